"""nvpflow.importers: flows of normflows and FrEIA, and those made of them, compute the same.

As in test_importers.py the comparison is the test's own.
"""

from __future__ import annotations

import warnings

import numpy as np
import nvpflow
import pytest
from nvpflow.importers import from_freia, from_normflows
from oracle import unit_data

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn = torch.nn

with warnings.catch_warnings():  # of libraries that are older than their dependencies
    warnings.simplefilter("ignore")
    try:
        import normflows
    except ImportError:
        normflows = None
    try:
        import FrEIA.framework as freia
        import FrEIA.modules as modules
    except ImportError:
        freia = modules = None

needs_normflows = pytest.mark.skipif(normflows is None, reason="normflows is not installed")
needs_freia = pytest.mark.skipif(freia is None, reason="FrEIA is not installed")
pytestmark = [  # of the libraries, about what they rest on
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using non-full backward hooks:FutureWarning"),
]
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _doubles():
    """Let the peers be float64 from the start, and the same each time."""
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002  FrEIA draws permutations from it
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scrambled(model, scale=0.2):
    """The model with random weights, and statistics as after training; matrices that must be orthogonal stay."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("weights"):
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("data_dep_init_done"):
                buffer.fill_(1)
    for module in model.modules():
        if hasattr(module, "init_on_next_batch"):
            module.init_on_next_batch = False
    return model.double().eval()


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    ours, theirs = (np.where(ours == theirs, 0, values) for values in (ours, theirs))  # infinities, too
    np.testing.assert_array_less(np.abs(ours - theirs), TOLERANCE * (1 + np.abs(theirs)))


def rows_and_context(flow, rows):
    size = flow.spec.context_size
    x = unit_data(64, flow.spec.input_size, 4, "float64") if rows is None else rows
    return x, (unit_data(64, size, 5, "float64") if size else None)


# -------------------------------------------------------------------------------------------------------- normflows


def net(inputs, outputs, **options):
    return normflows.nets.MLP([inputs, 12, 10, outputs], **options)


def same_as_normflows(flows, size, q0=None, conditional=False, rows=None):
    kind = normflows.ConditionalNormalizingFlow if conditional else normflows.NormalizingFlow
    model = scrambled(kind(q0 or normflows.distributions.base.DiagGaussian(size), flows))
    flow = from_normflows(model, dtype="float64")
    x, c = rows_and_context(flow, rows)
    given = [] if c is None else [torch.from_numpy(c)]
    close(flow.log_prob(x, context=c), model.log_prob(torch.from_numpy(x), *given))
    assert flow.import_report.verdict == "exact", flow.import_report
    assert flow.import_report.library == "normflows"
    return flow


@needs_normflows
@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
def test_blocks_of_normflows(scale_map, size):
    first = -(-size // 2)
    flows = []
    for mode in ("shuffle", "swap"):
        flows += [
            normflows.flows.AffineCouplingBlock(net(first, 2 * (size - first), leaky=0.01), scale_map=scale_map),
            normflows.flows.ActNorm(size),
            normflows.flows.Permute(size, mode),
            normflows.flows.AffineCouplingBlock(
                net(size - first, 2 * first), scale_map=scale_map, split_mode="channel_inv"
            ),
            normflows.flows.AffineCouplingBlock(net(first, size - first), scale=False),
        ]
    flow = same_as_normflows(flows, size)
    assert flow.spec.layers[0].inverse
    assert flow.import_report.layers[0].path == "flow.flows[9]"


@needs_normflows
def test_checkerboards_of_normflows():
    modes = ("checkerboard", "checkerboard_inv")
    same_as_normflows([normflows.flows.AffineCouplingBlock(net(2, 4), split_mode=mode) for mode in modes], 4)


@needs_normflows
def test_masked_flows_and_matrices_of_normflows():
    mask = torch.tensor([1.0, 0, 1, 0, 0])
    bounded = net(5, 5, output_fn="tanh", output_scale=2.0, score_scale=0.5)
    flow = same_as_normflows(
        [
            normflows.flows.MaskedAffineFlow(mask, net(5, 5), bounded),
            normflows.flows.MaskedAffineFlow(1 - mask, t=net(5, 5)),
            normflows.flows.MaskedAffineFlow(mask, s=net(5, 5, output_fn="tanh")),
            normflows.flows.InvertibleAffine(5),
            normflows.flows.InvertibleAffine(5, use_lu=False),
            normflows.flows.base.Reverse(normflows.flows.LULinearPermute(5)),
            normflows.flows.AffineConstFlow(5),
        ],
        5,
    )
    coupling = flow.spec.layers[-2]  # before the base's ActNorm
    assert coupling.transform == nvpflow.layers.Affine("tanh", factor=2.0, divisor=2.0)
    assert coupling.scale_network == nvpflow.layers.MLP((12, 10), "relu")


@needs_normflows
@pytest.mark.parametrize("context", [None, 3])
def test_splines_of_normflows(context):
    def spline(**options):
        return normflows.flows.CoupledRationalQuadraticSpline(5, 2, 12, num_context_channels=context, **options)

    flows = [spline(), normflows.flows.LULinearPermute(5), spline(num_bins=4, tail_bound=2.0, reverse_mask=True)]
    same_as_normflows(flows, 5, conditional=context is not None)


@needs_normflows
def test_bases_of_normflows():
    bases = normflows.distributions.base
    splines = [normflows.flows.CoupledRationalQuadraticSpline(4, 1, 12, tails=None, reverse_mask=r) for r in (0, 1)]
    rows = np.random.default_rng(0).uniform(size=(64, 4))
    flow = same_as_normflows(splines, 4, bases.Uniform(4, 0.0, 1.0), rows=rows)
    assert flow.spec.base == nvpflow.layers.Uniform(0.0, 1.0)
    scales, weights = np.random.default_rng(1).uniform(0.5, 2, size=(3, 4)), [1.0, 2.0, 4.0]
    mixture = bases.GaussianMixture(3, 4, scale=scales, weights=weights)
    flow = same_as_normflows([normflows.flows.CoupledRationalQuadraticSpline(4, 1, 12)], 4, mixture)
    assert flow.spec.base == nvpflow.layers.Mixture(3)
    log_scales = mixture.log_scale.detach().numpy()[0]  # which are others by now
    np.testing.assert_allclose(flow.parameters()["base.log_scales"], log_scales, rtol=1e-6)
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8))
    flows = [normflows.flows.CoupledRationalQuadraticSpline(4, 1, 12, num_context_channels=3)]
    flow = same_as_normflows(flows, 4, bases.ConditionalDiagGaussian(4, encoder), conditional=True)
    assert flow.spec.context_size == 3


@needs_normflows
def test_what_normflows_has_and_nvpflow_has_not_is_refused():
    kinds, bases = normflows.flows, normflows.distributions.base
    block = kinds.AffineCouplingBlock
    normal = bases.DiagGaussian(4)
    mask = torch.tensor([1.0, 0, 1, 0])
    for flows, q0, message in (
        ([kinds.LULinearPermute(4)], bases.GaussianPCA(4, 2), r"flow\.q0 is a GaussianPCA, .* normal, uniform"),
        ([kinds.BatchNorm()], normal, r"flow\.flows\[0\] is a BatchNorm, .*batch at hand.*ActNorm"),
        ([block(net(2, 4)), kinds.Planar((4,))], normal, r"flow\.flows\[1\] is a Planar, .*no closed inverse"),
        ([kinds.AutoregressiveRationalQuadraticSpline(4, 1, 8)], normal, "D passes one way; train couplings"),
        ([kinds.CircularCoupledRationalQuadraticSpline(4, 1, 8, [0])], normal, "circular splines have no counterpart"),
        ([kinds.ActNorm(4)], normal, "an ActNorm that no batch has initialized yet"),
        ([block(nn.Conv1d(2, 4, 1))], normal, r"flow\.flows\[0\]\.flows\[1\]\.param_map is a Conv1d"),
        ([block(net(2, 4, output_fn="tanh"))], normal, "a Tanh behind the last Linear, expected a linear last layer"),
        ([kinds.MaskedAffineFlow(mask, s=net(4, 4, output_fn="relu"))], normal, "a ReLU behind the last Linear of s"),
        ([kinds.MaskedAffineFlow(0.5 * mask, t=net(4, 4))], normal, r"flow\.flows\[0\]\.b is a mask"),
        ([kinds.LULinearPermute(4)], normal, "has no coupling, expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            from_normflows(normflows.NormalizingFlow(q0, flows))
    with pytest.raises(TypeError, match=r"model is builtins\.int, expected a normflows\.NormalizingFlow"):
        from_normflows(3)


# ------------------------------------------------------------------------------------------------------------ FrEIA


def subnet(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.BatchNorm1d(12),
        nn.Linear(12, 10),
        nn.ReLU(),
        nn.Linear(10, outputs),
    )


def chain(size, *parts):
    """A SequenceINN of (class, arguments), where condition=C puts a module under so many numbers."""
    model = freia.SequenceINN(size)
    for kind, given in parts:
        options = dict(given)
        count = options.pop("condition", None)
        if count is not None:
            options |= {"cond": 0, "cond_shape": (count,)}
        model.append(kind, **options)
    return model


def same_as_freia(model, conditions=None, **options):
    flow = from_freia(scrambled(model), dtype="float64", **options)
    x, c = rows_and_context(flow, None)
    given = {} if c is None else {"c": [torch.from_numpy(part) for part in np.split(c, conditions or [], axis=1)]}
    z, log_det = model(torch.from_numpy(x), **given)
    ours, our_log_det = flow.forward(x, context=c)
    close(ours, z)
    close(our_log_det, log_det.expand(len(x)))
    close(flow.inverse(z.detach().numpy(), context=c), model(z, rev=True, **given)[0])
    assert flow.import_report.verdict == "exact", flow.import_report
    assert flow.import_report.library == "FrEIA"
    return flow


@needs_freia
@pytest.mark.parametrize("condition", [None, 2])
@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("clamp", ["ATAN", "TANH", "SIGMOID"])
def test_blocks_of_freia(clamp, size, condition):
    given = {"subnet_constructor": subnet, "clamp": 1.5, "clamp_activation": clamp, "condition": condition}
    flow = same_as_freia(
        chain(
            size,
            (modules.GLOWCouplingBlock, given),
            (modules.PermuteRandom, {}),
            (modules.RNVPCouplingBlock, given),
            (modules.ActNorm, {}),
            (modules.AffineCouplingOneSided, given | {"split_len": 1}),
        )
    )
    assert [type(layer).__name__ for layer in flow.spec.layers].count("Coupling") == 5
    expected = {
        "ATAN": nvpflow.layers.Affine("atan", factor=0.636 * 1.5, divisor=1.0),
        "TANH": nvpflow.layers.Affine("tanh", factor=1.5, divisor=1.0),
        "SIGMOID": nvpflow.layers.Affine("tanh", factor=1.5, divisor=2.0),
    }
    assert flow.spec.layers[0].transform == expected[clamp]
    assert flow.import_report.assumed == ("latents are standard normal: base=Normal()",)
    assert any("BatchNorm1d" in note for note in flow.import_report.folded)
    assert any("dropout" in note for note in flow.import_report.dropped)


@needs_freia
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learned_householder_permutation": 2},
        {"reverse_permutation": True},
        {"global_affine_type": "EXP", "affine_clamping": 1.0},
        {"global_affine_type": "SIGMOID"},
    ],
)
@pytest.mark.parametrize("condition", [None, 2])
def test_blocks_in_one_of_freia(options, condition):
    given = {"subnet_constructor": subnet, "condition": condition, **options}
    flow = same_as_freia(chain(5, *[(modules.AllInOneBlock, given)] * 2))
    (coupling, *_) = (layer for layer in flow.spec.layers if isinstance(layer, nvpflow.layers.Coupling))
    bound = options.get("affine_clamping", 2.0)
    assert coupling.transform == nvpflow.layers.Affine("tanh", factor=bound, divisor=1.0)


@needs_freia
def test_the_clamp_of_a_block_is_found_by_calling_it():
    """Versions of FrEIA that are called alike differ in it."""
    model = chain(4, *[(modules.AllInOneBlock, {"subnet_constructor": subnet, "affine_clamping": 1.5})] * 2)

    def affine(self, x, a, rev=False):
        a = 0.1 * a
        s = self.clamp * torch.tanh(a[:, : x.shape[1]] / self.clamp)
        t = a[:, x.shape[1] :]
        return ((x - t) * torch.exp(-s), -s.sum(1)) if rev else (x * torch.exp(s) + t, s.sum(1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules.AllInOneBlock, "_affine", affine)
        flow = same_as_freia(model)
        assert flow.spec.layers[0].transform == nvpflow.layers.Affine("tanh", bound=1.5)
        patch.setattr(modules.AllInOneBlock, "_affine", lambda self, x, a, rev=False: (x, torch.sin(a).sum(1)))
        with pytest.raises(ValueError, match=r"flow\.module_list\[0\]\._affine is another function"):
            from_freia(model)


@needs_freia
def test_soft_permutations_of_freia_are_close():
    """It counts log|det| of a float32 rotation as 0, and its inverse as the transpose."""
    model = scrambled(chain(5, (modules.AllInOneBlock, {"subnet_constructor": subnet, "permute_soft": True})).float())
    flow = from_freia(model, dtype="float64")
    assert flow.import_report.verdict == "close"
    x = unit_data(64, 5, 4, "float64")
    np.testing.assert_allclose(flow.forward(x)[0], model.double()(torch.from_numpy(x))[0].detach(), atol=1e-7)


@needs_freia
def test_linear_layers_of_freia():
    given = {"subnet_constructor": subnet}
    matrix, offset = torch.eye(4) + 0.3 * torch.randn(4, 4), torch.randn(4)
    same_as_freia(
        chain(
            4,
            (modules.NICECouplingBlock, given),
            (modules.OrthogonalTransform, {}),
            (modules.HouseholderPerm, {"n_reflections": 3}),
            (modules.HouseholderPerm, {"n_reflections": 2, "fixed": True}),
            (modules.FixedLinearTransform, {"M": matrix, "b": offset}),
            (modules.LearnedElementwiseScaling, {}),
        )
    )


@needs_freia
def test_modules_of_freia_may_differ_in_what_they_are_conditioned_on():
    given = {"subnet_constructor": subnet}
    flow = same_as_freia(
        chain(4, (modules.GLOWCouplingBlock, given), (modules.ConditionalAffineTransform, given | {"condition": 3}))
    )
    assert flow.spec.context_size == 3
    nodes = [freia.InputNode(4, name="in")]
    first, second = freia.ConditionNode(2, name="first"), freia.ConditionNode(3, name="second")
    for i, conditions in enumerate(([first], [second, first])):
        nodes.append(freia.Node(nodes[-1], modules.GLOWCouplingBlock, given, conditions=conditions, name=f"block {i}"))
        nodes.append(freia.Node(nodes[-1], modules.PermuteRandom, {}, name=f"mixed {i}"))
    model = freia.GraphINN([*nodes, freia.OutputNode(nodes[-1], name="out"), first, second])
    flow = same_as_freia(model, conditions=[2])
    assert flow.spec.context_size == 5
    assert flow.import_report.layers[0].path == "flow.node_list['block 0']"


@needs_freia
def test_the_base_of_freia_is_given():
    model = scrambled(chain(4, (modules.NICECouplingBlock, {"subnet_constructor": subnet})))
    base = nvpflow.layers.Uniform(-6, 6)
    flow = from_freia(model, base=base, dtype="float64")
    assert flow.spec.base == base
    assert flow.import_report.assumed == ("latents are uniform from -6 to 6: base=Uniform(-6.0, 6.0)",)


@needs_freia
def test_what_freia_has_and_nvpflow_has_not_is_refused():
    given = {"subnet_constructor": subnet}
    gin = r"is an AllInOneBlock with gin_block=True, expected gin_block=False"
    crooked = chain(4, (modules.GLOWCouplingBlock, given), (modules.OrthogonalTransform, {}))
    with torch.no_grad():
        crooked.module_list[1].weights += 0.1
    for model, message in (
        (chain(4, (modules.GINCouplingBlock, given)), r"flow\.module_list\[0\] is a GINCouplingBlock, .* GLOWCoupling"),
        (chain(4, (modules.AllInOneBlock, given | {"gin_block": True})), gin),
        (chain(4, (modules.IResNetLayer, {})), "is an IResNetLayer, .*no closed inverse"),
        (chain(4, (modules.ActNorm, {})), "an ActNorm that no batch has initialized yet"),
        (crooked, r"flow\.module_list\[1\]\.weights is off an orthogonal matrix by .*orth_correction"),
        (
            chain(4, (modules.GLOWCouplingBlock, given | {"clamp_activation": torch.sin})),
            r"flow\.module_list\[0\]\.f_clamp is another function, expected what computes 0\.636 atan",
        ),
        (chain(3, (modules.PermuteRandom, {})), "has no coupling"),
    ):
        with pytest.raises(ValueError, match=message):
            from_freia(model)
    with pytest.raises(TypeError, match="expected a SequenceINN or GraphINN of FrEIA"):
        from_freia(nn.Linear(2, 2))
