"""`sample_and_log_prob`: the rows of `sample` with their log p, in every interface of Python that draws."""

from __future__ import annotations

import numpy as np
import nvpflow
import pytest
from cases import DTYPES, flow_and_oracle
from general_oracle import base_log_density, random_spec
from oracle import assert_same_bits, assert_within_budget

INTERVAL = {"kind": "uniform", "low": -1.5, "high": 2.25}
STUDENT = {"kind": "student_t", "df": 4.0, "trainable": True}
MIXTURE = {"kind": "mixture", "components": 3, "covariance": "full"}


def make_case(seed: int, dtype: str, base: dict | None = None):
    """A flow of random layers, and its oracle."""
    rng = np.random.default_rng([seed, 0x5A])
    spec = random_spec(rng, dtype=dtype, max_size=18)
    if base is not None:
        spec = {**spec, "base": base}
    return flow_and_oracle(spec, rng)


def context_of(flow: nvpflow.Flow, count: int | None = None) -> dict[str, np.ndarray]:
    size = flow.spec.context_size
    shape = (size,) if count is None else (count, size)
    return {"context": np.random.default_rng(3).normal(size=shape).astype(flow.spec.dtype)} if size else {}


@pytest.mark.parametrize("base", [None, INTERVAL, STUDENT, MIXTURE], ids=["normal", "uniform", "student_t", "mixture"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_of_sample_and_densities_those_of_the_oracle(seed, dtype, base) -> None:
    flow, oracle = make_case(seed, dtype, base)
    given = context_of(flow)
    x, log_p = flow.sample_and_log_prob(150, seed=5, **given)
    assert_same_bits(x, flow.sample(150, seed=5, **given))
    assert log_p.dtype == dtype
    assert log_p.shape == (150,)
    z = flow._noise(150, 5).astype(np.float64)
    each = {name: np.tile(value.astype(np.float64), (150, 1)) for name, value in given.items()}
    _, log_det = oracle.inverse(z, **each)
    assert_within_budget(log_p, base_log_density(oracle.spec, z, oracle.parameters) - log_det, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_cut_or_the_threads(dtype) -> None:
    for seed in range(4):
        flow, _ = make_case(seed, dtype)
        given = context_of(flow)
        x, log_p = flow.sample_and_log_prob(300, seed=1, **given)
        for threads, step in ((1, 1), (3, 7), (2, 64)):
            flow.num_threads = threads
            for start in range(0, 300, step):
                part = flow.sample_and_log_prob(min(step, 300 - start), seed=1, start=start, **given)
                assert_same_bits(part[0], x[start : start + step])
                assert_same_bits(part[1], log_p[start : start + step])


@pytest.mark.parametrize("dtype", DTYPES)
def test_densities_are_those_that_log_prob_finds(dtype) -> None:
    flow = nvpflow.build(6, 4, (32,), dtype=dtype, standardize=True, seed=2)
    rng = np.random.default_rng(0)
    flow.fit(rng.normal(size=(500, 6)).astype(dtype) * 3 + 1, epochs=2, validation=None, progress=False)
    x, log_p = flow.sample_and_log_prob(2000, seed=8)
    assert_within_budget(log_p, flow.log_prob(x).astype(np.float64), dtype)


def test_rows_of_float64_from_a_flow_of_float32() -> None:
    flow = nvpflow.build(3, 2, (8,), standardize=True, seed=1)
    flow.initialize_from(np.random.default_rng(0).normal(size=(100, 3)) + 1e6)
    x, log_p = flow.sample_and_log_prob(70, seed=4, dtype="float64")
    assert x.dtype == np.float64
    assert log_p.dtype == np.float32
    assert_same_bits(x, flow.sample(70, seed=4, dtype="float64"))
    assert_within_budget(log_p, flow.log_prob(x).astype(np.float64), "float32")
    narrow, same = flow.sample_and_log_prob(70, seed=4)
    assert_same_bits(narrow, flow.sample(70, seed=4))
    assert_same_bits(same, log_p)


def test_contexts() -> None:
    flow = nvpflow.build(3, 3, (17,), context_size=2, seed=3)
    contexts = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    x, log_p = flow.sample_and_log_prob(40, seed=2, context=contexts)
    assert (x.shape, log_p.shape) == ((5, 40, 3), (5, 40))
    assert_same_bits(x, flow.sample(40, seed=2, context=contexts))
    for m, context in enumerate(contexts):
        one = flow.sample_and_log_prob(40, seed=2, start=40 * m, context=context)
        given = flow.condition(context).sample_and_log_prob(40, seed=2, start=40 * m)
        for found in (one, given):
            assert_same_bits(found[0], x[m])
            assert_same_bits(found[1], log_p[m])
    lost, density = flow.sample_and_log_prob(3, seed=2, context=np.array([np.nan, 0], np.float32))
    assert np.isnan(lost).all()
    assert np.isnan(density).all()
    assert flow.sample_and_log_prob(0, seed=2, context=contexts)[1].shape == (5, 0)


def test_arrays_of_the_callers_own() -> None:
    flow = nvpflow.build(3, 2, (8,), seed=1)
    x, log_p = flow.sample_and_log_prob(10, seed=1)
    out = np.full((10, 3), np.nan, np.float32), np.full(10, np.nan, np.float32)
    found = flow.sample_and_log_prob(10, seed=1, out=out)
    assert found[0] is out[0]
    assert found[1] is out[1]
    assert_same_bits(out[0], x)
    assert_same_bits(out[1], log_p)
    assert flow.sample_and_log_prob(10, seed=1, out=(None, out[1]))[1] is out[1]
    memory = np.zeros(40, np.float32)
    with pytest.raises(ValueError, match=r"out\[0\] \(x\) overlaps out\[1\] \(log_prob\)"):
        flow.sample_and_log_prob(10, out=(memory[:30].reshape(10, 3), memory[20:30]))
    with pytest.raises(ValueError, match=r"out\[1\] \(log_prob\) has shape \(9,\), expected \(10,\)"):
        flow.sample_and_log_prob(10, out=(out[0], np.zeros(9, np.float32)))
    with pytest.raises(TypeError, match="tuple"):
        flow.sample_and_log_prob(10, out=out[0])
    for wrong in ("10", -1, 2.5):
        with pytest.raises((TypeError, ValueError), match="n is"):
            flow.sample_and_log_prob(wrong)
    with pytest.raises(TypeError, match="sample_and_log_prob"):
        flow.sample_and_log_prob(3, rows=2)


def test_seeds_of_the_system_differ() -> None:
    flow = nvpflow.build(3, 2, (8,))
    first, second = (flow.sample_and_log_prob(5)[0] for _ in range(2))
    assert not np.array_equal(first, second)
