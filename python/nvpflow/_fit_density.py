"""What `Flow.fit_density` does around the compiled loop: checks, the progress bar and the history."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _context, _core, _training_options
from nvpflow._bar import Bar, open_bar
from nvpflow._model import Model
from nvpflow._target import LogDensity, Target
from nvpflow.density_history import DensityHistory

if TYPE_CHECKING:
    from nvpflow._core import DensityRecord  # of the stub only: the type of a plain dict

_TITLE = "reverse KL"


class _Bar(Bar):
    """A bar over every step."""

    _begun = False

    def on_progress(self, step: int, steps: int) -> None:
        if not self._begun:
            self._begun = True
            self.begin(steps, step)
        self.move(step, _TITLE)

    def on_report(self, record: DensityRecord) -> None:
        text = f"loss {record['validation_loss']:.4f} nats"
        if not math.isnan(record["ess"]):
            text += f", ESS {record['ess']:.1%}"
        self.show(text, _TITLE, record["step"])


def contexts_of(flow: Model, context: ArrayLike | None) -> NDArray[Any] | None:
    """Return contexts [M, C] of the flow's dtype, from [C] or [M, C]; None for a flow without one."""
    spec = flow.spec
    if spec.context_size == 0 or context is None:
        return _context.rows(context, 1, spec)  # None, or what is wrong
    given = np.asarray(_core._host_array(context))
    return _context.rows(context, len(given) if given.ndim == 2 else 1, spec, names=flow._context_names())


def fit_density(
    flow: Model,
    log_density: LogDensity,
    *,
    context: ArrayLike | None,
    options: Mapping[str, Any],
    progress: bool | None,
    callback: Callable[[DensityRecord], object] | None,
) -> DensityHistory:
    """Train `flow`; `Flow.fit_density` documents the arguments."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {_checks.describe(callback)}, expected callable or None")
    target, contexts = Target(log_density, flow.spec), contexts_of(flow, context)
    checked = _training_options.checked(options, _training_options.DENSITY_OPTIONS)
    bar = open_bar(progress, _Bar)

    def on_report(record: DensityRecord) -> bool:
        if bar is not None:
            bar.on_report(record)
        answer = None if callback is None else callback(record)
        return not (isinstance(answer, (bool, np.bool_)) and not answer)

    on_progress = None if bar is None else bar.on_progress
    with bar or nullcontext():
        return DensityHistory._from_summary(flow._fit_density(target, checked, on_progress, on_report, contexts))
