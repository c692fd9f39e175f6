"""What a training on a log-density was, report by report: `DensityHistory`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nvpflow._records import Column, Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class DensityHistory(Records):
    """What `Flow.fit_density` did: one value per report in each array, losses in nats.

    Attributes
    ----------
    step
        Steps that were done by the report, int64.
    loss
        Mean of ``log q(x) - log p(x)`` over the rows of the steps since the last report, each drawn before its step.
        It is the divergence KL(q | p) less log Z, Z the integral of p: ``-loss`` is the evidence's lower bound.
    validation_loss
        The same of the weights after the report's steps or of their average, whichever is better. Its rows are of the
        seed's sample, the same ones each time, and no step takes them.
    ess
        Of these rows and weights: the effective share of the importance weights p / q, in (0, 1]; 1 where the flow is
        the target. NaN where rows have several contexts, whose evidences differ.
    learning_rate, gradient_norm
        Of the last step; the norm before clipping.
    seconds
        Wall time of the steps and of the report.
    best_step
        The step whose weights, or whose average, the flow now has; 0 for the weights it started from.
    best_loss
        Its validation loss.
    stop_reason
        "steps", "patience" or "callback".
    """

    step: NDArray[np.int64]
    loss: NDArray[np.float64]
    validation_loss: NDArray[np.float64]
    ess: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    gradient_norm: NDArray[np.float64]
    seconds: NDArray[np.float64]
    best_step: int
    best_loss: float
    stop_reason: str

    _COUNTER: ClassVar[str] = "step"
    _WHAT: ClassVar[str] = "the history"
    _COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column("step", "step", 5, ""),
        Column("loss", "loss", 11, ".4f"),
        Column("validation loss", "validation_loss", 15, ".4f"),
        Column("ESS", "ess", 6, ".1%"),
        Column("learning rate", "learning_rate", 13, ".3g"),
        Column("gradient norm", "gradient_norm", 13, ".3g"),
    )

    @classmethod
    def _from_summary(cls, summary: Mapping[str, Any]) -> DensityHistory:
        """Return what the compiled loop tells."""
        return cls._of_records(summary["reports"], summary)

    def _said(self) -> list[str]:
        done = int(self.step[-1]) if len(self) else 0
        return [f"{done:,} steps in {self.seconds.sum():.1f} s, stop reason: {self.stop_reason}"]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the evidence's lower bound over the steps: `nvpflow.plot.evidence_curve`.

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

        return plot.evidence_curve(self, ax=ax)
