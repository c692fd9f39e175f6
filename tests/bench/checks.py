"""A contender is checked before it is timed: what is fast and wrong is no contender."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from configurations import Configuration, given, reference
from general_oracle import base_log_density
from peers import LEARNING_RATE, Peer
from timing import Call

ROWS = 64
LIMIT = 1e-4  # relative to max(1, |value|)


class WrongResultError(ArithmeticError):
    """A contender's results are off by more than LIMIT."""


def error(actual: Any, expected: Any) -> float:
    """The largest |actual - expected| / max(1, |expected|) over arrays or tuples of them; NaN counts as infinite."""
    if not isinstance(expected, tuple):
        actual, expected = (actual,), (expected,)
    worst = 0.0
    for got, wanted in zip(actual, expected, strict=True):
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        if got.shape != wanted.shape:
            raise WrongResultError(f"shape {got.shape}, expected {wanted.shape}")
        difference = np.abs(got - wanted) / np.maximum(1.0, np.abs(wanted))
        worst = max(worst, float(np.max(np.where(np.isnan(difference), np.inf, difference))))
    return worst


def _first_rows(results: Any) -> Any:
    return tuple(map(_first_rows, results)) if isinstance(results, tuple) else results[:ROWS]


@cache
def oracle_losses(configuration: Configuration, batch: int, steps: int = 3) -> tuple[float, ...]:
    """The loss before each of the first Adam steps on one batch, in float64."""
    oracle, rows = reference(configuration), given(configuration, batch)
    trained = [name for name in oracle.parameters if not name.endswith(".sign")]
    first, second = ({name: np.zeros_like(oracle.parameters[name]) for name in trained} for _ in range(2))
    losses = []
    for step in range(1, steps + 1):
        loss, gradients = oracle.nll_gradient(*rows)
        losses.append(loss)
        for name in trained:
            gradient = gradients.parameters[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            corrected = np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
            oracle.parameters[name] = (
                oracle.parameters[name] - LEARNING_RATE * first[name] / (1 - 0.9**step) / corrected
            )
    return tuple(losses)


def _first_given(rows: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple(array[:ROWS] if array.ndim == 2 else array for array in rows)


def _expected(peer: Peer, configuration: Configuration, op: str, rows: tuple[np.ndarray, ...]) -> tuple[str, Any]:
    """What to compare with, in words and numbers; None where only a round trip is left."""
    rows = _first_given(rows)
    if peer.other_maths:
        return "its own float64", peer.reference(op, *rows)
    oracle = reference(peer.checked_as(configuration))
    return "oracle", {"log_prob": oracle.log_prob, "forward": oracle.forward, "inverse": oracle.inverse}[op](*rows)


def _round_trip_error(
    peer: Peer, configuration: Configuration, op: str, rows: tuple[np.ndarray, ...], results: Any
) -> float:
    """inverse(forward(x)) against x, and log_prob against the density of forward's latents."""
    x, context = rows[0], rows[1:]
    if op == "inverse":
        return error(_first_rows(peer.function("forward", *rows)(results, *context)[0]), _first_rows(x))
    z, log_det = (np.asarray(part, np.float64) for part in peer.function("forward", *rows)(*rows))
    if op == "forward":
        return error(_first_rows(peer.function("inverse", *rows)(results[0], *context)), _first_rows(x))
    log_base = base_log_density(configuration.spec, z)
    return error(_first_rows(results), _first_rows(log_base + log_det))


def _training_error(
    peer: Peer, configuration: Configuration, rows: tuple[np.ndarray, ...], losses: list[float]
) -> tuple[str, float]:
    if peer.other_maths:
        return "its own float64, first loss", error(losses[:1], [-np.mean(peer.reference("log_prob", *rows))])
    if peer.other_steps:
        return "oracle, first loss", error(losses[:1], [reference(peer.checked_as(configuration)).nll(*rows)])
    return "oracle, three steps", error(losses, oracle_losses(peer.checked_as(configuration), len(rows[0])))


def check(peer: Peer, configuration: Configuration, op: str, rows: tuple[np.ndarray, ...], timed: Any) -> dict:
    """Run what will be timed once and compare its first rows; raises WrongResultError."""
    results = timed.result()
    if op == "train":
        against, worst = _training_error(peer, configuration, rows, results)
    else:
        if isinstance(timed, Call):
            results = tuple(np.array(r) for r in results) if op == "forward" else np.array(results)
        against, expected = _expected(peer, configuration, op, rows)
        if op == "inverse" and not peer.other_maths:
            expected = expected[0]
        if expected is None:
            against, worst = "round trip", _round_trip_error(peer, configuration, op, rows, results)
        else:
            worst = error(_first_rows(results), expected)
    if not worst <= LIMIT:
        raise WrongResultError(f"error {worst:.2g} against {against}, the limit is {LIMIT:.0e}")
    return {"against": against, "error": worst}
