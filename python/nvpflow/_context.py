"""Contexts as Python has them: what may come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _core, _frames
from nvpflow._core import FlowSpec

Array = NDArray[Any]


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
        way = _checks.reshaped(name, found.shape, size)
        raise ValueError(f"{name} has shape {found.shape}, expected {wanted}{way}")
    with np.errstate(over="ignore"):
        rounded = found.astype(spec.dtype)
    large = np.isinf(rounded) & np.isfinite(found)
    if large.any():
        at = np.unravel_index(int(large.argmax()), found.shape)
        where = ", ".join(map(str, at))
        raise ValueError(f"{name}[{where}] is {found[at]:g}, expected a number that {spec.dtype} holds")
    return np.ascontiguousarray(np.broadcast_to(rounded, (count, size)))


def varying(context: Array) -> NDArray[np.bool_]:
    """Tell which columns [C] of contexts [N, C] are not constant."""
    varies: NDArray[np.bool_] = (context != context[:1]).any(axis=0)
    return varies
