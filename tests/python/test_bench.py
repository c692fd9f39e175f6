"""The benchmark's own machinery, without any peer but NumPy: what it computes, what it writes, what becomes of it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bench
import checks
import formula
import machine
import report
import session
import tables
import targets
from configurations import CONFIGURATIONS, data, given, reference
from results import Results
from timing import Call, summary

BENCH = Path(__file__).parents[1] / "bench"


def run_bench(path: Path, *arguments: str) -> dict:
    """What a short run writes."""
    words = ["--quick", "--peers", "numpy", *arguments, "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(BENCH / "bench.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "## Targets" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "results.json"
    return run_bench(path, "--configs", "A", "--ops", "log_prob", "--batches", "1,64")


@pytest.fixture(scope="module")
def general_document(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "general.json"
    return run_bench(path, "--configs", "G1,R,I", "--ops", "log_prob", "--batches", "1")


# ---------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "flops", "kibibytes"),
    [
        *(
            ("A", 24_576, 50),
            ("B", 49_152, 100),
            ("C", 1_441_792, 2_834),
            ("D", 74_752, 150),
            ("E", 19_267_584, 37_688),
        ),
        # J: 10 networks 3 -> 100 -> 100 -> 6 and 11 matrices 6 x 6.
        ("J", 2 * (10 * (3 * 100 + 100 * 100 + 100 * 6) + 11 * 6 * 6), 436),
        # G: 10 numbers of context in the first layer and in both gates; with halves of 2 and 3 three couplings give 3.
        ("G", 2 * (62 * 50 + 5 * 4 * 2_500 + 5 * 2 * 500 + 26 * 50 + 6 * 25), 240),
        ("G1", 2 * (12 * 50 + 5 * 4 * 2_500 + 26 * 50 + 6 * 25), 210),
        ("M", 2 * 10 * 2 * (3 * 100 + 100 * 100 + 100 * 3), 844),
        ("R", 24_576, 50),
        # 23 numbers for each of 3 features, 29 with 10 bins, 31 with free slopes at the ends.
        ("F", 2 * (10 * (3 * 256 + 4 * 256 * 256 + 256 * 69) + 11 * 6 * 6), 11_014),
        ("S", 2 * (62 * 50 + 5 * 4 * 2_500 + 5 * 2 * 500 + 50 * 13 * 29 + 5 * 25), 309),
        ("H", 2 * 4 * (2 * 32 + 2 * 32 * 32 + 32 * 62), 66),
        ("I", 2 * 8 * (3 * 64 + 64 * 64 + 64 * 69), 278),
    ],
)
def test_arithmetic_and_size_of_a_configuration(name, flops, kibibytes) -> None:
    configuration = CONFIGURATIONS[name]
    assert configuration.flops_per_row == flops
    assert round(configuration.weight_bytes / 1024) == kibibytes
    assert configuration.flops("train", 256) == 3 * 256 * flops


def test_the_models_are_those_that_nvpflow_builds() -> None:
    import nvpflow

    for configuration in CONFIGURATIONS.values():
        spec = nvpflow.FlowSpec.from_json(json.dumps(configuration.spec))
        built = eval(configuration.expression, {"nvpflow": nvpflow, **vars(nvpflow.layers)}).spec
        if configuration.mixing != "lu" and configuration.mask != "random":
            assert built == spec
        else:  # but for the orders and the masks that were drawn
            found, wanted = ([re.sub(r"\d+(?=[,)])", "", repr(layer)) for layer in s.layers] for s in (built, spec))
            assert found == wanted
        flow = nvpflow.Flow(spec)
        assert list(flow.parameters()) == list(reference(configuration).parameters)
        if configuration.plain:
            assert 4 * flow.num_parameters == configuration.weight_bytes
            kernels = sum(value.size for name, value in flow.parameters().items() if name.endswith(".kernel"))
            assert 2 * kernels == configuration.flops_per_row


def test_fewer_rows_are_the_first_of_more() -> None:
    assert np.array_equal(data(CONFIGURATIONS["A"], 3), data(CONFIGURATIONS["A"], 64)[:3])
    for few, many in zip(given(CONFIGURATIONS["G"], 3), given(CONFIGURATIONS["G"], 64), strict=True):
        assert np.array_equal(few, many[:3])
    assert given(CONFIGURATIONS["G1"], 3)[1].shape == (10,)
    assert np.array_equal(data(CONFIGURATIONS["H"], 3), data(CONFIGURATIONS["H"], 64)[:3])


# ---------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("library", "name"),
    [
        *itertools.product(["numpy", "jax", "torch"], ["A", "J", "G", "G1", "M", "R", "S", "H", "I"]),
        *(("torch_compile", "S"), ("torch_compile", "H")),  # of which only the splines are written in another way
    ],
)
def test_the_formula_is_the_oracle_s_in_every_library(library, name) -> None:
    library, _, compiled = library.partition("_")
    module = pytest.importorskip("jax.numpy" if library == "jax" else library)
    arrays = getattr(formula, f"{library}_arrays")(*([True] if compiled else []))
    convert = module.tensor if library == "torch" else module.asarray
    configuration, oracle = CONFIGURATIONS[name], reference(CONFIGURATIONS[name])
    rows, flow = given(configuration, 5), formula.flow(configuration)
    limit = 5e-5 if configuration.splines else 1e-5  # logarithms of slopes are differences of large terms
    for one_head in (True, False):
        trained = formula.parameters(configuration, one_head)
        for op in ("log_prob", "forward", "inverse"):
            expected = getattr(oracle, op)(*rows)
            for p in [formula.composed(configuration, trained), *([trained] if op != "inverse" else [])]:
                p = {key: convert(value) for key, value in p.items()}
                found = formula.run(arrays, flow, p, op, *map(convert, rows))
                assert checks.error(found, expected[0] if op == "inverse" else expected) < limit


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
    assert checks.check(peer, CONFIGURATIONS["A"], "log_prob", (x,), peer.call("log_prob", x))["error"] < 1e-5
    peer.parameters["flow_2_coupling_dense_0.kernel"][0, 0] += 0.5
    with pytest.raises(checks.WrongResultError, match="the limit is 1e-04"):
        checks.check(peer, CONFIGURATIONS["A"], "log_prob", (x,), peer.call("log_prob", x))


def test_rows_outside_a_uniform_base_have_no_density() -> None:
    configuration = CONFIGURATIONS["H"]
    p = formula.composed(configuration, formula.parameters(configuration))
    x = np.array([[0.5, 0.5, 0.5, 1.5], [0.5, 0.5, 0.5, 0.5]], np.float32)
    density = formula.run(formula.numpy_arrays(), formula.flow(configuration), p, "log_prob", x)
    assert density[0] == -math.inf
    assert math.isfinite(density[1])


@pytest.mark.parametrize("name", ["A", "J", "G", "M", "R", "S", "H", "I"])
@pytest.mark.filterwarnings("ignore:.*:nvpflow.DataWarning")  # there are few rows
def test_a_step_of_ours_is_a_step_of_adam(name) -> None:
    from ours import Nvpflow

    peer = Nvpflow(CONFIGURATIONS[name], 1)
    for batch in (32, 300):  # the second time from the first weights again
        rows = given(CONFIGURATIONS[name], batch)
        assert checks.check(peer, CONFIGURATIONS[name], "train", rows, peer.train(*rows))["error"] < 1e-5


@pytest.mark.parametrize(
    ("label", "name"),
    [
        *(("torch_eager", "J"), ("torch_fused", "G"), ("jax", "G"), ("zuko", "J"), ("zuko", "M"), ("nflows", "J")),
        ("zuko", "G1"),
        *(("nflows", "G"), ("normflows", "J"), ("normflows", "M"), ("freia", "G"), ("freia", "M"), ("flowjax", "G1")),
        *(("onnxruntime", "J"), ("onnxruntime_bound", "G"), ("openvino", "G1"), ("openvino", "M")),
        *(("torch_eager", "I"), ("torch_fused", "H"), ("jax", "S"), ("zuko", "S"), ("zuko", "H"), ("nflows", "S")),
        *(("nflows", "H"), ("normflows", "S"), ("normflows", "H"), ("normflows", "I"), ("madnis", "H")),
        *(("flowjax", "H"), ("onnxruntime", "S"), ("openvino", "H")),
    ],
)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_peers_pass_their_checks(label, name) -> None:
    packages = {"jax": "optax", "freia": "FrEIA", "torch_eager": "torch", "torch_fused": "torch"}
    packages["onnxruntime_bound"] = "onnxruntime"
    if label in ("onnxruntime", "onnxruntime_bound", "openvino"):
        pytest.importorskip("onnx")
    pytest.importorskip(packages.get(label, label))
    from peers import PEERS

    configuration, rows = CONFIGURATIONS[name], given(CONFIGURATIONS[name], 3)
    peer = PEERS[label](configuration, 1)
    for op in ("log_prob",) if label in ("jax", "flowjax") else ("log_prob", "inverse"):
        checks.check(peer, configuration, op, rows, peer.call(op, *rows))
    if peer.can_train and not configuration.one_context:
        checks.check(peer, configuration, "train", rows, peer.train(*rows))


def test_nothing_trains_under_one_context() -> None:
    found = session.cells(["G", "G1"], ["log_prob", "train"], [1], [256])
    assert [(c.configuration, c.op) for c in found] == [("G", "log_prob"), ("G", "train"), ("G1", "log_prob")]


def test_who_takes_part() -> None:
    def contenders(name: str) -> list[str]:
        every = session.labels(session.PEERS, ["native", "avx2"])
        return [label for label in every if session.takes_part(label, session.Cell(name, "log_prob", 1024))]

    assert {"onnxruntime", "zuko", "nflows", "normflows", "flowjax", "jax"} <= set(contenders("A"))
    assert {"nvpflow_halves", "onnxruntime", "freia"} & set(contenders("J")) == {"onnxruntime", "freia"}
    assert {"nflows", "normflows", "freia", "zuko"} & set(contenders("G")) == {"nflows", "freia", "zuko"}
    assert {"nflows", "normflows", "freia", "zuko", "flowjax"} & set(contenders("M")) == {"normflows", "freia", "zuko"}
    assert {"nvpflow", "nvpflow_halves", "nvpflow_avx2"} <= set(contenders("R"))
    libraries = {"nflows", "normflows", "freia", "madnis", "zuko", "flowjax"}
    assert libraries & set(contenders("S")) == libraries - {"freia", "madnis"}
    assert libraries & set(contenders("H")) == libraries - {"freia"}


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


def test_flows_beyond_halves_are_held_to_targets_of_their_own(general_document) -> None:
    results = Results(general_document)
    by_name = {(t.what, t.case): t for t in targets.evaluate(results)}
    assert by_name["random masks over halves", "R log_prob 1"].met is not None
    isa = results.native_isa()
    assert ((f"one row, median, {isa}", "G1") in by_name) == (isa in ("avx512", "avx2"))
    assert by_name["1,024 rows, share of FMA peak", "G1"].target == "at least 45 %"
    assert ("1,024 rows, ahead of PyTorch flow libraries", "G1") in by_name
    assert by_name["1,024 rows, ahead of the fastest compiled peer", "I"].target == "at least 1.5 x"
    assert by_name["training step of 512 rows, ahead of PyTorch flow libraries", "I"].target == "at least 4 x"
    assert {case.split()[0] for _, case in by_name} == {"G1", "R", "I"}


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
    begin, end = report.SPEED
    for path in (readme, page):
        path.write_text(f"# Title\n\n{begin}\nold\n{end}\n\nThe rest.\n", encoding="utf-8")
    arguments = [str(results), "--readme", str(readme), "--page", str(page)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main([*arguments, "--write"]) == 0
    assert report.main([*arguments, "--check"]) == 0
    for path in (readme, page):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# Title\n\n" + begin)
        assert text.endswith(end + "\n\nThe rest.\n")
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


def test_flows_beyond_halves_have_a_section_of_their_own(general_document, tmp_path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "benchmarks.md"
    results.write_text(json.dumps(general_document), encoding="utf-8")
    speed, general, splines = ("\n".join(markers) for markers in (report.SPEED, report.GENERAL, report.SPLINES))
    page.write_text(f"{speed}\n\n{general}\n\n{splines}\n", encoding="utf-8")
    arguments = [str(results), "--readme", str(tmp_path / "no such file"), "--page", str(page)]
    assert report.main([*arguments, "--write"]) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(speed)
    assert "| G1 " in text
    assert "random masks" in text
    assert CONFIGURATIONS["R"].expression in text
    assert CONFIGURATIONS["I"].expression in text.split(report.SPLINES[0])[1]


def test_versus_compares_flows_beyond_halves() -> None:
    words = [str(BENCH / "versus.py"), sys.executable, sys.executable]
    words += ["--models", "G,G1", "--rounds", "2", "--slice", "0.001", "--rows", "1", "--train-rows", "4096"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["G", "log_prob", "1"],
        ["G", "train", "4096"],
        ["G1", "log_prob", "1"],
    ]


def test_pictures_are_drawn(document, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    plots.draw(Results(document), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"roofline.png", "batch_curve.png"}
