"""The networks of couplings: one for each head, LayerNorm, residual blocks; against the general oracle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvpflow
import pytest
from nvpflow import _core
from oracle import (
    ACTIVATIONS,
    assert_same_bits,
    assert_within_budget,
    finite_difference,
    unit_data,
)
from test_general_layers import Case, assert_gradients, well_conditioned

ROWS = (0, 1, 2, 3, 7, 16, 17, 33, 100, 1025)
WIDTHS = (1, 2, 3, 7, 16, 17, 33, 64, 100)
SIZE = 5
DTYPES = ("float64", "float32")

Spec = dict[str, Any]


def mlp(hidden_sizes: list[int], activation: str, layer_norm: bool = False) -> Spec:
    return {"kind": "mlp", "hidden_sizes": hidden_sizes, "activation": activation, "layer_norm": layer_norm}


def residual(hidden_size: int, num_blocks: int, activation: str, block_affines: bool = False) -> Spec:
    return {
        "kind": "residual",
        "hidden_size": hidden_size,
        "num_blocks": num_blocks,
        "activation": activation,
        "context_gates": False,
        "block_affines": block_affines,
    }


def flow_spec(*networks: Spec, input_size: int = SIZE, couplings: int = 2, dtype: str = "float64") -> Spec:
    """Affine couplings of alternating halves; two networks: one for each head."""
    names = ("network",) if len(networks) == 1 else ("scale_network", "translation_network")
    affine = {"kind": "affine", "log_scale": {"function": "tanh", "factor": 1.0, "divisor": 1.0}}
    return {
        "input_size": input_size,
        "context_size": 0,
        "standardize_context": False,
        "dtype": dtype,
        "base": {"kind": "normal"},
        "layers": [
            {
                "kind": "coupling",
                "inverse": k % 3 == 2,
                "transformed": "second_half" if k % 2 == 0 else "first_half",
                "transform": affine,
                **dict(zip(names, networks, strict=True)),
            }
            for k in range(couplings)
        ],
    }


def make(variant: tuple[Spec, ...], dtype: str, rows: int, **options: int) -> Case:
    spec = flow_spec(*variant, dtype=dtype, **options)
    rng = np.random.default_rng([rows, 0x2E75])
    x = rng.normal(size=(rows, spec["input_size"])).astype(dtype)
    return Case(well_conditioned(spec, rng, dtype, x[:200], None), dtype, x, None)


def networks() -> Iterator[tuple[Spec, ...]]:
    """Every variant at every width, with the activations in turn, and with every activation."""
    activations = itertools.cycle(ACTIVATIONS)
    sizes = [(width, next(activations)) for width in WIDTHS] + [(19, activation) for activation in ACTIVATIONS]
    for i, (width, act) in enumerate(sizes):
        yield mlp([width] * (i % 3), act), mlp([width + 1], next(activations))
        yield (mlp([max(2, width)] * (1 + i % 2), act, layer_norm=True),)
        yield mlp([max(2, width), 9], act, layer_norm=True), mlp([], act)
        yield (residual(width, i % 4, act),)
        yield (residual(width, (i + 1) % 4, act, block_affines=True),)


def name_of(networks: tuple[Spec, ...]) -> str:
    def one(network: Spec) -> str:
        words = [network["activation"]]
        if network["kind"] == "mlp":
            return "-".join([*map(str, network["hidden_sizes"]), *words, "norm" * network["layer_norm"]])
        return "-".join(
            [f"{network['num_blocks']}x{network['hidden_size']}", *words, "affine" * network["block_affines"]]
        )

    return "+".join(map(one, networks))


def check_values(variant: tuple[Spec, ...], dtype: str) -> None:
    """Both directions and the density, against the formula; a row's bits are the same wherever it stands."""
    case = make(variant, dtype, max(ROWS))
    flow, x = case.flow, case.x
    z, log_det = flow.forward(x)
    back, back_log_det = flow.inverse(x, with_log_det=True)
    log_prob = flow.log_prob(x)
    for actual, expected in zip((z, log_det), case.oracle.forward(x), strict=True):
        assert_within_budget(actual, expected, dtype, "forward")
    for actual, expected in zip((back, back_log_det), case.oracle.inverse(x), strict=True):
        assert_within_budget(actual, expected, dtype, "inverse")
    assert_within_budget(log_prob, case.oracle.log_prob(x), dtype, "log p")
    for rows in ROWS:
        for first in {0, max(ROWS) - rows}:
            part = slice(first, first + rows)
            assert_same_bits(flow.log_prob(x[part]), log_prob[part], f"log p of {rows} rows")
            assert_same_bits(flow.inverse(x[part]), back[part], f"x of {rows} rows")


def check_gradients(variant: tuple[Spec, ...], dtype: str) -> None:
    """vjp in both directions and nll_gradient, against the oracle's."""
    case = make(variant, dtype, 600, couplings=3)
    for direction in ("forward", "inverse"):
        margin = 2e-5 if dtype == "float32" else 1e-12  # of a kink, where rounding decides the branch
        smooth = case.oracle.smallest_pre_activation(case.x, direction) > margin
        x = case.x[smooth][:260]
        rng = np.random.default_rng(3)
        grad_out = (rng.normal(size=x.shape) / len(x)).astype(dtype)
        grad_log_det = (rng.normal(size=len(x)) / len(x)).astype(dtype)
        actual = case.flow.vjp(x, grad_out, grad_log_det, direction=direction)
        assert_gradients(case, actual, case.oracle.vjp(x, grad_out, grad_log_det, direction), len(x), direction)
        if direction == "forward":
            loss, gradient = case.flow.nll_gradient(x)
            expected_loss, expected = case.oracle.nll_gradient(x)
            assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == "float32" else 1e-12)
            assert_gradients(case, (None, gradient), expected, len(x), "nll")


NETWORKS = list(networks())
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@both_dtypes
@pytest.mark.parametrize("variant", NETWORKS, ids=name_of)
def test_values_are_the_formulas(variant, dtype) -> None:
    check_values(variant, dtype)


@both_dtypes
@pytest.mark.parametrize("variant", NETWORKS, ids=name_of)
def test_gradients_are_the_formulas(variant, dtype) -> None:
    check_gradients(variant, dtype)


@pytest.mark.parametrize(
    "variant",
    [
        (mlp([4], "silu"), mlp([3, 2], "tanh")),
        (mlp([3, 4], "gelu", layer_norm=True),),
        (residual(3, 2, "softplus"),),
        (residual(3, 2, "silu", block_affines=True),),
    ],
    ids=name_of,
)
def test_gradients_are_finite_differences(variant) -> None:
    """Of the formula, every parameter and every input, in both directions."""
    case = make(variant, "float64", 4, input_size=3)
    flow, oracle, x = case.flow, case.oracle, case.x
    grad_out, grad_log_det = unit_data(4, 3, 5), unit_data(4, 1, 6)[:, 0]

    for direction in ("forward", "inverse"):

        def loss(direction: str = direction) -> float:
            values, log_det = getattr(oracle, direction)(x)
            return float(np.sum(grad_out * values) + np.sum(grad_log_det * log_det))

        grad_x, gradient = flow.vjp(x, grad_out, grad_log_det, direction=direction)
        expected = []
        for name, value in oracle.parameters.items():

            def moved(at: np.ndarray, name: str = name) -> float:
                oracle.parameters[name] = at
                return loss()

            expected.append(finite_difference(moved, value).ravel())
            oracle.parameters[name] = value
        assert np.allclose(gradient, np.concatenate(expected), rtol=1e-6, atol=1e-7)

        def of_x(at: np.ndarray) -> float:
            values, log_det = getattr(oracle, direction)(at)  # noqa: B023
            return float(np.sum(grad_out * values) + np.sum(grad_log_det * log_det))

        assert np.allclose(grad_x, finite_difference(of_x, x), rtol=1e-6, atol=1e-7)


WIDE = [
    (mlp([90, 70], "relu"), mlp([130], "silu")),
    (mlp([130, 90], "relu", layer_norm=True),),
    (residual(130, 2, "relu"),),
    (residual(120, 2, "gelu", block_affines=True),),
]


@pytest.mark.parametrize("variant", WIDE, ids=name_of)
def test_threads_do_not_change_bits(variant) -> None:
    case = make(variant, "float32", 3001)
    flow, x = case.flow, case.x
    results = []
    for threads in (1, 2, 3, 5):
        flow.num_threads = threads
        loss, gradient = flow.nll_gradient(x)
        few_loss, few_gradient = flow.nll_gradient(x[:150])  # threads share one tile
        results.append([flow.log_prob(x), gradient, np.float64(loss), few_gradient, np.float64(few_loss)])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert_same_bits(same, one)


@both_dtypes
@pytest.mark.parametrize("variant", WIDE, ids=name_of)
def test_fit_lowers_the_loss(variant, dtype) -> None:
    spec = flow_spec(*variant, dtype=dtype)
    x = unit_data(2000, SIZE, 8, dtype)
    x[:, 1] = x[:, 0] ** 2 + 0.3 * x[:, 1]
    x[:, 4] += np.sin(2 * x[:, 2])

    def new() -> nvpflow.Flow:
        return nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)), 1)

    def fitted(threads: int) -> nvpflow.Flow:
        flow = new()
        flow.fit(x, epochs=4, batch_size=250, seed=2, progress=False, num_threads=threads)
        return flow

    flow = fitted(1)
    assert flow.nll(x) < new().nll(x) - 0.3
    assert_same_bits(fitted(3).nll_gradient(x[:9])[1], flow.nll_gradient(x[:9])[1])


@pytest.mark.parametrize("variant", WIDE, ids=name_of)
def test_rows_of_nan_stay_by_themselves(variant) -> None:
    case = make(variant, "float32", 67)
    flow, x = case.flow, case.x.copy()
    clean, (_, gradient) = flow.log_prob(x), flow.vjp(x, x)
    x[[3, 40, 66], [0, 4, 2]] = np.nan, np.inf, np.nan
    bad = [3, 40, 66]
    log_prob, (grad_x, _) = flow.log_prob(x), flow.vjp(x, x)
    assert np.isnan(log_prob[bad]).all()
    assert np.isnan(grad_x[bad]).all()
    assert np.isfinite(gradient).all()
    assert_same_bits(np.delete(log_prob, bad), np.delete(clean, bad))


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_every_instruction_set(isa, run_python) -> None:
    script = (
        "import test_networks as t\n"
        "for dtype in t.DTYPES:\n"
        "    for variant in t.NETWORKS[::9] + t.WIDE:\n"
        "        t.check_values(variant, dtype)\n"
        "        t.check_gradients(variant, dtype)\n"
        "print('done')"
    )
    assert run_python(script, env={"NVPFLOW_ISA": isa}, timeout=600).strip() == "done"
