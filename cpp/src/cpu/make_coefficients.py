"""Writes coefficients.inl: the polynomials of simd.hpp, fitted in 60-digit arithmetic (needs mpmath).

Each is the Chebyshev interpolant of a smooth function, which is within a small factor of the minimax polynomial; the
tests measure the error of the finished functions in ulp. Run: python cpp/src/cpu/make_coefficients.py
"""

import textwrap
from collections.abc import Callable
from pathlib import Path

import mpmath as mp

mp.mp.dps = 60


def interpolate(function: Callable[[mp.mpf], mp.mpf], low: mp.mpf, high: mp.mpf, degree: int) -> list[mp.mpf]:
    """Monomial coefficients, lowest first, of the interpolant at the Chebyshev nodes of [low, high]."""
    count = degree + 1
    nodes = [(low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    matrix = mp.matrix(count, count)
    for row, node in enumerate(nodes):
        for column in range(count):
            matrix[row, column] = node**column
    return list(mp.lu_solve(matrix, mp.matrix([function(node) for node in nodes])))


def expm1_tail(r: mp.mpf) -> mp.mpf:
    return (mp.expm1(r) - r) / r**2 if abs(r) > mp.mpf(10) ** -20 else mp.mpf(1) / 2 + r / 6


def atanh_tail(w: mp.mpf) -> mp.mpf:
    """(atanh(s) - s) / s^3 as a function of w = s^2."""
    s = mp.sqrt(w)
    return (mp.atanh(s) - s) / s**3 if w > mp.mpf(10) ** -20 else mp.mpf(1) / 3


def sin_tail(w: mp.mpf) -> mp.mpf:
    """(sin(pi f / 2) - pi f / 2) / f^3 as a function of w = f^2."""
    f = mp.sqrt(w)
    return (mp.sin(mp.pi / 2 * f) - mp.pi / 2 * f) / f**3 if w > mp.mpf(10) ** -20 else -((mp.pi / 2) ** 3) / 6


def cos_tail(w: mp.mpf) -> mp.mpf:
    """(cos(pi f / 2) - 1) / f^2 as a function of w = f^2."""
    f = mp.sqrt(w)
    return (mp.cos(mp.pi / 2 * f) - 1) / f**2 if w > mp.mpf(10) ** -20 else -((mp.pi / 2) ** 2) / 2


MILLS_CENTRE = mp.mpf(4)


MILLS_SHIFT = mp.mpf(5) / 4  # near sqrt(pi / 2), where the slope at x = 0 vanishes


def mills(y: mp.mpf) -> mp.mpf:
    """(x + s) Q(x) exp(x^2 / 2) - 1/2, Q the normal upper tail, as a function of y = (x - c) / (x + c)."""
    x = MILLS_CENTRE * (1 + y) / (1 - y)
    root = mp.sqrt(2)
    if x > 1000:  # asymptotic series of Mills' ratio
        ratio = (1 - 1 / x**2 + 3 / x**4 - 15 / x**6 + 105 / x**8) / x
        return (x + MILLS_SHIFT) * ratio / mp.sqrt(2 * mp.pi) - mp.mpf(1) / 2
    return ((x + MILLS_SHIFT) * mp.exp(x**2 / 2) * mp.erfc(x / root) - 1) / 2


HALF_LN2 = mp.log(2) / 2 * mp.mpf("1.001")
FITS = [
    ("kExpm1Tail", "(e^r - 1 - r) / r^2, |r| <= ln 2 / 2", expm1_tail, -HALF_LN2, HALF_LN2, 4, 10),
    ("kAtanhTailWide", "(atanh s - s) / s^3 in s^2, s <= 1/3", atanh_tail, mp.mpf(0), mp.mpf(1) / 9, 4, 12),
    ("kAtanhTail", "(atanh s - s) / s^3 in s^2, |s| <= 3 - 2 sqrt 2", atanh_tail, mp.mpf(0), mp.mpf("0.0296"), 3, 8),
    ("kSinTail", "(sin(pi f / 2) - pi f / 2) / f^3 in f^2, |f| <= 1/2", sin_tail, mp.mpf(0), mp.mpf("0.2501"), 3, 7),
    ("kCosTail", "(cos(pi f / 2) - 1) / f^2 in f^2, |f| <= 1/2", cos_tail, mp.mpf(0), mp.mpf("0.2501"), 3, 7),
    ("kMills", "(x + 5/4) Q(x) exp(x^2 / 2) - 1/2 in (x - 4) / (x + 4), x >= 0", mills, mp.mpf(-1), mp.mpf(1), 11, 26),
]


def main() -> None:
    lines = ["// Written by make_coefficients.py; lowest power first.", ""]
    for name, what, function, low, high, degree_float, degree_double in FITS:
        lines.append(f"// {what}")
        for suffix, kind, degree, digits in (("F", "float", degree_float, 10), ("D", "double", degree_double, 18)):
            values = [mp.nstr(c, digits) for c in interpolate(function, low, high, degree)]
            ending = "f" if kind == "float" else ""
            text = ", ".join((v if ("." in v or "e" in v) else v + ".0") + ending for v in values)
            lines += textwrap.wrap(f"constexpr {kind} {name}{suffix}[] = {{{text}}};", 120, subsequent_indent="    ")
        lines.append("")
    Path(__file__).with_name("coefficients.inl").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
