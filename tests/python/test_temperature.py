"""`temperature=` of the samples and of log_prob, and `score`, the gradient of log p by x."""

from __future__ import annotations

import numpy as np
import nvpflow
import pytest
from general_oracle import GeneralFlow
from oracle import assert_same_bits, assert_within_budget
from test_sample_density import DTYPES, INTERVAL, context_of, make_case


def tempered_density(oracle: GeneralFlow, z: np.ndarray, log_det: np.ndarray, temperature: float) -> np.ndarray:
    """Log p of rows with these latents, where the base is N(0, T I)."""
    return log_det - 0.5 * (z**2).sum(axis=1) / temperature - 0.5 * z.shape[1] * np.log(2 * np.pi * temperature)


def repeated(context: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: np.tile(value.astype(np.float64), (count, 1)) for name, value in context.items()}


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_both_are_those_of_the_oracle(seed, dtype, temperature) -> None:
    flow, oracle = make_case(seed, dtype)
    given = context_of(flow)
    x, log_p = flow.sample_and_log_prob(90, seed=5, temperature=temperature, **given)
    assert_same_bits(x, flow.sample(90, seed=5, temperature=temperature, **given))
    z = flow._noise(90, 5).astype(np.float64) * np.sqrt(temperature)
    wanted, log_det = oracle.inverse(z, **repeated(given, 90))
    assert_within_budget(x, wanted, dtype)
    assert_within_budget(log_p, tempered_density(oracle, z, -log_det, temperature), dtype)
    rows = np.random.default_rng(seed).normal(size=(70, flow.spec.input_size)).astype(dtype)
    z, log_det = oracle.forward(rows.astype(np.float64), **repeated(given, 70))
    found = flow.log_prob(rows, temperature=temperature, **given)
    assert_within_budget(found, tempered_density(oracle, z, log_det, temperature), dtype)


def test_the_tempered_density_integrates_to_one() -> None:
    flow = nvpflow.build(2, 3, (16,), dtype="float64", standardize=False, seed=3)
    rng = np.random.default_rng(1)
    flow.set_parameters({name: v + 0.3 * rng.normal(size=v.shape) for name, v in flow.parameters().items()})
    axis = np.linspace(-30, 30, 1501)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    for temperature in (0.5, 1.0, 2.0):
        total = np.exp(flow.log_prob(grid, temperature=temperature)).sum() * (axis[1] - axis[0]) ** 2
        assert abs(total - 1) < 2e-3


def test_one_and_none_are_the_call_without() -> None:
    flow, _ = make_case(3, "float32")
    given = context_of(flow)
    x = flow.sample(40, seed=2, **given)
    for temperature in (None, 1, 1.0, np.float32(1)):
        assert_same_bits(flow.sample(40, seed=2, temperature=temperature, **given), x)
        assert_same_bits(flow.log_prob(x, temperature=temperature, **given), flow.log_prob(x, **given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_cut_or_the_threads(dtype) -> None:
    flow, _ = make_case(1, dtype)
    given = context_of(flow)
    x, log_p = flow.sample_and_log_prob(300, seed=1, temperature=0.7, **given)
    again = flow.log_prob(x, temperature=0.7, **given)
    for threads, step in ((1, 1), (3, 7), (2, 64)):
        flow.num_threads = threads
        for start in range(0, 300, step):
            count = min(step, 300 - start)
            part = flow.sample_and_log_prob(count, seed=1, start=start, temperature=0.7, **given)
            assert_same_bits(part[0], x[start : start + step])
            assert_same_bits(part[1], log_p[start : start + step])
            rows = x[start : start + step]
            assert_same_bits(flow.log_prob(rows, temperature=0.7, **given), again[start : start + step])


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_several_contexts(count) -> None:
    flow = nvpflow.build(500, 1, (3,), context_size=2, seed=3)  # of so many columns that a chunk is 2,097 rows
    contexts = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    x, log_p = flow.sample_and_log_prob(count, seed=2, temperature=0.5, context=contexts)
    assert (x.shape, log_p.shape) == ((3, count, 500), (3, count))
    for m, context in enumerate(contexts):
        view = flow.condition(context)
        one = view.sample_and_log_prob(count, seed=2, start=count * m, temperature=0.5)
        assert_same_bits(one[0], x[m])
        assert_same_bits(one[1], log_p[m])
        assert_same_bits(view.log_prob(x[m], temperature=0.5), flow.log_prob(x[m], temperature=0.5, context=context))
    rows = x.reshape(-1, 500)
    each = flow.log_prob(rows, temperature=0.5, context=np.repeat(contexts, count, axis=0))
    assert_within_budget(each, log_p.ravel().astype(np.float64), "float32")


def test_rows_of_float64_keep_their_digits() -> None:
    flow = nvpflow.build(3, 2, (8,), seed=1)
    flow.initialize_from(np.random.default_rng(0).normal(size=(100, 3)) + 1e6)
    x, log_p = flow.sample_and_log_prob(70, seed=4, dtype="float64", temperature=0.5)
    assert x.dtype == np.float64
    assert_within_budget(flow.log_prob(x, temperature=0.5), log_p.astype(np.float64), "float32")
    score = flow.score(x)
    assert score.dtype == np.float32
    assert_same_bits(score, flow.log_prob_vjp(x, np.ones(70, np.float32), wrt="x")[0])


def test_rows_without_a_density() -> None:
    flow = nvpflow.build(3, 2, (8,), seed=1)
    x = np.zeros((4, 3), np.float32)
    x[1, 0], x[2, 1], x[3, 2] = np.nan, np.inf, 3e38
    found = flow.log_prob(x, temperature=2)
    assert np.isfinite(found[0])
    assert np.isnan(found[1:3]).all()
    assert found[3] == -np.inf
    assert np.isnan(flow.score(x)[1:3]).all()


def test_refusals() -> None:
    flow = nvpflow.build(3, 2, (8,), seed=1)
    x = np.zeros((4, 3), np.float32)
    for wrong in (0, -1, np.nan, np.inf, 1e-13, 1e13):
        for call in (lambda t: flow.log_prob(x, temperature=t), lambda t: flow.sample(3, temperature=t)):
            with pytest.raises(ValueError, match=r"temperature is .*, expected a number from 1e-12 to 1e12"):
                call(wrong)
    for wrong in ("1", True, [1.0], 1j):
        with pytest.raises(TypeError, match=r"temperature is .*, expected a real number"):
            flow.log_prob(x, temperature=wrong)
    uniform = nvpflow.build(3, 2, (8,), transform="spline", base="uniform")
    assert uniform.sample(3, temperature=1).shape == (3, 3)
    with pytest.raises(ValueError, match="only a normal base has a temperature"):
        uniform.sample(3, temperature=0.5)
    with pytest.raises(TypeError, match=r"unexpected argument 'context'"):
        nvpflow.build(3, context_size=1).condition([0.0]).log_prob(x, temperature=0.5, context=[0.0])


# ---- in PyTorch and JAX ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_those_of_torch(seed, dtype, temperature) -> None:
    torch = pytest.importorskip("torch")
    from nvpflow.torch import FlowDistribution, FlowModule

    flow, _ = make_case(seed, dtype)
    given = context_of(flow)
    context = torch.from_numpy(given["context"]) if given else None
    module = FlowModule(flow)
    x, log_p = module.sample_and_log_prob(40, context, seed=5, temperature=temperature)
    assert_same_bits(x.numpy(), flow.sample(40, seed=5, temperature=temperature, **given))
    wanted = flow.astype("float64").log_prob(x.double().numpy(), temperature=temperature, **given)
    assert_within_budget(log_p.numpy(), wanted, dtype)
    found = module.log_prob(x, context, temperature=temperature)
    assert_within_budget(found.detach().numpy(), wanted, dtype)
    assert found.requires_grad
    assert_same_bits(module.sample(40, context, seed=5, temperature=temperature).numpy(), x.numpy())
    assert_same_bits(module.rsample(40, context, seed=5, temperature=temperature).detach().numpy(), x.numpy())
    whole = FlowDistribution(module, context, temperature=temperature)
    assert_same_bits(whole.log_prob(x).detach().numpy(), found.detach().numpy())
    rows, log_p = whole.expand((3,)).rsample_and_log_prob((2,))
    assert_within_budget(log_p.detach().numpy(), whole.log_prob(rows).detach().numpy().astype(np.float64), dtype)
    with pytest.raises(NotImplementedError, match="has no formula"):
        torch.distributions.kl_divergence(whole, FlowDistribution(module, context))
    assert torch.equal(module.log_prob(x, context, temperature=1), module.log_prob(x, context))


def test_torch_compiles_a_temperature() -> None:
    torch = pytest.importorskip("torch")
    from nvpflow.torch import FlowModule

    module = FlowModule(nvpflow.build(3, 2, (8,), standardize=False, seed=1))
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32))
    compiled = torch.compile(lambda x: module.log_prob(x, temperature=0.5), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module.log_prob(x, temperature=0.5))


def test_the_gradient_of_torch_at_a_temperature() -> None:
    torch = pytest.importorskip("torch")
    from nvpflow.torch import FlowModule

    flow, _ = make_case(2, "float64")
    given = context_of(flow)
    context = torch.from_numpy(given["context"]) if given else None
    x = torch.from_numpy(flow.sample(5, seed=1, **given)).requires_grad_()
    FlowModule(flow).log_prob(x, context, temperature=0.4).sum().backward()
    step = 1e-6
    for j in range(x.shape[1]):
        ahead, behind = (x.detach().numpy() + sign * step * np.eye(x.shape[1])[j] for sign in (1, -1))
        ends = [flow.log_prob(rows, temperature=0.4, **given) for rows in (ahead, behind)]
        np.testing.assert_allclose(x.grad[:, j], (ends[0] - ends[1]) / (2 * step), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_those_of_jax(seed, dtype, temperature) -> None:
    jax = pytest.importorskip("jax")
    import nvpflow.jax as nj

    flow, _ = make_case(seed, dtype)
    given = context_of(flow)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        parameters, key = nj.parameters(flow), jax.random.key(4)
        drawn = jax.jit(lambda p: nj.sample_and_log_prob(flow.spec, p, key, 40, temperature=temperature, **given))
        x, log_p = drawn(parameters)
        noise = np.asarray(jax.random.normal(key, (40, flow.spec.input_size), dtype=dtype))
        latents = (noise * np.sqrt(temperature)).astype(dtype)
        assert_within_budget(np.asarray(x), flow.astype("float64").inverse(latents.astype(np.float64), **given), dtype)
        wanted = flow.astype("float64").log_prob(np.asarray(x, np.float64), temperature=temperature, **given)
        assert_within_budget(np.asarray(log_p), wanted, dtype)
        found = nj.log_prob(flow.spec, parameters, x, temperature=temperature, **given)
        assert_within_budget(np.asarray(found), wanted, dtype)
        rows = nj.sample(flow.spec, parameters, key, 40, temperature=temperature, **given)
        assert_within_budget(np.asarray(rows), np.asarray(x, np.float64), dtype)
        one = nj.log_prob(flow.spec, parameters, x, temperature=1, **given)
        assert_same_bits(np.asarray(one), np.asarray(nj.log_prob(flow.spec, parameters, x, **given)))


def test_rows_without_a_density_and_refusals_in_both() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("jax")
    import nvpflow.jax as nj
    from nvpflow.torch import FlowDistribution, FlowModule

    flow = nvpflow.build(3, 2, (8,), seed=1)
    x = np.zeros((4, 3), np.float32)
    x[1, 0], x[2, 1], x[3, 2] = np.nan, np.inf, 3e38
    module, parameters = FlowModule(flow), nj.parameters(flow)
    both = (
        lambda t: module.log_prob(torch.from_numpy(x), temperature=t).detach().numpy(),
        lambda t: np.asarray(nj.log_prob(flow.spec, parameters, x, temperature=t)),
    )
    for log_prob in both:
        found = log_prob(2)
        assert np.isfinite(found[0])
        assert np.isnan(found[1:3]).all()
        assert found[3] == -np.inf
        for wrong in (0, -1, np.nan, np.inf, 1e-13, 1e13):
            with pytest.raises(ValueError, match=r"temperature is .*, expected a number from 1e-12 to 1e12"):
                log_prob(wrong)
        with pytest.raises(TypeError, match=r"temperature is .*, expected a real number"):
            log_prob("1")
    uniform = nvpflow.build(3, 2, (8,), transform="spline", base="uniform")
    for call in (
        lambda: FlowModule(uniform).sample(3, temperature=0.5),
        lambda: FlowDistribution(FlowModule(uniform), temperature=0.5),
        lambda: nj.sample_and_log_prob(uniform.spec, nj.parameters(uniform), None, 3, temperature=0.5),
    ):
        with pytest.raises(ValueError, match="only a normal base has a temperature"):
            call()
    assert FlowModule(uniform).sample(3, temperature=1).shape == (3, 3)


# ---- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, INTERVAL], ids=["normal", "uniform"])
@pytest.mark.parametrize("seed", range(6))
def test_the_score_is_the_gradient(seed, base) -> None:
    flow, oracle = make_case(seed, "float64", base)
    given = context_of(flow)
    x = flow.sample(7, seed=3, **given)
    found = flow.score(x, **given)
    each = repeated(given, len(x))
    step = 1e-6
    for j in range(x.shape[1]):
        ahead, behind = x.copy(), x.copy()
        ahead[:, j] += step
        behind[:, j] -= step
        wanted = (oracle.log_prob(ahead, **each) - oracle.log_prob(behind, **each)) / (2 * step)
        near = np.isfinite(wanted)
        np.testing.assert_allclose(found[near, j], wanted[near], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_score_of_rows_of_any_number(dtype) -> None:
    flow, _ = make_case(4, dtype)
    given = context_of(flow)
    x = np.random.default_rng(0).normal(size=(130, flow.spec.input_size)).astype(dtype)
    whole = flow.score(x, **given)
    assert_same_bits(whole, flow.log_prob_vjp(x, np.ones(130, dtype), wrt="x", **given)[0])
    out = np.empty_like(x)
    assert flow.score(x, out=out, **given) is out
    assert_same_bits(out, whole)
    for rows in (1, 33):
        assert_same_bits(flow.score(x[:rows], **given), whole[:rows])
    assert_same_bits(flow.score(x[0], **given), whole[0])
    if given:
        assert_same_bits(flow.condition(given["context"]).score(x), whole)
    with pytest.raises(ValueError, match="out overlaps x"):
        flow.score(x, out=x, **given)
    with pytest.raises(ValueError, match=r"out has shape \(130,\), expected"):
        flow.score(x, out=np.empty(130, dtype), **given)
