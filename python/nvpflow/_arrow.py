"""CSV, Parquet and Arrow IPC for `nvpflow.data_io`, by pyarrow.

A CSV is parsed in chunks that end where a record does, each whole in memory: no reader goes on in the background when a
command ends early, and a chunk that holds something wrong can be looked into again.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from nvpflow import _arrow_rows, _checks
from nvpflow._source import TRUTHS, Array, DataError, Piece, Problems, Stream, numbered, rows_per_block
from nvpflow._text import counted

CHUNK = 1 << 22
LONGEST_RECORD = 1 << 26
PARALLEL = 1 << 20  # bytes that one thread parses
SNIFFED = 1 << 16
MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "None", "<NA>", "NaN", "nan", "-nan", "-NaN")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|", "space": " "}
INDEX_NAMES = ("", "Unnamed: 0", "__index_level_0__")

_NO_UTF_8 = "not UTF-8 text; convert it (iconv -f LATIN1 -t UTF-8)"
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?$|\d{1,2}:\d{2}(:\d{2})?")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?$")


@contextmanager
def _reading(name: str, kind: str) -> Iterator[None]:
    """Turn the errors of pyarrow and of the decompressors into ValueError."""
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, ValueError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise DataError(f"{name}: not a readable {kind}: {error}") from error


def zstd(stream: Stream) -> Any:
    """Return the decompressed stream."""
    return pa.CompressedInputStream(pa.PythonFile(io.BufferedReader(stream), mode="r"), "zstd")


def table_of(block: Array, names: Sequence[str], columns: Sequence[int]) -> Any:
    """Return columns of an array as a table of Arrow."""
    return pa.table([_arrow_rows.arrow_array(block[:, i]) for i in columns], names=list(names))


def is_number(text: str) -> bool:
    """Tell whether a field of a CSV is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


# ------------------------------------------------------------------------------------------------------------- csv


class CsvSource:
    """Text in columns: any delimiter, quotes, with a header or without."""

    rows = None
    unit = "line"

    def __init__(self, name: str, stream: Stream, delimiter: str | None) -> None:
        self.name = name
        self._stream = stream
        self._kinds: dict[int, str] = {}
        with _reading(name, "CSV"):
            head = stream.peek(SNIFFED)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{name}: UTF-16 text, expected UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
            if head.startswith(b"\xef\xbb\xbf"):
                stream.read(3)
                head = stream.peek(SNIFFED)
            self._delimiter = self._sniff(head, delimiter)
            records = list(_records(_whole_records(head), self._delimiter, 21))
        if not records:
            raise DataError(f"{name}: empty")
        first, second = records[0][1], records[1][1] if len(records) > 1 else []
        self._first_line = 1  # of the numbers
        self._shape_line = records[0][0]
        self.names = [field.strip() for field in first] if _is_header(first, second) else None
        self.notes = [] if self.names is None else _doubts(self.names, self._shape_line)
        self.width = len(first)
        self._sample = [record for _, record in records[self.names is not None :]]
        if self.names is not None:
            self._first_line = self._skip_header(head, records[0][0])

    def _sniff(self, head: bytes, given: str | None) -> str:
        if given is not None:
            mark = DELIMITERS.get(given, given)
            if len(mark.encode()) != 1 or mark in '"\r\n':
                raise DataError(f"--delimiter is {given!r}, expected one character or one of {', '.join(DELIMITERS)}")
            return mark
        best, most = ",", (False, 1)
        for mark in ",;\t|":
            widths = [len(record) for _, record in _records(_whole_records(head), mark, 20)]
            if widths and widths[0] > 1 and (len(set(widths)) == 1, widths[0]) > most:
                best, most = mark, (len(set(widths)) == 1, widths[0])
        if most == (False, 1):
            lines = [record for _, record in _records(_whole_records(head), " ", 20)]
            if lines and len(lines[0]) > 1 and all(is_number(field) for line in lines for field in line):
                return " "
        return best

    def _skip_header(self, head: bytes, line: int) -> int:
        """Read over the header, and return the number of the line behind it."""
        text = io.StringIO(_text(head), newline="")
        reader = csv.reader(text, delimiter=self._delimiter)
        for record in reader:
            if record and any(field.strip() for field in record):
                break
        raw = io.BytesIO(head)
        consumed = sum(len(part) for part in _raw_lines(raw, reader.line_num))
        try:
            self._stream.read(consumed).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}: {_NO_UTF_8}") from error
        return reader.line_num + 1

    def mapped(self) -> None:
        """Return None: text has to be read."""

    def index_column(self) -> int | None:
        """Return the first column if it has one of pandas' names for an index and holds integers."""
        if self.names is None or self.names[0] not in INDEX_NAMES:
            return None
        return 0 if all(record and record[0].strip().isdigit() for record in self._sample) else None

    def pieces(self, used: Sequence[int], passed: Sequence[int], typed: bool, problems: Problems) -> Iterator[Piece]:
        """Yield the table chunk by chunk."""
        line = self._first_line
        wanted = sorted({*used, *passed})
        with _reading(self.name, "CSV"):
            for chunk in self._chunks():
                if chunk.strip():
                    labels = _Lines(chunk, line, self._delimiter, self.width)
                    table = self._parsed(chunk, wanted, nulls=not passed, lines=labels, problems=problems)
                    yield self._piece(table, used, passed, typed, labels, problems)
                line += chunk.count(b"\n") or chunk.count(b"\r")

    def _piece(
        self,
        table: Any,
        used: Sequence[int],
        passed: Sequence[int],
        typed: bool,
        lines: _Lines,
        problems: Problems,
    ) -> Piece:
        rows = np.empty((len(table), len(used)))
        for j, column in enumerate(used):
            rows[:, j] = self._numbers(table.column(str(column)), column, lines, problems)
        handed_on = None
        if passed:
            numbers = {column: j for j, column in enumerate(used)} if typed else {}
            columns = [pa.array(rows[:, numbers[i]]) if i in numbers else table.column(str(i)) for i in passed]
            names = [f"column_{i + 1}" if self.names is None else self.names[i] for i in passed]
            handed_on = pa.table(columns, names=names)
        return Piece(rows, handed_on, lines.of)

    def _chunks(self) -> Iterator[bytes]:
        rest = b""
        while data := self._stream.read(CHUNK):
            rest += data
            if cut := _record_end(rest, last_resort=len(rest) > LONGEST_RECORD):
                yield rest[:cut]
                rest = rest[cut:]
            elif len(rest) > LONGEST_RECORD:
                raise DataError(f"{self.name}: a line of more than {LONGEST_RECORD >> 20} MiB, expected a table")
        if rest:
            yield rest

    def _parsed(self, chunk: bytes, wanted: Sequence[int], *, nulls: bool, lines: _Lines, problems: Problems) -> Any:
        """Return the columns of a chunk as text; records of another width are left out and noted."""
        ragged = False

        def on_ragged(record: Any) -> str:
            nonlocal ragged
            ragged = ragged or bool(record.text.strip())  # a line of blanks is none
            return "skip"

        parse = pyarrow.csv.ParseOptions(
            delimiter=self._delimiter, newlines_in_values=b'"' in chunk, invalid_row_handler=on_ragged
        )
        convert = pyarrow.csv.ConvertOptions(
            column_types={str(i): pa.string() for i in wanted},
            include_columns=[str(i) for i in wanted],
            strings_can_be_null=nulls,
            null_values=list(MISSING),
        )
        names = [str(i) for i in range(self.width)]
        for block_size in (PARALLEL, len(chunk) + 1):
            read = pyarrow.csv.ReadOptions(column_names=names, block_size=block_size)
            try:
                table = pyarrow.csv.read_csv(pa.BufferReader(chunk), read, parse, convert)
                break
            except pa.ArrowInvalid as error:
                if "UTF8" in str(error):
                    raise DataError(f"{self.name}: {_NO_UTF_8}") from error
                if block_size != PARALLEL or "straddl" not in str(error):
                    raise
        if ragged:
            self._note_ragged(lines, problems)
        return table

    def _note_ragged(self, lines: _Lines, problems: Problems) -> None:
        found = lines.ragged()
        if found and not problems.ragged.count:
            expected = f"expected {self.width} as in line {self._shape_line}"
            problems.ragged.example = f"line {found[0][0]}: {counted(found[0][1], 'column')}, {expected}"
        problems.ragged.add(len(found), [line for line, _ in found])

    def _numbers(self, text: Any, column: int, lines: _Lines, problems: Problems) -> Array:
        """Return a column as float64, NaN where it is empty; note the fields that are not numbers."""
        try:
            numbers = pc.cast(text, pa.float64())
            kind = "numbers"
        except pa.ArrowInvalid:
            text = pc.ascii_trim_whitespace(text)
            text = pc.if_else(pc.is_in(text, pa.array(MISSING)), pa.scalar(None, pa.string()), text)
            numbers, kind = self._trimmed(text, column, lines, problems)
        if numbers.null_count < len(numbers) and self._kinds.setdefault(column, kind) != kind:
            self._note_text(column, text, pc.is_valid(text), lines, problems)
        values: Array = numbers.to_numpy()
        return values

    def _trimmed(self, text: Any, column: int, lines: _Lines, problems: Problems) -> tuple[Any, str]:
        try:
            return pc.cast(text, pa.float64()), "numbers"
        except pa.ArrowInvalid:
            pass
        lower = pc.ascii_lower(text)
        if pc.all(pc.is_in(lower.drop_null(), pa.array(list(TRUTHS)))).as_py():
            return pc.cast(pc.cast(lower, pa.bool_()), pa.float64()), "true and false"
        distinct = pc.unique(text.drop_null())
        wrong = [value for value in distinct.to_pylist() if not is_number(value)]
        bad = pc.fill_null(pc.is_in(text, pa.array(wrong, pa.string())), False)
        if wrong:
            self._note_text(column, text, bad, lines, problems)
            return pa.chunked_array([pa.array(np.zeros(len(text)))]), self._kinds.get(column, "numbers")
        # Digits and blanks outside of ASCII, which Arrow does not know.
        numbers = [None if value is None else float(value) for value in text.to_pylist()]
        return pa.chunked_array([pa.array(numbers, pa.float64())]), "numbers"

    def _note_text(self, column: int, text: Any, bad: Any, lines: _Lines, problems: Problems) -> None:
        where = np.flatnonzero(bad.to_numpy())
        example = text[int(where[0])].as_py()
        known = problems.wrong.get(column)
        need = max(0, 3 - len(known.first)) if known else 3
        first = lines.of(where[:need].tolist()) if need else []
        problems.add_wrong(column, _kind_of_text(example), len(where), first, example)


def _kind_of_text(example: str) -> str:
    if _DATE.match(example):
        return "dates"
    if _DECIMAL_COMMA.match(example):
        return "numbers with a decimal comma"
    return "true and false beside numbers" if example.lower() in TRUTHS else "text"


def _is_header(first: Sequence[str], second: Sequence[str]) -> bool:
    """Tell whether the first record of a CSV holds the columns' names.

    It does in three cases:

    * none of its fields is a number, and not all are empty;
    * it holds 0, 1, 2, ... behind an empty field, as pandas writes columns without names behind an index;
    * some field is neither a number nor missing, and the next record has a number there.
    """
    fields = [field.strip() for field in first]
    if not any(fields):
        return False
    if not any(is_number(field) for field in fields):
        return True
    if len(fields) > 1 and fields == ["", *map(str, range(len(fields) - 1))]:
        return True
    text = [bool(field) and field not in MISSING and not is_number(field) for field in fields]
    return any(here and is_number(there) for here, there in zip(text, second, strict=False))


def _doubts(names: Sequence[str], line: int) -> list[str]:
    """Say that a line is taken for names where it could be a row: some are numbers, and not those of pandas."""
    numbers = [name for name in names if is_number(name)]
    if not numbers or names == ["", *map(str, range(len(names) - 1))]:
        return []
    text = next(name for name in names if name and not is_number(name))
    here, number = (_checks.shortened(repr(field)) for field in (text, numbers[0]))
    return [f"line {line} is taken for the names of the columns, as {here} is not a number; but {number} is one"]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _raw_lines(raw: io.BytesIO, count: int) -> Iterator[bytes]:
    """Yield the first `count` lines with their line ends."""
    for part in re.finditer(rb"[^\r\n]*(?:\r\n|\n|\r|$)", raw.getvalue()):
        if count == 0:
            return
        count -= 1
        yield part[0]


def _whole_records(head: bytes) -> bytes:
    """Return the beginning of a file without the record that it cuts off."""
    return head if len(head) < SNIFFED else head[: _record_end(head) or len(head)]


def _records(data: bytes, delimiter: str, most: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the first records that are not empty, and the line in which each begins."""
    reader = csv.reader(io.StringIO(_text(data), newline=""), delimiter=delimiter)
    line = 1
    try:
        for record in reader:
            if len(record) > 1 or (record and record[0].strip()):
                yield line, record
                most -= 1
                if most == 0:
                    return
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from error


def _record_end(data: bytes, *, last_resort: bool = False) -> int:
    """Return where the last whole record ends: behind a line's end that is not between quotes. 0: nowhere."""
    mark = b"\n" if b"\n" in data else b"\r"
    last = cut = data.rfind(mark) + 1
    if b'"' not in data:
        return cut
    odd = data.count(b'"', 0, cut) % 2
    for _ in range(1000):
        if not odd or not cut:
            break
        before = data.rfind(mark, 0, data.rfind(b'"', 0, cut)) + 1
        odd = (odd + data.count(b'"', before, cut)) % 2
        cut = before
    return last if odd or (last_resort and not cut) else cut


class _Lines:
    """Tells the lines of a chunk's rows: counts, or reads the chunk again where blank lines or quotes are in it."""

    def __init__(self, chunk: bytes, first: int, delimiter: str, width: int) -> None:
        self._chunk, self._first, self._delimiter, self._width = chunk, first, delimiter, width
        self._read: tuple[list[int], list[tuple[int, int]]] | None = None

    def of(self, rows: Sequence[int]) -> list[int]:
        """Return the lines, counted from 1 in the file, of rows counted from 0 in the chunk."""
        if self._read is None and not re.search(rb'"|^[ \t]*\r?$', self._chunk.rstrip(), re.MULTILINE):
            whole = self._chunk.count(b"\n") == 0
            if not whole:
                return [self._first + row for row in rows]
        good = self._lines()[0]
        return [good[row] if row < len(good) else self._first + row for row in rows]

    def ragged(self) -> list[tuple[int, int]]:
        """Return the lines of records of another width, and their widths."""
        return self._lines()[1]

    def _lines(self) -> tuple[list[int], list[tuple[int, int]]]:
        if self._read is None:
            good: list[int] = []
            ragged: list[tuple[int, int]] = []
            for line, record in _records(self._chunk, self._delimiter, -1):
                if len(record) == self._width:
                    good.append(line + self._first - 1)
                else:
                    ragged.append((line + self._first - 1, len(record)))
            self._read = good, ragged
        return self._read


# --------------------------------------------------------------------------------------------------- parquet and ipc


class _TypedSource:
    """A file whose columns have types."""

    unit = "row"
    notes: Sequence[str] = ()

    def __init__(self, name: str, schema: Any, rows: int | None) -> None:
        self.name = name
        self.rows = rows
        self._schema = schema
        self._fields = list(schema)
        self._original = [field.name for field in self._fields]
        self.names: list[str] | None = [name.strip() for name in self._original]
        self.width = len(self._fields)

    def mapped(self) -> None:
        """Return None: columns lie one behind the other."""

    def index_column(self) -> int | None:
        """Return the column that has one of pandas' names for an index and holds integers."""
        for i, field in enumerate(self._fields):
            if (field.name == "__index_level_0__" or (i == 0 and field.name in INDEX_NAMES)) and pa.types.is_integer(
                field.type
            ):
                return i
        return None

    def _batches(self, wanted: Sequence[int]) -> Iterator[Any]:
        raise NotImplementedError

    def pieces(self, used: Sequence[int], passed: Sequence[int], typed: bool, problems: Problems) -> Iterator[Piece]:
        """Yield the table; columns of no numbers are noted once, by their type."""
        wanted = sorted({*used, *passed})
        place = {column: k for k, column in enumerate(wanted)}
        for column in used:
            if kind := _kind_of_type(self._fields[column].type):
                problems.add_wrong(column, kind, 0, [], str(self._fields[column].type))
        numbers = [column for column in used if column not in problems.wrong]
        narrow = all(pa.types.is_float32(self._fields[i].type) for i in numbers)
        first = 0
        with _reading(self.name, "table"):
            for batch in self._batches(wanted):
                rows = _rows_of(batch, [place[column] if column in numbers else -1 for column in used], narrow)
                names = [self.names[i] for i in passed] if self.names else []
                handed_on = pa.table([batch.column(place[i]) for i in passed], names=names) if passed else None
                yield Piece(rows, handed_on, partial(numbered, first))
                first += len(batch)


def _rows_of(batch: Any, columns: Sequence[int], narrow: bool) -> Array:
    """Return rows of a batch's columns; one below 0 is of zeros."""
    dtype = "float32" if narrow else "float64"
    plain = None if -1 in columns else _arrow_rows.read(batch.select(list(columns)))
    if plain is not None:
        return plain.converted(dtype)
    rows = np.zeros((len(batch), len(columns)), dtype)
    for j, column in enumerate(columns):
        if column >= 0:
            rows[:, j] = _numbers(batch.column(column), narrow)
    return rows


def _numbers(values: Any, narrow: bool) -> Array:
    kind = pa.float32() if narrow else pa.float64()
    if not values.type.equals(kind):
        values = pc.cast(values, kind, safe=False)
    found: Array = values.to_numpy(zero_copy_only=False)
    return found


def _kind_of_type(kind: Any) -> str:
    """Return what a column holds that is not numbers, or nothing."""
    is_a = pa.types
    if is_a.is_floating(kind) or is_a.is_integer(kind) or is_a.is_boolean(kind) or is_a.is_decimal(kind):
        return ""
    if is_a.is_null(kind):
        return ""
    if is_a.is_temporal(kind):
        return "durations" if is_a.is_duration(kind) else "dates"
    if is_a.is_dictionary(kind):
        return "categories"
    return "text" if is_a.is_string(kind) or is_a.is_large_string(kind) else "other values"


class ParquetSource(_TypedSource):
    """A Parquet file."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        with _reading(name, ".parquet file"):
            self._file = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        super().__init__(name, self._file.schema_arrow, self._file.metadata.num_rows)

    def _batches(self, wanted: Sequence[int]) -> Iterator[Any]:
        names = self._original
        # Parquet's reader takes every column of a name, and for it "a" is also what "a.b" begins with.
        every = len(wanted) == self.width or len(set(names)) < self.width or any("." in name for name in names)
        columns = None if every else [names[i] for i in wanted]
        for batch in self._file.iter_batches(batch_size=rows_per_block(len(wanted)), columns=columns):
            yield batch.select(list(wanted)) if every else batch


class IpcSource(_TypedSource):
    """An Arrow IPC file (Feather), or a stream of the same."""

    def __init__(self, name: str, file: BinaryIO, *, stream: bool = False) -> None:
        with _reading(name, "Arrow file"):
            if stream:
                self._reader = pa.ipc.open_stream(pa.PythonFile(io.BufferedReader(file), mode="r"))  # type: ignore[type-var]
            else:
                self._reader = pa.ipc.open_file(file)
        self._stream = stream
        super().__init__(name, self._reader.schema, None)

    def _batches(self, wanted: Sequence[int]) -> Iterator[Any]:
        batches = (
            iter(self._reader) if self._stream else map(self._reader.get_batch, range(self._reader.num_record_batches))
        )
        step = rows_per_block(len(wanted))
        for batch in batches:
            chosen = batch.select(list(wanted))
            for first in range(0, len(chosen), step):
                yield chosen.slice(first, step)


# --------------------------------------------------------------------------------------------------------- writing


def csv_bytes(table: Any) -> bytes:
    """Return a table as lines of CSV, text between quotes only in blocks that need them."""
    columns = [
        pc.cast(column, column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    plain = pa.table(columns, names=[str(i) for i in range(len(columns))])
    for quotes in ("none", "needed"):
        sink = pa.BufferOutputStream()
        try:
            options = pyarrow.csv.WriteOptions(include_header=False, quoting_style=quotes)
            pyarrow.csv.write_csv(plain, sink, options)
            return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]
        except pa.ArrowInvalid as error:
            if quotes == "needed" or "structural" not in str(error):
                kinds = sorted({str(column.type) for column in columns if pa.types.is_nested(column.type)})
                raise DataError(f"CSV cannot hold {', '.join(kinds) or error}; write .parquet") from error
    raise AssertionError


def parquet_writer(file: BinaryIO, schema: Any) -> Any:
    """Return a writer that looks for repeated values in columns of text and the like only.

    Numbers such as scores and identifiers hardly repeat: to look for it takes 0.08 of 0.10 us a row of both, and what
    is given up half-way makes files a half larger.
    """
    kinds = pa.types
    plain = (kinds.is_floating, kinds.is_integer, kinds.is_boolean)
    others = [field.name for field in schema if not any(is_kind(field.type) for is_kind in plain)]
    return pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=others)


class ParquetTable:
    """A Parquet file that is being written, in groups of rows of a useful size."""

    GROUP = 1 << 18

    def __init__(self, file: BinaryIO, metadata: Mapping[bytes, bytes] | None = None) -> None:
        self._file = file
        self._metadata = metadata
        self._writer: Any = None
        self._waiting: list[Any] = []

    def write(self, table: Any) -> None:
        """Append rows."""
        self._waiting.append(table)
        if self._writer is None or sum(map(len, self._waiting)) >= self.GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            whole = pa.concat_tables(self._waiting)
            self._waiting = []
            if self._writer is None:
                schema = whole.schema.with_metadata(self._metadata)
                self._writer = parquet_writer(self._file, schema)
            self._writer.write_table(whole)

    def close(self) -> None:
        """Write what is left, and the footer."""
        self._flush()
        if self._writer is not None:
            self._writer.close()


def appended(passed: Any, name: str, values: Array) -> Any:
    """Return a table with one more column."""
    return passed.append_column(name, _arrow_rows.arrow_array(values))
