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
from nvpflow.layers import MLP, Affine, Coupling, ElementSpline, Spline
from oracle import unit_data

TWO = {"scale_network": MLP((20,), "gelu", layer_norm=True), "translation_network": MLP((9, 33), "tanh")}
BENT = Spline(5, 2.0, boundary="free", tails="slope", derivative="exp", size_bound=4.0)
GATED = {"network": "residual", "context_size": 5, "standardize_context": True}

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
    # Those of all others: streamed, with a workspace.
    (17, 2, (40,), "silu", {"mixing": "lu", **GATED}),
    (7, 1, (), "relu", {"layers": [Coupling("odd", Affine(), **TWO), Coupling("even", Affine(), **TWO)]}),
    (784, 1, (1024,), "gelu", {"mixing": "lu", "context_size": 3, "layer_norm": True}),
    # Splines: with a few features and many, whose numbers lie in a workspace; of constants; of every other sort.
    (9, 2, (40,), "silu", {"transform": "spline", "mixing": "lu", **GATED}),
    (100, 1, (64,), "relu", {"transform": "spline", "standardize": False}),
    (6, 1, (), "relu", {"layers": [ElementSpline("all"), Coupling("odd", BENT), ElementSpline("even", BENT)]}),
]
MODES = [("float32", "float32"), ("float64", "float32"), ("float32", "tf32"), ("float32", "bfloat16")]
BUDGET = {"float32": 1e-4, "float64": 1e-11}


def touch(shape: tuple, dtype: str, precision: str, rows: int) -> float:
    """Worst relative difference from the CPU over all calls."""
    size, layers, hidden, activation, options = shape
    if "layers" in options:
        cpu = nvpflow.build(size, dtype=dtype, **options)
    else:
        cpu = nvpflow.build(size, layers, hidden, activation, dtype=dtype, **options)
    context = unit_data(rows, cpu.spec.context_size, seed=3, dtype=dtype) if cpu.spec.context_size else None
    given = {} if context is None else {"context": context}
    one = {} if context is None else {"context": context[0]}
    cuda = cpu.to("cuda", precision)
    x = unit_data(rows, size, seed=1, dtype=dtype)
    results = []
    for flow in (cpu, cuda):
        nll, gradient = flow.nll_gradient(x, **given)
        vjp = [flow.vjp(x, x, x[:, 0].copy(), direction=d, **given) for d in ("forward", "inverse")]
        values = [*flow.forward(x, **given), flow.inverse(x, **given), flow.log_prob(x, **given)]
        results.append([*values, flow.sample(rows, seed=2, **one), nll, gradient, *vjp[0], *vjp[1]])
    worst = max(np.max(np.abs(a - b) / (1 + np.abs(b))) for a, b in zip(results[1], results[0], strict=True))
    if precision == "float32" and size < 100:
        cuda.fit(x, epochs=1, batch_size=rows // 2, validation=0.2, progress=False, **given)
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
