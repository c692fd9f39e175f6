"""nvpflow.jax: values, gradients, JAX's transformations, XLA's side of the calls, misuse."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import threading

import numpy as np
import nvpflow
import pytest
from oracle import ACTIVATIONS, KINKED, assert_same_bits, assert_within_budget, finite_difference, unit_data

jax = pytest.importorskip("jax", minversion="0.5", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402
import nvpflow.jax as nj  # noqa: E402
from documents import ROOT  # noqa: E402

SIZE = 5
HEADER = ROOT / "python" / "src" / "xla_ffi.h"


@pytest.fixture(autouse=True)
def _x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def make(make_flow):
    """A flow with random parameters, the same as arrays of JAX, and the oracle."""

    def make(dtype="float64", **options):
        options = {"input_size": SIZE, "num_flows": 2, "hidden_sizes": (7,), "standardize": True, **options}
        flow, oracle = make_flow(dtype=dtype, **options)
        return flow, nj.parameters(flow), oracle

    return make


def rows(count=6, dtype="float64", seed=1):
    return jnp.array(unit_data(count, SIZE, seed, dtype))


def plain(oracle, kind, parameters, x):
    """The flow in JAX's own operations, which JAX differentiates by itself."""
    activations = {
        "relu": jax.nn.relu,
        "leaky_relu": lambda u: jnp.where(u > 0, u, 0.01 * u),
        "elu": jax.nn.elu,
        "gelu": lambda u: jax.nn.gelu(u, approximate=False),
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
        "sigmoid": jax.nn.sigmoid,
        "softplus": jax.nn.softplus,
    }
    sign = -1 if kind == "inverse" else 1
    y, log_det = x, jnp.zeros(x.shape[0], x.dtype)
    for layer, name in oracle._named_layers()[::sign]:
        if not hasattr(layer, "swapped"):
            mean, log_std = parameters[f"{name}.mean"], parameters[f"{name}.log_std"]
            y = (y - mean) * jnp.exp(-log_std) if sign > 0 else y * jnp.exp(log_std) + mean
            log_det = log_det - sign * log_std.sum()
            continue
        a, b = oracle._halves(layer)
        g = y[:, a]
        for j in range(len(layer.hidden_sizes)):
            dense = f"{name}_coupling_dense_{j}"
            g = activations[layer.activation](g @ parameters[f"{dense}.kernel"] + parameters[f"{dense}.bias"])
        u = g @ parameters[f"{name}_scale.kernel"] + parameters[f"{name}_scale.bias"]
        t = g @ parameters[f"{name}_translation.kernel"] + parameters[f"{name}_translation.bias"]
        s = layer.scale_bound * jnp.tanh(u / layer.scale_bound)
        moved = y[:, b] * jnp.exp(s) + t if sign > 0 else (y[:, b] - t) * jnp.exp(-s)
        y, log_det = y.at[:, b].set(moved), log_det + sign * s.sum(axis=1)
    if kind == "log_prob":
        return (log_det - 0.5 * (oracle.input_size * jnp.log(2 * jnp.pi) + (y * y).sum(axis=1)),)
    return y, log_det


def ours(spec, kind, parameters, x):
    if kind == "log_prob":
        return (nj.log_prob(spec, parameters, x),)
    return nj.forward(spec, parameters, x) if kind == "forward" else nj.inverse(spec, parameters, x, with_log_det=True)


def weighted(results):
    """A scalar that every element of the results has a weight of its own in."""
    return sum((r * jnp.cos(1 + jnp.arange(r.size, dtype=r.dtype)).reshape(r.shape)).sum() for r in results)


def assert_trees_close(actual, expected, rtol=1e-10):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * (1 + np.abs(e).max(initial=0)))


KINDS = ("log_prob", "forward", "inverse")


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_the_flows_bit_for_bit(make, dtype, jit):
    flow, parameters, oracle = make(dtype)
    x = rows(9, dtype)
    wrap = jax.jit if jit else lambda f, **_: f
    log_prob, forward = (wrap(f, static_argnums=0)(flow.spec, parameters, x) for f in (nj.log_prob, nj.forward))
    inverse = wrap(lambda p, z: nj.inverse(flow.spec, p, z, with_log_det=True))(parameters, x)
    given = np.asarray(x)
    assert log_prob.dtype == dtype
    assert_within_budget(np.asarray(log_prob), oracle.log_prob(given), dtype)
    assert_same_bits(np.asarray(log_prob), flow.log_prob(given))
    for results, expected in ((forward, flow.forward(given)), (inverse, flow.inverse(given, with_log_det=True))):
        for result, value in zip(results, expected, strict=True):
            assert_same_bits(np.asarray(result), value)
    assert_same_bits(np.asarray(nj.inverse(flow.spec, parameters, x)), np.asarray(inverse[0]))
    np.testing.assert_allclose(nj.nll(flow.spec, parameters, x), flow.nll(given), rtol=1e-6)
    assert set(parameters) == set(flow.parameters())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0), (2, 1, 3)])
def test_any_leading_axes(make, shape):
    flow, parameters, _ = make()
    x = rows(6).reshape(-1)[: SIZE * int(np.prod(shape))].reshape(*shape, SIZE)
    z, log_det = nj.forward(flow.spec, parameters, x)
    log_prob = nj.log_prob(flow.spec, parameters, x)
    assert z.shape == x.shape
    assert log_det.shape == log_prob.shape == shape
    assert nj.inverse(flow.spec, parameters, x).shape == x.shape
    assert_same_bits(np.asarray(log_prob).reshape(-1), flow.log_prob(np.asarray(x).reshape(-1, SIZE)))
    gradient, grad_x = jax.grad(lambda p, x: weighted(nj.forward(flow.spec, p, x)), argnums=(0, 1))(parameters, x)
    assert grad_x.shape == x.shape
    for name, value in gradient.items():
        assert value.shape == parameters[name].shape
        assert x.size or not value.any()


def test_subnormal_numbers_are_kept_on_xlas_threads(make):
    """XLA flushes them to zero in its own arithmetic."""
    flow, parameters, _ = make("float32", standardize=False)
    x = jnp.array(unit_data(400, SIZE, 3, "float32") * np.float32(1e-39))
    assert_same_bits(
        np.asarray(jax.jit(nj.forward, static_argnums=0)(flow.spec, parameters, x)[0]), flow.forward(np.asarray(x))[0]
    )


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(make, kind):
    flow, parameters, _ = make(num_flows=2, hidden_sizes=(4, 3))
    x = rows(3)
    loss = jax.jit(lambda p, x: weighted(ours(flow.spec, kind, p, x)))
    gradient, grad_x = jax.grad(loss, argnums=(0, 1))(parameters, x)
    expected = finite_difference(lambda v: float(loss(parameters, v)), np.asarray(x))
    np.testing.assert_allclose(grad_x, expected, rtol=1e-7, atol=1e-8)
    for name, value in parameters.items():
        expected = finite_difference(lambda v, n=name: float(loss({**parameters, n: v}, x)), np.asarray(value))
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-7, atol=1e-8, err_msg=name)


def _cases():
    for activation in ACTIVATIONS:
        for kind in KINDS:
            quick = kind == "log_prob" or activation in ("relu", "silu")
            yield pytest.param(activation, kind, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("activation", "kind"), list(_cases()))
def test_gradients_against_jaxs_own(make, kind, activation):
    flow, parameters, oracle = make(activation=activation, scale_bound=1.5)
    x = rows(8)
    if activation in KINKED:
        assert oracle.smallest_pre_activation(np.asarray(x), "inverse" if kind == "inverse" else "forward").min() > 1e-9

    def loss(function, p, x):
        return weighted(function(p, x))

    mine = jax.value_and_grad(lambda p, x: loss(lambda p, x: ours(flow.spec, kind, p, x), p, x), argnums=(0, 1))
    theirs = jax.value_and_grad(lambda p, x: loss(lambda p, x: plain(oracle, kind, p, x), p, x), argnums=(0, 1))
    assert_trees_close(jax.jit(mine)(parameters, x), jax.jit(theirs)(parameters, x))


def test_nll_and_its_gradients(make):
    flow, parameters, oracle = make()
    x = rows(9)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: 3 * nj.nll(flow.spec, p, x)))(parameters)
    expected, of_parameters = oracle.nll_gradient(np.asarray(x))
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-12)
    assert_trees_close(gradient, {name: jnp.array(3 * g) for name, g in of_parameters.items()})
    mean = jax.grad(lambda p, x: -nj.log_prob(flow.spec, p, x).mean(), argnums=(0, 1))(parameters, x)
    assert_trees_close(jax.grad(lambda p, x: nj.nll(flow.spec, p, x), argnums=(0, 1))(parameters, x), mean)
    assert_trees_close(jax.grad(lambda x: nj.nll(flow.spec, parameters, x))(x), mean[1])
    stacked = jnp.stack([x, 2 * x])
    each = jax.vmap(jax.grad(lambda p, x: nj.nll(flow.spec, p, x)), in_axes=(None, 0))(parameters, stacked)
    assert_trees_close(jax.tree.map(lambda v: v[0], each), mean[0])
    np.testing.assert_allclose(jax.vmap(lambda x: nj.nll(flow.spec, parameters, x))(stacked)[0], expected, rtol=1e-12)


def test_float32_gradients(make):
    flow, parameters, _ = make("float32")
    exact, wide, _ = make("float64")
    exact.set_parameters({n: np.asarray(v, np.float64) for n, v in parameters.items()})
    wide, x = nj.parameters(exact), rows(50, "float32")
    narrow = jax.jit(jax.grad(lambda p, x: nj.nll(flow.spec, p, x), argnums=(0, 1)))(parameters, x)
    expected = jax.grad(lambda p, x: nj.nll(exact.spec, p, x), argnums=(0, 1))(wide, x.astype("float64"))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}
    for name, value in narrow[0].items():
        np.testing.assert_allclose(value, expected[0][name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(narrow[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("argnums", "shapes"), [(0, [(0,), (131,)]), (1, [(6, 5), (0,)]), ((0, 1), [(6, 5), (131,)])])
@pytest.mark.parametrize("kind", KINDS)
def test_only_wanted_gradients_are_formed(make, kind, argnums, shapes):
    flow, parameters, _ = make(num_flows=2, hidden_sizes=(6,), standardize=False)
    shapes = [(flow.num_parameters,) if shape == (131,) else shape for shape in shapes]
    x = rows(6)
    program = jax.make_jaxpr(jax.grad(lambda p, x: ours(flow.spec, kind, p, x)[0].sum(), argnums=argnums))(
        parameters, x
    )
    formed = [[v.aval.shape for v in e.outvars] for e in _equations(program.jaxpr) if "_vjp" in str(e.params)]
    assert shapes in formed


def _equations(program):
    for equation in program.eqns:
        if equation.primitive.name in ("ffi_call", "nvpflow_values"):
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_a_constant_loss_has_zero_gradients(make):
    flow, parameters, _ = make()
    gradient = jax.grad(lambda p: jax.lax.stop_gradient(nj.log_prob(flow.spec, p, rows())).sum())(parameters)
    assert not any(value.any() for value in gradient.values())
    some = jax.grad(lambda b: nj.log_prob(flow.spec, {**parameters, "flow_0_scale.bias": b}, rows()).sum())
    every = jax.grad(lambda p: nj.log_prob(flow.spec, p, rows()).sum())(parameters)
    assert_trees_close(some(parameters["flow_0_scale.bias"]), every["flow_0_scale.bias"])


def test_sample(make):
    flow, parameters, oracle = make()
    key = jax.random.key(3)
    noise = jax.random.normal(key, (7, SIZE), dtype="float64")
    drawn = jax.jit(lambda p, k: nj.sample(flow.spec, p, k, 7))(parameters, key)
    assert_same_bits(np.asarray(drawn), flow.inverse(np.asarray(noise)))
    gradient = jax.grad(lambda p: weighted([nj.sample(flow.spec, p, key, 7)]))(parameters)
    assert_trees_close(
        gradient, jax.jit(jax.grad(lambda p: weighted([plain(oracle, "inverse", p, noise)[0]])))(parameters)
    )
    assert nj.sample(flow.spec, parameters, key, 0).shape == (0, SIZE)


def test_sample_and_log_prob(make):
    flow, parameters, _ = make()
    key = jax.random.key(3)
    both = lambda p: nj.sample_and_log_prob(flow.spec, p, key, 7)  # noqa: E731
    x, log_p = jax.jit(both)(parameters)
    assert_same_bits(np.asarray(x), np.asarray(nj.sample(flow.spec, parameters, key, 7)))
    np.testing.assert_allclose(log_p, nj.log_prob(flow.spec, parameters, x), rtol=1e-10, atol=1e-10)
    by_one_pass = jax.grad(lambda p: both(p)[1].sum())(parameters)
    by_two = jax.grad(lambda p: nj.log_prob(flow.spec, p, nj.sample(flow.spec, p, key, 7)).sum())(parameters)
    assert_trees_close(by_one_pass, by_two, 1e-8)
    assert len(list(_equations(jax.make_jaxpr(both)(parameters).jaxpr))) == 1
    bounded = nvpflow.build(SIZE, 2, (7,), transform="spline", base=nvpflow.layers.Uniform(-1, 3), dtype="float64")
    x, log_p = nj.sample_and_log_prob(bounded.spec, nj.parameters(bounded), key, 7)
    np.testing.assert_allclose(log_p, bounded.log_prob(np.asarray(x)), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="n is -1"):
        nj.sample_and_log_prob(flow.spec, parameters, key, -1)


# ---- compositions ----------------------------------------------------------------------------------------------------


def test_vmap_over_rows_is_one_call(make):
    flow, parameters, _ = make()
    x = rows(6).reshape(2, 3, SIZE)
    one = lambda x: nj.log_prob(flow.spec, parameters, x)  # noqa: E731
    expected = one(x)
    assert_same_bits(np.asarray(jax.vmap(jax.vmap(one))(x)), np.asarray(expected))
    assert_same_bits(np.asarray(jax.vmap(one, in_axes=1, out_axes=1)(x)), np.asarray(expected))
    score = jax.grad(lambda x: one(x).sum())
    assert_same_bits(np.asarray(jax.vmap(jax.vmap(score))(x)), np.asarray(score(x)))
    calls = list(_equations(jax.make_jaxpr(jax.vmap(jax.vmap(score)))(x).jaxpr))
    assert {e.invars[0].aval.shape for e in calls} == {(6, SIZE)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_vmap_over_rows_is_one_call(make, kind):
    """As flowMC and harmonic write a loss: the mean over vmap of the log-density of a row."""
    flow, parameters, _ = make()
    x = rows(24)
    of_rows = lambda p, x: weighted([r.mean(0) for r in jax.vmap(lambda x: ours(flow.spec, kind, p, x))(x)])  # noqa: E731
    of_batch = lambda p, x: weighted([r.mean(0) for r in ours(flow.spec, kind, p, x)])  # noqa: E731
    for argnums in (0, 1, (0, 1)):
        expected = jax.value_and_grad(of_batch, argnums=argnums)(parameters, x)
        gradient = jax.value_and_grad(of_rows, argnums=argnums)
        assert_trees_close(gradient(parameters, x), expected)
        assert_trees_close(jax.jit(gradient)(parameters, x), expected)
        calls = list(_equations(jax.make_jaxpr(gradient)(parameters, x).jaxpr))
        assert [e.invars[0].aval.shape for e in calls] == [(24, SIZE)] * 2
    nested = jax.grad(lambda p: jax.vmap(jax.vmap(lambda x: nj.log_prob(flow.spec, p, x)))(x.reshape(4, 6, SIZE)).sum())
    flat = jax.grad(lambda p: nj.log_prob(flow.spec, p, x).sum())
    assert_trees_close(nested(parameters), flat(parameters))
    assert len(list(_equations(jax.make_jaxpr(nested)(parameters).jaxpr))) == 2
    inner = jax.grad(lambda p: jax.vmap(jax.jit(lambda x: nj.log_prob(flow.spec, p, x)))(x).sum())
    assert_trees_close(jax.jit(inner)(parameters), flat(parameters))
    checkpointed = jax.grad(lambda p: jax.checkpoint(jax.vmap(lambda x: nj.log_prob(flow.spec, p, x)))(x).sum())
    assert_trees_close(checkpointed(parameters), flat(parameters))


def test_vmap_over_parameters_and_gradients_of_each_row(make):
    flow, parameters, oracle = make()
    x = rows(4)
    stacked = jax.tree.map(lambda v: jnp.stack([v, 0.5 * v, 2 * v]), parameters)
    each = [jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(3)]
    members = jax.vmap(lambda p: nj.forward(flow.spec, p, x))(stacked)
    for i, member in enumerate(each):
        assert_trees_close(tuple(r[i] for r in members), nj.forward(flow.spec, member, x), 0)
    both = jax.vmap(lambda p, x: nj.log_prob(flow.spec, p, x))(stacked, x[:3])
    assert_same_bits(np.asarray(both), np.array([nj.log_prob(flow.spec, p, r) for p, r in zip(each, x, strict=False)]))
    of_each = jax.jit(jax.vmap(jax.grad(lambda p, x: nj.log_prob(flow.spec, p, x)), in_axes=(None, 0)))(parameters, x)
    theirs = jax.jit(jax.vmap(jax.grad(lambda p, x: plain(oracle, "log_prob", p, x[None])[0][0]), in_axes=(None, 0)))
    assert_trees_close(of_each, theirs(parameters, x))
    ensemble = jax.vmap(jax.grad(lambda p: nj.nll(flow.spec, p, x)))(stacked)
    assert_trees_close(jax.tree.map(lambda v: v[1], ensemble), jax.grad(lambda p: nj.nll(flow.spec, p, x))(each[1]))


@pytest.mark.parametrize("kind", ["forward", "inverse"])
def test_jacobians(make, kind):
    flow, parameters, oracle = make()
    x = rows(3)
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda x: ours(flow.spec, kind, parameters, x)[0])))(x)
    theirs = jax.jit(jax.vmap(jax.jacfwd(lambda x: plain(oracle, kind, parameters, x[None])[0][0])))(x)
    assert_trees_close(jacobian, theirs)
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], ours(flow.spec, kind, parameters, x)[1], atol=1e-11)
    of_parameters = jax.jit(jax.jacrev(lambda p: nj.log_prob(flow.spec, p, x)))(parameters)
    assert_trees_close(of_parameters, jax.jit(jax.jacrev(lambda p: plain(oracle, "log_prob", p, x)[0]))(parameters))


def test_training_in_a_scan(make):
    flow, parameters, oracle = make()
    x = rows(12)

    def train(nll):
        def step(p, _):
            value, gradient = jax.value_and_grad(nll)(p)
            return jax.tree.map(lambda v, g: v - 0.02 * g, p, gradient), value

        return jax.jit(lambda p: jax.lax.scan(step, p, None, length=20))(parameters)

    mine, losses = train(lambda p: nj.nll(flow.spec, p, x))
    theirs, expected = train(lambda p: -plain(oracle, "log_prob", p, x)[0].mean())
    assert_trees_close((mine, losses), (theirs, expected), 1e-8)
    assert losses[-1] < losses[0]
    flow.set_parameters(mine)
    np.testing.assert_allclose(flow.nll(np.asarray(x)), nj.nll(flow.spec, mine, x), rtol=1e-14)


def test_checkpoint_cond_and_layers_around(make):
    flow, parameters, oracle = make()
    weight = jnp.array(unit_data(3, SIZE, 8))
    x = jnp.array(unit_data(4, 3, 9))

    def loss(log_prob, w, p):
        return jax.lax.cond(w.sum() > -1e9, lambda: jax.checkpoint(log_prob)(p, jnp.tanh(x @ w)).sum(), lambda: 0.0)

    mine = jax.grad(lambda w, p: loss(lambda p, x: nj.log_prob(flow.spec, p, x), w, p), argnums=(0, 1))
    theirs = jax.grad(lambda w, p: loss(lambda p, x: plain(oracle, "log_prob", p, x)[0], w, p), argnums=(0, 1))
    assert_trees_close(jax.jit(mine)(weight, parameters), jax.jit(theirs)(weight, parameters))


def test_second_and_forward_derivatives_are_refused(make):
    flow, parameters, _ = make()
    score = jax.grad(lambda x: nj.log_prob(flow.spec, parameters, x).sum())
    for derivative in (jax.grad(lambda x: score(x).sum()), jax.jit(jax.hessian(lambda x: score(x).sum()))):
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            derivative(rows())
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda p: jax.grad(lambda p: nj.nll(flow.spec, p, rows()))(p)["flow_0_scale.bias"].sum())(parameters)
    tangents = lambda x: jax.jvp(lambda x: nj.log_prob(flow.spec, parameters, x), (x,), (x,))  # noqa: E731
    for derivative in (tangents, jax.jit(tangents), jax.vmap(tangents), jax.jit(jax.vmap(tangents))):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            derivative(rows())


def test_a_program_can_be_exported(make):
    flow, parameters, _ = make()
    export = pytest.importorskip("jax.export")
    checks = [export.DisabledSafetyCheck.custom_call("nvpflow_log_prob")]
    function = jax.jit(lambda p, x: nj.log_prob(flow.spec, p, x))
    text = export.export(function, disabled_checks=checks)(parameters, rows()).serialize()
    assert_same_bits(np.asarray(export.deserialize(text).call(parameters, rows())), flow.log_prob(np.asarray(rows())))


# ---- lifetimes and threads -------------------------------------------------------------------------------------------


def test_functions_outlive_the_flow_and_share_nothing_with_it(make):
    flow, parameters, _ = make()
    x = rows()
    expected = flow.log_prob(np.asarray(x))
    compiled = (
        jax.jit(lambda p, x: nj.log_prob(flow_spec, p, x)).lower(parameters, x) if (flow_spec := flow.spec) else 0
    )
    compiled = compiled.compile()
    flow.set_parameters({name: 0.5 * value for name, value in flow.parameters().items()})
    assert_same_bits(np.asarray(compiled(parameters, x)), expected)
    del flow
    gc.collect()
    assert_same_bits(np.asarray(compiled(parameters, x)), expected)
    changed = {**parameters, "flow_1_translation.bias": parameters["flow_1_translation.bias"] + 1}
    assert not np.array_equal(compiled(changed, x), expected)
    assert_same_bits(np.asarray(compiled(parameters, x)), expected)


def test_parameters_in_donated_memory(make):
    """A step that writes the new parameters where the old ones were: an address says nothing about what is there."""
    flow, parameters, _ = make()
    x = rows(8)
    step = jax.jit(
        lambda p: jax.tree.map(lambda v, g: v - 0.1 * g, p, jax.grad(lambda p: nj.nll(flow.spec, p, x))(p)),
        donate_argnums=0,
    )
    for _ in range(5):
        parameters = step(parameters)
        flow.set_parameters(parameters)
        assert_same_bits(np.asarray(nj.log_prob(flow.spec, parameters, x)), flow.log_prob(np.asarray(x)))


def test_many_models_in_turn(make):
    """More of them than are kept."""
    flows = [make(num_flows=k, hidden_sizes=(h,))[:2] for k in (1, 2, 3, 4) for h in (3, 4, 5)]
    x = rows()
    for _ in range(2):
        for flow, parameters in flows:
            assert_same_bits(np.asarray(nj.log_prob(flow.spec, parameters, x)), flow.log_prob(np.asarray(x)))


def test_threads_with_parameters_of_their_own(make):
    flow, parameters, _ = make("float32", hidden_sizes=(64,))
    x = rows(300, "float32")
    function = jax.jit(lambda p, x: nj.log_prob(flow.spec, p, x))
    sets = [jax.tree.map(lambda v, f=f: v * f, parameters) for f in (1, 0.9, 0.8, 0.7)]
    expected = [np.asarray(function(p, x)) for p in sets]
    wrong = []

    def work(mine):
        for i in range(60):
            at = mine if i % 2 else (mine + i) % 4
            if not np.array_equal(function(sets[at], x), expected[at]):
                wrong.append((mine, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_num_threads_changes_no_bit(make):
    flow, parameters, _ = make("float32", hidden_sizes=(64,))
    x = rows(5000, "float32")
    one, two = (nj.log_prob(flow.spec, parameters, x, num_threads=n) for n in (1, 2))
    assert_same_bits(np.asarray(one), np.asarray(two))


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 4)), ValueError, r"x has shape \(2, 4\), expected \(\.\.\., 5\)"),
        (np.zeros(()), ValueError, r"x has shape \(\), expected \(\.\.\., 5\)"),
        (np.zeros((2, 5), np.int32), TypeError, "x has dtype int32, expected float32"),
        (np.zeros((2, 5), np.float64), TypeError, "x has dtype float64, expected float32"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_wrong_rows(make, x, error, message, jit):
    flow, parameters, _ = make("float32")
    for function in (nj.log_prob, nj.forward, nj.nll):
        with pytest.raises(error, match=message):
            (jax.jit(function, static_argnums=0) if jit else function)(flow.spec, parameters, x)
    with pytest.raises(error, match=message.replace("x has", "z has")):
        nj.inverse(flow.spec, parameters, x)


def test_wrong_arguments(make):
    flow, parameters, _ = make()
    x, name = rows(), "flow_0_scale.bias"
    with pytest.raises(TypeError, match=r"spec is .*Flow\), expected an nvpflow\.FlowSpec, as flow\.spec is"):
        nj.log_prob(flow, parameters, x)
    with pytest.raises(TypeError, match=r"flow is .*, expected an nvpflow"):
        nj.parameters(flow.spec)
    with pytest.raises(TypeError, match=r"parameters is .*, expected a dict"):
        nj.log_prob(flow.spec, list(parameters.values()), x)
    with pytest.raises(ValueError, match=f"parameters lacks '{name}'"):
        nj.log_prob(flow.spec, {k: v for k, v in parameters.items() if k != name}, x)
    with pytest.raises(ValueError, match="holds 'bias', expected names of this flow's parameters only"):
        nj.log_prob(flow.spec, {**parameters, "bias": x}, x)
    with pytest.raises(ValueError, match=rf"parameters\['{name}'\] has shape \(4,\), expected \(3,\)"):
        nj.log_prob(flow.spec, {**parameters, name: jnp.zeros(4)}, x)
    with pytest.raises(TypeError, match=rf"parameters\['{name}'\] has dtype float32, expected float64"):
        nj.log_prob(flow.spec, {**parameters, name: jnp.zeros(3, "float32")}, x)
    with pytest.raises(ValueError, match="num_threads is -1"):
        nj.log_prob(flow.spec, parameters, x, num_threads=-1)
    with pytest.raises(TypeError, match=r"with_log_det is 1 .*, expected True or False"):
        nj.inverse(flow.spec, parameters, x, with_log_det=1)
    with pytest.raises(ValueError, match="at least one row"):
        nj.nll(flow.spec, parameters, x[:0])
    with pytest.raises(ValueError, match="n is -1"):
        nj.sample(flow.spec, parameters, jax.random.key(0), -1)


def test_float64_needs_x64(make):
    flow, parameters, _ = make()
    jax.config.update("jax_enable_x64", False)
    for call in (
        lambda: nj.parameters(flow),
        lambda: nj.log_prob(flow.spec, parameters, rows()),
        lambda: nj.sample(flow.spec, parameters, jax.random.key(0), 2),
    ):
        with pytest.raises(TypeError, match="jax_enable_x64"):
            call()


def test_lower_precisions_come_in(make):
    flow, parameters, _ = make("float32")
    x = rows(6, "float32").astype("bfloat16")
    assert_same_bits(np.asarray(nj.log_prob(flow.spec, parameters, x)), flow.log_prob(np.asarray(x.astype("float32"))))
    assert jax.grad(lambda x: nj.log_prob(flow.spec, parameters, x).sum())(x).dtype == "bfloat16"


def test_the_handlers_check_what_a_program_hands_them(make):
    """A program need not come from nvpflow.jax; what is wrong with it is an error of XLA with our message."""
    flow, parameters, _ = make()
    x, tensors = rows(), tuple(parameters[name] for name, _, _ in flow._layout())
    good = {"spec": flow.spec.to_json(), "num_threads": np.int64(1)}

    def call(arguments, shape=(6,), dtype="float64", attributes=good, target="nvpflow_log_prob"):
        handler = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, dtype), vmap_method="sequential")
        return jax.jit(lambda *a: handler(*a, **attributes))(*arguments).block_until_ready()

    assert_same_bits(np.asarray(call((x, *tensors))), flow.log_prob(np.asarray(x)))
    narrow = (x.astype("float32"), *tensors)
    for given, message in [
        (((x,),), r"the call has 1 arguments and 1 results, expected \d+ and 1"),
        (((x[0], *tensors),), "argument 0 has 1 axes, expected 2"),
        ((narrow,), "argument 0 has another dtype than the flow, float64"),
        (((x[:, :4], *tensors),), r"argument 0 has shape \[6, 4\], expected \[6, 5\]"),
        (((x, tensors[0][:-1], *tensors[1:]),), r"has shape \[\d+\], expected \[5\]"),
        (((x, *tensors), (7,)), r"result 0 has shape \[7\], expected \[6\]"),
        (((x, *tensors), (6,), "float32"), "result 0 has another dtype"),
        (((x, *tensors), (6,), "float64", {"spec": "{}", "num_threads": np.int64(1)}), "spec|dtype|input_size|layers"),
        (((x, *tensors), (6,), "float64", {"spec": good["spec"]}), "no attribute num_threads"),
        (((x, *tensors), (6,), "float64", {**good, "num_threads": np.int32(1)}), "not a 64-bit integer"),
    ]:
        with pytest.raises(Exception, match=message) as caught:
            call(*given)
        assert "INVALID_ARGUMENT" in str(caught.value) or isinstance(caught.value, ValueError)


# ---- the binary interface --------------------------------------------------------------------------------------------


def test_the_declarations_are_those_of_jaxlib(tmp_path):
    """Every offset and number that python/src/xla_ffi.h states, against the header that jaxlib brings."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    pairs = {
        "Extension": ("Extension_Base", "struct_size type next"),
        "ApiVersion": ("Api_Version", "struct_size extension_start major_version minor_version"),
        "ErrorCreateArgs": ("Error_Create_Args", "struct_size extension_start message errc"),
        "Api": ("Api", "struct_size extension_start api_version internal_api error_create=XLA_FFI_Error_Create"),
        "Buffer": ("Buffer", "struct_size extension_start dtype data rank dims"),
        "ByteSpan": ("ByteSpan", "ptr len"),
        "Scalar": ("Scalar", "dtype value"),
        "Arguments": ("Args", "struct_size extension_start size types args"),
        "Results": ("Rets", "struct_size extension_start size types rets"),
        "Attributes": ("Attrs", "struct_size extension_start size types names attrs"),
        "CallFrame": ("CallFrame", "struct_size extension_start api ctx stage args rets attrs future"),
        "Metadata": ("Metadata", "struct_size api_version traits"),
        "MetadataExtension": ("Metadata_Extension", "extension_base metadata"),
    }
    numbers = {
        "ExtensionType::metadata": "Extension_Metadata",
        "DataType::f32": "DataType_F32",
        "DataType::f64": "DataType_F64",
        "DataType::s64": "DataType_S64",
        "ArgumentType::buffer": "ArgType_BUFFER",
        "ResultType::buffer": "RetType_BUFFER",
        "AttributeType::scalar": "AttrType_SCALAR",
        "AttributeType::string": "AttrType_STRING",
        "Stage::execute": "ExecutionStage_EXECUTE",
        "ErrorCode::invalid_argument": "Error_Code_INVALID_ARGUMENT",
        "ErrorCode::resource_exhausted": "Error_Code_RESOURCE_EXHAUSTED",
        "ErrorCode::internal": "Error_Code_INTERNAL",
    }
    lines = [f'#include "{HEADER}"', '#include "xla/ffi/api/c_api.h"', "namespace x = nvpflow::python::xla;"]
    lines += ["static_assert(XLA_FFI_API_MAJOR == x::kMajor && XLA_FFI_API_MINOR >= x::kOldestMinor);"]
    for mine, (theirs, fields) in pairs.items():
        for field in fields.split():
            name, _, other = field.partition("=")
            at = f"offsetof(x::{mine}, {name}) == offsetof(XLA_FFI_{theirs}, {other or name})"
            sizes = f"sizeof(x::{mine}::{name}) == sizeof(XLA_FFI_{theirs}::{other or name})"
            lines += [f"static_assert({at});"] + ([f"static_assert({sizes});"] if mine != "Api" else [])
    lines += [f"static_assert(int(x::{mine}) == int(XLA_FFI_{theirs}));" for mine, theirs in numbers.items()]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines))
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", "-I", jax.ffi.include_dir(), source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    source.write_text("\n".join([*lines, "static_assert(offsetof(x::Buffer, data) == 0);"]))  # it can fail
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


class Version(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("next", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int)]


class Metadata(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("version", Version), ("traits", ctypes.c_uint32)]


class Extension(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
    ]


CREATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class Api(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("next", ctypes.c_void_p),
        ("version", Version),
        ("internal", ctypes.c_void_p),
        ("create", CREATE),
    ]


class Frame(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("api", ctypes.c_void_p),
        ("rest", ctypes.c_size_t * 20),
    ]


def handler_of(name):
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(nvpflow._core._xla_handlers()[name], None)
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)


@pytest.mark.parametrize(
    ("theirs", "answer"),
    [((0, 1), (0, 1)), ((0, 2), (0, 2)), ((0, 3), (0, 3)), ((0, 9), (0, 3)), ((1, 0), (0, 3)), (None, (0, 1))],
)
def test_versions_of_the_interface(theirs, answer):
    """XLA asks which version a handler speaks, and refuses to register what it does not support."""
    metadata = Metadata(ctypes.sizeof(Metadata))
    extension = Extension(ctypes.sizeof(Extension), 1, None, ctypes.addressof(metadata))
    api = Api(ctypes.sizeof(Api), None, Version(ctypes.sizeof(Version), None, *(theirs or (0, 0))))
    frame = Frame(ctypes.sizeof(Frame), ctypes.addressof(extension), ctypes.addressof(api) if theirs else None)
    assert handler_of("nvpflow_log_prob")(ctypes.addressof(frame)) is None
    assert (metadata.version.major, metadata.version.minor) == answer


@pytest.mark.parametrize(("version", "size"), [((1, 0), 184), ((0, 0), 184), ((0, 3), 40)])
def test_a_call_of_another_interface_is_an_error(version, size):
    messages = []

    class Arguments(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("next", ctypes.c_void_p), ("message", ctypes.c_char_p)]

    @CREATE
    def create(arguments):
        messages.append(Arguments.from_address(arguments).message.decode())
        return 1

    api = Api(ctypes.sizeof(Api), None, Version(ctypes.sizeof(Version), None, *version), None, create)
    frame = Frame(size, None, ctypes.addressof(api))
    assert handler_of("nvpflow_nll")(ctypes.addressof(frame)) == 1
    assert "foreign-function interface" in messages[0]
    assert f"{version[0]}.{version[1]}" in messages[0]


def test_a_jaxlib_that_refuses_the_handlers_is_named(run_python):
    output = run_python(
        """
import warnings; warnings.simplefilter("ignore")
import jax.ffi
def refuse(*arguments, **options): raise RuntimeError("incompatible API version")
jax.ffi.register_ffi_target = refuse
try:
    import nvpflow.jax
except ImportError as error:
    print(error)
"""
    )
    assert f"jaxlib {jax.lib.__version__}" in output
    assert "incompatible API version" in output


def test_the_absence_of_jax_says_what_to_install(run_python):
    output = run_python(
        """
import sys
sys.modules["jax"] = None
import nvpflow
try:
    import nvpflow.jax
except ImportError as error:
    print(error)
"""
    )
    assert 'pip install "jax>=0.5"' in output


def test_initialize_from_sets_the_layer_and_nothing_else() -> None:
    flow = nvpflow.build(4, 2, (8,), seed=1)
    before = nj.parameters(flow)
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32) * 30 + 5
    after = nj.initialize_from(flow.spec, before, jnp.asarray(x))
    flow.initialize_from(x)
    expected = nj.parameters(flow)
    assert list(after) == list(expected)
    assert all(np.array_equal(after[name], expected[name]) for name in after)
    assert not np.any(before["standardize_0.mean"])
