"""Rows gathered from Arrow's C stream interface: the numbers that NumPy makes of the columns, and every release."""

from __future__ import annotations

import ctypes
import datetime
import decimal
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import nvpflow
import pytest
from nvpflow import _arrow_rows, _core, _frames
from nvpflow.tables import Scorer
from oracle import assert_same_bits

pa = pytest.importorskip("pyarrow")

NUMBERS = {
    "int8": [-128, 127, 0, 5, -7],
    "uint8": [0, 255, 1, 2, 3],
    "int16": [-(2**15), 2**15 - 1, 0, 1, 2],
    "uint16": [0, 2**16 - 1, 1, 2, 3],
    "int32": [-(2**31), 2**31 - 1, 16777217, 1, 2],
    "uint32": [0, 2**32 - 1, 16777217, 1, 2],
    # Rounded to float64 and then to float32 it is another number than rounded at once.
    "int64": [-(2**63), 2**63 - 1, 2**53 + 1, (1 << 60) + (1 << 36) + 1, 2],
    "uint64": [0, 2**64 - 1, 2**53 + 1, (1 << 60) + (1 << 36) + 1, 2],
    "float16": np.array([0, 65504, 2**-24, -np.inf, 0.1], np.float16),
    "float32": np.array([0, 3e38, 1e-45, np.nan, 0.1], np.float32),
    "float64": [0, 1e308, 5e-324, np.inf, 0.1],
    "bool": [True, False, True, True, False],
}


def column_of(kind: str) -> Any:
    return pa.array(NUMBERS[kind], getattr(pa, {"bool": "bool_"}.get(kind, kind))())


def by_numpy(table: Any, dtype: str) -> np.ndarray:
    """What column by column, stacked and converted, comes to."""
    with np.errstate(over="ignore"):
        return np.asarray(_frames.read("table", table, None)[0], dtype=dtype, order="C")


def gathered(table: Any, dtype: str) -> np.ndarray:
    rows = _arrow_rows.read(table)
    assert rows is not None
    return rows.converted(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kinds", [(kind,) for kind in NUMBERS] + list(itertools.combinations(NUMBERS, 2)), ids=str)
def test_numbers_are_those_of_numpy(kinds: tuple[str, ...], dtype: str) -> None:
    table = pa.table({kind: column_of(kind) for kind in kinds})
    expected = by_numpy(table, dtype)
    assert_same_bits(gathered(table, dtype), expected)
    polars = pytest.importorskip("polars")
    if "float16" not in kinds:
        assert_same_bits(gathered(polars.from_arrow(table), dtype), expected)
    for batch in table.to_batches():
        assert_same_bits(gathered(batch, dtype), expected)


@pytest.mark.parametrize("kind", NUMBERS)
def test_nulls_are_nan(kind: str) -> None:
    values = [None if i in (1, 8, 9) else value for i, value in enumerate(column_of(kind).to_pylist() * 4)]
    table = pa.table({"a": pa.array(values, column_of(kind).type), "b": pa.array(range(20), pa.float32())})
    found = gathered(table, "float64")
    assert np.isnan(found[[1, 8, 9], 0]).all()
    np.testing.assert_array_equal(found, by_numpy(table, "float64"))  # NaN of any bits
    assert_same_bits(gathered(table.slice(7, 11), "float64"), found[7:18])
    assert_same_bits(gathered(table.slice(9, 1), "float64"), found[9:10])


def test_chunks_and_slices_are_put_together() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10_007, 5)).astype(np.float32)
    bits = rng.random(10_007) < 0.5
    whole = pa.table({str(i): x[:, i].copy() for i in range(5)} | {"t": bits})
    expected = np.column_stack([x, bits])
    cuts = [0, 1, 1, 8, 1000, 1001, 5000, 10_007]
    parts = pa.concat_tables([whole.slice(a, b - a) for a, b in itertools.pairwise(cuts)])
    # Columns whose chunks end at different rows.
    uneven = pa.table(
        {
            name: pa.chunked_array([whole.column(name).slice(0, at).chunk(0), whole.column(name).slice(at).chunk(0)])
            for name, at in zip(whole.column_names, (1, 17, 4096, 9999, 10_000, 33), strict=True)
        }
    )
    for table in (whole, parts, uneven):
        for first, count in ((0, 10_007), (3, 9_000), (999, 3), (10_007, 0)):
            assert_same_bits(gathered(table.slice(first, count), "float32"), expected[first : first + count])


def test_many_columns_and_none() -> None:
    x = np.random.default_rng(0).normal(size=(300, 784))
    table = pa.table({str(i): x[:, i].copy() for i in range(784)})
    assert_same_bits(gathered(table, "float64"), x)
    assert gathered(table.slice(0, 0), "float32").shape == (0, 784)
    assert _arrow_rows.read(table.select([])) is None


OTHER = {
    "text": pa.array(["1", "2"]),
    "categories": pa.array(["1", "2"]).dictionary_encode(),
    "numbered categories": pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([5, 6])),
    "dates": pa.array([datetime.date(2020, 1, 1)] * 2),
    "times": pa.array([datetime.datetime(2020, 1, 1)] * 2),
    "decimals": pa.array([decimal.Decimal("1.5")] * 2),
    "lists": pa.array([[1.0], [2.0]]),
    "nulls": pa.nulls(2),
    "structs": pa.array([{"a": 1}, {"a": 2}]),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_columns_are_refused_by_name_as_ever(kind: str) -> None:
    table = pa.table({"a": pa.array([1.0, 2.0]), "b": OTHER[kind]})
    assert _arrow_rows.read(table) is None
    scorer = Scorer(nvpflow.build(2), ["a", "b"])
    for given in (table, table.to_batches()[0]):
        with pytest.raises(TypeError, match=r"table: column 'b' is .*: (encode it as numbers|convert it to seconds)"):
            scorer(given)


def test_a_type_that_is_more_than_its_numbers_is_no_number() -> None:
    class Kelvin(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.float32(), "nvpflow.kelvin")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

    values = pa.ExtensionArray.from_storage(Kelvin(), pa.array([1, 2], pa.float32()))
    assert _core._arrow_columns(pa.table({"a": values})).formats == ("",)
    noted = pa.schema([pa.field("a", pa.float32(), metadata={"unit": "K", "": "x"})])
    table = pa.table([pa.array([1, 2], pa.float32())], schema=noted)
    assert _core._arrow_columns(table).formats == ("f",)


@pytest.mark.parametrize("standardize", [True, False])
def test_what_overflows_has_the_density_0(standardize: bool) -> None:
    flow = nvpflow.build(2, 2, (8,), standardize=standardize)
    table = pa.table({"a": [1.0, 1e300, None, float("inf"), 2.0], "b": [0.0, 0.0, 0.0, 0.0, -1e300]})
    expected = Scorer(flow, ["a", "b"])(table.to_pandas())["log_p"].to_numpy()  # by way of NumPy
    found = Scorer(flow, ["a", "b"])(table)["log_p"].to_numpy()
    assert_same_bits(found, expected)
    assert np.isfinite(found[0])
    assert np.isneginf(found[[1, 4]]).all()
    assert np.isnan(found[[2, 3]]).all()


def test_bits_do_not_go_by_where_nulls_are() -> None:
    flow = nvpflow.build(2, 2, (8,))
    rng = np.random.default_rng(0)
    flow.initialize_from(rng.normal(50, 9, size=(99, 2)))
    a = [None if i == 40 else i for i in range(80)]
    table = pa.table({"a": pa.array(a, pa.int16()), "b": pa.array(rng.normal(size=80), pa.float32())})
    scorer = Scorer(flow, ["a", "b"])
    parts = [scorer(table.slice(first, 20))["log_p"].to_numpy() for first in range(0, 80, 20)]
    assert_same_bits(np.concatenate(parts), scorer(table)["log_p"].to_numpy())


# ----------------------------------------------------------------------------------- producers of one's own


class Schema(ctypes.Structure):
    pass


class Batch(ctypes.Structure):
    pass


class Stream(ctypes.Structure):
    pass


Release = {kind: ctypes.CFUNCTYPE(None, ctypes.POINTER(kind)) for kind in (Schema, Batch, Stream)}
Fill = {kind: ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Stream), ctypes.POINTER(kind)) for kind in (Schema, Batch)}
Say = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Stream))
Schema._fields_ = [
    ("format", ctypes.c_char_p),
    ("name", ctypes.c_char_p),
    ("metadata", ctypes.c_char_p),
    ("flags", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("children", ctypes.POINTER(ctypes.POINTER(Schema))),
    ("dictionary", ctypes.POINTER(Schema)),
    ("release", Release[Schema]),
    ("private_data", ctypes.c_void_p),
]
Batch._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(Batch))),
    ("dictionary", ctypes.POINTER(Batch)),
    ("release", Release[Batch]),
    ("private_data", ctypes.c_void_p),
]
Stream._fields_ = [
    ("get_schema", Fill[Schema]),
    ("get_next", Fill[Batch]),
    ("get_last_error", Say),
    ("release", Release[Stream]),
    ("private_data", ctypes.c_void_p),
]
ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Producer:
    """One column of float32, in batches; counts what it hands out and what comes back."""

    def __init__(self, batches: int = 2, change: Callable[[Batch], None] | None = None, **options: Any) -> None:
        self.given = {"schema": 0, "batch": 0, "stream": 1}
        self.released = {"schema": 0, "batch": 0, "stream": 0}
        self.said = ctypes.create_string_buffer(b"the disk is gone")
        self.left, self.change, self.options = batches, change, options
        self.values = (ctypes.c_float * 6)(*range(6))
        self.buffers = (ctypes.c_void_p * 2)(None, ctypes.addressof(self.values))
        none = (ctypes.c_void_p * 1)(None)
        self.column = Batch(length=3, offset=options.get("offset", 0), n_buffers=2, buffers=self.buffers)
        self.columns = (ctypes.POINTER(Batch) * 1)(ctypes.pointer(self.column))
        self.field = Schema(format=b"f", name=b"a")
        self.fields = (ctypes.POINTER(Schema) * 1)(ctypes.pointer(self.field))
        self.none = none
        self.calls = {
            "schema": Release[Schema](self._release("schema")),
            "batch": Release[Batch](self._release("batch")),
            "stream": Release[Stream](self._release("stream")),
        }
        self.stream = Stream(
            get_schema=Fill[Schema](self._schema),
            get_next=Fill[Batch](self._next),
            get_last_error=Say(lambda _: ctypes.addressof(self.said) if options.get("says", True) else None),
            release=self.calls["stream"],
        )

    def _release(self, what: str) -> Callable[[Any], None]:
        def release(held: Any) -> None:
            self.released[what] += 1
            ctypes.memset(ctypes.addressof(held.contents) + type(held.contents).release.offset, 0, 8)

        return release

    def _schema(self, _: Any, out: Any) -> int:
        if self.options.get("fail") == "schema":
            return 5
        self.given["schema"] += 1
        out[0] = Schema(
            format=self.options.get("format", b"+s"), n_children=1, children=self.fields, release=self.calls["schema"]
        )
        return 0

    def _next(self, _: Any, out: Any) -> int:
        if self.left == 0:
            if self.options.get("fail") == "next":
                return 5
            ctypes.memset(ctypes.addressof(out.contents), 0, ctypes.sizeof(Batch))
            return 0
        self.left -= 1
        self.given["batch"] += 1
        batch = Batch(
            length=3, n_buffers=1, buffers=self.none, n_children=1, children=self.columns, release=self.calls["batch"]
        )
        if self.change is not None and self.left == 0:
            self.change(batch)
        out[0] = batch
        return 0

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return ctypes.pythonapi.PyCapsule_New(ctypes.addressof(self.stream), b"arrow_array_stream", None)


def test_all_is_released_once() -> None:
    producer = Producer(batches=3)
    columns = _core._arrow_columns(producer)
    assert producer.released == {"schema": 1, "batch": 0, "stream": 1}
    assert columns.rows == 9
    rows, overflowed = columns.gather("float64", False)
    assert rows.ravel().tolist() == [0, 1, 2] * 3
    assert not overflowed
    del columns
    assert producer.released == producer.given == {"schema": 1, "batch": 3, "stream": 1}


def test_offsets_add_up() -> None:
    def shorter(batch: Batch) -> None:
        batch.offset, batch.length = 1, 2

    rows, _ = _core._arrow_columns(Producer(1, shorter, offset=2)).gather("float32", False)
    assert rows.ravel().tolist() == [3, 4]


def change_of(**fields: Any) -> Callable[[Batch], None]:
    def change(batch: Batch) -> None:
        for name, value in fields.items():
            setattr(batch, name, value)

    return change


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fail": "schema"}, "table's Arrow stream failed: the disk is gone"),
        ({"fail": "next"}, "table's Arrow stream failed: the disk is gone"),
        ({"fail": "next", "says": False}, "table's Arrow stream failed: Input/output error"),
        ({"format": b"f"}, "table's Arrow stream is of f, expected record batches"),
        ({"change": change_of(n_children=0)}, "gave a record batch of an impossible form"),
        ({"change": change_of(length=-1)}, "gave a record batch of an impossible form"),
        ({"change": change_of(length=4)}, "gave a record batch of an impossible form"),
        ({"change": change_of(offset=1)}, "gave a record batch of an impossible form"),
        ({"change": change_of(offset=-1)}, "gave a record batch of an impossible form"),
    ],
)
def test_a_stream_that_fails_is_released_all_the_same(options: dict[str, Any], message: str) -> None:
    producer = Producer(**options)
    with pytest.raises(ValueError, match=message):
        _core._arrow_columns(producer)
    assert producer.released == producer.given


def test_columns_without_values_are_refused() -> None:
    producer = Producer()
    producer.buffers[1] = None
    with pytest.raises(ValueError, match="impossible form"):
        _core._arrow_columns(producer)
    assert producer.released == producer.given


def test_what_is_no_stream_is_named() -> None:
    class Odd:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return 3

    with pytest.raises(TypeError, match=r"table\.__arrow_c_stream__\(\) gave no capsule of an Arrow stream"):
        _core._arrow_columns(Odd())
    with pytest.raises(TypeError, match="table is int, expected an object with __arrow_c_stream__"):
        _core._arrow_columns(3)
    producer = Producer()
    _core._arrow_columns(producer)
    with pytest.raises(ValueError, match="Arrow stream that was used before, expected a new one"):
        _core._arrow_columns(producer)
    columns = _core._arrow_columns(pa.table({"a": ["x"]}))
    with pytest.raises(TypeError, match="column 0 holds no plain numbers"):
        columns.gather("float32", False)


SCORES = """
import os, sys
import nvpflow
from nvpflow.tables import Scorer, score_file
os.chdir(sys.argv[1])
score_file(Scorer(nvpflow.build(2), ["a", "b"], keep=["id"]), "rows.parquet", "scores.parquet")
assert "pyarrow" in sys.modules and "pandas" not in sys.modules
"""


def test_scoring_a_file_imports_no_pandas(run_python, tmp_path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": [1, 2], "a": [0.5, 1.5], "b": [1, None]}), tmp_path / "rows.parquet")
    run_python(SCORES, tmp_path)
    assert pq.read_table(tmp_path / "scores.parquet").column_names == ["id", "log_p"]
