"""The uniform base: densities and gradients against the oracle, samples, files, and every place that knows the base."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import nvpflow
import pytest
from cases import ADDITIVE, DTYPES, contexts_of, flow_and_oracle, identity
from general_oracle import random_spec
from nvpflow import _bases, _core, _scores
from nvpflow._expression import from_json
from nvpflow.layers import MLP, Coupling, Normal, Spline, Standardize, Uniform
from oracle import assert_same_bits, assert_within_budget

INTERVAL = {"kind": "uniform", "low": -1.5, "high": 2.25}
GRADIENT_BUDGET = {"float32": 1e-5, "float64": 1e-13}


def make_case(seed: int, dtype: str, rows: int = 70):
    """A flow of random layers, its oracle, rows, of which every second one is outside and none at an edge, contexts."""
    rng = np.random.default_rng([seed, 0xBA5E])
    spec = {**random_spec(rng, dtype=dtype, max_size=18), "base": INTERVAL}
    flow, oracle = flow_and_oracle(spec, rng)
    z = (0.4 + np.tanh(rng.normal(size=(rows, spec["input_size"])))).astype(dtype)
    z[1::2, 0] = np.where(np.arange(len(z[1::2])) % 2, 2.5, -1.75)
    given = contexts_of(spec, rng, rows)
    return flow, oracle, flow.inverse(z, **given), given


# ------------------------------------------------------------------------------------------------- what a base is


def test_a_base_is_an_object_that_prints_as_its_call() -> None:
    assert repr(Normal()) == "Normal()"
    assert repr(Uniform()) == "Uniform(0.0, 1.0)"
    assert repr(Uniform(-2, 3)) == "Uniform(-2.0, 3.0)"
    for base in (Normal(), Uniform(), Uniform(-1e-3, 1e10)):
        assert eval(repr(base)) == base
        assert pickle.loads(pickle.dumps(base)) == base
        assert copy.deepcopy(base) == base
        assert from_json(_bases.KINDS, json.loads(json.dumps(base._to_json()))) == base
        assert type(base).__module__ == "nvpflow.layers"
    assert Uniform(0, 1) != Uniform(0, 2) != Normal()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Uniform(1, 1), ValueError, "high is 1.0, expected more than low, which is 1.0"),
        (lambda: Uniform(2, 1), ValueError, "high is 1.0, expected more than low, which is 2.0"),
        (lambda: Uniform(-math.inf, 1), ValueError, "low is -inf, expected a finite number"),
        (lambda: Uniform(0, math.nan), ValueError, "high is nan, expected a finite number"),
        (lambda: Uniform("0", 1), TypeError, "low is '0' (str), expected a real number"),
        (
            lambda: nvpflow.build(2, base="cauchy"),
            ValueError,
            "base is 'cauchy', expected 'normal', 'uniform', 'student_t', 'mixture', or one",
        ),
        (lambda: nvpflow.build(2, base=None), TypeError, "base is None"),
        (lambda: nvpflow.build(2, base=Uniform), TypeError, "such as Uniform(0, 1)"),
        (lambda: nvpflow.FlowSpec.from_layers(2, ADDITIVE, base=3), TypeError, "base is 3 (int)"),
        (lambda: identity(Uniform(1, 1 + 1e-9)), ValueError, "by a finite number of float32"),
        (lambda: identity(Uniform(0, 1e300)), ValueError, "base.high is 1e+300, expected finite in float32"),
    ],
)
def test_what_is_no_base_is_refused(make, error, message) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_a_spec_holds_its_base() -> None:
    normal = nvpflow.FlowSpec.from_layers(2, ADDITIVE)
    spec = nvpflow.FlowSpec.from_layers(2, ADDITIVE, base=Uniform(0, 0.5))
    assert normal.base == Normal() == nvpflow.FlowSpec(2).base
    assert spec.base == Uniform(0, 0.5)
    assert spec != normal
    assert hash(spec) != hash(normal)
    assert nvpflow.FlowSpec.from_layers(2, ADDITIVE, base="normal") == normal
    assert nvpflow.FlowSpec.from_layers(2, ADDITIVE, base="uniform").base == Uniform(0, 1)
    assert repr(spec).endswith("dtype='float32', base=Uniform(0.0, 0.5))")
    assert "base" not in repr(normal)
    for other in (
        nvpflow.FlowSpec.from_json(spec.to_json()),
        pickle.loads(pickle.dumps(spec)),
        eval(repr(spec), {"FlowSpec": nvpflow.FlowSpec, **vars(nvpflow.layers)}),
        spec.with_dtype("float64").with_dtype("float32"),
    ):
        assert other == spec
        assert other.base == spec.base


def test_build_takes_a_base() -> None:
    assert nvpflow.build(3).spec == nvpflow.build(3, base="normal").spec == nvpflow.build(3, base=Normal()).spec
    assert nvpflow.build(3).spec.to_json().startswith('{"input_size":3,"dtype"')  # format 1.0 says it
    flow = nvpflow.build(3, transform="spline", num_bins=5, base="uniform", mixing="permutation")
    assert flow.spec.base == Uniform(0, 1)
    assert not flow.spec.standardize  # which would move rows out
    assert nvpflow.build(3).spec.standardize
    splines = {layer.transform for layer in flow.spec.layers if isinstance(layer, Coupling)}
    assert splines == {Spline(5, interval=(0, 1), boundary="free")}
    wide = nvpflow.build(3, transform="spline", base=Uniform(-9, 9), standardize=True, context_size=2)
    assert wide.spec.standardize
    assert wide.spec.layers[1].transform.interval == (-9, 9)
    assert wide.spec.standardize_context
    assert nvpflow.build(3, transform="spline", base="uniform", context_size=2).spec.standardize_context
    plain = nvpflow.build(3, transform="spline", base="uniform", context_size=2, standardize=False)
    assert not plain.spec.standardize_context
    for options, message in (
        ({}, "transform is 'affine' with base=Uniform(0.0, 1.0), expected 'spline'"),
        ({"transform": "additive"}, "transform is 'additive' with base"),
        ({"transform": "spline", "actnorm": True}, "actnorm is True with base=Uniform(0.0, 1.0), expected False"),
        ({"transform": "spline", "mixing": "lu"}, "mixing is 'lu' with base"),
    ):
        with pytest.raises(ValueError, match="with base") as caught:
            nvpflow.build(3, base="uniform", **options)
        assert message in str(caught.value)
        assert str(caught.value).endswith("the interval; nvpflow.build(layers=) makes such a flow all the same")
    assert "base=Uniform(0.0, 1.0)" in repr(flow)
    assert "Uniform(0.0, 1.0)" in flow._repr_html_()
    assert "base" not in nvpflow.build(3)._repr_html_()
    assert flow.astype("float64").spec.base == flow.to("cpu").spec.base == Uniform(0, 1)


# ------------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_densities_and_gradients_agree_with_the_oracle(seed, dtype) -> None:
    flow, oracle, x, given = make_case(seed, dtype)
    wide, context = x.astype(np.float64), given.get("context")
    context = None if context is None else context.astype(np.float64)
    log_p, expected = flow.log_prob(x, **given), oracle.log_prob(wide, context)
    inside = np.arange(len(x)) % 2 == 0
    assert np.isneginf(expected[~inside]).all()
    assert np.isneginf(log_p[~inside]).all()
    assert_within_budget(log_p[inside], expected[inside], dtype)
    assert flow.nll(x, **given) == math.inf
    one = {name: value[3:4] for name, value in given.items()}
    assert_same_bits(flow.log_prob(x[3:4], **one), log_p[3:4])

    grad = (np.random.default_rng(seed).normal(size=len(x)) / len(x)).astype(dtype)
    results = flow.log_prob_vjp(x, grad, **given)
    found = oracle.log_prob_vjp(wide, grad.astype(np.float64), context)
    assert_gradients(results[0], found.x, dtype)
    assert (results[0][~inside] == 0).all()
    assert_named_gradients(flow, results[1], found.parameters, dtype)
    if given:
        assert_gradients(results[2], found.context, dtype)
        assert (results[2][~inside] == 0).all()

    loss, gradient = flow.nll_gradient(x, **given)
    assert loss == math.inf
    assert_named_gradients(flow, gradient, oracle.nll_gradient(wide, context)[1].parameters, dtype)


def assert_named_gradients(flow: nvpflow.Flow, flat: np.ndarray, expected: dict[str, np.ndarray], dtype: str) -> None:
    for name, shape, offset in _core._layout_of(flow.spec):
        size = int(np.prod(shape))
        if not name.endswith(".sign"):  # which never changes
            assert_gradients(flat[offset : offset + size].reshape(shape), expected[name], dtype)


def assert_gradients(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert np.isfinite(actual).all()
    budget = GRADIENT_BUDGET[dtype] * (1 + np.max(np.abs(expected), initial=0.0))
    assert np.max(np.abs(actual - expected), initial=0.0) <= budget


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_belong_to_the_interval(dtype) -> None:
    flow = identity(Uniform(0.25, 1), dtype=dtype)
    below, above = np.nextafter(np.asarray([0.25, 1], dtype), np.asarray([-1, 2], dtype))
    x = np.array([[0.25, 1], [0.25, 0.25], [1, 1], [below, 0.5], [0.5, above], [0.5, -np.finfo(dtype).max]], dtype)
    inside = -2 * math.log(0.75)
    for rows in (x, np.tile(x, (40, 1))):
        log_p = flow.log_prob(rows).reshape(-1, 6)
        np.testing.assert_allclose(log_p[:, :3], inside, rtol=1e-6)
        assert np.isneginf(log_p[:, 3:]).all()
    for bad in (math.nan, math.inf, -math.inf):
        x[3, 1] = bad
        assert np.isnan(flow.log_prob(x)).tolist() == [False] * 3 + [True] + [False] * 2
        assert np.isnan(flow.nll(x))
    assert np.isneginf(flow.log_prob(np.array([2.0, 0.5], dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_density_integrates_to_one(dtype) -> None:
    layers = [Coupling("second_half", network=MLP((8,), "tanh")), Coupling("first_half", network=MLP((8,), "tanh"))]
    flow = nvpflow.build(2, layers=layers, base=Uniform(-1, 1), dtype=dtype, seed=3)
    flow.set_parameters({name: 20 * value for name, value in flow.parameters().items()})
    points = np.linspace(-6, 6, 1501)
    grid = np.stack(np.meshgrid(points, points), axis=-1).reshape(-1, 2).astype(dtype)
    assert np.exp(flow.log_prob(grid)).sum() * (12 / 1500) ** 2 == pytest.approx(1, abs=0.01)


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [Uniform(), Uniform(0.1, 0.3), Uniform(-1e6, 1e6 + 0.25), Uniform(-3, -1e-30)])
def test_samples_are_uniform_and_never_outside(dtype, base) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    flow = identity(base, 5, dtype)
    x = flow.sample(200_000, seed=11)
    assert (x >= np.asarray(base.low, dtype)).all()
    assert (x <= np.asarray(base.high, dtype)).all()
    assert np.isfinite(flow.log_prob(x)).all()
    for column in x.T.astype(np.float64):
        assert scipy_stats.kstest(column, "uniform", args=(base.low, base.high - base.low)).pvalue > 1e-6
    assert np.abs(np.corrcoef(x, rowvar=False) - np.eye(5)).max() < 5 / math.sqrt(len(x))
    assert_same_bits(flow.sample(100, seed=11), x[:100])
    flow.num_threads = 3
    assert_same_bits(flow.sample(1000, seed=11), x[:1000])
    assert not np.array_equal(flow.sample(100, seed=12), x[:100])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_is_the_inverse_of_its_noise(dtype) -> None:
    flow, _, _, given = make_case(1, dtype)
    noise = flow._noise(33, 7)
    assert noise.min() >= -1.5
    assert noise.max() <= 2.25
    one = {name: value[0] for name, value in given.items()}
    assert_same_bits(flow.sample(33, seed=7, **one), flow.inverse(noise, **one))


# ------------------------------------------------------------------------------------------------------------ files


def test_files_keep_the_base(tmp_path) -> None:
    path = tmp_path / "uniform.safetensors"
    flow, _, x, given = make_case(2, "float32")
    flow.save(path)
    for other in (nvpflow.load(path), pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        assert other == flow
        assert other.spec.base == Uniform(-1.5, 2.25)
        assert_same_bits(other.log_prob(x, **given), flow.log_prob(x, **given))
    normal = nvpflow.FlowSpec.from_json(json.dumps({**json.loads(flow.spec.to_json()), "base": {"kind": "normal"}}))
    with pytest.raises(nvpflow.FileFormatError, match=r"base\.kind is uniform in the file, expected normal"):
        nvpflow.load(path, spec=normal)
    with pytest.raises(ValueError, match="base"):
        nvpflow.Flow(normal).swap(flow)


# --------------------------------------------------------------------------------------------------------- training


def test_fit_names_rows_outside_before_it_trains() -> None:
    x = np.random.default_rng(0).uniform(size=(200, 2)).astype(np.float32)
    outside = x.copy()
    outside[17, 1], outside[40, 0] = 1.5, -0.25
    flow = identity("uniform")
    before = flow.parameters()
    with pytest.raises(ValueError, match="outside the uniform base") as caught:
        flow.fit(outside, epochs=1)
    message = str(caught.value)
    assert message.startswith("x has 2 of 200 rows outside the uniform base (row 17, counted from 0, is [")
    assert ", 1.5]: latent 1 is 1.5, expected 0 to 1), which have no density; scale the rows into the" in message
    with pytest.raises(ValueError, match="validation has 2 of 200 rows outside the uniform base"):
        flow.fit(x, validation=outside, epochs=1)
    for name, value in flow.parameters().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(ValueError, match="as standardize and actnorm do"):
        nvpflow.build(2, layers=[Standardize(), *ADDITIVE], base="uniform").fit(x, epochs=1)
    wide = nvpflow.build(2, layers=[Standardize(), *ADDITIVE], base=Uniform(-2, 2), seed=1)
    history = wide.fit(x, epochs=2, learning_rate=1e-4)
    assert history.best_loss == pytest.approx(2 * math.log(4) + np.log(x.std(axis=0)).sum(), abs=0.05)


def bounded(**options: Any) -> nvpflow.Flow:
    return nvpflow.build(2, 2, (8,), base="uniform", transform="spline", **options)


def test_float64_rows_are_refused_with_a_cast_that_keeps_them_inside() -> None:
    flow, x = bounded(), np.random.default_rng(0).uniform(size=(200, 2))
    x[0] = [1, np.nextafter(1, 0)]  # which rounds to the edge
    way = r"\(np.float32\), which carries no row out of the base's interval, or build the flow with dtype=.float64."
    for call in (flow.log_prob, flow.forward, flow.vjp, flow.fit, flow.certify):
        with pytest.raises(TypeError, match=r"; convert it with x\.astype" + way) as caught:
            call(x)
        assert "standardize" not in str(caught.value)
    assert np.isfinite(flow.log_prob(x.astype(np.float32))).all()
    with pytest.raises(TypeError, match=r"^dtype is float64, expected float32, the flow's dtype; convert the result"):
        flow.sample(3, dtype="float64")
    wide = nvpflow.build(2, 2, (8,), base=Uniform(-9, 9), transform="spline", standardize=True)
    assert np.isfinite(wide.log_prob(x)).all()


def test_float64_rows_of_other_libraries_are_refused_in_the_same_way() -> None:
    torch = pytest.importorskip("torch")
    import nvpflow.torch

    x = torch.full((3, 2), 0.5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"; convert it with x\.to\(torch\.float32\), which carries no row"):
        bounded().log_prob(x)
    with pytest.raises(TypeError, match=r"torch\.float32, the module's; convert it with \.to\(torch\.float32\)$"):
        nvpflow.torch.FlowModule(bounded()).log_prob(x)


def test_rows_that_training_carries_out_are_named() -> None:
    x = np.random.default_rng(0).uniform(size=(200, 2)).astype(np.float32)
    flow = nvpflow.build(2, layers=[Coupling(), Coupling("first_half")], base="uniform", seed=1)
    with pytest.raises(nvpflow.TrainingError, match="rows have left the interval of the uniform base"):
        flow.fit(0.1 + 0.8 * x, epochs=30, learning_rate=0.05)


def uneven(rows: int, columns: int = 3, seed: int = 0) -> np.ndarray:
    """Rows on [0, 1] with edges of positive and of infinite density, which follow from each other."""
    u = np.random.default_rng(seed).uniform(size=(rows, columns))
    u[:, 1] = (u[:, 1] + u[:, 0]) / 2
    u[:, 2] = u[:, 2] ** 2
    return u.astype(np.float32)


def test_splines_learn_a_density_on_an_interval() -> None:
    x, test = uneven(4000), uneven(2000, seed=1)
    x[:3] = [[0, 0, 0], [1, 1, 1], [0, 1, 0]]
    flow = nvpflow.build(3, 4, (32,), base="uniform", transform="spline", seed=0)
    history = flow.fit(x, epochs=15, progress=False)
    assert np.isfinite(flow.log_prob(x)).all()
    samples = flow.sample(5000, seed=1)
    assert samples.min() >= 0
    assert samples.max() <= 1
    # E log p: of column 1 given column 0 log 2, of column 2 E -log(2 sqrt(x)) = 1 - log 2.
    assert flow.log_prob(test).mean() > 1 - 0.2
    assert history.best_loss < -0.8
    shares = np.linspace(0.05, 0.95, 19)
    drawn, given = (np.quantile(rows, shares, axis=0) for rows in (samples, test))
    np.testing.assert_allclose(drawn, given, atol=0.05)
    z, _ = flow.forward(test)
    assert z.min() >= 0
    assert z.max() <= 1
    found = flow.certify(test)
    assert found.ok
    assert not any("outside" in sentence for sentence in found.advice)


# ------------------------------------------------------------------------------------------- what describes a flow


def test_certify_compares_rows_that_have_a_density() -> None:
    flow = identity("uniform")
    x = np.random.default_rng(0).uniform(size=(300, 2)).astype(np.float32)
    found = flow.certify(x)
    assert found.verdict == "accurate"
    assert found.round_trip_bound is None
    assert not found.advice
    x[5] = 2
    found = flow.certify(x)
    assert found.verdict == "accurate"
    assert found.failed_rows == 0
    assert "1 row outside of the base, whose latents are uniform from 0 to 1" in found.advice[0]
    x[6] = 3e38
    x[7, 0] = math.nan
    assert flow.certify(x).nonfinite_rows == 1
    everywhere = flow.certify(np.full((3, 2), 2, np.float32))
    assert everywhere.log_prob is None
    assert everywhere.verdict == "accurate"


def test_normal_scores() -> None:
    z = np.array([[0.25, 0.5], [0, 1], [-0.1, 0.75]])
    np.testing.assert_array_equal(_scores.normal_scores(Normal(), z), z)
    scores = _scores.normal_scores(Uniform(), z)
    np.testing.assert_allclose(scores[0], [-0.6744897501960817, 0], atol=1e-12)
    assert scores[1, 0] == pytest.approx(-scores[1, 1], rel=0.01)
    assert scores[1, 0] < -8
    assert np.isneginf(scores[2, 0])


def test_reports_and_plots_show_normal_scores() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from nvpflow import plot, report

    x = np.random.default_rng(0).uniform(size=(400, 2)).astype(np.float32)
    flow = identity("uniform")
    page = report.html(flow, x)
    assert "Latents that should be uniform from 0 to 1, as normal scores." in page
    outside = report.examine(flow, report.Rows(np.vstack([x, [[2, 0.5]]]).astype(np.float32)), None, None).notices
    assert outside == [
        "1 row without a density, outside of the base, whose latents are uniform from 0 to 1; not in the means."
    ]
    axes = plot.latent_qq(flow.forward(x)[0], base=flow.spec.base, ax=Figure().subplots())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    distances = [float(label.rsplit(" ", 1)[1]) for label in labels if "up to" in label]
    assert max(distances) < 0.3
    with pytest.raises(ValueError, match="1 of 400 rows outside of base=Uniform"):
        plot.latent_qq(np.concatenate([x[1:], [[2, 0.5]]]), base="uniform")
    with pytest.raises(ValueError, match="base is 'flat'"):
        plot.latent_qq(x, base="flat")


# --------------------------------------------------------------------------------------------------- other libraries


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    import nvpflow.torch

    flow, _, x, given = make_case(4, "float64")
    module = nvpflow.torch.FlowModule(flow)
    rows = torch.from_numpy(x).requires_grad_()
    context = {name: torch.from_numpy(value) for name, value in given.items()}
    log_p = module.log_prob(rows, **context)
    assert_same_bits(log_p.detach().numpy(), flow.log_prob(x, **given))
    log_p.sum().backward()
    expected = flow.log_prob_vjp(x, np.ones(len(x)), **given)
    assert_same_bits(rows.grad.numpy(), expected[0])
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters() if parameter.grad is not None)

    one = {name: value[0] for name, value in context.items()}
    samples, density = module.sample_and_log_prob(50, seed=3, **one)
    theirs, its = flow.sample_and_log_prob(50, seed=3, **{name: v.numpy() for name, v in one.items()})
    assert_same_bits(samples.numpy(), theirs)
    np.testing.assert_allclose(density.numpy(), its, rtol=1e-12)
    assert module.to_flow().spec.base == Uniform(-1.5, 2.25)


def test_torch_distributions() -> None:
    torch = pytest.importorskip("torch")
    import nvpflow.torch

    module = nvpflow.torch.FlowModule(identity("uniform"))
    distribution = nvpflow.torch.FlowDistribution(module, validate_args=True)
    x = distribution.rsample((100,))
    assert ((x >= 0) & (x <= 1)).all()
    assert (distribution.log_prob(x) == 0).all()
    assert torch.isneginf(distribution.log_prob(torch.tensor([2.0, 0.5])))
    assert module.to_flow().spec.base == Uniform()
    transform = nvpflow.torch.FlowTransform(module)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    own = torch.distributions.TransformedDistribution(normal, [transform])
    torch.testing.assert_close(own.log_prob(x), normal.log_prob(x))
    with pytest.raises(ValueError, match=r"the latents of its nvpflow\.Flow are uniform from 0 to 1"):
        module.to_flow()
    assert module.to_flow(drop_base=True).spec.base == Uniform()


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    import nvpflow.jax

    flow, _, x, given = make_case(5, "float32")
    parameters = nvpflow.jax.parameters(flow)
    context = {name: jax.numpy.asarray(value) for name, value in given.items()}
    log_p = jax.jit(lambda p, rows: nvpflow.jax.log_prob(flow.spec, p, rows, **context))(parameters, x)
    assert_same_bits(np.asarray(log_p), flow.log_prob(x, **given))
    gradient = jax.grad(lambda rows: nvpflow.jax.log_prob(flow.spec, parameters, rows, **context).sum())(x)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[1::2] == 0).all()
    plain = identity(Uniform(0.1, 0.3))
    rows = nvpflow.jax.sample(plain.spec, nvpflow.jax.parameters(plain), jax.random.key(0), 20_000)
    assert np.isfinite(plain.log_prob(np.asarray(rows))).all()
    np.testing.assert_allclose(np.asarray(rows).mean(axis=0), 0.2, atol=0.003)


def test_sklearn() -> None:
    pytest.importorskip("sklearn")
    from nvpflow.sklearn import FlowDensity
    from sklearn.base import clone

    x = np.random.default_rng(0).uniform(0.1, 0.9, size=(300, 2))
    estimator = FlowDensity(
        coupling="spline",
        hidden_sizes=(8,),
        num_flows=2,
        epochs=1,
        learning_rate=1e-4,
        base="uniform",
        random_state=0,
    )
    assert clone(estimator).get_params()["base"] == "uniform"
    estimator.fit(x)
    assert estimator.flow_.spec.base == Uniform()
    rows = x.astype(np.float32)
    assert estimator.score(x) == pytest.approx(estimator.flow_.log_prob(rows).astype(np.float64).mean(), abs=1e-12)
    assert estimator.score(x) > -0.01  # that of the uniform density, which a new flow is near
    assert np.isneginf(estimator.score_samples([[2.0, 0.5]]))
    with pytest.raises(ValueError, match="outside the uniform base"):
        estimator.fit(3 * x)
    with pytest.raises(ValueError, match="base is 'flat'"):
        clone(estimator).set_params(base="flat").fit(x)
    with pytest.raises(ValueError, match=r"^coupling is 'affine' with base=Uniform.*, expected 'spline'"):
        clone(estimator).set_params(coupling="affine").fit(x)


def test_command_line(tmp_path, capsys) -> None:
    from nvpflow import cli

    x = np.random.default_rng(0).uniform(0.1, 0.9, size=(300, 2))
    np.save(tmp_path / "data.npy", x)
    model = str(tmp_path / "model.safetensors")
    options = ["--base", "uniform", "--transform", "spline", "--learning-rate", "1e-4", "--epochs", "1"]
    assert cli.main(["fit", str(tmp_path / "data.npy"), "-o", model, *options]) == 0
    assert nvpflow.load(model).spec.base == Uniform()
    capsys.readouterr()
    assert cli.main(["info", model]) == 0
    assert "base=Uniform(0.0, 1.0)" in capsys.readouterr().out
    assert cli.main(["sample", model, "-n", "3", "-o", str(tmp_path / "rows.npy")]) == 0
    np.save(tmp_path / "data.npy", 2 * x)
    again = ["fit", str(tmp_path / "data.npy"), "-o", model, "--force"]
    assert cli.main([*again, *options]) != 0
    assert "rows outside the uniform base" in capsys.readouterr().err
    assert cli.main([*again, *options, "--interval", "-0.5", "2"]) == 0
    assert nvpflow.load(model).spec.base == Uniform(-0.5, 2)
    capsys.readouterr()
    for more, message in (
        (["--interval", "2", "1"], "--interval: high is 1.0, expected more than low, which is 2.0"),
        (
            ["--base", "normal", "--interval", "0", "1"],
            "--interval is given with --base normal, expected --base",
        ),
        (["--transform", "affine"], "transform is 'affine' with base=Uniform(0.0, 1.0), expected 'spline'"),
    ):
        assert cli.main([*again, *options, *more]) == 1
        assert message in capsys.readouterr().err
