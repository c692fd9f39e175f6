"""Measure what the defaults fit, beside a Gaussian, a mixture of Gaussians and other recipes, at equal time.

    NVPFLOW_DATA=/path/to/data python tests/bench/defaults.py    # all data sets, 4 seeds: half an hour or more
    python tests/bench/defaults.py --data 'moons;circles' --contenders 'before;default' --seeds 2
    python tests/bench/defaults.py --contenders 'default;glorot'    # of two, the differences seed by seed
    python tests/bench/defaults.py --quick                       # whether it runs, not how well it fits
    python tests/bench/defaults.py --json results.json > table.md

Each flow trains on one thread for the same processor time: what an epoch costs is measured first, and the schedule
gets as many epochs as fit into the time. Recipes that differ only in their initial weights get the same number of
epochs. Figures are the mean log-density of rows that took no part, in nats. The seed draws the data, the split, the
initial weights and the order of the rows; the real tables are always the same rows. "default" is what `FlowDensity()`
and `nvpflow fit` take; "glorot" is the same with the initial weights of `init="glorot"`, "splines" with four couplings
of splines in place of eight affine ones; "before" is what the documentation recommended when the defaults were chosen.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import nvpflow
from nvpflow import demo
from nvpflow._defaults import default_activation
from nvpflow.sklearn import FlowDensity
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.datasets import make_circles, make_moons
from sklearn.mixture import GaussianMixture

TEST_ROWS = 10_000
FOLDER = os.environ.get("NVPFLOW_DATA")


# ------------------------------------------------------------------------------------------------------- data sets


def _moons(n: int, seed: int) -> np.ndarray:
    return make_moons(n, noise=0.05, random_state=seed)[0]


def _circles(n: int, seed: int) -> np.ndarray:
    return make_circles(n, noise=0.03, factor=0.5, random_state=seed)[0]


def _checkerboard(n: int, seed: int) -> np.ndarray:
    r = np.random.default_rng(seed)
    column = r.integers(-2, 2, n)
    return np.column_stack([column + r.random(n), 2 * r.integers(-1, 1, n) + column % 2 + r.random(n)])


def clusters(n: int, seed: int) -> np.ndarray:
    """Eight Gaussians of standard deviation 0.3 on a circle of radius 4."""
    r = np.random.default_rng(seed)
    angle = r.integers(0, 8, n) * np.pi / 4
    return 4 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * r.normal(size=(n, 2))


def clusters_log_prob(x: np.ndarray) -> np.ndarray:
    """The true log-density of `clusters`."""
    angle = np.arange(8) * np.pi / 4
    centres = 4 * np.stack([np.cos(angle), np.sin(angle)], 1)
    square = ((x[:, None].astype(np.float64) - centres) ** 2).sum(2) / 0.3**2
    return np.logaddexp.reduce(-0.5 * square, axis=1) - np.log(8 * 2 * np.pi * 0.3**2)


def _two_modes(n: int, seed: int) -> np.ndarray:
    r = np.random.default_rng(seed)
    return r.normal(size=(n, 2)) + 100.0 * (r.random((n, 1)) < 0.3)


def _heavy_tails(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(2, size=(n, 3))


def _lognormal(n: int, seed: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=(n, 3)))


def _curved(n: int, seed: int, features: int) -> np.ndarray:
    """The second half of the columns is bent and stretched by the first."""
    half = features // 2
    z = np.random.default_rng(seed).normal(size=(n, features))
    z[:, half:] = z[:, half:] * np.exp(0.5 * z[:, :half]) + np.sin(2 * z[:, :half])
    return z


def _gaussian(n: int, seed: int, features: int) -> np.ndarray:
    mix = np.random.default_rng(9).normal(size=(features, features))
    return np.random.default_rng(seed).normal(size=(n, features)) @ mix


@dataclass(frozen=True)
class DataSet:
    """Rows to train on and rows that take no part, drawn by `make(rows, seed)` or read by `read()`."""

    name: str
    rows: int
    make: Callable[[int, int], np.ndarray] | None = None
    read: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and test rows, float32."""
        if self.read is not None:
            train, test = self.read()
        else:
            train, test = self.make(self.rows, seed), self.make(TEST_ROWS, seed + 1000)
        return np.ascontiguousarray(train, np.float32), np.ascontiguousarray(test, np.float32)


def _household() -> tuple[np.ndarray, np.ndarray]:
    split = demo.split_data(demo.load_data())
    return split.train, split.test


def _dithered(x: np.ndarray, column: int) -> np.ndarray:
    """Add uniform noise of one step to a column that takes few values."""
    step = np.median(np.diff(np.unique(x[:, column])))
    noise = np.zeros(x.shape)
    noise[:, column] = step * (np.random.default_rng(0).random(len(x)) - 0.5)
    return x + noise


def _of_folder(name: str) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def read() -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(0)
        parts = [np.load(Path(FOLDER) / f"{name}_{part}.npy", mmap_mode="r") for part in ("train", "val")]
        counts = (20_000, TEST_ROWS)
        train, test = (
            part[np.sort(order.permutation(len(part))[:count])] for part, count in zip(parts, counts, strict=True)
        )
        if name == "protein":  # its column 8 takes 341 values: a density on those has no bound
            train, test = (_dithered(part, column=7) for part in (train, test))
        return train, test

    return read


DATA = {
    d.name: d
    for d in (
        DataSet("moons", 5000, _moons),
        DataSet("moons, few rows", 200, _moons),
        DataSet("circles", 5000, _circles),
        DataSet("checkerboard", 5000, _checkerboard),
        DataSet("8 clusters", 5000, clusters),
        DataSet("2 modes 100 sd apart", 5000, _two_modes),
        DataSet("t(2), 3 columns", 5000, _heavy_tails),
        DataSet("lognormal(1), 3 columns", 5000, _lognormal),
        DataSet("Gaussian, 5 columns, few rows", 300, lambda n, seed: _gaussian(n, seed, 5)),
        DataSet("curved, 6 columns", 5000, lambda n, seed: _curved(n, seed, 6)),
        DataSet("curved, 8 columns, many rows", 50_000, lambda n, seed: _curved(n, seed, 8)),
        DataSet("Gaussian, 20 columns", 5000, lambda n, seed: _gaussian(n, seed, 20)),
        DataSet("curved, 64 columns", 10_000, lambda n, seed: _curved(n, seed, 64)),
        DataSet("household power, 6 columns", 16_000, read=_household),
        DataSet("POWER, 6 columns", 20_000, read=_of_folder("power")),
        DataSet("protein, 10 columns", 20_000, read=_of_folder("protein")),
    )
}
NEEDS_FOLDER = ("POWER, 6 columns", "protein, 10 columns")


# ------------------------------------------------------------------------------------------------------ contenders


_PACES: dict[Any, float] = {}


@dataclass(frozen=True)
class Recipe:
    """A flow and how it trains."""

    build: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)

    def built(self, features: int, seed: int) -> nvpflow.Flow:
        build = dict(self.build)
        if build.get("activation", "relu") is None:
            build["activation"] = default_activation(features)
        flow = nvpflow.build(features, **build, seed=seed)
        flow.num_threads = 1
        return flow

    def pace(self, train: np.ndarray, seed: int) -> float:
        """Processor seconds that an epoch takes, one number for all recipes that differ only in how they start."""
        starts = ("init", "standardize")
        same_work = replace(self, build={name: value for name, value in self.build.items() if name not in starts})
        key = (repr(same_work), train.shape, seed)
        if key not in _PACES:
            _PACES[key] = self._measured_pace(train)
        return _PACES[key]

    def _measured_pace(self, train: np.ndarray) -> float:
        """Return the shortest time of some epochs, for other processes can only add to it."""
        marks: list[float] = []

        def more(_: Any) -> bool:
            marks.append(time.process_time())
            return len(marks) < 6 or marks[-1] - marks[0] < 0.1

        self.built(train.shape[1], 0).fit(train, progress=False, callback=more, **self.fit)
        return float(np.min(np.diff(marks)))

    def log_prob(self, train: np.ndarray, test: np.ndarray, seed: int, seconds: float) -> np.ndarray:
        flow = self.built(train.shape[1], seed)
        epochs = max(1, round(seconds / self.pace(train, seed)))
        flow.fit(train, progress=False, epochs=epochs, seed=seed, **self.fit)
        return flow.log_probability(test).astype(np.float64)


class Mixture:
    """scikit-learn's mixture of ten Gaussians."""

    def log_prob(self, train: np.ndarray, test: np.ndarray, seed: int, seconds: float) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of iterations that have not converged
            return GaussianMixture(10, random_state=seed).fit(train.astype(np.float64)).score_samples(test)


class Gaussian:
    """One Gaussian with scikit-learn's shrunk covariance."""

    def log_prob(self, train: np.ndarray, test: np.ndarray, seed: int, seconds: float) -> np.ndarray:
        fitted = LedoitWolf().fit(train.astype(np.float64))
        return multivariate_normal(fitted.location_, fitted.covariance_).logpdf(test)


def default_recipe() -> Recipe:
    """What FlowDensity takes where nothing is said."""
    given = {name: p.default for name, p in inspect.signature(FlowDensity).parameters.items()}
    model = ("num_flows", "hidden_sizes", "activation", "scale_bound")
    training = ("batch_size", "learning_rate", "schedule", "weight_decay", "clip_norm", "averaging")
    return Recipe({name: given[name] for name in model}, {name: given[name] for name in training})


CONTENDERS: dict[str, Any] = {
    "GMM(10)": Mixture(),
    "Gaussian": Gaussian(),
    "before": Recipe(
        {"num_flows": 8, "hidden_sizes": (64, 64), "init": "glorot"},
        {"learning_rate": 3e-3, "clip_norm": 5.0, "batch_size": 256, "weight_decay": 0.0, "averaging": None},
    ),
    "default": default_recipe(),
    "glorot": replace(default_recipe(), build={**default_recipe().build, "init": "glorot"}),
    "splines": replace(default_recipe(), build={**default_recipe().build, "num_flows": 4, "transform": "spline"}),
    "standardized": replace(default_recipe(), build={**default_recipe().build, "standardize": True}),
    "covariance": replace(default_recipe(), build={**default_recipe().build, "standardize": "covariance"}),
    "student_t": replace(default_recipe(), build={**default_recipe().build, "base": "student_t"}),
    "build(D)": Recipe(),
}
REFERENCES = ("GMM(10)", "Gaussian", "before")


# --------------------------------------------------------------------------------------------------------- measure


def budget(rows: int, seconds: float) -> float:
    """Processor seconds: `seconds` for 5,000 rows, a quarter of it for few, three times as much for many."""
    return seconds * float(np.clip(rows / 5000, 0.25, 3.0))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each seed, data set and contender; Ctrl-C leaves what is complete until then."""
    names = [name for name in options.data if FOLDER is not None or name not in NEEDS_FOLDER]
    for name in options.data:
        if name not in names:
            print(f"{name}: left out, NVPFLOW_DATA names no folder that holds it", file=sys.stderr)
    records = []
    try:
        for seed in range(options.seeds):
            for name in names:
                records += _compared(DATA[name], seed, options)
    except KeyboardInterrupt:
        print("interrupted: the results are what was measured until now", file=sys.stderr)
    return records


def _compared(data: DataSet, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of every contender on the same rows."""
    train, test = data.split(seed)
    shared = {"data": data.name, "seed": seed, "rows": len(train), "columns": train.shape[1]}
    records = []
    for name in options.contenders:
        started = time.process_time()
        log_p = CONTENDERS[name].log_prob(train, test, seed, budget(len(train), options.seconds))
        measured = {"log_p": float(log_p.mean()), "lowest": float(log_p.min())}
        records.append({**shared, "contender": name, **measured, "seconds": time.process_time() - started})
        print(f"seed {seed}, {data.name}, {name}: {log_p.mean():.3f}", file=sys.stderr, flush=True)
    return records


# ----------------------------------------------------------------------------------------------------------- table


def _mean(records: list[dict[str, Any]], data: str, contender: str, key: str = "log_p") -> float:
    return float(np.mean([r[key] for r in records if r["data"] == data and r["contender"] == contender]))


def table(records: list[dict[str, Any]]) -> str:
    """Means over the seeds, and what is missing from the best of REFERENCES, as Markdown."""
    names = list(dict.fromkeys(r["contender"] for r in records))
    references = [name for name in names if name in REFERENCES]
    judged = [name for name in names if name not in REFERENCES and references]
    head = ["data", "rows", *names, *(f"gap of {name}" for name in judged)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    gaps: dict[str, list[float]] = {name: [] for name in judged}
    for data in dict.fromkeys(r["data"] for r in records):
        means = {name: _mean(records, data, name) for name in names}
        for name in judged:
            gaps[name].append(max(means[r] for r in references) - means[name])
        rows = next(r["rows"] for r in records if r["data"] == data)
        cells = [f"{means[name]:.3f}" for name in names] + [f"{gaps[name][-1]:+.3f}" for name in judged]
        lines.append(f"| {data} | {rows:,} | " + " | ".join(cells) + " |")
    last = [""] * len(names) + [f"{np.mean(gaps[name]):+.3f}" for name in judged]
    if judged:
        lines.append("| mean gap | | " + " | ".join(last) + " |")
    return "\n".join(lines)


def differences(records: list[dict[str, Any]], first: str, second: str) -> str:
    """How much better the first contender is than the second, seed by seed on the same rows, as Markdown."""
    head = ["data", "rows", first, second, f"{first} - {second}", "sd over seeds", "seeds better"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    means = []
    for data in dict.fromkeys(r["data"] for r in records):
        of = {(r["contender"], r["seed"]): r["log_p"] for r in records if r["data"] == data}
        seeds = [seed for name, seed in of if name == second]  # the contender that an interruption may have kept out
        better = np.array([of[first, seed] - of[second, seed] for seed in seeds])
        if not len(better):
            continue
        means.append(better.mean())
        rows = next(r["rows"] for r in records if r["data"] == data)
        spread = f"{better.std(ddof=1):.3f}" if len(better) > 1 else ""
        cells = [f"{_mean(records, data, name):.3f}" for name in (first, second)]
        cells += [f"{means[-1]:+.3f}", spread, f"{np.sum(better > 0)} of {len(better)}"]
        lines.append(f"| {data} | {rows:,} | " + " | ".join(cells) + " |")
    if not means:
        return "nothing was measured for both"
    apart = f"{np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
    lines.append(f"| mean, sd over data sets | | | | {np.mean(means):+.3f} | {apart} | |")
    lines.append(f"| median | | | | {np.median(means):+.3f} | | |")
    return "\n".join(lines)


def below_the_gaussian(records: list[dict[str, Any]]) -> list[str]:
    """Rows of a table: the contenders that have enough rows and are worse than a Gaussian by more than 0.05 nats."""
    found = []
    for data, rows, columns in dict.fromkeys((r["data"], r["rows"], r["columns"]) for r in records):
        for name in dict.fromkeys(r["contender"] for r in records):
            less = _mean(records, data, "Gaussian") - _mean(records, data, name)
            if rows >= 50 * columns and less > 0.05 and name != "Gaussian":
                found.append(f"| {name} | {data} | {less:.3f} |")
    return found


def lowest_ordinary_rows(records: list[dict[str, Any]]) -> list[str]:
    """Rows of a table: the least likely of the test rows of the eight clusters, of each seed, and the mean."""
    return [
        f"| {name} | {', '.join(format(r['lowest'], '.0f') for r in of)} | {_mean(of, '8 clusters', name):.3f} |"
        for name in dict.fromkeys(r["contender"] for r in records)
        if (of := [r for r in records if r["contender"] == name and r["data"] == "8 clusters"])
    ]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    def names(known: dict[str, Any]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            found = [name for name in known if any(name.startswith(part) for part in text.split(";"))]
            if not found:
                raise argparse.ArgumentTypeError(f"{text} is the beginning of none of {'; '.join(known)}")
            return found

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=names(DATA), default=list(DATA), metavar="NAME;...", help="names or their beginnings")
    contenders = f"of {'; '.join(CONTENDERS)}"
    add("--contenders", type=names(CONTENDERS), default=list(CONTENDERS), metavar="NAME;...", help=contenders)
    add("--seeds", type=int, default=4, metavar="N")
    seconds = "processor seconds for 5,000 rows (default: %(default)s)"
    add("--seconds", type=float, default=2.5, metavar="S", help=seconds)
    add("--json", type=Path, metavar="FILE", help="write the records there")
    add("--quick", action="store_true", help="one seed, a tenth of a second")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.seconds = 1, 0.1
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    records = measure(options)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(differences(records, *options.contenders) if len(options.contenders) == 2 else table(records))
    if {"Gaussian", "default"} <= set(options.contenders):
        found = below_the_gaussian(records)
        below = "more than 0.05 nats below the Gaussian on data with at least 50 rows a column"
        if found:
            print(f"\nThese contenders are {below}:\n")
            print("| contender | data | nats below the Gaussian |\n| --- | --- | ---: |\n" + "\n".join(found))
        else:
            print(f"\nNo contender is {below}.")
    if any(r["data"] == "8 clusters" for r in records):
        least = min(float(clusters_log_prob(DATA["8 clusters"].split(s)[1]).min()) for s in range(options.seeds))
        rows = lowest_ordinary_rows(records)
        print(
            f"\nLowest log-density of ordinary rows of the eight clusters, each seed; the true value is {least:.1f}:\n"
        )
        print("| contender | lowest log p | mean log p |\n| --- | --- | ---: |\n" + "\n".join(rows))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell puts in the background has none
    sys.exit(main())
