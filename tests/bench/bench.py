"""Measure nvpflow beside what else there is, and against what the machine can do.

    python tests/bench/bench.py                                          # everything, for an hour or two
    python tests/bench/bench.py --configs A,B --ops log_prob --batches 1,1024 --quick
    python tests/bench/bench.py --threads 1,2 --isa native,avx2 --peers none --json out.json --plots pictures

Every contender is a process of its own on the same processors. In each cell (configuration, operation, batch) all are
checked, then timed in turn, block by block, so that whatever else the machine does hits all alike. Peers that are not
installed are skipped by name; `pip install ".[bench]"` installs them.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import machine
import tables
from configurations import CONFIGURATIONS
from peers import PACKAGES, PEERS
from results import FORMAT, Results
from session import FULL, INFERENCE_OPS, QUICK, Cell, Session, cells, describe, labels, processors


def _names(known: list[str]):
    """A parser of comma-separated names that must be among `known`."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(known)}")
        return found

    return parse


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("expected numbers from 1")
    return found


def _peers(text: str) -> list[str]:
    return {"all": list(PEERS), "none": []}[text] if text in ("all", "none") else _names(list(PEERS))(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configs", type=_names(list(CONFIGURATIONS)), default=list(CONFIGURATIONS), metavar="A,B,...")
    add("--ops", type=_names([*INFERENCE_OPS, "train"]), default=[*INFERENCE_OPS, "train"], metavar="OP,...")
    add("--batches", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64, 1024, 65_536], metavar="N,...")
    add("--train-batches", type=_numbers, default=[256, 4096], metavar="N,...")
    add("--threads", type=_numbers, default=[1], metavar="N,...", help="each number is measured by itself")
    isas = ["native", "avx512", "avx2", "baseline", "neon"]
    add("--isa", type=_names(isas), default=["native"], metavar="ISA,...", help=f"of {', '.join(isas)}")
    add("--peers", type=_peers, default=list(PEERS), metavar="all|none|NAME,...", help=f"of {', '.join(PEERS)}")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--plots", type=Path, metavar="FOLDER", help="draw the roofline and the batch curve there")
    add("--quick", action="store_true", help="a few blocks of each: shows that it runs, not how fast")
    options = parser.parse_args(arguments)
    if max(options.threads) > (available := len(processors())):
        parser.error(f"--threads {max(options.threads)}: this process may use {available} processors")
    return options


def best_limits(before: dict | None, after: dict | None) -> dict | None:
    """The better of two measurements, number by number: other processes can only take away."""
    if before is None or after is None:
        return before or after
    return {
        "fma": {isa: max(value, after["fma"][isa]) for isa, value in before["fma"].items()},
        "read": {
            level: {"bytes": found["bytes"], "rate": max(found["rate"], after["read"][level]["rate"])}
            for level, found in before["read"].items()
        },
        "floors": {name: min(value, after["floors"][name]) for name, value in before["floors"].items()},
    }


def run_session(session: Session, planned: list[Cell], document: dict) -> bool:
    """Run all cells between two looks at the machine's limits; False if Ctrl-C ended it, and nothing is lost."""
    before = session.machine()
    after = None
    try:
        for cell in planned:
            session.run(cell)
            session.say(f"{cell.configuration} {cell.op} {cell.batch:,}, {session.threads} thread(s)")
        after = session.machine() if before else None
    except KeyboardInterrupt:
        return False
    finally:
        if limits := best_limits(before, after):
            document["limits"][str(session.threads)] = limits
    return True


def measure(options: argparse.Namespace) -> dict:
    """Run all sessions; the document that goes into the JSON file."""

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.0f} s] {text}", file=sys.stderr, flush=True)

    start = time.monotonic()
    document = {
        "format": FORMAT,
        "command": " ".join(["python tests/bench/bench.py", *options.command]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": options.quick,
        "machine": machine.describe(),
        "versions": machine.versions(PACKAGES),
        "configurations": {name: describe(CONFIGURATIONS[name]) for name in options.configs},
        "limits": {},
        "records": [],
        "skipped": [],
    }
    settings = QUICK if options.quick else FULL
    every = cells(options.configs, options.ops, options.batches, options.train_batches)
    planned = [cell for cell in every if cell.flops <= settings.most_flops]
    for cell in every:
        if cell not in planned:
            say(f"left out: {cell.configuration} {cell.op} {cell.batch}: {cell.flops / 1e9:.0f} GFLOP a call")
    for threads in options.threads:
        with Session(labels(options.peers, options.isa), threads, settings, say) as session:
            finished = run_session(session, planned, document)
        document["records"] += session.records
        document["skipped"] += session.skipped
        if not finished:
            say("interrupted: the results are what was measured until now")
            break
    return document


def without_files(arguments: list[str]) -> list[str]:
    """What was measured, without where it was written."""
    kept, places = [], ("--json", "--plots")
    for i, word in enumerate(arguments):
        if not word.startswith(places) and (i == 0 or arguments[i - 1] not in places):
            kept.append(word)
    return kept


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.command = without_files(sys.argv[1:] if arguments is None else arguments)
    document = measure(options)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    results = Results(document)
    print(tables.everything(results))
    if options.plots:
        import plots

        options.plots.mkdir(parents=True, exist_ok=True)
        plots.draw(results, options.plots)
    if not any(record["contender"].startswith("nvpflow") for record in document["records"]):
        print("nvpflow itself was not measured: see what was skipped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # As Ctrl-C, after which the results until then are written; what a shell puts in the background has none.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
