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
