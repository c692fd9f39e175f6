"""An independent float64 oracle of every flow that a spec can say, in plain NumPy.

Nothing here imports nvpflow. A flow is a spec, as `json.loads` reads it from a model file, and its tensors by name.
Each layer is written once, from its formula. Gradients come from a tape of NumPy operations; test_general_oracle.py
holds them against central finite differences and against the reverse mode that oracle.py writes by hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from oracle import ACTIVATIONS, DERIVATIVES, KINKED, LOG_2_PI, settled

Spec = Mapping[str, Any]
Shape = tuple[int, ...]

# ---------------------------------------------------------------------------------------------- the tape


class Node:
    """An array, and how a cotangent of it goes on to the arrays it was made from."""

    __array_ufunc__ = None  # ndarray + Node comes here
    _count = itertools.count()

    def __init__(self, value: np.ndarray, *parents: tuple[Node, Callable[[np.ndarray], np.ndarray]]):
        self.value = np.asarray(value, dtype=np.float64)
        self.parents = parents
        self.number = next(Node._count)

    def __add__(self, other: Node | np.ndarray | float) -> Node:
        other = _node(other)
        return Node(self.value + other.value, (self, lambda g: g), (other, lambda g: g))

    def __neg__(self) -> Node:
        return Node(-self.value, (self, lambda g: -g))

    def __sub__(self, other: Node | np.ndarray | float) -> Node:
        return self + -_node(other)

    def __rsub__(self, other: float) -> Node:
        return other + -self

    def __mul__(self, other: Node | np.ndarray | float) -> Node:
        other = _node(other)
        return Node(self.value * other.value, (self, lambda g: g * other.value), (other, lambda g: g * self.value))

    def __truediv__(self, other: Node) -> Node:
        quotient = self.value / other.value
        return Node(quotient, (self, lambda g: g / other.value), (other, lambda g: -g * quotient / other.value))

    def __matmul__(self, other: Node) -> Node:
        return Node(self.value @ other.value, (self, lambda g: g @ other.value.T), (other, lambda g: self.value.T @ g))

    __radd__ = __add__
    __rmul__ = __mul__

    def map(self, f: Callable[[np.ndarray], np.ndarray], derivative: Callable[[np.ndarray], np.ndarray]) -> Node:
        """F of each element."""
        return Node(f(self.value), (self, lambda g: g * derivative(self.value)))

    def columns(self, features: np.ndarray) -> Node:
        """[B, D] -> [B, n]."""

        def pull(g: np.ndarray) -> np.ndarray:
            whole = np.zeros_like(self.value)
            whole[:, features] = g
            return whole

        return Node(self.value[:, features], (self, pull))

    def at(self, places: tuple[np.ndarray, ...], shape: Shape) -> Node:
        """Zeros of `shape` with the elements of a vector at `places`."""
        whole = np.zeros(shape)
        whole[places] = self.value
        return Node(whole, (self, lambda g: g[places]))

    def sum_of_row(self) -> Node:
        """[..., n] -> [...]."""
        return Node(np.sum(self.value, axis=-1), (self, lambda g: np.broadcast_to(g[..., None], self.value.shape)))

    def sums_from_left(self) -> Node:
        """[..., n] -> [..., n + 1]: 0, the first, the first two, ..., all."""
        nothing = np.zeros((*self.value.shape[:-1], 1))
        sums = np.concatenate([nothing, np.cumsum(self.value, axis=-1)], axis=-1)
        return Node(sums, (self, lambda g: np.cumsum(g[..., :0:-1], axis=-1)[..., ::-1]))

    def pick(self, index: np.ndarray) -> Node:
        """[..., n] -> [...]: of each row the element at `index` [...]."""

        def pull(g: np.ndarray) -> np.ndarray:
            whole = np.zeros_like(self.value)
            np.put_along_axis(whole, index[..., None], g[..., None], axis=-1)
            return whole

        return Node(np.take_along_axis(self.value, index[..., None], axis=-1)[..., 0], (self, pull))

    def of_features(self, n: int) -> Node:
        """[B, p n] -> [B, n, p]; column i n + j is number i of feature j."""
        rows, columns = self.value.shape
        return Node(
            self.value.reshape(rows, columns // n, n).transpose(0, 2, 1),
            (self, lambda g: g.transpose(0, 2, 1).reshape(rows, columns)),
        )

    def between(self, low: float, high: float) -> Node:
        """Each element, brought into [low, high]."""
        inside = (self.value >= low) & (self.value <= high)
        # Also of NaN, so that what is computed from it is a number: a row that holds one is set to NaN at the end.
        brought = np.where(inside, self.value, np.where(self.value > high, high, low))
        return Node(brought, (self, lambda g: np.where(inside, g, 0.0)))

    def mean_of_row(self) -> Node:
        """[B, n] -> [B, 1]."""
        n = self.value.shape[1]
        return Node(
            np.mean(self.value, axis=1, keepdims=True), (self, lambda g: np.broadcast_to(g / n, self.value.shape))
        )


def _node(value: Node | np.ndarray | float) -> Node:
    return value if isinstance(value, Node) else Node(np.asarray(value))


def _side_by_side(parts: Iterable[Node]) -> Node:
    parts = list(parts)
    ends = np.cumsum([0, *(part.value.shape[1] for part in parts)])
    pulls = [(part, lambda g, i=i: g[:, ends[i] : ends[i + 1]]) for i, part in enumerate(parts)]
    return Node(np.concatenate([part.value for part in parts], axis=1), *pulls)


def _solve(matrix: Node, rows: Node) -> Node:
    """y with y W^T = rows, row by row."""
    y = np.linalg.solve(matrix.value, rows.value.T).T

    def to_rows(g: np.ndarray) -> np.ndarray:
        return np.linalg.solve(matrix.value.T, g.T).T

    return Node(y, (rows, to_rows), (matrix, lambda g: -to_rows(g).T @ y))


def _transposed(matrix: Node) -> Node:
    return Node(matrix.value.T, (matrix, lambda g: g.T))


def pull_back(cotangents: Iterable[tuple[Node, np.ndarray]]) -> dict[int, np.ndarray]:
    """Cotangents of every node behind the given ones, by the node's number."""
    found: dict[int, Node] = {}
    waiting = []
    gradients: dict[int, np.ndarray] = {}
    for node, cotangent in cotangents:
        gradients[node.number] = np.asarray(cotangent, dtype=np.float64)
        waiting.append(node)
    while waiting:
        node = waiting.pop()
        if node.number not in found:
            found[node.number] = node
            waiting += [parent for parent, _ in node.parents]
    for number in sorted(found, reverse=True):  # a node is younger than its parents
        for parent, pull in found[number].parents:
            if number not in gradients:
                continue
            step = pull(gradients[number])
            # What was broadcast on the way is summed on the way back.
            step = step.sum(axis=tuple(range(step.ndim - parent.value.ndim)))
            narrow = tuple(i for i, n in enumerate(parent.value.shape) if n == 1 and step.shape[i] != 1)
            step = step.sum(axis=narrow, keepdims=True)
            gradients[parent.number] = gradients[parent.number] + step if parent.number in gradients else step
    return gradients


# ---------------------------------------------------------------------------------------------- log-scale functions


def _exp(u: Node) -> Node:
    return u.map(np.exp, np.exp)


def _log(u: Node) -> Node:
    return u.map(np.log, lambda v: 1.0 / v)


def _softplus(u: Node) -> Node:
    return u.map(ACTIVATIONS["softplus"], DERIVATIVES["softplus"])


def log_scale(function: Spec, u: Node) -> Node:
    """s = g(u), element by element."""
    name = function["function"]
    if name == "identity":
        return u
    if name in ("tanh", "softsign", "atan"):
        f, derivative = {
            "tanh": (np.tanh, lambda v: 1.0 / np.cosh(v) ** 2),
            "softsign": (lambda v: v / (1.0 + np.abs(v)), lambda v: (1.0 + np.abs(v)) ** -2.0),
            "atan": (np.arctan, lambda v: 1.0 / (1.0 + v * v)),
        }[name]
        return (u * (1.0 / function["divisor"])).map(f, derivative) * function["factor"]
    low, high, v = function["low"], function["high"], u + function["offset"]
    if name == "sigmoid" and low == 0:
        s = -_softplus(-v) + math.log(high)
    elif name == "sigmoid":
        s = _log(v.map(ACTIVATIONS["sigmoid"], DERIVATIVES["sigmoid"]) * (high - low) + low)
    elif name == "softplus":
        cap = math.inf if high is None else high
        s = _log((_softplus(v) + low).map(lambda w: np.minimum(w, cap), lambda w: np.where(w < cap, 1.0, 0.0)))
    else:
        raise ValueError(f"function is {name!r}")
    return -s if function["negated"] else s


# ---------------------------------------------------------------------------------------------- splines


def _where(chosen: np.ndarray, yes: Node, no: Node) -> Node:
    return Node(
        np.where(chosen, yes.value, no.value),
        (yes, lambda g: np.where(chosen, g, 0.0)),
        (no, lambda g: np.where(chosen, 0.0, g)),
    )


def _as_column(values: Node) -> Node:
    """[...] -> [..., 1]."""
    return Node(values.value[..., None], (values, lambda g: g[..., 0]))


def _with_ends(inner: Node, end: float) -> Node:
    """[..., n] -> [..., n + 2]."""
    column = np.full((*inner.value.shape[:-1], 1), end)
    return Node(np.concatenate([column, inner.value, column], axis=-1), (inner, lambda g: g[..., 1:-1]))


def _bin_sizes(spline: Spec, raw: Node, smallest: float) -> Node:
    """Widths or heights of the bins [B, n, K]: a softmax with a floor, of the interval."""
    if (bound := spline["size_bound"]) is not None:
        raw = raw.map(lambda u: u / (1.0 + np.abs(u / bound)), lambda u: (1.0 + np.abs(u / bound)) ** -2.0)
    e = _exp(raw - np.max(raw.value, axis=-1, keepdims=True))  # a softmax is that of shifted numbers, too
    share = e / _as_column(e.sum_of_row())
    return (share * (1.0 - spline["num_bins"] * smallest) + smallest) * (spline["upper"] - spline["lower"])


def _knot_slopes(spline: Spec, raw: Node | None, shape: Shape) -> Node:
    """Derivatives at the knots [B, n, K + 1]; raw is None where there are no inner knots."""
    how, least = spline["derivative"], spline["min_derivative"]
    if raw is None:
        return Node(np.ones((*shape, 2)))
    if how["function"] == "exp":
        bound = how["bound"]
        v = raw.map(lambda u: u / (1.0 + np.abs(u / bound)), lambda u: (1.0 + np.abs(u / bound)) ** -2.0)
        slopes = _exp(v) + least
    else:
        slopes = _softplus(raw + how["offset"]) * how["gain"] + least
    return slopes if spline["boundary"] == "free" else _with_ends(slopes, 1.0)


def rational_quadratic(
    spline: Spec, widths: Node, heights: Node, derivatives: Node | None, x: Node, backwards: bool, kinks: list
) -> tuple[Node, Node]:
    """Map x [B, n] and give log |dy/dx| [B, n]: Durkan et al., Neural Spline Flows, 2019, equations 4 to 8.

    Raw numbers are [B, n, K] for the bins and, for the knots, [B, n, K - 1], or K + 1 where the ends are free.
    """
    low, high, bins = spline["lower"], spline["upper"], spline["num_bins"]
    knots_x = _bin_sizes(spline, widths, spline["min_bin_width"]).sums_from_left() + low
    knots_y = _bin_sizes(spline, heights, spline["min_bin_height"]).sums_from_left() + low
    delta = _knot_slopes(spline, derivatives, x.value.shape)

    knots = (knots_y if backwards else knots_x).value
    kinks.append((x.value[..., None] - knots).reshape(len(x.value), -1))
    inside = x.between(low, high)
    k = np.sum(knots[..., 1:-1] <= inside.value[..., None], axis=-1)
    x_k, y_k, d_k, d_next = knots_x.pick(k), knots_y.pick(k), delta.pick(k), delta.pick(k + 1)
    width, height = knots_x.pick(k + 1) - x_k, knots_y.pick(k + 1) - y_k
    s = height / width
    curvature = d_next + d_k - 2.0 * s
    if backwards:
        rise = inside - y_k
        a = height * (s - d_k) + rise * curvature
        b = height * d_k - rise * curvature
        c = -s * rise
        root = (b * b - 4.0 * a * c).map(lambda v: np.sqrt(np.maximum(v, 0.0)), lambda v: 0.5 / np.sqrt(v))
        xi = 2.0 * c / (-b - root)
        y = x_k + xi * width
    else:
        xi = (inside - x_k) / width
        y = y_k + height * (s * xi * xi + d_k * xi * (1.0 - xi)) / (s + curvature * xi * (1.0 - xi))
    rest = 1.0 - xi
    slope = s * s * (d_next * xi * xi + 2.0 * s * xi * rest + d_k * rest * rest)
    log_slope = _log(slope) - 2.0 * _log(s + curvature * xi * rest)

    below, above = x.value < low, x.value > high
    ends = {}
    for name, edge, at in (("below", low, 0), ("above", high, bins)):
        d = delta.pick(np.full(x.value.shape, at))
        if spline["tails"] == "identity":
            ends[name] = x, Node(np.zeros_like(x.value))
        else:
            ends[name] = ((x - edge) / d if backwards else (x - edge) * d) + edge, _log(d)
    y = _where(below, ends["below"][0], _where(above, ends["above"][0], y))
    log_slope = _where(below, ends["below"][1], _where(above, ends["above"][1], log_slope))
    return y, -log_slope if backwards else log_slope


# ---------------------------------------------------------------------------------------------- the flow


def coupling_of_1_1(layer: Spec) -> Spec:
    """A coupling in the form of format 1.1; that of format 1.0 has halves, tanh and one perceptron."""
    if "transformed" in layer:
        return layer
    bound = layer["scale_bound"]
    return {
        "kind": "coupling",
        "inverse": False,
        "transformed": "first_half" if layer["swapped"] else "second_half",
        "transform": {"kind": "affine", "log_scale": {"function": "tanh", "factor": bound, "divisor": bound}},
        "network": {
            "kind": "mlp",
            "hidden_sizes": layer["hidden_sizes"],
            "activation": layer["activation"],
            "layer_norm": False,
        },
    }


def transformed_features(transformed: str | list[int], input_size: int) -> np.ndarray:
    """b, ascending."""
    names = {
        "first_half": np.arange(input_size // 2),
        "second_half": np.arange(input_size // 2, input_size),
        "even": np.arange(0, input_size, 2),
        "odd": np.arange(1, input_size, 2),
        "all": np.arange(input_size),
    }
    return names[transformed] if isinstance(transformed, str) else np.asarray(transformed, dtype=np.int64)


def heads_of(transform: Spec) -> dict[str, int]:
    """What a network gives for each transformed feature: how many numbers of each name."""
    if transform["kind"] == "additive":
        return {"translation": 1}
    return {"scale": 1, "translation": 1} if transform["kind"] == "affine" else raw_numbers(transform)


def raw_numbers(spline: Spec) -> dict[str, int]:
    """How many numbers of each name make one spline; no entry where there are none."""
    bins = spline["num_bins"]
    counts = {"widths": bins, "heights": bins, "derivatives": bins + 1 if spline["boundary"] == "free" else bins - 1}
    return {name: count for name, count in counts.items() if count > 0}


def tensor_shapes(spec: Spec) -> list[tuple[str, Shape]]:
    """Every parameter's name and shape, in the order of the flat buffer."""
    size, context = spec["input_size"], spec.get("context_size", 0)
    shapes: list[tuple[str, Shape]] = []

    def dense(name: str, width: int, units: int) -> int:
        shapes.extend([(f"{name}.kernel", (width, units)), (f"{name}.bias", (units,))])
        return units

    def hidden(network: Spec, prefix: str, dense_name: str, width: int) -> int:
        """The network up to its last hidden layer; gives the width of that."""
        if network["kind"] == "mlp":
            for j, units in enumerate(network["hidden_sizes"]):
                width = dense(f"{prefix}_{dense_name}_{j}", width, units)
            return width
        units = network["hidden_size"]
        dense(f"{prefix}_initial", width, units)
        for j in range(network["num_blocks"]):
            block = f"{prefix}_block_{j}"
            if network["block_affines"]:
                shapes.extend([(f"{block}_affine.scale", (units,)), (f"{block}_affine.shift", (units,))])
            dense(f"{block}_dense_0", units, units)
            dense(f"{block}_dense_1", units, units)
            if network["context_gates"] and context > 0:
                dense(f"{block}_context", context, units)
        return units

    couplings = 0
    for i, layer in enumerate(spec["layers"]):
        if layer["kind"] == "coupling":
            prefix, couplings = f"flow_{couplings}", couplings + 1
            layer = coupling_of_1_1(layer)
            n = len(transformed_features(layer["transformed"], size))
            width = size - n + context
            if "network" in layer:
                width = hidden(layer["network"], prefix, "coupling_dense", width)
                for head, count in heads_of(layer["transform"]).items():
                    dense(f"{prefix}_{head}", width, count * n)
            else:
                for head in ("scale", "translation"):
                    dense(f"{prefix}_{head}", hidden(layer[f"{head}_network"], prefix, f"{head}_dense", width), n)
        elif layer["kind"] == "lu_linear":
            triangle = size * (size - 1) // 2
            for part, entries in (("lower", triangle), ("upper", triangle)):
                shapes.append((f"lu_linear_{i}.{part}", (entries,)))
            shapes.extend((f"lu_linear_{i}.{part}", (size,)) for part in ("log_diagonal", "sign", "bias"))
        elif layer["kind"] == "actnorm":
            shapes.extend((f"actnorm_{i}.{part}", (size,)) for part in ("log_scale", "shift"))
        elif layer["kind"] == "element_spline":
            n = len(transformed_features(layer["features"], size))
            shapes.extend((f"spline_{i}.{name}", (count, n)) for name, count in raw_numbers(layer["spline"]).items())
        elif layer["kind"] == "standardize":
            shapes.extend((f"standardize_{i}.{part}", (size,)) for part in ("mean", "log_std"))
    base = spec.get("base", {"kind": "normal"})
    if base["kind"] == "student_t":
        shapes.append(("base.log_df", (size,)))
    if base["kind"] == "mixture":
        components = base["components"]
        shapes.append(("base.logits", (components,)))
        shapes.extend((f"base.{part}", (components, size)) for part in ("means", "log_scales"))
        if base["covariance"] == "full":
            shapes.append(("base.lower", (components, size * (size - 1) // 2)))
    if spec.get("standardize_context", False):
        shapes.extend((f"context.{part}", (context,)) for part in ("mean", "log_std"))
    return shapes


Named = Mapping[str, np.ndarray]


def _digamma(x: np.ndarray) -> np.ndarray:
    """By its recurrence and its asymptotic series (Abramowitz and Stegun, 6.3.5 and 6.3.18)."""
    total = np.zeros_like(x)
    while (small := x < 20).any():
        total -= np.where(small, 1 / x, 0.0)
        x = np.where(small, x + 1, x)
    v = 1 / x**2
    return total + np.log(x) - 0.5 / x - v * (1 / 12 - v * (1 / 120 - v * (1 / 252 - v * (1 / 240 - v / 132))))


def _log_of_student(z: np.ndarray, log_df: np.ndarray) -> np.ndarray:
    """Of each latent [B, D], as it stands in any book."""
    df = np.exp(log_df)
    norm = [math.lgamma((v + 1) / 2) - math.lgamma(v / 2) - 0.5 * math.log(v * math.pi) for v in df]
    return np.array(norm) - (df + 1) / 2 * np.log1p(z**2 / df)


def _covariances(base: Spec, own: Named) -> tuple[np.ndarray, np.ndarray]:
    """F and F F^T of each component, [M, D, D]."""
    components, size = own["base.means"].shape
    unit = np.tile(np.eye(size), (components, 1, 1))
    if base["covariance"] == "full":
        rows, columns = np.tril_indices(size, -1)
        unit[:, rows, columns] = own["base.lower"]
    factor = unit * np.exp(own["base.log_scales"])[:, None, :]
    return factor, factor @ factor.transpose(0, 2, 1)


def _log_of_components(base: Spec, z: np.ndarray, own: Named) -> np.ndarray:
    """log(w_m N(z; mean_m, covariance_m)), [B, M]."""
    log_weights = own["base.logits"] - np.log(np.sum(np.exp(own["base.logits"])))
    columns = []
    for m, covariance in enumerate(_covariances(base, own)[1]):
        away = z - own["base.means"][m]
        square = np.sum(away * np.linalg.solve(covariance, away.T).T, axis=1)
        columns.append(log_weights[m] - 0.5 * (z.shape[1] * LOG_2_PI + np.linalg.slogdet(covariance)[1] + square))
    return np.stack(columns, axis=1)


def base_log_density(spec: Spec, z: np.ndarray, own: Named | None = None) -> np.ndarray:
    """log of the base density of latents [B, D]; of rows with NaN it is NaN. own: the base's tensors."""
    base = spec.get("base", {"kind": "normal"})
    if base["kind"] == "normal":
        with np.errstate(over="ignore"):
            return -0.5 * (spec["input_size"] * LOG_2_PI + np.sum(z * z, axis=1))
    if base["kind"] == "student_t":
        return np.sum(_log_of_student(z, own["base.log_df"]), axis=1)
    if base["kind"] == "mixture":
        logs = _log_of_components(base, z, own)
        most = np.max(logs, axis=1)
        return most + np.log(np.sum(np.exp(logs - most[:, None]), axis=1))
    assert base["kind"] == "uniform"
    inside = (z >= base["low"]) & (z <= base["high"])
    of_one = np.where(inside, -math.log(base["high"] - base["low"]), np.where(np.isnan(z), z, -np.inf))
    with np.errstate(invalid="ignore"):
        return np.sum(of_one, axis=1)


def base_cotangents(
    spec: Spec, z: np.ndarray, grad: np.ndarray, own: Named | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Cotangents of z, of the log-determinant and of the base's tensors from those of log p, [B]."""
    base = spec.get("base", {"kind": "normal"})
    if base["kind"] == "normal":
        return -z * grad[:, None], grad, {}
    if base["kind"] == "student_t":
        df = np.exp(own["base.log_df"])
        by_df = _digamma((df + 1) / 2) / 2 - _digamma(df / 2) / 2 - 0.5 / df
        by_df = by_df - 0.5 * np.log1p(z**2 / df) + (df + 1) / 2 * z**2 / (df * (df + z**2))
        return -(df + 1) * z / (df + z**2) * grad[:, None], grad, {"base.log_df": grad @ by_df * df}
    if base["kind"] == "mixture":
        return _mixture_cotangents(base, z, grad, own)
    return np.zeros_like(z), np.where(np.isfinite(base_log_density(spec, z)), grad, 0.0), {}


def _mixture_cotangents(base, z, grad, own):
    logs = _log_of_components(base, z, own)
    shares = np.exp(logs - logs.max(axis=1, keepdims=True))
    shares = shares / shares.sum(axis=1, keepdims=True) * grad[:, None]  # [B, M], times the cotangents
    factors, covariances = _covariances(base, own)
    weights = np.exp(own["base.logits"]) / np.sum(np.exp(own["base.logits"]))
    found = {name: np.zeros_like(value) for name, value in own.items() if name.startswith("base.")}
    found["base.logits"] = shares.sum(axis=0) - weights * grad.sum()
    of_z, below = np.zeros_like(z), np.tril_indices(z.shape[1], -1)
    for m, (factor, covariance) in enumerate(zip(factors, covariances, strict=True)):
        pulled = np.linalg.solve(covariance, (z - own["base.means"][m]).T).T
        of_z -= shares[:, m : m + 1] * pulled
        found["base.means"][m] = shares[:, m] @ pulled
        # By the covariance first: d log N = tr((v v^T - S^-1) dS) / 2, dS = dF F^T + F dF^T.
        of_covariance = 0.5 * (pulled.T * shares[:, m] @ pulled - shares[:, m].sum() * np.linalg.inv(covariance))
        of_factor = 2 * of_covariance @ factor
        found["base.log_scales"][m] = np.sum(np.tril(of_factor * factor), axis=0)
        if base["covariance"] == "full":
            found["base.lower"][m] = (of_factor * np.exp(own["base.log_scales"][m]))[below]
    return of_z, grad, found


class Gradients(NamedTuple):
    """Of one vector-Jacobian product."""

    x: np.ndarray  # [B, D]
    context: np.ndarray | None  # of the context's own shape
    parameters: dict[str, np.ndarray]


class _Run(NamedTuple):
    x: Node
    context: Node | None
    parameters: dict[str, Node]
    values: Node
    log_det: Node


class GeneralFlow:
    """`parameters` maps the names of the file format to float64 arrays and may be assigned to.

    `context` is [B, C], a row for each row of x, or [C], one for all of them.
    """

    def __init__(self, spec: Spec, parameters: Mapping[str, np.ndarray] | None = None):
        self.spec = spec
        self.input_size: int = spec["input_size"]
        self.context_size: int = spec.get("context_size", 0)
        self.layers = [coupling_of_1_1(layer) if layer["kind"] == "coupling" else layer for layer in spec["layers"]]
        self.parameters = {name: np.zeros(shape) for name, shape in tensor_shapes(spec)}
        if parameters is not None:
            assert list(parameters) == list(self.parameters), f"names are {list(parameters)}"
            for name, value in parameters.items():
                assert value.shape == self.parameters[name].shape, f"{name} has shape {value.shape}"
                self.parameters[name] = np.array(value, dtype=np.float64)

    def forward(self, x: np.ndarray, context: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """z [B, D] and log|det dz/dx| [B]."""
        run = self._run(x, context, "forward")
        values = np.where(self.outside(x)[:, None], np.inf, run.values.value)
        return settled(self._all_given(x, context), values, run.log_det.value, -np.inf)

    def outside(self, x: np.ndarray) -> np.ndarray:
        """Which finite rows lie outside of bounds or on an edge [B]."""
        found = np.zeros(len(x), bool)
        for layer in self.layers:
            if layer["kind"] == "bounds":
                low, high = _ends(layer)
                found |= ~((x > low) & (x < high)).all(axis=1) & np.isfinite(x).all(axis=1)
        return found

    def inverse(self, z: np.ndarray, context: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """x [B, D] and log|det dx/dz| [B]."""
        run = self._run(z, context, "inverse")
        return settled(self._all_given(z, context), run.values.value, run.log_det.value, np.inf)

    def log_prob(self, x: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        z, log_det = self.forward(x, context)
        return base_log_density(self.spec, z, self.parameters) + log_det

    def nll(self, x: np.ndarray, context: np.ndarray | None = None) -> float:
        return -float(np.mean(self.log_prob(x, context)))

    def vjp(
        self,
        x: np.ndarray,
        grad_out: np.ndarray | None,
        grad_log_det: np.ndarray | None,
        direction: str = "forward",
        context: np.ndarray | None = None,
    ) -> Gradients:
        """Gradients of sum(grad_out * out) + sum(grad_log_det * log_det)."""
        run = self._run(x, context, direction)
        kept = ~self.outside(x) if direction == "forward" else np.ones(len(x), bool)  # the others have no gradient
        cotangents = [
            (
                node,
                np.zeros_like(node.value)
                if given is None
                else np.where(kept if given.ndim == 1 else kept[:, None], given, 0.0),
            )
            for node, given in ((run.values, grad_out), (run.log_det, grad_log_det))
        ]
        found = pull_back(cotangents)

        def of(node: Node) -> np.ndarray:
            return found.get(node.number, np.zeros_like(node.value))

        of_context = None if run.context is None else of(run.context)
        return Gradients(of(run.x), of_context, {name: of(node) for name, node in run.parameters.items()})

    def log_prob_vjp(self, x: np.ndarray, grad: np.ndarray, context: np.ndarray | None = None) -> Gradients:
        """Gradients of sum(grad * log_prob)."""
        z, _ = self.forward(x, context)
        outside = self.outside(x)  # such rows have no gradient
        z, grad = np.where(outside[:, None], 0.0, z), np.where(outside, 0.0, grad)
        *cotangents, of_base = base_cotangents(self.spec, z, grad, self.parameters)
        found = self.vjp(x, *cotangents, context=context)
        return found._replace(parameters=found.parameters | of_base)

    def nll_gradient(self, x: np.ndarray, context: np.ndarray | None = None) -> tuple[float, Gradients]:
        rows = len(x)
        return self.nll(x, context), self.log_prob_vjp(x, np.full(rows, -1.0 / rows), context)

    def smallest_pre_activation(
        self, x: np.ndarray, direction: str = "forward", context: np.ndarray | None = None
    ) -> np.ndarray:
        """Per row, the distance to the nearest point where a derivative jumps [B]; inf where there is none."""
        kinks: list[np.ndarray] = []
        self._run(x, context, direction, kinks)
        smallest = np.full(len(x), np.inf)
        for u in kinks:
            smallest = np.minimum(smallest, np.min(np.abs(u), axis=1, initial=np.inf))
        return smallest

    # -- the walk

    def _all_given(self, x: np.ndarray, context: np.ndarray | None) -> np.ndarray:
        if context is None:
            return np.asarray(x)
        return np.concatenate([x, np.broadcast_to(context, (len(x), self.context_size))], axis=1)

    def _run(self, x: np.ndarray, context: np.ndarray | None, direction: str, kinks: list | None = None) -> _Run:
        assert (context is None) == (self.context_size == 0)
        p = {name: Node(value) for name, value in self.parameters.items()}
        start, given = Node(np.array(x, dtype=np.float64)), None if context is None else Node(np.array(context))
        values, log_det = start, Node(np.zeros(len(x)))
        layers = list(zip(self.layers, self.prefixes(), strict=True))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            c = None if given is None else given + np.zeros((len(x), self.context_size))
            if c is not None and self.spec.get("standardize_context", False):
                c = (c - p["context.mean"]) * _exp(-p["context.log_std"])
            for layer, prefix in layers if direction == "forward" else reversed(layers):
                run_backwards = (direction == "inverse") != layer.get("inverse", False)
                values, step = getattr(self, f"_{layer['kind']}")(
                    layer, prefix, p, values, c, run_backwards, [] if kinks is None else kinks
                )
                log_det = log_det + step
        return _Run(start, given, p, values, log_det)

    def prefixes(self) -> list[str]:
        couplings = itertools.count()
        return [
            f"flow_{next(couplings)}" if kind == "coupling" else f"{kind.removeprefix('element_')}_{i}"
            for i, kind in enumerate(layer["kind"] for layer in self.layers)
        ]

    # -- the layers: output and log-determinant from the input, by the formula or by its inverse

    def _coupling(self, layer, prefix, p, x, c, backwards, kinks):
        b = transformed_features(layer["transformed"], self.input_size)
        a = np.setdiff1d(np.arange(self.input_size), b)
        given = x.columns(a) if c is None else _side_by_side([x.columns(a), c])
        heads = heads_of(layer["transform"])
        if "network" in layer:
            last = dict.fromkeys(heads, self._hidden(layer["network"], prefix, "coupling_dense", p, given, c, kinks))
        else:
            last = {
                head: self._hidden(layer[f"{head}_network"], prefix, f"{head}_dense", p, given, c, kinks)
                for head in heads
            }
        raw = {head: _dense(p, f"{prefix}_{head}", last[head]) for head in heads}
        if layer["transform"]["kind"] == "spline":
            of_features = {name: numbers.of_features(len(b)) for name, numbers in raw.items()}
            y_b, step = _spline(layer["transform"], of_features, x.columns(b), backwards, kinks)
        else:
            y_b, step = _affine(layer["transform"], raw, x.columns(b), backwards, kinks)
        places = np.argsort(np.concatenate([a, b]))
        return _side_by_side([x.columns(a), y_b]).columns(places), step.sum_of_row()

    def _hidden(self, network, prefix, dense_name, p, given, c, kinks):
        """The network up to its last hidden layer."""

        def activate(u: Node) -> Node:
            if network["activation"] in KINKED:
                kinks.append(u.value)
            return u.map(ACTIVATIONS[network["activation"]], DERIVATIVES[network["activation"]])

        h = given
        if network["kind"] == "mlp":
            for j in range(len(network["hidden_sizes"])):
                h = activate(_dense(p, f"{prefix}_{dense_name}_{j}", h))
                if network["layer_norm"]:
                    h = _layer_norm(h)
            return h
        assert network["kind"] == "residual"
        h = _dense(p, f"{prefix}_initial", h)
        for j in range(network["num_blocks"]):
            block, v = f"{prefix}_block_{j}", h
            if network["block_affines"]:
                v = v * p[f"{block}_affine.scale"] + p[f"{block}_affine.shift"]
            v = _dense(p, f"{block}_dense_0", activate(v))
            v = _dense(p, f"{block}_dense_1", activate(v))
            if network["context_gates"] and c is not None:
                v = v * _dense(p, f"{block}_context", c).map(ACTIVATIONS["sigmoid"], DERIVATIVES["sigmoid"])
            h = h + v
        return h

    def _element_spline(self, layer, prefix, p, x, c, backwards, kinks):
        b = transformed_features(layer["features"], self.input_size)
        a = np.setdiff1d(np.arange(self.input_size), b)
        rows = np.zeros((len(x.value), 1, 1))
        raw = {name: _transposed(p[f"{prefix}.{name}"]) + rows for name in raw_numbers(layer["spline"])}
        y_b, step = _spline(layer["spline"], raw, x.columns(b), backwards, kinks)
        places = np.argsort(np.concatenate([a, b]))
        return _side_by_side([x.columns(a), y_b]).columns(places), step.sum_of_row()

    def _permutation(self, layer, prefix, p, x, c, backwards, kinks):
        order = np.asarray(layer["order"])
        return x.columns(np.argsort(order) if backwards else order), Node(np.zeros(len(x.value)))

    def _lu_linear(self, layer, prefix, p, x, c, backwards, kinks):
        size = self.input_size
        diagonal, log_diagonal = np.diag_indices(size), p[f"{prefix}.log_diagonal"]
        lower = p[f"{prefix}.lower"].at(np.tril_indices(size, -1), (size, size)) + np.eye(size)
        upper = p[f"{prefix}.upper"].at(np.triu_indices(size, 1), (size, size))
        upper = upper + (p[f"{prefix}.sign"] * _exp(log_diagonal)).at(diagonal, (size, size))
        step = log_diagonal.sum_of_row() + np.zeros(len(x.value))
        if backwards:
            return _solve(lower @ upper, x - p[f"{prefix}.bias"]), -step
        return x @ _transposed(lower @ upper) + p[f"{prefix}.bias"], step

    def _actnorm(self, layer, prefix, p, x, c, backwards, kinks):
        log_scale, shift = p[f"{prefix}.log_scale"], p[f"{prefix}.shift"]
        step = log_scale.sum_of_row() + np.zeros(len(x.value))
        return ((x - shift) * _exp(-log_scale), -step) if backwards else (x * _exp(log_scale) + shift, step)

    def _standardize(self, layer, prefix, p, x, c, backwards, kinks):
        mean, log_std = p[f"{prefix}.mean"], p[f"{prefix}.log_std"]
        step = log_std.sum_of_row() + np.zeros(len(x.value))
        return (x * _exp(log_std) + mean, step) if backwards else ((x - mean) * _exp(-log_std), -step)

    def _bounds(self, layer, prefix, p, x, c, backwards, kinks):
        low, high = _ends(layer)
        steps = []
        for j, (a, b) in enumerate(zip(low, high, strict=True)):
            v = x.columns(np.array([j]))
            below, above = math.isfinite(a), math.isfinite(b)
            if backwards:
                if below and above:
                    share = v.map(ACTIVATIONS["sigmoid"], DERIVATIVES["sigmoid"])
                    steps.append((share * (b - a) + a, math.log(b - a) - _softplus(v) - _softplus(-v)))
                elif below or above:
                    steps.append((_exp(v) + a, v) if below else (b - _exp(-v), -v))
                else:
                    steps.append((v, v * 0.0))
                continue
            # Rows outside take a number inside: their log-determinant is -inf in any case.
            inside = (v.value > a) & (v.value < b)
            some = a + (b - a) / 2 if below and above else a + 1.0 if below else b - 1.0 if above else 0.0
            v = _where(inside, v, Node(np.full_like(v.value, some)))
            if below and above:
                steps.append((_log(v - a) - _log(b - v), math.log(b - a) - _log(v - a) - _log(b - v)))
            elif below or above:
                distance = _log(v - a) if below else _log(b - v)
                steps.append((distance if below else -distance, -distance))
            else:
                steps.append((v, v * 0.0))
        values, log_slopes = _side_by_side(y for y, _ in steps), _side_by_side(step for _, step in steps)
        log_det = log_slopes.sum_of_row()
        if not backwards:
            log_det = log_det + np.where(self.outside(x.value), -np.inf, 0.0)
        return values, log_det


def _ends(bounds: Spec) -> tuple[np.ndarray, np.ndarray]:
    low, high = bounds["low"], bounds["high"]
    return (
        np.array([-np.inf if value is None else value for value in low]),
        np.array([np.inf if value is None else value for value in high]),
    )


def _affine(transform: Spec, raw: Mapping[str, Node], x: Node, backwards: bool, kinks: list) -> tuple[Node, Node]:
    """x exp(s) + t and s, or the inverse of it."""
    t = raw["translation"]
    if transform["kind"] == "additive":
        s = Node(np.zeros_like(t.value))
    else:
        s = log_scale(function := transform["log_scale"], raw["scale"])
        if function["function"] == "softplus" and function["high"] is not None:
            v = raw["scale"].value + function["offset"]
            kinks.append(ACTIVATIONS["softplus"](v) + function["low"] - function["high"])
    return ((x - t) * _exp(-s), -s) if backwards else (x * _exp(s) + t, s)


def _spline(spline: Spec, raw: Mapping[str, Node], x: Node, backwards: bool, kinks: list) -> tuple[Node, Node]:
    return rational_quadratic(spline, raw["widths"], raw["heights"], raw.get("derivatives"), x, backwards, kinks)


def _dense(p: Mapping[str, Node], name: str, given: Node) -> Node:
    return given @ p[f"{name}.kernel"] + p[f"{name}.bias"]


def _layer_norm(h: Node) -> Node:
    """(h - mean) / sqrt(variance + 1e-5) of each row, with the unbiased variance."""
    n = h.value.shape[1]
    centred = h - h.mean_of_row()
    variance = (centred * centred).mean_of_row() * (n / (n - 1))
    return centred * (variance + 1e-5).map(lambda v: v**-0.5, lambda v: -0.5 * v**-1.5)


# ---------------------------------------------------------------------------------------------- random flows

# What random_spec may draw; each name is a part of the format that a library can have or lack.
FEATURES = frozenset(
    {
        "transformed",  # odd, even and lists of features, beside the halves
        "inverse",
        "additive",
        "permutation",
        "log_scales",  # all but tanh
        "two_networks",
        "layer_norm",
        "residual",
        "lu_linear",
        "actnorm",
        "context",
        "standardize_context",
        "spline",
        "element_spline",
    }
)

# Each function with constants that some library has.
LOG_SCALES: tuple[Spec, ...] = (
    {"function": "tanh", "factor": 1.0, "divisor": 1.0},
    {"function": "tanh", "factor": 2.0, "divisor": 2.0},
    {"function": "tanh", "factor": 1.5, "divisor": 2.0},
    {"function": "softsign", "factor": 6.907755278982137, "divisor": 6.907755278982137},
    {"function": "softsign", "factor": 1.0, "divisor": 2.0},
    {"function": "atan", "factor": 1.272, "divisor": 1.0},
    {"function": "atan", "factor": 0.636, "divisor": 0.5},
    {"function": "identity"},
    {"function": "sigmoid", "low": 0.001, "high": 1.001, "offset": 2.0, "negated": False},
    {"function": "sigmoid", "low": 0.0, "high": 1.0, "offset": 2.0, "negated": True},
    {"function": "sigmoid", "low": 0.0, "high": 1.0, "offset": 2.0, "negated": False},
    {"function": "sigmoid", "low": 0.5, "high": 2.0, "offset": -0.5, "negated": True},
    {"function": "softplus", "low": 0.01, "high": None, "offset": 0.52546, "negated": False},
    {"function": "softplus", "low": 0.001, "high": 3.0, "offset": 0.0, "negated": False},
    {"function": "softplus", "low": 0.1, "high": 1.1, "offset": 0.5, "negated": True},
)

IDENTITY_OFFSET = math.log(math.expm1(1 - 1e-3))  # for which softplus(offset) + 1e-3 is 1


def spline_of(num_bins: int, tail_bound: float = 3.0, **fields: Any) -> dict[str, Any]:
    """The fields of a spline, by default those whose raw zeros make the identity."""
    plain = {
        "num_bins": num_bins,
        "lower": -tail_bound,
        "upper": tail_bound,
        "min_bin_width": 1e-3,
        "min_bin_height": 1e-3,
        "min_derivative": 1e-3,
        "derivative": {"function": "softplus", "offset": IDENTITY_OFFSET, "gain": 1.0},
        "size_bound": None,
        "boundary": "one",
        "tails": "identity",
    }
    assert fields.keys() <= plain.keys()
    return plain | fields


_NO_FLOORS = {"min_bin_width": 0.0, "min_bin_height": 0.0, "min_derivative": 0.0}
# Those of libraries, and the smallest ones.
SPLINES: tuple[Spec, ...] = (
    spline_of(8),
    spline_of(10, derivative={"function": "softplus", "offset": 0.0, "gain": 1.0}),  # nflows
    spline_of(8, 5.0, **_NO_FLOORS, derivative={"function": "exp", "bound": -math.log(1e-3)}, size_bound=3.45),  # zuko
    spline_of(7, 4.0, boundary="free"),  # flowjax
    spline_of(4, lower=-2.0, upper=4.0, min_bin_width=2e-5, min_bin_height=2e-5, boundary="free", tails="slope"),
    spline_of(6, derivative={"function": "softplus", "offset": 0.0, "gain": 1.44}, min_bin_width=0.1),
    spline_of(1),
    spline_of(1, boundary="free", tails="slope"),
    spline_of(2, lower=0.0, upper=1.0, tails="slope"),
    spline_of(3, derivative={"function": "exp", "bound": 2.0}, boundary="free"),
    spline_of(17),
)


def random_spec(
    rng: np.random.Generator, features: Iterable[str] = FEATURES, dtype: str = "float64", max_size: int = 40
) -> dict[str, Any]:
    """A spec of format 1.1 that uses some of `features`: 1 to max_size columns, 1 to 6 layers."""
    has = frozenset(features)
    assert has <= FEATURES, f"unknown features {has - FEATURES}"

    def chance(feature: str, probability: float = 0.5) -> bool:
        return bool(rng.random() < probability) and feature in has

    context = int(rng.integers(1, 6)) if chance("context", 0.6) else 0
    # Half of the flows are small: that is where the edges are.
    size = int(rng.integers(1 if context else 2, 1 + (max_size if rng.random() < 0.5 else min(6, max_size))))
    kinds = [
        "coupling",
        "coupling",
        "standardize",
        *(kind for kind in ("permutation", "lu_linear", "actnorm", "element_spline") if kind in has),
    ]
    drawn = [str(rng.choice(kinds)) for _ in range(int(rng.integers(1, 7)))]
    if "coupling" not in drawn:
        drawn[int(rng.integers(len(drawn)))] = "coupling"

    def network(two: bool = False) -> dict[str, Any]:
        activation = str(rng.choice(list(ACTIVATIONS)))
        if not two and chance("residual", 0.4):
            return {
                "kind": "residual",
                "hidden_size": int(rng.integers(1, 36)),
                "num_blocks": int(rng.integers(0, 4)),
                "activation": activation,
                "context_gates": context > 0 and bool(rng.random() < 0.5),
                "block_affines": bool(rng.random() < 0.5),
            }
        layer_norm = chance("layer_norm", 0.3)
        # LayerNorm of few units, which may be nearly equal, makes much of rounding; test_networks.py has such flows.
        sizes = [int(rng.integers(8 if layer_norm else 1, 36)) for _ in range(int(rng.integers(0, 4)))]
        return {"kind": "mlp", "hidden_sizes": sizes, "activation": activation, "layer_norm": layer_norm}

    def transformed() -> str | list[int]:
        if size == 1 or (context and rng.random() < 0.15):
            return "all"
        names = ["first_half", "second_half"] * 2 + (["odd", "even", None, None] if "transformed" in has else [])
        if (name := names[int(rng.integers(len(names)))]) is not None:
            return name
        count = int(rng.integers(1, size))
        return sorted(map(int, rng.choice(size, count, replace=False)))

    def spline() -> dict[str, Any]:
        return dict(SPLINES[int(rng.integers(len(SPLINES)))])

    def layer(kind: str) -> dict[str, Any]:
        if kind == "standardize":
            return {"kind": kind}
        if kind == "permutation":
            return {"kind": kind, "order": [int(j) for j in rng.permutation(size)]}
        flag = {"kind": kind, "inverse": chance("inverse")}
        if kind == "element_spline":
            every = rng.random() < 0.3 or size == 1
            return {**flag, "features": "all" if every else transformed(), "spline": spline()}
        if kind != "coupling":
            return flag
        flag["transformed"] = transformed()
        if chance("spline", 0.3):
            return {**flag, "transform": {"kind": "spline", **spline()}, "network": network()}
        if chance("additive", 0.2):
            return {**flag, "transform": {"kind": "additive"}, "network": network()}
        functions = LOG_SCALES if "log_scales" in has else LOG_SCALES[:3]
        affine = {"kind": "affine", "log_scale": dict(functions[int(rng.integers(len(functions)))])}
        if chance("two_networks", 0.25):
            networks = {"scale_network": network(two=True), "translation_network": network(two=True)}
            return {**flag, "transform": affine, **networks}
        return {**flag, "transform": affine, "network": network()}

    return {
        "input_size": size,
        "context_size": context,
        "dtype": dtype,
        "base": {"kind": "normal"},
        "standardize_context": context > 0 and chance("standardize_context"),
        "layers": [layer(kind) for kind in drawn],
    }


def _slopes_of_one(spec: Spec) -> dict[str, float]:
    """What to add to raw derivatives, by the tensors' names, so that their zeros are about slopes of 1."""
    shifts: dict[str, float] = {}
    couplings = 0
    for i, layer in enumerate(spec["layers"]):
        spline, name = layer.get("spline"), f"spline_{i}.derivatives"
        if layer["kind"] == "coupling":
            spline, name = layer.get("transform"), f"flow_{couplings}_derivatives.bias"
            couplings += 1
        how = {} if spline is None else spline.get("derivative", {})
        if how.get("function") == "softplus" and "derivatives" in raw_numbers(spline):
            rise = (1 - spline["min_derivative"]) / how["gain"]
            shifts[name] = math.log(math.expm1(rise)) - how["offset"]
    return shifts


def scrambled(spec: Spec, rng: np.random.Generator, kernel_scale: float = 1.0) -> dict[str, np.ndarray]:
    """Parameters far from the identity: kernels N(0, kernel_scale^2 / in), most of the rest 0.1 N(0, 1).

    Splines are so about the identity.
    """
    size = spec["input_size"]

    def draw(name: str, shape: Shape) -> np.ndarray:
        values = rng.normal(size=shape)
        if name.endswith(".kernel"):
            return values * (kernel_scale / math.sqrt(max(1, shape[0])))
        if name.endswith((".lower", ".upper")):
            return values * (0.4 / math.sqrt(size))
        if name.startswith("spline_"):
            return values * (0.5 * kernel_scale)
        if name == "base.log_df":
            return 1 + values
        if name in ("base.logits", "base.means"):
            return values
        if name.endswith(".sign"):
            return np.where(values < 0, -1.0, 1.0)
        return values * 0.1 + (1.0 if name.endswith("_affine.scale") else 0.0)

    drawn = {name: draw(name, shape) for name, shape in tensor_shapes(spec)}
    for name, shift in _slopes_of_one(spec).items():
        drawn[name] += shift
    return drawn


_PUSH = 2.0**-40


def _pushed(values: np.ndarray, rng: np.random.Generator, least: float) -> np.ndarray:
    """Each number moved up or down by one unit in a million million of itself, or of `least` where it is smaller."""
    return values + _PUSH * np.maximum(np.abs(values), least) * rng.choice([-1.0, 1.0], size=values.shape)


def condition(flow: GeneralFlow, x: np.ndarray, context: np.ndarray | None, rng: np.random.Generator) -> float:
    """How far results move, in their budget's measure, when all that is given moves by one unit in a million million.

    Results are both transforms at x, and log p; the largest of three random pushes of x, context and parameters.
    """

    def results(flow: GeneralFlow, x: np.ndarray, context: np.ndarray | None) -> np.ndarray:
        z, log_det = flow.forward(x, context)
        back, back_log_det = flow.inverse(x, context)
        log_p = flow.log_prob(x, context)
        return np.concatenate([z.ravel(), log_det, back.ravel(), back_log_det, log_p])

    here, worst = results(flow, x, context), 0.0
    for _ in range(3):
        moved = {n: v if n.endswith(".sign") else _pushed(v, rng, 0.0) for n, v in flow.parameters.items()}
        of_rows = None if context is None else _pushed(context, rng, 0.0)
        there = results(GeneralFlow(flow.spec, moved), _pushed(x, rng, 0.0), of_rows)
        worst = max(worst, float(np.max(np.abs(there - here) / (1.0 + np.abs(here)), initial=0.0)))
    return worst / _PUSH


def sensitivities(
    results: Callable[[GeneralFlow, np.ndarray, np.ndarray | None], Iterable[np.ndarray]],
    flow: GeneralFlow,
    x: np.ndarray,
    context: np.ndarray | None,
    rng: np.random.Generator,
    pushes: int = 4,
) -> list[np.ndarray]:
    """How many units each result moves when rows and raw numbers of splines do by one, and kernels by one of theirs.

    Of the results the shapes; the largest of some random pushes. Biases stand for the raw numbers: rounding these costs
    a unit of 1, also where they are small.
    """
    here = [np.asarray(result, dtype=np.float64) for result in results(flow, x, context)]
    worst = [np.zeros_like(result) for result in here]
    for _ in range(pushes):
        moved = {
            name: value if name.endswith(".sign") else _pushed(value, rng, 0.0 if name.endswith(".kernel") else 1.0)
            for name, value in flow.parameters.items()
        }
        of_rows = None if context is None else _pushed(context, rng, 0.0)
        there = results(GeneralFlow(flow.spec, moved), _pushed(x, rng, 1.0), of_rows)
        worst = [np.maximum(w, np.abs(t - h) / _PUSH) for w, t, h in zip(worst, there, here, strict=True)]
    return worst
