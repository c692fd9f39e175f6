"""One contender in a process of its own: no library's threads, allocator or settings touch another's timings.

Reads a JSON object per line from stdin and answers with one on stdout. Threads, instruction set and the processors to
run on are set before any library is loaded: the environment by session.py, which starts this, the processors here.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


class Worker:
    """Holds one model of one contender and the call that is being timed."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        self.peer: Any = None
        self.configuration: str | None = None
        self.timed: Any = None

    def prepare(self, configuration: str, op: str, batch: int, seconds: float) -> dict:
        """Build, check, and find out how many calls fill a block of `seconds`."""
        import checks
        from configurations import CONFIGURATIONS, given

        if self.configuration != configuration:
            self.peer, self.configuration = self._class()(CONFIGURATIONS[configuration], self.threads), configuration
        rows = given(CONFIGURATIONS[configuration], batch)
        if op == "train":
            self.timed = self.peer.train(*rows)
        else:
            self.timed = self.peer.call(op, *rows, chunked=self.name.endswith("_chunks"))
        answer = checks.check(self.peer, CONFIGURATIONS[configuration], op, rows, self.timed)
        answer["isa"] = getattr(self.peer, "isa", None)
        return {**answer, "calls": self.timed.calibrate(seconds), "other_maths": self.peer.other_maths}

    def _class(self) -> Any:
        from ours import OURS
        from peers import PEERS

        return {**OURS, **PEERS}[self.name.removesuffix("_chunks")]

    def block(self, calls: int) -> dict:
        return {"seconds": self.timed.block(calls)}

    def singles(self, calls: int) -> dict:
        return {"nanoseconds": self.timed.singles(calls)}

    def cold(self, calls: int) -> dict:
        return {"nanoseconds": self.timed.cold(calls)}


class Machine(Worker):
    """What the contenders are measured against; `read` competes in their rounds."""

    def __init__(self, name: str, threads: int) -> None:
        super().__init__(name, threads)
        from machine import Probe

        self.probe = Probe()

    def limits(self) -> dict:
        from machine import limits

        return limits(self.probe, self.threads)

    def floors(self) -> dict:
        """Seconds of an empty loop, of reading the clock, and of a C function called with a keyword that does nothing.

        str.expandtabs has the calling convention of nvpflow's hot methods (METH_FASTCALL with keywords) and returns at
        once for an empty string: no call through the binding can take less.
        """
        from timing import Call

        def best(statement: str, **names: Any) -> float:
            call = Call(statement, names)
            return min(call.block(20_000) for _ in range(30))

        loop = best("pass")
        clock = sorted(Call("pass").singles(20_000))[10_000] * 1e-9
        return {"loop": loop, "clock": clock, "call": best("text.expandtabs(tabsize=8)", text="") - loop}

    def prepare_read(self, size: int, seconds: float) -> dict:
        from timing import Function

        read = self.probe.reader(size)
        self.timed = Function(seconds_per_call=read, result=None)
        return {"calls": self.timed.calibrate(seconds)}


def _failure(error: BaseException) -> dict:
    if isinstance(error, ImportError) and error.name:
        return {"failure": f"{error.name} is not installed", "missing": True}
    lines = str(error).strip().splitlines() or [""]
    return {"failure": f"{type(error).__name__}: {lines[0]}"[:300]}


def main() -> None:
    name, threads, processors = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
    # Libraries print what they like: the protocol keeps the pipe, and descriptor 1 becomes stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = (Machine if name == "machine" else Worker)(name, threads)
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = _failure(error)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
