"""`AdamState`: what the optimizer keeps from one call of `Flow.fit` to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks


class AdamState:
    """What Adam keeps from one call of `Flow.fit` to the next, for rows that come in parts.

    A new one has made no step. ``flow.fit(x, adam=state, ...)`` goes on from it and leaves in it what the next call
    needs; it belongs to the weights that the flow then has. It can be copied and pickled.

    Attributes
    ----------
    steps : int
        Updates that were made.
    epochs : int
        Passes that were made; the order of the rows goes by it.
    first_moment, second_moment : ndarray of float64
        Running means of every parameter's gradient and of its square, in the order of a model file's tensors. Empty
        before the first step.

    Examples
    --------
    >>> import numpy as np, nvpflow
    >>> rng = np.random.default_rng(0)
    >>> flow, adam = nvpflow.build(2, 2, (8,)), nvpflow.AdamState()
    >>> options = {"epochs": 1, "validation": None, "averaging": None, "schedule": "constant", "progress": False}
    >>> for _ in range(3):
    ...     history = flow.fit(rng.normal(size=(640, 2)), adam=adam, **options)
    >>> adam.epochs
    3
    """

    __slots__ = ("epochs", "first_moment", "second_moment", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.epochs = 0
        self.first_moment: NDArray[np.float64] = np.empty(0)
        self.second_moment: NDArray[np.float64] = np.empty(0)

    def __repr__(self) -> str:
        """Return a summary such as ``AdamState(steps=40, epochs=5)``."""
        return f"{type(self).__name__}(steps={self.steps}, epochs={self.epochs})"

    def __eq__(self, other: Any) -> bool:
        """Two states are equal where they go on in the same way."""
        if not isinstance(other, AdamState):
            return NotImplemented
        return (self.steps, self.epochs) == (other.steps, other.epochs) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("first_moment", "second_moment")
        )

    __hash__ = None  # type: ignore[assignment]  # it changes


def check_state(name: str, state: Any) -> None:
    """Refuse attributes that no training leaves: anybody may set them. Sizes are checked with the flow's."""
    if not isinstance(state, AdamState):
        raise TypeError(f"{name} is {_checks.describe(state)}, expected an nvpflow.AdamState or None")
    for part in ("steps", "epochs"):
        _checks.count(f"{name}.{part}", getattr(state, part))
    for part in ("first_moment", "second_moment"):
        values = getattr(state, part)
        if not isinstance(values, np.ndarray) or values.dtype != np.float64:
            raise TypeError(f"{name}.{part} is {_checks.describe(values)}, expected an array of float64")
        if not np.isfinite(values).all() or (part == "second_moment" and (values < 0).any()):
            also = " and none below 0" if part == "second_moment" else ""
            raise ValueError(f"{name}.{part} holds {_worst(values)}, expected finite numbers{also}; give a new state")


def _worst(values: NDArray[np.float64]) -> str:
    return "negative numbers" if np.isfinite(values).all() else "NaN or infinity"
