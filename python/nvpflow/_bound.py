"""A bound on the rounding error of a round trip, from the weights and from what the rows reach on their way.

The derivation is in python/docs/certify.md of the sources; its letters are used here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks
from nvpflow._bases import NORMAL
from nvpflow._model import Model
from nvpflow.layers import MLP, Affine, Bounds, Coupling, Layer, Standardize

Array = NDArray[np.float64]

# Largest |act'|. Of gelu x Phi(x) it is Phi(sqrt 2) + sqrt 2 phi(sqrt 2), of silu that at x = 2.3994; both rounded up.
_LIPSCHITZ = {"relu": 1.0, "leaky_relu": 1.0, "elu": 1.0, "tanh": 1.0, "softplus": 1.0}
_LIPSCHITZ |= {"gelu": 1.12891, "silu": 1.09985, "sigmoid": 0.25}
# Roundings of an affine step there and back: exp is within 2 ulp, products and sums within half a one, FMA or not.
_STEP_ROUNDINGS = 8.0
# An activation is within 2 ulp, s = B tanh(u / B) within 3 with its quotient and product.
_ACTIVATION_ROUNDINGS, _SCALE_ROUNDINGS = 2.0, 3.0
# Beyond so many rows and columns a singular value takes too long; the bound by row and column sums is looser.
_LARGEST_SVD = 1536


def _sums_norm(kernel: Array) -> float:
    """Return sqrt(|W|_1 |W|_inf), which is at least the spectral norm of both W and |W|."""
    size = np.abs(kernel)
    return math.sqrt(float(size.sum(axis=0).max()) * float(size.sum(axis=1).max()))


def spectral_norm(kernel: Array) -> float:
    """Return the largest singular value of a kernel, or a bound of it where the kernel is large."""
    if min(kernel.shape) > _LARGEST_SVD:
        return min(_sums_norm(kernel), float(np.linalg.norm(kernel)))
    return float(np.linalg.norm(kernel, 2))


class _Dense:
    def __init__(self, parameters: dict[str, Array], name: str) -> None:
        kernel, bias = parameters[f"{name}.kernel"], parameters[f"{name}.bias"]
        self.norm, self.sums_norm, self.bias = spectral_norm(kernel), _sums_norm(kernel), float(np.linalg.norm(bias))
        self.inputs, self.outputs = kernel.shape

    def rounding(self, size: float, error: float, eps: float) -> float:
        """Return the error of the result for an input of norm `size` and this `error`: n + 1 roundings of a sum."""
        of_sums: float = (self.inputs + 1) * eps / 2 * (self.sums_norm * size + self.bias)
        return self.norm * error + of_sums


class _Coupling:
    """One coupling layer of the float64 flow, and the largest values that rows were seen to reach in it."""

    def __init__(self, flow: Model, index: int, name: str, layer: Coupling, parameters: dict[str, Array]) -> None:
        assert isinstance(layer.network, MLP)
        assert isinstance(layer.transform, Affine)
        self._flow, self._index = flow, index
        half = flow.spec.input_size // 2
        self.a, self.b = (1, 0) if layer.transformed == "first_half" else (0, 1)
        self._columns = (slice(0, half), slice(half, None))
        self._activation, self._limit = layer.network.activation, layer.transform.bound
        hidden = range(len(layer.network.hidden_sizes))
        self._hidden = [_Dense(parameters, f"{name}_coupling_dense_{j}") for j in hidden]
        self._scale = _Dense(parameters, f"{name}_scale")
        self._shift = _Dense(parameters, f"{name}_translation")
        slope = math.prod(dense.norm * _LIPSCHITZ[self._activation] for dense in self._hidden)
        self._scale_slope, self._shift_slope = slope * self._scale.norm, slope * self._shift.norm
        # Over all rows: |a|, |x_b| and |t exp(-s)| as Euclidean norms, and the largest |x_b| and -s of an element.
        self._norm_a = self._norm_b = self._norm_shift = self._largest_b = 0.0
        self._shrink = -math.inf

    def walk(self, x: Array) -> tuple[Array, Array]:
        s, t = self._flow._conditioner(self._index, x)
        a, b = self._columns[self.a], self._columns[self.b]
        self._norm_a = max(self._norm_a, _largest_norm(x[:, a]))
        self._norm_b = max(self._norm_b, _largest_norm(x[:, b]))
        self._norm_shift = max(self._norm_shift, _largest_norm(t * np.exp(-s)))
        self._largest_b = max(self._largest_b, float(np.abs(x[:, b]).max()))
        self._shrink = max(self._shrink, float((-s).max()))
        y = x.copy()
        y[:, b] = x[:, b] * np.exp(s) + t
        return y, s.sum(axis=1)

    def pull_back(self, errors: list[float], eps: float) -> list[float]:
        """Return the errors of the two parts before the layer from those after it, on the way back."""
        error = errors[self.a]
        rounding_s, rounding_t = self._conditioner_roundings(eps) if error > 0 else (0.0, 0.0)
        width = 2 * self._limit * math.sqrt(self._scale.outputs)
        change_s = min(width, self._scale_slope * error + 2 * rounding_s)
        change_t = self._shift_slope * error + 2 * rounding_t
        of_one = min(2 * self._limit, change_s)
        stretch = np.exp(min(self._limit, self._shrink + of_one))
        secant = np.expm1(of_one) / of_one if of_one > 0 else 1.0
        local = eps * (_STEP_ROUNDINGS * self._norm_b + self._norm_shift)
        before = [0.0, 0.0]
        before[self.a] = error
        before[self.b] = float(stretch * (errors[self.b] + change_t) + self._largest_b * secant * change_s + local)
        return before

    def _conditioner_roundings(self, eps: float) -> tuple[float, float]:
        """Return the rounding errors of the computed s and t, as Euclidean norms."""
        size, error = self._norm_a, 0.0
        for dense in self._hidden:
            error = dense.rounding(size, error, eps) * _LIPSCHITZ[self._activation]
            size = self._activated(dense.norm * size + dense.bias, dense.outputs)
            error += _ACTIVATION_ROUNDINGS * eps * size
        of_scale = self._scale.rounding(size, error, eps)
        of_scale += _SCALE_ROUNDINGS * eps * self._limit * math.sqrt(self._scale.outputs)
        return of_scale, self._shift.rounding(size, error, eps)

    def _activated(self, size: float, outputs: int) -> float:
        """Bound the norm of the activations of a vector whose norm is at most `size`."""
        if self._activation == "sigmoid":
            return math.sqrt(outputs)
        if self._activation == "softplus":  # softplus(u) <= |u| + log 2
            return size + math.log(2) * math.sqrt(outputs)
        return min(size, math.sqrt(outputs)) if self._activation == "tanh" else size


class _Standardize:
    """y = (x - mean) / std. As the first layer it is where the errors' unit changes, and its factor is left out."""

    def __init__(self, flow: Model, name: str, parameters: dict[str, Array], *, first: bool) -> None:
        self._mean, self._std = parameters[f"{name}.mean"], np.exp(parameters[f"{name}.log_std"])
        half = flow.spec.input_size // 2
        self._parts = (slice(0, half), slice(half, None))
        self._first = first
        self._local = [0.0, 0.0]  # roundings there and back, of each part

    def walk(self, x: Array) -> tuple[Array, Array]:
        y: Array = (x - self._mean) / self._std
        roundings = 5 * np.abs(x - self._mean) + np.abs(x)
        if self._first:  # relative to std + |x|, as the errors are
            roundings = roundings / (self._std + np.abs(x))
        for i, part in enumerate(self._parts):
            self._local[i] = max(self._local[i], _largest_norm(roundings[:, part]))
        return y, np.full(len(x), -float(np.log(self._std).sum()))

    def pull_back(self, errors: list[float], eps: float) -> list[float]:
        factors = [1.0 if self._first else float(self._std[part].max()) for part in self._parts]
        return [f * e + eps * local for f, e, local in zip(factors, errors, self._local, strict=True)]


def _largest_norm(rows: Array) -> float:
    return float(np.linalg.norm(rows, axis=1).max())


class Unbounded:
    """Stands for a walk through layers that the derivation does not cover: log p is that of the flow itself."""

    def __init__(self, flow: Model, reason: str) -> None:
        self._flow, self._reason = flow, reason

    def log_prob(self, x: Array, context: NDArray[Any] | None = None) -> Array:
        """Return log p of rows [n, D] under their contexts [n, C], in nats."""
        found: Array = self._flow.log_probability(x, context=context)
        return found

    def bound(self, eps: float) -> tuple[None, str]:
        """Return no bound, and why there is none."""
        return None, self._reason


class Walk:
    """Takes rows through the layers of a float64 flow on the CPU one by one, and remembers what they reach.

    What it computes beside the bound is an independent log p: the conditioners are the library's, the rest is NumPy.
    """

    def __init__(self, flow: Model) -> None:
        parameters = {name: np.array(value) for name, value in flow.parameters().items()}
        self._layers: list[_Coupling | _Standardize] = []
        couplings = 0
        for i, layer in enumerate(flow.spec.layers):
            if isinstance(layer, Coupling):
                self._layers.append(_Coupling(flow, i, f"flow_{couplings}", layer, parameters))
                couplings += 1
            else:
                self._layers.append(_Standardize(flow, f"standardize_{i}", parameters, first=i == 0))
        self._walked = False

    def log_prob(self, x: Array, context: NDArray[Any] | None = None) -> Array:
        """Return log p of rows [n, D], n > 0, in nats; the derivation knows no context."""
        assert context is None
        self._walked = True
        log_det = np.zeros(len(x))
        for layer in self._layers:
            x, step = layer.walk(x)
            log_det += step
        log_normal: Array = -0.5 * (x.shape[1] * math.log(2 * math.pi) + np.square(x).sum(axis=1))
        return log_normal + log_det

    def bound(self, eps: float) -> tuple[float | None, str | None]:
        """Bound the relative error of a round trip in arithmetic of `eps`; or tell why there is no bound."""
        if not self._walked:
            return None, "there is no finite row"
        errors = [0.0, 0.0]
        with np.errstate(over="ignore", invalid="ignore"):
            for layer in reversed(self._layers):
                errors = layer.pull_back(errors, eps)
        return (max(errors), None) if math.isfinite(sum(errors)) else (None, "it is beyond the range of float64")


def walk(flow: Model) -> Walk | Unbounded:
    """Return what takes rows through the layers of a float64 flow on the CPU."""
    for layer in flow.spec.layers:
        if isinstance(layer, Coupling) and isinstance(layer.transform, Affine) and math.isinf(layer.transform.bound):
            return Unbounded(
                flow, f"the log-scale of {layer.transform!r} has no bound, and rows far from the data can overflow"
            )
    if flow.spec.context_size:
        return Unbounded(flow, "it is not derived for flows with a context")
    if flow.spec.base != NORMAL:
        return Unbounded(flow, f"it is not derived for base={flow.spec.base!r}")
    for layer in flow.spec.layers:
        if not _is_covered(layer):
            return Unbounded(flow, f"it is not derived for {_not_covered(layer)}")
    return Walk(flow)


def _not_covered(layer: Layer) -> str:
    """Return what the derivation does not cover in a layer."""
    if isinstance(layer, Coupling) and isinstance(layer.transform, Affine):
        return _checks.shortened(repr(layer))
    if isinstance(layer, Bounds):
        return "columns with bounds or discrete ones" if layer.discrete else "columns with bounds"
    return f"{layer._in_words()}s"


def _is_covered(layer: Layer) -> bool:
    """Tell whether it is a coupling of halves with one MLP and B tanh(u / B), or a standardize layer."""
    if not isinstance(layer, Coupling):
        return isinstance(layer, Standardize)
    halves = layer.transformed in ("first_half", "second_half") and not layer.inverse
    affine, network = layer.transform, layer.network
    bounded = isinstance(affine, Affine) and affine.function == "tanh" and affine.factor == affine.divisor
    return halves and bounded and isinstance(network, MLP) and not network.layer_norm
