"""What latents are: `Normal`, `Uniform`, `StudentT` and `Mixture` of `nvpflow.layers`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from nvpflow import _checks
from nvpflow._expression import HOME, Kind


class _BaseKind(Kind):
    """What the package asks of a base."""

    _is_bounded: ClassVar[bool] = False  # there are latents without a density: layers must keep rows where it is
    _has_heavy_tails: ClassVar[bool] = False  # far rows are what it is for

    def _in_words(self) -> str:
        """Return what latents are, for messages."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Normal(_BaseKind):
    """Latents are independent and standard normal, ``N(0, I)``."""

    _kind = "normal"

    def _in_words(self) -> str:
        return "standard normal"


@dataclass(frozen=True, repr=False)
class Uniform(_BaseKind):
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

    _kind = "uniform"
    _is_bounded = True
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

    def _in_words(self) -> str:
        return f"uniform from {self.low:g} to {self.high:g}"


@dataclass(frozen=True, repr=False)
class StudentT(_BaseKind):
    """Latents are independent and follow Student's t distribution, each feature with its own degrees of freedom.

    It is for data with heavy tails. The density of far rows falls off as a power, which no layer over a normal base
    gives them. The degrees of freedom are ``exp(base.log_df)``, a parameter of the flow [D]. `Flow.fit` then
    leaves out no far row, and sets the standardize layer from quartiles, which far rows do not move.

    Parameters
    ----------
    df
        What each feature's degrees of freedom start as, > 0. 1 is Cauchy's distribution; many are nearly the normal
        one.
    trainable
        Train them with the layers. False: they stay.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """

    _kind = "student_t"
    _has_heavy_tails = True

    df: float = 4.0
    trainable: bool = True

    def __post_init__(self) -> None:
        df = _checks.real("df", self.df)
        if not 0 < df < math.inf:
            raise ValueError(f"df is {df}, expected a finite number above 0")
        self._set(df=df, trainable=_checks.boolean("trainable", self.trainable))

    def _in_words(self) -> str:
        return f"Student t distributed with {'trained ' if self.trainable else ''}degrees of freedom"


COVARIANCES = ("diagonal", "full")


@dataclass(frozen=True, repr=False)
class Mixture(_BaseKind):
    """Latents follow a mixture of normal distributions, whose weights, means and covariances are trained.

    It is for data that fall into separate groups: layers alone leave bridges between them. Component m has the weight
    ``softmax(base.logits)[m]``, the mean ``base.means[m]`` and the covariance ``F F^T``. F is ``L diag(s)`` with
    ``s = exp(base.log_scales[m])``. L is the identity. With full covariances it is unit lower triangular, with
    ``base.lower[m]`` below the diagonal, row by row.

    Parameters
    ----------
    components
        1 to 1,024.
    covariance
        "diagonal" or "full". ``components * D^2`` is at most 2^26.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """

    _kind = "mixture"

    components: int = 4
    covariance: str = "diagonal"

    def __post_init__(self) -> None:
        components = _checks.integer("components", self.components)
        if not 1 <= components <= MOST_COMPONENTS:
            raise ValueError(f"components is {components}, expected 1 to {MOST_COMPONENTS}")
        covariance = _checks.text("covariance", self.covariance)
        if covariance not in COVARIANCES:
            raise ValueError(
                f"covariance is {_checks.shortened(repr(covariance))}, expected one of {', '.join(COVARIANCES)}"
            )
        self._set(components=components, covariance=covariance)

    def _in_words(self) -> str:
        return f"a mixture of {self.components} normal distributions with {self.covariance} covariances"


MOST_COMPONENTS = 1024
Base = Normal | Uniform | StudentT | Mixture
NORMAL = Normal()
KINDS: tuple[type[Base], ...] = get_args(Base)
NAMES = tuple(kind._kind for kind in KINDS)
for _kind in KINDS:
    _kind.__module__ = HOME


def checked(value: Any) -> Base:
    """Return a base given as such, or by the name of its kind."""
    if isinstance(value, str) and value in NAMES:
        return KINDS[NAMES.index(value)]()
    if type(value) in KINDS:
        return value  # type: ignore[no-any-return]
    expected = f"expected {', '.join(map(repr, NAMES))}, or one of nvpflow.layers such as Uniform(0, 1)"
    if isinstance(value, str):
        raise ValueError(f"base is {_checks.shortened(repr(value))}, {expected}")
    raise TypeError(f"base is {_checks.describe(value)}, {expected}")


def is_bounded(base: Base) -> bool:
    """Tell whether there are latents without a density, so that layers must keep rows where it is."""
    return base._is_bounded


def has_heavy_tails(base: Base) -> bool:
    """Tell whether far rows are what the base is for."""
    return base._has_heavy_tails


_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-12, 1e12  # beyond, latents or their squares leave float32


def checked_temperature(value: Any, base: Base) -> float:
    """Return a temperature, the variance of a normal base: 1 for None and for 1, which every base has.

    It says what `Flow.sample` says.
    """
    given = 1.0 if value is None else _checks.real("temperature", value)
    if not _LEAST_TEMPERATURE <= given <= _MOST_TEMPERATURE:
        raise ValueError(f"temperature is {given:g}, expected a number from 1e-12 to 1e12")
    if given != 1 and not isinstance(base, Normal):
        raise ValueError(
            f"temperature is {given:g}, expected 1: only a normal base has a temperature, and this flow's is another "
            "one"
        )
    return given


def in_words(base: Base) -> str:
    """Return what latents are, for messages."""
    return base._in_words()
