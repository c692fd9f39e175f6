"""Log-densities of the Gaussians that flows are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def gaussian_log_prob(train: Array, rows: Array, contexts: tuple[Array, Array] | None = None) -> NDArray[np.float64]:
    """Return log p [B] in nats under the Gaussian with the training rows' mean and full covariance.

    Parameters
    ----------
    train
        Rows [N, D] to take mean and covariance from.
    rows
        Rows [B, D].
    contexts
        Of both, [N, C] and [B, C]: the density is that under the context, whose Gaussian has a mean that is linear in
        it. Columns of a context may be constant or depend on each other.

    Raises
    ------
    numpy.linalg.LinAlgError
        The covariance of `train` is singular.
    """
    known = 0 if contexts is None else contexts[0].shape[1]
    if len(train) <= train.shape[1] + known:
        count = train.shape[1] + known
        raise np.linalg.LinAlgError(f"train has {len(train)} rows of {count} columns, expected more rows than columns")
    train, rows = train.astype(np.float64), rows.astype(np.float64)
    if contexts is not None:
        train, rows = _without_what_is_linear(train, rows, contexts)
    covariance = np.cov(train, rowvar=False)
    std = np.sqrt(np.diag(covariance))
    if not std.all() or np.linalg.matrix_rank(covariance / np.outer(std, std), hermitian=True) < len(std):
        raise np.linalg.LinAlgError("train has a singular covariance, expected one of full rank; leave out a column")
    return _log_density(rows - train.mean(axis=0), covariance)


def _without_what_is_linear(train: Array, rows: Array, contexts: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return rows less what a linear function of the context explains of them, fitted to the training rows."""
    given, others = (context.astype(np.float64) for context in contexts)
    centre, spread = given.mean(axis=0), given.std(axis=0)
    spread[spread == 0] = 1
    given, others = (given - centre) / spread, (others - centre) / spread
    mean = train.mean(axis=0)
    slopes = np.linalg.lstsq(given, train - mean, rcond=None)[0]
    return train - given @ slopes, rows - others @ slopes


def shrunk_log_prob(
    train: Array, rows: Array, given: int = 0, *, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return log p [B] in nats under a Gaussian that few training rows are enough for.

    Its correlations are shrunk towards none (Ledoit and Wolf, 2004), so that their matrix is never singular.

    Parameters
    ----------
    train
        Rows [N, D] to take mean and covariance from.
    rows
        Rows [B, D].
    given
        How many of the last columns are a context: the density is that of the others under it.
    weights
        Of the training rows [N]. None: all count alike.

    Raises
    ------
    numpy.linalg.LinAlgError
        A column of `train` is constant.
    """
    train, rows = train.astype(np.float64), rows.astype(np.float64)
    shares = np.full(len(train), 1 / len(train)) if weights is None else weights / weights.sum()
    mean = shares @ train
    std = np.sqrt(shares @ np.square(train - mean))
    if not std.all():
        raise np.linalg.LinAlgError("train has a constant column, expected none; leave it out")
    z = (train - mean) / std
    deviations, correlations = (rows - mean) / std, _shrunk_correlations(z, shares)
    density = _log_density(deviations, correlations)
    own = len(std) - given
    if given:
        density -= _log_density(deviations[:, own:], correlations[own:, own:])
    density -= np.log(std[:own]).sum()
    return density


def _shrunk_correlations(z: Array, shares: NDArray[np.float64]) -> Array:
    """Return the mean of their outer products and the identity, weighted, for rows [N, D] of unit variance.

    shares [N], which add up to 1: what each row counts for.
    """
    correlations: Array = (z * shares[:, None]).T @ z
    target = np.eye(z.shape[1])
    distance = np.square(correlations - target).sum()
    # The mean square by which the outer products of single rows differ from their mean.
    noise = (shares @ np.square(np.square(z).sum(axis=1)) - np.square(correlations).sum()) * (shares @ shares)
    weight = float(np.clip(noise / distance, 0, 1)) if distance > 0 else 1.0
    return (1 - weight) * correlations + weight * target


def _log_density(deviations: Array, covariance: Array) -> NDArray[np.float64]:
    """Return log p [B] of deviations [B, D] from the mean."""
    factor = np.linalg.cholesky(covariance)
    white = np.linalg.solve(factor, deviations.T)
    log_det = 2 * np.log(np.diag(factor)).sum()
    density = -0.5 * (deviations.shape[1] * np.log(2 * np.pi) + log_det + np.square(white).sum(axis=0))
    return np.asarray(density, dtype=np.float64)
