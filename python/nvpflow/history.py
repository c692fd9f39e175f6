"""What a training was, epoch by epoch: `History`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nvpflow._records import Column, Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class History(Records):
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

    _COUNTER: ClassVar[str] = "epoch"
    _WHAT: ClassVar[str] = "the history"
    _COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column("epoch", "epoch", 5, ""),
        Column("train nll", "train_loss", 11, ".4f"),
        Column("validation nll", "validation_loss", 14, ".4f"),
        Column("learning rate", "learning_rate", 13, ".3g"),
        Column("gradient norm", "gradient_norm", 13, ".3g"),
        Column("seconds", "seconds", 7, ".2f"),
    )
    _LATER: ClassVar[frozenset[str]] = frozenset({"standardized", "rows_left_out", "folds", "initial_loss"})

    @classmethod
    def _from_summary(cls, summary: Mapping[str, Any], standardized: dict[str, str]) -> History:
        """Return what the compiled loop tells."""
        return cls._of_records(summary["epochs"], {**summary, "standardized": standardized})

    def _columns(self) -> tuple[Column, ...]:
        measured = len(self) > 0 and not np.isnan(self.round_trip).all()
        return (*self._COLUMNS, Column("round trip", "round_trip", 10, ".2e")) if measured else self._COLUMNS

    def _said(self) -> list[str]:
        return [self._summary(), *self._start(), *self._findings()]

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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """Return the history that `to_dict` has made `values` of, also by way of JSON (None stands for NaN).

        Raises
        ------
        ValueError
            `values` is not what `to_dict` returns.
        """
        return super().from_dict({"effective_rows": values.get("train_rows"), **values})

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
