"""sbi (simulation-based inference): a variational posterior by nvpflow beside that by sbi's own flow.

Needs ``pip install sbi``. The posterior is a banana, whose density is known. ``--full`` takes 1,000 iterations.
"""

from __future__ import annotations

import argparse
import time
import warnings

import nvpflow
import torch
from nvpflow.torch import FlowDistribution, FlowModule
from sbi.inference.posteriors import VIPosterior
from sbi.inference.potentials.base_potential import BasePotential
from sbi.utils import BoxUniform


# --- the adapter
def nvp_distribution(size):
    return FlowDistribution(FlowModule(nvpflow.build(size, 8, (50, 50)), flat=True))


# --- the problem


class Banana(BasePotential):
    """Log N(x_0; 0, 1) + log N(x_1; x_0^2, 1/2)."""

    def __init__(self, prior) -> None:
        super().__init__(prior=prior, device="cpu")

    allow_iid_x = False

    def __call__(self, theta: torch.Tensor, track_gradients: bool = True) -> torch.Tensor:
        normal = torch.distributions.Normal(0.0, 1.0)
        with torch.set_grad_enabled(track_gradients):
            bent = torch.distributions.Normal(theta[:, 0] ** 2, 0.5).log_prob(theta[:, 1])
            return normal.log_prob(theta[:, 0]) + bent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="1,000 iterations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    iterations = 1000 if options.full else 200
    torch.set_num_threads(1)
    prior = BoxUniform(torch.tensor([-5.0, -5.0]), torch.tensor([5.0, 25.0]))
    target = Banana(prior)
    for name, q in {"sbi's maf": "maf", "nvpflow": nvp_distribution(2)}.items():
        torch.manual_seed(options.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = VIPosterior(target, prior, q=q).set_default_x(torch.zeros(1, 1))
            start = time.process_time()
            posterior.train(
                max_num_iters=iterations,
                min_num_iters=iterations,
                n_particles=256,
                quality_control=False,
                show_progress_bar=False,
            )
            took = time.process_time() - start
            theta = posterior.sample((20_000,), show_progress_bars=False)
            divergence = (posterior.log_prob(theta) - target(theta, track_gradients=False)).mean()
        print(f"{name}: KL(q || p) {divergence:.3f} nats, {1e3 * took / iterations:.0f} ms an iteration")


if __name__ == "__main__":
    main()
