"""Whether an imported flow is its source: both are computed on the same rows, in float64 and in the flow's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks, _core
from nvpflow._bases import Base, Uniform
from nvpflow._import_report import HOME, Differences, ImportReport
from nvpflow.flow import Flow
from nvpflow.importers._recipe import Array, Recipe, flow_of

ROWS = 256
"""Half of them drawn at random, half samples of the source."""
_SEED = 20261130
_EXACT, _CLOSE = 1e-9, 1e-6
_MOST_CONDITION = 1e4
"""More does not excuse a difference: an import that is wrong is wrong by more than what 1e-6 times it allows."""
_STEP = 1e-8
"""By which rows are changed to see what a rounding comes to, in proportion to 1 + their size."""


class Peer(Protocol):
    """The source, computed by its own library in float64. context: [N, C], or None where there is none."""

    def forward(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        """Return latents [N, D] as nvpflow's base has them, and log-determinants [N]."""

    def inverse(self, z: Array, context: Array | None) -> Array:
        """Return data [N, D]."""

    def log_prob(self, x: Array, context: Array | None) -> Array:
        """Return log p [N]."""


class ParityError(ValueError):
    """An imported flow is not its source.

    Attributes
    ----------
    report
        The `ImportReport`, which says by how much.
    """

    def __init__(self, message: str, report: ImportReport) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.report)


ParityError.__module__ = HOME


def imported(recipe: Recipe, peer: Peer | str, *, dtype: Any, check: bool) -> Flow:
    """Return the flow of a recipe with its report.

    Parameters
    ----------
    recipe
        What the importer has read.
    peer
        The source, or why it cannot be computed.
    dtype
        Of the flow, "float32" or "float64".
    check
        Raise `ParityError` where the flow is not its source.
    """
    name = _checks.dtype_name("dtype", dtype)
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype is '{name}', expected one of float32, float64")
    check = _checks.boolean("check", check)
    double = flow_of(recipe)
    flow = double if name == "float64" else double.astype(name)
    report = _unchecked(recipe, name, peer) if isinstance(peer, str) else _measured(recipe, double, flow, peer)
    flow._set_import_report(report.to_json())
    if check and report.verdict == "different":
        raise ParityError(_difference_in_words(report), report)
    return flow


def _described(recipe: Recipe, dtype: str) -> dict[str, Any]:
    return {
        "library": recipe.library,
        "version": recipe.version,
        "nvpflow_version": _core.__version__,
        "dtype": dtype,
        "layers": recipe.layers(),
        "dropped": recipe.notes("dropped"),
        "folded": recipe.notes("folded"),
        "assumed": tuple(recipe.assumed),
    }


def _unchecked(recipe: Recipe, dtype: str, reason: str) -> ImportReport:
    nothing: dict[str, Any] = {"rows": 0, "failed_rows": 0, "nonfinite_rows": 0}
    nothing |= {"condition": None, "float64": None, "in_dtype": None}
    return ImportReport(verdict="unchecked", unchecked=reason, **_described(recipe, dtype), **nothing)


def _measured(recipe: Recipe, double: Flow, flow: Flow, peer: Peer) -> ImportReport:
    rows = _Rows(double, peer)
    in_double = rows.compare(double)
    condition = rows.conditions()
    verdict = "exact" if in_double.within(_EXACT, condition) else "close"
    if not in_double.within(_CLOSE, condition):
        verdict = "different"
    return ImportReport(
        verdict=verdict,
        rows=ROWS,
        failed_rows=int(np.sum(in_double.failed)),
        nonfinite_rows=int(np.sum(in_double.nonfinite)),
        condition=float(np.max(condition)),
        float64=in_double.largest(),
        in_dtype=None if flow is double else rows.compare(flow).largest(),
        unchecked=None,
        **_described(recipe, flow.spec.dtype),
    )


def _difference_in_words(report: ImportReport) -> str:
    found = report.float64
    assert found is not None
    back = "" if found.x is None else f", x by {found.x:.1e}"
    numbers = f"log p differs by {found.log_prob:.1e}, z by {found.z:.1e}, log_det by {found.log_det:.1e}{back}"
    wrong = f", and {report.nonfinite_rows:,} rows are finite on one side only" if report.nonfinite_rows else ""
    return (
        f"the imported flow is different from its source: {numbers}{wrong}, relative, in float64; {report.source} may "
        "compute otherwise than the versions known here: see .report of this error, and report a fault; check=False "
        "returns the flow as it is"
    )


class _Rows:
    """The rows that both are computed on, and the source's results."""

    def __init__(self, flow: Flow, peer: Peer) -> None:
        spec, self.peer = flow.spec, peer
        self.double = flow
        half, random = ROWS // 2, np.random.default_rng(_SEED)
        self.noise, drawn = (_draw(random, spec.base, (half, spec.input_size)) for _ in range(2))
        size = spec.context_size
        self.contexts = _draw_contexts(random, flow) if size else None
        contexts = self._of_samples()
        samples = _by_rows(peer.inverse, self.noise, contexts, spec.input_size, needed=False)
        ours = flow.inverse(self.noise, context=contexts)
        self.x = np.concatenate([drawn, np.where(np.isfinite(samples), samples, ours)])

    def _of_samples(self) -> Array | None:
        return None if self.contexts is None else self.contexts[ROWS // 2 :]

    def compare(self, flow: Flow) -> _Compared:
        """Compare a flow with the source at the rows as the flow's dtype has them."""
        dtype, columns = np.dtype(flow.spec.dtype), flow.spec.input_size
        x, noise = self.x.astype(dtype), self.noise.astype(dtype)
        contexts = None if self.contexts is None else self.contexts.astype(dtype)
        ours = _computed(flow, x, noise, contexts)
        double, below = x.astype(np.float64), noise.astype(np.float64)
        given = None if contexts is None else contexts.astype(np.float64)
        found = _by_rows(lambda rows, c: np.column_stack(self.peer.forward(rows, c)), double, given, columns + 1)
        of_samples = None if given is None else given[ROWS // 2 :]
        theirs = {
            "log_prob": _by_rows(lambda rows, c: self.peer.log_prob(rows, c)[:, None], double, given, 1),
            "z": found[:, :-1],
            "log_det": found[:, -1:],
            "x": _behind_nothing(_by_rows(self.peer.inverse, below, of_samples, columns, needed=False)),
        }
        back = flow.inverse(flow.forward(x, context=contexts)[0], context=contexts)
        return _Compared(ours, theirs, _relative(back.astype(np.float64), double))

    def conditions(self) -> Array:
        """Return by how much a change of each row is amplified in the float64 flow [N], at least 1."""
        signs = np.random.default_rng(_SEED + 1).choice([-_STEP, _STEP], (3, ROWS, self.x.shape[1]))
        found = np.ones(ROWS)
        given = _computed(self.double, self.x, self.noise, self.contexts)
        for step in signs:
            x = self.x + step * (1 + np.abs(self.x))
            noise = self.noise + step[: len(self.noise)] * (1 + np.abs(self.noise))
            moved = _computed(self.double, x, noise, self.contexts)
            for name, values in given.items():
                change = np.max(_relative(moved[name], values), axis=1) / _STEP
                found = np.fmax(found, np.where(np.isfinite(change), change, 1.0))
        return np.minimum(found, _MOST_CONDITION)


class _Compared:
    """What both gave, by name, [N, anything]; NaN where there is nothing to compare."""

    def __init__(self, ours: dict[str, Array], theirs: dict[str, Array], round_trip: Array) -> None:
        known = {name: ~np.any(np.isnan(values), axis=1) for name, values in theirs.items()}
        self.has_inverse = bool(np.any(known["x"]))
        known["x"][: ROWS // 2 if self.has_inverse else ROWS] = True  # which has no rows there
        self.failed = ~np.all(list(known.values()), axis=0)
        self.differences, wrong = {}, []
        for name, values in theirs.items():
            same = values == ours[name]  # infinities, too
            both = np.isfinite(values) & np.isfinite(ours[name])
            wrong.append(np.any(~same & ~both & ~np.isnan(values), axis=1))
            with np.errstate(invalid="ignore"):
                self.differences[name] = np.where(same, 0.0, _relative(ours[name], values))
        self.nonfinite = np.any(wrong, axis=0)
        self.round_trip = round_trip

    def within(self, limit: float, condition: Array) -> bool:
        """Tell whether all differences are, and there is something to compare."""
        if np.any(self.nonfinite) or np.all(self.failed):
            return False
        return all(not np.any(values > limit * condition[:, None]) for values in self.differences.values())

    def largest(self) -> Differences:
        """Return the largest of each."""
        found: dict[str, Any] = {
            name: float(np.max(values, initial=0.0, where=np.isfinite(values)))
            for name, values in {**self.differences, "round_trip": self.round_trip}.items()
        }
        return Differences(**found | ({} if self.has_inverse else {"x": None}))


def _computed(flow: Flow, x: Array, noise: Array, contexts: Array | None) -> dict[str, Array]:
    z, log_det = flow.forward(x, context=contexts)
    log_p = flow.log_prob(x, context=contexts)
    back = flow.inverse(noise, context=None if contexts is None else contexts[ROWS // 2 :])
    found = {"log_prob": log_p[:, None], "z": z, "log_det": log_det[:, None], "x": _behind_nothing(back)}
    return {name: values.astype(np.float64) for name, values in found.items()}


def _behind_nothing(values: Array) -> Array:
    """Put rows of samples where the samples are among all rows: there are none in the first half."""
    return np.concatenate([np.full((ROWS - len(values), values.shape[1]), np.nan), values])


def _relative(values: Array, expected: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        found: Array = np.abs(values - expected) / (1 + np.abs(expected))
    return found


def _draw(random: np.random.Generator, base: Base, shape: tuple[int, int]) -> Array:
    if isinstance(base, Uniform):
        return random.uniform(base.low, base.high, shape)
    return random.normal(size=shape)


def _draw_contexts(random: np.random.Generator, flow: Flow) -> Array:
    """Return contexts [N, C] that are standard normal where they enter the networks."""
    drawn: Array = random.normal(size=(ROWS, flow.spec.context_size))
    if not flow.spec.standardize_context:
        return drawn
    mean, log_std = (flow.parameters()[f"context.{name}"] for name in ("mean", "log_std"))
    found: Array = mean + np.exp(log_std) * drawn
    return found


def _by_rows(
    call: Callable[[Array, Array | None], NDArray[Any]],
    rows: Array,
    contexts: Array | None,
    columns: int,
    *,
    needed: bool = True,
) -> Array:
    """Return what a source gives for rows; NaN for those that it cannot compute, none of which may be all if needed."""
    try:
        return np.asarray(call(rows, contexts), np.float64).reshape(len(rows), columns)
    except Exception as error:
        if len(rows) == 1:
            return np.full((1, columns), np.nan)
        # Some libraries refuse a batch for the sake of one row.
        parts = [(rows[i : i + 1], None if contexts is None else contexts[i : i + 1]) for i in range(len(rows))]
        found = np.concatenate([_by_rows(call, row, context, columns) for row, context in parts])
        if needed and np.all(np.isnan(found)):
            raise ValueError(
                f"the source fails on every row: {type(error).__name__}: {error}; expected a flow that computes log p "
                "of rows [N, D]"
            ) from error
        return found
