"""``nvpflow demo``: train a flow on a real data set, measure it, and draw it.

The data is a sample of the UCI household electric power consumption data; `data/README.md` beside this file gives
source, licence (CC BY 4.0) and preparation.
"""

from __future__ import annotations

import os
import timeit
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import nvpflow
from nvpflow._gaussian import gaussian_log_prob

Array = NDArray[Any]

COLUMNS = ("active power", "voltage", "kitchen", "laundry", "heating", "time of day")
UNITS = ("kW", "V", "Wh/min", "Wh/min", "Wh/min", "min")

# The household's meters stand at a few levels for most of the time: splines have room between the levels.
MODEL: dict[str, Any] = {
    "num_flows": 6,
    "hidden_sizes": (64, 64),
    "mixing": "lu",
    "transform": "spline",
    "num_bins": 16,
    "tail_bound": 4.0,
}
EPOCHS = 80
SAMPLES = 10_000


class Split(NamedTuple):
    """Rows to train on, to choose the epoch by, and to report on."""

    train: Array
    validation: Array
    test: Array


def load_data() -> Array:
    """Return the data set: 20,000 minutes of one household, float32 [20000, 6], in the units of data/README.md."""
    with resources.as_file(resources.files("nvpflow") / "data" / "household_power.npy") as path:
        data: Array = np.load(path)
    return data


def split_data(data: Array) -> Split:
    """Split rows 80/10/10, always in the same way."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data))
    train, validation, test = np.split(data[order], [len(data) * 8 // 10, len(data) * 9 // 10])
    return Split(train, validation, test)


def run(
    folder: str | None = None,
    *,
    force: bool = False,
    epochs: int | None = None,
    threads: int = 0,
    device: str = "cpu",
) -> Path:
    """Run the demo and print what it finds.

    Parameters
    ----------
    folder
        Where to write model.safetensors, samples.npy and demo.png. None: a new folder nvpflow-demo, or nvpflow-demo-2
        and so on.
    force
        Overwrite these three files in `folder`.
    epochs
        Passes over the training rows; None: enough to converge.
    threads
        0: all that this process may use.
    device
        "cpu", "cuda" or "cuda:N".

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    FileExistsError
        `folder` holds one of the three files and `force` is False.
    ValueError
        `epochs` or `threads` is out of range, or there is no such `device`.
    CudaError
        CUDA cannot be used; the message says why.
    """
    target = _claim_folder(folder, force=force)
    try:
        _run_in(target, EPOCHS if epochs is None else epochs, threads, device)
    except BaseException:
        if folder is None:
            with suppress(OSError):
                target.rmdir()  # made for this run, and still empty
        raise
    return target


def _run_in(target: Path, epochs: int, threads: int, device: str) -> None:
    data = load_data()
    split = split_data(data)
    print(f"Data       {len(data):,} minutes of one household's electricity, {data.shape[1]} columns (UCI, CC BY 4.0)")
    print(
        f"           {len(split.train):,} rows to train, {len(split.validation):,} to validate, "
        f"{len(split.test):,} to test"
    )

    flow = nvpflow.build(data.shape[1], **MODEL, device=device)
    flow.column_names = COLUMNS
    flow.num_threads = threads
    where = nvpflow.cpu_isa() if device == "cpu" else flow.device
    print(f"Model      {flow}", flush=True)
    history = flow.fit(split.train, validation=split.validation, epochs=epochs)
    print(
        f"Training   {len(history)} epochs in {history.seconds.sum():.1f} s ({where}); best epoch {history.best_epoch}"
    )

    gaussian = _report_density(flow, split)
    _report_accuracy_and_speed(flow, split)

    samples = flow.sample(SAMPLES, seed=0)
    flow.save(target / "model.safetensors")
    np.save(target / "samples.npy", samples)
    written = ["model.safetensors", "samples.npy"]
    try:
        draw(target / "demo.png", split.test, samples, history, gaussian)
        written.append("demo.png")
    except ImportError:
        print("No picture: Matplotlib is not installed (pip install matplotlib)")
    print(f"Written    {', '.join(written)} in {target}{os.sep}")


def _claim_folder(folder: str | None, *, force: bool) -> Path:
    """Make the folder for the results; without a name, one that does not exist yet."""
    if folder is not None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "samples.npy", "demo.png"):
            if not force and (target / name).exists():
                raise FileExistsError(f"{target / name} exists already (--force overwrites it)")
        return target
    number = 1
    while True:
        target = Path("nvpflow-demo" if number == 1 else f"nvpflow-demo-{number}")
        try:
            target.mkdir()
            return target
        except FileExistsError:
            number += 1


def _report_density(flow: nvpflow.Flow, split: Split) -> float:
    """Print the test rows' log-likelihood beside a Gaussian's, which is returned as nats per row."""
    ours = flow.log_probability(split.test).astype(np.float64)
    gaussian = gaussian_log_prob(split.train, split.test)
    print("\nHeld-out log-likelihood of the test rows, nats per row (higher is better)")
    for name, values in (("flow", ours), ("full-covariance Gaussian", gaussian), ("difference", ours - gaussian)):
        print(f"  {name:<26}{values.mean():>9.3f} +- {values.std() / np.sqrt(len(values)):.3f}")
    return float(gaussian.mean())


def _report_accuracy_and_speed(flow: nvpflow.Flow, split: Split) -> None:
    rows = split.test
    error = np.abs(flow.inverse(flow.forward(rows)[0]) - rows) / rows.std(axis=0)
    print(f"\nRound trip max|inverse(forward(x)) - x| = {error.max():.1e} standard deviations of a column")

    row, out = rows[:1], np.empty(1, dtype=rows.dtype)
    timer = timeit.Timer("score(row, out=out)", globals={"score": flow.log_probability, "row": row, "out": out})
    calls = 500
    seconds = np.median(timer.repeat(repeat=101, number=calls)) / calls
    print(f"One row    {seconds * 1e6:.2f} us per log_probability call (median)")

    batch = np.resize(rows, (1 << 18, rows.shape[1]))
    out = np.empty(len(batch), dtype=rows.dtype)
    timer = timeit.Timer("score(batch, out=out)", globals={"score": flow.log_probability, "batch": batch, "out": out})
    rate = len(batch) / np.median(timer.repeat(repeat=5, number=1))
    print(f"Batch      {rate / 1e6:.2f} million rows per second, log_probability of {len(batch):,} rows\n")


# --------------------------------------------------------------------------------------------------------- picture


def draw(path: Path, data: Array, samples: Array, history: nvpflow.History, gaussian: float) -> None:
    """Draw every pair of columns, data against samples, and the learning curve, into a PNG.

    Parameters
    ----------
    path
        Where to.
    data, samples
        Rows [N, D] and [M, D].
    history
        Of the training.
    gaussian
        Log-likelihood of a Gaussian, nats per row, drawn as a line beside the learning curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nvpflow import plot

    count = data.shape[1]
    names = [f"{name} ({unit})" for name, unit in zip(COLUMNS, UNITS, strict=True)]
    with plot.style():
        figure = Figure(figsize=(12, 12), dpi=120)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            count, count, left=0.065, right=0.985, bottom=0.065, top=0.92, hspace=0.09, wspace=0.09
        )
        panels = np.full((count, count), None, dtype=object)
        for i, j in np.argwhere(np.tri(count)).tolist():
            panels[i, j] = figure.add_subplot(grid[i, j])
        labels = (f"{len(data):,} held-out rows", f"{len(samples):,} samples of the flow")
        plot.corner(data, samples, names=names, labels=labels, ax=panels)
        curve = figure.add_subplot(grid[0 : count // 2 - 1, count // 2 + 1 :])
        plot.learning_curve(history, reference={"full-covariance Gaussian, test rows": gaussian}, ax=curve)
        curve.set_title("Learning curve", loc="left")
        figure.text(0.065, 0.965, "One household's electricity, minute by minute", fontsize=17, weight="bold")
        figure.text(0.065, 0.012, "Diagonal: counts on a logarithmic scale.", fontsize=9, alpha=0.7)
        figure.savefig(path)
