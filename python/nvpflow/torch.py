"""PyTorch: a flow as an ``nn.Module``, a ``Transform`` and a ``Distribution``, differentiable by nvpflow's own gradients.

>>> import nvpflow, nvpflow.torch, torch
>>> module = nvpflow.torch.FlowModule(nvpflow.build(input_size=16, num_flows=4, hidden_sizes=(128,)))
>>> optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
>>> loss = -module.log_prob(torch.randn(256, 16)).mean()
>>> loss.backward()
>>> optimizer.step()

Needs the extra ``torch``: ``pip install "nvpflow[torch]"``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

try:
    import torch
    from torch.distributions import constraints
    from torch.optim.optimizer import register_optimizer_step_post_hook
except ImportError as error:
    raise ImportError('nvpflow.torch needs PyTorch 2.4 or newer: pip install "nvpflow[torch]"') from error

from nvpflow import _checks
from nvpflow._core import FlowSpec
from nvpflow.flow import Flow

__all__ = ["FlowDistribution", "FlowModule", "FlowTransform"]

_Result = TypeVar("_Result")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
# What converts to a flow's dtype without loss.
_NARROWER = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float16, torch.bfloat16, torch.float32),
}


# ---- the packed parameters ------------------------------------------------------------------------------------------

# Steps of any optimizer in this process. The fused ones write to parameters without a trace in Tensor._version.
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class _Packed:
    """A flow that holds a copy of some parameters, and what tells that they are still the same."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.stamp: object = None
        self.kept: list[torch.Tensor] = []  # their memory cannot become somebody else's while the stamp counts
        self.users = 0
        self.generation = 0  # how often the parameters were found changed


class _Forecast:
    """A gradient of log_prob that was formed together with its value, because its cotangent could be foreseen.

    A mean over the rows, the usual loss, gives every row the same cotangent, and the same one as in the step before.
    With it a training step passes forward once instead of twice. What was foreseen counts only where everything it
    came from turns out to be the same, bit for bit: it changes when gradients are formed, never what they are.
    """

    def __init__(self) -> None:
        self.rows = -1  # none
        self.cotangent = 0.0
        self._made_from: tuple[object, ...] | None = None
        self._x: torch.Tensor | None = None  # its memory cannot become another tensor's meanwhile
        self._gradient: Any = None

    def expects(self, x: torch.Tensor) -> bool:
        return self.rows == x.shape[0] > 0

    def keep(self, x: torch.Tensor, packed: _Packed, gradient: Any) -> None:
        self._x, self._gradient = x.detach(), gradient
        self._made_from = _identity(x, packed)
        self.rows = -1  # until a backward pass bears it out

    def take(self, x: torch.Tensor, packed: _Packed, cotangent: torch.Tensor) -> Any:
        """Return the gradient, once, or None where it is not the one."""
        made_from, gradient = self._made_from, self._gradient
        self._made_from = self._x = self._gradient = None
        value = _common_value(cotangent)
        if value is None:
            return None
        foreseen, self.cotangent, self.rows = self.cotangent, value, x.shape[0]
        return gradient if made_from == _identity(x, packed) and foreseen == value else None


def _identity(x: torch.Tensor, packed: _Packed) -> tuple[object, ...]:
    """What x and the parameters are, as long as both are kept."""
    return id(packed), packed.generation, x.data_ptr(), x._version, x.shape, x.stride()


def _common_value(values: torch.Tensor) -> float | None:
    """The value of all elements, where it is one that is not NaN or zero; on the CPU alone, where to look is cheap."""
    if values.device.type != "cpu" or values.numel() == 0:
        return None
    array = values.detach().numpy()
    first = float(array[0])
    same = array.strides == (0,) or bool((array == first).all())
    return first if same and first == first and first != 0 else None


class _GradientMemory:
    """Memory for the parameters' gradient that the next step finds where the last one left it.

    The system hands out memory of megabytes as pages that each cost a fault when first written: a tenth of a training
    step of a large flow. NumPy owns the memory here, because its count of references tells when the last tensor that
    looked at it is gone. On a device PyTorch keeps memory itself.
    """

    def __init__(self) -> None:
        self._array: Any = None
        self._idle = 0

    def take(self, size: int, dtype: torch.dtype) -> Any:
        """Return an array [size] that no tensor looks at, nothing else does, and that holds anything."""
        name = _DTYPES[dtype]
        if (
            self._array is None
            or self._array.shape != (size,)
            or self._array.dtype != name
            or self._count() != self._idle
        ):
            self._array = np.empty(size, name)
            self._idle = self._count()
        return self._array

    def _count(self) -> int:
        return sys.getrefcount(self._array)


class _Engine:
    """Runs nvpflow's kernels on parameters that PyTorch owns.

    The kernels read a packed copy of the parameters. It is made anew exactly when they have changed. What PyTorch does
    to a tensor shows in its address, its version or the count of optimizer steps, which cost a microsecond to look at.
    Where a call is `checked`, as all are that autograd follows, their bytes are compared besides.
    """

    def __init__(self, spec: FlowSpec, precision: str, num_threads: int) -> None:
        self.spec = spec
        self.precision = precision
        self.num_threads = num_threads
        self.flat: torch.Tensor | None = None  # the buffer whose parts the parameters are, unless somebody moved them
        self.offsets: list[int] = []
        self._addresses: tuple[int, list[int]] = (0, [])
        self._lock = threading.Lock()
        self._packed: _Packed | None = None
        self._forecast = _Forecast()
        self._gradient_memory = _GradientMemory()
        self.handle = next(_handles)
        _engines[self.handle] = self

    def run(self, parameters: Sequence[torch.Tensor], checked: bool, call: Callable[[Flow], _Result]) -> _Result:
        """Return call(flow), where the flow has these parameters until the call is over."""
        with self._using(parameters, checked) as packed:
            return call(packed.flow)

    def forward(
        self, x: torch.Tensor, parameters: Sequence[torch.Tensor], checked: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Flow.forward."""
        return self.run(parameters, checked, lambda flow: flow.forward(x.detach().contiguous()))

    def inverse(
        self, z: torch.Tensor, parameters: Sequence[torch.Tensor], checked: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Flow.inverse with log_det."""
        return self.run(parameters, checked, lambda flow: flow.inverse(z.detach().contiguous(), with_log_det=True))

    def log_prob(self, x: torch.Tensor, parameters: Sequence[torch.Tensor], checked: bool) -> torch.Tensor:
        """As Flow.log_prob; where its gradient can be foreseen, forms that, too."""
        with self._using(parameters, checked) as packed:
            with self._lock:
                foreseen = checked and self._forecast.expects(x) and not x.requires_grad
                cotangent = self._forecast.cotangent
            if not foreseen or not any(p.requires_grad for p in parameters):
                return packed.flow.log_prob(x.detach().contiguous())  # type: ignore[no-any-return]
            memory = self._memory(packed, x)
            cotangents = x.new_full(x.shape[:1], cotangent)
            log_prob, gradient = packed.flow._log_prob_and_vjp(x.detach().contiguous(), cotangents, memory)
            gradient = gradient if memory is None else torch.from_numpy(gradient)
            with self._lock:
                self._forecast.keep(x, packed, gradient)
            return log_prob  # type: ignore[no-any-return]

    def vjp(
        self,
        kind: str,
        x: torch.Tensor,
        grad_out: torch.Tensor | None,
        grad_log_det: torch.Tensor | None,
        parameters: Sequence[torch.Tensor],
        wrt: str,
    ) -> tuple[Any, Any]:
        """As Flow.vjp of kind "forward" or "inverse", or Flow.log_prob_vjp, whose cotangent is `grad_log_det`."""
        given = [None if g is None else g.detach().contiguous() for g in (grad_out, grad_log_det)]
        with self._using(parameters, True) as packed:
            if kind == "log_prob" and wrt == "parameters" and grad_log_det is not None:
                with self._lock:
                    gradient = self._forecast.take(x, packed, grad_log_det)
                if gradient is not None:
                    return None, gradient
            rows, memory = x.detach().contiguous(), None if wrt == "x" else self._memory(packed, x)
            options: dict[str, Any] = {"wrt": wrt, "out": (None, memory)}
            if kind == "log_prob":
                grad_x, gradient = packed.flow.log_prob_vjp(rows, given[1], **options)  # type: ignore[arg-type]
            else:
                grad_x, gradient = packed.flow.vjp(rows, *given, direction=kind, **options)
            return grad_x, gradient if memory is None else torch.from_numpy(gradient)

    def _memory(self, packed: _Packed, x: torch.Tensor) -> Any:
        """Where the parameters' gradient goes; None: a new tensor."""
        if x.device.type != "cpu":
            return None
        with self._lock:
            return self._gradient_memory.take(packed.flow.num_parameters, x.dtype)

    @contextlib.contextmanager
    def _using(self, parameters: Sequence[torch.Tensor], checked: bool) -> Iterator[_Packed]:
        with self._lock:
            packed = self._refreshed(parameters, checked)
            packed.users += 1
        try:
            yield packed
        finally:
            with self._lock:
                packed.users -= 1

    def _refreshed(self, parameters: Sequence[torch.Tensor], checked: bool) -> _Packed:
        addresses = [p.data_ptr() for p in parameters]
        try:
            stamp: object = (_optimizer_steps, addresses, [p._version for p in parameters])
        except RuntimeError:  # made in inference mode: they have no version
            stamp, checked = None, True
        packed = self._packed
        if packed is not None and not checked and packed.stamp == stamp:
            return packed
        flat = self._gather(parameters, addresses)
        if packed is None or packed.users > 0 or not self._fits(packed.flow, flat):
            packed = self._packed = _Packed(self._new_flow(flat))
        packed.stamp = None  # whatever fails from here on
        packed.flow.num_threads = self.num_threads
        if packed.flow._update_flat_parameters(flat.numpy() if flat.device.type == "cpu" else flat.cpu().numpy()):
            packed.generation += 1
        packed.stamp = stamp
        packed.kept = [] if flat is self.flat else [p.detach() for p in parameters]
        return packed

    def _gather(self, parameters: Sequence[torch.Tensor], addresses: list[int]) -> torch.Tensor:
        """All parameters in one vector: their own memory, where they lie in one."""
        if self.flat is not None and addresses == self._flat_addresses(self.flat):
            return self.flat
        return torch.cat([p.detach().reshape(-1) for p in parameters])

    def _flat_addresses(self, flat: torch.Tensor) -> list[int]:
        start = flat.data_ptr()
        if self._addresses[0] != start:
            self._addresses = (start, [start + offset * flat.element_size() for offset in self.offsets])
        return self._addresses[1]

    def _fits(self, flow: Flow, flat: torch.Tensor) -> bool:
        return flow.spec.dtype == _DTYPES.get(flat.dtype) and flow.device == _place(flat.device)

    def _new_flow(self, flat: torch.Tensor) -> Flow:
        if flat.device.type not in ("cpu", "cuda"):
            raise ValueError(f"the parameters are on device '{flat.device}', expected the CPU or a CUDA device")
        spec = json.loads(self.spec.to_json())
        spec["dtype"] = _DTYPES[flat.dtype]
        # Modes of lower precision are for float32 on a CUDA device.
        lower = flat.device.type == "cuda" and flat.dtype == torch.float32
        precision = self.precision if lower else "float32"
        return Flow(FlowSpec.from_json(json.dumps(spec)), device=_place(flat.device), precision=precision)


_handles = itertools.count()
_engines: weakref.WeakValueDictionary[int, _Engine] = weakref.WeakValueDictionary()


def _place(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


# ---- operators ------------------------------------------------------------------------------------------------------
# What torch.compile sees: functions of rows and parameters without side effects. `engine` is the number of an _Engine.


@torch.library.custom_op("nvpflow::forward", mutates_args=())
def _forward(
    x: torch.Tensor, parameters: list[torch.Tensor], engine: int, checked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _engines[engine].forward(x, parameters, checked)


@torch.library.custom_op("nvpflow::inverse", mutates_args=())
def _inverse(
    z: torch.Tensor, parameters: list[torch.Tensor], engine: int, checked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _engines[engine].inverse(z, parameters, checked)


@torch.library.custom_op("nvpflow::log_prob", mutates_args=())
def _log_prob(x: torch.Tensor, parameters: list[torch.Tensor], engine: int, checked: bool) -> torch.Tensor:
    return _engines[engine].log_prob(x, parameters, checked)


@torch.library.custom_op("nvpflow::vjp", mutates_args=())
def _vjp(
    kind: str,
    x: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_log_det: torch.Tensor | None,
    parameters: list[torch.Tensor],
    engine: int,
    wrt: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cotangents of x and of all parameters in one vector; what is not wanted comes as an empty tensor."""
    grad_x, grad_parameters = _engines[engine].vjp(kind, x, grad_out, grad_log_det, parameters, wrt)
    none = x.new_empty(0)
    return none if grad_x is None else grad_x, none if grad_parameters is None else grad_parameters


@_forward.register_fake
@_inverse.register_fake
def _transform_shapes(
    x: torch.Tensor, parameters: list[torch.Tensor], engine: int, checked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


@_log_prob.register_fake
def _log_prob_shape(x: torch.Tensor, parameters: list[torch.Tensor], engine: int, checked: bool) -> torch.Tensor:
    return x.new_empty(x.shape[:1])


@_vjp.register_fake
def _vjp_shapes(
    kind: str,
    x: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_log_det: torch.Tensor | None,
    parameters: list[torch.Tensor],
    engine: int,
    wrt: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = sum(p.numel() for p in parameters)
    grad_x = x.new_empty(0 if wrt == "parameters" else x.shape)
    return grad_x, x.new_empty(0 if wrt == "x" else size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    x, parameters, ctx.engine, _ = inputs
    ctx.save_for_backward(x, *parameters)
    ctx.set_materialize_grads(False)


def _gradients(
    kind: str, ctx: Any, engine: int, wanted: Sequence[bool], grad_out: Any, grad_log_det: Any
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Cotangents of the saved rows and parameters; wanted: which of them."""
    x, *parameters = ctx.saved_tensors
    nothing: list[torch.Tensor | None] = [None] * len(parameters)
    if grad_out is None and grad_log_det is None:
        return None, nothing
    wrt = "both" if wanted[0] and any(wanted[1:]) else "x" if wanted[0] else "parameters"
    # Under create_graph the operator is what refuses second derivatives.
    direct = not torch.is_grad_enabled() and _is_plain(x)
    call = functools.partial(_engines[engine].vjp, kind) if direct else functools.partial(_vjp_operator, engine, kind)
    grad_x, flat = call(x, grad_out, grad_log_det, parameters, wrt)
    if wrt == "x":
        return grad_x, nothing
    parts = flat.split([p.numel() for p in parameters])
    grads = [
        (part if p.dim() == 1 else part.view(p.shape)) if w else None
        for part, p, w in zip(parts, parameters, wanted[1:], strict=True)
    ]
    return grad_x if wanted[0] else None, grads


def _vjp_operator(engine: int, kind: str, x: Any, grad_out: Any, grad_log_det: Any, parameters: Any, wrt: str) -> Any:
    return _vjp(kind, x, grad_out, grad_log_det, parameters, engine, wrt)


def _operator_backward(kind: str, ctx: Any, grad_out: Any, grad_log_det: Any) -> tuple[Any, ...]:
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    return *_gradients(kind, ctx, ctx.engine, wanted, grad_out, grad_log_det), None, None


def _forward_backward(ctx: Any, grad_z: Any, grad_log_det: Any) -> tuple[Any, ...]:
    return _operator_backward("forward", ctx, grad_z, grad_log_det)


def _inverse_backward(ctx: Any, grad_x: Any, grad_log_det: Any) -> tuple[Any, ...]:
    return _operator_backward("inverse", ctx, grad_x, grad_log_det)


def _log_prob_backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
    return _operator_backward("log_prob", ctx, None, grad)


def _no_second_derivatives(ctx: Any, *grads: object) -> None:
    raise NotImplementedError(
        "nvpflow has first derivatives only: a gradient of FlowModule made with create_graph=True cannot be "
        "differentiated again"
    )


_forward.register_autograd(_forward_backward, setup_context=_setup_context)
_inverse.register_autograd(_inverse_backward, setup_context=_setup_context)
_log_prob.register_autograd(_log_prob_backward, setup_context=_setup_context)
_vjp.register_autograd(_no_second_derivatives)

_OPERATORS: dict[str, Any] = {"forward": _forward, "inverse": _inverse, "log_prob": _log_prob}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory, as those that stand for one in a trace do not."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


class _Eager(torch.autograd.Function):
    """The same for autograd alone, in a third of an operator's time."""

    @staticmethod
    def forward(kind: str, engine: int, x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return getattr(_engines[engine], kind)(x, parameters, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.kind, ctx.engine, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_out, grad_log_det = grads if len(grads) == 2 else (None, *grads)
        grad_x, others = _gradients(ctx.kind, ctx, ctx.engine, ctx.needs_input_grad[2:], grad_out, grad_log_det)
        return None, None, grad_x, *others


# ---- the module -----------------------------------------------------------------------------------------------------


class _Parameters(torch.nn.Module):
    """The tensors of one layer: names with a dot are a module and its parameter in PyTorch."""


class FlowModule(torch.nn.Module):
    """A flow whose parameters are PyTorch's, for losses, layers and optimizers of one's own.

    Gradients by every parameter and by the rows are nvpflow's vector-Jacobian products, through `forward`, `inverse`,
    `log_prob` and `rsample`; there are no second derivatives. Each method is one operator to ``torch.compile``.

    Parameters
    ----------
    flow
        The model and its weights, which are copied; later changes of either do not reach the other.

    Raises
    ------
    TypeError
        `flow` is no `nvpflow.Flow`.

    Notes
    -----
    Rows are tensors ``[..., D]`` of the module's dtype, on its device; lower precisions, such as autocast gives, are
    converted. Results have the leading axes of the rows. A tensor that is C-contiguous is read where it is; others are
    copied.

    Parameters have the names of `nvpflow.Flow.parameters` (``flow_0_scale.kernel``, ...), and ``state_dict``, ``.to``,
    ``copy.deepcopy``, pickling, ``requires_grad_`` and ``torch.func.functional_call`` do with them what they do
    elsewhere. Those of a standardize layer start with ``requires_grad=False``, as `nvpflow.Flow.fit` keeps them, too.
    They are views of one buffer, so that reading them costs no copy, and ``.to`` keeps them so.

    The kernels run on a packed copy that is made anew when the parameters have changed. Calls that autograd follows
    compare every byte. Others trust PyTorch's own account of changes: in-place operations, assignments, optimizers.
    What writes behind it (``parameter.data.add_``, ``parameter.detach().numpy()``, a CUDA graph, another process) must
    be followed by `refresh`. Any number of threads may call one module.

    Examples
    --------
    >>> import nvpflow, nvpflow.torch, torch
    >>> module = nvpflow.torch.FlowModule(nvpflow.build(input_size=2))
    >>> module.log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be an nvpflow.Flow, got {_checks.describe(flow)}")
        self._engine = _Engine(flow.spec, flow.precision, flow.num_threads)
        flat = torch.from_numpy(flow._copy_flat_parameters()).to(flow.device)
        self._names: list[tuple[str, str]] = []
        for name, shape, offset in flow._layout():
            layer, _, tensor = name.partition(".")
            if layer not in self._modules:
                self.add_module(layer, _Parameters())
            size = torch.Size(shape).numel()
            trained = not layer.startswith("standardize")
            parameter = torch.nn.Parameter(flat[offset : offset + size].view(shape), requires_grad=trained)
            self._modules[layer].register_parameter(tensor, parameter)
            self._names.append((layer, tensor))
        self._flatten()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z [..., D] and log|det dz/dx| [...], nats: data to latent."""
        z, log_det = self._call("forward", "x", x)
        return z.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def inverse(self, z: torch.Tensor, *, with_log_det: bool = False) -> Any:
        """Return x [..., D], latent to data; with `with_log_det`, (x, log|det dx/dz| [...], nats)."""
        x, log_det = self._call("inverse", "z", z)
        x = x.reshape(z.shape)
        return (x, log_det.reshape(z.shape[:-1])) if with_log_det else x

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Return log p(x) [...], nats."""
        result: torch.Tensor = self._call("log_prob", "x", x)
        return result.reshape(x.shape[:-1])

    def sample(self, n: int, *, seed: int | None = None) -> torch.Tensor:
        """Return n rows [n, D] without a gradient.

        Parameters
        ----------
        n
            How many rows.
        seed
            In [0, 2**64): the rows of `nvpflow.Flow.sample`. None: drawn from PyTorch's default generator, so that
            ``torch.manual_seed`` decides.
        """
        with torch.no_grad():
            return self.rsample(n, seed=seed)

    def rsample(self, n: int, *, seed: int | None = None) -> torch.Tensor:
        """Return the rows of `sample`, differentiable by the parameters: the inverse of noise that has none."""
        count = _checks.integer("n", n)
        if count < 0:
            raise ValueError(f"n is {count}, expected 0 or more")
        return self.inverse(self._noise(count, _seed(seed)))  # type: ignore[no-any-return]

    # -- the flow -----------------------------------------------------------------------------------------------------

    @property
    def num_threads(self) -> int:
        """Threads of a call on the CPU, as `nvpflow.Flow.num_threads`: 0 is as many as this process may use."""
        return self._engine.num_threads

    @num_threads.setter
    def num_threads(self, value: int) -> None:
        self._engine.num_threads = _checks.integer("num_threads", value)
        self.refresh()

    def to_flow(self) -> Flow:
        """Return an `nvpflow.Flow` with a copy of the parameters, on their device: to save, to fit, to call fast."""
        flow = self._engine.run(self._tensors(), True, lambda flow: flow.to(flow.device, flow.precision))
        flow.num_threads = self.num_threads
        return flow

    def refresh(self) -> None:
        """Read the parameters anew at the next call; needed after they were written behind PyTorch's back only."""
        packed = self._engine._packed
        if packed is not None:
            packed.stamp = None

    def extra_repr(self) -> str:
        """Return the model in one line."""
        return repr(self._engine.spec)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _tensors(self) -> list[torch.Tensor]:
        """All parameters, in the order of the flow's flat buffer."""
        modules: Any = self._modules
        try:
            return [modules[layer]._parameters[tensor] for layer, tensor in self._names]
        except KeyError:  # parametrized: no parameter any more, but a property
            return [getattr(modules[layer], tensor) for layer, tensor in self._names]

    def _call(self, kind: str, name: str, rows: torch.Tensor) -> Any:
        parameters = self._tensors()
        rows = self._checked(name, rows, parameters[0])
        engine, followed = self._engine, torch.is_grad_enabled()
        if not _is_plain(rows):
            return _OPERATORS[kind](rows, parameters, engine.handle, followed)
        if followed:
            return _Eager.apply(kind, engine.handle, rows, *parameters)
        return getattr(engine, kind)(rows, parameters, False)

    def _checked(self, name: str, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the rows as [B, D] of the parameters' dtype."""
        size = self._engine.spec.input_size
        if not isinstance(rows, torch.Tensor):
            raise TypeError(f"{name} is {type(rows).__name__}, expected a torch.Tensor")
        if rows.dim() == 0 or rows.shape[-1] != size:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected (..., {size})")
        if rows.device != like.device:
            raise ValueError(f"{name} is on '{rows.device}', the module on '{like.device}'; move one with .to()")
        if rows.dtype != like.dtype:
            if rows.dtype not in _NARROWER.get(like.dtype, ()):
                raise TypeError(
                    f"{name} has dtype {rows.dtype}, the module {like.dtype}; convert one of them with .to()"
                )
            rows = rows.to(like.dtype)
        return rows if rows.dim() == 2 else rows.reshape(-1, size)

    def _noise(self, n: int, seed: int) -> torch.Tensor:
        parameters = self._tensors()
        noise = self._engine.run(parameters, False, lambda flow: flow._noise(n, seed))
        return torch.from_numpy(noise).to(parameters[0].device)

    def _flatten(self) -> None:
        """Make the parameters views of one buffer, in the order of the flow's."""
        parameters = self._tensors()
        engine = self._engine
        engine.flat = None
        engine.offsets = list(itertools.accumulate((p.numel() for p in parameters[:-1]), initial=0))
        first = parameters[0]
        if first.device.type == "meta" or any((p.device, p.dtype) != (first.device, first.dtype) for p in parameters):
            return
        with torch.no_grad():
            flat = torch.cat([p.detach().reshape(-1) for p in parameters])
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.data = part.view(parameter.shape)
        engine.flat = flat

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FlowModule:
        """As nn.Module: what .to(), .double(), .cuda() and others do to every tensor."""
        first = self._tensors()[0]
        dtype = fn(torch.empty(0, dtype=first.dtype, device=first.device)).dtype
        if dtype not in _DTYPES:
            raise TypeError(f"the parameters cannot be {dtype}: nvpflow computes in float32 and float64")
        super()._apply(fn, recurse)
        engine, tensors = self._engine, self._tensors()
        moved = engine.flat is None or [p.data_ptr() for p in tensors] != engine._flat_addresses(engine.flat)
        if moved:
            self._flatten()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        state = self.__dict__.copy()
        engine = state.pop("_engine")
        return {**state, "_settings": (engine.spec, engine.precision, engine.num_threads)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state.pop("_settings")
        super().__setstate__(state)
        self._engine = _Engine(*settings)
        self._flatten()


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(2**63 - 1, ()).item())
    return _checks.integer("seed", seed, unsigned=True)


# ---- torch.distributions --------------------------------------------------------------------------------------------


class FlowTransform(torch.distributions.Transform):
    """A flow as a ``torch.distributions`` transform from latents z to data x, so that a base of one's own can be used.

    Parameters
    ----------
    module
        The flow; the transform's gradients reach its parameters.
    cache_size
        As of every transform: 1 keeps the last pair (x, z).
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, module: FlowModule, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.module = module

    def __eq__(self, other: object) -> bool:
        """Two transforms are equal where they are of one module."""
        return isinstance(other, FlowTransform) and other.module is self.module

    __hash__ = None  # type: ignore[assignment]

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Return the transform with another size of the cache."""
        return self if self._cache_size == cache_size else FlowTransform(self.module, cache_size)

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        return self.module.inverse(x)  # type: ignore[no-any-return]

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self.module.forward(y)[0]

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return log|det dy/dx| [...], nats; x is the latent here, y the data, as transforms call them."""
        return -self.module.forward(y)[1]


class FlowDistribution(torch.distributions.Distribution):
    """A flow as a ``torch.distributions`` distribution of rows.

    Parameters
    ----------
    module
        The flow; gradients of `log_prob` and `rsample` reach its parameters.
    validate_args
        As of every distribution: check values. None: PyTorch's default.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (that is how distributions say it)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, module: FlowModule, *, validate_args: bool | None = None) -> None:
        self.module = module
        super().__init__(torch.Size(), torch.Size([module._engine.spec.input_size]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the distribution of independent rows of a batch."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.module = self.module
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new  # type: ignore[no-any-return]

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:  # noqa: B008  (as in PyTorch)
        """Return rows [*sample_shape, *batch_shape, D], differentiable by the parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.module.rsample(shape[:-1].numel()).reshape(shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Return log p(value) [..., *batch_shape], nats."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.module.log_prob(value).expand(shape)
