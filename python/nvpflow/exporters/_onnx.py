"""A flow as an ONNX graph, of operators that onnxruntime has in float32 and in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow._bases import Mixture, Normal, StudentT, Uniform
from nvpflow._bounds import ends, inside
from nvpflow.exporters._onnx_graph import Graph, Value
from nvpflow.exporters._weights import Weights, context_statistics, layers_of, lu_factors, split
from nvpflow.flow import Flow
from nvpflow.layers import (
    MLP,
    ActNorm,
    Additive,
    Affine,
    Bounds,
    Coupling,
    ElementSpline,
    Layer,
    LULinear,
    Permutation,
    ResidualNet,
    Spline,
    Standardize,
)

Result = tuple[
    Value, Value | float
]  # what a layer makes of rows; log-derivatives [batch, n], or their sum for all rows
Raw = dict[str, Value]  # raw numbers of a spline, [batch or 1, n, K]


def model_of(flow: Flow, method: str) -> Any:
    """Return the ONNX model of one method; that of "sample" has the latents as a last output, "z"."""
    spec, g = flow.spec, Graph(flow.spec.dtype)
    size, backwards = spec.input_size, method in ("inverse", "sample")
    rows, context = Value(g, "z" if backwards else "x"), Value(g, "context") if spec.context_size else None
    inputs = [] if method == "sample" else [g.floats(rows.name, "batch", size)]
    if context is not None:
        inputs.append(g.floats("context", "batch", spec.context_size))
    elif method == "sample":
        inputs.append(g.integer("n"))
    if method == "sample":
        count = Value(g, "n") if context is None else context.node("Shape", start=0, end=1)
        rows = _noise(g, flow, g.node("Concat", count, g.indices(size), axis=0))
    values, log_det, poison = _walk(g, flow, rows, context, backwards)
    marked = values + poison.node("Unsqueeze", g.indices(-1)), log_det + poison
    if method == "log_prob":
        outputs = {"log_prob": _log_prob(flow, values, log_det) + poison}
    elif method == "sample":
        outputs = {"x": marked[0], "log_prob": _log_prob(flow, rows, -log_det) + poison, "z": rows}
    else:
        outputs = {"x" if backwards else "z": marked[0], "log_det": marked[1]}
    axes = {"x": ("batch", size), "z": ("batch", size)}
    described = {name: (value, g.floats(name, *axes.get(name, ("batch",)))) for name, value in outputs.items()}
    return g.model(f"nvpflow_{method}", inputs, described)


def _noise(g: Graph, flow: Flow, shape: Value) -> Value:
    zeros, base = g.zeros(shape), flow.spec.base
    if isinstance(base, Normal):
        return zeros.node("RandomNormalLike")
    if isinstance(base, Uniform):
        return zeros.node("RandomUniformLike", low=base.low, high=base.high).node("Clip", base.low, base.high)
    if isinstance(base, StudentT):  # Bailey (1994)
        df, share = np.exp(_of_base(flow)["log_df"]), zeros.node("RandomUniformLike", low=_LEAST_SHARE, high=1.0)
        x = share.node("Log") * (-2 / df)
        angle = zeros.node("RandomUniformLike", low=0.0, high=2 * math.pi)
        radius = ((1.0 - (-x).node("Exp")) * df).node("Sqrt") * (x * 0.5).node("Exp")
        return radius * angle.node("Cos")
    assert isinstance(base, Mixture)
    return _mixture_noise(g, _of_base(flow), zeros)


_LEAST_SHARE = 1e-30  # a share of 0 has no logarithm


def _of_base(flow: Flow) -> Weights:
    """Return the base's numbers in float64, by their names without the base's."""
    return {
        name.removeprefix("base."): value.astype(np.float64)
        for name, value in flow.parameters().items()
        if name.startswith("base.")
    }


def _unit_factors(own: Weights) -> NDArray[np.float64]:
    """Return L of each component [M, D, D]."""
    components, size = own["means"].shape
    unit = np.tile(np.eye(size), (components, 1, 1))
    if "lower" in own:
        rows, columns = np.tril_indices(size, -1)
        unit[:, rows, columns] = own["lower"]
    return unit


def _mixture_noise(g: Graph, own: Weights, zeros: Value) -> Value:
    shares = np.exp(own["logits"] - own["logits"].max())
    ends_of = np.cumsum(shares / shares.sum())[:-1]
    drawn = zeros.slice(0, 1).node("RandomUniformLike", low=0.0, high=1.0)  # [n, 1]
    passed = drawn.node("GreaterOrEqual", np.append(ends_of, 2.0))  # the last end is none, also of one component
    chosen = passed.count().node("Squeeze", g.indices(-1))
    scaled = zeros.node("RandomNormalLike") * g.constant(np.exp(own["log_scales"])).node("Gather", chosen, axis=0)
    if "lower" in own:
        factors = g.constant(_unit_factors(own)).node("Gather", chosen, axis=0)
        scaled = factors.node("MatMul", scaled.node("Unsqueeze", g.indices(-1))).node("Squeeze", g.indices(-1))
    return g.constant(own["means"]).node("Gather", chosen, axis=0) + scaled


def _walk(g: Graph, flow: Flow, rows: Value, context: Value | None, backwards: bool) -> tuple[Value, Value, Value]:
    """Return what all layers make of rows, the log-determinant, and what to add to either: 0, or NaN for bad rows.

    Bad are rows that came with NaN or infinity; what overflows in others is infinite.
    """
    poison = (rows - rows).sum()
    if context is not None:
        poison = poison + (context - context).sum()
        if (statistics := context_statistics(flow)) is not None:
            mean, log_std = (values.astype(np.float64) for values in statistics)
            context = (context - mean) * np.exp(-log_std)
    values, log_det, of_all = rows, poison, 0.0
    layers = layers_of(flow)
    for layer, weights in reversed(layers) if backwards else layers:
        turned = backwards != getattr(layer, "inverse", False)
        values, step = _layer(layer, weights, flow.spec.input_size, values, context, turned)
        if isinstance(step, Value):
            log_det = log_det + step.sum()
        else:
            of_all += step
    log_det = log_det + of_all
    values = values.where(values.node("IsNaN"), math.inf)
    return values, log_det.where(log_det.node("IsNaN"), math.inf if backwards else -math.inf), poison


def _log_prob(flow: Flow, z: Value, log_det: Value) -> Value:
    """Return log p of rows, where the latents are z and the log-determinant from data to latent is log_det."""
    log_p = _log_base(flow, z, log_det)
    return log_p.where(log_p.node("IsNaN"), -math.inf)


def _log_base(flow: Flow, z: Value, log_det: Value) -> Value:
    size, base = flow.spec.input_size, flow.spec.base
    if isinstance(base, Normal):
        return log_det - 0.5 * (z * z).sum() - 0.5 * size * math.log(2 * math.pi)
    if isinstance(base, Uniform):
        outside = z.node("Less", base.low).node("Or", z.node("Greater", base.high))
        return (log_det - size * math.log(base.high - base.low)).where(outside.any(), -math.inf)
    if isinstance(base, StudentT):
        return log_det + _log_student(z, np.exp(_of_base(flow)["log_df"]))
    assert isinstance(base, Mixture)
    return log_det + _log_mixture(z, _of_base(flow))


def _log_student(z: Value, df: NDArray[np.float64]) -> Value:
    """Return log p of latents, where no square overflows."""
    t = z.node("Abs") / np.sqrt(df)
    near = t.node("LessOrEqual", 1.0)
    m = (1.0 / t.where(near, 1.0)).where(near, t)
    log = _log1p(m * m) + 2.0 * t.where(near, 1.0).node("Log")
    return (-0.5 * (df + 1) * log).sum() + float(sum(map(_log_norm_of_student, df)))


def _log_norm_of_student(df: float) -> float:
    """Return log p at 0. Of many degrees of freedom the difference of two logarithms of Gamma is their series."""
    df = min(max(df, 1e-18), 1e18)
    if df > 1e3:
        return 1 / (24 * df**3) - 1 / (4 * df) - 0.5 * math.log(2 * math.pi)
    return math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)


def _log_mixture(z: Value, own: Weights) -> Value:
    indices = z.graph.indices
    away = z.node("Unsqueeze", indices(1)) - own["means"]  # [batch, M, D]
    if "lower" in own:
        inverse = np.linalg.inv(_unit_factors(own)).transpose(0, 2, 1)
        away = away.node("Unsqueeze", indices(2)).node("MatMul", inverse).node("Squeeze", indices(2))
    away = away * np.exp(-own["log_scales"])
    weights = own["logits"] - np.logaddexp.reduce(own["logits"])
    peaks = weights - own["log_scales"].sum(axis=1) - 0.5 * own["means"].shape[1] * math.log(2 * math.pi)
    logs: Value = peaks - 0.5 * (away * away).sum()  # [batch, M]
    most = logs.node("ReduceMax", indices(-1), keepdims=1)
    return (logs - most).node("Exp").sum().node("Log") + most.node("Squeeze", indices(-1))


# ------------------------------------------------------------------------------------------------------------- layers


def _layer(layer: Layer, weights: Weights, size: int, x: Value, context: Value | None, backwards: bool) -> Result:
    if isinstance(layer, Coupling):
        a, b, places = split(layer.transformed, size)
        heads = _heads(layer, weights, x.columns(a) if len(a) else None, context)
        if isinstance(layer.transform, Spline):
            counts = {name: len(weights[f"{name}.bias"]) // len(b) for name in heads}
            raw = {name: u.by_feature(counts[name], len(b)) for name, u in heads.items()}
            y, step = _spline(layer.transform, raw, x.columns(b), backwards)
        else:
            y, step = _affine(layer.transform, heads, x.columns(b), backwards)
        return (y if not len(a) else x.columns(a).beside(y).columns(places)), step
    if isinstance(layer, ElementSpline):
        a, b, places = split(layer.features, size)
        raw = {name: x.graph.constant(values.T[None]) for name, values in weights.items()}
        y, step = _spline(layer.spline, raw, x.columns(b), backwards)
        return (y if not len(a) else x.columns(a).beside(y).columns(places)), step
    if isinstance(layer, Permutation):
        order = np.array(layer.order)
        return x.columns(np.argsort(order) if backwards else order), 0.0
    if isinstance(layer, LULinear):
        return _linear(weights, x, backwards)
    if isinstance(layer, Bounds):
        return _bounded(layer, x, backwards)
    return _diagonal(layer, weights, x, backwards)


def _bounded(layer: Bounds, x: Value, backwards: bool) -> Result:
    """Map columns with bounds, each kind by itself; a row outside becomes NaN."""
    low, high = ends(layer)
    has_low, has_high = np.isfinite(low), np.isfinite(high)
    kinds = [has_low & has_high, has_low & ~has_high, ~has_low & has_high, ~has_low & ~has_high]
    columns = [np.flatnonzero(kind) for kind in kinds]
    parts: list[Value] = []
    steps: list[Value] = []
    least, most = inside(layer, x.graph.dtype)
    for places, kind in zip(columns, (_both, _above, _below, None), strict=True):
        if not len(places):
            continue
        values = x.columns(places)
        if kind is not None:
            values, step = kind(values, low[places], high[places], backwards)
            steps.append(step)
            if backwards:
                values = values.node("Max", least[places]).node("Min", most[places])
        parts.append(values)
    y, step = parts[0], steps[0]
    for part in parts[1:]:
        y = y.beside(part)
    for more in steps[1:]:
        step = step.beside(more)
    poison = step.sum(keepdims=1) * 0.0  # NaN of a row that is outside
    return y.columns(np.argsort(np.concatenate(columns))) + poison, step


def _logarithm(distance: Value) -> Value:
    """Return log of a distance, NaN where it is not positive."""
    return distance.node("Log").where(distance.node("LessOrEqual", 0.0), math.nan)


def _both(x: Value, low: NDArray[Any], high: NDArray[Any], backwards: bool) -> tuple[Value, Value]:
    width = high - low
    if not backwards:
        u, v = _logarithm(x - low), _logarithm(high - x)
        return u - v, np.log(width) - u - v
    away = x.node("Abs")
    e = (-away).node("Exp")
    distance = width * e / (e + 1.0)
    near_low = x.node("Less", 0.0)
    value = (high - distance).where(near_low, low + distance)
    return value, np.log(width) - away - 2.0 * (e + 1.0).node("Log")


def _above(x: Value, low: NDArray[Any], high: NDArray[Any], backwards: bool) -> tuple[Value, Value]:
    if backwards:
        return x.node("Exp") + low, x
    y = _logarithm(x - low)
    return y, -y


def _below(x: Value, low: NDArray[Any], high: NDArray[Any], backwards: bool) -> tuple[Value, Value]:
    if backwards:
        return high - (-x).node("Exp"), -x
    y = -_logarithm(high - x)
    return y, y


def _diagonal(layer: Standardize | ActNorm, weights: Weights, x: Value, backwards: bool) -> Result:
    if isinstance(layer, Standardize):  # an actnorm read backwards
        weights, backwards = {"log_scale": weights["log_std"], "shift": weights["mean"]}, not backwards
    log_scale, shift = weights["log_scale"].astype(np.float64), weights["shift"].astype(np.float64)
    if backwards:
        return (x - shift) * np.exp(-log_scale), -float(log_scale.sum())
    return x * np.exp(log_scale) + shift, float(log_scale.sum())


def _linear(weights: Weights, x: Value, backwards: bool) -> Result:
    lower, upper = lu_factors(weights)
    bias, log_det = weights["bias"], float(weights["log_diagonal"].astype(np.float64).sum())
    if backwards:
        inverse = np.linalg.solve(upper, np.linalg.inv(lower))
        return (x - bias).node("MatMul", inverse.T), -log_det
    return x.node("Gemm", (lower @ upper).T, bias), log_det


# ----------------------------------------------------------------------------------------------------------- networks


def _heads(layer: Coupling, weights: Weights, a: Value | None, context: Value | None) -> dict[str, Value]:
    """Return what the networks of a coupling give, by the names of its heads."""
    given = context if a is None else a if context is None else a.beside(context)
    assert given is not None  # a coupling of all features has a context
    names = [name.removesuffix(".bias") for name in weights if name.endswith(".bias")]
    names = [name for name in ("scale", "translation", "widths", "heights", "derivatives") if name in names]
    if layer.network is not None:
        h = _network(layer.network, weights, "coupling_dense", given, context)
        return {name: _dense(weights, name, h) for name in names}
    assert layer.scale_network is not None
    assert layer.translation_network is not None
    networks = {"scale": layer.scale_network, "translation": layer.translation_network}
    return {
        name: _dense(weights, name, _network(network, weights, f"{name}_dense", given, context))
        for name, network in networks.items()
    }


def _dense(weights: Weights, name: str, h: Value) -> Value:
    return h.node("Gemm", weights[f"{name}.kernel"], weights[f"{name}.bias"])


def _network(network: MLP | ResidualNet, weights: Weights, name: str, given: Value, context: Value | None) -> Value:
    activate = _ACTIVATIONS[network.activation]
    if isinstance(network, MLP):
        h = given
        for j in range(len(network.hidden_sizes)):
            h = activate(_dense(weights, f"{name}_{j}", h))
            h = _layer_norm(h, network.hidden_sizes[j]) if network.layer_norm else h
        return h
    h = _dense(weights, "initial", given)
    for j in range(network.num_blocks):
        block, v = f"block_{j}", h
        if network.block_affines:
            v = v * weights[f"{block}_affine.scale"] + weights[f"{block}_affine.shift"]
        v = _dense(weights, f"{block}_dense_0", activate(v))
        v = _dense(weights, f"{block}_dense_1", activate(v))
        if network.context_gates:
            assert context is not None
            v = v * _dense(weights, f"{block}_context", context).node("Sigmoid")
        h = h + v
    return h


def _layer_norm(h: Value, width: int) -> Value:
    h = h - h.sum(keepdims=1) / width
    return h / ((h * h).sum(keepdims=1) / (width - 1) + 1e-5).node("Sqrt")


def _leaky_relu(u: Value) -> Value:
    return u.node("Max", 0.0) + 0.01 * u.node("Min", 0.0)


def _elu(u: Value) -> Value:
    return u.node("Max", 0.0) + (u.node("Min", 0.0).node("Exp") - 1.0)


def _gelu(u: Value) -> Value:
    return 0.5 * u * ((u / math.sqrt(2.0)).node("Erf") + 1.0)


def _softplus(u: Value) -> Value:
    return u.node("Max", 0.0) + _log1p((-u.node("Abs")).node("Exp"))


def _log1p(e: Value) -> Value:
    """Return log(1 + e), which keeps no digits of a small e; the quotient brings them back (Kahan)."""
    one = e + 1.0
    return (one.node("Log") * e / (one - 1.0)).where(one.node("Equal", 1.0), e)


_ACTIVATIONS: dict[str, Callable[[Value], Value]] = {
    "relu": lambda u: u.node("Max", 0.0),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "gelu": _gelu,
    "silu": lambda u: u * u.node("Sigmoid"),
    "tanh": lambda u: u.node("Tanh"),
    "sigmoid": lambda u: u.node("Sigmoid"),
    "softplus": _softplus,
}


# --------------------------------------------------------------------------------------------------------- transforms


def _affine(transform: Affine | Additive, heads: dict[str, Value], x: Value, backwards: bool) -> Result:
    t = heads["translation"]
    if isinstance(transform, Additive):
        return (x - t if backwards else x + t), 0.0
    s = _log_scale(transform, heads["scale"])
    return ((x - t) * (-s).node("Exp"), -s) if backwards else (x * s.node("Exp") + t, s)


def _log_scale(transform: Affine, u: Value) -> Value:
    function = transform.function
    if function == "identity":
        return u
    if transform.factor is not None and transform.divisor is not None:
        v = u / transform.divisor
        if function == "softsign":
            return transform.factor * v / (v.node("Abs") + 1.0)
        return transform.factor * (v.node("Tanh") if function == "tanh" else _atan(v))
    low, high, offset = transform.low, transform.high, transform.offset
    assert low is not None
    assert high is not None
    assert offset is not None
    v = u + offset
    if function == "softplus":
        scale = _softplus(v) + low
        s = (scale.node("Min", high) if math.isfinite(high) else scale).node("Log")
    elif low == 0:  # no logarithm of a rounded sigmoid, which may be 0
        s = math.log(high) - _softplus(-v)
    else:
        s = (v.node("Sigmoid") * (high - low) + low).node("Log")
    return -s if transform.negated else s


def _atan(v: Value) -> Value:
    if v.graph.dtype == np.float32:
        return v.node("Atan")
    # onnxruntime has none in float64. Half the angle is atan(v / (1 + sqrt(1 + v^2))); of a sixteenth of a right angle
    # the series' twelve terms are exact.
    halvings, terms = 3, 12
    tangent = v.node("Clip", -1e150, 1e150)  # whose squares are finite; the angle is a right one from 1e16 on
    for _ in range(halvings):
        tangent = tangent / ((tangent * tangent + 1.0).node("Sqrt") + 1.0)
    square = tangent * tangent
    series: Value | float = 1.0 / (2 * terms - 1)
    for k in reversed(range(terms - 1)):
        series = 1.0 / (2 * k + 1) - square * series
    return 2.0**halvings * tangent * series


def _spline(spline: Spline, raw: Raw, x: Value, backwards: bool) -> Result:
    """Map x [batch, n] by the formulas of `nvpflow.exporters._torch.RationalQuadratic`."""
    (lower, upper), g = spline.interval, x.graph
    w = _sizes(spline, raw["widths"], spline.min_bin_width)
    h = _sizes(spline, raw["heights"], spline.min_bin_height)
    d = _slopes(spline, raw.get("derivatives"))
    size, other_size = (h, w) if backwards else (w, h)  # of the bins in the input and in the output
    start, other_start = (sizes.node("CumSum", g.indices(2), exclusive=1) for sizes in (size, other_size))
    t = ((x - lower) / (upper - lower)).node("Clip", 0.0, 1.0).node("Unsqueeze", g.indices(-1))
    k = start.slice(1, spline.num_bins).node("LessOrEqual", t).count()
    every = t.node("Shape")  # what a spline without a network has once, each row gets

    def at(values: Value, places: Value = k) -> Value:
        return values.node("Expand", every).node("GatherElements", places, axis=2)

    share = ((t - at(start)) / at(size)).node("Clip", 0.0, 1.0)
    s = at(h) / at(w)
    d0, d1 = (1.0, 1.0) if d is None else (at(d), at(d, k.node("Add", g.indices(1))))
    share, log_slope = _root(share, s, d0, d1) if backwards else _quotient(share, 1.0 - share, s, d0, d1)
    y, log_slope = (
        value.node("Squeeze", g.indices(-1)) for value in (at(other_start) + at(other_size) * share, log_slope)
    )
    return _with_tails(spline, x, (y * (upper - lower) + lower, log_slope), d, backwards)


def _sizes(spline: Spline, raw: Value, least: float) -> Value:
    """Return widths or heights of the bins, in parts of the interval."""
    u = raw if spline.size_bound is None else raw / ((raw / spline.size_bound).node("Abs") + 1.0)
    u = u - u.node("ReduceMax", u.graph.indices(-1), keepdims=1)
    e = u.node("Max", -40.0 if u.graph.dtype == np.float32 else -340.0).node("Exp")
    return e / e.sum(keepdims=1) * (1.0 - spline.num_bins * least) + least


def _slopes(spline: Spline, raw: Value | None) -> Value | None:
    """Return derivatives at all K + 1 knots; None: they are 1."""
    if raw is None:
        return None
    if spline.derivative == "exp":
        d = (raw / ((raw / spline.derivative_bound).node("Abs") + 1.0)).node("Exp")
    else:
        d = _softplus(raw + spline.derivative_offset) * spline.derivative_gain
    largest = 1e18 if d.graph.dtype == np.float32 else 1e150  # slopes are squared
    d = (d + spline.min_derivative).node("Clip", 1.0 / largest, largest)
    return d if spline.boundary == "free" else d.node("Pad", d.graph.indices(0, 0, 1, 0, 0, 1), 1.0)


def _with_tails(spline: Spline, x: Value, inside: tuple[Value, Value], d: Value | None, backwards: bool) -> Result:
    (lower, upper), (y, log_slope) = spline.interval, inside
    below, above = x.node("Less", lower), x.node("Greater", upper)
    if spline.tails == "identity" or d is None:
        outside = below.node("Or", above)
        return y.where(outside, x), log_slope.where(outside, 0.0)
    for edge, place, is_out in ((lower, 0, below), (upper, spline.num_bins, above)):
        slope = d.slice(place, place + 1).node("Squeeze", d.graph.indices(-1))
        slope = 1.0 / slope if backwards else slope
        y, log_slope = y.where(is_out, (x - edge) * slope + edge), log_slope.where(is_out, slope.node("Log"))
    return y, log_slope


def _quotient(xi: Value, rest: Value, s: Value, d0: Value | float, d1: Value | float) -> tuple[Value, Value]:
    """Return how far up its bin a spline has come at xi, rest being 1 - xi, and the logarithm of its slope."""
    up = s * xi * xi + d0 * xi * rest  # no term of these sums is negative: nothing cancels
    total = up + s * rest * rest + d1 * xi * rest
    m = d1 * xi * xi + 2.0 * s * xi * rest + d0 * rest * rest
    return up / total, m.node("Log") + 2.0 * (s / total).node("Log")


def _root(eta: Value, s: Value, d0: Value | float, d1: Value | float) -> tuple[Value, Value]:
    """Return where in its bin a spline is that has come eta up, and minus the logarithm of its slope there."""
    p = d0 * (1.0 - eta) - d1 * eta
    q, r = 2.0 * s * eta, 2.0 * s * (1.0 - eta)
    m = (p * p + q * r).node("Sqrt") + p.node("Abs")
    from_left = p.node("GreaterOrEqual", 0.0)
    total = (m + r).where(from_left, q + m)
    xi = m.where(from_left, q) / total
    _, log_slope = _quotient(xi, r.where(from_left, m) / total, s, d0, d1)
    return xi, -log_slope
