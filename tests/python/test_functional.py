"""nvpflow.functional against Edifice's formulas, written out in float64 NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from nvpflow import functional
from oracle import ACTIVATIONS

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def random_layer(size, hidden_sizes, *, even=True, dtype="float64", seed=0, rows=7):
    """A batch and the weights of a coupling layer, all of `dtype`."""
    random = np.random.default_rng(seed)
    inputs, outputs = (size // 2, size - size // 2) if even else (size - size // 2, size // 2)

    def dense(n_in, n_out):
        kernel = random.normal(size=(n_in, n_out)) / np.sqrt(max(n_in, 1))
        return kernel.astype(dtype), random.normal(scale=0.3, size=n_out).astype(dtype)

    widths = [inputs, *hidden_sizes]
    hidden = [dense(a, b) for a, b in itertools.pairwise(widths)]
    x = random.normal(size=(rows, size)).astype(dtype)
    return x, hidden, dense(widths[-1], outputs), dense(widths[-1], outputs)


def reference_layer(x, hidden, scale, translation, *, even, activation, scale_bound):
    """y and s of one coupling layer, float64."""
    x = x.astype(np.float64)
    half = x.shape[1] // 2
    a, b = (slice(0, half), slice(half, None)) if even else (slice(half, None), slice(0, half))
    g = x[:, a]
    for kernel, bias in hidden:
        g = ACTIVATIONS[activation](g @ kernel.astype(np.float64) + bias)
    s = scale_bound * np.tanh((g @ scale[0].astype(np.float64) + scale[1]) / scale_bound)
    t = g @ translation[0].astype(np.float64) + translation[1]
    y = x.copy()
    y[:, b] = x[:, b] * np.exp(s) + t
    return y, s


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(
    ("size", "hidden_sizes", "activation", "scale_bound"),
    [
        (6, (8,), "relu", 1.0),
        (2, (5,), "tanh", 1.0),
        (7, (9, 4), "silu", 2.5),
        (3, (), "relu", 0.5),
        (33, (17, 17, 17), "gelu", 1.0),
    ],
)
def test_coupling_layer(size, hidden_sizes, activation, scale_bound, even, dtype):
    x, *weights = random_layer(size, hidden_sizes, even=even, dtype=dtype)
    options = {"even": even, "activation": activation, "scale_bound": scale_bound}
    y, s = functional.affine_coupling_layer(x, *weights, **options)
    expected_y, expected_s = reference_layer(x, *weights, **options)

    assert y.dtype == s.dtype == dtype
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(y, expected_y, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(s, expected_s, rtol=tolerance, atol=tolerance)
    back = functional.inverse_coupling_layer(y, *weights, size // 2, **options)
    np.testing.assert_allclose(back, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("even", [True, False])
def test_conditioning_half_is_passed_through_unchanged(even):
    x, *weights = random_layer(7, (4,), even=even)
    y, _ = functional.affine_coupling_layer(x, *weights, even=even)
    a = slice(0, 3) if even else slice(3, None)
    assert np.array_equal(y[:, a], x[:, a])


def test_layers_chained_by_hand_are_the_flow(make_flow):
    flow, _ = make_flow(6, 4, (8, 5), "elu")
    x = np.random.default_rng(1).normal(size=(11, 6))
    weights = flow.parameters()

    z, scales = x, []
    for k in range(4):
        hidden = [[weights[f"flow_{k}_coupling_dense_{j}.{part}"] for part in ("kernel", "bias")] for j in range(2)]
        heads = [
            [weights[f"flow_{k}_{head}.{part}"] for part in ("kernel", "bias")] for head in ("scale", "translation")
        ]
        z, s = functional.affine_coupling_layer(z, hidden, *heads, even=k % 2 == 0, activation="elu")
        scales.append(s)

    expected_z, expected_log_det = flow.forward(x)
    np.testing.assert_allclose(z, expected_z, rtol=1e-12, atol=1e-12)
    log_det = functional.total_log_det_jacobian(scales)
    np.testing.assert_allclose(log_det, expected_log_det, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(functional.log_probability(z, log_det), flow.log_probability(x), rtol=1e-12)
    assert functional.nll_loss(z, log_det) == pytest.approx(flow.nll(x), rel=1e-12)


def test_empty_batch():
    x, *weights = random_layer(4, (3,), rows=0)
    y, s = functional.affine_coupling_layer(x, *weights)
    assert y.shape == (0, 4)
    assert s.shape == (0, 2)
    assert functional.inverse_coupling_layer(y, *weights).shape == (0, 4)
    assert functional.log_probability(y, s.sum(axis=1)).shape == (0,)
    with pytest.raises(ValueError, match="z has no rows"):
        functional.nll_loss(y, s.sum(axis=1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reductions(dtype):
    random = np.random.default_rng(2)
    scales = [random.normal(size=(5, n)).astype(dtype) for n in (3, 4)]
    z = random.normal(size=(5, 7)).astype(dtype)
    log_dets = [s.astype(np.float64).sum(axis=1) for s in scales]
    total = functional.total_log_det_jacobian(scales)
    expected = -0.5 * (7 * np.log(2 * np.pi) + (z.astype(np.float64) ** 2).sum(axis=1)) + sum(log_dets)

    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(functional.log_det_jacobian(scales[0]), log_dets[0], rtol=tolerance)
    np.testing.assert_allclose(total, sum(log_dets), rtol=tolerance)
    log_p = functional.log_probability(z, total)
    np.testing.assert_allclose(log_p, expected, rtol=tolerance)
    assert functional.log_det_jacobian(scales[0]).dtype == total.dtype == log_p.dtype == dtype
    assert functional.nll_loss(z, total) == pytest.approx(-expected.mean(), rel=tolerance)


def test_nan_row_stays_alone():
    x, *weights = random_layer(4, (3,))
    expected, _ = functional.affine_coupling_layer(x, *weights)
    x[2, 1] = np.nan
    y, _ = functional.affine_coupling_layer(x, *weights)
    others = np.arange(len(x)) != 2
    assert np.array_equal(y[others], expected[others])
    assert np.isnan(y[2]).any()


def wrong(**changes):
    """Call the layer with one argument replaced."""
    x, hidden, scale, translation = random_layer(4, (3,))
    given = {"x": x, "hidden": hidden, "scale": scale, "translation": translation} | changes
    return functional.affine_coupling_layer(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros(4)}, ValueError, r"x has shape \(4,\), expected two dimensions"),
        ({"x": np.zeros((3, 4), dtype=int)}, TypeError, "x has dtype int64, expected float32 or float64"),
        ({"x": np.zeros((3, 1))}, ValueError, r"1 column\(s\), expected at least 2"),
        ({"x": np.zeros((3, 6))}, ValueError, r"hidden\[0\] kernel has shape \(2, 3\), expected \(3, out\)"),
        ({"hidden": []}, ValueError, r"scale kernel has shape \(3, 2\), expected \(2, 2\)"),
        ({"hidden": [None]}, TypeError, r"hidden\[0\] is None .*, expected a pair \(kernel, bias\)"),
        (
            {"hidden": [(np.zeros((2, 3)), np.zeros(2))]},
            ValueError,
            r"hidden\[0\] bias has shape \(2,\), expected \(3,\)",
        ),
        ({"scale": (np.zeros((3, 1)), np.zeros(1))}, ValueError, r"scale kernel has shape \(3, 1\), expected \(3, 2\)"),
        ({"translation": (np.zeros((3, 2)), np.zeros(1))}, ValueError, "translation bias"),
        ({"translation": (np.zeros((3, 2), dtype=complex), np.zeros(2))}, TypeError, "translation kernel has dtype"),
        ({"activation": "rulu"}, ValueError, "activation is 'rulu'.*softplus"),
        ({"activation": 3}, TypeError, "activation is 3 .*, expected a string"),
        ({"even": 2}, TypeError, "even is 2 .*, expected True or False"),
        ({"scale_bound": 0.0}, ValueError, "scale_bound is 0"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        wrong(**changes)


def test_float64_weights_are_not_rounded_in_silence():
    x, *weights = random_layer(4, (3,))
    with pytest.raises(TypeError, match=r"hidden\[0\] kernel has dtype float64"):
        functional.affine_coupling_layer(x.astype(np.float32), *weights)


def test_wrong_half_size():
    y, *weights = random_layer(7, (3,))
    with pytest.raises(ValueError, match="half_size=4 for 7 columns, expected 3"):
        functional.inverse_coupling_layer(y, *weights, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.log_det_jacobian(np.zeros(3)), r"scale has shape \(3,\)"),
        (lambda: functional.total_log_det_jacobian([]), "scales is empty"),
        (
            lambda: functional.total_log_det_jacobian([np.zeros((2, 1)), np.zeros((3, 1))]),
            r"scales have \[2, 3\] rows",
        ),
        (lambda: functional.log_probability(np.zeros((3, 2)), np.zeros(2)), r"total_log_det has shape \(2,\)"),
        (lambda: functional.nll_loss(np.zeros((3, 2)), np.zeros((3, 1))), r"total_log_det has shape \(3, 1\)"),
    ],
)
def test_wrong_shapes_of_the_reductions(call, message):
    with pytest.raises(ValueError, match=message):
        call()
