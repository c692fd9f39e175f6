"""Score a stream of electricity readings one by one: false readings found, and a histogram of the latency.

The false readings carry the total power of another minute. Every value is then ordinary by itself; only the combination
with the sub-meters is odd. Limits per column cannot see that, a joint density can where the two minutes differ enough.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import nvpflow
from nvpflow import demo

INK, FLOW_COLOUR = "#30435f", "#e8743b"
FALSE_SHARE = 0.02
ALARM_SHARE = 0.01  # of true readings: the limit is set so that so many of the validation rows exceed it


@dataclass(frozen=True)
class Stream:
    """Readings [N, 6] in the order of their arrival, and which of them are false [N]."""

    rows: np.ndarray
    false: np.ndarray


def make_stream(test: np.ndarray, rows: int, random: np.random.Generator) -> Stream:
    """Draw readings from the test rows and give some of them the active power (column 0) of another."""
    stream = test[random.integers(len(test), size=rows)].copy()
    false = random.random(rows) < FALSE_SHARE
    stream[false, 0] = test[random.integers(len(test), size=int(false.sum())), 0]
    return Stream(stream, false)


def score_one_by_one(flow: nvpflow.Flow, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return -log p [N] in nats and the time of each call [N] in ns, the clock's own time included.

    The loop is that of a service: one row, one call, no allocation by nvpflow.
    """
    scores = np.empty(len(rows))
    took = np.empty(len(rows), dtype=np.int64)
    row, out = np.empty((1, rows.shape[1]), rows.dtype), np.empty(1, rows.dtype)
    score, clock = flow.log_probability, time.perf_counter_ns
    for _ in range(1000):  # first calls fault pages in and fill caches
        score(rows[:1], out=out)
    for i in range(len(rows)):
        row[0] = rows[i]
        start = clock()
        score(row, out=out)
        took[i] = clock() - start
        scores[i] = -out[0]
    return scores, took


def report_alarms(name: str, stream: Stream, scores: np.ndarray, limit: float) -> None:
    """Print what an alarm limit finds."""
    found, mistaken = np.mean(scores[stream.false] > limit), np.mean(scores[~stream.false] > limit)
    shares = f"finds {found:.1%} of the false readings, flags {mistaken:.1%} of the true"
    print(f"  {name:<25} limit {limit:5.1f} nats: {shares}")


def report_latency(took: np.ndarray) -> dict[str, float]:
    """Print the distribution of the calls' times and return its quantiles in us."""
    names = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    quantiles = {name: float(np.quantile(took, share)) / 1e3 for name, share in names.items()}
    print("Latency    " + ", ".join(f"{name} {value:.2f} us" for name, value in quantiles.items()))
    return quantiles


def draw(path: Path, stream: Stream, scores: np.ndarray, limit: float, took: np.ndarray, quantiles: dict) -> None:
    """Draw the last 2,000 readings' scores and the histogram of all calls' times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    at = np.arange(max(len(scores) - 2000, 0), len(scores))
    false = stream.false[at]
    left.plot(at[~false], scores[at][~false], ".", color=INK, markersize=2.5, label="true reading")
    left.plot(at[false], scores[at][false], "o", color=FLOW_COLOUR, markersize=4.5, label="false reading")
    left.axhline(limit, color="black", linewidth=1, linestyle="--", label=f"alarm limit, {limit:.1f} nats")
    left.set_title("Score of each reading, -log p", fontsize=10, loc="left")
    left.set(xlabel="reading", ylabel="nats", xlim=(at[0], at[-1]), ylim=(min(scores[at].min(), 0) - 2, 20_000))
    left.set_yscale("symlog", linthresh=40)  # linear where the true readings are, then logarithmic
    left.set_yticks([0, 20, 40, 100, 1000], ["0", "20", "40", "100", "1000"])
    left.legend(frameon=False, fontsize=8, loc="upper right", ncols=3, borderpad=0)

    low, high = took.min() / 1e3, max(quantiles["max"], 2 * quantiles["p99.9"])
    right.hist(took / 1e3, bins=np.geomspace(0.9 * low, high, 120), color=INK)
    for name, height in (("p50", 0.99), ("p99", 0.84), ("p99.9", 0.69)):
        right.axvline(quantiles[name], color=FLOW_COLOUR, linewidth=1)
        right.annotate(
            f" {name}", (quantiles[name], height), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=8
        )
    right.set_title(f"Time of each of {len(took):,} calls", fontsize=10, loc="left")
    right.set(xscale="log", yscale="log", xlabel="us", ylabel="calls")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Train, score the stream, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs and readings: a few seconds")
    parser.add_argument("--rows", type=int, help="readings of the stream (default 200,000; quick 5,000)")
    parser.add_argument("--picture", type=Path, help="write a PNG here (needs matplotlib)")
    arguments = parser.parse_args()
    rows = arguments.rows or (5_000 if arguments.quick else 200_000)

    split = demo.split_data(demo.load_data())
    flow = nvpflow.build(input_size=6, num_flows=8, hidden_sizes=(64, 64))
    epochs = 4 if arguments.quick else 30
    flow.fit(split.train, validation=split.validation, epochs=epochs, learning_rate=3e-3, clip_norm=5.0, progress=False)
    stream = make_stream(split.test, rows, np.random.default_rng(0))

    scores, took = score_one_by_one(flow, stream.rows)
    limit = float(np.quantile(-flow.log_probability(split.validation), 1 - ALARM_SHARE))
    print(f"Stream     {rows:,} readings, {int(stream.false.sum()):,} of them false")
    print(f"Alarms     at the score that {ALARM_SHARE:.0%} of the validation rows exceed")
    report_alarms("flow", stream, scores, limit)
    gaussian = -demo.gaussian_log_prob(split.train, stream.rows)
    limit_of_gaussian = np.quantile(-demo.gaussian_log_prob(split.train, split.validation), 1 - ALARM_SHARE)
    report_alarms("full-covariance Gaussian", stream, gaussian, float(limit_of_gaussian))
    quantiles = report_latency(took)

    print("\nMost surprising true readings:")
    true = stream.rows[~stream.false]
    order = np.argsort(-scores[~stream.false])
    for i in order[np.sort(np.unique(true[order], axis=0, return_index=True)[1])[:3]]:  # the stream repeats readings
        reading = ", ".join(f"{name} {value:.1f}" for name, value in zip(demo.COLUMNS, true[i], strict=True))
        print(f"  {scores[~stream.false][i]:6.1f} nats: {reading}")

    if arguments.picture:
        draw(arguments.picture, stream, scores, limit, took, quantiles)
        print(f"\nPicture    {arguments.picture}")


if __name__ == "__main__":
    main()
