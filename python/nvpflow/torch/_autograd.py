"""Where PyTorch differentiates: operators for traces, a function of autograd for everything else, one backward pass.

An operator is what torch.compile sees: a function of rows and parameters without side effects. It costs a tenth of a
millisecond a call, so a call that is not recorded goes through a `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from nvpflow.torch._engine import Engine, Foreseen, engines

# ---- operators; `engine` is the number of an Engine -----------------------------------------------------------------


@torch.library.custom_op("nvpflow::forward", mutates_args=())
def _forward(
    x: torch.Tensor, context: torch.Tensor | None, parameters: list[torch.Tensor], engine: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return engines[engine].forward(x, context, parameters)


@torch.library.custom_op("nvpflow::inverse", mutates_args=())
def _inverse(
    z: torch.Tensor, context: torch.Tensor | None, parameters: list[torch.Tensor], engine: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return engines[engine].inverse(z, context, parameters)


@torch.library.custom_op("nvpflow::log_prob", mutates_args=())
def _log_prob(
    x: torch.Tensor, context: torch.Tensor | None, parameters: list[torch.Tensor], engine: int
) -> torch.Tensor:
    return engines[engine].log_prob(x, context, parameters)


@torch.library.custom_op("nvpflow::vjp", mutates_args=())
def _vjp(
    kind: str,
    x: torch.Tensor,
    context: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_log_det: torch.Tensor | None,
    parameters: list[torch.Tensor],
    engine: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Engine.vjp, but a cotangent that is not wanted is an empty tensor."""
    grads = engines[engine].vjp(kind, x, context, grad_out, grad_log_det, parameters, wanted)
    grad_x, grad_parameters, grad_context = (x.new_empty(0) if grad is None else grad for grad in grads)
    return grad_x, grad_parameters, grad_context


def _pair_of_shapes(
    rows: torch.Tensor, context: torch.Tensor | None, parameters: list[torch.Tensor], engine: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[:1])


_forward.register_fake(_pair_of_shapes)
_inverse.register_fake(_pair_of_shapes)


@_log_prob.register_fake
def _log_prob_shape(
    x: torch.Tensor, context: torch.Tensor | None, parameters: list[torch.Tensor], engine: int
) -> torch.Tensor:
    return x.new_empty(x.shape[:1])


@_vjp.register_fake
def _vjp_shapes(
    kind: str,
    x: torch.Tensor,
    context: torch.Tensor | None,
    grad_out: torch.Tensor | None,
    grad_log_det: torch.Tensor | None,
    parameters: list[torch.Tensor],
    engine: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    by_x, by_parameters, by_context = wanted
    size = sum(p.numel() for p in parameters)
    grad_context = x.new_empty(context.shape if context is not None and by_context else 0)
    return x.new_empty(x.shape if by_x else 0), x.new_empty(size if by_parameters else 0), grad_context


# ---- the backward pass ----------------------------------------------------------------------------------------------


def _parts(flat: torch.Tensor, parameters: Sequence[torch.Tensor], wanted: Sequence[bool]) -> list[torch.Tensor | None]:
    """Split the gradient of all parameters into those of each."""
    parts: Any = torch.split(flat, [p.numel() for p in parameters])
    return [
        (part if p.dim() == 1 else part.view(p.shape)) if w else None
        for part, p, w in zip(parts, parameters, wanted, strict=True)
    ]


def _remember(ctx: Any, kind: str, engine: Engine, tensors: Sequence[Any], foreseen: Foreseen | None) -> None:
    """Keep what `_gradients` needs: the engine, which the graph may outlive otherwise, rows, context and parameters."""
    ctx.kind, ctx.engine, ctx.foreseen = kind, engine, foreseen
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: Sequence[Any], needed: Sequence[bool], *, traced: bool) -> tuple[Any, Any, list[Any]]:
    """Return the gradients by the rows, by the context and by each parameter, as far as they are needed."""
    x, context, *parameters = ctx.saved_tensors
    by_x, by_context, *by_each = needed
    grad_out, grad_log_det = (None, grads[0]) if ctx.kind == "log_prob" else grads
    if grad_out is None and grad_log_det is None:
        return None, None, [None] * len(parameters)
    wanted = [by_x, any(by_each), by_context]
    if traced:
        grad = _vjp(ctx.kind, x, context, grad_out, grad_log_det, parameters, ctx.engine.handle, wanted)
    elif torch.is_grad_enabled():  # create_graph
        arguments = (ctx.kind, ctx.engine, wanted, x, context, grad_out, grad_log_det, *parameters)
        grad = _Vjp.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        grad = None
        if ctx.kind == "log_prob":
            grad = ctx.engine.take_foreseen(ctx.foreseen, grad_log_det, wanted)
        if grad is None:
            grad = ctx.engine.vjp(ctx.kind, x, context, grad_out, grad_log_det, parameters, wanted)
    by_parameter = _parts(grad[1], parameters, by_each) if any(by_each) else [None] * len(parameters)
    return grad[0] if by_x else None, grad[2] if by_context else None, by_parameter


_PLAIN = "nvpflow.exporters.to_torch(module.to_flow()) makes a slower module that has all derivatives"


def _no_second_derivatives(ctx: Any, *grads: object) -> None:
    raise NotImplementedError(
        "nvpflow has first derivatives only: a gradient of FlowModule made with create_graph=True cannot be "
        f"differentiated again; {_PLAIN}"
    )


def _no_forward_mode(ctx: Any, *tangents: object) -> None:
    raise NotImplementedError(
        "nvpflow has derivatives only in reverse mode, and torch.func.jvp, jacfwd and hessian differentiate forward: "
        f"take torch.func.grad, vjp or jacrev; {_PLAIN}"
    )


def _differentiable(kind: str, operator: Any) -> Any:
    """Give an operator the backward pass."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        x, context, parameters, engine = inputs
        _remember(ctx, kind, engines[engine], [x, context, *parameters], None)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        by_x, by_context, by_each, _ = ctx.needs_input_grad
        return (*_gradients(ctx, grads, [by_x, by_context, *by_each], traced=True), None)

    operator.register_autograd(backward, setup_context=remember)
    return operator


_OPERATORS: dict[str, Any] = {
    kind: _differentiable(kind, operator)
    for kind, operator in (("forward", _forward), ("inverse", _inverse), ("log_prob", _log_prob))
}
_vjp.register_autograd(_no_second_derivatives)


# ---- without an operator --------------------------------------------------------------------------------------------


# torch.func.vmap: one call on the rows of all slices, or one for each where parameters or their gradients differ.


def _one_by_one(function: Any, count: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, Any]:
    """Call a function of autograd on each of `count` slices; stacks the tensors of its results."""
    results = []
    for i in range(count):
        pairs = zip(arguments, in_dims, strict=True)
        results.append(function.apply(*(a.select(d, i) if isinstance(d, int) else a for a, d in pairs)))
    columns = [
        torch.stack(column) if isinstance(column[0], torch.Tensor) else None for column in zip(*results, strict=True)
    ]
    return tuple(columns), tuple(None if column is None else 0 for column in columns)


def _merged(tensor: torch.Tensor | None, dim: int | None, count: int) -> torch.Tensor | None:
    """Return rows [n, ...] of each slice as [count n, ...]."""
    if tensor is None:
        return None
    each = tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return each.flatten(0, 1)


def _merged_context(
    context: torch.Tensor | None, dim: int | None, count: int, rows: int, *, keep_one: bool
) -> torch.Tensor | None:
    """Return contexts [n, C] or [C] of each slice for merged rows; keep_one: one [C] for all slices stays so."""
    if context is None or (keep_one and dim is None and context.dim() == 1):
        return context
    if dim is not None:
        context, dim = context.movedim(dim, 0), 0
    if context.dim() == (1 if dim is None else 2):
        context = context.unsqueeze(-2).expand(*context.shape[:-1], rows, -1)
    return _merged(context, dim, count)


def _is_batched(dims: Sequence[int | None]) -> bool:
    return any(dim is not None for dim in dims)


def _rows_of_slice(x: torch.Tensor, dim: int | None) -> int:
    return int((x if dim is None else x.movedim(dim, 0)[0]).shape[0])


class _Vjp(torch.autograd.Function):
    """Engine.vjp where somebody may want to differentiate it again, and must hear that this cannot be."""

    @staticmethod
    def forward(
        kind: str,
        engine: Engine,
        wanted: Sequence[bool],
        x: Any,
        context: Any,
        grad_out: Any,
        grad_log_det: Any,
        *parameters: torch.Tensor,
    ) -> Any:
        return engine.vjp(kind, x, context, grad_out, grad_log_det, parameters, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(_no_second_derivatives)
    jvp = staticmethod(_no_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        kind, engine, wanted, x, context, *cotangents = arguments[:7]
        of_x, of_context, *of_cotangents = in_dims[3:7]
        count = info.batch_size
        if wanted[1] or _is_batched(in_dims[7:]):
            return _one_by_one(_Vjp, count, in_dims, arguments)
        rows = _rows_of_slice(x, of_x)
        merged = (
            _merged(x, of_x, count),
            _merged_context(context, of_context, count, rows, keep_one=not wanted[2]),
            *(_merged(c, d, count) for c, d in zip(cotangents, of_cotangents, strict=True)),
        )
        grads: Any = _Vjp.apply(kind, engine, wanted, *merged, *arguments[7:])  # type: ignore[no-untyped-call]
        grad_x, grad_context = (None if g is None else g.unflatten(0, (count, rows)) for g in (grads[0], grads[2]))
        if grad_context is not None and context.dim() - (of_context is not None) == 1:
            grad_context = grad_context.sum(1)
        return (grad_x, None, grad_context), tuple(None if g is None else 0 for g in (grad_x, None, grad_context))


class _Call(torch.autograd.Function):
    """A method of the engine; of log_prob with the gradients that could be foreseen, or None, as a second result."""

    @staticmethod
    def forward(
        kind: str, engine: Engine, x: torch.Tensor, context: torch.Tensor | None, *parameters: torch.Tensor
    ) -> Any:
        if kind == "log_prob":
            return engine.log_prob_foreseeing(x, context, parameters)
        return getattr(engine, kind)(x, context, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kind, engine, *tensors = inputs
        _remember(ctx, kind, engine, tensors, output[1] if kind == "log_prob" else None)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_x, grad_context, by_parameter = _gradients(ctx, grads, ctx.needs_input_grad[2:], traced=False)
        return None, None, grad_x, grad_context, *by_parameter

    jvp = staticmethod(_no_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        kind, engine, x, context = arguments[:4]
        count = info.batch_size
        if _is_batched(in_dims[4:]):
            return _one_by_one(_Call, count, in_dims, arguments)
        rows = _rows_of_slice(x, in_dims[2])
        merged = (
            _merged(x, in_dims[2], count),
            _merged_context(context, in_dims[3], count, rows, keep_one=True),
        )
        results: Any = _Call.apply(kind, engine, *merged, *arguments[4:])  # type: ignore[no-untyped-call]
        tensors = [r.unflatten(0, (count, rows)) if isinstance(r, torch.Tensor) else None for r in results]
        return tuple(tensors), tuple(None if tensor is None else 0 for tensor in tensors)


# ---- calls ----------------------------------------------------------------------------------------------------------


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory and its operations are not recorded: a trace sees only operators."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return plain and not recorded


def call(
    kind: str, engine: Engine, rows: torch.Tensor, context: torch.Tensor | None, parameters: list[torch.Tensor]
) -> Any:
    """Return what `kind` of the engine gives on rows [B, D] under contexts [B, C], one [C] or None.

    It is differentiable where somebody may want a gradient.
    """
    if not is_plain(rows) or (context is not None and not is_plain(context)):
        return _OPERATORS[kind](rows, context, parameters, engine.handle)
    if not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None:
        return getattr(engine, kind)(rows, context, parameters)
    result: Any = _Call.apply(kind, engine, rows, context, *parameters)  # type: ignore[no-untyped-call]
    return result[0] if kind == "log_prob" else result


def refuse_tangents(tensors: list[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{name} has a tangent of forward-mode differentiation, and nvpflow has derivatives only in reverse "
                "mode: use torch.func.vjp, torch.func.grad or backward(), or pass the value without its tangent; "
                f"{_PLAIN}"
            )
