"""The README's table on speed and the tables of python/docs/benchmarks.md, from the results of bench.py.

python tests/bench/report.py results.json              # prints them
python tests/bench/report.py results.json --write      # puts them between the markers in both files
python tests/bench/report.py results.json --check      # tells, by its exit status, whether both files have them

A to E are a section of the page and the README's table; flows of splines and all others have sections of their own on
the page. Results write what they have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tables
from peers import COMPILED, TORCH_FLOW_LIBRARIES
from results import Results

Rivals = Mapping[str, Sequence[str] | None]
ROOT = Path(__file__).resolve().parent.parent.parent
README, PAGE = ROOT / "README.md", ROOT / "python/docs/benchmarks.md"
SPEED, GENERAL, SPLINES = (
    tuple(f"<!-- {name}:{end} -->" for end in ("begin", "end")) for name in ("speed", "general", "splines")
)
# Whom a table shows beside nvpflow: the fastest of all, or of those named.
EVERYONE: Rivals = {"fastest peer": None}
GENERAL_RIVALS: Rivals = {"fastest PyTorch library": TORCH_FLOW_LIBRARIES, "fastest compiled peer": COMPILED}
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
    "freia": "FrEIA",
}


def _name(contender: str) -> str:
    peer = contender.removesuffix("_chunks")
    return PEER_NAMES.get(peer, peer) + (" in chunks of 1,024" if contender.endswith("_chunks") else "")


def _rival(r: Results, name: str, op: str, batch: int, among: Sequence[str] | None = None) -> tuple[str, float | None]:
    rival = r.rival(name, op, batch, among)
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


def many_rows(r: Results, op: str = "log_prob", rivals: Rivals = EVERYONE) -> str:
    rows = []
    for name in r.configurations:
        for batch in (MIDDLE_BATCH, *LARGE_BATCHES):
            if r.seconds(name, op, batch) is None:
                continue
            ours = tables.rate(r.rows_per_second(name, op, batch))
            share = tables.percent(r.peak_fraction(name, op, batch))
            found = [_rival(r, name, op, batch, among) for among in rivals.values()]
            theirs = [f"{tables.rate(seconds and batch / seconds)} ({peer})" for peer, seconds in found]
            rows.append([f"{name}, {batch:,}", ours, share, *theirs])
    return tables.table(["rows at once", "nvpflow", "of FMA peak", *rivals], rows)


def training(r: Results, rivals: Rivals = EVERYONE) -> str:
    rows = []
    for name in r.configurations:
        for batch in r.batches(name, "train"):
            ours = tables.time(r.seconds(name, "train", batch))
            share = tables.percent(r.peak_fraction(name, "train", batch))
            found = [_rival(r, name, "train", batch, among) for among in rivals.values()]
            rows.append([f"{name}, {batch:,}", ours, share, *(f"{tables.time(s)} ({peer})" for peer, s in found)])
    return tables.table(["training step", "nvpflow", "of FMA peak", *rivals], rows)


def masks(r: Results) -> str:
    """Random masks beside halves, which were measured in the same cells."""
    rows = []
    for name in r.configurations:
        for op in ("log_prob", "inverse", "train"):
            for batch in r.batches(name, op, "nvpflow_halves"):
                random, halves = (r.seconds(name, op, batch, who) for who in ("nvpflow", "nvpflow_halves"))
                rows.append([f"{op}, {batch:,}", *map(tables.time, (random, halves)), f"{random / halves:.2f}"])
    return tables.table(["rows at once", "random masks", "halves", "ratio"], rows)


def models(r: Results) -> str:
    rows = [
        [name, f"{c['input_size']}", f"{c['num_flows']}", f"{c['hidden_sizes']}"]
        for name, c in r.configurations.items()
    ]
    return tables.table(["model", "columns", "couplings", "hidden layers"], rows)


def general_models(r: Results) -> str:
    rows = [
        [name, f"{c['context_size']}", f"{c['flops_per_row'] / 1e3:.0f}", f"`{c['expression']}`"]
        for name, c in r.configurations.items()
    ]
    return tables.table(["model", "context", "kFLOP a row", "built by"], rows)


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
        SPEED[0],
        f"Median time of one call of `flow.log_probability(x, out=out)` on one core of\n{_processor(r)}.\n{_quick(r)}",
        tables.table(header, rows) + "\n",
        SPEED[1],
    ]
    return "\n".join(parts)


def _machine(r: Results) -> str:
    limits = r.document["limits"].get("1")
    isa = r.native_isa()
    lines = [f"Processor: {_processor(r)}", f"Date: {r.document['date']}"]
    if limits and isa:
        lines.append(f"Multiply-add peak of one core, measured: {limits['fma'][isa] / 1e9:.0f} GFLOP/s")
    return _list(lines)


def _versions_and_command(r: Results) -> list[str]:
    versions = [f"{name} {version}" for name, version in r.document["versions"].items()]
    return ["The versions are:\n", _list(versions) + "\n", f"Command: `{r.document['command']}`"]


def section(r: Results) -> str:
    """The page's tables on A to E, with the markers."""
    parts = [
        SPEED[0],
        f"The times are medians on one core.\nThe flows are float32 with relu.\n{_quick(r)}",
        _machine(r) + "\n",
        models(r) + "\n",
        "The first table has one row through Python, `flow.log_probability(x, out=out)`.\n"
        "Its medians come from blocks of calls; p99 and cold come from calls timed one at a time.\n"
        "Before each cold call 16 MiB are read.\n",
        one_row(r) + "\n",
        "The second table has many rows, `log_probability`, in rows per second.\n",
        many_rows(r) + "\n",
        "The third table has one training step, gradient and Adam, at a batch size.\n",
        training(r) + "\n",
        *_versions_and_command(r),
        SPEED[1],
    ]
    return "\n".join(parts)


def general_section(r: Results, markers: tuple[str, str]) -> str:
    """The page's tables on the other flows, with the markers."""
    flows = r.only(lambda c: c["mask"] != "random")
    parts = [
        markers[0],
        f"The times are medians on one core.\nThe flows are float32.\n{_quick(r)}",
        _machine(r) + "\n",
        general_models(r) + "\n",
        "One row through Python:\n",
        one_row(flows) + "\n",
        "Many rows, `log_probability`, in rows per second:\n",
        many_rows(flows, rivals=GENERAL_RIVALS) + "\n",
        "Many rows, `inverse`, which is sampling without drawing the noise:\n",
        many_rows(flows, "inverse", GENERAL_RIVALS) + "\n",
        "One training step:\n",
        training(flows, GENERAL_RIVALS) + "\n",
    ]
    if flows.configurations != r.configurations:
        parts += ["Random masks, in turns with halves of the same sizes:\n", masks(r) + "\n"]
    return "\n".join([*parts, *_versions_and_command(r), markers[1]])


def _group(configuration: dict) -> tuple[str, str]:
    """The markers of the section of a configuration."""
    if configuration.get("plain", True):
        return SPEED
    return SPLINES if configuration.get("num_bins", 0) else GENERAL


def sections(r: Results, readme: Path, page: Path) -> list[tuple[Path, tuple[str, str], str]]:
    """What results have to say: a file, the markers in it, and what stands between them."""
    of_group = {group: r.only(lambda c, group=group: _group(c) == group) for group in (SPEED, GENERAL, SPLINES)}
    found = []
    if (plain := of_group.pop(SPEED)).configurations:
        found += [(readme, SPEED, summary(plain)), (page, SPEED, section(plain))]
    found += [(page, group, general_section(some, group)) for group, some in of_group.items() if some.configurations]
    return found


def replaced(text: str, markers: tuple[str, str], new: str) -> str:
    """A text with the section between its markers replaced."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} and one {end} after it")
    return text[: text.index(begin)] + new + text[text.index(end) + len(end) :]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=PAGE)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="replace the sections in the README and the page")
    action.add_argument("--check", action="store_true", help="exit with 1 if a section differs")
    options = parser.parse_args(arguments)
    found = sections(Results.read(options.results), options.readme, options.page)
    if not (options.write or options.check):
        print("\n\n".join(new for _, _, new in found))
        return 0
    differs = False
    for path, markers, new in found:
        text = path.read_text(encoding="utf-8")
        try:
            wanted = replaced(text, markers, new)
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        if options.write:
            path.write_text(wanted, encoding="utf-8")
        elif text != wanted:
            print(f"{path}: the section of {markers[0]} is not what {options.results} gives", file=sys.stderr)
            differs = True
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
