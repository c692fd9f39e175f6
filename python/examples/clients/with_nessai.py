"""nessai (nested sampling): the evidence by a flow of nvpflow beside that by nessai's own.

Needs ``pip install nessai``. The likelihood is Rosenbrock's function on a square, as in nessai's examples; the evidence
is known there. ``--full`` takes five dimensions and nessai's own sizes.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings

import numpy as np
import nvpflow
import torch
from _timing import Stopwatch
from glasflow.nflows.distributions import StandardNormal
from glasflow.nflows.transforms import Transform
from nessai.flowmodel import FlowModel
from nessai.flows.base import NFlow
from nessai.flowsampler import FlowSampler
from nessai.model import Model
from nvpflow.torch import FlowModule


# --- the adapter
class NvpTransform(Transform):
    def __init__(self, flow):
        super().__init__()
        self.inner = FlowModule(flow, flat=True)
        self.forward, self.reset_parameters = self.inner.forward, self.inner.reset_parameters

    def inverse(self, z, context=None):
        return self.inner.inverse(z, context, with_log_det=True)


def nvp_flow(inputs, neurons, blocks, layers, **options):
    flow = nvpflow.build(inputs, blocks, (neurons,) * layers, seed=int(torch.randint(2**31, ())), **options)
    return NFlow(NvpTransform(flow), StandardNormal([inputs]))


# --- the problem


class Rosenbrock(Model):
    """Sum over neighbours of ``-(100 (x_(i+1) - x_i^2)^2 + (1 - x_i)^2)`` on [-5, 5]^d."""

    def __init__(self, dimensions: int) -> None:
        self.names = [f"x_{i}" for i in range(dimensions)]
        self.bounds = {name: [-5, 5] for name in self.names}

    def log_prior(self, x):
        return np.log(self.in_bounds(x), dtype=float) - len(self.names) * np.log(10)

    def log_likelihood(self, x):
        x = self.unstructured_view(x)
        return -(100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(axis=-1)


TRUTH = {2: -5.804, 5: -19.73}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="five dimensions, 1,000 live points")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dimensions, live = (5, 1000) if options.full else (2, 300)
    clock = Stopwatch(FlowModel, ["train", "forward_and_log_prob", "inverse", "log_prob", "sample_and_log_prob"])
    torch.set_num_threads(1)
    print(f"log Z of Rosenbrock's function in {dimensions} dimensions is {TRUTH[dimensions]}")
    for name, config in {"nessai's RealNVP": {}, "nvpflow": {"flow": nvp_flow}}.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = FlowSampler(
                Rosenbrock(dimensions),
                output=folder,
                nlive=live,
                seed=options.seed,
                resume=False,
                flow_config=config or None,
            )
            sampler.run(plot=False, save=False)
        state = sampler.ns.state
        log_z, error = state.log_evidence, state.log_evidence_error
        print(f"{name}: log Z {log_z:.3f} +- {error:.3f}, in the flow {clock.take():.1f} s")


if __name__ == "__main__":
    main()
