"""nvpflow.importers: flows of flowjax, and those made of them, compute the same.

As in test_importers.py the comparison is the test's own.
"""

from __future__ import annotations

import warnings

import numpy as np
import nvpflow
import pytest
from nvpflow.importers import from_flowjax
from oracle import unit_data

jax = pytest.importorskip("jax", reason="JAX is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    flowjax = pytest.importorskip("flowjax", reason="flowjax is not installed")
    import equinox
    import paramax
    from flowjax import bijections as B
    from flowjax import distributions as D
    from flowjax.flows import coupling_flow, masked_autoregressive_flow

L = nvpflow.layers
TOLERANCE = 1e-10


@pytest.fixture(params=[True, False], ids=["float64", "float32"])
def wide(request):
    """Whether the peer is made of float64 arrays; its results always are float64."""
    with jax.enable_x64(request.param):
        yield request.param


def scrambled(dist, scale=0.15):
    arrays, rest = equinox.partition(dist, equinox.is_inexact_array)
    leaves, tree = jax.tree_util.tree_flatten(arrays)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [a + scale * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys, strict=True)]
    return equinox.combine(jax.tree_util.tree_unflatten(tree, moved), rest)


def same(dist, wide, rows=None):
    flow = from_flowjax(dist, dtype="float64")
    report = flow.import_report
    assert report.verdict == "exact", report
    assert (report.library, report.version) == ("flowjax", flowjax.__version__)
    if wide:
        size = flow.spec.context_size
        x = unit_data(32, flow.spec.input_size, 4, "float64") if rows is None else rows
        c = unit_data(32, size, 5, "float64") if size else None
        theirs = np.asarray(dist.log_prob(x, c))
        ours = flow.log_prob(x, context=c)
        np.testing.assert_array_less(np.abs(ours - theirs), TOLERANCE * (1 + np.abs(theirs)))
    return flow


def made(size=4, transformer=None, **options):
    given = {"flow_layers": 3, "nn_width": 12, "nn_depth": 2, "nn_activation": jax.nn.tanh} | options
    base = D.StandardNormal((size,))
    return coupling_flow(jax.random.key(0), base_dist=base, transformer=transformer, **given)


@pytest.mark.parametrize("condition", [None, 3])
@pytest.mark.parametrize("invert", [True, False])
def test_affine_couplings_of_flowjax(invert, condition, wide):
    flow = same(scrambled(made(5, invert=invert, cond_dim=condition)), wide)
    coupling = flow.spec.layers[0 if invert else -1]
    assert coupling.network == L.MLP((12, 12), "tanh")
    assert coupling.inverse is not invert
    assert (coupling.transform.function, coupling.transform.low) == ("softplus", 0.01)
    assert flow.import_report.layers[0].path.startswith("dist.bijection.bijection")


@pytest.mark.parametrize("condition", [None, 3])
@pytest.mark.parametrize("invert", [True, False])
def test_splines_of_flowjax(invert, condition, wide):
    spline = B.RationalQuadraticSpline(knots=5, interval=(-4, 3))
    flow = same(scrambled(made(2, spline, invert=invert, cond_dim=condition, nn_depth=1)), wide)
    coupling = flow.spec.layers[0 if invert else -1]
    assert (coupling.transform.num_bins, coupling.transform.interval) == (6, (-4.0, 3.0))
    assert (coupling.transform.boundary, coupling.transform.tails) == ("free", "identity")


def test_other_transformers_of_flowjax(wide):
    exponential = equinox.tree_at(lambda a: a.scale, B.Affine(), paramax.Parameterize(jax.numpy.exp, np.zeros(())))
    for transformer, expected in (
        (B.Affine(), "softplus"),
        (exponential, "identity"),
        (B.Loc(0.0), L.Additive()),
    ):
        flow = same(scrambled(made(4, transformer, nn_depth=0 if expected == L.Additive() else 1)), wide)
        transform = flow.spec.layers[0].transform
        assert getattr(transform, "function", transform) == expected


def test_bijections_and_bases_of_flowjax(wide):
    lower = np.eye(4) + np.tril(np.ones((4, 4)), -1)
    chain = B.Chain(
        [
            made(cond_dim=2).bijection,
            B.Affine(np.ones(4), 2 * np.ones(4)),
            B.Invert(B.TriangularAffine(np.zeros(4), jax.numpy.asarray(lower))),
            B.Flip((4,)),
            B.AdditiveCondition(equinox.nn.Linear(2, 4, key=jax.random.key(1)), (4,), (2,)),
        ]
    )
    base = D.MultivariateNormal(np.ones(4), jax.numpy.asarray(2 * np.eye(4)))
    flow = same(D.Transformed(base, scrambled(chain)), wide)
    assert flow.spec.context_size == 2
    splines = scrambled(made(4, B.RationalQuadraticSpline(knots=5, interval=4))).bijection
    uniform = D.Transformed(D.Uniform(np.full(4, -4.0), np.full(4, 4.0)), splines)
    rows = np.random.default_rng(0).uniform(-4, 4, size=(32, 4))
    flow = same(uniform, wide, rows)
    assert isinstance(flow.spec.base, L.Uniform)
    np.testing.assert_allclose((flow.spec.base.low, flow.spec.base.high), (-4, 4), rtol=1e-6)


def test_heavy_tails_and_mixtures_of_flowjax(wide):
    inner = scrambled(made(4)).bijection
    df = np.array([1.5, 2.0, 4.0, 30.0])
    for loc, scale in ((0.0, 1.0), (np.arange(4.0), np.full(4, 2.0))):
        flow = same(D.Transformed(D.StudentT(df, loc, scale), inner), wide)
        assert isinstance(flow.spec.base, L.StudentT)
        np.testing.assert_allclose(np.exp(flow.parameters()["base.log_df"]), df, rtol=1e-5)
    rng, weights = np.random.default_rng(0), np.array([1.0, 2.0, 3.0])
    loc, scale = rng.normal(size=(3, 4)), rng.uniform(0.5, 2, size=(3, 4))
    normals = equinox.filter_vmap(D.Normal)(jax.numpy.asarray(loc), jax.numpy.asarray(scale))
    flow = same(D.Transformed(D.VmapMixture(normals, weights), inner), wide)
    assert flow.spec.base == L.Mixture(3)
    factors = np.tril(rng.normal(size=(3, 4, 4)), -1) + np.stack([np.diag(s) for s in scale])
    covariances = jax.numpy.asarray(factors @ factors.transpose(0, 2, 1))
    normals = equinox.filter_vmap(D.MultivariateNormal)(jax.numpy.asarray(loc), covariances)
    assert same(D.Transformed(D.VmapMixture(normals, weights), inner), wide).spec.base == L.Mixture(3, "full")
    heavy = equinox.filter_vmap(D.StudentT)(jax.numpy.asarray(scale))
    with pytest.raises(ValueError, match=r"dist\.base_dist\.dist is a StudentT, expected a Normal or Multivariate"):
        from_flowjax(D.Transformed(D.VmapMixture(heavy, weights), inner))


def test_what_flowjax_has_and_nvpflow_has_not_is_refused():
    key, normal = jax.random.key(0), D.StandardNormal((4,))
    known = "expected a Coupling, Chain, Scan, Invert, Permute, Flip, Identity, Affine, Loc, Scale, TriangularAffine"
    gumbel = D.Transformed(D.Gumbel(np.zeros(4)), made().bijection)
    for dist, message in (
        (masked_autoregressive_flow(key, base_dist=normal, flow_layers=2), f"is a MaskedAutoregressive, {known}"),
        (D.Transformed(normal, B.Exp((4,))), r"dist\.bijection is an Exp, .*add the log-derivative to log p"),
        (gumbel, r"dist\.base_dist\.base_dist is a _StandardGumbel, expected a StandardNormal.* normal, uniform"),
        (D.Transformed(normal, B.Flip((4,))), "has no coupling"),
        (made(4, B.Power(2.0)), r"transformer is a Power, expected an Affine, Loc or RationalQuadraticSpline"),
        (D.Transformed(D.StandardNormal((2, 2)), B.Identity((2, 2))), r"dist is of shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_flowjax(dist)
    with pytest.raises(TypeError, match="expected a Transformed distribution of flowjax"):
        from_flowjax(normal)
