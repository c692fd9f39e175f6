"""Learn the density of the POWER benchmark and set it beside the table of the paper that introduced the benchmark.

The data are UCI's household electric power consumption as prepared for Papamakarios, Pavlakou and Murray, "Masked
Autoregressive Flow for Density Estimation" (NeurIPS 2017): 6 standardized columns. With NVPFLOW_DATA at a folder with
power_train.npy and power_val.npy, the flow trains on the first, chooses its epoch by a tenth of those rows, and scores
the second, which is the benchmark's validation split. Without it, the sample that comes with nvpflow takes their place.
That is not the benchmark: it has fewer rows, another scale and another noise of rounding.

Two cores of an AMD EPYC (AVX-512) train splines in 17 minutes and affine couplings in 18: 2 epochs took 33 and 43
seconds (`--threads 2 --epochs 2`). One core needs 29 and 31 minutes (`--threads 1`).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import nvpflow
from nvpflow import demo

INK, FLOW_COLOUR = "#30435f", "#e8743b"
COLUMNS = ("active power", "voltage", "kitchen", "laundry", "heating", "time of day")
PAIRS = ((5, 0), (1, 0))  # columns that the picture shows

# Options of build and of fit, by the couplings' transform.
RECIPES = {
    "spline": (
        {"num_flows": 10, "transform": "spline", "num_bins": 8, "tail_bound": 3.0},
        {"epochs": 60, "learning_rate": 1e-3},
    ),
    "affine": ({"num_flows": 20, "scale_bound": 2.0}, {"epochs": 50, "learning_rate": 2e-3}),
}

# Mean test log-likelihood in nats, and two standard errors: table 1 of the paper, and of Durkan et al., "Neural Spline
# Flows" (NeurIPS 2019).
PUBLISHED = {
    "Gaussian": (-7.74, 0.02),
    "MADE": (-3.08, 0.03),
    "RealNVP (5)": (-0.02, 0.01),
    "MAF (5)": (0.14, 0.01),
    "RealNVP (10)": (0.17, 0.01),
    "MAF (10)": (0.24, 0.01),
    "MAF MoG (5)": (0.30, 0.01),
    "MADE MoG": (0.40, 0.01),
    "Glow": (0.42, 0.01),
    "RQ-NSF (C)": (0.64, 0.01),
}


def load(folder: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to train on and rows to score, float32 [N, 6], standardized by the former."""
    if folder:
        return np.load(Path(folder) / "power_train.npy"), np.load(Path(folder) / "power_val.npy")
    split = demo.split_data(demo.load_data())
    train = np.concatenate([split.train, split.validation])
    mean, std = train.mean(axis=0), train.std(axis=0)
    return (train - mean) / std, (split.test - mean) / std


def mean_and_error(log_p: np.ndarray) -> tuple[float, float]:
    """Return the mean of log p [N] and two standard errors of it, as the table has them."""
    values = log_p.astype(np.float64)
    return float(values.mean()), float(2 * values.std() / np.sqrt(len(values)))


Curve = list[tuple[float, float]]


def curve_of(history: nvpflow.History) -> Curve:
    """Return minutes from the start, and nats per row of the tenth that chooses the epoch, of every epoch."""
    minutes = np.cumsum(history.seconds) / 60
    return [(float(at), -float(loss)) for at, loss in zip(minutes, history.validation_loss, strict=True)]


def draw_curves(ax, curves: dict[str, Curve]) -> None:
    """Draw nats over minutes of training."""
    for (name, curve), colour in zip(curves.items(), (FLOW_COLOUR, INK, "0.6"), strict=False):
        ax.plot(*zip(*curve, strict=True), color=colour, label=name)
    ax.set(xlabel="minutes of training", ylim=(0, None))
    ax.set_title("Nats per row of the rows that choose the epoch", fontsize=10, loc="left")
    ax.grid(color="0.92")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def draw(
    path: Path,
    results: dict[str, tuple[float, float]],
    curves: dict[str, Curve],
    data: np.ndarray,
    samples: np.ndarray,
) -> None:
    """Draw the log-likelihoods above -2, the curves, and two pairs of columns of the data and of the samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, panels = figure.subfigures(1, 2, width_ratios=[1, 1.45])
    ax, below = left.subplots(2, height_ratios=[1.3, 1])
    draw_curves(below, curves)
    shown = sorted(((name, value) for name, value in results.items() if value[0] > -2), key=lambda item: item[1])
    for place, (name, (mean, error)) in enumerate(shown):
        ours = name.startswith("nvpflow")
        ax.errorbar(mean, place, xerr=error, fmt="o", color=FLOW_COLOUR if ours else INK, markersize=6, capsize=2)
        ax.annotate(f"{mean:.2f}", (mean, place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=9)
    ax.set(xlabel="nats per row", ylim=(-0.5, len(shown) - 0.3))
    ax.set_title("Held-out log-likelihood (published: test split)", fontsize=10, loc="left")
    ax.grid(axis="x", color="0.92")
    ax.spines[["top", "right"]].set_visible(False)

    grid = panels.subplots(2, 2, sharex="row", sharey="row")
    for row, (i, j) in zip(grid, PAIRS, strict=True):
        low, high = np.quantile(data[:, [i, j]], [0.0005, 0.9995], axis=0)
        for cell, rows, title in zip(row, (data, samples), ("held-out rows", "samples of the flow"), strict=True):
            cell.hist2d(rows[:, i], rows[:, j], bins=90, range=np.stack([low, high], axis=1), norm="log", cmap="Blues")
            cell.set_xlabel(f"{COLUMNS[i]} (standardized)", fontsize=8)
            cell.tick_params(labelsize=8)
            if (i, j) == PAIRS[0]:
                cell.set_title(title, fontsize=10, loc="left")
        row[0].set_ylabel(COLUMNS[j], fontsize=8)
    figure.savefig(path)


def train_flow(train: np.ndarray, arguments: argparse.Namespace) -> tuple[nvpflow.Flow, Curve]:
    """Train by the recipe; return the flow and its curve."""
    build_options, fit_options = RECIPES[arguments.transform]
    epochs = arguments.epochs or (3 if arguments.quick else fit_options["epochs"])
    flow = nvpflow.build(6, hidden_sizes=(128, 128), mixing="lu", seed=0, **build_options)
    flow.num_threads = arguments.threads
    batch_size = 1024 if len(train) > 100_000 else 256
    history = flow.fit(
        train,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=fit_options["learning_rate"],
        clip_norm=5.0,
        seed=0,
    )
    return flow, curve_of(history)


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transform", choices=list(RECIPES), default="spline", help="of the couplings")
    parser.add_argument("--quick", action="store_true", help="20,000 rows and few epochs: seconds, and no result")
    parser.add_argument("--epochs", type=int, help="passes over the training rows (default: the recipe's; quick 3)")
    parser.add_argument("--threads", type=int, default=0, help="0 (default): all that the process may use")
    parser.add_argument("--model", type=Path, help="write the flow here; a file that exists is read instead")
    parser.add_argument("--curves", type=Path, help="a JSON file to which the training's curve is added, by its name")
    parser.add_argument("--picture", type=Path, help="write a PNG here (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    """Train, score, print the table and draw."""
    arguments = parse_arguments()
    folder = os.environ.get("NVPFLOW_DATA")
    train, test = load(folder)
    if arguments.quick:
        train = train[:20_000]
    source = "POWER, the benchmark's splits" if folder else "the packaged sample: NOT the benchmark (set NVPFLOW_DATA)"
    print(f"Data       {source}; {len(train):,} rows to train on, {len(test):,} to score")

    name = f"nvpflow ({RECIPES[arguments.transform][0]['num_flows']}, LU, {arguments.transform})"
    given = arguments.curves is not None and arguments.curves.exists()
    curves: dict[str, Curve] = json.loads(arguments.curves.read_text()) if given else {}
    if arguments.model and arguments.model.exists():
        flow = nvpflow.load(arguments.model)
    else:
        flow, curves[name] = train_flow(train, arguments)
        if arguments.model:
            flow.save(arguments.model)
        if arguments.curves:
            arguments.curves.write_text(json.dumps(curves))
    couplings, parameters = flow.spec.num_flows, f"{flow.num_parameters:,}"
    print(
        f"Model      {couplings} x (permutation, LU layer, {arguments.transform} coupling), {parameters} parameters\n"
    )

    gaussian = "full-covariance Gaussian, here"
    results = dict(PUBLISHED)
    results[gaussian] = mean_and_error(demo.gaussian_log_prob(train, test))
    results[name] = mean_and_error(flow.log_probability(test))
    print("Log-likelihood, nats per row, and two standard errors (published: test split)")
    for label, (mean, error) in sorted(results.items(), key=lambda item: item[1]):
        mark = (
            "" if label in PUBLISHED else f"   <- {len(test):,} held-out rows of {source.split(':')[0].split(';')[0]}"
        )
        print(f"  {label:<32}{mean:>7.3f} +- {error:.3f}{mark}")

    if arguments.picture:
        ours = (name, *PUBLISHED) if folder else (name,)
        shown = {label: results[label] for label in ours}
        draw(arguments.picture, shown, curves, test, flow.sample(len(test), seed=0))
        print(f"\nPicture    {arguments.picture}")


if __name__ == "__main__":
    main()
