"""The layers of a flow with their weights, as exporters go through them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow.flow import Flow
from nvpflow.layers import Layer, members, prefixes

Weights = dict[str, NDArray[Any]]


def layers_of(flow: Flow) -> list[tuple[Layer, Weights]]:
    """Return each layer with copies of its weights, by their names without the layer's: "scale.kernel", "mean"."""
    weights = flow.parameters()
    return [
        (layer, {name.removeprefix(prefix): np.array(value) for name, value in weights.items() if _of(name, prefix)})
        for layer, prefix in zip(flow.spec.layers, prefixes(flow.spec.layers), strict=True)
    ]


def context_statistics(flow: Flow) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return mean and log_std of a context that the flow standardizes."""
    weights = flow.parameters()
    if not flow.spec.standardize_context:
        return None
    return np.array(weights["context.mean"]), np.array(weights["context.log_std"])


def split(transformed: str | tuple[int, ...], input_size: int) -> tuple[NDArray[np.intp], ...]:
    """Return the features that stay, those that are transformed, and where each of the two after the other goes."""
    b = members(transformed, input_size)
    a = np.setdiff1d(np.arange(input_size), b)
    return a, b, np.argsort(np.concatenate([a, b]))


def lu_factors(weights: Weights) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return L and U of a linear layer."""
    size = len(weights["bias"])
    lower, upper = np.eye(size), np.diag(weights["sign"] * np.exp(weights["log_diagonal"].astype(np.float64)))
    lower[np.tril_indices(size, -1)] = weights["lower"]
    upper[np.triu_indices(size, 1)] = weights["upper"]
    return lower, upper


def _of(name: str, prefix: str) -> bool:
    return name.startswith(prefix)
