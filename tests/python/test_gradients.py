"""Gradients: the oracle's reverse mode against finite differences, and the flow's against the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import (
    ACTIVATIONS,
    KINKED,
    OracleFlow,
    assert_same_bits,
    finite_difference,
    oracle_of,
    random_parameters,
    real_nvp,
    unit_data,
    well_conditioned_scale,
)

# Central differences in float64 are good to about 1e-9 of the function's scale (oracle.finite_difference).
FINITE_DIFFERENCE_BUDGET = 1e-8
# |gradient - oracle| <= budget (1 + largest |oracle| of the tensor), element by element. Sums over rows cancel, so an
# element's own size says nothing about the rounding that went into it.
GRADIENT_BUDGET = {"float32": 1e-5, "float64": 2e-14}

# (input_size, num_flows, hidden_sizes, standardize, scale_bound, rows)
SHAPES = [
    (2, 1, (), False, 1.0, 1),
    (2, 3, (1,), True, 1.0, 33),
    (3, 2, (3,), False, 0.5, 7),
    (5, 4, (7, 5), True, 2.0, 65),
    (6, 8, (64,), False, 1.0, 100),
    (7, 3, (16, 17, 18), True, 1.0, 47),
    (13, 2, (35, 47), True, 1.0, 70),
    (9, 2, (40, 10), False, 1.0, 130),
    (16, 4, (128,), False, 1.0, 257),
    (31, 2, (100, 100), False, 1.0, 49),
    (64, 2, (33,), True, 1.0, 129),
    (101, 2, (), False, 1.0, 63),
]
LARGE = [(784, 1, (64,), False, 1.0, 20), (17, 2, (1025,), False, 1.0, 31), (1000, 2, (16,), True, 1.0, 18)]


def _smooth_rows(oracle: OracleFlow, rows: int, direction: str, dtype: str, seed: int, activation: str) -> np.ndarray:
    """Unit data without the rows whose pre-activations are so near a kink that rounding decides the branch."""
    if activation not in KINKED:
        return unit_data(rows, oracle.input_size, seed, dtype)
    candidates = unit_data(40 * rows + 200, oracle.input_size, seed, dtype)
    margin = 2e-5 if dtype == "float32" else 1e-12
    smooth = candidates[oracle.smallest_pre_activation(candidates, direction) > margin]
    assert len(smooth) >= rows
    return smooth[:rows]


def _assert_gradient(actual: np.ndarray, expected: np.ndarray, dtype: str, what: str) -> None:
    assert actual.shape == expected.shape, what
    assert actual.dtype == np.dtype(dtype), what
    scale = 1.0 + np.max(np.abs(expected), initial=0.0)
    error = np.max(np.abs(actual - expected), initial=0.0) / scale
    assert error <= GRADIENT_BUDGET[dtype], f"{what}: error {error:.3g} of its scale"


def _named(flow, flat: np.ndarray) -> dict[str, np.ndarray]:
    """The flat gradient cut into the parameters' shapes, in their order."""
    named, offset = {}, 0
    for name, value in flow.parameters().items():
        named[name] = flat[offset : offset + value.size].reshape(value.shape)
        offset += value.size
    assert offset == flat.size
    return named


# ---------------------------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 1, (), False, 1.0), (3, 2, (3,), True, 0.5), (5, 3, (7, 5), True, 2.0)])
def test_oracle_reverse_mode_agrees_with_its_finite_differences(shape, activation, direction) -> None:
    size, flows, hidden, standardize, bound = shape
    oracle = real_nvp(size, flows, hidden, activation, bound, standardize)
    oracle.set_parameters(random_parameters(oracle.shapes(), 1))
    x = unit_data(50, size, 2)
    x = x[oracle.smallest_pre_activation(x, direction) > 1e-3][:4]
    assert len(x) == 4
    grad_out, grad_log_det = unit_data(4, size, 3), unit_data(4, 1, 4)[:, 0]

    def loss(v: np.ndarray) -> float:
        out, log_det = getattr(oracle, direction)(v)
        return float(np.sum(grad_out * out) + np.sum(grad_log_det * log_det))

    grad_x, gradients = oracle.vjp(x, grad_out, grad_log_det, direction)
    np.testing.assert_allclose(grad_x, finite_difference(loss, x), rtol=0, atol=FINITE_DIFFERENCE_BUDGET)
    for name, value in oracle.parameters.items():

        def loss_of(v: np.ndarray, name: str = name) -> float:
            oracle.parameters[name] = v
            return loss(x)

        expected = finite_difference(loss_of, value)
        oracle.parameters[name] = value
        scale = 1.0 + np.max(np.abs(expected))
        np.testing.assert_allclose(
            gradients[name], expected, rtol=0, atol=FINITE_DIFFERENCE_BUDGET * scale, err_msg=name
        )


# ---------------------------------------------------------------------------------------------- the flow


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nll_gradient_agrees_with_finite_differences(make_flow, activation) -> None:
    """The one direct check: differences of the flow's own nll, no oracle in between."""
    flow, oracle = make_flow(5, 3, (4, 3), activation, standardize=True)
    x = unit_data(400, 5, 3)
    x = x[oracle.smallest_pre_activation(x) > 1e-4][:37]
    parameters = {name: value.copy() for name, value in flow.parameters().items()}
    loss, flat = flow.nll_gradient(x)
    assert loss == pytest.approx(flow.nll(x), rel=1e-14)
    for name, gradient in _named(flow, flat).items():

        def loss_of(v: np.ndarray, name: str = name) -> float:
            flow.set_parameters({**parameters, name: v})
            return flow.nll(x)

        expected = finite_difference(loss_of, parameters[name])
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=FINITE_DIFFERENCE_BUDGET, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "activation"),
    [(shape, activation) for i, shape in enumerate(SHAPES) for activation in list(ACTIVATIONS)[i % 2 :: 2]]
    + [(shape, activation) for shape, activation in zip(LARGE, ("relu", "silu", "tanh"), strict=True)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_gradients_agree_with_the_oracle(make_flow, shape, activation, dtype) -> None:
    size, flows, hidden, standardize, bound, rows = shape
    flow, oracle = make_flow(
        size,
        flows,
        hidden,
        activation,
        dtype=dtype,
        standardize=standardize,
        scale_bound=bound,
        seed=size,
        kernel_scale=well_conditioned_scale(flows),
    )
    x = _smooth_rows(oracle, rows, "forward", dtype, 5, activation)
    loss, flat = flow.nll_gradient(x)
    expected_loss, expected = oracle.nll_gradient(x)
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == "float32" else 1e-12)
    for name, gradient in _named(flow, flat).items():
        _assert_gradient(gradient, expected[name], dtype, f"nll: {name}")

    for direction in ("forward", "inverse"):
        x = _smooth_rows(oracle, rows, direction, dtype, 5, activation)
        # A mean over the rows, so that the sums are of the scale of one row's gradient.
        grad_out = (unit_data(rows, size, 6) / rows).astype(dtype)
        grad_log_det = (unit_data(rows, 1, 7)[:, 0] / rows).astype(dtype)
        grad_x, flat = flow.vjp(x, grad_out, grad_log_det, direction=direction)
        expected_x, expected = oracle.vjp(x, grad_out, grad_log_det, direction)
        _assert_gradient(grad_x * rows, expected_x * rows, dtype, f"{direction}: grad_x")
        for name, gradient in _named(flow, flat).items():
            _assert_gradient(gradient, expected[name], dtype, f"{direction}: {name}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_absent_gradients_mean_zero(make_flow, dtype) -> None:
    flow, oracle = make_flow(5, 3, (6,), dtype=dtype)
    x, grad_out = unit_data(21, 5, 8, dtype), unit_data(21, 5, 9, dtype)
    grad_log_det = unit_data(21, 1, 10, dtype)[:, 0]
    for direction in ("forward", "inverse"):
        for given_out, given_log_det in ((grad_out, None), (None, grad_log_det), (None, None)):
            grad_x, flat = flow.vjp(x, given_out, given_log_det, direction=direction)
            expected_x, expected = oracle.vjp(x, given_out, given_log_det, direction)
            _assert_gradient(grad_x, expected_x, dtype, "grad_x")
            for name, gradient in _named(flow, flat).items():
                _assert_gradient(gradient / 21, expected[name] / 21, dtype, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_score_of_log_prob(make_flow, activation) -> None:
    """d log p / dx is the vjp with grad_out = -z and grad_log_det = 1."""
    flow, oracle = make_flow(6, 3, (10,), activation, standardize=True)
    x = unit_data(200, 6, 11)
    x = x[oracle.smallest_pre_activation(x) > 1e-4][:9]
    z, _ = flow.forward(x)
    score, _ = flow.vjp(x, -z, np.ones(len(x)))
    for row, expected in zip(x, score, strict=True):
        numerical = finite_difference(lambda v: float(flow.log_prob(v)), row)
        np.testing.assert_allclose(expected, numerical, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 7, 64, 1009, 4099])
def test_threads_do_not_change_a_bit_of_a_gradient(make_flow, rows, dtype) -> None:
    flow, _ = make_flow(9, 3, (40,), "gelu", dtype=dtype, standardize=True)
    x, grad_out = unit_data(rows, 9, 12, dtype), unit_data(rows, 9, 13, dtype)
    grad_log_det = unit_data(rows, 1, 14, dtype)[:, 0]
    results = {}
    for threads in (1, 2, 3, 4):
        flow.num_threads = threads
        loss, gradient = flow.nll_gradient(x)
        results[threads] = (
            np.float64(loss),
            gradient,
            *flow.vjp(x, grad_out, grad_log_det),
            *flow.vjp(x, grad_out, grad_log_det, direction="inverse"),
        )
        for result, reference in zip(results[threads], results[1], strict=True):
            assert_same_bits(result, reference, f"{threads} threads")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_grad_x_of_a_row_does_not_depend_on_the_others(make_flow, dtype) -> None:
    flow, _ = make_flow(7, 3, (12,), "elu", dtype=dtype)
    x, grad_out = unit_data(130, 7, 15, dtype), unit_data(130, 7, 16, dtype)
    grad_log_det = unit_data(130, 1, 17, dtype)[:, 0]
    for direction in ("forward", "inverse"):
        whole, _ = flow.vjp(x, grad_out, grad_log_det, direction=direction)
        for first, last in ((0, 1), (5, 6), (3, 20), (17, 81), (64, 130)):
            part, _ = flow.vjp(x[first:last], grad_out[first:last], grad_log_det[first:last], direction=direction)
            assert_same_bits(part, whole[first:last], f"rows {first} to {last}, {direction}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_one_row_and_of_none(make_flow, dtype) -> None:
    flow, _ = make_flow(5, 2, (6,), dtype=dtype)
    x, grad_out = unit_data(1, 5, 18, dtype), unit_data(1, 5, 19, dtype)
    one = np.ones(1, dtype=dtype)
    batch_x, batch_flat = flow.vjp(x, grad_out, one)
    row_x, row_flat = flow.vjp(x[0], grad_out[0], one[0])
    assert row_x.shape == (5,)
    assert_same_bits(row_x, batch_x[0], "grad_x")
    assert_same_bits(row_flat, batch_flat, "grad_params")
    empty_x, empty_flat = flow.vjp(x[:0], grad_out[:0], one[:0])
    assert empty_x.shape == (0, 5)
    assert empty_flat.shape == (flow.num_parameters,)
    assert not np.any(empty_flat)
    with pytest.raises(ValueError, match=r"\bx\b.*row"):
        flow.nll_gradient(x[:0])
    with pytest.raises(ValueError, match=r"\bx\b.*row"):
        flow.nll(x[:0])


def test_gradient_arguments_are_checked_and_named(make_flow) -> None:
    flow, _ = make_flow(5, 2, (6,))
    x = unit_data(8, 5, 20)
    with pytest.raises(ValueError, match=r"grad_out.*\b7\b"):
        flow.vjp(x, x[:7])
    with pytest.raises(ValueError, match=r"grad_out.*\(8, 4\)"):
        flow.vjp(x, x[:, :4])
    with pytest.raises(ValueError, match=r"grad_log_det.*\(7,\)"):
        flow.vjp(x, x, np.ones(7))
    with pytest.raises(ValueError, match=r"grad_log_det.*\(8, 1\)"):
        flow.vjp(x, x, np.ones((8, 1)))
    with pytest.raises(TypeError, match=r"grad_out.*complex128"):
        flow.vjp(x, x.astype(complex))
    with pytest.raises(ValueError, match=r"direction.*sideways.*forward.*inverse"):
        flow.vjp(x, x, direction="sideways")


def test_a_bad_row_makes_the_gradient_nan_not_wrong(make_flow) -> None:
    flow, _ = make_flow(5, 2, (6,), "relu")
    x = unit_data(40, 5, 21)
    x[13, 1] = np.nan
    loss, flat = flow.nll_gradient(x)
    assert np.isnan(loss)
    assert np.all(np.isnan(flat))
    grad_x, _ = flow.vjp(x, np.ones_like(x), np.ones(40))
    assert list(np.flatnonzero(np.isnan(grad_x).any(axis=1))) == [13]
    assert np.all(np.isnan(grad_x[13]))


def test_oracle_of_a_flow_holds_its_parameters(make_flow) -> None:
    flow, oracle = make_flow(5, 2, (6,), dtype="float32", standardize=True)
    again = oracle_of(flow)
    for name, value in flow.parameters().items():
        assert_same_bits(again.parameters[name].astype(np.float32), value, name)
        assert_same_bits(again.parameters[name], oracle.parameters[name], name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_wanted_changes_nothing_else(make_flow, dtype) -> None:
    """wrt= and out= of both vector-Jacobian products, and log_prob's against the chain rule through forward."""
    flow, _ = make_flow(6, 3, (9,), dtype=dtype, standardize=True)
    x = unit_data(21, 6, 1, dtype)
    cotangent = np.linspace(-1, 1, len(x)).astype(dtype)
    z, _ = flow.forward(x)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-11, "atol": 1e-11}
    by_rows = flow.log_prob_vjp(x, cotangent)
    for got, chained in zip(by_rows, flow.vjp(x, -z * cotangent[:, None], cotangent), strict=True):
        np.testing.assert_allclose(got, chained, **tolerance)
    for wrt, wanted in (("all", by_rows), ("x", (by_rows[0], None)), ("parameters", (None, by_rows[1]))):
        value, grads = flow._log_prob_and_vjp(x, cotangent, wrt=wrt)
        assert np.array_equal(value, flow.log_prob(x))
        assert all(map(np.array_equal, grads, wanted))
    calls = {
        "log_prob": lambda **options: flow.log_prob_vjp(x, cotangent, **options),
        "forward": lambda **options: flow.vjp(x, z, cotangent, **options),
        "inverse": lambda **options: flow.vjp(x, z, cotangent, direction="inverse", **options),
    }
    for call in calls.values():
        both = call()
        (only_x, none), (nothing, only_parameters) = call(wrt="x"), call(wrt="parameters")
        assert none is nothing is None
        assert np.array_equal(only_x, both[0])
        assert np.array_equal(only_parameters, both[1])
        out = np.full_like(x, np.nan), np.full(flow.num_parameters, np.nan, dtype)
        given = call(out=out)
        assert given[0] is out[0]
        assert given[1] is out[1]
        assert np.array_equal(out[0], both[0])
        assert np.array_equal(out[1], both[1])
        with pytest.raises(ValueError, match=r"^wrt is 'y', expected"):
            call(wrt="y")
        with pytest.raises(ValueError, match=r"^out\[0\] .*overlap"):
            call(out=(x, None))
