"""A flow in PyTorch's own operations: modules that TorchScript compiles, and that differentiate any number of times."""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError('nvpflow.exporters.to_torch needs PyTorch 2.4 or newer: pip install "torch>=2.4"') from error

from nvpflow._bounds import ends, inside
from nvpflow.exporters._torch_bases import base_of
from nvpflow.exporters._weights import Weights, context_statistics, layers_of, split
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

# No tensor of a module is empty: torch.export cannot save two of them. What would be is None, which TorchScript decides
# as it compiles. It reads the annotations below, and knows Optional.
Context = Optional[Tensor]  # noqa: UP045

# softplus(u) is u from here on: what is missing is less than half a unit of u.
_LINEAR_SOFTPLUS = 40.0


def module_of(flow: Flow) -> PlainFlow:
    """Return the flow as a module, on its device."""
    module = PlainFlow(flow)
    module.to(flow.device)
    return module


class PlainFlow(nn.Module):
    """A flow as `nvpflow.exporters.to_torch` describes it."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        spec = flow.spec
        self.input_size: int = spec.input_size
        self.context_size: int = spec.context_size
        self.base = base_of(flow)
        mean, log_std = context_statistics(flow) or (None, None)
        self.register_buffer("context_mean", None if mean is None else torch.from_numpy(mean))
        self.register_buffer("context_log_std", None if log_std is None else torch.from_numpy(log_std))
        self.has_bounds: bool = isinstance(spec.layers[0], Bounds)
        self.layers = nn.ModuleList(_layer(*each, spec.input_size) for each in layers_of(flow))

    def forward(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Return z [..., D] and log|det dz/dx| [...]."""
        return self._walk(x, context, False)

    @torch.jit.export
    def inverse(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Return x [..., D] and log|det dx/dz| [...]."""
        return self._walk(z, context, True)

    @torch.jit.export
    def log_prob(self, x: Tensor, context: Context = None) -> Tensor:
        """Return log p(x) [...]."""
        z, log_det = self._walk(x, context, False)
        density = self.base(z)
        log_p = (density + log_det).masked_fill(density == -math.inf, -math.inf)
        return log_p.masked_fill(log_p.isnan(), -math.inf).masked_fill(z.isnan().any(-1), math.nan)

    @torch.jit.export
    def sample(
        self,
        n: int,
        context: Context = None,
        generator: Optional[torch.Generator] = None,  # noqa: UP045
    ) -> Tensor:
        """Return n rows [n, D]; under contexts [..., C] n rows for each, [..., n, D]."""
        shape = [n, self.input_size]
        c = context
        if context is not None:
            shape = list(context.shape[:-1]) + shape
            c = context.unsqueeze(-2)
        return self._walk(self.base.sample(shape, generator), c, True)[0]

    def _walk(self, rows: Tensor, context: Context, backwards: bool) -> tuple[Tensor, Tensor]:
        values, c = self._given(rows, context)
        given, log_det = values, torch.zeros_like(values[..., 0])
        count = len(self.layers)
        for k in range(count):
            place = count - 1 - k if backwards else k
            for i, layer in enumerate(self.layers):  # which TorchScript unrolls: it goes through no list backwards
                if i == place:
                    values, step = layer(values, c, backwards)
                    log_det = log_det + step
        if self.has_bounds and not backwards:  # nothing moves around a row that is outside
            outside = log_det == -math.inf
            values = values.masked_fill(outside.unsqueeze(-1), math.inf)
            log_det = log_det.masked_fill(outside, -math.inf)
        return _settled(given, context, values, log_det, math.inf if backwards else -math.inf)

    def _given(self, rows: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Return rows and standardized contexts with the same leading axes."""
        if rows.dtype != self.base.log_peak.dtype:
            raise TypeError(
                f"rows have dtype {rows.dtype}, expected the module's, {self.base.log_peak.dtype}, in a tensor"
            )
        if rows.shape[-1] != self.input_size:
            raise ValueError(f"rows have shape {list(rows.shape)}, expected (..., {self.input_size})")
        if context is None:
            if self.context_size > 0:
                raise ValueError(
                    f"context is missing, expected a tensor (..., {self.context_size}): the flow is a density "
                    "p(x | context)"
                )
            return rows, None
        if self.context_size == 0:
            raise ValueError("context is a tensor, expected None: the flow has no context")
        if context.shape[-1] != self.context_size:
            raise ValueError(f"context has shape {list(context.shape)}, expected (..., {self.context_size})")
        c = context
        if self.context_mean is not None:
            c = (c - self.context_mean) * torch.exp(-self.context_log_std)
        return rows + torch.zeros_like(c[..., :1]), c + torch.zeros_like(rows[..., :1])


def _settled(given: Tensor, context: Context, values: Tensor, log_det: Tensor, lost: float) -> tuple[Tensor, Tensor]:
    """Spread NaN over the results of rows that came with NaN or infinity; what overflows in others is infinite."""
    bad = ~torch.isfinite(given).all(-1)
    if context is not None:
        bad = bad | ~torch.isfinite(context).all(-1)
    values = values.masked_fill(values.isnan(), math.inf).masked_fill(bad.unsqueeze(-1), math.nan)
    return values, log_det.masked_fill(log_det.isnan(), lost).masked_fill(bad, math.nan)


# ------------------------------------------------------------------------------------------------------------- layers


def _layer(layer: Layer, weights: Weights, input_size: int) -> nn.Module:
    if isinstance(layer, Coupling):
        return CouplingLayer(layer, weights, input_size)
    if isinstance(layer, ElementSpline):
        return SplineLayer(layer, weights, input_size)
    if isinstance(layer, LULinear):
        return LinearLayer(layer, weights)
    if isinstance(layer, Permutation):
        return PermutationLayer(layer)
    if isinstance(layer, Bounds):
        return BoundsLayer(layer)
    return DiagonalLayer(layer, weights)


class DiagonalLayer(nn.Module):
    """``x exp(log_scale) + shift``, or, of standardize, ``(x - mean) exp(-log_std)``: the former read backwards."""

    def __init__(self, layer: Standardize | ActNorm, weights: Weights) -> None:
        super().__init__()
        if isinstance(layer, ActNorm):
            self.turned = layer.inverse
            self.log_scale, self.shift = _parameter(weights["log_scale"]), _parameter(weights["shift"])
        else:
            self.turned = True
            self.register_buffer("log_scale", torch.from_numpy(weights["log_std"]))
            self.register_buffer("shift", torch.from_numpy(weights["mean"]))

    def forward(self, x: Tensor, context: Context, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output [..., D] and the log-determinant, one for all rows."""
        log_det = self.log_scale.sum()
        if backwards != self.turned:
            return (x - self.shift) * torch.exp(-self.log_scale), -log_det
        return x * torch.exp(self.log_scale) + self.shift, log_det


class BoundsLayer(nn.Module):
    """Columns with bounds, to the whole line and back, in float64.

    A row outside becomes 0, with the log-determinant -inf.
    """

    def __init__(self, layer: Bounds) -> None:
        super().__init__()
        low, high = (torch.from_numpy(values) for values in ends(layer))
        has_low, has_high = low.isfinite(), high.isfinite()
        both = has_low & has_high
        width = torch.where(both, high - low, torch.ones_like(low))
        self.register_buffer("low", torch.where(has_low, low, torch.zeros_like(low)))
        self.register_buffer("high", torch.where(has_high, high, torch.zeros_like(high)))
        self.register_buffer("width", width)
        self.register_buffer("has_low", has_low)
        self.register_buffer("has_high", has_high)
        # The least and the largest number of the flow's dtype that lie inside.
        for dtype in (np.float32, np.float64):
            numbers = np.stack(inside(layer, np.dtype(dtype)))
            self.register_buffer(f"inside{8 * numbers.itemsize}", torch.from_numpy(numbers))

    def forward(self, rows: Tensor, context: Context, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output [..., D] and the log-determinant [...]."""
        values = rows.double()
        free = ~(self.has_low | self.has_high)
        if not backwards:
            return self._there(values, free, rows.dtype)
        changed, log_slope = self._back(values)
        changed = torch.where(free, values, changed).to(rows.dtype)
        least, most = self.inside64[0], self.inside64[1]
        if rows.dtype == torch.float32:
            least, most = self.inside32[0], self.inside32[1]
        changed = torch.where(free, changed, torch.maximum(torch.minimum(changed, most), least))
        return changed, torch.where(free, torch.zeros_like(log_slope), log_slope).sum(-1).to(rows.dtype)

    def _there(self, x: Tensor, free: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(x)
        u, v = torch.where(self.has_low, x - self.low, one), torch.where(self.has_high, self.high - x, one)
        outside = ((u <= 0) | (v <= 0)).any(-1, keepdim=True)
        log_u, log_v = torch.log(torch.where(outside, one, u)), torch.log(torch.where(outside, one, v))
        log_det = (torch.log(self.width) - log_u - log_v).sum(-1).masked_fill(outside.squeeze(-1), -math.inf)
        y = torch.where(free, x, log_u - log_v).masked_fill(outside, 0.0)
        return y.to(dtype), log_det.to(dtype)

    def _back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        both = self.has_low & self.has_high
        exponent = torch.where(both, -y.abs(), torch.where(self.has_high, -y, y))
        e = torch.exp(exponent)
        far = torch.where(both, 1 + e, torch.ones_like(e))
        distance = self.width * (e / far)
        from_low = self.has_low & (~both | (y < 0))
        log_slope = torch.log(self.width) + exponent - 2 * torch.log(far)
        return torch.where(from_low, self.low + distance, self.high - distance), log_slope


class PermutationLayer(nn.Module):
    """``y[j] = x[order[j]]``."""

    def __init__(self, layer: Permutation) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(layer.order))
        self.register_buffer("back", torch.tensor(layer.order).argsort())

    def forward(self, x: Tensor, context: Context, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output [..., D] and the log-determinant, 0."""
        return x.index_select(-1, self.back if backwards else self.order), torch.zeros_like(x[..., 0])


class LinearLayer(nn.Module):
    """``y = L U x + bias``."""

    def __init__(self, layer: LULinear, weights: Weights) -> None:
        super().__init__()
        self.turned = layer.inverse
        self.size: int = len(weights["bias"])
        for name in ("lower", "upper", "log_diagonal", "bias"):
            self.register_parameter(name, _parameter(weights[name]) if weights[name].size else None)
        self.register_buffer("sign", torch.from_numpy(weights["sign"]))
        below, above = np.tril_indices(self.size, -1), np.triu_indices(self.size, 1)
        for name, (i, j) in (("lower_places", below), ("upper_places", above)):
            self.register_buffer(name, torch.from_numpy(i * self.size + j) if i.size else None)

    def forward(self, x: Tensor, context: Context, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output [..., D] and the log-determinant, one for all rows."""
        lower = torch.diag(torch.ones_like(self.bias))
        upper = torch.diag(self.sign * torch.exp(self.log_diagonal))
        if self.lower is not None:
            zeros = torch.zeros_like(self.bias).repeat(self.size)
            lower = lower + zeros.scatter(0, self.lower_places, self.lower).reshape(lower.shape)
            upper = upper + zeros.scatter(0, self.upper_places, self.upper).reshape(upper.shape)
        log_det = self.log_diagonal.sum()
        if backwards == self.turned:
            return (x @ upper.t()) @ lower.t() + self.bias, log_det
        rows = (x - self.bias).reshape(-1, self.size)
        rows = torch.linalg.solve_triangular(lower.t(), rows, upper=True, left=False, unitriangular=True)
        rows = torch.linalg.solve_triangular(upper.t(), rows, upper=False, left=False)
        return rows.reshape(x.shape), -log_det


class SplineLayer(nn.Module):
    """A spline of each feature by itself."""

    def __init__(self, layer: ElementSpline, weights: Weights, input_size: int) -> None:
        super().__init__()
        self.turned = layer.inverse
        _register_split(self, layer.features, input_size)
        for name in ("widths", "heights", "derivatives"):  # a spline of one bin may have no derivatives
            self.register_parameter(name, _parameter(weights[name].T.copy()) if name in weights else None)
        self.spline = RationalQuadratic(layer.spline)

    def forward(self, x: Tensor, context: Context, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output [..., D] and the log-determinant [...]."""
        derivatives = self.widths[..., :0]
        if self.derivatives is not None:
            derivatives = self.derivatives
        b = x.index_select(-1, self.transformed)
        y, log_slope = self.spline(b, self.widths, self.heights, derivatives, backwards != self.turned)
        if self.conditioning is not None:
            y = torch.cat([x.index_select(-1, self.conditioning), y], -1).index_select(-1, self.places)
        return y, log_slope.sum(-1)


class CouplingLayer(nn.Module):
    """``y_b = transform(x_b; network([x_a, c]))``."""

    def __init__(self, layer: Coupling, weights: Weights, input_size: int) -> None:
        super().__init__()
        self.turned = layer.inverse
        _register_split(self, layer.transformed, input_size)
        if layer.network is not None:
            self.network, self.translation_network = _network(layer.network, weights, "coupling_dense"), None
        else:
            assert layer.scale_network is not None
            assert layer.translation_network is not None
            self.network = _network(layer.scale_network, weights, "scale_dense")
            self.translation_network = _network(layer.translation_network, weights, "translation_dense")
        if isinstance(layer.transform, Spline):
            self.transform: nn.Module = SplineTransform(layer.transform, weights)
        else:
            self.transform = AffineTransform(layer.transform, weights)

    def forward(self, x: Tensor, context: Context, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output [..., D] and the log-determinant [...]."""
        given = x[..., :0] if self.conditioning is None else x.index_select(-1, self.conditioning)
        if context is not None:
            given = torch.cat([given, context], -1)
        h = self.network(given, context)
        other = h
        if self.translation_network is not None:
            other = self.translation_network(given, context)
        y, log_slope = self.transform(x.index_select(-1, self.transformed), h, other, backwards != self.turned)
        if self.conditioning is not None:
            y = torch.cat([x.index_select(-1, self.conditioning), y], -1).index_select(-1, self.places)
        return y, log_slope.sum(-1)


def _register_split(module: nn.Module, transformed: str | tuple[int, ...], input_size: int) -> None:
    names = ("conditioning", "transformed", "places")
    for name, values in zip(names, split(transformed, input_size), strict=True):
        module.register_buffer(name, torch.from_numpy(values) if values.size else None)


# ----------------------------------------------------------------------------------------------------------- networks


def _activation(name: str) -> nn.Module:
    kinds: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,
        "elu": nn.ELU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
    }
    return nn.Softplus(threshold=_LINEAR_SOFTPLUS) if name == "softplus" else kinds[name]()


def _network(network: MLP | ResidualNet, weights: Weights, name: str) -> nn.Module:
    return Perceptron(network, weights, name) if isinstance(network, MLP) else Residual(network, weights)


class Perceptron(nn.Module):
    """The hidden layers of an `nvpflow.layers.MLP`."""

    def __init__(self, network: MLP, weights: Weights, name: str) -> None:
        super().__init__()
        self.dense = nn.ModuleList(_linear(weights, f"{name}_{j}") for j in range(len(network.hidden_sizes)))
        self.activation = _activation(network.activation)
        self.layer_norm: bool = network.layer_norm

    def forward(self, given: Tensor, context: Context) -> Tensor:
        """Return the last hidden layer [..., H]."""
        h = given
        for dense in self.dense:
            h = self.activation(dense(h))
            if self.layer_norm:
                h = h - h.mean(-1, keepdim=True)
                h = h * torch.rsqrt((h * h).sum(-1, keepdim=True) / (h.shape[-1] - 1) + 1e-5)
        return h


class Residual(nn.Module):
    """All of an `nvpflow.layers.ResidualNet` but for its heads."""

    def __init__(self, network: ResidualNet, weights: Weights) -> None:
        super().__init__()
        self.initial = _linear(weights, "initial")
        self.blocks = nn.ModuleList(Block(network, weights, f"block_{j}") for j in range(network.num_blocks))

    def forward(self, given: Tensor, context: Context) -> Tensor:
        """Return what the last block gives [..., H]."""
        h = self.initial(given)
        for block in self.blocks:
            h = h + block(h, context)
        return h


class Block(nn.Module):
    """What one block adds."""

    def __init__(self, network: ResidualNet, weights: Weights, name: str) -> None:
        super().__init__()
        affine = network.block_affines
        self.scale = _parameter(weights[f"{name}_affine.scale"]) if affine else None
        self.shift = _parameter(weights[f"{name}_affine.shift"]) if affine else None
        self.dense_0, self.dense_1 = _linear(weights, f"{name}_dense_0"), _linear(weights, f"{name}_dense_1")
        self.gate = _linear(weights, f"{name}_context") if network.context_gates else None
        self.activation = _activation(network.activation)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """Return [..., H]."""
        v = h
        if self.scale is not None:
            assert self.shift is not None
            v = v * self.scale + self.shift
        v = self.dense_1(self.activation(self.dense_0(self.activation(v))))
        if self.gate is not None:
            assert context is not None
            v = v * torch.sigmoid(self.gate(context))
        return v


# --------------------------------------------------------------------------------------------------------- transforms


class AffineTransform(nn.Module):
    """``x exp(g(u)) + t``; without a scale ``x + t``."""

    def __init__(self, transform: Affine | Additive, weights: Weights) -> None:
        super().__init__()
        self.translation = _linear(weights, "translation")
        affine = isinstance(transform, Affine)
        self.scale = _linear(weights, "scale") if affine else None
        self.function: str = transform.function if isinstance(transform, Affine) else ""
        self.negated: bool = bool(getattr(transform, "negated", False))
        for name in ("factor", "divisor", "low", "high", "offset"):
            value = getattr(transform, name, None)
            setattr(self, name, 0.0 if value is None else float(value))

    def forward(self, x: Tensor, h: Tensor, other: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output and its log-derivatives, both as x [..., n]; h is for the scale, other for t."""
        t = self.translation(other)
        if self.scale is None:
            return x - t if backwards else x + t, torch.zeros_like(t)
        s = self._log_scale(self.scale(h))
        return ((x - t) * torch.exp(-s), -s) if backwards else (x * torch.exp(s) + t, s)

    def _log_scale(self, u: Tensor) -> Tensor:
        if self.function == "identity":
            return u
        if self.function == "tanh":
            return self.factor * torch.tanh(u / self.divisor)
        if self.function == "atan":
            return self.factor * torch.atan(u / self.divisor)
        if self.function == "softsign":
            v = u / self.divisor
            return self.factor * v / (1.0 + v.abs())
        v = u + self.offset
        if self.function == "softplus":
            s = torch.log((_softplus(v) + self.low).clamp(max=self.high))
        elif self.low == 0.0:  # no logarithm of a rounded sigmoid, which may be 0
            s = math.log(self.high) - _softplus(-v)
        else:
            s = torch.log(self.low + (self.high - self.low) * torch.sigmoid(v))
        return -s if self.negated else s


class SplineTransform(nn.Module):
    """A spline whose raw numbers are a network's."""

    def __init__(self, spline: Spline, weights: Weights) -> None:
        super().__init__()
        self.widths, self.heights = _linear(weights, "widths"), _linear(weights, "heights")
        self.derivatives = _linear(weights, "derivatives") if "derivatives.bias" in weights else None
        self.spline = RationalQuadratic(spline)

    def forward(self, x: Tensor, h: Tensor, other: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the output and its log-derivatives, both as x [..., n]."""
        n = x.shape[-1]
        widths, heights = _by_feature(self.widths(h), n), _by_feature(self.heights(h), n)
        derivatives = widths[..., :0]
        if self.derivatives is not None:
            derivatives = _by_feature(self.derivatives(h), n)
        y, log_slope = self.spline(x, widths, heights, derivatives, backwards)
        return y, log_slope


def _by_feature(raw: Tensor, n: int) -> Tensor:
    """[..., p n] -> [..., n, p]."""
    return raw.unflatten(-1, [raw.shape[-1] // n, n]).transpose(-1, -2)


class RationalQuadratic(nn.Module):
    """Monotonic rational-quadratic splines, each feature with raw numbers of its own [..., n, K]."""

    def __init__(self, spline: Spline) -> None:
        super().__init__()
        self.num_bins: int = spline.num_bins
        self.lower: float = spline.interval[0]
        self.upper: float = spline.interval[1]
        self.min_bin_width: float = spline.min_bin_width
        self.min_bin_height: float = spline.min_bin_height
        self.min_derivative: float = spline.min_derivative
        self.is_exp: bool = spline.derivative == "exp"
        self.offset: float = spline.derivative_offset or 0.0
        self.gain: float = spline.derivative_gain or 0.0
        self.bound: float = spline.derivative_bound or math.inf
        self.size_bound: float = spline.size_bound or math.inf
        self.is_free: bool = spline.boundary == "free"
        self.has_slopes: bool = spline.tails == "slope"

    def forward(
        self, x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the output and its log-derivatives, both as x [..., n]."""
        w, h = self._sizes(widths, self.min_bin_width), self._sizes(heights, self.min_bin_height)
        d = self._slopes(derivatives)
        size, other_size = (h, w) if backwards else (w, h)  # of the bins in the input and in the output
        start, other_start = _starts(size), _starts(other_size)
        # Rows outside are moved to the nearest end, and their results dropped: no value and no gradient is NaN.
        t = ((x - self.lower) / (self.upper - self.lower)).clamp(0.0, 1.0).unsqueeze(-1)
        k = (start[..., 1:] <= t).sum(-1, keepdim=True)
        share = ((t - _at(start, k)) / _at(size, k)).clamp(0.0, 1.0)
        s, d0, d1 = _at(h, k) / _at(w, k), _at(d, k), _at(d, k + 1)
        share, log_slope = _root(share, s, d0, d1) if backwards else _quotient(share, 1.0 - share, s, d0, d1)
        y = (_at(other_start, k) + _at(other_size, k) * share).squeeze(-1)
        y, log_slope = self.lower + (self.upper - self.lower) * y, log_slope.squeeze(-1)
        return self._with_tails(x, y, log_slope, d, backwards)

    def _sizes(self, raw: Tensor, least: float) -> Tensor:
        """Return widths or heights of the bins, in parts of the interval."""
        u = raw
        if self.size_bound < math.inf:
            u = u / (1.0 + (u / self.size_bound).abs())
        u = u - u.amax(-1, keepdim=True).detach()
        e = torch.exp(u.clamp(min=-40.0 if u.dtype == torch.float32 else -340.0))
        return least + (1.0 - self.num_bins * least) * e / e.sum(-1, keepdim=True)

    def _slopes(self, raw: Tensor) -> Tensor:
        """Return derivatives at all K + 1 knots."""
        if self.is_exp:
            d = torch.exp(raw / (1.0 + (raw / self.bound).abs()))
        else:
            d = self.gain * _softplus(raw + self.offset)
        largest = 1e18 if raw.dtype == torch.float32 else 1e150  # slopes are squared
        d = (d + self.min_derivative).clamp(1.0 / largest, largest)
        if self.is_free:
            return d
        ends = torch.ones_like(d.sum(-1, keepdim=True))
        return torch.cat([ends, d, ends], -1)

    def _with_tails(self, x: Tensor, y: Tensor, log_slope: Tensor, d: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        below, above = x < self.lower, x > self.upper
        if not self.has_slopes:
            outside = below | above
            return torch.where(outside, x, y), log_slope.masked_fill(outside, 0.0)
        first, last = d[..., 0], d[..., self.num_bins]
        if backwards:
            first, last = 1.0 / first, 1.0 / last
        y = torch.where(below, self.lower + (x - self.lower) * first, y)
        y = torch.where(above, self.upper + (x - self.upper) * last, y)
        log_slope = torch.where(below, torch.log(first), torch.where(above, torch.log(last), log_slope))
        return y, log_slope


def _starts(sizes: Tensor) -> Tensor:
    """Where each bin begins, in parts of the interval."""
    return torch.cat([torch.zeros_like(sizes[..., :1]), torch.cumsum(sizes, -1)[..., :-1]], -1)


def _at(values: Tensor, k: Tensor) -> Tensor:
    """Of [..., n, m], or the same for all rows, number k [..., n, 1] of each feature."""
    return torch.gather(values.expand(list(k.shape[:-1]) + [values.shape[-1]]), -1, k)  # noqa: RUF005  TorchScript


def _quotient(xi: Tensor, rest: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far up its bin a spline has come at xi, rest being 1 - xi, and the logarithm of its slope."""
    up = s * xi * xi + d0 * xi * rest  # no term of these sums is negative: nothing cancels
    total = up + s * rest * rest + d1 * xi * rest
    m = d1 * xi * xi + 2.0 * s * xi * rest + d0 * rest * rest
    return up / total, torch.log(m) + 2.0 * torch.log(s / total)


def _root(eta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """Return where in its bin a spline is that has come eta up, and minus the logarithm of its slope there.

    Of the two forms of the root each is taken where it is a sum, and the discriminant is one of squares.
    """
    p = d0 * (1.0 - eta) - d1 * eta
    q, r = 2.0 * s * eta, 2.0 * s * (1.0 - eta)
    m = torch.sqrt(p * p + q * r) + p.abs()
    from_left = p >= 0
    xi = torch.where(from_left, q, m) / torch.where(from_left, q + m, m + r)
    rest = torch.where(from_left, m, r) / torch.where(from_left, q + m, m + r)
    _, log_slope = _quotient(xi, rest, s, d0, d1)
    return xi, -log_slope


def _softplus(u: Tensor) -> Tensor:
    return torch.nn.functional.softplus(u, threshold=40.0)  # as _LINEAR_SOFTPLUS, which TorchScript does not read


# ------------------------------------------------------------------------------------------------------------ tensors


def _parameter(values: NDArray[Any]) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values))


def _linear(weights: Weights, name: str) -> nn.Linear:
    kernel, bias = weights[f"{name}.kernel"], weights[f"{name}.bias"]
    linear = nn.Linear(*kernel.shape, device="meta")  # draws nothing from the caller's random numbers
    linear.weight, linear.bias = _parameter(np.ascontiguousarray(kernel.T)), _parameter(bias)
    return linear
