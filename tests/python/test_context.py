"""Contexts in Python's calls: what may come in, what comes out, views, samples, cotangents and training."""

import copy
import gc
import pickle
import threading
import warnings

import numpy as np
import nvpflow
import pytest
from nvpflow.layers import MLP, Affine, Coupling, ResidualNet, Standardize
from oracle import assert_same_bits

D, C, B = 3, 2, 41
RNG = np.random.default_rng(20)
DTYPES = ("float32", "float64")


def scrambled(flow: nvpflow.Flow, seed: int = 0) -> nvpflow.Flow:
    """The flow with weights of a size that makes everything matter."""
    rng = np.random.default_rng(seed)
    values = {
        name: (value if name.endswith("sign") else value + 0.3 * rng.normal(size=value.shape)).astype(flow.spec.dtype)
        for name, value in flow.parameters().items()
    }
    flow.set_parameters(values)
    return flow


def new_flow(dtype: str = "float32", **options) -> nvpflow.Flow:
    return scrambled(nvpflow.build(D, 3, (17,), "tanh", context_size=C, dtype=dtype, **options))


def rows(count: int = B, size: int = D, dtype: str = "float32", seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(dtype)


X, CONTEXT = rows(), rows(B, C, seed=2)


# --------------------------------------------------------------------------------------------------- what may come in


@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 17, 1025])
def test_a_row_depends_on_its_own_context_alone(count) -> None:
    flow, x, c = new_flow(), rows(count), rows(count, C, seed=3)
    log_p = flow.log_prob(x, context=c)
    assert log_p.shape == (count,)
    for i in range(0, count, 100):
        assert_same_bits(flow.log_prob(x[i], context=c[i]), log_p[i])
        assert_same_bits(flow.log_prob(x[i : i + 1], context=c[i : i + 1]), log_p[i : i + 1])


KINDS = {
    "float64": lambda c: c.astype(np.float64),
    "integers": lambda c: np.round(c).astype(np.int64),
    "a list": lambda c: c.tolist(),
    "every second column": lambda c: np.repeat(c, 2, axis=1)[:, ::2],
    "Fortran's order": np.asfortranarray,
    "read-only": lambda c: np.frombuffer(c.tobytes(), c.dtype).reshape(c.shape),
    "booleans": lambda c: c > 0,
    "float16": lambda c: c.astype(np.float16),
    "big-endian": lambda c: c.astype(">f8"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_may_be_of_any_kind_of_numbers(kind, dtype) -> None:
    flow, x = new_flow(dtype), X.astype(dtype)
    given = KINDS[kind](CONTEXT)
    same = np.array(np.asarray(given), dtype=dtype)
    assert_same_bits(flow.log_prob(x, context=given), flow.log_prob(x, context=same))
    assert_same_bits(flow.condition(KINDS[kind](CONTEXT[3:4])[0]).log_prob(x), flow.log_prob(x, context=same[3]))


def test_frames_may_be_contexts() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(CONTEXT.astype(np.float64), columns=["a", "b"])
    flow = new_flow()
    assert_same_bits(flow.log_prob(X, context=frame), flow.log_prob(X, context=CONTEXT))
    assert_same_bits(flow.condition(frame.iloc[3]).log_prob(X), flow.log_prob(X, context=CONTEXT[3]))
    frame["a"] = "text"
    with pytest.raises(TypeError, match="column 'a' is str"):
        flow.log_prob(X, context=frame)


def test_results_are_of_the_library_of_x_and_samples_of_that_of_the_context() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    flow = new_flow()
    expected = flow.log_prob(X, context=CONTEXT)
    assert_same_bits(flow.log_prob(X, context=torch.from_numpy(CONTEXT)), expected)
    found = flow.log_prob(torch.from_numpy(X), context=CONTEXT)
    assert isinstance(found, torch.Tensor)
    assert_same_bits(found.numpy(), expected)
    drawn = flow.sample(5, seed=1, context=torch.from_numpy(CONTEXT))
    assert isinstance(drawn, torch.Tensor)
    assert_same_bits(drawn.numpy(), flow.sample(5, seed=1, context=CONTEXT))
    with pytest.raises(ValueError, match="context requires grad, which a Flow does not follow"):
        flow.log_prob(X, context=torch.from_numpy(CONTEXT).requires_grad_())


WRONG = {
    "none": (None, ValueError, r"context is missing, expected an array \(B, 2\) or \(2,\): the flow is a density p\("),
    "too few rows": (CONTEXT[:3], ValueError, r"context has shape \(3, 2\), expected \(41, 2\), one for each row, or"),
    "one row with two axes": (CONTEXT[:1], ValueError, r"context has shape \(1, 2\), expected \(41, 2\)"),
    "too wide": (rows(B, 3), ValueError, r"context has shape \(41, 3\), expected \(B, 2\) or, for one row, \(2,\)"),
    "too wide, one": (rows(1, 3)[0], ValueError, r"context has shape \(3,\), expected"),
    "three axes": (CONTEXT[None], ValueError, r"context has shape \(1, 41, 2\), expected"),
    "a number": (1.5, ValueError, r"context has shape \(\), expected"),
    "text": (
        ["a", "b"],
        TypeError,
        "context has dtype <U1, expected float32.* loss; encode text as columns of 0 and 1",
    ),
    "complex": (CONTEXT * 1j, TypeError, "context has dtype complex64"),
    "too large": (np.array([1e300, 0]), ValueError, r"context\[0\] is 1e\+300, expected a number that float32 holds"),
    "too large, a list": ([0, -1e300], ValueError, r"context\[1\] is -1e\+300, expected a number that float32 holds"),
    "too large, rows": (
        np.where(np.arange(2 * B).reshape(B, 2) > 4, 1e39, 0),
        ValueError,
        r"context\[2, 1\] is 1e\+39, ",
    ),
    "masked": (np.ma.masked_array(CONTEXT, CONTEXT > 0), ValueError, "context is a masked array with masked values"),
    "a str": ("abc", TypeError, "context is a str"),
    "a dict": ({"a": 1}, TypeError, r"context is a dict, .*: take the numbers by name, \[context\[name\] for"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_context_is_refused_by_every_call(wrong) -> None:
    value, error, message = WRONG[wrong]
    flow = new_flow()
    cotangent = np.ones(B, np.float32)
    for call in (
        flow.forward,
        flow.inverse,
        flow.log_prob,
        flow.log_probability,
        flow.nll,
        flow.nll_gradient,
        lambda x, context: flow.vjp(x, x, context=context),
        lambda x, context: flow.log_prob_vjp(x, cotangent, context=context),
    ):
        with pytest.raises(error, match=message):
            call(X, context=value)


def test_one_row_takes_one_context() -> None:
    flow = new_flow()
    way = r"; np.tile\(x, \(41, 1\)\) puts the row beside each context"
    with pytest.raises(ValueError, match=rf"context has shape \(41, 2\), expected \(2,\) beside one row{way}"):
        flow.log_prob(X[0], context=CONTEXT)
    with pytest.raises(ValueError, match=rf"context has shape \(41, 2\), expected \(1, 2\), .*, one for all{way}"):
        flow.log_prob(X[:1], context=CONTEXT)
    for x in (X[0], X[:1]):
        assert flow.log_prob(np.tile(x, (41, 1)), context=CONTEXT).shape == (41,)


def test_contexts_of_one_number_that_are_no_rows() -> None:
    flow = nvpflow.build(D, 2, (8,), context_size=1)
    with pytest.raises(
        ValueError, match=r"context has shape \(41,\), expected .*; np.reshape\(context, \(-1, 1\)\) makes"
    ):
        flow.log_prob(X, context=CONTEXT[:, 0])
    with pytest.raises(ValueError, match=r"context has shape \(\), expected .*; \[context\] makes a row of it"):
        flow.sample(3, context=0.5)
    with pytest.raises(
        ValueError, match=r"context has shape \(41,\), .* each row; np.reshape\(context, \(-1, 1\)\) makes"
    ):
        flow.fit(X, context=CONTEXT[:, 0], progress=False)
    with pytest.raises(
        ValueError, match=r"\[41, 1\], a row for each row, or \[1\], one for all; np.reshape\(context, "
    ):
        flow.certify(X, context=CONTEXT[:, 0])
    assert_same_bits(
        flow.log_prob(X, context=np.reshape(CONTEXT[:, 0], (-1, 1))), flow.log_prob(X, context=CONTEXT[:, :1])
    )


def test_a_flow_without_a_context_takes_none() -> None:
    flow = nvpflow.build(D, 2, (8,))
    assert_same_bits(flow.log_prob(X, context=None), flow.log_prob(X))
    assert flow.sample(2, seed=1, context=None).shape == (2, D)
    assert len(flow.vjp(X, X, context=None)) == 2
    for call in (
        lambda: flow.log_prob(X, context=CONTEXT),
        lambda: flow.sample(2, context=CONTEXT),
        lambda: flow.fit(X, context=CONTEXT, progress=False),
        lambda: flow.certify(X, context=CONTEXT),
        lambda: flow.condition(CONTEXT[0]),
    ):
        with pytest.raises(ValueError, match=r"context is .*, expected None: the flow has no context"):
            call()


def test_a_context_that_holds_nan_or_inf_spoils_its_row_alone() -> None:
    flow, c = new_flow(), CONTEXT.copy()
    c[5, 0], c[9, 1] = np.nan, -np.inf
    for found, expected in zip(
        (flow.log_prob(X, context=c), *flow.forward(X, context=c)),
        (flow.log_prob(X, context=CONTEXT), *flow.forward(X, context=CONTEXT)),
        strict=True,
    ):
        assert np.isnan(found[[5, 9]]).all()
        kept = np.delete(np.arange(B), [5, 9])
        assert_same_bits(found[kept], expected[kept])
    assert np.isnan(flow.condition(c[5]).sample(3, seed=1)).all()
    assert np.isnan(flow.sample(4, seed=1, context=c)[9]).all()


def test_out_is_written_and_must_not_overlap_the_context() -> None:
    flow = new_flow()
    out = np.full(B, np.nan, np.float32)
    assert flow.log_prob(X, out=out, context=CONTEXT) is out
    assert_same_bits(out, flow.log_prob(X, context=CONTEXT))
    memory = CONTEXT.copy()
    with pytest.raises(ValueError, match="out overlaps context"):
        flow.log_prob(X, out=memory.reshape(-1)[:B], context=memory)
    with pytest.raises(ValueError, match=r"out\[1\] \(log_det\) overlaps context"):
        flow.forward(X, out=(np.empty_like(X), memory.reshape(-1)[:B]), context=memory)
    with pytest.raises(ValueError, match=r"out\[2\] \(grad_context\) overlaps context"):
        flow.vjp(X, X, out=(np.empty_like(X), None, memory), context=memory)


def test_one_column_under_a_context() -> None:
    flow = scrambled(nvpflow.build(1, 3, (8,), "tanh", context_size=4, dtype="float64"))
    grid = np.linspace(-60, 60, 200_001)[:, None]
    for c in np.random.default_rng(0).normal(size=(3, 4)):
        density = np.exp(flow.log_prob(grid, context=c))
        assert np.trapezoid(density, grid[:, 0]) == pytest.approx(1, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_under_many_contexts(dtype) -> None:
    flow, c = new_flow(dtype), CONTEXT[:5]
    drawn = flow.sample(7, seed=3, start=11, context=c)
    assert drawn.shape == (5, 7, D)
    for m in range(5):
        assert_same_bits(drawn[m], flow.sample(7, seed=3, start=11 + 7 * m, context=c[m]))
        assert_same_bits(drawn[m], flow.condition(c[m]).sample(7, seed=3, start=11 + 7 * m))
    noise = flow._noise(35, 3)
    first = flow.sample(7, seed=3, context=c).reshape(35, D)
    assert_same_bits(first, flow.inverse(noise, context=np.repeat(c, 7, axis=0)))


@pytest.mark.parametrize(
    ("contexts", "n", "size"), [(50, 15, 40), (50, 16, 40), (9, 17, 40), (9, 127, 2), (9, 300, 2), (2, 4000, 40)]
)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_folding_contexts_of_many_rows_changes_no_bit(dtype, threads, contexts, n, size) -> None:
    """What a context of several rows makes is computed once, where that pays; the rows do not tell."""
    flow = scrambled(nvpflow.build(D, 3, (33,), "tanh", context_size=size, dtype=dtype))
    flow.num_threads = threads
    given, repeated = rows(contexts, size, dtype), np.repeat(rows(contexts, size, dtype), n, axis=0)
    noise = flow._noise(contexts * n, 3)
    drawn = flow.sample(n, seed=3, context=given)
    assert_same_bits(drawn.reshape(-1, D), flow.inverse(noise, context=repeated))
    wide = flow.sample(n, seed=3, context=given, dtype="float64")
    assert_same_bits(wide.reshape(-1, D), flow.inverse(noise, context=repeated, dtype="float64"))
    given[1, -1] = np.nan
    poisoned = flow.sample(n, seed=3, context=given)
    assert np.isnan(poisoned[1]).all()
    assert_same_bits(np.delete(poisoned, 1, axis=0), np.delete(drawn, 1, axis=0))


def test_empty_samples() -> None:
    flow = new_flow()
    assert flow.sample(0, context=CONTEXT[:5]).shape == (5, 0, D)
    assert flow.sample(3, context=CONTEXT[:0]).shape == (0, 3, D)
    assert flow.sample(0, context=CONTEXT[0]).shape == (0, D)
    assert flow.condition(CONTEXT[0]).sample(0).shape == (0, D)


def test_samples_into_out() -> None:
    flow = new_flow()
    out = np.full((4, 6, D), np.nan, np.float32)
    assert flow.sample(6, seed=1, out=out, context=CONTEXT[:4]) is out
    assert_same_bits(out, flow.sample(6, seed=1, context=CONTEXT[:4]))
    with pytest.raises(ValueError, match=r"out has shape \(24, 3\), expected \(4, 6, 3\)"):
        flow.sample(6, out=out.reshape(24, D), context=CONTEXT[:4])
    wide = flow.sample(6, seed=1, dtype="float64", context=CONTEXT[:4])
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, out, rtol=0, atol=1e-5)


def test_rows_that_a_seed_does_not_have() -> None:
    flow, view = new_flow(), new_flow().condition(CONTEXT[0])
    last = 2**63 - 12
    assert flow.sample(4, seed=1, start=last, context=CONTEXT[:3]).shape == (3, 4, D)
    for m in range(3):
        drawn = flow.sample(4, seed=1, start=last + 4 * m, context=CONTEXT[m])
        assert_same_bits(flow.sample(4, seed=1, start=last, context=CONTEXT[:3])[m], drawn)
    message = (
        rf"start is {last + 1}, expected at most {last}: of 12 rows in all the last would be beyond row 2\*\*63 - 1"
    )
    with pytest.raises(ValueError, match=message):
        flow.sample(4, seed=1, start=last + 1, context=CONTEXT[:3])
    assert view.sample(1, seed=1, start=2**63 - 1).shape == (1, D)
    assert view.sample(0, seed=1, start=2**63 - 1).shape == (0, D)
    with pytest.raises(ValueError, match="start is 9223372036854775807, expected at most 9223372036854775806: of 2"):
        view.sample(2, seed=1, start=2**63 - 1)


def test_samples_that_no_memory_holds() -> None:
    with pytest.raises(MemoryError, match=r"n is \d+ rows of 12 bytes for each of 41 contexts: more than can be"):
        new_flow().sample(2**58, context=CONTEXT)


# --------------------------------------------------------------------------------------------------------------- views


def test_a_view_follows_the_weights_of_its_flow() -> None:
    flow = new_flow()
    view = flow.condition(CONTEXT[0])
    before = view.log_prob(X)
    scrambled(flow, 7)
    after = view.log_prob(X)
    assert (before != after).all()
    assert_same_bits(after, flow.log_prob(X, context=CONTEXT[0]))
    flow.swap(new_flow())
    assert_same_bits(view.log_prob(X), before)


def test_a_view_keeps_its_flow_and_its_context() -> None:
    c = CONTEXT[0].copy()
    flow = new_flow()
    view = flow.condition(c)
    expected = flow.log_prob(X, context=c)
    assert view.flow is flow
    assert view.spec == flow.spec
    c[:] = 9
    del flow
    gc.collect()
    assert_same_bits(view.log_prob(X), expected)
    assert_same_bits(view.context, CONTEXT[0])
    with pytest.raises(ValueError, match="read-only"):
        view.context[0] = 1


def test_a_view_shows_what_its_flow_is_and_sets_none_of_it() -> None:
    flow = new_flow()
    flow.column_names = [f"x{i}" for i in range(D)]
    flow.context_names = [f"c{i}" for i in range(flow.context_size)]
    flow.fit_threshold(X, context=CONTEXT)
    flow.num_threads = 2
    view = flow.condition(CONTEXT[0])
    assert view.context_size == 0
    names = ("spec", "column_names", "context_names", "threshold", "num_parameters")
    for name in (*names, "device", "precision", "weights", "num_threads"):
        assert getattr(view, name) == getattr(flow, name)
        with pytest.raises(AttributeError):
            setattr(view, name, getattr(flow, name))
    for name in ("fit", "fit_threshold", "set_threshold", "save", "parameters"):
        assert not hasattr(view, name)


def test_a_view_says_what_is_of_its_flow() -> None:
    view = nvpflow.build(2, 1, (3,), context_size=1).condition([0.5])
    for name in ("fit", "fit_threshold", "astype"):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}'; it is of the flow: view\.flow\.{name}$"):
            getattr(view, name)
    with pytest.raises(AttributeError, match=r"no attribute 'fits'$"):
        _ = view.fits


def test_views_can_be_copied_and_pickled() -> None:
    view = new_flow().condition(CONTEXT[0])
    for other in (copy.copy(view), copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert_same_bits(other.log_prob(X), view.log_prob(X))
        assert_same_bits(other.context, view.context)
    assert "context=[0.189053, -0.522748]" in repr(view)


def test_a_view_has_the_methods_of_a_flow_without_a_context() -> None:
    view = new_flow().condition(CONTEXT[0])
    for name in ("log_prob", "log_probability", "forward", "inverse", "sample", "nll", "vjp", "log_prob_vjp"):
        with pytest.raises(TypeError, match=r"unexpected argument 'context'; a view of Flow.condition has its context"):
            getattr(view, name)(X, context=CONTEXT)
    assert len(view.vjp(X, X)) == len(view.log_prob_vjp(X, np.ones(B, np.float32))) == 2
    loss, gradient = view.nll_gradient(X)
    assert (loss, len(gradient)) == (view.nll(X), view.flow.num_parameters)
    with pytest.raises(ValueError, match=r"wrt is 'context', expected .*\(the call has no context=\)"):
        view.vjp(X, X, wrt="context")


def test_a_view_that_was_never_initialised() -> None:
    for kind in (nvpflow.ConditionedFlow, nvpflow._core.ConditionedFlow):
        view = kind.__new__(kind)
        for use in (lambda v: v.log_prob(X), lambda v: v.nll(X), lambda v: v.flow, lambda v: v.context):
            with pytest.raises(
                TypeError, match=r"this ConditionedFlow was never initialised: call ConditionedFlow\.__in"
            ):
                use(view)
    for wrong in (CONTEXT[:0], CONTEXT[:6]):
        with pytest.raises(ValueError, match="context has two axes"):
            nvpflow._core.ConditionedFlow(new_flow(), wrong)
    with pytest.raises(TypeError, match="flow is int, expected a Flow"):
        nvpflow._core.ConditionedFlow(3, CONTEXT[0])
    for wrong in (CONTEXT, None, [1.0], np.zeros(3)):
        with pytest.raises(ValueError, match="context"):
            new_flow().condition(wrong)
    with pytest.raises(TypeError, match=r"flow is .*, expected a Flow"):
        nvpflow.ConditionedFlow(X, CONTEXT[0])


def test_the_number_of_a_context_that_calls_take() -> None:
    flow = new_flow()
    assert flow.context_size == flow.spec.context_size == C
    assert nvpflow.build(D, 2, (8,)).context_size == 0
    view = flow.condition(CONTEXT[0])
    assert (view.context_size, view.flow.context_size) == (0, C)
    with pytest.raises(AttributeError):
        flow.context_size = 3


def test_a_view_is_made_once() -> None:
    view = new_flow().condition(CONTEXT[0])
    with pytest.raises(
        TypeError, match=r"ConditionedFlow\.__init__\(\) was called on an object that has been made already"
    ):
        view.__init__(new_flow(), CONTEXT[1])
    assert_same_bits(view.context, CONTEXT[0])


def test_views_in_many_threads_while_weights_change() -> None:
    flow = new_flow()
    states = [dict(flow.parameters()), dict(scrambled(new_flow(), 5).parameters())]
    states = [{name: value.copy() for name, value in state.items()} for state in states]
    x = rows(500)
    expected = []
    for state in states:
        flow.set_parameters(state)
        expected.append(flow.log_prob(x, context=CONTEXT[0]))
    view, wrong, stop = flow.condition(CONTEXT[0]), [], threading.Event()

    def score() -> None:
        while not stop.is_set():
            found = view.log_prob(x)
            if not any(np.array_equal(found, one) for one in expected):
                wrong.append(found)

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        flow.set_parameters(states[i % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------------------------------------------------- cotangents


def differences(function, at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function."""
    found = np.empty_like(at)
    for i in np.ndindex(at.shape):
        moved = [at.copy(), at.copy()]
        moved[0][i] += step
        moved[1][i] -= step
        found[i] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return found


GATED = ResidualNet(9, activation="tanh", context_gates=True)
BOTH = {"scale_network": MLP((9,), "tanh"), "translation_network": MLP((5,), "silu")}
NETWORKS = {
    "mlp": {},
    "lu": {"mixing": "lu", "actnorm": True},
    "residual": {"layers": [Standardize(), Coupling("odd", Affine(), GATED), Coupling("even", Affine(), GATED)]},
    "two networks": {"layers": [Coupling("odd", Affine(), **BOTH)]},
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("one_for_all", [False, True])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_cotangents_of_the_context(kind, one_for_all, direction) -> None:
    options = {"standardize_context": True, "dtype": "float64", "context_size": C} | NETWORKS[kind]
    if "layers" not in options:
        options |= {"num_flows": 2, "hidden_sizes": (9,), "activation": "tanh"}
    flow = scrambled(nvpflow.build(D, **options), 3)
    x, c = rows(7, dtype="float64"), rows(7, C, "float64", seed=4)
    c = c[2] if one_for_all else c
    g_out, g_log_det = rows(7, dtype="float64", seed=5), rows(7, 1, "float64", seed=6)[:, 0]

    def loss(context: np.ndarray) -> float:
        if direction == "forward":
            out, log_det = flow.forward(x, context=context)
        else:
            out, log_det = flow.inverse(x, with_log_det=True, context=context)
        return float((out * g_out).sum() + (log_det * g_log_det).sum())

    _, _, of_context = flow.vjp(x, g_out, g_log_det, direction=direction, context=c)
    assert of_context.shape == c.shape
    np.testing.assert_allclose(of_context, differences(loss, c), rtol=1e-6, atol=1e-7)
    if direction == "forward":
        _, _, of_context = flow.log_prob_vjp(x, g_log_det, context=c)
        expected = differences(lambda context: float(flow.log_prob(x, context=context) @ g_log_det), c)
        np.testing.assert_allclose(of_context, expected, rtol=1e-6, atol=1e-7)


def test_wrt_names_what_is_wanted() -> None:
    flow = new_flow()
    cotangent = np.ones(B, np.float32)
    every = flow.log_prob_vjp(X, cotangent, context=CONTEXT)
    names = ("x", "parameters", "context")
    for wanted in ("all", "both", *names, (), ("x", "context"), ("context",), ("parameters", "x")):
        named = {"all": names, "both": names[:2]}.get(wanted, wanted if isinstance(wanted, tuple) else (wanted,))
        found = flow.log_prob_vjp(X, cotangent, wrt=wanted, context=CONTEXT)
        assert len(found) == 3
        for name, value, expected in zip(names, found, every, strict=True):
            if name not in named:
                assert value is None
            elif name == "parameters":  # what is wanted may change the order of their sums
                np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
            else:
                assert_same_bits(value, expected)
    for wrong, error, message in (
        ("contexts", ValueError, "wrt is 'contexts', expected 'all', 'both', 'x', 'parameters', 'context' or a tuple"),
        (3, TypeError, "wrt is int, expected a str or a tuple of them"),
        (("x", 3), TypeError, "wrt is int, expected a str or a tuple of them"),
    ):
        with pytest.raises(error, match=message):
            flow.log_prob_vjp(X, cotangent, wrt=wrong, context=CONTEXT)


def test_cotangents_into_out() -> None:
    flow = new_flow()
    cotangent = np.ones(B, np.float32)
    for c in (CONTEXT, CONTEXT[0]):
        outs = (np.empty_like(X), np.empty(flow.num_parameters, np.float32), np.full_like(c, np.nan))
        found = flow.log_prob_vjp(X, cotangent, out=outs, context=c)
        for one, out, expected in zip(found, outs, flow.log_prob_vjp(X, cotangent, context=c), strict=True):
            assert one is out
            assert_same_bits(out, expected)
    with pytest.raises(TypeError, match="out is a tuple of 2, expected a tuple of three arrays, for grad_x"):
        flow.log_prob_vjp(X, cotangent, out=outs[:2], context=CONTEXT)


def test_cotangents_of_no_rows() -> None:
    flow = new_flow()
    none = np.empty(0, np.float32)
    for c, shape in ((CONTEXT[:0], (0, C)), (CONTEXT[0], (C,))):
        of_x, of_parameters, of_context = flow.log_prob_vjp(X[:0], none, context=c)
        assert of_x.shape == (0, D)
        assert not of_parameters.any()
        assert of_context.shape == shape
        assert not of_context.any()


# ------------------------------------------------------------------------------------------------------------ training


SHORT = pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # it is, after so few epochs


def simulated(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """x = A c + noise, its contexts with an offset, and the entropy of the noise."""
    rng = np.random.default_rng(seed)
    c = rng.normal(50, 4, size=(count, C))
    deviations = np.array([0.5, 2.0, 1.0])
    x = (c - 50) @ np.array([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]]) + rng.normal(size=(count, D)) * deviations
    return x, c, float(D / 2 * np.log(2 * np.pi * np.e) + np.log(deviations).sum())


def test_fit_learns_the_conditional_density() -> None:
    x, c, entropy = simulated(4000, 0)
    test_x, test_c, _ = simulated(4000, 1)
    flow = nvpflow.build(D, 4, (32,), context_size=C)
    history = flow.fit(x, context=c, epochs=40, progress=False)
    assert flow.nll(test_x, context=test_c) == pytest.approx(entropy, abs=0.12)
    assert history.validation_rows == 400
    parameters = flow.parameters()
    np.testing.assert_allclose(parameters["context.mean"], c.mean(axis=0), rtol=1e-2)
    np.testing.assert_allclose(np.exp(parameters["context.log_std"]), c.std(axis=0), rtol=5e-2)
    assert flow.certify(test_x[:500], context=test_c[:500]).verdict == "accurate"
    drawn = flow.condition(test_c[0]).sample(20_000, seed=1)
    centre = (test_c[0] - 50) @ np.array([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]])
    np.testing.assert_allclose(drawn.mean(axis=0), centre, atol=0.5)


@SHORT
def test_training_does_not_depend_on_threads_or_on_who_standardizes() -> None:
    x, c, _ = simulated(300, 2)
    found = []
    for threads in (1, 3):
        flow = nvpflow.build(D, 2, (8,), context_size=C)
        flow.fit(x, context=c, epochs=2, num_threads=threads, progress=False)
        found.append(flow)
    assert found[0] == found[1]


@SHORT
def test_validation_with_its_context() -> None:
    x, c, _ = simulated(300, 3)
    flow = nvpflow.build(D, 2, (8,), context_size=C)
    history = flow.fit(x[:200], context=c[:200], validation=(x[200:], c[200:]), epochs=3, progress=False)
    assert history.validation_rows == 100
    assert flow.nll(x[200:], context=c[200:]) == pytest.approx(history.best_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"context is missing, expected \[300, 2\], a row for each row: the flow is a density"),
        ({"context": 0}, r"context has shape \(\), expected \[300, 2\]"),
        ({"context": np.zeros(2)}, r"context has shape \(2,\), expected \[300, 2\]"),
        ({"context": np.zeros((299, 2))}, r"context has shape \(299, 2\), expected \[300, 2\]"),
        ({"context": np.full((300, 2), np.nan)}, "context .*NaN"),
        (
            {"context": np.zeros((300, 2)), "validation": np.zeros((9, 3))},
            "validation holds rows without their context",
        ),
        (
            {"context": np.zeros((300, 2)), "validation": [np.zeros((9, 3)), np.zeros((9, 2))]},
            "validation is a list of 2, expected a tuple of two",
        ),
        (
            {"context": np.zeros((300, 2)), "validation": (0.2, np.zeros((9, 2)))},
            "validation is a tuple of a share and a context",
        ),
        (
            {"context": np.zeros((300, 2)), "validation": (np.zeros((9, 3)),)},
            "validation is a tuple of 1, expected a tuple of two",
        ),
        (
            {"context": np.zeros((300, 2)), "validation": (np.zeros((9, 3)), np.zeros((8, 2)))},
            r"the context of validation has shape \(8, 2\), expected \[9, 2\]",
        ),
    ],
)
def test_a_wrong_context_is_refused_by_fit(arguments, message) -> None:
    x, _, _ = simulated(300, 4)
    flow = nvpflow.build(D, 2, (8,), context_size=C)
    before = copy.copy(flow)
    with pytest.raises(ValueError, match=message):
        flow.fit(x, progress=False, epochs=1, **arguments)
    assert flow == before


@SHORT
def test_fit_warns_of_constant_and_far_contexts() -> None:
    x, c, _ = simulated(300, 5)
    spoilt = c.copy()
    spoilt[7, 1] = 1e30
    with pytest.warns(nvpflow.DataWarning, match="context: column 2 has far rows that make its standard deviation"):
        nvpflow.build(D, 2, (8,), context_size=C).fit(x, context=spoilt, epochs=1, progress=False)
    with pytest.warns(
        nvpflow.DataWarning, match="context: column 1 is constant, 0 in all rows: the flow learns nothing of"
    ):
        nvpflow.build(D, 2, (8,), context_size=C).fit(x, context=c * [0, 1], epochs=1, progress=False)
    one_hot = np.eye(2)[np.random.default_rng(0).integers(0, 2, 300)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", nvpflow.DataWarning)
        nvpflow.build(D, 2, (8,), context_size=C).fit(x, context=one_hot, epochs=1, validation=None, progress=False)


def test_a_context_of_a_spread_that_the_dtype_cannot_divide_by() -> None:
    x, c, _ = simulated(300, 8)
    flow = nvpflow.build(D, 2, (8,), context_size=C)
    flow.initialize_from(x, context=(c - 50) * 1e-40)
    assert not flow.parameters()["context.log_std"].any()
    assert np.isfinite(flow.log_prob(x, context=(c - 50) * 1e-40)).all()


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")
def test_fit_warns_where_one_column_is_not_normal() -> None:
    rng = np.random.default_rng(3)
    c = rng.normal(size=(2000, 1))
    flow = nvpflow.build(1, 2, (8,), context_size=1)
    with pytest.warns(nvpflow.DataWarning, match="of this flow is a normal distribution, whose mean and width depend"):
        flow.fit(c + rng.exponential(size=(2000, 1)), context=c, epochs=3, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"p\(x \| context\) of this flow")
        nvpflow.build(1, 2, (8,), context_size=1).fit(
            c + rng.normal(size=(2000, 1)), context=c, epochs=8, progress=False
        )
        flow = nvpflow.build(1, 2, (8,), context_size=1, transform="spline")
        flow.fit(c + rng.exponential(size=(2000, 1)), context=c, epochs=3, progress=False)


def test_rows_of_frames_are_checked_by_their_names() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    flow = new_flow()
    flow.context_names = ["p", "q"]
    flow.column_names = ["a", "b", "c"]
    row = pandas.Series({"p": 1.0, "q": 2.0})
    assert_same_bits(flow.condition(row).context, np.float32([1, 2]))
    for wrong in (row[["q", "p"]], row.rename({"q": "z"})):
        with pytest.raises(ValueError, match=r"context (has columns in another order|lacks columns)"):
            flow.condition(wrong)
        with pytest.raises(ValueError, match=r"context (has columns in another order|lacks columns)"):
            flow.log_prob(X, context=wrong)
    with pytest.raises(ValueError, match="x has columns in another order"):
        flow.log_prob(pandas.Series({"b": 1.0, "a": 2.0, "c": 0.0}), context=row)


@SHORT
def test_fit_warns_of_a_context_whose_digits_are_lost() -> None:
    x, c, _ = simulated(300, 5)
    flow = nvpflow.build(D, 2, (8,), context_size=C)
    with pytest.warns(nvpflow.DataWarning, match="context: column 2 keeps few digits, neighbouring numbers of float32"):
        flow.fit(x, context=c + np.array([0, 1e9]), epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nvpflow.DataWarning)  # and there are no validation rows to judge it by
        nvpflow.build(D, 2, (8,), context_size=C, dtype="float64").fit(
            x, context=c + np.array([0, 1e9]), epochs=1, validation=None, progress=False
        )


def test_fit_warns_where_a_linear_gaussian_of_the_context_is_better() -> None:
    x, c, _ = simulated(2000, 6)
    flow = nvpflow.build(D, 1, (2,), context_size=C)
    with pytest.warns(nvpflow.DataWarning, match="under a Gaussian of the training rows and their context"):
        flow.fit(x, context=c, epochs=1, progress=False)


@SHORT
def test_fit_takes_contexts_of_bools() -> None:
    x, c, _ = simulated(300, 5)
    flows = [nvpflow.build(D, 2, (8,), context_size=C) for _ in range(2)]
    for flow, context in zip(flows, (c > 50, (c > 50).astype(np.float32)), strict=True):
        flow.fit(x, context=context, validation=(x[:50], context[:50]), epochs=2, progress=False)
        flow.certify(x, context=context)
        flow.initialize_from(x, context=context)
    assert flows[0] == flows[1]


@SHORT
def test_checkpoints_with_a_context(tmp_path) -> None:
    x, c, _ = simulated(300, 7)
    whole = nvpflow.build(D, 2, (8,), context_size=C)
    whole.fit(x, context=c, epochs=4, progress=False)
    part = nvpflow.build(D, 2, (8,), context_size=C)
    options = {"context": c, "epochs": 4, "progress": False, "checkpoint": tmp_path / "run"}
    part.fit(x, callback=lambda record: record["epoch"] < 2, **options)
    with pytest.raises(ValueError, match="belongs to another run: its context is"):
        nvpflow.build(D, 2, (8,), context_size=C).fit(x, **{**options, "context": c + 1})
    part = nvpflow.build(D, 2, (8,), context_size=C)
    part.fit(x, **options)
    assert part == whole


def test_thresholds_and_blame_under_a_context() -> None:
    flow = new_flow()
    threshold = flow.fit_threshold(X, 0.5, context=CONTEXT)
    assert threshold.log_p == pytest.approx(float(np.median(flow.log_prob(X, context=CONTEXT))), rel=1e-6)
    found = nvpflow.blame(flow.condition(CONTEXT[0]), X[:3])
    assert found.shape == (3, D)
    assert (found >= 0).all()
    with pytest.raises(ValueError, match=r"flow has a context, .*expected flow.condition\(context\)"):
        nvpflow.blame(flow, X)


def test_certificates_under_a_context() -> None:
    flow = new_flow()
    c = CONTEXT.copy()
    c[4] = np.nan
    found = flow.certify(X, context=c)
    assert found.verdict == "accurate"
    assert (found.rows, found.nonfinite_rows, found.first_nonfinite_row) == (B, 1, 4)
    assert found.log_det.relative < 1e-5
    assert (found.round_trip_bound, found.no_bound) == (None, "it is not derived for flows with a context")
    assert "  bound on x -> z -> x, by weights  none: it is not derived for flows with a context\n" in f"{found}\n"
    view = flow.condition(CONTEXT[0]).certify(X)
    assert view.to_json() == flow.certify(X, context=CONTEXT[0]).to_json()
    assert flow.certify(X, context=np.full(C, np.nan)).nonfinite_rows == B


def test_files_keep_what_a_conditional_flow_is(tmp_path) -> None:
    flow = new_flow(mixing="lu")
    flow.save(tmp_path / "flow")
    other = nvpflow.load(tmp_path / "flow")
    assert other == flow
    assert_same_bits(other.log_prob(X, context=CONTEXT), flow.log_prob(X, context=CONTEXT))
    assert_same_bits(
        flow.astype("float64").log_prob(X.astype(np.float64), context=CONTEXT).astype(np.float32),
        flow.astype("float64").log_prob(X, context=CONTEXT.astype(np.float64)).astype(np.float32),
    )
