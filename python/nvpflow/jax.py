"""JAX: a flow's functions under ``jit``, ``grad`` and ``vmap`` on the CPU, with nvpflow's own kernels and gradients.

Each function is a custom call of XLA: compiled programs go straight into nvpflow's kernels, without Python. All of them
are pure functions of the arrays they get; a `FlowSpec` says what model these belong to, and no `Flow` is kept.

Of a flow with a context, a density p(x | c), they need ``context=`` and are differentiable by it.

Needs JAX 0.5 or newer (``pip install "jax>=0.5"``; the extra ``jax``).

Examples
--------
>>> import jax, nvpflow, nvpflow.jax
>>> flow = nvpflow.build(input_size=16, num_flows=4, hidden_sizes=(128,))
>>> parameters = nvpflow.jax.parameters(flow)  # a dict of arrays: a pytree
>>> loss = jax.jit(lambda parameters, x: -nvpflow.jax.log_prob(flow.spec, parameters, x).mean())
>>> value, gradient = jax.value_and_grad(loss)(parameters, jax.random.normal(jax.random.key(0), (256, 16)))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

try:
    import jax
    import jax.custom_batching
    import jax.custom_derivatives
    import jax.extend.core
    import jax.ffi
    import jax.numpy as jnp
    import jaxlib
    from jax.interpreters import ad, batching, mlir
except ImportError as error:
    raise ImportError('nvpflow.jax needs JAX 0.5 or newer: pip install "jax>=0.5"') from error

from nvpflow import _checks, _core, _hints, _sample_weight
from nvpflow._bases import Mixture, Normal, StudentT, Uniform, checked_temperature
from nvpflow._core import FlowSpec
from nvpflow.flow import Flow

__all__ = ["density", "forward", "inverse", "log_prob", "nll", "parameters", "sample", "sample_and_log_prob"]


def _register() -> None:
    for name, handler in _core._xla_handlers().items():
        try:
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        except Exception as error:
            version = jaxlib.__version__  # type: ignore[attr-defined]
            raise ImportError(
                f"jaxlib {version} does not take nvpflow's functions, written for versions 0.1 to 0.3 of "
                f"XLA's foreign-function interface: {error}. Install another jaxlib or a newer nvpflow"
            ) from error


_register()


# ---- a target --------------------------------------------------------------------------------------------------------


def density(function: Callable[..., jax.Array]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return what `nvpflow.Flow.fit_density` takes, of a log-density in JAX.

    Parameters
    ----------
    function
        Of an array x [B, D], and of its contexts [B, C] where the flow has one. It returns log p [B], each of which
        depends on its own row alone: ``jax.vmap`` makes one of a function of one row. JAX traces it and forms the
        gradient. Of a float64 flow it gets float64 only where ``jax_enable_x64`` is on.

    Returns
    -------
    callable
        Of arrays of NumPy, which returns (log p [B], its gradient by x [B, D]).

    Examples
    --------
    >>> import jax, nvpflow, nvpflow.jax
    >>> target = nvpflow.jax.density(lambda x: -0.5 * (x**2).sum(axis=1))
    >>> flow = nvpflow.build(3, 4, (32,), standardize=False)
    >>> history = flow.fit_density(target, steps=20, progress=False)
    """
    if not callable(function):
        raise TypeError(f"function is {_checks.describe(function)}, expected a function of an array x [B, D]")

    @jax.jit
    def value_and_gradient(x: jax.Array, *context: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p, back = jax.vjp(lambda rows: function(rows, *context), x)
        shape = jnp.shape(log_p)
        if shape != x.shape[:1]:
            raise ValueError(
                f"the function of nvpflow.jax.density returned an array {list(shape)}, expected [{x.shape[0]}]"
            )
        return log_p, back(jnp.ones_like(log_p))[0]

    def log_density(x: np.ndarray, *context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_p, gradient = value_and_gradient(x, *context)
        return np.asarray(log_p), np.asarray(gradient)

    return log_density


# ---- the functions ---------------------------------------------------------------------------------------------------


@_hints.explained
def parameters(flow: Flow) -> dict[str, jax.Array]:
    """Return a copy of a flow's parameters as arrays of JAX.

    Parameters
    ----------
    flow
        The model; later changes of it do not reach the arrays. What it rounds on the CPU (``weights="bfloat16"``) they
        do not.

    Returns
    -------
    dict
        By the names of `nvpflow.Flow.parameters`, of its shapes and dtype. ``flow.set_parameters`` takes such a dict.

    Raises
    ------
    TypeError
        `flow` is not an `nvpflow.Flow`, or is a float64 flow and ``jax_enable_x64`` is off.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow is {_checks.describe(flow)}, expected an nvpflow.Flow")
    _check_x64(flow.spec)
    _checks.whole_mean(flow)
    _checks.no_discrete("flow", flow.spec)
    flat = flow._copy_flat_parameters()
    return {
        name: jnp.array(flat[offset : offset + math.prod(shape)].reshape(shape))
        for name, shape, offset in _layout(flow.spec)
    }


@_hints.explained
def initialize_from(
    spec: FlowSpec,
    parameters: Mapping[str, Any],
    x: Any,
    context: Any = None,
    *,
    sample_weight: Any = None,
    standardize: Literal["auto", "mean", "robust"] | None = None,
    allow_degenerate: bool = False,
) -> dict[str, jax.Array]:
    """Return the parameters with those set from rows that `nvpflow.Flow.initialize_from` sets.

    Parameters
    ----------
    spec
        What the model is, ``flow.spec``.
    parameters
        An array for each name of `parameters`; they stay as they are.
    x
        Rows [N, D] with values: it cannot be traced.
    context
        Of a flow with a context: [N, C], with values.
    sample_weight
        What each row counts for, [N], with values.
    standardize
        What the layer is set from, as in `nvpflow.Flow.fit`.
    allow_degenerate
        Keep columns that are copies or linear combinations of others where a layer whitens, as in `nvpflow.Flow.fit`.

    Returns
    -------
    dict
        As of `parameters`; the other arrays are those given.

    Raises
    ------
    TypeError, ValueError
        The flow has nothing that is set so, a row holds NaN or infinity, a column is constant, or the context is
        missing.
    """
    _check_spec(spec)
    tensors = _checked_parameters(spec, parameters)
    flow = Flow(spec)
    names = [name for name, _, _ in _layout(spec)]
    flow.set_parameters({name: np.asarray(tensor) for name, tensor in zip(names, tensors, strict=True)})
    flow.initialize_from(
        np.asarray(x),
        context=None if context is None else np.asarray(context),
        sample_weight=None if sample_weight is None else np.asarray(sample_weight),
        standardize="auto" if standardize is None else standardize,
        allow_degenerate=allow_degenerate,
    )
    values = flow.parameters()
    return {**parameters, **{name: jnp.array(values[name]) for name in _core._from_data(spec)}}


@_hints.explained
def forward(
    spec: FlowSpec, parameters: Mapping[str, Any], x: Any, *, context: Any = None, num_threads: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Return z and ``log|det dz/dx|``: data to latent.

    Parameters
    ----------
    spec
        What the model is, ``flow.spec``. Static: it cannot be traced.
    parameters
        An array of the spec's dtype for each name that `parameters` gives.
    x
        Rows [..., D] of the spec's dtype, or of one that converts to it without loss.
    context
        Of a flow with a context, which needs it: a row for each row of `x`, [..., C], or one for all, [C]. Numbers,
        which are rounded to the spec's dtype.
    num_threads
        Of the kernels: 0 is as many as this process may use. Small batches stay on XLA's thread.

    Returns
    -------
    z
        Latents [..., D].
    log_det
        [...], nats.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected; at tracing, since shapes and dtypes are known then.
    NotImplementedError
        A second derivative is asked for; there are first ones only, by reverse mode.

    Notes
    -----
    Differentiable by `parameters`, `x` and `context`. ``vmap`` only over rows, contexts or both becomes one call on all
    rows, and so does the gradient of what is made of its results, such as ``-vmap(log_prob)(x).mean()``. ``vmap`` over
    parameters, or of gradients by the parameters, is one call after the other.
    """
    call, rows, contexts, tensors = _prepare(spec, parameters, "x", x, context, num_threads)
    z, log_det = _values(call.of_kind("forward"), rows, contexts, tensors)
    return z.reshape(jnp.shape(x)), log_det.reshape(jnp.shape(x)[:-1])


@_hints.explained
def inverse(
    spec: FlowSpec,
    parameters: Mapping[str, Any],
    z: Any,
    *,
    context: Any = None,
    with_log_det: bool = False,
    num_threads: int = 0,
) -> Any:
    """Return x [..., D], latent to data; with `with_log_det`, ``(x, log|det dx/dz| [...], nats)``.

    Parameters, errors and notes are those of `forward`; `z` are latents [..., D].
    """
    call, rows, contexts, tensors = _prepare(spec, parameters, "z", z, context, num_threads)
    x, log_det = _values(call.of_kind("inverse"), rows, contexts, tensors)
    x = x.reshape(jnp.shape(z))
    return (x, log_det.reshape(jnp.shape(z)[:-1])) if _checks.boolean("with_log_det", with_log_det) else x


@_hints.explained
def log_prob(
    spec: FlowSpec,
    parameters: Mapping[str, Any],
    x: Any,
    *,
    context: Any = None,
    temperature: float | None = None,
    num_threads: int = 0,
) -> jax.Array:
    """Return log p(x) [...], nats; with a context log p(x | context).

    Parameters, errors and notes are those of `forward`; `temperature` is that of `sample`.
    """
    call, rows, contexts, tensors = _prepare(spec, parameters, "x", x, context, num_threads)
    heat = checked_temperature(temperature, spec.base)
    if heat == 1:
        (result,) = _values(call.of_kind("log_prob"), rows, contexts, tensors)
    else:
        z, log_det = _values(call.of_kind("forward"), rows, contexts, tensors)
        result = _log_normal(z, heat) + log_det
        # NaN where rows hold NaN or infinity, and nowhere else.
        result = jnp.where(jnp.isnan(result) & ~jnp.isnan(log_det), -jnp.inf, result)
    return result.reshape(jnp.shape(x)[:-1])


@_hints.explained
def nll(
    spec: FlowSpec,
    parameters: Mapping[str, Any],
    x: Any,
    *,
    context: Any = None,
    sample_weight: Any = None,
    num_threads: int = 0,
) -> jax.Array:
    """Return the mean of -log p over all rows of x, a scalar, nats: the loss of maximum likelihood.

    It is ``-log_prob(spec, parameters, x).mean()`` with the sum in float64. It is faster to differentiate: the value
    and the gradients by parameters, `x` and `context` come from one pass. With weights they take two, and the sum is
    in the spec's dtype.

    Parameters, errors and notes are those of `forward`; `x` has at least one row.

    Parameters
    ----------
    sample_weight
        w [...], what each row of x counts for: at least 0 and not all of them 0. Weights that are traced are not
        checked for that. The loss is then ``-sum(w * log p) / sum(w)``. A row of weight 0 changes nothing, whatever it
        holds.
    """
    call, rows, contexts, tensors = _prepare(spec, parameters, "x", x, context, num_threads)
    if rows.shape[0] == 0:
        raise ValueError(f"x has shape {jnp.shape(x)}, expected at least one row: the mean over none is not defined")
    if sample_weight is None:
        return _nll(call, rows, contexts, tensors)  # type: ignore[no-any-return]
    weights = _checked_weights(spec, sample_weight, jnp.shape(x))
    counts, some = weights > 0, jnp.argmax(weights)
    rows = jnp.where(counts[:, None], rows, rows[some])
    if contexts is not None and len(contexts) > 1:
        contexts = jnp.where(counts[:, None], contexts, contexts[some])
    (log_p,) = _values(call.of_kind("log_prob"), rows, contexts, tensors)
    return -(weights / weights.sum() * jnp.where(counts, log_p, 0)).sum()


@_hints.explained
def sample(
    spec: FlowSpec,
    parameters: Mapping[str, Any],
    key: jax.Array,
    n: int,
    *,
    context: Any = None,
    temperature: float | None = None,
    num_threads: int = 0,
) -> jax.Array:
    """Return n rows [n, D], differentiable by the parameters: the inverse of noise ``jax.random.normal(key, (n, D))``.

    Under another base (`FlowSpec.base`) the noise is of that. Of the uniform one it is ``jax.random.uniform`` of its
    interval. Of student_t it is ``sqrt(df (u^(-2 / df) - 1)) cos(2 pi v)``, differentiable by the degrees of freedom.
    Which component of a mixture a row is of has no derivative. Where one by the mixture's parameters is asked for,
    NotImplementedError says so.

    Parameters
    ----------
    spec, parameters, num_threads
        As of `forward`.
    key
        Of ``jax.random``. The rows are not those of `nvpflow.Flow.sample`, whose noise is its own.
    n
        How many rows; under several contexts, for each of them. Static.
    context
        Of a flow with a context: one [C], or several [M, C] (any leading axes [..., C]). The rows are differentiable by
        it.
    temperature
        T of the base N(0, T I) that takes the place of N(0, I), 1e-12 to 1e12. Only a normal base has one. Static.

    Returns
    -------
    x
        [n, D], or [M, n, D] under M contexts, from the noise ``jax.random.normal(key, (M, n, D))``.
    """
    return _drawn(spec, parameters, key, n, context, temperature, num_threads)[0]


@_hints.explained
def sample_and_log_prob(
    spec: FlowSpec,
    parameters: Mapping[str, Any],
    key: jax.Array,
    n: int,
    *,
    context: Any = None,
    temperature: float | None = None,
    num_threads: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Return the rows of `sample` and log p of each, [n] or [M, n], nats, from one pass: differentiable as they are.

    Arguments are those of `sample`.
    """
    x, log_det, noise = _drawn(spec, parameters, key, n, context, temperature, num_threads)
    heat = checked_temperature(temperature, spec.base)
    return x, _log_density(spec, _of_base(spec, parameters), noise, heat) - log_det


def _drawn(
    spec: FlowSpec,
    parameters: Mapping[str, Any],
    key: jax.Array,
    n: int,
    context: Any,
    temperature: float | None,
    num_threads: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return a sample, its log|det dx/dz| and the noise that it is made of."""
    count = _checks.count("n", n)
    call, tensors = _checked_call(spec, parameters, num_threads)
    contexts, leading = _checked_sample_context(spec, context)
    heat = checked_temperature(temperature, spec.base)
    noise = _noise(spec, _of_base(spec, parameters), key, (*leading, count, spec.input_size))
    if heat != 1:
        noise = noise * math.sqrt(heat)
    x, log_det = _values(call.of_kind("inverse"), _as_rows(noise), contexts, tensors)
    return x.reshape(noise.shape), log_det.reshape(noise.shape[:-1]), noise


def _of_base(spec: FlowSpec, parameters: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the base's own tensors, those of a mixture such that a derivative by them is refused."""
    own = {name: jnp.asarray(value) for name, value in parameters.items() if name.startswith("base.")}
    return _without_derivative(own) if isinstance(spec.base, Mixture) else own  # type: ignore[no-any-return]


@jax.custom_vjp
def _without_derivative(own: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return own


def _refuse_derivative(*_: Any) -> Any:
    raise NotImplementedError(
        "a sample of a mixture base has no derivative by the base's parameters, which say which component a row is of; "
        "take jax.lax.stop_gradient of the parameters that begin with 'base.'"
    )


_without_derivative.defvjp(lambda own: (own, None), _refuse_derivative)


def _factors(base: Mixture, own: Mapping[str, jax.Array]) -> jax.Array:
    """Return F of each component [M, D, D], whose covariance is F F^T."""
    components, size = own["base.means"].shape
    unit = jnp.broadcast_to(jnp.eye(size, dtype=own["base.means"].dtype), (components, size, size))
    if base.covariance == "full":
        rows, columns = np.tril_indices(size, -1)
        unit = unit.at[:, rows, columns].set(own["base.lower"])
    return unit * jnp.exp(own["base.log_scales"])[:, None]


def _log_normal(z: jax.Array, temperature: float) -> jax.Array:
    """Return log N(z; 0, T I) [...], nats."""
    return -0.5 * (jnp.square(z).sum(-1) / temperature + z.shape[-1] * math.log(2 * math.pi * temperature))


def _log_density(spec: FlowSpec, own: Mapping[str, jax.Array], z: jax.Array, temperature: float) -> jax.Array:
    """Return log p [...] of latents [..., D] that were drawn from the base at a temperature, nats."""
    base, size = spec.base, spec.input_size
    if isinstance(base, Normal):
        return _log_normal(z, temperature)
    if isinstance(base, Uniform):
        return jnp.full(z.shape[:-1], -size * math.log(base.high - base.low), z.dtype)
    if isinstance(base, StudentT):
        return jax.scipy.stats.t.logpdf(z, jnp.exp(own["base.log_df"])).sum(-1)
    away = jnp.expand_dims(z, -2) - own["base.means"]  # [..., M, D]
    factors = jnp.broadcast_to(_factors(base, own), (*away.shape, size))
    whitened = jax.scipy.linalg.solve_triangular(factors, away[..., None], lower=True)[..., 0]
    log_peaks = jax.nn.log_softmax(own["base.logits"]) - own["base.log_scales"].sum(-1)
    log_p = log_peaks - 0.5 * (jnp.square(whitened).sum(-1) + size * math.log(2 * math.pi))
    return jax.nn.logsumexp(log_p, axis=-1)


def _noise(spec: FlowSpec, own: Mapping[str, jax.Array], key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return latents of the spec's base."""
    base = spec.base
    if isinstance(base, Normal):
        return jax.random.normal(key, shape, dtype=spec.dtype)
    if isinstance(base, Uniform):
        drawn = jax.random.uniform(key, shape, spec.dtype, base.low, base.high)
        return jnp.minimum(drawn, jnp.asarray(base.high, spec.dtype))  # where it was rounded up
    if isinstance(base, StudentT):  # Bailey (1994): smooth in the degrees of freedom, for nothing is rejected
        of_radius, of_angle = jax.random.split(key)
        df, angle = jnp.exp(own["base.log_df"]), jax.random.uniform(of_angle, shape, spec.dtype, 0, 2 * math.pi)
        x = 2 * jax.random.exponential(of_radius, shape, spec.dtype) / df
        return jnp.sqrt(df * -jnp.expm1(-x)) * jnp.exp(x / 2) * jnp.cos(angle)
    of_component, of_normal = jax.random.split(key)
    chosen = jax.random.categorical(of_component, own["base.logits"], shape=shape[:-1])
    normal = jax.random.normal(of_normal, shape, dtype=spec.dtype)
    return own["base.means"][chosen] + jnp.einsum("...ij,...j->...i", _factors(base, own)[chosen], normal)


# ---- arguments -------------------------------------------------------------------------------------------------------

# What converts to a flow's dtype without loss.
_NARROWER = {"float32": ("float16", "bfloat16"), "float64": ("float16", "bfloat16", "float32")}


@functools.lru_cache(maxsize=64)
def _layout(spec: FlowSpec) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """Name, shape and place of every parameter, in the order that the handlers take them."""
    return tuple(_core._layout_of(spec))


def _check_spec(spec: Any) -> None:
    if not isinstance(spec, FlowSpec):
        raise TypeError(f"spec is {_checks.describe(spec)}, expected an nvpflow.FlowSpec, as flow.spec is")
    _checks.no_discrete("spec", spec)


def _check_x64(spec: FlowSpec) -> None:
    if spec.dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise TypeError(
            'the flow is a float64 one, and JAX makes float32 of its arrays; jax.config.update("jax_enable_x64", True) '
            'ends that, flow.astype("float32") gives a flow without the need'
        )


def _prepare(
    spec: FlowSpec, parameters: Mapping[str, Any], name: str, rows: Any, context: Any, num_threads: int
) -> tuple[_Call, jax.Array, jax.Array | None, tuple[jax.Array, ...]]:
    """Check the arguments of a function of rows, which come back as [B, D], and their context as [B, C] or [1, C]."""
    call, tensors = _checked_call(spec, parameters, num_threads)
    given = _checked_rows(spec, name, rows)
    return call, given, _checked_context(spec, context, name, jnp.shape(rows)), tensors


def _checked_call(
    spec: FlowSpec, parameters: Mapping[str, Any], num_threads: int
) -> tuple[_Call, tuple[jax.Array, ...]]:
    _check_spec(spec)
    threads = _checks.integer("num_threads", num_threads)
    if threads < 0:
        raise ValueError(f"num_threads is {threads}, expected 0 or more")
    return _Call(spec, threads), _checked_parameters(spec, parameters)


def _as_rows(array: jax.Array) -> jax.Array:
    """[..., k] -> [B, k]."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _checked_rows(spec: FlowSpec, name: str, rows: Any) -> jax.Array:
    rows = jnp.asarray(rows)
    if rows.ndim == 0 or rows.shape[-1] != spec.input_size:
        raise ValueError(f"{name} has shape {rows.shape}, expected (..., {spec.input_size})")
    if rows.dtype != spec.dtype:
        if rows.dtype.name not in _NARROWER[spec.dtype]:
            way_out = "convert the rows with .astype()"
            if spec.dtype == "float32" and rows.dtype.kind in "fiu" and not spec._is_bounded:
                way_out = (
                    "take flow.astype('float64'); a cast of the rows to float32 loses digits where values are large "
                    "beside their spread"
                )
            raise TypeError(f"{name} has dtype {rows.dtype}, expected {spec.dtype}, the flow's; {way_out}")
        rows = rows.astype(spec.dtype)
    return _as_rows(rows)


def _checked_context(spec: FlowSpec, context: Any, name: str, shape: tuple[int, ...]) -> jax.Array | None:
    """Check the context of rows of a shape; None where the flow has none."""
    one = (spec.context_size,)
    each = (*shape[:-1], *one)
    wanted = f"{one} beside one row" if each == one else f"{each}, one for each row of {name}, or {one}, one for all"
    given = _context_array(spec, context, wanted)
    if given is None:
        return None
    if given.shape not in (one, each):
        way = _way_to_rows(given.shape, spec)
        if each == (1, *one) and given.shape[1:] == one:
            way = f"; jnp.tile({name}, ({len(given)}, 1)) puts the row beside each context"
        raise ValueError(f"context has shape {given.shape}, expected {wanted}{way}")
    return _as_rows(given)


def _checked_weights(spec: FlowSpec, weights: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return weights [B] of rows of a shape, those with values checked."""
    traced = isinstance(weights, jax.core.Tracer)
    given = weights if traced else np.asarray(weights)
    if given.shape != shape[:-1]:
        raise ValueError(f"sample_weight has shape {given.shape}, expected {shape[:-1]}, a weight for each row of x")
    if not traced:
        given = _sample_weight.read(given.reshape(-1), given.size)
        given = given / given.max()  # which every dtype holds
    return jnp.asarray(given).reshape(-1).astype(spec.dtype)


def _way_to_rows(shape: tuple[int, ...], spec: FlowSpec) -> str:
    """Return what to say of numbers that were to be contexts of one number; "" of all else."""
    one = spec.context_size == 1 and len(shape) == 1
    return "; jnp.reshape(context, (-1, 1)) makes a row of each number" if one else ""


def _checked_sample_context(spec: FlowSpec, context: Any) -> tuple[jax.Array | None, tuple[int, ...]]:
    """Check the contexts of a sample, which come back as [M, C], with the axes before the last."""
    size = spec.context_size
    wanted = f"({size},), or (..., {size}) for rows under each"
    given = _context_array(spec, context, wanted)
    if given is None:
        return None, ()
    if given.ndim == 0 or given.shape[-1] != size:
        raise ValueError(f"context has shape {given.shape}, expected {wanted}{_way_to_rows(given.shape, spec)}")
    return _as_rows(given), given.shape[:-1]


def _context_array(spec: FlowSpec, context: Any, wanted: str) -> jax.Array | None:
    """Numbers of the spec's dtype, of any shape; None of a flow without a context."""
    if spec.context_size == 0:
        if context is None:
            return None
        raise ValueError(
            f"context is {type(context).__name__}, expected None: the flow has no context; build it with context_size="
        )
    if context is None:
        raise ValueError(f"context is missing, expected {wanted}: the flow is a density p(x | context)")
    try:
        array = jnp.asarray(context)
    except (TypeError, ValueError):
        _checks.numbers("context", context)  # which says what is wrong, of text for example
        raise
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"context has dtype {array.dtype}, expected {spec.dtype}")
    return array.astype(spec.dtype)


def _checked_parameters(spec: FlowSpec, parameters: Any) -> tuple[jax.Array, ...]:
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters is {_checks.describe(parameters)}, expected a dict from names to arrays")
    _check_x64(spec)
    layout = _layout(spec)
    _checks.names("parameters", parameters, [name for name, _, _ in layout])
    tensors = []
    for name, shape, _ in layout:
        value = jnp.asarray(parameters[name])
        if value.shape != shape:
            raise ValueError(f"parameters[{name!r}] has shape {value.shape}, expected {shape}")
        if value.dtype != spec.dtype:
            raise TypeError(f"parameters[{name!r}] has dtype {value.dtype}, expected {spec.dtype}, as spec says")
        tensors.append(value)
    return tuple(tensors)


# ---- calls of the handlers -------------------------------------------------------------------------------------------

# An argument of this shape says zero, a result of it is not wanted.
_ABSENT = (0,)


@dataclass(frozen=True)
class _Call:
    """What a handler is told beside arrays, and what it answers; a static value to JAX."""

    spec: FlowSpec
    num_threads: int
    handler: str = ""
    inverse: bool = False
    results: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> _Call:
        """Return the call of "forward", "inverse" or "log_prob"."""
        if kind == "log_prob":
            return self._of("log_prob", False, "row")
        return self._of("transform", kind == "inverse", "rows", "row")

    def vjp(self, wanted: _Wanted) -> _Call:
        """Return the call of its vector-Jacobian product."""
        return self._of(f"{self.handler.removeprefix('nvpflow_')}_vjp", self.inverse, *self._gradients(wanted))

    def nll(self, of_parameters: bool) -> _Call:
        """Return the call of the mean of -log p and its gradient."""
        return self._of("nll", False, "mean", "parameters" if of_parameters else "absent")

    def nll_vjp(self, wanted: _Wanted) -> _Call:
        """Return the call of the mean of -log p, of each row's log p, and of its vector-Jacobian product."""
        return self._of("nll_vjp", False, "mean", "row", *self._gradients(wanted))

    def _gradients(self, wanted: _Wanted) -> list[str]:
        results = ["rows" if wanted.rows else "absent", "parameters" if wanted.parameters else "absent"]
        return [*results, "context" if wanted.context else "absent"] if self.has_context else results

    def _of(self, handler: str, inverse: bool, *results: str) -> _Call:
        return _Call(self.spec, self.num_threads, f"nvpflow_{handler}", inverse, results)

    @property
    def has_context(self) -> bool:
        """Whether the second input is a context."""
        return self.spec.context_size > 0

    @property
    def is_by_row(self) -> bool:
        """Whether every result belongs to a row or to its context."""
        return all(result in ("rows", "row", "context", "absent") for result in self.results)

    def shapes(self, rows: int, contexts: int) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes of the results of a call on so many rows and contexts."""
        _, last, offset = _layout(self.spec)[-1]
        shapes: dict[str, tuple[int, ...]] = {
            "rows": (rows, self.spec.input_size),
            "row": (rows,),
            "context": (contexts, self.spec.context_size),
            "mean": (),
            "parameters": (offset + math.prod(last),),
            "absent": _ABSENT,
        }
        dtype = self.spec.dtype
        return [jax.ShapeDtypeStruct(shapes[r], dtype) for r in self.results]  # type: ignore[no-untyped-call]


def _inputs(rows: jax.Array, context: jax.Array | None, *cotangents: jax.Array) -> tuple[jax.Array, ...]:
    """Return what a handler takes before the parameters."""
    return (rows, *cotangents) if context is None else (rows, context, *cotangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(call: _Call, inputs: tuple[jax.Array, ...], tensors: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Call a handler; under vmap once with all rows, or as often as there are sets of parameters."""

    @jax.custom_batching.custom_vmap  # type: ignore[untyped-decorator, unused-ignore]
    def run(inputs: tuple[jax.Array, ...], tensors: tuple[jax.Array, ...]) -> list[jax.Array]:
        shapes = call.shapes(inputs[0].shape[0], inputs[1].shape[0] if call.has_context else 0)
        handler: Any = jax.ffi.ffi_call(call.handler, shapes, vmap_method="sequential")
        attributes = {"spec": call.spec.to_json(), "num_threads": np.int64(call.num_threads)}
        return list(handler(*inputs, *tensors, **attributes, inverse=np.int64(call.inverse)))

    @run.def_vmap  # type: ignore[untyped-decorator, unused-ignore]
    def run_batched(count: int, batched: Any, inputs: tuple[jax.Array, ...], tensors: tuple[jax.Array, ...]) -> Any:
        if any(batched[1]) or not call.is_by_row:
            return _run_one_by_one(_run, call, batched, inputs, tensors), [True] * len(call.results)
        return _run_merged(_run, call, count, batched[0], inputs, tensors)

    return run(inputs, tensors)  # type: ignore[no-any-return]


@_run.defjvp
def _no_second_derivatives(call: _Call, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "nvpflow.jax has first derivatives only, by reverse mode: a gradient of its functions cannot be differentiated "
        "again"
    )


def _run_one_by_one(
    run: Any, call: _Call, batched: Any, inputs: Sequence[jax.Array], tensors: Sequence[jax.Array]
) -> list[jax.Array]:
    """Run a call once for each set of parameters; run: `_run` or `_bind`."""
    flags = [*batched[0], *batched[1]]
    arrays = [*inputs, *tensors]

    def one(moving: list[jax.Array]) -> list[jax.Array]:
        left = iter(moving)
        every = [next(left) if flag else array for flag, array in zip(flags, arrays, strict=True)]
        return run(call, tuple(every[: len(inputs)]), tuple(every[len(inputs) :]))  # type: ignore[no-any-return]

    return jax.lax.map(one, [array for flag, array in zip(flags, arrays, strict=True) if flag])  # type: ignore[no-any-return]


def _run_merged(
    run: Any, call: _Call, count: int, batched: Any, inputs: Sequence[jax.Array], tensors: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[bool]]:
    """Make one call on the rows of all; a context that is one for all rows of all stays so."""

    def merged(place: int) -> jax.Array:
        array, is_batched = inputs[place], batched[place]
        is_context = call.has_context and place == 1
        if array.shape == _ABSENT:
            return array
        if not is_batched:
            if is_context and array.shape[0] == 1 and "context" not in call.results:
                return array
            array = jnp.broadcast_to(array, (count, *array.shape))
        return array.reshape(count * array.shape[1], *array.shape[2:])

    sizes = [array.shape[1 if is_batched else 0] for array, is_batched in zip(inputs[:2], batched, strict=False)]
    given = tuple(merged(place) for place in range(len(inputs)))
    shapes = call.shapes(sizes[0], sizes[1] if call.has_context else 0)
    are_batched = [result != "absent" for result in call.results]
    results = _run_summed(run, call, given, tensors)
    split = [
        result.reshape(count, *shape.shape) if is_batched else result
        for result, shape, is_batched in zip(results, shapes, are_batched, strict=True)
    ]
    return split, are_batched


def _run_summed(run: Any, call: _Call, inputs: tuple[jax.Array, ...], tensors: Sequence[jax.Array]) -> list[jax.Array]:
    """Make a call; the cotangents of contexts that each belong to several rows are summed over these."""
    if "context" not in call.results or inputs[1].shape[0] in (1, inputs[0].shape[0]):
        return run(call, inputs, tuple(tensors))  # type: ignore[no-any-return]
    rows, context, *cotangents = inputs
    contexts, size = context.shape
    shape = (contexts, rows.shape[0] // contexts, size)
    each = _as_rows(jnp.broadcast_to(context[:, None], shape))
    *others, of_rows = run(call, (rows, each, *cotangents), tuple(tensors))
    return [*others, of_rows.reshape(shape).sum(axis=1)]


# ---- derivatives -----------------------------------------------------------------------------------------------------
# Only the forward pass knows the wanted derivatives. What it says of them reaches the backward pass within the
# residuals, as a part of their structure.


class _Wanted(NamedTuple):
    """Of what a derivative is asked for."""

    rows: bool
    context: bool
    parameters: bool


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class _Residuals:
    """What a backward pass needs."""

    rows: jax.Array
    context: jax.Array | None
    tensors: tuple[jax.Array, ...]
    wanted: _Wanted

    @classmethod
    def of(cls, rows: Any, context: Any, tensors: Any) -> _Residuals:
        """Return those of what a forward pass gets."""
        wanted = _Wanted(
            rows.perturbed, context is not None and context.perturbed, any(tensor.perturbed for tensor in tensors)
        )
        return cls(
            rows.value, None if context is None else context.value, tuple(tensor.value for tensor in tensors), wanted
        )

    def run(self, call: _Call, *cotangents: jax.Array) -> list[jax.Array]:
        """Call a handler."""
        return _run_summed(_run, call, _inputs(self.rows, self.context, *cotangents), self.tensors)

    def tree_flatten(self) -> tuple[Any, _Wanted]:
        """As JAX wants it."""
        return (self.rows, self.context, self.tensors), self.wanted

    @classmethod
    def tree_unflatten(cls, wanted: _Wanted, values: Any) -> _Residuals:
        """As JAX wants it."""
        rows, context, tensors = values
        return cls(rows, context, tensors, wanted)


def _products(call: _Call, residuals: _Residuals, cotangents: list[jax.Array]) -> tuple[Any, Any, Any]:
    """Return the gradients of values by rows, by context and by each tensor, None for those that are not wanted."""
    wanted = residuals.wanted
    of_rows, flat, *of_context = residuals.run(call.vjp(wanted), *cotangents)
    return (
        of_rows if wanted.rows else None,
        of_context[0] if wanted.context else None,
        _parts(call, flat) if wanted.parameters else None,
    )


# Values are a primitive of JAX's, so that vmap comes before the derivative: a gradient of vmap over rows is that of one
# call on all rows. custom_vjp would batch the derivative, whose sum over the rows nobody could then see.
#
# Its arguments are rows, the context where there is one, and the tensors. Its derivative is linear in their tangents:
# a second primitive, which has those that move behind all arguments, and no other rule than its transpose.

_values_p = jax.extend.core.Primitive("nvpflow_values")
_tangent_p = jax.extend.core.Primitive("nvpflow_tangent")
_values_p.multiple_results = _tangent_p.multiple_results = True


def _values(call: _Call, rows: jax.Array, context: jax.Array | None, tensors: tuple[jax.Array, ...]) -> list[jax.Array]:
    return _bind(call, _inputs(rows, context), tensors)


def _bind(call: _Call, inputs: Sequence[jax.Array], tensors: Sequence[jax.Array]) -> list[jax.Array]:
    return list(_values_p.bind(*inputs, *tensors, call=call))


def _split(call: _Call, arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return what a handler takes before the parameters, and the parameters."""
    first = 2 if call.has_context else 1
    return arguments[:first], arguments[first:]


def _values_of(*arguments: jax.Array, call: _Call) -> list[jax.Array]:
    inputs, tensors = _split(call, arguments)
    return _run(call, tuple(inputs), tuple(tensors))  # type: ignore[no-any-return]


def _values_shapes(*arguments: Any, call: _Call, **_: Any) -> list[Any]:
    shapes = call.shapes(arguments[0].shape[0], arguments[1].shape[0] if call.has_context else 0)
    return [jax.core.ShapedArray(shape.shape, shape.dtype) for shape in shapes]


def _values_batched(arguments: Sequence[Any], axes: Sequence[int | None], *, call: _Call) -> tuple[Any, Any]:
    pairs = list(zip(arguments, axes, strict=True))
    count = next(array.shape[axis] for array, axis in pairs if axis is not None)
    inputs, tensors = _split(call, [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in pairs])
    of_inputs, of_tensors = batched = _split(call, [axis is not None for axis in axes])
    if any(of_tensors):
        return _run_one_by_one(_bind, call, batched, inputs, tensors), [0] * len(call.results)
    results, are_batched = _run_merged(_bind, call, count, of_inputs, inputs, tensors)
    return results, [0 if is_batched else None for is_batched in are_batched]


def _values_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: _Call) -> tuple[Any, Any]:
    moving = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero))
    given = [tangents[i] for i in moving]
    return _values_p.bind(*primals, call=call), _tangent_p.bind(*primals, *given, call=call, moving=moving)


def _tangent_transpose(cotangents: Sequence[Any], *arguments: Any, call: _Call, moving: tuple[int, ...]) -> list[Any]:
    primals = arguments[: len(arguments) - len(moving)]
    inputs, tensors = _split(call, primals)
    context = inputs[1] if call.has_context else None
    wanted = _Wanted(0 in moving, call.has_context and 1 in moving, moving[-1] >= len(inputs))
    zero = jnp.zeros(_ABSENT, call.spec.dtype)
    given = [zero if isinstance(c, ad.Zero) else c for c in cotangents]
    if all(c is zero for c in given):
        return [None] * len(arguments)
    of_rows, of_context, of_tensors = _products(call, _Residuals(inputs[0], context, tuple(tensors), wanted), given)
    gradients = [of_rows, *([of_context] if call.has_context else []), *(of_tensors or [None] * len(tensors))]
    return [None] * len(primals) + [gradients[i] for i in moving]


def _no_forward_mode(*arguments: Any, **_: Any) -> Any:
    raise NotImplementedError(
        "nvpflow.jax has first derivatives only, by reverse mode: take jax.grad, jax.vjp or jax.jacrev once, not "
        "forward-mode differentiation (jax.jvp, jax.jacfwd, jax.hessian)"
    )


_values_p.def_impl(_values_of)
_values_p.def_abstract_eval(_values_shapes)
mlir.register_lowering(_values_p, mlir.lower_fun(_values_of, multiple_results=True))
batching.primitive_batchers[_values_p] = _values_batched
ad.primitive_jvps[_values_p] = _values_jvp
_tangent_p.def_abstract_eval(_values_shapes)
ad.primitive_transposes[_tangent_p] = _tangent_transpose
_tangent_p.def_impl(_no_forward_mode)
mlir.register_lowering(_tangent_p, _no_forward_mode)
batching.primitive_batchers[_tangent_p] = _no_forward_mode
ad.primitive_jvps[_tangent_p] = _no_forward_mode


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(call: _Call, rows: jax.Array, context: jax.Array | None, tensors: tuple[jax.Array, ...]) -> jax.Array:
    return _run(call.nll(of_parameters=False), _inputs(rows, context), tensors)[0]


def _nll_forward(call: _Call, rows: Any, context: Any, tensors: Any) -> Any:
    residuals = _Residuals.of(rows, context, tensors)
    wanted = residuals.wanted
    if not wanted.parameters:
        return residuals.run(call.nll(of_parameters=False))[0], residuals
    # Value and gradients come from one pass: those of the parameters are of the whole batch under vmap, too.
    if not (wanted.rows or wanted.context):
        value, flat = residuals.run(call.nll(of_parameters=True))
        return value, (None, None, flat)
    value, _, of_rows, flat, *of_context = residuals.run(call.nll_vjp(wanted), _nll_cotangent(residuals.rows))
    return value, (of_rows if wanted.rows else None, of_context[0] if wanted.context else None, flat)


def _nll_cotangent(rows: jax.Array) -> jax.Array:
    """Return that of each row's log p."""
    return jnp.full(rows.shape[0], -1 / rows.shape[0], rows.dtype)


def _nll_backward(call: _Call, residuals: Any, cotangent: Any) -> tuple[Any, Any, Any]:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    if isinstance(residuals, _Residuals):
        return _products(call.of_kind("log_prob"), residuals, [_nll_cotangent(residuals.rows) * cotangent])
    of_rows, of_context, flat = jax.tree.map(lambda gradient: gradient * cotangent, residuals)
    return of_rows, of_context, _parts(call, flat)


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


def _parts(call: _Call, flat: jax.Array) -> tuple[jax.Array, ...]:
    """Split the gradient of all parameters into those of each."""
    return tuple(flat[offset : offset + math.prod(shape)].reshape(shape) for _, shape, offset in _layout(call.spec))
