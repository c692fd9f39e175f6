"""check_data: each finding on data that has it, none on data that has not; what fit and the command do with them."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from nvpflow import _data, _source, cli, demo

RANDOM = np.random.default_rng(0)
DATA = os.environ.get("NVPFLOW_DATA")
QUICK = {"epochs": 1, "batch_size": 64, "progress": False}


def normal(rows: int = 1000, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, columns))


def moons(rows: int = 6000) -> np.ndarray:
    random = np.random.default_rng(2)
    angle = np.pi * random.random(rows)
    upper = random.random(rows) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle))
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    return (np.column_stack([x, y]) + 0.05 * random.normal(size=(rows, 2))).astype(np.float32)


def flow_of(x: np.ndarray, **options: object) -> nvpflow.Flow:
    return nvpflow.build(x.shape[1], num_flows=2, hidden_sizes=(8,), **{"standardize": True, **options})


def found(x: object, **options: object) -> dict[str, nvpflow.Finding]:
    return {finding.kind: finding for finding in nvpflow.check_data(x, **options).findings}


# ------------------------------------------------------------------------------------------------------ nothing to find


SOUND = {
    "normal": normal(),
    "normal in float32": normal().astype(np.float32),
    "20 columns": normal(5000, 20),
    "moons": moons(),
    "t(3)": np.random.default_rng(3).standard_t(3, size=(5000, 3)),
    "lognormal(1)": np.exp(np.random.default_rng(4).normal(size=(5000, 3))),
    "modes 100 sd apart": normal(5000) + 100.0 * np.random.default_rng(5).integers(0, 2, (5000, 1)),
    "strongly dependent": normal(5000) @ np.array([[1, 1, 1], [0, 1e-2, 0], [0, 0, 1e-2]]),
    "counts to a thousand": np.random.default_rng(6).poisson(1000, size=(5000, 2)),
    "rounded to hundredths": np.round(normal(5000), 2),
    "seconds since 1970": 1.7e9 + 60 * normal(),
    "the demo's": demo.load_data(),
}


@pytest.mark.parametrize("x", SOUND.values(), ids=SOUND)
def test_nothing_is_found_in_sound_data(x) -> None:
    report = nvpflow.check_data(x)
    assert report.ok, report
    assert repr(report).endswith("; nothing found")


@pytest.mark.parametrize("name", ["normal", "20 columns", "moons", "t(3)"])
def test_unit_scale_needs_no_standardize_layer(name) -> None:
    assert nvpflow.check_data(SOUND[name], standardize=False).ok


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="NVPFLOW_DATA is not set")
@pytest.mark.parametrize("name", ["power_train", "power_val", "protein_train", "protein_val"])
def test_nothing_is_found_in_real_data(name) -> None:
    x = np.load(Path(DATA) / f"{name}.npy", mmap_mode="r")
    assert nvpflow.check_data(x).ok
    assert nvpflow.check_data(x, standardize=False).ok


# ------------------------------------------------------------------------------------------------------- each finding


def test_missing_values_are_counted_by_row_and_column() -> None:
    x = normal()
    x[7, 1], x[7, 2], x[900, 1] = np.nan, np.inf, -np.inf
    finding = found(x, names=["a", "b", "c"])["missing"]
    assert finding.severity == "error"
    assert finding.columns == (2, 3)
    assert finding.text == (
        "2 of 1,000 rows with NaN or infinite values (rows 7, 900, counted from 0; column 'b': 2, column 'c': 1)"
    )
    assert set(found(x)) == {"missing"}  # the finite rows are sound


@pytest.mark.parametrize("value", [0.0, 3.0, -1e30])
def test_a_constant_column(value) -> None:
    x = normal()
    x[:, 2] = value
    finding = found(x)["constant"]
    assert finding.severity == "error"
    assert (finding.columns, finding.names) == ((3,), ("column 3",))
    assert set(found(x)) == {"constant"}


def test_a_column_that_is_nearly_constant() -> None:
    x = normal()
    x[:, 2] = 3
    x[0, 2] = 4
    assert set(found(x)) == {"few"}
    assert found(x)["few"].columns == (3,)
    x[:100, 2] = normal(100)[:, 0]
    assert found(x)["repeated"].figures["share"] == pytest.approx(0.9)


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (-3, 100), (1e-3, 7)])
def test_a_copy(scale, offset) -> None:
    x = normal()
    x[:, 2] = scale * x[:, 0] + offset
    finding = found(x)["copy"]
    assert finding.severity == "error"
    assert finding.columns == (3, 1)
    assert ("scale and offset" in finding.text) == (scale != 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_linear_combination_names_the_columns_that_depend(dtype) -> None:
    x = normal(2000, 6)
    x[:, 4] = 2 * x[:, 0] - x[:, 3] + 5
    finding = found(x.astype(dtype))["dependent"]
    assert finding.severity == "error"
    assert finding.columns == (5, 1, 4)


def test_shares_that_add_up_to_one() -> None:
    x = np.exp(normal(2000, 4))
    assert found(x / x.sum(axis=1, keepdims=True))["dependent"].columns == (4, 1, 2, 3)


def test_dependence_that_is_not_exact_is_a_warning() -> None:
    x = normal(5000)
    x[:, 2] = x[:, 0] + x[:, 1] + 1e-5 * normal(5000, 4)[:, 3]
    assert found(x)["dependent"].severity == "warning"
    x = normal(5000)
    x[:, 2] = x[:, 0]
    x[4321, 2] += 1e-3  # all rows count, also those that no sample holds
    assert found(x)["copy"].severity == "warning"


def test_a_copy_in_all_rows_but_one_that_no_sample_holds() -> None:
    x = np.random.default_rng(0).normal(size=(300_000, 2)).astype(np.float32)
    x[:, 1] = x[:, 0]
    assert found(x)["copy"].severity == "error"
    seen = []
    for row in range(3):  # of which one at most is drawn
        x[row, 1] += 1
        seen += [finding.severity for finding in nvpflow.check_data(x).findings]
        x[row, 1] = x[row, 0]
    assert len(seen) >= 2
    assert set(seen) == {"warning"}


def test_common_fill_values_are_no_dependence() -> None:
    x = normal()
    x[::200] = 1e30
    assert set(found(x)) == {"outliers"}


def test_few_rows_are_no_dependence() -> None:
    assert set(found(normal(10, 20))) == {"rows"}


def test_digits() -> None:
    seconds = np.column_stack([1.7e9 + 60 * normal()[:, 0], normal()[:, 1]])
    assert nvpflow.check_data(seconds).ok  # float64 rows, which a standardize layer takes
    rounded = seconds.astype(np.float32)
    assert set(found(rounded)) == {"digits"}
    finding = found(rounded)["digits"]
    assert finding.columns == (1,)
    assert finding.figures["step"] == 128
    assert found(seconds, standardize=False)["digits"].columns == (1,)
    assert nvpflow.check_data(seconds - seconds.mean(axis=0), standardize=True).ok
    assert set(found(1.7e9 + 60e-9 * normal())) == {"digits"}  # float64 has an end, too
    assert nvpflow.check_data(1000 + normal().astype(np.float32)).ok


def test_scale_counts_where_nothing_standardizes() -> None:
    x = normal() * [1, 20, 1e-3] + [100, 0, 0]
    assert nvpflow.check_data(x).ok
    scale = [
        finding.columns for finding in nvpflow.check_data(x, standardize=False).findings if finding.kind == "scale"
    ]
    assert scale == [(1,), (2,), (3,)]


@pytest.mark.parametrize("factor", [1e3, 1e5, 1e30])
def test_outliers(factor) -> None:
    x = normal(5000)
    x[::1000, 1] *= factor
    assert set(found(x)) == {"outliers"}
    assert found(x)["outliers"].columns == (2,)


def test_few_distinct_values_and_integers() -> None:
    x = normal(5000)
    x[:, 0] = RANDOM.integers(0, 3, 5000)
    x[:, 1] = RANDOM.poisson(300, 5000)  # 17 steps
    x[:, 2] = np.where(x[:, 2] < -0.5, -0.5, x[:, 2])
    kinds = found(x)
    assert set(kinds) == {"few", "integers", "repeated"}
    assert [kinds[kind].columns for kind in ("few", "integers", "repeated")] == [(1,), (2,), (3,)]
    assert kinds["few"].figures["distinct"] == 3
    dithered = x[:, :2] + RANDOM.random((5000, 2))
    assert nvpflow.check_data(dithered).ok


def test_a_variance_beyond_float64_is_left_to_the_training_loop() -> None:
    x = normal() * [1, 1, 1e300]
    assert nvpflow.check_data(x).ok
    with pytest.raises(ValueError, match="x has a variance beyond float64 in column 3"):
        flow_of(x, dtype="float64").fit(x, **QUICK)


def test_too_few_rows() -> None:
    assert found(normal(89))["rows"].severity == "warning"
    assert found(normal(60))["rows"].text == "60 rows are few for 3 columns"
    assert found(normal(1))["rows"].severity == "warning"
    assert found(normal(0))["rows"].severity == "error"
    assert nvpflow.check_data(normal(90)).ok
    assert repr(nvpflow.check_data(normal(1, 1))).startswith("DataReport: 1 row of 1 column;")


# --------------------------------------------------------------------------------------------------------- the report


def bad_table() -> np.ndarray:
    x = normal(1000, 5)
    x[3, 0] = np.nan
    x[:, 1] = 4
    x[:, 3] = x[:, 2]
    x[:, 4] = RANDOM.integers(0, 2, 1000)
    return x


def test_all_problems_of_a_table_are_in_one_report() -> None:
    report = nvpflow.check_data(bad_table(), names=["a", "b", "c", "d", "e"])
    assert [finding.kind for finding in report.errors] == ["missing", "constant", "copy"]
    assert [finding.kind for finding in report.warnings] == ["few"]
    assert report.findings == report.errors + report.warnings
    assert not report.ok
    lines = repr(report).splitlines()
    assert lines[0] == "DataReport: 1,000 rows of 5 columns; 3 errors, 1 warning"
    assert len(lines) == 5
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.to_dict()["findings"][1]["names"] == ["column 'b'"]


def test_the_report_does_not_depend_on_layout_or_call() -> None:
    x = bad_table()
    assert nvpflow.check_data(x) == nvpflow.check_data(np.asfortranarray(x)) == nvpflow.check_data(x.tolist())


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ("table.csv", {}, TypeError, "x is a str, expected rows"),
        (np.zeros(5), {}, ValueError, r"x has shape \(5,\), expected \[N, D\]"),
        (np.zeros((5, 0)), {}, ValueError, r"x has shape \(5, 0\), expected \[N, D\] with at least one column"),
        (np.array([["a", "b"]]), {}, TypeError, "x has dtype <U1, expected real numbers"),
        ([[1.0], [1.0, 2.0]], {}, TypeError, "x cannot be read as an array of numbers"),
        (normal(), {"names": ["a"]}, ValueError, "names holds 1 names, expected 3"),
        (normal(), {"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        (normal(), {"standardize": 1}, TypeError, r"standardize is 1 \(int\), expected True or False"),
    ],
)
def test_arguments_that_are_refused(x, options, error, message) -> None:
    with pytest.raises(error, match=message):
        nvpflow.check_data(x, **options)


# ------------------------------------------------------------------------------------------------------------ fit


@pytest.mark.parametrize("standardize", [True, False])
def test_fit_refuses_what_has_no_density_in_one_message(standardize) -> None:
    x = bad_table().astype(np.float32)
    flow = flow_of(x, standardize=standardize)
    flow.column_names = ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match=r"^x, 3 things:") as refused:
        flow.fit(x, **QUICK)
    for text in ("1 of 1,000 rows with NaN", "column 'b' is constant, 4", "column 'd' is a copy of column 'c'"):
        assert text in str(refused.value)


@pytest.mark.parametrize("standardize", [True, False])
def test_a_constant_column_has_the_same_answer_with_and_without_standardize(standardize) -> None:
    x = normal().astype(np.float32)
    x[:, 1] = 3
    with pytest.raises(ValueError, match=r"^x: column 2 is constant, 3 in all rows") as refused:
        flow_of(x, standardize=standardize).fit(x, **QUICK)
    assert str(refused.value).endswith("a column without variation has no density: remove it")


def test_fit_warns_once_of_everything_else() -> None:
    x = normal().astype(np.float32)
    x[:, 0] = 1.7e9 + 60 * x[:, 0].astype(float)
    x[:, 1] = x[:, 1] > 0
    x[0, 2] = 1e6
    flow = flow_of(x)
    flow.column_names = ["time", "flag", "amount"]
    with pytest.warns(nvpflow.DataWarning) as seen:
        flow.fit(x, **QUICK)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    message = str(seen[0].message)
    for text in (
        "column 'time' has lost digits",
        "column 'flag' has 2 distinct values",
        "column 'amount' has outliers",
    ):
        assert text in message


def test_fit_says_nothing_of_sound_data_and_scoring_never_looks() -> None:
    x = normal().astype(np.float32)
    flow = flow_of(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.fit(x, **QUICK)
        flow.log_prob(np.ones((5, 3), np.float32))
        flow.forward(np.full((5, 3), 1e9, np.float32))


def test_fit_keeps_the_names_of_a_frame_of_contexts_and_methods_compare_them() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rng = np.random.default_rng(0)
    c = pandas.DataFrame(rng.normal(size=(300, 2)), columns=["hour", "load"])
    x = rng.normal(size=(300, 2)) + c.to_numpy()
    flow = nvpflow.build(2, 1, (4,), context_size=2)
    swapped = c[["load", "hour"]]
    message = "context has columns in another order: column 1 is 'load', the flow was trained with 'hour' there; take "
    way = "them by name, context[list(flow.context_names)]"
    with pytest.raises(ValueError, match="the context of validation has columns in another order"):
        flow.fit(x, context=c, validation=(x[:9], swapped[:9]), epochs=1, progress=False)
    with pytest.raises(ValueError, match="epochs is 0"):
        flow.fit(x, context=c, epochs=0, progress=False)
    assert flow.context_names is None  # where training does not begin there are none
    with pytest.warns(nvpflow.DataWarning, match="context: column 'load' keeps few digits, neighbouring"):
        flow.fit(x, context=c.assign(load=c.load + 1e9), epochs=1, validation=None, progress=False)
    assert flow.context_names == ("hour", "load")
    assert flow.column_names is None
    c = c[list(flow.context_names)]
    flow.log_prob(x, context=c)
    for call in (
        lambda: flow.log_prob(x, context=swapped),
        lambda: flow.sample(2, context=swapped),
        lambda: flow.nll(x, context=swapped),
        lambda: flow.certify(x, context=swapped),
        lambda: flow.fit(x, context=swapped, epochs=1, progress=False),
    ):
        with pytest.raises(ValueError, match=re.escape(message + way)):
            call()
    with pytest.raises(ValueError, match="context has two columns of one name: columns 1 and 2 are both called 'a'"):
        flow.log_prob(x, context=c.set_axis(["a", "a"], axis=1))
    assert "2: hour, load" in flow._repr_html_()


def test_raw_units_without_standardize_are_warned_of() -> None:
    x = (100 + 20 * normal()).astype(np.float32)
    with pytest.warns(nvpflow.DataWarning) as seen:
        flow_of(x, standardize=False).fit(x, **QUICK)
    before, after = (str(warning.message) for warning in seen)
    assert re.search(r"column 1 has mean .* far from unit scale.*standardize=True", before)
    assert re.search(r"the flow is worse than a Gaussian.*; mend what nvpflow\.check_data finds in x, then ", after)


# ---------------------------------------------------------------------------------------------------- the certificate


def test_a_flow_whose_input_lost_its_digits_is_not_called_accurate(tmp_path, capsys) -> None:
    seconds = np.column_stack([1.7e9 + 60 * normal()[:, 0], normal()[:, 1]]).astype(np.float32)
    flow = flow_of(seconds)
    flow.column_names = ["time", "amount"]
    with pytest.warns(nvpflow.DataWarning, match="column 'time' has lost digits"):
        flow.fit(seconds, **QUICK)
    found = flow.certify(seconds)
    assert found.verdict == "unreliable"
    assert found.blurred_columns == ("column 'time'",)
    assert found.input_resolution > 1
    assert "column 'time'" in found.advice[0]
    assert len(found.advice) == 1  # the arithmetic itself is sound
    assert nvpflow.Certificate.from_json(found.to_json()) == found
    assert flow.certify(seconds, tolerance=10).verdict == "reduced"
    flow.save(tmp_path / "m.safetensors")
    np.save(tmp_path / "x.npy", seconds)
    assert cli.main(["check", str(tmp_path / "m.safetensors"), str(tmp_path / "x.npy")]) == 3
    assert "lost digits before they came, in column 'time'" in capsys.readouterr().out


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_a_certificate_of_sound_data_has_no_word_of_digits(offset) -> None:
    x = (normal() + offset).astype(np.float32)
    flow = flow_of(x)
    flow.fit(x, **QUICK)
    for rows in (x, x[0]):
        found = flow.certify(rows)
        assert found.blurred_columns == ()
        assert found.input_resolution == pytest.approx(1.2e-7 * (offset + 3), rel=1)
    x[5] = 1e20  # a row far out says nothing of the others
    assert flow.certify(x).blurred_columns == ()


def test_the_report_tells_what_was_found_in_the_columns() -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    from nvpflow import report

    x = normal().astype(np.float32)
    flow = flow_of(x)
    x[:, 1] = x[:, 1] > 0
    assert "Column &#x27;flag&#x27; has 2 distinct values" in report.html(flow, x, names=["a", "flag", "c"])


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_fit_warns_and_refuses(tmp_path, capsys) -> None:
    x = normal(200)
    x[:, 1] = RANDOM.integers(0, 2, 200)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header="a,b,c", comments="")
    fit = ["fit", str(tmp_path / "x.csv"), "--epochs", "1", "--batch-size", "50", "--quiet", "-o"]
    assert cli.main([*fit, str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().err.startswith(f"nvpflow: warning: {fit[1]}: column 'b' has 2 distinct values")
    x[:, 1], x[:, 2] = 5, x[:, 0]
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header="a,b,c", comments="")
    assert cli.main([*fit, str(tmp_path / "b.safetensors")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "column 'b' is constant, 5" in message
    assert "column 'c' is a copy of column 'a'" in message


def test_the_warning_of_the_command_names_the_file_and_the_command(tmp_path, capsys) -> None:
    x = normal(200)
    x[:, 0] = 1.7e9 + 60 * x[:, 0].astype(np.float32)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    model, table = str(tmp_path / "m.safetensors"), str(tmp_path / "x.npy")
    assert cli.main(["fit", table, "-o", model, "--epochs", "1", "--quiet"]) == 0
    message = capsys.readouterr().err
    assert message.startswith(f"nvpflow: warning: {table}: column 1 has lost digits")
    assert "nvpflow.check_data" not in message
    assert message.endswith("(nvpflow check MODEL DATA shows them line by line)\n")


# ------------------------------------------------------------------------------------------------- rows that come by


def running(x: np.ndarray, step: int, **options: object) -> nvpflow.DataReport:
    look = _data.RunningLook(None, x.shape[1], "float32", True, **options)
    for first in range(0, len(x), step):
        look.add(x[first : first + step])
    return look.report()


def test_rows_in_blocks_are_looked_at_as_the_whole_table() -> None:
    x = normal(3000, 6)
    x[:, 1] = x[:, 0] * 2 - 1
    x[:, 2] = 7
    x[:, 3] = RANDOM.integers(0, 4, 3000)
    x[2500, 4], x[2900, 5] = np.nan, np.inf
    x[10, 4] = -1e6
    whole = nvpflow.check_data(x)
    assert {finding.kind for finding in whole.findings} == {"copy", "constant", "few", "missing", "outliers"}
    for step in (1, 700, 3000):
        assert [str(f) for f in running(x, step).findings] == [str(f) for f in whole.findings]


def test_what_only_later_rows_hold_is_found_in_one_pass() -> None:
    x = normal(60_000, 3)
    x[:5_000, 1] = 4  # the whole of the first block
    x[:, 2] = x[:, 0]
    x[59_999, 0] = np.nan
    found = running(x, 5000).findings
    assert [finding.kind for finding in found] == ["missing", "copy"]
    assert "1 of 60,000 rows with NaN or infinite values (row 59999" in found[0].text
    assert found[1].text == "column 3 is a copy of column 1 in the 20,000 rows looked at"


def test_memory_of_a_running_look_does_not_grow() -> None:
    look = _data.RunningLook(None, 4, "float32", True)
    look.add(normal(40_000, 4))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(20):
        look.add(normal(40_000, 4))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert look.report().rows == 21 * 40_000
    assert grown < 2 * 20_000 * 5 * 8  # the rows drawn and their keys may lie in new arrays


def test_other_units_than_those_of_the_training_are_found() -> None:
    x = normal(2000)
    flow = flow_of(x)
    assert _data.trained_scales(flow) is None
    flow.initialize_from(x)
    trained = _data.trained_scales(flow)
    assert running(x, 500, trained=trained).ok
    for other in (1000 * x, x / 1000, x + 50):
        (found,) = {finding.kind for finding in running(other, 500, trained=trained).findings}
        assert found == "scale"
    wild = x.copy()
    wild[:3] = 1e5  # a few rows far out are no other units
    assert {finding.kind for finding in running(wild, 500, trained=trained).findings} == {"outliers"}
    text = str(running(1000 * x, 500, trained=trained).findings[0])
    assert "column 1 has mean" in text
    assert "the flow was trained around" in text
    assert "initialize_from" in text


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one epoch
def test_a_second_fit_on_other_units_names_initialize_from() -> None:
    x = normal().astype(np.float32)
    flow = flow_of(x)
    flow.fit(x, **QUICK)
    flow.fit(x, **QUICK)  # the same units: no word
    with pytest.warns(nvpflow.DataWarning, match=r"the flow was trained around .*flow\.initialize_from\(x\)"):
        flow.fit(50 * x, **QUICK)
    flow.initialize_from(50 * x)
    flow.fit(50 * x, **QUICK)


def test_the_command_check_looks_at_every_row(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_source, "BLOCK_VALUES", 600)
    x = normal(3000)
    flow = flow_of(x)
    flow.initialize_from(x)
    flow.column_names = ["a", "b", "c"]
    flow.save(tmp_path / "m.safetensors")
    check = ["check", str(tmp_path / "m.safetensors"), str(tmp_path / "x.npy"), "--jacobian-rows", "0"]
    x[:, 2] = x[:, 0]
    x[:, 1] *= 100
    x[2999, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    assert cli.main([*check, "--missing", "nan", "--json"]) == 0
    said = capsys.readouterr()
    json.loads(said.out)
    for text in ("column 'b' has mean", "column 'c' is a copy of column 'a'", "column 'b': 1"):
        assert text in said.err
    assert all(line.startswith(f"nvpflow: {check[2]}: ") for line in said.err.splitlines())


# ---------------------------------------------------------------------------------------------------------- contexts


def contexts(rows: int = 3000) -> np.ndarray:
    """Sound ones: numbers, a coin, counts, an hour and a one-hot column of a fiftieth of the rows."""
    random = np.random.default_rng(7)
    hour, coin, rare = random.integers(0, 24, rows), random.integers(0, 2, rows), np.arange(rows) % 50 == 0
    return np.column_stack([normal(rows, 1), coin, random.poisson(3, rows), hour, rare])


def of_context(context: object, **options: object) -> dict[str, nvpflow.Finding]:
    x = normal(len(context), 2)
    report = nvpflow.check_data(x, context=context, **options)
    assert all(finding.argument == "context" for finding in report.findings)
    return {finding.kind: finding for finding in report.findings}


def test_nothing_is_found_in_sound_contexts() -> None:
    c = contexts()
    report = nvpflow.check_data(normal(3000, 2), context=c)
    assert repr(report) == "DataReport: 3,000 rows of 2 columns under 5 columns of context; nothing found"
    assert report.context_columns == tuple(f"context column {i}" for i in range(1, 6))
    for other in (c.astype(np.float32), c.tolist(), c[:, 1:2] > 0, np.hstack([c, c[:, :1]])):  # copies do no harm
        assert of_context(other) == {}


def test_each_finding_of_a_context() -> None:
    c = contexts()
    c[:, 0] += 1e9
    c[:, 1] = 4
    c[7, 2] = 1e6
    c[:, 4] = np.arange(3000) % 1000 == 5
    names = ["time", "kind", "count", "hour", "rare"]
    found = of_context(c, context_names=names)
    assert {kind: (f.names, f.columns, f.severity) for kind, f in found.items()} == {
        "digits": (("context column 'time'",), (1,), "warning"),
        "constant": (("context column 'kind'",), (2,), "warning"),
        "outliers": (("context column 'count'",), (3,), "warning"),
        "rare": (("context column 'rare'",), (5,), "warning"),
    }
    assert found["rare"].text == (
        "context column 'rare' is 0 in all but one in 1,000 rows: the flow learns little of its other values"
    )
    assert found["rare"].figures == {"value": 0, "share": 0.001}
    assert found["constant"].text.endswith("is constant, 4 in all rows: the flow learns nothing of it")
    assert set(of_context(c, standardize=False)) == {"digits", "constant", "rare"}
    assert set(of_context(c, dtype="float64")) == {"constant", "outliers", "rare"}
    report = nvpflow.check_data(normal(3000, 2), context=c, context_names=names)
    assert json.loads(report.to_json())["findings"][0]["argument"] == "context"


def test_a_rare_value_that_no_sample_holds() -> None:
    c = np.zeros((100_000, 1))
    seen = _data.drawn(np.arange(100_000), _data._sample_size(1))
    c[np.setdiff1d(np.arange(100_000), seen)[50]] = 1
    assert of_context(c)["rare"].text.startswith("context column 1 is 0 in nearly all rows: ")


def test_contexts_that_are_no_numbers_are_errors() -> None:
    c = contexts()
    c[3, 1], c[5, 0] = np.nan, np.inf
    finding = of_context(c)["missing"]
    assert (finding.severity, finding.columns) == ("error", (1, 2))
    assert finding.text.startswith("2 of 3,000 rows with NaN or infinite values (rows 3, 5, counted from 0; context co")
    assert finding.remedy == "remove or repair them: context[np.isfinite(context).all(axis=1)]"
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"kind": ["a", "b"] * 50, "hour": np.arange(100.0), "day": True})
    report = nvpflow.check_data(normal(100, 2), context=frame)
    assert [(f.kind, f.severity, f.names) for f in report.findings] == [
        ("type", "error", ("context column 'kind'",)),
        ("constant", "warning", ("context column 'day'",)),
    ]


@pytest.mark.parametrize(
    ("context", "options", "error", "message"),
    [
        (np.zeros((5, 2)), {}, ValueError, "context has 5 rows, x 1,000; expected one for each row"),
        (
            np.zeros(1000),
            {},
            ValueError,
            r"context has shape \(1000,\), expected \[N, C\]; np.reshape\(context, \(-1, 1\)\)",
        ),
        (
            np.zeros((1000, 0)),
            {},
            ValueError,
            r"context has shape \(1000, 0\), expected \[N, C\] with at least one col",
        ),
        (np.array([["a"]]), {}, TypeError, "context has dtype <U1, expected real numbers; encode text as numbers"),
        (
            {"a": [1.0]},
            {},
            TypeError,
            r"context is a dict, expected contexts \[N, C\] or \[C\] in an array or a frame: take",
        ),
        (normal(), {"context_names": ["a"]}, ValueError, "context_names holds 1 names, expected 3"),
    ],
)
def test_contexts_that_are_refused(context, options, error, message) -> None:
    with pytest.raises(error, match=message):
        nvpflow.check_data(normal(), context=context, **options)


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one epoch
def test_fit_warns_of_contexts_once_and_names_the_column() -> None:
    c = contexts(1000)[:, [0, 1]]
    x = normal(1000, 2).astype(np.float32)
    c[:, 1] = np.arange(1000) == 500
    flow = flow_of(x, context_size=2)
    flow.context_names = ["hour", "rare"]
    with pytest.warns(nvpflow.DataWarning) as seen:
        flow.fit(x, context=c, **QUICK)
    (message,) = [str(warning.message) for warning in seen if "Gaussian" not in str(warning.message)]
    assert message == (
        "context: column 'rare' is 0 in all but one in 1,000 rows: the flow learns little of its other values; give "
        "more rows of these, join rare categories, or leave the column out (nvpflow.check_data shows them as a table)"
    )


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one epoch
def test_a_second_fit_under_other_contexts_names_initialize_from() -> None:
    x, c = normal(1000, 2).astype(np.float32), contexts(1000)[:, [0, 1]]
    flow = flow_of(x, context_size=2)
    assert _data.trained_context_scales(flow) is None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="context")
        flow.fit(x, context=c, **QUICK)
        flow.fit(x, context=c, **QUICK)  # the same units: no word
    mean, std = _data.trained_context_scales(flow)
    np.testing.assert_allclose(mean, c.mean(axis=0), atol=0.05)  # of nine tenths of the rows
    np.testing.assert_allclose(std, c.std(axis=0), rtol=0.05)
    moved = c + np.array([50, 0])
    for other in (moved, c * [1000, 1]):
        with pytest.warns(
            nvpflow.DataWarning,
            match=r"context: column 1 has mean .* trained around .*flow\.initialize_from\(x, context=context\)",
        ):
            flow.fit(x, context=other, **QUICK)
    flow.initialize_from(x, context=moved)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="context")
        flow.fit(x, context=moved, **QUICK)


def test_the_command_check_looks_at_contexts(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_source, "BLOCK_VALUES", 600)
    x, c = normal(3000, 2), contexts()[:, [0, 4]]
    flow = flow_of(x, context_size=2)
    flow.initialize_from(x, context=c)
    flow.context_names = ["hour", "rare"]
    flow.save(tmp_path / "m.safetensors")
    c[:, 0] += 50
    c[:, 1] = 0
    c[7, 1] = 1
    np.save(tmp_path / "x.npy", np.hstack([x, c]))
    check = ["check", str(tmp_path / "m.safetensors"), str(tmp_path / "x.npy"), "--jacobian-rows", "0"]
    cli.main([*check, "--context-columns", "3,4", "--json"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"nvpflow: {check[2]}: context column 'hour' has mean 50")
    assert lines[1].startswith(f"nvpflow: {check[2]}: context column 'rare' is 0 in all but one in 3,000 rows")
