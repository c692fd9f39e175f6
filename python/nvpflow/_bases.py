"""What latents are: `Normal` and `Uniform` of `nvpflow.layers`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks
from nvpflow._expression import HOME, Expression

# Normal scores of a uniform latent end here: 8.2 standard deviations out.
_LEAST_SHARE = 1e-16


@dataclass(frozen=True, repr=False)
class Normal(Expression):
    """Latents are independent and standard normal, ``N(0, I)``."""


@dataclass(frozen=True, repr=False)
class Uniform(Expression):
    """Latents are independent and uniform from `low` to `high`, both of them included.

    ``log p(x) = log|det dz/dx| - D log(high - low)`` where all latents lie in the interval, else -inf, with a gradient
    of zero. Samples never lie outside. It is for data that fill an interval, and for layers that keep it, such as
    splines on it. Standardize and actnorm layers, linear ones and affine couplings move rows out.

    Parameters
    ----------
    low, high
        Finite, ``low < high``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """

    _by_position = 2

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        low, high = (_checks.real(name, getattr(self, name)) for name in ("low", "high"))
        for name, value in (("low", low), ("high", high)):
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}, expected a finite number")
        if not low < high:
            raise ValueError(f"high is {high}, expected more than low, which is {low}")
        self._set(low=low, high=high)


Base = Normal | Uniform
NORMAL = Normal()
_KINDS: dict[str, type[Base]] = {"normal": Normal, "uniform": Uniform}
NAMES = tuple(_KINDS)
for _kind in _KINDS.values():
    _kind.__module__ = HOME


def checked(value: Any) -> Base:
    """Return a base given as such, or by the name of its kind."""
    if isinstance(value, str) and value in _KINDS:
        return _KINDS[value]()
    if type(value) in _KINDS.values():
        return value  # type: ignore[no-any-return]
    expected = f"expected {', '.join(map(repr, NAMES))}, or one of nvpflow.layers such as Uniform(0, 1)"
    if isinstance(value, str):
        raise ValueError(f"base is {_checks.shortened(repr(value))}, {expected}")
    raise TypeError(f"base is {_checks.describe(value)}, {expected}")


def is_bounded(base: Base) -> bool:
    """Tell whether there are latents without a density, so that layers must keep rows where it is."""
    return isinstance(base, Uniform)


def in_words(base: Base) -> str:
    """Return what latents are, for messages."""
    return "standard normal" if isinstance(base, Normal) else f"uniform from {base.low:g} to {base.high:g}"


def to_json(base: Base) -> dict[str, Any]:
    """Return what JSON holds of a base."""
    (name,) = (name for name, kind in _KINDS.items() if kind is type(base))
    return {"kind": name} | dataclasses.asdict(base)


def from_json(entry: dict[str, Any]) -> Base:
    """Return the base of an entry that the extension wrote."""
    fields = dict(entry)
    return _KINDS[fields.pop("kind")](**fields)


def normal_scores(base: Base, latents: NDArray[Any]) -> NDArray[np.float64]:
    """Return latents such that they are standard normal where the base is what they are distributed by.

    Those outside of the base become infinite.
    """
    z = np.asarray(latents, dtype=np.float64)
    if isinstance(base, Normal):
        return z
    share = np.clip((z - base.low) / (base.high - base.low), _LEAST_SHARE, 1 - _LEAST_SHARE)
    from statistics import NormalDist  # which takes a tenth of what importing NumPy takes

    scores = np.reshape([NormalDist().inv_cdf(p) for p in share.ravel()], z.shape)
    return np.where(z < base.low, -np.inf, np.where(z > base.high, np.inf, scores))
