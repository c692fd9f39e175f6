"""JAX as importers use it, which is loaded where there is a flow of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def in_float64() -> AbstractContextManager[Any]:
    """Return a context in which JAX computes in float64."""
    jax = sys.modules["jax"]
    enable: Callable[[bool], AbstractContextManager[Any]]
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return enable(True)
