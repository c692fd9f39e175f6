"""Certificates: each figure against the oracle or by hand, good and bad models told apart; fit's max_round_trip."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvpflow import _bound, _certify, certificate
from nvpflow.layers import Coupling, ElementSpline, LULinear
from oracle import ACTIVATIONS, DERIVATIVES, assert_same_bits, oracle_of, random_parameters, unit_data

DTYPES = ("float32", "float64")
EPS = {dtype: float(np.finfo(dtype).eps) for dtype in DTYPES}


def random_flow(
    kernel_scale, dtype="float32", *, size=16, num_flows=8, hidden=(64,), activation="relu", seed=0, **more
):
    flow = nvpflow.build(size, num_flows, hidden, activation, dtype=dtype, **more)
    shapes = {name: value.shape for name, value in flow.parameters().items()}
    random = random_parameters(shapes, seed, kernel_scale)
    flow.set_parameters({name: value.astype(dtype) for name, value in random.items()})
    return flow


# ---------------------------------------------------------------------------------------------- good and bad models


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("standardize", [False, True])
def test_a_new_flow_is_accurate(dtype, standardize) -> None:
    flow = nvpflow.build(16, 4, (64,), dtype=dtype, standardize=standardize)
    found = flow.certify(unit_data(500, 16, 1, dtype))
    assert (found.verdict, found.ok, found.advice) == ("accurate", True, ())
    assert found.promised == {"float32": 1e-5, "float64": 1e-12}[dtype]
    assert 0 < found.round_trip.relative < found.round_trip_bound
    assert found.round_trip_bound < 2000 * EPS[dtype]


def test_a_trained_flow_is_accurate() -> None:
    x = unit_data(2000, 5, 0, "float32")
    x[:, 4] += x[:, 1] * x[:, 2]
    flow = nvpflow.build(5, 4, (32,), standardize=True)
    flow.fit(x * 100 + 1000, epochs=4, progress=False)
    found = flow.certify(x * 100 + 1000)
    assert found.verdict == "accurate"
    # Data far from zero in units of their spread: x' has no room for the last digits of z.
    assert found.round_trip.absolute > 3e-7


def test_deep_flows_with_large_weights_are_flagged_in_float32_and_cured_by_float64() -> None:
    x = unit_data(1000, 16, 1, "float32")
    reduced, unreliable = (random_flow(scale).certify(x) for scale in (1.0, 2.0))
    assert (reduced.verdict, reduced.ok) == ("reduced", True)
    assert (unreliable.verdict, unreliable.ok) == ("unreliable", False)
    assert [re.findall("float64|scale_bound|weight_decay", sentence) for sentence in unreliable.advice] == [
        ["float64", "float64", "float64"],
        ["scale_bound", "weight_decay"],
    ]
    for scale, single in ((1.0, reduced), (2.0, unreliable)):
        double = random_flow(scale).astype("float64").certify(x.astype(np.float64))
        assert double.ok
        assert double.round_trip.relative < 1e-5 * single.round_trip.relative
        # The certificate of the float32 flow said so: of the rows it took, the worst of all among them.
        assert single.float64_round_trip <= double.round_trip.relative
        assert single.shrink > 100


def test_a_flow_that_no_arithmetic_saves_is_not_sent_to_float64() -> None:
    flow = random_flow(4.0, num_flows=16, scale_bound=3.0)
    found = flow.certify(unit_data(300, 16, 1, "float32"))
    assert found.verdict == "unreliable"
    assert not any("Use float64" in sentence for sentence in found.advice)
    assert any("scale_bound (now 3)" in sentence for sentence in found.advice)


def test_splines_say_how_many_digits_they_keep() -> None:
    x = unit_data(1000, 6, 1, "float32")
    flow = nvpflow.build(6, 6, (32,), transform="spline", standardize=False, seed=1)
    new = flow.certify(x)
    assert (new.verdict, new.round_trip_bound, new.advice) == ("accurate", None, ())
    heads = tuple(f"{head}.kernel" for head in ("widths", "heights", "derivatives"))
    for scale, verdict in ((100, "reduced"), (200, "unreliable")):
        values = flow.parameters().items()
        other = nvpflow.Flow(flow.spec)
        other.set_parameters({name: value * np.float32(scale if name.endswith(heads) else 1) for name, value in values})
        found = other.certify(x)
        assert (found.verdict, found.round_trip_bound) == (verdict, None)
        worst = max(found.round_trip.relative, found.log_prob.relative, found.log_det.relative)
        digits = int(re.search(r"float32 keeps (\d+) digits? on these rows: splines", " ".join(found.advice))[1])
        assert 10.0 ** -(digits + 1) < worst <= 10.0**-digits
        assert any("float64" in sentence for sentence in found.advice)
        assert any("fewer bins (now 8 bins on [-3, 3])" in sentence for sentence in found.advice) == (scale == 200)
        assert not any("scale_bound" in sentence for sentence in found.advice)
        double = other.astype("float64").certify(x.astype(np.float64))
        assert double.round_trip.relative < 1e-5 * found.round_trip.relative


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"transform": "spline"}, "spline couplings"),
        ({"transform": "additive"}, "additive couplings"),
        ({"mixing": "lu"}, "permutations"),
        ({"actnorm": True}, "actnorm layers"),
        ({"layers": [Coupling(), LULinear()]}, "LU layers"),
        ({"layers": [ElementSpline("all"), Coupling()]}, "spline layers"),
        ({"mask": "checkered"}, "Coupling('odd', Affine('tanh', bound=1.0), MLP((256,), 'r..."),
        ({"transform": "spline", "base": "uniform"}, "base=Uniform(0.0, 1.0)"),
    ],
)
def test_no_bound_says_in_words_why(options, what) -> None:
    found = nvpflow.build(4, **options).certify(np.full((3, 4), 0.5, np.float32))
    assert (found.round_trip_bound, found.no_bound) == (None, f"it is not derived for {what}")
    assert f"none: it is not derived for {what}\n" in repr(found)


def test_a_tolerance_of_ones_own() -> None:
    x = unit_data(500, 16, 1, "float32")
    flow = random_flow(1.0)
    error = flow.certify(x).round_trip.relative
    assert flow.certify(x, tolerance=1.01 * error).verdict == "reduced"
    assert flow.certify(x, tolerance=0.99 * error).verdict == "unreliable"


@pytest.mark.parametrize("scale", ["exp", "softplus"])
def test_a_log_scale_without_a_bound_is_named(scale) -> None:
    found = nvpflow.build(3, 2, (4,), scale=scale).certify(unit_data(100, 3, 1, "float32"))
    assert found.round_trip_bound is None
    assert found.no_bound.endswith("has no bound, and rows far from the data can overflow")
    assert found.no_bound in f"{found}"


def test_rounding_on_purpose_is_named() -> None:
    flow = random_flow(0.5, num_flows=2).to("cpu", weights="bfloat16")
    found = flow.certify(unit_data(100, 16, 1, "float32"))
    assert found.weights == "bfloat16"
    assert (found.round_trip_bound, found.no_bound) == (None, "the flow rounds on purpose")
    # Compared with the weights in full, which its file holds.
    assert found.log_prob.relative > 1e-4
    assert found.round_trip.relative < 1e-5
    assert any("weights='bfloat16'" in sentence for sentence in found.advice)


@pytest.mark.gpu
def test_a_flow_on_cuda_is_measured_there() -> None:
    flow = random_flow(0.5, num_flows=2, hidden=(16,))
    x = unit_data(200, 16, 1, "float32")
    x[5] = np.nan
    found, on_cpu = flow.to("cuda").certify(x, jacobian_rows=3), flow.certify(x, jacobian_rows=3)
    assert (found.verdict, found.device) == ("accurate", "cuda:0")
    assert found.round_trip.relative <= found.round_trip_bound == on_cpu.round_trip_bound
    assert found.parameters_sha256 == on_cpu.parameters_sha256
    assert found.float64_round_trip == pytest.approx(on_cpu.float64_round_trip, abs=1e-15)
    double = flow.to("cuda").astype("float64")
    assert (double.device, double.certify(x.astype(np.float64), jacobian_rows=1).verdict) == ("cuda:0", "accurate")
    rounded = flow.to("cuda", "tf32").certify(x, jacobian_rows=1)
    assert (rounded.precision, rounded.round_trip_bound) == ("tf32", None)
    assert rounded.log_prob.relative > 1e-5
    assert any("precision='tf32'" in sentence for sentence in rounded.advice)


# ---------------------------------------------------------------------------------------------- each figure


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("standardize", [False, True])
def test_errors_are_those_of_the_oracle(make_flow, dtype, standardize) -> None:
    flow, oracle = make_flow(5, 3, (12,), "gelu", dtype=dtype, standardize=standardize, scale_bound=1.5)
    x = unit_data(300, 5, 3, dtype)
    found = flow.certify(x, jacobian_rows=300)
    wide, (z, log_det) = x.astype(np.float64), flow.forward(x)
    std = np.exp(oracle.parameters["standardize_0.log_std"]) if standardize else np.ones(5)

    back = flow.inverse(z)
    error = np.abs(back - wide)
    relative = (error / (std + np.abs(wide))).max(axis=1)
    assert found.round_trip.row == np.argmax(relative)
    assert found.round_trip.relative == pytest.approx(relative.max(), rel=1e-9)
    assert found.round_trip.absolute == pytest.approx((error / std).max(), rel=1e-9)

    error = np.abs(flow.forward(back)[0].astype(np.float64) - z)
    relative = (error / (1 + np.abs(z))).max(axis=1)
    assert found.latent_round_trip == certificate.Deviation(relative.max(), int(np.argmax(relative)), error.max())

    error = np.abs(flow.log_probability(x) - oracle.log_prob(wide))
    relative = error / (1 + np.abs(oracle.log_prob(wide)))
    if dtype == "float32":  # in float64 the difference is one of rounding, which is nobody's to predict
        assert found.log_prob.row == np.argmax(relative)
        assert found.log_prob.relative == pytest.approx(relative.max(), rel=1e-6)
        assert found.log_prob.absolute == pytest.approx(error.max(), rel=1e-6)
    else:
        assert found.log_prob.relative < 1e-14

    rows = np.arange(5)
    jacobians = np.stack([oracle.vjp(np.tile(x, (5, 1)), np.repeat(np.eye(5)[rows], 300, 0), None)[0]])
    jacobians = jacobians.reshape(5, 300, 5).transpose(1, 0, 2)  # [row, i of z, j of x]
    expected = np.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(expected, oracle.forward(wide)[1], rtol=1e-11, atol=1e-11)
    relative = np.abs(log_det - expected) / (1 + np.abs(expected))
    assert found.jacobian_rows == 300
    if dtype == "float32":
        assert found.log_det.row == np.argmax(relative)
        assert found.log_det.relative == pytest.approx(relative.max(), rel=1e-5)
    else:
        assert found.log_det.relative < 1e-13
    singular = np.linalg.svd(jacobians * std, compute_uv=False)
    assert found.stretch == pytest.approx(singular[:, 0].max(), rel=1e-9)
    assert found.shrink == pytest.approx((1 / singular[:, -1]).max(), rel=1e-9)
    assert found.jacobian_resolution == pytest.approx(
        5 * EPS["float64"] * (singular[:, 0] / singular[:, -1]).max(), rel=1e-9
    )


def test_a_wrong_log_determinant_would_be_found(monkeypatch) -> None:
    """The Jacobian is not formed from the log-determinant: one that is off by 0.01 shows."""
    flow = nvpflow.build(4, 2, (8,))
    x = unit_data(50, 4, 0, "float32")
    forward = nvpflow.Flow.forward

    class Wrong(nvpflow.Flow):
        __slots__ = ()

        def forward(self, x, **more):
            z, log_det = forward(self, x, **more)
            return z, log_det + np.float32(0.01)

    wrong = Wrong(flow.spec)
    wrong.set_parameters(flow.parameters())
    found = wrong.certify(x)
    assert found.log_det.absolute == pytest.approx(0.01, rel=1e-3)
    assert found.verdict == "unreliable"
    assert flow.certify(x).verdict == "accurate"


def test_hand_computed(make_flow) -> None:
    """Two columns; t = 3 a, then t = 2 a; s = 0. x = (1, 2) goes to (1, 5) and on to (11, 5)."""
    flow = nvpflow.build(2, 2, (), dtype="float64")
    parameters = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
    parameters["flow_0_translation.kernel"][:] = 3
    flow.set_parameters(parameters)
    x = np.array([[1.0, 2.0]])
    eps = EPS["float64"]
    # One coupling that does something: 8 |x_b| + |t| roundings. The second: 8 |x_b| of column 0.
    one = nvpflow.build(2, 1, (), dtype="float64")
    one.set_parameters({name: parameters[name] for name in one.parameters()})
    assert one.certify(x).round_trip_bound == pytest.approx((8 * 2 + 3) * eps, rel=1e-12)

    parameters["flow_1_translation.kernel"][:] = 2
    flow.set_parameters(parameters)
    found = flow.certify(x)
    assert found.round_trip == certificate.Deviation(0.0, 0, 0.0)
    assert found.log_prob == certificate.Deviation(0.0, 0, 0.0)
    assert flow.log_probability(x)[0] == pytest.approx(-math.log(2 * math.pi) - (11**2 + 5**2) / 2)
    # J = [[1 + 2 * 3, 2], [3, 1]]: determinant 1; singular values from its Frobenius norm, 63.
    assert found.log_det.absolute < 1e-13
    largest = math.sqrt((63 + math.sqrt(63**2 - 4)) / 2)
    assert found.stretch == pytest.approx(largest)
    assert found.shrink == pytest.approx(largest)
    # Back through the second: 8 * 1 + 10. Through the first: the shift moves by 3 * 18, its own roundings are 2 * 3,
    # those of the scale 2 * 3 times |x_b| = 2, and the step's 19.
    assert found.round_trip_bound == pytest.approx((3 * 18 + 6 + 12 + 19) * eps, rel=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slopes_of_activations(activation) -> None:
    u = np.linspace(-12, 12, 200_001)
    steepest = np.max(np.abs(DERIVATIVES[activation](u)))
    assert steepest <= _bound._LIPSCHITZ[activation] <= steepest + 2e-5


def test_norms_of_kernels() -> None:
    kernel = np.random.default_rng(0).normal(size=(30, 50))
    assert _bound.spectral_norm(kernel) == pytest.approx(np.linalg.svd(kernel)[1][0])
    large = np.random.default_rng(0).normal(size=(1600, 1540)).astype(np.float32).astype(np.float64)
    # Too large for singular values: a bound, which those of Gaussian matrices, sqrt(m) + sqrt(n), tell to be one.
    assert math.sqrt(1600) + math.sqrt(1540) < _bound.spectral_norm(large) <= np.linalg.norm(large)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    size=st.integers(2, 9),
    num_flows=st.integers(1, 6),
    hidden=st.sampled_from([(), (1,), (8,), (16, 5)]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    kernel_scale=st.sampled_from([0.01, 0.3, 1.0, 2.0]),
    scale_bound=st.sampled_from([0.1, 1.0, 2.5]),
    standardize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_the_bound_holds(
    size, num_flows, hidden, activation, kernel_scale, scale_bound, standardize, dtype, spread, seed
) -> None:
    """No round trip is worse than the bound, also of deep flows with large weights and of data of other scales."""
    options = {"size": size, "num_flows": num_flows, "hidden": hidden, "activation": activation, "seed": seed}
    flow = random_flow(kernel_scale, dtype, scale_bound=scale_bound, standardize=standardize, **options)
    x = (unit_data(40, size, seed) * spread).astype(dtype)
    found = flow.certify(x, jacobian_rows=0)
    assert found.failed_rows == 0
    assert found.round_trip_bound is None or found.round_trip.relative <= found.round_trip_bound


def test_the_bound_holds_for_any_list_of_layers() -> None:
    spec = json.loads(nvpflow.build(5, 2, (8,), "tanh", standardize=False).spec.to_json())
    coupling, swapped = spec["layers"]
    spec["layers"] = [swapped, {"kind": "standardize"}, swapped, coupling, {"kind": "standardize"}]
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps(spec)))
    shapes = {name: value.shape for name, value in flow.parameters().items()}
    flow.set_parameters({name: v.astype(np.float32) for name, v in random_parameters(shapes, 3, 0.7).items()})
    x = unit_data(500, 5, 4, "float32")
    found = flow.certify(x)
    assert found.verdict == "accurate"
    assert found.round_trip.relative <= found.round_trip_bound < 1
    # Without a standardize layer in front errors are in the data's own unit.
    error = np.abs(flow.inverse(flow.forward(x)[0]).astype(np.float64) - x)
    assert found.round_trip.relative == (error / (1 + np.abs(x.astype(np.float64)))).max()


# ---------------------------------------------------------------------------------------------- rows


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    flow = random_flow(0.5, num_flows=2)
    x = unit_data(400, 16, 1, "float32")
    holed = np.insert(x, [3, 200, 200], np.nan, axis=0)
    holed[3, :15], holed[201, :8] = 0, -np.inf
    found, expected = flow.certify(holed), flow.certify(x)
    assert (found.rows, found.nonfinite_rows, found.first_nonfinite_row) == (403, 3, 3)
    assert (expected.rows, expected.nonfinite_rows, expected.first_nonfinite_row) == (400, 0, None)
    assert found.verdict == "accurate"
    assert [sentence.split(":")[0] for sentence in found.advice] == ["3 rows with NaN or infinity (first"]
    for name in ("round_trip", "latent_round_trip", "log_prob"):
        of_found, of_expected = getattr(found, name), getattr(expected, name)
        assert (of_found.relative, of_found.absolute) == (of_expected.relative, of_expected.absolute)
        assert_same_bits(holed[of_found.row], x[of_expected.row])
    assert found.round_trip_bound == expected.round_trip_bound


def test_rows_without_any_number_prove_nothing() -> None:
    found = nvpflow.build(3, 2, (4,)).certify(np.full((7, 3), np.nan, np.float32))
    assert (found.verdict, found.nonfinite_rows, found.jacobian_rows) == ("unreliable", 7, 0)
    assert found.round_trip is found.log_prob is found.log_det is found.round_trip_bound is None
    assert found.no_bound == "there is no finite row"
    assert "not measured" in repr(found)
    assert nvpflow.Certificate.from_json(found.to_json()) == found


def test_finite_rows_that_overflow_are_failures() -> None:
    flow = nvpflow.build(3, 2, (4,))
    x = unit_data(50, 3, 1, "float32")
    x[[20, 31]] = 3e38
    found = flow.certify(x)
    assert (found.verdict, found.failed_rows, found.first_failed_row) == ("unreliable", 2, 20)
    assert any("2 finite rows (first: row 20)" in sentence for sentence in found.advice)
    assert found.round_trip.relative < 1e-6, "the other rows are as they were"
    assert nvpflow.Certificate.from_json(found.to_json()) == found


def test_one_row_and_none() -> None:
    flow = nvpflow.build(4, 2, (8,))
    row = unit_data(1, 4, 1, "float32")
    found = flow.certify(row)
    assert (found.rows, found.jacobian_rows, found.round_trip.row) == (1, 1, 0)
    assert flow.certify(row[0]) == found
    with pytest.raises(ValueError, match="x has no rows"):
        flow.certify(row[:0])


def test_what_is_refused() -> None:
    flow = nvpflow.build(4, 2, (8,), standardize=False)
    x = unit_data(10, 4, 1, "float32")
    with pytest.raises(ValueError, match=r"^x has shape \(10, 3\), expected \[N, 4\]"):
        flow.certify(x[:, :3])
    with pytest.raises(ValueError, match=r"^x has shape \(2, 5, 4\)"):
        flow.certify(x.reshape(2, 5, 4))
    with pytest.raises(TypeError, match=r"^x has dtype float64.*float32"):
        flow.certify(x.astype(np.float64))
    for tolerance in (0, 1e-6, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^tolerance is .*at least 1e-05"):
            flow.certify(x, tolerance=tolerance)
    with pytest.raises(TypeError, match="tolerance"):
        flow.certify(x, tolerance="small")
    with pytest.raises(ValueError, match="jacobian_rows is -1"):
        flow.certify(x, jacobian_rows=-1)
    with pytest.raises(TypeError, match="jacobian_rows"):
        flow.certify(x, jacobian_rows=1.5)


def test_blocks_and_threads_change_nothing(monkeypatch) -> None:
    flow = random_flow(0.7, num_flows=4)
    x = unit_data(900, 16, 1, "float32")
    x[77, 3] = np.nan
    expected = flow.certify(x, jacobian_rows=10)
    assert expected.jacobian_rows in (10, 11)
    certifier = _certify.Certifier(flow, jacobian_rows=10)
    for rows in np.split(x, [1, 2, 78, 300, 301]):
        certifier.add(rows)
    assert certifier.certificate() == expected
    monkeypatch.setattr(_certify, "_BLOCK_VALUES", 16 * 37)
    flow.num_threads = 2
    assert flow.certify(x, jacobian_rows=10) == expected
    assert flow.certify(np.asfortranarray(x), jacobian_rows=10) == expected


def test_rows_for_jacobians_are_drawn_evenly() -> None:
    """Of 300 rows in 3 blocks 30 are drawn: by chance about 10 of each."""
    flow = nvpflow.build(2, 1, ())
    certifier = _certify.Certifier(flow, jacobian_rows=30)
    for block in range(3):
        certifier.add(np.full((100, 2), block, np.float32))
    assert sorted(set(certifier._drawn_rows // 100)) == [0, 1, 2]
    assert np.bincount(certifier._drawn_rows // 100).min() >= 4
    assert_same_bits(certifier._drawn[:, 0], (certifier._drawn_rows // 100).astype(np.float32))


def test_no_jacobian_where_one_takes_minutes_or_none_is_wanted() -> None:
    wide = nvpflow.build(7000, 1, (2,))
    row = np.zeros((1, 7000), np.float32)
    small = nvpflow.build(16, 2, (8,))
    for found in (wide.certify(row), small.certify(row[:, :16], jacobian_rows=0)):
        assert found.verdict == "accurate"
        assert found.jacobian_rows == 0
        assert found.log_det is found.stretch is found.shrink is found.jacobian_resolution is None
        assert found.float64_round_trip == 0
        assert nvpflow.Certificate.from_json(found.to_json()) == found
        assert re.search(r"log_det against 0 Jacobians +not measured", str(found))
    assert 1 <= _certify.Certifier(nvpflow.build(784, 2, (512,)))._wanted < 64


def test_determinants_that_float64_does_not_hold_are_left_out() -> None:
    flow = nvpflow.build(400, 1, (), dtype="float64", scale_bound=4.0)
    parameters = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
    parameters["flow_0_scale.bias"][:] = -100.0
    flow.set_parameters(parameters)
    found = flow.certify(unit_data(3, 400, 0))
    # 200 columns shrink by e^-4: the determinant, e^-800, is below float64, its logarithm is not.
    assert found.jacobian_rows == 3
    assert found.log_det.relative < 1e-12
    assert found.shrink == pytest.approx(math.exp(4))


def test_the_flow_is_left_alone_and_may_change_meanwhile() -> None:
    flow = random_flow(0.5, num_flows=2)
    before = {name: value.copy() for name, value in flow.parameters().items()}
    x = unit_data(100, 16, 1, "float32")
    expected = flow.certify(x)
    certifier = _certify.Certifier(flow)
    certifier.add(x[:50])
    flow.set_parameters({name: 2 * value for name, value in before.items()})
    certifier.add(x[50:])
    assert certifier.certificate() == expected


# ---------------------------------------------------------------------------------------------- the result


def test_a_certificate_prints_and_goes_through_json() -> None:
    found = random_flow(2.0).certify(unit_data(200, 16, 1, "float32"))
    text = str(found)
    assert text.startswith("Certificate: unreliable; float32 promises 1e-05, tolerated 1e-03")
    assert f"{found.round_trip.relative:.1e}  {found.round_trip.absolute:>8.1e}" in text
    assert f"{found.round_trip_bound:.1e}" in text
    assert f"  * {found.advice[0]}" in text
    assert re.search(r"log_det against 6[45] Jacobians", text)

    values = json.loads(found.to_json())
    assert values == found.to_dict()
    assert values["round_trip"]["relative"] == found.round_trip.relative
    assert nvpflow.Certificate.from_json(found.to_json()) == found
    assert len(found.parameters_sha256) == 64
    assert found.parameters_sha256 != random_flow(2.0, seed=1).certify(np.zeros((1, 16), np.float32)).parameters_sha256
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.verdict = "accurate"


def test_json_of_something_else_is_refused() -> None:
    values = nvpflow.build(2, 1, ()).certify(np.ones((1, 2), np.float32)).to_dict()
    for wrong in ({}, {**values, "more": 1}, {k: v for k, v in values.items() if k != "rows"}, [], 3):
        with pytest.raises(ValueError, match="Certificate holds"):
            nvpflow.Certificate.from_json(json.dumps(wrong))
    with pytest.raises(ValueError, match="Deviation holds"):
        nvpflow.Certificate.from_dict({**values, "round_trip": {"relative": 1}})


# ---------------------------------------------------------------------------------------------- astype


def test_a_flow_in_another_dtype(make_flow) -> None:
    flow, oracle = make_flow(5, 3, (8,), "silu", dtype="float32", standardize=True)
    x = unit_data(50, 5, 1)
    flow.num_threads = 1
    double = flow.astype("float64")
    assert (double.spec.dtype, double.num_threads) == ("float64", 1)
    assert double.spec.activation == "silu"
    np.testing.assert_allclose(double.log_probability(x), oracle.log_prob(x), rtol=1e-12)
    assert double.astype(np.float32) == flow
    assert flow.astype("float32") == flow
    assert flow.astype("float32") is not flow
    assert flow.to("cpu", weights="bfloat16").astype("float64") == double
    assert flow.to("cpu", weights="bfloat16").astype("float32").weights == "bfloat16"


def test_weights_that_float32_does_not_hold() -> None:
    flow = nvpflow.build(2, 1, (), dtype="float64")
    flow.set_parameters({name: np.full_like(value, 1e39) for name, value in flow.parameters().items()})
    with pytest.raises(ValueError, match=r"dtype is 'float32'.*beyond its range"):
        flow.astype("float32")
    with pytest.raises(ValueError, match="float16"):
        flow.astype("float16")
    with pytest.raises(TypeError, match="dtype"):
        flow.astype(None)


# ---------------------------------------------------------------------------------------------- fit


def curved(rows: int, seed: int = 0) -> np.ndarray:
    x = unit_data(rows, 5, seed)
    x[:, 3] = 0.05 * x[:, 3] + np.sin(2 * x[:, 0])
    x[:, 4] = 0.05 * x[:, 4] + x[:, 1] * x[:, 2]
    return (3 * x + 7).astype(np.float32)


def train(flow, x, **options):
    shared = {"progress": False, "epochs": 6, "batch_size": 64, "seed": 3, "learning_rate": 1e-2}
    return flow.fit(x, **{**shared, **options})


def trainee(seed: int = 1):
    return nvpflow.build(5, 4, (16,), "tanh", seed=seed, standardize=True)


def flat(flow) -> np.ndarray:
    return flow._copy_flat_parameters()


def test_fit_measures_what_a_certificate_would() -> None:
    x, validation = curved(500), curved(300, seed=2)
    for options, rows in (({"validation": validation}, validation), ({"validation": None}, x)):
        flow = trainee()
        history = train(flow, x, epochs=1, max_round_trip=1e-3, **options)
        assert history.round_trip[0] == pytest.approx(flow.certify(rows).round_trip.relative, rel=1e-12)
    # Rows held out by fit: at most the worst of all.
    flow = trainee()
    history = train(flow, x, epochs=1, max_round_trip=1e-3, validation=0.2)
    assert 0 < history.round_trip[0] <= flow.certify(x).round_trip.relative


def test_measuring_changes_nothing_else() -> None:
    x = curved(500)
    plain, measured = trainee(), trainee()
    first, second = train(plain, x), train(measured, x, max_round_trip=1.0)
    assert_same_bits(flat(plain), flat(measured))
    assert np.isnan(first.round_trip).all()
    assert np.all(second.round_trip > 0)
    assert "round trip" not in repr(first)
    assert f"{second.round_trip[0]:.2e}" in repr(second)
    assert second.to_dict()["round_trip"] == list(second.round_trip)
    for threads in (1, 2):
        assert_same_bits(train(trainee(), x, max_round_trip=1.0, num_threads=threads).round_trip, second.round_trip)


def separated(x, validation) -> tuple[dict[str, object], nvpflow.History]:
    """Options of a run whose lowest loss is outside the bound and which has epochs within; and the run without it."""
    for seed in range(8):  # the errors of good flows are noise: in one run of six the best epoch has the smallest
        free = train(trainee(), x, validation=validation, seed=seed, max_round_trip=1.0)
        of_best = free.round_trip[free.best_epoch - 1]
        smaller = free.round_trip[free.round_trip < of_best]
        if len(smaller):
            bound = float(np.sqrt(smaller.max() * of_best))
            return {"validation": validation, "seed": seed, "max_round_trip": bound}, free
    raise AssertionError("no run of eight has an epoch with a smaller error than the best")


def test_epochs_outside_the_bound_are_not_the_best() -> None:
    x, validation = curved(500), curved(300, seed=2)
    options, free = separated(x, validation)
    bound = options["max_round_trip"]
    flow = trainee()
    history = train(flow, x, **options)
    within = free.round_trip <= bound
    assert_same_bits(history.round_trip, free.round_trip)
    assert history.best_loss == free.validation_loss[within].min()
    assert history.best_epoch == int(free.epoch[within][np.argmin(free.validation_loss[within])])
    assert flow.certify(validation).round_trip.relative <= bound


def test_a_run_without_an_epoch_inside_says_so_and_leaves_the_flow_alone(tmp_path) -> None:
    x = curved(500)
    smallest = train(trainee(), x, max_round_trip=1.0).round_trip
    message = rf"max_round_trip 1e-10: the smallest error of 6 epochs was .*epoch {1 + np.argmin(smallest)}.*as it was"
    path = tmp_path / "run.checkpoint"
    for _ in range(2):  # the second time from the checkpoint of a run that has ended
        flow = trainee()
        before = flat(flow)
        with pytest.raises(nvpflow.TrainingError, match=message):
            train(flow, x, max_round_trip=1e-10, checkpoint=path)
        assert_same_bits(flat(flow), before)
    with pytest.raises(nvpflow.TrainingError, match="1 epochs"):
        train(trainee(), x, max_round_trip=1e-10, callback=lambda record: False)
    # For patience an epoch outside is no better, however low its loss.
    assert len(train(trainee(), x, max_round_trip=1.0, patience=3)) == 6
    with pytest.raises(nvpflow.TrainingError, match="of 3 epochs"):
        train(trainee(), x, max_round_trip=1e-10, patience=3)


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_resumed_run_remembers_the_bound(tmp_path, stop_after) -> None:
    x, validation = curved(500), curved(300, seed=2)
    options, free = separated(x, validation)
    whole = trainee()
    expected = train(whole, x, **options)
    assert expected.best_epoch != free.best_epoch
    options["checkpoint"] = tmp_path / "run.checkpoint"
    try:
        train(trainee(), x, callback=lambda record: record["epoch"] < stop_after, **options)
    except nvpflow.TrainingError:  # no epoch was inside yet
        assert expected.best_epoch > stop_after
    resumed = trainee(seed=99)
    history = train(resumed, x, **options)
    assert_same_bits(flat(resumed), flat(whole))
    assert_same_bits(history.round_trip, expected.round_trip)
    assert (history.best_epoch, history.best_loss) == (expected.best_epoch, expected.best_loss)
    for other in (None, 2 * options["max_round_trip"]):
        with pytest.raises(ValueError, match="max_round_trip"):
            train(trainee(), x, **(options | {"max_round_trip": other}))


def test_the_callback_hears_of_the_round_trip() -> None:
    heard = []
    history = train(trainee(), curved(300), max_round_trip=1.0, callback=lambda r: heard.append(r["round_trip"]))
    assert heard == list(history.round_trip)


@pytest.mark.parametrize(("value", "error"), [(-1.0, ValueError), (math.nan, ValueError), ("1e-4", TypeError)])
def test_bounds_that_mean_nothing(value, error) -> None:
    with pytest.raises(error, match="max_round_trip"):
        train(trainee(), curved(300), max_round_trip=value)


# ---------------------------------------------------------------------------------------------- the command


def command(folder: Path, *arguments: object, fails: int = 0, stdin: str | None = None):
    done = subprocess.run(
        [sys.executable, "-m", "nvpflow", *map(str, arguments)],
        capture_output=True, text=True, cwd=folder, input=stdin, timeout=120,
    )  # fmt: skip
    assert done.returncode == fails, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_check_prints_the_certificate_and_tells_by_its_exit_code(tmp_path) -> None:
    x = unit_data(70_000, 16, 1, "float32")  # more than one block of the file
    np.save(tmp_path / "data.npy", x)
    good, bad = random_flow(0.5, num_flows=2, hidden=(8,)), random_flow(2.0, hidden=(8,))
    good.save(tmp_path / "good.safetensors")
    bad.save(tmp_path / "bad.safetensors")
    assert command(tmp_path, "check", "good.safetensors", "data.npy").stdout == f"{good.certify(x)}\n"
    done = command(tmp_path, "check", "bad.safetensors", "data.npy", "--json", "--jacobian-rows", 3, fails=3)
    assert done.stderr == ""
    assert nvpflow.Certificate.from_json(done.stdout) == bad.certify(x, jacobian_rows=3)
    # Another tolerance, another verdict.
    command(tmp_path, "check", "bad.safetensors", "data.npy", "--tolerance", 1e9, "--jacobian-rows", 0)


def test_check_of_data_that_cannot_be_used(tmp_path) -> None:
    flow = nvpflow.build(3, 1, (4,))
    flow.save(tmp_path / "model.safetensors")
    check = ("check", "model.safetensors")
    assert "no rows" in command(tmp_path, *check, "-", stdin="a,b,c\n", fails=1).stderr
    assert "2 columns, the model takes 3" in command(tmp_path, *check, "-", stdin="1,2\n", fails=1).stderr
    assert "tolerance is 1e-09" in command(tmp_path, *check, "-", "--tolerance", 1e-9, stdin="1,2,3\n", fails=1).stderr
    refused = command(tmp_path, *check, "-", stdin="1,2,3\n4,nan,6\n", fails=1).stderr
    assert "missing cells in column 2 (line 2): --missing nan takes them as NaN, and gives NaN for 1 row\n" in refused
    output = command(tmp_path, *check, "-", "--missing", "nan", stdin="1,2,3\n4,nan,6\n").stdout
    assert "2 rows; 1 with NaN or inf (first: row 1)" in output
    command(tmp_path, *check, "none.npy", fails=1)


def test_check_says_what_is_wrong_with_the_columns(tmp_path) -> None:
    x = unit_data(500, 3, 1, "float32")
    np.save(tmp_path / "plain.npy", x)
    x[:, 2] = np.arange(500) % 3
    np.save(tmp_path / "codes.npy", x)
    nvpflow.build(3, 1, (4,)).save(tmp_path / "model.safetensors")
    assert command(tmp_path, "check", "model.safetensors", "plain.npy").stderr == ""
    done = command(tmp_path, "check", "model.safetensors", "codes.npy", "--json")
    assert "column 3 has 3 distinct values" in done.stderr
    nvpflow.Certificate.from_json(done.stdout)  # stdout is the certificate only


def test_fit_keeps_inside_the_bound_from_the_shell(tmp_path) -> None:
    np.save(tmp_path / "data.npy", curved(500))
    fit = ("fit", "data.npy", "--num-flows", 2, "--hidden-sizes", 8, "--epochs", 2, "--threads", 1)
    assert "round trip" in command(tmp_path, *fit, "-o", "kept.safetensors", "--max-round-trip", 1e-4).stdout
    done = command(tmp_path, *fit, "-o", "none.safetensors", "--max-round-trip", 1e-12, fails=1)
    assert done.stderr.startswith("nvpflow: error: no epoch was inside --max-round-trip 1e-12")
    assert not (tmp_path / "none.safetensors").exists()
    assert (tmp_path / "kept.safetensors").exists()


# ---------------------------------------------------------------------------------------------- the page


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys) -> None:
    page = Path(__file__).parents[2] / "python" / "docs" / "certify.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert "Certificate: " in capsys.readouterr().out


@pytest.mark.data
def test_a_model_of_the_power_data_is_certified() -> None:
    import os

    folder = Path(os.environ["NVPFLOW_DATA"])
    rows = np.load(folder / "power_train.npy", mmap_mode="r")[:60_000]
    validation = np.load(folder / "power_val.npy")[:20_000]
    flow = nvpflow.build(6, 6, (32,), standardize=True)
    history = flow.fit(rows, validation=validation, epochs=2, batch_size=512, max_round_trip=1e-3, progress=False)
    found = flow.certify(validation)
    assert found.ok
    assert found.round_trip.relative == history.round_trip[history.best_epoch - 1]
    oracle = oracle_of(flow)
    at = found.log_prob.row
    expected = oracle.log_prob(validation[at : at + 1].astype(np.float64))[0]
    actual = flow.log_probability(validation[at : at + 1])[0]
    assert abs(actual - expected) / (1 + abs(expected)) == pytest.approx(found.log_prob.relative, rel=1e-6)
