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

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('nvpflow.torch needs PyTorch 2.4 or newer: pip install "torch>=2.4"') from error

from nvpflow.torch._density import density
from nvpflow.torch.distributions import FlowDistribution, FlowTransform
from nvpflow.torch.module import FlowModule, _Parameters

__all__ = ["FlowDistribution", "FlowModule", "FlowTransform", "density"]

for _class in (FlowDistribution, FlowModule, FlowTransform, _Parameters, density):
    _class.__module__ = __name__  # the name in pickles and messages
