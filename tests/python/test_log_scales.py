"""The log-scale functions of affine couplings: by themselves, far out, in flows, on every instruction set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import nvpflow
import pytest
from general_oracle import LOG_SCALES, GeneralFlow, scrambled
from nvpflow import _core
from oracle import assert_same_bits, assert_within_budget

DTYPES = ("float32", "float64")
FUNCTIONS = (
    *LOG_SCALES,
    {"function": "softplus", "low": 0.0, "high": None, "offset": 0.0, "negated": False},
    {"function": "softplus", "low": 0.0, "high": None, "offset": 1.0, "negated": True},
)
# By themselves only: a flow of them has numbers so large that their rounding is, too.
STEEP = (
    {"function": "softsign", "factor": 30.0, "divisor": 0.01},
    {"function": "atan", "factor": 0.001, "divisor": 50.0},
    {"function": "sigmoid", "low": 0.0, "high": 1e6, "offset": 0.0, "negated": False},
    {"function": "softplus", "low": 0.0, "high": 1e-5, "offset": -3.0, "negated": False},
)
BATCHES = (0, 1, 2, 3, 7, 16, 17, 33, 100, 1025)
SIZES = (2, 3, 6, 17, 33)
# |gradient - oracle| <= budget (1 + largest |oracle| of the tensor), of means over the rows.
GRADIENT_BUDGET = {"float32": 1e-5, "float64": 1e-13}


def flow_of(oracle: GeneralFlow, dtype: str) -> nvpflow.Flow:
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps({**oracle.spec, "dtype": dtype})))
    flow.set_parameters({name: value.astype(dtype) for name, value in oracle.parameters.items()})
    return flow


def spec_of(size: int, layers: list[Mapping[str, Any]], dtype: str) -> dict[str, Any]:
    return {
        "input_size": size,
        "context_size": 0,
        "standardize_context": False,
        "dtype": dtype,
        "base": {"kind": "normal"},
        "layers": layers,
    }


def coupling(function: Mapping[str, Any], transformed: Any, hidden: list[int], inverse: bool) -> dict[str, Any]:
    return {
        "kind": "coupling",
        "inverse": inverse,
        "transformed": transformed,
        "transform": {"kind": "affine", "log_scale": dict(function)},
        "network": {"kind": "mlp", "hidden_sizes": hidden, "activation": "silu", "layer_norm": False},
    }


# ------------------------------------------------------------------------------------------------ each by itself


def reference(function: Mapping[str, Any], u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s and ds / du in float64, without a sum that cancels or a scale that underflows."""
    name = function["function"]
    if name == "identity":
        return u, np.ones_like(u)
    if name in ("tanh", "softsign", "atan"):
        factor, v = function["factor"], u / function["divisor"]
        slope = factor / function["divisor"]
        if name == "tanh":
            return factor * np.tanh(v), slope / np.cosh(np.clip(v, -300, 300)) ** 2
        if name == "softsign":
            return factor * v / (1 + np.abs(v)), slope / (1 + np.abs(v)) ** 2
        return factor * np.arctan(v), slope / (1 + v * v)
    x, low = u + function["offset"], function["low"]
    high = math.inf if function["high"] is None else function["high"]
    e = np.exp(-np.abs(x))
    sigmoid, complement = np.where(x < 0, e, 1) / (1 + e), np.where(x < 0, 1, e) / (1 + e)
    with np.errstate(divide="ignore", invalid="ignore"):
        if name == "sigmoid" and low == 0:
            s, slope = math.log(high) + np.minimum(x, 0) - np.log1p(e), complement
        elif name == "sigmoid":
            v = low + (high - low) * sigmoid
            s, slope = np.log(v), (high - low) * sigmoid * complement / v
        else:
            v = np.maximum(x, 0) + np.log1p(e) + low
            far = (low == 0) & (x < -40)
            s, slope = np.where(far, x, np.log(v)), np.where(far, 1, sigmoid / v)
            s, slope = np.minimum(s, math.log(high)), np.where(s > math.log(high), 0, slope)
    return (-s, -slope) if function["negated"] else (s, slope)


def arguments(dtype: str) -> np.ndarray:
    """Close together, far out, near every change of formula, and down to the smallest numbers."""
    rng = np.random.default_rng(5)
    far = [1e4, 3e4, 110, 104, 103.5, 89, 88, 87, 60, 41, 39, 21, 20, 19, 10, 9, 8, 2, 1, 0.5, 1e-3, 1e-10, 1e-30, 0]
    if dtype == "float64":
        far += [800, 746, 745, 709, 708, 1e-300]
    u = np.concatenate([rng.uniform(-25, 25, 4000), rng.uniform(-3, 3, 4000), far, np.negative(far)])
    return u.astype(dtype)


def alone(function: Mapping[str, Any], dtype: str) -> nvpflow.Flow:
    """z = (u, x exp(g(u))): the network says its input."""
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec_of(2, [coupling(function, [1], [], False)], dtype))))
    parameters = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
    parameters["flow_0_scale.kernel"][:] = 1
    flow.set_parameters(parameters)
    return flow


def check_function(function: Mapping[str, Any], dtype: str) -> None:
    eps, tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    u = arguments(dtype)
    s, slope = reference(function, u.astype(np.float64))
    flow, rows = alone(function, dtype), np.stack([u, np.ones_like(u)], axis=1)
    margin = 16 * eps * (1 + np.abs(s))
    what = f"{function} in {dtype}"
    said, _ = flow._conditioner(0, rows)
    assert np.all(np.abs(said[:, 0] - s) <= margin), what

    for direction, sign in (("forward", 1.0), ("inverse", -1.0)):
        values, log_det = flow.forward(rows) if sign > 0 else flow.inverse(rows, with_log_det=True)
        with np.errstate(over="ignore"):
            scale = np.exp(sign * s)
        fits = scale < 0.5 * float(np.finfo(dtype).max)
        np.testing.assert_array_equal(values[fits, 0], u[fits])
        assert not np.isnan(values).any(), what
        error = np.abs(values[fits, 1] - scale[fits]) / (margin[fits] * scale[fits] + tiny)
        assert error.max() <= 1, f"{what}: the scale at {u[fits][error.argmax()]} is off by {error.max():.3g} margins"
        error = np.abs(log_det - sign * s)[fits] / margin[fits]
        assert error.max() <= 1, f"{what}: s at {u[fits][error.argmax()]} is off by {error.max():.3g} margins"
        # A row whose scale overflows is infinite, and its density is 0.
        assert np.isinf(values[scale > 1.01 * float(np.finfo(dtype).max), 1]).all(), what

        near_cap = np.zeros_like(fits)
        if function["function"] == "softplus" and function["high"] is not None:
            v = np.logaddexp(0, u.astype(np.float64) + function["offset"]) + function["low"]
            near_cap = np.abs(v / function["high"] - 1) < 64 * eps
        grad, _ = flow.vjp(rows, np.zeros_like(rows), np.ones_like(u), direction=direction)
        wanted = sign * slope
        # That of tanh comes from the rounded tanh: its error does not shrink with it. Rounding u + offset moves a
        # small sigmoid by a part of itself.
        allowed = eps * (64 + 4 * np.abs(u)) * np.abs(wanted) + tiny
        if function["function"] == "tanh":
            allowed += 8 * eps * function["factor"] / function["divisor"]
        checked = fits & ~near_cap
        error = (np.abs(grad[:, 0] - wanted) / allowed)[checked]
        assert error.max() <= 1, f"{what}: ds / du at {u[checked][error.argmax()]} is off by {error.max():.3g} margins"


# ---------------------------------------------------------------------------------------------------- in a flow


def flow_case(function: Mapping[str, Any], size: int, dtype: str) -> tuple[GeneralFlow, nvpflow.Flow, np.ndarray]:
    layers = [
        coupling(function, "second_half", [7], False),
        coupling(function, "first_half", [], True),
        coupling(function, "odd", [5, 6], False),
    ]
    spec = spec_of(size, layers, dtype)
    rng = np.random.default_rng(size)
    parameters = {
        name: value.astype(dtype).astype(np.float64) for name, value in scrambled(spec, rng, kernel_scale=0.2).items()
    }
    oracle = GeneralFlow(spec, parameters)
    return oracle, flow_of(oracle, dtype), rng.normal(size=(BATCHES[-1], size)).astype(dtype)


def results(flow: nvpflow.Flow, x: np.ndarray) -> tuple[np.ndarray, ...]:
    return (*flow.forward(x), *flow.inverse(x, with_log_det=True), flow.log_prob(x))


def check_batches(function: Mapping[str, Any], size: int, dtype: str) -> None:
    """Tiles and a few rows give the same bits, also those on the tape."""
    _, flow, x = flow_case(function, size, dtype)
    whole = results(flow, x)
    for batch in BATCHES:
        first = (len(x) - batch) // 2
        for part, expected in zip(results(flow, x[first : first + batch]), whole, strict=True):
            assert_same_bits(part, expected[first : first + batch], f"{function}, {batch} rows of {size}")
    taped, _ = flow._log_prob_and_vjp(x, np.ones(len(x), dtype), wrt="parameters")
    assert_same_bits(taped, whole[-1], f"{function}, log_prob beside its gradient")


_ISA = """
import sys
import nvpflow
from test_log_scales import DTYPES, FUNCTIONS, SIZES, STEEP, check_batches, check_function
assert nvpflow.cpu_isa() == sys.argv[1]
for dtype in DTYPES:
    for i, function in enumerate(FUNCTIONS):
        check_function(function, dtype)
        check_batches(function, SIZES[i % len(SIZES)], dtype)
    for function in STEEP:
        check_function(function, dtype)
print("done")
"""


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_every_instruction_set_has_every_function(run_python, isa) -> None:
    assert run_python(_ISA, isa, env={"NVPFLOW_ISA": isa}).strip() == "done"


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param


def name_of(function: Any) -> str | None:
    return "-".join(map(str, function.values())) if isinstance(function, dict) else None


over_functions = pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
over_functions_and_steep = pytest.mark.parametrize("function", FUNCTIONS + STEEP, ids=name_of)


@over_functions
@pytest.mark.parametrize("size", SIZES)
def test_flows_are_the_oracles(function, size, dtype) -> None:
    oracle, flow, x = flow_case(function, size, dtype)
    for actual, expected in zip(
        results(flow, x), (*oracle.forward(x), *oracle.inverse(x), oracle.log_prob(x)), strict=True
    ):
        assert_within_budget(actual, expected, dtype, str(function))


@over_functions
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_are_the_oracles(function, size, direction, dtype) -> None:
    oracle, flow, x = flow_case(function, size, dtype)
    x = x[oracle.smallest_pre_activation(x, direction) > 1e-4][:33]
    rng = np.random.default_rng(size)
    grad_out = (rng.normal(size=x.shape) / len(x)).astype(dtype)
    grad_log_det = (rng.normal(size=len(x)) / len(x)).astype(dtype)
    expected = oracle.vjp(x, grad_out, grad_log_det, direction)
    grad, flat = flow.vjp(x, grad_out, grad_log_det, direction=direction)
    wanted = np.concatenate([value.ravel() for value in expected.parameters.values()])
    for actual, correct in ((grad * len(x), expected.x * len(x)), (flat, wanted)):
        assert np.max(np.abs(actual - correct)) <= GRADIENT_BUDGET[dtype] * (1 + np.max(np.abs(correct)))


@over_functions
def test_the_gradient_of_the_mean_agrees_with_its_differences(function) -> None:
    """The one direct check: differences of the flow's own nll, no oracle in between."""
    _, flow, x = flow_case(function, 5, "float64")
    parameters = {name: value.copy() for name, value in flow.parameters().items()}
    names = [name for name in parameters if "scale" in name]
    x, offset, flat = x[:20], 0, flow.nll_gradient(x[:20])[1]
    step = 6e-6
    for name, value in parameters.items():
        gradient, offset = flat[offset : offset + value.size], offset + value.size
        for at in range(value.size if name in names else 0):
            losses = []
            for h in (step, -step):
                moved = value.copy()
                moved.flat[at] += h
                flow.set_parameters({**parameters, name: moved})
                losses.append(flow.nll(x))
            difference = (losses[0] - losses[1]) / (2 * step)
            assert gradient[at] == pytest.approx(difference, rel=1e-7, abs=1e-8 * (1 + abs(losses[0])))


# -------------------------------------------------------------------------------------------------------- the edges


def test_a_scale_that_overflows_is_its_rows_own(dtype) -> None:
    flow = alone({"function": "identity"}, dtype)
    x = np.ones((100, 2), dtype)
    clean = flow.forward(x)
    x[[3, 40], 0] = 1e4
    z, log_det = flow.forward(x)
    assert np.isinf(z[[3, 40], 1]).all()
    np.testing.assert_array_equal(flow.log_prob(x)[[3, 40]], -np.inf)
    rest = np.delete(np.arange(100), [3, 40])
    assert_same_bits(z[rest], clean[0][rest])
    assert_same_bits(log_det[rest], clean[1][rest])


@over_functions_and_steep
def test_a_finite_row_is_never_nan(function, dtype) -> None:
    huge = float(np.finfo(dtype).max)
    flow = alone(function, dtype)
    far = np.array([1e4, -1e4, huge, -huge, 0, 1], dtype)
    x = np.stack(np.meshgrid(far, far), axis=-1).reshape(-1, 2)
    for rows in (len(x), 1):
        for at in range(0, len(x), rows):
            for result in results(flow, x[at : at + rows]):
                assert not np.isnan(result).any()


def refusal(function: Mapping[str, Any], dtype: str) -> Callable[[], object]:
    return lambda: nvpflow.FlowSpec.from_json(json.dumps(spec_of(2, [coupling(function, [1], [], False)], dtype)))


def test_constants_that_float32_cannot_hold_are_refused() -> None:
    plain = {"function": "softplus", "low": 0.0, "high": None, "offset": 0.0, "negated": False}
    for field, value, expected in (
        ("low", 1e-40, "finite and > 0 in float32"),
        ("low", 1e300, "finite and > 0 in float32"),
        ("low", -1.0, "finite and >= 0"),
        ("offset", 1e300, "finite in float32"),
        ("offset", -1e300, "finite in float32"),
    ):
        with pytest.raises(nvpflow.FileFormatError, match=rf"log_scale\.{field} is .*, expected {expected}"):
            refusal({**plain, field: value}, "float32")()
        if value > -1:
            refusal({**plain, field: value}, "float64")()
