"""Flows of every kind of layer in random order, against the general oracle; and what their bits may not depend on."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import nvpflow
import pytest
from general_oracle import (
    FEATURES,
    GeneralFlow,
    Gradients,
    Spec,
    condition,
    random_spec,
    scrambled,
    sensitivities,
    tensor_shapes,
    transformed_features,
)
from nvpflow import _core
from oracle import AdamW, assert_same_bits, assert_within_budget

DTYPES = ("float32", "float64")
SEEDS = [*range(24), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(24, 400))]
FEW_SEEDS = range(12)
BATCHES = (0, 1, 2, 3, 7, 16, 17, 33, 64, 100, 1025)

# Results that move by more than so many units for one unit of what is given are not the kernels' to promise.
LARGEST_CONDITION = 20.0
# |gradient - oracle| <= budget (1 + largest |oracle| of the tensor), of means over the rows.
GRADIENT_BUDGET = {"float32": 1e-5, "float64": 1e-13}


class Case:
    """A flow, its oracle with the very same numbers, rows and their contexts."""

    def __init__(self, oracle: GeneralFlow, dtype: str, x: np.ndarray, context: np.ndarray | None) -> None:
        self.oracle, self.dtype, self.x, self.context = oracle, dtype, x, context
        self.flow = flow_of(oracle, dtype)

    def given(self, rows: Any = slice(None)) -> dict[str, np.ndarray]:
        """The keyword that hands over the context, where there is one."""
        return {} if self.context is None else {"context": self.context[rows]}


def flow_of(oracle: GeneralFlow, dtype: str) -> nvpflow.Flow:
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(json.dumps({**oracle.spec, "dtype": dtype})))
    flow.set_parameters({name: value.astype(dtype) for name, value in oracle.parameters.items()})
    return flow


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.astype(dtype).astype(np.float64)


def well_conditioned(spec: Spec, rng: np.random.Generator, dtype: str, x: np.ndarray, context: np.ndarray | None):
    """An oracle with scrambled parameters, as large as the budgets allow."""
    for kernel_scale in (1.0, 0.7, 0.5, 0.3, 0.2, 0.1):
        parameters = {name: rounded(value, dtype) for name, value in scrambled(spec, rng, kernel_scale).items()}
        oracle = GeneralFlow(spec, parameters)
        if condition(oracle, x, context, rng) <= LARGEST_CONDITION:
            return oracle
    raise AssertionError("no kernel_scale is small enough")


def make_case(seed: int, dtype: str, rows: int = 100, features=FEATURES, max_size: int = 40) -> Case:
    rng = np.random.default_rng([seed, 0x6E11])
    spec = random_spec(rng, features, dtype, max_size)
    x = rng.normal(size=(rows, spec["input_size"])).astype(dtype)
    context = rng.normal(size=(rows, spec["context_size"])).astype(dtype) if spec["context_size"] else None
    oracle = well_conditioned(spec, rng, dtype, x[:200], None if context is None else context[:200])
    return Case(oracle, dtype, x, context)


@pytest.fixture(params=DTYPES)
def dtype(request) -> str:
    return request.param


# ----------------------------------------------------------------------------------------------------- what a spec is


def test_layout_is_the_contracts() -> None:
    for seed in range(300):
        given = random_spec(np.random.default_rng(seed), FEATURES)
        offset = 0
        layout = _core._layout_of(nvpflow.FlowSpec.from_json(json.dumps(given)))
        for (name, shape, at), expected in zip(layout, tensor_shapes(given), strict=True):
            assert (name, shape) == expected
            assert at == offset
            offset += int(np.prod(shape))


@pytest.mark.parametrize("seed", SEEDS)
def test_specs_come_back_from_all_their_forms(seed, dtype) -> None:
    given = random_spec(np.random.default_rng(seed), FEATURES, dtype)
    spec = nvpflow.FlowSpec.from_json(json.dumps(given))
    said = json.loads(spec.to_json())
    if "context_size" in said:
        assert said == given
    else:  # what format 1.0 can say is said in it
        assert GeneralFlow(said).layers == GeneralFlow(given).layers
    sizes = {name: given[name] for name in ("input_size", "dtype", "context_size", "standardize_context")}
    for other in (
        nvpflow.FlowSpec.from_json(spec.to_json()),
        pickle.loads(pickle.dumps(spec)),
        nvpflow.FlowSpec.from_layers(layers=spec.layers, **sizes),
        eval(repr(spec), {"FlowSpec": nvpflow.FlowSpec, **vars(nvpflow.layers)}),
    ):
        assert other == spec
        assert hash(other) == hash(spec)
        assert other.layers == spec.layers


@pytest.mark.parametrize("seed", FEW_SEEDS)
def test_files_keep_every_bit(seed, dtype, tmp_path) -> None:
    case = make_case(seed, dtype)
    case.flow.save(tmp_path / "flow.safetensors")
    expected = case.flow.log_prob(case.x, **case.given())
    for other in (nvpflow.load(tmp_path / "flow.safetensors"), pickle.loads(pickle.dumps(case.flow))):
        assert other == case.flow
        assert_same_bits(other.log_prob(case.x, **case.given()), expected)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("seed", SEEDS)
def test_values_are_the_oracles(seed, dtype) -> None:
    case = make_case(seed, dtype, rows=BATCHES[-1])
    x, oracle, given = case.x, case.oracle, case.given()
    for actual, expected in zip(case.flow.forward(x, **given), oracle.forward(x, **given), strict=True):
        assert_within_budget(actual, expected, dtype, "forward")
    for actual, expected in zip(
        case.flow.inverse(x, with_log_det=True, **given), oracle.inverse(x, **given), strict=True
    ):
        assert_within_budget(actual, expected, dtype, "inverse")
    assert_within_budget(case.flow.log_prob(x, **given), oracle.log_prob(x, **given), dtype, "log p")
    assert case.flow.nll(x, **given) == pytest.approx(oracle.nll(x, **given), rel=1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_has_the_same_bits_in_every_batch(seed, dtype) -> None:
    """Few rows take another path than many; either has to give what the other gives."""
    case = make_case(seed, dtype, rows=BATCHES[-1])
    flow, x = case.flow, case.x

    def results(rows) -> tuple[np.ndarray, ...]:
        given = case.given(rows)
        return (
            *flow.forward(x[rows], **given),
            *flow.inverse(x[rows], with_log_det=True, **given),
            flow.log_prob(x[rows], **given),
        )

    whole = results(slice(None))
    for batch in BATCHES:
        for first in {0, (len(x) - batch) // 2, len(x) - batch}:
            for part, expected in zip(results(slice(first, first + batch)), whole, strict=True):
                assert_same_bits(part, expected[first : first + batch], f"{batch} rows from {first}")
    for i in (0, 1, 500):
        for part, expected in zip(results(i), whole, strict=True):
            assert_same_bits(part, expected[i], f"row {i}")


@pytest.mark.parametrize("seed", FEW_SEEDS)
def test_threads_change_no_bit(seed, dtype) -> None:
    case = make_case(seed, dtype, rows=1025)
    given, results = case.given(), {}
    for threads in (1, 3):
        case.flow.num_threads = threads
        loss, *gradient = case.flow.nll_gradient(case.x, **given)
        results[threads] = (
            *case.flow.forward(case.x, **given),
            *case.flow.inverse(case.x, with_log_det=True, **given),
            case.flow.log_prob(case.x, **given),
            np.float64(loss),
            *gradient,
        )
    for one, three in zip(results[1], results[3], strict=True):
        assert_same_bits(three, one)


def every_result(flow, x: np.ndarray, **given) -> list[np.ndarray]:
    cotangent = np.ones(len(x), x.dtype)
    return [
        *flow.forward(x, **given),
        *flow.inverse(x, with_log_det=True, **given),
        flow.log_prob(x, **given),
        *flow.log_prob_vjp(x, cotangent, wrt="both", **given)[:2],
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_one_context_is_that_context_in_every_row(seed, dtype) -> None:
    case = make_case(seed, dtype)
    if case.context is None:
        pytest.skip("this flow has no context")
    flow, x, c = case.flow, case.x, case.context[3]
    view = flow.condition(c)
    for rows in (0, 1, 2, 7, 100):
        part, tiled = x[:rows], np.tile(c, (rows, 1))
        expected = every_result(flow, part, context=tiled)
        for found in (every_result(flow, part, context=c), every_result(view, part)):
            for one, many in zip(found, expected, strict=True):
                assert_same_bits(one, many)
        if rows:
            assert view.nll(part) == flow.nll(part, context=c) == flow.nll(part, context=tiled)
    for row in x[:3]:
        assert view.log_prob(row) == flow.log_prob(row, context=c) == flow.log_prob(row[None], context=c[None])[0]


@pytest.mark.parametrize("seed", FEW_SEEDS)
def test_samples_are_the_inverse_of_noise(seed, dtype) -> None:
    case = make_case(seed, dtype)
    context = {} if case.context is None else {"context": case.context[0]}
    drawn = case.flow.sample(20, seed=3, dtype=dtype, **context)
    assert_within_budget(drawn, case.oracle.inverse(case.flow._noise(20, 3), **context)[0], dtype, "samples")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_row_spoils_no_other(seed, dtype) -> None:
    case = make_case(seed, dtype, rows=33)
    flow, x = case.flow, case.x.copy()
    x[5, -1] = np.nan
    x[20, 0] = np.inf
    bad = {5, 20}
    given = case.given()
    if case.context is not None:
        given = {"context": case.context.copy()}
        given["context"][11, 0] = np.nan
        bad |= {11}
    clean = (
        *flow.forward(case.x, **case.given()),
        *flow.inverse(case.x, with_log_det=True, **case.given()),
        flow.log_prob(case.x, **case.given()),
    )
    spoiled = (*flow.forward(x, **given), *flow.inverse(x, with_log_det=True, **given), flow.log_prob(x, **given))
    good = np.array([i not in bad for i in range(len(x))])
    for was, became in zip(clean, spoiled, strict=True):
        assert np.isnan(became[~good]).all()
        assert_same_bits(became[good], was[good])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_finite_row_is_never_nan(seed, dtype) -> None:
    """However large its numbers are: what overflows is infinite."""
    case = make_case(seed, dtype, rows=40)
    huge = np.finfo(dtype).max
    x = case.x * np.array([1, huge**0.25, huge**0.5, huge / 16], dtype)[np.arange(40) % 4, None]
    given = case.given()
    results = (
        *case.flow.forward(x, **given),
        *case.flow.inverse(x, with_log_det=True, **given),
        case.flow.log_prob(x, **given),
    )
    for result in results:
        assert not np.isnan(result).any()
    alone = case.flow.log_prob(case.x[::4], **case.given(slice(None, None, 4)))
    assert_same_bits(results[-1][::4], alone)


@pytest.mark.parametrize("seed", SEEDS)
def test_float32_flows_that_begin_with_standardize_take_float64_rows(seed) -> None:
    case = make_case(seed, "float32", rows=50)
    if case.oracle.layers[0]["kind"] != "standardize":
        pytest.skip("this flow begins with another layer")
    x = case.x.astype(np.float64) + 1e-9
    for rows in (1, 50):
        given = case.given(slice(rows))
        z, _ = case.flow.forward(x[:rows], **given)
        assert_within_budget(z.astype(np.float32), case.oracle.forward(x[:rows], **given)[0], "float32", "z")
        log_p = case.flow.log_prob(x[:rows], **given)
        assert_within_budget(log_p.astype(np.float32), case.oracle.log_prob(x[:rows], **given), "float32", "log p")


# ---------------------------------------------------------------------------------------------------------- gradients


def smooth_case(seed: int, dtype: str, direction: str, rows: int) -> Case:
    """A case without the rows whose gradients rounding decides.

    They have pre-activations near a kink, or results so far out that what a saturated tanh leaves of 1 - s^2 counts, or
    lie where a spline bends sharply.
    """
    case = make_case(seed, dtype, rows=40 * rows + 200)
    margin = 2e-5 if dtype == "float32" else 1e-12
    out, _ = getattr(case.oracle, direction)(case.x, case.context)
    tame = np.max(np.abs(out), axis=1) < 5
    smooth = case.oracle.smallest_pre_activation(case.x, direction, case.context) > margin
    smooth = np.flatnonzero(smooth & tame)[: 8 * rows + 40]
    smooth = smooth[gradient_conditions(case, smooth, direction) < LARGEST_CONDITION][:rows]
    assert len(smooth) == rows
    case.x = case.x[smooth]
    if case.context is not None:
        case.context = case.context[smooth]
    return case


def gradient_conditions(case: Case, chosen: np.ndarray, direction: str) -> np.ndarray:
    """By how many units a row's gradient moves for one of what is given; 0 without splines."""
    if not any("spline" in json.dumps(layer) for layer in case.oracle.layers):
        return np.zeros(len(chosen))
    x, context = case.x[chosen], None if case.context is None else case.context[chosen]

    def gradient(oracle: GeneralFlow, x: np.ndarray, context: np.ndarray | None) -> list[np.ndarray]:
        return [oracle.vjp(x, np.ones_like(x), np.ones(len(x)), direction, context).x]

    (moved,) = sensitivities(gradient, case.oracle, x, context, np.random.default_rng(0), pushes=2)
    size = np.abs(gradient(case.oracle, x, context)[0]).max(axis=1)
    return moved.max(axis=1) / (1 + size)


def named(case: Case, flat: np.ndarray) -> dict[str, np.ndarray]:
    """The flat gradient cut into the parameters' shapes."""
    cut, offset = {}, 0
    for name, value in case.oracle.parameters.items():
        cut[name] = flat[offset : offset + value.size].reshape(value.shape)
        offset += value.size
    assert offset == flat.size
    return cut


# Training leaves them as they are, and their gradient is nobody's.
NOT_TRAINED = (".sign", ".mean", ".log_std")


def assert_gradients(case: Case, actual: tuple[np.ndarray, ...], expected: Gradients, rows: int, what: str) -> None:
    """`actual` is of x, of the parameters and, where there is one, of the context; None: was not given."""

    def check(name: str, got: np.ndarray, wanted: np.ndarray) -> None:
        assert got.shape == wanted.shape, f"{what}: {name}"
        assert got.dtype == np.dtype(case.dtype), f"{what}: {name}"
        scale = 1.0 + np.max(np.abs(wanted), initial=0.0)
        error = np.max(np.abs(got - wanted), initial=0.0) / scale
        assert error <= GRADIENT_BUDGET[case.dtype], f"{what}: {name} has error {error:.3g} of its scale"

    of_x, flat, *of_context = actual
    if of_x is not None:
        check("x", of_x * rows, expected.x * rows)
    for name, gradient in named(case, flat).items():
        if not name.endswith(NOT_TRAINED):
            check(name, gradient, expected.parameters[name])
    for gradient in of_context:
        check("context", gradient * rows, expected.context * rows)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_are_the_oracles(seed, rows, dtype) -> None:
    for direction in ("forward", "inverse"):
        case = smooth_case(seed, dtype, direction, rows)
        rng = np.random.default_rng(seed)
        # A mean over the rows, so that the sums are of the scale of one row's gradient.
        grad_out = (rng.normal(size=case.x.shape) / rows).astype(dtype)
        grad_log_det = (rng.normal(size=rows) / rows).astype(dtype)
        actual = case.flow.vjp(case.x, grad_out, grad_log_det, direction=direction, **case.given())
        expected = case.oracle.vjp(case.x, grad_out, grad_log_det, direction, **case.given())
        assert_gradients(case, actual, expected, rows, direction)
        if direction == "forward":
            loss, gradient = case.flow.nll_gradient(case.x, **case.given())
            expected_loss, expected = case.oracle.nll_gradient(case.x, **case.given())
            assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == "float32" else 1e-12)
            assert_gradients(case, (None, gradient), expected, rows, "nll")


@pytest.mark.parametrize("seed", FEW_SEEDS)
def test_a_score_is_the_gradient_of_log_prob(seed, dtype) -> None:
    case = smooth_case(seed, dtype, "forward", 21)
    cotangent = np.linspace(-1, 1, len(case.x)).astype(dtype)
    z, _ = case.oracle.forward(case.x, **case.given())
    expected = case.oracle.vjp(case.x, -z * cotangent[:, None], cotangent, **case.given())
    of_x, flat, *of_context = case.flow.log_prob_vjp(case.x, cotangent, **case.given())
    rows = len(case.x)
    parameters = {name: value / rows for name, value in expected.parameters.items()}
    actual = (of_x / rows, flat / rows, *(gradient / rows for gradient in of_context))
    context = None if expected.context is None else expected.context / rows
    assert_gradients(case, actual, Gradients(expected.x / rows, context, parameters), rows, "log_prob_vjp")


@pytest.mark.parametrize("seed", FEW_SEEDS)
def test_training_steps_are_adamw_on_the_oracles_gradient(seed) -> None:
    """All rows in one batch, so that their order cannot matter; constant learning rate."""
    case = smooth_case(seed, "float64", "forward", 420)
    rate, optimiser = 1e-3, AdamW(1e-3)
    start = {name: value.copy() for name, value in case.oracle.parameters.items()}
    losses = []
    for _ in range(3):
        loss, gradients = case.oracle.nll_gradient(case.x, **case.given())
        losses.append(loss)
        trained = {n: g for n, g in gradients.parameters.items() if not n.endswith(NOT_TRAINED)}
        optimiser.step(case.oracle.parameters, trained)
    options = {"epochs": 3, "batch_size": 420, "learning_rate": rate, "schedule": "constant", "weight_decay": 0.0}
    history = case.flow.fit(case.x, validation=None, clip_norm=None, progress=False, seed=1, **options, **case.given())
    np.testing.assert_allclose(history.train_loss, losses, rtol=1e-9)
    for name, value in case.flow.parameters().items():
        # Adam divides by the gradient's own size: where that is near zero its rounding becomes the step's.
        np.testing.assert_allclose(value, case.oracle.parameters[name], rtol=0, atol=1e-4 * rate, err_msg=name)
        if name.endswith(NOT_TRAINED):
            assert_same_bits(value, start[name], name)


# ---------------------------------------------------------------------------------- what the bits may not depend on


@pytest.mark.parametrize("seed", SEEDS)
def test_orientation_is_the_other_direction(seed, dtype) -> None:
    """The layers in the other order, each turned over: forward is the other flow's inverse."""
    case = make_case(seed, dtype)
    oracle = case.oracle
    kept = [i for i, layer in enumerate(oracle.layers) if layer["kind"] != "standardize"]  # it has one orientation
    if not any(oracle.layers[i]["kind"] == "coupling" for i in kept):
        pytest.skip("nothing can be turned over")

    def turned(layer: Spec) -> Spec:
        if layer["kind"] == "permutation":
            return {**layer, "order": np.argsort(layer["order"]).tolist()}
        return {**layer, "inverse": not layer["inverse"]}

    def made(layers: list[Spec], origins: list[int]) -> nvpflow.Flow:
        """A flow with the tensors of those layers of the oracle."""
        spec = {**oracle.spec, "layers": layers}
        new = GeneralFlow(spec)
        olds = oracle.prefixes()
        for prefix, origin in zip(new.prefixes(), origins, strict=True):
            for name in new.parameters:
                if name.startswith((prefix + "_", prefix + ".")):
                    new.parameters[name] = oracle.parameters[olds[origin] + name.removeprefix(prefix)]
        for name in new.parameters:
            if name.startswith("context."):
                new.parameters[name] = oracle.parameters[name]
        return flow_of(new, dtype)

    one = made([oracle.layers[i] for i in kept], kept)
    other = made([turned(oracle.layers[i]) for i in reversed(kept)], kept[::-1])
    for rows in (1, 5, 100):
        x, given = case.x[:rows], case.given(slice(rows))
        for there, back in ((one, other), (other, one)):
            z, log_det = there.forward(x, **given)
            values, back_log_det = back.inverse(x, with_log_det=True, **given)
            assert_same_bits(values, z, "values")
            assert_same_bits(back_log_det, log_det, "log_det")


def couplings(sets: list[list[int]], size: int, hidden: list[int], seed: int, dtype: str) -> GeneralFlow:
    layers = [
        {
            "kind": "coupling",
            "inverse": False,
            "transformed": features,
            "transform": {"kind": "affine", "log_scale": {"function": "tanh", "factor": 1.0, "divisor": 1.0}},
            "network": {"kind": "mlp", "hidden_sizes": hidden, "activation": "silu", "layer_norm": False},
        }
        for features in sets
    ]
    spec = {
        "input_size": size,
        "context_size": 0,
        "standardize_context": False,
        "dtype": dtype,
        "base": {"kind": "normal"},
        "layers": layers,
    }
    values = scrambled(spec, np.random.default_rng(seed), 0.7)
    return GeneralFlow(spec, {name: rounded(value, dtype) for name, value in values.items()})


@pytest.mark.parametrize(("size", "first"), [(2, 1), (3, 1), (6, 3), (7, 2), (17, 5), (33, 16), (40, 37)])
@pytest.mark.parametrize("hidden", [[], [7], [33, 5]])
def test_where_features_stand_changes_no_bit_of_them(size, first, hidden, dtype) -> None:
    """Columns renamed, with the order in either set kept, and columns put elsewhere by permutation layers."""
    rng = np.random.default_rng(size)
    low, high = list(range(first)), list(range(first, size))
    straight = couplings([high, low, high], size, hidden, 1, dtype)
    straight_flow = flow_of(straight, dtype)
    x = rng.normal(size=(100, size)).astype(dtype)
    z, log_det = straight_flow.forward(x)
    back, back_log_det = straight_flow.inverse(x, with_log_det=True)
    for _ in range(4):
        chosen = np.sort(rng.choice(size, first, replace=False))
        rest = np.setdiff1d(np.arange(size), chosen)
        place = np.concatenate([chosen, rest])  # of each column of the straight flow
        sets = [rest.tolist(), chosen.tolist(), rest.tolist()]
        mixed = couplings(sets, size, hidden, 1, dtype)
        around = GeneralFlow(
            {
                **straight.spec,
                "layers": [
                    {"kind": "permutation", "order": place.tolist()},
                    *straight.layers,
                    {"kind": "permutation", "order": np.argsort(place).tolist()},
                ],
            },
            straight.parameters,
        )
        for oracle in (mixed, around):
            flow, moved = flow_of(oracle, dtype), np.empty_like(x)
            moved[:, place] = x
            for rows in (1, 3, 100):
                for actual, expected in (
                    (flow.forward(moved[:rows]), (z, log_det)),
                    (flow.inverse(moved[:rows], with_log_det=True), (back, back_log_det)),
                ):
                    assert_same_bits(actual[0][:, place], expected[0][:rows])
                    assert_same_bits(actual[1], expected[1][:rows])


def test_names_of_sets_are_their_lists(dtype) -> None:
    for size in (2, 3, 8, 9):
        for name in ("first_half", "second_half", "odd", "even"):
            listed = transformed_features(name, size).tolist()
            named_set, list_of_it = (couplings([s, s], size, [5], 1, dtype) for s in (name, listed))
            x = np.random.default_rng(size).normal(size=(50, size)).astype(dtype)
            assert_same_bits(flow_of(named_set, dtype).log_prob(x), flow_of(list_of_it, dtype).log_prob(x))
