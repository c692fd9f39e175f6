"""What `Flow.fit` does around the compiled training loop: checks, the progress bar and the history."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _core, _data, _frames, _html

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nvpflow._core import EpochRecord, FitSummary  # of the stub alone: types of plain dicts
    from nvpflow.flow import Flow


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """What `Flow.fit` did: one value per epoch in each array, losses in nats per row.

    Attributes
    ----------
    epoch
        The epochs' numbers, from 1, int64.
    train_loss
        Mean of ``-log p`` over the epoch's updates, each taken before its update.
    validation_loss
        Mean of ``-log p`` over the validation rows after the epoch, of the weights or of their average, whichever is
        better; NaN without validation data.
    learning_rate, gradient_norm
        Of the epoch's last update; the norm before clipping.
    seconds
        Wall time of the epoch, validation included.
    round_trip
        Largest relative error of a round trip after the epoch, over the rows that epochs are compared by (see
        `Certificate`); NaN where `Flow.fit` was given no ``max_round_trip``.
    best_epoch
        The epoch whose weights the flow now has; 0 for the weights it started from.
    best_loss
        Its validation loss; without validation data, the loss of up to 65,536 training rows after the epoch.
    stop_reason
        "epochs", "patience" or "callback".
    train_rows, validation_rows
        Rows trained and validated on.
    standardized
        The columns whose mean and scale in the standardize layer are not their mean and standard deviation, and what
        they are: ``{"column 3": "robust"}``. Columns without a name are counted from 1.
    rows_left_out
        Rows that were neither trained nor validated on, because they are extremely far out (`max_deviation` of
        `Flow.fit`).
    """

    epoch: NDArray[np.int64]
    train_loss: NDArray[np.float64]
    validation_loss: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    gradient_norm: NDArray[np.float64]
    seconds: NDArray[np.float64]
    round_trip: NDArray[np.float64]
    best_epoch: int
    best_loss: float
    stop_reason: str
    train_rows: int
    validation_rows: int
    standardized: dict[str, str] = field(default_factory=dict)
    rows_left_out: int = 0

    @classmethod
    def _from_summary(cls, flow: Flow, summary: FitSummary) -> History:
        records = summary["epochs"]
        return cls(
            epoch=np.array([record["epoch"] for record in records], dtype=np.int64),
            train_loss=np.array([record["train_loss"] for record in records], dtype=np.float64),
            validation_loss=np.array([record["validation_loss"] for record in records], dtype=np.float64),
            learning_rate=np.array([record["learning_rate"] for record in records], dtype=np.float64),
            gradient_norm=np.array([record["gradient_norm"] for record in records], dtype=np.float64),
            seconds=np.array([record["seconds"] for record in records], dtype=np.float64),
            round_trip=np.array([record["round_trip"] for record in records], dtype=np.float64),
            best_epoch=summary["best_epoch"],
            best_loss=summary["best_loss"],
            stop_reason=summary["stop_reason"],
            train_rows=summary["train_rows"],
            validation_rows=summary["validation_rows"],
            standardized=unlike_mean(flow, summary["standardized"]),
            rows_left_out=summary["rows_left_out"],
        )

    def __len__(self) -> int:
        """Return the number of epochs."""
        return len(self.epoch)

    def __repr__(self) -> str:
        """Return a table of the first, the best and the last epoch."""
        lines = [
            f"History: {self._summary()}",
            "         epoch    train nll  validation nll  learning rate  gradient norm  seconds",
        ]
        measured = len(self) > 0 and not np.isnan(self.round_trip).all()
        lines[1] += "  round trip" if measured else ""
        for mark, i in self._marked():
            lines.append(
                f"  {mark:<5}  {self.epoch[i]:>5}  {self.train_loss[i]:>11.4f}  {self.validation_loss[i]:>14.4f}  "
                f"{self.learning_rate[i]:>13.3g}  {self.gradient_norm[i]:>13.3g}  {self.seconds[i]:>7.2f}"
                + (f"  {self.round_trip[i]:>10.2e}" if measured else "")
            )
        return "\n".join([*lines, *self._findings()])

    def _findings(self) -> list[str]:
        """Say what was done about far rows, in a sentence each."""
        said = []
        if self.standardized:
            columns = "; ".join(f"{column}: {how}" for column, how in self.standardized.items())
            said.append(f"standardized by median and central range in place of mean and standard deviation: {columns}")
        if self.rows_left_out:
            rows = f"{self.rows_left_out:,} row{'s' * (self.rows_left_out != 1)}"
            are = "is" if self.rows_left_out == 1 else "are"
            said.append(f"left out of training and validation: {rows} that {are} extremely far out (max_deviation)")
        return said

    def _repr_html_(self) -> str:
        """Return a table of the first, the best and the last epoch, for notebooks."""
        head = ("", "epoch", "train nll", "validation nll", "learning rate", "gradient norm", "seconds")
        lines = [
            (
                mark,
                f"{self.epoch[i]}",
                f"{self.train_loss[i]:.4f}",
                f"{self.validation_loss[i]:.4f}",
                f"{self.learning_rate[i]:.3g}",
                f"{self.gradient_norm[i]:.3g}",
                f"{self.seconds[i]:.2f}",
            )
            for mark, i in self._marked()
        ]
        said = "; ".join([self._summary(), *self._findings()])
        return _html.table(f"History: {said}", head, lines)

    def _summary(self) -> str:
        return (
            f"{len(self)} epochs in {self.seconds.sum():.1f} s, stop reason: {self.stop_reason}; "
            f"{self.train_rows:,} training and {self.validation_rows:,} validation rows"
        )

    def _marked(self) -> list[tuple[str, int]]:
        """Return the first, the best and the last epoch, by index."""
        at_best = np.flatnonzero(self.epoch == self.best_epoch)
        marks = [("first", 0), *(("best", int(i)) for i in at_best), ("last", len(self) - 1)]
        return marks if len(self) else []

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as lists and numbers of Python, NaN where there was no validation data."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """Return the history that `to_dict` has made `values` of, also by way of JSON (None stands for NaN).

        Raises
        ------
        ValueError
            `values` is not what `to_dict` returns.
        """
        arrays: dict[str, Any] = dict.fromkeys(("epoch",), np.int64)
        arrays |= dict.fromkeys(
            ("train_loss", "validation_loss", "learning_rate", "gradient_norm", "round_trip", "seconds"), np.float64
        )
        scalars: dict[str, Any] = {"best_epoch": int, "best_loss": float, "stop_reason": str}
        scalars |= {"train_rows": int, "validation_rows": int}
        later: dict[str, Any] = {"standardized": dict, "rows_left_out": int}  # not in histories of older versions
        if set(values) - {*later} != {*arrays, *scalars}:
            raise ValueError(f"a history holds {', '.join([*arrays, *scalars])}; got {', '.join(map(str, values))}")
        try:
            given: dict[str, Any] = {name: np.array(values[name], dtype=dtype) for name, dtype in arrays.items()}
            given |= {name: kind(values[name]) for name, kind in (scalars | later).items() if name in values}
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a history's values are lists of numbers of one length: {error}") from error
        if any(given[name].shape != (len(given["epoch"]),) for name in arrays):
            raise ValueError("a history's lists have different lengths")
        return cls(**given)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the log-likelihood over the epochs: `nvpflow.plot.learning_curve`.

        Parameters
        ----------
        ax
            Where to draw; None makes a new figure.

        Returns
        -------
        matplotlib.axes.Axes
            The axes drawn on.

        Raises
        ------
        ImportError
            Matplotlib is not installed (``pip install matplotlib``).
        """
        from nvpflow import plot

        return plot.learning_curve(self, ax=ax)


class _Bar:
    """A tqdm bar over every update; drawn in `on_progress` alone, which is called at most 20 times a second."""

    def __init__(self, epochs: int) -> None:
        # tqdm draws nothing on a terminal that does not know its size, as some containers' do not.
        fits = _terminal_columns() or _in_notebook()
        size: dict[str, Any] = {"dynamic_ncols": True} if fits else {"ncols": 120, "nrows": 24}
        self._bar = _tqdm()(unit=" updates", file=sys.stderr, **size)
        self._epochs = epochs
        self._steps = 0
        self._best = math.inf

    def on_progress(self, epoch: int, step: int, steps: int) -> None:
        done = (epoch - 1) * steps + step
        if self._steps == 0:
            self._steps = steps
            self._bar.reset(total=self._epochs * steps)
            self._bar.initial = self._bar.n = (epoch - 1) * steps  # epochs of a checkpoint do not count in the rate
        self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.update(done - self._bar.n)

    def on_epoch(self, record: EpochRecord) -> None:
        train, validation = record["train_loss"], record["validation_loss"]
        shown = f"nll {train:.4f}"
        if not math.isnan(validation):
            self._best = min(self._best, validation)
            shown += f", validation {validation:.4f}, best {self._best:.4f}"
        self._bar.set_postfix_str(f"{shown} nats", refresh=False)
        self._bar.set_description(f"epoch {record['epoch']}/{self._epochs}", refresh=False)
        self._bar.n = record["epoch"] * self._steps

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._bar.refresh()
        self._bar.close()


def _tqdm() -> Any:
    """Return the class of the bar: a widget in a notebook that has ipywidgets, else lines of text."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    if not _in_notebook():
        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells those without ipywidgets to install them
        from tqdm import autonotebook
    return autonotebook.tqdm


def _in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this process."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):  # not a terminal, closed, or replaced by something without a file
        return 0


def _open_bar(progress: Any, epochs: int) -> _Bar | None:
    if progress is not None:
        return _Bar(epochs) if _checks.boolean("progress", progress) else None
    if sys.stderr is None or not (sys.stderr.isatty() or _in_notebook()):
        return None
    try:
        return _Bar(epochs)
    except ImportError:
        return None


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the types of fit's options; the extension checks their ranges."""
    given = dict(options)
    for name in ("averaging", "clip_norm", "max_round_trip", "max_deviation", "patience", "num_threads"):
        given[name] = 0 if given[name] is None else given[name]
    integers = ("epochs", "patience", *(() if given["batch_size"] is None else ("batch_size",)))
    checked: dict[str, Any] = {name: _checks.integer(name, given[name]) for name in integers}
    if checked.get("batch_size") == 0:  # the extension's word for None
        raise ValueError("batch_size is 0, expected at least 1, or None for an automatic size")
    decays = () if given["weight_decay"] is None else ("weight_decay",)
    reals = ("learning_rate", *decays, "averaging", "clip_norm", "max_round_trip", "max_deviation")
    checked |= {name: _checks.real(name, given[name]) for name in reals}
    checked["num_threads"] = _checks.integer("num_threads", given["num_threads"], bits=32)
    checked["schedule"] = _checks.text("schedule", given["schedule"])
    checked["seed"] = _checks.integer("seed", given["seed"], unsigned=True)
    checkpoint = given["checkpoint"]
    checked["checkpoint"] = "" if checkpoint is None else _checks.path("checkpoint", checkpoint)
    if checkpoint is not None and not checked["checkpoint"]:
        raise ValueError("checkpoint is an empty path, expected that of a file, or None for no checkpoint")
    return checked


def statistics_of(flow: Flow, standardize: Any) -> str:
    """Return what the standardize layer is to be set from: what is said here, else what `build` was told."""
    if standardize is None:
        return flow._statistics()
    return _checks.text("standardize", standardize)


def unlike_mean(flow: Flow, how: Sequence[str]) -> dict[str, str]:
    """Return the columns that were not standardized by mean and standard deviation, and what by."""
    names = flow.column_names or [f"column {j + 1}" for j in range(flow.spec.input_size)]
    return {names[j]: found for j, found in enumerate(how) if found != "mean"}


def _split(
    flow: Flow, validation: float | ArrayLike | None, names: list[str] | None
) -> tuple[NDArray[Any] | None, float]:
    """Tell a validation array from a share of the rows."""
    if validation is None:
        return None, 0.0
    if isinstance(validation, (str, bytes, bool)):
        expected = "expected a share of the rows in [0, 1), an array of rows or None"
        raise TypeError(f"validation is {_checks.describe(validation)}, {expected}")
    validation, _ = _frames.read("validation", validation, names)
    validation = _core._host_array(validation)
    if np.ndim(validation) == 0:
        return None, _checks.real("validation", validation)
    return _checks.rows("validation", validation, flow.spec), 0.0


@contextmanager
def _named(flow: Flow, names: list[str] | None) -> Iterator[None]:
    """Give the flow the names of a frame's columns, unless training does not begin."""
    before = flow._column_names()
    if names is not None:
        flow._set_column_names(names)
    try:
        yield
    except (ValueError, TypeError):
        flow._set_column_names(before)
        raise


def fit(
    flow: Flow,
    x: ArrayLike,
    *,
    validation: float | ArrayLike | None,
    options: Mapping[str, Any],
    progress: bool | None,
    callback: Callable[[EpochRecord], object] | None,
) -> History:
    """Train `flow`; `Flow.fit` documents the arguments."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, got {_checks.describe(callback)}")
    given, frame_names = _frames.read("x", x, flow._column_names())
    rows = _checks.rows("x", _core._host_array(given), flow.spec)
    names = flow._column_names() or frame_names
    validation_rows, fraction = _split(flow, validation, names)
    checked = _checked_options(options) | {"validation_fraction": fraction}
    checked["standardize"] = _statistics_to_use(flow, options["standardize"])
    report = _data.require_density(rows, names, flow.spec.dtype, flow.spec.standardize)

    bar = _open_bar(progress, checked["epochs"])

    def on_epoch(record: EpochRecord) -> bool:
        if bar is not None:
            bar.on_epoch(record)
        answer = None if callback is None else callback(record)
        return not (isinstance(answer, (bool, np.bool_)) and not answer)

    on_progress = None if bar is None else bar.on_progress
    with _named(flow, names), bar or nullcontext():
        summary = flow._fit(rows, validation_rows, checked, on_progress, on_epoch)
    history = History._from_summary(flow, summary)
    if not any(finding.kind == "outliers" for finding in report.warnings):  # one warning for one finding
        _warn_of_far_rows(history, asked=checked["standardize"] == "robust")
    return history


def _statistics_to_use(flow: Flow, standardize: Any) -> str:
    if standardize is not None and not flow.spec.standardize:
        given = _checks.text("standardize", standardize)
        raise ValueError(
            f"standardize is {given!r}, but the flow does not begin with a standardize layer; expected None, or a flow "
            "of build(standardize=True)"
        )
    return statistics_of(flow, standardize)


def _warn_of_far_rows(history: History, *, asked: bool) -> None:
    """Say what `fit` has done about far rows without being asked."""
    findings = history._findings()
    if asked and not history.rows_left_out:
        return
    if findings:
        advice = "see whether these rows belong there; standardize and max_deviation choose otherwise"
        warnings.warn(
            f"x has rows that are far out. {'. '.join(findings)}; {advice}",
            _data.DataWarning,
            stacklevel=_data._outside(),
        )
