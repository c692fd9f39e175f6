"""A flow in ``torch.distributions``: a transform, and a distribution of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import constraints

from nvpflow import _hints
from nvpflow.torch.module import FlowModule


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

    @_hints.explained
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

    @_hints.explained
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

    @_hints.explained
    def __init__(self, module: FlowModule, *, validate_args: bool | None = None) -> None:
        self.module = module
        super().__init__(torch.Size(), torch.Size([module._engine.spec.input_size]), validate_args=validate_args)

    @_hints.explained
    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the distribution of independent rows of a batch."""
        new: Any = self._get_checked_instance(FlowDistribution, _instance)  # type: ignore[no-untyped-call]
        new.module = self.module
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new  # type: ignore[no-any-return]

    @_hints.explained
    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:  # noqa: B008  (as in PyTorch)
        """Return rows [*sample_shape, *batch_shape, D], differentiable by the parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.module.rsample(shape[:-1].numel()).reshape(shape)

    @_hints.explained
    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Return log p(value) [..., *batch_shape], nats."""
        if self._validate_args and value.numel() > 0:  # PyTorch's check of vectors fails on none
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        return self.module.log_prob(value).expand(shape)
