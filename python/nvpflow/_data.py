"""One look at a table before a density is fitted to it: what makes one impossible, meaningless, or hard to find."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nvpflow import _bounds, _checks, _core, _frames, _hints, _html
from nvpflow._model import Model
from nvpflow._spec import begins_with_standardize, standardize_name
from nvpflow._text import counted
from nvpflow.layers import Bounds

Array = NDArray[Any]

COARSE = 1e-2
"""Share of a column's spread above which the distance of its floating-point numbers hides what a density could show."""
SHOWN_BY = "(nvpflow.check_data shows them as a table)"
_SAMPLE_ROWS = 20_000  # for medians, distinct values and dependence
_SAMPLE_VALUES = 1 << 17
_BLOCK_VALUES = 1 << 16
_SHOWN_ROWS = 5
_MOST_COLUMNS = 1000  # whose dependence is looked for: the work grows with the third power
_ROWS_PER_COLUMN = 30  # with fewer most flows lose to a Gaussian, and too few validation rows are left to tell
_OUTLYING = 10.0  # standard deviation in units of what the middle half of the rows says it is
_BEYOND = 5.0  # the farthest row in units of how far 98 % of the rows reach
_UNIT_SCALE = 10.0
_FEW = 50  # distinct values
_STEPS = 20.0  # integers whose standard deviation is more steps than this look continuous
_EVEN = 0.05  # of a step, by which numbers that were recorded in steps are off
_REPEATED = 0.1  # share of the rows with one and the same value
_DEPENDENT = 1e-4  # of its spread, to within which a column follows from others
_QUARTILES_PER_STD = 1.349  # of a normal distribution
_RARE = 0.01  # share of the rows below which what differs from all others is rare: beyond 10 standard deviations


class DataWarning(UserWarning):
    """A table holds what a density does badly with, or a flow fits it worse than a Gaussian does.

    The message names the columns, or both log-densities, and says what to do. `check_data` shows what was found in the
    columns as a table. ``warnings.simplefilter("ignore", nvpflow.DataWarning)`` silences it.
    """


@dataclass(frozen=True)
class Finding:
    """One thing about a table that stands in the way of a density.

    Attributes
    ----------
    kind
        "type", "missing", "rows", "outside", "constant", "copy", "dependent", "digits", "scale", "outliers",
        "repeated", "few", "integers", "ties" or "rare".
    severity
        "error": there is no density, and `Flow.fit` refuses the table. "warning": there is one, and it will not be what
        one expects.
    columns
        Their numbers, counted from 1; empty where it is the whole table.
    names
        Their names, or "column 3" where they have none.
    text
        What was found, in words.
    remedy
        What to do about it.
    figures
        The numbers behind it.
    argument
        What it is of: "x" or "context".
    """

    kind: str
    severity: str
    columns: tuple[int, ...]
    names: tuple[str, ...]
    text: str
    remedy: str
    figures: dict[str, float] = field(default_factory=dict)
    argument: str = "x"

    def __str__(self) -> str:
        """Return it as one sentence."""
        return f"{self.text}; {self.remedy}"


@dataclass(frozen=True, repr=False)
class DataReport:
    """What `check_data` found. Prints as a table.

    Attributes
    ----------
    rows
        How many there are.
    columns
        Names of the columns, or "column 1" and so on where they have none.
    findings
        All of them, errors first.
    context_columns
        Names of the columns of the context, "context column 1" and so on where they have none; empty without one.
    """

    rows: int
    columns: tuple[str, ...]
    findings: tuple[Finding, ...]
    context_columns: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings for which `Flow.fit` refuses the table."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings of which `Flow.fit` warns."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def _summary(self) -> str:
        table = f"DataReport: {counted(self.rows, 'row')} of {counted(len(self.columns), 'column')}"
        if self.context_columns:
            table += f" under {counted(len(self.context_columns), 'column')} of context"
        if self.ok:
            return f"{table}; nothing found"
        return f"{table}; {counted(len(self.errors), 'error')}, {counted(len(self.warnings), 'warning')}"

    def __repr__(self) -> str:
        """Return the table."""
        width = max((len(f.kind) for f in self.findings), default=0)
        return "\n".join([self._summary(), *(f"  {f.severity:<7}  {f.kind:<{width}}  {f}" for f in self.findings)])

    def _repr_html_(self) -> str:
        """Return a table of the findings, for notebooks."""
        lines = [(finding.severity, finding.kind, str(finding)) for finding in self.findings]
        return _html.table(self._summary(), ("", "kind", "finding") if lines else (), lines, text_from=1)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as numbers, strings, lists and dicts."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


@_hints.explained
def check_data(
    x: ArrayLike,
    *,
    context: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    context_names: Sequence[str] | None = None,
    dtype: DTypeLike = "float32",
    standardize: bool = True,
    bounds: Any = None,
    discrete: Any = None,
) -> DataReport:
    """Look at every column of a table for what stands in the way of a density, and say what to do about it.

    `Flow.fit` and the estimators do this by themselves: errors are raised, the rest is one `DataWarning`. It takes one
    pass over the rows; medians, distinct values and dependence are those of up to 20,000 rows drawn by a fixed seed.

    Parameters
    ----------
    x
        Rows [N, D]: an array of real numbers, or a frame of pandas, polars or pyarrow, whose column names are used.
    context
        Of a density p(x | context): [N, C], a row for each row of x.
    names, context_names
        Of the columns. None: those of a frame, else the columns are counted from 1.
    dtype
        Of the flow that is meant: float32 or float64.
    standardize
        Whether the flow standardizes its rows and their context. Without that columns of x must be near unit scale.
    bounds
        As `nvpflow.build` takes them. Columns with bounds are looked at behind these, as the flow sees them.
    discrete
        As `nvpflow.build` takes it: columns that may repeat their values, which are integers.

    Returns
    -------
    DataReport
        Its findings are of these kinds, errors first:

        * "type": a column is not numeric
        * "missing": NaN, infinity or a null
        * "outside": of the bounds, on an edge, or no integer in a discrete column
        * "constant", "copy" and "dependent": exactly, up to rounding
        * "rows": none

        These are warnings:

        * "dependent": to within 1e-4 of the spread
        * "digits": numbers too large beside their spread for their dtype
        * "scale": far from unit scale, or from the scale that the flow was trained on
        * "outliers": standard deviation and quartiles disagree by 10 and more
        * "repeated": a tenth of the rows and more hold one value
        * "few": few distinct values
        * "integers": all values are integers
        * "ties": other numbers come again, in more rows than chance explains
        * "rows": fewer than thirty for each column

        A context needs no density. Errors: "type" and "missing". Warnings: "constant", "digits", "outliers", and "rare"
        (all but one in a hundred rows hold one value).

    Raises
    ------
    TypeError, ValueError
        `x` or `context` is not a table, or names are not as many as its columns.

    Examples
    --------
    >>> import numpy as np, nvpflow
    >>> x = np.random.default_rng(0).normal(size=(1000, 2))
    >>> nvpflow.check_data(x)
    DataReport: 1,000 rows of 2 columns; nothing found
    """
    flow_dtype = _checks.dtype_name("dtype", dtype)
    if flow_dtype not in ("float32", "float64"):
        raise ValueError(f"dtype is {flow_dtype!r}, expected 'float32' or 'float64'")
    _checks.boolean("standardize", standardize)
    table = _Table.read("x", x, "names", names)
    layer = _bounds.checked(bounds, len(table.labels), table.names, discrete)
    layer = None if layer is None else _bounds.of_columns(layer, table.good)
    look = _look_at(table.rows, table.labels, table.good, flow_dtype, standardize, framed=table.framed, bounds=layer)
    found = [*table.found, *look]
    beside = None
    if context is not None:
        beside = _Table.read("context", context, "context_names", context_names)
        if len(beside.rows) != len(table.rows):
            raise ValueError(f"context has {len(beside.rows):,} rows, x {len(table.rows):,}; expected one for each row")
        look = _look_at_context(beside.rows, beside.labels, beside.good, flow_dtype, standardize, framed=beside.framed)
        found += [*beside.found, *look]
    order = {"error": 0, "warning": 1}
    findings = tuple(sorted(found, key=lambda f: order[f.severity]))
    return DataReport(len(table.rows), tuple(table.labels), findings, tuple(beside.labels) if beside else ())


@dataclass
class _Table:
    """The argument of `check_data`: its columns of numbers [N, d], their places `good`, and the kinds of the others."""

    rows: Array
    good: list[int]
    labels: list[str]
    names: list[str] | None
    found: list[Finding]
    framed: bool

    @classmethod
    def read(cls, name: str, value: Any, names_name: str, names: Sequence[str] | None) -> _Table:
        """Read the argument of this name, and that which names its columns."""
        expected, columns = ("[N, D]", "column") if name == "x" else ("[N, C]", "context column")
        bad, given, frame = [], None, _frames.inspect(value, name)
        if frame is None:
            _frames.refuse(name, value, "column_names" if name == "x" else "context_names")
            rows = _checks.numbers(name, _core._host_array(value))
            if rows.ndim != 2:
                way = _checks.reshaped(name, rows.shape, 1) if name == "context" else ""
                raise ValueError(f"{name} has shape {rows.shape}, expected {expected}{way}")
            count = rows.shape[1]
            good = list(range(count))
        else:
            bad, given, count = frame.problems(), frame.names, frame.width
            unusable = {problem.column for problem in bad}
            good = [i for i in range(count) if i not in unusable]
            rows = frame.array(good)
        if count == 0:
            raise ValueError(f"{name} has shape {rows.shape}, expected {expected} with at least one column")
        listed = _checks.column_names(names_name, names) or given
        if listed is not None and len(listed) != count:
            raise ValueError(f"{names_name} holds {len(listed)} names, expected {count}, one for each column")
        labels = _frames.labels(listed, count, columns)
        found = [
            Finding(
                p.kind,
                "error",
                (p.column + 1,),
                (labels[p.column],),
                f"{labels[p.column]} {p.text}",
                p.remedy,
                {},
                name,
            )
            for p in bad
        ]
        return cls(rows, good, labels, listed, found, frame is not None)


def require_density(
    rows: Array,
    names: Sequence[str] | None,
    dtype: str,
    standardize: bool,
    name: str = "x",
    *,
    trained: tuple[Array, Array] | None = None,
    framed: bool = False,
    heavy_tails: bool = False,
    allow_degenerate: bool = False,
    bounds: Bounds | None = None,
    effective: float | None = None,
) -> DataReport:
    """Raise ValueError where `rows` [N, D] have no density, naming everything; warn once of everything else.

    `allow_degenerate`: warn, too, of columns that follow from others.

    `trained`: mean and standard deviation of the flow's standardize layer, where it has been set; see `trained_scales`.
    `framed`: whether they came in a frame. `heavy_tails`: far rows are what the flow's base is for. `bounds`: the
    flow's. `effective`: how many rows they are good for by weight.
    """
    labels = _frames.labels(names, rows.shape[1])
    if len(rows) == 0:
        return DataReport(0, tuple(labels), ())  # which the training loop refuses
    places = list(range(rows.shape[1]))
    found = _look_at(
        rows, labels, places, dtype, standardize, trained, framed=framed, bounds=bounds, effective=effective
    )
    if allow_degenerate:
        found = [replace(f, severity="warning") if f.kind in ("copy", "dependent") else f for f in found]
    report = DataReport(len(rows), tuple(labels), tuple(f for f in found if not (heavy_tails and f.kind == "outliers")))
    if report.errors:
        raise ValueError(_message(name, report.errors))
    if report.warnings:
        text = f"{_message(name, report.warnings)} {SHOWN_BY}"
        warnings.warn(text, DataWarning, stacklevel=_outside())
    return report


def refusal(name: str, table: Any) -> str | None:
    """Return one message with all that rules out a density of a table, if some of its fields are not numbers.

    None if the table holds only finite numbers, or if it is not a table.
    """
    try:
        errors = check_data(table).errors
    except (TypeError, ValueError):
        return None
    kinds = {finding.kind for finding in errors}
    if kinds == {"type"}:
        return _frames.not_numbers(name, table)
    return _message(name, errors) if kinds & {"type", "missing"} else None


def warn_of_context(
    context: Array, names: Sequence[str] | None, dtype: str, standardize: bool, trained: tuple[Array, Array] | None
) -> None:
    """Warn once of columns of a training context [N, C] from which the flow can learn little.

    `trained`: mean and standard deviation that the flow standardizes contexts by, where these have been set. What has
    NaN or infinity is left to the training loop, which refuses it.
    """
    labels = _frames.labels(names, context.shape[1])
    found = _look_at_context(context, labels, list(range(len(labels))), dtype, standardize, trained)
    if found and not any(finding.severity == "error" for finding in found):
        warnings.warn(f"{_message('context', found)} {SHOWN_BY}", DataWarning, stacklevel=_outside())


def _message(name: str, findings: Iterable[Finding]) -> str:
    """Return all findings as sentences, one a line; those of one kind, whose remedies are one, together."""
    by_remedy: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_remedy.setdefault((finding.kind, finding.remedy), []).append(finding)
    lines = []
    for (_, remedy), group in by_remedy.items():
        texts = [finding.text for finding in group]
        shown = texts if len(texts) <= 5 else [*texts[:5], f"and {len(texts) - 5} columns more"]
        lines.append(f"{', '.join(shown)}; {remedy}")
    if len(lines) == 1:
        return f"{name}: {lines[0]}"
    return f"{name}, {len(lines)} things:\n" + "\n".join(f"  {line}." for line in lines)


def _outside() -> int:
    """Return the stacklevel of the first caller outside of the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "nvpflow":
        level, frame = level + 1, frame.f_back
    return level


# ------------------------------------------------------------------------------------------------------- measuring


class _Measures:
    """What one pass over rows of finite and other numbers tells of each column.

    Attributes
    ----------
    rows, count
        All rows, and those whose numbers are all finite, which everything but `missing` is of.
    low, high
        The least and the largest number [D].
    missing
        How many are NaN or infinite [D].
    bad_rows
        The first of the rows that hold such.
    """

    def __init__(self, columns: int) -> None:
        self.rows = self.count = 0
        self.low, self.high = np.full(columns, np.inf), np.full(columns, -np.inf)
        self.missing = np.zeros(columns, np.int64)
        self.bad_rows: list[int] = []
        self._shift: Array | None = None
        self._total, self._square = np.zeros(columns), np.zeros(columns)

    def add(self, block: Array, middle: Array | None = None) -> None:
        """Take rows [D, n] in float64, which it may overwrite; `middle` [D] is near their means, if it is known."""
        first = self.rows
        self.rows += block.shape[1]
        least, largest = block.min(axis=1), block.max(axis=1)
        if not (np.isfinite(least).all() and np.isfinite(largest).all()):
            finite = np.isfinite(block)
            self.missing += np.count_nonzero(~finite, axis=1)
            good = finite.all(axis=0)
            self.bad_rows += (np.flatnonzero(~good)[: _SHOWN_ROWS - len(self.bad_rows)] + first).tolist()
            block = block[:, good]
            least, largest = block.min(axis=1, initial=np.inf), block.max(axis=1, initial=-np.inf)
        self.count += block.shape[1]
        self.low, self.high = np.minimum(self.low, least), np.maximum(self.high, largest)
        if self._shift is None:
            if middle is None and block.shape[1] == 0:
                return
            self._shift = np.median(block, axis=1) if middle is None else middle
        block -= self._shift[:, None]
        self._total += block.sum(axis=1)
        self._square += np.einsum("ij,ij->i", block, block)

    def mean(self) -> Array:
        """Return the means [D]."""
        mean: Array = self._total / max(1, self.count)
        return mean if self._shift is None else mean + self._shift

    def std(self) -> Array:
        """Return the standard deviations [D]."""
        count = max(1, self.count)
        std: Array = np.sqrt(np.maximum(self._square / count - (self._total / count) ** 2, 0))
        return std


def _sample_size(columns: int) -> int:
    """Return how many rows are looked at for medians, distinct values and dependence."""
    return min(_SAMPLE_ROWS, max(_SAMPLE_VALUES // columns, 4 * columns))


def drawn(rows: Array, wanted: int) -> Array:
    """Draw rows: one at random of each of equally long stretches, so that no period of the rows meets theirs."""
    at = np.arange(len(rows))
    if wanted < len(rows):
        at = ((np.arange(wanted) + np.random.default_rng(0).random(wanted)) * (len(rows) / wanted)).astype(np.int64)
    return rows[np.minimum(at, len(rows) - 1)]


def _blocks(rows: Array, bounds: Bounds | None = None) -> Iterator[Array]:
    """Yield the columns of some rows, behind their bounds, as float64 [D, n]."""
    step = max(1, _BLOCK_VALUES // rows.shape[1])
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        yield np.array((block if bounds is None else _bounds.forward(bounds, block)).T, dtype=np.float64, order="C")


class _Outside:
    """Rows that lie outside of their bounds or on an edge: how many of each column, and which come first."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.rows = self._seen = 0
        self.counts = np.zeros(len(bounds.low), np.int64)
        self.first: list[list[int]] = [[] for _ in bounds.low]
        self.bad_rows: list[int] = []  # the first that hold NaN or infinity
        self.example = np.zeros(len(bounds.low))

    def leave_out(self, rows: Array) -> Array:
        """Return those of rows [n, D] that are inside, or hold NaN or infinity, and count the others."""
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        if not finite.all():
            self.bad_rows += (np.flatnonzero(~finite)[: _SHOWN_ROWS - len(self.bad_rows)] + self._seen).tolist()
        bad = ~_bounds.contains(self.bounds, rows) & finite[:, None]
        for j in np.flatnonzero(bad.any(axis=0)):
            at = np.flatnonzero(bad[:, j])
            if self.counts[j] == 0:
                self.example[j] = rows[at[0], j]
            self.counts[j] += len(at)
            self.first[j] += (at[: _SHOWN_ROWS - len(self.first[j])] + self._seen).tolist()
        self._seen += len(rows)
        out = bad.any(axis=1)
        self.rows += int(np.count_nonzero(out))
        return rows[~out] if out.any() else rows


def _without_outside(rows: Array, outside: _Outside) -> Array:
    """Return the rows that are inside: the array itself where all are."""
    step = max(1, _BLOCK_VALUES // rows.shape[1])
    parts = [outside.leave_out(rows[first : first + step]) for first in range(0, len(rows), step)]
    return np.concatenate(parts) if outside.rows else rows


def _look_at(
    rows: Array,
    labels: list[str],
    numbers: list[int],
    dtype: str,
    standardize: bool,
    trained: tuple[Array, Array] | None = None,
    *,
    framed: bool = False,
    bounds: Bounds | None = None,
    effective: float | None = None,
) -> list[Finding]:
    """Look at rows [N, D]; `numbers` are the places of their columns in the whole table, which `labels` name."""
    columns = rows.shape[1]
    measures, sample = _Measures(columns), rows[:0]
    again, outside = None, None
    if columns and bounds is not None:
        outside = _Outside(bounds)
        rows = _without_outside(rows, outside)
    if columns:
        sample, again = drawn(rows, _sample_size(columns)), partial(_blocks, rows, bounds)
    look = _Look(
        *(measures, sample, rows.dtype, labels, numbers, dtype, standardize),
        trained=trained,
        again=again,
        framed=framed,
        outside=outside,
        effective=effective,
    )
    with np.errstate(all="ignore"):
        for block in _blocks(rows, bounds) if columns else ():
            measures.add(block, look.middle)
    measures.rows = len(rows)
    return look.findings()


def _look_at_context(
    context: Array,
    labels: list[str],
    numbers: list[int],
    dtype: str,
    standardize: bool,
    trained: tuple[Array, Array] | None = None,
    *,
    framed: bool = False,
) -> list[Finding]:
    """Look at contexts [N, C]; arguments as of `_look_at`."""
    columns = context.shape[1]
    if columns == 0 or len(context) == 0:
        return []
    measures, sample = _Measures(columns), drawn(context, _sample_size(columns))
    look = _ContextLook(
        *(measures, sample, context.dtype, labels, numbers, dtype, standardize), trained=trained, framed=framed
    )
    with np.errstate(all="ignore"):
        for block in _blocks(context):
            measures.add(block, look.middle)
    return look.findings()


class RunningLook:
    """`check_data` of rows, or of contexts, that come in blocks: one pass over them, in memory that does not grow.

    Dependence is that of the rows drawn, at most 20,000, and the text says so where there are more.
    """

    def __init__(
        self,
        names: Sequence[str] | None,
        columns: int,
        dtype: str,
        standardize: bool,
        trained: tuple[Array, Array] | None = None,
        *,
        of_context: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        """Take the columns' names and the flow's dtype; `trained`: what it standardizes them by, mean and deviation."""
        self._outside = None if bounds is None else _Outside(bounds)
        labels = _frames.labels(names, columns, "context column" if of_context else "column")
        self._options = labels, list(range(columns)), dtype, standardize
        self._look = _ContextLook if of_context else _Look
        self._trained = trained
        self._measures = _Measures(columns)
        self._dtype = np.dtype(dtype)
        self._random = np.random.default_rng(0)
        self._keys, self._sample = np.empty(0), np.empty((0, columns))

    def add(self, rows: Array) -> None:
        """Take rows [n, D]; all of one dtype."""
        self._dtype = rows.dtype
        if self._outside is not None:
            rows = self._outside.leave_out(rows)
        wanted = _sample_size(rows.shape[1])
        keys = self._random.random(len(rows))
        near = np.flatnonzero(keys < self._keys.max()) if len(self._keys) == wanted else np.arange(len(rows))
        keys = np.concatenate([self._keys, keys[near]])
        kept = np.sort(np.argsort(keys, kind="stable")[:wanted])
        self._keys, self._sample = keys[kept], np.concatenate([self._sample, rows[near]])[kept]
        with np.errstate(all="ignore"):
            for block in _blocks(rows, None if self._outside is None else self._outside.bounds):
                self._measures.add(block)

    def report(self) -> DataReport:
        """Return what was found so far."""
        labels = self._options[0]
        look = self._look(
            *(self._measures, self._sample, self._dtype, *self._options), trained=self._trained, outside=self._outside
        )
        return DataReport(self._measures.rows, tuple(labels), tuple(look.findings()))


def trained_scales(flow: Model) -> tuple[Array, Array] | None:
    """Return mean and standard deviation [D] of a flow's first standardize layer; None without one.

    They are of rows behind the flow's bounds, where it has some.
    """
    return _scales(flow, standardize_name(flow.spec)) if begins_with_standardize(flow.spec) else None


def trained_context_scales(flow: Model) -> tuple[Array, Array] | None:
    """Return the mean and standard deviation [C] that a flow standardizes its contexts by."""
    return _scales(flow, "context") if flow.spec.standardize_context else None


def _scales(flow: Model, layer: str) -> tuple[Array, Array] | None:
    parameters = flow.parameters()
    log_std = parameters[f"{layer}.log_std"]
    mean = parameters[f"{layer}.mean"] + np.asarray(parameters.get(f"{layer}.mean_low", 0), np.float64)
    return (mean, np.exp(log_std.astype(np.float64))) if mean.any() or log_std.any() else None


# --------------------------------------------------------------------------------------------------------- looking


class _Look:
    """One look at what was measured of a table, and at a sample of its rows [n, D].

    `numbers` are the places of the columns in the whole table, which `labels` name. `again` yields all rows once more;
    None: they are gone, and the sample has to do. `framed`: whether they came in a frame. `effective`: how many rows
    they are good for by weight; None: all.
    """

    _argument = "x"

    def __init__(
        self,
        measures: _Measures,
        sample: Array,
        own: np.dtype[Any],
        labels: list[str],
        numbers: list[int],
        dtype: str,
        standardize: bool,
        *,
        trained: tuple[Array, Array] | None = None,
        again: Callable[[], Iterator[Array]] | None = None,
        framed: bool = False,
        outside: _Outside | None = None,
        effective: float | None = None,
    ) -> None:
        self._measures, self._own, self._again, self._framed = measures, own, again, framed
        self._outside, self._bounds = outside, None if outside is None else outside.bounds
        self._effective = effective
        self._labels, self._numbers = labels, numbers
        self._standardize, self._trained, self._dtype = standardize, trained, dtype
        wide = own.name if own.kind == "f" else "float64"
        kept = wide if standardize else min(wide, dtype)  # "float32" < "float64"; a standardize layer takes both
        self._digits = kept if kept in ("float16", "float32", "float64") else "float64"
        self._eps = float(np.finfo(self._digits).eps)
        self._found: list[Finding] = []
        columns = np.array(sample.T, dtype=np.float64, order="C")
        self._given = columns[:, np.isfinite(columns).all(axis=0)]  # [D, n]
        self._sample = self._given  # behind bounds
        if self._bounds is not None:
            self._sample = np.ascontiguousarray(_bounds.forward(self._bounds, self._given.T).T)
        self._drawn = len(sample)
        with np.errstate(all="ignore"):
            self._percentiles = (
                np.percentile(self._sample, (25, 50, 75, 1, 99), axis=1)
                if self._sample.size
                else np.zeros((5, len(columns)))
            )

    @property
    def middle(self) -> Array:
        """The sample's medians [D]."""
        middle: Array = self._percentiles[1]
        return middle

    def findings(self) -> list[Finding]:
        rows, columns = self._measures.rows, len(self._sample)
        if self._outside is not None and self._outside.rows:
            self._report_outside(self._outside)
            if rows == 0:
                return self._found
        if rows == 0:
            self._add(
                "rows", "error", (), "no rows", f"give rows to learn from, {_ROWS_PER_COLUMN} for each column at least"
            )
            return self._found
        if columns == 0:
            return self._found
        self._low, self._high = self._measures.low, self._measures.high
        with np.errstate(all="ignore"):
            self._mean, self._std = self._measures.mean(), self._measures.std()
            if self._measures.count < rows:
                self._report_missing()
            if self._measures.count >= 2:  # one row tells nothing of a column
                self._columns()
                self._dependence()
        effective = rows if self._effective is None else self._effective
        if effective < _ROWS_PER_COLUMN * columns:
            by_weight = "" if effective == rows else f", by weight as good as {effective:.3g},"
            are = "s are" if rows > 1 else " is"
            text = f"{rows:,} row{are.replace(' ', f'{by_weight} ')} few for {columns:,} columns"
            remedy = (
                f"give {_ROWS_PER_COLUMN} for each column at least; with fewer a Gaussian is mostly the better "
                "density, and the validation rows are too few to tell"
            )
            self._add("rows", "warning", (), text, remedy, rows=rows, columns=columns)
        return sorted(self._found, key=lambda finding: finding.severity)  # "error" < "warning"

    def _add(self, kind: str, severity: str, at: Sequence[int], text: str, remedy: str, **figures: float) -> None:
        names = tuple(self._label(j) for j in at)
        numbers = tuple(self._numbers[j] + 1 for j in at)
        finite = {name: float(value) for name, value in figures.items() if np.isfinite(value)}
        self._found.append(Finding(kind, severity, numbers, names, text, remedy, finite, self._argument))

    def _label(self, column: int) -> str:
        return self._labels[self._numbers[column]]

    def _in_front(self, j: int, value: float) -> float:
        """Return a number of a column as it was given, in front of its bounds."""
        if self._bounds is None or self._bounds.is_free(j):
            return value
        row = np.zeros((1, len(self._low)))
        row[0, j] = value
        return float(_bounds.inverse(self._bounds, row)[0, j])

    def _report_outside(self, outside: _Outside) -> None:
        every = self._measures.rows + outside.rows
        for j in np.flatnonzero(outside.counts).tolist():
            count, shown = int(outside.counts[j]), ", ".join(map(str, outside.first[j]))
            more = ", ..." if count > len(outside.first[j]) else ""
            within = _bounds.interval(outside.bounds, j)
            discrete = j in outside.bounds.discrete
            beyond = f"does not hold {within}" if discrete else f"is outside of its bounds {within} or on an edge"
            text = (
                f"{self._label(j)} {beyond} in {count:,} of {every:,} rows (row{'s' * (count > 1)} {shown}{more}, "
                f"counted from 0; the first holds {outside.example[j]:g})"
            )
            remedy = (
                "round or remove such rows, make the bounds wider, or leave the column out of the discrete ones"
                if discrete
                else "remove or repair such rows, or make the bounds wider; where many rows hold the edge itself, give "
                "them a model of their own"
            )
            self._add("outside", "error", (j,), text, remedy, rows=count)

    def _report_missing(self) -> None:
        measures = self._measures
        bad, rows, missing = measures.rows - measures.count, measures.bad_rows, measures.missing
        if self._outside is not None:  # which has seen all rows
            rows = self._outside.bad_rows
        columns = np.flatnonzero(missing).tolist()
        where = _listed([f"{self._label(j)}: {missing[j]:,}" for j in columns])
        shown = ", ".join(map(str, rows)) + (", ..." if bad > len(rows) else "")
        text = (
            f"{bad:,} of {measures.rows:,} rows with NaN or infinite values (row{'s' * (bad > 1)} {shown}, counted "
            f"from 0; {where})"
        )
        given = self._argument
        # np.isfinite is neither true nor false of a frame's nulls, which would stay.
        way = f"{given}.dropna()" if self._framed else f"{given}[np.isfinite({given}).all(axis=1)]"
        remedy = f"remove or repair them: {way}"
        self._add("missing", "error", columns, text, remedy, rows=bad)

    # -- one column

    def _columns(self) -> None:
        spread = (self._percentiles[2] - self._percentiles[0]) / _QUARTILES_PER_STD
        self._varies = self._low < self._high
        for j in range(len(self._low)):
            if not self._varies[j]:
                self._constant(j)
                continue
            if not np.isfinite(self._std[j]):  # beyond float64: what standardizes refuses it
                continue
            coarse = self._coarse(j, float(spread[j]))
            self._outliers(j, float(spread[j]))
            if not coarse and (self._bounds is None or j not in self._bounds.discrete):
                self._repetitions(j)
            if not self._standardize:
                self._scale(j)
            elif self._trained is not None:
                self._other_units(j, float(spread[j]), *(float(values[j]) for values in self._trained))

    def _constant(self, j: int) -> None:
        text = f"{self._label(j)} is constant, {self._low[j]:g} in all rows (in {self._own})"
        remedy = "a column without variation has no density: remove it"
        self._add("constant", "error", (j,), text, remedy, value=self._low[j])

    def _coarse(self, j: int, spread: float) -> bool:
        """Tell whether neighbouring numbers are far apart beside the spread, that of all or of the middle half."""
        largest = max(abs(self._low[j]), abs(self._high[j]))
        ordinary = max(abs(self._percentiles[0][j]), abs(self._percentiles[2][j]))
        std = self._std[j]
        if self._eps * largest <= COARSE * std and self._eps * ordinary <= COARSE * spread:
            return False
        if self._eps * largest <= COARSE * std and spread == 0:
            return False
        if self._eps * largest <= COARSE * std:
            largest, std = ordinary, spread
        step = float(np.spacing(np.array(largest, self._digits)))
        text = (
            f"{self._label(j)} has lost digits: values of {largest:.3g} with a spread of {std:.2g}, of which "
            f"{self._digits} keeps steps of {step:.2g}"
        )
        remedy = (
            "subtract an offset in float64 before rounding to float32"
            if self._digits == "float32"
            else "subtract an offset where the values are made"
        )
        self._add("digits", "warning", (j,), text, remedy, largest=largest, spread=std, step=step)
        return True

    def _outliers(self, j: int, spread: float) -> None:
        """Report a few rows that are far beyond all others and make most of the standard deviation."""
        median, low, high = self._percentiles[[1, 3, 4], j]
        farthest = max(self._high[j] - median, median - self._low[j])
        ordinary = max(high - median, median - low)  # of 98 % of the rows
        if not self._std[j] > _OUTLYING * spread > 0 or not farthest > _BEYOND * ordinary:
            return
        ratio = self._std[j] / spread
        behind = "" if self._bounds is None or self._bounds.is_free(j) else " behind its bounds"
        middle, least, most = (self._in_front(j, float(v)) for v in (median, self._low[j], self._high[j]))
        text = (
            f"{self._label(j)} has outliers{behind}: its standard deviation is {ratio:.3g} times what its middle half "
            f"says (median {middle:.3g}, from {least:.3g} to {most:.3g})"
        )
        remedy = (
            "look at these rows and remove what is wrong; where such rows belong to the data, build the flow with "
            "base='student_t', or transform the column (log, arcsinh); fit leaves out what is beyond its "
            "max_deviation, and History.rows_left_out counts it"
        )
        figures = {"std": self._std[j], "spread": spread, "low": least, "high": most}
        self._add("outliers", "warning", (j,), text, remedy, **figures)

    def _repetitions(self, j: int) -> None:
        """Report values that come again and again, on which a density is unbounded."""
        values, std = np.sort(self._given[j]), self._std[j]
        low, high = self._low[j], self._high[j]
        if self._bounds is not None and not self._bounds.is_free(j):
            std, low, high = values.std(), values.min(initial=np.inf), values.max(initial=-np.inf)
        count = len(values)
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        distinct = len(starts)
        if count < 20 or 4 * distinct > 3 * count:
            return
        runs = np.diff(np.append(starts, count))
        share, often = float(runs.max() / count), float(values[starts[runs.argmax()]])
        integer = bool((values == np.rint(values)).all())
        say_so = "build the flow with discrete= for counts, which adds noise to them"
        figures = {"distinct": distinct, "share": share}
        if distinct <= _FEW and 4 * distinct <= count:
            what = f"{'integers' if integer else 'numbers'} from {low:g} to {high:g}"
            text = f"{self._label(j)} has {distinct} distinct values ({what}), on which a density is unbounded"
            noise = say_so if integer else "add uniform noise of one step to numbers that are rounded"
            remedy = f"make a category a context, or leave it out; {noise}"
            self._add("few", "warning", (j,), text, remedy, **figures)
        elif share >= _REPEATED:
            text = f"{self._label(j)} is {often:g} in {share:.0%} of the rows, where a density is unbounded"
            remedy = "fit the rows with and without this value apart, or leave the column out"
            self._add("repeated", "warning", (j,), text, remedy, value=often, **figures)
        elif integer and std < _STEPS and 4 * distinct <= count:
            text = f"{self._label(j)} holds integers, whose density is unbounded"
            self._add("integers", "warning", (j,), text, f"{say_so}, or leave it out", std=std, **figures)
        elif not integer:
            self._ties(j, values[starts], count, std, figures)

    def _ties(self, j: int, distinct: Array, count: int, std: float, figures: dict[str, Any]) -> None:
        """Report numbers that come again, but not those of steps so small that they look continuous."""
        gaps = np.diff(distinct)
        rounding = 8 * self._eps * float(np.abs(distinct).max())
        step = float(gaps[gaps > rounding].min(initial=np.inf))
        away = np.abs(gaps / step - np.rint(gaps / step))
        recorded = bool((away <= _EVEN + rounding / step).all())  # in steps
        if not np.isfinite(step) or (std >= _STEPS * step if recorded else not self._copies):
            return
        text = f"{self._label(j)} has {len(distinct):,} distinct values in {count:,} rows"
        remedy = "numbers that come again have no density: leave out rows that are copies, or fit by sample_weight"
        if recorded:
            text += f", in steps of {step:.3g}"
            remedy = "add uniform noise of one step to numbers that are rounded; see 'Discrete and rounded columns' in "
            remedy += "choosing.md"
        self._add("ties", "warning", (j,), f"{text}, on which a density is unbounded", remedy, step=step, **figures)

    @cached_property
    def _copies(self) -> bool:
        """Whether a quarter of the rows come again, as those of a sample drawn with replacement do."""
        rows = np.ascontiguousarray(np.transpose(self._given))
        whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))  # one value for a row
        return 4 * len(np.unique(whole)) <= 3 * len(rows)

    def _scale(self, j: int) -> None:
        mean, std = self._mean[j], self._std[j]
        if 1 / _UNIT_SCALE <= std <= _UNIT_SCALE and abs(mean) <= _UNIT_SCALE:
            return
        text = f"{self._label(j)} has mean {mean:.3g} and standard deviation {std:.3g}, far from unit scale"
        remedy = (
            "build the flow with standardize=True, or bring the columns to unit scale, and with them the interval of a "
            "uniform base"
        )
        self._add("scale", "warning", (j,), text, remedy, mean=mean, std=std)

    def _other_units(self, j: int, spread: float, trained_mean: float, trained_std: float) -> None:
        """Report a column that lies elsewhere, or is wider or narrower, than what the flow was trained on."""
        middle, std = float(self._percentiles[1, j]), float(self._std[j])
        spreads = [value / trained_std for value in (std, spread) if value > 0]
        same = not spreads or (min(spreads) <= _UNIT_SCALE and max(spreads) >= 1 / _UNIT_SCALE)
        if same and abs(middle - trained_mean) <= _UNIT_SCALE * trained_std:
            return
        text = (
            f"{self._label(j)} has mean {self._mean[j]:.3g} and standard deviation {std:.3g}, the flow was trained "
            f"around {trained_mean:.3g} with {trained_std:.3g}"
        )
        given = "x" if self._argument == "x" else "x, context=context"
        remedy = f"give it in the units of its training, or train the flow anew after flow.initialize_from({given})"
        figures = {"mean": self._mean[j], "std": std, "trained_mean": trained_mean, "trained_std": trained_std}
        self._add("scale", "warning", (j,), text, remedy, **figures)

    # -- several columns

    def _dependence(self) -> None:
        """Take the columns one by one, and report those that follow from the ones before (sweeps of the correlations).

        Beaton (1964): after a sweep by the columns S, ``a[j, j]`` is the share of column j's variance that S leaves
        unexplained, and ``a[S, j]`` are the coefficients.
        """
        columns = np.flatnonzero(self._varies & (self._std > 0))
        z = self._unit_columns(columns)
        if z is None:
            return
        a = z @ z.T / z.shape[1]
        swept = np.zeros(len(columns), bool)
        for j in range(len(columns)):
            if a[j, j] > _DEPENDENT**2:
                pivot, row = a[j, j], a[j] / a[j, j]
                column = a[:, j].copy()
                a -= np.outer(column, row)
                a[j], a[:, j], a[j, j] = row, -column / pivot, 1 / pivot
                swept[j] = True
                continue
            others = np.flatnonzero(swept)
            weights = a[others, j]
            left = float(np.std(z[j] - weights @ z[others]))
            used = np.abs(weights) > 1e-5
            if left <= _DEPENDENT and used.any():
                self._report_dependence(columns, j, others[used], weights[used], left)

    def _unit_columns(self, columns: NDArray[np.int64]) -> Array | None:
        """Return the sample's columns [d, n] with mean 0 and variance 1, without rows far out: they hide the others."""
        spread = (self._percentiles[2] - self._percentiles[0])[columns]
        scale = np.where(spread > 0, spread / _QUARTILES_PER_STD, self._std[columns])[:, None]
        z = (self._sample[columns] - self._percentiles[1][columns][:, None]) / scale
        z = z[:, (np.abs(z) <= 50).all(axis=0)]
        if not 2 <= len(columns) <= _MOST_COLUMNS or z.shape[1] < max(20, 2 * len(columns)):
            return None
        z -= z.mean(axis=1, keepdims=True)
        self._unit_scale = scale[:, 0] * z.std(axis=1)
        if not (self._unit_scale > 0).all():
            return None
        z /= z.std(axis=1, keepdims=True)
        return z  # type: ignore[no-any-return]

    def _report_dependence(self, columns: Array, j: int, others: Array, weights: Array, left: float) -> None:
        here, there = int(columns[j]), columns[others].tolist()
        involved = [here, *there]
        size = np.maximum(np.abs(self._low), np.abs(self._high))[involved]
        rounding = self._eps * size / self._unit_scale[np.append(j, others)]
        exact = left <= 4 * float(np.linalg.norm(rounding * np.append(1.0, weights))) + 1e-9
        exact = exact and self._holds_everywhere(columns, j, others, weights, left)
        names = _listed([self._label(k) for k in there])
        within = "" if exact else f" to within {left:.1g} of its spread"
        if self._again is None and self._drawn < self._measures.rows:
            within += f" in the {self._drawn:,} rows looked at"
        if len(there) == 1:
            scaled = "" if self._same(here, there[0]) else ", but for scale and offset"
            text = f"{self._label(here)} is a copy of {names}{scaled}{within}"
        else:
            text = f"{self._label(here)} is a linear combination of {names}{within}"
        remedy = "such columns have no density together: leave out one of them, or keep them by allow_degenerate=True"
        if not exact:
            remedy = "their density is nearly singular: leave out one of them, or replace it by the difference"
        kind = "copy" if len(there) == 1 else "dependent"
        self._add(kind, "error" if exact else "warning", involved, text, remedy, unexplained=left)

    def _same(self, a: int, b: int) -> bool:
        return bool((self._sample[a] == self._sample[b]).all())

    def _holds_everywhere(self, columns: Array, j: int, others: Array, weights: Array, left: float) -> bool:
        """Tell whether all rows keep the relation as the sampled ones do."""
        here, there = int(columns[j]), columns[others]
        factors = weights * self._unit_scale[j] / self._unit_scale[others]
        size = np.maximum(np.abs(self._low), np.abs(self._high))
        rounding = 8 * self._eps * (size[here] + np.abs(factors) @ size[there])
        limit = max(20 * left * self._unit_scale[j], rounding)
        low, high = np.inf, -np.inf
        for block in (self._sample,) if self._again is None else self._again():
            error = block[here] - factors @ block[there]
            error = error[np.isfinite(error)]
            low, high = min(low, error.min(initial=np.inf)), max(high, error.max(initial=-np.inf))
        return bool(high - low <= 2 * limit)


class _ContextLook(_Look):
    """One look at a context, which needs no density: columns that are far out, or of which little can be learned."""

    _argument = "context"

    def findings(self) -> list[Finding]:
        measures = self._measures
        self._low, self._high = measures.low, measures.high
        with np.errstate(all="ignore"):
            self._mean, self._std = measures.mean(), measures.std()
            if measures.count < measures.rows:
                self._report_missing()
            elif measures.rows >= 2:
                for j in range(len(self._low)):
                    self._column(j)
        return self._found

    def _column(self, j: int) -> None:
        if self._low[j] == self._high[j]:
            text = f"{self._label(j)} is constant, {self._low[j]:g} in all rows: the flow learns nothing of it"
            self._add("constant", "warning", (j,), text, "leave it out", value=self._low[j])
        elif not self._has_few_digits(j) and not (self._standardize and self._has_far_rows(j)):
            self._rarities(j)
        if self._standardize and self._trained is not None:
            spread = float(self._percentiles[2, j] - self._percentiles[0, j]) / _QUARTILES_PER_STD
            self._other_units(j, spread, *(float(values[j]) for values in self._trained))

    def _has_few_digits(self, j: int) -> bool:
        """Tell whether rounding to the flow's dtype loses what varies."""
        step = float(np.finfo(self._dtype).eps) * max(abs(self._low[j]), abs(self._high[j])) / self._std[j]
        if not step > COARSE:
            return False
        text = (
            f"{self._label(j)} keeps few digits, neighbouring numbers of {self._dtype} are up to {step:.1g} standard "
            "deviations apart"
        )
        remedy = "subtract an offset in float64, in training and in each call"
        self._add("digits", "warning", (j,), text, remedy, step=step)
        return True

    def _has_far_rows(self, j: int) -> bool:
        """Tell whether a few far rows decide the standard deviation, as of columns of x (`column_statistics.hpp`)."""
        first, middle, third, low, high = self._percentiles[:, j]
        unit = (third - first) / _QUARTILES_PER_STD
        farthest = max(self._high[j] - middle, middle - self._low[j])
        if not (self._std[j] > _OUTLYING * unit > 0 and farthest > _BEYOND * (high - low)):
            return False
        text = (
            f"{self._label(j)} has far rows that make its standard deviation, from {self._low[j]:.3g} to "
            f"{self._high[j]:.3g} around {middle:.3g}: the others come out alike"
        )
        figures = {"std": self._std[j], "spread": unit, "low": self._low[j], "high": self._high[j]}
        self._add("outliers", "warning", (j,), text, "look at these rows and mend what is wrong", **figures)
        return True

    def _rarities(self, j: int) -> None:
        """Report a value that nearly all rows have: of the others the flow sees little, and that far out."""
        common, values = float(self._percentiles[1, j]), self._sample[j]
        others = float(np.mean(values != common))
        if others >= _RARE:
            return
        often = f"all but one in {1 / others:,.0f}" if others > 0 else "nearly all"
        text = f"{self._label(j)} is {common:g} in {often} rows: the flow learns little of its other values"
        remedy = "give more rows of these, join rare categories, or leave the column out"
        self._add("rare", "warning", (j,), text, remedy, value=common, share=others)


class Digits:
    """How far apart neighbouring numbers are beside each column's spread, of rows that come in blocks of one dtype."""

    def __init__(self, columns: int) -> None:
        self._eps = 0.0
        self._count = 0
        self._shift: Array | None = None
        self._total, self._square, self._largest = np.zeros(columns), np.zeros(columns), np.zeros(columns)

    def add(self, rows: Array) -> None:
        """Take finite rows [n, D]."""
        if len(rows) == 0:
            return
        self._eps = float(np.finfo(rows.dtype).eps)
        wide = rows.astype(np.float64)
        self._largest = np.maximum(self._largest, np.abs(wide).max(axis=0))
        if self._shift is None:
            self._shift = np.median(wide, axis=0)
        wide -= self._shift
        self._count += len(rows)
        self._total += wide.sum(axis=0)
        self._square += np.einsum("ij,ij->j", wide, wide)

    def resolution(self, least_spread: Array) -> Array:
        """Return the distances [D] in units of the standard deviation, or of `least_spread`; NaN where both are 0."""
        count = max(1, self._count)
        variance = np.maximum(self._square / count - (self._total / count) ** 2, 0)
        spread = np.maximum(np.sqrt(variance), least_spread)
        with np.errstate(all="ignore"):
            return np.where(spread > 0, self._eps * self._largest / spread, np.nan)


def _listed(texts: list[str]) -> str:
    return ", ".join(texts) if len(texts) <= 5 else f"{', '.join(texts[:5])} and {len(texts) - 5} more"
