"""Tables of numbers out of files and pipes, in blocks, for the command line.

A table is read once, from the first row to the last, in blocks of some megabytes, whatever its size. `.npy` needs NumPy
only; `nvpflow._arrow` reads every other kind. What cannot be used is collected until the end of the table, so that one
message names all of it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nvpflow import _checks
from nvpflow._data import RunningLook
from nvpflow._source import SHOWN, Array, Piece, Problems, Source, Stream, numbered, option_value, rows_per_block
from nvpflow._source import DataError as DataError
from nvpflow._text import counted

NPY_MAGIC = b"\x93NUMPY"
KINDS = ".npy, .csv, .tsv, .parquet, .feather or .arrow"
CSV_SUFFIXES = (".csv", ".tsv")
IPC_SUFFIXES = (".feather", ".arrow", ".ipc")


@dataclass(frozen=True)
class Reading:
    """How a table is read.

    Attributes
    ----------
    columns
        Those to use, in this order: names, or numbers counted from 1 where the table has no names. None: all.
    drop
        Columns to leave out.
    context
        Columns that condition the rows and are not a part of them, as `columns` names them. None: those that the model
        knows by name.
    weight
        The column that says what each row counts for, which is not a part of the rows. None: there is none.
    context_only
        The table holds contexts and no rows. Without `context` and names, of the model or of the table, every column
        is one of the context.
    keep
        Columns to hand on beside the rows; left out of the rows unless the model has them.
    append
        Hand on every column of the file.
    missing
        What missing cells do: "refuse" (one error for all of them), "skip" (their rows are left out) or "nan".
    in_place
        No row is to be left out, because each has a result of its own: what the error of "refuse" says does not offer
        it.
    delimiter
        Of a CSV; None: found out from its first lines.
    typed
        Hand on what a CSV's columns of numbers hold as numbers, not as the text in the file.
    for_density
        Where a table cannot be used, say too which of its columns have no density.
    """

    columns: Sequence[str] | None = None
    drop: Sequence[str] = ()
    context: Sequence[str] | None = None
    weight: str | None = None
    context_only: bool = False
    keep: Sequence[str] = ()
    append: bool = False
    missing: str = "refuse"
    in_place: bool = False
    delimiter: str | None = None
    typed: bool = False
    for_density: bool = False


@dataclass(frozen=True)
class ModelColumns:
    """What a model takes of a table; names are None where it has none, or where nobody is to look at them."""

    size: int
    names: Sequence[str] | None = None
    context_size: int = 0
    context_names: Sequence[str] | None = None


@dataclass
class Block:
    """Rows [n, columns] that can be used, float64 or of the file's own dtype.

    Beside them their context [n, context columns] and their weights [n], where the table has such, and the columns
    handed on.
    """

    rows: Array
    context: Array | None
    passed: Any
    weights: Array | None = None


class Content(NamedTuple):
    """Rows [n, columns], their context [n, context columns] and their weights [n]; None where the table has none."""

    rows: Array
    context: Array | None
    weights: Array | None


# ----------------------------------------------------------------------------------------------------------- table


class Table:
    """A table that is being read: the columns that were chosen, in blocks. Can be consumed once.

    Attributes
    ----------
    name
        The file's name, for messages.
    columns
        Number of columns in a row.
    rows
        Number of rows; None where only reading to the end will tell.
    names
        Of the columns, where the file has them.
    context_names
        Of the columns of the context, where the file has them.
    passed_names
        Of the columns that are handed on.
    incomplete
        Rows with missing cells so far.
    """

    def __init__(self, source: Source, reading: Reading, model: ModelColumns | None) -> None:
        self.name = source.name
        self.incomplete = 0
        self._source = source
        self._reading = reading
        self._problems = Problems(source.name, source.unit)
        self._problems.names, self._problems.in_place = source.names, reading.in_place
        known = model.names if model is not None else None
        if source.names is None or source.names != [name.strip() for name in known or ()]:
            self._problems.notes += source.notes
        self._context = self._select_context(model)
        self._weight = [] if reading.weight is None else self._found("--weight-column", [reading.weight])
        if self._weight and self._weight[0] in self._context:
            column = self._problems.column(self._weight[0])
            raise DataError(f"{self.name}: --weight-column names {column}, a column of the context")
        self._problems.needed = {*self._context, *self._weight}
        self._used, self._passed = self._select(known)
        self.columns = len(self._used)
        self.names = None if source.names is None else [source.names[i] for i in self._used]
        self.context_names = None if source.names is None else [source.names[i] for i in self._context]
        self.passed_names = [self._name(i) for i in self._passed]
        self.rows = None if reading.missing == "skip" else source.rows
        if twice := self._repeated():
            self._problems.general.append(f"{twice}, expected a name for each; rename one of them")
        if self.columns == 0 and source.width and not reading.context_only:
            raise DataError(f"{self.name}: no column is left")
        if model is not None:
            self._expect(model)
            self._expect_context(model)

    @property
    def notes(self) -> list[str]:
        """What was done that the user did not ask for."""
        return [f"{self.name}: {note}" for note in self._problems.notes]

    def _name(self, i: int) -> str:
        return f"column_{i + 1}" if self._source.names is None else self._source.names[i]

    def _repeated(self) -> str:
        """Return what to say where two of the columns that make the rows have one name."""
        shown = [""] * self._source.width
        for i in [*self._used, *self._context]:
            shown[i] = (self._source.names or shown)[i]
        return _checks.repeated(shown)

    def _select(self, model_names: Sequence[str] | None) -> tuple[list[int], list[int]]:
        """Return the columns that make the rows, and those handed on."""
        reading, known = self._reading, {name.strip() for name in model_names or ()}
        chosen = None if reading.columns is None else self._found("--columns", reading.columns)
        drop, keep = self._found("--drop", reading.drop), self._found("--keep", reading.keep)
        for option, given in (("--columns", chosen), ("--drop", drop)):
            if both := [i for i in given or () if i in self._problems.needed]:
                what = "that of the weights" if both[0] in self._weight else "a column of the context"
                named = f"{option} names {self._problems.column(both[0])}"
                raise DataError(f"{self.name}: {named}, {what}; leave it out there")
        left_out = {*drop, *self._problems.needed, *(i for i in keep if self._name(i).strip() not in known)}
        if reading.context_only:
            chosen = []
        if chosen is None:
            chosen = [i for i in range(self._source.width) if i not in left_out]
            index = self._source.index_column()
            if index in chosen and self._name(index).strip() not in known:
                chosen.remove(index)
                self._problems.notes.append(
                    f"{self._problems.column(index)} is the index that pandas writes, and is left out"
                )
        else:
            chosen = [i for i in chosen if i not in drop]
        return chosen, list(range(self._source.width)) if reading.append else keep

    def _select_context(self, model: ModelColumns | None) -> list[int]:
        """Return the columns of the context: those of the option, or those that the model knows by name."""
        option = "--context-columns"
        if self._reading.context is not None:
            if model is not None and model.context_size == 0:
                raise DataError(f"{option} is given, expected it left out: the model has no context")
            if not self._reading.context:
                raise DataError(f"{option} is empty, expected the columns of the context")
            return self._found(option, self._reading.context)
        if model is None or model.context_size == 0:
            return []
        names = [name.strip() for name in self._source.names or ()]
        if names and model.context_names:
            wanted = [name.strip() for name in model.context_names]
            if unknown := [name for name in wanted if names.count(name) != 1]:
                twice = " (or more than one of that name)" if any(name in names for name in unknown) else ""
                raise DataError(
                    f"{self.name}: there is no column {_listed(unknown)}{twice} for the context of the model; the "
                    f"table has {_listed(names)}; {option} with --ignore-names takes others"
                )
            if model.names and (both := [name.strip() for name in model.names if name.strip() in wanted]):
                raise DataError(
                    f"{self.name}: the model calls a column and one of its context {_listed(both[:1])}; {option} with "
                    "--ignore-names says which is which"
                )
            return [names.index(name) for name in wanted]
        if self._reading.context_only:
            return list(range(self._source.width))
        raise DataError(
            f"{self.name}: the model is a density under a context of {counted(model.context_size, 'column')}; say with "
            f"{option} which of the table's these are"
        )

    def _found(self, option: str, wanted: Sequence[str]) -> list[int]:
        """Return the numbers, from 0, of columns that an option names."""
        names = self._source.names
        known = [str(i + 1) for i in range(self._source.width)] if names is None else names
        if again := [name for i, name in enumerate(wanted) if name in wanted[:i]]:
            raise DataError(f"{option} names {_listed(again[:1])} twice, expected each column once")
        unknown = [name for name in wanted if known.count(name) != 1]
        if unknown:
            has = f"columns 1 to {len(known)} without names" if names is None else _listed(known)
            twice = " (or more than one of that name)" if any(name in known for name in unknown) else ""
            raise DataError(f"{self.name}: {option}: there is no column {_listed(unknown)}{twice}; the table has {has}")
        return [known.index(name) for name in wanted]

    def _expect(self, model: ModelColumns) -> None:
        """Check that the rows have the model's columns, and of its names where both are named."""
        names = model.names
        if self.columns != model.size and not self._reading.context_only:
            hint = ""
            if names and self.names and {name.strip() for name in names} <= {name.strip() for name in self.names}:
                hint = f"; --columns {','.join(map(option_value, names))} chooses those that it was trained with"
                known = {name.strip() for name in names}
                self._problems.needless = {i for i in self._used if self._name(i).strip() not in known}
            self._problems.general.append(f"{counted(self.columns, 'column')}, the model takes {model.size}{hint}")
            return
        self._expect_names("column", self.names, names, "reorder the columns")

    def _expect_context(self, model: ModelColumns) -> None:
        """Check the same of the context."""
        if len(self._context) != model.context_size:
            self._problems.general.append(
                f"a context of {counted(len(self._context), 'column')}, the model takes {model.context_size}"
            )
            return
        self._expect_names("context column", self.context_names, model.context_names, "reorder --context-columns")

    def _expect_names(
        self, column: str, names: Sequence[str] | None, expected: Sequence[str] | None, remedy: str
    ) -> None:
        for i, pair in enumerate(zip(names or (), expected or (), strict=False)):
            if pair[0].strip() != pair[1].strip():
                here, there = (_checks.shortened(repr(name)) for name in pair)
                self._problems.general.append(
                    f"{column} {i + 1} is {here}, the model was trained with {there} there; "
                    f"{remedy}, or give --ignore-names if only their names differ"
                )
                return

    def blocks(self) -> Iterator[Block]:
        """Yield the rows. A table that cannot be used is read to its end, and everything said in one DataError."""
        problems, own = self._problems, self.columns
        look = None
        beside = [*self._context, *self._weight]
        pieces = self._source.pieces([*self._used, *beside], self._passed, self._reading.typed, problems)
        for number, piece in enumerate(pieces):
            rows, passed = piece.rows, piece.passed
            if self._weight:
                self._check_weights(rows[:, -1], piece)
            if rows.dtype.kind == "f" and rows.size and np.isnan(rows.min()):
                gaps = np.isnan(rows)
                complete = ~gaps.any(axis=1)
                self.incomplete += int(len(rows) - complete.sum())
                if self._reading.missing == "refuse":
                    self._refuse(gaps, piece)
                elif self._reading.missing == "skip":
                    rows = rows[complete]
                    passed = None if passed is None else passed.filter(complete)
            if not problems:
                yield self._block(rows, passed) if beside else Block(rows, None, passed)
            elif number == 0 and self._reading.for_density and own:  # else some rows have gone, and no look is whole
                look = RunningLook(self.names, own, "float64", True)
            if look is not None:
                look.add(rows[:, :own])
        problems.incomplete = self.incomplete
        if look is not None:
            problems.general += self._without_density(look)
        problems.raise_all()

    def _check_weights(self, weights: Array, piece: Piece) -> None:
        bad = np.flatnonzero((weights < 0) | np.isinf(weights))
        column = self._problems.column(self._weight[0])
        if len(bad) and not any(text.startswith(column) for text in self._problems.general):
            (at,) = piece.labels(bad[:1].tolist())
            found = f"{weights[bad[0]]:g} in {self._problems.unit} {at}"
            self._problems.general.append(f"{column}, the weights, is {found}, expected finite and at least 0")

    def _block(self, rows: Array, passed: Any) -> Block:
        context, weights = self.columns, self.columns + len(self._context)
        return Block(
            rows[:, :context],
            rows[:, context:weights] if self._context else None,
            passed,
            rows[:, weights] if self._weight else None,
        )

    def _without_density(self, look: RunningLook) -> list[str]:
        """Return what else rules out a density of the columns that are numbers."""
        found = []
        for finding in look.report().errors:
            columns = {self._used[column - 1] for column in finding.columns}
            if finding.kind not in ("missing", "rows") and not columns & {*self._problems.wrong}:
                found.append(f"{finding.text}: {finding.remedy}")
        return found

    def _refuse(self, gaps: Array, piece: Piece) -> None:
        for j in np.flatnonzero(gaps.any(axis=0)):
            where = np.flatnonzero(gaps[:, j])
            column = (self._used + self._context + self._weight)[j]
            known = self._problems.missing.get(column)
            wanted = where[: SHOWN - len(known.first)] if known else where[:SHOWN]
            first = piece.labels(wanted.tolist()) if len(wanted) else []
            self._problems.add_missing(column, len(where), first)

    def chunks(self, dtype: str, *, wide: bool = False) -> Iterator[Content]:
        """Yield the rows in C-contiguous arrays of `dtype`, of bounded size; wide: of float64 where that rounds.

        Beside them their context, of `dtype` or of float64 where that rounds, and their weights, of float64.
        """
        for block in self.blocks():
            context = None if block.context is None else converted(block.context, dtype, wide=True)
            weights = None if block.weights is None else converted(block.weights, "float64")
            yield Content(converted(block.rows, dtype, wide=wide), context, weights)

    def read(self, dtype: str, *, wide: bool = False) -> Content:
        """Return all of this as one array each; a `.npy` of rows of that dtype stays on disk, mapped."""
        if self._context or self._weight:
            return self._joined(dtype, wide=wide)
        mapped = self._source.mapped()
        whole = mapped is not None and self._used == list(range(self._source.width)) and mapped.flags.c_contiguous
        if whole and mapped is not None and mapped.dtype in ((dtype, "float64") if wide else (dtype,)):
            for _ in self.blocks():
                pass  # what is wrong with it
            if not self.incomplete or self._reading.missing == "nan":
                return Content(mapped, None, None)
            return Content(np.ascontiguousarray(mapped[~np.isnan(mapped).any(axis=1)]), None, None)
        return self._joined(dtype, wide=wide)

    def _joined(self, dtype: str, *, wide: bool) -> Content:
        rows, context = _Growing(self.columns, dtype, self.rows), _Growing(len(self._context), dtype, self.rows)
        weights = _Growing(1, "float64", self.rows)
        for chunk in self.chunks(dtype, wide=wide):
            rows.add(chunk.rows)
            if chunk.context is not None:
                context.add(chunk.context)
            if chunk.weights is not None:
                weights.add(chunk.weights[:, None])
        return Content(
            rows.whole(),
            context.whole() if self._context else None,
            weights.whole()[:, 0] if self._weight else None,
        )


class _Growing:
    """An array [n, columns] that grows in place: memory for the rows once."""

    def __init__(self, columns: int, dtype: str, expected: int | None) -> None:
        self._rows = np.empty((0, columns), dtype)
        self._expected = expected or 0
        self._end = 0

    def add(self, block: Array) -> None:
        """Append rows, all of one dtype."""
        columns, end = block.shape[1], self._end + len(block)
        if self._end == 0:
            self._rows = np.empty((self._expected, columns), block.dtype)
        if end > len(self._rows):
            self._rows.resize((max(end, len(self._rows) + len(self._rows) // 4), columns), refcheck=False)
        self._rows[self._end : end] = block
        self._end = end

    def whole(self) -> Array:
        """Return the rows."""
        self._rows.resize((self._end, self._rows.shape[1]), refcheck=False)
        return self._rows


def converted(block: Array, dtype: str, *, wide: bool = False) -> Array:
    """Return a block as the model takes it, C-contiguous; wide: in float64 where `dtype` rounds."""
    if wide and not np.can_cast(block.dtype, dtype, "safe"):
        dtype = "float64"
    with np.errstate(over="ignore"):  # to infinity, which fit counts and names
        return np.asarray(block, dtype=dtype, order="C")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(_checks.shortened(repr(name)) for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


# --------------------------------------------------------------------------------------------------------- opening


_OPENERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
COMPRESSIONS = (*_OPENERS, ".zst")
_ZIP = b"PK\x03\x04"


@contextmanager
def open_table(source: str, reading: Reading | None = None, model: ModelColumns | None = None) -> Iterator[Table]:
    """Open a table: a file whose suffix says what it is, or `-` or a pipe that brings CSV, `.npy` or an Arrow stream.

    Parameters
    ----------
    source
        A path or `-`.
    reading
        What to take of it; None: everything.
    model
        What the model takes that the rows are for. Where it is another table, `Table.blocks` says so.

    Yields
    ------
    Table
        Whose blocks can be read until the context ends.

    Raises
    ------
    DataError, OSError
        It cannot be read.
    ImportError
        pyarrow is not installed, and this is no `.npy`.
    """
    reading = reading or Reading()
    with ExitStack() as stack:
        yield Table(_open_source(source, reading, stack), reading, model)


def _open_source(source: str, reading: Reading, stack: ExitStack) -> Source:
    if not source:
        raise DataError("the name of a table is empty, expected a path, or - for standard input")
    if source == "-":
        if sys.stdin is None:
            raise DataError("standard input is closed")
        return _stream_source("standard input", sys.stdin.buffer, reading, stack)
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"{source} is a directory, expected a table ({KINDS})")
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    kind = Path(path.stem).suffix.lower() if compression else suffix
    if is_special(source):  # a named pipe, or what the shell makes of <(command)
        return _stream_source(source, stack.enter_context(path.open("rb")), reading, stack)
    file = stack.enter_context(path.open("rb"))
    if kind == ".npy" and not compression:
        return NpySource(source, file, source)
    if kind == ".npy" or kind in CSV_SUFFIXES:
        return _stream_source(source, file, reading, stack)
    if (kind == ".parquet" or kind in IPC_SUFFIXES) and not compression:
        arrow = _arrow(source)
        return arrow.ParquetSource(source, file) if kind == ".parquet" else arrow.IpcSource(source, file)  # type: ignore[no-any-return]
    raise DataError(f"{source}: unknown kind of table {suffix!r}, expected {KINDS} (.csv.gz, .bz2, .xz and .zst, too)")


def is_special(path: str) -> bool:
    """Tell pipes, devices and open descriptors (/dev/stdin) from files, which have a kind and can be replaced."""
    if os.path.isdir(path):
        return False
    return os.path.exists(path) and (not os.path.isfile(path) or path.startswith(("/dev/", "/proc/")))


def _arrow(name: str) -> Any:
    try:
        from nvpflow import _arrow
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise ImportError(f"{name}: reading anything but .npy needs pyarrow: pip install pyarrow") from error
    return _arrow


def _stream_source(name: str, file: Any, reading: Reading, stack: ExitStack) -> Source:
    stream = Stream(file)
    magic = stream.peek(6)
    for start, suffix in _MAGIC.items():
        if magic.startswith(start):
            opened = _arrow(name).zstd(stream) if suffix == ".zst" else _OPENERS[suffix](io.BufferedReader(stream))
            stream = Stream(stack.enter_context(opened))
    try:
        magic = stream.peek(len(NPY_MAGIC))
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"{name}: cannot be decompressed: {error}") from error
    if magic == NPY_MAGIC:
        return NpySource(name, io.BufferedReader(stream))
    if magic.startswith(_ZIP):
        raise DataError(f"{name}: a zip archive or a spreadsheet, expected a table ({KINDS}); unpack or export it")
    if magic[:4] == b"PAR1" or magic == b"ARROW1":
        kind = "Parquet" if magic[:4] == b"PAR1" else "An Arrow file"
        raise DataError(f"{name}: {kind} is read from its end and cannot come from a pipe; name the file")
    arrow = _arrow(name)
    if magic[:4] == b"\xff\xff\xff\xff":
        return arrow.IpcSource(name, stream, stream=True)  # type: ignore[no-any-return]
    return arrow.CsvSource(name, stream, reading.delimiter)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------- npy

# What NumPy raises for headers that are damaged or lie.
_BAD_NPY = (ValueError, EOFError, OverflowError, TypeError, SyntaxError, tokenize.TokenError)


class NpySource:
    """A `.npy` (format: numpy.lib.format), read without a mapping: a file that shrinks under one ends the process."""

    names: list[str] | None = None
    unit = "row"
    notes: Sequence[str] = ()

    def __init__(self, name: str, file: BinaryIO, path: str | None = None) -> None:
        self.name = name
        self._file = file
        self._path = path
        kind = "file" if path else "stream"
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"format version {version}")
            read_header = getattr(np.lib.format, f"read_array_header_{1 if version == (1, 0) else 2}_0")
            shape, self._column_major, self._dtype = read_header(file)
            if any(type(extent) is not int or extent < 0 for extent in shape):
                raise ValueError(f"shape {shape}")
            if path:
                self._check_size(file, shape)
        except _BAD_NPY as error:
            file_start = b""
            if path:
                file.seek(0)
                file_start = file.read(4)
            if file_start == _ZIP:
                raise DataError(f"{name}: an archive of several arrays, expected one array") from error
            raise DataError(f"{name}: not a readable .npy {kind}: {error}") from error
        if self._dtype.kind not in "fiu":
            raise DataError(f"{name}: dtype {self._dtype}, expected real numbers")
        if len(shape) != 2:
            raise DataError(f"{name}: shape {shape}, expected two dimensions [rows, columns]")
        if self._column_major and not path:
            raise DataError(f"{name}: a column-major .npy cannot be read row by row; write a C-ordered array")
        self.rows, self.width = shape

    def _check_size(self, file: BinaryIO, shape: tuple[int, ...]) -> None:
        self._start = file.tell()
        if self._dtype.hasobject:
            raise ValueError("it holds Python objects")
        expected = self._dtype.itemsize
        for extent in shape:
            expected *= extent
        size = os.fstat(file.fileno()).st_size - self._start
        if size < expected:
            raise ValueError(f"{size} bytes of data, expected {expected}")

    def index_column(self) -> None:
        """Return None: an array has no index."""

    def mapped(self) -> Array | None:
        """Return all of it as one memory-mapped array."""
        if self._path is None or not self.rows or not self.width:
            return None
        order: Any = "F" if self._column_major else "C"
        return np.memmap(self._path, self._dtype, "r", self._start, (self.rows, self.width), order)

    def pieces(self, used: Sequence[int], passed: Sequence[int], typed: bool, problems: Problems) -> Iterator[Piece]:
        """Yield blocks of the columns asked for, of the array's dtype."""
        step = rows_per_block(self.width)
        every = list(used) == list(range(self.width))
        for first in range(0, self.rows if self.width else 0, step):
            block = self._columns_of(first, step) if self._column_major else self._rows_of(first, step)
            handed_on = (
                _arrow(self.name).table_of(block, [f"column_{i + 1}" for i in passed], passed) if passed else None
            )
            yield Piece(block if every else block[:, used], handed_on, partial(numbered, first))

    def _rows_of(self, first: int, step: int) -> Array:
        row_size = self.width * self._dtype.itemsize
        wanted = min(step, self.rows - first) * row_size
        data = self._file.read(wanted)
        if len(data) < wanted:
            raise self._ends_early(first + len(data) // row_size)
        return np.frombuffer(data, dtype=self._dtype).reshape(-1, self.width)

    def _columns_of(self, first: int, step: int) -> Array:
        count, size = min(step, self.rows - first), self._dtype.itemsize
        block = np.empty((count, self.width), self._dtype)
        for j in range(self.width):
            self._file.seek(self._start + (j * self.rows + first) * size)
            data = self._file.read(count * size)
            if len(data) < count * size:
                raise self._ends_early(0)
            block[:, j] = np.frombuffer(data, dtype=self._dtype)
        return block

    def _ends_early(self, rows: int) -> DataError:
        return DataError(f"{self.name}: ends early, after {rows} of {self.rows} rows")
