"""Learn the density of the POWER benchmark and set it beside the table of the paper that introduced the benchmark.

The data are UCI's household electric power consumption as prepared for Papamakarios, Pavlakou and Murray, "Masked
Autoregressive Flow for Density Estimation" (NeurIPS 2017): 6 standardized columns. With NVPFLOW_DATA at a folder with
power_train.npy and power_val.npy, the flow trains on the first, chooses its epoch by a tenth of those rows, and scores
the second, which is the benchmark's validation split. Without it, the sample that comes with nvpflow takes their place.
That is not the benchmark: it has fewer rows, another scale and another noise of rounding.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import nvpflow
from nvpflow import demo

INK, FLOW_COLOUR = "#30435f", "#e8743b"
COLUMNS = ("active power", "voltage", "kitchen", "laundry", "heating", "time of day")
PAIRS = ((5, 0), (1, 0))  # columns that the picture shows

# Table 1, column POWER, of the paper: mean test log-likelihood in nats, and two standard errors.
PUBLISHED = {
    "Gaussian": (-7.74, 0.02),
    "MADE": (-3.08, 0.03),
    "RealNVP (5)": (-0.02, 0.01),
    "MAF (5)": (0.14, 0.01),
    "RealNVP (10)": (0.17, 0.01),
    "MAF (10)": (0.24, 0.01),
    "MAF MoG (5)": (0.30, 0.01),
    "MADE MoG": (0.40, 0.01),
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


def draw(path: Path, results: dict[str, tuple[float, float]], data: np.ndarray, samples: np.ndarray) -> None:
    """Draw the log-likelihoods above -2, and two pairs of columns of the data and of the samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, panels = figure.subfigures(1, 2, width_ratios=[1, 1.45])
    ax = left.subplots()
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


def main() -> None:
    """Train, score, print the table and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 rows and few epochs: seconds, and no result")
    parser.add_argument("--epochs", type=int, help="passes over the training rows (default 36; quick 3)")
    parser.add_argument("--threads", type=int, default=0, help="0 (default): all that the process may use")
    parser.add_argument("--model", type=Path, help="write the flow here; a file that exists is read instead")
    parser.add_argument("--picture", type=Path, help="write a PNG here (needs matplotlib)")
    arguments = parser.parse_args()

    folder = os.environ.get("NVPFLOW_DATA")
    train, test = load(folder)
    if arguments.quick:
        train = train[:20_000]
    source = "POWER, the benchmark's splits" if folder else "the packaged sample: NOT the benchmark (set NVPFLOW_DATA)"
    print(f"Data       {source}; {len(train):,} rows to train on, {len(test):,} to score")
    epochs = arguments.epochs or (3 if arguments.quick else 36)

    if arguments.model and arguments.model.exists():
        flow = nvpflow.load(arguments.model)
    else:
        flow = nvpflow.build(6, num_flows=10, hidden_sizes=(128, 128), mixing="lu", scale_bound=2, seed=0)
        flow.num_threads = arguments.threads
        batch_size = 1024 if len(train) > 100_000 else 256
        flow.fit(train, epochs=epochs, batch_size=batch_size, learning_rate=3e-3, clip_norm=5.0, seed=0)
        if arguments.model:
            flow.save(arguments.model)
    couplings, parameters = flow.spec.num_flows, f"{flow.num_parameters:,}"
    print(f"Model      {couplings} x (permutation, LU layer, affine coupling), {parameters} parameters\n")

    gaussian = "full-covariance Gaussian, here"
    results = dict(PUBLISHED)
    results[gaussian] = mean_and_error(demo.gaussian_log_prob(train, test))
    results["nvpflow (10, LU)"] = mean_and_error(flow.log_probability(test))
    print("Log-likelihood, nats per row, and two standard errors (published: test split, MAF paper, table 1)")
    for name, (mean, error) in sorted(results.items(), key=lambda item: item[1]):
        mark = "" if name in PUBLISHED else f"   <- {len(test):,} held-out rows of {source.split(':')[0].split(';')[0]}"
        print(f"  {name:<32}{mean:>7.3f} +- {error:.3f}{mark}")

    if arguments.picture:
        ours = ("nvpflow (10, LU)", *PUBLISHED) if folder else ("nvpflow (10, LU)",)
        shown = {name: results[name] for name in ours}
        draw(arguments.picture, shown, test, flow.sample(len(test), seed=0))
        print(f"\nPicture    {arguments.picture}")


if __name__ == "__main__":
    main()
