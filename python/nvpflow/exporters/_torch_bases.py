"""The bases of exported modules: log p of latents, and latents, in operations that TorchScript compiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nvpflow._bases import Mixture, Normal, StudentT, Uniform
from nvpflow.flow import Flow
from nvpflow.torch._bases import log_student

Generator = Optional[torch.Generator]  # noqa: UP045  (TorchScript reads it)


def base_of(flow: Flow) -> nn.Module:
    """Return the base with copies of its parameters."""
    base, size = flow.spec.base, flow.spec.input_size
    dtype = getattr(torch, flow.spec.dtype)
    own = {name: np.array(value) for name, value in flow.parameters().items() if name.startswith("base.")}
    if isinstance(base, Normal):
        return NormalBase(size, dtype)
    if isinstance(base, Uniform):
        return UniformBase(base, size, dtype)
    if isinstance(base, StudentT):
        return StudentBase(base, own, dtype)
    assert isinstance(base, Mixture)
    return MixtureBase(size, own, dtype)


class NormalBase(nn.Module):
    """N(0, I)."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("log_peak", torch.tensor(-0.5 * size * math.log(2 * math.pi), dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Return log p [...] of latents [..., D]."""
        return self.log_peak - 0.5 * (z * z).sum(-1)

    @torch.jit.export
    def sample(self, shape: list[int], generator: Generator) -> Tensor:
        """Return latents [..., D]."""
        return torch.randn(shape, generator=generator, dtype=self.log_peak.dtype, device=self.log_peak.device)


class UniformBase(nn.Module):
    """Uniform from `low` to `high`, edges included."""

    def __init__(self, base: Uniform, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.low: float = base.low
        self.high: float = base.high
        self.register_buffer("log_peak", torch.tensor(-size * math.log(base.high - base.low), dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Return log p [...] of latents [..., D]."""
        inside = ((z >= self.low) & (z <= self.high)).all(-1)
        return self.log_peak.expand(inside.shape).masked_fill(~inside, -math.inf)

    @torch.jit.export
    def sample(self, shape: list[int], generator: Generator) -> Tensor:
        """Return latents [..., D]."""
        share = torch.rand(shape, generator=generator, dtype=self.log_peak.dtype, device=self.log_peak.device)
        return (self.low + (self.high - self.low) * share).clamp(self.low, self.high)


class StudentBase(nn.Module):
    """Student's t distribution of each feature, with its own degrees of freedom."""

    def __init__(self, base: StudentT, own: Mapping[str, NDArray[Any]], dtype: torch.dtype) -> None:
        super().__init__()
        log_df = torch.from_numpy(own["base.log_df"])
        if base.trainable:
            self.log_df = nn.Parameter(log_df)
        else:
            self.register_buffer("log_df", log_df)
        self.register_buffer("log_peak", torch.zeros((), dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Return log p [...] of latents [..., D]."""
        return self.log_peak + log_student(z, self.log_df).sum(-1)

    @torch.jit.export
    def sample(self, shape: list[int], generator: Generator) -> Tensor:
        """Return latents [..., D], by Bailey's formula (1994), in which nothing is rejected."""
        like, df = self.log_peak, self.log_df.exp()
        angle = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) * (2 * math.pi)
        x = torch.empty(shape, dtype=like.dtype, device=like.device).exponential_(1.0, generator=generator)
        x = 2 * x / df
        return torch.sqrt(df * -torch.expm1(-x)) * torch.exp(x / 2) * torch.cos(angle)


class MixtureBase(nn.Module):
    """A mixture of normal distributions with the covariances ``F F^T``, ``F = L diag(exp(log_scales))``."""

    def __init__(self, size: int, own: Mapping[str, NDArray[Any]], dtype: torch.dtype) -> None:
        super().__init__()
        self.size: int = size
        self.logits, self.means, self.log_scales = (
            nn.Parameter(torch.from_numpy(own[f"base.{name}"])) for name in ("logits", "means", "log_scales")
        )
        lower = own.get("base.lower", np.empty((0, 0)))  # no parameter is empty: torch.export cannot save it
        self.register_parameter("lower", nn.Parameter(torch.from_numpy(lower)) if lower.size else None)
        rows, columns = np.tril_indices(size, -1)
        places = torch.from_numpy(rows * size + columns).expand(lower.shape) if lower.size else None
        self.register_buffer("places", None if places is None else places.contiguous())
        self.register_buffer("log_peak", torch.tensor(-0.5 * size * math.log(2 * math.pi), dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Return log p [...] of latents [..., D]."""
        away = z.unsqueeze(-2) - self.means  # [..., M, D]
        if self.lower is not None:
            away = torch.linalg.solve_triangular(self._unit(), away.unsqueeze(-1), upper=False, unitriangular=True)
            away = away.squeeze(-1)
        away = away * torch.exp(-self.log_scales)
        peaks = self.logits.log_softmax(0) - self.log_scales.sum(-1)
        return self.log_peak + (peaks - 0.5 * (away * away).sum(-1)).logsumexp(-1)

    def _unit(self) -> Tensor:
        """Return L of each component [M, D, D]."""
        assert self.lower is not None
        assert self.places is not None
        zeros = torch.zeros_like(self.log_scales).repeat(1, self.size)
        ones = torch.diag_embed(torch.ones_like(self.log_scales))
        return ones + zeros.scatter(1, self.places, self.lower).reshape(ones.shape)

    @torch.jit.export
    def sample(self, shape: list[int], generator: Generator) -> Tensor:
        """Return latents [..., D]."""
        like = self.log_peak
        share = torch.rand(shape[:-1], generator=generator, dtype=like.dtype, device=like.device).unsqueeze(-1)
        chosen = (share >= self.logits.softmax(0).cumsum(0)).sum(-1).clamp(max=len(self.logits) - 1)
        z = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        z = z * torch.exp(self.log_scales)[chosen]
        if self.lower is not None:
            z = (self._unit()[chosen] @ z.unsqueeze(-1)).squeeze(-1)
        return self.means[chosen] + z
