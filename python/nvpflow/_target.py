"""Log-densities that a caller gives as functions: what they may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _core
from nvpflow._core import FlowSpec

Array = NDArray[Any]
LogDensity = Callable[..., Any]
"""Of rows x [B, D], and of their contexts [B, C] where the flow has one: (log p [B], its gradient [B, D])."""

_PAIR = "a tuple (log_p [B], gradient [B, D]); nvpflow.torch.density and nvpflow.jax.density make one of a function"


class Target:
    """A caller's log-density with what it returns checked.

    Parameters
    ----------
    log_density
        Of x [B, D], and of its contexts [B, C] where the flow has one.
    spec
        The flow's.
    """

    def __init__(self, log_density: LogDensity, spec: FlowSpec) -> None:
        if not callable(log_density):
            raise TypeError(
                f"log_density is {_checks.describe(log_density)}, expected a function of x that returns {_PAIR}"
            )
        self._function, self._dtype = log_density, np.dtype(spec.dtype)

    def __call__(self, x: Array, context: Array | None, with_gradient: bool) -> tuple[Array, Array | None]:
        """Return log p [B] in float64 and, where wanted, its gradient [B, D] in the flow's dtype."""
        returned = self._of(x, context)
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise TypeError(f"log_density returned {_described(returned)}, expected {_PAIR}")
        log_p = _numbers("log_p", returned[0], (len(x),), np.dtype(np.float64))
        return log_p, _numbers("gradient", returned[1], x.shape, self._dtype) if with_gradient else None

    def log_p(self, x: Array, context: Array | None) -> Array:
        """Return log p [B] in float64, of a function that may also return nothing else."""
        returned = self._of(x, context)
        pair = isinstance(returned, (tuple, list)) and len(returned) == 2 and np.ndim(returned[0]) > 0
        return _numbers("log_p", returned[0] if pair else returned, (len(x),), np.dtype(np.float64))

    def _of(self, x: Array, context: Array | None) -> Any:
        return self._function(x) if context is None else self._function(x, context)


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {tuple(shape)}" if isinstance(shape, tuple) else _checks.describe(value)


def _numbers(name: str, value: ArrayLike, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    where = f"the {name} that log_density returned"
    try:
        found = _checks.numbers(where, _core._host_array(value))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; expected an array {list(shape)}") from None
    if found.shape != shape:
        raise ValueError(f"{where} has shape {found.shape}, expected {shape}: one for each row of x")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(found, dtype=dtype)
