"""Latents as normal scores: what they would be under the standard normal base, for pictures and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist  # which takes a tenth of what importing SciPy takes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow._bases import Base, Mixture, Normal, StudentT, Uniform

Array = NDArray[np.float64]

# Normal scores end here: 8.2 standard deviations out.
_LEAST_SHARE = 1e-16
# With so many degrees of freedom Student's t distribution is the normal one to the digits of a picture.
_NEARLY_NORMAL = 1e6
_STEPS = 500  # of a continued fraction, which takes about the root of its arguments


def normal_scores(base: Base, latents: NDArray[Any], parameters: Mapping[str, NDArray[Any]] | None = None) -> Array:
    """Return latents [N, D] such that each column is standard normal where they are distributed by the base.

    Those outside of the base become infinite. parameters: of the flow, for a base that has some.
    """
    z = np.asarray(latents, dtype=np.float64)
    if isinstance(base, Uniform):
        inner = _of_shares((z - base.low) / (base.high - base.low))
        return np.where(z < base.low, -np.inf, np.where(z > base.high, np.inf, inner))
    if isinstance(base, Normal):
        return z
    if parameters is None:
        raise ValueError(f"base is {base!r}, expected the flow itself: its base has parameters")
    own = {name: np.asarray(v, dtype=np.float64) for name, v in parameters.items() if name.startswith("base.")}
    if isinstance(base, StudentT):
        degrees = np.exp(own["base.log_df"])
        return np.column_stack([_student_scores(column, df) for column, df in zip(z.T, degrees, strict=True)])
    return _mixture_scores(base, z, own)


def _of_shares(shares: Array) -> Array:
    """Return standard normal quantiles."""
    bounded = np.clip(shares, _LEAST_SHARE, 1 - _LEAST_SHARE)
    return np.reshape([NormalDist().inv_cdf(p) for p in bounded.ravel()], shares.shape)


def _student_scores(t: Array, df: float) -> Array:
    if df > _NEARLY_NORMAL:
        return t
    with np.errstate(over="ignore"):  # t^2 of a latent that is far out, whose share beyond is 0
        beyond = 0.5 * _beta_share(0.5 * df, 0.5, df / (df + t * t))
    return np.sign(t) * -_of_shares(beyond)


def _beta_share(a: float, b: float, x: Array) -> Array:
    """Return the regularized incomplete beta function, by its continued fraction (Abramowitz and Stegun, 26.5.8)."""
    swap = x > (a + 1) / (a + b + 2)
    p, q, y = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, 1 - x, x)
    with np.errstate(divide="ignore"):
        front = np.exp(
            p * np.log(y) + q * np.log1p(-y) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - np.log(p)
        )
    c, d = np.ones_like(y), 1 / (1 - (p + q) * y / (p + 1))  # Lentz's way
    value = d.copy()
    for m in range(1, _STEPS):
        for numerator in (
            m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m)),
            -(p + m) * (p + q + m) * y / ((p + 2 * m) * (p + 2 * m + 1)),
        ):
            d, c = 1 / (1 + numerator * d), 1 + numerator / c
            value *= c * d
        if np.max(np.abs(c * d - 1), initial=0.0) < 1e-14:
            break
    share = front * value
    found: Array = np.where(swap, 1 - share, share)
    return found


def _mixture_scores(base: Mixture, z: Array, own: Mapping[str, Array]) -> Array:
    """Return scores by the marginal distribution of each feature, which is a mixture too."""
    weights = np.exp(own["base.logits"] - own["base.logits"].max())
    weights /= weights.sum()
    deviations = np.exp(own["base.log_scales"])  # [M, D]
    if base.covariance == "full":
        size = z.shape[1]
        rows, columns = np.tril_indices(size, -1)
        unit = np.tile(np.eye(size), (base.components, 1, 1))
        unit[:, rows, columns] = own["base.lower"]
        deviations = np.sqrt(np.sum((unit * deviations[:, None]) ** 2, axis=2))
    below = np.zeros_like(z)
    erf = np.frompyfunc(math.erf, 1, 1)
    for weight, mean, deviation in zip(weights, own["base.means"], deviations, strict=True):
        below += weight * 0.5 * (1 + erf((z - mean) / (deviation * math.sqrt(2))).astype(np.float64))
    return _of_shares(below)
