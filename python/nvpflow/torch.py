"""PyTorch: a flow as an ``nn.Module``, a ``Transform`` and a ``Distribution``, with nvpflow's own gradients.

Needs PyTorch 2.4 or newer (``pip install "torch>=2.4"``; the extra ``torch``).

Examples
--------
>>> import nvpflow, nvpflow.torch, torch
>>> module = nvpflow.torch.FlowModule(nvpflow.build(input_size=16, num_flows=4, hidden_sizes=(128,)))
>>> optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
>>> loss = -module.log_prob(torch.randn(256, 16)).mean()
>>> loss.backward()
>>> optimizer.step()
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

try:
    import torch
    from torch.autograd import forward_ad
    from torch.distributions import constraints
except ImportError as error:
    raise ImportError('nvpflow.torch needs PyTorch 2.4 or newer: pip install "torch>=2.4"') from error

from nvpflow import _checks, _data
from nvpflow._core import FlowSpec
from nvpflow.flow import Flow

__all__ = ["FlowDistribution", "FlowModule", "FlowTransform"]

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
# What converts to a flow's dtype without loss.
_NARROWER = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float16, torch.bfloat16, torch.float32),
}


# ---- the packed parameters ------------------------------------------------------------------------------------------


class _Packed:
    """A flow that holds a copy of some parameters; it is not changed while it has users."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.copy: torch.Tensor | None = None  # of its parameters, where they are on a CUDA device
        self.users = 0


class _Foreseen:
    """The parameters' gradient of one call of log_prob, formed with the value because its cotangent could be foreseen.

    A mean over the rows, the usual loss, gives every row the same cotangent, and the same one as in the step before.
    With it a training step passes forward once instead of twice. It belongs to one call and counts only where the
    cotangent turns out to be that one: it changes when a gradient is formed, never what it is.
    """

    def __init__(self, cotangent: float, gradient: torch.Tensor) -> None:
        self.cotangent = cotangent
        self.gradient: torch.Tensor | None = gradient

    def take(self) -> torch.Tensor | None:
        """Return the gradient, once: the caller owns it from then on and may add to it."""
        gradient, self.gradient = self.gradient, None
        return gradient


def _common_value(values: torch.Tensor) -> float | None:
    """Return the value of all elements, if one that is not NaN or zero; on the CPU alone, where to look is cheap."""
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

    The kernels read a packed copy of the parameters, made anew when they have changed. Every call compares all their
    bytes: what PyTorch knows of changes leaves out ``parameter.data.add_``, NumPy's views and fused optimizers.
    """

    def __init__(self, flow: Flow) -> None:
        self.spec = flow.spec
        self.precision = flow.precision
        self.flat: torch.Tensor | None = None  # the memory that the parameters lie in, unless somebody moved them
        self._layout = [(name, torch.Size(shape), offset) for name, shape, offset in flow._layout()]
        self._places: tuple[int, list[tuple[int, torch.Size]]] = (0, [])
        self._lock = threading.Lock()
        self._packed = _Packed(flow)
        self._gradient_memory = _GradientMemory()
        # Rows and cotangent of the last backward pass of log_prob; none between a prediction and its confirmation.
        self._expected: tuple[int, float] | None = None
        self.handle = next(_handles)
        _engines[self.handle] = self

    @property
    def num_threads(self) -> int:
        return self._packed.flow.num_threads

    @num_threads.setter
    def num_threads(self, value: int) -> None:
        with self._lock:
            self._packed.flow.num_threads = value

    # -- calls --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, parameters: Sequence[torch.Tensor]) -> Iterator[Flow]:
        """Give a flow that has these parameters until the end of the block."""
        packed = self._acquire(parameters)
        try:
            yield packed.flow
        finally:
            with self._lock:
                packed.users -= 1

    def forward(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """As Flow.forward."""
        with self.using(parameters) as flow:
            return flow.forward(x.detach().contiguous())

    def inverse(self, z: torch.Tensor, parameters: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """As Flow.inverse with log_det."""
        with self.using(parameters) as flow:
            result: tuple[torch.Tensor, torch.Tensor] = flow.inverse(z.detach().contiguous(), with_log_det=True)
            return result

    def log_prob(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """As Flow.log_prob."""
        with self.using(parameters) as flow:
            result: torch.Tensor = flow.log_prob(x.detach().contiguous())
            return result

    def log_prob_foreseeing(
        self, x: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, _Foreseen | None]:
        """As Flow.log_prob, with the parameters' gradient where its cotangent can be foreseen."""
        wanted = not x.requires_grad and any(p.requires_grad for p in parameters)
        cotangent = self._expectation(x.shape[0]) if wanted else None
        if cotangent is None:
            return self.log_prob(x, parameters), None
        with self.using(parameters) as flow:
            memory = self._memory(flow, x)
            log_prob, gradient = flow._log_prob_and_vjp(
                x.detach().contiguous(), x.new_full(x.shape[:1], cotangent), memory
            )
            return log_prob, _Foreseen(cotangent, gradient if memory is None else torch.from_numpy(gradient))

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
        given: list[Any] = [None if g is None else g.detach().contiguous() for g in (grad_out, grad_log_det)]
        with self.using(parameters) as flow:
            memory = None if wrt == "x" else self._memory(flow, x)
            options: dict[str, Any] = {"wrt": wrt, "out": (None, memory)}
            rows = x.detach().contiguous()
            if kind == "log_prob":
                grad_x, gradient = flow.log_prob_vjp(rows, given[1], **options)
            else:
                grad_x, gradient = flow.vjp(rows, *given, **{**options, "direction": kind})
            return grad_x, gradient if memory is None else torch.from_numpy(gradient)

    def take_foreseen(self, foreseen: _Foreseen | None, cotangent: torch.Tensor) -> torch.Tensor | None:
        """Return the foreseen gradient if its cotangent is this one, and learn what to foresee next."""
        value = _common_value(cotangent)
        with self._lock:
            self._expected = None if value is None else (cotangent.shape[0], value)
        return foreseen.take() if foreseen is not None and foreseen.cotangent == value else None

    def _expectation(self, rows: int) -> float | None:
        with self._lock:
            if self._expected is None or self._expected[0] != rows:
                return None
            cotangent, self._expected = self._expected[1], None
            return cotangent

    def _memory(self, flow: Flow, x: torch.Tensor) -> Any:
        """Return where the parameters' gradient goes; None: a new tensor."""
        if x.device.type != "cpu":
            return None
        with self._lock:
            return self._gradient_memory.take(flow.num_parameters, x.dtype)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def flatten(self, parameters: Sequence[torch.Tensor]) -> None:
        """Lay the parameters out in one piece of the host's memory, in the order of the flow's.

        Each has a storage of its own there: one that is a view of a larger storage is refused by safetensors and
        others. On a device they stay where they are, where joining them costs little.
        """
        self.flat = None
        first = parameters[0]
        if first.device.type != "cpu" or any((p.device, p.dtype) != (first.device, first.dtype) for p in parameters):
            return
        values = np.concatenate([p.detach().numpy().reshape(-1) for p in parameters])
        for (_, shape, offset), parameter in zip(self._layout, parameters, strict=True):
            parameter.data = torch.from_numpy(values[offset : offset + shape.numel()].reshape(shape))
        self.flat = torch.from_numpy(values)

    def are_flat(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether the parameters are the parts of `flat`."""
        if self.flat is None:
            return False
        start, size = self.flat.data_ptr(), self.flat.element_size()
        if self._places[0] != start:
            self._places = (start, [(start + size * offset, shape) for _, shape, offset in self._layout])
        return all(
            p.data_ptr() == address and p.shape == shape and p.is_contiguous()
            for p, (address, shape) in zip(parameters, self._places[1], strict=True)
        )

    def _acquire(self, parameters: Sequence[torch.Tensor]) -> _Packed:
        flat = self.flat if self.flat is not None and self.are_flat(parameters) else self._gather(parameters)
        with self._lock:
            packed = self._packed
            packed.users += 1
        if self._holds(packed, flat):
            return packed
        with self._lock:
            packed.users -= 1
            packed = self._packed
            if packed.users > 0 or not self._fits(packed.flow, flat):
                packed = self._packed = _Packed(self._new_flow(flat, packed.flow.num_threads))
            packed.copy = None if flat.device.type == "cpu" else flat.clone()
            packed.flow._set_flat_parameters(flat.cpu().numpy())
            packed.users += 1
            return packed

    def _gather(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copy all parameters into one vector."""
        first = parameters[0]
        for (name, shape, _), p in zip(self._layout, parameters, strict=True):
            if p.shape != shape:
                raise ValueError(f"the parameter {name} has shape {tuple(p.shape)}, expected {tuple(shape)}")
            if p.dtype not in _DTYPES:
                raise TypeError(f"the parameter {name} has dtype {p.dtype}, expected torch.float32 or torch.float64")
            if (p.dtype, p.device) != (first.dtype, first.device):
                raise ValueError(
                    f"the parameter {name} is {p.dtype} on '{p.device}', {self._layout[0][0]} {first.dtype} on "
                    f"'{first.device}'; expected all of one dtype on one device, as module.to() leaves them"
                )
        return torch.cat([p.detach().reshape(-1) for p in parameters])

    def _holds(self, packed: _Packed, flat: torch.Tensor) -> bool:
        if not self._fits(packed.flow, flat):
            return False
        if flat.device.type == "cpu":
            return packed.flow._has_flat_parameters(flat.numpy())
        return packed.copy is not None and torch.equal(packed.copy, flat)

    def _fits(self, flow: Flow, flat: torch.Tensor) -> bool:
        return flow.spec.dtype == _DTYPES[flat.dtype] and flow.device == _place(flat.device)

    def _new_flow(self, flat: torch.Tensor, num_threads: int) -> Flow:
        if flat.device.type not in ("cpu", "cuda"):
            raise ValueError(f"the parameters are on device '{flat.device}', expected the CPU or a CUDA device")
        spec = json.loads(self.spec.to_json())
        spec["dtype"] = _DTYPES[flat.dtype]
        # Modes of lower precision are for float32 on a CUDA device.
        lower = flat.device.type == "cuda" and flat.dtype == torch.float32
        precision = self.precision if lower else "float32"
        flow = Flow(FlowSpec.from_json(json.dumps(spec)), device=_place(flat.device), precision=precision)
        flow.num_threads = num_threads
        return flow


_handles = itertools.count()
_engines: weakref.WeakValueDictionary[int, _Engine] = weakref.WeakValueDictionary()


def _place(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


# ---- operators ------------------------------------------------------------------------------------------------------
# What torch.compile sees: functions of rows and parameters without side effects. `engine` is the number of an _Engine.


@torch.library.custom_op("nvpflow::forward", mutates_args=())
def _forward(x: torch.Tensor, parameters: list[torch.Tensor], engine: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _engines[engine].forward(x, parameters)


@torch.library.custom_op("nvpflow::inverse", mutates_args=())
def _inverse(z: torch.Tensor, parameters: list[torch.Tensor], engine: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _engines[engine].inverse(z, parameters)


@torch.library.custom_op("nvpflow::log_prob", mutates_args=())
def _log_prob(x: torch.Tensor, parameters: list[torch.Tensor], engine: int) -> torch.Tensor:
    return _engines[engine].log_prob(x, parameters)


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
def _forward_shapes(x: torch.Tensor, parameters: list[torch.Tensor], engine: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


@_inverse.register_fake
def _inverse_shapes(z: torch.Tensor, parameters: list[torch.Tensor], engine: int) -> tuple[torch.Tensor, torch.Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:1])


@_log_prob.register_fake
def _log_prob_shape(x: torch.Tensor, parameters: list[torch.Tensor], engine: int) -> torch.Tensor:
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


def _wrt(wanted: Sequence[bool]) -> str:
    return "both" if wanted[0] and any(wanted[1:]) else "x" if wanted[0] else "parameters"


def _parts(flat: torch.Tensor, parameters: Sequence[torch.Tensor], wanted: Sequence[bool]) -> list[torch.Tensor | None]:
    """Split the gradient of all parameters into those of each."""
    parts: Any = torch.split(flat, [p.numel() for p in parameters])
    return [
        (part if p.dim() == 1 else part.view(p.shape)) if w else None
        for part, p, w in zip(parts, parameters, wanted, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    x, parameters, ctx.engine = inputs
    ctx.owner = _engines.get(ctx.engine)  # which the graph may outlive otherwise
    ctx.save_for_backward(x, *parameters)
    ctx.set_materialize_grads(False)


def _operator_backward(kind: str, ctx: Any, grad_out: Any, grad_log_det: Any) -> tuple[Any, ...]:
    x, *parameters = ctx.saved_tensors
    if grad_out is None and grad_log_det is None:
        return None, [None] * len(parameters), None
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    wrt = _wrt(wanted)
    grad_x, flat = _vjp(kind, x, grad_out, grad_log_det, parameters, ctx.engine, wrt)
    grads = [None] * len(parameters) if wrt == "x" else _parts(flat, parameters, wanted[1:])
    return grad_x if wanted[0] else None, grads, None


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


# ---- the same for autograd alone, without what an operator costs -----------------------------------------------------


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory and nobody writes down what becomes of it: a trace sees operators alone."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return plain and not recorded


def _are_shared(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether other processes see them (`share_memory`): then they stay where they are."""
    return any(tensor.device.type == "cpu" and tensor.is_shared() for tensor in tensors)  # type: ignore[no-untyped-call]


def _no_vmap(info: Any, in_dims: Any, *arguments: object) -> Any:
    raise NotImplementedError(
        "FlowModule does not support torch.func.vmap; its methods take rows [..., D] with any leading axes at once, "
        "and torch.autograd.functional.jacobian gives Jacobians"
    )


class _EagerVjp(torch.autograd.Function):
    """_Engine.vjp where somebody may want to differentiate it again, and must hear that this cannot be."""

    @staticmethod
    def forward(
        engine: _Engine, kind: str, wrt: str, x: Any, grad_out: Any, grad_log_det: Any, *parameters: torch.Tensor
    ) -> Any:
        return engine.vjp(kind, x, grad_out, grad_log_det, parameters, wrt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(_no_second_derivatives)
    vmap = staticmethod(_no_vmap)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(kind: str, engine: _Engine, x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        if kind == "log_prob":
            return engine.log_prob_foreseeing(x, parameters)
        return getattr(engine, kind)(x, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.kind, ctx.engine, *tensors = inputs
        ctx.foreseen = output[1] if ctx.kind == "log_prob" else None
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kind, engine, foreseen, wanted = ctx.kind, ctx.engine, ctx.foreseen, ctx.needs_input_grad[2:]
        x, *parameters = ctx.saved_tensors
        grad_out, grad_log_det = (None, grads[0]) if kind == "log_prob" else grads
        if grad_out is None and grad_log_det is None:
            return None, None, *[None] * len(wanted)
        wrt, flat, grad_x = _wrt(wanted), None, None
        if torch.is_grad_enabled():  # create_graph
            arguments = (engine, kind, wrt, x, grad_out, grad_log_det, *parameters)
            grad_x, flat = _EagerVjp.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            if kind == "log_prob" and wrt == "parameters":
                flat = engine.take_foreseen(foreseen, grad_log_det)
            if flat is None:
                grad_x, flat = engine.vjp(kind, x, grad_out, grad_log_det, parameters, wrt)
        others = [None] * len(parameters) if wrt == "x" else _parts(flat, parameters, wanted[1:])
        return None, None, grad_x if wanted[0] else None, *others

    vmap = staticmethod(_no_vmap)


def _refuse_tangents(tensors: list[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{name} has a tangent of forward-mode differentiation, and nvpflow has derivatives in reverse mode "
                "alone: use torch.func.vjp, torch.func.grad or backward(), or pass the value without its tangent"
            )


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
        The model and its weights, which are copied; later changes of either do not reach the other. What it rounds on
        the CPU (``weights="bfloat16"``) the module does not: gradients want the weights in full.

    Raises
    ------
    TypeError
        `flow` is no `nvpflow.Flow`.

    Notes
    -----
    Rows are tensors ``[..., D]`` of the module's dtype, on its device; lower precisions, such as autocast gives, are
    converted. Results have the leading axes of the rows. A tensor that is C-contiguous is read where it is; others are
    copied.

    Nothing sets a standardize layer here as `nvpflow.Flow.fit` does: call `initialize_from` before a loop of your own.
    Where the layer is still the identity and the first batch of 16 rows or more is far from unit scale, a `DataWarning`
    says so, once.

    A `context` of other libraries' calls may be given as None: these flows have no context.

    Parameters have the names of `nvpflow.Flow.parameters` (``flow_0_scale.kernel``, ...), and ``state_dict``, ``.to``,
    ``copy.deepcopy``, pickling, ``requires_grad_`` and ``torch.func.functional_call`` do with them what they do
    elsewhere. Those of a standardize layer start with ``requires_grad=False``, as `nvpflow.Flow.fit` keeps them, too.
    On the CPU they lie one after the other in memory, so that reading them costs no copy, and ``.to`` keeps them so.

    The kernels run on a packed copy of the parameters. Every call compares all their bytes with it, so that no change
    is missed, also one that PyTorch does not count (``parameter.data.add_``). That takes as long as reading the weights
    once. For calls of single rows without gradients, `to_flow` has no such cost. Any number of threads may call one
    module, with the parameters as they are when the call begins.

    Examples
    --------
    >>> import nvpflow, nvpflow.torch, torch
    >>> module = nvpflow.torch.FlowModule(nvpflow.build(input_size=2))
    >>> module.log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    _looks_at_scale = False  # the next batch is to be looked at; False for what was pickled without it
    _has_own_base = False  # a FlowTransform goes through the module, from a base that is not in it

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be an nvpflow.Flow, got {_checks.describe(flow)}")
        _checks.whole_mean(flow)
        self._engine = _Engine(flow.to(flow.device, flow.precision, "full"))
        flat = torch.from_numpy(flow._copy_flat_parameters()).to(flow.device)
        self._names: list[tuple[str, str]] = []
        for name, shape, offset in flow._layout():
            layer, _, tensor = name.partition(".")
            if layer not in self._modules:
                self.add_module(layer, _Parameters())
            size = torch.Size(shape).numel()
            trained = not layer.startswith("standardize")
            parameter = torch.nn.Parameter(flat[offset : offset + size].view(shape), requires_grad=trained)
            self.get_submodule(layer).register_parameter(tensor, parameter)
            self._names.append((layer, tensor))
        self._engine.flatten(self._tensors())
        self._looks_at_scale = self._standardizes() and not bool(self._layer_in_front().any())

    # -- rows ---------------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, context: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z [..., D] and log|det dz/dx| [...], nats: data to latent."""
        _no_context(context)
        z, log_det = self._call("forward", "x", x)
        return z.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def inverse(self, z: torch.Tensor, context: None = None, *, with_log_det: bool = False) -> Any:
        """Return x [..., D], latent to data; with `with_log_det`, (x, log|det dx/dz| [...], nats)."""
        _no_context(context)
        x, log_det = self._call("inverse", "z", z)
        x = x.reshape(z.shape)
        return (x, log_det.reshape(z.shape[:-1])) if with_log_det else x

    def log_prob(self, x: torch.Tensor, context: None = None) -> torch.Tensor:
        """Return log p(x) [...], nats."""
        _no_context(context)
        result: torch.Tensor = self._call("log_prob", "x", x)
        return result.reshape(x.shape[:-1])

    def sample(self, n: int, context: None = None, *, seed: int | None = None) -> torch.Tensor:
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
            return self.rsample(n, context, seed=seed)

    def rsample(self, n: int, context: None = None, *, seed: int | None = None) -> torch.Tensor:
        """Return the rows of `sample`, differentiable by the parameters: the inverse of noise that has none."""
        _no_context(context)
        return self.inverse(self._noise(_count(n), _seed(seed)))  # type: ignore[no-any-return]

    def sample_and_log_prob(
        self, n: int, context: None = None, *, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of `rsample` [n, D] and their log p [n], nats, from one pass; both are differentiable."""
        _no_context(context)
        z = self._noise(_count(n), _seed(seed))
        x, log_det = self.inverse(z, with_log_det=True)
        log_normal = -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
        return x, log_normal - log_det

    # -- the flow -----------------------------------------------------------------------------------------------------

    @property
    def num_threads(self) -> int:
        """Threads of a call on the CPU, as `nvpflow.Flow.num_threads`: 0 is as many as this process may use."""
        return self._engine.num_threads

    @num_threads.setter
    def num_threads(self, value: int) -> None:
        self._engine.num_threads = value

    def to_flow(self, *, drop_base: bool = False) -> Flow:
        """Return an `nvpflow.Flow` with a copy of the parameters, on their device: to save, to fit, to call fast.

        Parameters
        ----------
        drop_base
            Of a module that a `FlowTransform` goes through: True takes the module without the base distribution in
            front of the transform, as if that were the standard normal one.

        Raises
        ------
        ValueError
            A `FlowTransform` goes through the module and `drop_base` is False. The latents of an `nvpflow.Flow` are
            standard normal: with another base its densities would be those of another model.
        """
        if self._has_own_base and not _checks.boolean("drop_base", drop_base):
            raise ValueError(
                "to_flow of a module that a FlowTransform goes through: the transform's base distribution is not in "
                "the module, and the latents of an nvpflow.Flow are standard normal; keep the TransformedDistribution, "
                "or, where its base is standard normal, call to_flow(drop_base=True)"
            )
        with self._engine.using(self._tensors()) as flow:
            return flow.to(flow.device, flow.precision)

    def initialize_from(
        self, x: torch.Tensor, *, standardize: Literal["auto", "mean", "robust"] | None = None
    ) -> dict[str, str]:
        """Set the standardize layer from rows [..., D], as `nvpflow.Flow.initialize_from` does; returns what it does.

        Raises
        ------
        TypeError, ValueError
            The flow has no standardize layer in front, a row holds NaN or infinity, or a column is constant.
        """
        tensors = self._tensors()
        rows = self._checked("x", x, tensors[0]).detach().cpu().numpy()
        with self._engine.using(tensors) as flow:
            own = flow.to("cpu")
        how = own.initialize_from(rows, standardize="auto" if standardize is None else standardize)
        self._take(own, only=("standardize_0",))
        self._looks_at_scale = False
        return how

    def reset_parameters(self, *, seed: int | None = None, init: str = "fan_in") -> None:
        """Draw kernels and biases anew; what a standardize layer was set to stays.

        Parameters
        ----------
        seed
            In [0, 2**64): the weights of ``nvpflow.build(seed=seed)``. None: drawn from PyTorch's default generator.
        init
            As in `nvpflow.build`.
        """
        flow = Flow(self._engine.spec, _seed(seed), init=_checks.text("init", init))
        self._take(flow, only=[layer for layer, _ in self._names if not layer.startswith("standardize")])

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

    def _standardizes(self) -> bool:
        return self._names[0][0] == "standardize_0"

    def _layer_in_front(self) -> torch.Tensor:
        return torch.cat([tensor.detach() for tensor in self._tensors()[:2]])

    def _take(self, flow: Flow, only: Sequence[str]) -> None:
        """Copy the parameters of some layers from a flow on the CPU."""
        values = flow.parameters()
        with torch.no_grad():
            for (layer, tensor), parameter in zip(self._names, self._tensors(), strict=True):
                if layer in only:
                    parameter.copy_(torch.tensor(values[f"{layer}.{tensor}"], dtype=parameter.dtype))

    def _look_at_scale(self, rows: torch.Tensor) -> None:
        """Warn where nobody has set the standardize layer and the rows need it; looks at one batch."""
        if len(rows) < _LOOK_ROWS or torch._C._functorch.is_functorch_wrapped_tensor(rows):
            return
        self._looks_at_scale = False
        spread, centre = torch.std_mean(rows.detach(), dim=0)
        far = (centre.abs() > _UNIT_SCALE) | (spread > _UNIT_SCALE) | (spread < 1 / _UNIT_SCALE)
        if bool(far.any()) and not bool(self._layer_in_front().any()):
            columns = ", ".join(str(int(j) + 1) for j in far.nonzero()[:5])
            warnings.warn(
                f"the standardize layer is still the identity and column {columns}{', ...' * (far.sum() > 5)} of the "
                "rows is far from mean 0 and standard deviation 1, which trains badly; call "
                "module.initialize_from(rows) with the training rows before you train",
                _data.DataWarning,
                stacklevel=_data._outside(),
            )

    def _call(self, kind: str, name: str, rows: torch.Tensor) -> Any:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise NotImplementedError("torch.jit.trace cannot record a FlowModule; use torch.compile or torch.export")
        parameters = self._tensors()
        rows = self._checked(name, rows, parameters[0])
        if forward_ad._current_level >= 0:  # a level of forward mode is open, also where gradients are switched off
            _refuse_tangents([(name, rows), *zip(map(".".join, self._names), parameters, strict=True)])
        engine = self._engine
        if not _is_plain(rows):
            return _OPERATORS[kind](rows, parameters, engine.handle)
        if self._looks_at_scale and kind != "inverse":
            self._look_at_scale(rows)
        if not torch.is_grad_enabled() and not torch._C._functorch.is_functorch_wrapped_tensor(rows):
            return getattr(engine, kind)(rows, parameters)
        result: Any = _Eager.apply(kind, engine, rows, *parameters)  # type: ignore[no-untyped-call]
        return result[0] if kind == "log_prob" else result

    def _checked(self, name: str, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the rows as [B, D] of the parameters' dtype."""
        size = self._engine.spec.input_size
        if not isinstance(rows, torch.Tensor):
            raise TypeError(f"{name} is {type(rows).__name__}, expected a torch.Tensor")
        if rows.layout != torch.strided:
            raise TypeError(f"{name} has layout {rows.layout}, expected torch.strided; convert it with .to_dense()")
        if rows.dim() == 0 or rows.shape[-1] != size:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected (..., {size})")
        if rows.device != like.device:
            raise ValueError(f"{name} is on '{rows.device}', the module on '{like.device}'; move one with .to()")
        if rows.dtype != like.dtype:
            if rows.dtype not in _NARROWER.get(like.dtype, ()):
                way_out = "convert the rows with .to()"
                if like.dtype == torch.float32 and not rows.dtype.is_complex:
                    way_out = (
                        "make it a float64 module with module.double(); a cast of the rows to float32 loses digits "
                        "where values are large beside their spread"
                    )
                raise TypeError(f"{name} has dtype {rows.dtype}, the module {like.dtype}; {way_out}")
            rows = rows.to(like.dtype)
        return rows if rows.dim() == 2 else rows.reshape(-1, size)

    def _noise(self, n: int, seed: int) -> torch.Tensor:
        parameters = self._tensors()
        with self._engine.using(parameters) as flow:
            return torch.from_numpy(flow._noise(n, seed)).to(parameters[0].device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FlowModule:
        """As nn.Module: what .to(), .double(), .cuda() and others do to every tensor."""
        first = self._tensors()[0]
        dtype = fn(torch.empty(0, dtype=first.dtype, device=first.device)).dtype
        if dtype not in _DTYPES:
            raise TypeError(f"the parameters cannot be {dtype}: nvpflow computes in float32 and float64")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tensors = self._tensors()
        if not self._engine.are_flat(tensors) and not _are_shared(tensors):
            self._engine.flatten(tensors)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        state = self.__dict__.copy()
        engine = state.pop("_engine")
        return {**state, "_settings": (engine.spec, engine.precision, engine.num_threads)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        spec, precision, num_threads = state.pop("_settings")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        flow = Flow(spec)
        flow.num_threads = num_threads
        self._engine = _Engine(flow)
        self._engine.precision = precision
        if not _are_shared(tensors := self._tensors()):
            self._engine.flatten(tensors)


# A column's mean beyond this, or its standard deviation beyond it or below one over it, is far from unit scale; a batch
# of fewer rows cannot tell.
_UNIT_SCALE, _LOOK_ROWS = 10.0, 16


def _no_context(context: object) -> None:
    if context is not None:
        raise TypeError(
            f"context is a {type(context).__name__}, expected None: nvpflow's flows are not conditional; append it to "
            "the rows for the joint density"
        )


def _count(n: int) -> int:
    count = _checks.integer("n", n)
    if count < 0:
        raise ValueError(f"n is {count}, expected 0 or more")
    return count


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
        As of every transform: 1 keeps the last pair (x, z) and its log-determinant, so that a log_prob of a
        ``TransformedDistribution`` passes through the flow once instead of twice.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, module: FlowModule, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.module = module
        module._has_own_base = True
        # The last rows of _inverse and their log-determinant, which log_abs_det_jacobian is asked for next.
        self._cached_log_det: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

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
        z, log_det = self.module.forward(y)
        if self._cache_size > 0:
            self._cached_log_det = y, log_det
        return z

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return log|det dy/dx| [...], nats; x is the latent here, y the data, as transforms call them."""
        rows, log_det = self._cached_log_det
        return -log_det if rows is y and log_det is not None else -self.module.forward(y)[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the cache holds."""
        return {**super().__getstate__(), "_cached_log_det": (None, None)}  # type: ignore[no-untyped-call]


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
        new: Any = self._get_checked_instance(FlowDistribution, _instance)  # type: ignore[no-untyped-call]
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
        if self._validate_args and value.numel() > 0:  # PyTorch's check of vectors fails on none
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        return self.module.log_prob(value).expand(shape)
