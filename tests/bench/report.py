"""The README's table on speed and the tables of python/docs/benchmarks.md, from the results of bench.py.

python tests/bench/report.py results.json              # prints them
python tests/bench/report.py results.json --write      # puts them between the markers in both files
python tests/bench/report.py results.json --check      # tells, by its exit status, whether both files have them
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import tables
from results import Results

ROOT = Path(__file__).resolve().parent.parent.parent
README, PAGE = ROOT / "README.md", ROOT / "python/docs/benchmarks.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
LARGE_BATCHES = (1024, 65_536)
MIDDLE_BATCH = 16  # between the single row and the large batches
PEER_NAMES = {
    "numpy": "NumPy",
    "torch_eager": "PyTorch",
    "torch_fused": "PyTorch, one head matrix",
    "torch_compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_bound": "ONNX Runtime, I/O binding",
    "openvino": "OpenVINO",
    "jax": "JAX jit",
}


def _name(contender: str) -> str:
    peer = contender.removesuffix("_chunks")
    return PEER_NAMES.get(peer, peer) + (" in chunks of 1,024" if contender.endswith("_chunks") else "")


def _rival(r: Results, name: str, op: str, batch: int) -> tuple[str, float | None]:
    rival = r.rival(name, op, batch)
    return (_name(rival.name), rival.seconds) if rival else ("-", None)


def one_row(r: Results) -> str:
    rows = []
    for name in r.configurations:
        peer, seconds = _rival(r, name, "log_prob", 1)
        eager = r.seconds(name, "log_prob", 1, "torch_eager")
        cells = [
            r.seconds(name, "log_prob", 1),
            r.percentile(name, "p99"),
            r.percentile(name, "median", cold=True),
            seconds,
            eager,
        ]
        shown = [tables.time(cell) for cell in cells]
        rows.append([name, *shown[:3], f"{shown[3]} ({peer})", shown[4]])
    return tables.table(["one row", "nvpflow", "p99", "cold", "fastest peer", "PyTorch eager"], rows)


def many_rows(r: Results) -> str:
    rows = []
    for name in r.configurations:
        for batch in (MIDDLE_BATCH, *LARGE_BATCHES):
            if r.seconds(name, "log_prob", batch) is None:
                continue
            peer, seconds = _rival(r, name, "log_prob", batch)
            ours = tables.rate(r.rows_per_second(name, "log_prob", batch))
            share = tables.percent(r.peak_fraction(name, "log_prob", batch))
            rows.append([f"{name}, {batch:,}", ours, share, f"{tables.rate(seconds and batch / seconds)} ({peer})"])
    return tables.table(["rows at once", "nvpflow", "of FMA peak", "fastest peer"], rows)


def training(r: Results) -> str:
    rows = []
    for name in r.configurations:
        for batch in r.batches(name, "train"):
            peer, seconds = _rival(r, name, "train", batch)
            ours = tables.time(r.seconds(name, "train", batch))
            share = tables.percent(r.peak_fraction(name, "train", batch))
            rows.append([f"{name}, {batch:,}", ours, share, f"{tables.time(seconds)} ({peer})"])
    return tables.table(["training step", "nvpflow", "of FMA peak", "fastest peer"], rows)


def models(r: Results) -> str:
    rows = [
        [name, f"{c['input_size']}", f"{c['num_flows']}", f"{c['hidden_sizes']}"]
        for name, c in r.configurations.items()
    ]
    return tables.table(["model", "columns", "couplings", "hidden layers"], rows)


def _processor(r: Results) -> str:
    machine = r.document["machine"]
    virtual = f", under {machine['virtual']}" if machine["virtual"] else ""
    return f"{machine['cpu']} ({machine['family']}{virtual}), {r.native_isa()}"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _quick(r: Results) -> str:
    return "With `--quick`: these figures show that it runs, not how fast.\n" if r.document["quick"] else ""


def summary(r: Results) -> str:
    """The README's table, with the markers: medians of calls in blocks, so that all columns can be compared."""
    batch = LARGE_BATCHES[0]
    rows = []
    for name, c in r.configurations.items():
        cells = [name, f"{c['input_size']}, {c['num_flows']}, {c['hidden_sizes']}"]
        for count in (1, batch):
            peer, seconds = _rival(r, name, "log_prob", count)
            cells += [tables.time(r.seconds(name, "log_prob", count)), f"{tables.time(seconds)} ({peer})"]
        rows.append(cells)
    header = ["model", "columns, couplings, hidden", "one row", "fastest peer", f"{batch:,} rows", "fastest peer"]
    parts = [
        BEGIN,
        f"Median time of one call of `flow.log_probability(x, out=out)` on one core of\n{_processor(r)}.\n{_quick(r)}",
        tables.table(header, rows) + "\n",
        END,
    ]
    return "\n".join(parts)


def section(r: Results) -> str:
    """The page's tables, with the markers."""
    document = r.document
    limits = document["limits"].get("1")
    isa = r.native_isa()
    machine = [f"Processor: {_processor(r)}", f"Date: {document['date']}"]
    if limits and isa:
        machine.append(f"Multiply-add peak of one core, measured: {limits['fma'][isa] / 1e9:.0f} GFLOP/s")
    versions = [f"{name} {version}" for name, version in document["versions"].items()]
    parts = [
        BEGIN,
        f"The times are medians on one core.\nThe flows are float32 with relu.\n{_quick(r)}",
        _list(machine) + "\n",
        models(r) + "\n",
        "The first table has one row through Python, `flow.log_probability(x, out=out)`.\n"
        "Its medians come from blocks of calls; p99 and cold come from calls timed one at a time.\n"
        "Before each cold call 16 MiB are read.\n",
        one_row(r) + "\n",
        "The second table has many rows, `log_probability`, in rows per second.\n",
        many_rows(r) + "\n",
        "The third table has one training step, gradient and Adam, at a batch size.\n",
        training(r) + "\n",
        "The versions are:\n",
        _list(versions) + "\n",
        f"Command: `{document['command']}`",
        END,
    ]
    return "\n".join(parts)


def replaced(text: str, new: str) -> str:
    """A text with the section between its markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and one {END} after it")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=PAGE)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="replace the sections in the README and the page")
    action.add_argument("--check", action="store_true", help="exit with 1 if a section differs")
    options = parser.parse_args(arguments)
    results = Results.read(options.results)
    sections = {options.readme: summary(results), options.page: section(results)}
    if not (options.write or options.check):
        print("\n\n".join(sections.values()))
        return 0
    differs = False
    for path, new in sections.items():
        text = path.read_text(encoding="utf-8")
        try:
            wanted = replaced(text, new)
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        if options.write:
            path.write_text(wanted, encoding="utf-8")
        elif text != wanted:
            print(f"{path}: the speed section is not what {options.results} gives", file=sys.stderr)
            differs = True
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
