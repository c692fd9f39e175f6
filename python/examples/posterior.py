"""Learn the posterior of a simulator's parameters for every observation at once, and check it by calibration.

A source decays: its counts in eight intervals are Poisson with rates exp(a - exp(b) t). A flow of the two parameters
(a, b) under the counts is trained on draws from the prior. Whether it is the posterior is then tested on fresh draws:
ranks of the true parameters among draws of the flow must be uniform (simulation-based calibration, Talts et al., 2018).
"""

import argparse

import numpy as np
import nvpflow

TIMES = np.linspace(0.5, 8.0, 8)
NAMES = ["log initial rate", "log decay"]


def prior(rows, rng):
    """Return parameters [rows, 2]."""
    return rng.normal([3.0, -1.0], [0.7, 0.5], size=(rows, 2))


def simulate(parameters, rng):
    """Return what is observed [rows, 8]: roots of counts, whose noise is alike for all rates."""
    rates = np.exp(parameters[:, :1] - np.exp(parameters[:, 1:]) * TIMES)
    return np.sqrt(rng.poisson(rates))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=20_000, help="simulations to train on (default %(default)s)")
    options.add_argument("--epochs", type=int, default=20, help="passes over them (default %(default)s)")
    options.add_argument("--checks", type=int, default=2_000, help="simulations to check with (default %(default)s)")
    options.add_argument("--picture", help="file for the rank histograms, say ranks.png; needs Matplotlib")
    options.add_argument("--save", help="file for the flow")
    arguments = options.parse_args()

    rng = np.random.default_rng(0)
    parameters = prior(arguments.rows, rng)
    flow = nvpflow.build(2, 6, (64, 64), context_size=8)
    history = flow.fit(parameters, context=simulate(parameters, rng), epochs=arguments.epochs, batch_size=256)
    print(f"Trained    {history.epoch[-1]} epochs in {history.seconds.sum():.0f} s, {-history.best_loss:.3f} nats")

    truth = np.array([[3.2, -1.3]])
    posterior = flow.condition(simulate(truth, rng)[0])  # one observation: its cost is paid here
    draws = posterior.sample(10_000, seed=1)
    for name, true, column in zip(NAMES, truth[0], draws.T, strict=True):
        print(f"Posterior  {name:16} {column.mean():6.3f} +- {column.std():.3f}, true {true:g}")

    truth = prior(arguments.checks, rng)
    draws = flow.sample(99, seed=2, context=simulate(truth, rng))  # 99 under each observation
    ranks = (draws < truth[:, None]).sum(axis=1)  # uniform on 0 .. 99
    for name, column in zip(NAMES, ranks.T, strict=True):
        bars = np.bincount(column // 5, minlength=20)
        chi2 = ((bars - arguments.checks / 20) ** 2 / (arguments.checks / 20)).sum()
        print(f"Ranks      {name:16} chi2 {chi2:.1f} on 19 degrees of freedom (below 36.2 in 99 % of cases)")
    if arguments.picture:
        from nvpflow import plot

        with plot.style():
            plot.rank_histogram(truth, draws, names=NAMES).figure.savefig(arguments.picture, dpi=150)
        print(f"Picture    {arguments.picture}")
    if arguments.save:
        flow.save(arguments.save)
        print(f"Flow       {arguments.save}")
