"""Import flows of zuko, nflows and normflows, show how exactly they agree, and time both sides on one core.

The flows are what people use there: a conditional RealNVP of zuko, a neural spline flow of nflows as sbi builds it, and
a Glow of normflows without images. Their weights are random, not as they start: a new flow is nearly the identity, and
would prove nothing. Both sides are timed in turn. A library that is not installed is left out, and named.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import nvpflow
import torch

COLUMNS, CONTEXT = 5, 10
GLOW_COLUMNS = 6
Call = Callable[[], Any]
Score = Callable[..., Any]


def zuko_realnvp() -> tuple[nvpflow.Flow, Score]:
    """Return a conditional RealNVP as imported, and how zuko scores rows."""
    import zuko

    theirs = zuko.flows.RealNVP(features=COLUMNS, context=CONTEXT, transforms=5, hidden_features=(64, 64))
    shake(theirs)
    return nvpflow.importers.from_zuko(theirs), lambda x, c: theirs(c).log_prob(x)


def nflows_nsf() -> tuple[nvpflow.Flow, Score]:
    """Return what sbi calls "nsf": five steps of a spline coupling and a linear layer."""
    from nflows import distributions, flows, nn, transforms

    steps = []
    for step in range(5):
        mask = torch.arange(COLUMNS) % 2 == step % 2
        steps.append(
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask.int(),
                lambda n, out: nn.nets.ResidualNet(n, out, 50, context_features=CONTEXT, num_blocks=2),
                num_bins=10,
                tails="linear",
                tail_bound=3.0,
            )
        )
        steps.append(transforms.LULinear(COLUMNS, identity_init=False))
    theirs = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([COLUMNS]))
    shake(theirs)
    return nvpflow.importers.from_nflows(theirs), theirs.log_prob


def normflows_glow() -> tuple[nvpflow.Flow, Score]:
    """Return eight steps of an affine coupling, a linear layer and an ActNorm layer."""
    import normflows

    half, steps = GLOW_COLUMNS // 2, []
    for _ in range(8):
        network = normflows.nets.MLP([half, 64, 64, 2 * half])
        steps += [
            normflows.flows.AffineCouplingBlock(network),
            normflows.flows.LULinearPermute(GLOW_COLUMNS),
            normflows.flows.ActNorm(GLOW_COLUMNS),
        ]
    theirs = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(GLOW_COLUMNS), steps)
    theirs.log_prob(torch.randn(256, GLOW_COLUMNS))  # ActNorm starts from the first rows that it sees
    shake(theirs)
    return nvpflow.importers.from_normflows(theirs), theirs.log_prob


SOURCES = {
    "zuko, RealNVP": ("zuko", zuko_realnvp),
    "nflows, NSF as in sbi": ("nflows", nflows_nsf),
    "normflows, Glow": ("normflows", normflows_glow),
}


def shake(module: torch.nn.Module) -> None:
    """Move every weight away from where it starts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    module.eval()


def race(calls: list[Call], seconds: float) -> list[float]:
    """Return each call's median time in seconds: blocks of calls in turn, for so many seconds altogether."""
    times: list[list[float]] = [[] for _ in calls]
    counts = []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        counts.append(max(1, int(0.01 / (time.perf_counter() - begin))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times[0]:
        for call, count, found in zip(calls, counts, times, strict=True):
            begin = time.perf_counter()
            for _ in range(count):
                call()
            found.append((time.perf_counter() - begin) / count)
    return [statistics.median(found) for found in times]


def calls_of(flow: nvpflow.Flow, score: Score, rows: int) -> list[Call]:
    """Return the library's call and nvpflow's, on the same rows, each with a context of its own where there is one."""
    random = np.random.default_rng(0)
    sizes = [size for size in (flow.spec.input_size, flow.spec.context_size) if size]
    given = [random.normal(size=(rows, size)).astype(np.float32) for size in sizes]
    tensors = [torch.from_numpy(array) for array in given]
    x, context = given[0], given[1] if len(given) > 1 else None
    out = np.empty(rows, np.float32)
    return [lambda: score(*tensors), lambda: flow.log_probability(x, out=out, context=context)]


def shown(seconds: float) -> str:
    """Return a time with its unit."""
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def main() -> None:
    """Import, print the reports, race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--reports", action="store_true", help="print each report whole, not its first line")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lines = []
    for name, (library, build) in SOURCES.items():
        try:
            importlib.import_module(library)
        except ImportError:
            print(f"{name}: {library} is not installed")
            continue
        flow, score = build()
        flow.num_threads = 1
        report = flow.import_report
        print(report if arguments.reports else str(report).splitlines()[0])
        with torch.inference_mode():
            for rows in (1, 1024):
                theirs, ours = race(calls_of(flow, score, rows), arguments.seconds)
                lines.append(f"{name:<24}{rows:>6,}{shown(theirs):>14}{shown(ours):>12}{theirs / ours:>9.0f} x")
    print(f"\n{'log p, one core':<24}{'rows':>6}{'the library':>14}{'nvpflow':>12}{'':>11}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
