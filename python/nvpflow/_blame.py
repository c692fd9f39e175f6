"""Which columns make a row unlikely: `blame`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _core, _frames, _hints
from nvpflow._spec import bounds_of
from nvpflow.conditioned import ConditionedFlow
from nvpflow.flow import Flow

Array = NDArray[Any]

_SAMPLES = 2048  # of the flow, whose quantiles are the values that are tried first
_QUANTILES = 33
_FINER = 15  # values between the neighbours of the best so far, in each of the later rounds
_ROUNDS = 3  # each makes the step an eighth of what it was
_ELEMENTS = 1 << 20  # of the rows that are scored at once


@_hints.explained
def blame(flow: Flow | ConditionedFlow, x: ArrayLike) -> Any:
    """Tell which columns make a row unlikely: by how much log p would rise if one column had its likeliest value.

    ``blame[i, j] = max over t of log p(x_i with column j set to t) - log p(x_i)``, in nats: the other columns stay as
    they are, so that the value is judged given them. The log-density of column j given the others differs by
    the same number, because its normalization does not depend on t. It is never negative, and no unit of a column is in
    it, so that columns can be compared. For a Gaussian with precision matrix P it is ``(P (x - mean))_j^2 / (2 P_jj)``,
    half the squared distance from the conditional mean in conditional standard deviations.

    Parameters
    ----------
    flow
        The flow; one with a context under one, ``flow.condition(c)``.
    x
        Rows [B, D] or one row [D], as `Flow.log_probability` takes them.

    Returns
    -------
    ndarray [B, D] or [D], or DataFrame
        Nats, of the flow's dtype; for a DataFrame of pandas one with the same index and columns. NaN for a row that
        holds NaN or infinity. inf where log p is -inf and one value would make it finite.

    Raises
    ------
    TypeError, ValueError
        `flow` is not a Flow, or as `Flow.log_probability`.

    Notes
    -----
    Where two columns do not fit each other, either could be mended and both are blamed. Where columns are independent,
    the row's entries add up to the distance from the mode's log p.

    The largest value is searched for: 33 quantiles of 2,048 samples of the flow are tried, then three times 15 values
    around the best. That is about 80 evaluations of log p for each column of each row. What lies beyond the samples is
    not tried, and a narrow second mode can be missed: then the result is too small. The values that are tried are
    always the same, and a row's result does not depend on its batch.

    Examples
    --------
    >>> import numpy as np, nvpflow
    >>> x = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    >>> flow = nvpflow.build(3, hidden_sizes=(16,), standardize=True)
    >>> history = flow.fit(x, epochs=3, progress=False)
    >>> int(nvpflow.blame(flow, np.float32([0.1, 5.0, -0.3])).argmax())
    1
    """
    if not isinstance(flow, (Flow, ConditionedFlow)):
        raise TypeError(f"flow is {_checks.describe(flow)}, expected a Flow")
    if isinstance(flow, Flow) and flow.spec.context_size:
        raise ValueError("flow has a context, and rows are blamed under one; expected flow.condition(context)")
    given, _ = _frames.read("x", x, flow.column_names)
    log_p = np.asarray(_core._host_array(flow.log_probability(given)), dtype=np.float64)  # and checks the rest
    rows = np.asarray(_core._host_array(given))
    if isinstance(given, (list, tuple)) or rows.dtype not in (np.float32, np.float64):
        wide = flow.spec._takes_float64_rows and not np.can_cast(rows.dtype, flow.spec.dtype, "safe")
        rows = rows.astype(np.float64 if wide else flow.spec.dtype)
    single = rows.ndim == 1
    rows = np.atleast_2d(rows)
    found = np.empty(rows.shape, flow.spec.dtype)
    tried = _first_values(flow, rows.dtype)
    step = max(1, _ELEMENTS // (_QUANTILES * rows.shape[1]))
    for at in range(0, len(rows), step):
        part = slice(at, at + step)
        found[part] = _gains(flow, rows[part], np.atleast_1d(log_p)[part], tried)
    if single:
        return found[0]
    frame: Any = x
    return type(frame)(found, index=frame.index, columns=frame.columns) if hasattr(frame, "iloc") else found


def _first_values(flow: Flow | ConditionedFlow, dtype: np.dtype[Any]) -> Array:
    """Return quantiles [_QUANTILES, D] of the flow's samples, the least and the largest among them."""
    wide = "float64" if dtype == np.float64 and flow.spec._takes_float64_rows else None
    samples = np.asarray(_core._host_array(flow.sample(_SAMPLES, seed=0, dtype=wide)), dtype=np.float64)
    samples = samples[np.isfinite(samples).all(axis=1)]
    if not len(samples):
        raise ValueError("flow has no finite samples, expected some to compare rows with")
    return np.quantile(samples, np.linspace(0, 1, _QUANTILES), axis=0).astype(dtype)


def _gains(flow: Flow | ConditionedFlow, rows: Array, log_p: Array, tried: Array) -> Array:
    """Return what each row would gain by the best value of each column [B, D]."""
    finite = np.isfinite(rows).all(axis=1)
    log_p = np.where(finite & np.isnan(log_p), -np.inf, log_p)  # so far out that the arithmetic has overflown
    gains = np.full(rows.shape, np.nan)
    for column in range(rows.shape[1]):
        best = np.maximum(_best(flow, rows[finite], column, tried[:, column]), log_p[finite])
        with np.errstate(invalid="ignore"):
            gain = best - log_p[finite]
        gains[finite, column] = np.where(np.isnan(gain), 0.0, gain)  # -inf whatever this column is
    return gains


def _best(flow: Flow | ConditionedFlow, rows: Array, column: int, values: Array) -> Array:
    """Return the largest log p [B] that rows reach by their column `column`."""
    tried = np.broadcast_to(values, (len(rows), len(values)))
    best = np.full(len(rows), -np.inf)
    every = np.arange(len(rows))
    for _ in range(1 + _ROUNDS):
        scores = _scores(flow, rows, column, tried)
        at = scores.argmax(axis=1)
        best = np.maximum(best, scores[every, at])
        low = tried[every, np.maximum(at - 1, 0)]
        high = tried[every, np.minimum(at + 1, tried.shape[1] - 1)]
        tried = np.linspace(low, high, _FINER + 2, axis=1, dtype=rows.dtype)
    return best


def _scores(flow: Flow | ConditionedFlow, rows: Array, column: int, values: Array) -> Array:
    """Return log p [B, V] of rows with one column set to each of the values [B, V]; -inf where it is not finite."""
    bounds = bounds_of(flow.spec)
    changed = np.repeat(rows[:, None, :], values.shape[1], axis=1)
    changed[:, :, column] = np.rint(values) if bounds is not None and column in bounds.discrete else values
    log_p = np.asarray(flow.log_probability(changed.reshape(-1, rows.shape[1])), dtype=np.float64)
    return np.where(np.isfinite(log_p), log_p, -np.inf).reshape(values.shape)
