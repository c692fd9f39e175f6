"""Contexts as Python has them: what may come in, and what is said of their numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _core, _data, _frames
from nvpflow._core import FlowSpec

Array = NDArray[Any]

_JUDGED_ROWS = 1 << 16  # of a context, whose quantiles are taken


def rows(
    value: ArrayLike | None,
    count: int,
    spec: FlowSpec,
    name: str = "context",
    *,
    names: Sequence[str] | None = None,
    one_for_all: bool = True,
) -> Array | None:
    """Return contexts [count, C] of the spec's dtype, a row for each of so many rows; None for a spec without one.

    Parameters
    ----------
    value
        [count, C] or, with `one_for_all`, [C]: an array or a frame of numbers, rounded to the dtype.
    count
        How many rows.
    spec
        The flow's.
    name
        Of the argument, for messages.
    names
        That the columns of a frame must have: the flow's `context_names`.
    one_for_all
        Whether one context may stand for all rows.

    Raises
    ------
    TypeError, ValueError
        It is missing, superfluous, of another shape, no numbers, or too large for the dtype.
    """
    size = spec.context_size
    if size == 0:
        if value is None:
            return None
        kind = type(value).__name__
        raise ValueError(f"{name} is {kind}, expected None: the flow has no context; build it with context_size=")
    wanted = f"[{count}, {size}], a row for each row" + (f", or [{size}], one for all" if one_for_all else "")
    if value is None:
        raise ValueError(f"{name} is missing, expected {wanted}: the flow is a density p(x | context)")
    given, _ = _frames.read(name, value, names, "context_names")
    found = _checks.numbers(name, _core._host_array(given))
    if found.shape != (count, size) and not (one_for_all and found.shape == (size,)):
        raise ValueError(f"{name} has shape {found.shape}, expected {wanted}")
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(np.broadcast_to(found, (count, size)), dtype=spec.dtype)
    if (np.isinf(rounded) & np.isfinite(found)).any():
        raise ValueError(f"{name} holds a number too large for {spec.dtype}")
    return rounded


def warn(value: ArrayLike | None, names: Sequence[str] | None, spec: FlowSpec) -> None:
    """Warn once of what makes columns of a context to train on, as it was given, of little use to the flow."""
    if value is None:
        return
    given = _checks.numbers("context", _core._host_array(value))
    if len(given) == 0 or not np.isfinite(given).all():
        return
    spread, largest = given.std(axis=0, dtype=np.float64), np.abs(given).max(axis=0).astype(np.float64)
    found = []

    def add(columns: NDArray[np.bool_], text: str) -> None:
        at = np.flatnonzero(columns)
        if len(at):
            called = ", ".join(_checks.shortened(repr(names[j])) if names else str(j + 1) for j in at[:5])
            found.append(f"column {called}{f' and {len(at) - 5} more' if len(at) > 5 else ''} {text}")

    with np.errstate(all="ignore"):
        steps = float(np.finfo(spec.dtype).eps) * largest / spread
    coarse = (spread > 0) & (steps > _data.COARSE)
    if coarse.any():
        apart = f"neighbouring numbers of {spec.dtype} are up to {steps[coarse].max():.1g} standard deviations apart"
        add(coarse, f"keeps few digits, {apart}: subtract an offset in float64, in training and in each call")
    add((spread == 0) & (len(given) > 1), "is constant: the flow learns nothing of it")
    if spec.standardize_context:
        add(
            _is_far(given, spread),
            "has far rows that make its standard deviation: the others come out alike; mend them",
        )
    if found:
        text = "; ".join(found)
        warnings.warn(f"context: {text}", _data.DataWarning, stacklevel=_data._outside())


def _is_far(given: Array, spread: Array) -> NDArray[np.bool_]:
    """Tell of which columns [C] a few far rows decide the standard deviation, as of columns of x (`statistics.hpp`)."""
    some = _data.drawn(given, _JUDGED_ROWS)
    low, first, middle, third, high = np.quantile(some, [0.01, 0.25, 0.5, 0.75, 0.99], axis=0)
    with np.errstate(all="ignore"):
        unit = (third - first) / 1.349
        farthest = np.abs(given - middle).max(axis=0)
        far: NDArray[np.bool_] = (unit > 0) & (spread > 10 * unit) & (farthest > 5 * (high - low))
    return far


def varying(context: Array) -> NDArray[np.bool_]:
    """Tell which columns [C] of contexts [N, C] are not constant."""
    varies: NDArray[np.bool_] = (context != context[:1]).any(axis=0)
    return varies
