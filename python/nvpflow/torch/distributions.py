"""A flow in ``torch.distributions``: a transform, and a distribution of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributions import constraints
from torch.distributions.kl import register_kl

from nvpflow import _checks, _hints
from nvpflow._bases import checked_temperature
from nvpflow.flow import Flow
from nvpflow.torch.module import FlowModule


class FlowTransform(torch.distributions.Transform, torch.nn.Module):
    """A flow as a ``torch.distributions`` transform from latents z to data x, so that a base of one's own can be used.

    The base of the flow's spec plays no part in it. It is an ``nn.Module``, too, whose parameters are the flow's. So
    code that looks for parameters in a module or a list of transforms finds them.

    Parameters
    ----------
    module
        The flow; the transform's gradients reach its parameters.
    cache_size
        As of every transform: 1 keeps the last pair (x, z) and its log-determinant, in either direction. So a log_prob
        of a ``TransformedDistribution`` passes through the flow once, and not at all for the rows that it has just
        drawn. What was computed without gradients, such as rows of ``sample``, is computed anew where they are
        wanted.
    context
        Of a flow with a context, [..., C]; its leading axes broadcast with those of the rows, and gradients reach it.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    _cached_x_y: tuple[torch.Tensor | None, torch.Tensor | None]  # of Transform

    @_hints.explained
    def __init__(self, module: FlowModule, cache_size: int = 0, context: torch.Tensor | None = None) -> None:
        super().__init__(cache_size=cache_size)
        _check(module)
        self.module = module
        self.context = context
        self._context_axes = _axes(module, context)
        module._has_own_base = True
        # The last data and log|det dx/dz|, which log_abs_det_jacobian is asked for next.
        self._cached_log_det: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

    def __eq__(self, other: object) -> bool:
        """Two transforms are equal where they are of one module, under the same context."""
        if not isinstance(other, FlowTransform) or other.module is not self.module:
            return False
        return _are_equal(self.context, other.context)

    def __hash__(self) -> int:
        """Return the hash of the module: contexts are tensors, whose values may change."""
        return hash(self.module)

    @_hints.explained
    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Return the transform with another size of the cache."""
        return self if self._cache_size == cache_size else FlowTransform(self.module, cache_size, self.context)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Return the shape of the data to latents of a shape: with the axes of the context."""
        return torch.Size((*torch.broadcast_shapes(shape[:-1], self._context_axes), *shape[-1:]))  # type: ignore[no-untyped-call]

    inverse_shape = forward_shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the data to latents x [..., D], as transforms call them."""
        self._forget_what_has_no_graph()
        return super().__call__(x)  # type: ignore[no-untyped-call, no-any-return]

    def _inv_call(self, y: torch.Tensor) -> torch.Tensor:
        self._forget_what_has_no_graph()
        return super()._inv_call(y)  # type: ignore[no-untyped-call, no-any-return]

    def _forget_what_has_no_graph(self) -> None:
        """Empty the cache of a pair made under no_grad, where a gradient through it would silently be lost."""
        if self._cache_size == 0 or not torch.is_grad_enabled():
            return
        pair = [tensor for tensor in self._cached_x_y if tensor is not None]
        if not pair or any(tensor.requires_grad for tensor in pair):
            return
        given = [] if self.context is None else [self.context]
        if any(tensor.requires_grad for tensor in (*self.module._tensors(), *given)):
            self._cached_x_y = None, None
            self._cached_log_det = None, None

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        data, log_det = self.module.inverse(x, self.context, with_log_det=True)
        if self._cache_size > 0:
            self._cached_log_det = data, log_det
        return data  # type: ignore[no-any-return]

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        z, log_det = self.module.forward(y, self.context)
        if self._cache_size > 0:
            self._cached_log_det = y, -log_det
        return z

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return log|det dy/dx| [...], nats; x is the latent here, y the data, as transforms call them."""
        self._forget_what_has_no_graph()
        rows, log_det = self._cached_log_det
        return log_det if rows is y and log_det is not None else -self.module.forward(y, self.context)[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the cache holds."""
        return {**super().__getstate__(), "_cached_log_det": (None, None)}  # type: ignore[no-untyped-call]


class FlowDistribution(torch.distributions.Distribution):
    """A flow as a ``torch.distributions`` distribution of rows.

    Its support is that of the rows' type, all of R^D: rows that a bounded base leaves out have ``log_prob`` -inf, and
    gradients of zero.

    Parameters
    ----------
    module
        The flow; gradients of `log_prob` and `rsample` reach its parameters.
    context
        Of a flow with a context, which needs it: [C], or [*batch_shape, C] for a batch of densities p(x | c). Gradients
        reach it.
    temperature
        T of the base N(0, T I) that takes the place of N(0, I), in rows and densities. Only a normal base has one.
        None: 1.
    validate_args
        As of every distribution: check values. None: PyTorch's default.

    Raises
    ------
    TypeError, ValueError
        The context is missing, superfluous, or of another size, dtype or device than the module's. The temperature is
        not from 1e-12 to 1e12, or not 1 where the base has none.
    """

    support = constraints.real_vector
    has_rsample = True

    @_hints.explained
    def __init__(
        self,
        module: FlowModule,
        context: torch.Tensor | None = None,
        *,
        temperature: float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check(module)
        self.module = module
        self.context = context
        self.temperature = checked_temperature(temperature, module._base)
        size = module._engine.spec.input_size
        super().__init__(_axes(module, context), torch.Size([size]), validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """What the context must be, where there is one."""
        if self.context is None or self.context.numel() == 0:  # PyTorch's check of vectors fails on none
            return {}
        return {"context": constraints.real_vector}

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the module's parameters, for what trains a distribution by its parameters."""
        return iter(self.module.parameters())

    def modules(self) -> Iterator[torch.nn.Module]:
        """Return the module and those in it."""
        return iter(self.module.modules())

    @_hints.explained
    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the distribution of independent rows of a batch."""
        new: Any = self._get_checked_instance(FlowDistribution, _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        new.module, new.temperature = self.module, self.temperature
        new.context = None if self.context is None else self.context.expand(*shape, self.context.shape[-1])
        super(FlowDistribution, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new  # type: ignore[no-any-return]

    @_hints.explained
    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:  # noqa: B008  (as in PyTorch)
        """Return rows [*sample_shape, *batch_shape, D], differentiable by the parameters and the context."""
        return self.module.inverse(self._latents(sample_shape), self.context)  # type: ignore[no-any-return]

    @_hints.explained
    def rsample_and_log_prob(
        self,
        sample_shape: Any = torch.Size(),  # noqa: B008  (as in PyTorch)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of `rsample` and their log p [*sample_shape, *batch_shape], nats, from one pass."""
        return self.module._with_log_prob(self._latents(sample_shape), self.context, self.temperature)

    @_hints.explained
    def sample_and_log_prob(
        self,
        sample_shape: Any = torch.Size(),  # noqa: B008  (as in PyTorch)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of ``sample`` and their log p, as `rsample_and_log_prob`, without a gradient."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)

    def _latents(self, sample_shape: Any) -> torch.Tensor:
        return self.module._noise(self._extended_shape(torch.Size(sample_shape))[:-1], None, self.temperature)

    @_hints.explained
    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Return log p(value) [..., *batch_shape], nats; with a context log p(value | context)."""
        if self._validate_args and value.numel() > 0:  # PyTorch's check of vectors fails on none
            self._validate_sample(value)
        # It says what is wrong with shapes.
        log_p = self.module.log_prob(value, self.context, temperature=self.temperature)
        return log_p.expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))  # type: ignore[no-untyped-call]


# Between flows, and between a flow and anything else, there is no formula for the divergence of Kullback and Leibler.


@register_kl(FlowDistribution, FlowDistribution)  # type: ignore[untyped-decorator, unused-ignore]
def _kl_of_flows(p: FlowDistribution, q: FlowDistribution) -> torch.Tensor:
    if p.module is not q.module or p.temperature != q.temperature or not _are_equal(p.context, q.context):
        _no_kl(p, q)
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)  # type: ignore[no-untyped-call]
    return p.module._tensors()[0].new_zeros(shape)


@register_kl(FlowDistribution, torch.distributions.Distribution)  # type: ignore[untyped-decorator, unused-ignore]
@register_kl(torch.distributions.Distribution, FlowDistribution)  # type: ignore[untyped-decorator, unused-ignore]
def _no_kl(p: torch.distributions.Distribution, q: torch.distributions.Distribution) -> torch.Tensor:
    raise NotImplementedError(
        f"KL(p || q) of p {type(p).__name__} and q {type(q).__name__} has no formula; estimate it from rows of p, "
        "x, log_p = p.rsample_and_log_prob((n,)) or x = p.rsample((n,)), as (log_p - q.log_prob(x)).mean(0)"
    )


def _are_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _check(module: FlowModule) -> None:
    if not isinstance(module, FlowModule):
        do = "; wrap the flow: FlowModule(flow)" if isinstance(module, Flow) else ""
        raise TypeError(f"module is {_checks.describe(module)}, expected an nvpflow.torch.FlowModule{do}")


def _axes(module: FlowModule, context: torch.Tensor | None) -> torch.Size:
    """Return the leading axes of a context that is good for the module; throws."""
    given = module._checked_context(context, module._tensors()[0])
    return torch.Size() if given is None else given.shape[:-1]
