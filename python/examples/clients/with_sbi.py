"""sbi (simulation-based inference): posteriors and likelihoods by nvpflow beside those by sbi's own flows.

Needs ``pip install sbi``. ``--full`` takes more simulations and iterations. The parts are:

- ``vi``: a variational posterior of a banana, whose density is known
- ``npe``: the posterior by simulations of a bent plane, with the ranks of simulation-based calibration
- ``nle``: its likelihood, which is known
- ``import``: the posterior that sbi has trained, as a flow of nvpflow
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings

import nvpflow
import torch
from nvpflow.importers import from_sbi
from nvpflow.torch import FlowDistribution, FlowModule
from sbi.diagnostics import check_sbc, run_sbc
from sbi.inference import NLE, NPE
from sbi.inference.posteriors import VIPosterior
from sbi.inference.potentials.base_potential import BasePotential
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils import BoxUniform


# --- the adapter of vi
def nvp_distribution(size):
    return FlowDistribution(FlowModule(nvpflow.build(size, 8, (50, 50)), flat=True))


# --- the adapter of npe and nle
class NvpEstimator(ConditionalDensityEstimator):
    def __init__(self, rows, context):
        flow = nvpflow.build(rows.shape[1], 6, (64,), context_size=context.shape[1], transform="spline")
        flow.initialize_from(rows.numpy(), context=context.numpy())
        super().__init__(FlowModule(flow, flat=True), rows[0].shape, context[0].shape)

    def log_prob(self, input, condition, **_):
        return self.net.log_prob(input, condition)

    def loss(self, input, condition, **_):
        return -self.net.log_prob(input, condition)

    def sample(self, shape, condition, **_):
        return self.net.rsample(torch.Size(shape).numel(), condition).movedim(-2, 0)


# --- the problems


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


NOISE = 0.3
PRIOR = BoxUniform(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]))


def likelihood(theta: torch.Tensor) -> torch.distributions.Distribution:
    """Of two numbers: the sum of the parameters, and the first one squared less the second, with noise."""
    mean = torch.stack([theta[..., 0] + theta[..., 1], 2 * theta[..., 0] ** 2 - theta[..., 1]], -1)
    return torch.distributions.Independent(torch.distributions.Normal(mean, NOISE), 1)


def simulated(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    theta = PRIOR.sample((count,))
    return theta, likelihood(theta).sample()


def variational(options: argparse.Namespace) -> None:
    iterations = 1000 if options.full else 200
    prior = BoxUniform(torch.tensor([-5.0, -5.0]), torch.tensor([5.0, 25.0]))
    target = Banana(prior)
    for name, q in {"sbi's maf": "maf", "nvpflow": nvp_distribution(2)}.items():
        torch.manual_seed(options.seed)
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
        print(f"{name}, vi: KL(q || p) {divergence:.3f} nats, {1e3 * took / iterations:.0f} ms an iteration")


def trained(trainer, theta: torch.Tensor, x: torch.Tensor, epochs: int):
    """Return the estimator, and the processor time of an epoch."""
    start = time.process_time()
    estimator = trainer.append_simulations(theta, x).train(max_num_epochs=epochs, stop_after_epochs=epochs)
    return estimator, (time.process_time() - start) / epochs


def posteriors(options: argparse.Namespace) -> None:
    count, epochs = (10_000, 60) if options.full else (2_000, 20)
    torch.manual_seed(options.seed)
    theta, x = simulated(count)
    held_out, seen = simulated(1000)
    for name, kind in {"sbi's nsf": "nsf", "nvpflow": NvpEstimator}.items():
        torch.manual_seed(options.seed)
        trainer = NPE(PRIOR, density_estimator=kind, show_progress_bars=False)
        estimator, took = trained(trainer, theta, x, epochs)
        posterior = trainer.build_posterior(estimator)
        with torch.no_grad():
            mean = estimator.log_prob(held_out[None], seen).mean()
        ranks, _ = run_sbc(held_out[:200], seen[:200], posterior, num_posterior_samples=200, show_progress_bar=False)
        uniform = check_sbc(ranks, held_out[:200], ranks * 0 + 1.0, 200)["ks_pvals"].min()
        print(f"{name}, npe: log q {mean:.3f} nats, p of uniform ranks {uniform:.3f}, {1e3 * took:.0f} ms an epoch")
        if options.part in ("import", "all") and kind == "nsf":
            take_over(estimator, held_out, seen)


def take_over(estimator, theta: torch.Tensor, x: torch.Tensor) -> None:
    """Import what sbi has trained; compare and time one row."""
    flow, embed = from_sbi(estimator)
    assert embed is None
    rows, seen = theta.numpy(), x.numpy()
    with torch.no_grad():
        off = (estimator.log_prob(theta[None], x)[0] - torch.from_numpy(flow.log_prob(rows, context=seen))).abs().max()
        times = [timed(lambda: estimator.log_prob(theta[:1][None], x[:1]))]
    times.append(timed(lambda: flow.log_prob(rows[:1], context=seen[:1])))
    print(f"imported: off by {off:.1e} nats, one row {1e6 * times[0]:.0f} us in sbi, {1e6 * times[1]:.1f} us here")


def timed(call, repeats: int = 200) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def likelihoods(options: argparse.Namespace) -> None:
    count, epochs = (10_000, 60) if options.full else (2_000, 20)
    torch.manual_seed(options.seed)
    theta, x = simulated(count)
    at, held_out = simulated(1000)
    exact = likelihood(at).log_prob(held_out).mean()
    for name, kind in {"sbi's maf": "maf", "nvpflow": lambda theta, x: NvpEstimator(x, theta)}.items():
        torch.manual_seed(options.seed)
        trainer = NLE(PRIOR, density_estimator=kind, show_progress_bars=False)
        estimator, took = trained(trainer, theta, x, epochs)
        with torch.no_grad():
            behind = exact - estimator.log_prob(held_out[None], at).mean()
        posterior = trainer.build_posterior(estimator, mcmc_method="slice_np_vectorized")
        some = posterior.sample((500,), x=held_out[:1], show_progress_bars=False)
        off = (some.mean(0) - exact_mean(held_out[0])).abs().max()
        print(f"{name}, nle: {behind:.3f} nats behind, mean off by {off:.3f}, {1e3 * took:.0f} ms an epoch")


def exact_mean(x: torch.Tensor) -> torch.Tensor:
    """Of the parameters that have made x, from a grid."""
    line = torch.linspace(-1, 1, 401)
    grid = torch.cartesian_prod(line, line)
    weights = likelihood(grid).log_prob(x).softmax(0)
    return (weights[:, None] * grid).sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="10,000 simulations, 60 epochs, 1,000 iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=("vi", "npe", "nle", "import", "all"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        os.chdir(folder)  # sbi writes logs of its training where it runs
        warnings.simplefilter("ignore")
        if options.part in ("vi", "all"):
            variational(options)
        if options.part in ("npe", "import", "all"):
            posteriors(options)
        if options.part in ("nle", "all"):
            likelihoods(options)
        os.chdir(os.path.dirname(folder))


if __name__ == "__main__":
    main()
