"""A configuration's formula, written once for NumPy, JAX, PyTorch and ONNX.

What does not depend on rows is computed ahead for inference (`composed`) and in each step of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from configurations import Configuration, reference
from general_oracle import transformed_features

LOG_2_PI = math.log(2 * math.pi)


class Arrays(NamedTuple):
    """An array library: the module, whose names are NumPy's, and what each library does best in a way of its own."""

    module: Any
    dense: Callable  # (rows, kernel [in, out], bias)
    relu: Callable
    sigmoid: Callable
    columns: Callable  # (rows, a slice or a list of indices)
    split: Callable = lambda x, at: (x[:, :at], x[:, at:])
    total: Callable = sum


def numpy_arrays() -> Arrays:
    return Arrays(
        np,
        dense=lambda x, kernel, bias: x @ kernel + bias,
        relu=lambda u: np.maximum(u, 0),
        sigmoid=lambda u: 1 / (1 + np.exp(-u)),
        columns=lambda x, indices: x[:, indices],
    )


def jax_arrays() -> Arrays:
    import jax
    import jax.numpy as jnp

    return Arrays(
        jnp,
        dense=lambda x, kernel, bias: x @ kernel + bias,
        relu=lambda u: jnp.maximum(u, 0),
        sigmoid=jax.nn.sigmoid,
        columns=lambda x, indices: x[:, indices if isinstance(indices, slice) else np.asarray(indices)],
    )


def torch_arrays() -> Arrays:
    import torch

    return Arrays(
        torch,
        dense=lambda x, kernel, bias: torch.addmm(bias, x, kernel),
        relu=torch.relu,
        sigmoid=torch.sigmoid,
        columns=lambda x, indices: x[:, indices],
    )


# ------------------------------------------------------------------------------------------ what a flow consists of


@dataclass(frozen=True)
class Linear:
    """An lu_linear layer and the permutation before it."""

    name: str
    order: tuple[int, ...]


@dataclass(frozen=True)
class Coupling:
    """A coupling layer; `layer` is what the spec says of it."""

    name: str
    passed: tuple[int, ...]
    moved: tuple[int, ...]
    layer: dict[str, Any]


def steps(configuration: Configuration) -> list[Linear | Coupling]:
    oracle = reference(configuration)
    every = tuple(range(configuration.input_size))
    order, found = every, []
    for layer, name in zip(oracle.layers, oracle.prefixes(), strict=True):
        if layer["kind"] == "permutation":
            order = tuple(layer["order"])
        elif layer["kind"] == "lu_linear":
            found.append(Linear(name, order))
            order = every
        else:
            assert order is every, "a permutation comes before a linear layer"
            moved = tuple(transformed_features(layer["transformed"], len(every)).tolist())
            found.append(Coupling(name, tuple(f for f in every if f not in moved), moved, layer))
    return found


def parameters(configuration: Configuration, one_head: bool = True) -> dict[str, np.ndarray]:
    """The reference's parameters in float32, triangles of linear layers as matrices [D, D].

    With `one_head` the scale and the translation that one network gives are one matrix, `heads`.
    """
    size = configuration.input_size
    found = {k: v.astype(np.float32) for k, v in reference(configuration).parameters.items()}
    for step in steps(configuration):
        if isinstance(step, Linear):
            assert np.all(found.pop(f"{step.name}.sign") == 1), "other libraries have no signs"
            for part, places in (("lower", np.tril_indices(size, -1)), ("upper", np.triu_indices(size, 1))):
                matrix = np.zeros((size, size), np.float32)
                matrix[places] = found[f"{step.name}.{part}"]
                found[f"{step.name}.{part}"] = matrix
        elif one_head and "network" in step.layer:
            for part in ("kernel", "bias"):
                heads = [found.pop(f"{step.name}_{head}.{part}") for head in ("scale", "translation")]
                found[f"{step.name}_heads.{part}"] = np.concatenate(heads, axis=-1)
    return found


def composed(configuration: Configuration, trained: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`parameters` for inference: a linear layer as one matrix with its order inside, both ways."""
    found, arrays = dict(trained), numpy_arrays()
    for step in steps(configuration):
        if isinstance(step, Linear):
            triangles = {f"{step.name}.{k}": found.pop(f"{step.name}.{k}") for k in ("lower", "upper", "log_diagonal")}
            exact = {name: value.astype(np.float64) for name, value in triangles.items()}
            matrix, log_det = _matrix(arrays, exact, step)
            inverse = np.linalg.inv(matrix)
            bias = found[f"{step.name}.bias"]
            parts = {"matrix": matrix, "log_det": log_det, "inverse": inverse, "inverse_bias": -bias @ inverse}
            found |= {f"{step.name}.{part}": np.asarray(value, np.float32) for part, value in parts.items()}
    return found


# ------------------------------------------------------------------------------------------ the walk


class _Columns:
    """The columns of rows, in one array or in the two of a coupling, until another layer wants them elsewhere."""

    def __init__(self, arrays: Arrays, x: Any) -> None:
        self.arrays, self.held = arrays, [x]
        self.sets: list[tuple[int, ...]] = [tuple(range(x.shape[1]))]

    def split(self, passed: tuple[int, ...], moved: tuple[int, ...]) -> tuple[Any, Any]:
        if set(self.sets) != {passed, moved}:
            x = self.whole()
            self.sets = sorted([passed, moved])
            if self.sets[0][-1] < self.sets[1][0]:
                self.held = list(self.arrays.split(x, len(self.sets[0])))
            else:
                self.held = [self.arrays.columns(x, _evenly(features)) for features in self.sets]
        first, second = self.held
        return (first, second) if self.sets[0] == passed else (second, first)

    def put(self, moved: tuple[int, ...], values: Any) -> None:
        self.held[self.sets.index(moved)] = values

    def whole(self) -> Any:
        if len(self.sets) == 1:
            return self.held[0]
        x = self.arrays.module.concatenate(self.held, axis=1)
        places = _places([*self.sets[0], *self.sets[1]])
        return x if places == list(range(len(places))) else self.arrays.columns(x, places)


def _places(order: Sequence[int]) -> list[int]:
    """The inverse of an order."""
    return sorted(range(len(order)), key=lambda j: order[j])


def _evenly(features: tuple[int, ...]) -> slice | list[int]:
    """Features as a slice, which costs no gathering, where they are evenly spaced."""
    step = features[1] - features[0] if len(features) > 1 else 1
    even = all(features[j + 1] - features[j] == step for j in range(len(features) - 1))
    return slice(features[0], features[-1] + 1, step) if even else list(features)


def _matrix(arrays: Arrays, p: Mapping[str, Any], step: Linear) -> tuple[Any, Any]:
    """The matrix [in, out] and the log-determinant of a linear layer, from its factors if need be."""
    if f"{step.name}.matrix" in p:
        return p[f"{step.name}.matrix"], p[f"{step.name}.log_det"]
    module, log_diagonal = arrays.module, p[f"{step.name}.log_diagonal"]
    unit = module.eye(len(step.order), dtype=log_diagonal.dtype)
    lower = module.tril(p[f"{step.name}.lower"], -1) + unit
    upper = module.triu(p[f"{step.name}.upper"], 1) + module.diag(module.exp(log_diagonal))
    return arrays.columns(lower @ upper, _places(step.order)).T, log_diagonal.sum()


def _entered(arrays: Arrays, p: Mapping[str, Any], name: str, x: Any, c: Any) -> Any:
    """A dense layer of [x, c]; one context for all rows becomes a part of the bias."""
    kernel, bias = p[f"{name}.kernel"], p[f"{name}.bias"]
    if c is None:
        return arrays.dense(x, kernel, bias)
    if c.ndim == 2:
        return arrays.dense(arrays.module.concatenate([x, c], axis=1), kernel, bias)
    return arrays.dense(x, kernel[: x.shape[1]], bias + c @ kernel[x.shape[1] :])


def _hidden(arrays: Arrays, p: Mapping[str, Any], prefix: str, network: dict, name: str, x: Any, c: Any) -> Any:
    """A network up to its last hidden layer."""
    act = arrays.relu if network["activation"] == "relu" else getattr(arrays.module, network["activation"])

    def dense(name: str, x: Any) -> Any:
        return arrays.dense(x, p[f"{name}.kernel"], p[f"{name}.bias"])

    if network["kind"] == "mlp":
        hidden = act(_entered(arrays, p, f"{prefix}_{name}_0", x, c))
        for j in range(1, len(network["hidden_sizes"])):
            hidden = act(dense(f"{prefix}_{name}_{j}", hidden))
        return hidden
    hidden = _entered(arrays, p, f"{prefix}_initial", x, c)
    for j in range(network["num_blocks"]):
        block = f"{prefix}_block_{j}"
        added = dense(f"{block}_dense_1", act(dense(f"{block}_dense_0", act(hidden))))
        if network["context_gates"]:
            kernel, bias = p[f"{block}_context.kernel"], p[f"{block}_context.bias"]
            added = added * arrays.sigmoid(arrays.dense(c, kernel, bias) if c.ndim == 2 else bias + c @ kernel)
        hidden = hidden + added
    return hidden


def _log_scale_and_shift(arrays: Arrays, p: Mapping[str, Any], step: Coupling, x: Any, c: Any) -> tuple[Any, Any]:
    def head(name: str, hidden: Any) -> Any:
        return arrays.dense(hidden, p[f"{step.name}_{name}.kernel"], p[f"{step.name}_{name}.bias"])

    layer = step.layer
    if "network" not in layer:
        raw, shift = (
            head(name, _hidden(arrays, p, step.name, layer[f"{name}_network"], f"{name}_dense", x, c))
            for name in ("scale", "translation")
        )
    else:
        hidden = _hidden(arrays, p, step.name, layer["network"], "coupling_dense", x, c)
        if f"{step.name}_heads.kernel" in p:
            raw, shift = arrays.split(head("heads", hidden), len(step.moved))
        else:
            raw, shift = head("scale", hidden), head("translation", hidden)
    function = layer["transform"]["log_scale"]
    return (raw if function["function"] == "identity" else arrays.module.tanh(raw)), shift


def run(arrays: Arrays, flow: list[Linear | Coupling], p: Mapping[str, Any], op: str, x: Any, c: Any = None) -> Any:
    """log_prob, forward or inverse; in training p are `parameters`, else `composed`."""
    inverse, columns, log_dets, exp = op == "inverse", _Columns(arrays, x), [], arrays.module.exp
    for step in reversed(flow) if inverse else flow:
        if isinstance(step, Linear):
            if inverse:
                kernel, bias = p[f"{step.name}.inverse"], p[f"{step.name}.inverse_bias"]
            else:
                (kernel, log_det), bias = _matrix(arrays, p, step), p[f"{step.name}.bias"]
                log_dets.append(log_det)
            columns = _Columns(arrays, arrays.dense(columns.whole(), kernel, bias))
            continue
        passed, moved = columns.split(step.passed, step.moved)
        log_scale, shift = _log_scale_and_shift(arrays, p, step, passed, c)
        backwards = inverse != step.layer["inverse"]
        columns.put(step.moved, (moved - shift) * exp(-log_scale) if backwards else moved * exp(log_scale) + shift)
        if not inverse:
            log_dets.append((-log_scale if backwards else log_scale).sum(axis=1))
    if op == "log_prob":
        squares = arrays.total([(part * part).sum(axis=1) for part in columns.held])
        return arrays.total([*log_dets, squares * -0.5, -0.5 * x.shape[1] * LOG_2_PI])
    return columns.whole() if inverse else (columns.whole(), arrays.total(log_dets))
