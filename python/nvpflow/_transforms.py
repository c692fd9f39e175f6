"""What a coupling layer does to the features that it transforms: `Affine`, `Additive`; `Spline` is in _splines.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nvpflow import _checks
from nvpflow._expression import HOME, Kind
from nvpflow._splines import Spline

FUNCTIONS = ("tanh", "softsign", "atan", "identity", "sigmoid", "softplus")
_ALIASES = {"exp": "identity"}  # the scale exp(u), by which other libraries call it
_LIMITS = {"tanh": 1.0, "softsign": 1.0, "atan": math.pi / 2}  # of |s| / factor
_CONSTANTS = {"sigmoid": ("low", "high", "offset"), "softplus": ("low", "high", "offset"), "identity": ()}
_CONSTANTS |= dict.fromkeys(_LIMITS, ("factor", "divisor"))
_SOFTPLUS_LOW = 0.01
_LARGEST_LOG = 700.0  # whose exp float64 holds


@dataclass(frozen=True, init=False, repr=False)
class Affine(Kind):
    """``y = x * exp(s) + t``, the log-scale ``s = g(u)``; the network gives u and t.

    Parameters
    ----------
    function
        g, with F the factor and d the divisor:

        ============  ===============================================================
        ``tanh``      ``F tanh(u / d)``
        ``softsign``  ``F v / (1 + abs(v))``, ``v = u / d``
        ``atan``      ``F atan(u / d)``
        ``identity``  ``u``, without a bound; "exp" is another name for it
        ``sigmoid``   ``log(low + (high - low) sigmoid(u + offset))``
        ``softplus``  ``log(min(softplus(u + offset) + low, high))``
        ============  ===============================================================
    bound
        Of ``abs(s)``: positive and finite. It sets the constants of tanh, softsign and atan so that g has slope 1 at 0.
        Those of sigmoid make the scale lie between ``exp(-bound)`` and ``exp(bound)``, and 1 at ``u = 0``. None: 1,
        where no constant is given.
    factor, divisor
        F and d of tanh, softsign and atan in place of `bound`; both positive and finite.
    low, high, offset
        Smallest and largest scale, and what is added to u. For sigmoid in place of `bound`. For softplus in place of
        ``low=0.01, high=inf`` and the offset for which the scale is 1 at ``u = 0``. low is at least 0. high is above
        low, and infinite for softplus only.
    negated
        sigmoid, softplus: s has the opposite sign, and the scale is 1 over the one above.

    Raises
    ------
    TypeError, ValueError
        A value is of the wrong type or out of range, or does not go with the function. The flow's dtype may bound
        factors further.

    Notes
    -----
    A constant that the function does not have is None.

    References
    ----------
    Dinh et al., Density estimation using Real NVP, 2017, eq. 7-8.
    """

    _kind = "affine"

    function: str = "tanh"
    factor: float | None = None
    divisor: float | None = None
    low: float | None = None
    high: float | None = None
    offset: float | None = None
    negated: bool | None = None

    def __init__(
        self,
        function: str = "tanh",
        bound: float | None = None,
        *,
        factor: float | None = None,
        divisor: float | None = None,
        low: float | None = None,
        high: float | None = None,
        offset: float | None = None,
        negated: bool | None = None,
    ) -> None:
        given = {"factor": factor, "divisor": divisor, "low": low, "high": high, "offset": offset}
        constants = {name: _checks.real(name, value) for name, value in given.items() if value is not None}
        if bound is not None:
            bound = _checks.real("bound", bound)
        name = _function(function)
        has_sign = name in ("sigmoid", "softplus")
        if negated is not None:
            negated = _checks.boolean("negated", negated)
            if not has_sign:
                raise ValueError(f"negated is {negated} with function={name!r}, expected sigmoid or softplus for it")
        constants = _complete(name, bound, constants)
        _check(name, constants)
        empty = dict.fromkeys(given)
        self._set(function=name, **(empty | constants), negated=bool(negated) if has_sign else None)

    @property
    def bound(self) -> float:
        """The largest ``abs(s)``; infinite where there is none."""
        if self.function in _LIMITS:
            assert self.factor is not None
            return _bound_of(self.function, self.factor)
        if not self.low or self.high is None or math.isinf(self.high):
            return math.inf
        return max(abs(math.log(self.low)), abs(math.log(self.high)))

    def _arguments(self) -> Iterator[str]:
        yield repr(self.function)
        constants = {name: getattr(self, name) for name in _CONSTANTS[self.function]}
        for bound in (self.bound, float(f"{self.bound:.15g}")):  # the second: 2 B / pi * pi / 2 is not quite B
            if _takes(self.function, bound) and _of_bound(self.function, bound) == constants:
                constants = {"bound": bound}
        if self.function != "softplus" or constants != _softplus():
            yield from (f"{name}={_number(value)}" for name, value in constants.items())
        if self.negated:
            yield "negated=True"

    def _bound_in_words(self) -> str:
        """Return the largest log-scale, for tables."""
        bound = "none" if math.isinf(self.bound) else f"{self.bound:g}"
        return bound + ("" if self.function == "tanh" else f" ({self.function})")

    def _fields_to_json(self) -> dict[str, Any]:
        constants = {name: value for name, value in asdict(self).items() if value is not None}
        if constants.get("high") == math.inf:
            constants["high"] = None  # JSON has no infinity
        return {"log_scale": constants}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Affine:
        constants = dict(fields["log_scale"])
        if "high" in constants and constants["high"] is None:
            constants["high"] = math.inf
        return cls(**constants)


@dataclass(frozen=True, repr=False)
class Additive(Kind):
    """``y = x + t``; the network gives t, and the log-determinant is 0.

    References
    ----------
    Dinh et al., NICE: Non-linear independent components estimation, 2015.
    """

    _kind = "additive"

    def _bound_in_words(self) -> str:
        return "0"


Transform = Affine | Additive | Spline
for _kind in (Affine, Additive):
    _kind.__module__ = HOME


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else f"float({str(value)!r})"


def _function(value: str) -> str:
    name = _checks.text("function", value)
    name = _ALIASES.get(name, name)
    if name not in FUNCTIONS:
        known = ", ".join((*FUNCTIONS, *_ALIASES))
        raise ValueError(f"function is {_checks.shortened(repr(name))}, expected one of {known}")
    return name


def _complete(function: str, bound: float | None, constants: dict[str, float]) -> dict[str, float]:
    """Return all constants of a function, from a bound where none is given."""
    expected = _CONSTANTS[function]
    for name, value in constants.items():
        if name not in expected:
            raise ValueError(f"{name} is {value} with function={function!r}, expected {_taken(function)}")
    if bound is not None and (constants or function in ("softplus", "identity")):
        raise ValueError(f"bound is {bound} with {_shown(function, constants)}, expected {_taken(function)}")
    if constants:
        if missing := [name for name in expected if name not in constants]:
            raise ValueError(
                f"{' and '.join(missing)} missing with {_shown(function, constants)}, expected {_taken(function)}"
            )
        return constants
    return _softplus() if function == "softplus" else _of_bound(function, 1.0 if bound is None else bound)


def _shown(function: str, constants: dict[str, float]) -> str:
    return ", ".join([f"function={function!r}", *(f"{name}={value}" for name, value in constants.items())])


def _taken(function: str) -> str:
    """Return what a function can be given, in words."""
    if function == "identity":
        return "no constant: s is u itself, without a bound"
    *first, last = _CONSTANTS[function]
    every = f"all of {', '.join(first)} and {last}"
    return f"{every}, or none" if function == "softplus" else f"{every}, or only bound"


def _takes(function: str, bound: float) -> bool:
    """Tell whether `_of_bound` has constants for it."""
    if function in ("softplus", "identity"):
        return False
    return 0 < bound <= _LARGEST_LOG if function == "sigmoid" else 0 < bound < math.inf


def _of_bound(function: str, bound: float) -> dict[str, float]:
    """Return the constants for which ``abs(s) <= bound`` and the scale is 1 at u = 0."""
    if function == "identity":
        return {}
    if not 0 < bound < math.inf:
        raise ValueError(f"bound is {bound}, expected finite and > 0")
    if function == "sigmoid":
        if bound > _LARGEST_LOG:
            raise ValueError(f"bound is {bound}, expected at most {_LARGEST_LOG:g} with function='sigmoid'")
        return {"low": math.exp(-bound), "high": math.exp(bound), "offset": -bound}
    factor = bound / _LIMITS[function]
    return {"factor": factor, "divisor": factor}


def _bound_of(function: str, factor: float) -> float:
    return factor * _LIMITS[function]


def _softplus() -> dict[str, float]:
    """Return the constants of flowjax: a scale above 0.01 that is 1 at u = 0."""
    return {"low": _SOFTPLUS_LOW, "high": math.inf, "offset": math.log(math.expm1(1 - _SOFTPLUS_LOW))}


def _check(function: str, constants: dict[str, float]) -> None:
    for name in ("factor", "divisor"):
        if name in constants and not 0 < constants[name] < math.inf:
            raise ValueError(f"{name} is {constants[name]}, expected finite and > 0")
    if "low" not in constants:
        return
    low, high, offset = constants["low"], constants["high"], constants["offset"]
    if not 0 <= low < math.inf:
        raise ValueError(f"low is {low}, expected finite and >= 0")
    if not high > low or (function == "sigmoid" and math.isinf(high)):
        finite = "finite and " if function == "sigmoid" else ""
        raise ValueError(f"high is {high}, expected {finite}> low, which is {low}")
    if not math.isfinite(offset):
        raise ValueError(f"offset is {offset}, expected finite")
