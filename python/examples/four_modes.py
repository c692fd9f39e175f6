"""Fit four separate modes in the plane, with affine couplings and with splines, and measure what is left to learn.

The density is known, so the distance to it is, too: in nats per row, and as the effective share of the flow's samples
when they are weighted to be samples of the target (importance sampling).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import nvpflow

WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])
CENTRES = np.array([[-2.0, -1.0], [-1.0, 2.0], [1.0, -2.0], [2.0, 1.0]])
STD = 0.2
LIMIT = 3.0  # of the picture


def target_log_p(x: np.ndarray) -> np.ndarray:
    """Return log p [B], nats, of x [B, 2]: four normal distributions."""
    squares = ((x[:, None].astype(np.float64) - CENTRES) ** 2).sum(axis=2) / STD**2
    parts = np.log(WEIGHTS) - 0.5 * squares - np.log(2 * np.pi * STD**2)
    largest = parts.max(axis=1)
    return largest + np.log(np.exp(parts - largest[:, None]).sum(axis=1))


def draw_rows(rows: int, random: np.random.Generator) -> np.ndarray:
    """Draw rows [rows, 2] of the target."""
    mode = random.choice(len(WEIGHTS), size=rows, p=WEIGHTS)
    return (CENTRES[mode] + STD * random.normal(size=(rows, 2))).astype(np.float32)


def effective_share(flow: nvpflow.Flow, rows: int) -> float:
    """Return the effective number of samples, weighted by target / flow, as a share of them (Kish 1965)."""
    samples = flow.sample(rows, seed=1)
    log_weights = target_log_p(samples) - flow.log_probability(samples)
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (rows * (weights**2).sum()))


def draw(path: Path, flows: dict[str, nvpflow.Flow]) -> None:
    """Draw the density of the target and of each flow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.3), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axis = np.linspace(-LIMIT, LIMIT, 240)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
    shown = {"The target": target_log_p(grid)} | {name: flow.log_probability(grid) for name, flow in flows.items()}
    for ax, (name, log_p) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        density = np.clip(log_p, -12, None).reshape(len(axis), -1)
        ax.imshow(density, cmap="Blues", vmin=-12, vmax=0, origin="lower", extent=(-LIMIT, LIMIT) * 2)
        ax.set_title(name, fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Train both flows, print the table and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs: seconds, and worse flows")
    parser.add_argument("--seed", type=int, default=1, help="of the rows (default 1)")
    parser.add_argument("--picture", type=Path, help="write a PNG here (needs matplotlib)")
    arguments = parser.parse_args()

    random = np.random.default_rng(arguments.seed)
    train, test = draw_rows(50_000, random), draw_rows(100_000, random)
    options = {"epochs": 3 if arguments.quick else 30, "batch_size": 512, "progress": False}
    print(f"Target     4 modes, {target_log_p(test).mean():.4f} nats per row\n")
    print(f"  {'':<22}{'parameters':>11}{'nats behind':>13}{'effective samples':>19}")
    flows = {
        "Affine couplings": nvpflow.build(2, num_flows=8, hidden_sizes=(64, 64)),
        "Spline couplings": nvpflow.build(2, num_flows=4, hidden_sizes=(64, 64), transform="spline", num_bins=16),
    }
    for name, flow in flows.items():
        flow.fit(train, **options)
        behind = float(np.mean(target_log_p(test) - flow.log_probability(test)))
        share = effective_share(flow, 100_000)
        print(f"  {name:<22}{flow.num_parameters:>11,}{behind:>13.4f}{share:>18.1%}")

    if arguments.picture:
        draw(arguments.picture, flows)
        print(f"\nPicture    {arguments.picture}")


if __name__ == "__main__":
    main()
