"""Timing one call: in blocks, one at a time, and cold."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Between cold calls this much is read, as a program does that has other work to do.
COLD_BYTES = 16 << 20

# The statement is compiled into the loops, so that a call is timed as a user writes it, without a wrapper around it.
_LOOPS = """
def block(calls, clock):
    counter = repeat(None, calls)
    start = clock()
    for _ in counter:
        {statement}
    return clock() - start

def singles(calls, clock, between):
    times = []
    for _ in repeat(None, calls):
        between()
        start = clock()
        {statement}
        times.append(clock() - start)
    return times
"""


@dataclass
class Call:
    """A statement and the names it uses; `result` evaluates it once and returns the arrays to check."""

    statement: str
    names: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from itertools import repeat

        scope = {**self.names, "repeat": repeat}
        exec(textwrap.dedent(_LOOPS).format(statement=self.statement), scope)
        self._block, self._singles = scope["block"], scope["singles"]

    def result(self) -> Any:
        return eval(self.statement, dict(self.names))

    def block(self, calls: int) -> float:
        """Seconds of a call, the mean of `calls` of them, after some to warm up; a long call needs none."""
        if calls > 1:
            self._block(max(1, calls // 10), time.perf_counter)
        return self._block(calls, time.perf_counter) / calls

    def calibrate(self, seconds: float) -> int:
        """How many calls take about `seconds`."""
        calls = 1
        while True:
            elapsed = self._block(calls, time.perf_counter)
            if elapsed >= seconds / 2:
                return max(1, round(calls * seconds / elapsed))
            calls *= 4

    def singles(self, calls: int) -> list[int]:
        """Nanoseconds of each of `calls` calls, the clock's own cost included."""
        self._singles(calls // 10 + 1, time.perf_counter_ns, lambda: None)
        return self._singles(calls, time.perf_counter_ns, lambda: None)

    def cold(self, calls: int) -> list[int]:
        """The same with 16 MiB read before each call. NumPy reads them, which keeps its own code warm."""
        other_data = np.ones(COLD_BYTES // 4, np.float32)
        self._singles(1, time.perf_counter_ns, other_data.sum)
        return self._singles(calls, time.perf_counter_ns, other_data.sum)


@dataclass
class Function:
    """A contender that times itself: `seconds_per_call` runs a number of calls and returns the seconds of one."""

    seconds_per_call: Any
    result: Any

    def block(self, calls: int) -> float:
        return self.seconds_per_call(calls)

    def calibrate(self, seconds: float) -> int:
        """By the clock on the wall: what `seconds_per_call` says may be a difference, and small."""
        calls = 1
        while True:
            start = time.perf_counter()
            self.seconds_per_call(calls)
            elapsed = time.perf_counter() - start
            if elapsed >= seconds / 2:
                return max(1, round(calls * seconds / elapsed))
            calls *= 4


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread; `samples` is the number of blocks or calls that they are taken over."""
    p10, median, p90 = np.percentile(seconds, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "samples": len(seconds)}


def summary_of_singles(nanoseconds: Sequence[int]) -> dict[str, float]:
    times = np.asarray(nanoseconds) * 1e-9
    return {**summary(times), "p99": float(np.percentile(times, 99))}
