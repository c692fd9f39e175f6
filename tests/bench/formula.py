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
from general_oracle import heads_of, transformed_features

LOG_2_PI = math.log(2 * math.pi)


class Arrays(NamedTuple):
    """An array library: the module, whose names are NumPy's, and what each library does best in a way of its own."""

    module: Any
    dense: Callable  # (rows, kernel [in, out], bias)
    relu: Callable
    sigmoid: Callable
    columns: Callable  # (rows, a slice or a list of indices)
    dense_transposed: Callable  # as dense, [out, rows]
    softmax: Callable  # along the first axis
    softplus: Callable
    pick: Callable  # (values [n, elements], which of each element [elements])
    clip: Callable = lambda x, low, high: x.clip(low, high)
    count: Callable = lambda conditions: conditions.sum(axis=0)
    split: Callable = lambda x, at: (x[:, :at], x[:, at:])
    total: Callable = sum


def numpy_arrays() -> Arrays:
    def softmax(u: np.ndarray) -> np.ndarray:
        e = np.exp(u - u.max(axis=0))
        return e / e.sum(axis=0)

    return Arrays(
        np,
        dense=lambda x, kernel, bias: x @ kernel + bias,
        relu=lambda u: np.maximum(u, 0),
        sigmoid=lambda u: 1 / (1 + np.exp(-u)),
        columns=lambda x, indices: x[:, indices],
        dense_transposed=lambda x, kernel, bias: kernel.T @ x.T + bias[:, None],
        softmax=softmax,
        softplus=lambda u: np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u))),
        pick=lambda values, places: np.take_along_axis(values, places[None], 0)[0],
    )


def jax_arrays() -> Arrays:
    import jax
    import jax.numpy as jnp

    def pick(values: Any, places: Any) -> Any:  # in one loop with what comes before, where gathering is one of its own
        return jnp.sum(jnp.where(jnp.arange(len(values))[:, None] == places, values, 0), axis=0)

    return Arrays(
        jnp,
        dense=lambda x, kernel, bias: x @ kernel + bias,
        relu=lambda u: jnp.maximum(u, 0),
        sigmoid=jax.nn.sigmoid,
        columns=lambda x, indices: x[:, indices if isinstance(indices, slice) else np.asarray(indices)],
        dense_transposed=lambda x, kernel, bias: kernel.T @ x.T + bias[:, None],
        softmax=lambda u: jax.nn.softmax(u, axis=0),
        softplus=jax.nn.softplus,
        pick=pick,
    )


def torch_arrays(compiled: bool = False) -> Arrays:
    import torch

    def gather(values: Any, places: Any) -> Any:
        return values.gather(0, places[None])[0]

    def select(values: Any, places: Any) -> Any:  # as in jax_arrays
        return torch.where(torch.arange(len(values))[:, None] == places, values, 0.0).sum(dim=0)

    return Arrays(
        torch,
        dense=lambda x, kernel, bias: torch.addmm(bias, x, kernel),
        relu=torch.relu,
        sigmoid=torch.sigmoid,
        columns=lambda x, indices: x[:, indices],
        dense_transposed=lambda x, kernel, bias: torch.addmm(bias[:, None], kernel.t(), x.t()),
        softmax=lambda u: torch.softmax(u, dim=0),
        softplus=torch.nn.functional.softplus,
        pick=select if compiled else gather,
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


@dataclass(frozen=True)
class Flow:
    """What `run` walks through."""

    steps: list[Linear | Coupling]
    bounded: bool  # latents are uniform on [0, 1], else normal


def flow(configuration: Configuration) -> Flow:
    return Flow(steps(configuration), configuration.bounded)


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

    With `one_head` all that one network gives is one matrix, `heads`.
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
                heads = [found.pop(f"{step.name}_{head}.{part}") for head in heads_of(step.layer["transform"])]
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


class _Walk(NamedTuple):
    """What is asked of a transform."""

    backwards: bool
    log_det: bool


def _affine(arrays: Arrays, p: Mapping[str, Any], step: Coupling, x: Any, c: Any, moved: Any, walk: _Walk) -> Any:
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
    function, exp = layer["transform"]["log_scale"], arrays.module.exp
    log_scale = raw if function["function"] == "identity" else arrays.module.tanh(raw)
    values = (moved - shift) * exp(-log_scale) if walk.backwards else moved * exp(log_scale) + shift
    if walk.log_det:
        return values, (-log_scale if walk.backwards else log_scale).sum(axis=1)
    return values, None


class _Bins(NamedTuple):
    """Of each element the bin that it lies in; its slopes at the ends, and the mean one."""

    left: Any
    width: Any
    bottom: Any
    height: Any
    slope0: Any
    slope1: Any
    mean: Any


def _bins(arrays: Arrays, spline: dict, raw: Sequence[Any], at: Any, backwards: bool) -> _Bins:
    """Where elements `at` lie, from raw widths and heights [K, elements] and slopes [K - 1 or K + 1, elements]."""
    module, bins, span = arrays.module, spline["num_bins"], spline["upper"] - spline["lower"]

    def sizes(u: Any, least: float) -> tuple[Any, Any]:
        found = arrays.softmax(u) * ((1 - bins * least) * span) + least * span
        return module.cumsum(found, 0) - found + spline["lower"], found

    lefts, widths = sizes(raw[0], spline["min_bin_width"])
    bottoms, heights = sizes(raw[1], spline["min_bin_height"])
    k = arrays.count((bottoms if backwards else lefts)[1:] <= at)
    left, width, bottom, height = (arrays.pick(values, k) for values in (lefts, widths, bottoms, heights))
    free = spline["boundary"] == "free"
    knots = (k, k + 1) if free else (arrays.clip(k - 1, 0, bins - 2), arrays.clip(k, 0, bins - 2))
    function = spline["derivative"]
    slope0, slope1 = (
        arrays.softplus(arrays.pick(raw[2], knot) + function["offset"]) * function["gain"] + spline["min_derivative"]
        for knot in knots
    )
    if not free:
        slope0, slope1 = module.where(k <= 0, 1.0, slope0), module.where(bins - 1 <= k, 1.0, slope1)
    return _Bins(left, width, bottom, height, slope0, slope1, height / width)


def _spline(arrays: Arrays, p: Mapping[str, Any], step: Coupling, x: Any, c: Any, moved: Any, walk: _Walk) -> Any:
    """Splines of the moved features, side by side as elements: feature after feature, vectors go along rows."""
    spline, count = step.layer["transform"], len(step.moved)
    hidden = _hidden(arrays, p, step.name, step.layer["network"], "coupling_dense", x, c)
    elements = moved.shape[0] * count

    def head(name: str) -> Any:
        u = arrays.dense_transposed(hidden, p[f"{step.name}_{name}.kernel"], p[f"{step.name}_{name}.bias"])
        return u.reshape(u.shape[0] // count, elements)

    if f"{step.name}_heads.kernel" in p:
        every, bins = head("heads"), spline["num_bins"]
        raw = every[:bins], every[bins : 2 * bins], every[2 * bins :]
    else:
        raw = head("widths"), head("heights"), head("derivatives")
    given = moved.T.reshape(elements)
    values, log_slopes = _through_spline(arrays, spline, raw, given, walk)
    values = values.reshape(count, moved.shape[0]).T
    return values, log_slopes.reshape(count, moved.shape[0]).sum(axis=0) if walk.log_det else None


def _through_spline(arrays: Arrays, spline: dict, raw: Sequence[Any], x: Any, walk: _Walk) -> tuple[Any, Any]:
    """The spline (Durkan et al., 2019), or its inverse, and the logarithms of its slopes; outside the identity."""
    module, at = arrays.module, arrays.clip(x, spline["lower"], spline["upper"])
    b = _bins(arrays, spline, raw, at, walk.backwards)
    if walk.backwards:
        eta = (at - b.bottom) / b.height
        p, q = b.slope0 * (1.0 - eta) - b.slope1 * eta, b.mean * eta * 2.0
        xi = q / (p + q + module.sqrt(p * p + q * b.mean * (1.0 - eta) * 2.0))  # a discriminant without differences
    else:
        xi = (at - b.left) / b.width
    rest = 1.0 - xi
    both, square = xi * rest, xi * xi
    share = b.mean / (b.mean + (b.slope0 + b.slope1 - b.mean * 2.0) * both)
    if walk.backwards:
        values = b.left + b.width * xi
    else:
        values = b.bottom + b.width * share * (b.mean * square + b.slope0 * both)
    inside = at == x
    values = module.where(inside, values, x)
    if not walk.log_det:
        return values, None
    slopes = (b.slope1 * square + b.mean * both * 2.0 + b.slope0 * rest * rest) * share * share
    log_slopes = module.log(slopes)
    return values, module.where(inside, -log_slopes if walk.backwards else log_slopes, 0.0)


def _log_density(arrays: Arrays, flow: Flow, parts: Sequence[Any], log_dets: Sequence[Any], size: int) -> Any:
    if not flow.bounded:
        squares = arrays.total([(part * part).sum(axis=1) for part in parts])
        return arrays.total([*log_dets, squares * -0.5, -0.5 * size * LOG_2_PI])
    module, log_det = arrays.module, arrays.total(log_dets)
    for part in parts:
        log_det = module.where((module.abs(part - 0.5) <= 0.5).all(axis=1), log_det, -math.inf)
    return log_det


def run(arrays: Arrays, flow: Flow, p: Mapping[str, Any], op: str, x: Any, c: Any = None) -> Any:
    """log_prob, forward or inverse; in training p are `parameters`, else `composed`."""
    inverse, columns, log_dets = op == "inverse", _Columns(arrays, x), []
    for step in reversed(flow.steps) if inverse else flow.steps:
        if isinstance(step, Linear):
            if inverse:
                kernel, bias = p[f"{step.name}.inverse"], p[f"{step.name}.inverse_bias"]
            else:
                (kernel, log_det), bias = _matrix(arrays, p, step), p[f"{step.name}.bias"]
                log_dets.append(log_det)
            columns = _Columns(arrays, arrays.dense(columns.whole(), kernel, bias))
            continue
        passed, moved = columns.split(step.passed, step.moved)
        transform = _spline if step.layer["transform"]["kind"] == "spline" else _affine
        walk = _Walk(backwards=inverse != step.layer["inverse"], log_det=not inverse)
        values, log_det = transform(arrays, p, step, passed, c, moved, walk)
        columns.put(step.moved, values)
        if not inverse:
            log_dets.append(log_det)
    if op == "log_prob":
        return _log_density(arrays, flow, columns.held, log_dets, x.shape[1])
    return columns.whole() if inverse else (columns.whole(), arrays.total(log_dets))
