"""Writes coefficients.inl and tables.inl: what the elementary functions of the CPU and of CUDA evaluate.

The arithmetic has 60 digits (mpmath, NumPy). Each polynomial is the Chebyshev interpolant of a smooth function, which
is within a small factor of the minimax polynomial; the tests measure the error of the finished functions in ulp.
Run: python cpp/src/elementary/make_coefficients.py
"""

import textwrap
from collections.abc import Callable
from pathlib import Path

import mpmath as mp
import numpy as np

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


def atan_tail(w: mp.mpf) -> mp.mpf:
    """(atan(t) - t) / t^3 as a function of w = t^2."""
    t = mp.sqrt(w)
    return (mp.atan(t) - t) / t**3 if w > mp.mpf(10) ** -20 else -mp.mpf(1) / 3


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
    ("kAtanTail", "(atan t - t) / t^3 in t^2, |t| <= 1/2", atan_tail, mp.mpf(0), mp.mpf("0.2501"), 5, 12),
    ("kSinTail", "(sin(pi f / 2) - pi f / 2) / f^3 in f^2, |f| <= 1/2", sin_tail, mp.mpf(0), mp.mpf("0.2501"), 3, 7),
    ("kCosTail", "(cos(pi f / 2) - 1) / f^2 in f^2, |f| <= 1/2", cos_tail, mp.mpf(0), mp.mpf("0.2501"), 3, 7),
    ("kMills", "(x + 5/4) Q(x) exp(x^2 / 2) - 1/2 in (x - 4) / (x + 4), x >= 0", mills, mp.mpf(-1), mp.mpf(1), 11, 26),
]


# ---- tables of 32 numbers, which AVX-512 looks up in one instruction -------------------------------------------------

ENTRIES = 32
TANH_LOWEST = -4  # binary exponent of the first interval; four intervals to an octave
TANH_DEGREE = 5


def nearly_exact(function: Callable[[mp.mpf], mp.mpf], near: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """Find a float near `near` at which the function is all but a float (Gal 1986); return both."""
    if near == 0:
        return near, function(near)
    below = above = np.float32(float(near))
    candidates = [below]
    for _ in range(100):
        below, above = np.nextafter(below, np.float32(-100)), np.nextafter(above, np.float32(100))
        candidates += [below, above]

    def rounded(x: np.float32) -> mp.mpf:
        return mp.mpf(float(np.float32(float(function(mp.mpf(float(x)))))))

    best = min(candidates, key=lambda x: abs(rounded(x) / function(mp.mpf(float(x))) - 1))
    return mp.mpf(float(best)), rounded(best)


def tanh_tables() -> list[list[mp.mpf]]:
    """Centre and coefficients of tanh in the distance from it, by the low five bits of (bits of |x|) >> 21."""
    rows: list[list[mp.mpf]] = [[] for _ in range(ENTRIES)]
    for interval in range(ENTRIES):
        octave = mp.mpf(2) ** (TANH_LOWEST + interval // 4)
        low = octave * (1 + mp.mpf(interval % 4) / 4)
        high = low + octave / 4
        if interval == 0:
            low = mp.mpf(0)  # all that is smaller, too: the centre is 0 there, and the error relative
        centre, value = nearly_exact(mp.tanh, (low + high) / 2 if interval > 0 else low)

        def slope(d: mp.mpf, x: mp.mpf = centre) -> mp.mpf:
            return (mp.tanh(x + d) - mp.tanh(x)) / d if abs(d) > mp.mpf(10) ** -20 else mp.sech(x) ** 2

        first = int(np.float32(2.0**TANH_LOWEST).view(np.int32)) >> 21
        fitted = interpolate(slope, low - centre, high - centre, TANH_DEGREE - 1)
        rows[(first + interval) % ENTRIES] = [centre, value, *fitted]
    return [list(column) for column in zip(*rows, strict=True)]


def exp_tables() -> list[list[mp.mpf]]:
    """Arguments near k / 15 and their exponentials, by the low five bits of k = -15 .. 15."""
    rows = [nearly_exact(mp.exp, mp.mpf(k if k < 16 else k - ENTRIES) / 15) for k in range(ENTRIES)]
    return [list(column) for column in zip(*rows, strict=True)]


def power_table() -> list[list[mp.mpf]]:
    """2^(k / 16) for k = 0 .. 15, twice."""
    return [[mp.mpf(2) ** (mp.mpf(k % 16) / 16) for k in range(ENTRIES)]]


TABLES = [
    ("kTanhTable", "tanh: centre of the interval, value there, coefficients of the distance from it", tanh_tables),
    ("kExpTable", "e^x: x near k / 15, and its exponential", exp_tables),
    ("kPowerTable", "2^(k / 16), k = 0 .. 15, twice", power_table),
]


def literal(value: mp.mpf, kind: str, digits: int) -> str:
    text = mp.nstr(value, digits)
    return (text if ("." in text or "e" in text) else text + ".0") + ("f" if kind == "float" else "")


FIRST_LINE = "// Written by make_coefficients.py; lowest power first."


def polynomials() -> list[str]:
    lines = [FIRST_LINE, ""]
    for name, what, function, low, high, degree_float, degree_double in FITS:
        lines.append(f"// {what}")
        for suffix, kind, degree, digits in (("F", "float", degree_float, 10), ("D", "double", degree_double, 18)):
            text = ", ".join(literal(c, kind, digits) for c in interpolate(function, low, high, degree))
            lines += textwrap.wrap(f"constexpr {kind} {name}{suffix}[] = {{{text}}};", 120, subsequent_indent="    ")
        lines.append("")
    return lines


def tables() -> list[str]:
    lines = [FIRST_LINE, ""]
    for name, what, make in TABLES:
        lines.append(f"// {what}")
        lines.append(f"alignas(64) constexpr float {name}[][{ENTRIES}] = {{")
        for row in make():
            text = "{" + ", ".join(literal(value, "float", 10) for value in row) + "},"
            lines += textwrap.wrap(text, 120, initial_indent="    ", subsequent_indent="     ")
        lines += ["};", ""]
    return lines


def main() -> None:
    for name, lines in (("coefficients.inl", polynomials()), ("tables.inl", tables())):
        Path(__file__).with_name(name).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
