"""Densities of bases in PyTorch's own operations, which TorchScript compiles, too."""

from __future__ import annotations

import math

import torch


def log_student(z: torch.Tensor, log_df: torch.Tensor) -> torch.Tensor:
    """Return log p of each latent [..., D] under degrees of freedom exp(log_df) [D], where no square overflows."""
    df = log_df.double().exp().clamp(1e-18, 1e18)
    # Of many the difference of two logarithms of Gamma would lose its digits: it is their series.
    few, many = df.clamp(max=1e3), df.clamp(min=1e3)
    gammas = torch.lgamma((few + 1) / 2) - torch.lgamma(few / 2) - 0.5 * torch.log(few / 2)
    series = (1 / (24 * many**3)) - 1 / (4 * many)
    norm = (torch.where(df > 1e3, series, gammas) - 0.5 * math.log(2 * math.pi)).to(z.dtype)
    own = df.to(z.dtype)
    t = z.abs() / own.sqrt()
    far = t > 1
    one = torch.ones_like(t)
    m = torch.where(far, 1 / torch.where(far, t, one), t)
    return norm - (own + 1) / 2 * (torch.log1p(m * m) + 2 * torch.log(torch.where(far, t, one)))
