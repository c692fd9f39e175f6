"""lu_linear layers against the float64 oracle: values, gradients, and that no bit depends on how a call is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import nvpflow
import pytest
from general_oracle import GeneralFlow, scrambled
from nvpflow import _core
from oracle import assert_same_bits, finite_difference, unit_data

LINEAR, BACKWARDS = {"kind": "lu_linear", "inverse": False}, {"kind": "lu_linear", "inverse": True}
ROWS = (0, 1, 2, 3, 7, 16, 17, 33, 100, 1025)
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def coupling(transformed: Any = "odd", hidden: Sequence[int] = (5,), inverse: bool = False) -> dict[str, Any]:
    network = {"kind": "mlp", "hidden_sizes": list(hidden), "activation": "tanh", "layer_norm": False}
    log_scale = {"function": "tanh", "factor": 1.0, "divisor": 1.0}
    return {
        "kind": "coupling",
        "inverse": inverse,
        "transformed": transformed,
        "transform": {"kind": "affine", "log_scale": log_scale},
        "network": network,
    }


def reversal(size: int) -> dict[str, Any]:
    return {"kind": "permutation", "order": list(range(size))[::-1]}


def document(size: int, layers: Sequence[dict[str, Any]], dtype: str) -> dict[str, Any]:
    return {
        "input_size": size,
        "context_size": 0,
        "dtype": dtype,
        "base": {"kind": "normal"},
        "standardize_context": False,
        "layers": list(layers),
    }


def pair(
    size: int, layers: Sequence[dict[str, Any]], dtype: str = "float64", seed: int = 0, **options: Any
) -> tuple[nvpflow.Flow, GeneralFlow]:
    """A flow with parameters far from the identity, and its oracle on the same numbers."""
    spec = document(size, layers, dtype)
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)), **options)
    values = {name: v.astype(dtype) for name, v in scrambled(spec, np.random.default_rng(seed)).items()}
    flow.set_parameters(values)
    return flow, GeneralFlow(spec, {name: v.astype(np.float64) for name, v in values.items()})


def assert_close(actual: np.ndarray, expected: np.ndarray, dtype: str, ulps: float, what: str = "") -> None:
    """Against the largest of all numbers: sums over features and rows cancel."""
    assert actual.shape == expected.shape
    error = np.max(np.abs(actual - expected), initial=0.0)
    allowed = ulps * EPS[dtype] * (1.0 + np.max(np.abs(expected), initial=0.0))
    assert error <= allowed, f"{what}: {error} > {allowed}"


def run(flow: nvpflow.Flow, direction: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return flow.forward(x) if direction == "forward" else flow.inverse(x, with_log_det=True)


def flat(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Of the whole layout; a sign, which is never trained, has none."""
    return np.concatenate([0 * v.ravel() if name.endswith(".sign") else v.ravel() for name, v in gradients.items()])


LAYERS = {
    "alone": lambda size: [LINEAR, coupling()],
    "backwards": lambda size: [BACKWARDS, coupling()],
    # Features lie elsewhere in a tile before and behind each of the matrices.
    "placed": lambda size: [
        coupling("odd"),
        reversal(size),
        LINEAR,
        coupling("even"),
        BACKWARDS,
        reversal(size),
        coupling("first_half", inverse=True),
        LINEAR,
        LINEAR,
    ],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_are_the_oracles_and_tiles_give_the_bits_of_rows(name: str, dtype: str) -> None:
    for size in (*range(2, 20), 31, 32, 33, 47, 64, 65, 70, 128):
        flow, oracle = pair(size, LAYERS[name](size), dtype, seed=size)
        x = unit_data(ROWS[-1], size, 1, dtype)
        for direction in ("forward", "inverse"):
            whole, whole_log_det = run(flow, direction, x)
            values, log_det = getattr(oracle, direction)(x.astype(np.float64))
            assert_close(whole, values, dtype, 16.0 * size, f"{direction} of {size} columns")
            assert_close(whole_log_det, log_det, dtype, 16.0 * size, f"{direction} log_det of {size} columns")
            for rows in ROWS[:-1]:
                part, part_log_det = run(flow, direction, x[:rows])
                assert_same_bits(part, whole[:rows], f"{rows} rows of {size} columns")
                assert_same_bits(part_log_det, whole_log_det[:rows], f"{rows} rows of {size} columns")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_way_back_ends_where_it_began_beside_a_large_bias(dtype: str) -> None:
    flow, _ = pair(12, [LINEAR, coupling()], dtype)
    values = {name: 0 * v if name.startswith("flow_0") else v for name, v in flow.parameters().items()}
    bias = 100.0 * np.sign(values["lu_linear_0.bias"])
    flow.set_parameters({**values, "lu_linear_0.bias": bias.astype(dtype)})
    x = unit_data(1000, 12, 2, dtype)
    # A bias taken off after the product would lose a digit more than y itself does.
    y, _ = flow.forward(x)
    assert np.max(np.abs(flow.inverse(y) - x)) <= 4 * EPS[dtype] * np.max(np.abs(y))
    assert np.max(np.abs(flow.forward(flow.inverse(y))[0] - y)) <= 4 * EPS[dtype] * np.max(np.abs(y))


def test_a_new_layer_is_the_identity() -> None:
    spec = nvpflow.FlowSpec.from_json(json.dumps(document(7, [LINEAR, BACKWARDS, coupling(hidden=())], "float32")))
    flow = nvpflow.Flow(spec)
    flow.set_parameters({n: v if n.startswith("lu") else np.zeros_like(v) for n, v in flow.parameters().items()})
    x = unit_data(50, 7, 0, "float32")
    z, log_det = flow.forward(x)
    assert_same_bits(z, x)
    assert np.all(log_det == 0)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("layer", [LINEAR, BACKWARDS], ids=["plain", "inverse"])
def test_gradients_are_finite_differences(direction: str, layer: dict[str, Any]) -> None:
    size, rows = 4, 9
    flow, _ = pair(size, [reversal(size), coupling("odd"), layer, coupling("even")])
    rng = np.random.default_rng(3)
    x, g_out, g_log_det = rng.normal(size=(rows, size)), rng.normal(size=(rows, size)), rng.normal(size=rows)
    g_x, gradient = flow.vjp(x, g_out, g_log_det, direction=direction)
    start = {name: value.copy() for name, value in flow.parameters().items()}

    def value(x: np.ndarray) -> float:
        out, log_det = run(flow, direction, x)
        return float(np.sum(g_out * out) + np.sum(g_log_det * log_det))

    np.testing.assert_allclose(g_x, finite_difference(value, x), rtol=0, atol=2e-8)
    offset = 0
    for name, tensor in start.items():
        found = gradient[offset : offset + tensor.size].reshape(tensor.shape)
        offset += tensor.size
        if name.endswith(".sign"):
            assert np.all(found == 0)
            continue

        def moved(at: np.ndarray, name: str = name) -> float:
            flow.set_parameters({**start, name: at})
            return value(x)

        np.testing.assert_allclose(found, finite_difference(moved, tensor), rtol=0, atol=2e-8, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_oracles(name: str, dtype: str) -> None:
    for size, rows in ((2, 5), (3, 700), (17, 33), (33, 257), (70, 130), (128, 40)):
        flow, oracle = pair(size, LAYERS[name](size), dtype, seed=size)
        x = unit_data(rows, size, 4, dtype)
        loss, gradient = flow.nll_gradient(x)
        expected_loss, expected = oracle.nll_gradient(x.astype(np.float64))
        assert_close(np.array(loss), np.array(expected_loss), dtype, 16.0 * size)
        assert_close(gradient, flat(expected.parameters), dtype, 64.0 * size, f"{size} columns")
        rng = np.random.default_rng(5)
        g_out, g_log_det = rng.normal(size=x.shape).astype(dtype), rng.normal(size=rows).astype(dtype)
        for direction in ("forward", "inverse"):
            g_x, gradient = flow.vjp(x, g_out, g_log_det, direction=direction)
            want = oracle.vjp(*(v.astype(np.float64) for v in (x, g_out, g_log_det)), direction)
            assert_close(g_x, want.x, dtype, 64.0 * size, f"{direction}, {size} columns")
            assert_close(gradient, flat(want.parameters), dtype, 256.0 * size, f"{direction}, {size} columns")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_do_not_depend_on_threads(dtype: str) -> None:
    for size, rows in ((6, 3000), (70, 1500)):
        flow, _ = pair(size, LAYERS["placed"](size), dtype)
        x = unit_data(rows, size, 6, dtype)
        g = np.random.default_rng(7).normal(size=x.shape).astype(dtype)
        found = []
        for threads in (1, 2, 3, 5):
            flow.num_threads = threads
            results = [*flow.vjp(x, g, direction="inverse"), *flow.nll_gradient(x)]
            found.append([np.asarray(result) for result in results])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert_same_bits(a, b, f"{size} columns")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_accumulated_is_the_sum(dtype: str) -> None:
    flow, _ = pair(9, LAYERS["placed"](9), dtype)
    x = unit_data(400, 9, 8, dtype)
    g = np.random.default_rng(9).normal(size=x.shape).astype(dtype)
    whole = flow.vjp(x, g)[1]
    first, second = flow.vjp(x[:150], g[:150])[1], flow.vjp(x[150:], g[150:])[1]
    assert_close(first + second, whole, dtype, 1000.0)
    assert np.array_equal(flow.vjp(x[:0], g[:0])[1], np.zeros_like(whole))


def test_training_reaches_a_rotated_normal_distribution() -> None:
    """A coupling that stays linear cannot turn the plane; the matrix before it can."""
    rng = np.random.default_rng(10)
    covariance = np.array([[1.0, 0.9, 0.3], [0.9, 2.0, -0.4], [0.3, -0.4, 0.5]])
    x = (rng.normal(size=(4000, 3)) @ np.linalg.cholesky(covariance).T).astype(np.float32)
    spec = document(3, [LINEAR, coupling(hidden=())], "float32")
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)))
    flow.fit(x, epochs=60, batch_size=200, learning_rate=0.02, weight_decay=0.0, seed=1)
    entropy = 0.5 * (3 * (1 + np.log(2 * np.pi)) + np.log(np.linalg.det(covariance)))
    assert flow.nll(x) <= entropy + 0.03
    assert np.all(np.abs(flow.parameters()["lu_linear_0.sign"]) == 1)


def test_rounded_weights_leave_the_matrix_alone() -> None:
    flow, _ = pair(24, [LINEAR, coupling(), BACKWARDS], "float32", weights="bfloat16")
    exact, _ = pair(24, [LINEAR, coupling(), BACKWARDS], "float32")
    values = {name: 0 * v if name.startswith("flow_") else v for name, v in flow.parameters().items()}
    flow.set_parameters(values)
    exact.set_parameters(values)
    x = unit_data(70, 24, 11, "float32")
    assert_same_bits(flow.forward(x)[0], exact.forward(x)[0])
    assert_same_bits(flow.inverse(x), exact.inverse(x))


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (-2.0, "-2"), (1.5, "1.5"), (np.nan, "nan")])
def test_a_number_that_is_no_sign_is_refused(value: float, text: str) -> None:
    flow, _ = pair(5, [coupling(), LINEAR], "float32")
    ones = np.ones((3, 5), np.float32)
    before, _ = flow.forward(ones)
    sign = flow.parameters()["lu_linear_1.sign"].copy()
    sign[3] = value
    with pytest.raises(ValueError, match=rf"lu_linear_1\.sign\[3\] is {text}, expected 1 or -1"):
        flow.set_parameters({**flow.parameters(), "lu_linear_1.sign": sign})
    assert_same_bits(flow.forward(ones)[0], before)


def test_a_file_with_another_sign_is_refused(tmp_path) -> None:
    path = tmp_path / "flow.safetensors"
    flow, _ = pair(5, [coupling(), LINEAR], "float64")
    flow.save(path)
    assert_same_bits(nvpflow.load(path).forward(np.ones((3, 5)))[0], flow.forward(np.ones((3, 5)))[0])
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin = 8 + header + json.loads(data[8 : 8 + header])["lu_linear_1.sign"]["data_offsets"][0]
    data[begin + 8 : begin + 16] = np.float64(0.5).tobytes()
    path.write_bytes(data)
    with pytest.raises(nvpflow.FileFormatError, match=r"flow\.safetensors: lu_linear_1\.sign\[1\] is 0\.5, expected"):
        nvpflow.load(path)


_ISA = """
import sys
import numpy as np, nvpflow
from test_lu_linear import LAYERS, assert_close, flat, pair, run
from oracle import unit_data
assert nvpflow.cpu_isa() == sys.argv[1]
for dtype in ("float32", "float64"):
    for size in (2, 7, 16, 33, 70):
        flow, oracle = pair(size, LAYERS["placed"](size), dtype)
        x = unit_data(257, size, 1, dtype)
        for rows in (1, 3, 8, 17, 257):
            for direction in ("forward", "inverse"):
                got, log_det = run(flow, direction, x[:rows])
                values, want_log_det = getattr(oracle, direction)(x[:rows].astype(np.float64))
                assert_close(got, values, dtype, 16.0 * size)
                assert_close(log_det, want_log_det, dtype, 16.0 * size)
        assert_close(flow.nll_gradient(x)[1], flat(oracle.nll_gradient(x)[1].parameters), dtype, 64.0 * size)
print("done")
"""


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_every_instruction_set_agrees_with_the_oracle(isa: str, run_python) -> None:
    assert "done" in run_python(_ISA, isa, env={"NVPFLOW_ISA": isa})
