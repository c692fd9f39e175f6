"""Rows of a flow weighted to a target known by its log-density: `importance`, and `check_modes`, which looks beyond."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _bounds, _checks, _core, _hints
from nvpflow._bases import NORMAL
from nvpflow._spec import bounds_of
from nvpflow._target import LogDensity, Target
from nvpflow.conditioned import ConditionedFlow
from nvpflow.layers import Bounds

Array = NDArray[Any]
AnyFlow = _core.Flow | ConditionedFlow

_BLOCK = 1 << 15  # rows of one call of log_density, at most
_FAR_BELOW = np.log(100.0)
_VISIBLE, _SURE = 0.01, 2.0  # missed share that is called dropped: so much, and so many standard errors
_UNRELIABLE_K = 0.7  # Vehtari et al. (2024): above, the error of an importance estimate is no guide
_MOST_KNOWN = 1000


@dataclass(frozen=True, eq=False, repr=False)
class Importance:
    """Rows of a flow q and their weights p / q, from `importance`.

    Attributes
    ----------
    x
        The rows [n, D].
    log_weights
        ``log p(x) - log q(x)`` [n], float64; -inf where p is 0.
    log_evidence
        The estimate of log Z, Z the integral of p: the logarithm of the weights' mean.
    log_evidence_error
        Its standard error, by the delta method. It presumes that q reaches wherever p has mass, and that the weights'
        variance is finite (`pareto_k`).
    ess
        Effective number of rows: ``(sum w)^2 / sum w^2``, from 1 to n.
    pareto_k
        The tail index of the weights, of the generalized Pareto distribution of Zhang and Stephens (2009) as Vehtari et
        al. (2024) fit it. Below 0.5 the variance is finite; above 0.7 no estimate here is to be trusted. NaN below 25
        rows.
    """

    x: Array
    log_weights: NDArray[np.float64]
    log_evidence: float
    log_evidence_error: float
    ess: float
    pareto_k: float

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weights [n], with sum 1."""
        return _normalized(self.log_weights)

    def mean(self, function: Callable[[Array], ArrayLike] | None = None) -> tuple[Array, Array]:
        """Return the mean of a function over the target, and its standard error.

        Parameters
        ----------
        function
            Of the rows [n, D], with values [n] or [n, K]. None: the rows themselves. Where the target is 0 its values
            count for nothing, whatever they are.

        Returns
        -------
        mean, error : ndarray of float64
            [] or [K].

        Raises
        ------
        TypeError, ValueError
            `function` is no function, or what it returns is not a number, or numbers, for each row.
        """
        values = self._values(function)
        counts = self.weights > 0
        values = values[counts]
        weights = self.weights[counts].reshape((-1,) + (1,) * (values.ndim - 1))
        mean = (weights * values).sum(axis=0)
        return mean, np.sqrt((weights**2 * (values - mean) ** 2).sum(axis=0))

    def _values(self, function: Callable[[Array], ArrayLike] | None) -> NDArray[np.float64]:
        """Return a function's values [n] or [n, ...] of the rows."""
        if function is None:
            return self.x.astype(np.float64)
        if not callable(function):
            raise TypeError(f"function is {_checks.describe(function)}, expected a function of rows [n, D], or None")
        name, n = "what function returned", len(self.x)
        values = _checks.numbers(name, _core._host_array(function(self.x)))
        if values.ndim == 0 or len(values) != n:
            raise ValueError(f"{name} has shape {values.shape}, expected [{n}] or [{n}, K], a value for each row")
        return values.astype(np.float64)

    def resample(self, n: int, seed: int = 0) -> Array:
        """Return n rows [n, D] drawn by weight, with replacement: rows of the target where `ess` is far above n."""
        draw = np.random.default_rng(_checks.integer("seed", seed, unsigned=True))
        return self.x[draw.choice(len(self.x), size=_checks.count("n", n), p=self.weights)]

    def __repr__(self) -> str:
        """Return the figures in a line or two."""
        text = (
            f"Importance: log evidence {self.log_evidence:.4f} +- {self.log_evidence_error:.4f} nats, "
            f"{self.ess:,.0f} effective of {len(self.x):,} rows ({self.ess / len(self.x):.1%}), "
            f"Pareto k {self.pareto_k:.2f}"
        )
        if self.pareto_k > _UNRELIABLE_K:
            text += f"\nThe weights have no finite variance (k above {_UNRELIABLE_K}): trust none of these figures."
        return text


@_hints.explained
def importance(
    flow: AnyFlow,
    log_density: LogDensity,
    n: int = 10_000,
    *,
    context: ArrayLike | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> Importance:
    """Draw rows from a flow and weight them to a target: its evidence with an error, and means under it.

    Parameters
    ----------
    flow
        A `Flow`, or a `ConditionedFlow`, which needs no `context`.
    log_density
        As of `Flow.fit_density`, or a function that returns log p [B] alone. It may be -inf where the target is 0.
    n
        Rows, at least 2.
    context
        Of a flow with a context: one [C].
    temperature
        Of the proposal, as of `Flow.sample`: above 1 it reaches further out than the flow does.
    seed
        Of the rows: ``flow.sample(n, seed=seed)`` draws the same. Give another one than `Flow.fit_density` has had.

    Returns
    -------
    Importance
        The rows, their weights and the figures.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, or what `log_density` has returned: NaN, inf, another shape; or it is 0 everywhere. So is a
        flow with discrete columns refused, whose samples' exact density is not known.

    Examples
    --------
    >>> import numpy as np, nvpflow
    >>> flow = nvpflow.build(2, standardize=False)
    >>> nvpflow.importance(flow, lambda x: -0.5 * (x**2).sum(axis=1), 1000)  # log 2 pi = 1.8379
    Importance: log evidence 1.8... nats, ... effective of 1,000 rows (...%), Pareto k ...
    """
    proposal = _Proposal(flow, log_density, context)
    rows = _checks.count("n", n)
    if rows < 2:
        raise ValueError(f"n is {rows}, expected at least 2 rows")
    drawn = proposal.draw(rows, _checks.integer("seed", seed, unsigned=True), temperature)
    return _weighted(drawn.x, drawn.log_p - drawn.log_q)


@dataclass(frozen=True, eq=False, repr=False)
class ModeCheck:
    """What `check_modes` has found. Printed, it says so in sentences.

    Attributes
    ----------
    missed
        The share of the target where the flow's density is less than a hundredth of the target's.
    missed_error
        Its standard error.
    log_evidence, log_evidence_error
        log Z of all proposals together.
    log_evidence_of_flow, log_evidence_of_flow_error
        log Z of the flow's rows alone, which do not know what the flow has left out.
    excess
        For each row of `known` [K], ``log p(x) - log q(x) - log Z``: by how many nats the flow's density is below the
        target's there. Empty where none were given.
    pareto_k
        As of `Importance`, of all proposals together: above 0.7 the check itself is not to be trusted.
    dropped
        `missed` is above 1 % by more than two standard errors.
    """

    missed: float
    missed_error: float
    log_evidence: float
    log_evidence_error: float
    log_evidence_of_flow: float
    log_evidence_of_flow_error: float
    excess: NDArray[np.float64]
    pareto_k: float

    @property
    def dropped(self) -> bool:
        """Whether the flow leaves out a part of the target that can be seen."""
        return self.missed - _SURE * self.missed_error > _VISIBLE

    def __repr__(self) -> str:
        """Return what was found, in sentences."""
        lines = [
            "ModeCheck: " + ("the flow leaves out a part of the target" if self.dropped else "no mode is seen missing"),
            f"  share of the target that it leaves out  {self.missed:.2%} +- {self.missed_error:.2%}",
            f"  log evidence, all proposals             {self.log_evidence:.4f} +- {self.log_evidence_error:.4f} nats",
            f"  log evidence, the flow's rows           {self.log_evidence_of_flow:.4f} +- "
            f"{self.log_evidence_of_flow_error:.4f} nats",
        ]
        if self.excess.size:
            lines.append(f"  largest excess at a known row           {self.excess.max():.1f} nats")
        if self.pareto_k > _UNRELIABLE_K:
            lines.append(f"  The proposals' weights have Pareto k {self.pareto_k:.2f}: the check is not to be trusted.")
        if not self.dropped:
            near = "neither the flow, tempered where it can be, nor a known row comes near"
            lines.append(f"  A mode that {near} cannot be seen.")
        return "\n".join(lines)


@_hints.explained
def check_modes(
    flow: AnyFlow,
    log_density: LogDensity,
    n: int = 10_000,
    *,
    known: ArrayLike | None = None,
    temperature: float = 4.0,
    context: ArrayLike | None = None,
    seed: int = 0,
) -> ModeCheck:
    """Look for parts of a target that a flow has left out, as reverse KL does with modes far from each other.

    The target is integrated by rows of several proposals together: the flow, and the flow at a higher `temperature`.
    Where rows are `known`, normal distributions around them, of the flow's own covariance, are the third. Each row is
    weighted by the target over the mean of the proposals' densities (Veach and Guibas, 1995). A row in a mode that the
    flow lacks then has a bounded weight. What share of the target is where the flow has less than a hundredth of its
    density is an ordinary estimate with an error.

    What it cannot see: a mode that no proposal comes near. At a temperature the flow's map carries latents from further
    out, which need not come to where another mode is. Rows that you know are the better check, one in each mode. They
    may be the ends of short chains from many starts, maxima that an optimizer finds, or draws of a prior that fit.

    Parameters
    ----------
    flow, log_density, context
        As of `importance`.
    n
        Rows of each proposal, at least 2.
    known
        Rows [K, D] where the target has mass as far as you know, at most 1,000; inside of the flow's bounds.
    temperature
        Of the second proposal; above 1.
    seed
        Of the rows.

    Returns
    -------
    ModeCheck
        The share that is left out, and the evidence with and without it.

    Raises
    ------
    TypeError, ValueError
        As of `importance`; or the flow's base has no temperature, and no row is known.
    """
    proposal = _Proposal(flow, log_density, context)
    count, number = _checks.count("n", n), _checks.integer("seed", seed, unsigned=True)
    if count < 2:
        raise ValueError(f"n is {count}, expected at least 2 rows")
    hot = _checks.real("temperature", temperature)
    if not hot > 1:
        raise ValueError(f"temperature is {hot:g}, expected a number above 1")
    given = proposal.known_rows(known)
    has_temperature = proposal.flow.spec.base == NORMAL
    if not has_temperature and given is None:
        raise ValueError("known is None, expected rows [K, D]: the flow's base has no temperature to look further with")
    log_p_known = None if given is None else proposal.log_p(given)
    if log_p_known is not None and np.isneginf(log_p_known).any():
        row = int(np.flatnonzero(np.isneginf(log_p_known))[0])
        raise ValueError(f"known[{row}] is a row where log_density is -inf, expected rows where the target has mass")
    own = proposal.draw(count, number, None)
    parts = [own.x]
    densities: list[Callable[[Array], Array]] = [lambda x: proposal.log_q(x, None)]
    if has_temperature:
        parts.append(proposal.draw_rows(count, (number + 1) % 2**64, hot))
        densities.append(lambda x: proposal.log_q(x, hot))
    if given is not None:
        around = _Around(given, own.x, bounds_of(proposal.flow.spec))
        parts.append(around.draw(count, number))
        densities.append(around.log_density)
    x = np.concatenate(parts)
    log_each = np.stack([density(x) for density in densities])
    log_q = log_each[0]
    log_mixture = _log_sum(log_each) - np.log(len(densities))
    log_p = np.concatenate([own.log_p, proposal.log_p(x[count:])])
    all_of_them, alone = _weighted(x, log_p - log_mixture), _weighted(own.x, own.log_p - own.log_q)
    weights = all_of_them.weights
    missing = log_p > log_q + all_of_them.log_evidence + _FAR_BELOW
    missed = float(weights[missing].sum())
    excess = np.empty(0)
    if given is not None and log_p_known is not None:
        excess = log_p_known - proposal.log_q(given, None) - all_of_them.log_evidence
    return ModeCheck(
        missed=missed,
        missed_error=float(np.sqrt((weights**2 * (missing - missed) ** 2).sum())),
        log_evidence=all_of_them.log_evidence,
        log_evidence_error=all_of_them.log_evidence_error,
        log_evidence_of_flow=alone.log_evidence,
        log_evidence_of_flow_error=alone.log_evidence_error,
        excess=excess,
        pareto_k=all_of_them.pareto_k,
    )


# ---- a flow beside a target ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    x: Array
    log_q: NDArray[np.float64]
    log_p: NDArray[np.float64]


class _Proposal:
    """A flow under its context, and the target, in blocks of rows."""

    def __init__(self, flow: AnyFlow, log_density: LogDensity, context: ArrayLike | None) -> None:
        if not isinstance(flow, (_core.Flow, ConditionedFlow)):
            raise TypeError(f"flow is {_checks.describe(flow)}, expected a Flow or a ConditionedFlow")
        bounds = bounds_of(flow.spec)
        if bounds is not None and bounds.discrete:
            raise ValueError(
                "flow has discrete columns, expected none: the density that it gives of their samples is that of the "
                "middle of a cell, and weights by it are biased"
            )
        if isinstance(flow, ConditionedFlow):
            if context is not None:
                raise ValueError("context is given beside a ConditionedFlow, which has one; expected None")
        elif flow.spec.context_size or context is not None:
            if context is None:
                raise ValueError(
                    f"context is missing, expected one [{flow.spec.context_size}]: the flow is a density p(x | context)"
                )
            flow = ConditionedFlow(flow, context)
        self.flow: Any = flow
        self._target = Target(log_density, flow.spec)
        self._context = flow.context if isinstance(flow, ConditionedFlow) else None

    def draw(self, n: int, seed: int, temperature: float | None) -> _Drawn:
        """Return rows with both their log-densities."""
        x, log_q = self._room(n), np.empty(n)
        for start, stop in _blocks(n):
            x[start:stop], log_q[start:stop] = self.flow.sample_and_log_prob(
                stop - start, seed=seed, start=start, temperature=temperature
            )
        if not np.isfinite(log_q).all():
            row = int(np.flatnonzero(~np.isfinite(log_q))[0])
            raise ValueError(f"row {row} of the flow's sample has log q {log_q[row]}: its numbers leave the dtype")
        return _Drawn(x, log_q, self.log_p(x))

    def draw_rows(self, n: int, seed: int, temperature: float) -> Array:
        """Return rows alone."""
        x = self._room(n)
        for start, stop in _blocks(n):
            x[start:stop] = self.flow.sample(stop - start, seed=seed, start=start, temperature=temperature)
        return x

    def _room(self, n: int) -> Array:
        """Return memory for rows, all at once: too many are then refused before the first is drawn."""
        spec = self.flow.spec
        row = spec.input_size * np.dtype(spec.dtype).itemsize
        if n * row >= 2**63:
            raise MemoryError(f"n is {n} rows of {row} bytes: more than can be addressed")
        return np.empty((n, spec.input_size), dtype=spec.dtype)

    def log_q(self, x: Array, temperature: float | None) -> NDArray[np.float64]:
        """Return the flow's log-density of rows."""
        return np.asarray(self.flow.log_prob(x, temperature=temperature), dtype=np.float64)

    def log_p(self, x: Array) -> NDArray[np.float64]:
        """Return the target's; -inf is 0, all else is a number."""
        found = np.concatenate([self._log_p_of_block(x[start:stop]) for start, stop in _blocks(len(x))])
        wrong = np.isnan(found) | (found == np.inf)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            shown = ", ".join(f"{value:g}" for value in x[row][:6])
            raise ValueError(
                f"log_density gave {found[row]} for x = [{shown}{', ...' if x.shape[1] > 6 else ''}], expected a "
                "number, or -inf where the target is 0"
            )
        return found

    def _log_p_of_block(self, x: Array) -> Array:
        context = None if self._context is None else np.tile(self._context, (len(x), 1))
        return self._target.log_p(x.copy(), context)

    def known_rows(self, known: ArrayLike | None) -> Array | None:
        """Return the rows that a caller knows."""
        if known is None:
            return None
        spec = self.flow.spec
        found = _checks.numbers("known", _core._host_array(known))
        if found.ndim != 2 or found.shape[1] != spec.input_size or not 1 <= len(found) <= _MOST_KNOWN:
            wanted = f"[K, {spec.input_size}], 1 to {_MOST_KNOWN:,} rows"
            raise ValueError(f"known has shape {found.shape}, expected {wanted}")
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(found, dtype=spec.dtype)
        if not np.isfinite(rows).all():
            raise ValueError(f"known has rows with NaN or infinite values in {spec.dtype}, expected finite numbers")
        if (bounds := bounds_of(spec)) is not None:
            outside = np.argwhere(~_bounds.contains(bounds, rows))
            if len(outside):
                row, column = map(int, outside[0])
                raise ValueError(
                    f"known[{row}, {column}] is {rows[row, column]:g}, expected a number inside the flow's bounds, "
                    f"{_bounds.interval(bounds, column)}"
                )
        return rows


class _Around:
    """The mixture, of equal shares, of normal distributions around rows, with the covariance of other rows.

    Columns with bounds are normal where these have been taken away, so that no row is drawn outside.
    """

    def __init__(self, centres: Array, like: Array, bounds: Bounds | None) -> None:
        self._bounds, self._dtype = bounds, like.dtype
        self._centres = self._unbounded(centres)
        covariance = np.atleast_2d(np.cov(self._unbounded(like), rowvar=False))
        scale = np.trace(covariance) / len(covariance)
        self._root = np.linalg.cholesky(covariance + 1e-6 * max(scale, 1e-300) * np.eye(len(covariance)))

    def _unbounded(self, x: Array) -> NDArray[np.float64]:
        return x.astype(np.float64) if self._bounds is None else _bounds.forward(self._bounds, x)

    def draw(self, n: int, seed: int) -> Array:
        draw = np.random.default_rng(seed)
        which = draw.integers(len(self._centres), size=n)
        found = self._centres[which] + draw.normal(size=(n, len(self._root))) @ self._root.T
        if self._bounds is None:
            return found.astype(self._dtype)
        rows = _bounds.inverse(self._bounds, found).astype(self._dtype)
        kept: Array = np.clip(rows, *_bounds.inside(self._bounds, self._dtype))
        return kept

    def log_density(self, x: Array) -> NDArray[np.float64]:
        size = len(self._root)
        constant = -0.5 * size * np.log(2 * np.pi) - np.log(np.diag(self._root)).sum() - np.log(len(self._centres))
        centres = np.linalg.solve(self._root, self._centres.T)  # whitened, [D, K]
        found = []
        for start, stop in _blocks(len(x), _BLOCK // 16):
            y = self._unbounded(x[start:stop])
            rows = np.linalg.solve(self._root, y.T)
            squares = ((rows[:, None, :] - centres[:, :, None]) ** 2).sum(axis=0)  # [K, B]
            log_det = 0.0 if self._bounds is None else -np.log(_bounds.slopes(self._bounds, y)).sum(axis=1)
            found.append(_log_sum(-0.5 * squares) + constant + log_det)
        return np.concatenate(found)


# ---- weights ---------------------------------------------------------------------------------------------------------


def _blocks(n: int, size: int = _BLOCK) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, n)) for start in range(0, max(n, 1), size))


def _log_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(sum(exp(values))) over the first axis; -inf where all are."""
    largest = values.max(axis=0)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = shift + np.log(np.exp(values - shift).sum(axis=0))
    return found


def _normalized(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(log_weights - log_weights.max())
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def _weighted(x: Array, log_weights: NDArray[np.float64]) -> Importance:
    if not np.isfinite(log_weights.max()):
        raise ValueError("log_density gave -inf for every row: the flow is nowhere where the target is")
    weights, n = _normalized(log_weights), len(log_weights)
    ess = float(1 / (weights**2).sum())
    return Importance(
        x=x,
        log_weights=log_weights,
        log_evidence=float(_log_sum(log_weights) - np.log(n)),
        log_evidence_error=float(np.sqrt(max(n / ess - 1, 0.0) / (n - 1))),
        ess=ess,
        pareto_k=_pareto_k(log_weights),
    )


def _pareto_k(log_weights: NDArray[np.float64]) -> float:
    """Return the shape of the generalized Pareto distribution of the largest weights (Vehtari et al., 2024)."""
    n = len(log_weights)
    tail = min(n // 5, int(np.ceil(3 * np.sqrt(n))))
    if tail < 5:
        return float("nan")
    ordered = np.exp(np.sort(log_weights)[-tail - 1 :] - log_weights.max())
    exceedances = ordered[1:] - ordered[0]
    quarter = exceedances[int(tail / 4 + 0.5) - 1]
    if not quarter > 0:  # nearly equal weights have no tail; where most are 0, a few are all there is
        return 0.0 if ordered[0] > 0 else float("inf")
    # Zhang and Stephens, Technometrics 51 (2009): the posterior mean of theta under their prior, on a grid of it.
    grid = np.arange(1, 31 + int(np.sqrt(tail))) - 0.5
    theta = 1 / exceedances[-1] + (1 - np.sqrt((len(grid)) / grid)) / (3 * quarter)
    with np.errstate(divide="ignore", invalid="ignore"):
        shapes = np.log1p(-theta[:, None] * exceedances).mean(axis=1)
        profile = tail * (np.log(-theta / shapes) - shapes - 1)
    good = np.isfinite(profile)
    posterior = np.exp(profile[good] - profile[good].max())
    mean = float((theta[good] * posterior).sum() / posterior.sum())
    shape = float(np.log1p(-mean * exceedances).mean())
    prior = 10  # Vehtari et al.: as if so many weights of the tail had said 0.5
    return (tail * shape + prior * 0.5) / (tail + prior)
