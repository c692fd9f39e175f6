"""Weights of rows as Python has them: what may come in, what they come to, and quantiles by weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _core

Weights = NDArray[np.float64]


def read(value: ArrayLike, count: int, name: str = "sample_weight", *, is_part: bool = False) -> Weights:
    """Return weights [count] of so many rows as float64; `is_part`: other processes have the rest of them.

    Raises
    ------
    TypeError, ValueError
        They are no numbers, of another shape, negative, not finite, or, where they are all there are, all 0.
    """
    given = _checks.numbers(name, _core._host_array(value))
    if given.shape != (count,):
        raise ValueError(f"{name} has shape {given.shape}, expected ({count},), a weight for each row")
    weights = np.ascontiguousarray(given, dtype=np.float64)
    if weights.any() or not is_part:
        _core._check_weights(name, weights)
    return weights


def effective_rows(weights: Weights | None, count: int) -> float:
    """Return the number of rows without weights of which a mean is as certain (Kish, 1965)."""
    if weights is None:
        return float(count)
    shares = weights / weights.sum()
    return float(1 / np.square(shares).sum())


def that_count(weights: Weights, *tables: NDArray[Any] | None) -> NDArray[np.bool_]:
    """Tell which rows have a weight above 0; all of them where a table holds NaN, which is for others to refuse."""
    counts = weights > 0
    if counts.all() or all(table is None or np.isfinite(table).all() for table in tables):
        return counts
    return np.ones_like(counts)


def quantile(values: NDArray[np.float64], weights: Weights | None, shares: float | Sequence[float]) -> Any:
    """Return quantiles by weight, `numpy.quantile`'s where all weights are equal. One beside infinity may be NaN.

    The steps between the sorted numbers are as wide as the mean weight of the two that they are between.
    """
    with np.errstate(invalid="ignore"):
        if weights is None or np.isnan(values).any():  # of which it makes NaN
            return np.quantile(values, shares)
        order = np.argsort(values, kind="stable")
        ordered, steps = values[order], weights[order]
        places = np.concatenate([[0.0], np.cumsum((steps[1:] + steps[:-1]) / 2)])
        return np.interp(np.multiply(shares, places[-1]), places, ordered)
