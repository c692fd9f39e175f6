"""Rational-quadratic splines: each by itself against 50 digits, far out and at its knots, in flows, on every path.

A coupling without hidden layers whose kernels are zero hands the biases of its heads to the spline, whatever x is: so
any raw numbers reach it through the public interface.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import nvpflow
import pytest
from general_oracle import SPLINES, GeneralFlow, raw_numbers, scrambled, sensitivities, spline_of
from nvpflow import _core
from oracle import BUDGET, assert_same_bits, assert_within_budget
from spline_reference import Spline

DTYPES = ("float32", "float64")
BATCHES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 100, 1025)
# A result may be what 50 digits say of a number so many roundings away, and as many roundings beside that.
UNITS = 32
# |gradient - oracle| <= budget (1 + largest |oracle| of the tensor), of means over the rows.
GRADIENT_BUDGET = {"float32": 1e-5, "float64": 1e-13}

Raw = dict[str, np.ndarray]  # [count, features]


def unit_of(dtype: str) -> float:
    """Largest relative error of one rounding."""
    return float(np.finfo(dtype).eps) / 2


def spec_of(size: int, layers: list[dict[str, Any]], dtype: str, context: int = 0) -> dict[str, Any]:
    return {
        "input_size": size,
        "context_size": context,
        "standardize_context": False,
        "dtype": dtype,
        "base": {"kind": "normal"},
        "layers": layers,
    }


def coupling(
    spline: Mapping[str, Any], transformed: Any, *, inverse: bool = False, network: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    plain = {"kind": "mlp", "hidden_sizes": [], "activation": "relu", "layer_norm": False}
    transform = {"kind": "spline", **spline}
    return {
        "kind": "coupling",
        "inverse": inverse,
        "transformed": transformed,
        "transform": transform,
        "network": dict(network or plain),
    }


def flow_of(spec: Mapping[str, Any], parameters: Mapping[str, np.ndarray]) -> nvpflow.Flow:
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)))
    flow.set_parameters({name: np.asarray(value).astype(spec["dtype"]) for name, value in parameters.items()})
    return flow


def alone(spline: Mapping[str, Any], raw: Raw, dtype: str, *, inverse: bool = False) -> nvpflow.Flow:
    """Feature 0 stays, and each other one has the spline of its column of raw numbers."""
    features = raw["widths"].shape[1]
    spec = spec_of(features + 1, [coupling(spline, list(range(1, features + 1)), inverse=inverse)], dtype)
    parameters = {name: np.zeros_like(value) for name, value in GeneralFlow(spec).parameters.items()}
    for name, values in raw.items():
        parameters[f"flow_0_{name}.bias"] = values.ravel()
    return flow_of(spec, parameters)


def draw_raw(spline: Mapping[str, Any], features: int, scale: float, dtype: str, rng: np.random.Generator) -> Raw:
    return {
        name: (scale * rng.normal(size=(count, features))).astype(dtype) for name, count in raw_numbers(spline).items()
    }


def reference_of(spline: Mapping[str, Any], raw: Raw, feature: int) -> Spline:
    columns = [raw[name][:, feature].tolist() if name in raw else [] for name in ("widths", "heights", "derivatives")]
    return Spline(spline, *columns)


def points_of(
    spline: Mapping[str, Any], knots: list[mpmath.mpf], dtype: str, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Anywhere within the interval, on knots and beside them."""
    low, high = spline["lower"], spline["upper"]
    kind = np.dtype(dtype).type
    chosen = rng.choice(len(knots), min(len(knots), 12), replace=False)
    on = np.array([float(knots[k]) for k in chosen]).astype(dtype)
    beside = [np.nextafter(on, kind(low)), np.nextafter(on, kind(high))]
    anywhere = rng.uniform(low, high, count).astype(dtype)
    found = np.concatenate([on, *beside, anywhere, np.array([low, high], dtype)])
    return np.clip(found, kind(low), kind(high))


def evaluate(flow: nvpflow.Flow, feature: int, points: np.ndarray, backwards: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] and log-slopes [n] of one feature; the others lie where they add nothing to the determinant."""
    rows = np.full((len(points), flow.spec.input_size), 100, points.dtype)
    rows[:, 1 + feature] = points
    values, log_det = flow.inverse(rows, with_log_det=True) if backwards else flow.forward(rows)
    rest = np.delete(np.arange(rows.shape[1]), 1 + feature)
    assert_same_bits(values[:, rest], rows[:, rest])
    return values[:, 1 + feature], log_det


def check_one(
    spline: Mapping[str, Any],
    raw: Raw,
    dtype: str,
    count: int,
    rng: np.random.Generator,
    steps: int = 2,
    device: str = "cpu",
) -> None:
    """Every feature in both directions, against 50 digits."""
    rounding = UNITS * unit_of(dtype)
    flow = alone(spline, raw, dtype).to(device)
    for feature in range(raw["widths"].shape[1]):
        reference = reference_of(spline, raw, feature)
        for backwards in (False, True):
            points = points_of(spline, reference.knots_y if backwards else reference.knots_x, dtype, count, rng)
            values, log_slopes = evaluate(flow, feature, points, backwards)
            for x, *got in zip(points.tolist(), values.tolist(), log_slopes.tolist(), strict=True):
                allowed = reference.ranges(x, backwards=backwards, rounding=rounding, steps=steps)
                for name, number, (low, high) in zip(("value", "log-slope"), got, allowed, strict=True):
                    what = f"{'inverse' if backwards else 'forward'} of feature {feature} at {x!r} in {dtype}"
                    assert low <= number <= high, f"{what}: {name} {number!r}, expected {low!r} to {high!r}"


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param


def name_of(spline: Any) -> str | None:
    if not isinstance(spline, dict):
        return None
    how = spline["derivative"]["function"]
    return f"{spline['num_bins']}-{spline['lower']:g}-{spline['upper']:g}-{how}-{spline['boundary']}-{spline['tails']}"


over_splines = pytest.mark.parametrize("spline", SPLINES, ids=name_of)


# --------------------------------------------------------------------------------------------- against 50 digits


def features_of(spline: Mapping[str, Any]) -> int:
    """Beyond tails with the slope of a free end a feature adds to the determinant: one at a time there."""
    return 1 if spline["tails"] == "slope" and spline["boundary"] == "free" else 3


@over_splines
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_values_and_slopes(spline, scale, dtype) -> None:
    rng = np.random.default_rng([len(name_of(spline)), int(10 * scale)])
    check_one(spline, draw_raw(spline, features_of(spline), scale, dtype, rng), dtype, 30, rng)


@pytest.mark.gpu
@over_splines
def test_values_and_slopes_on_a_device(spline, dtype) -> None:
    rng = np.random.default_rng([len(name_of(spline)), 11])
    for scale in (0.3, 3.0):
        raw = draw_raw(spline, features_of(spline), scale, dtype, rng)
        check_one(spline, raw, dtype, 15, rng, device="cuda")


@pytest.mark.parametrize("num_bins", [*range(1, 33), 256])
def test_every_number_of_bins(num_bins, dtype) -> None:
    rng = np.random.default_rng(num_bins)
    spline = spline_of(num_bins)
    for scale in (0.3, 2.0):
        check_one(spline, draw_raw(spline, 1, scale, dtype, rng), dtype, 15, rng)


@pytest.mark.parametrize("num_bins", [1, 2, 7, 16])
def test_bins_of_hardly_any_freedom(num_bins, dtype) -> None:
    """The floors take all of the interval but 1e-6 of it."""
    rng = np.random.default_rng(num_bins)
    floor = (1 - 1e-6) / num_bins
    spline = spline_of(num_bins, min_bin_width=floor, min_bin_height=floor)
    check_one(spline, draw_raw(spline, 2, 3.0, dtype, rng), dtype, 20, rng)


@over_splines
def test_raw_numbers_that_are_large(spline, dtype) -> None:
    """One bin takes all that the floors leave; within 32 roundings slopes change by orders of magnitude."""
    rng = np.random.default_rng(5)
    floors = {"min_bin_width": max(spline["min_bin_width"], 1e-3), "min_bin_height": 1e-3}
    check_one({**spline, **floors}, draw_raw(spline, 1, 30.0, dtype, rng), dtype, 10, rng, steps=64)


@pytest.mark.slow
@over_splines
@pytest.mark.parametrize("seed", range(4))
def test_values_and_slopes_of_many(spline, seed, dtype) -> None:
    rng = np.random.default_rng([seed, 7])
    for scale in (0.5, 1.0, 2.0, 5.0):
        check_one(spline, draw_raw(spline, features_of(spline), scale, dtype, rng), dtype, 30, rng)


def test_tame_splines_keep_the_promise_of_affine_flows(dtype) -> None:
    """K = 8 on [-3, 3], raw numbers of 0.3 N(0, 1): rounding costs what it costs in a flow of moderate weights."""
    rng = np.random.default_rng(1)
    spline = SPLINES[0]
    raw = draw_raw(spline, 200, 0.3, dtype, rng)
    flow, rows = alone(spline, raw, dtype), rng.uniform(-3, 3, (300, 201)).astype(dtype)
    oracle = GeneralFlow(json.loads(flow.spec.to_json()), {k: v.astype(float) for k, v in flow.parameters().items()})
    budget = 1e-5 if dtype == "float32" else 1e-12
    for actual, expected in ((flow.forward(rows), oracle.forward(rows)), (inverse(flow, rows), oracle.inverse(rows))):
        assert np.abs(actual[0] - expected[0]).max() <= budget
        assert np.abs(actual[1] - expected[1]).max() / 200 <= budget
    back, _ = inverse(flow, flow.forward(rows)[0])
    assert np.abs(back - rows).max() <= budget


def inverse(flow: nvpflow.Flow, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return flow.inverse(z, with_log_det=True)


# --------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("scale", [0.5, 3.0])
@over_splines
def test_monotone_and_smooth_at_the_knots(spline, scale) -> None:
    """Value and slope from the left and from the right of each knot; at the ends, too, where the spline says so."""
    rng = np.random.default_rng(3)
    raw = draw_raw(spline, 1, scale, "float64", rng)
    flow, reference = alone(spline, raw, "float64"), reference_of(spline, raw, 0)
    smooth_ends = spline["boundary"] == "one" or spline["tails"] == "slope"
    for backwards in (False, True):
        knots = np.array([float(k) for k in (reference.knots_y if backwards else reference.knots_x)])
        knots = knots if smooth_ends else knots[1:-1]
        left, right = (evaluate(flow, 0, np.nextafter(knots, side), backwards) for side in (-np.inf, np.inf))
        slope = np.exp(left[1])
        np.testing.assert_allclose(left[0], right[0], rtol=0, atol=1e-13 * (1 + slope.max(initial=0)))
        for k, *log_slopes in zip(knots.tolist(), left[1], right[1], strict=True):
            _, (low, high) = reference.ranges(k, backwards=backwards, rounding=UNITS * unit_of("float64"))
            assert low <= min(log_slopes) <= max(log_slopes) <= high
        x = np.sort(np.concatenate([rng.uniform(spline["lower"] - 1, spline["upper"] + 1, 3000), knots]))
        values, _ = evaluate(flow, 0, x, backwards)
        assert np.all(np.diff(values) > -1e-14)


@pytest.mark.parametrize("num_bins", [1, 2, 3, 8, 10, 31, 256])
def test_raw_zeros_are_the_identity(num_bins, dtype) -> None:
    spline = spline_of(num_bins, 2.5)
    raw = {name: np.zeros((count, 3)) for name, count in raw_numbers(spline).items()}
    flow, x = alone(spline, raw, dtype), np.random.default_rng(0).normal(size=(500, 4)).astype(dtype)
    for values, log_det in (flow.forward(x), inverse(flow, x)):
        assert np.abs(values - x).max() <= UNITS * unit_of(dtype) * 5
        assert np.abs(log_det).max() <= 3 * UNITS * unit_of(dtype)


@over_splines
def test_the_inverse_undoes_the_map(spline) -> None:
    rng = np.random.default_rng(4)
    flow = alone(spline, draw_raw(spline, 5, 1.0, "float64", rng), "float64")
    x = 2 * rng.normal(size=(400, 6))
    z, log_det = flow.forward(x)
    back, back_log_det = inverse(flow, z)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(back_log_det, -log_det, rtol=0, atol=1e-8)


# ----------------------------------------------------------------------------------------- beyond the interval


@over_splines
def test_rows_beyond_the_interval(spline, dtype) -> None:
    """They stay as they are, or go on in a straight line; so does their gradient."""
    rng = np.random.default_rng(6)
    raw = draw_raw(spline, 2, 1.0, dtype, rng)
    flow, kind = alone(spline, raw, dtype), np.dtype(dtype).type
    low, high = kind(spline["lower"]), kind(spline["upper"])
    beyond = [low - kind(0.5), low - 100, high + kind(0.25), high + 1000, kind(1e30), kind(-1e30)]
    far = np.finfo(dtype).max / 8
    beyond = np.array([*beyond, far, -far], dtype)
    x = np.stack([np.zeros_like(beyond), beyond, beyond[::-1]], axis=1)
    slopes = np.ones((2, 2))  # [feature, lower or upper]
    if spline["tails"] == "slope":
        slopes = np.array(
            [[float(s) for s in reference_of(spline, raw, j).slopes[:: spline["num_bins"]]] for j in (0, 1)]
        )
    above = (x[:, 1:] > 0).astype(int)
    slope = slopes[[0, 1], above]
    for values, log_det, sign in ((*flow.forward(x), 1), (*inverse(flow, x), -1)):
        edge = np.where(above, high, low).astype(float)
        expected = edge + (x[:, 1:] - edge) * slope**sign
        if spline["tails"] == "identity":
            assert_same_bits(values, x)
            assert not log_det.any()
        else:
            np.testing.assert_allclose(values[:, 1:], expected, rtol=UNITS * unit_of(dtype))
            np.testing.assert_allclose(
                log_det, sign * np.log(slope).sum(axis=1), rtol=0, atol=2 * UNITS * unit_of(dtype)
            )
        ones = np.ones_like(x)
        direction = "forward" if sign > 0 else "inverse"
        grad, _ = flow.vjp(x, ones, np.ones(len(x), dtype), direction=direction)
        np.testing.assert_allclose(grad[:, 1:], slope**sign, rtol=UNITS * unit_of(dtype))


@over_splines
def test_what_is_inside_stays_inside(spline, dtype) -> None:
    """Not by a rounding beyond the ends, where a uniform base has no density."""
    raw = draw_raw(spline, 200, 1.0, dtype, np.random.default_rng(21))
    flow, kind = alone(spline, raw, dtype), np.dtype(dtype).type
    low, high = kind(spline["lower"]), kind(spline["upper"])
    unit = np.finfo(dtype).eps * (high - low)
    near = [np.nextafter(low, high), np.nextafter(high, low), high - 2 * unit, low + 2 * unit]
    x = np.tile(np.array([low, high, *near], dtype)[:, None], (1, 201))
    for rows in (1, len(x)):
        for at in range(0, len(x), rows):
            for values in (flow.forward(x[at : at + rows])[0], flow.inverse(x[at : at + rows])):
                assert low <= values.min()
                assert values.max() <= high


@over_splines
def test_gradients_are_finite_wherever_a_row_is(spline, dtype) -> None:
    """On the knots, at both ends and far out; parameters get nothing from a row that passes."""
    rng = np.random.default_rng(7)
    raw = draw_raw(spline, 1, 1.0, dtype, rng)
    flow, reference = alone(spline, raw, dtype), reference_of(spline, raw, 0)
    for direction, knots in (("forward", reference.knots_x), ("inverse", reference.knots_y)):
        far = np.finfo(dtype).max * (1e-8 if spline["tails"] == "slope" else 1)  # a slope may take it further
        at = np.array([*map(float, knots), 0, -4e30, 4e30, far, -far]).astype(dtype)
        x = np.stack([np.zeros_like(at), at], axis=1)
        for part in (x, *x[:, None]):
            grad, flat = flow.vjp(part, np.zeros_like(part), np.ones(len(part), dtype), direction=direction)
            assert np.isfinite(grad).all()
            assert np.isfinite(flat).all()
        if spline["tails"] == "identity":
            _, flat = flow.vjp(x[-4:], x[-4:], np.ones(4, dtype), direction=direction)
            assert not flat[flow_biases(flow)].any()


def flow_biases(flow: nvpflow.Flow) -> np.ndarray:
    """Where the heads' biases stand in the flat buffer: all raw numbers of a spline alone."""
    marks = [np.full(value.size, name.endswith(".bias")) for name, value in flow.parameters().items()]
    return np.concatenate(marks)


@over_splines
def test_a_bad_row_spoils_no_other(spline, dtype) -> None:
    rng = np.random.default_rng(8)
    flow = alone(spline, draw_raw(spline, 3, 1.0, dtype, rng), dtype)
    x = rng.normal(size=(40, 4)).astype(dtype)
    clean = (*flow.forward(x), *inverse(flow, x), flow.log_prob(x))
    spoiled = x.copy()
    bad = [3, 17, 18, 30]
    spoiled[bad, [1, 2, 0, 3]] = np.nan, np.inf, np.nan, -np.inf
    good = np.delete(np.arange(40), bad)
    for was, became in zip(
        clean, (*flow.forward(spoiled), *inverse(flow, spoiled), flow.log_prob(spoiled)), strict=True
    ):
        assert np.isnan(became[bad]).all()
        assert_same_bits(became[good], was[good])
    for row, number in ((3, np.nan), (17, np.inf)):
        for result in (*flow.forward(spoiled[row : row + 1]), *inverse(flow, spoiled[row : row + 1])):
            assert np.isnan(result).all(), number
    grad, _ = flow.vjp(spoiled, x, np.ones(40, dtype), wrt="x")
    expected, _ = flow.vjp(x, x, np.ones(40, dtype), wrt="x")
    assert_same_bits(grad[good], expected[good])


@over_splines
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_no_raw_numbers_make_nan(spline, scale, dtype) -> None:
    """Saturated in every way; with floors everything is finite, too."""
    rng = np.random.default_rng(9)
    raw = draw_raw(spline, 4, 1.0, "float64", rng)
    raw = {name: (np.sign(v) * scale ** np.abs(v).clip(0, 1)).astype(dtype) for name, v in raw.items()}
    flow = alone(spline, raw, dtype)
    far = [0, *np.linspace(spline["lower"], spline["upper"], 97), 1e30, -1e30]
    x = np.tile(np.array(far, dtype)[:, None], (1, 5))
    for rows in (len(x), 1):
        for at in range(0, len(x), rows):
            part = x[at : at + rows]
            for result in (*flow.forward(part), *inverse(flow, part), flow.log_prob(part)):
                assert not np.isnan(result).any()
            for direction in ("forward", "inverse"):
                grad, flat = flow.vjp(part, np.ones_like(part), np.ones(len(part), dtype), direction=direction)
                assert not np.isnan(grad).any()
                assert not np.isnan(flat).any()


# ----------------------------------------------------------------------------------------------------- gradients


def numerical(spline, raw: Raw, feature: int, x: float, cotangents: tuple[float, float], backwards: bool) -> dict:
    """Central differences in 50 digits: of x, and of every raw number of the feature."""
    names = list(raw)
    columns = {name: [mpmath.mpf(v) for v in raw[name][:, feature].tolist()] for name in names}

    def loss(columns: Mapping[str, list], x: mpmath.mpf) -> mpmath.mpf:
        made = Spline(spline, columns["widths"], columns["heights"], columns.get("derivatives", []))
        value, log_slope = made.at(x, backwards=backwards)
        return cotangents[0] * value + cotangents[1] * log_slope

    with mpmath.workdps(50):
        step = mpmath.mpf(10) ** -16
        at = mpmath.mpf(x)
        found = {"x": [(loss(columns, at + step) - loss(columns, at - step)) / (2 * step)]}
        for name in names:
            found[name] = []
            for i, value in enumerate(columns[name]):
                both = []
                for moved in (value + step, value - step):
                    changed = [*columns[name][:i], moved, *columns[name][i + 1 :]]
                    both.append(loss({**columns, name: changed}, at))
                found[name].append((both[0] - both[1]) / (2 * step))
        return {name: np.array([float(v) for v in values]) for name, values in found.items()}


@over_splines
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_of_one_spline(spline, direction, dtype) -> None:
    """Against differences in 50 digits, row by row."""
    rng = np.random.default_rng(10)
    raw = draw_raw(spline, 1, 0.4, dtype, rng)
    flow = alone(spline, raw, dtype)
    low, high = spline["lower"], spline["upper"]
    points = np.array([*rng.uniform(low, high, 4), low - 0.5, high + 0.5]).astype(dtype)
    for x in points:
        row = np.array([[0, x]], dtype)
        cotangents = rng.normal(size=2).astype(dtype)
        grad, flat = flow.vjp(row, np.array([[0, cotangents[0]]], dtype), cotangents[1:], direction=direction)
        expected = numerical(spline, raw, 0, float(x), tuple(cotangents.tolist()), direction == "inverse")
        of_raw = np.split(flat[flow_biases(flow)], ends_of(raw))
        actual = {"x": grad[0, 1:], **dict(zip(raw, of_raw, strict=True))}
        for name, wanted in expected.items():
            allowed = GRADIENT_BUDGET[dtype] * (1 + np.abs(wanted).max())
            assert np.abs(actual[name] - wanted).max() <= allowed, f"{name} at {x}"


def ends_of(raw: Raw) -> np.ndarray:
    return np.cumsum([value.size for value in raw.values()])[:-1]


@pytest.mark.parametrize("spline", SPLINES[:5], ids=name_of)
def test_the_gradient_of_the_mean_agrees_with_its_differences(spline) -> None:
    """The one direct check: differences of the flow's own nll, no oracle in between."""
    _, flow, x = flow_case(spline, 5, "float64")
    parameters = {name: value.copy() for name, value in flow.parameters().items()}
    x, offset, flat = x[:20], 0, flow.nll_gradient(x[:20])[1]
    rng = np.random.default_rng(0)
    for name, value in parameters.items():
        gradient, offset = flat[offset : offset + value.size], offset + value.size
        for at in rng.choice(value.size, min(value.size, 6), replace=False):
            differences = []
            for step in (2e-5, 1e-5):  # extrapolated: of narrow bins the third derivative is large
                losses = []
                for h in (step, -step):
                    moved = value.copy()
                    moved.flat[at] += h
                    flow.set_parameters({**parameters, name: moved})
                    losses.append(flow.nll(x))
                differences.append((losses[0] - losses[1]) / (2 * step))
            difference = (4 * differences[1] - differences[0]) / 3
            assert gradient[at] == pytest.approx(difference, rel=1e-6, abs=1e-7)


# ----------------------------------------------------------------------------------------------------- in a flow

NETWORKS = (
    {"kind": "mlp", "hidden_sizes": [7], "activation": "tanh", "layer_norm": False},
    {"kind": "mlp", "hidden_sizes": [9, 5], "activation": "silu", "layer_norm": True},
    {
        "kind": "residual",
        "hidden_size": 11,
        "num_blocks": 2,
        "activation": "tanh",
        "context_gates": False,
        "block_affines": False,
    },
)
SIZES = (2, 3, 6, 17, 33)
CASES = [
    pytest.param(spline, size, id=f"{name_of(spline)}-{size}")
    for i, spline in enumerate(SPLINES)
    for size in (SIZES if i == 0 else (SIZES[i % 5], SIZES[(i + 2) % 5]))
]


def flow_case(
    spline: Mapping[str, Any], size: int, dtype: str, context: int = 0
) -> tuple[GeneralFlow, nvpflow.Flow, np.ndarray]:
    """Two couplings, with networks of another kind for each size, and splines of features by themselves between."""
    first, second = (NETWORKS[(size + i) % len(NETWORKS)] for i in range(2))
    layers = [
        coupling(spline, "second_half", network=first),
        {"kind": "element_spline", "inverse": True, "features": "all", "spline": dict(spline)},
        coupling(spline, "even", inverse=True, network=second),
    ]
    for network in (layer["network"] for layer in layers if "network" in layer):
        if network["kind"] == "residual":
            network["context_gates"] = context > 0
    if size == 1:
        layers = [{**layer, "transformed": "all"} if layer["kind"] == "coupling" else layer for layer in layers]
    spec = spec_of(size, layers, dtype, context)
    rng = np.random.default_rng(size)
    x = (1.5 * rng.normal(size=(BATCHES[-1], size))).astype(dtype)
    parameters = {name: value.astype(dtype).astype(np.float64) for name, value in scrambled(spec, rng, 0.3).items()}
    return GeneralFlow(spec, parameters), flow_of(spec, parameters), x


def results(flow: nvpflow.Flow, x: np.ndarray, **given: np.ndarray) -> tuple[np.ndarray, ...]:
    return (*flow.forward(x, **given), *flow.inverse(x, with_log_det=True, **given), flow.log_prob(x, **given))


def check_batches(spline: Mapping[str, Any], size: int, dtype: str) -> None:
    """Tiles and a few rows give the same bits, also those on the tape."""
    _, flow, x = flow_case(spline, size, dtype)
    whole = results(flow, x)
    for batch in BATCHES:
        first = (len(x) - batch) // 2
        for part, expected in zip(results(flow, x[first : first + batch]), whole, strict=True):
            assert_same_bits(part, expected[first : first + batch], f"{name_of(spline)}, {batch} rows of {size}")
    taped, _ = flow._log_prob_and_vjp(x, np.ones(len(x), dtype), wrt="parameters")
    assert_same_bits(taped, whole[-1], f"{name_of(spline)}, log_prob beside its gradient")


_ISA = """
import sys
import numpy as np
import nvpflow
from test_spline import DTYPES, SIZES, SPLINES, check_batches, check_one, draw_raw, features_of
assert nvpflow.cpu_isa() == sys.argv[1]
rng = np.random.default_rng(0)
for dtype in DTYPES:
    for i, spline in enumerate(SPLINES):
        check_one(spline, draw_raw(spline, features_of(spline), 1.5, dtype, rng), dtype, 5, rng)
        check_batches(spline, SIZES[i % len(SIZES)], dtype)
print("done")
"""


@pytest.mark.parametrize("isa", _core.cpu_isas_available())
def test_every_instruction_set_has_splines(run_python, isa) -> None:
    assert run_python(_ISA, isa, env={"NVPFLOW_ISA": isa}).strip() == "done"


@pytest.mark.parametrize(("spline", "size"), CASES)
def test_flows_are_the_oracles(spline, size, dtype) -> None:
    oracle, flow, x = flow_case(spline, size, dtype)
    check_values(oracle, flow, x[:100], None)


def every_value(oracle: GeneralFlow, x: np.ndarray, c: np.ndarray | None) -> tuple[np.ndarray, ...]:
    return (*oracle.forward(x, c), *oracle.inverse(x, c), oracle.log_prob(x, c))


def check_values(oracle: GeneralFlow, flow: nvpflow.Flow, x: np.ndarray, c: np.ndarray | None) -> None:
    """Within the budget, or what so many units of rounding make of a result where that is more."""
    moved = sensitivities(every_value, oracle, x, c, np.random.default_rng(0))
    expected = every_value(oracle, x, c)
    given = {} if c is None else {"context": c}
    for actual, wanted, by_one in zip(results(flow, x, **given), expected, moved, strict=True):
        assert actual.dtype == x.dtype
        allowed = np.maximum(BUDGET[x.dtype.name] * (1 + np.abs(wanted)), UNITS * unit_of(x.dtype.name) * by_one)
        worst = np.max(np.abs(actual - wanted) / allowed)
        assert worst <= 1, f"off by {worst:.3g} of what is allowed"


@pytest.mark.parametrize(("spline", "size"), CASES)
def test_gradients_are_the_oracles(spline, size, dtype) -> None:
    oracle, flow, x = flow_case(spline, size, dtype)
    for direction in ("forward", "inverse"):
        check_gradients(oracle, flow, x, None, direction)


def check_gradients(
    oracle: GeneralFlow, flow: nvpflow.Flow, x: np.ndarray, c: np.ndarray | None, direction: str
) -> None:
    """Of 33 rows away from the knots, at which second derivatives jump; of each tensor, of its largest element."""
    dtype, rng = x.dtype.name, np.random.default_rng(0)
    smooth = np.flatnonzero(oracle.smallest_pre_activation(x, direction, c) > 1e-4)[:33]
    x, c = x[smooth], None if c is None else c[smooth]
    grad_out = (rng.normal(size=x.shape) / len(x)).astype(dtype)
    grad_log_det = (rng.normal(size=len(x)) / len(x)).astype(dtype)

    def gradients(oracle: GeneralFlow, x: np.ndarray, c: np.ndarray | None) -> list[np.ndarray]:
        found = oracle.vjp(x, grad_out, grad_log_det, direction, c)
        of_context = [] if found.context is None else [found.context * len(x)]
        return [found.x * len(x), *of_context, *found.parameters.values()]

    moved = sensitivities(gradients, oracle, x, c, rng)
    grad, flat, *of_context = flow.vjp(x, grad_out, grad_log_det, direction=direction, context=c)
    named = np.split(flat, offsets(flow))
    actual = [grad * len(x), *(g * len(x) for g in of_context), *named]
    for got, wanted, by_one in zip(actual, gradients(oracle, x, c), moved, strict=True):
        allowed = max(GRADIENT_BUDGET[dtype] * (1 + np.abs(wanted).max()), UNITS * unit_of(dtype) * by_one.max())
        worst = np.abs(got - wanted.reshape(got.shape)).max() / allowed
        assert worst <= 1, f"off by {worst:.3g} of what is allowed, {direction}"


@over_splines
def test_orientation_is_the_other_direction(spline, dtype) -> None:
    raw = draw_raw(spline, 5, 1.0, dtype, np.random.default_rng(11))
    one, other = (alone(spline, raw, dtype, inverse=flag) for flag in (False, True))
    x = (2 * np.random.default_rng(12).normal(size=(100, 6))).astype(dtype)
    for rows in (1, 3, 100):
        for there, back in ((one, other), (other, one)):
            for got, expected in zip(there.forward(x[:rows]), inverse(back, x[:rows]), strict=True):
                assert_same_bits(got, expected)


@over_splines
@pytest.mark.parametrize("flag", [False, True])
def test_a_spline_by_itself_is_that_of_a_coupling(spline, flag, dtype) -> None:
    raw = draw_raw(spline, 5, 1.0, dtype, np.random.default_rng(13))
    features = {"kind": "element_spline", "inverse": flag, "features": [1, 2, 3, 4, 5], "spline": dict(spline)}
    affine = {"kind": "affine", "log_scale": {"function": "tanh", "factor": 1.0, "divisor": 1.0}}
    nothing = {**coupling(spline, [0]), "transform": affine}
    spec = spec_of(6, [features, nothing], dtype)
    parameters = {name: np.zeros_like(value) for name, value in GeneralFlow(spec).parameters.items()}
    flow = flow_of(spec, parameters | {f"spline_0.{name}": value for name, value in raw.items()})
    expected = alone(spline, raw, dtype, inverse=flag)
    x = (2 * np.random.default_rng(14).normal(size=(100, 6))).astype(dtype)
    for rows in (1, 3, 100):
        for got, wanted in zip(results(flow, x[:rows]), results(expected, x[:rows]), strict=True):
            assert_same_bits(got, wanted)
    cotangents = np.random.default_rng(15).normal(size=(100, 7)).astype(dtype)
    for direction in ("forward", "inverse"):
        grads = [f.vjp(x, cotangents[:, :6], cotangents[:, 6], direction=direction) for f in (flow, expected)]
        np.testing.assert_array_equal(grads[0][0][:, 1:], grads[1][0][:, 1:])
        of_raw = [np.split(grad[1], offsets(f)) for grad, f in zip(grads, (flow, expected), strict=True)]
        named = [
            dict(zip(f.parameters(), parts, strict=True)) for f, parts in zip((flow, expected), of_raw, strict=True)
        ]
        for name in raw:
            wanted = named[1][f"flow_0_{name}.bias"]
            allowed = GRADIENT_BUDGET[dtype] * (1 + np.abs(wanted).max()) * 100
            assert np.abs(named[0][f"spline_0.{name}"] - wanted).max() <= allowed


def offsets(flow: nvpflow.Flow) -> np.ndarray:
    return np.cumsum([value.size for value in flow.parameters().values()])[:-1]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads, dtype) -> None:
    _, flow, x = flow_case(SPLINES[0], 6, dtype)
    flow.num_threads = 2
    expected = (*results(flow, x), *map(np.asarray, flow.nll_gradient(x)))
    flow.num_threads = threads
    for got, wanted in zip((*results(flow, x), *map(np.asarray, flow.nll_gradient(x))), expected, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("spline", SPLINES[:5], ids=name_of)
def test_contexts(spline, size, dtype) -> None:
    """One column too, whose splines the context alone makes; values and gradients, and one context for all rows."""
    oracle, flow, x = flow_case(spline, size, dtype, context=3)
    c = np.random.default_rng(16).normal(size=(len(x), 3)).astype(dtype)
    check_values(oracle, flow, x[:100], c[:100])
    for direction in ("forward", "inverse"):
        check_gradients(oracle, flow, x, c, direction)
    view = flow.condition(c[0])
    for batch in BATCHES:
        tiled = results(flow, x[:batch], context=np.tile(c[0], (batch, 1)))
        for got, wanted in zip(results(view, x[:batch]), tiled, strict=True):
            assert_same_bits(got, wanted)


def test_float64_rows_of_a_float32_flow_keep_their_digits() -> None:
    spline = spline_of(8)
    spec = spec_of(4, [{"kind": "standardize"}, coupling(spline, "odd", network=NETWORKS[0])], "float32")
    oracle = GeneralFlow(spec, scrambled(spec, np.random.default_rng(17), 0.3))
    for name, value in oracle.parameters.items():
        oracle.parameters[name] = value.astype(np.float32).astype(np.float64)
    oracle.parameters["standardize_0.mean"][:] = 2.0**23
    flow = flow_of(spec, oracle.parameters)
    x = np.random.default_rng(18).normal(size=(100, 4)) + 2.0**23
    for rows in (1, 3, 100):
        assert_within_budget(flow.log_prob(x[:rows]).astype(np.float32), oracle.log_prob(x[:rows]), "float32")
        z, _ = flow.forward(x[:rows])
        back = flow.inverse(z, dtype="float64")
        assert np.abs(back - x[:rows]).max() <= 1e-5


# ------------------------------------------------------------------------------------------------------ through build


def test_a_new_flow_is_near_the_identity(dtype) -> None:
    for options in ({}, {"num_bins": 20, "tail_bound": 5.0}, {"mixing": "permutation"}, {"network": "residual"}):
        flow = nvpflow.build(5, 4, (16,), transform="spline", dtype=dtype, standardize=False, seed=1, **options)
        x = np.random.default_rng(19).normal(size=(500, 5)).astype(dtype)
        z, log_det = flow.forward(x)
        assert np.abs(np.sort(z, axis=1) - np.sort(x, axis=1)).max() < 0.1
        assert np.abs(log_det).max() < 0.5


def test_splines_with_a_uniform_base(dtype) -> None:
    """Of columns that fill [0, 1]: every row has a density, which integrates to 1, and samples stay inside."""
    rng = np.random.default_rng(22)
    first = rng.beta(2, 5, size=(3000, 1))
    x = np.hstack([first, 1 - first * rng.random((3000, 1))]).astype(dtype)
    x[:4] = [[0, 0], [0, 1], [1, 0], [1, 1]]
    flow = nvpflow.build(2, 4, (16,), transform="spline", base="uniform", dtype=dtype, seed=1)
    before = flow.nll(x)
    flow.fit(x, epochs=20, progress=False)
    assert flow.nll(x) < before - 1.5
    drawn = flow.sample(3000, seed=0)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert np.abs(drawn.mean(axis=0) - x.mean(axis=0)).max() < 0.03
    middle = (np.arange(400) + 0.5) / 400
    grid = np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 2).astype(dtype)
    assert np.exp(flow.log_prob(grid), dtype=np.float64).mean() == pytest.approx(1, abs=0.01)


def test_training_finds_what_no_affine_coupling_can() -> None:
    """Of one column, under a context: two peaks, where affine flows have one normal distribution."""
    rng = np.random.default_rng(20)
    c = rng.normal(size=(4000, 1)).astype(np.float32)
    x = (np.where(rng.random((4000, 1)) < 0.5, 1.5, -1.5) + 0.3 * rng.normal(size=(4000, 1)) + c).astype(np.float32)
    flow = nvpflow.build(1, 2, (32,), context_size=1, transform="spline", seed=1)
    flow.fit(x, context=c, epochs=15, progress=False)
    truth = 0.5 * np.exp(-0.5 * ((x - c - 1.5) / 0.3) ** 2) + 0.5 * np.exp(-0.5 * ((x - c + 1.5) / 0.3) ** 2)
    truth = float(np.mean(np.log(truth / (0.3 * np.sqrt(2 * np.pi)))))
    assert -flow.nll(x, context=c) > truth - 0.05
    drawn = flow.sample(1000, context=np.zeros(1, np.float32), seed=0)
    assert 0.45 < np.mean(drawn > 0) < 0.55
    assert np.mean(np.abs(drawn) < 0.5) < 0.02
