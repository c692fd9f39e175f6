"""nvpflow's kernels on parameters that PyTorch owns."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from nvpflow.flow import Flow

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class Piece(NamedTuple):
    """A parameter of a module: a tensor of the flow, or one that several lie in, one after the other."""

    name: str
    shape: torch.Size
    offset: int  # of its first element in the flow's flat buffer
    parts: tuple[tuple[str, torch.Size, int], ...] = ()  # names, shapes and places of several


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What a flow is told beside its spec and its weights.

    No tuple: sbi walks through a distribution and makes every tuple anew from a list.
    """

    columns: list[str]
    context: list[str]
    statistics: str

    @classmethod
    def of(cls, flow: Flow) -> Description:
        return cls(flow._column_names(), flow._context_names(), flow._statistics())

    def tell(self, flow: Flow) -> None:
        flow._set_column_names(self.columns)
        flow._set_context_names(self.context)
        flow._set_statistics(self.statistics)


class _Packed:
    """A flow that holds a copy of some parameters; it is not changed while it has users."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.copy: torch.Tensor | None = None  # of its parameters, where they are on a CUDA device
        self.users = 0


class Foreseen:
    """The gradients of one call of log_prob, formed with the value because their cotangent could be foreseen.

    A mean over the rows, the usual loss, gives every row the same cotangent, and the same one as in the step before.
    With it a training step passes forward once instead of twice. It belongs to one call and counts only where the
    cotangent turns out to be that one: it changes when a gradient is formed, never what it is.
    """

    def __init__(self, cotangent: float, gradients: tuple[Any, Any, Any]) -> None:
        self.cotangent = cotangent
        self.gradients: tuple[Any, Any, Any] | None = gradients  # as Engine.vjp gives them

    def take(self, wanted: Sequence[bool]) -> tuple[Any, Any, Any] | None:
        """Return the gradients where all that are wanted are there, once: the caller owns them and may add to them."""
        gradients, self.gradients = self.gradients, None
        if gradients is None or any(w and g is None for w, g in zip(wanted, gradients, strict=True)):
            return None
        return gradients


def _common_value(values: torch.Tensor) -> float | None:
    """Return the value of all elements, if one that is not NaN or zero; on the CPU only, where looking is cheap."""
    if values.device.type != "cpu" or values.numel() == 0:
        return None
    array = values.detach().numpy()
    first = float(array[0])
    same = array.strides == (0,) or bool((array == first).all())
    return first if same and first == first and first != 0 else None


class Engine:
    """Runs nvpflow's kernels on parameters that PyTorch owns.

    The kernels read a packed copy of the parameters, made anew when they have changed. Every call compares all their
    bytes: what PyTorch knows of changes leaves out ``parameter.data.add_``, NumPy's views and fused optimizers.
    """

    def __init__(self, flow: Flow, pieces: Sequence[Piece]) -> None:
        self.spec = flow.spec
        self.precision = flow.precision
        self.description = Description.of(flow)
        self.flat: torch.Tensor | None = None  # the memory that the parameters lie in, unless somebody moved them
        self.pieces = pieces
        self._places: tuple[int, list[tuple[int, torch.Size]]] = (0, [])
        self._lock = threading.Lock()
        self._packed = _Packed(flow)
        # Rows and cotangent of the last backward pass of log_prob; none between a prediction and its confirmation.
        self._expected: tuple[int, float] | None = None
        self.handle = next(_handles)
        engines[self.handle] = self

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

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None, parameters: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Flow.forward."""
        with self.using(parameters) as flow:
            return flow.forward(_given(x), context=_given(context))

    def inverse(
        self, z: torch.Tensor, context: torch.Tensor | None, parameters: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Flow.inverse with log_det."""
        with self.using(parameters) as flow:
            result: tuple[torch.Tensor, torch.Tensor]
            result = flow.inverse(_given(z), with_log_det=True, context=_given(context))
            return result

    def log_prob(
        self, x: torch.Tensor, context: torch.Tensor | None, parameters: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """As Flow.log_prob."""
        with self.using(parameters) as flow:
            result: torch.Tensor = flow.log_prob(_given(x), context=_given(context))
            return result

    def log_prob_foreseeing(
        self, x: torch.Tensor, context: torch.Tensor | None, parameters: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, Foreseen | None]:
        """As Flow.log_prob, with the gradients that tensors require where their cotangent can be foreseen."""
        by_context = context is not None and context.requires_grad
        wanted = [x.requires_grad, any(p.requires_grad for p in parameters), by_context]
        cotangent = self._expectation(x.shape[0]) if any(wanted) else None
        if cotangent is None:
            return self.log_prob(x, context, parameters), None
        with self.using(parameters) as flow:
            cotangents = x.new_full(x.shape[:1], cotangent)
            log_prob, grads = flow._log_prob_and_vjp(_given(x), cotangents, **_options(context, wanted))
            return log_prob, Foreseen(cotangent, _three(grads))

    def vjp(
        self,
        kind: str,
        x: torch.Tensor,
        context: torch.Tensor | None,
        grad_out: torch.Tensor | None,
        grad_log_det: torch.Tensor | None,
        parameters: Sequence[torch.Tensor],
        wanted: Sequence[bool],
    ) -> tuple[Any, Any, Any]:
        """As Flow.vjp of kind "forward" or "inverse", or Flow.log_prob_vjp, whose cotangent is `grad_log_det`.

        Returns the cotangents of x, of all parameters in one vector and of the context, None for each that is not
        `wanted`.
        """
        options = _options(context, wanted)
        with self.using(parameters) as flow:
            if kind == "log_prob":
                grads = flow.log_prob_vjp(_given(x), _given(grad_log_det), **options)
            else:
                options["direction"] = kind
                grads = flow.vjp(_given(x), _given(grad_out), _given(grad_log_det), **options)
        return _three(grads)

    def take_foreseen(
        self, foreseen: Foreseen | None, cotangent: torch.Tensor, wanted: Sequence[bool]
    ) -> tuple[Any, Any, Any] | None:
        """Return the foreseen gradients if their cotangent is this one, and learn what to foresee next."""
        value = _common_value(cotangent)
        with self._lock:
            self._expected = None if value is None else (cotangent.shape[0], value)
        return foreseen.take(wanted) if foreseen is not None and foreseen.cotangent == value else None

    def _expectation(self, rows: int) -> float | None:
        with self._lock:
            if self._expected is None or self._expected[0] != rows:
                return None
            cotangent, self._expected = self._expected[1], None
            return cotangent

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
        for (_, shape, offset, _), parameter in zip(self.pieces, parameters, strict=True):
            parameter.data = torch.from_numpy(values[offset : offset + shape.numel()].reshape(shape))
        self.flat = torch.from_numpy(values)

    def are_flat(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether the parameters are the parts of `flat`."""
        if self.flat is None:
            return False
        start, size = self.flat.data_ptr(), self.flat.element_size()
        if self._places[0] != start:
            self._places = (start, [(start + size * offset, shape) for _, shape, offset, _ in self.pieces])
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
        for (name, shape, _, _), p in zip(self.pieces, parameters, strict=True):
            if p.shape != shape:
                raise ValueError(f"the parameter {name} has shape {tuple(p.shape)}, expected {tuple(shape)}")
            if p.dtype not in DTYPES:
                raise TypeError(f"the parameter {name} has dtype {p.dtype}, expected torch.float32 or torch.float64")
            if (p.dtype, p.device) != (first.dtype, first.device):
                raise ValueError(
                    f"the parameter {name} is {p.dtype} on '{p.device}', {self.pieces[0].name} {first.dtype} on "
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
        return flow.spec.dtype == DTYPES[flat.dtype] and flow.device == _place(flat.device)

    def _new_flow(self, flat: torch.Tensor, num_threads: int) -> Flow:
        if flat.device.type not in ("cpu", "cuda"):
            raise ValueError(f"the parameters are on device '{flat.device}', expected the CPU or a CUDA device")
        spec = self.spec.with_dtype(DTYPES[flat.dtype])
        # Modes of lower precision are for float32 on a CUDA device.
        lower = flat.device.type == "cuda" and flat.dtype == torch.float32
        precision = self.precision if lower else "float32"
        flow = Flow(spec, device=_place(flat.device), precision=precision)
        flow.num_threads = num_threads
        self.description.tell(flow)
        return flow


def _given(tensor: torch.Tensor | None) -> Any:
    """Return a tensor as the kernels read it."""
    return None if tensor is None else tensor.detach().contiguous()


def _options(context: torch.Tensor | None, wanted: Sequence[bool]) -> dict[str, Any]:
    """Return what the vector-Jacobian products of a flow take: which of x, parameters and context are wanted."""
    return {"wrt": tuple(itertools.compress(("x", "parameters", "context"), wanted)), "context": _given(context)}


def _three(grads: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Return their results, with None for the context of a call without one."""
    return (*grads, None) if len(grads) == 2 else grads  # type: ignore[return-value]


_handles = itertools.count()
engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()


def _place(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


def are_shared(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether other processes see them (`share_memory`): then they stay where they are."""
    return any(tensor.device.type == "cpu" and tensor.is_shared() for tensor in tensors)  # type: ignore[no-untyped-call]
