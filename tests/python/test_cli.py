"""The command nvpflow as a shell user meets it: a process with exit codes, messages, files and pipes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import nvpflow
import pytest
from nvpflow import cli

COMMAND = [sys.executable, "-m", "nvpflow"]
QUICK = ["--epochs", "2", "--num-flows", "2", "--hidden-sizes", "8", "--threads", "1"]


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def flow():
    return nvpflow.build(3, 2, (8,), seed=1)


@pytest.fixture
def folder(tmp_path, rows, flow):
    """A folder that holds the rows as data.npy and a model, model.safetensors, for them."""
    np.save(tmp_path / "data.npy", rows)
    flow.save(tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def run(folder):
    """Run nvpflow in the folder; `fails` is the exit code to expect."""

    def run(*arguments, fails=0, stdin=None, text=True):
        result = subprocess.run(
            [*COMMAND, *map(str, arguments)], cwd=folder, input=stdin, capture_output=True, text=text, timeout=120
        )
        assert result.returncode == fails, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run


def error_of(result):
    """The message of a failed run, which must be one line and no traceback."""
    assert re.fullmatch(r"nvpflow: error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


# ---------------------------------------------------------------------------------------------------------- basics


def test_help_and_version(run):
    assert "fit" in run("--help").stdout
    assert "--max-time" in run("fit", "--help").stdout
    name, cpu, cuda = run("--version").stdout.splitlines()
    assert name == f"nvpflow {nvpflow.__version__}"
    assert cpu == f"CPU   {nvpflow.cpu_isa()}"
    devices = ", ".join(map(nvpflow.cuda.device_name, range(nvpflow.cuda.device_count())))
    assert cuda == f"CUDA  {devices or nvpflow.cuda.why_unavailable()}"


@pytest.mark.parametrize(
    "arguments",
    [[], ["paint"], ["fit", "data.npy"], ["sample", "model.safetensors"], ["fit", "a", "-o", "b", "--epochs", "x"]],
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    result = run(*arguments, fails=2)
    assert result.stderr.startswith("usage: nvpflow")
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------------------- fit


def test_fit_writes_the_model_that_python_would(run, folder, rows):
    output = run("fit", "data.npy", "-o", "new.safetensors", *QUICK).stdout
    assert "data: data.npy, 600 rows x 3 columns" in output
    assert re.search(r"held-out log-likelihood: -\d+\.\d{4} nats per row", output)
    assert "model written to new.safetensors" in output

    expected = nvpflow.build(3, 2, (8,), standardize=True)
    history = expected.fit(rows, epochs=2, num_threads=1)
    assert nvpflow.load(folder / "new.safetensors") == expected
    assert f"{-history.best_loss:.4f} nats" in output


@pytest.mark.parametrize(("count", "more"), [(149, ()), (150, ()), (149, ("--standardize", "auto"))], ids=str)
def test_fit_of_few_rows_begins_as_a_gaussian(call, folder, rows, count, more):
    np.save(folder / "few.npy", rows[:count])
    assert call("fit", "few.npy", "-o", "new.safetensors", "--quiet", *QUICK, *more)[0] == 0
    second = nvpflow.load(folder / "new.safetensors").spec.layers[1]
    assert (second == nvpflow.layers.LULinear(whitens=True)) == (count < 150 and not more)


def test_fit_passes_on_how_it_standardizes(call, folder, rows):
    far = rows.copy()
    far[:3, 1] = 1e4
    np.save(folder / "far.npy", far)
    fit = ("fit", "far.npy", "-o", "new.safetensors", "--quiet", *QUICK)
    assert call(*fit, "--standardize", "mean", "--max-deviation", "5")[0] == 0
    expected = nvpflow.build(3, 2, (8,))
    with pytest.warns(nvpflow.DataWarning):
        history = expected.fit(far, epochs=2, num_threads=1, standardize="mean", max_deviation=5, progress=False)
    assert history.rows_left_out == 3
    assert nvpflow.load(folder / "new.safetensors") == expected
    code, _, errors = call(*fit, "--force", "--standardize", "mean", "--no-standardize")
    assert (code, errors[:71]) == (1, "nvpflow: error: --standardize mean and --no-standardize contradict; giv")


def test_fit_passes_every_option_on(run, folder, rows):
    np.save(folder / "held_out.npy", rows[:100])
    run(
        *("fit", "data.npy", "-o", "new.safetensors", "--quiet", "--num-flows", 3, "--hidden-sizes", "7,5"),
        *("--activation", "silu", "--scale-bound", 2, "--no-standardize", "--dtype", "float64", "--epochs", 3),
        *("--batch-size", 100, "--learning-rate", 0.01, "--schedule", "constant", "--weight-decay", 0.1),
        *("--clip-norm", 0.5, "--patience", 2, "--validation", "held_out.npy", "--seed", 5, "--threads", 1),
        *("--checkpoint", "checkpoint", "--averaging", 0.5),
    )
    expected = nvpflow.build(3, 3, (7, 5), "silu", scale_bound=2, standardize=False, dtype="float64", seed=5)
    expected.fit(
        rows.astype(np.float64),
        validation=rows[:100].astype(np.float64),
        epochs=3,
        batch_size=100,
        learning_rate=0.01,
        schedule="constant",
        weight_decay=0.1,
        clip_norm=0.5,
        averaging=0.5,
        patience=2,
        seed=5,
    )
    assert nvpflow.load(folder / "new.safetensors") == expected
    assert (folder / "checkpoint").exists()


def test_fit_of_another_model_than_a_real_nvp(run, folder):
    """The layers, and with them the masks and orders that the seed draws, are those of build."""
    options = ("--mixing", "permutation", "--mask", "random", "--transform", "additive", "--actnorm")
    run("fit", "data.npy", "-o", "new.safetensors", "--quiet", *QUICK, "--hidden-sizes", "8", *options, "--seed", 3)
    flow = nvpflow.load(folder / "new.safetensors")
    more = {"mixing": "permutation", "mask": "random", "transform": "additive", "actnorm": True, "seed": 3}
    assert flow.spec == nvpflow.build(3, flow.spec.num_flows, (8,), **more).spec
    result = run("info", "new.safetensors")
    for layer in flow.spec.layers:
        assert f"\n    {layer!r}," in result.stdout


def test_fit_and_sample_splines(run, folder):
    options = ("--transform", "spline", "--num-bins", 5, "--tail-bound", 2.5)
    run("fit", "data.npy", "-o", "new.safetensors", "--quiet", *QUICK, "--hidden-sizes", "8", *options)
    flow = nvpflow.load(folder / "new.safetensors")
    more = {"transform": "spline", "num_bins": 5, "tail_bound": 2.5}
    assert flow.spec == nvpflow.build(3, flow.spec.num_flows, (8,), **more).spec
    assert "Spline(5, tail_bound=2.5)" in run("info", "new.safetensors").stdout
    assert "flow_0_derivatives.kernel" in run("info", "new.safetensors").stdout
    assert json.loads(run("info", "new.safetensors", "--json").stdout)["spec"] == json.loads(flow.spec.to_json())
    run("sample", "new.safetensors", "-n", 20, "--seed", 3, "-o", "drawn.npy")
    np.testing.assert_array_equal(np.load(folder / "drawn.npy"), flow.sample(20, seed=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-bins", 4), "--num-bins is 4 with transform='affine', expected transform='spline' for it"),
        (("--transform", "spline", "--scale-bound", 2), "--scale-bound is 2.0 with transform='spline', expected it "),
        (("--scale", "exp", "--scale-bound", 2), "--scale-bound is 2.0 with scale='exp', expected it left out: that f"),
        (("--network", "residual", "--hidden-sizes", "8,8"), "--hidden-sizes is (8, 8) with network='residual', expe"),
    ],
)
def test_fit_refuses_options_that_contradict_each_other(call, options, message):
    code, _, errors = call("fit", "data.npy", "-o", "new.safetensors", *options)
    assert (code, errors[: 16 + len(message)]) == (1, f"nvpflow: error: {message}")


def test_fit_without_hidden_layers_and_quiet(run, folder):
    result = run("fit", "data.npy", "-o", "new.safetensors", "--quiet", *QUICK, "--hidden-sizes", "none")
    assert result.stdout == result.stderr == ""
    assert nvpflow.load(folder / "new.safetensors").spec.hidden_sizes == ()


def test_fit_without_options_is_the_estimators_recipe(run, folder):
    pytest.importorskip("sklearn")
    from nvpflow.sklearn import FlowDensity

    run("fit", "data.npy", "-o", "default.safetensors", "--quiet", "--epochs", 2)
    expected = FlowDensity(epochs=2, random_state=0).fit(np.load(folder / "data.npy")).flow_
    assert nvpflow.load(folder / "default.safetensors") == expected


def test_fit_stops_in_time(run):
    output = run("fit", "data.npy", "-o", "new.safetensors", *QUICK, "--epochs", 10_000_000, "--max-time", 0.5).stdout
    assert "stop reason: --max-time" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs is 0, expected at least 1"),
        (["--activation", "rulu"], "activation is 'rulu', expected one of relu,"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--learning-rate", "0"], "--learning-rate is 0, expected a finite number above 0"),
        (["--threads", "-1"], "--threads is -1"),
        (["--validation", "1.5"], "validation is 1.5"),
        (["--validation", "none.npy"], "none.npy: No such file or directory"),
        (["--checkpoint", "no/where"], "no/where"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_fit_with_wrong_options_writes_nothing(run, folder, arguments, message):
    assert message in error_of(run("fit", "data.npy", "-o", "new.safetensors", *QUICK, *arguments, fails=1))
    assert not (folder / "new.safetensors").exists()


def test_fit_counts_and_names_rows_that_are_not_finite(run, folder, rows):
    damaged = rows.copy()
    damaged[[3, 77], 1] = np.nan, np.inf
    np.save(folder / "damaged.npy", damaged)
    message = error_of(run("fit", "damaged.npy", "-o", "new.safetensors", *QUICK, "--missing", "nan", fails=1))
    assert "2 of 600 rows" in message
    assert "77" in message


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted_fit_keeps_the_best_weights(folder):
    arguments = ["fit", "data.npy", "-o", "new.safetensors", *QUICK, "--epochs", "100000000"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not process.stdout.readline().startswith("model:"):
            assert process.poll() is None
        time.sleep(1)  # some epochs
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors.splitlines() == [
        "nvpflow: the best weights so far are in new.safetensors",
        "nvpflow: interrupted",
    ]
    assert nvpflow.load(folder / "new.safetensors").spec.num_flows == 2


def test_progress_bar_on_a_terminal(folder):
    pytest.importorskip("tqdm")
    pty = pytest.importorskip("pty")
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "fit", "data.npy", "-o", "new.safetensors", *QUICK],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
    assert process.wait(timeout=60) == 0
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "epoch 2/2: 100%" in shown
    assert re.search(r"nll \d+\.\d+, validation \d+\.\d+, best \d+\.\d+ nats", shown)


# ---------------------------------------------------------------------------------------------------------- tables


def save_csv(path, rows, header=""):
    np.savetxt(path, rows, delimiter=",", fmt="%.9g", header=header, comments="")


def test_score_reads_every_kind_of_table(run, folder, rows, flow):
    expected = flow.log_probability(rows)
    save_csv(folder / "plain.csv", rows)
    save_csv(folder / "header.csv", rows, header='"a, with comma",b,c')
    np.save(folder / "fortran.npy", np.asfortranarray(rows))
    np.save(folder / "wide.npy", rows.astype(np.float64))
    (folder / "dos.csv").write_bytes(
        b"\xef\xbb\xbf" + (folder / "plain.csv").read_bytes().replace(b"\n", b"\r\n") + b"\r\n"
    )
    for name in ("data.npy", "plain.csv", "header.csv", "fortran.npy", "wide.npy", "dos.csv"):
        run("score", "model.safetensors", name, "-o", f"{name}.scores.npy")
        scores = np.load(folder / f"{name}.scores.npy")
        assert scores.dtype == np.float32
        assert np.array_equal(scores, expected), name


def test_score_reads_parquet(run, folder, rows, flow):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({name: rows[:, i] for i, name in enumerate("abc")}), folder / "data.parquet")
    run("score", "model.safetensors", "data.parquet", "-o", "scores.npy")
    assert np.array_equal(np.load(folder / "scores.npy"), flow.log_probability(rows))


def test_score_writes_csv_that_reads_back_exactly(run, folder, rows, flow):
    run("score", "model.safetensors", "data.npy", "-o", "scores.csv")
    assert np.array_equal(np.loadtxt(folder / "scores.csv", dtype=np.float32), flow.log_probability(rows))


@pytest.fixture
def named(run, folder, rows):
    save_csv(folder / "named.csv", rows, header="east,north,up")
    run("fit", "named.csv", "-o", "named.safetensors", "--quiet", *QUICK)
    return nvpflow.load(folder / "named.safetensors")


def test_fit_keeps_the_names_of_columns(run, named):
    assert named.column_names == ("east", "north", "up")
    assert "columns: 'east', 'north', 'up'" in run("info", "named.safetensors").stdout
    assert json.loads(run("info", "named.safetensors", "--json").stdout)["column_names"] == ["east", "north", "up"]
    assert json.loads(run("info", "model.safetensors", "--json").stdout)["column_names"] is None
    assert "columns:" not in run("info", "model.safetensors").stdout


def test_info_tells_the_threshold(run, named, folder):
    assert json.loads(run("info", "named.safetensors", "--json").stdout)["threshold"] is None
    assert "threshold" not in run("info", "named.safetensors").stdout
    named.set_threshold(-12.5, 0.01)
    named.save(folder / "limited.safetensors")
    assert "threshold: log p below -12.5 nats, quantile 0.01\n" in run("info", "limited.safetensors").stdout
    found = json.loads(run("info", "limited.safetensors", "--json").stdout)["threshold"]
    assert found == {"log_p": -12.5, "quantile": 0.01}


def test_names_of_a_stranger_cannot_write_to_the_terminal(run, folder, rows):
    flow = nvpflow.build(3, 1, (4,))
    flow.column_names = ("a\nfake", "\x1b[2J", "x" * 100_000)
    flow.save(folder / "stranger.safetensors")
    save_csv(folder / "other.csv", rows, header="a,b,c")
    shown = run("info", "stranger.safetensors").stdout
    assert r"columns: 'a\nfake', '\x1b[2J', 'xxx" in shown
    assert "\x1b" not in shown
    assert len(shown) < 1000
    message = error_of(run("score", "stranger.safetensors", "other.csv", fails=1))
    assert r"the model was trained with 'a\nfake' there" in message


def test_a_first_line_without_a_value_is_no_header(run, folder):
    (folder / "missing.csv").write_text(",,\n1,2,3\n")
    message = "missing.csv: missing cells in column 1 (line 1), column 2 (line 1), column 3 (line 1)"
    assert message in error_of(run("score", "model.safetensors", "missing.csv", fails=1))


@pytest.mark.parametrize(
    "arguments",
    [
        ("score", "named.safetensors", "other.csv", "-o", "out.csv"),
        ("check", "named.safetensors", "other.csv"),
        ("report", "named.safetensors", "other.csv", "-o", "out.html"),
        ("report", "named.safetensors", "named.csv", "--train", "other.csv", "-o", "out.html"),
        ("fit", "named.csv", "--validation", "other.csv", "-o", "out.safetensors", *QUICK),
    ],
    ids=["score", "check", "report", "report --train", "fit --validation"],
)
def test_columns_in_another_order_are_refused(run, folder, rows, named, arguments):
    if arguments[0] == "report":
        pytest.importorskip("matplotlib")
    save_csv(folder / "other.csv", rows[:, [0, 2, 1]], header="east,up,north")
    message = error_of(run(*arguments, fails=1))
    assert "other.csv: column 2 is 'up', the model was trained with 'north' there" in message
    assert not list(folder.glob("out.*"))
    assert run(*arguments, "--ignore-names").returncode == 0


def test_tables_that_agree_or_have_no_names_are_scored(run, folder, rows, named):
    expected = named.log_probability(rows)
    for table in ("named.csv", "data.npy"):
        run("score", "named.safetensors", table, "-o", f"{table}.scores.npy")
        # The CSV holds decimal numbers, which are read as float64 and rounded once standardized.
        np.testing.assert_allclose(np.load(folder / f"{table}.scores.npy"), expected, rtol=1e-5, err_msg=table)


def test_score_in_a_pipe(run, folder, rows, flow):
    expected = flow.log_probability(rows)
    save_csv(folder / "plain.csv", rows)
    printed = run("score", "model.safetensors", "-", stdin=(folder / "plain.csv").read_text()).stdout
    assert np.array_equal(np.array(printed.split(), dtype=np.float32), expected)
    for name in ("data.npy", "plain.csv"):
        data = (folder / name).read_bytes()
        output = run("score", "model.safetensors", "-", "--format", "npy", stdin=data, text=False).stdout
        (folder / "piped.npy").write_bytes(output)
        assert np.array_equal(np.load(folder / "piped.npy"), expected)


def test_blocks_join_to_the_whole(run, folder, flow):
    """More rows than one block holds, so that every reader and writer goes round its loop."""
    rows = np.random.default_rng(3).normal(size=(400_000, 3)).astype(np.float32)
    np.save(folder / "large.npy", rows)
    data = (folder / "large.npy").read_bytes()
    output = run("score", "model.safetensors", "-", "--format", "npy", "--threads", 1, stdin=data, text=False).stdout
    (folder / "scores.npy").write_bytes(output)
    assert np.array_equal(np.load(folder / "scores.npy"), flow.log_probability(rows))


def test_empty_tables(run, folder):
    (folder / "header.csv").write_text("a,b,c\n")
    np.save(folder / "none.npy", np.empty((0, 3)))
    np.save(folder / "narrow.npy", np.empty((3, 0)))
    message = error_of(run("score", "model.safetensors", "narrow.npy", fails=1))
    assert "narrow.npy: 0 columns, the model takes 3" in message
    for name in ("header.csv", "none.npy"):
        run("score", "model.safetensors", name, "-o", "scores.npy", "--force")
        assert np.load(folder / "scores.npy").shape == (0,)
        assert f"{name}: no rows" in error_of(run("fit", name, "-o", "new.safetensors", fails=1))


def test_a_device_is_asked_for_before_the_data_are_read(run, folder):
    error = error_of(run("fit", "missing.csv", "-o", "m.safetensors", "--device", "tpu", fails=1))
    assert "device is 'tpu'" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n1,2,3\n\n4,5\n", "bad.csv: line 4: 2 columns, expected 3 as in line 1"),
        ("1,2,3\n4,5,6,7\n", "bad.csv: line 2: 4 columns, expected 3 as in line 1"),
        ("1,2,3\n4,,6\n", "bad.csv: missing cells in column 2 (line 2)"),
        ("a,b,c\n1,2,3\n4,5,six\n", "bad.csv: 'c' holds text (first 'six', line 3)"),
        ("1,two,3\n", "bad.csv: column 2 holds text (first 'two', line 1)"),
        ("1,2\n3,4\n", "bad.csv: 2 columns, the model takes 3"),
        ("", "bad.csv: empty"),
    ],
)
def test_bad_csv_is_named_with_its_line(run, folder, text, message):
    (folder / "bad.csv").write_text(text)
    assert message in error_of(run("score", "model.safetensors", "bad.csv", "-o", "scores.npy", fails=1))
    assert sorted(path.name for path in folder.iterdir()) == ["bad.csv", "data.npy", "model.safetensors"]


def test_bad_npy(run, folder, rows):
    np.save(folder / "complex.npy", rows.astype(complex))
    np.save(folder / "object.npy", np.array([[1, "a", None]], dtype=object), allow_pickle=True)
    np.save(folder / "vector.npy", rows[:, 0])
    (folder / "short.npy").write_bytes((folder / "data.npy").read_bytes()[:-10])
    (folder / "nothing.npy").touch()
    for name, message in (
        ("complex.npy", "dtype complex128, expected real numbers"),
        ("object.npy", "not a readable .npy file"),
        ("vector.npy", "shape (600,), expected two dimensions"),
        ("short.npy", "not a readable .npy file"),
        ("nothing.npy", "not a readable .npy file"),
    ):
        message = f"{name}: {message}"
        assert message in error_of(run("score", "model.safetensors", name, "-o", "scores.npy", fails=1))
    cut = (folder / "short.npy").read_bytes()
    result = run("score", "model.safetensors", "-", "-o", "scores.npy", stdin=cut, text=False, fails=1)
    assert b"standard input: ends early, after 599 of 600 rows" in result.stderr
    assert not (folder / "scores.npy").exists()


def test_paths_that_are_not_files(run, folder):
    (folder / "sub").mkdir()
    (folder / "data.txt").touch()
    for arguments, message in (
        (("score", "model.safetensors", "sub"), "sub is a directory"),
        (("score", "model.safetensors", "none.npy"), "none.npy: No such file or directory"),
        (("score", "model.safetensors", "data.txt"), "data.txt: unknown kind of table '.txt'"),
        (("score", "model.safetensors", "data.npy", "-o", "new"), "unknown kind of table ''"),
        (("score", "model.safetensors", "data.npy", "-o", "sub", "--format", "npy"), "--format is npy, expected parq"),
        (("score", "model.safetensors", "data.npy", "-o", "no/where.npy"), "no/where.npy: there is no folder"),
        (("score", "sub", "data.npy"), "sub"),
        (("score", "data.npy", "data.npy"), "not a safetensors file"),
        (("fit", "sub", "-o", "new.safetensors"), "sub is a directory"),
        (("fit", "data.npy", "-o", "sub"), "sub is a directory"),
        (("info", "none.safetensors"), "No such file or directory"),
    ):
        assert message in error_of(run(*arguments, fails=1))


# ---------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "data.npy", "-o", "old.npy", *QUICK],
        ["score", "model.safetensors", "data.npy", "-o", "old.npy"],
        ["sample", "model.safetensors", "-n", "5", "-o", "old.npy"],
    ],
)
def test_nothing_is_overwritten_without_force(run, folder, command):
    (folder / "old.npy").write_text("precious")
    assert "old.npy exists already (--force overwrites it)" in error_of(run(*command, fails=1))
    assert (folder / "old.npy").read_text() == "precious"
    run(*command, "--force")
    assert b"precious" not in (folder / "old.npy").read_bytes()


def test_failed_output_leaves_the_old_file(run, folder):
    (folder / "scores.npy").write_text("precious")
    (folder / "bad.csv").write_text("1,2,3\n" * 500_000 + "1,2\n")
    run("score", "model.safetensors", "bad.csv", "-o", "scores.npy", "--force", fails=1)
    assert (folder / "scores.npy").read_text() == "precious"
    assert sorted(path.name for path in folder.iterdir()) == ["bad.csv", "data.npy", "model.safetensors", "scores.npy"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk(run):
    message = error_of(run("score", "model.safetensors", "data.npy", "-o", "/dev/full", fails=1))
    assert message == "nvpflow: error: /dev/full: No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_reader_that_goes_away_is_not_an_error_message(folder):
    command = [*COMMAND, "sample", "model.safetensors", "-n", "3000000"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


# ---------------------------------------------------------------------------------------------------------- others


def test_sample(run, folder, flow):
    expected = flow.sample(1000, seed=7)
    run("sample", "model.safetensors", "-n", 1000, "--seed", 7, "-o", "samples.npy")
    assert np.array_equal(np.load(folder / "samples.npy"), expected)
    text = run("sample", "model.safetensors", "-n", 3, "--seed", 7, "--start", 10).stdout
    printed = np.array([line.split(",") for line in text.splitlines()], dtype=np.float32)
    assert np.array_equal(printed, expected[10:13])
    assert run("sample", "model.safetensors", "-n", 0).stdout == ""
    assert "-n -1: expected at least 0" in error_of(run("sample", "model.safetensors", "-n", -1, fails=1))


def test_sample_at_a_temperature(run, folder, flow):
    run("sample", "model.safetensors", "-n", "7", "--seed", "3", "--temperature", "0.5", "-o", "cold.npy")
    np.testing.assert_array_equal(np.load(folder / "cold.npy"), flow.sample(7, seed=3, temperature=0.5))


def test_sample_larger_than_a_block(run, folder, flow):
    run("sample", "model.safetensors", "-n", 500_000, "-o", "samples.npy", "--threads", 1)
    assert np.array_equal(np.load(folder / "samples.npy"), flow.sample(500_000, seed=0))


def test_info(run, flow):
    text = run("info", "model.safetensors").stdout
    assert repr(flow) in text
    assert re.search(r"flow_1_scale.kernel +float32 \[8, 1\]", text)
    info = json.loads(run("info", "model.safetensors", "--json").stdout)
    assert info["num_parameters"] == flow.num_parameters
    assert info["tensors"] == {name: list(value.shape) for name, value in flow.parameters().items()}
    assert nvpflow.FlowSpec.from_json(json.dumps(info["spec"])) == flow.spec


@pytest.mark.parametrize("standardize", ["auto", "covariance"])
def test_columns_that_follow_from_others_are_kept_on_request(run, folder, rows, standardize):
    np.save(folder / "copied.npy", np.column_stack([rows, rows[:, 0] - rows[:, 1]]))
    arguments = ("fit", "copied.npy", "-o", "copied.safetensors", *QUICK, "--standardize", standardize)
    assert "linear combination" in run(*arguments, fails=1).stderr
    assert "linear combination" in run(*arguments, "--allow-degenerate").stderr


def test_demo(run, folder):
    quick = ("--epochs", 1, "--threads", 1)
    output = run("demo", *quick).stdout
    assert re.search(r"full-covariance Gaussian +-20\.\d+", output)
    assert re.search(r"One row +\d+\.\d+ us", output)
    results = folder / "nvpflow-demo"
    assert nvpflow.load(results / "model.safetensors").spec.input_size == 6
    assert np.load(results / "samples.npy").shape == (10_000, 6)
    assert ("demo.png" in output) == (results / "demo.png").exists()

    assert f"in nvpflow-demo-2{os.sep}" in run("demo", *quick).stdout
    assert "--force overwrites it" in error_of(run("demo", *quick, "-o", "nvpflow-demo", fails=1))
    run("demo", *quick, "-o", "nvpflow-demo", "--force")
    run("demo", "--epochs", 0, fails=1)
    assert not (folder / "nvpflow-demo-3").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["fit", "data.npy", "-o", "data.npy"], "DATA"),
        (["fit", "data.npy", "-o", "m.st", "--checkpoint", "m.st"], "--checkpoint"),
        (["fit", "data.npy", "-o", "m.st", "--validation", "./m.st"], "--validation"),
        (["score", "model.safetensors", "data.npy", "-o", "data.npy"], "DATA"),
        (["score", "model.safetensors", "data.npy", "-o", "model.safetensors", "--format", "csv"], "MODEL"),
    ],
)
def test_inputs_are_not_overwritten_even_with_force(run, folder, arguments, word):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = error_of(run(*arguments, "--force", fails=1))
    assert word in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_does_not_go_to_stdout(run, folder):
    assert "stdout" in error_of(run("fit", "data.npy", "-o", "-", fails=1))
    assert not (folder / "-").exists()


def test_time_must_be_positive(run):
    assert "--max-time" in error_of(run("fit", "data.npy", "-o", "m.st", "--max-time", "-1", fails=1))


@pytest.mark.parametrize("header", ["{'descr': '<f4', 'fortran_order': False, 'shape': (10**29, 3), }", "(((("])
def test_a_lying_npy_header_is_one_line(header, tmp_path, capsys):
    nvpflow.build(3, 2, (8,)).save(tmp_path / "m.safetensors")
    text = header.replace("10**29", str(10**29)).encode().ljust(117) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    assert cli.main(["score", str(tmp_path / "m.safetensors"), str(tmp_path / "x.npy")]) == 1
    assert re.fullmatch(r"nvpflow: error: [^\n]*x.npy: not a readable .npy file: [^\n]*\n", capsys.readouterr().err)


def test_a_field_that_never_ends_is_one_line(tmp_path, capsys):
    nvpflow.build(3, 2, (8,)).save(tmp_path / "m.safetensors")
    (tmp_path / "x.csv").write_text("1" * 200_000 + ",2,3\n")
    assert cli.main(["score", str(tmp_path / "m.safetensors"), str(tmp_path / "x.csv")]) == 1
    assert re.fullmatch(r"nvpflow: error: [^\n]*x.csv: [^\n]*line 1: [^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(("closed", "code"), [("1>&-", 1), ("2>&-", 0), ("<&-", 0)])
def test_closed_streams(closed, code, tmp_path):
    nvpflow.build(3, 2, (8,)).save(tmp_path / "m.safetensors")
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m nvpflow info m.safetensors {closed}'], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------- tables of others


@pytest.fixture
def call(folder, monkeypatch, capfdbinary):
    """Run the command in this process, in the folder, and return its exit code, output and messages."""
    monkeypatch.chdir(folder)

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        output, errors = capfdbinary.readouterr()
        return code, output.decode(), errors.decode()

    return call


def scores_of(text):
    return np.array(text.split(), dtype=np.float32)


@pytest.fixture
def frame(rows):
    """What a stranger's table holds: a number, an integer, a bool, a category, a date, gaps."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": rows[:, 0], "count": np.arange(600) % 7, "ok": rows[:, 1] > 0})
    frame["kind"] = pandas.Series(np.where(rows[:, 1] > 1, "cat", "dog")).astype("category")
    frame["gap"] = np.where(np.arange(600) % 50 == 3, np.nan, rows[:, 2])
    frame["day"] = pandas.date_range("2020-01-01", periods=600)
    return frame


def write_frame(frame, name):
    pytest.importorskip("pyarrow")
    if name.endswith((".parquet", ".feather")):
        getattr(frame, "to_" + name.rpartition(".")[2])(name)
    else:
        frame.to_csv(name)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.feather"])
def test_a_table_of_pandas_fails_with_one_message_and_goes_through_as_that_says(call, frame, name, tmp_path):
    os.chdir(tmp_path)
    write_frame(frame, name)
    fit = ("fit", name, "-o", "new.safetensors", *QUICK, "--batch-size", 50, "--quiet")
    code, _, errors = call(*fit)
    assert code == 1
    assert errors.count("\n") == 1
    assert f"'kind' holds {'text' if 'csv' in name else 'categories'}" in errors
    assert "'day' holds dates" in errors
    assert "--drop kind,day leaves them out" in errors
    where = "lines 5, 55, 105" if "csv" in name else "rows 3, 53, 103"
    assert f"missing cells in 'gap' (12 cells, {where}, ...): --missing skip leaves 12 rows out" in errors
    assert call(*fit, "--drop", "kind,day", "--missing", "skip")[0] == 0
    assert nvpflow.load("new.safetensors").column_names == ("x", "count", "ok", "gap")
    flow = nvpflow.load("new.safetensors")

    # Row i of the output belongs to row i of the table.
    code, output, errors = call("score", "new.safetensors", name, "--drop", "kind,day", "--missing", "skip")
    assert code == 0
    assert "12 rows with missing cells: log p is NaN there" in errors
    numbers = frame[["x", "count", "ok", "gap"]].to_numpy(dtype=np.float64)
    # CSV holds decimal numbers, which are read as float64.
    np.testing.assert_allclose(scores_of(output), flow.log_probability(numbers), rtol=1e-5)

    # check counts in the rows of the table too.
    code, output, errors = call("check", "new.safetensors", name, "--drop", "kind,day", "--missing", "skip", "--json")
    assert "12 rows with missing cells: results are NaN there" in errors
    found = json.loads(output)
    assert (code, found["rows"], found["nonfinite_rows"]) == (0, len(frame), 12)
    assert found["first_nonfinite_row"] == np.isnan(numbers).any(axis=1).argmax()


def test_columns_without_a_density_are_in_the_one_message(call, frame, tmp_path):
    os.chdir(tmp_path)
    frame["four"], frame["again"] = 4.0, frame["x"]
    write_frame(frame, "t.csv")
    code, _, errors = call("fit", "t.csv", "-o", "new.safetensors")
    assert (code, errors.count("\n")) == (1, 1)
    for text in (
        "'kind' holds text",
        "missing cells in 'gap' (12 cells",
        "column 'four' is constant, 4 in all rows",
        "column 'again' is a copy of column 'x': such columns",
    ):
        assert text in errors
    assert "dropna" not in errors
    assert "isfinite" not in errors
    nvpflow.build(9).save("m.safetensors")  # of scores no density is asked
    assert "constant" not in call("score", "m.safetensors", "t.csv")[2]


def test_the_index_of_pandas_is_left_out_and_said(call, frame, flow, tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    os.chdir(tmp_path)
    rows = np.load("data.npy")
    frame = pandas.DataFrame(rows, columns=["a", "b", "c"])
    frame.to_csv("index.csv")
    pandas.read_csv("index.csv").to_csv("unnamed.csv", index=False)
    frame.sample(frac=1, random_state=0).sort_values("a").to_parquet("sorted.parquet")
    pandas.DataFrame(rows).to_csv("numbers.csv")
    for name, column in (("index.csv", "column 1"), ("unnamed.csv", "'Unnamed: 0'"), ("numbers.csv", "column 1")):
        code, output, errors = call("score", "model.safetensors", name)
        assert (code, errors) == (0, f"nvpflow: {name}: {column} is the index that pandas writes, and is left out\n")
        assert np.array_equal(scores_of(output), flow.log_probability(rows)), name
    assert "'__index_level_0__' is the index" in call("score", "model.safetensors", "sorted.parquet")[2]
    assert call("score", "model.safetensors", "index.csv", "--columns", "a,b,c")[2] == ""


@pytest.mark.parametrize("cell", ["\u00a04", "4\u2003", "\u0664", "\uff14"])
def test_blanks_and_digits_outside_of_ascii_leave_the_column_as_it_is(call, folder, cell):
    """Arrow does not read them: the column must not become zeros for it."""
    pytest.importorskip("pyarrow")
    scored = []
    for four in ("4", cell):
        (folder / "t.csv").write_text(f"1,2,3\n{four},5,6\n,7,8\n2,3,4\n", encoding="utf-8")
        scored.append(call("score", "model.safetensors", "t.csv", "--missing", "nan"))
    assert scored[0][0] == 0
    assert scored[0] == scored[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-n", "1", "--start", "-1"), "--start -1: expected at least 0"),
        (("-n", str(10**20)), f"-n {10**20}: a seed has {2**63} rows, expected no more"),
    ],
)
def test_rows_that_a_seed_does_not_have_are_refused_before_anything_is_written(call, options, message):
    assert call("sample", "model.safetensors", *options) == (1, "", f"nvpflow: error: {message}\n")


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_numbers_beyond_float32_have_the_density_0(call, folder, kind, standardize):
    """NaN is for rows that hold NaN or infinity: `log_p < limit` must find the row that lies furthest out."""
    table = np.array([[1, 2, 3], [1, 2, 1e30], [1, 2, 1e39], [-1e300, 2, 3], [1, 2, np.inf], [1e39, 2, np.nan]])
    name = f"far.{kind}"
    if kind == "csv":
        pytest.importorskip("pyarrow")
        np.savetxt(folder / name, table, delimiter=",")
    else:
        np.save(folder / name, table)
    nvpflow.build(3, 2, (8,), standardize=standardize).save(folder / "scored.safetensors")
    code, output, _ = call("score", "scored.safetensors", name, "--missing", "nan")
    found = scores_of(output)
    assert code == 0
    assert np.isfinite(found[0])
    assert found[1:4].tolist() == [-np.inf] * 3
    assert np.isnan(found[4:]).all()


@pytest.mark.parametrize("field", ["x", "1_0", "0x10", "\u22121", '"1,000"'])
def test_a_first_row_that_is_taken_for_names_is_said(call, folder, field):
    pytest.importorskip("pyarrow")
    (folder / "t.csv").write_text(f"{field},2,3\n4,5,6\n", encoding="utf-8")
    code, output, errors = call("score", "model.safetensors", "t.csv")
    assert (code, len(output.split())) == (0, 1)
    assert "line 1 is taken for the names of the columns, as " in errors
    assert errors.endswith("is not a number; but '2' is one\n")
    known = nvpflow.load(folder / "model.safetensors")
    known.column_names = [field.strip('"'), "2", "3"]
    known.save(folder / "known.safetensors")
    assert call("score", "known.safetensors", "t.csv")[2] == ""
    for sound in ("a,b,c\n1,2,3\n", "1,2,3\n4,5,6\n"):
        (folder / "t.csv").write_text(sound)
        assert call("score", "model.safetensors", "t.csv")[2] == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("score", "model.safetensors", "t.csv", "--columns", "a", "--columns", "b"), 2, "--columns is given twice"),
        (("score", "model.safetensors", "t.csv", "--columns", "a,b,a"), 1, "--columns names 'a' twice, expected each"),
        (("fit", "t.csv", "-o", "new.safetensors", "--validation", ""), 1, "--validation is empty, expected a share"),
        (("score", "model.safetensors", ""), 1, "the name of a table is empty, expected a path"),
        (("score", "model.safetensors", "zip.csv"), 1, "zip.csv: a zip archive or a spreadsheet, expected a table"),
    ],
)
def test_what_cannot_be_meant_is_said(call, folder, capfdbinary, arguments, code, message):
    pytest.importorskip("pyarrow")
    (folder / "t.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    with zipfile.ZipFile(folder / "zip.csv", "w") as archive:
        archive.writestr("t.csv", "1,2,3\n")
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            call(*arguments)
        assert message in capfdbinary.readouterr()[1].decode()
        return
    found, output, errors = call(*arguments)
    assert (found, output) == (code, "")
    assert errors.startswith(f"nvpflow: error: {message}")
    assert errors.count("\n") == 1


def test_columns_that_one_remedy_leaves_out_have_no_second_one(call, folder):
    pytest.importorskip("pyarrow")
    model = nvpflow.load(folder / "model.safetensors")
    model.column_names = ["a", "b", "c"]
    model.save(folder / "named.safetensors")
    (folder / "more.csv").write_text("a,b,kind,gap,c\n1,2,x,,3\n4,5,y,7,6\n")
    code, _, errors = call("score", "named.safetensors", "more.csv")
    assert code == 1
    told = "5 columns, the model takes 3; --columns a,b,c chooses those that it was trained with"
    assert errors == f"nvpflow: error: more.csv: {told}\n"
    assert call("score", "named.safetensors", "more.csv", "--columns", "a,b,c")[0] == 0
    (folder / "more.csv").write_text("a,b,kind,c\n1,2,x,3\n4,five,y,6\n")
    assert "'b' holds text (first 'five', line 3)" in call("score", "named.safetensors", "more.csv")[2]


def test_parquet_columns_whose_names_hold_points_are_not_mixed_up(call, folder, rows, flow):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"a": pyarrow.array([{"b": 1.0}] * len(rows)), "a.b": rows[:, 0], "c": rows[:, 1], "d": rows[:, 2]}
    parquet.write_table(pyarrow.table(columns), folder / "points.parquet")
    code, output, errors = call("score", "model.safetensors", "points.parquet", "--drop", "a")
    assert (code, errors) == (0, "")
    assert np.array_equal(scores_of(output), flow.log_probability(rows))


DIALECTS = {
    "semicolons": "a;b;c\n1;2;3\n4;5;6\n",
    "tabs": "a\tb\tc\n1\t2\t3\n4\t5\t6\n",
    "pipes": "1|2|3\n4|5|6\n",
    "spaces": "1.0e+00 2.0e+00 3.0e+00\n4 5 6\n",
    "quotes": '"a, b","b ""c""","c"\n"1","2","3"\n\n"4","5","6"\n',
    "blanks": "a, b, c\n 1, +2, 3 \n   \n4, 5, 6\n",
    "carriage returns": "a,b,c\r1,2,3\r4,5,6\r",
    "years": "a,2020,2021\n1,2,3\n4,5,6\n",
    "no end of line": "1,2,3\n4,5,6",
    "bytes": "\ufeffa,b,c\r\n1,2,3\r\n4,5,6\r\n",
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_of_csv(call, folder, flow, name):
    pytest.importorskip("pyarrow")
    (folder / "t.csv").write_bytes(DIALECTS[name].encode())
    code, output, errors = call("score", "model.safetensors", "t.csv")
    names = "line 1 is taken for the names of the columns, as 'a' is not a number; but '2020' is one"
    assert (code, errors) == (0, f"nvpflow: t.csv: {names}\n" if name == "years" else "")
    assert np.array_equal(scores_of(output), flow.log_probability(np.array([[1, 2, 3], [4, 5, 6]], np.float32)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b;c\n1,5;2;3\n", "'a' holds numbers with a decimal comma (first '1,5', line 2)"),
        ("a,b,c\ntrue,1,2\n0.5,3,4\n", "'a' holds true and false beside numbers (first 'true', line 2)"),
        ('a,b,c\n"x\ny",2,3\n4,5\n1,,six\n', "bad.csv: line 4: 2 columns, expected 3 as in line 1; 'a' holds text"),
        ('a,b,c\n"x\ny",2,3\n4,5\n1,,six\n', "missing cells in 'b' (line 5)"),
        ("a,b\n1,x\n", "bad.csv: 2 columns, the model takes 3; 'b' holds text (first 'x', line 2)"),
        (
            "a,b,c\n1,2,NA\n3,4,5\n",
            "missing cells in 'c' (line 2): --missing nan takes them as NaN, and gives NaN for 1 row",
        ),
        ("1,1_0,2\n", "column 2 holds text (first '1_0', line 1)"),
        ("a\0,b,c\n1,2,\0\n", "'c' holds text"),
    ],
)
def test_everything_wrong_with_a_csv_is_one_message(call, folder, text, message):
    pytest.importorskip("pyarrow")
    (folder / "bad.csv").write_text(text)
    code, _, errors = call("score", "model.safetensors", "bad.csv", "-o", "out.csv")
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("größe,b,c\n1,2,3\n".encode("latin1"), "not UTF-8 text"),
        ("a,b,c\n1,2,ß\n".encode("latin1"), "not UTF-8 text"),
        ("a,b,c\n1,2,3\n".encode("utf-16"), "UTF-16 text"),
        (b"\x1f\x8b\x08\x00garbage", "cannot be decompressed"),
        (b"\n \n", "t.csv: empty"),
    ],
)
def test_files_that_are_no_text_of_utf_8(call, folder, data, message):
    pytest.importorskip("pyarrow")
    (folder / "t.csv").write_bytes(data)
    code, _, errors = call("score", "model.safetensors", "t.csv")
    assert code == 1
    assert message in errors


def test_kinds_and_lines_hold_over_many_chunks(call, folder, flow, monkeypatch):
    pytest.importorskip("pyarrow")
    from nvpflow import _arrow

    monkeypatch.setattr(_arrow, "CHUNK", 64)
    lines = ["a,b,note"] + [f'{i},{i + 0.5},"say ""{i}"",\nplease"' for i in range(100)]
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    two = nvpflow.build(2, 2, (8,))
    two.save(folder / "two.safetensors")
    code, output, errors = call("score", "two.safetensors", "t.csv", "--append", "--drop", "note")
    assert (code, errors) == (0, "")
    rows = np.stack([np.arange(100), np.arange(100) + 0.5], axis=1)
    records = list(csv.reader(io.StringIO(output)))
    assert records[0] == ["a", "b", "note", "log_prob"]
    assert [record[2] for record in records[1:]] == [f'say "{i}",\nplease' for i in range(100)]
    assert np.array_equal(np.array([record[3] for record in records[1:]], np.float32), two.log_probability(rows))
    (folder / "t.csv").write_text("\n".join([*lines, "x,,z", "4,5", "x,true,z"]) + "\n")
    errors = call("score", "two.safetensors", "t.csv", "--drop", "note")[2]
    assert "line 203: 2 columns, expected 3 as in line 1; 'a' holds text (first 'x', lines 202, 204)" in errors
    assert "'b' holds true and false beside numbers (first 'true', line 204)" in errors
    assert "missing cells in 'b' (line 202)" in errors


def test_columns_are_chosen_by_name_or_number(call, folder, rows, named):
    pytest.importorskip("pyarrow")
    save_csv(folder / "more.csv", np.c_[rows[:, ::-1], rows], header="up,north,east,p,q,r")
    code, output, errors = call("score", "named.safetensors", "more.csv", "--columns", "east,north,up")
    assert (code, errors) == (0, "")
    np.testing.assert_allclose(scores_of(output), named.log_probability(rows), rtol=1e-5)  # read as float64
    hint = "6 columns, the model takes 3; --columns east,north,up chooses those that it was trained with"
    assert hint in call("score", "named.safetensors", "more.csv")[2]
    np.save("more.npy", np.c_[rows[:, ::-1], rows])
    code, output, errors = call("score", "named.safetensors", "more.npy", "--columns", "3,2,1")
    assert (code, errors) == (0, "")
    assert np.array_equal(scores_of(output), named.log_probability(rows))
    assert call("score", "named.safetensors", "more.npy", "--drop", "1,2,3")[1] == output
    for arguments, message in (
        (("more.csv", "--drop", "zip,p,zap"), "--drop: there is no column 'zip', 'zap'; the table has 'up', 'north'"),
        (("more.npy", "--columns", "0,7"), "--columns: there is no column '0', '7'; the table has columns 1 to 6"),
        (("more.csv", "--drop", "up,north,east,p,q,r"), "no column is left"),
    ):
        assert message in call("score", "named.safetensors", *arguments)[2]


def test_score_writes_other_columns_beside_log_p(call, folder, rows, named):
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = named.log_probability(np.array([[float(f"{v:.9g}") for v in row] for row in rows]))
    ids = [f"00{i}" for i in range(600)]
    lines = [f"{i},{','.join(f'{v:.9g}' for v in row)}" for i, row in zip(ids, rows, strict=True)]
    (folder / "id.csv").write_text("\n".join(["id, east ,north,up", *lines]))
    assert call("score", "named.safetensors", "id.csv", "--keep", "id,up", "-o", "kept.csv") == (0, "", "")
    kept = (folder / "kept.csv").read_text().splitlines()
    assert kept[0] == "id,up,log_prob"
    assert kept[1].startswith(f"000,{rows[0, 2]:.9g},")
    assert np.array_equal(np.array([line.split(",")[2] for line in kept[1:]], np.float32), expected)
    assert call("score", "named.safetensors", "id.csv", "--append", "--drop", "id", "-o", "all.parquet")[0] == 0
    table = parquet.read_table(folder / "all.parquet")
    assert table.column_names == ["id", "east", "north", "up", "log_prob"]
    assert table.column("id").to_pylist() == ids
    assert str(table.schema.field("up").type) == "double"
    assert np.array_equal(table.column("log_prob").to_numpy(), expected)
    assert call("score", "named.safetensors", "all.parquet", "--keep", "id,log_prob", "-o", "twice.csv")[0] == 1
    assert call("score", "named.safetensors", "all.parquet", "--columns", "east,north,up", "--keep", "id")[0] == 0
    assert call("score", "named.safetensors", "data.npy", "--append")[1].startswith(
        "column_1,column_2,column_3,log_prob\n"
    )
    assert (
        ".npy holds numbers of one kind" in call("score", "named.safetensors", "id.csv", "--append", "-o", "x.npy")[2]
    )


def test_sample_writes_the_names(call, folder, named):
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = named.sample(700, seed=0)
    assert call("sample", "named.safetensors", "-n", 700)[1].startswith("east,north,up\n")
    call("sample", "named.safetensors", "-n", 700, "-o", "s.parquet")
    call("sample", "model.safetensors", "-n", 0, "-o", "none.parquet")
    table = parquet.read_table(folder / "s.parquet")
    assert table.column_names == ["east", "north", "up"]
    assert np.array_equal(np.stack([column.to_numpy() for column in table.columns], axis=1), expected)
    assert parquet.read_table(folder / "none.parquet").column_names == ["column_1", "column_2", "column_3"]


def test_npy_needs_no_pyarrow_and_the_others_say_so(call, folder, flow, rows, monkeypatch):
    for name in [name for name in sys.modules if name == "nvpflow._arrow" or name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delattr(nvpflow, "_arrow", raising=False)
    code, output, errors = call("score", "model.safetensors", "data.npy")
    assert (code, errors) == (0, "")
    assert np.array_equal(scores_of(output), flow.log_probability(rows))
    save_csv(folder / "t.csv", rows)
    for arguments in (
        ["score", "model.safetensors", "t.csv"],
        ["sample", "model.safetensors", "-n", 1, "-o", "s.parquet"],
    ):
        code, _, errors = call(*arguments)
        assert code == 1
        assert "needs pyarrow: pip install" in errors


def test_a_npy_that_shrinks_while_it_is_read_is_an_error(call, folder, monkeypatch):
    from nvpflow import _source

    big = np.zeros((5000, 3), np.float32)
    for array in (big, np.asfortranarray(big)):
        np.save(folder / "big.npy", array)
        monkeypatch.setattr(_source, "BLOCK_VALUES", 3000)

        def truncate(*_, **__):
            os.truncate(folder / "big.npy", 1000)
            return np.zeros(1000, np.float32)

        monkeypatch.setattr(nvpflow.Flow, "log_probability", truncate)
        code, _, errors = call("score", "model.safetensors", "big.npy", "-o", "s.npy")
        assert code == 1
        assert "big.npy: ends early" in errors
        assert not (folder / "s.npy").exists()
        assert not list(folder.glob(".*"))


# ------------------------------------------------------------------------------------------------- files and signals


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04", "an archive of several arrays"),
        (np.lib.format.magic(9, 0), "not a readable .npy"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }", "shape (-1, 3)"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3), }", "shape (True, 3)"),
    ],
)
def test_malformed_npy(run, folder, start, message):
    header = start.ljust(117) + b"\n"
    data = start if start[:1] != b"{" else b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (folder / "x.npy").write_bytes(data + bytes(120))
    assert message in error_of(run("score", "model.safetensors", "x.npy", fails=1))
    if not start.startswith(b"PK"):
        errors = run("score", "model.safetensors", "-", stdin=data + bytes(120), text=False, fails=1).stderr.decode()
        assert message in errors
        assert errors.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="no /dev/stdin")
def test_open_descriptors_are_streams(folder, rows, flow):
    pytest.importorskip("pyarrow")
    save_csv(folder / "plain.csv", rows)
    for name in ("plain.csv", "data.npy"):
        with open(folder / name, "rb") as data, open(folder / "out", "wb") as out:
            command = [*COMMAND, "score", "model.safetensors", "/dev/stdin", "-o", "/dev/stdout"]
            subprocess.run(command, cwd=folder, stdin=data, stdout=out, check=True, timeout=120)
        assert np.array_equal(scores_of((folder / "out").read_text()), flow.log_probability(rows))


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_pipe_that_does_not_block_is_waited_for(folder, rows, flow):
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    command = [*COMMAND, "score", "model.safetensors", "-"]
    with subprocess.Popen(
        command, cwd=folder, stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        os.close(reading)
        with os.fdopen(writing, "wb") as file:
            for part in np.array_split(np.frombuffer((folder / "data.npy").read_bytes(), np.uint8), 3):
                file.write(part.tobytes())
                file.flush()
                time.sleep(0.2)
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
    assert np.array_equal(scores_of(output.decode()), flow.log_probability(rows))


def test_rows_that_a_seed_does_not_have_are_refused_before_the_first_is_written(call):
    code, output, errors = call("sample", "model.safetensors", "-n", 400_000, "--start", 2**63 - 1)
    assert (code, output) == (1, "")
    assert f"expected a start of at most {2**63 - 400_000}" in errors
    assert call("sample", "model.safetensors", "-n", 2, "--start", 2**63 - 2)[0] == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_a_file_that_is_replaced_keeps_its_mode(call, folder):
    (folder / "out.csv").touch()
    for mode in (0o600, 0o664):
        (folder / "out.csv").chmod(mode)
        assert call("score", "model.safetensors", "data.npy", "-o", "out.csv", "--force")[0] == 0
        assert (folder / "out.csv").stat().st_mode & 0o777 == mode


def test_long_names(call, folder):
    name = "x" * 250 + ".csv"
    assert call("score", "model.safetensors", "data.npy", "-o", name)[0] == 0
    assert (folder / name).exists()
    code, _, errors = call("score", "model.safetensors", "data.npy", "-o", "xx" + name)
    assert code == 1
    assert errors == f"nvpflow: error: xx{name}: File name too long\n"


NOT_UTF_8 = os.fsdecode(b"t\xff")


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of others hold Unicode")
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "utf-8:surrogateescape"])
def test_names_of_files_that_are_not_utf_8(folder, encoding):
    def run(*arguments):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, env=environment, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")

    model, page = NOT_UTF_8 + ".safetensors", NOT_UTF_8 + ".html"
    data = NOT_UTF_8 + ".npy"
    os.rename(folder / "data.npy", folder / data)
    run("fit", data, "-o", model, *QUICK)
    flow = nvpflow.load(folder / model)
    flow.column_names = ["größe", "b", "c"]
    flow.save(folder / model)
    run("info", model)
    pytest.importorskip("matplotlib")
    if encoding == "utf-8:strict":
        run("report", model, data, "-o", page)
        assert r"t\xff.npy" in (folder / page).read_text()


def test_a_history_of_impossible_numbers_is_one_line(call, folder, rows):
    pytest.importorskip("matplotlib")
    call("fit", "data.npy", "-o", "new.safetensors", *QUICK, "--history", "h.json", "--quiet")
    good = json.loads((folder / "h.json").read_text())
    for bad in ({"train_rows": float("inf")}, {"epoch": [1, 10**20]}):
        (folder / "bad.json").write_text(json.dumps(good | bad))
        code, _, errors = call("report", "new.safetensors", "data.npy", "-o", "p.html", "--history", "bad.json")
        assert code == 1
        assert "bad.json: not a file of fit --history" in errors
        assert errors.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_that_end_a_command_leave_nothing_behind(folder, name):
    command = [*COMMAND, "sample", "model.safetensors", "-n", str(10**12), "-o", "out.csv"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE) as process:
        while not list(folder.glob(".nvpflow-*.tmp")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()  # or the end of the block would wait for what has not ended
    assert (process.returncode, errors) == (-getattr(signal, name), b"")
    assert sorted(path.name for path in folder.iterdir()) == ["data.npy", "model.safetensors"]


@pytest.mark.parametrize("module", ["numpy", "numpy.linalg", "datetime"])
def test_an_interrupt_while_the_package_is_imported_is_an_interrupt(module):
    code = f"""
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Interrupt())
import nvpflow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert done.returncode in (-signal.SIGINT, 130)
