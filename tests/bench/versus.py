"""Compare two builds of nvpflow side by side: python tests/bench/versus.py OLD_PYTHON NEW_PYTHON

Each argument is the interpreter of an environment in which one build is installed. A worker process of each lives for
the whole run. For every cell the two are timed in turn, a slice each, in an order that alternates, so that what the
machine does to one it does to both. The ratio is new / old: the median over the rounds, with the quartiles.
A train cell is an epoch of about 8,192 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from configurations import CONFIGURATIONS

WORKER = r"""
import inspect, json, sys, time
import numpy as np, nvpflow
try:
    from nvpflow.layers import *
except ImportError:  # a build from before there were layers
    pass

EPOCHS = 5

def timed(call, seconds):
    spent, calls, begin = 0.0, 0, time.perf_counter()
    while time.perf_counter() - begin < seconds or calls == 0:
        spent += call()
        calls += 1
    return spent / calls

def once(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin

def many(call, count):
    return lambda: once(lambda: [call() for _ in range(count)]) / count

def epochs(flow, x, options):  # from the end of the first epoch to that of the last: what comes before is no training
    ends = []
    flow.fit(x, callback=lambda record: ends.append(time.perf_counter()), **options)
    return (ends[-1] - ends[0]) / (len(ends) - 1)

cells = {}
def make(model, one_context, op, rows):
    key = json.dumps([model, one_context, op, rows])
    if key in cells:
        return cells[key]
    flow = eval(model)
    flow.num_threads = 1
    rng = np.random.default_rng(0)
    flow.set_parameters({k: rng.normal(scale=0.5 / max(1, v.shape[0]) ** 0.5, size=v.shape).astype("float32")
                         if k.endswith((".kernel", ".bias")) else v for k, v in flow.parameters().items()})
    rows_of_x = rows if op == "log_prob" else max(rows, 8192 // rows * rows)
    x = rng.normal(size=(rows_of_x, flow.spec.input_size)).astype("float32")
    size = getattr(flow.spec, "context_size", 0)
    context = {"context": rng.normal(size=(rows_of_x, size)).astype("float32")} if size else {}
    if op == "log_prob":
        out = np.empty(rows, "float32")
        if one_context:
            flow, context = flow.condition(context["context"][0]), {}
        cells[key] = many(lambda: flow.log_probability(x, out=out, **context), max(1, 1000 // rows))
    else:
        known = inspect.signature(flow.fit).parameters
        plain = dict(batch_size=rows, epochs=EPOCHS, learning_rate=1e-4, schedule="constant", validation=0,
                     clip_norm=None, weight_decay=0.0, averaging=None, max_deviation=0, progress=False)
        options = {**{k: v for k, v in plain.items() if k in known}, **context}
        cells[key] = lambda: epochs(flow, x, options)
    cells[key]()
    return cells[key]

for line in sys.stdin:
    *cell, seconds = json.loads(line)
    print(json.dumps(timed(make(*cell), seconds)), flush=True)
"""


class Worker:
    """One build, in a process of its own."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, cell: tuple, slice_seconds: float) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([*cell, slice_seconds]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended")
        return float(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="the interpreter of the environment with the old build")
    parser.add_argument("new", help="the interpreter of the environment with the new build")
    parser.add_argument("--models", default="A,B,C,D,E", help=f"of {','.join(CONFIGURATIONS)}; both builds need them")
    parser.add_argument("--rows", default="1,16,1024,65536", help="of log_prob")
    parser.add_argument("--train-rows", default="256,4096", help="of a training step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slice", type=float, default=0.1, help="seconds of one timing, at least one call")
    arguments = parser.parse_args()
    counts = {"log_prob": arguments.rows, "train": arguments.train_rows}
    cells = [(op, int(rows)) for op, given in counts.items() for rows in given.split(",")]
    old, new = Worker(arguments.old), Worker(arguments.new)
    print("| model | operation | rows | old, us | new / old | quartiles |\n| --- | --- | ---: | ---: | ---: | --- |")
    for model in arguments.models.split(","):
        configuration = CONFIGURATIONS[model]
        for op, rows in cells:
            if op == "train" and configuration.one_context:
                continue
            cell = (configuration.expression, configuration.one_context, op, rows)
            first, ratios = [], []
            for i in range(arguments.rounds + 1):
                pair = [old, new] if i % 2 == 0 else [new, old]
                times = {id(worker): worker.seconds(cell, arguments.slice) for worker in pair}
                if i > 0:  # the first round warms up
                    first.append(times[id(old)])
                    ratios.append(times[id(new)] / times[id(old)])
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"| {model} | {op} | {rows} | {1e6 * statistics.median(first):.4g} | {middle:.3f} |"
                f" {low:.3f} to {high:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
