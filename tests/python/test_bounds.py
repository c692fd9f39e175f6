"""Columns with bounds: against the oracle, at the edges, in files, in training, and every place that knows them."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import nvpflow
import pytest
from cases import ADDITIVE, DTYPES, contexts_of, flow_and_oracle
from general_oracle import random_spec
from nvpflow import _bounds, _core
from nvpflow.layers import Bounds, Standardize
from oracle import assert_same_bits, assert_within_budget

GRADIENT_BUDGET = {"float32": 1e-5, "float64": 1e-12}


def random_bounds(size: int, rng: np.random.Generator) -> dict[str, Any]:
    """Intervals of every kind, around 0, one of them at least with an end."""
    kinds = rng.integers(0, 4, size)
    kinds[rng.integers(size)] = rng.integers(0, 3)
    low = [round(float(rng.uniform(-3, -1)), 3) if kind in (0, 1) else None for kind in kinds]
    return {
        "kind": "bounds",
        "low": low,
        "high": [round(float(rng.uniform(1, 4)), 3) if kind in (0, 2) else None for kind in kinds],
    }


def make_case(seed: int, dtype: str, rows: int = 70):
    """A flow of random layers behind bounds, its oracle, rows, every fifth of which is outside, and contexts."""
    rng = np.random.default_rng([seed, 0xB0])
    spec = random_spec(rng, dtype=dtype, max_size=18)
    bounds = random_bounds(spec["input_size"], rng)
    spec = {**spec, "base": {"kind": "normal"}, "layers": [bounds, *spec["layers"]]}
    flow, oracle = flow_and_oracle(spec, rng)
    layer = flow.spec.layers[0]
    x = _bounds.inverse(layer, 0.7 * rng.normal(size=(rows, spec["input_size"]))).astype(dtype)
    at = next(j for j in range(spec["input_size"]) if not layer.is_free(j))
    x[::5, at] = layer.low[at] - 0.5 if layer.low[at] is not None else layer.high[at] + 0.5
    return flow, oracle, x, contexts_of(spec, rng, rows)


# --------------------------------------------------------------------------------------------------- what bounds are


def test_bounds_are_a_layer_that_prints_as_its_call() -> None:
    layer = Bounds([0, 0, None], np.array([1, math.inf, math.inf]))
    assert repr(layer) == "Bounds((0.0, 0.0, None), (1.0, None, None))"
    assert layer == eval(repr(layer)) == copy.copy(layer) == pickle.loads(pickle.dumps(layer))
    assert layer != Bounds([0, 0, None], [1, 1, None])
    spec = nvpflow.FlowSpec.from_layers(3, [layer, Standardize(), *ADDITIVE])
    assert spec.layers[0] == layer
    assert nvpflow.FlowSpec.from_json(spec.to_json()) == spec
    assert eval(repr(spec), vars(nvpflow) | vars(nvpflow.layers)) == spec


@pytest.mark.parametrize(
    ("low", "high", "error", "message"),
    [
        (0, 1, TypeError, "low is 0 (int), expected a sequence of numbers and None, one a column"),
        ([0, 0], [1], ValueError, "high has 1 entries, expected 2, as low has"),
        ([None], [None], ValueError, "low and high hold no number, expected a bound of one column at least"),
        ([0, 1], [1, 1], ValueError, "high[1] is 1, expected more than low[1], which is 1"),
        (["a"], [1], TypeError, "low[0] is 'a' (str), expected a real number"),
        ([math.nan], [1], ValueError, "low[0] is nan, expected a finite number or None"),
        ([math.inf], [None], ValueError, "low[0] is inf, expected a finite number or None"),
    ],
)
def test_what_are_no_bounds_is_refused(low, high, error, message) -> None:
    with pytest.raises(error) as caught:
        Bounds(low, high)
    assert str(caught.value) == message


def test_only_the_first_layer_has_bounds() -> None:
    with pytest.raises(ValueError, match=r"layers\[1\] is a bounds layer, expected one only as layers\[0\]"):
        nvpflow.build(2, layers=[Standardize(), Bounds([0, 0], [1, 1]), *ADDITIVE])
    with pytest.raises(ValueError, match=r"layers\[0\]\.low has 3 entries, expected 2, one for each column"):
        nvpflow.build(2, layers=[Bounds([0, 0, 0], [1, 1, 1]), *ADDITIVE])
    with pytest.raises(ValueError, match="with numbers of float32 between them"):
        nvpflow.build(2, layers=[Bounds([1, 0], [1 + 1e-9, 1]), *ADDITIVE])


def test_build_takes_bounds_by_name_by_index_and_in_order() -> None:
    expected = Bounds([0, 0, None], [1, None, None])
    for given, options in (
        ({"share": (0, 1), "time": (0, None)}, {"column_names": ["share", "time", "x"]}),
        ({0: (0, 1), 1: (0, math.inf)}, {}),
        ({"time": (0, None), 0: [0, 1]}, {"column_names": ["share", "time", "x"]}),
        ([(0, 1), (0, None), None], {}),
        ([*np.array([[0, 1], [0, np.inf]]).tolist(), None], {}),
        (expected, {}),
    ):
        flow = nvpflow.build(3, bounds=given, **options)
        assert flow.spec.layers[:2] == (expected, Standardize())
        assert flow.column_names == (tuple(options["column_names"]) if options else None)
    assert nvpflow.build(3, bounds={}).spec == nvpflow.build(3, bounds=[None] * 3).spec == nvpflow.build(3).spec
    flow = nvpflow.build(3, bounds={2: (None, 7)}, standardize=False, transform="spline", dtype="float64")
    assert flow.spec.layers[0] == Bounds([None, None, None], [None, None, 7])
    assert "column 3 (-inf, 7)" in flow._repr_html_()
    assert "bounds" not in nvpflow.build(3)._repr_html_()


@pytest.mark.parametrize(
    ("bounds", "options", "error", "message"),
    [
        (
            {"a": (0, 1)},
            {},
            ValueError,
            "bounds names column 'a', but the columns have no names; give column_names, or an index from 0",
        ),
        ({"c": (0, 1)}, {"column_names": ["a", "b"]}, ValueError, "bounds names column 'c', expected one of 'a', 'b'"),
        ({2: (0, 1)}, {}, ValueError, "bounds names column 2, expected 0 to 1, counted from 0, or a name"),
        ({"a": (0, 1), 0: (0, 1)}, {"column_names": ["a", "b"]}, ValueError, "bounds names column 1 twice"),
        ((0, 1), {}, TypeError, "bounds[0] is 0 (int), expected a pair (low, high), None where there is no end"),
        ([(0, 1)], {}, ValueError, "bounds has 1 entries, expected 2, a pair or None for each column"),
        ("ab", {}, TypeError, "bounds is 'ab' (str), expected a dict such as"),
        ({0: 1}, {}, TypeError, "bounds[0] is 1 (int), expected a pair"),
        ({0: (1, 0)}, {}, ValueError, "bounds[0] is (1, 0), expected its first number to be the smaller one"),
        ({0: (None, None)}, {}, ValueError, "bounds[0] is (None, None) (tuple), expected a number at one end at least"),
        ({0: (0, "b")}, {}, TypeError, "bounds[0][1] is 'b' (str), expected a real number"),
        ({0: (0, 1)}, {"base": "uniform", "transform": "spline"}, ValueError, "bounds is Bounds((0.0, None)"),
        (
            {0: (0, 1)},
            {"layers": ADDITIVE},
            ValueError,
            "bounds is Bounds((0.0, None), (1.0, None)) (Bounds) beside layers",
        ),
    ],
)
def test_what_build_cannot_take_is_refused(bounds, options, error, message) -> None:
    with pytest.raises(error) as caught:
        nvpflow.build(2, bounds=bounds, **options)
    assert str(caught.value).startswith(message)


# ------------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(16))
def test_densities_and_gradients_agree_with_the_oracle(seed, dtype) -> None:
    flow, oracle, x, given = make_case(seed, dtype)
    wide, context = x.astype(np.float64), given.get("context")
    context = None if context is None else context.astype(np.float64)
    log_p, expected = flow.log_prob(x, **given), oracle.log_prob(wide, context)
    inside = np.arange(len(x)) % 5 != 0
    assert np.isneginf(expected[~inside]).all()
    assert np.isneginf(log_p[~inside]).all()
    assert_within_budget(log_p[inside], expected[inside], dtype)
    z, log_det = flow.forward(x, **given)
    expected_z, expected_log_det = oracle.forward(wide, context)
    assert np.isposinf(z[~inside]).all()
    assert np.isneginf(log_det[~inside]).all()
    assert_within_budget(z[inside], expected_z[inside], dtype)
    assert_within_budget(log_det[inside], expected_log_det[inside], dtype)
    back, back_log_det = flow.inverse(z[inside], **{k: v[inside] for k, v in given.items()}, with_log_det=True)
    expected_back, expected_log_det = oracle.inverse(
        z[inside].astype(np.float64), None if context is None else context[inside]
    )
    assert_within_budget(back, expected_back, dtype)
    assert_within_budget(back_log_det, expected_log_det, dtype)
    one = {name: value[3:4] for name, value in given.items()}
    assert_same_bits(flow.log_prob(x[3:4], **one), log_p[3:4])

    grad = (np.random.default_rng(seed).normal(size=len(x)) / len(x)).astype(dtype)
    results = flow.log_prob_vjp(x, grad, **given)
    found = oracle.log_prob_vjp(wide, grad.astype(np.float64), context)
    assert_gradients(results[0], found.x, dtype)
    assert (results[0][~inside] == 0).all()
    assert_named_gradients(flow, results[1], found.parameters, dtype)
    if given:
        assert_gradients(results[2], found.context, dtype)
        assert (results[2][~inside] == 0).all()
    loss, gradient = flow.nll_gradient(x, **given)
    assert loss == math.inf
    assert_named_gradients(flow, gradient, oracle.nll_gradient(wide, context)[1].parameters, dtype)

    grad_z = (np.random.default_rng(seed).normal(size=x.shape) / len(x)).astype(dtype)
    some = {name: value[inside] for name, value in given.items()}
    results = flow.vjp(z[inside], grad_z[inside], grad[inside], direction="inverse", **some)
    found = oracle.vjp(
        *(z[inside].astype(np.float64), grad_z[inside].astype(np.float64), grad[inside].astype(np.float64)),
        direction="inverse",
        context=None if context is None else context[inside],
    )
    assert_gradients(results[0], found.x, dtype)
    assert_named_gradients(flow, results[1], found.parameters, dtype)


def assert_named_gradients(flow: nvpflow.Flow, flat: np.ndarray, expected: dict[str, np.ndarray], dtype: str) -> None:
    for name, shape, offset in _core._layout_of(flow.spec):
        size = int(np.prod(shape))
        if not name.endswith(".sign"):  # which never changes
            assert_gradients(flat[offset : offset + size].reshape(shape), expected[name], dtype)


def assert_gradients(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert np.isfinite(actual).all()
    budget = GRADIENT_BUDGET[dtype] * (1 + np.max(np.abs(expected), initial=0.0))
    assert np.max(np.abs(actual - expected), initial=0.0) <= budget


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_density_behind_bounds_integrates_to_one(dtype) -> None:
    flow = identity([(0.25, 1), (2, None)], dtype)
    u, v = np.meshgrid((np.arange(400) + 0.5) / 400, (np.arange(1500) + 0.5) / 1500)
    x = np.column_stack([0.25 + 0.75 * u.ravel(), 2 + (v / (1 - v)).ravel()])
    weights = 0.75 / (1 - v.ravel()) ** 2
    total = float(np.mean(np.exp(flow.log_prob(x.astype(dtype)).astype(np.float64)) * weights))
    assert total == pytest.approx(1, abs=2e-3)


def identity(bounds: Any, dtype: str = "float32", standardize: bool = False) -> nvpflow.Flow:
    """A flow of two columns that does nothing behind its bounds."""
    layer = _bounds.checked(bounds, 2, None)
    layers = [layer, *([Standardize()] if standardize else []), *ADDITIVE]
    flow = nvpflow.build(2, layers=layers, dtype=dtype)
    flow.set_parameters({name: np.zeros_like(value) for name, value in flow.parameters().items()})
    return flow


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, None), (None, 0), (0.1, 0.7), (-1, 1e30), (1e6, None), (None, -3e-30)]
)
def test_the_numbers_next_to_an_edge_have_a_density(low, high, dtype) -> None:
    flow = identity([(low, high)] * 2, dtype)
    least, most = (values[0] for values in _bounds.inside(flow.spec.layers[0], np.dtype(dtype)))
    x = np.array([[least, most], [most, least]], dtype)
    log_p = flow.log_prob(x)
    assert np.isfinite(log_p).all()
    assert np.isfinite(flow.forward(x)[0]).all()
    wide = _bounds.forward(flow.spec.layers[0], x.astype(np.float64))
    assert_within_budget(flow.forward(x)[0], wide, dtype)
    with np.errstate(over="ignore"):
        next_ones = np.nextafter(least, -np.inf, dtype=dtype), np.nextafter(most, np.inf, dtype=dtype)
    for beyond in next_ones:
        row = np.array([[beyond, x[0, 0]]], dtype)
        if np.isfinite(beyond):
            assert flow.log_prob(row)[0] == -math.inf
            assert flow.nll(row) == math.inf
            assert (flow.log_prob_vjp(row, np.ones(1, dtype))[0] == 0).all()
    grad = flow.log_prob_vjp(x, np.ones(2, dtype))[0]
    assert not np.isnan(grad).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_sample_lies_outside_or_on_an_edge(dtype) -> None:
    # Latents far out: of a flow that stretches by e^3, hundreds of standard deviations.
    flow = nvpflow.build(3, bounds=[(0, 1), (0, None), (None, 3)], dtype=dtype, seed=1, standardize=False)
    wild = {name: 20 * value for name, value in flow.parameters().items()}
    flow.set_parameters(wild)
    for x in (flow.sample(20_000, seed=1), flow.sample_and_log_prob(20_000, seed=2)[0]):
        assert ((x > [0, 0, -np.inf]) & (x < [1, np.inf, 3])).all()
        assert np.isfinite(x).all()
        assert np.isfinite(flow.log_prob(x)).any()
    x, log_p = flow.sample_and_log_prob(20_000, seed=2)
    assert not np.isnan(log_p).any()
    assert_same_bits(x, flow.sample(20_000, seed=2))
    tame = nvpflow.build(2, bounds=[(0, 1), (0, None)], dtype=dtype)
    x, log_p = tame.sample_and_log_prob(5000, seed=3)
    ordinary = (x[:, 0] < 0.99) & (x[:, 1] > 0.01)  # where rounding of a sample does not move it by much
    assert np.abs(tame.log_prob(x) - log_p)[ordinary].max() < (1e-3 if dtype == "float32" else 1e-10)


def test_rows_with_nan_or_infinity_are_nan() -> None:
    for standardize in (False, True):
        flow = identity([(0, 1), None], standardize=standardize)
        for bad in (np.nan, np.inf, -np.inf):
            for row in ([bad, 0.5], [0.5, bad], [-1, bad]):
                x = np.array([row, [0.5, 0.5]], np.float32)
                z, log_det = flow.forward(x)
                assert np.isnan(z[0]).all()
                assert np.isnan([log_det[0], flow.log_prob(x)[0]]).all()
                assert np.isfinite(z[1]).all()
                assert np.isnan(flow.log_prob_vjp(x, np.ones(2, np.float32))[0][0]).all()


def test_float32_flows_keep_the_digits_behind_bounds() -> None:
    """Logarithms of 300 K, with 5 K of spread, lose digits where they are rounded before they are standardized."""
    rng = np.random.default_rng(0)
    x = 300 + 5 * rng.normal(size=(4000, 2))
    flow = nvpflow.build(2, num_flows=2, hidden_sizes=(8,), bounds=[(0, None), (0, 1000)])
    flow.initialize_from(x)
    wide = flow.astype("float64")
    for rows in (x, x.astype(np.float32)):
        expected = wide.log_prob(rows.astype(np.float64))
        assert_within_budget(flow.log_prob(rows), expected, "float32")
        z, _ = flow.forward(rows)
        assert np.abs(z - wide.forward(rows.astype(np.float64))[0]).max() < 2e-6
        back = flow.inverse(z, dtype=rows.dtype)
        assert np.abs(back - rows).max() < (4e-5 if rows.dtype == np.float32 else 2e-5)


def test_a_row_depends_on_nothing_but_itself() -> None:
    flow = nvpflow.build(3, bounds=[(0, 1), (0, None), None], seed=3)
    x = _bounds.inverse(flow.spec.layers[0], np.random.default_rng(0).normal(size=(300, 3))).astype(np.float32)
    flow.initialize_from(x)
    z, log_det = flow.forward(x)
    for threads in (1, 2, 3):
        flow.num_threads = threads
        assert_same_bits(flow.forward(x)[0], z)
    for count in (1, 2, 17, 64):
        assert_same_bits(flow.forward(x[:count])[0], z[:count])
        assert_same_bits(flow.log_prob(x[-count:]), flow.log_prob(x)[-count:])
    order = np.random.default_rng(1).permutation(len(x))
    assert_same_bits(flow.forward(np.ascontiguousarray(x[order]))[1], log_det[order])


# ----------------------------------------------------------------------------------------------------------- files


def test_files_copies_and_pickles_keep_bounds(tmp_path) -> None:
    flow = nvpflow.build(3, bounds={"a": (0, 1), "c": (None, 2.5)}, column_names=["a", "b", "c"], seed=5)
    flow.save(tmp_path / "m.safetensors")
    loaded = nvpflow.load(tmp_path / "m.safetensors")
    assert loaded == flow == copy.deepcopy(flow) == pickle.loads(pickle.dumps(flow)) == flow.to("cpu")
    assert loaded.spec.layers[0] == Bounds((0, None, None), (1, None, 2.5))
    assert loaded.column_names == ("a", "b", "c")
    assert flow.astype("float64").spec.layers[0] == flow.spec.layers[0]
    x = np.array([[0.5, -3, 1]], np.float32)
    assert_same_bits(loaded.log_prob(x), flow.log_prob(x))
    plain = nvpflow.build(3, seed=5)
    with pytest.raises(nvpflow.FileFormatError, match=r"the number of layers is 6 in .*, expected 5"):
        plain.reload(tmp_path / "m.safetensors")
    assert list(flow.parameters()) == [name.replace("standardize_0", "standardize_1") for name in plain.parameters()]


# -------------------------------------------------------------------------------------------------------- training


def shares_and_durations(rows: int = 12000) -> np.ndarray:
    """Return a uniform share and a duration that is densest at zero."""
    rng = np.random.default_rng(0)
    share = rng.random(rows)
    return np.column_stack([share, rng.gamma(1.0, 1.0, rows) * (0.5 + share)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shares_and_durations_are_learned_as_by_hand_and_no_sample_is_outside(dtype) -> None:
    """Measured: -0.944 by hand and with bounds; -0.992 to -1.012, and 0.5 to 1.7 % of samples outside, without."""
    x = shares_and_durations()
    train, test = x[:10000], x[10000:]
    truth = float(np.mean(-test[:, 1] / (0.5 + test[:, 0]) - np.log(0.5 + test[:, 0])))
    options = {"epochs": 40, "learning_rate": 3e-3, "clip_norm": 5, "validation": 0.1, "progress": False}
    flow = nvpflow.build(2, num_flows=8, hidden_sizes=(64, 64), bounds=[(0, 1), (0, None)])
    history = flow.fit(train.astype(dtype), **options)
    found = flow.log_prob(test.astype(dtype)).astype(np.float64).mean()
    by_hand = nvpflow.build(2, num_flows=8, hidden_sizes=(64, 64))
    layer = flow.spec.layers[0]
    by_hand.fit(_bounds.forward(layer, train), **options)
    log_slopes = -np.log(test[:, 0]) - np.log1p(-test[:, 0]) - np.log(test[:, 1])
    of_hand = (by_hand.log_prob(_bounds.forward(layer, test)) + log_slopes).mean()
    assert found > truth - 0.03
    assert abs(found - of_hand) < 0.01
    assert -history.best_loss == pytest.approx(found, abs=0.1)
    sample = flow.sample(100_000, seed=1)
    assert ((sample > 0) & (sample < [1, np.inf])).all()


def test_lognormal_columns_are_learned() -> None:
    """Measured: within 0.02 nats of the truth; without bounds 3.8 below."""
    train, test = (np.exp(2 * np.random.default_rng(seed).normal(size=(n, 3))) for seed, n in ((1, 5000), (2, 20000)))
    truth = (-0.5 * (np.log(test) / 2) ** 2 - np.log(2 * test * math.sqrt(2 * math.pi))).sum(axis=1).mean()
    flow = nvpflow.build(3, bounds=[(0, None)] * 3)
    flow.fit(train, epochs=15, progress=False)
    assert flow.log_prob(test).mean() > truth - 0.1


def test_losses_of_training_are_those_of_the_flow() -> None:
    x = shares_and_durations(900)
    for dtype, rows in (("float32", x), ("float32", x.astype(np.float32)), ("float64", x)):
        for standardize in (True, False):
            if rows.dtype != dtype and not standardize:
                continue
            flow = nvpflow.build(2, 2, (8,), bounds=[(0, 1), (0, None)], dtype=dtype, standardize=standardize)
            history = flow.fit(rows[:800], validation=rows[800:], epochs=3, progress=False)
            assert history.best_loss == pytest.approx(flow.nll(rows[800:]), abs=1e-5)
            flow = nvpflow.build(2, 2, (8,), bounds=[(0, 1), (0, None)], dtype=dtype, standardize=standardize)
            history = flow.fit(rows, validation=None, epochs=1, batch_size=900, learning_rate=1e-9, progress=False)
            assert history.train_loss[0] == pytest.approx(flow.nll(rows), abs=1e-4)
            flow.fit(rows, epochs=1, validation=None, max_round_trip=1e-3, averaging=0.5, progress=False)


def test_actnorm_starts_from_rows_behind_bounds() -> None:
    x = np.exp(3 + 2 * np.random.default_rng(0).normal(size=(2000, 2)))
    for dtype, standardize in (("float32", True), ("float64", True), ("float64", False)):
        flow = nvpflow.build(2, 2, (8,), bounds=[(0, None)] * 2, actnorm=True, standardize=standardize, dtype=dtype)
        flow.initialize_from(x)
        z, _ = flow.forward(x)
        assert np.abs(z.mean(axis=0)).max() < 0.2
        assert np.abs(z.std(axis=0) - 1).max() < 0.2
        other = nvpflow.build(2, 2, (8,), bounds=[(0, None)] * 2, actnorm=True, standardize=standardize, dtype=dtype)
        other.fit(x, validation=None, epochs=1, learning_rate=1e-12, progress=False)
        for name, value in flow.parameters().items():
            assert np.abs(other.parameters()[name] - value).max() < 1e-3, name


def test_fit_names_the_columns_that_hold_rows_outside() -> None:
    x = shares_and_durations(500)
    x[[3, 77, 401], 0] = [1, 1.5, 0]
    x[12, 1] = 0
    for flow in (
        nvpflow.build(2, bounds={"share": (0, 1), "time": (0, None)}, column_names=["share", "time"]),
        nvpflow.build(2, bounds=[(0, 1), (0, None)], dtype="float64"),
    ):
        share, time = ("column 'share'", "column 'time'") if flow.column_names else ("column 1", "column 2")
        before = copy.copy(flow)
        with pytest.raises(ValueError, match="outside of its bounds") as caught:
            flow.fit(x, progress=False)
        text = str(caught.value)
        assert f"{share} is outside of its bounds (0, 1) or on an edge in 3 of 500 rows (rows 3, 77, 401, " in text
        assert "counted from 0; the first holds 1)" in text
        assert f"{time} is outside of its bounds (0, inf) or on an edge in 1 of 500 rows (row 12, " in text
        assert "remove or repair such rows, or make the bounds wider; where many rows hold the edge itself" in text
        assert flow == before
        with pytest.raises(ValueError, match="x has 4 of 500 rows outside the bounds or on their edge") as caught:
            flow.initialize_from(x)
        assert f"{share} in 3 rows (3, 77, 401, counted from 0; the first holds 1, expected more than 0" in str(
            caught.value
        )
        good = np.delete(x, [3, 12, 77, 401], axis=0)
        with pytest.raises(ValueError, match="validation has 4 of 500 rows outside the bounds"):
            flow.fit(good, validation=x, progress=False)
        assert flow == before


def test_check_data_looks_behind_bounds() -> None:
    rng = np.random.default_rng(0)
    x = np.column_stack([np.exp(3 * rng.normal(size=5000)), rng.random(5000)])
    assert {finding.kind for finding in nvpflow.check_data(x).findings} == {"outliers"}
    assert nvpflow.check_data(x, bounds=[(0, None), (0, 1)]).ok
    x[7, 1] = np.nan
    x[[9, 11], 1] = [1, 2]
    report = nvpflow.check_data(x, bounds={"b": (0, 1)}, names=["a", "b"])
    outside, missing = report.errors
    assert (outside.kind, outside.columns, outside.figures) == ("outside", (2,), {"rows": 2.0})
    assert "column 'b' is outside of its bounds (0, 1) or on an edge in 2 of 5,000 rows (rows 9, 11, " in outside.text
    assert "1 of 4,998 rows with NaN or infinite values (row 7," in missing.text
    counts = np.column_stack([rng.poisson(3, 5000) + 1.0, rng.normal(size=5000)])
    (few,) = nvpflow.check_data(counts, bounds={0: (0, None)}).findings
    assert few.kind == "few"
    assert "integers from 1 to" in few.text


def test_far_rows_are_left_out_behind_bounds() -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(size=(1000, 2)))
    x[5, 0] = 1e-300
    flow = nvpflow.build(2, 1, (4,), bounds=[(0, None)] * 2, dtype="float64")
    with pytest.warns(nvpflow.DataWarning, match="outliers"):
        history = flow.fit(x, epochs=1, validation=0.1, max_deviation=50, standardize="robust", progress=False)
    assert history.rows_left_out == 1
    assert history.best_loss == pytest.approx(flow.nll(np.delete(x, 5, axis=0)), abs=0.3)


def test_a_run_goes_on_from_a_checkpoint(tmp_path) -> None:
    x = shares_and_durations(600)

    def train(epochs: int, **options: Any) -> nvpflow.Flow:
        flow = nvpflow.build(2, 2, (8,), bounds=[(0, 1), (0, None)])
        flow.fit(x, epochs=epochs, schedule="constant", progress=False, validation=0.2, **options)
        return flow

    whole = train(4)
    train(4, checkpoint=tmp_path / "c", callback=lambda record: record["epoch"] < 2)
    assert train(4, checkpoint=tmp_path / "c") == whole


def test_certify_measures_in_units_of_the_rows() -> None:
    x = shares_and_durations(3000)
    flow = nvpflow.build(2, 2, (16,), bounds=[(0, 1), (0, None)])
    flow.fit(x, epochs=3, progress=False)
    for rows in (x, x.astype(np.float32)):
        found = flow.certify(rows)
        assert found.verdict == "accurate", found
        assert found.no_bound == "it is not derived for columns with bounds"
    beyond = np.concatenate([x[:50], [[0.0, 1.0], [2.0, 1.0]]])
    found = flow.certify(beyond)
    assert found.verdict == "accurate"
    assert any("2 rows outside the bounds of their columns or on an edge" in line for line in found.advice)


# --------------------------------------------------------------------------------------------------- other libraries


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    import nvpflow.torch

    for dtype in DTYPES:
        flow, _, x, given = make_case(4, dtype)
        module = nvpflow.torch.FlowModule(flow)
        rows = torch.from_numpy(x).requires_grad_()
        context = {name: torch.from_numpy(value) for name, value in given.items()}
        log_p = module.log_prob(rows, **context)
        assert_same_bits(log_p.detach().numpy(), flow.log_prob(x, **given))
        log_p.sum().backward()
        assert_same_bits(rows.grad.numpy(), flow.log_prob_vjp(x, np.ones(len(x), dtype), **given)[0])
        assert (rows.grad[::5] == 0).all()
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads)
        one = {name: value[0] for name, value in context.items()}
        samples, _ = module.rsample_and_log_prob(50, seed=3, **one)
        samples.sum().backward()
        theirs, _ = flow.sample_and_log_prob(50, seed=3, **{name: v.numpy() for name, v in one.items()})
        assert_same_bits(samples.detach().numpy(), theirs)
        assert module.to_flow().spec == flow.spec


def test_a_module_says_that_nobody_has_set_its_standardize_layer() -> None:
    torch = pytest.importorskip("torch")
    import nvpflow.torch

    x = np.exp(30 + np.random.default_rng(0).normal(size=(500, 2))).astype(np.float32)
    module = nvpflow.torch.FlowModule(nvpflow.build(2, 1, (4,), bounds=[(0, None)] * 2))
    with pytest.warns(nvpflow.DataWarning, match="the standardize layer is still the identity"):
        module.log_prob(torch.from_numpy(x))
    module = nvpflow.torch.FlowModule(nvpflow.build(2, 1, (4,), bounds=[(0, None)] * 2))
    module.initialize_from(torch.from_numpy(x))
    own = module.to_flow()
    own_mean = own.parameters()["standardize_1.mean"]
    np.testing.assert_allclose(own_mean, np.log(x.astype(np.float64)).mean(axis=0), rtol=1e-6)
    assert np.abs(own.forward(x)[0].std(axis=0) - 1).max() < 0.2


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    import nvpflow.jax

    flow, _, x, given = make_case(5, "float32")
    parameters = nvpflow.jax.parameters(flow)
    context = {name: jax.numpy.asarray(value) for name, value in given.items()}
    log_p = jax.jit(lambda p, rows: nvpflow.jax.log_prob(flow.spec, p, rows, **context))(parameters, x)
    assert_same_bits(np.asarray(log_p), flow.log_prob(x, **given))
    gradient = jax.grad(lambda rows: nvpflow.jax.log_prob(flow.spec, parameters, rows, **context).sum())(x)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[::5] == 0).all()
    plain = nvpflow.build(2, 1, (4,), bounds=[(0, 1), (0, None)])
    own = nvpflow.jax.initialize_from(plain.spec, nvpflow.jax.parameters(plain), shares_and_durations(500))
    rows = np.asarray(nvpflow.jax.sample(plain.spec, own, jax.random.key(0), 20_000))
    assert ((rows > 0) & (rows < [1, np.inf])).all()
    assert abs(rows[:, 0].mean() - 0.5) < 0.05


def test_sklearn() -> None:
    pytest.importorskip("sklearn")
    pandas = pytest.importorskip("pandas")
    from nvpflow.sklearn import FlowDensity
    from sklearn.base import clone

    x = shares_and_durations(600)
    frame = pandas.DataFrame({"share": x[:, 0], "load": np.arange(600.0), "time": x[:, 1]})
    options = {"hidden_sizes": (8,), "num_flows": 2, "epochs": 2, "random_state": 0}
    estimator = FlowDensity(bounds={"share": (0, 1), "time": (0, None)}, context_features=["load"], **options)
    assert clone(estimator).get_params()["bounds"] == {"share": (0, 1), "time": (0, None)}
    estimator.fit(frame)
    assert estimator.flow_.spec.layers[0] == Bounds((0, 0), (1, None))
    assert estimator.flow_.column_names == ("share", "time")
    assert np.isneginf(estimator.score_samples(frame.assign(share=2.0))).all()
    by_index = FlowDensity(bounds={0: (0, 1), 2: (0, None)}, context_features=[1], **options).fit(frame.to_numpy())
    assert by_index.flow_.spec == estimator.flow_.spec
    for bounds, message in (
        ({"load": (0, None)}, "bounds names feature 1, which is one of context_features"),
        ({"speed": (0, None)}, "bounds names column 'speed', expected one of 'share', 'load', 'time'"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(estimator).set_params(bounds=bounds).fit(frame)
    with pytest.raises(ValueError, match="column 'share' is outside of its bounds"):
        clone(estimator).fit(frame.assign(share=2 * x[:, 0]))


def test_command_line(tmp_path, capsys) -> None:
    from nvpflow import cli

    x = shares_and_durations(500)
    np.savetxt(tmp_path / "data.csv", x, delimiter=",", header="share,time", comments="")
    np.save(tmp_path / "data.npy", x)
    model = str(tmp_path / "model.safetensors")
    options = ["--epochs", "1", "--force", "--quiet"]
    for source, bounds in (("data.csv", "share=0:1,time=0:"), ("data.npy", "1=0:1,2=0:")):
        assert cli.main(["fit", str(tmp_path / source), "-o", model, *options, "--bounds", bounds]) == 0
        assert nvpflow.load(model).spec.layers[0] == Bounds((0, 0), (1, None))
        assert nvpflow.load(model).column_names == (("share", "time") if source == "data.csv" else None)
        capsys.readouterr()
        assert cli.main(["info", model]) == 0
        first, second = ("'share'", "'time'") if source == "data.csv" else ("'column 1'", "'column 2'")
        shown = capsys.readouterr().out
        assert f"bounds: {first} (0, 1), {second} (0, inf)" in shown or "bounds: column 1 (0, 1)" in shown
        assert cli.main(["check", model, str(tmp_path / source)]) == 0
        assert cli.main(["sample", model, "-n", "100", "-o", str(tmp_path / "rows.npy"), "--force"]) == 0
        rows = np.load(tmp_path / "rows.npy")
        assert ((rows > 0) & (rows < [1, np.inf])).all()
    capsys.readouterr()
    for bounds, message in (
        ("3=0:1", "--bounds names column '3', expected a number from 1 to 2: the table has no names"),
        ("1=0:1,1=0:", "--bounds names column '1' twice, expected it once"),
        ("1=0:0.5", "column 1 is outside of its bounds (0, 0.5) or on an edge in"),
        ("1=2:1", "expected its first number to be the smaller one"),
    ):
        assert cli.main(["fit", str(tmp_path / "data.npy"), "-o", model, *options, "--bounds", bounds]) == 1
        assert message in capsys.readouterr().err
    for text in ("1", "=0:1", "1=0;1", "1=a:"):
        with pytest.raises(SystemExit):
            cli.main(["fit", str(tmp_path / "data.npy"), "-o", model, "--bounds", text])
        assert "--bounds" in capsys.readouterr().err


def test_a_report_says_them() -> None:
    pytest.importorskip("matplotlib")
    from nvpflow import report

    x = shares_and_durations(800)
    flow = nvpflow.build(2, 2, (8,), bounds={"share": (0, 1), "time": (0, None)}, column_names=["share", "time"])
    flow.fit(x[:600], epochs=1, progress=False)
    text = report.html(flow, x[600:])
    assert "<dt>Bounds</dt><dd>share (0, 1), time (0, inf)</dd>" in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_modules_compute_what_the_flow_does(dtype) -> None:
    torch = pytest.importorskip("torch")
    from nvpflow.exporters import to_torch

    for seed in (0, 1, 6):
        flow, _, x, given = make_case(seed, dtype)
        module = to_torch(flow)
        inside = np.arange(len(x)) % 5 != 0
        rows = torch.from_numpy(x).requires_grad_()
        context = {name: torch.from_numpy(value) for name, value in given.items()}
        log_p = module.log_prob(rows, **context)
        expected = flow.log_prob(x, **given)
        assert torch.isneginf(log_p[::5]).all()
        assert_within_budget(log_p.detach().numpy()[inside], expected[inside].astype(np.float64), dtype)
        z, log_det = module(rows, **context)
        assert torch.isposinf(z[::5]).all()
        assert torch.isneginf(log_det[::5]).all()
        log_p[1::5].sum().backward(retain_graph=True)
        (grad,) = torch.autograd.grad(log_p.sum(), rows)
        assert (grad[::5] == 0).all()
        assert torch.isfinite(grad).all()
        some = {name: value[inside] for name, value in context.items()}
        back, _ = module.inverse(z.detach()[inside], **some)
        low, high = _bounds.ends(flow.spec.layers[0])
        assert ((back.detach().numpy() > low) & (back.detach().numpy() < high)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_onnx_files_compute_what_the_flow_does(dtype, tmp_path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from nvpflow.exporters import to_onnx

    flow = nvpflow.build(4, 2, (8,), bounds=[(0, 1), None, (0, None), (None, 3)], dtype=dtype, seed=1)
    x = _bounds.inverse(flow.spec.layers[0], np.random.default_rng(0).normal(size=(50, 4))).astype(dtype)
    flow.initialize_from(x)
    x[0, 0], x[1, 2], x[2, 3], x[3, 1] = 1, -1, 4, np.nan

    def run(method: str, **given: np.ndarray) -> list[np.ndarray]:
        path = str(tmp_path / f"{method}.onnx")
        to_onnx(flow, path, method=method)
        return onnxruntime.InferenceSession(path).run(None, given)

    (log_p,) = run("log_prob", x=x)
    expected = flow.log_prob(x)
    assert np.isneginf(log_p[:3]).all()
    assert np.isnan(log_p[3])
    assert_within_budget(log_p[4:], expected[4:].astype(np.float64), dtype)
    z, log_det = run("forward", x=x)
    assert np.isposinf(z[:3]).all()
    assert np.isneginf(log_det[:3]).all()
    back, _ = run("inverse", z=(3 * np.random.default_rng(1).normal(size=(500, 4))).astype(dtype))
    assert ((back > [0, -np.inf, 0, -np.inf]) & (back < [1, np.inf, np.inf, 3])).all()
