"""nvpflow.importers: flows of other libraries and those made of them compute the same.

The comparison here is the test's own, at rows of its own: the report's is what is tested. Weights are random, for new
ones are zero where it matters.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import nvpflow
import nvpflow.cli
import pytest
from nvpflow.importers import ImportReport, ParityError
from oracle import unit_data

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

with warnings.catch_warnings():  # of libraries that are older than their dependencies
    warnings.simplefilter("ignore")
    try:
        import zuko
        from zuko.flows.coupling import GeneralCouplingTransform
        from zuko.transforms import AdditiveTransform, MonotonicRQSTransform
    except ImportError:
        zuko = None
    try:
        import nflows
        from nflows import distributions, flows, transforms
        from nflows.nn import nets
    except ImportError:
        nflows = None

needs_zuko = pytest.mark.skipif(zuko is None, reason="zuko is not installed")
needs_nflows = pytest.mark.skipif(nflows is None, reason="nflows is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.qr is deprecated"),
    pytest.mark.filterwarnings("ignore:Inputs to the softmax are not scaled down"),
]

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _doubles():
    """Let the peers be float64 from the start: theirs would else be converted, and some constants of theirs are not."""
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scrambled(model, scale=0.3, seed=0):
    """The model with random weights, and running statistics as after training; in the mode for use."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += scale * torch.randn(buffer.shape, generator=generator)
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def close(ours, theirs, tolerance=TOLERANCE):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    ours, theirs = (np.where(ours == theirs, 0, values) for values in (ours, theirs))  # infinities, too
    np.testing.assert_array_less(np.abs(ours - theirs), tolerance * (1 + np.abs(theirs)))


def context_of(flow, rows=64):
    size = flow.spec.context_size
    return (None, None) if not size else (c := unit_data(rows, size, 5, "float64"), torch.from_numpy(c))


# ------------------------------------------------------------------------------------------------------------- zuko


def same_as_zuko(model, tolerance=TOLERANCE, rows=None, **options):
    flow = nvpflow.importers.from_zuko(model, dtype="float64", **options)
    x = unit_data(64, flow.spec.input_size, 4, "float64") if rows is None else rows
    c, theirs_c = context_of(flow, len(x))
    distribution, theirs = model(theirs_c), torch.from_numpy(x)
    z, log_det = distribution.transform.call_and_ladj(theirs)
    close(flow.log_prob(x, context=c), distribution.log_prob(theirs), tolerance)
    if not any(layer.path == "flow.base" for layer in flow.import_report.layers):
        close(flow.forward(x, context=c)[0], z, tolerance)
        close(flow.forward(x, context=c)[1], log_det, tolerance)
        close(flow.inverse(z.detach().numpy(), context=c), distribution.transform.inv(z), tolerance)
    report = flow.import_report
    assert report.verdict == "exact", report
    assert (report.library, report.dtype, report.unchecked) == ("zuko", "float64", None)
    return flow


@needs_zuko
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("randmask", [False, True])
def test_zukos_real_nvp(context, randmask):
    model = zuko.flows.RealNVP(6, context, transforms=4, randmask=randmask, hidden_features=(16, 12))
    flow = same_as_zuko(scrambled(model))
    assert (flow.spec.input_size, flow.spec.context_size, len(flow.spec.layers)) == (6, context, 4)
    assert flow.spec.layers[0].transform == nvpflow.layers.Affine("softsign", bound=abs(math.log(1e-3)))


@needs_zuko
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (torch.nn.ELU, "elu"),
        (torch.nn.Tanh, "tanh"),
        (torch.nn.SiLU, "silu"),
        (torch.nn.GELU, "gelu"),
        (torch.nn.LeakyReLU, "leaky_relu"),
        (partial(torch.nn.LeakyReLU, 0.0), "relu"),
        (torch.nn.Sigmoid, "sigmoid"),
        (torch.nn.Softplus, "softplus"),
    ],
)
def test_zukos_networks(activation, name):
    model = zuko.flows.NICE(
        5, 2, transforms=2, hidden_features=(8, 9, 7), activation=activation, normalize=name == "elu"
    )
    flow = same_as_zuko(scrambled(model))
    assert flow.spec.layers[0].network == nvpflow.layers.MLP((8, 9, 7), name, layer_norm=name == "elu")


@needs_zuko
def test_zukos_couplings_of_other_univariates():
    additive = {"univariate": AdditiveTransform, "shapes": [()]}
    model = zuko.flows.NICE(5, 0, transforms=3, hidden_features=(8,), **additive)
    assert isinstance(same_as_zuko(scrambled(model)).spec.layers[0].transform, nvpflow.layers.Additive)
    spline = {"univariate": partial(MonotonicRQSTransform, slope=1e-2, bound=4.0), "shapes": [(6,), (6,), (5,)]}
    model = zuko.flows.NICE(5, 2, transforms=2, hidden_features=(8, 8), **spline)
    made = same_as_zuko(scrambled(model)).spec.layers[0].transform
    assert (made.num_bins, made.tail_bound) == (6, 4.0)
    model = zuko.flows.NICE(4, 0, transforms=2, hidden_features=())
    assert same_as_zuko(scrambled(model)).spec.layers[0].network.hidden_sizes == ()


@needs_zuko
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("kind", ["MAF", "NSF"])
@pytest.mark.parametrize("features", [4, 5])
def test_zukos_autoregressive_flows_of_two_passes_are_couplings(kind, context, features):
    model = getattr(zuko.flows, kind)(
        features, context, passes=2, transforms=2, hidden_features=(12, 12), randperm=True
    )
    flow = same_as_zuko(scrambled(model))
    became = flow.import_report.layers[0].became
    assert len(became) == 2
    assert became[0].startswith("spline coupling" if kind == "NSF" else "affine softsign coupling")


@needs_zuko
def test_zukos_autoregressive_flows_without_hidden_layers():
    same_as_zuko(scrambled(zuko.flows.NSF(3, passes=2, transforms=2, hidden_features=())))


@needs_zuko
@pytest.mark.parametrize("kind", ["RealNVP", "MAF", "NSF"])
def test_zukos_flows_of_one_feature(kind):
    flow = same_as_zuko(scrambled(getattr(zuko.flows, kind)(1, 3, hidden_features=(8,))))
    assert flow.spec.layers[0].transformed in ("all", (0,))


def zukos_flow(*layers, base=None, features=4, context=0):
    """A flow of couplings with other layers before, between and behind them."""
    first = GeneralCouplingTransform(features, context, hidden_features=(8,))
    last = GeneralCouplingTransform(features, context, mask=torch.arange(features) < 2, hidden_features=(8,))
    if base is None:
        loc, scale = torch.zeros(features), torch.ones(features)
        base = zuko.flows.UnconditionalDistribution(zuko.distributions.DiagNormal, loc, scale, buffer=True)
    return zuko.flows.Flow([layers[0], first, *layers[1:], last] if layers else [first, last], base)


@needs_zuko
@pytest.mark.filterwarnings("ignore:'Unconditional' is deprecated")
def test_zukos_fixed_transforms():
    fixed, t = zuko.flows.UnconditionalTransform, zuko.transforms
    affine = torch.distributions.AffineTransform
    rotated = [fixed(t.RotationTransform, torch.randn(4, 4)), fixed(t.AdditiveTransform, torch.ones(4))]
    given = [
        fixed(affine, loc=torch.randn(4), scale=torch.rand(4) + 0.5, buffer=True),
        fixed(t.PermutationTransform, torch.tensor([2, 0, 3, 1]), buffer=True),
        fixed(t.RotationTransform, torch.randn(4, 4)),
        fixed(t.LULinearTransform, torch.randn(4, 4) + 2 * torch.eye(4)),
        fixed(affine, loc=torch.randn(4), scale=torch.tensor([1.0, -2.0, 0.5, -1.0]), buffer=True),
        fixed(t.IdentityTransform),
        fixed(t.MonotonicAffineTransform, torch.randn(4), torch.randn(4)),
        fixed(t.AdditiveTransform, torch.randn(4)),
        zuko.lazy.Unconditional(t.AdditiveTransform, torch.randn(4), buffer=True),
        GeneralCouplingTransform(4, hidden_features=(8,)).inv,
        zuko.lazy.LazyComposedTransform(*rotated).inv,
        fixed(affine, loc=torch.ones(4), scale=torch.full((4,), 2.0), buffer=True).inv,
    ]
    flow = same_as_zuko(scrambled(zukos_flow(*given), 0.1))
    kinds = [type(layer).__name__ for layer in flow.spec.layers]
    assert kinds[:2] == ["Standardize", "Coupling"]
    report = flow.import_report
    assert "flow.transform.transforms[6]" in [layer.path for layer in report.layers if layer.became == ()]
    assert report.layers[0].kind == "UnconditionalTransform(AffineTransform)"


@needs_zuko
@pytest.mark.parametrize("context", [0, 2])
def test_zukos_bases(context):
    distribution = zuko.flows.UnconditionalDistribution
    base = distribution(zuko.distributions.DiagNormal, torch.randn(4), torch.rand(4) + 0.5, buffer=False)
    model = zukos_flow(base=base, context=context)
    flow = same_as_zuko(model)
    assert flow.spec.layers[-1] == nvpflow.layers.ActNorm(inverse=True)
    uniform = distribution(zuko.distributions.BoxUniform, torch.full((4,), -9.0), torch.full((4,), 9.0), buffer=True)
    flow = same_as_zuko(zukos_flow(base=uniform, context=context))
    assert flow.spec.base == nvpflow.layers.Uniform(-9, 9)


class MadeBase(torch.nn.Module):
    """A lazy distribution of zuko by a function."""

    def __init__(self, make, *tensors):
        super().__init__()
        self.make, self.tensors = make, torch.nn.ParameterList(tensors)

    def forward(self, c=None):
        return self.make(*self.tensors)


@needs_zuko
@pytest.mark.parametrize("moved", [False, True])
def test_zukos_heavy_tails(moved):
    kinds = torch.distributions
    df, loc, scale = torch.rand(4) + 2, torch.randn(4) * moved, torch.rand(4) * moved + 1
    flow = same_as_zuko(zukos_flow(base=MadeBase(lambda *t: kinds.Independent(kinds.StudentT(*t), 1), df, loc, scale)))
    assert isinstance(flow.spec.base, nvpflow.layers.StudentT)
    np.testing.assert_allclose(np.exp(flow.parameters()["base.log_df"]), df, rtol=1e-6)
    assert (flow.spec.layers[-1] == nvpflow.layers.ActNorm(inverse=True)) == moved


@needs_zuko
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical"])
def test_zukos_mixtures(covariance, tied):
    base = zuko.mixtures.GMM(4, components=3, covariance_type=covariance, tied=tied)
    flow = same_as_zuko(zukos_flow(base=base))
    assert flow.spec.base == nvpflow.layers.Mixture(3, "full" if covariance == "full" else "diagonal")
    with torch.no_grad():
        base.phi[2][0] = math.nan
    assert "scales that are not above 0" in refuses("flow.base", zukos_flow(base=base))


@needs_zuko
def test_pytorchs_mixtures_as_zukos_bases():
    kinds = torch.distributions

    def same_family(parts):
        return lambda logits, *rest: kinds.MixtureSameFamily(kinds.Categorical(logits=logits), parts(*rest))

    logits, loc = torch.randn(3), torch.randn(3, 4)
    factors = torch.tril(torch.randn(3, 4, 4), -1) + torch.diag_embed(torch.rand(3, 4) + 0.5)
    full = MadeBase(same_family(lambda m, f: kinds.MultivariateNormal(m, scale_tril=f)), logits, loc, factors)
    assert same_as_zuko(zukos_flow(base=full)).spec.base == nvpflow.layers.Mixture(3, "full")
    diagonal = same_family(lambda m, s: kinds.Independent(kinds.Normal(m, s), 1))
    made = MadeBase(diagonal, logits, loc, torch.rand(3, 4) + 0.5)
    assert same_as_zuko(zukos_flow(base=made)).spec.base == nvpflow.layers.Mixture(3)
    cauchy = same_family(lambda m: kinds.Independent(kinds.Cauchy(m, 1.0), 1))
    refuses("flow.base", zukos_flow(base=MadeBase(cauchy, logits, loc)))
    refuses("flow.base", zukos_flow(base=zuko.mixtures.GMM(4, 2), context=2))


def refuses(path, model, library="zuko", **options):
    with pytest.raises(ValueError) as info:  # noqa: PT011
        getattr(nvpflow.importers, f"from_{library}")(model, **options)
    message = str(info.value)
    assert message.startswith(f"{path} is "), message
    assert "expected" in message
    return message


@needs_zuko
def test_what_of_zuko_is_refused_is_named_by_its_path():
    at = "flow.transform.transforms[0]"
    assert "6 passes" in refuses(at, zuko.flows.NSF(6, transforms=2))
    assert "passes=2" in refuses(at, zuko.flows.MAF(6, 2, passes=3))
    adjacency = torch.eye(3, dtype=bool) | torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)
    refuses(at, zuko.flows.Flow([zuko.flows.MaskedAutoregressiveTransform(3, adjacency=adjacency)], zukos_flow().base))
    refuses("flow.transform", zuko.flows.CNF(3))
    refuses("flow.transform", zuko.flows.GF(3))
    softclip = zuko.flows.UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=9.0)
    assert "SoftclipTransform" in refuses(f"{at}.transform", zukos_flow(softclip.inv, softclip))
    last = zuko.flows.Flow([*zukos_flow().transform.transforms, softclip], zukos_flow().base)
    refuses("flow.transform.transforms[2]", last)
    refuses(f"{at}.univariate", zuko.flows.NICE(4, univariate=lambda s, a: None))
    given = {"univariate": partial(zuko.transforms.BernsteinTransform, bound=3), "shapes": [(9,)]}
    refuses(f"{at}.univariate", zuko.flows.NICE(4, **given))
    refuses(f"{at}.hyper[1]", zuko.flows.NICE(4, activation=partial(torch.nn.ELU, 0.5)))
    refuses(f"{at}.hyper[1]", zuko.flows.NICE(4, activation=torch.nn.Hardtanh))
    refuses(f"{at}.hyper[1]", zuko.flows.NICE(4, activation=partial(torch.nn.GELU, approximate="tanh")))
    refuses(f"{at}.hyper[1]", zuko.flows.MAF(4, passes=2, residual=True))
    mixed = zukos_flow()
    mixed.transform.transforms[0].hyper = zuko.nn.MLP(2, 4, (5, 5))
    mixed.transform.transforms[0].hyper[3] = torch.nn.Tanh()
    assert "tanh" in refuses(f"{at}.hyper[3]", mixed)
    mixed.transform.transforms[0].hyper[3] = torch.nn.LayerNorm(5)
    refuses(f"{at}.hyper[3]", mixed)
    linear, relu = partial(zuko.nn.Linear, 2, 2), torch.nn.ReLU
    for layers in (
        [linear(), relu(), relu(), linear(), zuko.nn.Linear(2, 4)],
        [linear(), zuko.nn.Linear(2, 4), relu()],
    ):
        mixed.transform.transforms[0].hyper = torch.nn.Sequential(*layers)
        assert "in turns" in refuses(f"{at}.hyper", mixed)
    mixed.transform.transforms[0].hyper = torch.nn.Bilinear(2, 2, 4)
    refuses(f"{at}.hyper", mixed)
    other = zukos_flow()
    with torch.no_grad():
        other.transform.transforms[1].hyper[0].weight[0, 0] = math.nan
    assert "NaN" in refuses("flow.transform.transforms[1]", other)
    distribution = zuko.flows.UnconditionalDistribution
    several = distribution(zuko.distributions.BoxUniform, torch.zeros(4), torch.arange(1.0, 5), buffer=True)
    refuses("flow.base", zukos_flow(base=several))
    mixture = distribution(zuko.distributions.GeneralizedNormal, torch.ones(4))
    assert "normal, uniform" in refuses("flow.base", zukos_flow(base=mixture))
    sizes = zukos_flow()
    sizes.transform.transforms[1].hyper = zuko.nn.MLP(4, 4, (8,))
    assert "0 numbers of context, which all of its layers have" in refuses("flow.transform.transforms[1]", sizes)
    singular = zuko.flows.UnconditionalTransform(zuko.transforms.LULinearTransform, torch.zeros(4, 4))
    assert "singular" in refuses(at, zukos_flow(singular))
    zero = zuko.flows.UnconditionalTransform(torch.distributions.AffineTransform, loc=0.0, scale=0.0)
    refuses(at, zukos_flow(zero))


@needs_zuko
def test_networks_with_dropout():
    model = zukos_flow()
    layers = list(model.transform.transforms[0].hyper)
    model.transform.transforms[0].hyper = torch.nn.Sequential(*layers[:2], torch.nn.Dropout(0.1), layers[2])
    report = same_as_zuko(scrambled(model)).import_report
    assert report.dropped == ("dropout of p = 0.1, which acts in training only",)


@needs_zuko
def test_what_is_no_flow_of_zuko():
    for wrong in (None, 3, torch.nn.Linear(2, 2), nvpflow.build(2)):
        with pytest.raises(TypeError, match=r"^model is .*, expected a zuko.flows.Flow"):
            nvpflow.importers.from_zuko(wrong)
    for tensors in (zukos_flow().state_dict(), "model.pt"):
        with pytest.raises(TypeError, match=r"expected a zuko.flows.Flow.*; for tensors alone take from_state_dict$"):
            nvpflow.importers.from_zuko(tensors)
    with pytest.raises(ValueError, match="dtype is 'float16', expected one of float32, float64"):
        nvpflow.importers.from_zuko(zukos_flow(), dtype="float16")
    with pytest.raises(TypeError, match=r"check is 1 \(int\), expected True or False"):
        nvpflow.importers.from_zuko(zukos_flow(), check=1)


@needs_zuko
def test_the_model_stays_as_it_is_and_may_be_float32():
    torch.set_default_dtype(torch.float32)
    model = scrambled(zuko.flows.RealNVP(4, 2, hidden_features=(8,))).train()
    before = copy.deepcopy(model.state_dict())
    flow = nvpflow.importers.from_zuko(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = flow.import_report
    assert (flow.spec.dtype, report.dtype, report.verdict) == ("float32", "float32", "exact")
    assert max(vars(report.float64).values()) < 1e-10
    assert 1e-9 < report.in_dtype.log_prob < 1e-4
    x, c = unit_data(20, 4, 4, "float32"), unit_data(20, 2, 5, "float32")
    close(flow.log_prob(x, context=c), model(torch.from_numpy(c)).log_prob(torch.from_numpy(x)), 1e-4)


# ----------------------------------------------------------------------------------------------------------- nflows


def same_as_nflows(model, tolerance=TOLERANCE, *, has_inverse=True):
    flow = nvpflow.importers.from_nflows(model, dtype="float64")
    x = unit_data(64, flow.spec.input_size, 4, "float64")
    c, theirs_c = context_of(flow)
    with torch.no_grad():
        z, log_det = model._transform(torch.from_numpy(x), theirs_c)
        log_p = model.log_prob(torch.from_numpy(x), theirs_c)
    close(flow.log_prob(x, context=c), log_p, tolerance)
    if not any(layer.path == "flow._distribution" for layer in flow.import_report.layers):
        close(flow.forward(x, context=c)[0], z, tolerance)
        close(flow.forward(x, context=c)[1], log_det, tolerance)
        noise = unit_data(64, flow.spec.input_size, 6, "float64")
        back = flow.inverse(noise, context=c)
        if has_inverse:
            with torch.no_grad():
                close(back, model._transform.inverse(torch.from_numpy(noise), theirs_c)[0], tolerance)
        else:
            close(noise, model._transform(torch.from_numpy(back), theirs_c)[0], 1e-9)
    report = flow.import_report
    assert report.verdict == "exact", report
    assert report.library == "nflows"
    return flow


def residual_net(context=0, **options):
    given = {"hidden_features": 10, "context_features": context or None, **options}
    return lambda inputs, outputs: nets.ResidualNet(inputs, outputs, **given)


def nflows_flow(*layers, base=None, features=5, context=0):
    odd = torch.arange(features) % 2
    first = transforms.AffineCouplingTransform(odd, residual_net(context))
    last = transforms.AdditiveCouplingTransform(1 - odd, residual_net(context, activation=torch.tanh))
    base = distributions.StandardNormal([features]) if base is None else base
    return flows.Flow(transforms.CompositeTransform([first, *layers, last]), base)


@needs_nflows
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_nflows_simple_real_nvp(within, between, additive):
    model = flows.SimpleRealNVP(
        5, 12, 4, 2, use_volume_preserving=additive, batch_norm_within_layers=within, batch_norm_between_layers=between
    )
    flow = same_as_nflows(scrambled(model))
    report = flow.import_report
    assert len(report.folded) == within + between
    assert flow.spec.layers[0].network.block_affines == within


@needs_nflows
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("unconditional", [False, True])
def test_nflows_spline_flows(context, unconditional):
    layers = []
    for i in range(3):
        layers += [
            transforms.RandomPermutation(6),
            transforms.LULinear(6, identity_init=False),
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                torch.arange(6) % 2 == i % 2,
                residual_net(context, num_blocks=2, use_batch_norm=True, dropout_probability=0.25),
                num_bins=7,
                tails="linear",
                tail_bound=2.5,
                apply_unconditional_transform=unconditional,
            ),
        ]
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([6]))
    flow = same_as_nflows(scrambled(model, 0.15), tolerance=1e-9)
    made = flow.spec.layers[2]
    assert (made.transform.num_bins, made.transform.tail_bound, made.network.context_gates) == (7, 2.5, context > 0)
    report = flow.import_report
    assert report.dropped == ("dropout of p = 0.25, which acts in training only (6 times)",)
    assert len(report.layers) == (12 if unconditional else 9)


@needs_nflows
@pytest.mark.parametrize("context", [0, 3])
def test_nflows_other_transforms(context):
    reflect = transforms.HouseholderSequence(5, 3)
    layers = [
        transforms.PointwiseAffineTransform(torch.randn(5), torch.rand(5) + 0.5),
        transforms.PointwiseAffineTransform(0.25, 2.0),
        transforms.ReversePermutation(5),
        transforms.Permutation(torch.tensor([1, 2, 3, 4, 0])),
        transforms.ActNorm(5),
        transforms.BatchNorm(5),
        transforms.SVDLinear(5, num_householder=4),
        transforms.QRLinear(5, num_householder=3),
        transforms.NaiveLinear(5),
        reflect,
        transforms.IdentityTransform(),
        transforms.InverseTransform(transforms.CompositeTransform([transforms.LULinear(5), transforms.ActNorm(5)])),
        transforms.InverseTransform(transforms.AffineCouplingTransform([1, 1, 0, 0, 0], residual_net(context))),
        transforms.PiecewiseRationalQuadraticCDF(5, num_bins=4, tails="linear", tail_bound=2.0),
    ]
    model = scrambled(nflows_flow(*layers, context=context))
    flow = same_as_nflows(model, has_inverse=False)
    kinds = [type(layer).__name__ for layer in flow.spec.layers]
    assert kinds[1:3] == ["Standardize", "Standardize"]
    assert flow.import_report.float64.x is None  # torch.solve is gone, which NaiveLinear's inverse calls
    assert "unknown" in repr(flow.import_report)


@needs_nflows
def test_nflows_mlps():
    def net(inputs, outputs):
        return Mlp([inputs], [outputs], [9, 8], activation=torch.nn.functional.silu)

    class Mlp(nets.MLP):
        def forward(self, inputs, context=None):
            return super().forward(inputs)

    odd = torch.arange(4) % 2
    layers = [transforms.AffineCouplingTransform(odd, net), transforms.AffineCouplingTransform(1 - odd, net)]
    spline = {"num_bins": 5, "tails": "linear", "tail_bound": 3.0}
    layers.append(transforms.PiecewiseRationalQuadraticCouplingTransform(odd, net, **spline))
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))
    flow = same_as_nflows(scrambled(model))
    assert flow.spec.layers[0].network == nvpflow.layers.MLP((9, 8), "silu")


@needs_nflows
@pytest.mark.parametrize("context", [0, 3])
def test_nflows_bases(context):
    class Diagonal(distributions.DiagonalNormal):
        pass

    assert distributions.DiagonalNormal([5])._log_z is not None
    flow = same_as_nflows(scrambled(nflows_flow(base=distributions.DiagonalNormal([5]), context=context)))
    assert flow.spec.layers[-1] == nvpflow.layers.ActNorm(inverse=True)
    if context:
        base = distributions.ConditionalDiagonalNormal([5], torch.nn.Linear(context, 10))
        flow = same_as_nflows(scrambled(nflows_flow(base=base, context=context)))
        assert flow.spec.layers[-1].transformed == "all"
        base._context_encoder = torch.nn.Tanh()
        refuses("flow._distribution._context_encoder", nflows_flow(base=base, context=context), "nflows")
    refuses("flow._distribution", nflows_flow(base=Diagonal([5]), context=context), "nflows")


@needs_nflows
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (lambda u: torch.sigmoid(u + 2) + 1e-3, ("sigmoid", 1.001)),
        (lambda u: (torch.nn.functional.softplus(u) + 1e-3).clamp(0, 3), ("softplus", 3.0)),
        (torch.exp, ("identity", None)),
        (lambda u: torch.exp(6 * (torch.sigmoid(u) - 0.5)), ("tanh", None)),
    ],
)
def test_scale_activations_of_forks_of_nflows(scale, expected):
    class AffineCouplingTransform(transforms.AffineCouplingTransform):
        scale_activation = staticmethod(scale)

        def _scale_and_shift(self, params):
            count = self.num_transform_features
            return self.scale_activation(params[:, count:]), params[:, :count]

    layers = [AffineCouplingTransform(torch.arange(4) % 2, residual_net())]
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))
    made = same_as_nflows(scrambled(model)).spec.layers[0].transform
    assert (made.function, made.high) == expected
    if made.function == "tanh":
        assert (made.factor, made.divisor) == (pytest.approx(3), 2)


@needs_nflows
def test_what_of_nflows_is_refused_is_named_by_its_path():
    at = "flow._transform._transforms"
    refuses(f"{at}[1]", nflows_flow(transforms.Tanh()), "nflows")
    refuses(f"{at}[1]", nflows_flow(transforms.Logit()), "nflows")
    masked = transforms.MaskedAffineAutoregressiveTransform(5, 8)
    assert "D passes" in refuses(f"{at}[1]", nflows_flow(masked), "nflows")
    quadratic = transforms.PiecewiseQuadraticCouplingTransform([1, 0, 0, 0, 0], residual_net(), tails="linear")
    refuses(f"{at}[1]", nflows_flow(quadratic), "nflows")
    autoregressive = flows.MaskedAutoregressiveFlow(5, 8, 2, 2)
    message = refuses("flow._transform._transforms[1]", autoregressive, "nflows")
    assert "is a MaskedAffineAutoregressiveTransform" in message, message
    assert "it takes D passes one way" in message, message
    model = flows.Flow(transforms.LULinear(3), distributions.StandardNormal([3]))
    refuses("flow._transform", model, "nflows")
    with_net = flows.Flow(nflows_flow(context=2)._transform, distributions.StandardNormal([5]), torch.nn.Linear(4, 2))
    assert "_embedding_net" in refuses("flow._embedding_net", with_net, "nflows")
    other = nflows_flow(context=2)
    other._transform._transforms[1] = transforms.AdditiveCouplingTransform([1, 0, 0, 0, 0], residual_net())
    assert "0 numbers of context, expected 2" in refuses(f"{at}[1]", other, "nflows").replace("under ", "")
    conv = nflows_flow()
    conv._transform._transforms[0].transform_net = torch.nn.Conv1d(2, 2, 1)
    refuses(f"{at}[0].transform_net", conv, "nflows")
    block = nflows_flow()
    block._transform._transforms[0].transform_net.blocks[1] = torch.nn.Linear(10, 10)
    refuses(f"{at}[0].transform_net.blocks[1]", block, "nflows")
    leaky = nflows_flow()
    leaky._transform._transforms[0].transform_net.blocks[0].activation = partial(torch.nn.functional.elu, alpha=2.0)
    refuses(f"{at}[0].transform_net.blocks[0].activation", leaky, "nflows")
    with pytest.raises(TypeError, match=r"^model is .*Linear, expected an nflows.flows.Flow"):
        nvpflow.importers.from_nflows(torch.nn.Linear(2, 2))


@needs_nflows
def test_splines_on_the_unit_interval_with_a_uniform_base():
    class Uniform(distributions.Distribution):  # as glasflow has it
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.zeros(4))
            self.register_buffer("high", torch.ones(4))

        def _log_prob(self, inputs, context):
            return torch.where(((inputs >= 0) & (inputs < 1)).all(1), 0.0, -torch.inf)

    Uniform.__name__ = "MultivariateUniform"
    odd = torch.arange(4) % 2
    layers = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(mask, residual_net(), num_bins=5, tails=None)
        for mask in (odd, 1 - odd)
    ]
    model = scrambled(flows.Flow(transforms.CompositeTransform(layers), Uniform()))
    flow = nvpflow.importers.from_nflows(model, dtype="float64")
    assert flow.import_report.verdict == "exact"
    assert flow.spec.base == nvpflow.layers.Uniform(0, 1)
    x = np.random.default_rng(0).uniform(size=(50, 4))
    close(flow.log_prob(x), model.log_prob(torch.from_numpy(x)))


def fork_of_nflows(name):
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("scale", ["nflows", "nflows_general", "log3"])
def test_glasflows_real_nvp(context, scale):
    build = fork_of_nflows("glasflow.flows").RealNVP
    options = {"batch_norm_between_transforms": True, "linear_transform": "lu", "scale_activation": scale}
    model = build(5, 3, n_conditional_inputs=context, n_neurons=8, batch_norm_within_blocks=True, **options)
    flow = nvpflow.importers.from_nflows(scrambled(model), dtype="float64")
    report = flow.import_report
    assert (report.verdict, report.library) == ("exact", "glasflow")
    x = unit_data(64, 5, 4, "float64")
    c, theirs = context_of(flow)
    close(flow.log_prob(x, context=c), model.log_prob(torch.from_numpy(x), conditional=theirs))


def test_glasflows_splines_of_a_uniform_base():
    build = fork_of_nflows("glasflow.flows").CouplingNSF
    model = scrambled(build(4, 3, n_neurons=8, linear_transform="permutation", distribution="uniform"))
    flow = nvpflow.importers.from_nflows(model, dtype="float64")
    assert flow.import_report.verdict == "exact"
    assert flow.spec.base == nvpflow.layers.Uniform(0, 1)
    x = np.random.default_rng(0).uniform(size=(50, 4))
    close(flow.log_prob(x), model.log_prob(torch.from_numpy(x)))


@pytest.mark.parametrize("net", ["mlp", "resnet"])
def test_nessais_real_nvp(net):
    build = fork_of_nflows("nessai.flows.realnvp").RealNVP
    base = fork_of_nflows("nessai.flows.distributions").MultivariateNormal((4,), var=2.25)
    model = scrambled(build(4, 8, 3, 2, net=net, distribution=base, activation=torch.tanh))
    flow = nvpflow.importers.from_nflows(model, dtype="float64")
    assert (flow.import_report.verdict, flow.import_report.library) == ("exact", "nessai")
    x = unit_data(64, 4, 4, "float64")
    close(flow.log_prob(x), model.log_prob(torch.from_numpy(x)))


# --------------------------------------------------------------------------------------------------------- reports


@needs_zuko
def test_a_wrong_import_is_found_out(monkeypatch):
    """Any of: other weights, another constant, heads the wrong way round."""
    from nvpflow.importers import _zuko

    model = scrambled(zuko.flows.RealNVP(4, 2, hidden_features=(8,)))
    heads = _zuko.affine_heads

    def turned(last, *, scale, translation):
        return heads(last, scale=translation, translation=scale)

    def other_weights(last, *, scale, translation):
        return heads(last.scaled(1 + 1e-4), scale=scale, translation=translation)

    for wrong in (turned, other_weights):
        with monkeypatch.context() as patch:
            patch.setattr(_zuko, "affine_heads", wrong)
            with pytest.raises(ParityError, match=r"different from its source: log p differs by .*check=False") as info:
                nvpflow.importers.from_zuko(model)
            flow = nvpflow.importers.from_zuko(model, check=False)
        assert info.value.report == flow.import_report
        assert flow.import_report.verdict == "different"
        assert not flow.import_report.ok
        assert pickle.loads(pickle.dumps(info.value)).report == info.value.report
    with monkeypatch.context() as patch:
        patch.setattr(_zuko, "_SLOPE", 1.0001e-3)
        with pytest.raises(ParityError):
            nvpflow.importers.from_zuko(model)
    assert nvpflow.importers.from_zuko(model).import_report.verdict == "exact"


@needs_zuko
def test_nearly_equal_flows_are_close(monkeypatch):
    from nvpflow.importers import _zuko

    monkeypatch.setattr(_zuko, "_SLOPE", 1e-3 * (1 + 1e-6))
    model = scrambled(zuko.flows.RealNVP(4, hidden_features=(8,)))
    report = nvpflow.importers.from_zuko(model).import_report
    assert report.verdict == "close"
    assert report.ok


@needs_zuko
def test_a_source_that_cannot_compute_some_rows_or_any(monkeypatch):
    from nvpflow.importers._zuko import ZukoPeer

    model = scrambled(zuko.flows.RealNVP(4, hidden_features=(8,)))
    log_prob = ZukoPeer.log_prob

    def fails_above(limit):
        def call(self, x, context):
            assert not np.any(x[:, 0] > limit)
            return log_prob(self, x, context)

        return call

    monkeypatch.setattr(ZukoPeer, "log_prob", fails_above(1.0))
    report = nvpflow.importers.from_zuko(model).import_report
    assert report.verdict == "exact"
    assert 10 < report.failed_rows < 200
    assert f"the source failed on {report.failed_rows}" in repr(report)
    monkeypatch.setattr(ZukoPeer, "log_prob", fails_above(-1e9))
    with pytest.raises(ValueError, match="the source fails on every row: AssertionError"):
        nvpflow.importers.from_zuko(model)
    monkeypatch.setattr(ZukoPeer, "log_prob", lambda self, x, c: np.full(len(x), -np.inf))
    with pytest.raises(ParityError, match="256 rows are finite on one side only"):
        nvpflow.importers.from_zuko(model)


@pytest.fixture
def imported():
    if zuko is None:
        pytest.skip("zuko is not installed")
    return nvpflow.importers.from_zuko(scrambled(zuko.flows.RealNVP(4, 2, hidden_features=(8,))))


def test_a_report_goes_where_its_weights_go(imported, tmp_path):
    report = imported.import_report
    assert isinstance(report, ImportReport)
    imported.save(tmp_path / "model")
    for same in (
        nvpflow.load(tmp_path / "model"),
        copy.copy(imported),
        imported.astype("float64"),
        imported.to("cpu", weights="bfloat16"),
        pickle.loads(pickle.dumps(imported)),
    ):
        assert same.import_report == report
    plain = nvpflow.Flow(imported.spec)
    assert plain.import_report is None
    plain.swap(imported)
    assert (plain.import_report, imported.import_report) == (report, None)
    imported.reload(tmp_path / "model")
    assert imported.import_report == report
    imported.set_parameters(imported.parameters())
    assert imported.import_report is None
    with warnings.catch_warnings(action="ignore"):  # of how good it is
        plain.fit(unit_data(500, 4, 0, "float32"), context=unit_data(500, 2, 1, "float32"), epochs=1, progress=False)
    assert plain.import_report is None


def test_a_report_prints_and_comes_back_from_json(imported):
    report = imported.import_report
    assert ImportReport.from_json(report.to_json()) == report
    assert ImportReport.from_dict(json.loads(report.to_json())) == report
    text = repr(report)
    assert text.startswith(f"ImportReport: exact; from zuko {zuko.__version__} to float32\n  256 rows; condition ")
    assert "  flow.transform.transforms[2]: GeneralCouplingTransform\n    -> affine softsign coupling of 2 of 4" in text
    page = report._repr_html_()
    assert page.count("<table>") == 2
    assert "GeneralCouplingTransform" in page
    values = report.to_dict()
    for wrong in (
        [],
        {},
        values | {"verdict": "fine"},
        values | {"rows": True},
        values | {"rows": "256"},
        values | {"layers": [{}]},
        values | {"layers": [3]},
        values | {"dropped": [1]},
        values | {"float64": {"z": 1}},
        {**values, "more": 1},
    ):
        with pytest.raises(ValueError, match=r"expected|holds"):
            ImportReport.from_dict(wrong)


def test_a_report_in_a_file_is_checked_when_it_is_asked_for(imported, tmp_path):
    report = imported.import_report
    imported._set_import_report('{"verdict": "exact"}')
    imported.save(tmp_path / "model")
    with pytest.raises(ValueError, match="ImportReport holds verdict, expected verdict, library"):
        nvpflow.load(tmp_path / "model").import_report  # noqa: B018
    values = report.to_dict()
    for change in ({"condition": None}, {"float64": None}, {"verdict": "unchecked"}, {"unchecked": "for no reason"}):
        with pytest.raises(ValueError, match=r"is .* beside verdict '\w+', expected (None|a value)"):
            ImportReport.from_dict(values | change)
    with pytest.raises(ValueError, match="lists within lists"):
        ImportReport.from_json("[" * 100_000)
    for wrong in ("[]", "{", "\0"):
        with pytest.raises(ValueError, match=r"import_report: .*expected JSON"):
            imported._set_import_report(wrong)


def test_a_strangers_report_cannot_write_to_the_terminal(imported, tmp_path, capsys):
    values = imported.import_report.to_dict() | {"library": "zu\x1b[2Jko", "dropped": ["a\nb"]}
    imported._set_import_report(json.dumps(values))
    assert "\x1b" not in repr(imported.import_report)
    assert r"dropped: a\nb" in repr(imported.import_report)
    imported.save(tmp_path / "model")
    assert nvpflow.cli.main(["info", str(tmp_path / "model")]) == 0
    assert r"imported: from zu\x1b[2Jko" in capsys.readouterr().out


def test_no_peer_is_imported():
    script = """
import sys, nvpflow
assert "nvpflow.importers" not in sys.modules
nvpflow.importers.from_zuko, nvpflow.importers.from_sbi
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "jax", "zuko", "nflows", "sbi"}))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"


# ----------------------------------------------------------------------------------------------------- state dicts


def same_weights(flow, expected):
    assert flow.spec == expected.spec
    for name, values in expected.parameters().items():
        np.testing.assert_allclose(flow.parameters()[name], values, rtol=1e-13, atol=1e-15, err_msg=name)
    report = flow.import_report
    assert report.verdict == "unchecked"
    assert "not compared" in repr(report)
    return report


@needs_zuko
def test_state_dicts_of_zuko():
    spline = {"univariate": MonotonicRQSTransform, "shapes": [(6,), (6,), (5,)]}
    additive = {"univariate": AdditiveTransform, "shapes": [()]}
    for model in (
        zuko.flows.RealNVP(5, 2, randmask=True, hidden_features=(8, 7)),
        zuko.flows.NICE(4, hidden_features=(8,), normalize=True),
        zuko.flows.NICE(4, hidden_features=(), **additive),
        zuko.flows.NICE(4, 1, hidden_features=(8, 8), **spline),
        zuko.flows.NSF(5, passes=2, hidden_features=(8, 8)),
        zuko.flows.MAF(4, 2, passes=2, hidden_features=(8, 8)),
    ):
        expected = nvpflow.importers.from_zuko(scrambled(model), dtype="float64")
        tensors = model.state_dict()
        same_weights(nvpflow.importers.from_state_dict(tensors, "zuko", dtype="float64"), expected)
        arrays = {name: value.numpy() for name, value in tensors.items()}
        same_weights(nvpflow.importers.from_state_dict(arrays, library="zuko", dtype="float64"), expected)
    model = scrambled(zuko.flows.RealNVP(4, hidden_features=(8,), activation=torch.nn.SiLU))
    expected = nvpflow.importers.from_zuko(model, dtype="float64")
    flow = nvpflow.importers.from_state_dict(model.state_dict(), "zuko", activation="silu", dtype="float64")
    report = same_weights(flow, expected)
    assert report.assumed == ("activation 'silu'", "slope 0.001")
    assert "  * assumed: activation 'silu'" in repr(report)
    lost = {name: value for name, value in model.state_dict().items() if name != "transform.transforms.0.hyper.2.bias"}
    report = nvpflow.importers.from_state_dict(lost, "zuko").import_report
    assert "transform.transforms.0.hyper.2 without a bias" in report.assumed


@needs_nflows
def test_state_dicts_of_nflows():
    odd = torch.arange(5) % 2
    spline = {"num_bins": 6, "tails": "linear", "tail_bound": 2.0, "apply_unconditional_transform": True}
    couplings = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(mask, residual_net(3, use_batch_norm=True), **spline)
        for mask in (odd, 1 - odd)
    ]
    layers = [
        transforms.PointwiseAffineTransform(torch.randn(5), torch.rand(5) + 0.5),
        transforms.RandomPermutation(5),
        transforms.LULinear(5),
        transforms.ActNorm(5),
        transforms.BatchNorm(5),
        transforms.SVDLinear(5, num_householder=4),
        transforms.QRLinear(5, num_householder=3),
        transforms.NaiveLinear(5),
        transforms.HouseholderSequence(5, 3),
        transforms.InverseTransform(transforms.CompositeTransform([transforms.LULinear(5)])),
        *couplings,
    ]
    for base in (distributions.StandardNormal([5]), distributions.DiagonalNormal([5])):
        model = scrambled(nflows_flow(*layers, base=base, context=3), 0.1)
        for coupling in model._transform._transforms:
            for block in getattr(getattr(coupling, "transform_net", None), "blocks", ()):
                block.activation = torch.relu
        expected = nvpflow.importers.from_nflows(model, dtype="float64")
        given = {"library": "nflows", "tail_bound": 2.0, "dtype": "float64"}
        report = same_weights(nvpflow.importers.from_state_dict(model.state_dict(), **given), expected)
        assert {"eps 0.001 of LULinear", "splines from -2 to 2", "eps 0.001 of BatchNorm1d"} <= set(report.assumed)
    with pytest.raises(ValueError, match=r"tail_bound is None, expected a number: flow\._transform._transforms"):
        nvpflow.importers.from_state_dict(model.state_dict(), "nflows")


@needs_nflows
def test_state_dicts_of_nflows_mlps_and_splines_on_the_unit_interval():
    class Mlp(nets.MLP):
        def forward(self, inputs, context=None):
            return super().forward(inputs)

    odd, made = torch.arange(4) % 2, lambda inputs, outputs: Mlp([inputs], [outputs], [9, 8])
    layers = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(odd, made, num_bins=5, tails="linear", tail_bound=3.0),
        transforms.AffineCouplingTransform(1 - odd, made),
        transforms.PiecewiseRationalQuadraticCDF(4, num_bins=6, tails="linear", tail_bound=3.0),
    ]
    model = scrambled(flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4])))
    expected = nvpflow.importers.from_nflows(model, dtype="float64")
    options = {"tail_bound": 3.0, "dtype": "float64"}
    tensors = model.state_dict()
    report = same_weights(nvpflow.importers.from_state_dict(tensors, "nflows", **options), expected)
    assert "scale sigmoid(u + 2) + 0.001, that of version 0.14" in report.assumed

    def refused(path, tensors):
        with pytest.raises(ValueError) as info:  # noqa: PT011
            nvpflow.importers.from_state_dict(tensors, "nflows", **options)
        assert str(info.value).startswith(f"{path} is of "), info.value

    at = "_transform._transforms.0.transform_net"
    refused(f"flow.{at}", {name.replace(f"{at}._input_layer", f"{at}.first"): v for name, v in tensors.items()})
    refused("flow._distribution", {**tensors, "_distribution.loc": torch.zeros(4)})
    refused("flow._transform._transforms.3", {**tensors, "_transform._transforms.3.theta": torch.zeros(4)})
    name = "_transform._transforms.2.unnormalized_widths"
    refused("flow._transform._transforms.2", {**tensors, name: torch.zeros(4, 7)})


@needs_zuko
def test_state_dicts_of_zuko_with_other_bases_and_layers():
    read = partial(nvpflow.importers.from_state_dict, library="zuko", dtype="float64")
    distribution = zuko.flows.UnconditionalDistribution
    for base, assumed in (
        (distribution(zuko.distributions.DiagNormal, torch.randn(4), torch.rand(4) + 0.5, buffer=True), True),
        (distribution(zuko.distributions.BoxUniform, lower=-9 * torch.ones(4), upper=9 * torch.ones(4)), False),
    ):
        model = zukos_flow(GeneralCouplingTransform(4, hidden_features=(8,)).inv, base=base)
        report = same_weights(read(model.state_dict()), nvpflow.importers.from_zuko(model, dtype="float64"))
        assert ("base DiagNormal" in report.assumed) == assumed
    tensors = model.state_dict()
    at = "transform.transforms.0.transform."
    for path, wrong in (
        ("flow.base", {**tensors, "base.more": torch.zeros(4)}),
        ("flow.transform.transforms.3", {**tensors, "transform.transforms.3._0": torch.zeros(4)}),
        ("flow.transform.transforms.0.transform", {n: v for n, v in tensors.items() if n != f"{at}mask"}),
        (f"flow.{at}hyper.5", {n.replace(f"{at}hyper.2", f"{at}hyper.5"): v for n, v in tensors.items()}),
    ):
        with pytest.raises(ValueError, match=rf"^{path.replace('.', chr(92) + '.')} is ") as info:
            read(wrong)
        assert "expected" in str(info.value)


@needs_zuko
def test_state_dicts_that_are_refused():
    read = nvpflow.importers.from_state_dict
    tensors = zuko.flows.RealNVP(4, hidden_features=(8,)).state_dict()
    with pytest.raises(TypeError, match=r"tensors is .*, expected what model\.state_dict"):
        read([1], "zuko")
    with pytest.raises(ValueError, match="library is 'flax', expected one of zuko, nflows"):
        read(tensors, "flax")
    with pytest.raises(ValueError, match="activation is 'cosine', expected one of relu"):
        read(tensors, "zuko", activation="cosine")
    with pytest.raises(ValueError, match="slope is 2"):
        read(tensors, "zuko", slope=2.0)
    with pytest.raises(ValueError, match="tail_bound is -1"):
        read(tensors, "zuko", tail_bound=-1.0)
    with pytest.raises(ValueError, match="tensors holds base, transform, expected names that begin with _transform"):
        read(tensors, "nflows")
    within = torch.nn.ModuleDict({"flow": zuko.flows.RealNVP(4, hidden_features=(8,)), "net": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"tensors holds flow, net, .*; .* give prefix='flow\.'$"):
        read(within.state_dict(), "zuko")
    with pytest.raises(
        ValueError, match=r"prefix is 'flows\.', expected what names of tensors begin with: 'flow\.', 'net\.'"
    ):
        read(within.state_dict(), "zuko", prefix="flows.")
    part = read(within.state_dict(), "zuko", prefix="flow.")
    same_weights(part, nvpflow.importers.from_zuko(within["flow"]))
    with pytest.raises(ValueError, match="tensors holds nothing, expected"):
        read({}, "zuko")
    with pytest.raises(ValueError, match="tensors holds more, expected none of these"):
        read({**tensors, "more": torch.zeros(2)}, "zuko")
    less = {name: value for name, value in tensors.items() if "transforms.1." not in name}
    with pytest.raises(ValueError, match=r"tensors holds none of transform.transforms.1, expected some"):
        read(less, "zuko")
    with pytest.raises(ValueError, match=r"tensors lacks transform.transforms.0.hyper.0.weight"):
        read({n: v for n, v in tensors.items() if n != "transform.transforms.0.hyper.0.weight"}, "zuko")
    wrong = {**tensors, "transform.transforms.0.hyper.0.weight": torch.zeros(8, 3)}
    with pytest.raises(ValueError):  # noqa: PT011
        read(wrong, "zuko")
    with pytest.raises(ValueError, match="expected names of at most 64 dots"):
        read({**tensors, "transform" + ".transform" * 5000: torch.zeros(2)}, "zuko")
    autoregressive = zuko.flows.NSF(4, hidden_features=(8,)).state_dict()
    with pytest.raises(ValueError, match=r"flow.transform.transforms\[0\] is a Masked.* of 4 passes"):
        read(autoregressive, "zuko")


def damaged(tensors):
    """Yield what no part of a state dict may be, one tensor at a time, each with its name."""
    for name, value in tensors.items():
        if name.endswith((".num_batches_tracked", ".initialized")):
            continue
        others = ["text", None, value.to(torch.complex64), value.to_sparse(), value.to("meta")]
        others += [value[..., None], value.new_zeros(1).expand(2**40)]
        if value.ndim:
            others += [torch.cat([value, value]), value[:-1], value[:0], value.new_zeros(())]
        for other in others:
            yield name, {**tensors, name: other}


@needs_zuko
@pytest.mark.parametrize("passes", [2, None])
def test_damaged_state_dicts_of_zuko(passes):
    model = (
        zuko.flows.NSF(3, 2, transforms=2, hidden_features=(4,), passes=2)
        if passes
        else zuko.flows.NICE(3, 1, hidden_features=(4,))
    )
    for _, tensors in damaged(model.state_dict()):
        with pytest.raises(ValueError, match=r"expected"):
            nvpflow.importers.from_state_dict(tensors, "zuko")
    if passes:
        lost = {n: v for n, v in model.state_dict().items() if n != "transform.transforms.0.hyper.0.mask"}
        with pytest.raises(ValueError, match=r"tensors lacks transform.transforms.0.hyper.0.mask"):
            nvpflow.importers.from_state_dict(lost, "zuko")


@needs_nflows
def test_damaged_state_dicts_of_nflows():
    net = partial(nets.ResidualNet, hidden_features=6, num_blocks=1, use_batch_norm=True)
    spline = partial(transforms.PiecewiseRationalQuadraticCouplingTransform, tails="linear", tail_bound=3.0, num_bins=4)
    layers = [
        transforms.ReversePermutation(4),
        transforms.LULinear(4),
        spline(torch.arange(4) % 2, net),
        transforms.BatchNorm(4),
        transforms.QRLinear(4, 2),
        transforms.SVDLinear(4, 2),
        transforms.AffineCouplingTransform(1 - torch.arange(4) % 2, net),
    ]
    model = nflows_flow(*layers, features=4)
    for name, tensors in damaged(model.state_dict()):
        if name.endswith(("._log_z", ".q_vectors")):  # a constant; any number of reflections
            continue
        with pytest.raises(ValueError, match=r"expected"):
            nvpflow.importers.from_state_dict(tensors, "nflows", tail_bound=3.0)


@needs_zuko
def test_the_command_imports_state_dicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, fails=0):
        assert nvpflow.cli.main(["import", *arguments]) == fails
        said = capsys.readouterr()
        return said.err if fails else said.out

    model = scrambled(zuko.flows.RealNVP(4, 2, hidden_features=(8,), activation=torch.nn.Tanh))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    options = ("--library", "zuko", "--activation", "tanh", "--dtype", "float64")
    said = run("model.pt", "-o", "model.safetensors", *options)
    assert said.startswith("ImportReport: unchecked; from zuko to float64\n  nothing was compared: a state dict holds")
    assert said.endswith("model written to model.safetensors\n")
    flow = nvpflow.load(tmp_path / "model.safetensors")
    same_weights(flow, nvpflow.importers.from_zuko(model, dtype="float64"))
    x, c = unit_data(9, 4, 4, "float64"), unit_data(9, 2, 5, "float64")
    close(flow.log_prob(x, context=c), model(torch.from_numpy(c)).log_prob(torch.from_numpy(x)))

    assert nvpflow.cli.main(["info", "model.safetensors"]) == 0
    assert "\nimported: from zuko, unchecked\n" in capsys.readouterr().out
    assert "exists already (--force overwrites it)" in run("model.pt", "-o", "model.safetensors", *options, fails=1)
    report = json.loads(run("model.pt", "-o", "model.safetensors", *options, "--force", "--json"))
    assert ImportReport.from_dict(report) == flow.import_report
    parts = {f"flow.{name}": value for name, value in model.state_dict().items()} | {"scale": torch.zeros(2)}
    torch.save({"state_dict": parts, "epoch": 3}, tmp_path / "lightning.pt")
    assert "written to part.safetensors" in run("lightning.pt", "-o", "part.safetensors", *options, "--prefix", "flow.")
    assert nvpflow.load(tmp_path / "part.safetensors") == flow
    wrong = run("model.pt", "-o", "a", "--library", "zuko", "--activation", "cosine", fails=1)
    assert wrong.startswith("nvpflow: error: activation is 'cosine', expected one of relu, ")

    torch.save(model, tmp_path / "whole.pt")  # code, which is not run
    assert "whole.pt: not read as tensors only" in run("whole.pt", "-o", "a", *options, fails=1)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04" + bytes(99))
    assert "broken.pt: not read as tensors only" in run("broken.pt", "-o", "a", *options, fails=1)
    torch.save({"epoch": 3, "model": model.state_dict()}, tmp_path / "checkpoint.pt")
    assert "a dict of epoch, model, expected a state dict" in run("checkpoint.pt", "-o", "a", *options, fails=1)
    torch.save({3: torch.zeros(2)}, tmp_path / "numbers.pt")
    assert "a dict of 3, expected a state dict" in run("numbers.pt", "-o", "a", *options, fails=1)
    (tmp_path / "other.pt").write_bytes(pickle.dumps({"a": print}, protocol=4))  # of which PyTorch warns
    assert "other.pt: not read as tensors only" in run("other.pt", "-o", "a", *options, fails=1)
    assert "none.pt: No such file or directory" in run("none.pt", "-o", "a", *options, fails=1)
    assert "it cannot go to stdout" in run("model.pt", "-o", "-", *options, fails=1)
    assert "is STATE too" in run("model.pt", "-o", "model.pt", *options, "--force", fails=1)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "model.pt: PyTorch reads such files; pip install" in run("model.pt", "-o", "a", *options, fails=1)
    assert not (tmp_path / "a").exists()


# -------------------------------------------------------------------------------------------------------------- sbi


@pytest.fixture
def builders():
    """The functions of sbi that make a density estimator from batches."""
    torch.set_default_dtype(torch.float32)  # sbi has no other
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("sbi.neural_nets.net_builders", reason="sbi is not installed")


def batches(features, conditions):
    theta, x = (unit_data(100, size, seed, "float32") for seed, size in enumerate((features, conditions)))
    return torch.from_numpy(3 * theta + 1), torch.from_numpy(5 * x - 2)


def same_as_sbi(estimator, features, conditions, embedded=False, **options):
    """The estimator's own log_prob, in float64, is the flow's, from raw conditions."""
    flow, embedding = nvpflow.importers.from_sbi(estimator, dtype="float64", **options)
    estimator = getattr(estimator, "posterior_estimator", estimator)
    report = flow.import_report
    assert (report.verdict, report.library) == ("exact", "sbi")
    assert (embedding is not None) == embedded
    theta, x = (values.double() for values in batches(features, conditions))
    theirs = copy.deepcopy(estimator).double()
    with torch.no_grad():
        context = x if embedding is None else copy.deepcopy(embedding).double()(x)
        expected = theirs.log_prob(theta[None], x)[0]
    # sbi has rounded the constant of nflows' normal distribution to float32.
    close(flow.log_prob(theta.numpy(), context=context.numpy()), expected, 1e-7)
    return flow


@pytest.mark.parametrize(("features", "z_score"), [(1, "none"), (1, "independent"), (4, "none"), (4, "structured")])
def test_sbis_neural_spline_flows(builders, features, z_score):
    scores = {"z_score_x": z_score, "z_score_y": z_score}
    estimator = builders.build_nsf(*batches(features, 3), hidden_features=12, num_transforms=2, **scores)
    flow = same_as_sbi(scrambled(estimator, 0.2), features, 3)
    assert flow.spec.standardize_context == (z_score != "none")
    assert isinstance(flow.spec.layers[0], nvpflow.layers.Standardize) == (z_score != "none")


@pytest.mark.parametrize(("kind", "options"), [("nice", {}), ("maf", {"passes": 2}), ("nsf", {"passes": 2})])
def test_sbis_flows_of_zuko(builders, kind, options):
    build = getattr(builders, f"build_zuko_{kind}")
    estimator = build(*batches(4, 3), hidden_features=12, num_transforms=2, **options)
    flow = same_as_sbi(scrambled(estimator, 0.2), 4, 3)
    assert flow.spec.standardize_context


@pytest.mark.parametrize("kind", ["nsf", "zuko_nice"])
def test_sbis_embedding_networks_are_returned_apart(builders, kind):
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh())
    estimator = getattr(builders, f"build_{kind}")(*batches(4, 3), num_transforms=2, embedding_net=net)
    flow = same_as_sbi(scrambled(estimator, 0.2), 4, 3, embedded=True)
    assert (flow.spec.context_size, flow.spec.standardize_context) == (5, False)


def test_posteriors_of_sbi_and_what_is_none(builders):
    from sbi.inference.posteriors import DirectPosterior

    estimator = scrambled(builders.build_nsf(*batches(2, 3), num_transforms=2), 0.2)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    same_as_sbi(DirectPosterior(estimator, prior), 2, 3)
    maf = builders.build_maf(*batches(4, 3), num_transforms=2)
    message = refuses_sbi(maf)
    assert message.startswith("estimator.net._transform._transforms[1] is a MaskedAffineAutoreg"), message
    message = refuses_sbi(DirectPosterior(builders.build_zuko_nsf(*batches(4, 3)), prior))
    assert message.startswith("posterior.posterior_estimator.net.transform.transforms[1] is a Masked"), message
    assert refuses_sbi(builders.build_mdn(*batches(4, 3))).startswith("estimator.net is ")
    with pytest.raises(TypeError, match=r"model is .*, expected a density estimator of sbi or a DirectPosterior"):
        nvpflow.importers.from_sbi(prior)


def refuses_sbi(model):
    with pytest.raises(ValueError) as info:  # noqa: PT011
        nvpflow.importers.from_sbi(model)
    return str(info.value)
