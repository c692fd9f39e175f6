"""Finite rows whose numbers leave the format: their log-density is -inf, and nothing is NaN."""

from __future__ import annotations

import numpy as np
import nvpflow
import pytest
from nvpflow import _core
from oracle import assert_same_bits, oracle_of, random_parameters, unit_data

DTYPES = ("float32", "float64")
# As in tables: markers for missing values, of netCDF and of rasters, and what overflows when it is squared.
FILLS = (-9999.0, 1e18, 3e19, 9.969209968386869e36, -3.4028234663852886e38, 3.4028234663852886e38)
SPECS = (
    (2, (), "relu", False),
    (3, (16,), "relu", True),
    (6, (64, 64), "relu", False),
    (17, (33,), "elu", False),
    (6, (7, 5), "gelu", True),
    (31, (9,), "silu", False),
    (5, (16,), "tanh", True),
    (7, (8,), "sigmoid", False),
    (4, (12,), "softplus", False),
    (16, (24,), "leaky_relu", True),
)


def filled_rows(size: int, dtype: str, rows: int = 130) -> np.ndarray:
    """Unit data; in two rows of three some columns or all hold a fill value, for float64 squared as well."""
    rng = np.random.default_rng(size)
    x = unit_data(rows, size, 3, dtype)
    values = [float(np.finfo(dtype).max) if abs(v) > 3.4e38 and dtype == "float64" else v for v in FILLS]
    if dtype == "float64":
        values += [1e160, -1.2e200]
    for r in range(0, rows, 3):
        columns = rng.random(size) < rng.choice([0.2, 0.5, 1.0])
        columns[rng.integers(size)] = True
        x[r, columns] = np.copysign(1, rng.normal()) * values[r // 3 % len(values)]
    return x


def results(flow, x: np.ndarray) -> list[np.ndarray]:
    return [flow.log_prob(x), *flow.forward(x), *flow.inverse(x, with_log_det=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "hidden", "activation", "standardize"), SPECS)
def test_finite_rows_are_never_nan(make_flow, size, hidden, activation, standardize, dtype) -> None:
    flow, oracle = make_flow(size, 4, hidden, activation, dtype=dtype, standardize=standardize)
    x = filled_rows(size, dtype)
    log_prob, z, log_det, back, inverse_log_det = results(flow, x)
    assert np.all(log_prob < np.inf)  # false for NaN
    assert not np.isnan(z).any()
    assert not np.isnan(back).any()
    assert np.all(log_det < np.inf)
    assert np.all(inverse_log_det > -np.inf)
    # Of the density itself, -inf and nothing but -inf is beyond the format.
    expected = oracle.log_prob(x)
    largest = float(np.finfo(dtype).max)
    beyond, inside = expected < -1.01 * largest, expected > -0.01 * largest
    if dtype == "float64":
        beyond = expected == -np.inf
    assert beyond.any()
    np.testing.assert_array_equal(log_prob[beyond], -np.inf)
    np.testing.assert_allclose(log_prob[inside], expected[inside], rtol=2e-5, atol=1e-4)
    # A limit raises its alarm: the filled rows lie below every ordinary one.
    ordinary = np.abs(x).max(axis=1) < 10
    assert log_prob[~ordinary].max() < log_prob[ordinary].min()


_SAME_BITS = """
import sys
import numpy as np, nvpflow
from test_overflow import DTYPES, SPECS, check_paths
assert nvpflow.cpu_isa() == sys.argv[1]
for dtype in DTYPES:
    for size, hidden, activation, standardize in SPECS:
        check_paths(size, hidden, activation, standardize, dtype)
print("done")
"""


def check_paths(size, hidden, activation, standardize, dtype) -> None:
    """Tiles and a few rows, full and rounded weights, gradients: the same bits, with rows of NaN and inf between."""
    for weights in ("full", "bfloat16") if dtype == "float32" else ("full",):
        flow = nvpflow.build(size, 4, hidden, activation, dtype=dtype, standardize=standardize, weights=weights)
        shapes = {name: value.shape for name, value in flow.parameters().items()}
        flow.set_parameters({name: value.astype(dtype) for name, value in random_parameters(shapes, 1).items()})
        x = filled_rows(size, dtype)
        bad = [7, 40, 41]
        x[bad, 0] = np.nan, np.inf, -np.inf
        whole = results(flow, x)
        finite = np.isfinite(x).all(axis=1)
        for result in whole:
            assert np.isnan(result[~finite]).all()
            assert not np.isnan(result[finite]).any()
        for rows in (1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 33):
            pieces = [results(flow, x[at : at + rows]) for at in range(0, len(x), rows)]
            for name, together, *parts in zip(
                ("log_prob", "z", "log_det", "x", "log_det"), whole, *pieces, strict=True
            ):
                assert_same_bits(np.concatenate(parts), together, f"{name} of {rows} rows")
        taped, _ = flow._log_prob_and_vjp(x, np.ones(len(x), dtype), wrt="parameters")
        assert_same_bits(taped[finite], whole[0][finite], "log_prob beside its gradient")
        assert np.isnan(taped[~finite]).all()


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_every_path_says_the_same(run_python, isa) -> None:
    assert run_python(_SAME_BITS, isa, env={"NVPFLOW_ISA": isa}).strip() == "done"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_and_its_gradient_say_so(make_flow, dtype) -> None:
    flow, _ = make_flow(6, 3, (9,), "relu", dtype=dtype)
    x = unit_data(50, 6, 1, dtype)
    x[13] = np.finfo(dtype).max
    assert flow.nll(x) == np.inf
    loss, _ = flow.nll_gradient(x)
    assert loss == np.inf
    grad, _ = flow.log_prob_vjp(x, np.ones(50, dtype))
    assert list(np.flatnonzero(~np.isfinite(grad).all(axis=1))) == [13]
    x[14, 0] = np.nan
    assert np.isnan(flow.nll(x))
    assert np.isnan(flow.nll_gradient(x)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_overflow_give_infinities(make_flow, dtype) -> None:
    """Samples too, whose noise is always finite."""
    flow, _ = make_flow(6, 3, (9,), "relu", dtype=dtype)
    huge = {name: value * np.finfo(dtype).max ** 0.5 for name, value in flow.parameters().items()}
    flow.set_parameters({name: value.astype(dtype) for name, value in huge.items()})
    x = flow.sample(100, seed=1)
    assert not np.isfinite(x).all()
    for result in (x, *results(flow, unit_data(100, 6, 1, dtype))):
        assert not np.isnan(result).any()


def test_the_oracle_settles_what_it_has_lost() -> None:
    flow = nvpflow.build(input_size=4, num_flows=2, hidden_sizes=(), dtype="float64")
    flow.set_parameters({name: np.ones_like(value) for name, value in flow.parameters().items()})
    x = np.array([[1e308, -1e308, 1e308, -1e308], [1.6e308, 1.6e308, -1.6e308, -1.6e308], [np.nan, 0, 0, 0]])
    oracle = oracle_of(flow)
    z, log_det = oracle.forward(x)
    assert not np.isnan(z[:2]).any()
    assert np.isnan(z[2]).all()
    assert np.isnan(log_det[2])
    assert list(oracle.log_prob(x)[:2]) == [-np.inf, -np.inf]
