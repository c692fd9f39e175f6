"""pocoMC (preconditioned Monte Carlo): the evidence by a flow of nvpflow beside that by pocoMC's own.

Needs ``pip install pocomc``, which brings zuko. The likelihood is Rosenbrock's function, as in pocoMC's README.
``--full`` takes the README's ten dimensions.
"""

from __future__ import annotations

import argparse

import numpy as np
import nvpflow
import pocomc
import scipy.stats
import torch
import zuko
from _timing import Stopwatch
from nvpflow.torch import FlowModule, FlowTransform
from pocomc.flow import Flow


# --- the adapter
class NvpTransform(zuko.lazy.LazyTransform):
    def __init__(self, flow):
        super().__init__()
        self.latent_to_data = FlowTransform(FlowModule(flow, flat=True), cache_size=1)

    def forward(self, c=None):
        return self.latent_to_data.inv


def nvp_zuko(size, **options):
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(size), torch.ones(size), buffer=True
    )
    return zuko.flows.Flow(NvpTransform(nvpflow.build(size, **options)), base)


# --- the problem


def log_likelihood(x: np.ndarray) -> np.ndarray:
    return -(10.0 * (x[:, ::2] ** 2 - x[:, 1::2]) ** 2 + (x[:, ::2] - 1.0) ** 2).sum(axis=1)


TRUTH = np.log(np.pi / np.sqrt(10) / 400)  # log Z of two dimensions, nats; pairs of columns are independent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="ten dimensions, 4,096 samples")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size, total = (10, 4096) if options.full else (2, 512)
    clock = Stopwatch(Flow, ["fit", "forward", "inverse", "log_prob", "sample"])
    torch.set_num_threads(1)
    print(f"log Z of Rosenbrock's function in {size} dimensions is {TRUTH * size / 2:.3f}")
    for name, flow in {
        "pocoMC's nsf3": "nsf3",
        "nvpflow": nvp_zuko(size, num_flows=6, hidden_sizes=(32, 32)),
    }.items():
        sampler = pocomc.Sampler(
            prior=pocomc.Prior(size * [scipy.stats.uniform(-10.0, 20.0)]),
            likelihood=log_likelihood,
            vectorize=True,
            flow=flow,
            random_state=options.seed,
            n_effective=total // 2,
            n_active=total // 4,
        )
        sampler.run(n_total=total, n_evidence=total, progress=False)
        log_z, error = sampler.evidence()
        print(f"{name}: log Z {log_z:.3f} +- {error:.3f}, in the flow {clock.take():.1f} s")


if __name__ == "__main__":
    main()
