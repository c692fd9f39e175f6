"""Probabilities of the unit cells that integers of discrete columns stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _bounds, _checks, _core
from nvpflow._model import Model, _where
from nvpflow._spec import FlowSpec, bounds_of
from nvpflow.layers import Bounds

Array = NDArray[Any]


def log_mass(flow: Model, x: ArrayLike, context: ArrayLike | None, points: int) -> NDArray[np.float64]:
    """Return what `Flow.log_mass` does."""
    count = _checks.integer("points", points)
    if count < 1:
        raise ValueError(f"points is {count}, expected at least 1")
    middle = np.asarray(_core._host_array(flow.log_prob(x, context=context)), np.float64)  # which checks x
    bounds = bounds_of(flow.spec)
    if bounds is None or not bounds.discrete:
        return middle
    wide = flow.spec.dtype == "float64" or flow.spec._takes_float64_rows
    rows = np.array(_core._host_array(x), np.float64 if wide else np.float32)
    columns = list(bounds.discrete)
    density, total = _continuous(flow, bounds), np.full(middle.shape, -np.inf)
    for shift in _lattice(len(columns), count):
        moved = rows.copy()
        moved[..., columns] = moved[..., columns] + shift.astype(rows.dtype)
        with np.errstate(invalid="ignore"):
            total = np.logaddexp(total, density.log_prob(moved, context=context))
    can_be = _bounds.contains(bounds, np.atleast_2d(rows)).all(axis=1).reshape(middle.shape)
    found: NDArray[np.float64] = np.where(can_be | np.isnan(middle), total - math.log(count), -np.inf)
    return found


def _continuous(flow: Model, bounds: Bounds) -> Model:
    """Return the flow with the same weights whose columns hold any number."""
    old, (first, *behind) = flow.spec, flow.spec.layers
    plain = [] if all(bounds.is_free(j) for j in range(old.input_size)) else [dataclasses.replace(bounds, discrete=())]
    assert first == bounds
    spec = FlowSpec.from_layers(
        old.input_size,
        [*plain, *behind],
        dtype=old.dtype,
        context_size=old.context_size,
        standardize_context=old.standardize_context,
        base=old.base,
    )
    return flow._copy(spec, flow._copy_state(), _where(flow.device, flow.precision, flow.weights))


def _lattice(columns: int, count: int) -> Iterator[NDArray[np.float64]]:
    """Yield points of the cell (-1/2, 1/2)^columns, one more even set the more they are.

    The first coordinate is that of equal steps. The others go round by irrational shares of the cell: powers of the
    positive root of g^(d + 1) = g + 1, as the golden ratio is of one column.
    """
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / columns)  # of d = columns - 1 further coordinates
    shares = root ** -np.arange(1.0, columns)
    for k in range(count):
        yield np.append((k + 0.5) / count, (0.5 + k * shares) % 1) - 0.5
