"""What a training on a log-density was, report by report: `DensityHistory`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _html


@dataclass(frozen=True, eq=False, repr=False)
class DensityHistory:
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

    @classmethod
    def _from_summary(cls, summary: Mapping[str, Any]) -> DensityHistory:
        """Return what the compiled loop tells; its records have the names of the arrays here."""
        reports = summary["reports"]
        arrays: dict[str, Any] = {
            name: np.array([report[name] for report in reports], dtype=np.int64 if name == "step" else np.float64)
            for name in _ARRAYS
        }
        return cls(**arrays, **{name: summary[name] for name in _SCALARS})

    def __len__(self) -> int:
        """Return the number of reports."""
        return len(self.step)

    def __repr__(self) -> str:
        """Return a table of the first, the best and the last report."""
        lines = [
            f"DensityHistory: {self._summary()}",
            "          step         loss  validation loss     ESS  learning rate  gradient norm",
        ]
        lines += [
            f"  {mark:<5}  {self.step[i]:>5}  {self.loss[i]:>11.4f}  {self.validation_loss[i]:>15.4f}  "
            f"{self.ess[i]:>6.1%}  {self.learning_rate[i]:>13.3g}  {self.gradient_norm[i]:>13.3g}"
            for mark, i in self._marked()
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return a table of the first, the best and the last report, for notebooks."""
        head = ("", "step", "loss", "validation loss", "ESS", "learning rate", "gradient norm")
        lines = [
            (
                mark,
                f"{self.step[i]}",
                f"{self.loss[i]:.4f}",
                f"{self.validation_loss[i]:.4f}",
                f"{self.ess[i]:.1%}",
                f"{self.learning_rate[i]:.3g}",
                f"{self.gradient_norm[i]:.3g}",
            )
            for mark, i in self._marked()
        ]
        return _html.table(f"DensityHistory: {self._summary()}", head, lines)

    def _summary(self) -> str:
        done = int(self.step[-1]) if len(self) else 0
        return f"{done:,} steps in {self.seconds.sum():.1f} s, stop reason: {self.stop_reason}"

    def _marked(self) -> list[tuple[str, int]]:
        """Return the first, the best and the last report, by index."""
        at_best = np.flatnonzero(self.step == self.best_step)
        marks = [("first", 0), *(("best", int(i)) for i in at_best), ("last", len(self) - 1)]
        return marks if len(self) else []

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as lists and numbers of Python."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}


_ARRAYS = [field.name for field in fields(DensityHistory) if str(field.type).startswith("NDArray")]
_SCALARS = [field.name for field in fields(DensityHistory) if field.name not in _ARRAYS]
