"""`AdamState`: what the optimizer keeps from one call of `Flow.fit` to the next; `Adam`: its steps, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _core


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


class Adam:
    """The optimizer of `Flow.fit`, for training loops of your own: Adam with decoupled weight decay.

    With the gradients that `Flow.fit` would form, a flow on the CPU gets the weights that `Flow.fit` would give it, bit
    for bit. Steps are made on the host. One thread at a time may use it.

    Parameters
    ----------
    flow
        What is trained. It is changed in place.
    learning_rate
        The step size, above 0.
    weight_decay
        Share of each kernel that a step takes off, times the learning rate.
    clip_norm
        A longer gradient is scaled down to this norm. 0: never.
    state
        What to go on from, such as that of `Flow.fit`. None: no step has been made.

    Attributes
    ----------
    learning_rate, weight_decay, clip_norm : float
        As above. Set them between two steps for a schedule.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type, or the state is of other parameters.

    Examples
    --------
    >>> import numpy as np, nvpflow
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(640, 2)).astype(np.float32)
    >>> flow = nvpflow.build(2, 2, (8,), standardize=False)
    >>> adam, gradient = nvpflow.Adam(flow), np.empty(flow.num_parameters, np.float32)
    >>> for rows in rng.permutation(640).reshape(10, 64):
    ...     loss, _ = flow.nll_gradient(x, index=rows, out=gradient)
    ...     norm = adam.step(gradient)
    >>> adam.state
    AdamState(steps=10, epochs=0)
    """

    __slots__ = ("_adam", "_flow", "clip_norm", "learning_rate", "weight_decay")

    def __init__(
        self,
        flow: _core.Flow,
        learning_rate: float = 3e-3,
        *,
        weight_decay: float = 0.0,
        clip_norm: float = 5.0,
        state: AdamState | None = None,
    ) -> None:
        if not isinstance(flow, _core.Flow):
            raise TypeError(f"flow is {_checks.describe(flow)}, expected a nvpflow.Flow")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self._flow = flow
        self._adam = _core.Adam(flow)
        if state is not None:
            self.state = state

    def step(self, gradient: ArrayLike) -> float:
        """Update the flow's kernels and biases by a gradient; its `Flow.threshold` goes, as it was of other weights.

        Parameters
        ----------
        gradient
            [num_parameters], of the flow's dtype, in the order of `Flow.parameters_flat`: what `Flow.nll_gradient`
            gives. What is not trained, such as a standardize layer, stays.

        Returns
        -------
        float
            The Euclidean norm of the gradient of what is trained, before clipping.

        Raises
        ------
        TrainingError
            The norm is NaN or infinite. Nothing has changed.
        TypeError, ValueError
            The gradient or an attribute is not as above. Nothing has changed.
        RuntimeError
            Another thread is in a step.
        """
        return _core._adam_step(self._adam, gradient, self.learning_rate, self.weight_decay, self.clip_norm)

    @property
    def state(self) -> AdamState:
        """A copy of what a later step goes on from; `Flow.fit` takes it, too. Settable."""
        state = AdamState()
        _core._adam_give_state(self._adam, state)
        return state

    @state.setter
    def state(self, state: AdamState) -> None:
        check_state("state", state)
        _core._adam_take_state(self._adam, state)

    def __repr__(self) -> str:
        """Return a summary such as ``Adam(learning_rate=0.003, steps=40)``."""
        return f"{type(self).__name__}(learning_rate={self.learning_rate!r}, steps={self.state.steps})"


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
