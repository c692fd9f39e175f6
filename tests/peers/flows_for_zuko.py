"""Flows of nvpflow with the interface of zuko's, for zuko's own tests (see run.py)."""

from __future__ import annotations

from typing import Any

import nvpflow
import torch
import zuko
from nvpflow.torch import FlowModule, FlowTransform


def note() -> None:
    """Count a flow that was conditioned; the plugin puts its own function here."""


class Transform(zuko.lazy.LazyTransform):
    """A FlowModule as zuko's transform from data to latents."""

    def __init__(self, flow: nvpflow.Flow) -> None:
        super().__init__()
        self.module = FlowModule(flow)

    def forward(self, c: Any = None) -> Any:
        note()
        return FlowTransform(self.module, cache_size=1, context=c).inv


class Coupled(zuko.flows.Flow):
    """A standard normal distribution behind a flow of couplings."""

    def __init__(self, features: int, context: int = 0, transform: str = "affine") -> None:
        base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
        )
        sizes = {"context_size": context, "standardize": False}
        super().__init__(Transform(nvpflow.build(features, 3, (32, 32), transform=transform, **sizes)), base)


class NICE(Coupled):
    """In place of zuko.flows.NICE, which couples by affine maps, too."""


class NSF(Coupled):
    """In place of zuko.flows.NSF; couplings of splines where that one is autoregressive."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__(features, context, "spline")
