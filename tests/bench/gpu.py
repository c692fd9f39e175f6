"""Speed of flows on a CUDA device, against what the device can do: one JSON file and one table.

Ceilings are measured in the same run where PyTorch is there: products of large float32, TF32 and bfloat16 matrices, a
copy on the device, copies over the link. So are the same flows in PyTorch on the same device, in float32: eager,
captured in a CUDA graph, compiled. Each configuration is checked against the float64 oracle before it is timed.
Measurements are taken in the order of their weight, so that a run that is out of time has the main ones.

    python tests/bench/gpu.py --json gpu.json --seconds 120
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import nvpflow
from configurations import CONFIGURATIONS, Configuration, data, reference
from ours import flow_of

try:
    import peers
    import torch

    HAVE_TORCH = torch.cuda.is_available()
except ImportError:
    HAVE_TORCH = False

PRECISIONS = ("float32", "tf32", "bfloat16")
BUDGET = {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 1e-1}  # |log p - oracle| <= budget (1 + |oracle|)
OPERATIONS = ("log_prob", "forward", "inverse", "sample")
BATCHES = (1, 1024, 65536, 1 << 24)
TRAIN_BATCHES = (256, 4096, 65536)
MAIN = ("A", "B", "C", "D")  # measured first, in every precision and beside PyTorch
PEERS = ("torch_eager", "torch_graph", "torch_compile")
PEER_ROWS = 1 << 20  # [rows, hidden] arrays fit the device
SECONDS_PER_MEASUREMENT = 0.25
MOST_BYTES = 16 << 30
HOST_ROWS = 1 << 22  # of NumPy at most: the link is full long before, and the host is slow to fill more


@dataclass
class Flow:
    """A configuration on the device in one precision, checked."""

    configuration: Configuration
    precision: str
    flow: nvpflow.Flow
    error: float

    @classmethod
    def make(cls, configuration: Configuration, precision: str) -> Flow:
        flow = flow_of(configuration, device="cuda", precision=precision)
        x = data(configuration, 256)
        expected = reference(configuration).log_prob(x)
        error = float(np.max(np.abs(flow.log_prob(x) - expected) / (1 + np.abs(expected))))
        return cls(configuration, precision, flow, error)


# ---- clocks ----------------------------------------------------------------------------------------------------------


def wait(flow: nvpflow.Flow, rows: Any) -> None:
    """Wait for what was queued on the stream of device arrays."""
    if HAVE_TORCH:
        torch.cuda.synchronize()
    else:
        flow.log_prob(rows).numpy()


def per_call(call: Callable[[], Any], finish: Callable[[], Any]) -> list[float]:
    """Seconds a call: five blocks, each long enough, after one to warm up."""
    call()
    finish()
    calls = 1
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        finish()
        elapsed = time.perf_counter() - start
        if elapsed > SECONDS_PER_MEASUREMENT / 5:
            break
        calls = max(2 * calls, int(calls * SECONDS_PER_MEASUREMENT / 5 / max(elapsed, 1e-6)))
    blocks = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        finish()
        blocks.append((time.perf_counter() - start) / calls)
    return blocks


# ---- what the device can do ------------------------------------------------------------------------------------------


def ceilings() -> dict[str, float]:
    """FLOP/s and B/s by PyTorch's own means; empty without it."""
    if not HAVE_TORCH:
        return {}

    def rate(amount: float, call: Callable[[], Any]) -> float:
        return amount / float(np.median(per_call(call, torch.cuda.synchronize)))

    found = {}
    n = 8192
    for name, dtype, tf32 in (
        ("fma", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        found[name] = rate(2 * n**3, lambda a=a, b=b: a @ b)
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.empty(1 << 28, device="cuda")
    y = torch.empty_like(x)
    found["memory"] = rate(2 * x.nbytes, lambda: y.copy_(x))
    pinned = torch.empty(1 << 26).pin_memory()
    small = x[: 1 << 26]
    found["to_device"] = rate(pinned.nbytes, lambda: small.copy_(pinned, non_blocking=True))
    found["to_host"] = rate(pinned.nbytes, lambda: pinned.copy_(small, non_blocking=True))
    return found


def bound(limits: dict[str, float], c: Configuration, op: str, rows: int, precision: str, where: str) -> float | None:
    """The least seconds that the ceilings allow."""
    if not limits:
        return None
    products = {"float32": max(limits["fma"], limits["tf32"] / 3), "tf32": limits["tf32"], "bfloat16": limits["bf16"]}
    in_bytes = 0 if op == "sample" else 4 * c.input_size * rows
    out_bytes = 4 * rows * {"log_prob": 1, "forward": c.input_size + 1, "inverse": c.input_size}.get(op, c.input_size)
    if op == "train":
        out_bytes = 0
    times = [c.flops(op, rows) / products[precision], (in_bytes + out_bytes) / limits["memory"]]
    if where == "host":
        times += [in_bytes / limits["to_device"], out_bytes / limits["to_host"]]
    return max(times)


# ---- measurements ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def arrays_of(name: str, rows: int, where: str) -> tuple[Any, Any, Any]:
    """Rows, room for as many, and for a number of each; kept while the next measurement wants the same."""
    some = data(CONFIGURATIONS[name], min(rows, 4096))
    d = some.shape[1]
    if where == "device" and HAVE_TORCH:
        x = torch.from_numpy(some).cuda().repeat(-(-rows // len(some)), 1)[:rows].contiguous()
        return x, torch.empty_like(x), torch.empty(rows, device="cuda")
    x = np.resize(some, (rows, d))
    arrays = (x, np.empty_like(x), np.empty(rows, np.float32))
    return tuple(map(nvpflow.cuda.array, arrays)) if where == "device" else arrays


def call_of(f: Flow, op: str, rows: int, where: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The call as a user writes it, with out=, and what waits for it."""
    x, wide, narrow = arrays_of(f.configuration.name, rows, where)
    calls = {
        "log_prob": lambda: f.flow.log_prob(x, out=narrow),
        "forward": lambda: f.flow.forward(x, out=(wide, narrow)),
        "inverse": lambda: f.flow.inverse(x, out=wide),
        "sample": lambda: f.flow.sample(rows, seed=1, out=wide),
    }
    one = nvpflow.cuda.array(data(f.configuration, 1)) if where == "device" and not HAVE_TORCH else None
    return calls[op], (lambda: wait(f.flow, one)) if where == "device" else (lambda: None)


def train_seconds(f: Flow, batch: int) -> list[float]:
    """Seconds a step: epochs of `fit` on resident rows, one row of validation."""
    steps = max(4, min(256, (1 << 20) // batch)) if SECONDS_PER_MEASUREMENT > 0.01 else 4
    x = np.resize(data(f.configuration, 4096), (batch * steps, f.configuration.input_size))
    flow = f.flow.to("cuda", f.precision)
    history = flow.fit(x, validation=x[:1].copy(), epochs=6, batch_size=batch, learning_rate=1e-5, progress=False)
    return [float(s) / steps for s in history.seconds[1:]]


# ---- PyTorch on the same device --------------------------------------------------------------------------------------


def peer_call(c: Configuration, op: str, rows: int, peer: str) -> Callable[[], Any]:
    """A call of the same flow in PyTorch, or a step of its training."""
    compiled = peer == "torch_compile"
    with torch.device("cuda"):
        module = peers.torch_flow(c, one_head=True, compiled=compiled)
    x = arrays_of(c.name, rows, "device")[0]
    if op == "train":
        module.train()
        adam = torch.optim.Adam(module.parameters(), lr=1e-5, fused=True)
        nll = torch.compile(module.log_prob, dynamic=False) if compiled else module.log_prob

        def step() -> None:
            adam.zero_grad()
            (-nll(x).mean()).backward()
            adam.step()

        return step
    function = getattr(module.eval(), op)
    run = torch.inference_mode()(torch.compile(function, dynamic=False) if compiled else function)
    if peer != "torch_graph":
        return lambda: run(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x)
    return graph.replay


def measure_peer(c: Configuration, op: str, rows: int, peer: str, limits: dict[str, float]) -> dict[str, Any]:
    torch._dynamo.reset()
    seconds = per_call(peer_call(c, op, rows, peer), torch.cuda.synchronize)
    return result_of(c, op, rows, "float32", "device", seconds, limits) | {"contender": peer}


# ---- the run ---------------------------------------------------------------------------------------------------------


def plan(
    names: list[str], precisions: list[str], batches: list[int], quick: bool
) -> Iterator[tuple[str, str, int, str, str, str]]:
    """(configuration, op, rows, precision, where, contender), the main ones first."""
    seen = set()
    large, small = max(batches), min(batches)
    train = [b for b in TRAIN_BATCHES if not quick] or [64]
    main = [n for n in names if n in MAIN]
    ours = [
        [(n, op, large, p, "device") for n in main for p in precisions for op in ("log_prob", "inverse")],
        [(n, "log_prob", small, "float32", w) for n in main for w in ("device", "host")],
        [(n, "log_prob", large, "float32", "host") for n in main],
        [(n, "train", train[-1], p, "device") for n in main for p in precisions],
        [(n, "log_prob", large, p, "device") for n in names for p in precisions],
    ]
    rest = [
        [(n, op, large, "float32", "device") for n in names for op in OPERATIONS],
        [(n, "log_prob", b, "float32", w) for n in names for b in batches for w in ("device", "host")],
        [(n, "train", b, "float32", "device") for n in names for b in train],
        [(n, op, large, p, "device") for n in names for op in OPERATIONS for p in precisions],
        [(n, op, b, "float32", w) for n in names for op in OPERATIONS for b in batches for w in ("device", "host")],
    ]
    calls = [("log_prob", PEER_ROWS), ("inverse", PEER_ROWS), ("train", train[-1])]
    others = [
        (n, op, rows, "float32", "device", peer)
        for n in main
        for peer in PEERS
        for op, rows in calls
        if HAVE_TORCH and not (op == "train" and peer == "torch_graph")
    ]
    for items in (ours, [others], rest):
        for item in (one for stage in items for one in stage):
            if item not in seen:
                seen.add(item)
                yield item if len(item) == 6 else (*item, "nvpflow")


def result_of(
    c: Configuration, op: str, rows: int, precision: str, where: str, seconds: list[float], limits: dict[str, float]
) -> dict[str, Any]:
    median = float(np.median(seconds))
    least = bound(limits, c, op, rows, precision, where)
    return {
        "configuration": c.name,
        "op": op,
        "rows": rows,
        "precision": precision,
        "arrays": where,
        "seconds": median,
        "spread": [min(seconds), max(seconds)],
        "rows_per_second": rows / median,
        "flops_per_second": c.flops(op, rows) / median,
        "fraction_of_bound": None if least is None else least / median,
    }


def measure(f: Flow, op: str, rows: int, where: str, limits: dict[str, float]) -> dict[str, Any]:
    seconds = train_seconds(f, rows) if op == "train" else per_call(*call_of(f, op, rows, where))
    result = result_of(f.configuration, op, rows, f.precision, where, seconds, limits)
    return result | {"contender": "nvpflow", "log_prob_error": f.error}


def line(r: dict[str, Any]) -> str:
    fraction = "" if r["fraction_of_bound"] is None else f"{100 * r['fraction_of_bound']:6.1f} %"
    return (
        f"{r['contender']:<13} {r['configuration']:<3} {r['op']:<9} {r['rows']:>8} {r['precision']:<9} "
        f"{r['arrays']:<7} "
        f"{1e6 * r['seconds']:>11.1f} us {r['rows_per_second'] / 1e6:>10.2f} M rows/s "
        f"{r['flops_per_second'] / 1e12:>8.2f} TFLOP/s {fraction}"
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seconds", type=float, default=120, help="when to stop taking more measurements")
    parser.add_argument("--configs", default="A,B,C,D,E,J,F")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--batches", help=f"default: {','.join(map(str, BATCHES))}")
    parser.add_argument("--quick", action="store_true", help="whether it runs, not how fast: few rows")
    return parser.parse_args()


def main() -> int:
    arguments = options()
    global SECONDS_PER_MEASUREMENT
    start = time.monotonic()
    if reason := nvpflow.cuda.why_unavailable():
        print(f"gpu.py: no CUDA device: {reason}", file=sys.stderr)
        return 1
    batches = [int(b) for b in arguments.batches.split(",")] if arguments.batches else list(BATCHES)
    if arguments.quick:
        batches, SECONDS_PER_MEASUREMENT = [1, 32], 0.001
    names, precisions = arguments.configs.split(","), arguments.precisions.split(",")
    limits = {} if arguments.quick else ceilings()
    report: dict[str, Any] = {
        "device": nvpflow.cuda.device_name(),
        "nvpflow": nvpflow.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__ if HAVE_TORCH else None,
        "ceilings": limits,
        "complete": False,
        "results": [],
    }
    print(
        f"{report['device']}; ceilings: " + ", ".join(f"{k} {v / 1e12:.2f} T/s" for k, v in limits.items()), flush=True
    )

    flows: dict[tuple[str, str], Flow] = {}
    wrong = []
    for name, op, rows, precision, where, contender in plan(names, precisions, batches, arguments.quick):
        if time.monotonic() - start > arguments.seconds:
            print("out of time: the measurements that are missing are not in the file")
            break
        c = CONFIGURATIONS[name]
        rows = min(rows, MOST_BYTES // (12 * c.input_size), HOST_ROWS if where == "host" else rows)
        if (name, precision) not in flows:
            made = flows[name, precision] = Flow.make(c, precision)
            if not made.error <= BUDGET[precision]:
                wrong.append(f"{name} {precision}: error {made.error:.2e}, budget {BUDGET[precision]:.0e}")
        if contender == "nvpflow":
            result = measure(flows[name, precision], op, rows, where, limits)
        else:
            try:
                result = measure_peer(c, op, rows, contender, limits)
            except Exception as problem:  # it may lack a compiler, or memory
                print(f"{contender} {name} {op}: not measured: {str(problem).splitlines()[0]}", flush=True)
                continue
        report["results"].append(result)
        print(line(result), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1))
    else:
        report["complete"] = True
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
