"""What a report tells of a flow: its likelihood of data beside a Gaussian's, samples, latents and rounding errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvpflow import _bases, _frames, _scores
from nvpflow._data import check_data
from nvpflow._gaussian import gaussian_log_prob
from nvpflow._spec import begins_with_standardize, bounds_of
from nvpflow._text import counted
from nvpflow.certificate import Certificate, Deviation
from nvpflow.flow import Flow
from nvpflow.plot import some_rows

Array = NDArray[Any]

EXAMINED = 100_000  # rows for everything but the likelihood, which all rows have
CERTIFIED = 20_000  # rows for the certificate, which takes many passes
SAMPLES = 20_000
LEAST_ROWS = 10


@dataclass
class Findings:
    """What the page tells, and the arrays that its pictures show."""

    rows: Array  # [N, D], the finite ones
    numbers: NDArray[np.int64]  # [N], of these among all rows
    total: int
    names: list[str]
    contexts: Array | None  # [N, C], of a flow with a context
    context_names: list[str]
    log_p: NDArray[np.float64]  # [N]
    gaussian: NDArray[np.float64] | None  # [N]
    gaussian_source: str
    samples: Array  # drawn under contexts of the rows
    samples_contexts: Array | None
    samples_log_p: NDArray[np.float64]
    latents: NDArray[np.float64]  # of the rows examined, as normal scores
    distance: NDArray[np.float64]  # [D], Kolmogorov-Smirnov, data and samples
    certificate: Certificate  # of at most CERTIFIED of the rows; its errors are numbered as all rows are
    notices: list[str] = field(default_factory=list)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Tell the rows whose log-density is a finite number."""
        return np.isfinite(self.log_p)


class Rows(NamedTuple):
    """Rows [N, D] and their contexts [N, C], None of a flow without."""

    rows: Array
    contexts: Array | None = None

    def finite(self) -> NDArray[np.bool_]:
        """Tell the rows that hold no NaN and no infinity, nor do their contexts."""
        finite = np.isfinite(self.rows).all(axis=1)
        if self.contexts is not None:
            finite &= np.isfinite(self.contexts).all(axis=1)
        return np.asarray(finite)

    def those(self, which: NDArray[Any]) -> Rows:
        """Return some of them."""
        return Rows(self.rows[which], None if self.contexts is None else self.contexts[which])


def examine(
    flow: Flow, data: Rows, train: Rows | None, names: list[str] | None, context_names: list[str] | None = None
) -> Findings:
    finite = data.finite()
    rows, contexts = table = data if finite.all() else data.those(finite)
    total = len(data.rows)
    if len(rows) < LEAST_ROWS:
        raise ValueError(f"data has {counted(len(rows), 'row')} of finite numbers, expected at least {LEAST_ROWS}")
    notices = []
    if len(rows) < total:
        bad = np.flatnonzero(~finite)
        notices.append(
            f"{counted(len(bad), 'row')} of {total:,} with NaN or infinite values left out "
            f"(row {', '.join(map(str, bad[:5]))}{', …' if len(bad) > 5 else ''}, counted from 0)."
        )
    notices += _about_columns(flow, table, names, context_names)
    log_p = flow.log_probability(rows, context=contexts).astype(np.float64)
    if not np.isfinite(log_p).any():
        raise ValueError(
            "no row of data has a finite log-density under this flow; are they on the scale of its training data?"
        )
    if wild := int(np.sum(~np.isfinite(log_p))):
        where = "so far out that the log-density is not a finite number"
        if flow.spec._is_bounded:
            where = f"without a density, outside of the base, whose latents are {_bases.in_words(flow.spec.base)}"
        elif flow.spec._has_bounds:
            bounds = bounds_of(flow.spec)
            no_integer = ", no integer in a discrete one" if bounds is not None and bounds.discrete else ""
            where = f"without a density, outside of the bounds of their columns or on an edge{no_integer}, or far out"
        notices.append(f"{counted(wild, 'row')} {where}; not in the means.")
    drawn = _samples(flow, table)
    samples = drawn if (kept := drawn.finite()).all() else drawn.those(kept)
    if wild := len(drawn.rows) - len(samples.rows):
        notices.append(f"{counted(wild, 'sample')} of {SAMPLES:,} not finite, and left out.")
    gaussian, source = _gaussian(table, train)
    some, numbers = table.those(some_rows(np.arange(len(rows)), EXAMINED)), np.flatnonzero(finite)
    latents, _ = flow.forward(some.rows, context=some.contexts)
    latents = _scores.normal_scores(flow.spec.base, latents, flow.parameters())
    columns = range(flow.spec.input_size)
    return Findings(
        rows=rows,
        numbers=numbers,
        total=total,
        names=names or _frames.labels(None, len(columns)),
        contexts=contexts,
        context_names=context_names or _frames.labels(None, flow.spec.context_size, "context"),
        log_p=log_p,
        gaussian=gaussian,
        gaussian_source=source,
        samples=samples.rows,
        samples_contexts=samples.contexts,
        samples_log_p=flow.log_probability(samples.rows, context=samples.contexts).astype(np.float64),
        latents=latents[np.isfinite(latents).all(axis=1)],
        distance=np.array([_kolmogorov_smirnov(some.rows[:, i], samples.rows[:, i]) for i in columns]),
        certificate=_certified(flow, table, numbers),
        notices=notices,
    )


def _samples(flow: Flow, table: Rows) -> Rows:
    """Return rows of the flow, under the contexts of the table's rows where there are some, each about as often."""
    if table.contexts is None:
        return Rows(flow.sample(SAMPLES, seed=0, dtype=table.rows.dtype))
    which = np.resize(some_rows(np.arange(len(table.rows)), SAMPLES), SAMPLES)
    under = table.contexts[which]
    return Rows(flow.sample(1, seed=0, dtype=table.rows.dtype, context=under)[:, 0], under)


def _about_columns(flow: Flow, table: Rows, names: list[str] | None, context_names: list[str] | None) -> list[str]:
    """Return what stands in the way of a density of these rows, as `nvpflow.check_data` finds it."""
    found = check_data(
        table.rows,
        context=table.contexts,
        names=names,
        context_names=context_names,
        dtype=flow.spec.dtype,
        standardize=begins_with_standardize(flow.spec),
        bounds=bounds_of(flow.spec),
    ).findings
    told = [finding for finding in found if finding.kind not in ("rows", "outliers")]  # the page shows rows far out
    texts = [f"{finding.text[:1].upper()}{finding.text[1:]}; {finding.remedy}." for finding in told]
    return texts if len(texts) <= 5 else [*texts[:5], f"{len(texts) - 5} findings more: nvpflow.check_data shows them."]


def _gaussian(table: Rows, train: Rows | None) -> tuple[NDArray[np.float64] | None, str]:
    """Return log p of the rows under a Gaussian that was not fitted to them, and how that was done."""
    try:
        if train is not None:
            return _gaussian_of(train, table), "fitted to the training rows"
        first = np.random.default_rng(0).permutation(len(table.rows)) < len(table.rows) // 2
        halves = table.those(first), table.those(~first)
        density = np.empty(len(table.rows))
        density[first] = _gaussian_of(halves[1], halves[0])
        density[~first] = _gaussian_of(*halves)
        return density, "fitted to one half of the rows and scored on the other, in turns"
    except np.linalg.LinAlgError:
        return None, "not defined: the covariance is singular (a constant or redundant column, or too few rows)"


def _gaussian_of(train: Rows, rows: Rows) -> NDArray[np.float64]:
    contexts = None if train.contexts is None or rows.contexts is None else (train.contexts, rows.contexts)
    return gaussian_log_prob(train.rows, rows.rows, contexts)


def _kolmogorov_smirnov(data: Array, samples: Array) -> float:
    """Return the largest difference between two empirical distribution functions."""
    if not len(samples):
        return math.nan
    data, samples = np.sort(data), np.sort(samples)
    both = np.concatenate([data, samples])
    cdfs = [np.searchsorted(part, both, side="right") / len(part) for part in (data, samples)]
    return float(np.max(np.abs(cdfs[0] - cdfs[1])))


def _certified(flow: Flow, table: Rows, numbers: NDArray[np.int64]) -> Certificate:
    """Return the certificate of some of the rows; its errors have the numbers that their rows have among all."""
    chosen = some_rows(numbers, CERTIFIED)
    some = table.those(np.searchsorted(numbers, chosen))
    found = flow.certify(some.rows, context=some.contexts)

    def numbered(error: Deviation | None) -> Deviation | None:
        return None if error is None else replace(error, row=int(chosen[error.row]))

    errors = ("round_trip", "latent_round_trip", "log_prob", "log_det")
    changed: dict[str, Any] = {name: numbered(getattr(found, name)) for name in errors}
    return replace(found, **changed)
