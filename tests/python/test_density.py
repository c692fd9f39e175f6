"""Densities that are known: a trained flow comes close from below, never from above, and its samples are the data's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import nvpflow
import pytest


@dataclass(frozen=True)
class Target:
    """A density with exact samples; `largest_gap`: how far below it, in nats, a trained flow may stay."""

    name: str
    columns: int
    largest_gap: float
    entropy: float | None = None  # where it has a closed form

    def sample(self, rows: int, seed: int) -> np.ndarray:
        raise NotImplementedError

    def log_density(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return np.squeeze(largest, axis) + np.log(np.mean(np.exp(values - largest), axis=axis))


def log_normal(squares: np.ndarray, std: float, columns: int) -> np.ndarray:
    return -0.5 * squares / std**2 - columns * (math.log(std) + 0.5 * math.log(2 * math.pi))


class CorrelatedGaussian(Target):
    """N(mean, L L^T), four columns whose correlations are up to 0.97."""

    MEAN = np.array([1.0, -2.0, 0.5, 10.0])
    FACTOR = np.array([[2.0, 0, 0, 0], [1.5, 0.5, 0, 0], [-0.4, 0.9, 0.3, 0], [0.2, -0.1, 0.8, 0.25]])

    def sample(self, rows, seed):
        return self.MEAN + np.random.default_rng(seed).normal(size=(rows, 4)) @ self.FACTOR.T

    def log_density(self, x):
        noise = np.linalg.solve(self.FACTOR, (x - self.MEAN).T).T
        return log_normal(np.sum(noise**2, axis=1), 1.0, 4) - np.sum(np.log(np.diagonal(self.FACTOR)))


class EightGaussians(Target):
    """Equal parts of N(c_k, 0.3^2 I), c_k on a circle of radius 2. Eight islands are hard for an affine flow, which can
    only stretch one into eight and leaves bridges between them."""

    STD = 0.3
    CENTRES = 2 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)

    def sample(self, rows, seed):
        rng = np.random.default_rng(seed)
        return self.CENTRES[rng.integers(8, size=rows)] + self.STD * rng.normal(size=(rows, 2))

    def log_density(self, x):
        squares = np.sum((x[:, None] - self.CENTRES) ** 2, axis=2)
        return log_mean_exp(log_normal(squares, self.STD, 2), axis=1)


class TwoMoons(Target):
    """Two half circles, uniform along the arc, blurred by N(0, 0.15^2 I). The density is an integral over the arcs."""

    STD = 0.15

    @staticmethod
    def arcs(angle):
        upper = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=-1)
        return upper, lower

    def sample(self, rows, seed):
        rng = np.random.default_rng(seed)
        upper, lower = self.arcs(rng.uniform(0, np.pi, rows))
        return np.where(rng.random((rows, 1)) < 0.5, upper, lower) + self.STD * rng.normal(size=(rows, 2))

    def log_density(self, x):
        # The midpoint rule with 400 points: their distance is 0.05 of the blur's width.
        angle = (np.arange(400) + 0.5) * np.pi / 400
        points = np.concatenate(self.arcs(angle))
        chunks = [
            log_mean_exp(log_normal(np.sum((rows[:, None] - points) ** 2, axis=2), self.STD, 2), axis=1)
            for rows in np.array_split(x, max(1, len(x) // 1000))
        ]
        return np.concatenate(chunks)


TARGETS = [
    CorrelatedGaussian(
        "correlated Gaussian",
        4,
        0.02,
        2 * (1 + math.log(2 * math.pi)) + float(np.sum(np.log(np.diagonal(CorrelatedGaussian.FACTOR)))),
    ),
    EightGaussians("eight Gaussians", 2, 0.25),
    TwoMoons("two moons", 2, 0.05),
]
HELD_OUT = 20_000


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def trained(request):
    target = request.param
    flow = nvpflow.build(
        input_size=target.columns,
        num_flows=8,
        hidden_sizes=(64, 64),
        activation="silu",
        standardize=True,
        seed=2,
    )
    x = target.sample(20_000, seed=1).astype(np.float32)
    flow.fit(x, epochs=40, batch_size=256, learning_rate=2e-3, seed=1, progress=False, num_threads=1)
    return target, flow


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_targets_are_densities(target) -> None:
    """Samples and log_density belong together, and the density integrates to one."""
    x = target.sample(HELD_OUT, seed=3)
    log_density = target.log_density(x)
    if target.entropy is not None:
        noise = 4 * log_density.std() / math.sqrt(HELD_OUT)
        assert abs(-log_density.mean() - target.entropy) < noise
        return
    # On a grid the density sums to one, and its mean log under itself is that of the samples.
    side = np.linspace(-4.5, 4.5, 181)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    mass = np.exp(target.log_density(grid)) * (side[1] - side[0]) ** 2
    assert mass.sum() == pytest.approx(1.0, abs=1e-6)
    entropy = -np.sum(mass * target.log_density(grid))
    assert abs(-log_density.mean() - entropy) < 4 * log_density.std() / math.sqrt(HELD_OUT)


def test_the_flow_comes_close_from_below(trained) -> None:
    target, flow = trained
    x = target.sample(HELD_OUT, seed=4).astype(np.float32)
    log_q = flow.log_prob(x).astype(np.float64)
    log_p = target.log_density(x.astype(np.float64))
    # E[log p - log q] is the Kullback-Leibler divergence: never negative. Taking the difference row by row removes the
    # noise that both share; four standard errors remain.
    gap = log_p - log_q
    noise = 4 * gap.std() / math.sqrt(HELD_OUT)
    assert gap.mean() >= -noise, f"above the true density by {-gap.mean():.4f} nats, the noise is {noise:.4f}"
    assert gap.mean() <= target.largest_gap, f"{gap.mean():.4f} nats below the true density"
    if target.entropy is not None:
        assert log_q.mean() <= -target.entropy + 4 * log_q.std() / math.sqrt(HELD_OUT)


def test_the_flow_is_a_density(trained) -> None:
    """Importance sampling with a wider normal around the data: the integral of exp(log_prob) is one."""
    target, flow = trained
    rng = np.random.default_rng(5)
    data = target.sample(HELD_OUT, seed=6)
    mean, factor = data.mean(axis=0), np.linalg.cholesky(2.0 * np.cov(data, rowvar=False))
    noise = rng.normal(size=(200_000, target.columns))
    x = (mean + noise @ factor.T).astype(np.float32)
    log_proposal = log_normal(np.sum(noise**2, axis=1), 1.0, target.columns) - np.sum(np.log(np.diagonal(factor)))
    weight = np.exp(flow.log_prob(x) - log_proposal)
    assert abs(weight.mean() - 1) < 5 * weight.std() / math.sqrt(len(x)) + 1e-3


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float:
    both = np.concatenate([first, second])
    cdfs = [np.searchsorted(np.sort(part), both, side="right") / len(part) for part in (first, second)]
    return float(np.max(np.abs(cdfs[0] - cdfs[1])))


def energy_distances(distances: np.ndarray, first: np.ndarray) -> np.ndarray:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013); column k of `first` is 1 for the rows that are X."""
    second = 1.0 - first
    to_first, to_second = distances @ first, distances @ second
    x, y = first.sum(axis=0), second.sum(axis=0)
    between = np.sum(first * to_second, axis=0) / (x * y)
    return 2 * between - np.sum(first * to_first, axis=0) / x**2 - np.sum(second * to_second, axis=0) / y**2


def test_samples_are_the_datas(trained) -> None:
    target, flow = trained
    rows = 1000
    drawn, data = flow.sample(rows, seed=7).astype(np.float64), target.sample(rows, seed=8)

    # Per column and along random directions, each at level 1e-4: sqrt(-ln(1e-4 / 2) / 2) sqrt(2 / n).
    critical = math.sqrt(-math.log(0.5e-4) / 2) * math.sqrt(2 / rows)
    directions = np.concatenate(
        [np.eye(target.columns), np.random.default_rng(9).normal(size=(8, target.columns)) / data.std(axis=0)]
    )
    for direction in directions:
        assert kolmogorov_smirnov(drawn @ direction, data @ direction) < critical

    # All columns together: the energy distance against 199 random relabellings, level 1/200.
    both = np.concatenate([drawn, data]) / data.std(axis=0)
    squares = np.sum(both**2, axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * both @ both.T, 0))
    rng = np.random.default_rng(10)
    labels = (np.arange(2 * rows) < rows).astype(np.float64)
    distance = energy_distances(distances, np.stack([labels, *(rng.permutation(labels) for _ in range(199))], axis=1))
    assert distance[0] < np.max(distance[1:])


def test_the_two_sample_test_tells_distributions_apart() -> None:
    """It would notice: half of the correlations, or a shift of a fifth of a standard deviation."""
    target = TARGETS[0]
    data = target.sample(1000, seed=11)
    critical = math.sqrt(-math.log(0.5e-4) / 2) * math.sqrt(2 / 1000)
    assert kolmogorov_smirnov(data[:, 0], target.sample(1000, seed=12)[:, 0]) < critical
    assert kolmogorov_smirnov(data[:, 0], target.sample(1000, seed=12)[:, 0] + 0.25 * data[:, 0].std()) > critical


def test_an_untrained_flow_is_far_below() -> None:
    target = TARGETS[0]
    flow = nvpflow.build(input_size=target.columns, seed=2)
    x = target.sample(1000, seed=13).astype(np.float32)
    assert np.mean(target.log_density(x.astype(np.float64)) - flow.log_prob(x)) > 1
