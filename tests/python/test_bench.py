"""The benchmark's own machinery, without any peer but NumPy: what it computes, what it writes, what becomes of it."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bench
import checks
import machine
import report
import session
import tables
import targets
from configurations import CONFIGURATIONS, data, reference
from results import Results
from timing import Call, summary

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict:
    """What a short run writes."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    arguments = ["--quick", "--configs", "A", "--ops", "log_prob", "--peers", "numpy", "--batches", "1,64", "--json"]
    done = subprocess.run(
        [sys.executable, str(BENCH / "bench.py"), *arguments, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "## Targets" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "flops", "kibibytes"),
    [("A", 24_576, 50), ("B", 49_152, 100), ("C", 1_441_792, 2_834), ("D", 74_752, 150), ("E", 19_267_584, 37_688)],
)
def test_arithmetic_and_size_of_a_configuration(name, flops, kibibytes) -> None:
    configuration = CONFIGURATIONS[name]
    assert configuration.flops_per_row == flops
    assert round(configuration.weight_bytes / 1024) == kibibytes
    assert configuration.flops("train", 256) == 3 * 256 * flops


def test_the_models_are_those_that_nvpflow_builds() -> None:
    import nvpflow

    for configuration in CONFIGURATIONS.values():
        c = configuration
        flow = nvpflow.build(c.input_size, c.num_flows, c.hidden_sizes, standardize=False)
        assert 4 * flow.num_parameters == configuration.weight_bytes
        kernels = sum(value.size for name, value in flow.parameters().items() if name.endswith(".kernel"))
        assert 2 * kernels == configuration.flops_per_row
        assert list(flow.parameters()) == list(reference(configuration).parameters)


def test_fewer_rows_are_the_first_of_more() -> None:
    assert np.array_equal(data(CONFIGURATIONS["A"], 3), data(CONFIGURATIONS["A"], 64)[:3])


# ---------------------------------------------------------------------------------------------- timing and checks


def test_a_call_is_timed_as_it_is_written() -> None:
    seen = []
    call = Call("seen.append(1)", {"seen": seen})
    assert call.block(20) > 0
    assert len(seen) == 22, "a tenth more to warm up"
    assert call.calibrate(1e-3) > 1
    assert len(call.singles(5)) == 5
    assert all(ns > 0 for ns in call.cold(2))


def test_the_command_of_the_results_names_no_file() -> None:
    words = ["--isa", "avx2", "--json", "/a/b.json", "--quick", "--plots=pictures"]
    assert bench.without_files(words) == ["--isa", "avx2", "--quick"]


def test_summary_gives_median_and_spread() -> None:
    found = summary([float(i) for i in range(11)])
    assert found == {"median": 5.0, "p10": 1.0, "p90": 9.0, "samples": 11}


def test_errors_are_relative_and_nan_is_the_worst() -> None:
    assert checks.error(np.array([1000.1]), np.array([1000.0])) == pytest.approx(1e-4)
    assert checks.error((np.zeros(2), np.array([0.0, math.nan])), (np.zeros(2), np.zeros(2))) == math.inf
    with pytest.raises(checks.WrongResultError, match="shape"):
        checks.error(np.zeros(2), np.zeros(3))


def test_a_contender_that_is_wrong_is_refused() -> None:
    from peers import Numpy

    peer, x = Numpy(CONFIGURATIONS["A"], 1), data(CONFIGURATIONS["A"], 5)
    assert checks.check(peer, "A", "log_prob", x, peer.call("log_prob", x))["error"] < 1e-5
    peer.layers[2][0][0][0, 0] += 0.5
    with pytest.raises(checks.WrongResultError, match="the limit is 1e-04"):
        checks.check(peer, "A", "log_prob", x, peer.call("log_prob", x))


def test_chunks_give_what_the_whole_gives() -> None:
    from peers import Numpy

    peer, x = Numpy(CONFIGURATIONS["D"], 1), data(CONFIGURATIONS["D"], 2500)
    for op in ("log_prob", "forward", "inverse"):
        whole, chunked = peer.call(op, x).result(), peer.call(op, x, chunked=True).result()
        assert checks.error(chunked, tuple(whole) if op == "forward" else whole) < 1e-6


def test_a_peer_that_is_missing_is_skipped_by_name(monkeypatch) -> None:
    def ask(*_, **__):
        raise session.ContenderError("somelibrary is not installed", missing=True)

    said = []
    with session.Session(["numpy"], 1, session.QUICK, said.append) as running:
        monkeypatch.setattr(running.contenders["numpy"], "ask", ask)
        running.run(session.Cell("A", "log_prob", 1))
        assert not running.contenders
    assert said == ["skipped: numpy A log_prob 1: somelibrary is not installed"]


# ---------------------------------------------------------------------------------------------- results


def test_the_document_holds_what_the_tables_need(document) -> None:
    assert set(document) == {
        *("format", "command", "date", "quick", "machine", "versions"),
        *("configurations", "limits", "records", "skipped"),
    }
    assert document["quick"] is True
    assert {"cpu", "caches", "governor", "system"} <= set(document["machine"])
    assert {"python", "numpy", "nvpflow"} <= set(document["versions"])
    for record in document["records"]:
        assert {"configuration", "op", "batch", "contender", "threads", "seconds"} <= set(record)
        assert 0 < record["seconds"]["p10"] <= record["seconds"]["median"] <= record["seconds"]["p90"]
        if record["contender"] != "machine":
            assert record["against"] == "oracle"
            assert record["error"] <= checks.LIMIT
    found = {(r["contender"], r["batch"]) for r in document["records"] if r["contender"] != "machine"}
    has_jax = importlib.util.find_spec("jax") is not None
    by_jax = {("nvpflow_jax", 1), ("nvpflow_jax", 64)} if has_jax else set()
    ours = {("nvpflow", 1), ("nvpflow_new_array", 1), ("nvpflow", 64), *by_jax}
    assert found == {*ours, ("numpy", 1), ("numpy", 64)}
    absent = {"machine"} if has_jax else {"machine", "nvpflow_jax"}
    assert not [entry for entry in document["skipped"] if entry["contender"] not in absent]


def test_the_machine_was_measured(document) -> None:
    try:
        machine.Probe()
    except machine.ProbeUnavailableError as error:
        pytest.skip(str(error))
    limits = document["limits"]["1"]
    assert all(1e9 < rate < 1e13 for rate in limits["fma"].values())
    assert all(1e8 < found["rate"] < 1e13 for found in limits["read"].values())
    assert 0 < limits["floors"]["call"] < 1e-5


def test_without_a_compiler_it_says_so(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(machine.ProbeUnavailableError, match="install gcc or clang"):
        machine.Probe()


def test_tables_and_targets_come_from_the_document(document) -> None:
    results = Results(document)
    text = tables.everything(results)
    assert "A log_prob 64" in text
    by_name = {(t.what, t.case): t for t in targets.evaluate(results)}
    assert by_name["one row, median", "A"].met is not None
    assert by_name["one row, ahead of the fastest peer", "A"].met is not None
    assert by_name["training step, share of FMA peak", "A 256"].met is None, "it was not measured"
    assert {case.split()[0] for _, case in by_name} == {"A"}


def test_a_fall_of_the_batch_curve_is_found(document) -> None:
    record = next(r for r in document["records"] if (r["contender"], r["batch"]) == ("nvpflow", 1))
    slow = {**record, "batch": 2, "seconds": {**record["seconds"], "median": 10 * record["seconds"]["median"]}}
    [(small, large, ratio), *_] = targets.cliffs(
        Results({**document, "records": [*document["records"], slow]}), "A", "log_prob"
    )
    assert (small, large, round(ratio, 2)) == (1, 2, 0.2)


def test_results_of_another_format_are_refused(document) -> None:
    with pytest.raises(ValueError, match="format 99"):
        Results({**document, "format": 99})


def test_report_is_written_and_checked(document, tmp_path, capsys) -> None:
    results, readme, page = (tmp_path / name for name in ("results.json", "README.md", "benchmarks.md"))
    results.write_text(json.dumps(document), encoding="utf-8")
    for path in (readme, page):
        path.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe rest.\n", encoding="utf-8")
    arguments = [str(results), "--readme", str(readme), "--page", str(page)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main([*arguments, "--write"]) == 0
    assert report.main([*arguments, "--check"]) == 0
    for path in (readme, page):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# Title\n\n" + report.BEGIN)
        assert text.endswith(report.END + "\n\nThe rest.\n")
        assert document["machine"]["cpu"] in text
    for part in (document["date"], document["command"], "numpy " + np.__version__):
        assert part in page.read_text(encoding="utf-8")
    for path in (readme, page):  # either may be out of date
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("core", "Core"), encoding="utf-8")
        assert report.main([*arguments, "--check"]) == 1
        path.write_text(text, encoding="utf-8")
    readme.write_text("no markers", encoding="utf-8")
    assert report.main([*arguments, "--check"]) == 1
    assert "expected one" in capsys.readouterr().err


def test_pictures_are_drawn(document, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    plots.draw(Results(document), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"roofline.png", "batch_curve.png"}
