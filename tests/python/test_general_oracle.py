"""The general oracle against itself, against the first oracle's hand-written derivatives, and against its peers."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from general_oracle import (
    LOG_SCALES,
    SPLINES,
    GeneralFlow,
    Node,
    log_scale,
    pull_back,
    random_spec,
    scrambled,
    spline_of,
    tensor_shapes,
)
from oracle import ACTIVATIONS, KINKED, finite_difference, numerical_jacobian, random_parameters, real_nvp, unit_data

with warnings.catch_warnings():  # of libraries that are older than their dependencies
    warnings.simplefilter("ignore")
    try:
        import torch
    except ImportError:
        torch = None
    try:
        import zuko
    except ImportError:
        zuko = None
    try:
        import nflows.distributions
        import nflows.flows
        import nflows.nn.nets
        import nflows.transforms
    except ImportError:
        nflows = None
    try:
        import normflows
    except ImportError:
        normflows = None

SEEDS = range(60)


def random_flow(seed: int, **options) -> tuple[GeneralFlow, np.ndarray, np.ndarray | None]:
    """A random flow, with rows and contexts for it."""
    rng = np.random.default_rng([seed, 0x0F10])
    spec = random_spec(rng, **options)
    flow = GeneralFlow(spec, scrambled(spec, rng, 0.7))
    context = rng.normal(size=(11, spec["context_size"])) if spec["context_size"] else None
    return flow, rng.normal(size=(11, spec["input_size"])), context


# ------------------------------------------------------------------------------------------------------------ itself


def test_random_specs_use_every_feature() -> None:
    specs = [random_spec(np.random.default_rng(seed)) for seed in range(300)]
    layers = [layer for spec in specs for layer in spec["layers"]]
    couplings = [layer for layer in layers if layer["kind"] == "coupling"]
    networks = [c["network"] for c in couplings if "network" in c]
    plain = {"coupling", "standardize", "permutation", "lu_linear", "actnorm"}
    assert {layer["kind"] for layer in layers} == plain | {"element_spline"}
    assert {str(c["transformed"]) for c in couplings} >= {"first_half", "second_half", "odd", "even", "all"}
    assert any(isinstance(c["transformed"], list) for c in couplings)
    assert {layer["inverse"] for layer in layers if layer["kind"] in ("coupling", "lu_linear", "actnorm")} == {
        False,
        True,
    }
    assert {c["transform"]["kind"] for c in couplings} == {"affine", "additive", "spline"}
    splines = [layer["spline"] for layer in layers if layer["kind"] == "element_spline"]
    assert {str(c["transform"]) for c in couplings if c["transform"]["kind"] == "spline"} == {
        str({"kind": "spline", **spline}) for spline in SPLINES
    }
    assert set(map(str, splines)) == set(map(str, SPLINES))
    assert {str(c["transform"]["log_scale"]) for c in couplings if "log_scale" in c["transform"]} == set(
        map(str, LOG_SCALES)
    )
    assert any("scale_network" in c for c in couplings)
    assert {n["kind"] for n in networks} == {"mlp", "residual"}
    assert {n["layer_norm"] for n in networks if n["kind"] == "mlp"} == {False, True}
    for flag in ("context_gates", "block_affines"):
        assert {n[flag] for n in networks if n["kind"] == "residual"} == {False, True}
    assert {spec["standardize_context"] for spec in specs} == {False, True}
    assert {spec["input_size"] for spec in specs} >= {1, 2, 3}


def test_random_specs_leave_out_what_is_not_asked_for() -> None:
    for seed in SEEDS:
        spec = random_spec(np.random.default_rng(seed), features=())
        assert spec["context_size"] == 0
        for layer in spec["layers"]:
            assert layer["kind"] in ("coupling", "standardize")
            if layer["kind"] == "coupling":
                assert layer["transformed"] in ("first_half", "second_half")
                assert not layer["inverse"]
                assert layer["transform"]["log_scale"]["function"] == "tanh"
                assert not layer["network"]["layer_norm"]


@pytest.mark.parametrize("seed", SEEDS)
def test_inverse_undoes_forward(seed) -> None:
    flow, x, context = random_flow(seed)
    z, log_det = flow.forward(x, context)
    back, back_log_det = flow.inverse(z, context)
    np.testing.assert_allclose(back, x, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(back_log_det, -log_det, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_log_det_is_that_of_a_numerical_jacobian(seed) -> None:
    flow, x, context = random_flow(seed, max_size=6)
    for direction in (flow.forward, flow.inverse):
        _, log_det = direction(x[:3], None if context is None else context[:3])
        for i in range(3):
            c = None if context is None else context[i]
            jacobian = numerical_jacobian(lambda v, c=c, f=direction: f(v, c)[0], x[i])
            assert np.linalg.slogdet(jacobian)[1] == pytest.approx(log_det[i], rel=1e-6, abs=1e-6)


def test_log_prob_is_normalised() -> None:
    """In one dimension under a context, by the trapezoidal rule."""
    for seed in range(5):
        rng = np.random.default_rng([seed, 1])
        spec = {
            "input_size": 1,
            "context_size": 2,
            "dtype": "float64",
            "base": {"kind": "normal"},
            "standardize_context": True,
            "layers": [
                {"kind": "actnorm", "inverse": bool(seed % 2)},
                {
                    "kind": "coupling",
                    "inverse": bool(seed // 2 % 2),
                    "transformed": "all",
                    "transform": {"kind": "affine", "log_scale": {"function": "identity"}},
                    "network": {"kind": "mlp", "hidden_sizes": [5], "activation": "tanh", "layer_norm": True},
                },
            ],
        }
        flow = GeneralFlow(spec, scrambled(spec, rng, 0.5))
        grid = np.linspace(-60, 60, 50_001)
        density = np.exp(flow.log_prob(grid[:, None], rng.normal(size=2)))
        assert np.sum(density) * (grid[1] - grid[0]) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_tape_agrees_with_finite_differences(seed, direction) -> None:
    flow, x, context = random_flow(seed, max_size=7)
    smooth = flow.smallest_pre_activation(x, direction, context) > 1e-3
    x, context = x[smooth][:2], None if context is None else context[smooth][:2]
    rng = np.random.default_rng(seed)
    grad_out, grad_log_det = rng.normal(size=x.shape), rng.normal(size=len(x))

    def loss(v: np.ndarray, c: np.ndarray | None) -> float:
        out, log_det = getattr(flow, direction)(v, c)
        return float(np.sum(grad_out * out) + np.sum(grad_log_det * log_det))

    def compare(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
        scale = 1.0 + np.max(np.abs(expected), initial=0.0)
        np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=1e-7, err_msg=what)

    gradients = flow.vjp(x, grad_out, grad_log_det, direction, context)
    compare(gradients.x, finite_difference(lambda v: loss(v, context), x), "x")
    if context is not None:
        compare(gradients.context, finite_difference(lambda c: loss(x, c), context), "context")
        shared = flow.vjp(x, grad_out, grad_log_det, direction, context[0] if len(x) else np.zeros(flow.context_size))
        assert shared.context.shape == (flow.context_size,)
    for name, value in list(flow.parameters.items()):
        # Large tensors at some of their elements: what a difference costs is a run of the flow.
        chosen = rng.choice(value.size, min(value.size, 5), replace=False)

        def loss_of(v: np.ndarray, name: str = name, value: np.ndarray = value, at: np.ndarray = chosen) -> float:
            moved = value.copy()
            moved.flat[at] = v
            flow.parameters[name] = moved
            return loss(x, context)

        expected = finite_difference(loss_of, value.ravel()[chosen])
        flow.parameters[name] = value
        compare(gradients.parameters[name].ravel()[chosen], expected, name)


def test_one_context_for_all_rows_has_the_summed_gradient() -> None:
    flow, x, _ = next(found for seed in SEEDS if (found := random_flow(seed))[2] is not None)
    c = np.linspace(-1, 1, flow.context_size)
    grad_log_det = np.linspace(-1, 2, len(x))
    shared = flow.vjp(x, x, grad_log_det, context=c)
    tiled = flow.vjp(x, x, grad_log_det, context=np.tile(c, (len(x), 1)))
    np.testing.assert_allclose(shared.context, tiled.context.sum(axis=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", LOG_SCALES, ids=str)
def test_log_scale_functions_and_their_derivatives(function) -> None:
    """Against the formulas in extended precision, and central differences of those."""
    u = np.concatenate([np.linspace(-9, 9, 74), [1e-3, -1e-3, 40.0, -40.0]])  # softsign's slope has a kink at 0
    wide = u.astype(np.longdouble)

    def formula(u: np.ndarray) -> np.ndarray:
        name = function["function"]
        if name == "identity":
            return u
        if name in ("tanh", "softsign", "atan"):
            v = u / np.longdouble(function["divisor"])
            return function["factor"] * {"tanh": np.tanh, "softsign": lambda v: v / (1 + abs(v)), "atan": np.arctan}[
                name
            ](v)
        low, v = np.longdouble(function["low"]), u + np.longdouble(function["offset"])
        if name == "sigmoid":
            scale = low + (np.longdouble(function["high"]) - low) / (1 + np.exp(-v))
        else:
            scale = np.minimum(np.log1p(np.exp(v)) + low, math.inf if function["high"] is None else function["high"])
        return -np.log(scale) if function["negated"] else np.log(scale)

    s = log_scale(function, node := Node(u))
    np.testing.assert_allclose(s.value, formula(wide).astype(float), rtol=1e-13, atol=1e-13)
    step = np.longdouble(2.0**-20)
    slope = (formula(wide + step) - formula(wide - step)) / (2 * step)
    pulled = pull_back([(s, np.ones_like(u))])[node.number]
    np.testing.assert_allclose(pulled, slope.astype(float), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_specs_of_format_1_0_agree_with_the_first_oracle(activation, direction) -> None:
    first = real_nvp(5, 3, (6, 4), activation, 1.5, standardize=True)
    first.set_parameters(random_parameters(first.shapes(), 1))
    coupling = {"kind": "coupling", "hidden_sizes": [6, 4], "activation": activation, "scale_bound": 1.5}
    layers = [{"kind": "standardize"}, *({**coupling, "swapped": k % 2 == 1} for k in range(3))]
    flow = GeneralFlow({"input_size": 5, "dtype": "float64", "layers": layers}, first.parameters)
    x, grad_out, grad_log_det = unit_data(20, 5, 1), unit_data(20, 5, 2), unit_data(20, 1, 3)[:, 0]
    for actual, expected in zip(getattr(flow, direction)(x), getattr(first, direction)(x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(flow.log_prob(x), first.log_prob(x), rtol=1e-13)
    if activation in KINKED:
        expected = first.smallest_pre_activation(x, direction)
        np.testing.assert_allclose(flow.smallest_pre_activation(x, direction), expected, rtol=1e-9)
    expected_x, expected_parameters = first.vjp(x, grad_out, grad_log_det, direction)
    gradients = flow.vjp(x, grad_out, grad_log_det, direction)
    np.testing.assert_allclose(gradients.x, expected_x, rtol=1e-11, atol=1e-11)
    for name, expected in expected_parameters.items():
        np.testing.assert_allclose(gradients.parameters[name], expected, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("seed", SEEDS)
def test_orientation_is_the_other_direction(seed) -> None:
    """A layer with `inverse` turned over computes forward what the other computes backward."""
    flow, x, context = random_flow(seed)
    for kind in ("coupling", "lu_linear", "actnorm", "element_spline"):
        for i, layer in enumerate(flow.layers):
            if layer["kind"] != kind:
                continue
            alone = [{**layer, "inverse": flag} for flag in (False, True)]
            # Names tell a layer's index or number; alone it has the first one.
            old = flow.prefixes()[i]
            prefix = old.rpartition("_")[0] + "_0"
            p = {
                prefix + name.removeprefix(old): value
                for name, value in flow.parameters.items()
                if name.startswith((old + ".", old + "_"))
            }
            spec = {**flow.spec, "standardize_context": False}
            one, other = (GeneralFlow({**spec, "layers": [layer]}, p) for layer in alone)
            for there, back in ((one.forward, other.inverse), (one.inverse, other.forward)):
                for got, expected in zip(there(x, context), back(x, context), strict=True):
                    assert np.array_equal(got, expected)


def test_a_bad_context_makes_its_row_nan_only() -> None:
    flow, x, context = next(found for seed in SEEDS if (found := random_flow(seed))[2] is not None)
    context[4, 0] = np.nan
    for result in (*flow.forward(x, context), *flow.inverse(x, context), flow.log_prob(x, context)):
        bad = np.isnan(result.reshape(len(x), -1))
        assert bad[4].all()
        assert not np.delete(bad, 4, axis=0).any()


# ------------------------------------------------------------------------------------------------------------- peers
#
# A peer's modules are translated to a spec and tensors; the peer then says what the density is. In float64, with all
# parameters scrambled.


class Translation:
    """Layers as they are found, data -> latent, and the tensors of the spec that they make."""

    def __init__(self, size: int, context: int = 0) -> None:
        self.size, self.context = size, context
        self.layers: list[dict] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.couplings = 0

    def dense(self, name: str, linear, rows=slice(None), columns=slice(None)) -> None:
        self.tensors[f"{name}.kernel"] = array(linear.weight).T[rows][:, columns]
        self.tensors[f"{name}.bias"] = array(linear.bias)[columns]

    def named(self, kind: str, tensors: dict[str, np.ndarray], **fields) -> None:
        """A layer whose tensors are named by its index."""
        self.tensors |= {f"{kind}_{len(self.layers)}.{part}": value for part, value in tensors.items()}
        self.layers.append({"kind": kind, **fields})

    def coupling(self, transformed, transform: dict, inverse: bool = False, **networks) -> str:
        """The prefix of the tensors, which the caller adds."""
        self.layers.append(
            {"kind": "coupling", "inverse": inverse, "transformed": transformed, "transform": transform, **networks}
        )
        self.couplings += 1
        return f"flow_{self.couplings - 1}"

    def flow(self) -> GeneralFlow:
        spec = {"input_size": self.size, "context_size": self.context, "dtype": "float64", "layers": self.layers}
        return GeneralFlow(spec, {name: self.tensors[name] for name, _ in tensor_shapes(spec)})


def array(tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def scramble(module, seed: int):
    """The module in float64 and eval mode, its parameters N(0, 0.3^2); what its layers keep of batches, too."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return module


def mlp(linears, activation: str, layer_norm: bool = False) -> dict:
    sizes = [linear.out_features for linear in linears[:-1]]
    return {"kind": "mlp", "hidden_sizes": sizes, "activation": activation, "layer_norm": layer_norm}


def linears_of(module) -> list:
    return [layer for layer in module if hasattr(layer, "weight")]


def assert_same_densities(flow: GeneralFlow, expected, x: np.ndarray, context: np.ndarray | None = None) -> None:
    actual, expected = flow.log_prob(x, context), array(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-11)


def assert_same_gradients(flow: GeneralFlow, log_prob, x: np.ndarray, context: np.ndarray | None) -> None:
    """Of the sum of log p, by x and by the context."""
    given = [torch.tensor(v, requires_grad=True) for v in (x, context) if v is not None]
    log_prob(*given).sum().backward()
    _, gradients = flow.nll_gradient(x, context)
    for tensor, gradient in zip(given, (gradients.x, gradients.context), strict=False):
        np.testing.assert_allclose(-len(x) * gradient, array(tensor.grad), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(zuko is None, reason="zuko is not installed")
@pytest.mark.parametrize("random_mask", [False, True])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_zuko_real_nvp(context, random_mask, normalize) -> None:
    torch.manual_seed(1)
    peer = zuko.flows.RealNVP(
        5,
        context,
        transforms=4,
        randmask=random_mask,
        hidden_features=(9, 7),
        activation=torch.nn.ELU,
        normalize=normalize,
    )
    peer = scramble(peer, 2)
    found = Translation(5, context)
    bound = -math.log(1e-3)
    affine = {"kind": "affine", "log_scale": {"function": "softsign", "factor": bound, "divisor": bound}}
    for transform in peer.transform.transforms:
        b = np.flatnonzero(~transform.mask.numpy())  # true: what stays
        linears = linears_of(transform.hyper)
        prefix = found.coupling(b.tolist(), affine, network=mlp(linears, "elu", normalize))
        for j, linear in enumerate(linears[:-1]):
            found.dense(f"{prefix}_coupling_dense_{j}", linear)
        # Outputs: shift and scale of the first feature, then of the next.
        found.dense(f"{prefix}_translation", linears[-1], columns=slice(0, None, 2))
        found.dense(f"{prefix}_scale", linears[-1], columns=slice(1, None, 2))
    x, c = unit_data(50, 5, 3), unit_data(50, context, 4) if context else None

    def log_prob(x, c=None):
        return peer(c).log_prob(x)

    assert_same_densities(found.flow(), log_prob(*map(torch.tensor, (x, c) if context else (x,))), x, c)
    assert_same_gradients(found.flow(), log_prob, x, c)


@pytest.mark.skipif(zuko is None, reason="zuko is not installed")
@pytest.mark.parametrize("context", [0, 3])
def test_zuko_spline_couplings(context) -> None:
    size, bins = 5, 6
    torch.manual_seed(2)
    transforms = [
        zuko.flows.coupling.GeneralCouplingTransform(
            size,
            context,
            mask=[k % 2 == 1, True, k % 2 == 0, False, False],
            univariate=zuko.transforms.MonotonicRQSTransform,
            shapes=[(bins,), (bins,), (bins - 1,)],
            hidden_features=(9, 7),
        )
        for k in range(3)
    ]
    normal = zuko.distributions.DiagNormal
    base = zuko.lazy.UnconditionalDistribution(normal, torch.zeros(size), torch.ones(size), buffer=True)
    peer = scramble(zuko.flows.Flow(transforms, base), 3)
    found, bound = Translation(size, context), -math.log(1e-3)
    spline = spline_of(
        bins,
        5.0,
        min_bin_width=0.0,
        min_bin_height=0.0,
        min_derivative=0.0,
        derivative={"function": "exp", "bound": bound},
        size_bound=bound / 2,
    )
    for transform in peer.transform.transforms:
        b = np.flatnonzero(~transform.mask.numpy())
        linears = linears_of(transform.hyper)
        prefix = found.coupling(b.tolist(), {"kind": "spline", **spline}, network=mlp(linears, "relu"))
        for j, linear in enumerate(linears[:-1]):
            found.dense(f"{prefix}_coupling_dense_{j}", linear)
        for head, columns in spline_columns(len(b), bins, 3 * bins - 1).items():
            found.dense(f"{prefix}_{head}", linears[-1], columns=columns)
    x, c = 2 * unit_data(50, size, 3), unit_data(50, context, 4) if context else None

    def log_prob(x, c=None):
        return peer(c).log_prob(x)

    assert_same_densities(found.flow(), log_prob(*map(torch.tensor, (x, c) if context else (x,))), x, c)
    assert_same_gradients(found.flow(), log_prob, x, c)


def batch_norm_affine(norm) -> tuple[np.ndarray, np.ndarray]:
    """In eval mode y = x scale + shift."""
    scale = array(norm.weight) / np.sqrt(array(norm.running_var) + norm.eps)
    return scale, array(norm.bias) - array(norm.running_mean) * scale


def has_batch_norm(net) -> bool:
    return len(net.blocks) > 0 and net.blocks[0].use_batch_norm


def residual(net, activation: str, context: int) -> dict:
    return {
        "kind": "residual",
        "hidden_size": net.hidden_features,
        "num_blocks": len(net.blocks),
        "activation": activation,
        "context_gates": context > 0,
        "block_affines": has_batch_norm(net),
    }


def add_residual(found: Translation, prefix: str, net) -> None:
    """All of the network but its last layer, which is the heads."""
    with_norm = has_batch_norm(net)
    found.dense(f"{prefix}_initial", net.initial_layer)
    for j, block in enumerate(net.blocks):
        name = f"{prefix}_block_{j}"
        for k, linear in enumerate(block.linear_layers):
            found.dense(f"{name}_dense_{k}", linear)
        if with_norm:
            affine = batch_norm_affine(block.batch_norm_layers[0])
            found.tensors |= dict(zip((f"{name}_affine.scale", f"{name}_affine.shift"), affine, strict=True))
            # The second norm follows a dense layer, and is a part of it.
            scale, shift = batch_norm_affine(block.batch_norm_layers[1])
            found.tensors[f"{name}_dense_0.kernel"] *= scale
            found.tensors[f"{name}_dense_0.bias"] = found.tensors[f"{name}_dense_0.bias"] * scale + shift
        if found.context:
            found.dense(f"{name}_context", block.context_layer)


def add_nflows_coupling(found: Translation, transform, activation: str) -> None:
    net, b = transform.transform_net, transform.transform_features.numpy()
    additive = isinstance(transform, nflows.transforms.AdditiveCouplingTransform)
    scale = {"function": "sigmoid", "low": 1e-3, "high": 1.001, "offset": 2.0, "negated": False}
    kind = {"kind": "additive"} if additive else {"kind": "affine", "log_scale": scale}
    prefix = found.coupling(b.tolist(), kind, network=residual(net, activation, found.context))
    add_residual(found, prefix, net)
    # Outputs: all shifts, then all scales.
    found.dense(f"{prefix}_translation", net.final_layer, columns=slice(0, len(b)))
    if not additive:
        found.dense(f"{prefix}_scale", net.final_layer, columns=slice(len(b), None))


def spline_columns(count: int, bins: int, numbers: int) -> dict[str, np.ndarray]:
    """Where the peers' outputs are, all `numbers` of a feature and then those of the next, in the order of heads."""
    firsts = {"widths": range(bins), "heights": range(bins, 2 * bins), "derivatives": range(2 * bins, numbers)}
    return {name: np.array([j * numbers + p for p in places for j in range(count)]) for name, places in firsts.items()}


def add_nflows_spline(found: Translation, transform, activation: str) -> None:
    """The coupling, and the splines of the features that it leaves as they are."""
    net, b, bins = transform.transform_net, transform.transform_features.numpy(), transform.num_bins
    assert (transform.min_bin_width, transform.min_bin_height, transform.min_derivative) == (1e-3, 1e-3, 1e-3)
    softplus = {"function": "softplus", "offset": 0.0, "gain": 1.0}
    if transform.tails == "linear":
        spline = spline_of(bins, float(np.max(transform.tail_bound)), derivative=softplus)
    else:
        spline = spline_of(bins, lower=0.0, upper=1.0, derivative=softplus, boundary="free")
    prefix = found.coupling(b.tolist(), {"kind": "spline", **spline}, network=residual(net, activation, found.context))
    add_residual(found, prefix, net)
    for head, columns in spline_columns(len(b), bins, transform._transform_dim_multiplier()).items():
        found.dense(f"{prefix}_{head}", net.final_layer, columns=columns)
        if head != "derivatives":
            for part in ("kernel", "bias"):
                found.tensors[f"{prefix}_{head}.{part}"] /= math.sqrt(net.hidden_features)
    if (alone := transform.unconditional_transform) is not None:
        names = ("widths", "heights", "derivatives")
        raw = {name: array(getattr(alone, f"unnormalized_{name}")).T for name in names}
        features = transform.identity_features.tolist()
        found.tensors |= {f"spline_{len(found.layers)}.{name}": value for name, value in raw.items()}
        found.layers.append({"kind": "element_spline", "inverse": False, "features": features, "spline": spline})


def add_nflows(found: Translation, transform, activation: str) -> None:
    kind = type(transform).__name__
    if kind == "CompositeTransform":
        for part in transform._transforms:
            add_nflows(found, part, activation)
    elif kind == "RandomPermutation":
        found.named("permutation", {}, order=transform._permutation.tolist())
    elif kind == "LULinear":
        tensors = {
            "lower": array(transform.lower_entries),
            "upper": array(transform.upper_entries),
            "log_diagonal": np.log(np.logaddexp(0, array(transform.unconstrained_upper_diag)) + transform.eps),
            "sign": np.ones(found.size),
            "bias": array(transform.bias),
        }
        found.named("lu_linear", tensors, inverse=False)
    elif kind == "BatchNorm":
        weight = np.logaddexp(0, array(transform.unconstrained_weight)) + transform.eps
        scale = weight / np.sqrt(array(transform.running_var) + transform.eps)
        shift = array(transform.bias) - array(transform.running_mean) * scale
        found.named("actnorm", {"log_scale": np.log(scale), "shift": shift}, inverse=False)
    elif kind in ("PiecewiseRationalQuadraticCouplingTransform", "PiecewiseRationalQuadraticCoupling"):
        add_nflows_spline(found, transform, activation)
    else:
        assert "Coupling" in kind
        add_nflows_coupling(found, transform, activation)


@pytest.mark.skipif(nflows is None, reason="nflows is not installed")
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("volume_preserving", [False, True])
def test_nflows_simple_real_nvp(within, between, volume_preserving) -> None:
    peer = nflows.flows.SimpleRealNVP(
        features=5,
        hidden_features=8,
        num_layers=4,
        num_blocks_per_layer=2,
        use_volume_preserving=volume_preserving,
        batch_norm_within_layers=within,
        batch_norm_between_layers=between,
    )
    found = Translation(5)
    add_nflows(found, scramble(peer, 5)._transform, "relu")
    x = unit_data(50, 5, 6)
    assert_same_densities(found.flow(), peer.log_prob(torch.tensor(x)), x)
    assert_same_gradients(found.flow(), peer.log_prob, x, None)


@pytest.mark.skipif(nflows is None, reason="nflows is not installed")
@pytest.mark.parametrize("within", [False, True])
def test_nflows_conditional_couplings_with_permutations_and_lu(within) -> None:
    transforms = nflows.transforms
    parts = []
    for k in range(3):
        parts += [
            transforms.RandomPermutation(6),
            transforms.LULinear(6),
            transforms.AffineCouplingTransform(
                [1, 0, 1, 0, 0, 1] if k % 2 else [0, 1, 0, 1, 1, 0],
                lambda inputs, outputs: nflows.nn.nets.ResidualNet(
                    inputs, outputs, 10, context_features=4, num_blocks=2, activation=torch.tanh, use_batch_norm=within
                ),
            ),
        ]
    peer = nflows.flows.Flow(transforms.CompositeTransform(parts), nflows.distributions.StandardNormal([6]))
    found = Translation(6, 4)
    add_nflows(found, scramble(peer, 7)._transform, "tanh")
    x, c = unit_data(50, 6, 8), unit_data(50, 4, 9)
    assert_same_densities(found.flow(), peer.log_prob(torch.tensor(x), torch.tensor(c)), x, c)
    assert_same_gradients(found.flow(), peer.log_prob, x, c)


@pytest.mark.skipif(nflows is None, reason="nflows is not installed")
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("tails", ["linear", None])
def test_nflows_spline_couplings(context, alone, tails) -> None:
    """As its examples and sbi build them; without tails rows lie between 0 and 1."""
    transforms = nflows.transforms
    parts = []
    for k in range(2 if tails is None else 3):
        parts += [
            transforms.RandomPermutation(5),
            *([transforms.LULinear(5)] if tails else []),
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                [1, 0, 1, 0, 0] if k % 2 else [0, 1, 0, 1, 1],
                lambda inputs, outputs: nflows.nn.nets.ResidualNet(
                    inputs, outputs, 10, context_features=context or None, num_blocks=2
                ),
                num_bins=6,
                tails=tails,
                tail_bound=2.5,
                apply_unconditional_transform=alone,
            ),
        ]
    base = nflows.distributions.StandardNormal([5])
    peer = nflows.flows.Flow(transforms.CompositeTransform(parts), base)
    found = Translation(5, context)
    add_nflows(found, scramble(peer, 12)._transform, "relu")
    x, c = unit_data(50, 5, 13), unit_data(50, context, 14) if context else None
    if tails is None:
        x = 1 / (1 + np.exp(-x))
    given = [torch.tensor(v) for v in (x, c) if v is not None]
    assert_same_densities(found.flow(), peer.log_prob(*given), x, c)
    assert_same_gradients(found.flow(), peer.log_prob, x, c)


def add_normflows(found: Translation, layer) -> None:
    """What the layer's inverse does, which is data -> latent."""
    kind = type(layer).__name__
    size = found.size
    if kind == "Permute":
        order = (
            layer.inv_perm.tolist()
            if layer.mode == "shuffle"
            else np.roll(np.arange(size), -((size + 1) // 2)).tolist()
        )
        found.named("permutation", {}, order=order)
    elif kind in ("ActNorm", "AffineConstFlow"):
        tensors = {"log_scale": array(layer.s).ravel(), "shift": array(layer.t).ravel()}
        found.named("actnorm", tensors, inverse=True)
    elif kind == "LULinearPermute":
        found.named("permutation", {}, order=layer.permutation._permutation.tolist())
        linear = layer.linear
        tensors = {
            "lower": array(linear.lower_entries),
            "upper": array(linear.upper_entries),
            "log_diagonal": np.log(np.logaddexp(0, array(linear.unconstrained_upper_diag)) + linear.eps),
            "sign": np.ones(size),
            "bias": array(linear.bias),
        }
        found.named("lu_linear", tensors, inverse=False)
    elif kind == "CoupledRationalQuadraticSpline":
        add_nflows(found, layer.prqct, "relu")
    elif kind == "MaskedAffineFlow":
        constant = array(layer.b).ravel() > 0
        b = np.flatnonzero(~constant)
        networks = {
            f"{head}_network": mlp(linears_of(net.net), "relu")
            for head, net in (("scale", layer.s), ("translation", layer.t))
        }
        affine = {"kind": "affine", "log_scale": {"function": "identity"}}
        prefix = found.coupling(b.tolist(), affine, inverse=True, **networks)
        for head, net in (("scale", layer.s), ("translation", layer.t)):
            linears = linears_of(net.net)
            for j, linear in enumerate(linears[:-1]):
                found.dense(f"{prefix}_{head}_dense_{j}", linear, rows=constant if j == 0 else slice(None))
            found.dense(f"{prefix}_{head}", linears[-1], columns=b)
    else:
        assert kind == "AffineCouplingBlock"
        coupling, first = layer.flows[1], -(-size // 2)
        b = np.arange(first, size) if layer.flows[0].mode == "channel" else np.arange(first)
        sigmoid = {"function": "sigmoid", "low": 0.0, "high": 1.0, "offset": 2.0}
        function = {
            "exp": {"function": "identity"},
            "sigmoid": {**sigmoid, "negated": True},
            "sigmoid_inv": {**sigmoid, "negated": False},
        }[coupling.scale_map]
        transform = {"kind": "affine", "log_scale": function} if coupling.scale else {"kind": "additive"}
        linears = linears_of(coupling.param_map.net)
        prefix = found.coupling(b.tolist(), transform, inverse=True, network=mlp(linears, "relu"))
        for j, linear in enumerate(linears[:-1]):
            found.dense(f"{prefix}_coupling_dense_{j}", linear)
        if coupling.scale:
            found.dense(f"{prefix}_scale", linears[-1], columns=slice(1, None, 2))
        found.dense(f"{prefix}_translation", linears[-1], columns=slice(0, None, 2) if coupling.scale else slice(None))


def check_normflows(layers: list, size: int) -> None:
    peer = scramble(normflows.NormalizingFlow(normflows.distributions.DiagGaussian(size), layers), 10)
    for layer in layers:
        if isinstance(layer, normflows.flows.ActNorm):
            layer.data_dep_init_done = torch.tensor(1.0)
    found = Translation(size)
    for layer in reversed(layers):
        add_normflows(found, layer)
    base = {"log_scale": array(peer.q0.log_scale).ravel(), "shift": array(peer.q0.loc).ravel()}
    found.named("actnorm", base, inverse=True)
    x = unit_data(50, size, 11)
    assert_same_densities(found.flow(), peer.log_prob(torch.tensor(x)), x)
    assert_same_gradients(found.flow(), peer.log_prob, x, None)


@pytest.mark.skipif(normflows is None, reason="normflows is not installed")
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv", None])
@pytest.mark.parametrize("mode", ["shuffle", "swap"])
def test_normflows_affine_coupling_blocks(scale_map, mode) -> None:
    flows, size = normflows.flows, 5
    torch.manual_seed(3)
    layers = []
    for k in range(4):
        kept = size // 2 if k % 2 else size - size // 2
        outputs = (size - kept) * (1 if scale_map is None else 2)
        net = normflows.nets.MLP([kept, 8, 8, outputs])
        options = {"scale": scale_map is not None, "split_mode": "channel_inv" if k % 2 else "channel"}
        layers += [
            flows.AffineCouplingBlock(net, scale_map=scale_map or "exp", **options),
            flows.Permute(size, mode=mode),
            flows.ActNorm(size),
        ]
    check_normflows(layers, size)


@pytest.mark.skipif(normflows is None, reason="normflows is not installed")
def test_normflows_masked_affine_flows_and_lu() -> None:
    flows, size = normflows.flows, 5
    layers = []
    for k in range(4):
        mask = torch.tensor([1.0, 0, 1, 0, 0] if k % 2 else [0.0, 1, 0, 1, 1])
        nets = [normflows.nets.MLP([size, 8, size]) for _ in range(2)]
        layers += [flows.MaskedAffineFlow(mask, *nets), flows.LULinearPermute(size)]
    check_normflows(layers, size)


@pytest.mark.skipif(normflows is None, reason="normflows is not installed")
def test_normflows_spline_couplings() -> None:
    flows, size = normflows.flows, 5
    torch.manual_seed(4)
    layers = []
    for k in range(3):
        layers += [flows.CoupledRationalQuadraticSpline(size, 1, 8, reverse_mask=k % 2 == 1)]
        layers += [flows.LULinearPermute(size)]
    check_normflows(layers, size)
