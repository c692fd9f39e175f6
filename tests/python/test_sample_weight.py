"""Rows that count for more or less: nll, its gradient and fit by weight."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import numpy as np
import nvpflow
import pytest
from general_oracle import GeneralFlow
from nvpflow import _core, _gaussian, _sample_weight
from oracle import AdamW, assert_same_bits, clip_to_norm, unit_data

SIZE, CONTEXT = 5, 2
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "general": {"transform": "spline", "mixing": "lu", "actnorm": True},
    "residual": {"network": "residual", "mask": "checkered"},
    "conditional": {"context_size": CONTEXT},
    "heavy tails": {"base": "student_t"},
    "groups": {"base": "mixture"},
}


def curved(count: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    x = unit_data(count, SIZE, seed)
    x[:, 3] = 0.3 * x[:, 3] + np.sin(2 * x[:, 0])
    x[:, 4] = 0.3 * x[:, 4] + x[:, 1] * x[:, 2]
    return x.astype(dtype)


def weights_of(count: int, seed: int = 0, zeros: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=count) * (rng.random(count) >= zeros)


def far_from_identity(kind: str, dtype: str, **options: Any) -> nvpflow.Flow:
    flow = nvpflow.build(SIZE, 2, (16,), **{**KINDS[kind], "dtype": dtype, "seed": 2, **options})
    rng = np.random.default_rng(7)
    flow.set_parameters(
        {
            name: value if name.endswith(".sign") else (value + 0.2 * rng.normal(size=value.shape)).astype(dtype)
            for name, value in flow.parameters().items()
        }
    )
    return flow


def given(kind: str, count: int, dtype: str = "float32") -> dict[str, Any]:
    return {"context": unit_data(count, CONTEXT, 9).astype(dtype)} if kind == "conditional" else {}


def oracle_of(flow: nvpflow.Flow) -> GeneralFlow:
    spec = json.loads(flow.spec._to_full_json())
    return GeneralFlow(spec, {name: v.astype(np.float64) for name, v in flow.parameters().items()})


def flat(flow: nvpflow.Flow) -> np.ndarray:
    return np.concatenate([value.ravel() for value in flow.parameters().values()])


def new_flow(dtype: str = "float32", **options: Any) -> nvpflow.Flow:
    options = {"num_flows": 2, "hidden_sizes": (16,), "activation": "tanh", "seed": 1, **options}
    return nvpflow.build(SIZE, dtype=dtype, **options)


def fit(flow: nvpflow.Flow, x: np.ndarray, **options: Any) -> nvpflow.History:
    return flow.fit(x, **{"progress": False, "epochs": 4, "batch_size": 64, "seed": 3, **options})


# ------------------------------------------------------------------------------------------- nll and its gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_and_its_gradient_are_the_oracles_by_weight(kind: str, dtype: str) -> None:
    flow, x = far_from_identity(kind, dtype), curved(301, dtype=dtype)
    w, context = weights_of(301, zeros=0.2), given(kind, 301, dtype)
    oracle = oracle_of(flow)
    wide = {name: value.astype(np.float64) for name, value in context.items()}
    log_p = oracle.log_prob(x.astype(np.float64), **wide)
    expected = oracle.log_prob_vjp(x.astype(np.float64), -w / w.sum(), **wide).parameters
    loss, gradient = flow.nll_gradient(x, w, **context)
    tolerance = 2e-5 if dtype == "float32" else 1e-11
    assert loss == pytest.approx(-np.average(log_p, weights=w), rel=tolerance)
    assert flow.nll(x, w, **context) == pytest.approx(loss, rel=1e-12)
    largest = max(np.abs(value).max() for value in expected.values())
    at = 0
    for name, value in flow.parameters().items():
        found = gradient[at : at + value.size].reshape(value.shape)
        at += value.size
        if not name.endswith(".sign"):
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=10 * tolerance * largest, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_weights_are_rows_that_are_repeated(kind: str) -> None:
    flow, x = far_from_identity(kind, "float64"), curved(97, dtype="float64")
    times = np.random.default_rng(3).integers(0, 5, 97)
    context = given(kind, 97, "float64")
    repeated = {name: np.repeat(value, times, axis=0) for name, value in context.items()}
    loss, gradient = flow.nll_gradient(x, times, **context)
    other, expected = flow.nll_gradient(np.repeat(x, times, axis=0), **repeated)
    assert loss == pytest.approx(other, rel=1e-12)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


def test_the_gradient_is_that_of_finite_differences() -> None:
    flow, x = far_from_identity("general", "float64"), curved(60, dtype="float64")
    w = weights_of(60)
    _, gradient = flow.nll_gradient(x, w)
    start = {name: value.copy() for name, value in flow.parameters().items()}
    trained = _core._trained(flow.spec)
    direction = {
        name: np.random.default_rng(i).normal(size=value.shape) * (name in trained)
        for i, (name, value) in enumerate(start.items())
    }

    def loss(step: float) -> float:
        flow.set_parameters({name: value + step * direction[name] for name, value in start.items()})
        return flow.nll(x, w)

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    along = gradient @ np.concatenate([value.ravel() for value in direction.values()])
    assert along == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_of_weight_0_changes_no_bit_whatever_it_holds(kind: str, dtype: str, threads: int) -> None:
    flow, x = far_from_identity(kind, dtype), curved(2500, dtype=dtype)
    flow.num_threads = threads
    w, context = weights_of(2500, zeros=0.3), given(kind, 2500, dtype)
    counts = w > 0
    without = {name: value[counts] for name, value in context.items()}
    loss, gradient = flow.nll_gradient(x[counts], w[counts], **without)
    for value in (0.0, 1e30, np.finfo(dtype).max, np.nan):
        other = np.where(counts[:, None], x, np.array(value, dtype))
        found, same = flow.nll_gradient(other, w, **context)
        assert (found, flow.nll(other, w, **context)) == (loss, flow.nll(x[counts], w[counts], **without))
        assert_same_bits(same, gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_1_give_the_bits_of_none_for_any_number_of_threads(kind: str, dtype: str) -> None:
    flow, x = far_from_identity(kind, dtype), curved(3001, dtype=dtype)
    context = given(kind, 3001, dtype)
    loss, gradient = flow.nll_gradient(x, **context)
    w = weights_of(3001)
    by_weight = []
    for threads in (1, 2, 5):
        flow.num_threads = threads
        found, same = flow.nll_gradient(x, np.ones(3001), **context)
        assert (found, flow.nll(x, np.ones(3001, np.int64), **context)) == (loss, flow.nll(x, **context))
        assert_same_bits(same, gradient)
        by_weight.append(flow.nll_gradient(x, w, **context))
    for found, same in by_weight[1:]:
        assert found == by_weight[0][0]
        assert_same_bits(same, by_weight[0][1])


@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_float64_rows_and_one_context_for_all_have_weights(zeros: float) -> None:
    w = weights_of(5000, zeros=zeros)
    flow = far_from_identity("conditional", "float32")
    x, c = curved(5000, dtype="float64"), np.array([0.3, -1.0], np.float32)
    wide = x * np.array([1, 2, 1e3, 4, 5]) + 1e6
    flow.initialize_from(wide, context=np.tile(c, (5000, 1)) + unit_data(5000, CONTEXT, 1).astype(np.float32))
    log_p = flow.log_prob(wide, context=c).astype(np.float64)
    loss, gradient = flow.nll_gradient(wide, w, context=c)
    assert loss == pytest.approx(-np.average(log_p, weights=w), rel=1e-6)
    assert flow.nll(wide, w, context=c) == pytest.approx(loss, rel=1e-12)
    tiled = np.tile(c, (5000, 1))
    assert_same_bits(flow.nll_gradient(wide, w, context=tiled)[1], gradient)
    view = flow.condition(c)
    assert view.nll(wide, w) == flow.nll(wide, w, context=c)
    assert_same_bits(view.nll_gradient(wide, w)[1], gradient)
    few = slice(0, 1)
    one = flow.nll(wide[few], [2.0], context=c)
    assert one == flow.nll(wide[few], context=c) == flow.nll(wide[0], 2.0, context=c)


def test_weights_may_be_of_any_kind_of_numbers_and_any_library() -> None:
    flow, x = far_from_identity("default", "float32"), curved(40)
    w = np.arange(40) / 8
    expected = flow.nll(x, w)
    for given_as in (w.astype(np.float32), w.tolist(), w[::-1][::-1], (w * 8).astype(np.int32)):
        assert flow.nll(x, given_as) == pytest.approx(expected, rel=1e-12)
    torch = pytest.importorskip("torch")
    assert flow.nll(x, torch.from_numpy(w)) == expected
    assert flow.nll(x, sample_weight=torch.from_numpy(w).float()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e200, 1e303])
def test_only_ratios_of_weights_matter(scale: float) -> None:
    flow, x = new_flow(standardize=False), curved(400)
    w = np.arange(400.0)
    every_other, beyond = np.where(w % 2 == 0, 1.0, 0.0), np.where(w % 2 == 0, 1e305, 1e-308)
    for some, other in ((w, w * scale), (every_other, beyond)):
        assert flow.nll(x, other) == pytest.approx(flow.nll(x, some), rel=1e-12)
        expected, found = flow.nll_gradient(x, some)[1], flow.nll_gradient(x, other)[1]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        losses = [
            new_flow().fit(x, sample_weight=v, validation=(x, v), epochs=2, progress=False).validation_loss
            for v in (some, other)
        ]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


BAD = [
    ([1, 2, 3], ValueError, r"shape \(3,\), expected \(4,\)"),
    ([[1, 1, 1, 1]], ValueError, r"shape \(1, 4\), expected \(4,\)"),
    ([1, 1, -0.5, 1], ValueError, r"\[2\] is -0\.5, expected at least 0: .* negative weight the loss has no minimum"),
    ([1, np.nan, 1, 1], ValueError, r"\[1\] is nan, expected a finite number"),
    ([1, np.inf, 1, 1], ValueError, r"\[1\] is inf, expected a finite number"),
    ([0, 0, 0, 0], ValueError, r"is zero for all 4 rows, expected a weight above 0"),
    ([1e308] * 4, ValueError, "adds up to infinity"),
    (np.ones(4, complex), TypeError, "dtype complex128, expected"),
    (["a"] * 4, TypeError, "dtype <U1, expected"),
]


@pytest.mark.parametrize(("weights", "error", "message"), BAD)
def test_other_weights_are_refused(weights: Any, error: type[Exception], message: str) -> None:
    flow, x = new_flow(standardize=False), curved(4)
    before = flat(flow)
    for call in (
        lambda: flow.nll(x, weights),
        lambda: flow.nll_gradient(x, sample_weight=weights),
        lambda: flow.fit(x, sample_weight=weights, validation=None, progress=False),
    ):
        with pytest.raises(error, match=f"sample_weight.*{message}"):
            call()
    assert_same_bits(flat(flow), before)
    with pytest.raises(error, match=f"the weights of validation.*{message}"):
        flow.fit(curved(50), sample_weight=np.ones(50), validation=(x, weights), progress=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_within_bounds_have_weights(dtype: str) -> None:
    flow = nvpflow.build(SIZE, 2, (16,), bounds={0: (-40, None), 3: (-30, 50)}, dtype=dtype)
    x, w = curved(3000, dtype=dtype), weights_of(3000, zeros=0.2)
    history = fit(flow, x, sample_weight=w, averaging=None)
    held_out, _ = _core._split_rows(int((w > 0).sum()), 0.1, 3, 3000)
    rows, own = x[w > 0][held_out], w[w > 0][held_out]
    assert history.best_loss == pytest.approx(-np.average(flow.log_prob(rows), weights=own), rel=1e-4)
    loss, gradient = flow.nll_gradient(x, w)
    log_p = flow.log_prob(x).astype(np.float64)
    assert loss == pytest.approx(-np.average(log_p, weights=w), rel=1e-5)
    assert flow.nll(x, w) == pytest.approx(loss, rel=1e-7)
    expected = flow.log_prob_vjp(x, (-w / w.sum()).astype(dtype), wrt="parameters")[1]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    counts = w > 0
    other = np.where(counts[:, None], x, np.array(-1e30, dtype))  # beyond the bounds, too
    assert_same_bits(flow.nll_gradient(other, w)[1], flow.nll_gradient(x[counts], w[counts])[1])
    ones = flow.nll_gradient(x, np.ones(3000))
    assert_same_bits(ones[1], flow.nll_gradient(x)[1])
    assert ones[0] == flow.nll_gradient(x)[0]


# ------------------------------------------------------------------------------------------------------- training


def test_a_step_is_adamw_on_the_oracles_gradient_by_weight(make_flow) -> None:
    """One batch of all rows, so that their order cannot matter."""
    flow, _ = make_flow(SIZE, 3, (7,), "silu")
    oracle = oracle_of(flow)
    x, w = curved(300, dtype="float64"), weights_of(300)
    optimiser = AdamW(1e-2, 0.1)
    losses = []
    for _ in range(5):
        losses.append(-np.average(oracle.log_prob(x), weights=w))
        gradients = oracle.log_prob_vjp(x, -w / w.sum()).parameters
        optimiser.step(oracle.parameters, clip_to_norm(gradients, np.inf)[0])
    options = {"validation": None, "epochs": 5, "batch_size": 300, "learning_rate": 1e-2, "schedule": "constant"}
    history = fit(flow, x, sample_weight=w, **options, weight_decay=0.1, clip_norm=None)
    np.testing.assert_allclose(history.train_loss, losses, rtol=1e-10)
    assert history.effective_rows == pytest.approx(w.sum() ** 2 / np.square(w).sum(), rel=1e-12)
    assert history.train_rows == 300


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["default", "general", "conditional", "heavy tails", "groups"])
def test_weights_of_1_train_the_flow_that_none_do(kind: str, threads: int) -> None:
    x, context = curved(700, dtype="float64"), given(kind, 700)
    flows = []
    for w in (None, np.ones(700), np.full(700, 4.0)):
        flow = nvpflow.build(SIZE, 2, (16,), **KINDS[kind], seed=2)
        history = fit(flow, x, **context, sample_weight=w, num_threads=threads if w is None else 1)
        assert history.effective_rows == history.train_rows == 630
        flows.append(flow)
    for flow in flows[1:]:
        assert_same_bits(flat(flow), flat(flows[0]))


def test_rows_of_weight_0_are_as_if_absent() -> None:
    x, c = curved(800), unit_data(800, CONTEXT, 5).astype(np.float32)
    w = weights_of(800, zeros=0.25)
    counts = w > 0
    flows = []
    for rows, contexts, weights in ((x, c, w), (x[counts], c[counts], 2 * w[counts])):
        flow = new_flow(context_size=CONTEXT, actnorm=True)
        history = fit(flow, rows, context=contexts, sample_weight=weights)
        assert history.train_rows + history.validation_rows == counts.sum()
        flows.append(flat(flow))
    assert_same_bits(flows[0], flows[1])
    x[~counts] = np.nan
    with pytest.raises(ValueError, match=r"x: \d+ of 800 rows with NaN"):
        fit(new_flow(), x, sample_weight=w)


def test_the_layers_are_set_from_weighted_moments() -> None:
    rng = np.random.default_rng(0)
    x, c = rng.normal(3, 2, size=(4000, SIZE)), rng.normal(1, 3, size=(4000, CONTEXT)).astype(np.float32)
    w = np.exp(-0.5 * x[:, 0])
    flow = new_flow("float64", context_size=CONTEXT, actnorm=True)
    still = {"epochs": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "validation": None}
    c = c.astype(np.float64)
    fit(flow, x, context=c, sample_weight=w, standardize="mean", **still)
    values = flow.parameters()
    for layer, table in (("standardize_0", x), ("context", c)):
        mean = np.average(table, axis=0, weights=w)
        np.testing.assert_allclose(values[f"{layer}.mean"], mean, rtol=1e-12)
        std = np.sqrt(np.average((table - mean) ** 2, axis=0, weights=w))
        np.testing.assert_allclose(np.exp(values[f"{layer}.log_std"]), std, rtol=1e-12)
    oracle = oracle_of(flow)
    oracle.layers = oracle.layers[:2]  # as far as the first actnorm layer
    out = oracle.forward(x, c)[0]
    np.testing.assert_allclose(np.average(out, axis=0, weights=w), 0, atol=1e-12)
    np.testing.assert_allclose(np.average(out**2, axis=0, weights=w), 1, rtol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"standardize": "covariance"}, {"base": "mixture"}, {"bounds": {0: (0, None)}}]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_initialize_from_sets_what_fit_does_by_weight(options: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, c = rng.gamma(3, size=(3000, SIZE)), rng.normal(1, 3, size=(3000, CONTEXT)).astype(dtype)
    w = weights_of(3000, 1, zeros=0.3)
    flows = [new_flow(dtype, context_size=CONTEXT, actnorm="base" not in options, **options) for _ in range(2)]
    still = {"epochs": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "validation": None, "max_deviation": None}
    fit(flows[0], x, context=c, sample_weight=w, averaging=None, batch_size=3000, seed=0, **still)
    flows[1].initialize_from(x, context=c, sample_weight=7 * w)
    kept = w > 0
    flows.append(new_flow(dtype, context_size=CONTEXT, actnorm="base" not in options, **options))
    flows[2].initialize_from(x[kept], context=c[kept], sample_weight=w[kept])
    values = [flow.parameters() for flow in flows]
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    for name in nvpflow._core._from_data(flows[0].spec):
        if "mixture" not in options.values() or not name.startswith("base."):  # of other rows, evenly taken
            np.testing.assert_allclose(values[1][name], values[0][name], rtol=tolerance, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(values[2][name], values[1][name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_initialize_from_with_weights_of_1_and_bad_ones() -> None:
    x = curved(500)
    plain, ones, first = new_flow(actnorm=True), new_flow(actnorm=True), new_flow(actnorm=True)
    plain.initialize_from(x)
    ones.initialize_from(x, sample_weight=np.ones(500))
    assert_same_bits(flat(ones), flat(plain))
    first.initialize_from(x, sample_weight=np.arange(500) < 200)
    plain.initialize_from(x[:200])
    assert_same_bits(flat(first), flat(plain))
    for wrong, message in (
        (np.ones(3), r"sample_weight has shape \(3,\), expected \(500,\)"),
        (-np.ones(500), r"sample_weight\[0\] is -1"),
        (np.zeros(500), "sample_weight is zero for all 500 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            plain.initialize_from(x, sample_weight=wrong)
        with pytest.raises(ValueError, match=message):
            plain.fit_threshold(x, sample_weight=wrong)


def test_a_threshold_is_a_quantile_by_weight() -> None:
    flow, x = new_flow("float64"), curved(300, dtype="float64")
    w = np.random.default_rng(2).integers(0, 4, size=300)
    log_p = flow.log_prob(x)
    found = flow.fit_threshold(x, 0.2, sample_weight=w)
    assert found.log_p == _sample_weight.quantile(log_p[w > 0], w[w > 0].astype(float), 0.2)
    assert abs(w[log_p < found.log_p].sum() / w.sum() - 0.2) < 0.02
    assert flow.fit_threshold(x, 0.2, sample_weight=np.full(300, 3.0)).log_p == pytest.approx(
        flow.fit_threshold(x, 0.2).log_p, rel=1e-12
    )
    x[5] = np.nan
    with pytest.raises(ValueError, match="1 of 300 rows whose log p is not finite"):
        flow.fit_threshold(x, 0.2, sample_weight=np.ones(300))
    assert flow.fit_threshold(x, 0.2, sample_weight=np.arange(300) != 5).log_p == pytest.approx(
        np.quantile(log_p[np.arange(300) != 5], 0.2), rel=1e-12
    )


@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_a_fold_is_trained_by_the_weights_of_its_own_rows(clip_norm: float | None) -> None:
    x, w = curved(7, dtype="float64"), np.array([100.0, 1, 2, 1, 3, 1, 0.5])

    def trained(*rows: Any, **options: Any) -> nvpflow.History:
        given = {"epochs": 12, "batch_size": 7, "learning_rate": 0.02, "averaging": None, "weight_decay": 0.0}
        flow = new_flow("float64", standardize=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nvpflow.DataWarning)
            return fit(flow, *rows, **given, clip_norm=clip_norm, **options)

    found = trained(x, sample_weight=w, folds=7)
    assert found.folds == 7
    losses = np.zeros(12)
    for i in range(7):
        rest = np.arange(7) != i
        left = x[i : i + 1], np.ones(1)
        losses += w[i] * trained(x[rest], sample_weight=w[rest], validation=left).validation_loss
    np.testing.assert_allclose(found.validation_loss, losses / w.sum(), rtol=1e-9)


def test_the_loss_of_jax_has_weights() -> None:
    jax = pytest.importorskip("jax")
    import nvpflow.jax as nj

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        for kind in ("default", "conditional"):
            flow = far_from_identity(kind, "float64")
            x, w, context = curved(40, dtype="float64"), weights_of(40, 1, zeros=0.3), given(kind, 40, "float64")
            x[w == 0] = np.nan
            parameters = nj.parameters(flow)
            wanted, gradient = flow.nll_gradient(x, sample_weight=w, **context)

            def loss(p: Any, w: Any, flow=flow, x=x, context=context) -> Any:
                return nj.nll(flow.spec, p, x, sample_weight=w, **context)

            for value_and_grad in (
                lambda p, loss=loss, w=w: jax.value_and_grad(lambda p: loss(p, w))(p),
                lambda p, loss=loss, w=w: jax.jit(jax.value_and_grad(loss))(p, w),
            ):
                found, by = value_and_grad(parameters)
                assert float(found) == pytest.approx(wanted, rel=1e-12)
                flat_by = np.concatenate([np.ravel(by[name]) for name in parameters])
                np.testing.assert_allclose(flat_by, gradient, rtol=1e-9, atol=1e-11)
            stacked = loss(parameters, w)
            assert float(nj.nll(flow.spec, parameters, x, sample_weight=1e300 * w, **context)) == pytest.approx(
                float(stacked), rel=1e-12
            )
        for wrong, message in (
            (np.ones(3), r"sample_weight has shape \(3,\), expected \(40,\)"),
            (-np.ones(40), r"sample_weight\[0\] is -1"),
        ):
            with pytest.raises(ValueError, match=message):
                nj.nll(flow.spec, parameters, x, sample_weight=wrong, **context)
        flow = new_flow("float64")
        rows = curved(500, dtype="float64")
        own = nj.initialize_from(flow.spec, nj.parameters(flow), rows, sample_weight=weights_of(500))
        flow.initialize_from(rows, sample_weight=weights_of(500))
        assert_same_bits(np.asarray(own["standardize_0.mean"]), flow.parameters()["standardize_0.mean"])


def test_a_module_is_initialized_by_weight() -> None:
    torch = pytest.importorskip("torch")
    from nvpflow.torch import FlowModule

    flow, x, w = new_flow(), curved(500), weights_of(500)
    module = FlowModule(flow)
    module.initialize_from(torch.from_numpy(x).reshape(50, 10, SIZE), sample_weight=torch.from_numpy(w).reshape(50, 10))
    flow.initialize_from(x, sample_weight=w)
    assert_same_bits(flat(module.to_flow()), flat(flow))


@pytest.mark.parametrize(("count", "seed", "in_own_units"), [(3000, 0, True), (40, 1, False)])
def test_a_flow_that_begins_as_a_gaussian_begins_as_the_weighted_one(count: int, seed: int, in_own_units: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=(count, SIZE)) @ rng.normal(size=(SIZE, SIZE))
    w = weights_of(count, seed)
    flow = new_flow("float64", standardize="covariance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvpflow.DataWarning)  # the rows are few
        still = {"epochs": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "validation": None}
        fit(flow, x, sample_weight=w, standardize="mean", **still)
    z = flow.forward(x)[0]  # the couplings begin as the identity
    np.testing.assert_allclose(np.average(z, axis=0, weights=w), 0, atol=1e-10)
    mean = np.average(x, axis=0, weights=w)
    variances = np.average((x - mean) ** 2, axis=0, weights=w)
    u = (x - mean) / np.sqrt(variances)
    matrix = np.linalg.lstsq(u, z, rcond=None)[0]
    found, correlations = np.linalg.inv(matrix @ matrix.T), np.cov(u.T, aweights=w, ddof=0)
    shares = (found / correlations)[~np.eye(SIZE, dtype=bool)]  # of the correlations, that shrinking leaves
    np.testing.assert_allclose(shares, shares[0], rtol=1e-7)
    assert 0.3 < shares[0] <= 1 + 1e-9
    target = (np.diag(found) - shares[0]) * (variances if in_own_units else 1)  # one variance for all columns
    np.testing.assert_allclose(target, target[0], rtol=1e-5)
    assert target[0] > 0


def test_a_mixture_begins_at_weighted_groups() -> None:
    rng = np.random.default_rng(0)
    far = np.where(np.arange(2000) < 1000, 4.0, -4.0)
    x = rng.normal(size=(2000, SIZE)) + far[:, None]
    w = np.where(far > 0, 3.0, 1.0)
    flow = new_flow("float64", base=nvpflow.layers.Mixture(2))
    still = {"epochs": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "validation": None}
    fit(flow, x, sample_weight=w, **still)
    logits = flow.parameters()["base.logits"]
    shares = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(np.sort(shares), [0.25, 0.75], atol=2e-3)


def test_robust_statistics_are_weighted_quantiles() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_t(2, size=(3000, SIZE))
    w = rng.gamma(0.5, size=3000)
    flow = new_flow("float64")
    fit(flow, x, sample_weight=w, standardize="robust", epochs=1, learning_rate=1e-30, validation=None, max_deviation=0)
    for j in range(SIZE):
        low, middle, high = _sample_weight.quantile(x[:, j], w, (0.25, 0.5, 0.75))
        assert flow.parameters()["standardize_0.mean"][j] == pytest.approx(middle, rel=1e-9)
        spread = np.exp(flow.parameters()["standardize_0.log_std"][j])
        assert spread == pytest.approx((high - low) / 1.3489795003921636, rel=1e-9)


def test_a_weighted_quantile_is_numpys_of_equal_weights_and_near_that_of_repeated_rows() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=501)
    shares = [0, 0.1, 0.5, 0.93, 1]
    np.testing.assert_allclose(
        _sample_weight.quantile(values, np.full(501, 0.3), shares), np.quantile(values, shares), rtol=1e-12
    )
    times = rng.integers(1, 9, 501)
    repeated = np.quantile(np.repeat(values, times), shares)
    np.testing.assert_allclose(_sample_weight.quantile(values, times.astype(float), shares), repeated, atol=0.02)


def test_epochs_are_compared_by_weight() -> None:
    x, w = curved(600), weights_of(600)
    flow = new_flow()
    history = fit(flow, x, sample_weight=w, averaging=None)
    held_out, trained = _core._split_rows(600, 0.1, 3, 600)
    assert history.best_loss == pytest.approx(flow.nll(x[held_out], w[held_out]), rel=1e-5)
    assert history.effective_rows == pytest.approx(w[trained].sum() ** 2 / np.square(w[trained]).sum())
    flow = new_flow()
    history = fit(flow, x, sample_weight=w, validation=(x[:90], w[:90]))
    assert history.best_loss == pytest.approx(flow.nll(x[:90], w[:90]), rel=1e-5)
    flow = new_flow()
    history = fit(flow, x, sample_weight=w, validation=None)
    assert history.best_loss == pytest.approx(flow.nll(x, w), rel=1e-5)


def test_a_validation_tuple_is_read_by_what_the_fit_has() -> None:
    x, c, w = curved(300), unit_data(300, CONTEXT, 5).astype(np.float32), weights_of(300)
    one = {"epochs": 1}
    fit(new_flow(), x, sample_weight=w, validation=(x, w), **one)
    with_context = new_flow(context_size=CONTEXT)
    history = fit(with_context, x, context=c, sample_weight=w, validation=(x, c, w), averaging=None, **one)
    assert history.best_loss == pytest.approx(with_context.nll(x, w, context=c), rel=1e-5)
    refused = [
        (new_flow(), {"sample_weight": w, "validation": x}, r"without weights, expected a tuple \(rows, weights\)"),
        (new_flow(), {"sample_weight": w, "validation": (x, c, w)}, r"tuple of 3, .* two: \(rows, weights\)"),
        (new_flow(), {"sample_weight": w, "validation": (0.1, w)}, r"a share and weights, expected \(rows, weights\)"),
        (new_flow(), {"validation": (x, w)}, "rows and weights, expected rows alone where x has no weights"),
        (with_context, {"context": c, "sample_weight": w, "validation": (x, c)}, "tuple of 2, expected a tuple of thr"),
        (with_context, {"context": c, "sample_weight": w, "validation": x}, r"tuple \(rows, context, weights\)"),
        (with_context, {"context": c, "validation": (x, c, w)}, r"tuple of 3, .* two: \(rows, context\)"),
    ]
    for flow, options, message in refused:
        with pytest.raises(ValueError, match=f"validation.*{message}"):
            fit(flow, x, **options, **one)


def test_rows_that_are_left_out_take_their_weights_along() -> None:
    x, w = curved(500), weights_of(500)
    far = np.vstack([x[:200], np.full((3, SIZE), 1e9, np.float32), x[200:]])
    weights = np.concatenate([w[:200], [1e-9] * 3, w[200:]])
    options = {"sample_weight": weights, "standardize": "robust", "max_deviation": 100}
    with pytest.warns(nvpflow.DataWarning, match="has outliers"):
        history = fit(new_flow(), far, validation=None, **options)
    assert (history.rows_left_out, history.train_rows) == (3, 500)
    assert history.effective_rows == pytest.approx(w.sum() ** 2 / np.square(w).sum(), rel=1e-9)


def test_the_automatic_decay_and_the_warning_of_few_rows_go_by_weight() -> None:
    x, w = curved(2000), np.where(np.arange(2000) < 60, 1.0, 1e-9)
    flow, other = new_flow(), new_flow()
    with pytest.warns(nvpflow.DataWarning, match="2,000 rows, by weight as good as 60, are few for 5 columns"):
        history = fit(flow, x, sample_weight=w, validation=None)
    with pytest.warns(nvpflow.DataWarning, match="few for 5 columns"):
        fit(other, x, sample_weight=w, validation=None, weight_decay=min(1.0, (225 * 5 / history.effective_rows) ** 2))
    assert_same_bits(flat(flow), flat(other))
    assert f"training (by weight as good as {history.effective_rows:,.0f})" in repr(history)
    assert nvpflow.History.from_dict(history.to_dict()).effective_rows == history.effective_rows
    older = {name: value for name, value in history.to_dict().items() if name != "effective_rows"}
    assert nvpflow.History.from_dict(older).effective_rows == 2000


def test_the_gaussian_that_a_flow_is_compared_with_is_weighted() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(20000, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]])
    times = rng.integers(1, 6, 20000)
    found = _gaussian.shrunk_log_prob(x, x, weights=times.astype(float))
    np.testing.assert_allclose(found, _gaussian.shrunk_log_prob(np.repeat(x, times, axis=0), x), atol=5e-2)
    np.testing.assert_allclose(
        _gaussian.shrunk_log_prob(x, x, weights=np.full(20000, 0.2)), _gaussian.shrunk_log_prob(x, x), rtol=1e-12
    )


def test_a_checkpoint_knows_the_weights(tmp_path) -> None:
    x, w = curved(300), weights_of(300)
    file = tmp_path / "run.ckpt"
    whole = new_flow()
    fit(whole, x, sample_weight=w, epochs=4)
    parts = new_flow()
    fit(parts, x, sample_weight=w, epochs=4, checkpoint=file, callback=lambda record: record["epoch"] < 2)
    fit(parts, x, sample_weight=w, epochs=4, checkpoint=file)
    assert_same_bits(flat(parts), flat(whole))
    for other in (w[::-1], None):
        with pytest.raises(ValueError, match="belongs to another run: its sample_weight is"):
            fit(new_flow(), x, sample_weight=other, epochs=4, checkpoint=file, weight_decay=None)
    plain = tmp_path / "plain.ckpt"
    fit(new_flow(), x, epochs=4, checkpoint=plain, weight_decay=0.1)
    with pytest.raises(ValueError, match="its sample_weight is null"):
        fit(new_flow(), x, sample_weight=w, epochs=4, checkpoint=plain, weight_decay=0.1)


def test_parts_of_a_stream_have_weights() -> None:
    x, w = curved(400), weights_of(400)
    whole, parts = new_flow(standardize=False), new_flow(standardize=False)
    options = {"validation": None, "schedule": "constant", "averaging": None, "sample_weight": w}
    fit(whole, x, epochs=2, adam=nvpflow.AdamState(), **options)
    adam = nvpflow.AdamState()
    for _ in range(2):
        fit(parts, x, epochs=1, adam=adam, **options)
    assert_same_bits(flat(parts), flat(whole))


def test_weights_train_the_density_that_rows_drawn_by_them_have() -> None:
    """A mixture: rows of N(0, 2) by weight are N(1, 1), and its log-density is known."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6000, 2)).astype(np.float32) * 2
    w = np.exp(-0.5 * ((x - 1) ** 2).sum(1) + 0.5 * (x**2).sum(1) / 4)
    target = (rng.normal(size=(20000, 2)) + 1).astype(np.float32)
    truth = -np.log(2 * np.pi) - 1
    flow = nvpflow.build(2, 4, (32,))
    history = flow.fit(x, sample_weight=w, epochs=30, progress=False)
    drawn = nvpflow.build(2, 4, (32,))
    drawn.fit(x[rng.choice(len(x), 6000, p=w / w.sum())], epochs=30, progress=False)
    found, other = (float(f.log_prob(target).mean()) for f in (flow, drawn))
    assert truth - 0.04 < found < truth + 0.02
    assert found > other - 0.03
    assert history.effective_rows < 0.6 * history.train_rows


def test_an_expected_gradient_is_that_of_resampling() -> None:
    """Over all draws of one row by weight, the mean gradient is the weighted one, but for rounding."""
    flow, x = far_from_identity("default", "float64"), curved(30, dtype="float64")
    w = weights_of(30)
    mean = sum(share * flow.nll_gradient(row[None])[1] for share, row in zip(w / w.sum(), x, strict=True))
    np.testing.assert_allclose(flow.nll_gradient(x, w)[1], mean, rtol=1e-9, atol=1e-13)


def test_two_scales_of_weights_are_one() -> None:
    flows = []
    for factor in (1.0, 2.0**-400, 2.0**400):
        flow = new_flow()
        fit(flow, curved(300), sample_weight=factor * weights_of(300))
        flows.append(flat(flow))
    for one, other in itertools.pairwise(flows):
        assert_same_bits(one, other)


def test_the_free_function_takes_weights() -> None:
    rng = np.random.default_rng(0)
    z, log_det, w = rng.normal(size=(50, 3)), rng.normal(size=50), weights_of(50, zeros=0.3)
    log_p = nvpflow.functional.log_probability(z, log_det)
    expected = -np.average(log_p, weights=w)
    z[w == 0] = np.inf
    assert nvpflow.functional.nll_loss(z, log_det, sample_weight=w) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="negative weight"):
        nvpflow.functional.nll_loss(z, log_det, sample_weight=-w)


# --------------------------------------------------------------------------------------------------- scikit-learn


def estimators() -> Any:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    import nvpflow.sklearn

    return nvpflow.sklearn


QUICK: dict[str, Any] = {"num_flows": 2, "hidden_sizes": (8,), "epochs": 10, "random_state": 0}


def test_an_estimator_fits_and_scores_by_weight() -> None:
    density = estimators().FlowDensity(**QUICK)
    X, w = curved(600), weights_of(600, zeros=0.2)
    counts = w > 0
    fitted = density.fit(X, sample_weight=w)
    log_p = fitted.score_samples(X)
    assert fitted.score(X, sample_weight=w) == pytest.approx(np.average(log_p, weights=w), rel=1e-12)
    assert fitted.score(X, None, np.ones(600)) == pytest.approx(fitted.score(X), rel=1e-12)
    other = estimators().FlowDensity(**QUICK).fit(X[counts], None, w[counts].tolist())
    assert_same_bits(other.score_samples(X), log_p)
    with pytest.raises(ValueError, match="negative weight"):
        density.fit(X, sample_weight=-w)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\), expected \(600,\)"):
        density.score(X, sample_weight=[1, 2, 3])


def test_rows_of_their_own_to_choose_the_epoch_by_have_weights() -> None:
    X, w = curved(400), weights_of(400)
    density = estimators().FlowDensity(**QUICK, averaging=None)
    density.fit(X, sample_weight=w, X_val=X[:100], sample_weight_val=w[:100])
    expected = -np.average(density.score_samples(X[:100]), weights=w[:100])
    assert density.history_.best_loss == pytest.approx(expected, rel=1e-5)
    for options, message in (
        ({"sample_weight": w, "X_val": X}, "sample_weight_val is missing, expected a weight for each row of X_val"),
        ({"X_val": X, "sample_weight_val": w}, "without sample_weight"),
        ({"sample_weight": w, "sample_weight_val": w}, "without X_val"),
    ):
        with pytest.raises(ValueError, match=message):
            density.fit(X, **options)


def test_a_detectors_threshold_is_a_quantile_by_weight() -> None:
    X, w = curved(800), weights_of(800, zeros=0.1)
    detector = estimators().FlowOutlierDetector(contamination=0.2, **QUICK).fit(X, sample_weight=w)
    below = detector.predict(X) < 0
    assert w[below].sum() / w.sum() == pytest.approx(0.2, abs=0.01)
    detector.partial_fit(X, sample_weight=w)
    below = detector.predict(X) < 0
    assert w[below].sum() / w.sum() == pytest.approx(0.2, abs=0.01)
    assert detector.history_.effective_rows < 800


def test_metadata_routing_hands_weights_on() -> None:
    sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from sklearn.model_selection import cross_validate

    X, w = curved(600), np.where(np.arange(600) % 2, 2.0, 1.0)
    with sklearn.config_context(enable_metadata_routing=True):
        density = estimators().FlowDensity(**QUICK).set_fit_request(sample_weight=True)
        density.set_score_request(sample_weight=True)
        found = cross_validate(density, X, params={"sample_weight": w}, cv=2, return_estimator=True)
    for estimator, score, half in zip(
        found["estimator"], found["test_score"], (slice(0, 300), slice(300, 600)), strict=True
    ):
        assert score == pytest.approx(np.average(estimator.score_samples(X[half]), weights=w[half]))
        assert estimator.history_.effective_rows < estimator.history_.train_rows


# -------------------------------------------------------------------------------------------------- command line


def run(*arguments: Any) -> int:
    from nvpflow import cli

    return cli.main([str(argument) for argument in arguments])


def table(path: Any, x: np.ndarray, w: np.ndarray, header: str = "a,b,c,d,w,e") -> Any:
    columns = np.column_stack([x[:, :4], w, x[:, 4:]])
    np.savetxt(path, columns, delimiter=",", header=header, comments="", fmt="%.9g")
    return path


def test_a_column_of_a_table_holds_the_weights(tmp_path, capsys) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    x, w = curved(400), np.round(weights_of(400, zeros=0.1), 6)
    data, model = table(tmp_path / "data.csv", x, w), tmp_path / "model.safetensors"
    few = ["--num-flows", 2, "--hidden-sizes", 8, "--epochs", 10, "--seed", 4]
    assert run("fit", data, "-o", model, "--weight-column", "w", *few) == 0
    said = capsys.readouterr().out
    assert "held-out log-likelihood by weight: " in said
    assert "400 rows x 5 columns" in said
    flow = nvpflow.load(model)
    assert flow.column_names == ("a", "b", "c", "d", "e")
    expected = nvpflow.build(5, 2, (8,), seed=4)
    read = np.loadtxt(data, delimiter=",", skiprows=1)
    rows = np.delete(read, 4, axis=1)
    expected.fit(rows, sample_weight=read[:, 4], epochs=10, seed=4, progress=False)
    assert_same_bits(flat(flow), flat(expected))
    valid = table(tmp_path / "valid.csv", x[:50], w[:50] + 1)
    assert run("fit", data, "-o", model, "--force", "--weight-column", "w", "--validation", valid, *few) == 0
    assert run("score", model, data, "--drop", "w", "-o", tmp_path / "scores.csv") == 0


def test_columns_of_weights_are_refused_in_words(tmp_path, capsys) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    data, model = table(tmp_path / "data.csv", curved(60), weights_of(60) - 10), tmp_path / "model.safetensors"
    for options, message in (
        (["--weight-column", "w"], "data.csv: 'w', the weights, is -8.16"),
        (["--weight-column", "w"], " in line 2, expected finite and at least 0"),
        (["--weight-column", "z"], "--weight-column: there is no column 'z'"),
        (["--weight-column", "w", "--drop", "w"], "--drop names 'w', that of the weights; leave it out there"),
        (["--weight-column", "w", "--context-columns", "w"], "--weight-column names 'w', a column of the context"),
    ):
        assert run("fit", data, "-o", model, *options) == 1
        assert message in capsys.readouterr().err
    assert not model.exists()
