"""Which activation a function is, found by calling it: names do not tell slopes and other constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks
from nvpflow.importers._refusal import kind_of, named, refused

Array = NDArray[np.float64]

_PROBES = np.array([-30.0, -8.0, -3.0, -1.5, -0.7, -0.1, 0.0, 0.1, 0.7, 1.5, 3.0, 8.0, 30.0])
# float32's digits: some libraries compute in nothing else. GELU's two forms differ by 5e-4.
_TOLERANCE = 1e-5


def _of_sign(u: Array, negative: Callable[[Array], Array]) -> Array:
    return np.where(u > 0, u, negative(np.minimum(u, 0.0)))


def _sigmoid(u: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * u))


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda u: np.maximum(u, 0.0),
    "leaky_relu": lambda u: _of_sign(u, lambda v: 0.01 * v),
    "elu": lambda u: _of_sign(u, np.expm1),
    "gelu": lambda u: u * np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in u.ravel()]).reshape(u.shape),
    "silu": lambda u: u * _sigmoid(u),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "softplus": lambda u: np.logaddexp(0.0, u),
}


def computed(name: str, values: Array) -> Array:
    """Return what an activation makes of numbers."""
    return _FUNCTIONS[name](values)


def checked(path: str, name: str) -> str:
    """Return the name of an activation, which must be one here."""
    if name not in _FUNCTIONS:
        raise refused(path, _checks.shortened(repr(name)), f"one of {', '.join(_FUNCTIONS)}")
    return name


def recognised(path: str, source: Any, call: Callable[[Array], Any] | None = None) -> str:
    """Return the name of the activation here that `source` is.

    call: what it gives for an array [N] of float64; None: `source` itself does, or is a name.
    """
    if isinstance(source, str):
        return checked(path, source)
    try:
        found = np.asarray((call or source)(_PROBES), np.float64)
    except Exception as error:
        raise refused(path, f"{_named(source)}, which fails on numbers: {type(error).__name__}", _expected()) from error
    if found.shape == _PROBES.shape:
        for name, function in _FUNCTIONS.items():
            if np.all(np.abs(found - function(_PROBES)) <= _TOLERANCE * (1 + np.abs(_PROBES))):
                return name
    raise refused(path, _named(source), _expected(), "train the flow again with one of these")


def _named(source: Any) -> str:
    return str(getattr(source, "__name__", None) or named(kind_of(source)))


def _expected() -> str:
    return f"what computes one of {', '.join(_FUNCTIONS)}"
