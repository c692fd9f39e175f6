"""Questions to a benchmark's results: the tables, pictures, targets and the README ask here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
TRAINING_FLOPS_FACTOR = 3


@dataclass(frozen=True)
class Rival:
    """The fastest peer of a cell and its seconds."""

    name: str
    seconds: float
    other_maths: bool


class Results:
    """The JSON of bench.py. Answers are None where something has not been measured."""

    def __init__(self, document: dict) -> None:
        if document.get("format") != FORMAT:
            raise ValueError(f"the results have format {document.get('format')!r}, this script reads {FORMAT}")
        self.document = document
        self.configurations: dict[str, dict] = document["configurations"]
        self._records = {self._key(r): r for r in document["records"]}

    @classmethod
    def read(cls, path: Path) -> Results:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def only(self, wanted: Callable[[dict], bool]) -> Results:
        """The same results with those of their configurations that are wanted."""
        kept = {name: c for name, c in self.configurations.items() if wanted(c)}
        return Results({**self.document, "configurations": kept})

    @staticmethod
    def _key(record: dict) -> tuple:
        return tuple(record[k] for k in ("configuration", "op", "batch", "contender", "threads"))

    def record(self, name: str, op: str, batch: int, contender: str = "nvpflow", threads: int = 1) -> dict | None:
        return self._records.get((name, op, batch, contender, threads))

    def seconds(self, name: str, op: str, batch: int, contender: str = "nvpflow", threads: int = 1) -> float | None:
        record = self.record(name, op, batch, contender, threads)
        return record and record["seconds"]["median"]

    def rows_per_second(self, name: str, op: str, batch: int, contender: str = "nvpflow", threads: int = 1):
        seconds = self.seconds(name, op, batch, contender, threads)
        return seconds and batch / seconds

    def percentile(self, name: str, which: str, contender: str = "nvpflow", cold: bool = False) -> float | None:
        """Of single log_prob calls of one row."""
        record = self.record(name, "log_prob", 1, contender) or {}
        return record.get("cold" if cold else "single", {}).get(which)

    def batches(self, name: str, op: str, contender: str = "nvpflow", threads: int = 1) -> list[int]:
        keys = self._records
        return sorted(k[2] for k in keys if (k[0], k[1], k[3], k[4]) == (name, op, contender, threads))

    def contenders(self, name: str, op: str, batch: int, threads: int = 1) -> list[str]:
        return [k[3] for k in self._records if (k[0], k[1], k[2], k[4]) == (name, op, batch, threads)]

    def rival(self, name: str, op: str, batch: int, among: Any = None, threads: int = 1) -> Rival | None:
        """The fastest peer, or the fastest of those named in `among`; chunked variants count."""
        times = []
        for contender in self.contenders(name, op, batch, threads):
            if contender == "machine" or contender.startswith("nvpflow") or (among and contender not in among):
                continue
            record = self.record(name, op, batch, contender, threads)
            times.append((record["seconds"]["median"], contender, record.get("other_maths", False)))
        if not times:
            return None
        seconds, contender, other_maths = min(times)
        return Rival(contender, seconds, other_maths)

    def lead(self, name: str, op: str, batch: int, among: Any = None) -> float | None:
        """How many times faster nvpflow is than the fastest peer."""
        ours, rival = self.seconds(name, op, batch), self.rival(name, op, batch, among)
        return rival.seconds / ours if ours and rival else None

    def flop_rate(self, name: str, op: str, batch: int, contender: str = "nvpflow", threads: int = 1) -> float | None:
        rate = self.rows_per_second(name, op, batch, contender, threads)
        factor = TRAINING_FLOPS_FACTOR if op == "train" else 1
        return rate and rate * factor * self.configurations[name]["flops_per_row"]

    def peak(self, isa: str, threads: int = 1) -> float | None:
        limits = self.document["limits"].get(str(threads))
        return limits and limits["fma"].get(isa)

    def peak_fraction(self, name: str, op: str, batch: int, contender: str = "nvpflow", threads: int = 1):
        """Share of the multiply-add peak of the instruction set that the contender ran on."""
        record = self.record(name, op, batch, contender, threads)
        peak = record and self.peak(record["isa"], threads)
        return peak and self.flop_rate(name, op, batch, contender, threads) / peak

    def native_isa(self) -> str | None:
        return next((r["isa"] for r in self.document["records"] if r["contender"] == "nvpflow"), None)
