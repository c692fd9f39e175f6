"""Pyro (variational inference): the ELBO of a guide by nvpflow beside that by Pyro's own couplings.

Needs ``pip install pyro-ppl``. The model is the centred one of eight schools, a funnel that no Gaussian guide fits.
``--full`` takes 2,000 steps.
"""

from __future__ import annotations

import argparse
import time

import nvpflow
import pyro
import pyro.distributions as dist
import torch
from nvpflow.torch import FlowModule, FlowTransform
from pyro.distributions.transforms import affine_coupling, iterated, permute
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow


# --- the adapter
def nvp_transform(size):
    return FlowTransform(FlowModule(nvpflow.build(size, 6, (32, 32), standardize=False), flat=True), cache_size=1)


# --- the problem

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools() -> None:
    mean = pyro.sample("mean", dist.Normal(0, 10))
    spread = pyro.sample("spread", dist.HalfCauchy(5))
    with pyro.plate("school", 8):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("observed", dist.Normal(effect, ERRORS), obs=EFFECTS)


def own_transform(size: int):
    def block(size: int):
        return dist.transforms.ComposeTransformModule([affine_coupling(size, hidden_dims=[32, 32]), permute(size)])

    return iterated(6, block, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="2,000 steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = 2000 if options.full else 300
    torch.set_num_threads(1)
    for name, transform in {"Pyro's affine couplings": own_transform, "nvpflow": nvp_transform}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(options.seed)
        guide = AutoNormalizingFlow(schools, transform)
        loss = Trace_ELBO(num_particles=16, vectorize_particles=True)
        inference = SVI(schools, guide, pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / steps)}), loss)
        start = time.process_time()
        for _ in range(steps):
            inference.step()
        took = time.process_time() - start
        with torch.no_grad():
            elbo = -sum(loss.loss(schools, guide) for _ in range(50)) / 50
        print(f"{name}: ELBO {elbo:.2f} after {steps} steps, {1e3 * took / steps:.1f} ms a step")


if __name__ == "__main__":
    main()
