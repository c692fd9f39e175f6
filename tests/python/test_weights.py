"""``weights="bfloat16"``: a flow that computes with rounded kernels is the flow that has these kernels, bit for bit."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import nvpflow
import pytest
from nvpflow import _core, demo
from oracle import assert_same_bits, assert_within_budget, oracle_of, random_parameters, unit_data
from test_general_layers import make_case

# (input_size, num_flows, hidden_sizes, activation, standardize): one and several segments, odd widths, no hidden layer.
CONFIGS = [
    (2, 1, (), "relu", False),
    (3, 2, (1,), "tanh", True),
    (7, 3, (7, 5), "gelu", False),
    (16, 4, (128,), "relu", False),
    (17, 2, (255,), "silu", True),
    (64, 2, (257, 130), "leaky_relu", False),
    (64, 2, (512, 512), "relu", False),
    (101, 2, (1025,), "elu", False),
]
BATCHES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 19, 23, 31, 32, 33, 47, 48, 64, 65, 100)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest number of 8 significant bits, ties to the even one, worked out on the exact values."""
    exact = values.astype(np.float64)
    _, exponent = np.frexp(exact)
    unit = np.ldexp(1.0, np.maximum(exponent, -125) - 8)  # below 2**-126 the steps stay what they are there
    return (np.rint(exact / unit) * unit).astype(np.float32)


def _pair(config, seed=0) -> tuple[nvpflow.Flow, nvpflow.Flow]:
    """A flow of bfloat16 weights, and one of full weights that holds the rounded kernels."""
    size, num_flows, hidden, activation, standardize = config
    spec = {
        "input_size": size,
        "num_flows": num_flows,
        "hidden_sizes": hidden,
        "activation": activation,
        "standardize": standardize,
    }
    narrow = nvpflow.build(**spec, weights="bfloat16")
    shapes = {name: value.shape for name, value in narrow.parameters().items()}
    parameters = {name: value.astype(np.float32) for name, value in random_parameters(shapes, seed, 0.5).items()}
    narrow.set_parameters(parameters)
    full = nvpflow.build(**spec)
    full.set_parameters(
        {name: _round_to_bfloat16(value) if value.ndim == 2 else value for name, value in parameters.items()}
    )
    return narrow, full


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_results_are_those_of_the_rounded_kernels(config) -> None:
    narrow, full = _pair(config)
    size = config[0]
    x = unit_data(max(BATCHES), size, 3, "float32")
    oracle = oracle_of(full)
    assert_within_budget(narrow.log_prob(x), oracle.log_prob(x), "float32", "log_prob")
    for batch in BATCHES:
        rows = x[:batch]
        log_prob = np.full(batch, np.nan, np.float32)
        assert_same_bits(narrow.log_prob(rows, out=log_prob), full.log_prob(rows), f"log_prob of {batch} rows")
        for name, arguments in (("forward", {}), ("inverse", {"with_log_det": True})):
            got = getattr(narrow, name)(rows, **arguments)
            for mine, theirs in zip(got, getattr(full, name)(rows, **arguments), strict=True):
                assert_same_bits(mine, theirs, f"{name} of {batch} rows")
    assert_same_bits(narrow.sample(37, seed=5), full.sample(37, seed=5), "sample")
    for mine, theirs in zip(narrow.nll_gradient(x), full.nll_gradient(x), strict=True):
        assert_same_bits(np.asarray(mine), np.asarray(theirs), "gradient")


@pytest.mark.parametrize("seed", range(24))
def test_results_of_every_kind_of_layer(seed) -> None:
    """Kernels of networks are rounded, those that read the context and of gates too; LU factors are not."""
    case = make_case(seed, "float32")
    parameters = case.flow.parameters()
    narrow = nvpflow.Flow(case.flow.spec, weights="bfloat16")
    narrow.set_parameters(parameters)
    full = nvpflow.Flow(case.flow.spec)
    full.set_parameters(
        {name: _round_to_bfloat16(v) if name.endswith("kernel") else v for name, v in parameters.items()}
    )
    for batch in (0, 1, 2, 3, 7, 16, 17, 33, 100):
        x, given = case.x[:batch], case.given(slice(batch))
        assert_same_bits(narrow.log_prob(x, **given), full.log_prob(x, **given), f"log_prob of {batch} rows")
        for direction in (lambda f, x, given: f.forward(x, **given), lambda f, x, given: (f.inverse(x, **given),)):
            for mine, theirs in zip(direction(narrow, x, given), direction(full, x, given), strict=True):
                assert_same_bits(mine, theirs, f"{batch} rows")
    if case.context is not None:
        views = [flow.condition(case.context[0]) for flow in (narrow, full)]
        for batch in (1, 3, 100):
            assert_same_bits(views[0].log_prob(case.x[:batch]), views[1].log_prob(case.x[:batch]), "under one context")


def test_a_row_keeps_its_bits_in_every_batch() -> None:
    narrow, _ = _pair((64, 3, (256, 256), "relu", False))
    x = unit_data(200, 64, 1, "float32")
    expected = narrow.log_prob(x)
    for batch in range(1, 201):
        assert_same_bits(narrow.log_prob(x[-batch:]), expected[-batch:], f"{batch} rows")


def test_rounding_is_to_nearest_even_and_keeps_what_is_not_finite() -> None:
    """With one linear coupling of two features, what is added to the second is the kernel times the first."""
    values = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8), 2**-126, 3 * 2**-134, 1e-45, 3.4e38, 0.1]
    for value in (*values, np.inf, -np.inf, np.nan):
        flow = nvpflow.build(2, 1, (), weights="bfloat16")
        parameters = {name: np.zeros_like(array) for name, array in flow.parameters().items()}
        kernel = parameters["flow_0_translation.kernel"]
        kernel[:] = value
        flow.set_parameters(parameters)
        z, _ = flow.forward(np.float32([[1, 0]]))
        with np.errstate(over="ignore"):
            expected = _round_to_bfloat16(kernel).item() if np.isfinite(value) else value
        if np.isnan(value):
            expected = np.inf  # a finite row never gives NaN
        np.testing.assert_array_equal(z, np.float32([[1, expected]]), err_msg=str(value))
        assert_same_bits(flow.parameters()["flow_0_translation.kernel"], kernel, "parameters stay as they are")


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_every_instruction_set(run_python, isa) -> None:
    script = """
import sys, nvpflow, test_weights
assert nvpflow.cpu_isa() == sys.argv[1]
for config in test_weights.CONFIGS[2:7]:
    test_weights.test_results_are_those_of_the_rounded_kernels(config)
print("done")
"""
    assert run_python(script, isa, env={"NVPFLOW_ISA": isa}).strip() == "done"


def test_bad_rows_stay_alone() -> None:
    narrow, full = _pair((16, 4, (128,), "relu", False))
    for bad in (np.nan, np.inf, -np.inf):
        for batch in (1, 5, 16, 40):
            x = unit_data(batch, 16, 2, "float32")
            x[batch // 2, 3] = bad
            got = narrow.log_prob(x)
            assert np.isnan(got[batch // 2])
            assert_same_bits(got, full.log_prob(x), f"{batch} rows")


def test_the_choice_travels_with_the_flow(tmp_path) -> None:
    flow = nvpflow.build(6, 2, (9,), weights="bfloat16")
    full = nvpflow.build(6, 2, (9,))
    assert flow.weights == "bfloat16"
    assert full.weights == "full"
    assert "weights='bfloat16'" in repr(flow)
    assert "weights" not in repr(full)
    x = unit_data(5, 6, 0, "float32")
    expected = flow.log_prob(x)
    for other in (copy.copy(flow), copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), flow.to("cpu")):
        assert other.weights == "bfloat16"
        assert_same_bits(other.log_prob(x), expected)
    assert flow.to("cpu", weights="full").weights == "full"
    # A file holds the parameters as they are; how they are stored in memory is chosen where they are loaded.
    flow.save(tmp_path / "m.safetensors")
    assert nvpflow.load(tmp_path / "m.safetensors").weights == "full"
    loaded = nvpflow.load(tmp_path / "m.safetensors", weights="bfloat16")
    assert_same_bits(loaded.log_prob(x), expected)
    for name, value in flow.parameters().items():
        assert_same_bits(loaded.parameters()[name], value)


def test_training_is_of_the_full_weights() -> None:
    """Rounded after every step, small steps would be lost: only what fit leaves is rounded."""
    x = unit_data(600, 4, 0, "float32") * 2 + 1
    flows = [nvpflow.build(4, 2, (16,), weights=weights, standardize=True) for weights in ("full", "bfloat16")]
    histories = [flow.fit(x, epochs=3, progress=False) for flow in flows]
    assert list(histories[0].train_loss) == list(histories[1].train_loss)
    for name, value in flows[0].parameters().items():
        assert_same_bits(flows[1].parameters()[name], value)
    assert flows[1].weights == "bfloat16"
    assert not np.array_equal(flows[0].log_prob(x), flows[1].log_prob(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": "bfloat16", "dtype": "float64"}, ValueError, "weights is 'bfloat16'.*float32"),
        ({"weights": "half"}, ValueError, "weights is 'half', expected 'full' or 'bfloat16'"),
        ({"weights": None}, TypeError, "weights is None"),
        ({"weights": 16}, TypeError, "weights is 16"),
    ],
)
def test_other_weights_are_refused_and_named(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        nvpflow.build(4, **arguments)
    if "dtype" not in arguments:
        with pytest.raises(error, match=message if arguments["weights"] is not None else "."):
            nvpflow.build(4).to("cpu", weights=arguments["weights"] or 3)


def test_the_price_on_real_data_is_what_the_guide_says() -> None:
    """Kernels change by 2**-9 of their values at most; the model of the demo by less than is worth a thought."""
    split = demo.split_data(demo.load_data())
    flow = nvpflow.build(split.train.shape[1], 8, (64, 64), standardize=True)
    flow.fit(split.train, validation=split.validation, epochs=10, progress=False)
    full, narrow = flow.log_prob(split.test), flow.to("cpu", weights="bfloat16").log_prob(split.test)
    assert abs(np.mean(narrow - full)) < 0.01
    assert np.quantile(np.abs(narrow - full), 0.99) < 0.5
    assert np.any(narrow != full)
