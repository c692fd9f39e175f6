"""What nvpflow is meant to reach on a CPU, held against the results."""

from __future__ import annotations

from dataclasses import dataclass

from peers import COMPILED, TORCH_FLOW_LIBRARIES
from results import Results

ONE_ROW_SECONDS = {"A": 1.2e-6, "B": 1.8e-6, "D": 2.5e-6}
PEAK_FRACTION = {"A": 0.8, "B": 0.8, "C": 0.8, "D": 0.7, "E": 0.8}
TRAINING_FRACTION = {"A": 0.6, "B": 0.6, "C": 0.6, "D": 0.45}
# The flows beyond plain RealNVP, log_prob. Of those with splines AVX2 may take 1.6 times what AVX-512 does.
ONE_ROW_SECONDS_OF_ISA = {
    "J": {"avx512": 6e-6, "avx2": 11e-6},
    "G": {"avx512": 8e-6, "avx2": 12e-6},
    "G1": {"avx512": 8e-6, "avx2": 12e-6},
    "S": {"avx512": 8e-6, "avx2": 12.8e-6},
    "H": {"avx512": 3e-6, "avx2": 4.8e-6},
    "I": {"avx512": 6e-6, "avx2": 9.6e-6},
}
GENERAL_PEAK_FRACTION = {"J": 0.55, "G": 0.45, "G1": 0.45, "M": 0.55}
MOST_FOR_RANDOM_MASKS = 1.05  # of the time of halves of the same size
# How many times faster than PyTorch's flow libraries, and than the fastest compiled peer, flows of splines are meant to
# be: log_prob of 1,024 rows, a training step of 512.
SPLINE_LEADS = {"S": ((5, 1.5), (4, 1.5)), "H": ((8, 2), None), "I": ((5, 1.5), (4, 1.5))}
# The same of the fastest of all, where large products are most of the work.
LEADS_OF_LARGE_PRODUCTS = {"F": (1.3, 1.2)}
SMALL_BATCHES = range(2, 65)
OPS = ("log_prob", "forward", "inverse")
# The batch curve may dip by this much before it is called a cliff: what repeated measurements differ by.
NOISE = 0.03
NO_FALL = "never falls"
PLAIN_PYTORCH = ("torch_eager", "torch_fused")


@dataclass(frozen=True)
class Target:
    """One line of the table; `measured` and `met` are None where there was nothing to measure."""

    what: str
    case: str
    measured: str | None
    target: str
    met: bool | None


def at_most(what: str, case: str, value: float | None, limit: float, unit: str = "us", factor: float = 1e6) -> Target:
    shown = None if value is None else f"{value * factor:.2f} {unit}"
    return Target(what, case, shown, f"at most {limit * factor:.3g} {unit}", None if value is None else value <= limit)


def at_least(what: str, case: str, value: float | None, limit: float, unit: str = "x", factor: float = 1) -> Target:
    digits = ".3g" if value is not None and value * factor < 1000 else ".0f"
    shown = None if value is None else f"{value * factor:{digits}} {unit}"
    return Target(what, case, shown, f"at least {limit * factor:.3g} {unit}", None if value is None else value >= limit)


def _smallest(values) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def one_row(r: Results) -> list[Target]:
    rows = []
    for name, limit in ONE_ROW_SECONDS.items():
        ours = r.seconds(name, "log_prob", 1)
        new_array = r.seconds(name, "log_prob", 1, "nvpflow_new_array")
        p50, p99 = r.percentile(name, "median"), r.percentile(name, "p99")
        rows += [
            at_most("one row, median", name, ours, limit),
            at_most("one row, p99 over median", name, p99 and p99 / p50, 1.5, "x", 1),
            at_most("one row, cost of a new array", name, new_array and ours and new_array - ours, 0.3e-6),
            at_least("one row, ahead of the fastest peer", name, r.lead(name, "log_prob", 1), 8),
            at_least(
                "one row, ahead of PyTorch flow libraries", name, r.lead(name, "log_prob", 1, TORCH_FLOW_LIBRARIES), 100
            ),
        ]
    rows.append(at_most("one row, cold", "A", r.percentile("A", "median", cold=True), 10e-6))
    for name in ("C", "E"):
        ours, read = r.seconds(name, "log_prob", 1), r.seconds(name, "log_prob", 1, "machine")
        rows.append(at_most("one row over reading the weights", name, ours and read and ours / read, 1.25, "x", 1))
    return rows


def large_batches(r: Results) -> list[Target]:
    rows = []
    for name, limit in PEAK_FRACTION.items():
        for op in OPS:
            batches = [batch for batch in r.batches(name, op) if batch >= 1024]
            fraction = _smallest(r.peak_fraction(name, op, batch) for batch in batches)
            lead = _smallest(r.lead(name, op, batch) for batch in batches)
            rows += [
                at_least("1,024 rows and more, share of FMA peak", f"{name} {op}", fraction, limit, "%", 100),
                at_least("1,024 rows and more, ahead of the fastest peer", f"{name} {op}", lead, 1),
            ]
    return rows


def general(r: Results) -> list[Target]:
    """Flows with linear layers, contexts, residual networks, two networks a coupling."""
    rows = []
    isa = r.native_isa()
    for name, limits in ONE_ROW_SECONDS_OF_ISA.items():
        if isa in limits:
            rows.append(at_most(f"one row, median, {isa}", name, r.seconds(name, "log_prob", 1), limits[isa]))
    leads = (("PyTorch flow libraries", TORCH_FLOW_LIBRARIES, 4, 3), ("the fastest compiled peer", COMPILED, 1.3, 1.5))
    for name, limit in GENERAL_PEAK_FRACTION.items():
        fraction = r.peak_fraction(name, "log_prob", 1024)
        rows.append(at_least("1,024 rows, share of FMA peak", name, fraction, limit, "%", 100))
        for whom, peers, of_log_prob, of_training in leads:
            rows.append(
                at_least(f"1,024 rows, ahead of {whom}", name, r.lead(name, "log_prob", 1024, peers), of_log_prob)
            )
            rows += [
                at_least(f"training step, ahead of {whom}", f"{name} {batch:,}", lead, of_training)
                for batch in r.batches(name, "train")
                if (lead := r.lead(name, "train", batch, peers)) is not None
            ]
    return rows


def splines(r: Results) -> list[Target]:
    """Flows of spline couplings."""
    rows = []
    whom = (("PyTorch flow libraries", TORCH_FLOW_LIBRARIES), ("the fastest compiled peer", COMPILED))
    wanted = [
        (name, of_whom, peers, of_log_prob[i], of_training and of_training[i])
        for name, (of_log_prob, of_training) in SPLINE_LEADS.items()
        for i, (of_whom, peers) in enumerate(whom)
    ]
    wanted += [(name, "the fastest peer", None, *limits) for name, limits in LEADS_OF_LARGE_PRODUCTS.items()]
    for name, of_whom, peers, of_log_prob, of_training in wanted:
        lead = r.lead(name, "log_prob", 1024, peers)
        rows.append(at_least(f"1,024 rows, ahead of {of_whom}", name, lead, of_log_prob))
        if of_training is not None:
            lead = r.lead(name, "train", 512, peers)
            rows.append(at_least(f"training step of 512 rows, ahead of {of_whom}", name, lead, of_training))
    return rows


def masks(r: Results) -> list[Target]:
    """R beside its halves, in the same cells."""
    rows = []
    for op in (*OPS, "train"):
        for batch in r.batches("R", op, "nvpflow_halves"):
            cost = r.seconds("R", op, batch) / r.seconds("R", op, batch, "nvpflow_halves")
            rows.append(
                at_most("random masks over halves", f"R {op} {batch:,}", cost, MOST_FOR_RANDOM_MASKS, "x", factor=1)
            )
    return rows


def cliffs(r: Results, name: str, op: str) -> list[tuple[int, int, float]]:
    """Neighbouring batches up to 64 between which rows/s falls by more than noise, and the ratio."""
    batches = [batch for batch in r.batches(name, op) if batch <= 64]
    rates = [r.rows_per_second(name, op, batch) for batch in batches]
    steps = zip(batches, batches[1:], rates, rates[1:], strict=False)
    return [(small, large, after / before) for small, large, before, after in steps if after < (1 - NOISE) * before]


def small_batches(r: Results) -> list[Target]:
    rows = []
    for name in r.configurations:
        for op in OPS:
            batches = [batch for batch in r.batches(name, op) if batch <= 64]
            if len(batches) > 1:
                falls = cliffs(r, name, op)
                shown = ", ".join(f"{small} to {large}: x {ratio:.2f}" for small, large, ratio in falls)
                rows.append(
                    Target("batches 1 to 64, rows/s", f"{name} {op}", shown or "never falls", "never falls", not falls)
                )
            if name in ONE_ROW_SECONDS:
                lead = _smallest(r.lead(name, op, batch) for batch in batches if batch in SMALL_BATCHES)
                rows.append(at_least("batches 2 to 64, ahead of the fastest peer", f"{name} {op}", lead, 2))
    return rows


def threads(r: Results) -> list[Target]:
    rows = []
    for name in r.configurations:
        one, two = (r.rows_per_second(name, "log_prob", 65_536, threads=n) for n in (1, 2))
        rows.append(at_least("two threads, 65,536 rows", name, two / one if one and two else None, 1.85))
    return rows


def training(r: Results) -> list[Target]:
    rows = []
    for name, limit in TRAINING_FRACTION.items():
        for batch in (256, 4096):
            case = f"{name} {batch:,}"
            fraction = r.peak_fraction(name, "train", batch)
            rows += [
                at_least("training step, share of FMA peak", case, fraction, limit, "%", 100),
                at_least("training step, ahead of the fastest peer", case, r.lead(name, "train", batch), 1),
            ]
    # The step of E at 4,096 rows is left out (session.py).
    rows.append(at_least("training step, ahead of the fastest peer", "E 256", r.lead("E", "train", 256), 1))
    return rows


def pytorch(r: Results) -> list[Target]:
    rows = []
    for name in r.configurations:
        for batch in r.batches(name, "train", "nvpflow_torch"):
            plain = r.rival(name, "train", batch, PLAIN_PYTORCH)
            lead = plain and plain.seconds / r.seconds(name, "train", batch, "nvpflow_torch")
            rows.append(at_least("training step in PyTorch, ahead of its own operations", f"{name} {batch:,}", lead, 1))
    return rows


def avx2(r: Results) -> list[Target]:
    contender = "nvpflow" if r.native_isa() == "avx2" else "nvpflow_avx2"
    rows = []
    for name in PEAK_FRACTION:
        batches = [batch for batch in r.batches(name, "log_prob", contender) if batch >= 1024]
        fraction = _smallest(r.peak_fraction(name, "log_prob", batch, contender) for batch in batches)
        rows.append(at_least("AVX2 forced, share of AVX2's peak", name, fraction, 0.8, "%", 100))
    return rows


def float64(r: Results) -> list[Target]:
    rows = []
    for name in r.configurations:
        batches = [batch for batch in r.batches(name, "log_prob", "nvpflow_float64") if batch >= 1024]
        ratios = [r.seconds(name, "log_prob", b) / r.seconds(name, "log_prob", b, "nvpflow_float64") for b in batches]
        rows.append(at_least("float64 over float32, rows/s", name, _smallest(ratios), 0.5 * 0.85, "%", 100))
    return rows


def evaluate(results: Results) -> list[Target]:
    """Every target for the configurations that were asked for, in their order."""
    groups = (one_row, large_batches, general, splines, masks, small_batches, threads, training, pytorch, avx2, float64)
    every = [target for group in groups for target in group(results)]
    return [target for target in every if target.case.split()[0] in results.configurations]
