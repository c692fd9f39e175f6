"""What `Flow.fit` does around the compiled training loop: checks, the progress bar and the history."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import (
    _bases,
    _bounds,
    _checks,
    _context,
    _core,
    _data,
    _frames,
    _gaussian,
    _sample_weight,
    _spec,
    _training_options,
    distributed,
)
from nvpflow._bar import Bar, open_bar
from nvpflow._bases import NORMAL
from nvpflow._model import Model
from nvpflow.adam import Adam as Adam  # also by this path
from nvpflow.adam import AdamState, check_state
from nvpflow.history import History as History  # also by this path, in pickles too
from nvpflow.layers import Coupling

if TYPE_CHECKING:
    from nvpflow._core import EpochRecord  # of the stub only: the type of a plain dict


_MOST_COLUMNS = 1000  # of a flow that is compared with a Gaussian: the work grows with the third power
_MOST_ROWS, _MOST_VALUES = 20_000, 1 << 20  # of the comparison
_JUDGING_ROWS = 5  # fewer have no standard error to speak of
_VISIBLE_NATS = 0.05
_LEAST_FOR_SHAPE, _SKEWED, _UNLIKE_NORMAL = 100, 0.75, 1.5  # rows, |skewness| and |excess kurtosis| of latents
_LATE = 0.8  # share of the epochs after which the best one suggests that more would help


class _Bar(Bar):
    """A bar over every update of all epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self._epochs = epochs
        self._steps = 0
        self._best = math.inf

    def on_progress(self, epoch: int, step: int, steps: int) -> None:
        done = (epoch - 1) * steps + step
        if self._steps == 0:
            self._steps = steps
            self.begin(self._epochs * steps, (epoch - 1) * steps)
        self.move(done, f"epoch {epoch}/{self._epochs}")

    def on_epoch(self, record: EpochRecord) -> None:
        train, validation = record["train_loss"], record["validation_loss"]
        shown = f"nll {train:.4f}"
        if not math.isnan(validation):
            self._best = min(self._best, validation)
            shown += f", validation {validation:.4f}, best {self._best:.4f}"
        self.show(f"{shown} nats", f"epoch {record['epoch']}/{self._epochs}", record["epoch"] * self._steps)


def statistics_of(flow: Model, standardize: Any) -> str:
    """Return what the standardize layer is to be set from: what is said here, else what `build` was told."""
    if standardize is None:
        return flow._statistics()
    return _checks.text("standardize", standardize)


def unlike_mean(flow: Model, how: Sequence[str]) -> dict[str, str]:
    """Return the columns that were not standardized by mean and standard deviation, and what by."""
    names = flow.column_names or [f"column {j + 1}" for j in range(flow.spec.input_size)]
    return {names[j]: found for j, found in enumerate(how) if found != "mean"}


class _Names(NamedTuple):
    """Of the columns of rows and of contexts, where they have some."""

    columns: list[str] | None
    context: list[str] | None


class _Split(NamedTuple):
    """What epochs are compared by: rows with their contexts and weights, or a share of the training rows."""

    rows: NDArray[Any] | None = None
    context: NDArray[Any] | None = None
    weights: NDArray[np.float64] | None = None
    share: float = 0.0

    def taken(self, which: NDArray[Any]) -> _Split:
        """Return some of the rows."""
        rows, context, weights = (None if part is None else part[which] for part in self[:3])
        return self._replace(rows=rows, context=context, weights=weights)

    def that_count(self) -> _Split:
        """Return the rows whose weight is not 0."""
        if self.weights is None or self.rows is None:
            return self
        counts = _sample_weight.that_count(self.weights, self.rows, self.context)
        return self if counts.all() else self.taken(counts)

    def effective_rows(self) -> float:
        assert self.rows is not None
        return _sample_weight.effective_rows(self.weights, len(self.rows))


def _parts(flow: Model, validation: Any, *, weighted: bool) -> tuple[Any, Any, Any]:
    """Return what validation= holds: rows or a share, a context, weights."""
    names = ["rows", *["context"] * bool(flow.spec.context_size), *["weights"] * weighted]
    listed = f"({', '.join(names)})"
    if len(names) == 1:
        if isinstance(validation, tuple) and [getattr(part, "ndim", 0) for part in validation] == [2, 1]:
            raise ValueError("validation is a tuple of rows and weights, expected rows alone where x has no weights")
        return validation, None, None
    if not isinstance(validation, (tuple, list)):
        return validation, None, None
    if isinstance(validation, list) or len(validation) != len(names):
        count = {2: "two", 3: "three"}[len(names)]
        kind = type(validation).__name__
        raise ValueError(f"validation is a {kind} of {len(validation)}, expected a tuple of {count}: {listed}")
    if np.ndim(validation[0]) == 0:
        others = " and ".join(f"{'a ' * (name == 'context')}{name}" for name in names[1:])
        raise ValueError(f"validation is a tuple of a share and {others}, expected {listed} or only a share")
    by_name = dict(zip(names, validation, strict=True))
    return by_name["rows"], by_name.get("context"), by_name.get("weights")


def _split(flow: Model, validation: Any, names: _Names, *, weighted: bool, is_part: bool) -> _Split:
    if validation is None:
        return _Split()
    validation, context, weights = _parts(flow, validation, weighted=weighted)
    if isinstance(validation, (str, bytes, bool)):
        expected = "expected a share of the rows in [0, 1), an array of rows or None"
        raise TypeError(f"validation is {_checks.describe(validation)}, {expected}")
    validation, _ = _frames.read("validation", validation, names.columns)
    validation = _core._host_array(validation)
    if np.ndim(validation) == 0:
        return _Split(share=_checks.real("validation", validation))
    rows = _checks.rows("validation", validation, flow.spec)
    if flow.spec.context_size and context is None:
        expected = f"(rows, context{', weights' * weighted})"
        raise ValueError(f"validation holds rows without their context, expected a tuple {expected}")
    given = _context.rows(
        context, len(rows), flow.spec, "the context of validation", names=names.context, one_for_all=False
    )
    if not weighted:
        return _Split(rows, given)
    if weights is None:
        raise ValueError("validation holds rows without weights, expected a tuple (rows, weights); ones count alike")
    return _Split(rows, given, _sample_weight.read(weights, len(rows), "the weights of validation", is_part=is_part))


@contextmanager
def _named(flow: Model, names: _Names) -> Iterator[None]:
    """Give the flow the names of frames' columns, unless training does not begin."""
    before = flow._column_names(), flow._context_names()
    try:
        if names.columns is not None:
            flow._set_column_names(names.columns)
        if names.context is not None:
            flow._set_context_names(names.context)
        yield
    except (ValueError, TypeError):
        flow._set_column_names(before[0])
        flow._set_context_names(before[1])
        raise


def fit(
    flow: Model,
    x: ArrayLike,
    *,
    context: ArrayLike | None,
    sample_weight: ArrayLike | None,
    validation: float | ArrayLike | tuple[ArrayLike, ...] | None,
    options: Mapping[str, Any],
    progress: bool | None,
    callback: Callable[[EpochRecord], object] | None,
    adam: AdamState | None,
    communicator: object,
) -> History:
    """Train `flow`; `Flow.fit` documents the arguments."""
    together = None if communicator is None else distributed.communicator(communicator)
    with distributed.told_to_others(together):
        if callback is not None and not callable(callback):
            raise TypeError(f"callback is {_checks.describe(callback)}, expected callable or None")
        if adam is not None:
            check_state("adam", adam)
        sharded = together is not None or options["shards"] is not None
        read = _read(flow, x, context, sample_weight, validation, keep_all=sharded)
        checked = _training_options.checked(options) | {"validation": read.held_out.share}
        checked["standardize"] = _statistics_to_use(flow, options["standardize"])
        if together is not None and options["shards"] is None:
            checked["shards"] = distributed.SHARDS
    if together is not None:  # what is said of all rows, this process does not know
        with distributed.Patient(together) as patient:
            return _train(flow, read, checked, progress, callback, adam, patient)
    report = _look(flow, read, checked)
    history = _train(flow, read, checked, progress, callback, adam, None)
    read = read._replace(table=read.table.that_count(), held_out=read.held_out.that_count())
    if not any(finding.kind == "outliers" for finding in report.warnings):  # one warning for one finding
        heavy = _bases.has_heavy_tails(flow.spec.base)
        _warn_of_far_rows(history, asked=heavy or checked["standardize"] == "robust", heavy=heavy)
    # All rows were trained on where there are folds, and shards are split by themselves.
    judged = history.best_epoch > 0 and not history.folds and (not sharded or read.held_out.rows is not None)
    if judged and history.validation_rows >= _JUDGING_ROWS and flow.spec.input_size <= _MOST_COLUMNS:
        limit = options["max_deviation"]
        tables = [_near_rows(flow, some, history, limit) for some in _samples(read.table, read.held_out, checked)]
        _warn_of_normal_columns(flow, read.names.columns, tables[1])
        mend_first = any(finding.kind != "rows" for finding in report.warnings)  # more rows are the remedy anyway
        _warn_where_a_gaussian_is_better(flow, history, *tables, mend_first=mend_first)
    return history


class _Read(NamedTuple):
    """What `fit` was given, as arrays."""

    table: _Split
    held_out: _Split
    names: _Names
    is_framed: bool
    context: Any  # before it was rounded; None: there is none


def _read(
    flow: Model,
    x: ArrayLike,
    context: ArrayLike | None,
    sample_weight: ArrayLike | None,
    validation: Any,
    *,
    keep_all: bool,
) -> _Read:
    """Return what there is to train on. `keep_all`: also rows that count for nothing, which shards are counted with."""
    if text := _frames.not_numbers("x", x):
        raise TypeError(_data.refusal("x", x) or text)  # with all else that is wrong
    given, frame_names = _frames.read("x", x, flow._column_names())
    rows = _checks.rows("x", _core._host_array(given), flow.spec)
    context, context_names = _read_context(flow, context)
    contexts = _context.rows(context, len(rows), flow.spec, one_for_all=False)
    names = _Names(flow._column_names() or frame_names, flow._context_names() or context_names)
    weights = None if sample_weight is None else _sample_weight.read(sample_weight, len(rows), is_part=keep_all)
    table = _Split(rows, contexts, weights)
    held_out = _split(flow, validation, names, weighted=weights is not None, is_part=keep_all)
    if not keep_all:
        table, held_out = table.that_count(), held_out.that_count()
    return _Read(table, held_out, names, _frames.inspect(x) is not None, context)


def _look(flow: Model, read: _Read, checked: Mapping[str, Any]) -> _data.DataReport:
    """Warn of what is wrong with the rows and their context, and refuse what has no density."""
    spec, anew = flow.spec, checked["restandardize"]
    table = read.table.that_count()
    assert table.rows is not None
    report = _data.require_density(
        table.rows,
        read.names.columns,
        spec.dtype,
        _spec.begins_with_standardize(spec),
        trained=None if anew else _data.trained_scales(flow),
        framed=read.is_framed,
        allow_degenerate=checked["allow_degenerate"],
        effective=table.effective_rows(),
        heavy_tails=_bases.has_heavy_tails(spec.base),
        bounds=_spec.bounds_of(spec),
    )
    if read.context is not None:
        trained = None if anew else _data.trained_context_scales(flow)
        given = _checks.numbers("context", _core._host_array(read.context))
        _data.warn_of_context(given, read.names.context, spec.dtype, spec.standardize_context, trained)
    return report


def _train(
    flow: Model,
    read: _Read,
    checked: dict[str, Any],
    progress: bool | None,
    callback: Callable[[EpochRecord], object] | None,
    adam: AdamState | None,
    communicator: distributed.Communicator | None,
) -> History:
    if communicator is not None and communicator.rank != 0:
        progress = False if progress is None else progress  # one bar is enough
    with distributed.told_to_others(communicator):
        bar = open_bar(progress, lambda: _Bar(checked["epochs"]))

    def on_epoch(record: EpochRecord) -> bool:
        if bar is not None:
            bar.on_epoch(record)
        answer = None if callback is None else callback(record)
        return not (isinstance(answer, (bool, np.bool_)) and not answer)

    table, held_out = read.table, read.held_out
    assert table.rows is not None
    with ExitStack() as stack:
        with distributed.told_to_others(communicator):
            stack.enter_context(_named(flow, read.names))
            stack.enter_context(bar or nullcontext())
        summary = flow._fit(
            table.rows,
            held_out.rows,
            checked,
            None if bar is None else bar.on_progress,
            on_epoch,
            table.context,
            held_out.context,
            adam,
            table.weights,
            held_out.weights,
            communicator,
        )
    return History._from_summary(summary, unlike_mean(flow, summary["standardized"]))


def _read_context(flow: Model, context: ArrayLike | None) -> tuple[Any, list[str] | None]:
    """Return a context without its frame, and the names that it had in one; what cannot be one as it is."""
    if context is None or not flow.spec.context_size:
        return context, None
    return _frames.read("context", context, flow._context_names(), "context_names")


def _warn_of_normal_columns(flow: Model, names: Sequence[str] | None, set_aside: _Split) -> None:
    """Warn where the flow takes p(x | c), or columns that no coupling transforms, for normal and they are not."""
    spec = flow.spec
    if spec.base != NORMAL:
        return
    couplings = [layer for layer in spec.layers if isinstance(layer, Coupling)]
    whole = spec.context_size > 0 and all(_takes_all(layer, spec.input_size) for layer in couplings)
    whole = whole and not _spec.splines(spec)  # which bend what they transform, also where it is all
    columns, places = _spec.untransformed(spec)
    assert set_aside.rows is not None
    if not (whole or columns.size) or set_aside.effective_rows() < _LEAST_FOR_SHAPE:
        return
    z = np.asarray(flow.forward(set_aside.rows, context=set_aside.context)[0], dtype=np.float64)
    with np.errstate(all="ignore"):
        mean = functools.partial(np.average, axis=0, weights=set_aside.weights)
        z = z - mean(z)
        z = z / np.sqrt(mean(np.square(z)))
        unlike = np.abs(mean(z**3)) > _SKEWED
        unlike |= np.abs(mean(z**4) - 3) > _UNLIKE_NORMAL
    text = None
    if whole and unlike.any():
        text = (
            "p(x | context) of this flow is a normal distribution, whose mean and width depend on the context, because "
            "every coupling transforms all columns; the rows are of another shape. Build a flow that can bend, with "
            "transform='spline'"
        )
    elif (left := columns[unlike[places]]).size:
        labels = _frames.labels(names, spec.input_size)
        text = (
            f"x: no coupling transforms {', '.join(labels[column] for column in left[:5])}"
            f"{', ...' if left.size > 5 else ''}, for which this flow knows only normal distributions; the rows are of "
            "another shape. Put such columns into what a Coupling transforms, or into a mask of build"
        )
    if text is not None:
        warnings.warn(text, _data.DataWarning, stacklevel=_data._outside())


def _takes_all(layer: Coupling, size: int) -> bool:
    transformed = layer.transformed
    return transformed == "all" or size == 1 or (not isinstance(transformed, str) and len(transformed) == size)


def _statistics_to_use(flow: Model, standardize: Any) -> str:
    if standardize is not None and not _spec.begins_with_standardize(flow.spec):
        given = _checks.text("standardize", standardize)
        raise ValueError(
            f"standardize is {given!r}, but the flow does not begin with a standardize layer; expected None, or a flow "
            "of build(standardize=True)"
        )
    return statistics_of(flow, standardize)


def _warn_of_far_rows(history: History, *, asked: bool, heavy: bool) -> None:
    """Say what `fit` has done about far rows without being asked."""
    findings = history._findings()
    if asked and not history.rows_left_out:
        return
    if findings:
        of_base = "" if heavy else " base='student_t' is for data that have such rows, and"
        advice = f"see whether these rows belong there;{of_base} standardize and max_deviation choose otherwise"
        warnings.warn(
            f"x has rows that are far out. {'. '.join(findings)}; {advice}",
            _data.DataWarning,
            stacklevel=_data._outside(),
        )


def _samples(train: _Split, held_out: _Split, options: Mapping[str, Any]) -> tuple[_Split, _Split]:
    """Return some of the rows that were trained on, and some of those that were set aside, drawn at random."""
    assert train.rows is not None
    columns = train.rows.shape[1]
    most = min(_MOST_ROWS, max(_MOST_VALUES // columns, 10 * columns))
    if held_out.rows is not None:
        return _drawn(train, most), _drawn(held_out, most)
    set_aside, trained_on = _core._split_rows(len(train.rows), options["validation"], options["seed"], most)
    return train.taken(np.sort(trained_on)), train.taken(np.sort(set_aside))


def _drawn(table: _Split, most: int) -> _Split:
    assert table.rows is not None
    return table.taken(_data.drawn(np.arange(len(table.rows)), most))


def _near_rows(flow: Model, table: _Split, history: History, max_deviation: float | str | None) -> _Split:
    """Return the table without the rows that `fit` has left out."""
    scales = _data.trained_scales(flow)
    if scales is None or not history.rows_left_out:
        return table
    mean, std = scales
    max_deviation = _training_options.MAX_DEVIATION if max_deviation == _training_options.AUTO else max_deviation
    bounds = _spec.bounds_of(flow.spec)
    assert table.rows is not None
    rows: NDArray[Any] = table.rows if bounds is None else _bounds.forward(bounds, table.rows)
    return table.taken((np.abs(rows - mean) <= max_deviation * std).all(axis=1))


def _warn_where_a_gaussian_is_better(
    flow: Model, history: History, trained_on: _Split, set_aside: _Split, *, mend_first: bool
) -> None:
    """Warn of a flow to which a Gaussian is to be preferred, by more than chance explains."""
    assert trained_on.rows is not None
    assert set_aside.rows is not None
    train, rows, given = trained_on.rows, set_aside.rows, 0
    if trained_on.context is not None and set_aside.context is not None:
        varies = _context.varying(trained_on.context)
        given = int(varies.sum())
        train = np.hstack([train, trained_on.context[:, varies]])
        rows = np.hstack([rows, set_aside.context[:, varies]])
    try:
        gaussian = _gaussian.shrunk_log_prob(train, rows, given, weights=trained_on.weights)
    except np.linalg.LinAlgError:  # a column that varies, but not in the sample
        return
    ours = flow.log_probability(set_aside.rows, context=set_aside.context).astype(np.float64)
    average = functools.partial(np.average, weights=set_aside.weights)
    better, judging = gaussian - ours, set_aside.effective_rows()
    if judging < _JUDGING_ROWS:
        return
    mean = float(average(better))
    error = math.sqrt(average(np.square(better - mean)) / (judging - 1))
    if not mean > max(_VISIBLE_NATS, error):
        return
    done = int(history.epoch[-1])
    remedy = "give more rows, or take fewer couplings or hidden units (num_flows, hidden_sizes) or more weight_decay"
    if not _spec.whitens(flow.spec) and flow.spec.base == NORMAL:
        remedy = f"build the flow with standardize='covariance', so that it begins as that Gaussian, {remedy}"
    if history.best_epoch > _LATE * done:
        remedy = f"train for more epochs, {remedy}"
    if mend_first:
        remedy = f"mend what nvpflow.check_data finds in x, then {remedy}"
    warnings.warn(
        f"the flow is worse than a Gaussian: the mean log-density of {len(better):,} validation rows is "
        f"{average(ours):.3f} nats, and {average(gaussian):.3f} under a Gaussian of the training rows"
        f"{' and their context' if given else ''} (better by "
        f"{mean:.2f}, with a standard error of {error:.2f}; the best epoch was {history.best_epoch} of {done}); "
        f"{remedy}",
        _data.DataWarning,
        stacklevel=_data._outside(),
    )
