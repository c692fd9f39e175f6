"""Let a flow propose to Markov chain Monte Carlo: independence Metropolis-Hastings on a target with separate modes.

Random walks find the modes but hardly ever cross between them, so their samples do not say how much of the probability
each mode holds. A flow trained on those samples proposes jumps anywhere, and the Metropolis-Hastings test with the
flow's exact density makes the distribution of the chains the target's, whatever the flow has got wrong. The exact
answers for this target are known, so that this can be checked.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import nvpflow

INK, FLOW_COLOUR, MUTED = "#30435f", "#e8743b", "#9aa5b1"
STEP_SIZE = 0.45  # of the random walk: accepts somewhat less than half of its steps


class Target:
    """Four bent ridges of unequal probability in 6 dimensions; its density and its sampler are exact.

    A mixture of normal distributions in u, seen through a map that bends and mixes without changing volumes:
    ``x_1 = u_1 + BEND (u_0 - centre_0)^2``, ``x_j = u_j + sin(u_0) u_1 / 4`` for the other four columns.
    """

    WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])
    CENTRES = np.array([[-4.0, -4.0], [-4.0, 4.0], [4.0, -4.0], [4.0, 4.0]])
    STD = np.array([1.0, 0.4])
    BEND = 0.5
    DIMENSION = 6

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return log p [B], nats, of x [B, 6]."""
        x = x.astype(np.float64)
        log_parts = np.empty((len(x), len(self.WEIGHTS)))
        for k, (weight, centre) in enumerate(zip(self.WEIGHTS, self.CENTRES, strict=True)):
            first = x[:, 0] - centre[0]
            second = x[:, 1] - centre[1] - self.BEND * (first**2 - self.STD[0] ** 2)
            squares = (first / self.STD[0]) ** 2 + (second / self.STD[1]) ** 2
            log_parts[:, k] = np.log(weight) - 0.5 * squares - np.log(self.STD).sum()
        others = x[:, 2:] - np.sin(x[:, :1]) * x[:, 1:2] / 4
        log_rest = -0.5 * (others**2).sum(axis=1) - self.DIMENSION / 2 * np.log(2 * np.pi)
        largest = log_parts.max(axis=1)
        return largest + np.log(np.exp(log_parts - largest[:, None]).sum(axis=1)) + log_rest

    def sample(self, rows: int, random: np.random.Generator) -> np.ndarray:
        """Draw rows [rows, 6] directly, for the picture and for the exact answers."""
        mode = random.choice(len(self.WEIGHTS), size=rows, p=self.WEIGHTS)
        offset = random.normal(size=(rows, 2)) * self.STD
        x = random.normal(size=(rows, self.DIMENSION))
        x[:, 0] = self.CENTRES[mode, 0] + offset[:, 0]
        x[:, 1] = self.CENTRES[mode, 1] + offset[:, 1] + self.BEND * (offset[:, 0] ** 2 - self.STD[0] ** 2)
        x[:, 2:] += np.sin(x[:, :1]) * x[:, 1:2] / 4
        return x

    def mode_of(self, x: np.ndarray) -> np.ndarray:
        """Return which quadrant of the first two columns each row is in, numbered as the modes."""
        return 2 * (x[:, 0] > 0) + (x[:, 1] > 0)


@dataclass(frozen=True)
class Chains:
    """Rows that chains visited [chains, steps, D], and the share of the proposals that were accepted."""

    rows: np.ndarray
    acceptance: float


def random_walk(target: Target, start: np.ndarray, steps: int, step_size: float, random: np.random.Generator) -> Chains:
    """Run Metropolis chains with normal steps side by side, one from each row of `start`."""
    at, log_p = start, target.log_density(start)
    visited = np.empty((steps, *start.shape))
    accepted = 0
    for i in range(steps):
        proposal = at + step_size * random.normal(size=at.shape)
        proposed = target.log_density(proposal)
        take = np.log(random.random(len(at))) < proposed - log_p
        at, log_p = np.where(take[:, None], proposal, at), np.where(take, proposed, log_p)
        visited[i] = at
        accepted += int(take.sum())
    return Chains(visited.swapaxes(0, 1), accepted / (steps * len(start)))


def flow_chains(
    target: Target, flow: nvpflow.Flow, start: np.ndarray, steps: int, step_size: float, random: np.random.Generator
) -> Chains:
    """Run Metropolis-Hastings chains that take a step of a random walk, then one that the flow proposes, in turns.

    A sample y of the flow is accepted at x with probability min(1, w(y) / w(x)), w = p / q (Tierney, Annals of
    Statistics 22, 1994). All samples and their densities are made at once: they do not depend on the chains. The local
    steps are for the tails, where the flow proposes too little (Gabrie, Rotskoff and Vanden-Eijnden, PNAS 119, 2022).
    """
    chains = len(start)
    samples = flow.sample(steps * chains, seed=int(random.integers(2**63)))
    sample_weight = target.log_density(samples) - flow.log_probability(samples)
    samples, sample_weight = samples.reshape(steps, chains, -1), sample_weight.reshape(steps, chains)
    at = start.astype(samples.dtype)
    visited = np.empty((steps, *at.shape), dtype=at.dtype)
    accepted = 0
    for i in range(steps):
        at = random_walk(target, at, 1, step_size, random).rows[:, 0].astype(at.dtype)
        weight = target.log_density(at) - flow.log_probability(at)
        take = np.log(random.random(chains)) < sample_weight[i] - weight
        at = np.where(take[:, None], samples[i], at)
        visited[i] = at
        accepted += int(take.sum())
    return Chains(visited.swapaxes(0, 1), accepted / (steps * chains))


def effective_sample_size(values: np.ndarray) -> float:
    """Return the number of independent rows that would give the mean of values [chains, N] as exactly.

    The chains' average autocorrelation about their common mean, summed by Geyer's initial positive sequence (1992):
    chains that stay apart count once each.
    """
    chains, steps = values.shape
    spectrum = np.fft.rfft(values - values.mean(), 2 * steps, axis=1)
    autocovariance = np.fft.irfft((np.abs(spectrum) ** 2).mean(axis=0))[:steps]
    if not autocovariance[0] > 0:
        return float(chains)
    pairs = (autocovariance / autocovariance[0])[: steps // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0)
    time = 2 * pairs[: negative[0] if len(negative) else None].sum() - 1
    return chains * steps / max(time, 1.0)


def train_proposal(rows: np.ndarray, epochs: int) -> nvpflow.Flow:
    """Fit the proposal to rows [N, 6]."""
    flow = nvpflow.build(rows.shape[1], num_flows=10, hidden_sizes=(64, 64), seed=0)
    flow.fit(rows.astype(np.float32), epochs=epochs, learning_rate=3e-3, clip_norm=5.0, progress=False, seed=0)
    return flow


def compare(values: np.ndarray, exact_mean: float, exact_variance: float, exact_rows: float = np.inf) -> float:
    """Return how many standard errors the mean of values [chains, N] is from the exact one."""
    variance = exact_variance * (1 / effective_sample_size(values) + 1 / exact_rows)
    return float((values.mean() - exact_mean) / np.sqrt(variance))


def describe(name: str, target: Target, rows: np.ndarray, acceptance: float | None) -> float:
    """Print a line of the table for rows [chains, N, 6]; return the effective number of rows for the modes' shares."""
    mode = target.mode_of(rows.reshape(-1, target.DIMENSION)).reshape(rows.shape[:2])
    held = [(mode == k).astype(np.float64) for k in range(len(target.WEIGHTS))]
    effective = min(map(effective_sample_size, held))
    largest = max(abs(compare(h, w, w * (1 - w))) for h, w in zip(held, target.WEIGHTS, strict=True))
    accepted = "" if acceptance is None else f"{acceptance:.1%}"
    shares = "  ".join(f"{h.mean():.3f}" for h in held)
    print(f"  {name:<28}{accepted:>9}{effective:>11,.0f}   {shares}{largest:>13.1f}")
    return effective


def check_moments(target: Target, rows: np.ndarray, random: np.random.Generator) -> float:
    """Compare means and mean squares of rows [chains, N, 6] with those of a million exact draws; the largest |z|."""
    exact = target.sample(1_000_000, random)
    deviations = []
    for power in (1, 2):
        wanted = exact**power
        for j in range(target.DIMENSION):
            seen = rows[:, :, j].astype(np.float64) ** power
            deviations.append(compare(seen, wanted[:, j].mean(), wanted[:, j].var(), len(exact)))
    return float(np.abs(deviations).max())


def draw(path: Path, sets: dict[str, np.ndarray], target: Target) -> None:
    """Draw the first two columns of each set of rows [N, 6], and the modes' shares beside the exact ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 3.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.05])
    titles = ("Random walks, started evenly", "The flow that they trained", "The flow with Metropolis-Hastings")
    shares = {name: np.bincount(target.mode_of(rows), minlength=4) / len(rows) for name, rows in sets.items()}
    for ax, title, (name, rows) in zip(axes, titles, sets.items(), strict=False):
        ax.hist2d(rows[:, 0], rows[:, 1], bins=100, range=[[-8, 8], [-7, 10]], cmap="Blues", cmin=1, norm="log")
        for centre, share in zip(target.CENTRES, shares[name], strict=True):
            ax.annotate(f"{share:.2f}", (centre[0], centre[1] + 4.2), ha="center", fontsize=9, color=INK)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set(xlabel="x[0]")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("x[1]")

    last, place = axes[-1], np.arange(len(target.WEIGHTS))
    looks = (("s", MUTED), ("D", FLOW_COLOUR), ("o", INK))
    for offset, (marker, colour), (name, values) in zip((-0.2, 0.0, 0.2), looks, shares.items(), strict=True):
        last.plot(place + offset, values, marker, color=colour, markersize=6, label=name)
    last.hlines(target.WEIGHTS, place - 0.38, place + 0.38, color="black", linewidth=1, label="exact")
    last.set_title("Share of each mode", fontsize=10, loc="left")
    last.set(xticks=place, xticklabels=["left\nbelow", "left\nabove", "right\nbelow", "right\nabove"], ylim=(0, 0.5))
    last.legend(frameon=False, fontsize=8, loc="upper left")
    last.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Print the table, check the chains against the exact answers, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and epochs: seconds, and a worse proposal")
    parser.add_argument("--seed", type=int, default=1, help="of the walks and of the chains (default 1)")
    parser.add_argument("--picture", type=Path, help="write a PNG here (needs matplotlib)")
    arguments = parser.parse_args()
    walk_steps, steps, epochs = (500, 500, 12) if arguments.quick else (2_500, 5_000, 60)

    target, random = Target(), np.random.default_rng(arguments.seed)
    start = np.zeros((40, target.DIMENSION))
    start[:, :2] = np.tile(target.CENTRES, (10, 1))
    walk = random_walk(target, start, walk_steps, STEP_SIZE, random)
    flow = train_proposal(walk.rows.reshape(-1, target.DIMENSION), epochs)
    alone = flow.sample(len(start) * steps, seed=arguments.seed).reshape(len(start), steps, -1)
    chains = flow_chains(target, flow, walk.rows[:, -1], steps, STEP_SIZE, random)
    corrected = chains.rows[:, steps // 10 :]  # the first tenth is still on its way from where the walks ended

    print(f"Target     4 modes in {target.DIMENSION} dimensions, exact shares {target.WEIGHTS.tolist()}")
    print(f"Proposal   {flow}\n")
    print(f"  {'':<28}{'accepted':>9}{'effective':>11}   {'share of each mode':<26}{'largest |z|':>14}")
    describe(f"random walk, {walk.rows[..., 0].size:,} rows", target, walk.rows, walk.acceptance)
    describe(f"flow alone, {alone[..., 0].size:,} rows", target, alone, None)
    effective = describe(f"flow + MH, {corrected[..., 0].size:,} rows", target, corrected, chains.acceptance)
    moments = check_moments(target, corrected, np.random.default_rng(0))
    print(f"\nExactness  means and mean squares of all columns: largest |z| {moments:.1f}")
    print(f"Yield      {effective / corrected[..., 0].size:.2f} effective rows per step")

    if arguments.picture:
        sets = {"random walk": walk.rows, "flow, uncorrected": alone, "flow + MH": corrected}
        draw(arguments.picture, {name: rows.reshape(-1, target.DIMENSION) for name, rows in sets.items()}, target)
        print(f"Picture    {arguments.picture}")


if __name__ == "__main__":
    main()
