"""Values of a flow: against the float64 oracle, its own Jacobian, and itself over batches, threads and bad rows."""

from __future__ import annotations

import gc
import itertools
import json
import weakref

import numpy as np
import nvpflow
import pytest
from oracle import (
    ACTIVATIONS,
    BUDGET,
    LOG_2_PI,
    Coupling,
    OracleFlow,
    Standardize,
    assert_same_bits,
    assert_within_budget,
    numerical_jacobian,
    oracle_of,
    random_parameters,
    unit_data,
    well_conditioned_scale,
)

DTYPES = ("float32", "float64")
BATCHES = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 100, 127, 128, 129, 257, 1009)
SIZES = (2, 3, 5, 6, 7, 16, 17, 31, 64, 100, 101, 784, 1000)
FLOWS = (1, 2, 3, 4, 8)
HIDDEN = ((), (1,), (3,), (7, 5), (64,), (128,), (100, 100), (1025,), (16, 17, 18))

# (input_size, num_flows, hidden_sizes, activation, standardize, scale_bound): every value of every axis at least
# once, every activation on a narrow and on a wide trunk, the extremes of size together.
COVER = [
    (2, 1, (), "relu", False, 1.0),
    (2, 8, (1,), "silu", True, 1.0),
    (2, 4, (64,), "tanh", False, 3.0),
    (2, 3, (100, 100), "relu", True, 1.0),
    (3, 1, (3,), "gelu", False, 1.0),
    (3, 2, (7, 5), "leaky_relu", True, 0.5),
    (3, 4, (1025,), "softplus", False, 1.0),
    (5, 3, (16, 17, 18), "elu", False, 2.0),
    (5, 8, (), "sigmoid", True, 1.0),
    (6, 4, (128,), "relu", False, 1.0),
    (6, 2, (1,), "softplus", True, 1.0),
    (7, 3, (7, 5), "tanh", False, 1.0),
    (7, 1, (64,), "sigmoid", False, 0.25),
    (16, 4, (128,), "relu", False, 1.0),
    (16, 2, (100, 100), "gelu", True, 1.0),
    (16, 8, (3,), "elu", False, 1.0),
    (17, 4, (64,), "leaky_relu", False, 1.0),
    (17, 3, (16, 17, 18), "silu", True, 1.5),
    (31, 2, (128,), "elu", False, 1.0),
    (31, 1, (1,), "gelu", True, 1.0),
    (64, 3, (64,), "silu", False, 1.0),
    (64, 2, (), "softplus", True, 1.0),
    (100, 2, (7, 5), "sigmoid", False, 1.0),
    (101, 3, (100, 100), "relu", True, 1.0),
    (101, 8, (3,), "leaky_relu", False, 1.0),
    (784, 1, (64,), "relu", False, 1.0),
    (1000, 2, (16, 17, 18), "tanh", True, 1.0),
]


def _name(config) -> str:
    size, flows, hidden, activation, standardize, bound = config
    return f"D{size}-K{flows}-{'x'.join(map(str, hidden)) or 'linear'}-{activation}-{bound}{'-std' * standardize}"


def _poisoned(shape, dtype) -> np.ndarray:
    return np.full(shape, np.nan, dtype=dtype)


def _check_against_oracle(make_flow, config, dtype, batches, seed=1) -> None:
    size, flows, hidden, activation, standardize, bound = config
    flow, oracle = make_flow(
        size,
        flows,
        hidden,
        activation,
        dtype=dtype,
        standardize=standardize,
        scale_bound=bound,
        seed=seed,
        kernel_scale=well_conditioned_scale(flows),
    )
    data = unit_data(max(batches), size, seed, dtype)
    z_expected, log_det_expected = oracle.forward(data)
    x_expected, inverse_log_det_expected = oracle.inverse(data)
    log_prob_expected = oracle.log_prob(data)
    # A log_det is a sum of D terms that may cancel: its errors are those of a log-probability, and of that scale.
    log_det_scale = np.abs(oracle.log_normal(z_expected)) + np.abs(log_det_expected)
    inverse_log_det_scale = np.abs(oracle.log_normal(data)) + np.abs(inverse_log_det_expected)
    # Every element of a row goes into every other: its errors are of the scale of its row. (Single elements of 784
    # columns behind 8 couplings with linear heads are off by up to 3e-5 (1 + |element|) on every instruction set.)
    z_scale = np.max(np.abs(z_expected), axis=1, keepdims=True)
    inverse_scale = np.max(np.abs(x_expected), axis=1, keepdims=True)
    for batch in batches:
        x = data[:batch]
        z, log_det = _poisoned((batch, size), dtype), _poisoned(batch, dtype)
        flow.forward(x, out=(z, log_det))
        assert_within_budget(z, z_expected[:batch], dtype, f"z of {batch} rows", z_scale[:batch])
        what = f"log_det of {batch} rows"
        assert_within_budget(log_det, log_det_expected[:batch], dtype, what, log_det_scale[:batch])

        back, inverse_log_det = _poisoned((batch, size), dtype), _poisoned(batch, dtype)
        flow.inverse(x, with_log_det=True, out=(back, inverse_log_det))
        assert_within_budget(back, x_expected[:batch], dtype, f"inverse of {batch} rows", inverse_scale[:batch])
        what = f"inverse log_det of {batch} rows"
        assert_within_budget(
            inverse_log_det, inverse_log_det_expected[:batch], dtype, what, inverse_log_det_scale[:batch]
        )

        log_prob = _poisoned(batch, dtype)
        flow.log_prob(x, out=log_prob)
        assert_within_budget(log_prob, log_prob_expected[:batch], dtype, f"log_prob of {batch} rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", COVER, ids=_name)
def test_values_agree_with_the_oracle(make_flow, config, dtype) -> None:
    large = config[0] * (max(config[2], default=1) + config[0]) > 100_000
    _check_against_oracle(make_flow, config, dtype, (0, 1, 5, 17, 33) if large else BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_agree_with_the_oracle_everywhere(make_flow, activation, size, dtype) -> None:
    for flows, hidden in itertools.product(FLOWS, HIDDEN):
        config = (size, flows, hidden, activation, flows % 2 == 0, 1.0)
        _check_against_oracle(make_flow, config, dtype, (1, 16, 31, 67), seed=size + flows)


def test_cover_holds_every_value_of_every_axis() -> None:
    sizes, flows, hidden, activations, _, _ = map(set, zip(*COVER, strict=True))
    assert sizes == set(SIZES)
    assert flows == set(FLOWS)
    assert hidden == set(HIDDEN)
    assert activations == set(ACTIVATIONS) == set(nvpflow._core.activation_names())


@pytest.mark.parametrize("dtype", DTYPES)
def test_widest_trunk(make_flow, dtype) -> None:
    _check_against_oracle(make_flow, (1000, 2, (1025,), "relu", False, 1.0), dtype, (1, 19))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_list_of_layers(dtype) -> None:
    """Couplings of one parity in a row, widths and activations of their own, a standardize layer at the latent end."""
    text = json.loads(nvpflow.FlowSpec(5, 3, (4,), "relu", 1.0, True, dtype).to_json())
    standardize, first, second, third = text["layers"]
    second["swapped"] = False
    second["hidden_sizes"] = [3, 9]
    second["activation"] = "gelu"
    third["hidden_sizes"] = []
    third["scale_bound"] = 2.5
    text["layers"] = [first, standardize, second, third, standardize]
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(text)))

    layers = [
        Coupling(False, (4,), "relu"),
        Standardize(),
        Coupling(False, (3, 9), "gelu"),
        Coupling(False, (), "relu", 2.5),
        Standardize(),
    ]
    oracle = OracleFlow(5, layers)
    assert {name: value.shape for name, value in flow.parameters().items()} == oracle.shapes()
    parameters = {name: value.astype(dtype) for name, value in random_parameters(oracle.shapes(), 3).items()}
    flow.set_parameters(parameters)
    oracle.set_parameters(parameters)
    x = unit_data(37, 5, 3, dtype)
    z, log_det = flow.forward(x)
    z_expected, log_det_expected = oracle.forward(x)
    assert_within_budget(z, z_expected, dtype, "z")
    assert_within_budget(log_det, log_det_expected, dtype, "log_det")
    back, inverse_log_det = flow.inverse(x, with_log_det=True)
    back_expected, inverse_log_det_expected = oracle.inverse(x)
    assert_within_budget(back, back_expected, dtype, "inverse")
    assert_within_budget(inverse_log_det, inverse_log_det_expected, dtype, "inverse log_det")


def test_parameters_have_the_published_names_and_order(make_flow) -> None:
    flow, _ = make_flow(5, 2, (7, 3))
    names = list(flow.parameters())
    assert names[:4] == [
        "flow_0_coupling_dense_0.kernel",
        "flow_0_coupling_dense_0.bias",
        "flow_0_coupling_dense_1.kernel",
        "flow_0_coupling_dense_1.bias",
    ]
    assert names[4:8] == [
        "flow_0_scale.kernel",
        "flow_0_scale.bias",
        "flow_0_translation.kernel",
        "flow_0_translation.bias",
    ]
    shapes = {name: value.shape for name, value in flow.parameters().items()}
    # D = 5: the first half has 2 columns, the second 3.
    assert shapes["flow_0_coupling_dense_0.kernel"] == (2, 7)
    assert shapes["flow_0_scale.kernel"] == (3, 3)
    assert shapes["flow_1_coupling_dense_0.kernel"] == (3, 7)
    assert shapes["flow_1_translation.kernel"] == (3, 2)
    assert flow.num_parameters == sum(value.size for value in flow.parameters().values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pass_through_half_keeps_its_bits(make_flow, dtype) -> None:
    flow, _ = make_flow(7, 1, (5,), dtype=dtype)
    x = unit_data(33, 7, 1, dtype)
    x[0, 0], x[1, 1], x[2, 2] = 1e-40, -0.0, np.finfo(dtype).smallest_subnormal
    z, _ = flow.forward(x)
    assert_same_bits(z[:, :3], x[:, :3], "forward")
    assert_same_bits(flow.inverse(x)[:, :3], x[:, :3], "inverse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_is_the_normal_density_plus_log_det(make_flow, dtype) -> None:
    flow, _ = make_flow(6, 3, (9,), dtype=dtype)
    x = unit_data(100, 6, 2, dtype)
    z, log_det = (value.astype(np.float64) for value in flow.forward(x))
    assert_within_budget(flow.log_prob(x), -0.5 * (6 * LOG_2_PI + np.sum(z * z, axis=1)) + log_det, dtype)
    assert_same_bits(flow.log_probability(x), flow.log_prob(x))
    assert flow.nll(x) == pytest.approx(-np.mean(flow.log_prob(x), dtype=np.float64), rel=BUDGET[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [2, 3, 6, 7, 17])
def test_log_det_is_that_of_the_numerical_jacobian(make_flow, size, activation) -> None:
    flow, oracle = make_flow(size, 3, (11,), activation, standardize=True, seed=size)
    x = unit_data(60, size, size)
    # A perturbation must not carry a relu across its kink.
    rows = np.flatnonzero(
        (oracle.smallest_pre_activation(x) > 1e-4) & (oracle.smallest_pre_activation(x, "inverse") > 1e-4)
    )
    for row in rows[:3]:
        for direction in ("forward", "inverse"):
            run = flow.forward if direction == "forward" else lambda v: flow.inverse(v, with_log_det=True)
            jacobian = numerical_jacobian(lambda v, run=run: run(v)[0], x[row])
            sign, log_det = np.linalg.slogdet(jacobian)
            assert sign == 1
            assert run(x[row])[1] == pytest.approx(log_det, abs=1e-8 * size)
    assert len(rows) >= 3


# ---------------------------------------------------------------------------------------------- rows do not meet


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config", [(7, 3, (7, 5), "gelu"), (16, 2, (128,), "relu"), (3, 2, (), "tanh"), (33, 2, (65,), "elu")]
)
def test_a_row_keeps_its_bits_in_every_batch(make_flow, config, dtype) -> None:
    flow, _ = make_flow(*config, dtype=dtype, standardize=True)
    size = config[0]
    x = unit_data(200, size, 4, dtype)
    whole = (*flow.forward(x), *flow.inverse(x, with_log_det=True), flow.log_prob(x))
    for batch in range(1, 201):
        first = batch * 37 % (201 - batch)
        part = x[first : first + batch]
        results = (*flow.forward(part), *flow.inverse(part, with_log_det=True), flow.log_prob(part))
        for result, expected in zip(results, whole, strict=True):
            assert_same_bits(result, expected[first : first + batch], f"rows {first} to {first + batch}")
    assert_same_bits(flow.log_prob(x[11]), whole[-1][11], "one row without a batch axis")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_keeps_its_bits_at_every_position(make_flow, dtype) -> None:
    flow, _ = make_flow(6, 3, (20,), "softplus", dtype=dtype)
    one = unit_data(1, 6, 5, dtype)
    expected = flow.log_prob(one)[0]
    for position in range(0, 200, 1):
        x = unit_data(200, 6, 6, dtype)
        x[position] = one
        assert_same_bits(flow.log_prob(x)[position], expected, f"position {position}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(make_flow, dtype) -> None:
    flow, _ = make_flow(17, 3, (50,), "silu", dtype=dtype, standardize=True)
    for rows in (65, 1009, 5003):
        x = unit_data(rows, 17, 7, dtype)
        flow.num_threads = 1
        expected = (*flow.forward(x), *flow.inverse(x, with_log_det=True), flow.log_prob(x), flow.sample(rows, seed=3))
        for threads in (2, 3, 4):
            flow.num_threads = threads
            assert flow.num_threads == threads
            results = (
                *flow.forward(x),
                *flow.inverse(x, with_log_det=True),
                flow.log_prob(x),
                flow.sample(rows, seed=3),
            )
            for result, reference in zip(results, expected, strict=True):
                assert_same_bits(result, reference, f"{threads} threads, {rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
def test_a_bad_row_is_nan_and_alone(make_flow, bad, activation, dtype) -> None:
    flow, _ = make_flow(5, 3, (6,), activation, dtype=dtype, standardize=True)
    for rows in (1, 3, 67):
        clean = unit_data(rows, 5, 8, dtype)
        expected = (*flow.forward(clean), *flow.inverse(clean, with_log_det=True), flow.log_prob(clean))
        for column in range(5):
            bad_row = (29 + 7 * column) % rows
            x = clean.copy()
            x[bad_row, column] = bad
            results = (*flow.forward(x), *flow.inverse(x, with_log_det=True), flow.log_prob(x))
            others = np.arange(rows) != bad_row
            for result, reference in zip(results, expected, strict=True):
                assert np.all(np.isnan(result[bad_row])), f"column {column}: {result[bad_row]}"
                assert_same_bits(result[others], reference[others], f"column {column}, {rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_is_nan_without_hidden_layers_and_with_one_coupling(make_flow, dtype) -> None:
    """With one coupling no arithmetic touches the pass-through half: its NaN must be put there on purpose."""
    flow, _ = make_flow(4, 1, (), "relu", dtype=dtype)
    x = unit_data(20, 4, 9, dtype)
    x[7, 3] = np.inf
    x[11, 0] = np.nan
    for result in (*flow.forward(x), *flow.inverse(x, with_log_det=True), flow.log_prob(x)):
        bad = np.isnan(result) if result.ndim == 1 else np.all(np.isnan(result), axis=1)
        assert list(np.flatnonzero(bad)) == [7, 11]
        assert np.count_nonzero(np.isnan(result)) == 2 * (result.size // 20)


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("size", [2, 7, 16, 101])
def test_round_trip_of_an_untrained_default_model(size, dtype, bound) -> None:
    flow = nvpflow.build(input_size=size, dtype=dtype)
    x = unit_data(1000, size, 10, dtype)
    assert np.max(np.abs(flow.inverse(flow.forward(x)[0]) - x)) <= bound
    assert np.max(np.abs(flow.forward(flow.inverse(x))[0] - x)) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_round_trip_and_values_of_a_trained_default_model(dtype, bound) -> None:
    rng = np.random.default_rng(11)
    x = rng.normal(size=(4096, 6)).astype(dtype)
    x[:, 3:] = x[:, 3:] * 0.4 + np.sin(2 * x[:, :3])
    flow = nvpflow.build(input_size=6, dtype=dtype, standardize=True, seed=1)
    untrained = flow.nll(x)
    flow.fit(x, epochs=20, learning_rate=3e-3, seed=1, progress=False)
    assert flow.nll(x) < untrained - 1.0
    z, log_det = flow.forward(x)
    assert np.max(np.abs(flow.inverse(z) - x)) <= bound
    oracle = oracle_of(flow)
    assert_within_budget(flow.log_prob(x), oracle.log_prob(x), dtype, "log_prob")
    assert_within_budget(log_det, oracle.forward(x)[1], dtype, "log_det")


# ---------------------------------------------------------------------------------------------- the object


def test_equality_copies_and_repr(make_flow) -> None:
    import copy

    flow, _ = make_flow(5, 2, (7,), "elu", dtype="float32")
    twin = copy.copy(flow)
    deep = copy.deepcopy(flow)
    assert flow == twin == deep
    before = flow.log_prob(unit_data(3, 5, 1, "float32"))
    changed = {name: value + 1 for name, value in flow.parameters().items()}
    twin.set_parameters(changed)
    assert flow != twin
    assert_same_bits(flow.log_prob(unit_data(3, 5, 1, "float32")), before, "the original after its copy changed")
    assert flow != nvpflow.build(input_size=5, num_flows=2, hidden_sizes=(7,), activation="relu")
    assert flow != "flow"
    for word in ("5", "2", "7", "elu", "float32"):
        assert word in repr(flow)


def test_parameters_are_views_that_cannot_be_written(make_flow) -> None:
    flow, _ = make_flow(4, 2, (3,))
    for name, value in flow.parameters().items():
        with pytest.raises(ValueError, match="read-only"):
            value[...] = 0
        assert value.base is not None, f"{name} is a copy"


def test_parameters_hold_the_memory_that_they_look_at() -> None:
    flow = nvpflow.build(4, 2, (64,), seed=1)
    seen, views = weakref.ref(flow), flow.parameters()
    expected = {name: value.copy() for name, value in views.items()}
    del flow
    gc.collect()
    assert seen() is not None
    for name, value in views.items():
        assert_same_bits(value, expected[name], name)
    del views, value
    gc.collect()
    assert seen() is None


def test_set_parameters_names_what_is_wrong(make_flow) -> None:
    flow, _ = make_flow(4, 2, (3,))
    good = {name: value.copy() for name, value in flow.parameters().items()}
    before = flow.log_prob(unit_data(5, 4, 1))

    missing = dict(good)
    del missing["flow_1_scale.bias"]
    with pytest.raises((ValueError, KeyError), match=r"flow_1_scale\.bias"):
        flow.set_parameters(missing)
    with pytest.raises((ValueError, KeyError), match="flow_9_scale"):
        flow.set_parameters({**good, "flow_9_scale.bias": np.zeros(2)})
    with pytest.raises(
        ValueError, match=r"flow_0_scale\.kernel.*\(2, 3\).*\(3, 2\)|flow_0_scale\.kernel.*\(3, 2\).*\(2, 3\)"
    ):
        flow.set_parameters({**good, "flow_0_scale.kernel": np.zeros((2, 3))})
    with pytest.raises(TypeError, match=r"flow_0_scale\.bias.*complex128"):
        flow.set_parameters({**good, "flow_0_scale.bias": np.zeros(2, dtype=complex)})
    with pytest.raises(TypeError, match=r"parameters is 5 \(int\), expected a mapping of names to arrays"):
        flow.set_parameters(5)
    assert_same_bits(flow.log_prob(unit_data(5, 4, 1)), before, "after refused parameters")


def check_initial(name: str, value: np.ndarray, inputs: int, outputs: int, init: str) -> None:
    """Uniform on both sides of zero, as far out as `init` says, or zero."""
    hidden = "dense" in name
    if name.endswith(".bias") and (init == "glorot" or not hidden):
        assert not np.any(value), name
        return
    bound = {"glorot": np.sqrt(6 / (inputs + outputs)), "fan_in": 1 / np.sqrt(inputs)}[init] * (1 if hidden else 0.01)
    assert 0.5 * bound < np.max(np.abs(value)) <= bound * (1 + 1e-6), name
    error = bound / np.sqrt(value.size)  # of a mean, above its standard deviation by sqrt(3)
    assert abs(np.mean(value)) < 3 * error, name
    assert abs(np.sqrt(np.mean(np.square(value, dtype=float))) - bound / np.sqrt(3)) < 2 * error, name


@pytest.mark.parametrize("init", ["glorot", "fan_in"])
def test_initial_parameters_depend_on_spec_seed_and_init_alone(init) -> None:
    shape = {"input_size": 9, "hidden_sizes": (64, 33), "init": init}
    first, again, other = (nvpflow.build(**shape, seed=seed) for seed in (5, 5, 6))
    assert first == again == nvpflow.Flow(first.spec, 5, init=init)
    assert first != other
    wide = nvpflow.build(**shape, seed=5, dtype="float64").parameters()
    parameters = first.parameters()
    for name, value in parameters.items():
        assert_same_bits(value, wide[name].astype(np.float32), name)
        if name.startswith("standardize"):
            assert not np.any(value), name
        else:
            check_initial(name, value, *parameters[name.partition(".")[0] + ".kernel"].shape, init)


def test_fan_in_is_what_is_drawn_where_nothing_is_said() -> None:
    flow = nvpflow.build(4, seed=2)
    assert flow == nvpflow.build(4, seed=2, init="fan_in") == nvpflow.Flow(flow.spec, 2)
    assert flow != nvpflow.build(4, seed=2, init="glorot")
    with pytest.raises(ValueError, match=r"^init is 'he', expected one of glorot, fan_in$"):
        nvpflow.build(4, init="he")
    with pytest.raises(TypeError, match=r"^init is 3 \(int\), expected a string$"):
        nvpflow.build(4, init=3)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", ("0x1.7bad4c0000000p-1", "-0x1.9bb0080000000p-2", "0x1.0887280000000p-7")),
        ("float64", ("0x1.7bad4b91a75f1p-1", "-0x1.9bb007c400000p-2", "0x1.088728dfda935p-7")),
    ],
)
def test_glorot_draws_what_it_drew_when_it_was_the_only_one(dtype, expected) -> None:
    parameters = nvpflow.build(5, 2, (3,), standardize=False, seed=7, dtype=dtype, init="glorot").parameters()
    names = ("flow_0_coupling_dense_0", "flow_1_coupling_dense_0", "flow_1_translation")
    drawn = [parameters[f"{name}.kernel"].ravel()[at] for name, at in zip(names, (0, -1, -1), strict=True)]
    assert tuple(float(value).hex() for value in drawn) == expected


def test_build_standardizes_and_is_the_identity_until_fit() -> None:
    flow = nvpflow.build(4)
    assert flow.spec.standardize
    assert not any(np.any(value) for name, value in flow.parameters().items() if name.startswith("standardize"))
    assert "standardize" not in repr(flow)
    assert "standardize=False" in repr(nvpflow.build(4, standardize=False))
    assert not nvpflow.FlowSpec(4).standardize


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 1}, r"input_size.*1"),
        ({"input_size": 0}, r"input_size.*0"),
        ({"input_size": -3}, r"input_size.*-3"),
        ({"input_size": 2**62}, "input_size"),
        ({"input_size": 2**80}, "input_size"),
        ({"input_size": 4, "num_flows": 0}, "num_flows"),
        ({"input_size": 4, "num_flows": -1}, "num_flows"),
        ({"input_size": 4, "num_flows": 2**60}, "num_flows"),
        ({"input_size": 4, "hidden_sizes": (0,)}, "hidden_sizes"),
        ({"input_size": 4, "hidden_sizes": (3, -1)}, "hidden_sizes"),
        ({"input_size": 4, "hidden_sizes": (2**40, 2**40)}, "hidden_sizes|too large|elements|bytes"),
        ({"input_size": 4, "activation": "swish"}, "swish.*relu.*softplus"),
        ({"input_size": 4, "scale_bound": 0.0}, "scale_bound"),
        ({"input_size": 4, "scale_bound": -1.0}, "scale_bound"),
        ({"input_size": 4, "scale_bound": float("nan")}, "scale_bound"),
        ({"input_size": 4, "scale_bound": float("inf")}, "scale_bound"),
        ({"input_size": 4, "dtype": "float16"}, "float16.*float32.*float64"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_model_that_cannot_be_is_refused_and_named(arguments, message) -> None:
    with pytest.raises((ValueError, MemoryError), match=message):
        nvpflow.build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 4.0}, "input_size"),
        ({"input_size": "4"}, "input_size"),
        ({"input_size": 4, "num_flows": 2.5}, "num_flows"),
        ({"input_size": 4, "hidden_sizes": 64}, "hidden_sizes"),
        ({"input_size": 4, "hidden_sizes": (6.5,)}, "hidden_sizes"),
        ({"input_size": 4, "activation": 3}, "activation"),
        ({"input_size": 4, "scale_bound": "1"}, "scale_bound"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_model_argument_of_the_wrong_type_is_refused_and_named(arguments, message) -> None:
    with pytest.raises(TypeError, match=message):
        nvpflow.build(**arguments)


@pytest.mark.parametrize("threads", [-1, 2**40])
def test_num_threads_must_make_sense(make_flow, threads) -> None:
    flow, _ = make_flow(4)
    with pytest.raises((ValueError, OverflowError), match=r"num_threads"):
        flow.num_threads = threads
