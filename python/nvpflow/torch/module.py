"""`FlowModule`: a flow as an ``nn.Module``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

from nvpflow import _checks, _core, _data, _hints
from nvpflow.flow import Flow
from nvpflow.torch._autograd import call, is_plain, refuse_tangents
from nvpflow.torch._engine import DTYPES, Engine, are_shared

# What converts to a flow's dtype without loss.
_NARROWER = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float16, torch.bfloat16, torch.float32),
}


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

    @_hints.explained
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be an nvpflow.Flow, got {_checks.describe(flow)}")
        _checks.whole_mean(flow)
        self._engine = Engine(flow.to(flow.device, flow.precision, "full"))
        flat = torch.from_numpy(flow._copy_flat_parameters()).to(flow.device)
        self._names: list[tuple[str, str]] = []
        trained = _core._trained(flow.spec)
        for name, shape, offset in flow._layout():
            layer, _, tensor = name.partition(".")
            if layer not in self._modules:
                self.add_module(layer, _Parameters())
            size = torch.Size(shape).numel()
            parameter = torch.nn.Parameter(flat[offset : offset + size].view(shape), requires_grad=name in trained)
            self.get_submodule(layer).register_parameter(tensor, parameter)
            self._names.append((layer, tensor))
        self._engine.flatten(self._tensors())
        self._looks_at_scale = self._standardizes() and not bool(self._layer_in_front().any())

    # -- rows ---------------------------------------------------------------------------------------------------------

    @_hints.explained
    def forward(self, x: torch.Tensor, context: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z [..., D] and log|det dz/dx| [...], nats: data to latent."""
        _no_context(context)
        z, log_det = self._call("forward", "x", x)
        return z.reshape(x.shape), log_det.reshape(x.shape[:-1])

    @_hints.explained
    def inverse(self, z: torch.Tensor, context: None = None, *, with_log_det: bool = False) -> Any:
        """Return x [..., D], latent to data; with `with_log_det`, (x, log|det dx/dz| [...], nats)."""
        _no_context(context)
        x, log_det = self._call("inverse", "z", z)
        x = x.reshape(z.shape)
        return (x, log_det.reshape(z.shape[:-1])) if with_log_det else x

    @_hints.explained
    def log_prob(self, x: torch.Tensor, context: None = None) -> torch.Tensor:
        """Return log p(x) [...], nats."""
        _no_context(context)
        result: torch.Tensor = self._call("log_prob", "x", x)
        return result.reshape(x.shape[:-1])

    @_hints.explained
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

    @_hints.explained
    def rsample(self, n: int, context: None = None, *, seed: int | None = None) -> torch.Tensor:
        """Return the rows of `sample`, differentiable by the parameters: the inverse of noise that has none."""
        _no_context(context)
        return self.inverse(self._noise(_count(n), _seed(seed)))  # type: ignore[no-any-return]

    @_hints.explained
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

    @_hints.explained
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

    @_hints.explained
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
        trained = _core._trained(flow.spec)
        self._take(flow, only=[layer for layer, tensor in self._names if f"{layer}.{tensor}" in trained])

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
            refuse_tangents([(name, rows), *zip(map(".".join, self._names), parameters, strict=True)])
        if self._looks_at_scale and kind != "inverse" and is_plain(rows):
            self._look_at_scale(rows)
        return call(kind, self._engine, rows, parameters)

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
        if dtype not in DTYPES:
            raise TypeError(f"the parameters cannot be {dtype}: nvpflow computes in float32 and float64")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tensors = self._tensors()
        if not self._engine.are_flat(tensors) and not are_shared(tensors):
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
        self._engine = Engine(flow)
        self._engine.precision = precision
        if not are_shared(tensors := self._tensors()):
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
