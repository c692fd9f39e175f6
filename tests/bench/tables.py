"""Results as text: Markdown tables that read well in a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from results import Results
from targets import evaluate

OPS = ("log_prob", "forward", "inverse")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, columns padded to equal width: the first to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def time(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return "-"
    unit, factor = next((u, f) for u, f in (("us", 1e6), ("ms", 1e3), ("s", 1.0)) if seconds * f < 1000 or u == "s")
    value = seconds * factor
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def rate(rows_per_second: float | None) -> str:
    if rows_per_second is None:
        return "-"
    if rows_per_second >= 999_500:
        return f"{rows_per_second / 1e6:.2f} M/s"
    if rows_per_second < 9_995:
        return f"{rows_per_second:,.0f} /s"
    return f"{rows_per_second / 1e3:.0f} k/s" if rows_per_second >= 99_950 else f"{rows_per_second / 1e3:.1f} k/s"


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.0f} %"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g} x" if ratio < 100 else f"{ratio:.0f} x"


def _peer(rival) -> str:
    return "-" if rival is None else f"{rival.name}{' (other maths)' if rival.other_maths else ''}"


def machine(r: Results) -> str:
    """What the machine can do, in lines."""
    lines = []
    for threads, limits in r.document["limits"].items():
        peaks = ", ".join(f"{isa} {value / 1e9:.0f}" for isa, value in limits["fma"].items())
        lines.append(f"multiply-add peak, GFLOP/s, {threads} thread(s): {peaks}")
        if threads == "1":
            reads = ", ".join(f"{level} {found['rate'] / 1e9:.0f}" for level, found in limits["read"].items())
            floors = {name: f"{seconds * 1e9:.0f} ns" for name, seconds in limits["floors"].items()}
            lines.append(f"read by one core, GB/s: {reads}")
            lines.append(
                f"empty call {floors['call']}, loop {floors['loop']}, clock {floors['clock']} (single calls include it)"
            )
    return "\n".join(lines) or "not measured: see who was skipped"


def one_row(r: Results) -> str:
    rows = []
    for name in r.configurations:
        rival = r.rival(name, "log_prob", 1)
        rows.append(
            [
                name,
                time(r.seconds(name, "log_prob", 1)),
                time(r.percentile(name, "p99")),
                time(r.percentile(name, "median", cold=True)),
                time(r.seconds(name, "log_prob", 1, "nvpflow_new_array")),
                time(r.seconds(name, "log_prob", 1, "machine")),
                _peer(rival),
                time(rival and rival.seconds),
                times(r.lead(name, "log_prob", 1)),
            ]
        )
    header = ["", "nvpflow", "p99", "cold", "new array", "reading weights", "fastest peer", "its time", "lead"]
    return table(header, rows)


def spread(r: Results, op: str, batch: int, threads: int = 1) -> str:
    """Everyone's median and spread, one column per configuration."""
    found = {name: r.contenders(name, op, batch, threads) for name in r.configurations}
    everyone = list(dict.fromkeys(c for names in found.values() for c in names if c != "machine"))

    def cell(name: str, contender: str) -> str:
        record = r.record(name, op, batch, contender, threads)
        if record is None:
            return "-"
        seconds = record["seconds"]
        return f"{time(seconds['median'])} ({time(seconds['p10'])} to {time(seconds['p90'])})"

    rows = [[contender, *(cell(name, contender) for name in found)] for contender in everyone]
    return table([f"{op}, {batch:,} rows", *found], rows)


def throughput(r: Results, threads: int = 1) -> str:
    rows = []
    for name in r.configurations:
        for op in (*OPS, "train"):
            for batch in r.batches(name, op, threads=threads):
                rival = r.rival(name, op, batch, threads=threads)
                ours = r.seconds(name, op, batch, threads=threads)
                rows.append(
                    [
                        f"{name} {op} {batch:,}",
                        time(ours),
                        rate(r.rows_per_second(name, op, batch, threads=threads)),
                        percent(r.peak_fraction(name, op, batch, threads=threads)),
                        _peer(rival),
                        rate(rival and batch / rival.seconds),
                        times(rival and rival.seconds / ours),
                    ]
                )
    return table(["", "nvpflow", "rows", "of FMA peak", "fastest peer", "its rows", "lead"], rows)


def batch_curve(r: Results) -> str:
    """Rows per second of log_prob from 1 to 64 rows."""
    batches = sorted({b for name in r.configurations for b in r.batches(name, "log_prob") if b <= 64})
    rows = [
        [name, *(rate(r.rows_per_second(name, "log_prob", batch)) for batch in batches)] for name in r.configurations
    ]
    return table(["log_prob", *(f"{batch:,}" for batch in batches)], rows)


def targets(r: Results) -> str:
    every = evaluate(r)
    known = [t for t in every if t.met is not None]
    rows = [[t.what, t.case, t.measured, t.target, "yes" if t.met else "NO"] for t in known]
    count = f"{sum(t.met for t in known)} of {len(known)} met; {len(every) - len(known)} more were not measured."
    return f"{table(['target', 'case', 'measured', 'wanted', 'met'], rows)}\n\n{count}"


def skipped(r: Results) -> str:
    lines = []
    for entry in r.document["skipped"]:
        where = f" in {entry['configuration']} {entry['op']} {entry['batch']}" if "op" in entry else ""
        lines.append(f"{entry['contender']}{where}: {entry['reason']}")
    return "\n".join(dict.fromkeys(lines)) or "nobody"


def everything(r: Results) -> str:
    """What bench.py prints."""
    threads = sorted({record["threads"] for record in r.document["records"]})
    parts = [("The machine", machine(r)), ("One row, log_prob", one_row(r)), ("Batch curve", batch_curve(r))]
    parts += [(f"Everything, {n} thread(s)", throughput(r, n)) for n in threads]
    of_interest = [("log_prob", batch) for batch in (1, 1024, 65_536)]
    of_interest += [("train", batch) for batch in (256, 512, 4096)]
    measured = {(record["op"], record["batch"]) for record in r.document["records"]}
    parts += [
        (f"Medians (p10 to p90), {op} {batch:,}", spread(r, op, batch))
        for op, batch in of_interest
        if (op, batch) in measured
    ]
    parts += [("Targets", targets(r)), ("Skipped", skipped(r))]
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts)
