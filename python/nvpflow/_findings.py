"""What a report tells of a flow: its likelihood of data beside a Gaussian's, samples, latents and rounding errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow._data import check_data
from nvpflow._text import counted
from nvpflow.flow import Flow
from nvpflow.plot import some_rows

Array = NDArray[Any]

EXAMINED = 100_000  # rows for everything but the likelihood, which all rows have
SAMPLES = 20_000
LEAST_ROWS = 10


def gaussian_log_prob(train: Array, rows: Array) -> NDArray[np.float64]:
    """Return log p [B] in nats under the Gaussian with the training rows' mean and full covariance.

    Parameters
    ----------
    train
        Rows [N, D] to take mean and covariance from.
    rows
        Rows [B, D].

    Raises
    ------
    numpy.linalg.LinAlgError
        The covariance of `train` is singular.
    """
    if len(train) <= train.shape[1]:
        raise np.linalg.LinAlgError(f"{len(train)} rows of {train.shape[1]} columns have a singular covariance")
    train, rows = train.astype(np.float64), rows.astype(np.float64)
    covariance = np.cov(train, rowvar=False)
    std = np.sqrt(np.diag(covariance))
    if not std.all() or np.linalg.matrix_rank(covariance / np.outer(std, std), hermitian=True) < len(std):
        raise np.linalg.LinAlgError("the covariance of train is singular")
    factor = np.linalg.cholesky(covariance)
    white = np.linalg.solve(factor, (rows - train.mean(axis=0)).T)
    log_det = 2 * np.log(np.diag(factor)).sum()
    density = -0.5 * (rows.shape[1] * np.log(2 * np.pi) + log_det + np.square(white).sum(axis=0))
    return np.asarray(density, dtype=np.float64)


@dataclass
class Findings:
    """What the page tells, and the arrays that its pictures show."""

    rows: Array  # [N, D], the finite ones
    numbers: NDArray[np.int64]  # [N], of these among all rows
    total: int
    names: list[str]
    log_p: NDArray[np.float64]  # [N]
    gaussian: NDArray[np.float64] | None  # [N]
    gaussian_source: str
    samples: Array
    samples_log_p: NDArray[np.float64]
    latents: NDArray[np.float64]  # of the rows examined
    distance: NDArray[np.float64]  # [D], Kolmogorov-Smirnov, data and samples
    accuracy: list[tuple[str, float, float]]  # name, median, largest
    round_trip: float
    notices: list[str] = field(default_factory=list)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Tell the rows whose log-density is a finite number."""
        return np.isfinite(self.log_p)


def finite_rows(rows: Array) -> Array:
    return rows[np.isfinite(rows).all(axis=1)]


def examine(flow: Flow, data: Array, train: Array | None, names: list[str] | None) -> Findings:
    finite = np.isfinite(data).all(axis=1)
    rows = data if finite.all() else data[finite]
    if len(rows) < LEAST_ROWS:
        raise ValueError(f"data has {counted(len(rows), 'row')} of finite numbers, expected at least {LEAST_ROWS}")
    notices = []
    if len(rows) < len(data):
        bad = np.flatnonzero(~finite)
        notices.append(
            f"{counted(len(bad), 'row')} of {len(data):,} with NaN or infinite values left out "
            f"(row {', '.join(map(str, bad[:5]))}{', …' if len(bad) > 5 else ''}, counted from 0)."
        )
    notices += _about_columns(flow, rows, names)
    log_p = flow.log_probability(rows).astype(np.float64)
    if not np.isfinite(log_p).any():
        raise ValueError(
            "no row of data has a finite log-density under this flow; are they on the scale of its training data?"
        )
    if wild := int(np.sum(~np.isfinite(log_p))):
        notices.append(
            f"{counted(wild, 'row')} so far out that the log-density is not a finite number; not in the means."
        )
    samples = flow.sample(SAMPLES, seed=0, dtype=rows.dtype)
    if wild := len(samples) - len(finite_rows(samples)):
        notices.append(f"{counted(wild, 'sample')} of {SAMPLES:,} not finite, and left out.")
        samples = finite_rows(samples)
    gaussian, source = _gaussian(rows, train)
    some = some_rows(rows, EXAMINED)
    latents = flow.forward(some)[0].astype(np.float64)
    accuracy, round_trip = _accuracy(flow, some)
    return Findings(
        rows=rows,
        numbers=np.flatnonzero(finite),
        total=len(data),
        names=names or [f"column {i}" for i in range(data.shape[1])],
        log_p=log_p,
        gaussian=gaussian,
        gaussian_source=source,
        samples=samples,
        samples_log_p=flow.log_probability(samples).astype(np.float64),
        latents=latents[np.isfinite(latents).all(axis=1)],
        distance=np.array([_kolmogorov_smirnov(some[:, i], samples[:, i]) for i in range(data.shape[1])]),
        accuracy=accuracy,
        round_trip=round_trip,
        notices=notices,
    )


def _about_columns(flow: Flow, rows: Array, names: list[str] | None) -> list[str]:
    """Return what stands in the way of a density of these rows, as `nvpflow.check_data` finds it."""
    found = check_data(rows, names=names, dtype=flow.spec.dtype, standardize=flow.spec.standardize).findings
    told = [finding for finding in found if finding.kind not in ("rows", "outliers")]  # the page shows rows far out
    texts = [f"{finding.text[:1].upper()}{finding.text[1:]}; {finding.remedy}." for finding in told]
    return texts if len(texts) <= 5 else [*texts[:5], f"{len(texts) - 5} findings more: nvpflow.check_data shows them."]


def _gaussian(rows: Array, train: Array | None) -> tuple[NDArray[np.float64] | None, str]:
    """Return log p of the rows under a Gaussian that was not fitted to them, and how that was done."""
    try:
        if train is not None:
            return gaussian_log_prob(train, rows), "fitted to the training rows"
        first = np.random.default_rng(0).permutation(len(rows)) < len(rows) // 2
        density = np.empty(len(rows))
        density[first] = gaussian_log_prob(rows[~first], rows[first])
        density[~first] = gaussian_log_prob(rows[first], rows[~first])
        return density, "fitted to one half of the rows and scored on the other, in turns"
    except np.linalg.LinAlgError:
        return None, "not defined: the covariance is singular (a constant or redundant column, or too few rows)"


def _kolmogorov_smirnov(data: Array, samples: Array) -> float:
    """Return the largest difference between two empirical distribution functions."""
    if not len(samples):
        return math.nan
    data, samples = np.sort(data), np.sort(samples)
    both = np.concatenate([data, samples])
    cdfs = [np.searchsorted(part, both, side="right") / len(part) for part in (data, samples)]
    return float(np.max(np.abs(cdfs[0] - cdfs[1])))


def _accuracy(flow: Flow, rows: Array) -> tuple[list[tuple[str, float, float]], float]:
    """Return lines of name, typical and largest value; and the largest error of the way to the latents and back."""
    z, log_det = flow.forward(rows)
    back, log_det_back = flow.inverse(z, with_log_det=True, dtype=rows.dtype)
    std = rows.std(axis=0, dtype=np.float64)
    std[std == 0] = 1
    with np.errstate(invalid="ignore"):
        there = np.abs(back.astype(np.float64) - rows) / std
        dets = np.abs(log_det.astype(np.float64) + log_det_back)
        noise = np.random.default_rng(0).standard_normal((len(rows), rows.shape[1])).astype(z.dtype)
        other = np.abs(flow.forward(flow.inverse(noise, dtype=rows.dtype))[0].astype(np.float64) - noise)
    lines = [
        ("data → latent → data, in standard deviations of the column", there),
        ("latent → data → latent, standard normal noise", other),
        ("log-determinants there and back, their sum (nats)", dets),
    ]
    if flow.spec.dtype == "float32":
        exact = flow.to("cpu", "float32", "full").astype("float64").log_probability(rows.astype(np.float64))
        ours = flow.log_probability(rows).astype(np.float64)
        with np.errstate(invalid="ignore"):
            rounding = np.abs(ours - exact) / (1 + np.abs(exact))
        lines.append(("log p beside float64 arithmetic, relative to 1 + |log p|", rounding))
    return [(name, _median(e), _largest(e)) for name, e in lines], _largest(there)


def _median(errors: Array) -> float:
    finite = errors[np.isfinite(errors)]
    return float(np.median(finite)) if finite.size else math.nan


def _largest(errors: Array) -> float:
    return math.inf if not np.isfinite(errors).all() else float(errors.max())
