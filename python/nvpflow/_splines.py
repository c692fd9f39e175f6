"""Monotonic rational-quadratic splines: `Spline` of `nvpflow.layers`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nvpflow import _checks
from nvpflow._expression import HOME, Kind
from nvpflow._text import counted

MOST_BINS = 256
_TAIL_BOUND = 3.0
_EXP_BOUND = -math.log(1e-3)
_FUNCTIONS = ("softplus", "exp")
_BOUNDARIES = ("one", "free")
_TAILS = ("identity", "slope")


@dataclass(frozen=True, init=False, repr=False)
class Spline(Kind):
    """A monotonic rational-quadratic spline of each feature within an interval; the network gives its knots.

    The interval is divided into K bins, by knots in x and by as many in y. In each bin y is a quotient of two quadratic
    polynomials of x that rises from knot to knot. At the knots its value and its derivative are continuous. Rows
    outside pass as they are: give columns of unit scale, as a standardize layer makes them.

    Of each feature the network gives K raw widths, K raw heights and K - 1 raw derivatives (K + 1 with
    ``boundary="free"``), all called u below. Where all are 0 the spline of the default arguments is the identity, and
    so nearly is a new flow.

    Parameters
    ----------
    num_bins
        K, 1 to 256.
    tail_bound
        B: the interval is [-B, B]; positive and finite. None: 3, where no `interval` is given.
    interval
        (lower, upper) in place of `tail_bound`, finite and ascending; a spline maps it onto itself.
    min_bin_width, min_bin_height
        m, in parts of the interval: the sizes of its bins are ``m + (1 - K m) softmax(u)``. At least 0, with K m below
        1. A large one bounds how steep a spline can be.
    min_derivative
        Of a knot, at least 0.
    derivative
        At a knot: "softplus": ``min_derivative + gain softplus(u + offset)``; "exp":
        ``min_derivative + exp(B v / (1 + abs(v)))`` with ``v = u / B``, so between exp(-B) and exp(B) beside the
        minimum.
    derivative_offset, derivative_gain
        Of softplus; finite, the gain positive. None: a gain of 1, and the offset for which the derivative is 1 at
        u = 0.
    derivative_bound
        B of exp, positive and finite. None: 6.9078, so that derivatives reach from 0.001 to 1,000 beside the minimum.
    size_bound
        S: raw widths and heights become ``u / (1 + abs(u / S))`` before all else. Positive; None: they stay as they
        are.
    boundary
        Derivatives at the two ends. "one": they are 1. "free": they are parameters like the others.
    tails
        Outside the interval. "identity": y = x, which goes on with the same slope where ``boundary="one"``, and jumps
        to slope 1 where it is "free". "slope": a straight line with the derivative at the end.

    Raises
    ------
    TypeError, ValueError
        A value is of the wrong type or out of range, or does not go with the others. The flow's dtype may bound values
        further.

    Notes
    -----
    A constant that the derivative's function does not have is None. Both directions are closed formulas. A narrow bin
    beside a high one, or the reverse, costs digits in any implementation, in float32 first. `nvpflow.Flow.certify`
    measures them.

    References
    ----------
    Durkan et al., Neural spline flows, 2019, section 3.1; Gregory and Delbourgo, Piecewise rational quadratic
    interpolation to monotonic data, 1982.
    """

    _kind = "spline"

    num_bins: int = 8
    interval: tuple[float, float] = (-_TAIL_BOUND, _TAIL_BOUND)
    min_bin_width: float = 1e-3
    min_bin_height: float = 1e-3
    min_derivative: float = 1e-3
    derivative: str = "softplus"
    derivative_offset: float | None = None
    derivative_gain: float | None = None
    derivative_bound: float | None = None
    size_bound: float | None = None
    boundary: str = "one"
    tails: str = "identity"

    def __init__(
        self,
        num_bins: int = 8,
        tail_bound: float | None = None,
        *,
        interval: Sequence[float] | None = None,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
        derivative: str = "softplus",
        derivative_offset: float | None = None,
        derivative_gain: float | None = None,
        derivative_bound: float | None = None,
        size_bound: float | None = None,
        boundary: str = "one",
        tails: str = "identity",
    ) -> None:
        bins = _checks.integer("num_bins", num_bins)
        if not 1 <= bins <= MOST_BINS:
            raise ValueError(f"num_bins is {bins}, expected 1 to {MOST_BINS}")
        function = _one_of("derivative", derivative, _FUNCTIONS)
        least = _at_least_0("min_derivative", min_derivative)
        constants = _constants(function, least, derivative_offset, derivative_gain, derivative_bound)
        self._set(
            num_bins=bins,
            interval=_interval(tail_bound, interval),
            min_bin_width=_smallest_size("min_bin_width", min_bin_width, bins),
            min_bin_height=_smallest_size("min_bin_height", min_bin_height, bins),
            min_derivative=least,
            derivative=function,
            **constants,
            size_bound=None if size_bound is None else _positive("size_bound", size_bound),
            boundary=_one_of("boundary", boundary, _BOUNDARIES),
            tails=_one_of("tails", tails, _TAILS),
        )

    @property
    def tail_bound(self) -> float | None:
        """B of an interval [-B, B]; None of another."""
        lower, upper = self.interval
        return upper if lower == -upper else None

    def _arguments(self) -> Iterator[str]:
        usual: dict[str, object] = {field.name: field.default for field in fields(self)}
        if self.derivative_gain is None:
            usual["derivative_bound"] = _EXP_BOUND
        else:
            usual["derivative_gain"] = 1.0
            usual["derivative_offset"] = _identity_offset(self.min_derivative, self.derivative_gain)
        yield repr(self.num_bins)
        for name, value in vars(self).items():
            if name == "num_bins" or value == usual[name]:
                continue
            if name == "interval" and self.tail_bound is not None:
                name, value = "tail_bound", self.tail_bound
            yield f"{name}={value!r}"

    def _in_words(self) -> str:
        """Return bins and interval, "8 bins on [-3, 3]"."""
        lower, upper = self.interval
        return f"{counted(self.num_bins, 'bin')} on [{lower:g}, {upper:g}]"

    def _fields_to_json(self) -> dict[str, Any]:
        found = asdict(self)
        derivative = {"function": found.pop("derivative")}
        for name in ("offset", "gain", "bound"):
            if (value := found.pop(f"derivative_{name}")) is not None:
                derivative[name] = value
        found["lower"], found["upper"] = found.pop("interval")
        return found | {"derivative": derivative}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Spline:
        derivative = dict(fields.pop("derivative"))
        interval = fields.pop("lower"), fields.pop("upper")
        constants = {"derivative": derivative.pop("function")} | {f"derivative_{k}": v for k, v in derivative.items()}
        return cls(interval=interval, **fields, **constants)


Spline.__module__ = HOME


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    text = _checks.text(name, value)
    if text not in known:
        raise ValueError(f"{name} is {_checks.shortened(repr(text))}, expected one of {', '.join(known)}")
    return text


def _positive(name: str, value: float) -> float:
    number = _checks.real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {number}, expected finite and > 0")
    return number


def _at_least_0(name: str, value: float) -> float:
    number = _checks.real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {number}, expected finite and >= 0")
    return number


def _smallest_size(name: str, value: float, bins: int) -> float:
    number = _at_least_0(name, value)
    if not bins * number < 1:
        raise ValueError(f"{name} is {number} with num_bins={bins}, expected less than 1 / num_bins, {1 / bins:g}")
    return number


def _interval(tail_bound: float | None, interval: Sequence[float] | None) -> tuple[float, float]:
    if interval is None:
        bound = _positive("tail_bound", _TAIL_BOUND if tail_bound is None else tail_bound)
        return -bound, bound
    if tail_bound is not None:
        raise ValueError(f"tail_bound is {tail_bound} beside interval={interval}, expected only one of them")
    if isinstance(interval, str) or not hasattr(interval, "__len__") or len(interval) != 2:
        raise TypeError(f"interval is {_checks.describe(interval)}, expected two numbers, (lower, upper)")
    lower, upper = (_checks.real(f"interval[{i}]", value) for i, value in enumerate(interval))
    if not -math.inf < lower < upper < math.inf:
        raise ValueError(f"interval is ({lower}, {upper}), expected two finite numbers, the first below the second")
    return lower, upper


def _constants(
    function: str, least: float, offset: float | None, gain: float | None, bound: float | None
) -> dict[str, float | None]:
    """Return all constants of the derivatives; None is what their function does not have."""
    given = {"derivative_offset": offset, "derivative_gain": gain, "derivative_bound": bound}
    others = ("derivative_bound",) if function == "softplus" else ("derivative_offset", "derivative_gain")
    for name in others:
        if given[name] is not None:
            raise ValueError(f"{name} is {given[name]} with derivative={function!r}, expected it left out")
    if function == "exp":
        return given | {"derivative_bound": _positive("derivative_bound", _EXP_BOUND if bound is None else bound)}
    gain = _positive("derivative_gain", 1.0 if gain is None else gain)
    offset = _identity_offset(least, gain) if offset is None else _checks.real("derivative_offset", offset)
    if offset is None:
        raise ValueError(
            f"derivative_offset missing with min_derivative={least}, expected a number: no derivative can be 1 at u = 0"
        )
    if not math.isfinite(offset):
        raise ValueError(f"derivative_offset is {offset}, expected finite")
    return given | {"derivative_offset": offset, "derivative_gain": gain}


def _identity_offset(least: float, gain: float) -> float | None:
    """Return the offset with least + gain softplus(offset) = 1, if there is one."""
    if least >= 1:
        return None
    rise = (1 - least) / gain
    return rise + math.log(-math.expm1(-rise))  # ln(e^rise - 1), also where e^rise is too large
