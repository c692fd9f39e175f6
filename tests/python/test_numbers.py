"""Single numbers: elementary functions in ulp, random numbers, and how far a float32 round trip can drift."""

from __future__ import annotations

import decimal
import math

import numpy as np
import nvpflow
import pytest
from oracle import (
    ACTIVATIONS,
    assert_same_bits,
    assert_within_budget,
    oracle_of,
    philox4x32,
    standard_normals,
    ulp_error,
    unit_data,
)

DTYPES = ("float32", "float64")
PI = decimal.Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808651"
    "3282306647093844609550582231725359408128481117450284102701938521105559644622948954930381964428810975665933446128"
    "4756482337867831652712019091456485669234603486104543266482133936072602491412737245870066063155881748815209209628"
)
# The reference for float64 is 80-bit; elsewhere long double may be no longer than double.
needs_extended = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs an 80-bit long double")


# ---------------------------------------------------------------------------------------------- elementary functions


def probe(hidden_sizes, activation, dtype, scale_bound=1.0):
    """A flow of two columns whose one network passes its input on: kernels 1, biases 0."""
    flow = nvpflow.build(
        input_size=2,
        num_flows=1,
        hidden_sizes=hidden_sizes,
        activation=activation,
        dtype=dtype,
        scale_bound=scale_bound,
        standardize=False,
    )
    flow.set_parameters(
        {name: np.full_like(value, name.endswith(".kernel")) for name, value in flow.parameters().items()}
    )
    return flow


def arguments(low: float, high: float, dtype: str, count: int = 40_000) -> np.ndarray:
    """Both a grid and many magnitudes down to the subnormals, of both signs where the range has them."""
    rng = np.random.default_rng(5)
    tiny = np.exp(rng.uniform(np.log(np.finfo(dtype).smallest_subnormal), 0, count))
    values = np.concatenate([rng.uniform(low, high, 2 * count), tiny, -tiny, [0.0, 1.0, -1.0, low, high]])
    return values[(values >= low) & (values <= high)].astype(dtype)


def conditioner(flow, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.stack([a, np.ones_like(a)], axis=1)
    s, t = flow._conditioner(0, rows)
    return s[:, 0], t[:, 0]


def exact_normal_cdf(values: np.ndarray) -> np.ndarray:
    """Phi by the series of erf whose terms all have one sign, in decimal arithmetic with room for the cancellation."""
    results = []
    for value in values:
        x = decimal.Decimal(float(value))
        # 1/2 + (a number that tends to -1/2): the lower tail exp(-x^2 / 2) is lost in front of what remains.
        with decimal.localcontext(decimal.Context(prec=40 + int(value * value / 4.6))):
            term = total = x
            n = 1
            while abs(term) > abs(total) * decimal.Decimal(10) ** -decimal.getcontext().prec:
                term *= x * x / (2 * n + 1)
                total += term
                n += 1
            results.append(np.longdouble(str(decimal.Decimal("0.5") + total * (-x * x / 2).exp() / (2 * PI).sqrt())))
    return np.array(results)


def reference(activation: str, a: np.ndarray) -> np.ndarray:
    """The activation in extended precision."""
    u = a.astype(np.longdouble)
    if activation == "gelu":
        return u * exact_normal_cdf(a)
    if activation in ("silu", "sigmoid"):
        e = np.exp(-np.abs(u))
        sigmoid = np.where(u >= 0, 1, e) / (1 + e)
        return u * sigmoid if activation == "silu" else sigmoid
    if activation == "softplus":
        return np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u)))
    if activation == "elu":
        return np.where(u > 0, u, np.expm1(np.minimum(u, 0)))
    if activation == "tanh":
        return np.tanh(u)
    # 0.01 in the arithmetic of the model: the slope is a number of the dtype.
    return np.where(u > 0, u, u * (0 if activation == "relu" else a.dtype.type(0.01)))


# Largest error in ulp over the arguments below, and the range they are taken from: beyond it the results are
# subnormal, where an ulp is not a relative error any more. exp is the test of the scale below.
ULP_BOUNDS = {
    "relu": 0,
    "leaky_relu": 0.5,
    "elu": 1.5,
    "gelu": 2,
    "silu": 2,
    "tanh": 2,
    "sigmoid": 2,
    "softplus": 2,
}
LOWEST = {"float32": -85.0, "float64": -700.0}


@needs_extended
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_to_the_last_places(activation, dtype) -> None:
    if activation == "gelu":  # x Phi(x) is subnormal below
        a = arguments(-12.5 if dtype == "float32" else -36.0, 20.0, dtype, count=1000)
    else:
        a = arguments(LOWEST[dtype], 100.0, dtype)
    _, t = conditioner(probe((1,), activation, dtype), a)
    assert np.max(ulp_error(t, reference(activation, a))) <= ULP_BOUNDS[activation]


@needs_extended
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_scale_is_accurate_to_the_last_places(dtype) -> None:
    a = arguments(-30.0, 30.0, dtype)
    s, t = conditioner(probe((), "relu", dtype), a)
    assert_same_bits(t, a, "an affine network with weight 1")
    assert np.max(ulp_error(s, np.tanh(a.astype(np.longdouble)))) <= ULP_BOUNDS["tanh"]


@needs_extended
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_is_accurate_to_the_last_places(dtype) -> None:
    """exp(s) of the s that the flow itself gives, over the whole range of normal results."""
    limit = 87.0 if dtype == "float32" else 708.0
    flow = probe((), "relu", dtype, scale_bound=4096.0)
    parameters = {name: value.copy() for name, value in flow.parameters().items()}
    parameters["flow_0_translation.kernel"][:] = 0
    flow.set_parameters(parameters)
    a = arguments(-limit, limit, dtype)
    s, _ = conditioner(flow, a)
    rows = np.stack([a, np.ones_like(a)], axis=1)
    z, log_det = flow.forward(rows)
    np.testing.assert_array_equal(log_det, s)
    assert np.max(ulp_error(z[:, 1], np.exp(s.astype(np.longdouble)))) <= 1.1
    assert np.max(ulp_error(flow.inverse(rows)[:, 1], np.exp(-s.astype(np.longdouble)))) <= 1.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_arguments_are_their_limits(activation, dtype) -> None:
    huge = np.finfo(dtype).max
    a = np.array([-huge, -1e30, -2000.0, -100.0, -0.0, 0.0, 100.0, 2000.0, 1e30, huge], dtype)
    _, t = conditioner(probe((1,), activation, dtype), a)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = ACTIVATIONS[activation](a.astype(np.float64))
    # Relative: the subnormal results around -100 are not the point here.
    np.testing.assert_allclose(t, expected, rtol=1e-6, atol=float(np.finfo(dtype).tiny))


def test_importing_does_not_change_how_the_process_computes(run_python) -> None:
    """Unsafe mathematics in any object of the extension would flush subnormal numbers to zero in the whole process."""
    output = run_python(
        """
import numpy as np, nvpflow
flow = nvpflow.build(input_size=4)
flow.forward(np.ones((4096, 4), np.float32))
print(np.float32(1e-40) * np.float32(0.5) > 0, np.float64(1e-310) * 0.5 > 0)
"""
    )
    assert output.split() == ["True", "True"]


# ---------------------------------------------------------------------------------------------- random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:
    """The vectors that Random123 publishes: they make the oracle's Philox the Philox."""
    assert philox4x32(counter, key) == expected


def identity(size: int, dtype: str):
    """A flow that changes nothing: what it samples is its noise."""
    flow = nvpflow.build(input_size=size, num_flows=1, hidden_sizes=(), dtype=dtype)
    flow.set_parameters({name: np.zeros_like(value) for name, value in flow.parameters().items()})
    return flow


@needs_extended
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 17])
@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
def test_noise_is_box_muller_on_philox(size, seed, dtype) -> None:
    """Within 2.5 ulp of the exact value, so that backends which do the same are within a few ulp of each other."""
    for start in (0, 2**32 - 20, 2**62):
        drawn = identity(size, dtype).sample(67, seed=seed, start=start)
        expected = standard_normals(seed, range(start, start + 67), size, dtype)
        assert np.max(ulp_error(drawn, expected)) <= 2.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_do_not_depend_on_how_they_are_drawn(make_flow, dtype) -> None:
    flow, oracle = make_flow(7, 3, (12,), "gelu", dtype=dtype, standardize=True)
    whole = flow.sample(500, seed=11)
    for chunk in (1, 2, 3, 7, 16, 31, 64, 257):
        pieces = [flow.sample(min(chunk, 500 - at), seed=11, start=at) for at in range(0, 500, chunk)]
        assert_same_bits(np.concatenate(pieces), whole, f"chunks of {chunk}")
    noise = identity(7, dtype).sample(500, seed=11)
    assert_same_bits(flow.inverse(noise), whole, "inverse of the noise")
    assert np.any(flow.sample(500, seed=12) != whole)
    expected, _ = oracle.inverse(noise)
    np.testing.assert_allclose(whole, expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-5)


def test_samples_without_a_seed_differ(make_flow) -> None:
    flow, _ = make_flow(4)
    assert np.any(flow.sample(5) != flow.sample(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_standard_normal_and_uncorrelated(dtype) -> None:
    rows, size = 100_000, 6
    noise = identity(size, dtype).sample(rows, seed=123).astype(np.float64)
    # Five standard errors of each moment of n independent standard normals.
    bound = 5 / math.sqrt(rows)
    assert np.max(np.abs(noise.mean(axis=0))) < bound
    assert np.max(np.abs(noise.var(axis=0) - 1)) < bound * math.sqrt(2)
    assert np.max(np.abs((noise**3).mean(axis=0))) < bound * math.sqrt(15)
    assert np.max(np.abs((noise**4).mean(axis=0) - 3)) < bound * math.sqrt(96)
    correlation = np.corrcoef(noise, rowvar=False) - np.eye(size)
    assert np.max(np.abs(correlation)) < bound
    of_squares = np.corrcoef(noise**2, rowvar=False) - np.eye(size)
    assert np.max(np.abs(of_squares)) < bound
    assert np.max(np.abs(np.mean(noise[1:] * noise[:-1], axis=0))) < bound
    # Kolmogorov and Smirnov against Phi at level 1e-6 per column: sqrt(-ln(1e-6 / 2) / 2) / sqrt(n).
    for column in noise.T:
        cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in np.sort(column)])
        steps = np.arange(rows + 1) / rows
        distance = max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1]))
        assert distance < math.sqrt(-math.log(0.5e-6) / 2) / math.sqrt(rows)
    # The tails are there: of 600,000 normals about 38 are beyond 4.
    assert 10 < np.count_nonzero(np.abs(noise) > 4) < 90


def test_neighbouring_seeds_are_unrelated() -> None:
    draws = [identity(4, "float64").sample(20_000, seed=seed).ravel() for seed in (0, 1, 2, 2**32, 2**33)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.max(np.abs(correlation)) < 5 / math.sqrt(draws[0].size)


# ---------------------------------------------------------------------------------------------- round trips


def round_trip_error(make_flow, num_flows: int, kernel_scale: float, dtype: str) -> float:
    """Largest |inverse(forward(x)) - x| over rows of unit data and a few flows."""
    largest = 0.0
    for size, hidden, activation in (
        (16, (64,), "relu"),
        (6, (32, 32), "silu"),
        (2, (16,), "tanh"),
        (31, (64,), "gelu"),
    ):
        for seed in range(3):
            flow, _ = make_flow(size, num_flows, hidden, activation, dtype=dtype, kernel_scale=kernel_scale, seed=seed)
            x = unit_data(300, size, seed, dtype)
            largest = max(largest, float(np.max(np.abs(flow.inverse(flow.forward(x)[0]) - x))))
    return largest


DEPTHS = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_flows", "kernel_scale"),
    [(k, w) for k in (1, 2, 4, 8) for w in (0.25, 0.5, 1.0, 2.0)] + [(k, math.sqrt(2 / k)) for k in (16, 32, 64)],
)
def test_a_round_trip_is_bounded_by_depth_and_weights(make_flow, num_flows, kernel_scale, dtype) -> None:
    """error <= 8 eps exp(K w^2), for flows with hidden layers, kernels N(0, w^2 / in), unit data and scale_bound 1.

    Each layer multiplies what the rounding of the layers before it left behind; by how much depends on the size of its
    weights. The 1e-5 that float32 promises for default models therefore holds while K w^2 <= 2. More than 8 couplings
    with larger weights than that go beyond the bound.
    """
    bound = 8 * float(np.finfo(dtype).eps) * math.exp(num_flows * kernel_scale**2)
    assert round_trip_error(make_flow, num_flows, kernel_scale, dtype) <= bound
    if num_flows * kernel_scale**2 <= 2:
        assert bound <= (1e-5 if dtype == "float32" else 1.4e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_bound", [0.5, 1.0])
@pytest.mark.parametrize("num_flows", DEPTHS)
def test_the_promise_with_hidden_layers(make_flow, num_flows, scale_bound, dtype) -> None:
    """K w^2 = 2, scale_bound up to 1, up to 64 couplings: log p within the budget of the oracle."""
    kernel_scale = math.sqrt(2 / num_flows)
    for size, hidden, activation in ((16, (64,), "relu"), (6, (32, 32), "silu"), (2, (16,), "tanh"), (31, (9,), "elu")):
        options = {"dtype": dtype, "kernel_scale": kernel_scale, "scale_bound": scale_bound, "seed": num_flows}
        flow, oracle = make_flow(size, num_flows, hidden, activation, **options)
        x = unit_data(100, size, 4, dtype)
        assert_within_budget(flow.log_prob(x), oracle.log_prob(x), dtype, f"{size} columns")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [(), (32,)])
@pytest.mark.parametrize("num_flows", [1, 8, 64])
def test_the_promise_of_new_flows(num_flows, hidden, dtype) -> None:
    """Of every spec, the largest scale_bound included."""
    for size in (2, 5, 16, 31):
        for scale_bound in (1.0, 3.0, 7.0, float(np.finfo(dtype).max)):
            flow = nvpflow.build(
                size, num_flows, hidden, dtype=dtype, scale_bound=scale_bound, standardize=False, seed=size
            )
            x = unit_data(100, size, 4, dtype)
            assert_within_budget(flow.log_prob(x), oracle_of(flow).log_prob(x), dtype, f"{size}, {scale_bound}")


@pytest.mark.parametrize(
    ("num_flows", "kernel_scale", "hidden", "scale_bound"),
    [(64, math.sqrt(2 / 64), (), 1.0), (8, 0.5, (), 7.0), (8, 1.0, (64,), 7.0), (32, 1.0, (64,), 1.0)],
    ids=["no hidden layer", "and a large scale_bound", "a large scale_bound", "many large weights"],
)
def test_where_the_promise_ends_and_certify_says_so(make_flow, num_flows, kernel_scale, hidden, scale_bound) -> None:
    options = {"dtype": "float32", "scale_bound": scale_bound, "kernel_scale": kernel_scale}
    flow, _ = make_flow(16, num_flows, hidden, "relu", **options)
    x = unit_data(300, 16, 0, "float32")
    off = np.max(np.abs(flow.inverse(flow.forward(x)[0]) - x))
    assert off > 8 * np.finfo(np.float32).eps * math.exp(num_flows * kernel_scale**2)
    assert flow.certify(x, jacobian_rows=0).verdict != "accurate"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_bound", [1.0, 2.0, 3.0, 5.0, 7.0, None], ids=lambda bound: f"bound={bound}")
@pytest.mark.parametrize("hidden", [(), (16,)], ids=["no hidden layer", "hidden layer"])
def test_the_certificates_bound_holds_for_every_spec(make_flow, hidden, scale_bound, dtype) -> None:
    """What is promised where the rule ends: proved from the weights, so never below what is measured."""
    limit = float(np.finfo(dtype).max) if scale_bound is None else scale_bound
    bounded = 0
    for num_flows in (1, 2, 8, 64):
        for size in (5, 16):
            options = {"dtype": dtype, "scale_bound": limit, "kernel_scale": min(1.0, math.sqrt(2 / num_flows))}
            flow, oracle = make_flow(size, num_flows, hidden, "tanh", seed=num_flows, **options)
            x = unit_data(100, size, 4, dtype)
            found = flow.certify(x, jacobian_rows=0)
            if found.round_trip_bound is not None:
                bounded += 1
                assert found.round_trip.relative <= found.round_trip_bound
            if found.verdict == "accurate":
                assert_within_budget(flow.log_prob(x), oracle.log_prob(x), dtype, f"{num_flows}, {size}")
    assert bounded >= (2 if scale_bound is None else 6)


def test_where_float32_is_ill_conditioned_float64_is_clean(make_flow) -> None:
    """Eight layers, w = 1: the loss in float32 is the flow's own conditioning, not the kernels'."""
    single, double = (round_trip_error(make_flow, 8, 1.0, dtype) for dtype in DTYPES)
    assert single > 1e-5
    assert double < 2e-12

    # The same loss in exact arithmetic: rounding z to float32 once moves the oracle's x about as far.
    flow, oracle = make_flow(16, 8, (64,), "relu", dtype="float32", seed=1)
    x = unit_data(300, 16, 1, "float32")
    z, _ = oracle.forward(x)
    of_the_flow = np.max(np.abs(flow.inverse(flow.forward(x)[0]) - x))
    of_one_rounding = np.max(np.abs(oracle.inverse(z.astype(np.float32))[0] - x))
    assert of_the_flow <= 20 * of_one_rounding
