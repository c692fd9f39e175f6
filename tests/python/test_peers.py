"""Other libraries' own tests and formulas: normflows' FlowTest, PyTorch's transforms, equal couplings in float64.

Nothing of the peers is changed: where their log-scale is another function of the network's output than ours, the
network's last step is made to give what their function takes to ours.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import nvpflow
import pytest
from oracle import unit_data

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from nvpflow.torch import FlowDistribution, FlowModule, FlowTransform  # noqa: E402

with warnings.catch_warnings():  # of libraries that are older than their dependencies
    warnings.simplefilter("ignore")
    try:
        import normflows
        from normflows.flows.flow_test import FlowTest
    except ImportError:
        normflows, FlowTest = None, object
    try:
        import zuko
        from zuko.flows.coupling import GeneralCouplingTransform
    except ImportError:
        zuko = None
    try:
        import nflows.transforms
    except ImportError:
        nflows = None

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def module_of(size, num_flows=3, hidden_sizes=(7,), activation="tanh", seed=0, dtype="float64", **options):
    options = {"standardize": False, **options}
    flow = nvpflow.build(size, num_flows, hidden_sizes, activation, dtype=dtype, seed=seed, **options)
    random = np.random.default_rng(seed)  # far from the identity, which new weights are close to
    flow.set_parameters({n: random.normal(0, 0.4, p.shape).astype(dtype) for n, p in flow.parameters().items()})
    return FlowModule(flow)


# ---- normflows' FlowTest ---------------------------------------------------------------------------------------------


class Adapter(torch.nn.Module):
    """FlowModule as a normflows flow: both directions return the log-determinant, forward goes from latent to data."""

    def __init__(self, module: FlowModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, z):
        return self.module.inverse(z, with_log_det=True)

    def inverse(self, x):
        return self.module(x)


@pytest.mark.skipif(normflows is None, reason="normflows is not installed")
class TestNormflowsFlowTest(FlowTest):
    def test_forward_and_inverse(self) -> None:
        for size in (2, 3, 8):
            for batch in (0, 1, 5):
                for standardize in (False, True):
                    for adapted in (Adapter, lambda module: normflows.flows.Reverse(Adapter(module))):
                        flow = adapted(module_of(size, standardize=standardize))
                        inputs = torch.from_numpy(unit_data(batch, size, 1, "float64"))
                        self.checkForwardInverse(flow, inputs, atol=1e-10, rtol=1e-10)

    def test_float32(self) -> None:
        flow = Adapter(module_of(6, dtype="float32"))
        self.checkForwardInverse(flow, torch.from_numpy(unit_data(5, 6, 1, "float32")), atol=1e-4, rtol=1e-4)

    def test_inside_a_model_of_normflows(self) -> None:
        module = module_of(4)
        base = normflows.distributions.DiagGaussian(4, trainable=False).double()
        model = normflows.NormalizingFlow(base, [Adapter(module)])
        x = torch.from_numpy(unit_data(9, 4, 2, "float64"))
        self.assertClose(model.log_prob(x), module.log_prob(x), **TOLERANCE)
        model.forward_kld(x).backward()
        assert all(torch.any(p.grad != 0) for p in module.parameters())


# ---- the consistency conditions of torch.distributions --------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)
FLOWS = st.builds(
    module_of,
    st.integers(2, 6),
    st.integers(1, 3),
    st.sampled_from([(3,), (4, 5)]),
    st.sampled_from(["relu", "tanh", "silu"]),
    st.integers(0, 99),
    standardize=st.booleans(),
)


def rows_of(module: FlowModule, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    size = module.to_flow().spec.input_size
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(*shape, size)))


@settings(max_examples=25, deadline=None)
@given(module=FLOWS, shape=SHAPES, seed=st.integers(0, 99), cache=st.integers(0, 1))
def test_transform_is_a_bijection_of_the_shapes_and_log_dets_it_says(module, shape, seed, cache):
    z = rows_of(module, shape, seed)
    transform = FlowTransform(module, cache)
    x = transform(z)
    assert x.shape == transform.forward_shape(z.shape) == z.shape
    assert torch.allclose(transform.inv(x.clone()), z, rtol=1e-8, atol=1e-8)
    if x.numel():  # PyTorch's own check of a vector fails on none
        assert torch.all(transform.codomain.check(x)).item()
    log_det = transform.log_abs_det_jacobian(z, x)
    assert log_det.shape == shape
    assert torch.allclose(transform.inv.log_abs_det_jacobian(x, z), -log_det, rtol=1e-9, atol=1e-9)
    for i in np.ndindex(*shape):
        jacobian = torch.autograd.functional.jacobian(transform._call, z[i])
        assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, log_det[i], rtol=1e-7, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(module=FLOWS, sample_shape=SHAPES, batch_shape=SHAPES, seed=st.integers(0, 99))
def test_distribution_has_the_shapes_and_densities_of_the_change_of_variables(module, sample_shape, batch_shape, seed):
    torch.manual_seed(seed)
    size = module.to_flow().spec.input_size
    base = torch.distributions.MultivariateNormal(torch.zeros(size).double(), torch.eye(size).double())
    plain = torch.distributions.TransformedDistribution(base, [FlowTransform(module)]).expand(batch_shape)
    ours = FlowDistribution(module).expand(batch_shape)
    assert (ours.batch_shape, ours.event_shape) == (plain.batch_shape, plain.event_shape)
    for x in (ours.rsample(sample_shape), plain.rsample(sample_shape)):
        assert x.shape == (*sample_shape, *batch_shape, size)
        assert ours.log_prob(x).shape == (*sample_shape, *batch_shape)
        if x.numel():  # PyTorch's own check of a vector fails on none
            assert torch.all(ours.support.check(x)).item()
            assert torch.allclose(ours.log_prob(x), plain.log_prob(x), rtol=1e-9, atol=1e-9)


# ---- the same couplings, by others ----------------------------------------------------------------------------------


class Conditioner(torch.nn.Module):
    """The network of one of our couplings in PyTorch: `arrange` makes of log-scale and shift what the peer's takes."""

    def __init__(self, module: FlowModule, layer: int, arrange) -> None:
        super().__init__()
        state = {n: p.detach().clone() for n, p in module.named_parameters() if n.startswith(f"flow_{layer}_")}
        self.ours = {name: torch.nn.Parameter(value) for name, value in state.items()}
        for name, parameter in self.ours.items():
            self.register_parameter(name.replace(".", "_"), parameter)
        self.layer, self.arrange = layer, arrange

    def forward(self, passed, context=None):
        passed = passed if context is None else torch.cat([passed, context], 1)

        def dense(name, inputs):
            name = f"flow_{self.layer}_{name}"
            return inputs @ self.ours[f"{name}.kernel"] + self.ours[f"{name}.bias"]

        hidden = torch.tanh(dense("coupling_dense_0", passed))
        return self.arrange(torch.tanh(dense("scale", hidden)), dense("translation", hidden))


def compare(module, conditioners, forward, inverse, context=None):
    """Hold values, inverse and all gradients of FlowModule against a peer's, whose forward gives (z, log_det)."""
    size = module.to_flow().spec.input_size
    x = torch.from_numpy(unit_data(11, size, 3, "float64")).requires_grad_()
    inputs = [x] if context is None else [x, context.requires_grad_()]
    weight = torch.linspace(-1, 1, 11, dtype=torch.float64)
    grads = []
    for call in (module, forward):
        z, log_det = call(*inputs)
        for each in inputs:
            each.grad = None
        ((z**2).sum(1) * weight + log_det * weight.flip(0)).sum().backward()
        grads.append([each.grad for each in inputs])
        torch.testing.assert_close(z, module(*inputs)[0], **TOLERANCE)
        torch.testing.assert_close(log_det, module(*inputs)[1], **TOLERANCE)
    torch.testing.assert_close(grads[0], grads[1], **TOLERANCE)
    torch.testing.assert_close(module.inverse(*inputs), inverse(*inputs), **TOLERANCE)
    theirs = {name: p.grad for conditioner in conditioners for name, p in conditioner.ours.items()}
    assert len(theirs) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        assert torch.any(theirs[name] != 0)
        torch.testing.assert_close(parameter.grad, theirs[name], **TOLERANCE)


def contexts_of(size):
    return None if size == 0 else torch.from_numpy(unit_data(11, size, 5, "float64"))


@pytest.mark.skipif(zuko is None, reason="zuko is not installed")
@pytest.mark.parametrize("context_size", [0, 3])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_zukos_couplings(size, context_size):
    module, bound = module_of(size, context_size=context_size), -math.log(1e-3)
    transforms, conditioners = [], []
    for k in range(3):
        first = torch.arange(size) < size // 2
        mask = first if k % 2 == 0 else ~first
        coupling = GeneralCouplingTransform(features=size, context=context_size, mask=mask)
        # zuko's log-scale is u / (1 + |u| / bound), whose inverse is s / (1 - |s| / bound); per column (shift, u).
        conditioner = Conditioner(module, k, lambda s, t: torch.stack([t, s / (1 - s.abs() / bound)], -1).flatten(-2))
        coupling.hyper = conditioner
        transforms.append(coupling)
        conditioners.append(conditioner)
    base = zuko.flows.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(size).double(), torch.ones(size).double(), buffer=True
    )
    flow, context = zuko.flows.Flow(transforms, base), contexts_of(context_size)

    def forward(x, c=None):
        return flow(c).transform.call_and_ladj(x)

    compare(module, conditioners, forward, lambda z, c=None: flow(c).transform.inv(z), context)
    x = torch.from_numpy(unit_data(11, size, 4, "float64"))
    torch.testing.assert_close(module.log_prob(x, context), flow(context).log_prob(x), **TOLERANCE)
    theirs, ours = flow(context), FlowDistribution(module, context)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    for rows in (x, torch.stack([x, x + 1])):
        torch.testing.assert_close(ours.log_prob(rows), theirs.log_prob(rows), **TOLERANCE)


@pytest.mark.skipif(nflows is None, reason="nflows is not installed")
@pytest.mark.parametrize("context_size", [0, 3])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_nflows_couplings(size, context_size):
    """Its scale sigmoid(u + 2) + 0.001 stays below one: its own affine layer behind each coupling makes up for that."""
    module, shift = module_of(size, context_size=context_size), 1.5

    def arrange(s, t):
        scale = torch.exp(s - shift) - 1e-3
        return torch.cat([t * math.exp(-shift), torch.logit(scale) - 2], 1)

    transforms, conditioners = [], []
    for k in range(3):
        first = torch.arange(size) < size // 2
        transformed = ~first if k % 2 == 0 else first
        conditioner = Conditioner(module, k, arrange)
        conditioners.append(conditioner)
        stretch = torch.exp(shift * transformed.double())
        transforms += [
            nflows.transforms.AffineCouplingTransform(transformed.int(), lambda *_, c=conditioner: c),
            nflows.transforms.PointwiseAffineTransform(torch.zeros(size).double(), stretch),
        ]
    flow = nflows.transforms.CompositeTransform(transforms)
    compare(module, conditioners, flow, lambda z, c=None: flow.inverse(z, c)[0], contexts_of(context_size))


@pytest.mark.skipif(normflows is None, reason="normflows is not installed")
@pytest.mark.parametrize("size", [2, 6])
def test_normflows_couplings(size):
    """Its forward runs from latent to data; run the other way round it is ours. Columns are (shift, log-scale)."""
    module = module_of(size)
    conditioners, flows = [], []
    for k in range(3):
        conditioner = Conditioner(module, k, lambda s, t: torch.stack([t, s], -1).flatten(-2))
        conditioners.append(conditioner)
        swap = [normflows.flows.Permute(size, mode="swap")] * (k % 2)
        flows += [*swap, normflows.flows.AffineCouplingBlock(conditioner), *swap]

    def run(values, method, order):
        log_det = 0
        for flow in order:
            values, part = getattr(flow, method)(values)
            log_det = log_det + part
        return values, log_det

    compare(
        module,
        conditioners,
        lambda x: run(x, "forward", flows),
        lambda z: run(z, "inverse", flows[::-1])[0],
    )
