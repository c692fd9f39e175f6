"""JAX: a flow's functions under ``jit``, ``grad`` and ``vmap`` on the CPU, with nvpflow's own kernels and gradients.

Each function is a custom call of XLA: compiled programs go straight into nvpflow's kernels, without Python. All of them
are pure functions of the arrays they get; a `FlowSpec` says what model these belong to, and no `Flow` is kept.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

try:
    import jax
    import jax.custom_batching
    import jax.custom_derivatives
    import jax.ffi
    import jax.numpy as jnp
    import jaxlib
except ImportError as error:
    raise ImportError('nvpflow.jax needs JAX 0.5 or newer: pip install "jax>=0.5"') from error

from nvpflow import _checks, _core, _hints
from nvpflow._core import FlowSpec
from nvpflow.flow import Flow

__all__ = ["forward", "inverse", "log_prob", "nll", "parameters", "sample"]


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
        `flow` is no `nvpflow.Flow`, or is a float64 flow and ``jax_enable_x64`` is off.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be an nvpflow.Flow, got {_checks.describe(flow)}")
    _check_x64(flow.spec)
    _checks.whole_mean(flow)
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
    *,
    standardize: Literal["auto", "mean", "robust"] | None = None,
) -> dict[str, jax.Array]:
    """Return the parameters with the standardize layer set from rows, as `nvpflow.Flow.initialize_from` does.

    Parameters
    ----------
    spec
        What the model is, ``flow.spec``.
    parameters
        An array for each name of `parameters`; they stay as they are.
    x
        Rows [N, D] with values: it cannot be traced.
    standardize
        What the layer is set from, as in `nvpflow.Flow.fit`.

    Returns
    -------
    dict
        As of `parameters`; the other arrays are those given.

    Raises
    ------
    TypeError, ValueError
        The flow has no standardize layer in front, a row holds NaN or infinity, or a column is constant.
    """
    _check_spec(spec)
    _check_x64(spec)
    flow = Flow(spec)
    flow.initialize_from(np.asarray(x), standardize="auto" if standardize is None else standardize)
    front = {name: value for name, value in flow.parameters().items() if name.startswith("standardize_0.")}
    return {**parameters, **{name: jnp.array(value) for name, value in front.items()}}


@_hints.explained
def forward(
    spec: FlowSpec, parameters: Mapping[str, Any], x: Any, *, num_threads: int = 0
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
    Differentiable by `parameters` and `x`. ``vmap`` only over rows becomes one call on all rows; over parameters, or
    of gradients by the parameters, it is one call after the other.
    """
    call, rows, tensors = _prepare(spec, parameters, "x", x, num_threads)
    z, log_det = _values(call.of_kind("forward"), rows, tensors)
    return z.reshape(jnp.shape(x)), log_det.reshape(jnp.shape(x)[:-1])


@_hints.explained
def inverse(
    spec: FlowSpec, parameters: Mapping[str, Any], z: Any, *, with_log_det: bool = False, num_threads: int = 0
) -> Any:
    """Return x [..., D], latent to data; with `with_log_det`, ``(x, log|det dx/dz| [...], nats)``.

    Parameters, errors and notes are those of `forward`; `z` are latents [..., D].
    """
    call, rows, tensors = _prepare(spec, parameters, "z", z, num_threads)
    x, log_det = _values(call.of_kind("inverse"), rows, tensors)
    x = x.reshape(jnp.shape(z))
    return (x, log_det.reshape(jnp.shape(z)[:-1])) if _checks.boolean("with_log_det", with_log_det) else x


@_hints.explained
def log_prob(spec: FlowSpec, parameters: Mapping[str, Any], x: Any, *, num_threads: int = 0) -> jax.Array:
    """Return log p(x) [...], nats.

    Parameters, errors and notes are those of `forward`.
    """
    call, rows, tensors = _prepare(spec, parameters, "x", x, num_threads)
    (result,) = _values(call.of_kind("log_prob"), rows, tensors)
    return result.reshape(jnp.shape(x)[:-1])


@_hints.explained
def nll(spec: FlowSpec, parameters: Mapping[str, Any], x: Any, *, num_threads: int = 0) -> jax.Array:
    """Return the mean of -log p over all rows of x, a scalar, nats: the loss of maximum likelihood.

    It is ``-log_prob(spec, parameters, x).mean()`` with the sum in float64, and faster to differentiate by the
    parameters: value and gradient come from one pass.

    Parameters, errors and notes are those of `forward`; `x` has at least one row.
    """
    call, rows, tensors = _prepare(spec, parameters, "x", x, num_threads)
    if rows.shape[0] == 0:
        raise ValueError(f"x has shape {jnp.shape(x)}, expected at least one row: the mean over none is not defined")
    return _nll(call, rows, tensors)  # type: ignore[no-any-return]


@_hints.explained
def sample(spec: FlowSpec, parameters: Mapping[str, Any], key: jax.Array, n: int, *, num_threads: int = 0) -> jax.Array:
    """Return n rows [n, D], differentiable by the parameters: the inverse of ``jax.random.normal(key, (n, D))``.

    Parameters
    ----------
    spec, parameters, num_threads
        As of `forward`.
    key
        Of ``jax.random``. The rows are not those of `nvpflow.Flow.sample`, whose noise is its own.
    n
        How many rows; static.
    """
    count = _checks.integer("n", n)
    if count < 0:
        raise ValueError(f"n is {count}, expected 0 or more")
    _check_spec(spec)
    _check_x64(spec)
    noise = jax.random.normal(key, (count, spec.input_size), dtype=spec.dtype)
    return inverse(spec, parameters, noise, num_threads=num_threads)  # type: ignore[no-any-return]


# ---- arguments -------------------------------------------------------------------------------------------------------

# What converts to a flow's dtype without loss.
_NARROWER = {"float32": ("float16", "bfloat16"), "float64": ("float16", "bfloat16", "float32")}


@functools.lru_cache(maxsize=64)
def _layout(spec: FlowSpec) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """Name, shape and place of every parameter, in the order that the handlers take them."""
    return tuple(_core._layout_of(spec))


def _check_spec(spec: Any) -> None:
    if not isinstance(spec, FlowSpec):
        raise TypeError(f"spec must be an nvpflow.FlowSpec, as flow.spec is, got {_checks.describe(spec)}")


def _check_x64(spec: FlowSpec) -> None:
    if spec.dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise TypeError(
            'the flow is a float64 one, and JAX makes float32 of its arrays; jax.config.update("jax_enable_x64", True) '
            'ends that, flow.astype("float32") gives a flow without the need'
        )


def _prepare(
    spec: FlowSpec, parameters: Mapping[str, Any], name: str, rows: Any, num_threads: int
) -> tuple[_Call, jax.Array, tuple[jax.Array, ...]]:
    """Check the arguments of a function; rows come back as [B, D]."""
    _check_spec(spec)
    threads = _checks.integer("num_threads", num_threads)
    if threads < 0:
        raise ValueError(f"num_threads is {threads}, expected 0 or more")
    tensors = _checked_parameters(spec, parameters)
    rows = jnp.asarray(rows)
    if rows.ndim == 0 or rows.shape[-1] != spec.input_size:
        raise ValueError(f"{name} has shape {rows.shape}, expected (..., {spec.input_size})")
    if rows.dtype != spec.dtype:
        if rows.dtype.name not in _NARROWER[spec.dtype]:
            way_out = "convert the rows with .astype()"
            if spec.dtype == "float32" and rows.dtype.kind in "fiu":
                way_out = (
                    "take flow.astype('float64'); a cast of the rows to float32 loses digits where values are large "
                    "beside their spread"
                )
            raise TypeError(f"{name} has dtype {rows.dtype}, the flow {spec.dtype}; {way_out}")
        rows = rows.astype(spec.dtype)
    return _Call(spec, threads), rows.reshape(math.prod(rows.shape[:-1]), spec.input_size), tensors


def _checked_parameters(spec: FlowSpec, parameters: Any) -> tuple[jax.Array, ...]:
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must be a dict from names to arrays, got {_checks.describe(parameters)}")
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

    def vjp(self, of_rows: bool, of_parameters: bool) -> _Call:
        """Return the call of its vector-Jacobian product."""
        wanted = ("rows" if of_rows else "absent", "parameters" if of_parameters else "absent")
        return self._of(f"{self.handler.removeprefix('nvpflow_')}_vjp", self.inverse, *wanted)

    def nll(self, of_parameters: bool) -> _Call:
        """Return the call of the mean of -log p and its gradient."""
        return self._of("nll", False, "mean", "parameters" if of_parameters else "absent")

    def _of(self, handler: str, inverse: bool, *results: str) -> _Call:
        return _Call(self.spec, self.num_threads, f"nvpflow_{handler}", inverse, results)

    @property
    def is_by_row(self) -> bool:
        """Whether every result belongs to a row."""
        return all(result in ("rows", "row", "absent") for result in self.results)

    def shapes(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes of the results of a call on so many rows."""
        _, last, offset = _layout(self.spec)[-1]
        shapes: dict[str, tuple[int, ...]] = {
            "rows": (rows, self.spec.input_size),
            "row": (rows,),
            "mean": (),
            "parameters": (offset + math.prod(last),),
            "absent": _ABSENT,
        }
        dtype = self.spec.dtype
        return [jax.ShapeDtypeStruct(shapes[r], dtype) for r in self.results]  # type: ignore[no-untyped-call]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(call: _Call, inputs: tuple[jax.Array, ...], tensors: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Call a handler; under vmap once with all rows, or as often as there are sets of parameters."""

    @jax.custom_batching.custom_vmap  # type: ignore[untyped-decorator, unused-ignore]
    def run(inputs: tuple[jax.Array, ...], tensors: tuple[jax.Array, ...]) -> list[jax.Array]:
        handler: Any = jax.ffi.ffi_call(call.handler, call.shapes(inputs[0].shape[0]), vmap_method="sequential")
        attributes = {"spec": call.spec.to_json(), "num_threads": np.int64(call.num_threads)}
        return list(handler(*inputs, *tensors, **attributes, inverse=np.int64(call.inverse)))

    @run.def_vmap  # type: ignore[untyped-decorator, unused-ignore]
    def run_batched(count: int, batched: Any, inputs: tuple[jax.Array, ...], tensors: tuple[jax.Array, ...]) -> Any:
        if any(batched[1]) or not call.is_by_row:
            return _run_one_by_one(call, batched, inputs, tensors), [True] * len(call.results)
        rows = inputs[0].shape[1 if batched[0][0] else 0]
        merged = []
        for array, is_batched in zip(inputs, batched[0], strict=True):
            if not is_batched and array.shape != _ABSENT:
                array = jnp.broadcast_to(array, (count, *array.shape))
            merged.append(array.reshape(count * rows, *array.shape[2:]) if array.shape != _ABSENT else array)
        results: list[jax.Array] = _run(call, tuple(merged), tensors)
        are_batched = [result != "absent" for result in call.results]
        split = [
            result.reshape(count, rows, *result.shape[1:]) if is_batched else result
            for result, is_batched in zip(results, are_batched, strict=True)
        ]
        return split, are_batched

    return run(inputs, tensors)  # type: ignore[no-any-return]


@_run.defjvp
def _no_second_derivatives(call: _Call, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "nvpflow.jax has first derivatives only, by reverse mode: a gradient of its functions cannot be differentiated "
        "again"
    )


def _run_one_by_one(
    call: _Call, batched: Any, inputs: tuple[jax.Array, ...], tensors: tuple[jax.Array, ...]
) -> list[jax.Array]:
    flags = [*batched[0], *batched[1]]
    arrays = [*inputs, *tensors]

    def one(moving: list[jax.Array]) -> list[jax.Array]:
        left = iter(moving)
        every = [next(left) if flag else array for flag, array in zip(flags, arrays, strict=True)]
        return _run(call, tuple(every[: len(inputs)]), tuple(every[len(inputs) :]))  # type: ignore[no-any-return]

    return jax.lax.map(one, [array for flag, array in zip(flags, arrays, strict=True) if flag])  # type: ignore[no-any-return]


# ---- derivatives -----------------------------------------------------------------------------------------------------
# Only the forward pass knows the wanted derivatives. The choice reaches the backward pass as the structure of the
# residuals: () where a gradient is wanted, None where not, neither of which holds an array.

_WANTED = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(call: _Call, rows: jax.Array, tensors: tuple[jax.Array, ...]) -> list[jax.Array]:
    return _run(call, (rows,), tensors)  # type: ignore[no-any-return]


def _values_forward(call: _Call, rows: Any, tensors: Any) -> Any:
    rows, of_rows, tensors, of_parameters = _unpacked(rows, tensors)
    return _run(call, (rows,), tensors), (rows, of_rows, tensors, of_parameters)


def _values_backward(call: _Call, residuals: Any, cotangents: list[Any]) -> tuple[Any, Any]:
    rows, of_rows, tensors, of_parameters = residuals
    zero = jnp.zeros(_ABSENT, rows.dtype)
    given = [zero if isinstance(c, jax.custom_derivatives.SymbolicZero) else c for c in cotangents]
    if all(c is zero for c in given):
        return None, None
    gradient_call = call.vjp(of_rows is not None, of_parameters is not None)
    of_rows_value, flat = _run(gradient_call, (rows, *given), tensors)
    return of_rows_value if of_rows is not None else None, _parts(call, flat) if of_parameters is not None else None


_values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(call: _Call, rows: jax.Array, tensors: tuple[jax.Array, ...]) -> jax.Array:
    return _run(call.nll(of_parameters=False), (rows,), tensors)[0]


def _nll_forward(call: _Call, rows: Any, tensors: Any) -> Any:
    rows, of_rows, tensors, of_parameters = _unpacked(rows, tensors)
    if of_rows is None and of_parameters is not None:
        value, flat = _run(call.nll(of_parameters=True), (rows,), tensors)
        return value, flat
    value, _ = _run(call.nll(of_parameters=False), (rows,), tensors)
    return value, (rows, of_rows, tensors, of_parameters)


def _nll_backward(call: _Call, residuals: Any, cotangent: Any) -> tuple[Any, Any]:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None
    if not isinstance(residuals, tuple):
        return None, _parts(call, residuals * cotangent)
    rows = residuals[0]
    each = jnp.full(rows.shape[0], -1 / rows.shape[0], rows.dtype) * cotangent
    return _values_backward(call.of_kind("log_prob"), residuals, [each])


_nll.defvjp(_nll_forward, _nll_backward, symbolic_zeros=True)


def _unpacked(rows: Any, tensors: Any) -> tuple[Any, Any, Any, Any]:
    """Values of what a forward pass gets, and which of them gradients are wanted of."""
    of_parameters = _WANTED if any(t.perturbed for t in tensors) else None
    return rows.value, _WANTED if rows.perturbed else None, tuple(t.value for t in tensors), of_parameters


def _parts(call: _Call, flat: jax.Array) -> tuple[jax.Array, ...]:
    """Split the gradient of all parameters into those of each."""
    return tuple(flat[offset : offset + math.prod(shape)].reshape(shape) for _, shape, offset in _layout(call.spec))
