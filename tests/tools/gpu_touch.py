"""Runs every kernel once on few rows and checks the results: what compute-sanitizer watches.

    python tests/tools/gpu_touch.py [SECONDS]

After SECONDS no other flow is begun; those that were not reached are named.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import nvpflow
from oracle import unit_data

SHAPES = [  # (D, K, hidden sizes, activation, further options of build)
    (16, 2, (128,), "relu", {}),
    (5, 2, (20, 33), "gelu", {}),
    (64, 1, (256, 256), "silu", {"standardize": False}),
    (784, 1, (1024,), "relu", {"standardize": False}),
    (3, 2, (), "tanh", {"standardize": False}),
    # The kernels of general flows: resident, streamed, with a workspace.
    (17, 3, (40,), "tanh", {"mask": "random", "mixing": "permutation", "actnorm": True}),
    (64, 2, (256, 256), "relu", {"mask": "random", "mixing": "reverse", "transform": "additive"}),
    (784, 1, (1024,), "relu", {"mask": "checkered", "mixing": "permutation"}),
]
MODES = [("float32", "float32"), ("float64", "float32"), ("float32", "tf32"), ("float32", "bfloat16")]
BUDGET = {"float32": 1e-4, "float64": 1e-11}


def touch(shape: tuple, dtype: str, precision: str, rows: int) -> float:
    """Worst relative difference from the CPU over all calls."""
    size, layers, hidden, activation, options = shape
    cpu = nvpflow.build(size, layers, hidden, activation, dtype=dtype, **options)
    cuda = cpu.to("cuda", precision)
    x = unit_data(rows, size, seed=1, dtype=dtype)
    results = []
    for flow in (cpu, cuda):
        nll, gradient = flow.nll_gradient(x)
        vjp = [flow.vjp(x, x, x[:, 0].copy(), direction=d) for d in ("forward", "inverse")]
        sample = flow.sample(rows, seed=2)
        results.append([*flow.forward(x), flow.inverse(x), flow.log_prob(x), sample, nll, gradient, *vjp[0], *vjp[1]])
    worst = max(np.max(np.abs(a - b) / (1 + np.abs(b))) for a, b in zip(results[1], results[0], strict=True))
    if precision == "float32" and size < 100:
        cuda.fit(x, epochs=1, batch_size=rows // 2, validation=0.2, progress=False)
    return float(worst)


def main() -> int:
    start, bad, left_out = time.monotonic(), 0, []
    most = float(sys.argv[1]) if len(sys.argv) > 1 else float("inf")
    for dtype, precision in MODES:
        for shape in SHAPES:
            if shape[0] > 100 and dtype == "float64":
                continue  # slow under a sanitizer, and nothing new in it
            if time.monotonic() - start > most:
                left_out.append(f"{shape} {dtype} {precision}")
                continue
            worst = touch(shape, dtype, precision, rows=70)
            budget = BUDGET[dtype] * 70 if precision == "float32" else 1.0
            bad += not worst <= budget
            print(f"{shape} {dtype} {precision}: {worst:.2e}{'' if worst <= budget else '  TOO MUCH'}", flush=True)
    for name in left_out:
        print(f"NOT REACHED: {name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
