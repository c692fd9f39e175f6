"""Loops of one's own: gradients of batches in pieces and by index, flat parameters, Adam."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import nvpflow
import pytest
from oracle import assert_same_bits, philox4x32

SIZE, CONTEXT = 3, 2

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"standardize": False},
    "context": {"context_size": CONTEXT},
    "lu": {"mixing": "lu", "actnorm": True},
    "spline": {"transform": "spline", "num_bins": 4},
    "bounds": {"bounds": [(0, None), None, (-9, 9)], "context_size": CONTEXT},
    "mixture": {"base": nvpflow.layers.Mixture(3)},
}
DTYPES = ["float32", "float64"]


def flow_of(kind: str, dtype: str) -> nvpflow.Flow:
    flow = nvpflow.build(SIZE, 2, (16,), activation="tanh", seed=1, dtype=dtype, **KINDS[kind])
    rng = np.random.default_rng(2)
    fixed = ("sign", "log_std", "mean")
    flow.set_parameters(
        {
            name: value if name.endswith(fixed) else value + 0.2 * rng.normal(size=value.shape).astype(dtype)
            for name, value in flow.parameters().items()
        }
    )
    return flow


def rows_of(kind: str, count: int, dtype: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, SIZE)).astype(dtype)
    x[:, 0] = np.abs(x[:, 0]) + np.asarray(0.1, dtype)
    given = {"context": rng.normal(size=(count, CONTEXT)).astype(dtype)} if "context_size" in KINDS[kind] else {}
    return x, given


def picked(given: dict[str, np.ndarray], rows: Any) -> dict[str, np.ndarray]:
    return {name: value[rows] for name, value in given.items()}


# ------------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_add_up_to_the_batch(kind: str, dtype: str, weighted: bool) -> None:
    flow, (x, given) = flow_of(kind, dtype), rows_of(kind, 1003, dtype)
    w = np.random.default_rng(0).integers(0, 3, 1003) / 4 if weighted else None
    total = 1003 if w is None else w.sum()
    loss, gradient = flow.nll_gradient(x, w, **given)
    found, out = 0.0, np.full(flow.num_parameters, np.nan, dtype)
    for k, (first, last) in enumerate([(0, 0), (0, 1), (1, 334), (334, 334), (334, 1003)]):
        rows = slice(first, last)
        part, same = flow.nll_gradient(
            x[rows],
            None if w is None else w[rows],
            out=out,
            total_rows=total,
            accumulate=k > 0,
            **picked(given, rows),
        )
        found += part
        assert same is out
    tolerance = 1e-6 if dtype == "float32" else 1e-13
    assert found == pytest.approx(loss, rel=tolerance)
    np.testing.assert_allclose(out, gradient, rtol=0, atol=20 * tolerance * np.abs(gradient).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_piece_is_the_call_without_a_total(dtype: str) -> None:
    flow, (x, _) = flow_of("default", dtype), rows_of("default", 77, dtype)
    loss, gradient = flow.nll_gradient(x)
    found, same = flow.nll_gradient(x, total_rows=77)
    assert found == loss
    assert_same_bits(same, gradient)
    half, halved = flow.nll_gradient(x, total_rows=154.0)
    assert half == loss / 2
    assert_same_bits(halved, gradient / 2)


def test_accumulate_adds_once() -> None:
    flow, (x, _) = flow_of("plain", "float64"), rows_of("plain", 50, "float64")
    _, gradient = flow.nll_gradient(x)
    start = np.random.default_rng(0).normal(size=flow.num_parameters)
    out = start.copy()
    flow.nll_gradient(x, out=out, accumulate=True)
    np.testing.assert_allclose(out, start + gradient, rtol=1e-13, atol=1e-13)


def test_a_piece_without_rows_has_no_share() -> None:
    for kind in KINDS:
        flow, (x, given) = flow_of(kind, "float32"), rows_of(kind, 5, "float32")
        out = np.ones(flow.num_parameters, np.float32)
        none = slice(0, 0)
        assert flow.nll_gradient(x[none], out=out, total_rows=9, accumulate=True, **picked(given, none))[0] == 0
        assert (out == 1).all()
        loss, _ = flow.nll_gradient(x, np.zeros(5), out=out, total_rows=9, index=[1, 2], **given)
        assert loss == 0, kind
        assert not out.any(), kind


# ------------------------------------------------------------------------------------------------------- index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 5, 400])
def test_an_index_takes_the_bits_of_its_rows(kind: str, dtype: str, count: int) -> None:
    flow, (x, given) = flow_of(kind, dtype), rows_of(kind, 501, dtype)
    index = np.random.default_rng(count).integers(0, 501, count)  # some rows twice
    loss, gradient = flow.nll_gradient(x[index], **picked(given, index))
    for form in (index, index.astype(np.int32), index.astype(np.uint16), np.repeat(index, 2)[::2], index.tolist()):
        found, same = flow.nll_gradient(x, index=form, **given)
        assert found == loss
        assert_same_bits(same, gradient)
    w = np.random.default_rng(9).uniform(0, 2, 501)
    w[index[count // 2]] = 0 if count > 1 else 1
    loss, gradient = flow.nll_gradient(x[index], w[index], **picked(given, index))
    found, same = flow.nll_gradient(x, w, index=index, **given)
    assert found == pytest.approx(loss, rel=1e-12)
    assert_same_bits(same, gradient)


def test_an_index_goes_with_one_context_and_with_views() -> None:
    flow, (x, given) = flow_of("context", "float32"), rows_of("context", 90, "float32")
    one, index = given["context"][7], np.arange(89, 0, -3)
    loss, gradient = flow.nll_gradient(x[index], context=one)
    for found, same in (
        flow.nll_gradient(x, index=index, context=one),
        flow.condition(one).nll_gradient(x, index=index),
    ):
        assert found == loss
        assert_same_bits(same, gradient)


def test_an_index_goes_with_float64_rows() -> None:
    flow = flow_of("default", "float32")
    x = 1e6 + np.random.default_rng(0).normal(size=(300, SIZE))
    flow.initialize_from(x)
    index = np.random.default_rng(1).permutation(300)[:101]
    loss, gradient = flow.nll_gradient(x[index])
    out = np.empty(flow.num_parameters, np.float32)
    assert flow.nll_gradient(x, index=index, out=out)[0] == loss
    assert_same_bits(out, gradient)


def test_tensors_are_taken_and_written_in_place() -> None:
    torch = pytest.importorskip("torch")
    flow, (x, _) = flow_of("default", "float32"), rows_of("default", 64, "float32")
    index = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    out = torch.empty(flow.num_parameters)
    loss, same = flow.nll_gradient(torch.from_numpy(x), index=index, out=out)
    expected, gradient = flow.nll_gradient(x[index.numpy()])
    assert same is out
    assert loss == expected
    assert_same_bits(out.numpy(), gradient)


def test_threads_change_no_bit() -> None:
    flow, (x, _) = flow_of("default", "float32"), rows_of("default", 30_000, "float32")
    index = np.random.default_rng(0).permutation(30_000)[:20_001]
    found = []
    for threads in (1, 2, 5):
        flow.num_threads = threads
        found.append(flow.nll_gradient(x, index=index, total_rows=30_000))
    assert len({loss for loss, _ in found}) == 1
    for _, gradient in found[1:]:
        assert_same_bits(gradient, found[0][1])


BAD = [
    ({"total_rows": 0}, ValueError, "total_rows is 0, expected a number from 1e-150 to 1e150"),
    ({"total_rows": -4}, ValueError, "total_rows is -4, expected"),
    ({"total_rows": float("nan")}, ValueError, "total_rows is nan, expected"),
    ({"total_rows": "8"}, TypeError, "total_rows is str, expected a real number"),
    ({"total_rows": True}, TypeError, "total_rows is bool, expected a real number"),
    ({"accumulate": True}, ValueError, "out is None, expected the gradient to add to"),
    ({"accumulate": 1}, TypeError, "accumulate is int, expected True or False"),
    ({"accumulate": None}, TypeError, "accumulate is NoneType, expected True or False"),
    ({"index": [0, 8]}, ValueError, r"index\[1\] is no row of x, expected a number from 0 to 7"),
    ({"index": [-1]}, ValueError, r"index\[0\] is no row of x"),
    ({"index": np.array([2**64 - 1], np.uint64)}, ValueError, r"index\[0\] is no row of x"),
    ({"index": [0.5]}, TypeError, "index has dtype float64, expected integers"),
    ({"index": np.ones(8, bool)}, TypeError, "index has dtype bool, expected integers; np.flatnonzero"),
    ({"index": [[0], [1]]}, ValueError, "index has 2 axes, expected one"),
    ({"index": np.array([], int)}, ValueError, "index is empty, expected at least one row"),
    ({"index": [0], "x": [[0.0] * SIZE] * 8}, ValueError, "x is list that a call must convert"),
    ({"index": [0], "x": np.zeros((8, SIZE), np.float16)}, ValueError, r"x is numpy\.ndarray that a call"),
    (
        {"index": [0], "x": np.zeros((16, SIZE), np.float32)[::2]},
        ValueError,
        r"x is numpy\.ndarray that a call",
    ),
    ({"index": [0], "x": np.zeros(SIZE, np.float32)}, ValueError, "x has one axis, expected two beside index="),
    ({"index": [0], "x": np.zeros((0, SIZE), np.float32)}, ValueError, "expected none: x has no rows"),
    (
        {"index": [0], "sample_weight": np.ones(8, np.float32)},
        ValueError,
        r"sample_weight is numpy\.ndarray",
    ),
    ({"index": [0], "sample_weight": np.ones(7)}, ValueError, r"sample_weight has shape \(7,\), expected \(8,\)"),
    ({"index": [0, 1], "sample_weight": np.zeros(8)}, ValueError, "sample_weight is zero for all 2 rows of index"),
    ({"index": [1], "sample_weight": np.full(8, -1.0)}, ValueError, r"sample_weight\[1\] is -1, expected a finite"),
    ({"index": [1], "sample_weight": np.full(8, np.nan)}, ValueError, r"sample_weight\[1\] is nan, expected a finite"),
    ({"total_rows": 8, "sample_weight": np.full(8, np.inf)}, ValueError, r"sample_weight\[0\] is inf, expected"),
    ({"total_rows": 8, "sample_weight": np.full(8, 1e-160)}, ValueError, "sample_weight adds up to 8e-160, expected"),
    ({"out": np.empty(3, np.float32)}, ValueError, r"out has shape \(3,\), expected"),
    ({"out": np.empty(0)}, TypeError, "out has dtype float64, expected float32"),
    ({"out": [0.0]}, TypeError, "out is list, expected an array"),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD)
def test_bad_arguments_are_named(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    flow, (x, _) = flow_of("plain", "float32"), rows_of("plain", 8, "float32")
    with pytest.raises(kind, match=message):
        flow.nll_gradient(**{"x": x, **given})


def test_a_context_that_is_converted_is_refused_beside_an_index() -> None:
    flow, (x, given) = flow_of("context", "float32"), rows_of("context", 8, "float32")
    with pytest.raises(ValueError, match=r"context is numpy\.ndarray that a call"):
        flow.nll_gradient(x, index=[0], context=given["context"].astype(np.float64))


def test_out_may_not_be_what_is_read() -> None:
    flow = flow_of("plain", "float32")
    memory = np.zeros(flow.num_parameters + 8, np.float32)
    x = memory[: SIZE * 2].reshape(2, SIZE)
    with pytest.raises(ValueError, match="out"):
        flow.nll_gradient(x, out=memory[: flow.num_parameters])
    read_only = np.zeros(flow.num_parameters, np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        flow.nll_gradient(x, out=read_only)


# --------------------------------------------------------------------------------------------- flat parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_parameters_are_those_by_name(kind: str, dtype: str) -> None:
    flow = flow_of(kind, dtype)
    flat = flow.parameters_flat()
    assert flat.dtype == dtype
    assert flat.shape == (flow.num_parameters,)
    assert_same_bits(flat, np.concatenate([value.ravel() for value in flow.parameters().values()]))
    other = nvpflow.Flow(flow.spec)
    other.set_parameters_flat(flat)
    assert other == flow
    before = flow.parameters_flat()
    flat[:] = 0
    assert_same_bits(flow.parameters_flat(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    flow, (x, given) = flow_of(kind, "float64"), rows_of(kind, 40, "float64")
    start, index = flow.parameters_flat(), np.arange(1, 40, 2)
    _, gradient = flow.nll_gradient(x, index=index, total_rows=25, **given)
    trained = set(nvpflow._core._trained(flow.spec))
    moves = np.concatenate([np.full(v.size, name in trained) for name, v in flow.parameters().items()])
    direction = np.random.default_rng(0).normal(size=flow.num_parameters) * moves
    losses = []
    for step in (1e-6, -1e-6):
        flow.set_parameters_flat(start + step * direction)
        losses.append(flow.nll_gradient(x, index=index, total_rows=25, **given)[0])
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(gradient @ direction, rel=1e-6)


def test_what_float32_loses_of_a_mean_is_kept() -> None:
    flow = flow_of("default", "float32")
    x = 1e6 + np.random.default_rng(0).normal(size=(300, SIZE))
    flow.initialize_from(x)
    low, before = flow.parameters()["standardize_0.mean_low"].copy(), flow.log_prob(x)
    assert low.any()
    flat = flow.parameters_flat()
    flow.set_parameters_flat(flat)
    assert_same_bits(flow.log_prob(x), before)
    flat[0] += 1
    flow.set_parameters_flat(flat)
    assert flow.parameters()["standardize_0.mean_low"].tolist() == [0, *low[1:]]


def test_new_parameters_have_no_threshold() -> None:
    flow = flow_of("plain", "float32")
    flow.set_threshold(-3)
    flow.set_parameters_flat(flow.parameters_flat())
    assert flow.threshold is None


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (np.zeros(3, np.float32), ValueError, r"values has shape \(3,\), expected \(\d+,\)"),
        (np.zeros((1, 2), np.float32), ValueError, r"values has shape \(1, 2\)"),
        (np.zeros(3), TypeError, "values has dtype float64"),
        ("text", TypeError, "values has dtype"),
    ],
)
def test_bad_vectors_change_nothing(values: Any, kind: type[Exception], message: str) -> None:
    flow = flow_of("plain", "float32")
    before = flow.parameters_flat()
    with pytest.raises(kind, match=message):
        flow.set_parameters_flat(values)
    assert_same_bits(flow.parameters_flat(), before)


# -------------------------------------------------------------------------------------------------------- Adam

FIT = {"validation": None, "averaging": None, "schedule": "constant", "progress": False, "max_deviation": None}


def order_of(size: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch of `fit`: a Feistel network over an even power of two, walked until it lands inside."""
    half, keys, rows = 1, [], np.empty(size, np.int64)
    while 4**half < size:
        half += 1
    for pair in range(3):
        word = philox4x32((epoch, 0, pair, 2), (seed, 0))
        keys += [word[1] << 32 | word[0], word[3] << 32 | word[2]]

    def encrypt(value: int) -> int:
        left, right = value >> half, value % 2**half
        for key in keys:
            mixed = (right + key) % 2**64
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
                mixed = (mixed ^ mixed >> 33) * factor % 2**64
            left, right = right, left ^ (mixed >> 33) % 2**half
        return left << half | right

    for i in range(size):
        at = encrypt(i)
        while at >= size:
            at = encrypt(at)
        rows[i] = at
    return rows


@pytest.mark.parametrize("kind", ["default", "plain", "context", "lu", "mixture"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("decay", "clip", "weighted"), [(0.0, 0.0, False), (0.1, 0.5, True)])
def test_a_loop_of_ones_own_gives_the_weights_of_fit(
    kind: str, dtype: str, decay: float, clip: float, weighted: bool
) -> None:
    x, given = rows_of(kind, 150, dtype)
    w = np.random.default_rng(4).uniform(0.5, 2, 150) if weighted else None
    options = {"weight_decay": decay, "clip_norm": clip, "learning_rate": 2e-3}
    fitted, own, state = flow_of(kind, dtype), flow_of(kind, dtype), nvpflow.AdamState()
    for flow in (own, fitted)[: 0 if kind == "plain" else 2 if kind == "lu" else 1]:
        flow.initialize_from(x, sample_weight=w, **given)  # which fit does by itself where it has not been done
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            fitted.fit(x, sample_weight=w, epochs=1, batch_size=64, seed=5, adam=state, **given, **options, **FIT)
    if w is not None:
        w *= 150 / w.cumsum()[-1]  # to mean 1, as fit has them
    adam, gradient = nvpflow.training.Adam(own, **options), np.empty(own.num_parameters, dtype)
    for epoch in (1, 2, 3):
        order = order_of(150, 5, epoch)
        for first in (0, 64, 128):
            index = order[first : first + 64]
            own.nll_gradient(x, w, index=index, total_rows=len(index), out=gradient, **given)
            norm = adam.step(gradient)
    assert norm > 0
    assert adam.state.steps == state.steps == 9
    assert_same_bits(own.parameters_flat(), fitted.parameters_flat())
    assert_same_bits(adam.state.first_moment, state.first_moment)
    assert_same_bits(adam.state.second_moment, state.second_moment)


def test_a_state_goes_on() -> None:
    x, _ = rows_of("plain", 64, "float32")
    whole, parts = flow_of("plain", "float32"), flow_of("plain", "float32")
    adam = nvpflow.Adam(whole)
    for _ in range(6):
        adam.step(whole.nll_gradient(x)[1])
    state = None
    for _ in range(3):
        again = nvpflow.Adam(parts, state=pickle.loads(pickle.dumps(state)))
        for _ in range(2):
            again.step(parts.nll_gradient(x)[1])
        state = again.state
    assert state == adam.state
    assert_same_bits(parts.parameters_flat(), whole.parameters_flat())


def test_a_step_leaves_what_is_not_trained_and_the_low_part_of_a_mean() -> None:
    flow = flow_of("default", "float32")
    x = 1e6 + np.random.default_rng(0).normal(size=(300, SIZE))
    flow.initialize_from(x)
    flow.set_threshold(-5)
    before = {name: value.copy() for name, value in flow.parameters().items()}
    nvpflow.Adam(flow).step(flow.nll_gradient(x)[1])
    for name, value in flow.parameters().items():
        same = np.array_equal(value, before[name])
        assert same == name.startswith("standardize"), name
    assert flow.threshold is None


def test_steps_lower_the_loss() -> None:
    flow, (x, given) = flow_of("bounds", "float32"), rows_of("bounds", 300, "float32")
    adam, first = nvpflow.Adam(flow, 1e-2), flow.nll(x, **given)
    for step in range(30):
        adam.learning_rate = 1e-2 * (1 - step / 30)
        adam.step(flow.nll_gradient(x, **given)[1])
    assert flow.nll(x, **given) < first - 0.1
    assert repr(adam).endswith("steps=30)")


def ones_of(size: int, _: object) -> np.ndarray:
    return np.ones(size, np.float32)


@pytest.mark.parametrize(
    ("change", "gradient", "kind", "message"),
    [
        ({}, np.full, nvpflow.TrainingError, "gradient has the norm nan, expected a finite one"),
        ({}, lambda n, _: np.ones(n - 1, np.float32), ValueError, "gradient has shape"),
        ({}, lambda n, _: np.ones((1, n), np.float32), ValueError, "gradient has two axes, expected one"),
        ({}, lambda n, _: np.ones(n), TypeError, "gradient has dtype float64"),
        (
            {"learning_rate": 0},
            ones_of,
            ValueError,
            "learning_rate is 0, expected a finite",
        ),
        (
            {"learning_rate": "1"},
            ones_of,
            TypeError,
            "learning_rate is str, expected a real",
        ),
        (
            {"weight_decay": -1},
            ones_of,
            ValueError,
            "weight_decay is -1, expected a finite",
        ),
        ({"clip_norm": np.inf}, ones_of, ValueError, "clip_norm is inf, expected a finite"),
    ],
)
def test_a_bad_step_changes_nothing(change: dict, gradient: Any, kind: type[Exception], message: str) -> None:
    flow = flow_of("plain", "float32")
    adam, before = nvpflow.Adam(flow), flow.parameters_flat()
    for name, value in change.items():
        setattr(adam, name, value)
    given = np.full(flow.num_parameters, np.nan, np.float32) if gradient is np.full else gradient(len(before), None)
    with pytest.raises(kind, match=message):
        adam.step(given)
    assert_same_bits(flow.parameters_flat(), before)
    assert adam.state.steps == 0


def test_states_of_other_flows_are_refused() -> None:
    flow, other = flow_of("plain", "float32"), flow_of("spline", "float32")
    adam = nvpflow.Adam(other)
    adam.step(np.ones(other.num_parameters, np.float32))
    with pytest.raises(ValueError, match=r"state has made 1 steps with moments of \d+ and \d+ parameters, expected"):
        nvpflow.Adam(flow, state=adam.state)
    with pytest.raises(TypeError, match=r"state is 3 \(int\), expected an nvpflow\.AdamState"):
        nvpflow.Adam(flow, state=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"flow is None \(NoneType\), expected a nvpflow\.Flow"):
        nvpflow.Adam(None)  # type: ignore[arg-type]
