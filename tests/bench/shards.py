"""What shards cost in one process: seconds of a step of training, beside those of a step without.

    python tests/bench/shards.py [--threads N] [--rounds N]

Least of the epochs of all rounds; the flows take turns, so that a busy machine is one to all of them.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import nvpflow

FLOWS = {  # columns, couplings, hidden sizes, rows of a step
    "A": (16, 4, (128,), 16384),
    "C": (64, 10, (512, 512), 8192),
}
STEPS, EPOCHS = 2, 3


def seconds_of_step(name: str, shards: int | None, threads: int) -> float:
    columns, couplings, hidden, rows = FLOWS[name]
    x = np.random.default_rng(0).normal(size=(STEPS * rows, columns)).astype(np.float32)
    flow = nvpflow.build(columns, couplings, hidden, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvpflow.DataWarning)
        history = flow.fit(
            x,
            shards=shards,
            batch_size=rows,
            epochs=EPOCHS,
            validation=None,
            averaging=None,
            num_threads=threads,
            progress=False,
        )
    return float(min(history.seconds[1:])) / STEPS  # the first step looks for its grids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="of the training (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each flow takes (default: 3)")
    options = parser.parse_args()
    print(f"{nvpflow.cpu_isa()}, {options.threads} thread(s)\n")
    print("| flow | rows of a step | shards | ms a step | of that without |\n| --- | ---: | ---: | ---: | ---: |")
    for name, (*_, rows) in FLOWS.items():
        least = dict.fromkeys((1, 4, 16, 64), np.inf)
        for _ in range(options.rounds):
            for shards in least:
                least[shards] = min(least[shards], seconds_of_step(name, shards, options.threads))
        for shards, seconds in least.items():
            print(f"| {name} | {rows:,} | {shards} | {seconds * 1e3:.1f} | {seconds / least[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
