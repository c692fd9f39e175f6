"""What a training was, epoch by epoch: `History`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _html

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        Largest relative error of a round trip after the epoch, over the rows that epochs are compared by. See
        `Certificate`. NaN where `Flow.fit` was given no ``max_round_trip``.
    best_epoch
        The epoch whose weights the flow now has; 0 for the weights that training started from.
    best_loss
        Its validation loss; without validation data, the loss of up to 65,536 training rows after the epoch.
    stop_reason
        "epochs", "patience" or "callback".
    train_rows, validation_rows
        Rows trained and validated on.
    effective_rows
        ``sum(w)**2 / sum(w**2)`` of the training rows' weights (Kish, 1965): a mean by weight is as certain as that of
        so many rows without weights. `train_rows` where there are none.
    standardized
        The columns whose mean and scale in the standardize layer are not their mean and standard deviation, and what
        they are: ``{"column 3": "robust"}``. Columns without a name are counted from 1.
    rows_left_out
        Rows that were neither trained nor validated on, because they are extremely far out (`max_deviation` of
        `Flow.fit`).
    folds
        Of cross-validation: the validation loss is that of all rows, each by weights that have not seen it. 0: none.
    initial_loss
        Validation loss of the flow as it started, where it whitens (``standardize="covariance"`` of `build`). Epochs
        have to beat it by more than chance explains (see `Flow.fit`). None: not measured.
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
    effective_rows: float
    standardized: dict[str, str] = field(default_factory=dict)
    rows_left_out: int = 0
    folds: int = 0
    initial_loss: float | None = None

    @classmethod
    def _from_summary(cls, summary: Mapping[str, Any], standardized: dict[str, str]) -> History:
        """Return what the compiled loop tells; its records have the names of the arrays here."""
        epochs = summary["epochs"]
        values: dict[str, Any] = {
            name: np.array([epoch[name] for epoch in epochs], dtype=dtype) for name, dtype in _ARRAYS.items()
        }
        values |= {name: kind(summary[name]) for name, kind in _SCALARS.items() if name != "standardized"}
        values["standardized"] = standardized
        return cls(**values)

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
        return "\n".join([*lines, *self._start(), *self._findings()])

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

    def _start(self) -> list[str]:
        """Say that no epoch was better than the start, if so."""
        if self.best_epoch or self.initial_loss is None:
            return []
        return [f"kept as it started, a Gaussian: no epoch beats its validation nll, {self.initial_loss:.4f}"]

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
        said = "; ".join([self._summary(), *self._start(), *self._findings()])
        return _html.table(f"History: {said}", head, lines)

    def _summary(self) -> str:
        weighted = self.effective_rows != self.train_rows
        effective = f" (by weight as good as {self.effective_rows:,.0f})" if weighted else ""
        return (
            f"{len(self)} epochs in {self.seconds.sum():.1f} s, stop reason: {self.stop_reason}; "
            f"{self.train_rows:,} training{effective} "
            + (
                f"rows, validated in {self.folds} folds"
                if self.folds
                else f"and {self.validation_rows:,} validation rows"
            )
        )

    def _marked(self) -> list[tuple[str, int]]:
        """Return the first, the best and the last epoch, by index."""
        at_best = np.flatnonzero(self.epoch == self.best_epoch)
        marks = [("first", 0), *(("best", int(i)) for i in at_best), ("last", len(self) - 1)]
        return marks if len(self) else []

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as lists and numbers of Python, NaN where there was no validation data."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """Return the history that `to_dict` has made `values` of, also by way of JSON (None stands for NaN).

        Raises
        ------
        ValueError
            `values` is not what `to_dict` returns.
        """
        values = {"effective_rows": values.get("train_rows"), **values}
        needed = [name for name in [*_ARRAYS, *_SCALARS] if name not in _LATER]
        if set(values) - _LATER != set(needed):
            raise ValueError(f"the history holds {', '.join(map(str, values))}, expected {', '.join(needed)}")
        try:
            given: dict[str, Any] = {name: np.array(values[name], dtype=dtype) for name, dtype in _ARRAYS.items()}
            given |= {name: kind(values[name]) for name, kind in _SCALARS.items() if name in values}
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"the history holds something else ({error}), expected lists of numbers of one length"
            ) from error
        if any(given[name].shape != (len(given["epoch"]),) for name in _ARRAYS):
            lengths = {name: given[name].shape for name in _ARRAYS}
            raise ValueError(f"the history's lists have shapes {lengths}, expected one length")
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


_ARRAYS = {
    field.name: np.int64 if field.type == "NDArray[np.int64]" else np.float64
    for field in fields(History)
    if str(field.type).startswith("NDArray")
}


def _measured(value: Any) -> float | None:
    """Return a number, or None for what was not measured, which the compiled loop calls infinite."""
    return None if value is None or math.isinf(value) else float(value)


_KINDS: dict[Any, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "float | None": _measured,
    "str": str,
    "dict[str, str]": dict,
}
_SCALARS = {field.name: _KINDS[field.type] for field in fields(History) if field.name not in _ARRAYS}
# Not in histories of older versions.
_LATER = {"standardized", "rows_left_out", "folds", "initial_loss"}
