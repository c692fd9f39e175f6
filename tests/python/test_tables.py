"""Scorer: the same bits for every kind of table, in every process."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import subprocess
import sys

import numpy as np
import nvpflow
import pytest
from nvpflow import tables
from nvpflow.tables import Scorer, sample_file, score_file

COLUMNS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def flow():
    flow = nvpflow.build(3, 2, (8,), column_names=COLUMNS)
    rows = np.random.default_rng(0).normal([1, 2, 3], [1, 10, 0.1], (500, 3))
    flow.fit(rows.astype(np.float32), epochs=2, progress=False)
    return flow


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(1)
    columns = {name: rng.normal(i + 1, 1, 40) for i, name in enumerate(COLUMNS)}
    # Among others, in another order.
    return {"id": np.arange(40), "c": columns["c"], "other": np.zeros(40), "b": columns["b"], "a": columns["a"]}


def expected(flow, table):
    return flow.log_probability(np.column_stack([table[name] for name in COLUMNS]))


def kinds():
    def pandas(table):
        module = pytest.importorskip("pandas")
        return module.DataFrame(table, index=np.arange(100, 140))

    def polars(table):
        return pytest.importorskip("polars").DataFrame(table)

    def arrow(table):
        return pytest.importorskip("pyarrow").table(table)

    def batch(table):
        return pytest.importorskip("pyarrow").record_batch(table)

    return [dict, pandas, polars, arrow, batch]


@pytest.mark.parametrize("make", kinds(), ids=lambda make: make.__name__)
def test_a_table_of_each_kind_becomes_one_of_the_same(flow, table, make):
    given = make(table)
    found = Scorer(flow, keep=["id", "other"])(given)
    assert type(found) is type(given)
    names = found.schema.names if make.__name__ in ("arrow", "batch") else found if make is dict else found.columns
    assert list(names) == ["id", "other", "log_p"]
    np.testing.assert_array_equal(np.asarray(found["log_p"]), expected(flow, table))
    np.testing.assert_array_equal(np.asarray(found["id"]), table["id"])
    if make.__name__ == "pandas":
        assert list(found.index) == list(range(100, 140))
        assert list(given.columns) == list(table)  # nothing was added to what came


@pytest.mark.parametrize("make", kinds()[1:], ids=lambda make: make.__name__)
def test_batches_have_the_bits_of_the_whole(flow, table, make):
    given = make(table)
    cut = (lambda a, b: given.iloc[a:b]) if make.__name__ == "pandas" else (lambda a, b: given.slice(a, b - a))
    parts = Scorer(flow).batches(cut(a, b) for a, b in ((0, 1), (1, 1), (1, 18), (18, 40)))
    found = np.concatenate([np.asarray(part["log_p"]) for part in parts])
    np.testing.assert_array_equal(found, expected(flow, table))


def test_a_context_is_read_by_its_names(table):
    flow = nvpflow.build(2, 2, (8,), context_size=1)
    scorer = Scorer(flow, ["a", "b"], context_columns=["c"])
    rows = np.column_stack([table["a"], table["b"]]).astype(np.float32)
    given = {name: table[name].astype(np.float32) for name in COLUMNS}
    found = scorer(given)["log_p"]
    np.testing.assert_array_equal(found, flow.log_prob(rows, context=given["c"][:, None]))


def test_missing_values_and_numbers_beyond_the_dtype(flow):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": pandas.array([1, None, 1], "Int64"), "b": [1, 1, 1e300], "c": [True, False, True]})
    found = Scorer(flow)(table)["log_p"].to_numpy()
    assert np.isfinite(found[0])
    assert np.isnan(found[1])
    assert found[2] == -np.inf


def test_arrow_columns_are_those_of_the_flow(flow, table):
    pa = pytest.importorskip("pyarrow")
    scorer = Scorer(flow, keep=["id"])
    found = scorer.arrow_columns(*(pa.array(table[name]) for name in COLUMNS))
    np.testing.assert_array_equal(found.to_numpy(), expected(flow, table))
    with pytest.raises(ValueError, match="columns are 1, expected 3: 'a', 'b', 'c'"):
        scorer.arrow_columns(pa.array([1.0]))


WORKER = """
import pickle, sys
import numpy as np
scorer, table = pickle.load(sys.stdin.buffer)
again = pickle.loads(pickle.dumps(scorer))
assert again.flow is scorer.flow and scorer.flow.num_threads == 1
sys.stdout.buffer.write(pickle.dumps(scorer(table)))
"""


def test_another_process_gives_the_same_bits_by_one_flow(flow, table):
    sent = pickle.dumps((Scorer(flow), table))
    done = subprocess.run([sys.executable, "-c", WORKER], input=sent, capture_output=True, check=True, timeout=120)
    np.testing.assert_array_equal(pickle.loads(done.stdout)["log_p"], expected(flow, table))


def test_weights_come_back_in_any_buffer(flow):
    out_of_band = []
    pickled = pickle.dumps(flow, protocol=5, buffer_callback=out_of_band.append)
    buffers = [(ctypes.c_char * len(piece.raw())).from_buffer_copy(piece) for piece in out_of_band]
    assert buffers
    assert pickle.loads(pickled, buffers=buffers) == flow  # engines have such kinds of their own


def test_a_scorer_keeps_the_weights_that_it_was_given(flow, table):
    changed = copy.copy(flow)
    scorer = Scorer(changed)
    before = scorer(table)["log_p"]
    changed.fit(np.random.default_rng(2).normal([1, 2, 3], [1, 10, 0.1], (500, 3)), epochs=1, progress=False)
    np.testing.assert_array_equal(scorer(table)["log_p"], before)
    assert Scorer(changed).fingerprint != scorer.fingerprint


def test_what_is_wrong_is_named(flow, table):
    plain = nvpflow.build(3)
    with pytest.raises(TypeError, match=r"flow is 'x' .str., expected a nvpflow.Flow"):
        Scorer("x")
    with pytest.raises(ValueError, match="columns is None, expected 3 names: the flow knows none"):
        Scorer(plain)
    with pytest.raises(ValueError, match="columns are 2 names, expected 3: as many as the flow reads"):
        Scorer(plain, ["a", "b"])
    with pytest.raises(ValueError, match="columns: columns 1 and 3 are both called 'a', expected each once"):
        Scorer(plain, ["a", "b", "a"])
    with pytest.raises(TypeError, match=r"columns is 'abc' .str., expected a sequence of strings"):
        Scorer(plain, "abc")
    with pytest.raises(ValueError, match="context_columns are 1 name, expected 0"):
        Scorer(flow, context_columns=["d"])
    with pytest.raises(ValueError, match="name is 'id', a column of keep; expected another name"):
        Scorer(flow, keep=["id"], name="id")
    with pytest.raises(ValueError, match="num_threads is -1"):
        Scorer(flow, num_threads=-1)
    scorer = Scorer(flow)
    with pytest.raises(TypeError, match=r"(?s)table is .*, expected a DataFrame of pandas or Polars, a Table"):
        scorer(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"table has no column 'a', 'c', expected 'a', 'b', 'c' .*; it has 'b'"):
        scorer({"b": np.zeros(2)})
    with pytest.raises(ValueError, match=r"table\['b'\] has shape \(3,\), expected \(2,\)"):
        scorer({"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(2)})
    with pytest.raises(TypeError, match=r"table\['b'\]"):
        scorer({"a": np.zeros(2), "b": ["x", "y"], "c": np.zeros(2)})


@pytest.fixture
def parquet(table, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    pq.write_table(pytest.importorskip("pyarrow").table(table), path, row_group_size=16)
    return path


def test_a_file_is_scored_once(flow, table, parquet, tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(nvpflow.tables, "_FILE_ROWS", 7)
    scorer, target = Scorer(flow, keep=["id"]), tmp_path / "scores.parquet"
    assert score_file(scorer, parquet, target) == (str(target), 40, False)
    found = pq.read_table(target)
    assert found.column_names == ["id", "log_p"]
    np.testing.assert_array_equal(found["log_p"].to_numpy(), expected(flow, table))
    written = target.read_bytes()
    assert score_file(pickle.loads(pickle.dumps(scorer)), parquet, target) == (str(target), 40, True)
    assert target.read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.parquet", "scores.parquet"]


def test_a_file_of_something_else_is_not_overwritten(flow, parquet, tmp_path):
    target = tmp_path / "scores.parquet"
    score_file(Scorer(flow), parquet, target)
    for other, message in (
        (Scorer(flow, keep=["id"]), r"other options: keep \[\] there, \['id'\] here; force=True overwrites it"),
        (Scorer(flow, name="score"), "other options: name 'log_p' there, 'score' here"),
        (Scorer(nvpflow.build(3), COLUMNS), "by another model"),
    ):
        with pytest.raises(FileExistsError, match=rf"scores.parquet exists, made .*{message}"):
            score_file(other, parquet, target)
    os.utime(parquet, (1, 1))
    with pytest.raises(FileExistsError, match="of another source, or its source has changed"):
        score_file(Scorer(flow), parquet, target)
    assert not score_file(Scorer(flow), parquet, target, force=True).skipped
    target.write_text("no Parquet")
    with pytest.raises(FileExistsError, match="and is no whole Parquet file"):
        score_file(Scorer(flow), parquet, target)
    with pytest.raises(ValueError, match=r"rows.parquet would be overwritten by its own scores"):
        score_file(Scorer(flow), parquet, parquet, force=True)


def test_a_fingerprint_is_of_what_decides_the_numbers(flow):
    named = copy.copy(flow)
    named.column_names, named.num_threads = None, 3
    fingerprints = {Scorer(given, COLUMNS).fingerprint for given in (flow, named, pickle.loads(pickle.dumps(flow)))}
    assert fingerprints == {Scorer(flow).fingerprint}
    assert Scorer(flow.astype("float64")).fingerprint not in fingerprints


def test_a_file_that_cannot_be_scored_leaves_nothing_behind(parquet, tmp_path):
    scorer = Scorer(nvpflow.build(2), ["a", "d"])
    with pytest.raises(ValueError, match="table has no column 'd'"):
        score_file(scorer, parquet, tmp_path / "scores.parquet")
    with pytest.raises(FileNotFoundError):
        score_file(scorer, tmp_path / "none.parquet", tmp_path / "scores.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_rows_of_a_file_are_those_of_one_sample(flow, tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(nvpflow.tables, "_FILE_ROWS", 7)
    target = tmp_path / "rows.parquet"
    for rows, start in ((20, 5), (0, 0)):
        assert sample_file(flow, target, rows=rows, start=start, seed=3, force=True) == (str(target), rows, False)
        table = pq.read_table(target)
        assert table.column_names == COLUMNS
        found = np.column_stack([table[name].to_numpy() for name in COLUMNS])
        np.testing.assert_array_equal(found, flow.sample(rows, seed=3, start=start))
        assert found.dtype == np.float32
    assert sample_file(flow, target, rows=0, seed=3).skipped
    with pytest.raises(FileExistsError, match=r"made with other options: seed 3 there, 4 here; force=True"):
        sample_file(flow, target, rows=0, seed=4)
    sample_file(nvpflow.build(2), target, rows=2, dtype="float64", force=True)
    assert pq.read_schema(target).names == ["column_1", "column_2"]
    assert str(pq.read_schema(target).field(0).type) == "double"


def test_what_is_wrong_with_a_sample_is_named(flow, tmp_path):
    target = tmp_path / "rows.parquet"
    with pytest.raises(TypeError, match="flow is 3"):
        sample_file(3, target, rows=1)
    for wrong, message in (
        ({"rows": -1}, "rows is -1"),
        ({"rows": 1, "start": -1}, "start is -1"),
        ({"rows": 2, "start": 2**63 - 1}, "start"),
        ({"rows": 1, "seed": -1}, "seed is -1"),
        ({"rows": 1, "temperature": -1}, "temperature is -1"),
        ({"rows": 1, "context": [1.0]}, "context"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_file(flow, target, **wrong)
    conditional = nvpflow.build(2, context_size=1)
    with pytest.raises(ValueError, match=r"context has shape \(2, 1\), expected \(1,\): one context"):
        sample_file(conditional, target, rows=1, context=np.zeros((2, 1), np.float32))
    assert not target.exists()


MEMORY = """
import sys
import numpy as np, nvpflow, pyarrow as pa, pyarrow.parquet as pq
from nvpflow import cli
from nvpflow.tables import Scorer, sample_file, score_file
what, folder, small, large = sys.argv[1:]
flow = nvpflow.build(4, 1, (4,), column_names=list("abcd"))
flow.save(f"{folder}/model.safetensors")
scorer = Scorer(flow)
def work(rows):
    if what == "score_file":
        score_file(scorer, f"{folder}/{rows}.parquet", f"{folder}/{rows}.scores")
    elif what == "sample_file":
        sample_file(flow, f"{folder}/{rows}.drawn", rows=int(rows))
    else:
        cli.main(["score", f"{folder}/model.safetensors", f"{folder}/{rows}.parquet", "-o", f"{folder}/scores/"])
def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
work(small)
before, held = peak(), pa.default_memory_pool().max_memory()
work(large)
print(pa.default_memory_pool().max_memory() - held, peak() - before, file=sys.stderr)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "what", ["score_file", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("sample_file", "nvpflow score"))]
)
def test_memory_does_not_grow_with_the_file(run_python, tmp_path, what):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    small, large = 1_000_000, 6_000_000  # 16 and 96 MB
    for rows in (small, large) if what != "sample_file" else ():
        columns = np.random.default_rng(0).normal(size=(4, rows)).astype(np.float32)
        pq.write_table(
            pa.table(dict(zip("abcd", columns, strict=True))), tmp_path / f"{rows}.parquet", row_group_size=1 << 17
        )
    done = run_python(MEMORY, what, tmp_path, small, large, check=False)
    assert done.returncode == 0, done.stderr
    held, grown = map(int, done.stderr.split())
    assert held < 2**20
    assert grown < 40e6  # half of what the file has more: the allocator keeps some for later


def test_no_rows_give_no_scores(flow):
    found = Scorer(flow)({name: np.zeros(0) for name in COLUMNS})
    assert found["log_p"].shape == (0,)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_and_of_pickles_score_alike(flow, table, protocol):
    scorer = Scorer(flow)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(scorer, protocol)), protocol))
    tables._flows.clear()
    np.testing.assert_array_equal(again(table)["log_p"], expected(flow, table))


def test_weights_travel_out_of_band():
    large = nvpflow.build(64, 4, (256, 256))
    scorer, rows = Scorer(large, [str(i) for i in range(64)]), np.random.default_rng(0).normal(size=(9, 64))
    given = {str(i): rows[:, i].astype(np.float32) for i in range(64)}
    size = large.parameters_flat().nbytes
    for sent, most in ((large, 2_000), (scorer, 8_000)):
        buffers = []
        inside = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
        assert len(inside) < most
        assert sum(buffer.raw().nbytes for buffer in buffers) == size
        once = pickle.loads(inside, buffers=[bytes(buffer) for buffer in buffers])
        more = []
        inside = pickle.dumps(once, protocol=5, buffer_callback=more.append)
        assert len(inside) < most  # sent on, it is as small
        tables._flows.clear()
        last = pickle.loads(inside, buffers=more)
        expected_bits = large.log_prob(rows.astype(np.float32))
        found = last(given)["log_p"] if sent is scorer else last.log_prob(rows.astype(np.float32))
        np.testing.assert_array_equal(found, expected_bits)
    # A scorer's buffers are its own memory: no copy of them was made to send them.
    first, second = [], []
    for buffers in (first, second):
        pickle.dumps(scorer, protocol=5, buffer_callback=buffers.append)
    assert all(np.shares_memory(np.asarray(a.raw()), np.asarray(b.raw())) for a, b in zip(first, second, strict=True))
