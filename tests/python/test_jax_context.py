"""nvpflow.jax with a context: values, gradients that reach it, vmap, samples, what a program hands over, misuse."""

from __future__ import annotations

import numpy as np
import nvpflow
import pytest
from nvpflow.layers import (
    MLP,
    ActNorm,
    Affine,
    Coupling,
    ElementSpline,
    LULinear,
    Permutation,
    ResidualNet,
    Spline,
    Standardize,
)
from oracle import assert_same_bits, finite_difference
from test_context import scrambled
from test_general_layers import make_case

jax = pytest.importorskip("jax", minversion="0.5", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
import nvpflow.jax as nj  # noqa: E402

D, C, B = 3, 2, 6
KINDS = ("log_prob", "forward", "inverse")
DTYPES = ("float32", "float64")
GENERAL = (
    Standardize(),
    ActNorm(),
    Coupling("odd", Affine("softsign"), ResidualNet(5, num_blocks=2, activation="tanh", context_gates=True)),
    LULinear(),
    Coupling("all", Affine(), MLP((6,), "silu"), inverse=True),
    Permutation((2, 0, 1)),
)
# Of the random flows these have a context.
WITH_CONTEXT = (0, 2, 4, 6, 7)
SPLINES = (
    Coupling("even", Spline(4), MLP((6,), "tanh")),
    ElementSpline("all", Spline(3, 2.5, boundary="free", tails="slope"), inverse=True),
    Coupling("all", Spline(5, derivative="exp"), MLP((4,), "silu"), inverse=True),
)
MODELS = {
    "plain": {},
    "general": {"layers": GENERAL, "standardize_context": True},
    "spline": {"layers": SPLINES},
}


@pytest.fixture(autouse=True)
def _x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def new_flow(model: str = "general", dtype: str = "float64") -> nvpflow.Flow:
    options = {"num_flows": 2, "hidden_sizes": (7,), "activation": "tanh"} if model == "plain" else {}
    return scrambled(nvpflow.build(D, context_size=C, dtype=dtype, **options, **MODELS[model]))


def numbers(*shape: int, dtype: str = "float64", seed: int = 1) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def ours(spec, kind, parameters, x, context):
    """All results of a kind of call, as a tuple."""
    if kind == "inverse":
        return nj.inverse(spec, parameters, x, context=context, with_log_det=True)
    results = getattr(nj, kind)(spec, parameters, x, context=context)
    return results if isinstance(results, tuple) else (results,)


def of_flow(flow, kind, x, context):
    """The same of the flow itself."""
    more = {"with_log_det": True} if kind == "inverse" else {}
    results = getattr(flow, kind)(np.asarray(x), context=np.asarray(context), **more)
    return results if isinstance(results, tuple) else (results,)


def weighted(results):
    """A scalar in which every element of the results has a weight of its own."""
    return sum((r * jnp.cos(1 + jnp.arange(r.size, dtype=r.dtype)).reshape(r.shape)).sum() for r in results)


def assert_close(actual, expected, rtol=1e-10, what=""):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * (1 + np.abs(e).max(initial=0)), err_msg=what)


def calls(function, *arguments):
    """The calls of handlers in a function's program: shapes of the first two inputs and of all results."""

    def walk(program):
        for equation in program.eqns:
            if equation.primitive.name in ("ffi_call", "nvpflow_values"):
                yield [v.aval.shape for v in equation.invars[:2]], [v.aval.shape for v in equation.outvars]
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [1, 19])
def test_values_are_the_flows_bit_for_bit(model, dtype, jit, count):
    flow, x = new_flow(model, dtype), numbers(count, D, dtype=dtype)
    parameters = nj.parameters(flow)
    for context in (numbers(count, C, dtype=dtype, seed=2), numbers(C, dtype=dtype, seed=3)):
        for kind in KINDS:
            function = lambda p, x, c, kind=kind: ours(flow.spec, kind, p, x, c)  # noqa: E731
            results = (jax.jit(function) if jit else function)(parameters, x, context)
            for result, expected in zip(results, of_flow(flow, kind, x, context), strict=True):
                assert result.dtype == dtype
                assert_same_bits(np.asarray(result), expected)
        nll = nj.nll(flow.spec, parameters, x, context=context)
        np.testing.assert_allclose(nll, flow.nll(np.asarray(x), context=np.asarray(context)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0), (2, 1, 3)])
def test_any_leading_axes(shape):
    flow = new_flow()
    parameters, x = nj.parameters(flow), numbers(*shape, D)
    for context in (numbers(*shape, C, seed=2), numbers(C, seed=3)):
        log_p = nj.log_prob(flow.spec, parameters, x, context=context)
        assert log_p.shape == shape
        every = np.broadcast_to(np.asarray(context), (*shape, C)).reshape(-1, C)
        assert_same_bits(np.asarray(log_p).reshape(-1), flow.log_prob(np.asarray(x).reshape(-1, D), context=every))
        gradient = jax.grad(lambda c: weighted(ours(flow.spec, "forward", parameters, x, c)))(context)
        assert gradient.shape == context.shape
        assert x.size or not gradient.any()


def test_a_context_is_rounded_to_the_flows_dtype():
    flow, x = new_flow(dtype="float32"), numbers(B, D, dtype="float32")
    parameters, context = nj.parameters(flow), numbers(B, C, seed=2)
    for given in (
        context,
        context.astype("float16"),
        context.astype("bfloat16"),
        (3 * context).astype(int),
        context > 0,
    ):
        expected = flow.log_prob(np.asarray(x), context=np.asarray(given.astype("float32")))
        assert_same_bits(np.asarray(nj.log_prob(flow.spec, parameters, x, context=given)), expected)
    of_context = jax.grad(lambda c: nj.nll(flow.spec, parameters, x, context=c))(context)
    assert of_context.dtype == "float64"


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [False, True], ids=["each", "one"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_against_finite_differences(model, kind, one):
    flow = new_flow(model)
    parameters, x, context = nj.parameters(flow), numbers(3, D), numbers(*(() if one else (3,)), C, seed=2)
    loss = jax.jit(lambda p, x, c: weighted(ours(flow.spec, kind, p, x, c)))
    of_parameters, of_x, of_context = jax.grad(loss, argnums=(0, 1, 2))(parameters, x, context)
    expected = finite_difference(lambda c: float(loss(parameters, x, c)), np.asarray(context))
    np.testing.assert_allclose(of_context, expected, rtol=1e-7, atol=1e-8)
    expected = finite_difference(lambda x: float(loss(parameters, x, context)), np.asarray(x))
    np.testing.assert_allclose(of_x, expected, rtol=1e-7, atol=1e-8)
    for name, value in parameters.items():
        if name.endswith("sign"):
            continue
        expected = finite_difference(lambda v, n=name: float(loss({**parameters, n: v}, x, context)), np.asarray(value))
        np.testing.assert_allclose(of_parameters[name], expected, rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("seed", WITH_CONTEXT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_layers_are_the_flows_bit_for_bit(seed, dtype):
    case = make_case(seed, dtype)
    flow, x = case.flow, case.x
    parameters = nj.parameters(flow)
    for context in (case.context, case.context[3]):
        z, log_det = flow.forward(x, context=context)
        of_x, flat, of_context = flow.vjp(x, z, log_det, context=context)
        pull = jax.vjp(lambda p, x, c: nj.forward(flow.spec, p, x, context=c), parameters, x, context)[1]
        found, *others = pull((jnp.array(z), jnp.array(log_det)))
        assert_same_bits(np.concatenate([np.ravel(found[name]) for name in flow.parameters()]), flat)
        for result, expected in zip(others, (of_x, of_context), strict=True):
            assert_same_bits(np.asarray(result), expected)


@pytest.mark.parametrize("one", [False, True], ids=["each", "one"])
def test_an_embedding_network_trains_through_the_context(one):
    flow = new_flow()
    parameters, x, seen = nj.parameters(flow), numbers(B, D), numbers(*(() if one else (B,)), 4, seed=2)
    weights = (numbers(4, 5, seed=3), numbers(5, C, seed=4))

    def loss(nll, parameters, weights):
        return nll(parameters, jnp.tanh(seen @ weights[0]) @ weights[1])

    def mean(p, c):
        return -nj.log_prob(flow.spec, p, x, context=c).mean()

    def nll(p, c):
        return nj.nll(flow.spec, p, x, context=c)

    found = jax.jit(jax.grad(lambda p, w: loss(nll, p, w), argnums=(0, 1)))(parameters, weights)
    assert_close(found, jax.grad(lambda p, w: loss(mean, p, w), argnums=(0, 1))(parameters, weights))
    for i in range(2):
        at = lambda w, i=i: (w, weights[1]) if i == 0 else (weights[0], w)  # noqa: E731
        expected = finite_difference(lambda w, at=at: float(loss(nll, parameters, at(w))), np.asarray(weights[i]))
        np.testing.assert_allclose(found[1][i], expected, rtol=1e-7, atol=1e-8)

    def step(both, _):
        value, gradient = jax.value_and_grad(lambda both: loss(nll, *both))(both)
        return jax.tree.map(lambda v, g: v - 0.02 * g, both, gradient), value

    losses = jax.jit(lambda: jax.lax.scan(step, (parameters, weights), None, length=20))()[1]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("argnums", "rows", "flat", "contexts"),
    [(0, False, True, False), (1, True, False, False), (2, False, False, True), ((0, 2), False, True, True)],
)
def test_only_wanted_gradients_are_formed(kind, argnums, rows, flat, contexts):
    flow = new_flow()
    wanted = [
        (B, D) if rows else (0,),
        (flow.num_parameters,) if flat else (0,),
        (B, C) if contexts else (0,),
    ]
    program = jax.grad(lambda p, x, c: ours(flow.spec, kind, p, x, c)[0].sum(), argnums=argnums)
    formed = calls(program, nj.parameters(flow), numbers(B, D), numbers(B, C, seed=2))
    assert [results for _, results in formed][1:] == [wanted]


def test_a_training_step_is_one_call():
    flow, x, context = new_flow(), numbers(B, D), numbers(B, C, seed=2)
    parameters = nj.parameters(flow)
    wanted = {
        (0,): [(), (flow.num_parameters,)],
        (0, 2): [(), (B,), (0,), (flow.num_parameters,), (B, C)],
        (0, 1): [(), (B,), (B, D), (flow.num_parameters,), (0,)],
    }
    for argnums, results in wanted.items():
        step = jax.value_and_grad(lambda p, x, c: 3 * nj.nll(flow.spec, p, x, context=c), argnums=argnums)
        assert [shapes for _, shapes in calls(step, parameters, x, context)] == [results]
        value, found = jax.jit(step)(parameters, x, context)
        np.testing.assert_allclose(value, 3 * flow.nll(np.asarray(x), context=np.asarray(context)), rtol=1e-14)
        mean = jax.grad(lambda p, x, c: -3 * nj.log_prob(flow.spec, p, x, context=c).mean(), argnums=argnums)
        assert_close(found, mean(parameters, x, context), 1e-13)


def test_second_derivatives_are_refused():
    flow = new_flow()
    parameters, x, context = nj.parameters(flow), numbers(B, D), numbers(B, C)
    slope = jax.grad(lambda c: nj.log_prob(flow.spec, parameters, x, context=c).sum())
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda c: slope(c).sum())(context)


# ---- vmap ------------------------------------------------------------------------------------------------------------

# Shapes of x and of the context, what vmap is over, and the shapes that the one call then has.
BATCHES = {
    "rows and contexts": ((5, D), (5, C), (0, 0), ((5, D), (5, C))),
    "rows": ((5, D), (C,), (0, None), ((5, D), (1, C))),
    "contexts": ((D,), (5, C), (None, 0), ((5, D), (5, C))),
    "rows, second axis": ((4, 5, D), (4, C), (1, None), ((20, D), (20, C))),
    "batches, a context for each": ((5, 4, D), (5, C), (0, 0), ((20, D), (5, C))),
    "batches, a context for each row": ((5, 4, D), (5, 4, C), (0, 0), ((20, D), (20, C))),
    "batches under one context": ((5, 4, D), (C,), (0, None), ((20, D), (1, C))),
    "contexts of a batch": ((4, D), (5, C), (None, 0), ((20, D), (5, C))),
    "contexts, last axis": ((4, D), (4, C, 5), (None, 2), ((20, D), (20, C))),
}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_one_call(kind, case):
    shape, of_context, axes, expected = BATCHES[case]
    flow = new_flow()
    parameters, x, context = nj.parameters(flow), numbers(*shape), numbers(*of_context, seed=2)

    def moved(i):
        each_x = x if axes[0] is None else jnp.moveaxis(x, axes[0], 0)[i]
        return each_x, context if axes[1] is None else jnp.moveaxis(context, axes[1], 0)[i]

    function = lambda x, c: ours(flow.spec, kind, parameters, x, c)  # noqa: E731
    batched = jax.vmap(function, in_axes=axes)
    one_by_one = [function(*moved(i)) for i in range(5)]
    for found, each in zip(batched(x, context), zip(*one_by_one, strict=True), strict=True):
        assert_same_bits(np.asarray(found), np.stack(each))
    assert [tuple(inputs) for inputs, _ in calls(batched, x, context)] == [expected]

    gradient = jax.grad(lambda x, c: weighted(function(x, c)), argnums=(0, 1))
    batched = jax.vmap(gradient, in_axes=axes)
    one_by_one = [gradient(*moved(i)) for i in range(5)]
    for found, each in zip(jax.jit(batched)(x, context), zip(*one_by_one, strict=True), strict=True):
        assert_close(found, np.stack(each), 1e-13)
    assert len(calls(batched, x, context)) == 2


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_vmap_is_one_call(kind, case):
    shape, of_context, axes, _ = BATCHES[case]
    flow = new_flow()
    parameters, x, context = nj.parameters(flow), numbers(*shape), numbers(*of_context, seed=2)

    def slices(i):
        each_x = x if axes[0] is None else jnp.moveaxis(x, axes[0], 0)[i]
        return each_x, context if axes[1] is None else jnp.moveaxis(context, axes[1], 0)[i]

    def loss(p, x, c):
        results = jax.vmap(lambda x, c: ours(flow.spec, kind, p, x, c), in_axes=axes)(x, c)
        return weighted([r.sum(0) for r in results])

    def one_by_one(p):
        each = [ours(flow.spec, kind, p, *slices(i)) for i in range(5)]
        return weighted([jnp.stack(r).sum(0) for r in zip(*each, strict=True)])

    found = jax.grad(loss, argnums=(0, 1, 2))(parameters, x, context)
    for name, expected in jax.grad(one_by_one)(parameters).items():
        assert_close(found[0][name], expected, 1e-12)
    assert len(calls(jax.grad(loss), parameters, x, context)) == 2
    for at, moved in ((1, x), (2, context)):
        step = numbers(*moved.shape, seed=7)
        arguments = [parameters, x, context]
        ends = []
        for sign in (1, -1):
            arguments[at] = moved + sign * 1e-6 * step
            ends.append(loss(*arguments))
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, (found[at] * step).sum(), rtol=1e-6, atol=1e-6)


def test_contexts_of_many_rows_each_have_the_bits_of_rows():
    flow = scrambled(nvpflow.build(D, 2, (9,), context_size=20))
    parameters = nj.parameters(flow)
    x, context = numbers(5, 300, D, dtype="float32"), numbers(5, 20, dtype="float32", seed=2)
    every = np.repeat(np.asarray(context), 300, axis=0)
    log_p = jax.vmap(lambda x, c: nj.log_prob(flow.spec, parameters, x, context=c))(x, context)
    assert_same_bits(np.asarray(log_p).ravel(), flow.log_prob(np.asarray(x).reshape(-1, D), context=every))
    z, log_det = jax.vmap(lambda x, c: nj.forward(flow.spec, parameters, x, context=c))(x, context)
    for found, expected in zip((z, log_det), flow.forward(np.asarray(x).reshape(-1, D), context=every), strict=True):
        assert_same_bits(np.asarray(found).reshape(expected.shape), expected)


def test_nested_vmap_and_jacobians():
    flow = new_flow()
    parameters, x, context = nj.parameters(flow), numbers(4, D), numbers(3, C, seed=2)
    one = lambda x, c: nj.log_prob(flow.spec, parameters, x, context=c)  # noqa: E731
    table = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0))
    expected = np.stack([flow.log_prob(np.asarray(x), context=np.asarray(c)) for c in context])
    assert_same_bits(np.asarray(jax.jit(table)(x, context)), expected)
    assert len(calls(table, x, context)) == 1
    jacobian = jax.jacrev(lambda c: nj.forward(flow.spec, parameters, x, context=c)[0])(context[0])
    for i in range(C):
        moved = lambda v, i=i: nj.forward(flow.spec, parameters, x, context=context[0].at[i].set(v))[0]  # noqa: E731
        np.testing.assert_allclose(
            jacobian[..., i], (moved(context[0, i] + 1e-6) - moved(context[0, i] - 1e-6)) / 2e-6, rtol=1e-7, atol=1e-8
        )


def test_vmap_over_parameters():
    flow = new_flow()
    parameters, x, context = nj.parameters(flow), numbers(B, D), numbers(2, C, seed=2)
    stacked = jax.tree.map(lambda v: jnp.stack([v, v if (abs(v) == 1).all() else 0.5 * v]), parameters)
    nll = lambda p, c: nj.nll(flow.spec, p, x, context=c)  # noqa: E731
    each = [jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(2)]
    found = jax.vmap(jax.grad(nll, argnums=(0, 1)))(stacked, context)
    for i in range(2):
        assert_close(jax.tree.map(lambda v, i=i: v[i], found), jax.grad(nll, argnums=(0, 1))(each[i], context[i]))
    of_each = jax.vmap(jax.grad(lambda p, x, c: nj.log_prob(flow.spec, p, x, context=c)), in_axes=(None, 0, None))
    summed = jax.tree.map(lambda v: v.sum(axis=0), of_each(parameters, x, context[0]))
    assert_close(summed, jax.grad(lambda p: nj.log_prob(flow.spec, p, x, context=context[0]).sum())(parameters))


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "n", "dtype"),
    [
        ((), 5, "float32"),
        ((4,), 5, "float32"),
        ((), 1, "float64"),
        ((1,), 5, "float64"),
        ((4,), 1, "float64"),
        ((2, 3), 5, "float64"),
        ((), 0, "float64"),
        ((4,), 0, "float64"),
        ((0,), 5, "float64"),
    ],
)
def test_sample(shape, n, dtype):
    flow, key = new_flow(dtype=dtype), jax.random.key(3)
    parameters, context = nj.parameters(flow), numbers(*shape, C, dtype=dtype, seed=2)
    noise = jax.random.normal(key, (*shape, n, D), dtype)

    def draw(p, c):
        return nj.sample(flow.spec, p, key, n, context=c)

    def transform(p, c):
        return nj.inverse(flow.spec, p, noise, context=jnp.broadcast_to(c[..., None, :], (*shape, n, C)))

    results = [jax.jit(function)(parameters, context) for function in (draw, transform)]
    assert results[0].shape == (*shape, n, D)
    assert_same_bits(*map(np.asarray, results))
    gradients = [
        jax.jit(jax.grad(lambda p, c, f=function: weighted([f(p, c)]), argnums=(0, 1)))(parameters, context)
        for function in (draw, transform)
    ]
    assert_close(*gradients, 1e-5 if dtype == "float32" else 1e-12)


def test_samples_under_contexts_are_one_call_and_keep_one_row_for_each():
    flow, key = new_flow(), jax.random.key(3)
    parameters, context = nj.parameters(flow), numbers(4, C)
    assert calls(lambda c: nj.sample(flow.spec, parameters, key, 5, context=c), context)[0][0] == [(20, D), (4, C)]
    drawn = jax.vmap(lambda c: nj.sample(flow.spec, parameters, key, 5, context=c))(context)
    for i in range(4):
        assert_same_bits(np.asarray(drawn[i]), np.asarray(nj.sample(flow.spec, parameters, key, 5, context=context[i])))


# ---- what training starts from ---------------------------------------------------------------------------------------


def test_initialize_from_sets_what_the_flow_sets():
    flow = nvpflow.build(D, context_size=C, dtype="float64", **MODELS["general"])
    x, context, before = 30 * numbers(100, D) + 5, 7 * numbers(100, C, seed=2) - 3, nj.parameters(flow)
    after = nj.initialize_from(flow.spec, before, x, context)
    flow.initialize_from(np.asarray(x), context=np.asarray(context))
    assert all(np.array_equal(after[name], value) for name, value in flow.parameters().items())
    for name in ("standardize_0.mean", "actnorm_1.shift", "context.mean"):
        assert not before[name].any()
        assert after[name].all()
    with pytest.raises(ValueError, match="context is missing"):
        nj.initialize_from(flow.spec, before, x)


# ---- programs --------------------------------------------------------------------------------------------------------


def test_a_program_can_be_exported():
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")
    from jax import export

    flow = new_flow()
    parameters, x, context = nj.parameters(flow), numbers(B, D), numbers(B, C)
    function = jax.jit(lambda p, x, c: nj.log_prob(flow.spec, p, x, context=c))
    checks = [export.DisabledSafetyCheck.custom_call("nvpflow_log_prob")]
    text = export.export(function, disabled_checks=checks)(parameters, x, context).serialize()
    expected = flow.log_prob(np.asarray(x), context=np.asarray(context))
    assert_same_bits(np.asarray(export.deserialize(text).call(parameters, x, context)), expected)


def test_arrays_on_several_devices(run_python):
    output = run_python(
        """
import jax, numpy as np, nvpflow, nvpflow.jax as nj
from jax.sharding import Mesh, NamedSharding, PartitionSpec

flow = nvpflow.build(3, 2, (5,), context_size=2, seed=1)
parameters = nj.parameters(flow)
rng = np.random.default_rng(0)
x, context = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
rows = NamedSharding(Mesh(jax.devices(), "i"), PartitionSpec("i"))
nll = lambda p, x, c: nj.nll(flow.spec, p, x, context=c)
expected = jax.grad(nll, argnums=(0, 2))(parameters, x, context)
found = jax.jit(jax.grad(nll, argnums=(0, 2)))(parameters, jax.device_put(x, rows), jax.device_put(context, rows))
mapped = jax.pmap(lambda x, c: nj.log_prob(flow.spec, parameters, x, context=c))(
    x.reshape(2, 4, 3), context.reshape(2, 4, 2)
)
assert np.array_equal(mapped.reshape(8), flow.log_prob(x, context=context))
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
print(len(jax.devices()), "devices")
""",
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert output.strip() == "2 devices"


def test_the_handlers_check_the_context_that_a_program_hands_them():
    flow, x, context = new_flow(), numbers(B, D), numbers(B, C)
    tensors = tuple(nj.parameters(flow)[name] for name, _, _ in flow._layout())
    attributes = {"spec": flow.spec.to_json(), "num_threads": np.int64(1), "inverse": np.int64(0)}

    def call(given, target="nvpflow_log_prob", shapes=((B,),), x=x):
        results = [jax.ShapeDtypeStruct(shape, "float64") for shape in shapes]
        handler = jax.ffi.ffi_call(target, results, vmap_method="sequential")
        return jax.jit(lambda *a: handler(*a, **attributes))(x, *given, *tensors)[0].block_until_ready()

    expected = flow.log_prob(np.asarray(x), context=np.repeat(np.asarray(context[:2]), 3, axis=0))
    assert_same_bits(np.asarray(call((context[:2],))), expected)
    of_x = ((B, D), (0,))
    product = {"target": "nvpflow_log_prob_vjp"}
    for given, options, message in [
        ((), {}, r"the call has \d+ arguments and 1 results, expected \d+ and 1"),
        ((context[0],), {}, "argument 1, the context, has 1 axes, expected 2"),
        ((context[:, :1],), {}, r"argument 1, the context, has shape \[6, 1\], expected \[6, 2\]"),
        ((context.astype("float32"),), {}, "argument 1, the context, has another dtype than the flow, float64"),
        ((context[:4],), {}, "argument 1, the context, has 4 rows, expected a number that divides 6"),
        ((context[:0],), {}, "argument 1, the context, has 0 rows, expected a number that divides 6"),
        ((context, x[:, 0]), {**product, "shapes": of_x}, "2 results, expected .* and 3"),
        ((context, x[:, 0]), {**product, "shapes": (*of_x, (B, D))}, r"result 2 has shape \[6, 3\], expected \[6, 2\]"),
        (
            (context[:2], x[:, 0]),
            {**product, "shapes": (*of_x, (2, C))},
            "the context has 2 rows for 6, expected 1 or one for each where its cotangent is asked for",
        ),
        (
            (context[:0], x[:0, 0]),
            {"target": "nvpflow_nll_vjp", "shapes": ((), (0,), (0,), (flow.num_parameters,), (0,)), "x": x[:0]},
            "x has no rows, expected at least one: the mean over an empty batch is not defined",
        ),
    ]:
        with pytest.raises(Exception, match=message) as caught:
            call(given, **options)
        assert "INVALID_ARGUMENT" in str(caught.value)


# ---- misuse ----------------------------------------------------------------------------------------------------------

WRONG = {
    "none": (None, ValueError, r"context is missing, expected \(6, 2\), one for each row of x, or \(2,\), one for all"),
    "too few rows": (np.zeros((5, C)), ValueError, r"context has shape \(5, 2\), expected \(6, 2\), one for each row"),
    "one row with two axes": (np.zeros((1, C)), ValueError, r"context has shape \(1, 2\), expected \(6, 2\)"),
    "too wide": (np.zeros((B, 3)), ValueError, r"context has shape \(6, 3\), expected \(6, 2\)"),
    "a number": (1.5, ValueError, r"context has shape \(\), expected \(6, 2\)"),
    "complex": (np.zeros(C, complex), TypeError, "context has dtype complex128, expected float64"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("jit", [False, True])
def test_a_wrong_context_is_refused(wrong, jit):
    value, error, message = WRONG[wrong]
    flow, x = new_flow(), numbers(B, D)
    parameters = nj.parameters(flow)
    for function in (nj.log_prob, nj.forward, nj.nll, nj.inverse):
        call = lambda p, x, c, f=function: f(flow.spec, p, x, context=c)  # noqa: E731
        message_here = message.replace("row of x", "row of z") if function is nj.inverse else message
        with pytest.raises(error, match=message_here):
            (jax.jit(call) if jit else call)(parameters, x, value)


def test_what_takes_one_context_or_none_says_so():
    flow, x = new_flow(), numbers(D)
    parameters, key = nj.parameters(flow), jax.random.key(0)
    with pytest.raises(ValueError, match=r"context has shape \(1, 2\), expected \(2,\) beside one row$"):
        nj.log_prob(flow.spec, parameters, x, context=np.zeros((1, C)))
    with pytest.raises(ValueError, match=r"one for all; jnp.tile\(x, \(5, 1\)\) puts the row beside each context$"):
        nj.log_prob(flow.spec, parameters, x[None], context=np.zeros((5, C)))
    one = nvpflow.build(D, dtype="float64", context_size=1)
    with pytest.raises(ValueError, match=r"expected \(6, 1\).*; jnp.reshape\(context, \(-1, 1\)\) makes a row of each"):
        nj.log_prob(one.spec, nj.parameters(one), numbers(B, D), context=np.zeros(B))
    with pytest.raises(TypeError, match="context has dtype <U3, expected real numbers; encode text as numbers: a cat"):
        nj.log_prob(flow.spec, parameters, x, context=["red", "low"])
    for context, message in (
        (None, r"context is missing, expected \(2,\), or \(\.\.\., 2\) for rows under each: the flow is a density p\("),
        (np.zeros(3), r"context has shape \(3,\), expected \(2,\), or \(\.\.\., 2\)"),
        (1.0, r"context has shape \(\), expected \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            nj.sample(flow.spec, parameters, key, 3, context=context)
    plain = nvpflow.build(D, dtype="float64")
    parameters = nj.parameters(plain)
    for call in (
        lambda c: nj.log_prob(plain.spec, parameters, x, context=c),
        lambda c: nj.inverse(plain.spec, parameters, x, context=c),
        lambda c: nj.sample(plain.spec, parameters, key, 3, context=c),
    ):
        with pytest.raises(ValueError, match=r"context is .* expected None: the flow has no context; build it with"):
            call(np.zeros(C))
    with pytest.raises(TypeError, match="'condition'; what conditions the rows is called context"):
        nj.log_prob(flow.spec, nj.parameters(flow), x, condition=np.zeros(C))
