"""An independent float64 RealNVP in plain NumPy: values, gradients, AdamW and Philox, from the formulas alone.

Nothing here imports nvpflow. The reverse mode is written by hand and is itself checked against central finite
differences (test_gradients.py), so that it can stand in for them where finite differences would take too long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LOG_2_PI = math.log(2.0 * math.pi)


# ---------------------------------------------------------------------------------------------- activations


def _erf(u: np.ndarray) -> np.ndarray:
    flat = np.fromiter(map(math.erf, u.ravel().tolist()), dtype=np.float64, count=u.size)
    return flat.reshape(u.shape)


def _sigmoid(u: np.ndarray) -> np.ndarray:
    # 1/(1+e^-u) for u >= 0 and e^u/(1+e^u) below: neither exponential can overflow.
    e = np.exp(-np.abs(u))
    return np.where(u >= 0, 1.0, e) / (1.0 + e)


def _normal_cdf(u: np.ndarray) -> np.ndarray:
    # erfc keeps the relative accuracy of the lower tail, which 1 + erf loses.
    flat = np.fromiter((math.erfc(-v / math.sqrt(2.0)) for v in u.ravel().tolist()), dtype=np.float64, count=u.size)
    return 0.5 * flat.reshape(u.shape)


def _normal_pdf(u: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi)


def _elu(u: np.ndarray) -> np.ndarray:
    return np.where(u > 0, u, np.expm1(np.minimum(u, 0.0)))


def _softplus(u: np.ndarray) -> np.ndarray:
    return np.maximum(u, 0.0) + np.log1p(np.exp(-np.abs(u)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda u: np.maximum(u, 0.0),
    "leaky_relu": lambda u: np.where(u > 0, u, 0.01 * u),
    "elu": _elu,
    "gelu": lambda u: u * _normal_cdf(u),
    "silu": lambda u: u * _sigmoid(u),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
}

DERIVATIVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda u: np.where(u > 0, 1.0, 0.0),
    "leaky_relu": lambda u: np.where(u > 0, 1.0, 0.01),
    "elu": lambda u: np.where(u > 0, 1.0, np.exp(np.minimum(u, 0.0))),
    "gelu": lambda u: _normal_cdf(u) + u * _normal_pdf(u),
    "silu": lambda u: _sigmoid(u) * (1.0 + u * _sigmoid(-u)),
    "tanh": lambda u: 1.0 - np.tanh(u) ** 2,
    "sigmoid": lambda u: _sigmoid(u) * _sigmoid(-u),
    "softplus": _sigmoid,
}

# Derivative jumps at zero: a float32 pre-activation that rounds to the other side changes the gradient by O(1).
KINKED = ("relu", "leaky_relu")


# ---------------------------------------------------------------------------------------------- the flow


@dataclass(frozen=True)
class Coupling:
    """y_b = x_b exp(s) + t, y_a = x_a; a is the first half unless `swapped`."""

    swapped: bool
    hidden_sizes: tuple[int, ...]
    activation: str
    scale_bound: float = 1.0


@dataclass(frozen=True)
class Standardize:
    """y = (x - mean) exp(-log_std)."""


Layer = Coupling | Standardize


def real_nvp(
    input_size: int,
    num_flows: int,
    hidden_sizes: Sequence[int],
    activation: str,
    scale_bound: float = 1.0,
    standardize: bool = False,
) -> OracleFlow:
    """Couplings that alternate halves, after a standardize layer where asked for; parameters all zero."""
    layers: list[Layer] = [Standardize()] if standardize else []
    layers += [Coupling(k % 2 == 1, tuple(hidden_sizes), activation, scale_bound) for k in range(num_flows)]
    return OracleFlow(input_size, layers)


def settled(given: np.ndarray, values: np.ndarray, log_det: np.ndarray, lost: float) -> tuple[np.ndarray, np.ndarray]:
    """What a transform says of numbers that have overflowed: NaN is for rows that came in with NaN or inf.

    In a finite row, a NaN comes from inf - inf or 0 * inf on the way; it becomes inf, in the log-determinant `lost`.
    """
    finite = np.isfinite(given).all(axis=1)
    values = np.where(np.isnan(values), np.inf, values)
    log_det = np.where(np.isnan(log_det), lost, log_det)
    return np.where(finite[:, None], values, np.nan), np.where(finite, log_det, np.nan)


class OracleFlow:
    """`parameters` maps the names of the file format to float64 arrays and may be assigned to."""

    def __init__(self, input_size: int, layers: Sequence[Layer], parameters: Mapping[str, np.ndarray] | None = None):
        self.input_size = input_size
        self.layers = tuple(layers)
        self.parameters = {name: np.zeros(shape) for name, shape in self.shapes().items()}
        if parameters is not None:
            self.set_parameters(parameters)

    def set_parameters(self, parameters: Mapping[str, np.ndarray]) -> None:
        shapes = self.shapes()
        assert list(parameters) == list(shapes), f"names are {list(parameters)}, expected {list(shapes)}"
        for name, value in parameters.items():
            assert value.shape == shapes[name], f"{name} has shape {value.shape}, expected {shapes[name]}"
            self.parameters[name] = np.array(value, dtype=np.float64)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape, in the order of the flat buffer."""
        shapes: dict[str, tuple[int, ...]] = {}
        coupling_index = 0
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Standardize):
                shapes[f"standardize_{i}.mean"] = (self.input_size,)
                shapes[f"standardize_{i}.log_std"] = (self.input_size,)
                continue
            a, b = self._halves(layer)
            width = a.stop - a.start
            for j, hidden in enumerate(layer.hidden_sizes):
                shapes[f"flow_{coupling_index}_coupling_dense_{j}.kernel"] = (width, hidden)
                shapes[f"flow_{coupling_index}_coupling_dense_{j}.bias"] = (hidden,)
                width = hidden
            for head in ("scale", "translation"):
                shapes[f"flow_{coupling_index}_{head}.kernel"] = (width, b.stop - b.start)
                shapes[f"flow_{coupling_index}_{head}.bias"] = (b.stop - b.start,)
            coupling_index += 1
        return shapes

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """z [B, D] and log|det dz/dx| [B]."""
        y, log_det = np.array(x, dtype=np.float64), np.zeros(len(x))
        with np.errstate(over="ignore", invalid="ignore"):
            for layer, name in self._named_layers():
                y, step = self._apply(layer, name, y, "forward")
                log_det = log_det + step
        return settled(x, y, log_det, -np.inf)

    def inverse(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [B, D] and log|det dx/dz| [B]."""
        y, log_det = np.array(z, dtype=np.float64), np.zeros(len(z))
        with np.errstate(over="ignore", invalid="ignore"):
            for layer, name in reversed(self._named_layers()):
                y, step = self._apply(layer, name, y, "inverse")
                log_det = log_det + step
        return settled(z, y, log_det, np.inf)

    def log_normal(self, z: np.ndarray) -> np.ndarray:
        return -0.5 * (self.input_size * LOG_2_PI + np.sum(np.square(z, dtype=np.float64), axis=1))

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        z, log_det = self.forward(x)
        with np.errstate(over="ignore"):
            return self.log_normal(z) + log_det

    def nll(self, x: np.ndarray) -> float:
        return -float(np.mean(self.log_prob(x)))

    def conditioner(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-scale s and shift t of layer `layer` on its own input."""
        kind, name = self._named_layers()[layer]
        assert isinstance(kind, Coupling)
        s, t, _ = self._scale_and_shift(kind, name, np.asarray(x, dtype=np.float64)[:, self._halves(kind)[0]])
        return s, t

    def smallest_pre_activation(self, x: np.ndarray, direction: str = "forward") -> np.ndarray:
        """Per row, the distance of the nearest hidden pre-activation to zero [B]; inf without hidden layers."""
        y = np.array(x, dtype=np.float64)
        smallest = np.full(len(y), np.inf)
        layers = self._named_layers()
        for layer, name in layers if direction == "forward" else reversed(layers):
            if isinstance(layer, Coupling):
                _, _, cache = self._scale_and_shift(layer, name, y[:, self._halves(layer)[0]])
                for pre_activation, _ in cache:
                    smallest = np.minimum(smallest, np.min(np.abs(pre_activation), axis=1, initial=np.inf))
            y, _ = self._apply(layer, name, y, direction)
        return smallest

    # -- reverse mode

    def vjp(
        self,
        x: np.ndarray,
        grad_out: np.ndarray | None,
        grad_log_det: np.ndarray | None,
        direction: str = "forward",
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Gradients of sum(grad_out * out) + sum(grad_log_det * log_det): with respect to x, and to each parameter."""
        y = np.array(x, dtype=np.float64)
        layers = self._named_layers()
        if direction == "inverse":
            layers = layers[::-1]
        inputs = []
        for layer, name in layers:
            inputs.append(y)
            y, _ = self._apply(layer, name, y, direction)
        grad = np.zeros_like(y) if grad_out is None else np.array(grad_out, dtype=np.float64)
        grad_ld = np.zeros(len(y)) if grad_log_det is None else np.asarray(grad_log_det, dtype=np.float64)
        gradients = {name: np.zeros(shape) for name, shape in self.shapes().items()}
        for (layer, name), at in zip(reversed(layers), reversed(inputs), strict=True):
            grad = self._pull_back(layer, name, at, grad, grad_ld, direction, gradients)
        return grad, gradients

    def nll_gradient(self, x: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        z, log_det = self.forward(x)
        rows = len(z)
        _, gradients = self.vjp(x, z / rows, np.full(rows, -1.0 / rows))
        return -float(np.mean(self.log_normal(z) + log_det)), gradients

    # -- one layer

    def _named_layers(self) -> list[tuple[Layer, str]]:
        named: list[tuple[Layer, str]] = []
        couplings = 0
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Coupling):
                named.append((layer, f"flow_{couplings}"))
                couplings += 1
            else:
                named.append((layer, f"standardize_{i}"))
        return named

    def _halves(self, layer: Coupling) -> tuple[slice, slice]:
        half = self.input_size // 2
        first, second = slice(0, half), slice(half, self.input_size)
        return (second, first) if layer.swapped else (first, second)

    def _scale_and_shift(self, layer: Coupling, name: str, a: np.ndarray):
        """s, t and, per hidden layer, (pre-activation, input)."""
        p = self.parameters
        cache = []
        g = a
        for j in range(len(layer.hidden_sizes)):
            u = g @ p[f"{name}_coupling_dense_{j}.kernel"] + p[f"{name}_coupling_dense_{j}.bias"]
            cache.append((u, g))
            g = ACTIVATIONS[layer.activation](u)
        raw = g @ p[f"{name}_scale.kernel"] + p[f"{name}_scale.bias"]
        s = layer.scale_bound * np.tanh(raw / layer.scale_bound)
        t = g @ p[f"{name}_translation.kernel"] + p[f"{name}_translation.bias"]
        return s, t, cache

    def _apply(self, layer: Layer, name: str, x: np.ndarray, direction: str) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(layer, Standardize):
            mean, log_std = self.parameters[f"{name}.mean"], self.parameters[f"{name}.log_std"]
            total = np.full(len(x), np.sum(log_std))
            if direction == "forward":
                return (x - mean) * np.exp(-log_std), -total
            return x * np.exp(log_std) + mean, total
        a, b = self._halves(layer)
        s, t, _ = self._scale_and_shift(layer, name, x[:, a])
        y = x.copy()
        if direction == "forward":
            y[:, b] = x[:, b] * np.exp(s) + t
            return y, np.sum(s, axis=1)
        y[:, b] = (x[:, b] - t) * np.exp(-s)
        return y, -np.sum(s, axis=1)

    def _pull_back(self, layer, name, x, grad, grad_ld, direction, gradients) -> np.ndarray:
        """Gradient at the layer's input from the one at its output; parameters' gradients go into `gradients`."""
        p = self.parameters
        if isinstance(layer, Standardize):
            mean, log_std = p[f"{name}.mean"], p[f"{name}.log_std"]
            if direction == "forward":
                scaled = grad * np.exp(-log_std)
                gradients[f"{name}.mean"] = -np.sum(scaled, axis=0)
                gradients[f"{name}.log_std"] = -np.sum(scaled * (x - mean), axis=0) - np.sum(grad_ld)
                return scaled
            scaled = grad * np.exp(log_std)
            gradients[f"{name}.mean"] = np.sum(grad, axis=0)
            gradients[f"{name}.log_std"] = np.sum(scaled * x, axis=0) + np.sum(grad_ld)
            return scaled

        a, b = self._halves(layer)
        s, t, cache = self._scale_and_shift(layer, name, x[:, a])
        result = grad.copy()
        if direction == "forward":
            # y_b = x_b e^s + t, log_det = sum(s)
            result[:, b] = grad[:, b] * np.exp(s)
            grad_s = result[:, b] * x[:, b] + grad_ld[:, None]
            grad_t = grad[:, b]
        else:
            # x_b = (y_b - t) e^-s, log_det = -sum(s)
            result[:, b] = grad[:, b] * np.exp(-s)
            grad_s = -result[:, b] * (x[:, b] - t) - grad_ld[:, None]
            grad_t = -result[:, b]
        # s = B tanh(u / B), so ds/du = 1 - (s / B)^2
        grad_raw = grad_s * (1.0 - (s / layer.scale_bound) ** 2)

        last = ACTIVATIONS[layer.activation](cache[-1][0]) if cache else x[:, a]
        gradients[f"{name}_scale.kernel"] = last.T @ grad_raw
        gradients[f"{name}_scale.bias"] = np.sum(grad_raw, axis=0)
        gradients[f"{name}_translation.kernel"] = last.T @ grad_t
        gradients[f"{name}_translation.bias"] = np.sum(grad_t, axis=0)
        grad_g = grad_raw @ p[f"{name}_scale.kernel"].T + grad_t @ p[f"{name}_translation.kernel"].T
        for j in reversed(range(len(cache))):
            pre_activation, dense_in = cache[j]
            grad_u = grad_g * DERIVATIVES[layer.activation](pre_activation)
            gradients[f"{name}_coupling_dense_{j}.kernel"] = dense_in.T @ grad_u
            gradients[f"{name}_coupling_dense_{j}.bias"] = np.sum(grad_u, axis=0)
            grad_g = grad_u @ p[f"{name}_coupling_dense_{j}.kernel"].T
        result[:, a] += grad_g
        return result


# ---------------------------------------------------------------------------------------------- finite differences


def finite_difference(f: Callable[[np.ndarray], float], at: np.ndarray, step: float = 6e-6) -> np.ndarray:
    """Central differences of a scalar function, float64.

    The default step is the cube root of the unit round-off: truncation (h^2) and rounding (eps / h) are then both
    about 4e-11 of the function's scale.
    """
    at = np.array(at, dtype=np.float64)
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        value = at[index]
        h = step * max(1.0, abs(value))
        at[index] = value + h
        upper = f(at)
        at[index] = value - h
        lower = f(at)
        at[index] = value
        gradient[index] = (upper - lower) / ((value + h) - (value - h))
    return gradient


def numerical_jacobian(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 6e-6) -> np.ndarray:
    """d f_i / d x_j at one row x [D], by central differences with all D perturbed rows in one call of f([n, D])."""
    d = len(x)
    h = step * np.maximum(1.0, np.abs(x))
    upper, lower = x + np.diag(h), x - np.diag(h)
    width = np.diagonal(upper) - np.diagonal(lower)
    out = f(np.concatenate([upper, lower]))
    return ((out[:d] - out[d:]) / width[:, None]).T


# ---------------------------------------------------------------------------------------------- optimiser


class AdamW:
    """Adam (Kingma and Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov and Hutter 2019) on kernels."""

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ):
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.step_count = 0
        self.first: dict[str, np.ndarray] = {}
        self.second: dict[str, np.ndarray] = {}

    def step(self, parameters: dict[str, np.ndarray], gradients: Mapping[str, np.ndarray]) -> None:
        self.step_count += 1
        for name, gradient in gradients.items():
            first = self.beta1 * self.first.get(name, 0.0) + (1 - self.beta1) * gradient
            second = self.beta2 * self.second.get(name, 0.0) + (1 - self.beta2) * gradient**2
            self.first[name], self.second[name] = first, second
            first_hat = first / (1 - self.beta1**self.step_count)
            second_hat = second / (1 - self.beta2**self.step_count)
            decay = self.weight_decay if name.endswith(".kernel") else 0.0
            update = first_hat / (np.sqrt(second_hat) + self.eps) + decay * parameters[name]
            parameters[name] = parameters[name] - self.learning_rate * update


def clip_to_norm(gradients: Mapping[str, np.ndarray], largest: float) -> tuple[dict[str, np.ndarray], float]:
    """The gradient scaled down to Euclidean norm `largest` where it is longer, and its norm before."""
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in gradients.values()))
    factor = min(1.0, largest / norm)
    return {name: g * factor for name, g in gradients.items()}, norm


# ---------------------------------------------------------------------------------------------- random numbers

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> tuple[int, int, int, int]:
    """Philox4x32 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK, (k1 + _PHILOX_WEYL[1]) & _MASK
    return c0, c1, c2, c3


def standard_normals(seed: int, rows: Sequence[int], columns: int, dtype: str) -> np.ndarray:
    """The noise of sample(): row r, column c from block c // N of the counter {r low, r high, block, 0}, keyed by seed.

    N is 4 for float32 and 2 for float64. Box and Muller (1958): sqrt(-2 log u) (cos 2 pi v, sin 2 pi v), u from the
    first word or two of a pair, v from the others. Extended precision, so that 2 ulp of float64 can be told.
    """
    block_size = 4 if dtype == "float32" else 2
    key = (seed & _MASK, seed >> 32)
    blocks = -(-columns // block_size)
    words = np.array(
        [[philox4x32((row & _MASK, row >> 32, block, 0), key) for block in range(blocks)] for row in rows], np.uint64
    ).reshape(len(rows), blocks, 4)
    if dtype == "float32":
        # The uniform is formed in float32 (the word is rounded to 24 bits), the angle from 24 bits exactly.
        u = (words[..., 0::2].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
        quarters = (words[..., 1::2] >> np.uint64(8)).astype(np.longdouble) * 2.0**-22
    else:
        first = (words[..., 1:2] << np.uint64(32) | words[..., 0:1]) >> np.uint64(12)
        second = (words[..., 3:4] << np.uint64(32) | words[..., 2:3]) >> np.uint64(11)
        u = (first.astype(np.float64) + 0.5) * 2.0**-52
        quarters = second.astype(np.longdouble) * 2.0**-51
    radius = np.sqrt(-2 * np.log(u.astype(np.longdouble)))
    # Quarter turns are taken off exactly: near its zeros the sine keeps its relative accuracy.
    quadrant = np.rint(quarters)
    rest = (quarters - quadrant) * (2 * np.arctan(np.longdouble(1)))
    sine, cosine = np.sin(rest), np.cos(rest)
    turn = quadrant.astype(np.int64) % 4
    cos_v = np.choose(turn, [cosine, -sine, -cosine, sine])
    sin_v = np.choose(turn, [sine, cosine, -sine, -cosine])
    normals = np.stack([radius * cos_v, radius * sin_v], axis=-1)  # [rows, blocks, pairs, 2]
    return normals.reshape(len(rows), blocks * block_size)[:, :columns]


def ulp_error(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|actual - expected| in units of the last place of `actual`'s dtype at `expected`, subnormals included."""
    dtype = actual.dtype
    spacing = np.spacing(np.abs(expected).astype(dtype)).astype(np.longdouble)
    return np.abs(actual.astype(np.longdouble) - expected.astype(np.longdouble)) / spacing


# ---------------------------------------------------------------------------------------------- the tests' harness


def random_parameters(
    shapes: Mapping[str, tuple[int, ...]], seed: int, kernel_scale: float = 1.0
) -> dict[str, np.ndarray]:
    """Parameters far from the identity: kernels N(0, kernel_scale^2 / in), everything else 0.1 N(0, 1)."""
    rng = np.random.default_rng([seed, 0x5EED])
    return {
        name: rng.normal(size=shape) * (kernel_scale / math.sqrt(shape[0]) if name.endswith(".kernel") else 0.1)
        for name, shape in shapes.items()
    }


def well_conditioned_scale(num_flows: int) -> float:
    """The largest kernel_scale w up to 1 at which K layers do not amplify rounding beyond the budgets: K w^2 <= 2.

    With hidden layers and a scale_bound of 1. Beyond it a flow of random weights is ill-conditioned in any arithmetic;
    test_numbers.py measures by how much.
    """
    return min(1.0, math.sqrt(2.0 / num_flows))


def oracle_of(flow) -> OracleFlow:
    """The oracle with the layers of a built flow and the very values of its parameters."""
    spec = flow.spec
    oracle = real_nvp(
        spec.input_size, spec.num_flows, spec.hidden_sizes, spec.activation, spec.scale_bound, spec.standardize
    )
    oracle.set_parameters(flow.parameters())
    return oracle


def unit_data(rows: int, columns: int, seed: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng([seed, 0xDA7A]).normal(size=(rows, columns)).astype(dtype)


BUDGET = {"float32": 1e-5, "float64": 1e-12}


def assert_within_budget(
    actual: np.ndarray, expected: np.ndarray, dtype: str, what: str = "", scale: np.ndarray | None = None
) -> None:
    """|actual - expected| <= budget (1 + |expected|) element by element, or 1 + scale; NaN never passes."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == np.dtype(dtype), f"{what} has dtype {actual.dtype}, expected {dtype}"
    error = np.abs(actual.astype(np.float64) - expected) / (1.0 + (np.abs(expected) if scale is None else scale))
    worst = np.max(error, initial=0.0)
    assert worst <= BUDGET[dtype], f"{what}: error {worst:.3g} of its scale, the budget is {BUDGET[dtype]:.0e}"


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    different = np.ascontiguousarray(actual).tobytes() != np.ascontiguousarray(expected).tobytes()
    assert not different, f"{what}: {np.count_nonzero(actual != expected)} of {actual.size} elements differ"
