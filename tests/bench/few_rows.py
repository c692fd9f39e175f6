"""Compare how flows start on tables of few rows: standardized, and as a Gaussian, beside scikit-learn's Gaussian.

    python tests/bench/few_rows.py                      # ten minutes of one core
    python tests/bench/few_rows.py --sizes 60x5,200x5 --seeds 3

Each flow is `FlowDensity()` but for `standardize`, "auto" or "covariance". Figures are the mean log-density of 5,000
rows that took no part, in nats. LedoitWolf is fitted to the columns as they are.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np
import nvpflow
from nvpflow.sklearn import FlowDensity
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.datasets import make_moons

TEST_ROWS = 5000
SIZES = "200x20,60x5,60x2,200x5,500x5,1000x10,2000x20,200x2,2000x10,1000x2"
Table = Callable[[np.random.Generator, int, int], np.ndarray]


def _normal(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    return r.normal(size=(n, size)) @ r.normal(size=(size, size))


def _exponential(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    return r.exponential(size=(n, size)) @ r.normal(size=(size, size))


def _clusters(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    return 3 * r.normal(size=(4, size))[r.integers(4, size=n)] + r.normal(size=(n, size))


def _banana(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    z = r.normal(size=(n, size))
    z[:, 1:] += np.square(z[:, :1]) - 1
    return z


def _ring(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    z = r.normal(size=(n, size))
    return z / np.linalg.norm(z, axis=1, keepdims=True) * (3 + 0.2 * r.normal(size=(n, 1)))


def _two(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    centre = 2 * r.normal(size=size)
    return r.normal(size=(n, size)) + np.where(r.random((n, 1)) < 0.4, centre, -centre)


def _uniforms(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    return r.uniform(-3, 3, size=(5, size))[r.integers(5, size=n)] + r.random((n, size))


def _moons(r: np.random.Generator, n: int, size: int) -> np.ndarray:
    z = r.normal(size=(n, size))
    z[:, :2] = make_moons(n, noise=0.05, random_state=int(r.integers(2**31)))[0]
    return z


KINDS: dict[str, Table] = {
    "normal": _normal,
    "exponential": _exponential,
    "four clusters": _clusters,
    "banana": _banana,
    "ring": _ring,
    "two clusters": _two,
    "five uniforms": _uniforms,
    "moons": _moons,
}


def _compared(make: Table, rows: int, columns: int, seed: int) -> tuple[float, float, float]:
    """Of the standardized flow, the one that starts as a Gaussian, and LedoitWolf."""
    table = make(np.random.default_rng([seed, rows, columns]), rows + TEST_ROWS, columns).astype(np.float32)
    train, test = table[:rows], table[rows:]
    standardized, covariance = (
        FlowDensity(standardize=start, random_state=seed).fit(train).score(test) for start in ("auto", "covariance")
    )
    fitted = LedoitWolf().fit(train.astype(np.float64))
    return standardized, covariance, multivariate_normal(fitted.location_, fitted.covariance_).logpdf(test).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, metavar="NxD,...", help="rows x columns (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    options = parser.parse_args()
    warnings.simplefilter("ignore", nvpflow.DataWarning)
    head = ("rows x columns", "rows a column", "standardized", "covariance", "LedoitWolf", "covariance - standardized")
    print("| " + " | ".join(head) + " | better |\n| --- |" + " ---: |" * len(head))
    for text in options.sizes.split(","):
        rows, columns = map(int, text.split("x"))
        found = np.array(
            [_compared(make, rows, columns, seed) for make in KINDS.values() for seed in range(options.seeds)]
        )
        gain = found[:, 1] - found[:, 0]
        means = " | ".join(f"{value:.3f}" for value in found.mean(axis=0))
        print(
            f"| {rows:,} x {columns} | {rows // columns} | {means} | {gain.mean():+.3f} | "
            f"{np.sum(gain > 0)} of {len(gain)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
