"""Bases with parameters, student_t and mixture: against the oracle, and in every place that knows them."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import nvpflow
import pytest
from cases import ADDITIVE, DTYPES, contexts_of, flow_and_oracle, identity
from general_oracle import FEATURES, random_spec
from nvpflow import _bases, _core, _scores
from nvpflow._expression import from_json
from nvpflow.layers import MLP, Additive, Coupling, Mixture, StudentT
from oracle import assert_same_bits, assert_within_budget

STUDENT = {"kind": "student_t", "df": 4.0, "trainable": True}
BASES: dict[str, dict[str, Any]] = {
    "student_t": STUDENT,
    "fixed": {**STUDENT, "trainable": False},
    "diagonal": {"kind": "mixture", "components": 4, "covariance": "diagonal"},
    "full": {"kind": "mixture", "components": 3, "covariance": "full"},
}
# Layers that do not make much of a rounding of float32: the base is in question here.
TAME = FEATURES - {"spline", "element_spline", "lu_linear", "log_scales", "layer_norm"}
GRADIENT_BUDGET = {"float32": 2e-5, "float64": 1e-12}


def make_case(seed: int, base: str, dtype: str, rows: int = 70):
    """A flow of random layers, its oracle, rows, contexts."""
    rng = np.random.default_rng([seed, 0xBA5E5])
    spec = {**random_spec(rng, TAME, dtype=dtype, max_size=18), "base": BASES[base]}
    flow, oracle = flow_and_oracle(spec, rng)
    z = rng.normal(size=(rows, spec["input_size"])).astype(dtype)
    given = contexts_of(spec, rng, rows)
    return flow, oracle, flow.inverse(z, **given), given


# ------------------------------------------------------------------------------------------------- what a base is


def test_bases_print_as_their_calls() -> None:
    assert repr(StudentT()) == "StudentT()"
    assert repr(StudentT(2, trainable=False)) == "StudentT(df=2.0, trainable=False)"
    assert repr(Mixture()) == "Mixture()"
    assert repr(Mixture(8, "full")) == "Mixture(components=8, covariance='full')"
    for base in (StudentT(), StudentT(1.5), Mixture(3), Mixture(2, covariance="full")):
        assert eval(repr(base)) == base
        assert pickle.loads(pickle.dumps(base)) == base
        assert copy.deepcopy(base) == base
        spec = nvpflow.FlowSpec.from_layers(2, ADDITIVE, base=base)
        assert spec.base == base
        assert eval(repr(spec), {"FlowSpec": nvpflow.FlowSpec, **vars(nvpflow.layers)}) == spec
    assert nvpflow.build(3, base="student_t").spec.base == StudentT(4.0)
    assert nvpflow.build(3, base="mixture").spec.base == Mixture(4, "diagonal")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StudentT(0), ValueError, "df is 0.0, expected a finite number above 0"),
        (lambda: StudentT(math.inf), ValueError, "df is inf, expected a finite number above 0"),
        (lambda: StudentT("2"), TypeError, "df is '2' (str), expected a real number"),
        (lambda: StudentT(2, trainable=1), TypeError, "trainable is 1 (int)"),
        (lambda: Mixture(0), ValueError, "components is 0, expected 1 to 1024"),
        (lambda: Mixture(1025), ValueError, "components is 1025, expected 1 to 1024"),
        (lambda: Mixture(2.5), TypeError, "components is 2.5 (float)"),
        (lambda: Mixture(2, "tied"), ValueError, "covariance is 'tied', expected one of diagonal, full"),
        (lambda: nvpflow.build(1024, base=Mixture(65)), ValueError, "base.components is 65 with input_size 1024"),
        (lambda: nvpflow.build(2, base=StudentT(1e-60)), ValueError, "base.df is 1e-60, expected"),
    ],
)
def test_what_is_no_base_is_refused(make, error, message) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_parameters_begin_where_the_base_says() -> None:
    flow = nvpflow.build(3, base=StudentT(2.5))
    assert flow.parameters()["base.log_df"].tolist() == [np.float32(math.log(2.5))] * 3
    assert "base.log_df" in _core._trained(flow.spec)
    assert "base.log_df" not in _core._trained(nvpflow.build(3, base=StudentT(2.5, trainable=False)).spec)
    mixture = nvpflow.build(3, base=Mixture(5, "full"), seed=1)
    shapes = {name: value.shape for name, value in mixture.parameters().items() if name.startswith("base.")}
    assert shapes == {"base.logits": (5,), "base.means": (5, 3), "base.log_scales": (5, 3), "base.lower": (5, 3)}
    means = mixture.parameters()["base.means"]
    assert len(np.unique(means)) == means.size
    other = nvpflow.build(3, base=Mixture(5, "full"), seed=2).parameters()["base.means"]
    assert not np.array_equal(means, other)


# ------------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("seed", range(6))
def test_densities_and_gradients_agree_with_the_oracle(seed, base, dtype) -> None:
    flow, oracle, x, given = make_case(seed, base, dtype)
    wide, context = x.astype(np.float64), given.get("context")
    context = None if context is None else context.astype(np.float64)
    log_p, expected = flow.log_prob(x, **given), oracle.log_prob(wide, context)
    assert_within_budget(log_p, expected, dtype)
    one = {name: value[3:4] for name, value in given.items()}
    assert_same_bits(flow.log_prob(x[3:4], **one), log_p[3:4])

    grad = (np.random.default_rng(seed).normal(size=len(x)) / len(x)).astype(dtype)
    results = flow.log_prob_vjp(x, grad, **given)
    found = oracle.log_prob_vjp(wide, grad.astype(np.float64), context)
    assert_gradients(results[0], found.x, dtype)
    assert_named_gradients(flow, results[1], found.parameters, dtype)
    loss, gradient = flow.nll_gradient(x, **given)
    expected_loss, found = oracle.nll_gradient(wide, context)
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == "float32" else 1e-12)
    assert_named_gradients(flow, gradient, found.parameters, dtype)
    flow.num_threads = 3
    assert_same_bits(flow.nll_gradient(x, **given)[1], gradient)


def assert_named_gradients(flow: nvpflow.Flow, flat: np.ndarray, expected: dict[str, np.ndarray], dtype: str) -> None:
    for name, shape, offset in _core._layout_of(flow.spec):
        size = int(np.prod(shape))
        if not name.endswith(".sign"):  # which never changes
            assert_gradients(flat[offset : offset + size].reshape(shape), expected[name], dtype)


def assert_gradients(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    budget = GRADIENT_BUDGET[dtype] * (1 + np.max(np.abs(expected), initial=0.0))
    assert np.max(np.abs(actual - expected), initial=0.0) <= budget


@pytest.mark.parametrize("df", [1e-3, 0.3, 1.0, 2.0, 3.7, 30.0, 1e4, 1e9, 1e17])
def test_student_densities_agree_with_scipy_at_any_degrees_of_freedom(df) -> None:
    stats = pytest.importorskip("scipy.stats")
    flow = identity("student_t", dtype="float64", log_df=[math.log(df), math.log(7.0)])
    df = math.exp(math.log(df))
    x = np.array([[0, 1], [1e-9, -2], [1, 0], [-3, 5], [40, 1], [1e6, 0], [-1e100, 2]])
    expected = stats.t(df).logpdf(x[:, 0]) + stats.t(7).logpdf(x[:, 1])
    if df > 1e8:  # where scipy's own digits are gone, and the normal distribution is as near as 1 / df
        expected = stats.norm.logpdf(x[:, 0]) + stats.t(7).logpdf(x[:, 1])
        x, expected = x[:4], expected[:4]
    elif df >= 1e4:
        x, expected = x[:6], expected[:6]
    np.testing.assert_allclose(flow.log_prob(x), expected, rtol=2e-9 if df >= 1e4 else 1e-12, atol=1e-12)
    # The same derivative by log_df as a small step has.
    step, rows = 1e-5, x[:5]
    up, down = (
        identity("student_t", dtype="float64", log_df=[math.log(df) + d, math.log(7.0)]).log_prob(rows)
        for d in (step, -step)
    )
    by_log_df = np.array([flow.log_prob_vjp(row[None], np.ones(1))[1][_offset(flow, "base.log_df")] for row in rows])
    np.testing.assert_allclose(by_log_df, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def _offset(flow: nvpflow.Flow, wanted: str) -> int:
    return next(offset for name, _, offset in _core._layout_of(flow.spec) if name == wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_rows_have_a_density_and_a_gradient(dtype) -> None:
    flow = identity("student_t", dtype=dtype)  # Cauchy's
    far = np.array([[1e30, -1e30], [np.finfo(dtype).max, 0]], dtype)
    wide = far.astype(np.float64)
    expected = -2 * math.log(math.pi) - 2 * np.log(np.maximum(np.abs(wide), 1)).sum(axis=1)
    np.testing.assert_allclose(flow.log_prob(far), expected, rtol=1e-6)
    by_x, _ = flow.log_prob_vjp(far, np.ones(2, dtype))
    np.testing.assert_allclose(by_x[0], [-2e-30, 2e-30], rtol=1e-5)
    assert np.isnan(flow.log_prob(np.array([[np.nan, 0]], dtype))).all()
    assert np.isneginf(identity("mixture", dtype=dtype).log_prob(far[1:])).all()


def test_a_mixture_is_scikit_learns() -> None:
    mixture = pytest.importorskip("sklearn.mixture")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(300, 3)) @ rng.normal(size=(3, 3)) + 4 * rng.normal(size=3) for _ in range(4)])
    for covariance, kind in (("diagonal", "diag"), ("full", "full")):
        theirs = mixture.GaussianMixture(4, covariance_type=kind, random_state=0).fit(x)
        covariances = theirs.covariances_
        if covariance == "diagonal":
            own = {"log_scales": 0.5 * np.log(covariances)}
        else:
            factors = np.linalg.cholesky(covariances)
            scales = np.diagonal(factors, axis1=1, axis2=2)
            rows, columns = np.tril_indices(3, -1)
            own = {"log_scales": np.log(scales), "lower": (factors / scales[:, None])[:, rows, columns]}
        layers = [Coupling([0], Additive(), MLP((2,))), Coupling([1, 2], Additive(), MLP((2,)))]
        flow = nvpflow.build(3, layers=layers, base=Mixture(4, covariance), dtype="float64")
        zeros = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
        own |= {"logits": np.log(theirs.weights_), "means": theirs.means_}
        flow.set_parameters(zeros | {f"base.{name}": value for name, value in own.items()})
        np.testing.assert_allclose(flow.log_prob(x), theirs.score_samples(x), rtol=1e-12)


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("df", [0.5, 1.0, 2.0, 10.0, 1e6])
def test_student_samples_are_distributed_as_they_should(dtype, df) -> None:
    stats = pytest.importorskip("scipy.stats")
    flow = identity("student_t", 2, dtype, log_df=[math.log(df)] * 2)
    x = flow.sample(100_000, seed=11).astype(np.float64)
    assert np.isfinite(x).all()
    for column in x.T:
        assert stats.kstest(column, "t", args=(df,)).pvalue > 1e-6
    assert stats.spearmanr(x[:, 0], x[:, 1]).pvalue > 1e-6
    # Two numbers from one block are independent in their sizes as well.
    assert stats.spearmanr(np.abs(x[:, 0]), np.abs(x[:, 1])).pvalue > 1e-6
    assert_same_bits(flow.sample(100, seed=11), flow.sample(1000, seed=11)[:100])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["diagonal", "full"])
def test_mixture_samples_have_the_weights_means_and_covariances(dtype, base) -> None:
    spec = BASES[base]
    rng = np.random.default_rng(3)
    components = spec["components"]
    own = {
        "logits": rng.normal(size=components),
        "means": 40 * rng.normal(size=(components, 2)),
        "log_scales": 0.3 * rng.normal(size=(components, 2)),
    }
    if base == "full":
        own["lower"] = rng.normal(size=(components, 1))
    flow = identity(from_json(_bases.KINDS, spec), 2, dtype, **own)
    x = flow.sample(200_000, seed=4).astype(np.float64)
    of = np.argmin(np.linalg.norm(x[:, None] - own["means"], axis=2), axis=1)
    shares = np.exp(own["logits"]) / np.exp(own["logits"]).sum()
    np.testing.assert_allclose(np.bincount(of, minlength=components) / len(x), shares, atol=5e-3)
    for m in range(components):
        unit = np.array([[1, 0], [own["lower"][m, 0] if base == "full" else 0, 1]])
        factor = unit * np.exp(own["log_scales"][m])
        rows = x[of == m]
        np.testing.assert_allclose(rows.mean(axis=0), own["means"][m], atol=5 / math.sqrt(len(rows)) * factor.max())
        np.testing.assert_allclose(np.cov(rows.T), factor @ factor.T, atol=20 / math.sqrt(len(rows)))


def test_a_sample_is_the_inverse_of_its_noise() -> None:
    for base in BASES:
        flow, _, _, given = make_case(1, base, "float32")
        one = {name: value[0] for name, value in given.items()}
        assert_same_bits(flow.sample(33, seed=7, **one), flow.inverse(flow._noise(33, 7), **one))


# ------------------------------------------------------------------------------------------------------------ files


def test_files_keep_the_base(tmp_path) -> None:
    for base in BASES:
        path = tmp_path / f"{base}.safetensors"
        flow, _, x, given = make_case(2, base, "float32")
        flow.save(path)
        for other in (nvpflow.load(path), pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
            assert other == flow
            assert other.spec == flow.spec
            assert_same_bits(other.log_prob(x, **given), flow.log_prob(x, **given))
        wide = flow.astype("float64")
        assert wide.spec.base == flow.spec.base


# --------------------------------------------------------------------------------------------------------- training


def test_fit_learns_the_degrees_of_freedom_and_leaves_no_far_row_out() -> None:
    x = np.random.default_rng(0).standard_t([2, 30], size=(4000, 2))
    x[0] = [1e9, 0]
    flow = nvpflow.build(2, 2, (8,), base="student_t", seed=0)
    history = flow.fit(x.astype(np.float32), epochs=30, num_threads=1, progress=False)
    assert history.rows_left_out == 0
    assert set(history.standardized.values()) == {"robust"}
    df = np.exp(flow.parameters()["base.log_df"])
    assert df[0] < 4 < df[1]
    fixed = nvpflow.build(2, 2, (8,), base=StudentT(3, trainable=False), seed=0)
    fixed.fit(x.astype(np.float32), epochs=2, num_threads=1, progress=False)
    assert fixed.parameters()["base.log_df"].tolist() == [np.float32(math.log(3))] * 2
    narrow = nvpflow.build(2, 2, (8,), base="student_t", seed=0)
    with pytest.warns(nvpflow.DataWarning, match=r"see whether these rows belong there; standardize and max_deviation"):
        assert narrow.fit(x.astype(np.float32), epochs=1, max_deviation=100, progress=False).rows_left_out > 0
    assert narrow.initialize_from(x) == {"column 1": "robust", "column 2": "robust"}


def student_log_density(x: np.ndarray, df: float) -> np.ndarray:
    norm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return np.sum(norm - (df + 1) / 2 * np.log1p(x**2 / df), axis=1)


@pytest.mark.parametrize(("df", "most"), [(2, 0.05), (1, 0.15)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_heavy_tails_are_learnt_by_the_defaults(seed, df, most) -> None:
    """Cauchy's distribution, and Student's with 2 degrees of freedom: no variance."""
    x = np.random.default_rng([seed, 1]).standard_t(df, size=(5000, 3))
    test = np.random.default_rng([seed, 2]).standard_t(df, size=(20_000, 3))
    flow = nvpflow.build(3, base="student_t", seed=seed)
    history = flow.fit(x, num_threads=1, progress=False)
    assert history.rows_left_out == 0
    behind = student_log_density(test, df) - flow.log_prob(test).astype(np.float64)
    assert behind.mean() < most


def test_fit_learns_groups() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3000, 2)) * 0.1 + 4 * rng.choice([-1, 1], size=(3000, 2))).astype(np.float32)
    truth = math.log(4) + 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1))
    flow = nvpflow.build(2, 2, (8,), base=Mixture(8), seed=0)
    flow.fit(x, epochs=40, num_threads=1, progress=False)
    assert flow.nll(x) < truth + 0.1
    start = nvpflow.build(2, 2, (8,), base=Mixture(8), seed=0)
    history = start.fit(x, epochs=1, learning_rate=1e-12, num_threads=1, progress=False)
    assert history.best_loss < truth + 1  # the components begin at groups
    shares = np.exp(start.parameters()["base.logits"]) / 8
    assert shares.sum() == pytest.approx(1, rel=1e-5)
    again = start.parameters()
    start.fit(x, epochs=1, learning_rate=1e-12, num_threads=1, progress=False)  # which are no longer a new flow's
    np.testing.assert_allclose(start.parameters()["base.means"], again["base.means"], atol=1e-6)


# ------------------------------------------------------------------------------------------- pictures and reports


def test_normal_scores() -> None:
    stats = pytest.importorskip("scipy.stats")
    z = np.array([[-4.0, 0.1], [0, 3], [2, -40], [1e5, 0.5]])
    flow = identity("student_t", dtype="float64", log_df=[math.log(2.5), math.log(2e7)])
    scores = _scores.normal_scores(flow.spec.base, z, flow.parameters())
    np.testing.assert_allclose(scores[:, 0], stats.norm.ppf(stats.t(2.5).cdf(z[:, 0])), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(scores[:, 1], z[:, 1])
    for base in ("diagonal", "full"):
        flow = identity(from_json(_bases.KINDS, BASES[base]), dtype="float64")
        rng = np.random.default_rng(1)
        own = {name: rng.normal(size=v.shape) for name, v in flow.parameters().items() if name.startswith("base.")}
        flow.set_parameters(flow.parameters() | own)
        scores = _scores.normal_scores(flow.spec.base, flow.sample(50_000, seed=1), flow.parameters())
        for column in scores.T:
            assert stats.kstest(column, "norm").pvalue > 1e-6
    with pytest.raises(ValueError, match=r"base is StudentT\(\), expected the flow itself"):
        _scores.normal_scores(StudentT(), z)


def test_reports_and_certificates_know_the_base() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from nvpflow import plot, report

    x = np.random.default_rng(0).standard_t(3, size=(500, 2)).astype(np.float32)
    flow = nvpflow.build(2, 2, (8,), base="student_t", seed=0)
    flow.fit(x, epochs=2, num_threads=1, progress=False)
    page = report.html(flow, x)
    assert "Latents that should be Student t distributed with trained degrees of freedom, as normal scores." in page
    plot.latent_qq(flow.forward(x)[0], base=flow, ax=Figure().subplots())
    with pytest.raises(ValueError, match=r"base is StudentT\(\), expected the flow itself"):
        plot.latent_qq(flow.forward(x)[0], base=flow.spec.base, ax=Figure().subplots())
    assert flow.certify(x) is not None
    assert "base=StudentT()" in repr(flow)


# ------------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("base", BASES)
def test_torch(base) -> None:
    torch = pytest.importorskip("torch")
    from nvpflow.torch import FlowDistribution, FlowModule, FlowTransform

    flow, _, x, given = make_case(3, base, "float64")
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    module = FlowModule(flow)
    log_p = module.log_prob(torch.from_numpy(x), **tensors)
    assert_same_bits(log_p.detach().numpy(), flow.log_prob(x, **given))
    log_p.sum().backward()
    _, expected, *_ = flow.log_prob_vjp(x, np.ones(len(x)), **given)
    offsets = {name: (offset, shape) for name, shape, offset in _core._layout_of(flow.spec)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name.startswith("base."):
            offset, shape = offsets[name]
            of_tensor = expected[offset : offset + int(np.prod(shape))].reshape(shape)
            np.testing.assert_allclose(parameter.grad.numpy(), of_tensor, rtol=1e-12, atol=1e-12)
    one = {name: value[0] for name, value in tensors.items()}
    rows, log_p = module.sample_and_log_prob(40, seed=5, **one)
    theirs = flow.sample_and_log_prob(40, seed=5, **{name: value[0] for name, value in given.items()})
    assert_same_bits(rows.numpy(), theirs[0])
    np.testing.assert_allclose(log_p.numpy(), theirs[1], rtol=1e-9)
    if base == "fixed":
        assert module.rsample(3, **one).requires_grad
    else:
        with pytest.raises(NotImplementedError, match="depends on the base's parameters"):
            module.rsample(3, **one)
        with pytest.raises(NotImplementedError, match="depends on the base's parameters"):
            FlowDistribution(module, **one).rsample((3,))
        assert FlowModule(flow, frozen=("base",)).rsample(3, **one).requires_grad
    assert FlowDistribution(module, **one).sample((3,)).shape == (3, flow.spec.input_size)
    back = module.to_flow()
    assert back.spec == flow.spec
    assert_same_bits(back.log_prob(x, **given), flow.log_prob(x, **given))
    FlowTransform(module, **one)
    with pytest.raises(ValueError, match="the transform's base distribution is not in the module"):
        module.to_flow()
    assert module.to_flow(drop_base=True).spec.base == flow.spec.base


@pytest.mark.parametrize("base", BASES)
def test_jax(base) -> None:
    jax = pytest.importorskip("jax")
    import nvpflow.jax

    flow, _, x, given = make_case(3, base, "float64")
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        parameters = nvpflow.jax.parameters(flow)
        log_p = nvpflow.jax.log_prob(flow.spec, parameters, x, **given)
        assert_same_bits(np.asarray(log_p), flow.log_prob(x, **given))
        _, gradient = jax.value_and_grad(lambda p: nvpflow.jax.nll(flow.spec, p, x, **given))(parameters)
        _, expected = flow.nll_gradient(x, **given)
        for name, shape, offset in _core._layout_of(flow.spec):
            if name.startswith("base."):
                of_tensor = expected[offset : offset + int(np.prod(shape))].reshape(shape)
                np.testing.assert_allclose(gradient[name], of_tensor, rtol=1e-12, atol=1e-14)
        one = {name: value[0] for name, value in given.items()}
        key = jax.random.key(0)
        rows, log_p = nvpflow.jax.sample_and_log_prob(flow.spec, parameters, key, 200, **one)
        np.testing.assert_allclose(np.median(log_p - flow.log_prob(np.asarray(rows), **one)), 0, atol=1e-9)

        def total(p):
            return nvpflow.jax.sample(flow.spec, p, key, 5, **one).sum()

        if base in ("diagonal", "full"):
            with pytest.raises(NotImplementedError, match="a sample of a mixture base has no derivative"):
                jax.grad(total)(parameters)
            held = {n: jax.lax.stop_gradient(v) if n.startswith("base.") else v for n, v in parameters.items()}
            assert np.isfinite(nvpflow.jax.sample(flow.spec, held, key, 5, **one)).all()
        else:
            by_df = jax.grad(total)(parameters)["base.log_df"]
            step = 1e-5
            for j in range(min(2, flow.spec.input_size)):
                up, down = (
                    total({**parameters, "base.log_df": parameters["base.log_df"].at[j].add(d)}) for d in (step, -step)
                )
                np.testing.assert_allclose(by_df[j], (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


def test_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    from nvpflow.sklearn import FlowDensity
    from sklearn.base import clone

    x = np.random.default_rng(0).standard_t(9, size=(400, 2))
    for base in ("student_t", Mixture(3, "full")):
        estimator = FlowDensity(num_flows=2, hidden_sizes=(8,), base=base, epochs=20, random_state=0, n_jobs=1)
        assert clone(estimator).get_params()["base"] == base
        estimator.fit(x)
        assert estimator.flow_.spec.base == _bases.checked(base)
        assert np.isfinite(estimator.score_samples(x)).all()


def test_command_line(tmp_path, capsys) -> None:
    from nvpflow import cli

    data, model = str(tmp_path / "x.npy"), str(tmp_path / "model.safetensors")
    np.save(data, np.random.default_rng(0).standard_t(2, size=(300, 2)).astype(np.float32))
    common = ["fit", data, "-o", model, "--epochs", "1", "--num-flows", "2", "--hidden-sizes", "8", "--force"]
    for options, base in (
        (["--base", "student_t"], StudentT()),
        (["--base", "student_t", "--df", "2"], StudentT(2)),
        (["--base", "mixture", "--components", "3", "--covariance", "full"], Mixture(3, "full")),
    ):
        assert cli.main([*common, *options]) == 0
        assert nvpflow.load(model).spec.base == base
    capsys.readouterr()
    for options, message in (
        (["--df", "2"], "--df is given with --base normal, expected --base student_t for it"),
        (["--base", "student_t", "--components", "2"], "--components is given with --base student_t, expected"),
        (["--base", "student_t", "--df", "0"], "--df: df is 0.0, expected a finite number above 0"),
    ):
        assert cli.main([*common, *options]) != 0
        assert message in capsys.readouterr().err
