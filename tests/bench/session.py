"""Runs contenders side by side: who takes part in what, in which order, how often."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configurations import CONFIGURATIONS, Configuration
from ours import OURS, Nvpflow
from peers import CHUNK, PEERS
from timing import summary, summary_of_singles

INFERENCE_OPS = ("log_prob", "inverse", "forward")
# torch.compile takes up to half a minute for a shape.
BATCHES_OF_SLOW_BUILDERS = (1, 64, 1024, 65536)
LARGE_BATCH = 1024
ANSWER_SECONDS = 900


@dataclass(frozen=True)
class Settings:
    """How long to look. A block is a loop of calls; each contender runs one block a round."""

    block_seconds: float
    rounds: int
    most_seconds: float  # of one contender in one cell, beyond which there are fewer rounds
    fewest_rounds: int
    most_flops: float  # of a call: larger ones take seconds and tell nothing that a smaller batch does not
    singles: int  # calls timed one by one
    cold: int


FULL = Settings(
    block_seconds=0.02, rounds=15, fewest_rounds=3, most_seconds=10, most_flops=200e9, singles=100_000, cold=500
)
QUICK = Settings(
    block_seconds=0.005, rounds=3, fewest_rounds=1, most_seconds=0.3, most_flops=20e9, singles=2_000, cold=30
)


class ContenderError(RuntimeError):
    """A contender could not do what it was asked; `missing` if its library is not installed."""

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class Contender:
    """A worker process: a peer by its name, "nvpflow_avx2" for a forced instruction set, "machine" for the probe."""

    def __init__(self, label: str, threads: int, processors: list[int]) -> None:
        self.label = label
        self.isa = label.removeprefix("nvpflow_") if label.startswith("nvpflow_") and label not in OURS else None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        environment = {k: v for k, v in os.environ.items() if k != "NVPFLOW_ISA"}
        if self.isa:
            environment["NVPFLOW_ISA"] = self.isa
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[variable] = str(threads)
        name = "nvpflow" if self.isa else label
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), name, str(threads), json.dumps(processors)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **arguments: Any) -> dict:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderError(self._last_words()) from None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        if not ready:
            self._process.kill()
            raise ContenderError(f"no answer within {ANSWER_SECONDS} s")
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(self._last_words())
        answer = json.loads(line)
        if "failure" in answer:
            raise ContenderError(answer["failure"], answer.get("missing", False))
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"the process ended with status {status}: {lines[-1] if lines else 'it said nothing'}"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        if self.alive:
            self._process.communicate()  # closes its stdin, which ends it
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Cell:
    """One model, one operation, one batch size: what contenders are compared in."""

    configuration: str
    op: str
    batch: int

    @property
    def flops(self) -> int:
        return CONFIGURATIONS[self.configuration].flops(self.op, self.batch)


def cells(names: Iterable[str], ops: Iterable[str], batches: Iterable[int], train: Iterable[int]) -> list[Cell]:
    """Every cell asked for; under one context for all rows nothing trains."""
    return [
        Cell(name, op, batch)
        for name in names
        for op in ops
        for batch in sorted(train if op == "train" else batches)
        if op != "train" or not CONFIGURATIONS[name].one_context
    ]


def takes_part(label: str, cell: Cell) -> bool:
    """Whether a contender has something to say in a cell."""
    if label == "machine":
        return (cell.op, cell.batch) == ("log_prob", 1)
    if label == "nvpflow_new_array":
        return (cell.op, cell.batch) == ("log_prob", 1)
    if label == "nvpflow_float64":
        return cell.op == "log_prob" and cell.batch >= LARGE_BATCH
    if label == "nvpflow_torch":
        return cell.op == "train"
    if label == "nvpflow_jax":
        return cell.op == "train" or cell.batch in BATCHES_OF_SLOW_BUILDERS
    peer = {**OURS, **PEERS}.get(label.removesuffix("_chunks"), Nvpflow)  # a forced instruction set has no entry
    if not peer.holds(CONFIGURATIONS[cell.configuration]):
        return False
    if label.startswith("nvpflow"):
        return cell.op != "train" or peer.can_train
    if cell.op == "train":
        return peer.can_train and not label.endswith("_chunks")
    if label.endswith("_chunks") and cell.batch <= CHUNK:
        return False
    return not peer.slow_to_build or cell.batch in BATCHES_OF_SLOW_BUILDERS


def labels(peers: Iterable[str], isas: Iterable[str]) -> list[str]:
    """The contenders of a session, ours first."""
    forced = [f"nvpflow_{isa}" for isa in isas if isa != "native"]
    ours = [*OURS, *forced] if "native" in isas else forced
    peers = list(peers)
    return ["machine", *ours, *peers, *(f"{peer}_chunks" for peer in peers if PEERS[peer].chunks)]


def processors() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


class Session:
    """All contenders on the same processors, one at a time."""

    def __init__(self, wanted: list[str], threads: int, settings: Settings, say: Callable[[str], None]) -> None:
        self.threads, self.settings, self.say = threads, settings, say
        # The last processors: the first ones serve most interrupts.
        self.processors = processors()[-threads:]
        self.contenders = {label: Contender(label, threads, self.processors) for label in wanted}
        self.skipped: list[dict] = []
        self.records: list[dict] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for contender in self.contenders.values():
            contender.close()

    def machine(self) -> dict | None:
        """The machine's limits now; None, said once, where they cannot be measured."""
        if "machine" not in self.contenders:
            return None
        try:
            return {**self.contenders["machine"].ask("limits"), "floors": self.contenders["machine"].ask("floors")}
        except ContenderError as error:
            self._skip("machine", None, error, for_good=True)
            return None

    def run(self, cell: Cell) -> None:
        """Prepare and check everyone, then time them in rounds."""
        calls = {}
        for label in [label for label in self.contenders if takes_part(label, cell)]:
            try:
                calls[label] = self._prepare(label, cell)
            except ContenderError as error:
                self._skip(label, cell, error, for_good=error.missing or not self.contenders[label].alive)
        samples = self._rounds(calls, cell)
        for label, seconds in samples.items():
            prepared = {k: v for k, v in calls[label].items() if k != "calls"}
            record = {"configuration": cell.configuration, "op": cell.op, "batch": cell.batch, "contender": label}
            record |= {"threads": self.threads, **prepared, "seconds": summary(seconds)}
            self.records.append(record)
            if (cell.op, cell.batch) == ("log_prob", 1) and label != "machine":
                try:
                    record |= self._one_by_one(label, record["seconds"]["median"])
                except ContenderError as error:
                    self._skip(label, cell, error, for_good=True)

    def _prepare(self, label: str, cell: Cell) -> dict:
        contender, seconds = self.contenders[label], self.settings.block_seconds
        if label == "machine":
            return contender.ask("prepare_read", size=CONFIGURATIONS[cell.configuration].weight_bytes, seconds=seconds)
        return contender.ask("prepare", configuration=cell.configuration, op=cell.op, batch=cell.batch, seconds=seconds)

    def _rounds(self, calls: dict[str, dict], cell: Cell) -> dict[str, list[float]]:
        """Blocks of everyone in turn, in another order each round: what the machine does besides hits all alike."""
        samples: dict[str, list[float]] = {label: [] for label in calls}
        spent = dict.fromkeys(calls, 0.0)
        order = random.Random(0)
        limit = self.settings
        for done in range(limit.rounds):
            going = [c for c in samples if done < limit.fewest_rounds or spent[c] < limit.most_seconds]
            order.shuffle(going)
            for label in going:
                try:
                    seconds = self.contenders[label].ask("block", calls=calls[label]["calls"])["seconds"]
                except ContenderError as error:
                    self._skip(label, cell, error, for_good=True)
                    del samples[label]
                    continue
                samples[label].append(seconds)
                spent[label] += seconds * calls[label]["calls"]
        return samples

    def _one_by_one(self, label: str, median: float) -> dict:
        """Percentiles of single calls: as many as asked for, or as many as go into ten seconds, of peers into two."""
        contender, settings = self.contenders[label], self.settings
        seconds = 10 if label.startswith("nvpflow") else 2
        calls = min(settings.singles, max(1_000, round(seconds / median)))
        parts = 10
        single = [ns for _ in range(parts) for ns in contender.ask("singles", calls=calls // parts)["nanoseconds"]]
        cold = contender.ask("cold", calls=settings.cold)["nanoseconds"]
        return {"single": summary_of_singles(single), "cold": summary_of_singles(cold)}

    def _skip(self, label: str, cell: Cell | None, error: ContenderError, for_good: bool) -> None:
        where = "" if cell is None else f" {cell.configuration} {cell.op} {cell.batch}"
        self.say(f"skipped: {label}{where}: {error}")
        entry = {"contender": label, "threads": self.threads, "reason": str(error)}
        if cell is not None and not error.missing:
            entry |= {"configuration": cell.configuration, "op": cell.op, "batch": cell.batch}
        self.skipped.append(entry)
        if for_good:
            self.contenders.pop(label).close()


def describe(configuration: Configuration) -> dict:
    """What the results say about a configuration."""
    return {
        **{name: value for name, value in asdict(configuration).items() if name != "name"},
        "plain": configuration.plain,
        "expression": configuration.expression,
        "flops_per_row": configuration.flops_per_row,
        "weight_bytes": configuration.weight_bytes,
    }
