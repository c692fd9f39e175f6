"""The commands that write a file for each of many, as jobs of an array that die, meet and come again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from nvpflow import _arrow, _parts, cli

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNT, ROWS = 5, 40
SOURCES = [f"part-{i}.parquet" for i in range(COUNT)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model, a table in five files, and its scores."""
    monkeypatch.chdir(tmp_path)
    nvpflow.build(2, 2, (8,), seed=1, column_names=["a", "b"]).save("model.safetensors")
    rng = np.random.default_rng(0)
    for i, name in enumerate(SOURCES):
        columns = rng.normal(size=(2, ROWS)).astype(np.float32)
        ids = np.arange(i * ROWS, (i + 1) * ROWS)
        pq.write_table(pa.table({"id": ids, "a": columns[0], "b": columns[1]}), name)
    return tmp_path


@pytest.fixture
def call(folder, capfd):
    """Run the command in this process and return its exit code, output and messages."""

    def call(*arguments):
        code = cli.main(list(map(str, arguments)))
        return code, *capfd.readouterr()

    return call


def score(*more, sources=SOURCES, folder="scores"):
    return ["score", "model.safetensors", *sources, "-o", folder, "--keep", "id", *more]


def expected(source):
    table = pq.read_table(source)
    rows = np.column_stack([table["a"].to_numpy(), table["b"].to_numpy()])
    return nvpflow.load("model.safetensors").log_probability(rows)


def check_scores(folder="scores"):
    assert sorted(os.listdir(folder)) == SOURCES
    for name in SOURCES:
        found = pq.read_table(f"{folder}/{name}")
        assert found.column_names == ["id", "log_prob"]
        np.testing.assert_array_equal(found["log_prob"].to_numpy(), expected(name))
        np.testing.assert_array_equal(found["id"].to_numpy(), pq.read_table(name)["id"].to_numpy())


# ----------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_parts_are_the_whole(call, first, count):
    written = []
    for i in range(first, first + count):
        sources = SOURCES[i % COUNT :] + SOURCES[: i % COUNT]  # a shell may list them in another order
        code, output, errors = call(*score("--part", f"{i}/{count}", sources=sources))
        assert (code, errors) == (0, "")
        written.append(int(output.split()[1]))
    assert sum(written) == COUNT
    assert max(written) - min(written) <= 1
    check_scores()


def test_a_file_is_that_of_one_table_alone(call):
    for name in SOURCES:
        assert call("score", "model.safetensors", name, "-o", f"one-{name}", "--keep", "id")[0] == 0
    call(*score())
    for name in SOURCES:
        assert pq.read_table(f"one-{name}").equals(pq.read_table(f"scores/{name}"))


def test_done_files_are_left_alone(call):
    assert call(*score())[1] == "scores: 5 files written, 0 done before; 200 rows\n"
    before = {name: os.stat(f"scores/{name}").st_ino for name in SOURCES}
    os.remove("scores/part-3.parquet")
    code, output, errors = call(*score())
    assert (code, output) == (0, "scores: 1 file written, 4 done before; 200 rows\n")
    assert errors == "nvpflow: 4 files done already\n"
    after = {name: os.stat(f"scores/{name}").st_ino for name in SOURCES}
    assert {name for name in SOURCES if before[name] == after[name]} >= {*SOURCES} - {"part-3.parquet"}
    assert call(*score("--force"))[1] == "scores: 5 files written, 0 done before; 200 rows\n"
    check_scores()


def test_every_kind_of_table_goes_into_a_folder(call):
    table = pq.read_table("part-0.parquet")
    Path("text.csv").write_bytes(b"id,a,b\n" + _arrow.csv_bytes(table))
    np.save("array.npy", np.zeros((3, 2), np.float32))
    assert call("score", "model.safetensors", "text.csv", "array.npy", "-o", "out", "--drop", "1")[0] == 1
    assert call("score", "model.safetensors", "array.npy", "-o", "out/")[0] == 0
    assert call("score", "model.safetensors", "text.csv", "-o", "out", "--keep", "id")[0] == 0
    assert sorted(os.listdir("out")) == ["array.parquet", "text.parquet"]
    assert pq.read_table("out/array.parquet").column_names == ["log_prob"]
    np.testing.assert_array_equal(pq.read_table("out/text.parquet")["log_prob"].to_numpy(), expected("part-0.parquet"))


# ------------------------------------------------------------------------------------------------- what has changed


def changed_source():
    os.utime("part-2.parquet", (1, 1))
    return (), "made of another source, or its source has changed since"


def changed_model():
    nvpflow.build(2, 2, (8,), seed=2, column_names=["a", "b"]).save("model.safetensors")
    return (), "made by another model"


def other_options():
    return ("--missing", "nan"), "made with other options: missing 'refuse' there, 'nan' here"


def half_written():
    target = Path("scores/part-2.parquet")
    target.write_bytes(target.read_bytes()[:-10])
    return (), "and is no whole Parquet file"


def stranger():
    pq.write_table(pa.table({"id": [1]}), "scores/part-2.parquet")
    return (), "and is not written by nvpflow"


@pytest.mark.parametrize("change", [changed_source, changed_model, other_options, half_written, stranger])
def test_what_something_else_made_is_not_overwritten(call, change):
    call(*score())
    more, message = change()
    before = [path.read_bytes() for path in sorted(Path("scores").iterdir())]
    code, output, errors = call(*score(*more))
    assert (code, output) == (1, "")
    assert f"exists, {message}" in errors
    assert "--force overwrites it" in errors
    assert [path.read_bytes() for path in sorted(Path("scores").iterdir())] == before
    assert call(*score(*more, "--force"))[0] == 0
    check_scores()


def test_another_instruction_set_or_version_is_named(call, monkeypatch):
    call(*score())
    with monkeypatch.context() as patch:
        patch.setattr(_parts, "cpu_isa", lambda: "sse9")
        errors = call(*score())[2]
    assert f"made with {nvpflow.cpu_isa()}, and this process computes with sse9: other bits; NVPFLOW_ISA=" in errors
    monkeypatch.setattr(_parts, "__version__", "99")
    assert f"made by nvpflow {nvpflow.__version__}, and this is 99" in call(*score())[2]


def test_a_bad_table_does_not_stop_the_others(call):
    pq.write_table(pa.table({"id": [1], "a": ["x"], "b": [1.0]}), "part-1.parquet")
    Path("part-3.parquet").write_bytes(b"PAR1 cut")
    code, output, errors = call(*score())
    assert (code, output) == (1, "scores: 3 files written, 0 done before, 2 failed; 120 rows\n")
    first, second = errors.splitlines()
    assert first.startswith("nvpflow: error: part-1.parquet: 'a' holds text")
    assert second.startswith("nvpflow: error: part-3.parquet: not a readable .parquet file")
    assert sorted(os.listdir("scores")) == ["part-0.parquet", "part-2.parquet", "part-4.parquet"]


# ------------------------------------------------------------------------------------------------------ jobs that meet


def test_two_jobs_on_one_folder(call, monkeypatch):
    """Both score every file: the second one to finish finds the same file there."""
    both, real = threading.Barrier(2), _parts.write_once

    def together(*arguments, **options):
        both.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(_parts, "write_once", together)
    codes = []
    jobs = [threading.Thread(target=lambda: codes.append(cli.main(score()))) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert codes == [0, 0]
    check_scores()


def write_meanwhile(monkeypatch, make):
    """While the first file is being scored, make the target of it."""
    real = _parts.metadata

    def metadata(*arguments):
        found = real(*arguments)
        monkeypatch.setattr(_parts, "metadata", real)
        make(found)
        return found

    monkeypatch.setattr(_parts, "metadata", metadata)


def test_the_same_file_made_meanwhile_counts_as_done(call, monkeypatch):
    write_meanwhile(monkeypatch, lambda _: cli.main(score(sources=SOURCES[:1])))
    code, output, _ = call(*score(sources=SOURCES[:1], folder="scores/"))
    assert code == 0
    assert output.endswith("0 files written, 1 done before; 40 rows\n")


def test_another_file_made_meanwhile_is_kept(call, monkeypatch):
    write_meanwhile(monkeypatch, lambda _: stranger())
    code, _, errors = call(*score(sources=["part-2.parquet"], folder="scores/"))
    assert code == 1
    assert "scores/part-2.parquet exists, and is not written by nvpflow" in errors
    assert pq.read_table("scores/part-2.parquet").column_names == ["id"]


@pytest.mark.slow
def test_jobs_are_killed_and_come_again_until_all_is_done(call):
    """Two arrays of two jobs on one folder, each killed after a while, that grows until they are done."""
    for name in SOURCES:
        table = pq.read_table(name)
        pq.write_table(pa.concat_tables([table] * 10_000), name)  # 400,000 rows
    killed = 0
    for patience in (0.6, 0.8, 1, 1.5, 2, 3, 120):
        parts = ("0/2", "1/2", "1/1", "2/2")
        jobs = [
            subprocess.Popen(
                [sys.executable, "-m", "nvpflow", *score("--part", part)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for part in parts
        ]
        deadline = time.monotonic() + patience
        for job in jobs:
            try:
                job.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()
                killed += 1
            assert job.returncode in (0, -signal.SIGKILL)
        for path in Path("scores").glob("part-*") if os.path.isdir("scores") else ():
            assert pq.read_metadata(path).num_rows == 400_000  # what is there is whole
    assert killed >= 4
    for unfinished in Path("scores").glob(".nvpflow-*.tmp"):
        unfinished.unlink()
    check_scores()
    assert problems(call, "--rows", 2_000_000) == []


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (score(folder="-"), "5 tables, expected -o with the folder for their scores"),
        (score("--part", "1/2", sources=SOURCES[:1], folder="-"), "--part is given, expected -o with the folder"),
        (score(folder="."), "part-0.parquet would be overwritten by its own scores; give them another place"),
        (score("--force", folder="."), "part-0.parquet would be overwritten by its own scores"),
        (score(folder="model.safetensors"), "-o: model.safetensors is a file, expected a folder"),
        (score("--format", "csv"), "--format is csv, expected parquet where -o is a folder"),
        (score(sources=["part-0.parquet", "-"]), "- is a pipe, expected files where -o is a folder"),
        (score(sources=["part-0.parquet", "sub/part-0.csv.gz"]), "would both be scored into scores/part-0.parquet"),
        (score(sources=["part-0.parquet", "part-0.parquet"]), "part-0.parquet is given twice"),
        (score(sources=["none.parquet", "part-0.parquet"]), "none.parquet: No such file or directory"),
    ],
)
def test_what_is_refused(call, arguments, message):
    code, output, errors = call(*arguments)
    assert (code, output) == (1, "")
    assert errors.startswith("nvpflow: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not os.path.exists("scores/part-0.parquet")


@pytest.mark.parametrize("part", ["5/3", "3", "1/0", "0/0", "-1/3", "a/b", "1/2/3"])
def test_a_part_is_one_of_n(call, part):
    with pytest.raises(SystemExit) as end:
        call(*score(f"--part={part}"))
    assert end.value.code == 2


# ------------------------------------------------------------------------------------------------------------ samples


def sample(*more, rows="100", folder="drawn"):
    return ["sample", "model.safetensors", "-n", rows, "-o", folder, "--rows-per-file", "30", "--seed", "7", *more]


def rows_of(folder="drawn"):
    tables = [pq.read_table(path) for path in sorted(Path(folder).iterdir())]
    assert all(table.column_names == ["a", "b"] for table in tables)
    return np.concatenate([np.column_stack([table["a"].to_numpy(), table["b"].to_numpy()]) for table in tables])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_files_are_one_sample(call, count):
    for i in reversed(range(count)):
        assert call(*sample("--start", 1000, "--part", f"{i}/{count}"))[0] == 0
    assert sorted(os.listdir("drawn")) == [f"part-0000{i}.parquet" for i in range(4)]
    np.testing.assert_array_equal(rows_of(), nvpflow.load("model.safetensors").sample(100, seed=7, start=1000))
    assert call(*sample("--start", 1000))[1] == "drawn: 0 files written, 4 done before; 100 rows\n"


def test_a_tempered_sample_and_one_of_many_rows(call):
    assert call(*sample("--temperature", "0.5", rows="1e2"))[0] == 0
    np.testing.assert_array_equal(rows_of(), nvpflow.load("model.safetensors").sample(100, seed=7, temperature=0.5))
    assert "made with other options: temperature 0.5 there, None here" in call(*sample())[2]
    assert "made with other options: seed 7 there, 8 here" in call(*sample("--temperature", "0.5", "--seed", 8))[2]
    assert call(*sample(rows="0", folder="none"))[1] == "none: 1 file written, 0 done before; 0 rows\n"


def test_a_sample_under_a_context(call):
    nvpflow.build(2, 2, (8,), seed=1, context_size=2, column_names=["a", "b"]).save("model.safetensors")
    assert call(*sample("--context", "-1,2"))[0] == 0
    np.testing.assert_array_equal(rows_of(), nvpflow.load("model.safetensors").sample(100, seed=7, context=[-1, 2]))
    assert "context [-1.0, 2.0] there, [-1.0, 3.0] here" in call(*sample("--context", "-1,3"))[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (sample(folder="-"), "--rows-per-file is given, expected -o with the folder for the files"),
        (sample("--rows-per-file", "0"), "--rows-per-file is 0, expected at least 1"),
        (sample(rows="1e9"), "--rows-per-file is 30, expected at least 1000: at most 1,000,000 files"),
        (sample("--format", "csv"), "--format is csv, expected parquet with --rows-per-file"),
        (
            sample("--context-from", "part-0.parquet"),
            "--context-from is given with --rows-per-file, expected --context",
        ),
        (sample(folder="part-0.parquet"), "-o: part-0.parquet is a file, expected a folder"),
        (
            ["sample", "model.safetensors", "-n", "5", "-o", "."],
            "-o: . is a folder, expected a file, or --rows-per-file",
        ),
        (["sample", "model.safetensors", "-n", "5", "--part", "1/2"], "--part is given, expected --rows-per-file"),
    ],
)
def test_what_samples_are_refused(call, arguments, message):
    code, output, errors = call(*arguments)
    assert (code, output) == (1, "")
    assert errors.startswith(f"nvpflow: error: {message}")


@pytest.mark.parametrize("rows", ["x", "1.5", "nan", "1e999999999", "inf"])
def test_a_number_of_rows_is_whole(call, rows, capfd):
    with pytest.raises(SystemExit) as end:
        call(*sample(rows=rows))
    assert end.value.code == 2
    assert f"{rows!r} is no number of rows, expected one such as 1000 or 1e9" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------------------- merge-check


def problems(call, *more, folder="scores"):
    code, output, errors = call("merge-check", folder, *more)
    assert errors == ""
    first, *rest = output.splitlines()
    assert ("not complete" in first) == bool(code)
    assert code in (0, 1)
    return [line.strip() for line in rest if not line.startswith("  model ")]


def test_files_that_are_all_there(call):
    call(*score())
    assert problems(call) == []
    assert problems(call, "--files", 5, "--rows", "2e2") == []
    (Path("scores") / ".nvpflow-1-a.tmp").touch()
    assert problems(call) == ["1 file .nvpflow-*.tmp: unfinished; delete when no job runs"]
    call(*sample())
    assert problems(call, folder="drawn") == []
    model = _parts.fingerprint(nvpflow.load("model.safetensors"))
    found = nvpflow.tables.check_files("drawn")
    assert found.ok
    assert (found.what, found.files, found.rows, found.model) == ("sample", 4, 100, model)
    assert (found.computed_on, found.version) == (nvpflow.cpu_isa(), nvpflow.__version__)
    with pytest.raises(ValueError, match="files is -1"):
        nvpflow.tables.check_files("drawn", files=-1)


def test_a_folder_that_grows(call):
    call(*score(sources=SOURCES[:3]))
    call(*score("--part", "0/2", sources=SOURCES))  # files 0, 2 and 4 of 5: the first two are done
    assert problems(call) == ["4 of 5 files are there; the same command writes the others"]
    call(*score())
    assert problems(call) == []
    call(*score("--force", sources=SOURCES[1:2], folder="scores/"))
    assert problems(call) == []


def test_what_is_missing(call):
    call(*score("--part", "1/2"))
    missing = "missing: the first, behind part-1.parquet, behind part-3.parquet"
    assert problems(call) == [f"2 of 5 files are there, {missing}; the same command writes the others"]
    assert problems(call, "--files", 5) == [f"there are 2 files, expected 5, {missing}"]
    assert problems(call, "--files", 2, "--rows", 90) == ["they have 80 rows, expected 90"]
    call(*sample())
    os.remove("drawn/part-00001.parquet")
    gap, lost = problems(call, folder="drawn")
    assert gap == "rows 30 to 59 are missing before part-00002.parquet"
    assert lost == "3 of 4 files are there, missing: behind part-00000.parquet; the same command writes the others"
    os.mkdir("empty")
    assert problems(call, folder="empty") == ["there is no .parquet file"]
    assert call("merge-check", "nowhere")[::2] == (1, "nvpflow: error: nowhere: No such file or directory\n")


@pytest.mark.parametrize("change", [changed_model, half_written, stranger])
def test_files_that_do_not_fit(call, change):
    call(*score())
    change()
    call(*score("--force", sources=["part-2.parquet"], folder="scores/")) if change is changed_model else None
    (found,) = problems(call)
    assert (
        found
        == {
            changed_model: "another model than the other files have: part-2.parquet",
            half_written: "no whole Parquet file: part-2.parquet",
            stranger: "not written by nvpflow: part-2.parquet",
        }[change]
    )


def test_files_of_other_options_or_instruction_sets(call, monkeypatch):
    call(*score())
    with monkeypatch.context() as patch:
        patch.setattr(_parts, "cpu_isa", lambda: "sse9")
        call(*score("--force", "--missing", "nan", sources=SOURCES[:2]))
    assert problems(call) == [
        "another instruction set than the other files have: part-0.parquet, part-1.parquet",
        "another option missing than the other files have: part-0.parquet, part-1.parquet",
    ]
    call(*sample(folder="scores"))
    assert any(line.startswith("another contents than the other files have: part-00000") for line in problems(call))


def test_files_of_a_loop_do_not_say_how_many(call):
    os.mkdir("scores")
    scorer = nvpflow.tables.Scorer(nvpflow.load("model.safetensors"))
    for name in SOURCES:
        nvpflow.tables.score_file(scorer, name, f"scores/{name}")
    assert problems(call) == ["no file says how many there should be; say it: --files N"]
    assert problems(call, "--files", 5) == []
    os.rename("scores/part-4.parquet", "scores/part-5.parquet")
    call(*score("--force", sources=SOURCES[:2]))
    assert "no job was to write just these 5 files; say how many there should be: --files N" in problems(call)
