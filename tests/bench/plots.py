"""Two pictures: how near to the machine's limits, and how rows per second grow with the batch."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from configurations import FLOAT32_BYTES
from results import Results

COLOURS = {"A": "#0072B2", "B": "#D55E00", "C": "#009E73", "D": "#CC79A7", "E": "#8C6D1F"}
COLOURS |= {"J": "#56B4E9", "G": "#E69F00", "G1": "#A0522D", "M": "#882255", "R": "#44AA99"}
GREY = "#7F7F7F"
BOUND = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (4, 3))}
# What the batch curve shows beside nvpflow, in the order of the legend.
PEER_STYLES = {
    "openvino": ("#E69F00", "OpenVINO"),
    "jax": ("#56B4E9", "JAX jit"),
    "onnxruntime_bound": ("#009E73", "ONNX Runtime"),
    "torch_compile": ("#CC79A7", "torch.compile"),
    "torch_eager": ("#A0522D", "PyTorch eager"),
    "numpy": (GREY, "NumPy"),
}
BATCH_TICKS = (1, 8, 64, 1024, 65_536)
PEER_LINE = {"marker": "o", "markerfacecolor": "white", "markersize": 4, "linewidth": 0.7, "linestyle": ":"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def intensity(configuration: dict, batch: int) -> float:
    """FLOPs per byte of a log_prob call that reads the weights and each row once and writes a result a row."""
    moved = configuration["weight_bytes"] + batch * FLOAT32_BYTES * (configuration["input_size"] + 1)
    return configuration["flops_per_row"] * batch / moved


def _ceilings(axes, limits: dict, right: float) -> None:
    """Slanted lines: reading from each level; level ones: multiply-adds of each instruction set."""
    peaks = sorted(limits["fma"].items(), key=lambda item: -item[1])
    top = peaks[0][1]
    for isa, peak in peaks:
        axes.axhline(peak / 1e9, color=GREY, linewidth=1.2 if peak == top else 0.8, zorder=1)
        axes.text(right, peak / 1e9 * 1.05, f"{isa} {peak / 1e9:.0f}", color=GREY, ha="right", fontsize=8)
    left = axes.get_xlim()[0]
    axes.figure.canvas.draw()  # settles the layout, and with it the angle of the slanted lines
    for level, found in limits["read"].items():
        x = np.array([left, top / found["rate"]])
        y = found["rate"] * x / 1e9
        axes.plot(x, y, zorder=1, **BOUND)
        run, rise = np.diff(axes.transData.transform(np.column_stack([x, y])), axis=0)[0]
        axes.annotate(
            f"{level} {found['rate'] / 1e9:.0f} GB/s",
            (x[0], y[0]),
            xytext=(8, 12),
            textcoords="offset points",
            rotation=np.degrees(np.arctan2(rise, run)),
            rotation_mode="anchor",
            color=GREY,
            fontsize=8,
        )


def roofline(r: Results, path: Path) -> None:
    """GFLOP/s of log_prob against arithmetic intensity, one line a configuration from small batches to large ones."""
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of weights, rows and results", ylabel="GFLOP/s")
    for name, configuration in r.configurations.items():
        batches = r.batches(name, "log_prob")
        if not batches:
            continue
        x = [intensity(configuration, batch) for batch in batches]
        y = [r.flop_rate(name, "log_prob", batch) / 1e9 for batch in batches]
        axes.plot(x, y, "-o", color=COLOURS[name], markersize=5, linewidth=1.6, label=name, zorder=3)
        rivals = [r.rival(name, "log_prob", batch) for batch in batches]
        known = [(i, batch / rival.seconds) for i, batch, rival in zip(x, batches, rivals, strict=True) if rival]
        y = [rate * configuration["flops_per_row"] / 1e9 for _, rate in known]
        axes.plot([i for i, _ in known], y, color=COLOURS[name], zorder=2, **PEER_LINE)
    axes.plot([], [], color=GREY, label="fastest peer", **PEER_LINE)
    axes.legend(loc="lower right", title="nvpflow log_prob, one core")
    figure.suptitle(f"{r.document['machine']['cpu']}: batches from 1 row, left, to the largest, right", fontsize=10)
    limits = r.document["limits"].get("1")
    if limits:
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, 0.12), right)
        axes.set_ylim(top=1.5 * max(limits["fma"].values()) / 1e9)
        _ceilings(axes, limits, right)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def batch_curve(r: Results, path: Path) -> None:
    """Rows per second of log_prob against the batch, one panel a configuration."""
    names = [name for name in r.configurations if r.batches(name, "log_prob")]
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        size, hidden = r.configurations[name]["input_size"], r.configurations[name]["hidden_sizes"]
        flows = r.configurations[name]["num_flows"]
        axes.set_title(f"{name}: D={size}, K={flows}, hidden {' '.join(map(str, hidden))}", fontsize=9, loc="left")
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(BATCH_TICKS, [f"{batch:,}" for batch in BATCH_TICKS])
        axes.minorticks_off()
        for peer, (colour, label) in PEER_STYLES.items():
            _curve(axes, r, name, peer, color=colour, linewidth=1.1, markersize=3, label=label)
        _curve(axes, r, name, "nvpflow", color="black", linewidth=2, markersize=4, label="nvpflow")
        isa = r.native_isa()
        if isa and (peak := r.peak(isa)):
            axes.axhline(peak / r.configurations[name]["flops_per_row"], **BOUND)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    handles, texts = grid.flat[0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], **BOUND))
    figure.legend(handles, [*texts, "multiply-add peak"], loc="outside upper center", ncols=4)
    figure.supxlabel("rows per call", fontsize=10)
    figure.supylabel("log_prob, rows per second on one core", fontsize=10)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _curve(axes, r: Results, name: str, contender: str, **style) -> None:
    batches = r.batches(name, "log_prob", contender)
    if batches:
        rates = [r.rows_per_second(name, "log_prob", batch, contender) for batch in batches]
        axes.plot(batches, rates, "-o", **style)


def draw(r: Results, folder: Path) -> None:
    """Write roofline.png and batch_curve.png."""
    with plt.rc_context(STYLE):
        roofline(r, folder / "roofline.png")
        batch_curve(r, folder / "batch_curve.png")
