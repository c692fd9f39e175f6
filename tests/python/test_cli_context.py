"""The command nvpflow with models that have a context: which columns of a table it is, in every subcommand."""

from __future__ import annotations

import json
import re

import numpy as np
import nvpflow
import pytest
from nvpflow import cli

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

QUICK = ["--epochs", "2", "--num-flows", "2", "--hidden-sizes", "8", "--threads", "1"]
N = 300
NAMES = ("hour", "east", "load", "north")  # of the table; hour and load are the context
CONTEXT = ("--context-columns", "hour,load")
pytestmark = pytest.mark.filterwarnings("ignore::nvpflow.DataWarning")


@pytest.fixture(scope="module")
def data():
    """Rows [N, 2] and their context [N, 2], as float64."""
    rng = np.random.default_rng(0)
    c = np.stack([rng.integers(0, 24, N), rng.normal(5, 2, N).round(2)], axis=1)
    return (c @ [[0.1, 0.0], [0.3, -0.5]] + rng.normal(size=(N, 2))).round(4), c


@pytest.fixture(scope="module")
def table(data):
    x, c = data
    return np.stack([c[:, 0], x[:, 0], c[:, 1], x[:, 1]], axis=1)


@pytest.fixture
def call(tmp_path, table, monkeypatch, capfdbinary):
    """Run the command in a folder with data.csv, data.npy and model.safetensors; code, output and messages."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.csv", table, NAMES)
    np.save("data.npy", table)
    flow = nvpflow.build(2, 2, (8,), context_size=2, seed=3)
    flow.column_names, flow.context_names = ("east", "north"), ("hour", "load")
    flow.save("model.safetensors")

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        output, errors = capfdbinary.readouterr()
        return code, output.decode(), errors.decode()

    return call


def write(path, rows, names):
    lines = [",".join(repr(float(v)) for v in row) for row in rows]
    path.write_text("\n".join([",".join(names), *lines]) + "\n" if names else "\n".join(lines) + "\n")


def scores_of(result):
    assert (result[0], result[2]) == (0, "")
    return np.array(result[1].split(), np.float32)


def error_of(result):
    code, output, errors = result
    assert (code, output) == (1, ""), result
    assert re.fullmatch(r"nvpflow: error: [^\n]+\n", errors), errors
    return errors[16:]


# ------------------------------------------------------------------------------------------------------------- fit


def test_fit_writes_the_model_that_python_would(call, data):
    x, c = data
    code, output, _ = call("fit", "data.csv", *CONTEXT, "-o", "new", *QUICK, "--seed", 7)
    assert code == 0
    assert "data: data.csv, 300 rows x 2 columns, under 2 columns of context\n" in output
    expected = nvpflow.build(2, 2, (8,), context_size=2, seed=7)
    expected.fit(x, context=c, epochs=2, seed=7, num_threads=1, progress=False)
    found = nvpflow.load("new")
    assert found == expected
    assert (found.column_names, found.context_names) == (("east", "north"), ("hour", "load"))
    assert "\ncontext: 'hour', 'load'\n" in call("info", "new")[1]
    assert json.loads(call("info", "new", "--json")[1])["context_names"] == ["hour", "load"]
    # By numbers, where the table has no names; and the order is the option's.
    assert call("fit", "data.npy", "--context-columns", "3,1", "--quiet", "-o", "other", *QUICK)[0] == 0
    expected = nvpflow.build(2, 2, (8,), context_size=2)
    expected.fit(x, context=c[:, ::-1], epochs=2, num_threads=1, progress=False)
    assert nvpflow.load("other") == expected
    assert nvpflow.load("other").context_names is None
    assert "context:" not in call("info", "other")[1]


def test_fit_of_one_column_under_the_others(call, data):
    assert call("fit", "data.csv", *CONTEXT, "--columns", "north", "--quiet", "-o", "new", *QUICK)[0] == 0
    assert nvpflow.load("new").spec.input_size == 1
    assert call("fit", "data.csv", *CONTEXT, "--drop", "north", "--quiet", "-o", "two", *QUICK)[0] == 0
    assert nvpflow.load("two").column_names == ("east",)


def test_fit_with_a_table_to_validate_by(call, data, tmp_path, table):
    x, c = data
    write(tmp_path / "held_out.csv", table[:90, [1, 3, 2, 0]], ("east", "north", "load", "hour"))
    arguments = ("fit", "data.csv", *CONTEXT, "--quiet", "-o", "new", *QUICK, "--validation", "held_out.csv")
    assert call(*arguments)[0] == 0
    expected = nvpflow.build(2, 2, (8,), context_size=2)
    expected.fit(x, context=c, validation=(x[:90], c[:90]), epochs=2, num_threads=1, progress=False)
    assert nvpflow.load("new") == expected


def test_digits_of_a_context_that_float32_loses_are_warned_of(call, tmp_path, table):
    write(tmp_path / "late.csv", table + np.array([0, 0, 1e9, 0]), NAMES)
    errors = call("fit", "late.csv", *CONTEXT, "--quiet", "-o", "new", *QUICK)[2]
    assert "nvpflow: warning: context: column 'load' keeps few digits, neighbouring numbers of float32" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context-columns", "hour,day"), "data.csv: --context-columns: there is no column 'day'; the table has"),
        (("--context-columns", "hour,hour"), "--context-columns names 'hour' twice, expected each column once"),
        (("--context-columns", ""), "--context-columns is empty, expected the columns of the context"),
        (("--context-columns", "hour,east,load,north"), "data.csv: no column is left"),
        ((*CONTEXT, "--columns", "east,load"), "data.csv: --columns names 'load', a column of the context; leave it"),
        ((*CONTEXT, "--drop", "hour"), "data.csv: --drop names 'hour', a column of the context; leave it out there"),
    ],
)
def test_fit_with_wrong_columns_writes_nothing(call, tmp_path, arguments, message):
    assert error_of(call("fit", "data.csv", "-o", "new", *arguments)).startswith(message)
    assert not (tmp_path / "new").exists()


def test_what_is_no_number_in_a_context_cannot_be_dropped(call, tmp_path):
    (tmp_path / "text.csv").write_text("hour,east,load,north,id\nten,1,2,3,a\n11,,5,6,b\n")
    message = error_of(call("fit", "text.csv", *CONTEXT, "-o", "new"))
    assert "'hour' holds text (first 'ten', line 2), 'id' holds text" in message
    assert "--drop id leaves them out; encode those of the context as numbers; missing cells in 'east'" in message
    (tmp_path / "gap.csv").write_text("hour,east,load,north\n,1,2,3\n11,4,5,6\n")
    assert "missing cells in 'hour' (line 2)" in error_of(call("fit", "gap.csv", *CONTEXT, "-o", "new"))


# ----------------------------------------------------------------------------------------------------------- score


def test_score_finds_the_context_by_name(call, data, tmp_path, table):
    x, c = data
    flow = nvpflow.load("model.safetensors")
    expected = flow.log_prob(x, context=c)
    assert np.array_equal(scores_of(call("score", "model.safetensors", "data.csv")), expected)
    write(tmp_path / "more.csv", np.c_[table[:, ::-1], table[:, 0]], ("north ", "load", "east", "hour", "id"))
    arguments = ("score", "model.safetensors", "more.csv", "--columns", "east,north")
    assert np.array_equal(scores_of(call(*arguments)), expected)
    output = call(*arguments, "--keep", "id,hour")[1].splitlines()
    assert output[0] == "id,hour,log_prob"
    assert output[1].split(",")[:2] == [repr(float(c[0, 0]))] * 2
    by_number = ("score", "model.safetensors", "data.npy", "--context-columns", "1,3")
    assert np.array_equal(scores_of(call(*by_number)), expected)
    by_option = ("score", "model.safetensors", "data.csv", *CONTEXT)
    assert np.array_equal(scores_of(call(*by_option)), expected)
    write(tmp_path / "renamed.csv", table, ("h", "e", "l", "n"))
    other = ("score", "model.safetensors", "renamed.csv", "--context-columns", "h,l", "--ignore-names")
    assert np.array_equal(scores_of(call(*other)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("data.npy",),
            "data.npy: the model is a density under a context of 2 columns; say with --context-columns whi",
        ),
        (("data.csv", "--ignore-names"), "data.csv: the model is a density under a context of 2 columns; say with"),
        (
            ("data.csv", "--context-columns", "load,hour"),
            "data.csv: context column 1 is 'load', the model was trained w",
        ),
        (("data.csv", "--context-columns", "load", "--drop", "hour"), "data.csv: a context of 1 column, the model tak"),
        (("data.csv", "--columns", "east,load"), "data.csv: --columns names 'load', a column of the context; leave"),
        (("short.csv",), "short.csv: there is no column 'load' for the context of the model; the table has 'hour', 'e"),
        (("twice.csv",), "twice.csv: there is no column 'load' (or more than one of that name) for the context of the"),
    ],
)
def test_score_refuses_tables_without_the_context(call, tmp_path, table, arguments, message):
    write(tmp_path / "short.csv", table[:, [0, 1, 3]], ("hour", "east", "north"))
    write(tmp_path / "twice.csv", table, ("load", "east", "load", "hour"))
    assert error_of(call("score", "model.safetensors", *arguments)).startswith(message)


def test_a_model_without_a_context_takes_none(call):
    nvpflow.build(4, 1, ()).save("plain")
    message = "--context-columns is given, expected it left out: the model has no context"
    assert message in error_of(call("score", "plain", "data.csv", "--context-columns", "hour"))
    assert "--context: the model has no context" in error_of(call("sample", "plain", "-n", 1, "--context", "1"))
    assert "--context-from: the model has" in error_of(call("sample", "plain", "-n", 1, "--context-from", "data.csv"))


def test_one_name_for_a_column_and_a_context_needs_the_option(call, tmp_path, table):
    flow = nvpflow.load("model.safetensors")
    flow.column_names = ("east", "load ")
    flow.save("same")
    assert "the model calls a column and one of its context 'load'" in error_of(call("score", "same", "data.csv"))
    assert call("score", "same", "data.csv", *CONTEXT, "--ignore-names")[0] == 0


def test_a_context_that_is_no_number_of_the_model_gives_nan(call, tmp_path):
    lines = ["hour,load,east,north", "1,2,3,4", "1e300,2,3,4", ",2,3,4", "inf,2,3,4", "1,2,1e300,4", "1,2,nan,4"]
    (tmp_path / "odd.csv").write_text("\n".join(lines))
    for missing in ("nan", "skip"):  # both keep the places of rows
        _, output, _ = call("score", "model.safetensors", "odd.csv", "--missing", missing)
        found = np.array(output.split(), np.float32)
        assert np.isfinite(found[0])
        assert np.isnan(found[[1, 2, 3, 5]]).all()
        assert found[4] == -np.inf


def test_blocks_join_to_the_whole(call, monkeypatch):
    from nvpflow import _source

    whole = [call("score", "model.safetensors", "data.csv"), call("check", "model.safetensors", "data.csv", "--json")]
    monkeypatch.setattr(_source, "BLOCK_VALUES", 7)
    by_number = ("--context-columns", "1,3")
    assert call("score", "model.safetensors", "data.csv") == whole[0]
    assert call("check", "model.safetensors", "data.csv", "--json") == whole[1]
    assert call("fit", "data.npy", *by_number, "-o", "a", "--quiet", *QUICK)[0] == 0
    monkeypatch.undo()


# -------------------------------------------------------------------------------------------------- check and report


def test_check_measures_under_the_context(call, data):
    x, c = data
    code, output, _ = call("check", "model.safetensors", "data.csv", "--json")
    assert code == 0
    expected = nvpflow.load("model.safetensors").certify(x, context=c)
    assert json.loads(output) == json.loads(expected.to_json())


def test_report_takes_the_context(call, data, tmp_path):
    pytest.importorskip("matplotlib")
    x, c = data
    assert call("report", "model.safetensors", "data.csv", "-o", "page.html", "--train", "data.csv")[0] == 0
    page = (tmp_path / "page.html").read_text()
    mean = nvpflow.load("model.safetensors").log_prob(x, context=c).mean(dtype=np.float64)
    assert f"{mean:.3f}".replace("-", "\N{MINUS SIGN}") in page
    assert "2 numbers: hour, load; standardized" in page


# ---------------------------------------------------------------------------------------------------------- sample


def test_sample_under_one_context(call):
    flow = nvpflow.load("model.safetensors")
    code, output, errors = call("sample", "model.safetensors", "-n", 5, "--context=-7,2.5", "--seed", 3, "--start", 2)
    assert (code, errors) == (0, "")
    assert output.splitlines()[0] == "east,north"
    found = np.array([line.split(",") for line in output.splitlines()[1:]], np.float32)
    assert np.array_equal(found, flow.sample(5, seed=3, start=2, context=[-7, 2.5]))


@pytest.mark.parametrize("block", [1 << 20, 4, 6])
def test_sample_under_each_row_of_a_table(call, data, monkeypatch, block, tmp_path):
    """The same rows as Python's, whatever the blocks are; and the context behind them."""
    from nvpflow import _source

    _, c = data
    flow = nvpflow.load("model.safetensors")
    expected = flow.sample(5, seed=3, start=2, context=c).reshape(-1, 2)
    monkeypatch.setattr(_source, "BLOCK_VALUES", block)
    sample = ("sample", "model.safetensors", "-n", 5, "--context-from", "data.csv", "--seed", 3, "--start", 2)
    assert call(*sample, "-o", "s.npy") == (0, "", "")
    found = np.load("s.npy")
    assert found.dtype == np.float64  # float32 does not hold a load of 0.1
    assert np.array_equal(found, np.hstack([expected, np.repeat(c, 5, axis=0)]))
    output = call(*sample)[1].splitlines()
    assert output[0] == "east,north,hour,load"
    cells = [line.split(",") for line in output[1:]]
    assert [cell[2:] for cell in cells] == [
        [repr(float(v)).removesuffix(".0") for v in row] for row in np.repeat(c, 5, axis=0)
    ]
    assert np.array_equal(np.array([cell[:2] for cell in cells], np.float32), expected)
    assert call(*sample, "-o", "s.parquet")[0] == 0
    from pyarrow import parquet

    found = parquet.read_table("s.parquet")
    assert [str(field.type) for field in found.schema] == ["float", "float", "double", "double"]
    assert found.column_names == ["east", "north", "hour", "load"]
    # What was drawn can be scored again as it is.
    log_p = scores_of(call("score", "model.safetensors", "s.npy", "--context-columns", "3,4"))
    assert np.array_equal(log_p, flow.log_prob(expected, context=np.repeat(c, 5, axis=0)))


def test_tables_of_contexts(call, data, tmp_path):
    _, c = data
    flow = nvpflow.load("model.safetensors")
    expected = flow.sample(1, seed=0, context=c.astype(np.float32))[:, 0]
    np.save("c.npy", c.astype(np.float32))
    np.save("wide.npy", np.c_[c[:, 1], c[:, 0]].astype(np.float32))
    write(tmp_path / "c.csv", c, ("a", "b"))
    for arguments in (
        ("c.npy",),
        ("wide.npy", "--context-columns", "2,1"),
        ("data.npy", "--context-columns", "1,3"),
        ("c.csv", "--ignore-names"),
    ):
        assert (
            call("sample", "model.safetensors", "-n", 1, "-o", "s.npy", "--force", "--context-from", *arguments)[0] == 0
        )
        np.testing.assert_allclose(np.load("s.npy")[:, :2], expected, rtol=1e-5, atol=1e-5)
    assert np.load("s.npy").shape == (N, 4)
    call("sample", "model.safetensors", "-n", 1, "-o", "s.npy", "--force", "--context-from", "c.npy")
    assert np.load("s.npy").dtype == np.float32
    assert call("sample", "model.safetensors", "-n", 0, "-o", "s.npy", "--force", "--context-from", "c.npy")[0] == 0
    assert np.load("s.npy").shape == (0, 4)
    flow.column_names = None
    flow.save("half")
    assert call("sample", "half", "-n", 1, "--context-from", "c.npy")[1].startswith("column_1,column_2,hour,load\n")
    flow.context_names = None
    flow.save("none")
    assert call("sample", "none", "-n", 1, "--context-from", "c.npy")[1][0] in "-0123456789"
    assert call("sample", "none", "-n", 1, "--context-from", "c.npy", "-o", "s.parquet")[0] == 0
    from pyarrow import parquet

    assert parquet.read_table("s.parquet").column_names == [f"column_{i}" for i in (1, 2, 3, 4)]
    assert call("sample", "none", "-n", 1, "--context-from", "c.csv")[1].startswith("column_1,column_2,a,b\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "the model is a density under a context of 2 numbers ('hour', 'load'), expected either --context with the",
        ),
        (
            ("--context", "1,2", "--context-from", "data.csv"),
            "--context and --context-from are both given, expected on",
        ),
        (("--context", "1,2,3"), "--context has 3 numbers, expected 2 as the model takes"),
        (("--context-from", "data.npy"), "data.npy: a context of 4 columns, the model takes 2"),
        (("--context-from", "few.csv"), "few.csv: there is no column 'load' for the context of the model; the table h"),
        (("--context-from", "gap.csv"), "gap.csv: missing cells in 'load' (line 2)"),
        (("--context", "1e300,2"), "--context: 'hour' is 1e+300, expected a number that float32 holds"),
        (
            ("--context", "hour=1"),
            "--context names 'hour', expected each number of the model's context once: 'h",
        ),
        (
            ("--context", "hour=1,hour=2"),
            "--context names 'hour', 'hour', expected each number of the model's context",
        ),
        (
            ("--context", "hour=1,day=2"),
            "--context names 'hour', 'day', expected each number of the model's context ",
        ),
        (("--context", "1,2", *CONTEXT), "--context-columns is given, expected --context-from beside it"),
        (
            ("--context-from", "huge.csv"),
            "huge.csv: 'load' is 1e+300 in row 1, counted from 0, expected a number that",
        ),
        (("--context-from", "inf.csv"), "inf.csv: 'hour' is inf, expected a number that float32 holds"),
        (("--context-from", "data.csv", "-o", "data.csv", "--force"), "-o: data.csv is --context-from too; give the"),
    ],
)
def test_sample_refuses_what_is_no_context(call, tmp_path, arguments, message):
    (tmp_path / "few.csv").write_text("hour\n1\n")
    (tmp_path / "gap.csv").write_text("hour,load\n1,\n")
    (tmp_path / "huge.csv").write_text("hour,load\n1,2\n1,1e300\n")
    (tmp_path / "inf.csv").write_text("hour,load\ninf,2\n")
    assert message in error_of(call("sample", "model.safetensors", "-n", 2, *arguments))


def test_rows_that_a_seed_does_not_have_are_counted_over_all_contexts(call, tmp_path):
    (tmp_path / "c.csv").write_text("hour,load\n1,2\n3,4\n")
    arguments = ("sample", "model.safetensors", "--context-from", "c.csv", "-n", 1 << 62)
    assert "for each of 2 contexts" in error_of(call(*arguments, "--start", 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1,x", "'x' is not a finite number, true or false, expected numbers such as 0.5,1.2 or names with"),
        ("nan,1", "'nan' is not a finite number, true or false"),
        ("hour=1,load=-inf", "'-inf' is not a finite number, true or false"),
        ("1_0,2", "'1_0' is not a finite number, true or false"),
        ("-,2", "'-' is not a finite number"),
        ("hour=1,2", "'hour=1,2' is not a list, expected numbers such as 0.5,1.2 or names with a number each"),
        ("", "'' is not a list, expected numbers"),
    ],
)
def test_numbers_that_are_none_are_wrong_usage(call, capfdbinary, given, message):
    with pytest.raises(SystemExit) as end:
        call("sample", "model.safetensors", "-n", 1, f"--context={given}")
    assert end.value.code == 2
    assert message in capfdbinary.readouterr().err.decode()


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (("--context", "-20,3"), (-20, 3)),
        (("--context", "-.5,-1e2"), (-0.5, -100)),
        (("--context", "hour=-20,load=3"), (-20, 3)),
        (("--context", " load = 3 , hour=-20"), (-20, 3)),
        (("--context", "true,False"), (1, 0)),
        (("--context", "load=true,hour=2"), (2, 1)),
    ],
)
def test_ways_to_give_one_context(call, given, numbers):
    found = call("sample", "model.safetensors", "-n", 4, "-o", "s.npy", "--force", *given)
    assert found == (0, "", "")
    expected = nvpflow.load("model.safetensors").sample(4, seed=0, context=numbers)
    assert np.array_equal(np.load("s.npy"), expected)


def test_names_of_a_context_may_hold_any_character(call):
    flow = nvpflow.load("model.safetensors")
    flow.context_names = ("a=b", 'c,"d"')
    flow.save("odd")
    expected = flow.sample(1, seed=0, context=(1, 2))
    assert call("sample", "odd", "-n", 1, "-o", "s.npy", "--context", '"c,""d""=2",a=b=1')[0] == 0
    assert np.array_equal(np.load("s.npy"), expected)
    flow.context_names = None
    flow.save("none")
    message = error_of(call("sample", "none", "-n", 1, "--context", "a=1,b=2"))
    assert message == (
        "--context names 'a', expected numbers only: the model has no names for its context; "
        "give the 2 numbers in their order\n"
    )


def test_a_second_context_is_not_taken_for_the_first(call, capfdbinary):
    with pytest.raises(SystemExit) as end:
        call("sample", "model.safetensors", "-n", 1, "--context", "hour=1", "--context", "load=2")
    assert end.value.code == 2
    assert "--context is given twice, expected one list; write --context X,X" in capfdbinary.readouterr().err.decode()


def test_commands_that_leave_no_row_out_do_not_offer_it(call, tmp_path):
    (tmp_path / "gap.csv").write_text("hour,load,east,north\n1,2,,4\n1,,3,4\n1,2,3,4\n")
    for command in (("score",), ("check",), ("report", "-o", "page.html")):
        message = error_of(call(command[0], "model.safetensors", "gap.csv", *command[1:]))
        assert message.endswith(": --missing nan takes them as NaN, and gives NaN for 2 rows\n")
    message = error_of(call("fit", "gap.csv", *CONTEXT, "-o", "new"))
    assert message.endswith(": --missing skip leaves 2 rows out, --missing nan takes the cells as NaN\n")
