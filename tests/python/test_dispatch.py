"""Every instruction set that this build and this processor share, forced one by one in a process of its own."""

from __future__ import annotations

import numpy as np
import nvpflow
import pytest
from nvpflow import _core
from oracle import ulp_error

_SCORE = """
import sys
import numpy as np, nvpflow
from oracle import assert_within_budget, oracle_of, random_parameters, standard_normals, ulp_error, unit_data
isa = sys.argv[1]
assert nvpflow.cpu_isa() == isa, nvpflow.cpu_isa()
for dtype in ("float32", "float64"):
    for size, flows, hidden, activation in [
        (2, 2, (), "relu"), (7, 3, (7, 5), "gelu"), (16, 4, (128,), "relu"), (17, 2, (33,), "softplus"),
        (31, 2, (64,), "elu"), (6, 2, (9,), "silu"), (9, 2, (20,), "tanh"), (5, 3, (11,), "sigmoid"),
        (8, 2, (65,), "leaky_relu"),
        (64, 2, (512, 512), "relu"),  # weights beyond the second-level cache
        (9, 1, (2100, 2100), "leaky_relu"),  # and beyond all of them
    ]:
        flow = nvpflow.build(size, flows, hidden, activation, dtype=dtype, standardize=True)
        shapes = {name: value.shape for name, value in flow.parameters().items()}
        flow.set_parameters({name: value.astype(dtype) for name, value in random_parameters(shapes, 1).items()})
        oracle = oracle_of(flow)
        x = unit_data(257, size, 2, dtype)
        log_prob = oracle.log_prob(x)
        back, inverse_log_det = oracle.inverse(x)
        for rows in (1, 3, 8, 16, 23, 31, 33, 64, 257):
            assert_within_budget(flow.log_prob(x[:rows]), log_prob[:rows], dtype, "log_prob")
            got_back, got_log_det = flow.inverse(x[:rows], with_log_det=True)
            assert_within_budget(got_back, back[:rows], dtype, "inverse")
            assert_within_budget(got_log_det, inverse_log_det[:rows], dtype, "inverse log_det")
            assert np.array_equal(flow.log_prob(x[:rows]), flow.log_prob(x)[:rows]), f"{rows} rows"
        if activation not in ("relu", "leaky_relu"):
            loss, gradient = flow.nll_gradient(x)
            expected_loss, expected = oracle.nll_gradient(x)
            flat = np.concatenate([value.ravel() for value in expected.values()])
            error = np.max(np.abs(gradient - flat)) / (1 + np.max(np.abs(flat)))
            assert error <= (1e-5 if dtype == "float32" else 2e-14), error
    flow = nvpflow.build(input_size=5, num_flows=1, hidden_sizes=(), dtype=dtype)
    flow.set_parameters({name: np.zeros_like(value) for name, value in flow.parameters().items()})
    if np.finfo(np.longdouble).nmant >= 63:
        assert np.max(ulp_error(flow.sample(300, seed=9), standard_normals(9, range(300), 5, dtype))) <= 2
print("done")
"""


def test_one_is_chosen_and_it_is_the_best() -> None:
    available = _core.cpu_isas_available()
    assert isinstance(available, tuple)
    assert nvpflow.cpu_isa() in available
    assert set(available) <= {"baseline", "avx2", "avx512", "neon"}
    assert available[-1] == "baseline", "the one that always runs comes last"


def test_without_a_wish_the_best_one_runs(run_python, monkeypatch) -> None:
    monkeypatch.delenv("NVPFLOW_ISA", raising=False)
    output = run_python("import nvpflow; print(nvpflow.cpu_isa(), nvpflow._core.cpu_isas_available()[0])")
    chosen, best = output.split()
    assert chosen == best


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_a_forced_instruction_set_runs_and_agrees_with_the_oracle(run_python, isa) -> None:
    assert run_python(_SCORE, isa, env={"NVPFLOW_ISA": isa}).strip() == "done"


@pytest.mark.parametrize("value", ["avx1024", "AVX2 ", "none", "0"])
def test_an_unknown_one_is_refused_with_the_known_ones(run_python, value) -> None:
    result = run_python("import nvpflow; nvpflow.build(input_size=4)", env={"NVPFLOW_ISA": value}, check=False)
    assert result.returncode == 1, "not an exception"
    message = result.stderr.strip().splitlines()[-1]
    assert "NVPFLOW_ISA" in message
    assert value.strip() in message
    for known in _core.cpu_isas_available():
        assert known in message


def test_one_of_another_processor_is_refused(run_python) -> None:
    missing = next(isa for isa in ("neon", "avx2") if isa not in _core.cpu_isas_available())
    result = run_python("import nvpflow; nvpflow.build(input_size=4)", env={"NVPFLOW_ISA": missing}, check=False)
    assert result.returncode == 1
    assert "NVPFLOW_ISA" in result.stderr
    assert missing in result.stderr


def test_the_empty_value_is_no_wish(run_python) -> None:
    output = run_python("import nvpflow; print(nvpflow.cpu_isa())", env={"NVPFLOW_ISA": ""})
    assert output.strip() == _core.cpu_isas_available()[0]


def test_normals_agree_between_instruction_sets(run_python, tmp_path) -> None:
    """The same seed and row give the same noise to 2 ulp: what a flow of zeros samples is its noise."""
    script = """
import sys
import numpy as np, nvpflow
for dtype in ("float32", "float64"):
    flow = nvpflow.build(5, 1, (), dtype=dtype)
    flow.set_parameters({name: np.zeros_like(value) for name, value in flow.parameters().items()})
    np.save(f"{sys.argv[1]}_{dtype}.npy", flow.sample(100_000, seed=3))
"""
    for isa in _core.cpu_isas_available():
        run_python(script, tmp_path / isa, env={"NVPFLOW_ISA": isa})
    for dtype in ("float32", "float64"):
        first, *others = (np.load(tmp_path / f"{isa}_{dtype}.npy") for isa in _core.cpu_isas_available())
        for other in others:
            assert np.max(ulp_error(first, other)) <= 2
