"""`FlowModule`: a flow as an ``nn.Module``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

from nvpflow import _bounds, _checks, _core, _data, _hints
from nvpflow._bases import Mixture, Normal, StudentT, Uniform, checked_temperature, in_words
from nvpflow._spec import bounds_of, standardize_name
from nvpflow.flow import Flow
from nvpflow.torch._autograd import call, is_plain, refuse_tangents
from nvpflow.torch._bases import log_student
from nvpflow.torch._engine import DTYPES, Engine, Piece, are_shared

# What converts to a flow's dtype without loss.
_NARROWER = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float16, torch.bfloat16, torch.float32),
}


class _Parameters(torch.nn.Module):
    """The tensors of one layer: names with a dot are a module and its parameter in PyTorch."""

    def reset_parameters(self) -> None:
        """Leave that to the FlowModule, which comes after its parts where ``apply`` resets every module."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As nn.Module, but for flat parameters, whose parts the FlowModule has saved."""
        if not prefix.endswith(f"{_FLAT}."):
            super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]


# The module of parameters that hold several tensors.
_FLAT = "flat"


class FlowModule(torch.nn.Module):
    """A flow whose parameters are PyTorch's, for losses, layers and optimizers of one's own.

    Gradients by every parameter and by the rows are nvpflow's vector-Jacobian products, through `forward`, `inverse`,
    `log_prob`, `rsample` and `rsample_and_log_prob`; there are no second derivatives. Each method is one operator to
    ``torch.compile``.

    Parameters
    ----------
    flow
        The model and its weights, which are copied; later changes of either do not reach the other. What it rounds on
        the CPU (``weights="bfloat16"``) the module does not: gradients want the weights in full.
    flat
        One parameter for all tensors that are trained, in place of one for each. A step of an optimizer then takes
        microseconds; PyTorch's loop over many tensors takes milliseconds. ``state_dict`` keeps its names, while
        ``torch.func.functional_call`` goes by those of ``named_parameters``.
    frozen
        Names of layers or tensors, such as ``"flow_0_scale"`` or ``"flow_0_scale.kernel"``, that begin with
        ``requires_grad=False``. Of a flat module they are parameters of their own, so that ``requires_grad_`` still
        reaches each of them.

    Raises
    ------
    TypeError, ValueError
        `flow` is not an `nvpflow.Flow`, or `frozen` has a name that it does not have.

    Notes
    -----
    Rows are tensors ``[..., D]`` of the module's dtype, on its device; lower precisions, such as autocast gives, are
    converted. Results have the leading axes of the rows. A tensor that is C-contiguous is read where it is; others are
    copied.

    Nothing sets standardize and actnorm layers here as `nvpflow.Flow.fit` does: call `initialize_from` before a loop of
    your own. A `DataWarning` tells, once, of a standardize layer that is still the identity while a first batch of at
    least 16 rows has another scale. So it is with what standardizes the context, unless a network makes it.

    A flow with a context, a density p(x | c), needs ``context=`` in every call: tensors ``[..., C]`` of the module's
    dtype, on its device. Leading axes of rows and contexts broadcast, as everywhere in PyTorch, and results have them.
    One context for all rows, ``[C]``, costs less and gives the same bits. Gradients reach the context, and so a network
    that computes it. `FlowDistribution` is the module under given contexts.

    Parameters have the names of `nvpflow.Flow.parameters` (``flow_0_scale.kernel``, ...), and ``state_dict``, ``.to``,
    ``copy.deepcopy``, pickling, ``requires_grad_`` and ``torch.func.functional_call`` do with them what they do
    elsewhere. Those of a standardize layer start with ``requires_grad=False``, as `nvpflow.Flow.fit` keeps them, too.
    On the CPU they lie one after the other in memory, so that reading them costs no copy, and ``.to`` keeps them so.

    Of a flat module ``named_parameters`` has ``flat.0`` in their place, and ``flat.1``, ... where tensors that are not
    trained lie between them; those have their own names. ``state_dict`` gives and takes the same names and shapes as
    ever, so that files go from one form to the other. Everything that PyTorch does with single tensors (a group of an
    optimizer for the kernels, ``parametrize``, pruning) wants the other form.

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

    # The standardizing layers that are the identity, for rows of which the next batch is to be looked at.
    _unset: tuple[str, ...] = ()
    _first: str = "standardize_0"  # the standardize layer that comes first, if one does
    _has_own_base = False  # a FlowTransform goes through the module, from a base that is not in it

    @_hints.explained
    def __init__(self, flow: Flow, *, flat: bool = False, frozen: Sequence[str] = ()) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow is {_checks.describe(flow)}, expected an nvpflow.Flow")
        _checks.whole_mean(flow)
        _checks.no_discrete("flow", flow.spec)
        trained = _core._trained(flow.spec) - _chosen("frozen", frozen, [name for name, _, _ in flow._layout()])
        pieces = _pieces(flow, trained if _checks.boolean("flat", flat) else frozenset())
        self._engine = Engine(flow.to(flow.device, flow.precision, "full"), pieces)
        values = torch.from_numpy(flow._copy_flat_parameters()).to(flow.device)
        self._names: list[tuple[str, str]] = []
        for piece in pieces:
            layer, _, tensor = piece.name.partition(".")
            if layer not in self._modules:
                self.add_module(layer, _Parameters())
            value = values[piece.offset : piece.offset + piece.shape.numel()].view(piece.shape)
            parameter = torch.nn.Parameter(value, requires_grad=piece.name in trained or bool(piece.parts))
            self.get_submodule(layer).register_parameter(tensor, parameter)
            self._names.append((layer, tensor))
        self._engine.flatten(self._tensors())
        self._first, self._base = standardize_name(flow.spec), flow.spec.base
        self._unset = tuple(layer for layer in (self._first, "context") if self._is_identity(layer))

    # -- rows ---------------------------------------------------------------------------------------------------------

    @_hints.explained
    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z [..., D] and log|det dz/dx| [...], nats: data to latent."""
        z, log_det = self._call("forward", "x", x, context)
        return z, log_det

    @_hints.explained
    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None, *, with_log_det: bool = False) -> Any:
        """Return x [..., D], latent to data; with `with_log_det`, (x, log|det dx/dz| [...], nats)."""
        x, log_det = self._call("inverse", "z", z, context)
        return (x, log_det) if with_log_det else x

    @_hints.explained
    def log_prob(
        self, x: torch.Tensor, context: torch.Tensor | None = None, *, temperature: float | None = None
    ) -> torch.Tensor:
        """Return log p(x) [...], with a context log p(x | context), nats; `temperature` is that of `sample`."""
        heat = checked_temperature(temperature, self._base)
        if heat == 1:
            (result,) = self._call("log_prob", "x", x, context)
            return result
        z, log_det = self._call("forward", "x", x, context)
        return _total(z, log_det, heat)

    @_hints.explained
    def sample(
        self,
        n: int,
        context: torch.Tensor | None = None,
        *,
        seed: int | None = None,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Return n rows [n, D] without a gradient; under contexts [..., C] n rows for each, [..., n, D].

        Parameters
        ----------
        n
            How many rows.
        context
            [..., C], of a flow with a context.
        seed
            In [0, 2**64): the rows of `nvpflow.Flow.sample`. None: drawn from PyTorch's default generator, so that
            ``torch.manual_seed`` decides.
        temperature
            T of the base N(0, T I) that takes the place of N(0, I), 1e-12 to 1e12. Only a normal base has one.
        """
        with torch.no_grad():
            return self.rsample(n, context, seed=seed, temperature=temperature)

    @_hints.explained
    def rsample(
        self,
        n: int,
        context: torch.Tensor | None = None,
        *,
        seed: int | None = None,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Return the rows of `sample`, differentiable by parameters and context: the inverse of noise that has none.

        Raises
        ------
        NotImplementedError
            A gradient by the base's own parameters is asked for, on which the noise depends.
        """
        z, context = self._latents(n, context, seed, checked_temperature(temperature, self._base))
        return self.inverse(z, context)  # type: ignore[no-any-return]

    @_hints.explained
    def sample_and_log_prob(
        self,
        n: int,
        context: torch.Tensor | None = None,
        *,
        seed: int | None = None,
        temperature: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of `sample` [..., n, D] and their log p [..., n], nats, from one pass, without a gradient."""
        with torch.no_grad():
            return self.rsample_and_log_prob(n, context, seed=seed, temperature=temperature)

    @_hints.explained
    def rsample_and_log_prob(
        self,
        n: int,
        context: torch.Tensor | None = None,
        *,
        seed: int | None = None,
        temperature: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of `rsample` [..., n, D] and their log p [..., n], nats, differentiable, from one pass."""
        heat = checked_temperature(temperature, self._base)
        return self._with_log_prob(*self._latents(n, context, seed, heat), heat)

    def _with_log_prob(
        self, z: torch.Tensor, context: torch.Tensor | None, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the data of latents that were drawn from the base at a temperature, and their log p."""
        x, log_det = self.inverse(z, context, with_log_det=True)
        return x, self._log_density(z, temperature) - log_det

    def _log_density(self, z: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return log p [...] of latents [..., D] that were drawn from the base at a temperature, nats."""
        base, size = self._base, z.shape[-1]
        if isinstance(base, Normal):
            return _log_normal(z, temperature)
        if isinstance(base, Uniform):
            return z.new_full(z.shape[:-1], -size * math.log(base.high - base.low))
        own = dict(self._named())
        if isinstance(base, StudentT):
            return log_student(z, own["base.log_df"]).sum(-1)
        return _log_mixture(base, z, own)

    # -- the flow -----------------------------------------------------------------------------------------------------

    @property
    def num_threads(self) -> int:
        """Threads of a call on the CPU, as `nvpflow.Flow.num_threads`: 0 is as many as this process may use."""
        return self._engine.num_threads

    @num_threads.setter
    def num_threads(self, value: int) -> None:
        self._engine.num_threads = value

    @_hints.explained
    def to_flow(self, *, drop_base: bool = False) -> Flow:
        """Return an `nvpflow.Flow` with a copy of the parameters, on their device: to save, to fit, to call fast.

        Parameters
        ----------
        drop_base
            Of a module that a `FlowTransform` goes through: True leaves out the base distribution in front of the
            transform, and takes the module's own.

        Raises
        ------
        ValueError
            A `FlowTransform` goes through the module and `drop_base` is False. An `nvpflow.Flow` has the base of its
            spec: with another one its densities would be those of another model.
        """
        if self._has_own_base and not _checks.boolean("drop_base", drop_base):
            own = in_words(self._base)
            raise ValueError(
                "to_flow of a module that a FlowTransform goes through: the transform's base distribution is not in "
                f"the module, and the latents of its nvpflow.Flow are {own}; keep the TransformedDistribution, "
                f"or, where its base is {own}, call to_flow(drop_base=True)"
            )
        with self._engine.using(self._tensors()) as flow:
            return flow.to(flow.device, flow.precision)

    @_hints.explained
    def initialize_from(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        sample_weight: torch.Tensor | None = None,
        standardize: Literal["auto", "mean", "robust"] | None = None,
        allow_degenerate: bool = False,
    ) -> dict[str, str]:
        """Set from rows [..., D] what `nvpflow.Flow.initialize_from` sets; returns what it does.

        `sample_weight` [...] is what each row counts for.

        `context` [..., C] has a row for each row of x. That of an embedding network changes as it trains: leave such a
        flow's context as it is (``standardize_context=False``).

        With their contexts [..., C] it also sets what standardizes the context.

        Raises
        ------
        TypeError, ValueError
            The flow has nothing that is set so, a row holds NaN or infinity, a column is constant, or the context is
            missing.
        """
        tensors = self._tensors()
        rows = self._checked("x", x, tensors[0])
        rows, given, _ = _side_by_side("x", rows, self._checked_context(context, tensors[0]))
        with self._engine.using(tensors) as flow:
            own = flow.to("cpu")
        how = own.initialize_from(
            rows.detach().cpu().numpy(),
            context=None if given is None else given.detach().expand(len(rows), -1).cpu().numpy(),
            sample_weight=None if sample_weight is None else sample_weight.detach().cpu().numpy().reshape(-1),
            standardize=standardize,
            allow_degenerate=allow_degenerate,
        )
        self._take(own, _core._from_data(own.spec))
        self._unset = ()
        return how

    @_hints.explained
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
        set_once = _core._from_data(flow.spec) - _core._trained(flow.spec)
        self._take(flow, flow.parameters().keys() - set_once)

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

    def _is_identity(self, layer: str) -> bool:
        """Whether the flow has a standardizing layer of this name, and nobody has set it."""
        tensors = [tensor for name, tensor in self._named() if name.partition(".")[0] == layer]
        return bool(tensors) and not any(bool(tensor.detach().any()) for tensor in tensors)

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the flow by their names; those of a flat parameter are views of it."""
        for piece, parameter in zip(self._engine.pieces, self._tensors(), strict=True):
            if not piece.parts:
                yield piece.name, parameter
            for name, shape, start in piece.parts:
                yield name, parameter[start : start + shape.numel()].view(shape)

    def _take(self, flow: Flow, wanted: set[str]) -> None:
        """Copy these parameters from a flow on the CPU."""
        values = flow.parameters()
        with torch.no_grad():
            for name, tensor in self._named():
                if name in wanted:
                    tensor.copy_(torch.tensor(values[name], dtype=tensor.dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As nn.Module; the parts of a flat parameter by their own names, each in a storage of its own on the CPU."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        flat = {name for piece in self._engine.pieces for name, _, _ in piece.parts}
        if not flat:
            return
        for name, tensor in self._named():
            if name in flat:
                destination[prefix + name] = tensor if keep_vars else _alone(tensor.detach())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As nn.Module; tensors go to their places in a flat parameter."""
        missing, _, errors = lists
        for piece, parameter in zip(self._engine.pieces, self._tensors(), strict=True):
            if piece.parts:
                joined = _joined(piece, parameter.detach(), state_dict, prefix, missing, errors)
                state_dict[prefix + piece.name] = joined
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)  # type: ignore[no-untyped-call]

    def _look_at_scales(self, rows: torch.Tensor, context: torch.Tensor | None) -> None:
        if self._first in self._unset:
            bounds = bounds_of(self._engine.spec)
            if bounds is not None:
                rows = torch.from_numpy(_bounds.forward(bounds, rows.detach().cpu().numpy()))
            self._look_at_scale(self._first, rows)
        # Of a context without a graph nobody can say whether a network made it, whose outputs are as they are.
        if "context" in self._unset and context is not None and torch.is_grad_enabled():
            if context.requires_grad:
                self._unset = tuple(layer for layer in self._unset if layer != "context")
            elif context.dim() == 2:
                self._look_at_scale("context", context)

    def _look_at_scale(self, layer: str, rows: torch.Tensor) -> None:
        """Warn where nobody has set a standardizing layer and its rows need it; looks at one batch."""
        if len(rows) < _LOOK_ROWS or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        self._unset = tuple(other for other in self._unset if other != layer)
        spread, centre = torch.std_mean(rows.detach(), dim=0)
        far = (centre.abs() > _UNIT_SCALE) | (spread > _UNIT_SCALE) | (spread < 1 / _UNIT_SCALE)
        if bool(far.any()) and self._is_identity(layer):
            columns = ", ".join(str(int(j) + 1) for j in far.nonzero()[:5])
            of_rows = layer != "context"
            warnings.warn(
                f"{'the standardize layer' if of_rows else 'what standardizes the context'} is still the identity and "
                f"column {columns}{', ...' * (far.sum() > 5)} of the {'rows' if of_rows else 'context'} is far from "
                "mean 0 and standard deviation 1, which trains badly; call "
                f"module.initialize_from(rows{'' if of_rows else ', context'}) with the training rows before you train",
                _data.DataWarning,
                stacklevel=_data._outside(),
            )

    def _call(self, kind: str, name: str, rows: torch.Tensor, context: torch.Tensor | None) -> list[torch.Tensor]:
        """Return what `kind` gives, with the leading axes of rows and context."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise NotImplementedError("torch.jit.trace cannot record a FlowModule; use torch.compile or torch.export")
        parameters = self._tensors()
        rows = self._checked(name, rows, parameters[0])
        context = self._checked_context(context, parameters[0])
        if forward_ad._current_level >= 0:  # a level of forward mode is open, also where gradients are switched off
            named = [(name, rows), *zip(map(".".join, self._names), parameters, strict=True)]
            refuse_tangents(named if context is None else [*named, ("context", context)])
        flat, given, axes = _side_by_side(name, rows, context)
        if self._unset and kind != "inverse" and is_plain(flat):
            self._look_at_scales(flat, given)
        results = call(kind, self._engine, flat, given, parameters)
        if kind == "log_prob":
            return [results.reshape(axes)]
        return [results[0].reshape(*axes, flat.shape[1]), results[1].reshape(axes)]

    def _checked(self, name: str, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return rows [..., D], or contexts [..., C], of the parameters' dtype."""
        spec = self._engine.spec
        size = spec.context_size if name == "context" else spec.input_size
        if not isinstance(rows, torch.Tensor):
            raise TypeError(f"{name} is {type(rows).__name__}, expected a torch.Tensor")
        if rows.layout != torch.strided:
            raise TypeError(f"{name} has layout {rows.layout}, expected torch.strided; convert it with .to_dense()")
        if rows.dim() == 0 or rows.shape[-1] != size:
            way = f"; {name}.unsqueeze(-1) makes a row of each number" if size == 1 and rows.dim() < 2 else ""
            raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected (..., {size}){way}")
        if rows.device != like.device:
            raise ValueError(
                f"{name} is on '{rows.device}', expected '{like.device}', the module's; move one with .to()"
            )
        if rows.dtype != like.dtype:
            if rows.dtype not in _NARROWER.get(like.dtype, ()):
                way_out = f"convert it with .to({like.dtype})"
                may_lose = name != "context" and like.dtype == torch.float32 and not spec._is_bounded
                if may_lose and not rows.dtype.is_complex:
                    way_out = (
                        "make it a float64 module with module.double(); a cast of the rows to float32 loses digits "
                        "where values are large beside their spread"
                    )
                raise TypeError(f"{name} has dtype {rows.dtype}, expected {like.dtype}, the module's; {way_out}")
            rows = rows.to(like.dtype)
        return rows

    def _checked_context(self, context: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        size = self._engine.spec.context_size
        if size > 0 and context is not None:
            return self._checked("context", context, like)
        if size > 0:
            raise ValueError(
                f"context is missing, expected a tensor (..., {size}): the flow is a density p(x | context)"
            )
        if context is not None:
            raise ValueError(
                f"context is {type(context).__name__}, expected None: the flow has no context; build it with "
                "context_size="
            )
        return None

    def _latents(
        self, n: int, context: torch.Tensor | None, seed: int | None, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the noise of a sample [..., n, D], and its contexts with an axis for the n rows of each."""
        count = _checks.count("n", n)
        given = self._checked_context(context, self._tensors()[0])
        if given is None:
            return self._noise((count,), seed, temperature), None
        return self._noise((*given.shape[:-1], count), seed, temperature), given.unsqueeze(-2)

    def _noise(self, axes: Sequence[int], seed: int | None, temperature: float) -> torch.Tensor:
        """Return rows of the base [*axes, D]; row i of them is that of the sample of `nvpflow.Flow`."""
        number, parameters = _seed(seed), self._tensors()
        if torch.is_grad_enabled() and any(p.requires_grad for name, p in self._named() if name.startswith("base.")):
            raise NotImplementedError(
                f"the noise of base={self._base!r} depends on the base's parameters, and has no derivative "
                "by them; take sample() without a gradient, or FlowModule(flow, frozen=('base',))"
            )
        with self._engine.using(parameters) as flow:
            noise = torch.from_numpy(flow._noise(math.prod(axes), number))
        if temperature != 1:
            noise *= math.sqrt(temperature)
        return noise.reshape(*axes, noise.shape[1]).to(parameters[0].device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FlowModule:
        """As nn.Module: what .to(), .double(), .cuda() and others do to every tensor."""
        first = self._tensors()[0]
        dtype = fn(torch.empty(0, dtype=first.dtype, device=first.device)).dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.float64, which nvpflow computes in")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tensors = self._tensors()
        if not self._engine.are_flat(tensors) and not are_shared(tensors):
            self._engine.flatten(tensors)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        state = self.__dict__.copy()
        engine = state.pop("_engine")
        settings = (engine.spec, engine.precision, engine.num_threads, engine.description, engine.pieces)
        return {**state, "_settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        spec, precision, num_threads, description, pieces = state.pop("_settings")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        flow = Flow(spec)
        flow.num_threads = num_threads
        description.tell(flow)
        self._engine = Engine(flow, pieces)
        self._engine.precision = precision
        if not are_shared(tensors := self._tensors()):
            self._engine.flatten(tensors)


def _chosen(name: str, chosen: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return which tensors of these names are chosen, by their names or those of their layers."""
    if isinstance(chosen, str):
        raise TypeError(f"{name} is a str, expected several names; write [{chosen!r}]")
    if not isinstance(chosen, Iterable):
        raise TypeError(f"{name} is {_checks.describe(chosen)}, expected names of layers or tensors, or ()")
    found: set[str] = set()
    for one in chosen:
        mine = {other for other in names if one in (other, other.partition(".")[0])}
        if not mine:
            layers = ", ".join(dict.fromkeys(other.partition(".")[0] for other in names))
            raise ValueError(f"{name} has {one!r}, expected names of layers or tensors; the layers are {layers}")
        found |= mine
    return found


def _pieces(flow: Flow, joined: Set[str]) -> list[Piece]:
    """Return the parameters of a module: a piece for each tensor, but one for those to join that follow each other."""
    pieces: list[Piece] = []
    flat = 0
    for name, extents, offset in flow._layout():
        shape = torch.Size(extents)
        if name not in joined:
            pieces.append(Piece(name, shape, offset))
        elif pieces and pieces[-1].parts:
            before = pieces.pop()
            size = before.shape.numel()
            parts = (*before.parts, (name, shape, size))
            pieces.append(before._replace(shape=torch.Size([size + shape.numel()]), parts=parts))
        else:
            pieces.append(Piece(f"{_FLAT}.{flat}", torch.Size([shape.numel()]), offset, ((name, shape, 0),)))
            flat += 1
    return pieces


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a storage of its own, where that can be: safetensors refuses views of one storage."""
    return torch.from_numpy(tensor.numpy()) if is_plain(tensor) and tensor.device.type == "cpu" else tensor


def _joined(
    piece: Piece,
    values: torch.Tensor,
    state_dict: dict[str, Any],
    prefix: str,
    missing: list[str],
    errors: list[str],
) -> torch.Tensor:
    """Take the parts of a flat parameter out of a state dict, as one vector; what is not there stays as it is."""
    parts = []
    for name, shape, start in piece.parts:
        old = values[start : start + shape.numel()]
        new = state_dict.pop(prefix + name, None)
        if new is None:
            missing.append(prefix + name)
        elif new.shape != shape:
            errors.append(
                f"size mismatch for {prefix + name}: copying a param with shape {new.shape} from checkpoint, the shape "
                f"in current model is {shape}."
            )
            new = None
        parts.append(old if new is None else new.detach().reshape(-1))
    like = next((part for part in parts if part.device != values.device or part.dtype != values.dtype), values)
    return torch.cat([part.to(like) for part in parts])


# A column's mean beyond this, or its standard deviation beyond it or below one over it, is far from unit scale; a batch
# of fewer rows cannot tell.
_UNIT_SCALE, _LOOK_ROWS = 10.0, 16


def _side_by_side(
    name: str, rows: torch.Tensor, context: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Size]:
    """Return rows [B, D], their contexts [B, C], one [C] or None, and the axes that B stands for."""
    axes = rows.shape[:-1]
    if context is not None and context.dim() > 1:
        of_context = context.shape[:-1]
        try:
            axes = torch.broadcast_shapes(axes, of_context)  # type: ignore[no-untyped-call]
        except RuntimeError:
            size = context.shape[-1]
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected {(*axes, size)}, one for each row of {name}, or "
                f"{(size,)}, one for all; other leading axes must broadcast with {tuple(axes)}"
            ) from None
        rows = rows.expand(*axes, rows.shape[-1])
        one = math.prod(of_context) == 1
        context = context.reshape(-1) if one else context.expand(*axes, context.shape[-1]).flatten(0, -2)
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1]), context, axes


def _log_normal(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log N(z; 0, T I) [...], nats."""
    return -0.5 * (z.square().sum(-1) / temperature + z.shape[-1] * math.log(2 * math.pi * temperature))


def _total(z: torch.Tensor, log_det: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log p of rows by latents and log-determinant: NaN where rows hold NaN or infinity, and nowhere else."""
    log_p = _log_normal(z, temperature) + log_det
    return torch.where(log_p.isnan() & ~log_det.isnan(), -math.inf, log_p)


def _log_mixture(base: Mixture, z: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return log p [...] of latents [..., D]."""
    factors = torch.diag_embed(torch.ones_like(own["base.log_scales"]))
    if base.covariance == "full":
        below = torch.tril_indices(z.shape[-1], z.shape[-1], -1, device=z.device)
        factors = factors.index_put((torch.arange(len(factors))[:, None], *below), own["base.lower"])
    factors = factors * own["base.log_scales"].exp()[:, None]
    normals = torch.distributions.MultivariateNormal(own["base.means"], scale_tril=factors, validate_args=False)
    log_p: torch.Tensor = normals.log_prob(z[..., None, :]) + own["base.logits"].log_softmax(0)  # type: ignore[no-untyped-call]
    return log_p.logsumexp(-1)


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(2**63 - 1, ()).item())
    return _checks.integer("seed", seed, unsigned=True)
