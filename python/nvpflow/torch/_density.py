"""A target written in PyTorch, for `nvpflow.Flow.fit_density`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvpflow import _checks

Array = NDArray[Any]


def density(
    function: Callable[..., torch.Tensor], device: torch.device | str | None = None
) -> Callable[..., tuple[Array, Array]]:
    """Return what `nvpflow.Flow.fit_density` takes, of a log-density in PyTorch.

    Parameters
    ----------
    function
        Of a tensor x [B, D], and of its contexts [B, C] where the flow has one. It returns log p [B], each of which
        depends on its own row alone. Autograd forms the gradient.
    device
        Where the tensors are. None: the CPU.

    Returns
    -------
    callable
        Of arrays of NumPy, which returns (log p [B], its gradient by x [B, D]).

    Examples
    --------
    >>> import nvpflow, nvpflow.torch, torch
    >>> target = nvpflow.torch.density(torch.distributions.MultivariateNormal(torch.ones(3), torch.eye(3)).log_prob)
    >>> flow = nvpflow.build(3, 4, (32,), standardize=False)
    >>> history = flow.fit_density(target, steps=20, progress=False)
    """
    if not callable(function):
        raise TypeError(f"function is {_checks.describe(function)}, expected a function of a tensor x [B, D]")

    def log_density(x: Array, *context: Array) -> tuple[Array, Array]:
        rows = torch.from_numpy(x).to(device).requires_grad_()
        with torch.enable_grad():
            log_p = function(rows, *(torch.from_numpy(c).to(device) for c in context))
            if not isinstance(log_p, torch.Tensor) or log_p.shape != rows.shape[:1]:
                what = f"a tensor {list(log_p.shape)}" if isinstance(log_p, torch.Tensor) else _checks.describe(log_p)
                raise ValueError(f"the function of nvpflow.torch.density returned {what}, expected a tensor [{len(x)}]")
            total = log_p.sum()
            gradient = torch.autograd.grad(total, rows, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise ValueError(
                "the function of nvpflow.torch.density returned a tensor without a gradient by x, expected one that is "
                "computed from x; leave out detach() and no_grad()"
            )
        return log_p.detach().to("cpu", torch.float64).numpy(), np.asarray(gradient.to("cpu"))

    return log_density
