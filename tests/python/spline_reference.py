"""One rational-quadratic spline in arithmetic of 50 digits, and how much rounding it must be forgiven.

The formulas are those of Durkan et al., Neural Spline Flows, 2019, with the root of the quadratic as the textbook has
it. A spline is the dict that a spec holds; raw numbers and arguments are floats and are taken for what they are.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import mpmath

_DIGITS = 50


class Range(NamedTuple):
    """What a spline can be found to say of one number where the number and the result are rounded."""

    low: float
    high: float


class Spline:
    """Knots and their slopes."""

    def __init__(
        self, spec: Mapping[str, Any], widths: Sequence[float], heights: Sequence[float], derivatives: Sequence[float]
    ) -> None:
        self._spec = spec
        with mpmath.workdps(_DIGITS):
            self.lower, self.upper = mpmath.mpf(spec["lower"]), mpmath.mpf(spec["upper"])
            self.span = self.upper - self.lower
            self.knots_x = self._knots(widths, spec["min_bin_width"])
            self.knots_y = self._knots(heights, spec["min_bin_height"])
            inner = [self._slope(u) for u in derivatives]
            self.slopes = inner if spec["boundary"] == "free" else [mpmath.mpf(1), *inner, mpmath.mpf(1)]
        assert len(self.slopes) == len(self.knots_x) == len(self.knots_y) == spec["num_bins"] + 1

    def _knots(self, raw: Sequence[float], smallest: float) -> list[mpmath.mpf]:
        u = [mpmath.mpf(value) for value in raw]
        if (bound := self._spec["size_bound"]) is not None:
            u = [v / (1 + abs(v / mpmath.mpf(bound))) for v in u]
        e = [mpmath.exp(v - max(u)) for v in u]
        share = (1 - len(u) * mpmath.mpf(smallest)) / mpmath.fsum(e)
        knots = [self.lower]
        for value in e:
            knots.append(knots[-1] + self.span * (mpmath.mpf(smallest) + share * value))
        return [*knots[:-1], self.upper]

    def _slope(self, raw: float) -> mpmath.mpf:
        how, u, least = self._spec["derivative"], mpmath.mpf(raw), mpmath.mpf(self._spec["min_derivative"])
        if how["function"] == "exp":
            return least + mpmath.exp(u / (1 + abs(u / mpmath.mpf(how["bound"]))))
        return least + mpmath.mpf(how["gain"]) * mpmath.log1p(mpmath.exp(u + mpmath.mpf(how["offset"])))

    def at(self, x: float, *, backwards: bool) -> tuple[mpmath.mpf, mpmath.mpf]:
        """Value and log-slope."""
        with mpmath.workdps(_DIGITS):
            return (self._inverse if backwards else self._forward)(mpmath.mpf(x))

    def ranges(self, x: float, *, backwards: bool, rounding: float, steps: int = 2) -> tuple[Range, Range]:
        """Value and log-slope, of all numbers that are at most `rounding` of the interval away from x.

        And as much to either side, of the interval and in the log-slope. Of these numbers every knot and `steps` to
        either side are looked at.
        """
        with mpmath.workdps(_DIGITS):
            step = mpmath.mpf(rounding) * self.span
            near = [mpmath.mpf(x) + step * i / steps for i in range(-steps, steps + 1)]
            near += [knot for knot in (self.knots_y if backwards else self.knots_x) if near[0] < knot < near[-1]]
            if self.lower <= x <= self.upper:
                near = [min(max(v, self.lower), self.upper) for v in near]
            found = [self.at(v, backwards=backwards) for v in near]
            values, log_slopes = [value for value, _ in found], [log_slope for _, log_slope in found]
            return (
                Range(float(min(values) - step), float(max(values) + step)),
                Range(float(min(log_slopes) - rounding), float(max(log_slopes) + rounding)),
            )

    # -- within the interval or beyond it

    def _outside(self, x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf] | None:
        """The edge and the slope there, of a point that is beyond it."""
        if self.lower <= x <= self.upper:
            return None
        edge, slope = (self.lower, self.slopes[0]) if x < self.lower else (self.upper, self.slopes[-1])
        return edge, slope if self._spec["tails"] == "slope" else mpmath.mpf(1)

    def _forward(self, x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        if (beyond := self._outside(x)) is not None:
            edge, slope = beyond
            return edge + (x - edge) * slope, mpmath.log(slope)
        piece = self._piece(bisect.bisect_right(self.knots_x, x, 1, len(self.knots_x) - 1) - 1)
        xi = (x - piece.x) / piece.width
        return piece.y + piece.height * piece.share(xi), mpmath.log(piece.slope(xi))

    def _inverse(self, y: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        if (beyond := self._outside(y)) is not None:
            edge, slope = beyond
            return edge + (y - edge) / slope, -mpmath.log(slope)
        piece = self._piece(bisect.bisect_right(self.knots_y, y, 1, len(self.knots_y) - 1) - 1)
        xi = piece.root(y)
        return piece.x + piece.width * xi, -mpmath.log(piece.slope(xi))

    def _piece(self, k: int) -> _Piece:
        return _Piece(
            self.knots_x[k],
            self.knots_x[k + 1] - self.knots_x[k],
            self.knots_y[k],
            self.knots_y[k + 1] - self.knots_y[k],
            self.slopes[k],
            self.slopes[k + 1],
        )


class _Piece:
    """One bin."""

    def __init__(self, x, width, y, height, left, right) -> None:
        self.x, self.width, self.y, self.height, self.left, self.right = x, width, y, height, left, right

    @cached_property
    def s(self) -> mpmath.mpf:
        return self.height / self.width

    def share(self, xi: mpmath.mpf) -> mpmath.mpf:
        """Of the bin's height, at a share xi of its width: equation 4."""
        numerator = self.s * xi**2 + self.left * xi * (1 - xi)
        return numerator / (self.s + (self.right + self.left - 2 * self.s) * xi * (1 - xi))

    def slope(self, xi: mpmath.mpf) -> mpmath.mpf:
        """Equation 5."""
        numerator = self.s**2 * (self.right * xi**2 + 2 * self.s * xi * (1 - xi) + self.left * (1 - xi) ** 2)
        return numerator / (self.s + (self.right + self.left - 2 * self.s) * xi * (1 - xi)) ** 2

    def root(self, y: mpmath.mpf) -> mpmath.mpf:
        """Equations 6 to 8."""
        rise, mixed = y - self.y, self.right + self.left - 2 * self.s
        a = self.height * (self.s - self.left) + rise * mixed
        b = self.height * self.left - rise * mixed
        c = -self.s * rise
        return 2 * c / (-b - mpmath.sqrt(b * b - 4 * a * c))
