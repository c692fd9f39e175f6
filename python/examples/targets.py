"""Train a flow on a posterior in place of rows, and compare evidence and means with the exact ones.

The posterior is that of eight schools (Rubin, 1981) in its centred form, whose funnel is hard for samplers: the effects
of the schools, theta [8], have a common mean mu and a scale tau, and the smaller tau is, the closer they must be. Given
mu and tau the effects can be integrated exactly, so that the evidence and all means are sums over a grid of two
numbers, and every line below can be checked. Where numpyro is installed, its NUTS samples the same posterior, in this
form and in the one that has no funnel.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
import nvpflow

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
LOG_TWO_PI = np.log(2 * np.pi)
INK, FLOW_COLOUR, MUTED = "#30435f", "#e8743b", "#9aa5b1"


def normal(x: np.ndarray, mean: np.ndarray | float, std: np.ndarray | float) -> np.ndarray:
    """Return log N(x; mean, std^2)."""
    return -0.5 * (((x - mean) / std) ** 2 + LOG_TWO_PI) - np.log(std)


def log_posterior(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log p(mu, log tau, theta, data) [B] and its gradient for x [B, 10].

    mu ~ N(0, 5^2), log tau ~ N(1, 1), theta_j ~ N(mu, tau^2), effect_j ~ N(theta_j, error_j^2).
    """
    x = x.astype(np.float64)
    mu, log_tau, theta = x[:, :1], x[:, 1:2], x[:, 2:]
    tau = np.exp(log_tau)
    z = (theta - mu) / tau
    log_p = normal(mu, 0.0, 5.0)[:, 0] + normal(log_tau, 1.0, 1.0)[:, 0]
    log_p += (normal(theta, mu, tau) + normal(EFFECT, theta, ERROR)).sum(axis=1)
    by_theta = -z / tau + (EFFECT - theta) / ERROR**2
    by_mu = -mu / 25 + (z / tau).sum(axis=1, keepdims=True)
    by_log_tau = -(log_tau - 1) + (z**2 - 1).sum(axis=1, keepdims=True)
    return log_p, np.hstack([by_mu, by_log_tau, by_theta])


def exact() -> tuple[float, np.ndarray]:
    """Return log Z, and the posterior means of mu, log tau and theta_1, by sums over a grid of mu and log tau."""
    mu, log_tau = np.meshgrid(np.linspace(-30, 40, 1401), np.linspace(-7, 7, 1401), indexing="ij")
    variance = np.exp(2 * log_tau)
    log_p = normal(mu, 0.0, 5.0) + normal(log_tau, 1.0, 1.0)
    for effect, error in zip(EFFECT, ERROR, strict=True):
        log_p += normal(effect, mu, np.sqrt(variance + error**2))
    share = np.exp(log_p - log_p.max())
    cell = (mu[1, 0] - mu[0, 0]) * (log_tau[0, 1] - log_tau[0, 0])
    log_z = float(np.log(share.sum() * cell) + log_p.max())
    share /= share.sum()
    first = (EFFECT[0] * variance + mu * ERROR[0] ** 2) / (variance + ERROR[0] ** 2)
    return log_z, np.array([(share * value).sum() for value in (mu, log_tau, first)])


def train(steps: int, seed: int) -> tuple[nvpflow.Flow, nvpflow.DensityHistory]:
    """Fit a neural spline flow, which begins at draws of the prior."""
    random = np.random.default_rng(seed)
    mu, log_tau = random.normal(scale=5, size=(1000, 1)), 1 + random.normal(size=(1000, 1))
    prior = np.hstack([mu, log_tau, mu + np.exp(log_tau) * random.normal(size=(1000, 8))])
    flow = nvpflow.build(10, num_flows=6, hidden_sizes=(64,), transform="spline", tail_bound=5, mixing="lu", seed=seed)
    flow.initialize_from(prior)
    options = {"batch_size": 512, "learning_rate": 3e-3, "estimator": "path", "seed": seed}
    return flow, flow.fit_density(log_posterior, steps, **options, progress=False)


def effective_rows(values: np.ndarray) -> float:
    """Return how many independent rows the mean of a chain [N] is worth (Geyer's initial positive sequence, 1992)."""
    n = len(values)
    spectrum = np.fft.rfft(values - values.mean(), 2 * n)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2)[:n]
    pairs = (covariance / covariance[0])[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0)
    return n / max(2 * pairs[: negative[0] if len(negative) else None].sum() - 1, 1.0)


def metropolis(proposed: nvpflow.Importance, seed: int) -> tuple[np.ndarray, float]:
    """Return the rows of an independence chain through rows of a flow, and the share that it accepts."""
    at, visited = 0, []
    for i, level in enumerate(np.log(np.random.default_rng(seed).random(len(proposed.x)))):
        if level < proposed.log_weights[i] - proposed.log_weights[at]:
            at = i
        visited.append(at)
    return proposed.x[visited].astype(np.float64), float(np.mean(np.diff(visited) != 0))


def show(name: str, log_z: str, mean: np.ndarray, error: np.ndarray | None, rest: str) -> None:
    """Print a line of the table."""
    errors = [""] * 3 if error is None else [f"+- {value:.3f}" for value in error]
    means = "  ".join(f"{m:>6.3f} {e:<8}" for m, e in zip(mean, errors, strict=True))
    print(f"  {name:<26}{log_z:<22}{means}  {rest}")


def show_chain(name: str, rows: np.ndarray, rest: str) -> None:
    """Print a line of the table for a chain's rows [N, 10]."""
    columns = rows[:, :3].T
    effective = np.array([effective_rows(column) for column in columns])
    error = columns.std(axis=1) / np.sqrt(effective)
    show(name, "", columns.mean(axis=1), error, f"{effective.min():,.0f} of {len(rows):,} rows effective, {rest}")


def run_nuts(rows: int, seed: int, *, centred: bool) -> None:
    """Sample the same posterior with numpyro's NUTS, one chain, and print its line.

    centred: the effects themselves are sampled; else their offsets from mu in units of tau, which have no funnel.
    """
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    def effects(x: jax.Array) -> jax.Array:
        return x[2:] if centred else x[0] + jnp.exp(x[1]) * x[2:]

    def potential(x: jax.Array) -> jax.Array:
        spread = dist.Normal(x[0], jnp.exp(x[1])) if centred else dist.Normal(0, 1)
        log_p = dist.Normal(0, 5).log_prob(x[0]) + dist.Normal(1, 1).log_prob(x[1]) + spread.log_prob(x[2:]).sum()
        return -(log_p + dist.Normal(effects(x), ERROR).log_prob(EFFECT).sum())

    start = time.process_time()
    chain = MCMC(NUTS(potential_fn=potential), num_warmup=1000, num_samples=rows, progress_bar=False)
    chain.run(jax.random.key(seed), init_params=jnp.zeros(10), extra_fields=("diverging",))
    found = chain.get_samples()
    found = np.asarray(jnp.hstack([found[:, :2], jax.vmap(effects)(found)]), dtype=np.float64)
    diverging = int(chain.get_extra_fields()["diverging"].sum())
    name = f"NUTS, {'' if centred else 'not '}centred"
    show_chain(name, found, f"{diverging:,} diverging, {time.process_time() - start:.1f} s")


def draw(path: Path, flow: nvpflow.Flow, found: nvpflow.Importance, history: nvpflow.DensityHistory) -> None:
    """Draw the funnel with rows of the flow, and how the training went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # which Matplotlib needs, too

    figure = Figure(figsize=(9.0, 3.1), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    rows = flow.sample(1500, seed=11)
    for ax, title, shown in (
        (left, "Rows of the flow", rows),
        (middle, "The same, resampled by weight", found.resample(1500, seed=1)),
    ):
        ax.plot(shown[:, 2] - shown[:, 0], shown[:, 1], ".", color=FLOW_COLOUR, markersize=1.5)
        height = np.linspace(-2, 4.5, 50)
        for side in (-2, 2):
            ax.plot(side * np.exp(height), height, color=INK, linewidth=1)
        ax.set(xlim=(-40, 40), ylim=(-2, 4.5), xlabel="theta 1 - mu")
        ax.set_title(title, fontsize=10, loc="left")
    left.set_ylabel("log tau")
    right.plot(history.step, history.ess, color=INK)
    right.set(xlabel="step", ylim=(0, 1))
    right.set_title("Effective share of the weights", fontsize=10, loc="left")
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(24).save(path, optimize=True)


def main() -> None:
    """Print the table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps: seconds, and a worse flow")
    parser.add_argument("--seed", type=int, default=1, help="of the flow and of all samples (default 1)")
    parser.add_argument("--picture", type=Path, help="write a PNG here (needs matplotlib)")
    arguments = parser.parse_args()
    steps, rows = (300, 5_000) if arguments.quick else (3_000, 20_000)

    log_z, means = exact()
    print(f"  {'':<26}{'log evidence':<22}{'mean of mu':<17}{'log tau':<17}theta 1")
    show("exact", f"{log_z:.4f}", means, None, "")
    start = time.process_time()
    flow, history = train(steps, arguments.seed)
    trained = time.process_time() - start
    found = nvpflow.importance(flow, log_posterior, rows, seed=arguments.seed + 1)
    mean, error = found.mean(lambda x: x[:, :3])
    evidence = f"{found.log_evidence:.4f} +- {found.log_evidence_error:.4f}"
    share = f"{found.ess:,.0f} of {rows:,} rows effective, Pareto k {found.pareto_k:.2f}"
    show("flow, importance", evidence, mean, error, f"{share}, trained in {trained:.1f} s")
    chain, accepted = metropolis(found, arguments.seed)
    show_chain("flow, Metropolis", chain, f"{accepted:.0%} accepted")
    if importlib.util.find_spec("numpyro") is not None:
        run_nuts(rows, arguments.seed, centred=True)
        run_nuts(rows, arguments.seed, centred=False)
    else:
        print("  numpyro's NUTS            not installed: pip install numpyro")
    if arguments.picture:
        draw(arguments.picture, flow, found, history)
        print(f"Picture    {arguments.picture}")


if __name__ == "__main__":
    main()
