"""Tables of numbers in and out of files and pipes, in blocks, for the command line.

Readers convert to the model's dtype explicitly (a CSV holds decimal text, a `.npy` of float64 is rounded for a float32
model). Writers never leave half a file: they write beside the target and rename.
"""

import csv
import io
import math
import os
import shutil
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NPY_MAGIC = b"\x93NUMPY"
BLOCK_VALUES = 1 << 20


class DataError(ValueError):
    """A table cannot be used; the message names the file and, where there is one, the line."""


@dataclass
class Table:
    """A table that is being read.

    Attributes
    ----------
    name
        The file's name, for messages.
    columns
        Number of columns.
    rows
        Number of rows; None where only reading to the end will tell.
    blocks
        The rows in order, in arrays [n, columns] of the file's own dtype. Can be consumed once.
    mapped
        All rows as one memory-mapped array, where the file allows it.
    names
        Of the columns, where the file has them.
    """

    name: str
    columns: int
    rows: int | None
    blocks: Iterator[Array]
    mapped: Array | None = None
    names: list[str] | None = None

    def chunks(self, dtype: str) -> Iterator[Array]:
        """Yield the rows in C-contiguous arrays of `dtype`, of bounded size."""
        for block in self.blocks:
            yield _converted(block, dtype)

    def read(self, dtype: str) -> Array:
        """Return all rows as one C-contiguous array of `dtype`; a mapped file of that dtype stays on disk."""
        if self.mapped is not None:
            return _converted(self.mapped, dtype)
        return np.concatenate([np.empty((0, self.columns), dtype), *self.chunks(dtype)])


def _converted(block: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):  # to infinity, which scores as NaN and which fit counts and names
        return np.asarray(block, dtype=dtype, order="C")


def rows_per_block(columns: int) -> int:
    """Return how many rows of so many columns make a block of some megabytes."""
    return max(1, BLOCK_VALUES // max(1, columns))


# --------------------------------------------------------------------------------------------------------- reading


@contextmanager
def open_table(source: str) -> Iterator[Table]:
    """Open `source`: a `.npy`, `.csv` or `.parquet` file, or `-` (or a pipe) that brings CSV or `.npy`."""
    with ExitStack() as stack:
        if source == "-":
            if sys.stdin is None:
                raise DataError("standard input is closed")
            yield _stream_table("standard input", sys.stdin.buffer, stack)
            return
        path = Path(source)
        if path.is_dir():
            raise IsADirectoryError(f"{source} is a directory, expected a table (.npy, .csv or .parquet)")
        if path.exists() and not path.is_file():  # a named pipe, or what the shell makes of <(command)
            yield _stream_table(source, stack.enter_context(path.open("rb")), stack)
        elif path.suffix == ".npy":
            yield _npy_table(source)
        elif path.suffix == ".csv":
            yield _csv_table(source, stack.enter_context(path.open(encoding="utf-8-sig", newline=None)))
        elif path.suffix == ".parquet":
            yield _parquet_table(source)
        else:
            raise DataError(f"{source}: unknown kind of table {path.suffix!r}, expected .npy, .csv or .parquet")


# What NumPy raises for headers that are damaged or lie.
_BAD_NPY = (ValueError, EOFError, OverflowError, TypeError, SyntaxError, tokenize.TokenError)


def _check_array(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if dtype.kind not in "fiu":
        raise DataError(f"{name}: dtype {dtype}, expected real numbers")
    if len(shape) != 2:
        raise DataError(f"{name}: shape {shape}, expected two dimensions [rows, columns]")


def _npy_table(name: str) -> Table:
    try:
        mapped = np.load(name, mmap_mode="r", allow_pickle=False)
    except _BAD_NPY as error:
        raise DataError(f"{name}: not a readable .npy file: {error}") from error
    if not isinstance(mapped, np.ndarray):
        mapped.close()
        raise DataError(f"{name}: an archive of several arrays, expected one array")
    _check_array(name, mapped.dtype, mapped.shape)
    rows, columns = mapped.shape
    step = rows_per_block(columns)
    return Table(name, columns, rows, (mapped[i : i + step] for i in range(0, rows, step)), mapped)


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes have been read already, put together again."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _stream_table(name: str, stream: IO[bytes], stack: ExitStack) -> Table:
    head = stream.read(len(NPY_MAGIC))
    joined = io.BufferedReader(_Rejoined(head, stream))  # type: ignore[arg-type]
    if head == NPY_MAGIC:
        return _npy_stream_table(name, joined)
    return _csv_table(name, stack.enter_context(io.TextIOWrapper(joined, encoding="utf-8-sig", newline=None)))


def _npy_stream_table(name: str, stream: BinaryIO) -> Table:
    """Read a `.npy` that cannot be mapped or sought in (format: numpy.lib.format)."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, column_major, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, column_major, dtype = np.lib.format.read_array_header_2_0(stream)
    except _BAD_NPY as error:
        raise DataError(f"{name}: not a readable .npy stream: {error}") from error
    _check_array(name, dtype, shape)
    if column_major:
        raise DataError(f"{name}: a column-major .npy cannot be read row by row; write a C-ordered array")
    return Table(name, shape[1], shape[0], _npy_blocks(name, stream, shape, dtype))


def _npy_blocks(name: str, stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    rows, columns = shape
    step = rows_per_block(columns)
    for first in range(0, rows, step):
        wanted = min(step, rows - first) * columns * dtype.itemsize
        data = stream.read(wanted)
        if len(data) < wanted:
            whole_rows = first + len(data) // (columns * dtype.itemsize)
            raise DataError(f"{name}: ends early, after {whole_rows} of {rows} rows")
        yield np.frombuffer(data, dtype=dtype).reshape(-1, columns)


def _parquet_table(name: str) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"{name}: reading .parquet needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(name)
    except ValueError as error:
        raise DataError(f"{name}: not a readable .parquet file: {error}") from error
    names = [field.name for field in file.schema_arrow]
    rows = file.metadata.num_rows
    return Table(name, len(names), rows, _parquet_blocks(name, file, names), names=names)


def _parquet_blocks(name: str, file: Any, names: list[str]) -> Iterator[Array]:
    first = 1
    for batch in file.iter_batches(batch_size=rows_per_block(len(names))):
        for column, values in zip(names, batch.columns, strict=True):
            where = f"{name}, rows {first} to {first + len(values) - 1}, column {column!r}"
            if values.null_count:
                raise DataError(f"{where}: {values.null_count} missing values")
            if values.to_numpy(zero_copy_only=False).dtype.kind not in "fiu":
                raise DataError(f"{where}: type {values.type}, expected real numbers")
        yield np.column_stack([values.to_numpy(zero_copy_only=False) for values in batch.columns])
        first += len(batch)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _csv_table(name: str, text: IO[str]) -> Table:
    """Read comma-separated numbers; the first line is a header if no field of it is a number and not all are empty."""
    lines = ((number, line) for number, line in enumerate(_decoded(name, text), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        raise DataError(f"{name}: empty")
    fields = _fields(f"{name}, line {first[0]}", first[1])
    named = not any(_is_number(field) for field in fields) and any(field.strip() for field in fields)
    header = [field.strip() for field in fields] if named else None
    parser = _CsvParser(name, len(fields), first[0], header)
    return Table(name, len(fields), None, parser.blocks(lines if header else _prepended(first, lines)), names=header)


def _fields(where: str, line: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise DataError(f"{where}: {error}") from error


def _decoded(name: str, text: IO[str]) -> Iterator[str]:
    try:
        yield from text
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text: {error}") from error


def _prepended(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


@dataclass
class _CsvParser:
    name: str
    columns: int
    first_line: int
    header: list[str] | None

    def blocks(self, lines: Iterator[tuple[int, str]]) -> Iterator[Array]:
        """Yield [n, columns] float64 arrays. NumPy's parser reads a block; where it fails, ours finds out why."""
        while block := list(islice(lines, rows_per_block(self.columns))):
            try:
                values = np.loadtxt(
                    [line for _, line in block], delimiter=",", ndmin=2, comments=None, quotechar='"', dtype=np.float64
                )
            except ValueError as error:
                self._explain(block)
                raise DataError(f"{self.name}, lines {block[0][0]} to {block[-1][0]}: {error}") from error
            if values.shape[1] != self.columns:
                self._explain(block)
            yield values

    def _explain(self, block: list[tuple[int, str]]) -> None:
        for number, line in block:
            where = f"{self.name}, line {number}"
            fields = _fields(where, line)
            if len(fields) != self.columns:
                raise DataError(f"{where}: {len(fields)} columns, expected {self.columns} as in line {self.first_line}")
            for i, field in enumerate(fields):
                if not _is_number(field):
                    named = f" ({self.header[i]})" if self.header else ""
                    what = f"{field.strip()!r} is not a number" if field.strip() else "no value"
                    other = next((mark for mark in ";\t|" if mark in field), None)
                    hint = f"; columns are separated by commas here, not by {other!r}" if other else ""
                    raise DataError(f"{where}, column {i + 1}{named}: {what}{hint}")


# --------------------------------------------------------------------------------------------------------- writing


def output_format(target: str, asked: str | None) -> str:
    """Return "csv" or "npy": what was asked for, else what the target's name says, else CSV for a pipe."""
    if asked is not None:
        return asked
    suffix = Path(target).suffix
    if suffix in (".csv", ".npy"):
        return suffix[1:]
    if target == "-" or _is_special(target):
        return "csv"
    raise DataError(f"{target}: unknown kind of table {suffix!r}, expected .npy or .csv (or give --format)")


def _is_special(target: str) -> bool:
    """Tell pipes and devices, which are written to, from files, which are replaced."""
    return os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target)


def check_target(target: str, *, force: bool) -> None:
    """Refuse a target that could not be written in the end; called before the work is done."""
    folder = os.path.dirname(os.path.realpath(target))
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target} is a directory, expected a file name")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{target}: there is no folder {folder}")
    if os.path.isfile(target) and not force:
        raise FileExistsError(f"{target} exists already (--force overwrites it)")
    if not os.access(target if _is_special(target) else folder, os.W_OK):
        raise PermissionError(f"{target}: no permission to write there")


def check_distinct(target: str, sources: dict[str, str | None], option: str = "-o") -> None:
    """Refuse to write over a file that the same command reads, also with --force."""
    for name, source in sources.items():
        if source is not None and "-" not in (source, target) and os.path.realpath(source) == os.path.realpath(target):
            raise DataError(f"{option}: {target} is {name} too; give the output a file of its own")


def write_text(target: str, text: str, *, force: bool) -> None:
    """Write a whole file of UTF-8 text, or to standard output for `-`."""
    with _open_target(target, force=force) as file:
        file.write(text.encode())


@contextmanager
def create_table(
    target: str, *, kind: str, dtype: str, columns: int | None, rows: int | None, force: bool = False
) -> Iterator[Callable[[Array], None]]:
    """Open `target` for writing and give the function that appends a block of rows.

    Parameters
    ----------
    target
        A path, or `-` for standard output.
    kind
        "csv" (no header; as many digits as `dtype` needs to be read back exactly) or "npy".
    dtype
        Of the blocks.
    columns
        None: blocks are [n], the table has one dimension.
    rows
        How many rows will come in all; None where that is not known.
    force
        Replace an existing file.
    """
    with _open_target(target, force=force) as file:
        if kind == "csv":
            digits = "%.9g" if dtype == "float32" else "%.17g"
            yield lambda block: np.savetxt(file, block, fmt=digits, delimiter=",")
            return
        if target == "-" and sys.stdout.isatty():
            raise DataError("not writing binary .npy to a terminal; redirect standard output or give -o FILE")
        with _npy_writer(file, np.dtype(dtype), columns, rows) as write:
            yield write


@contextmanager
def _naming(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = target
        raise


class _TargetFile(io.FileIO):
    """A file whose failing writes name the target: Python names a file where opening it fails, and there alone."""

    def __init__(self, path: str, mode: str, target: str) -> None:
        super().__init__(path, mode)
        self._target = target

    def write(self, data: Any, /) -> int:
        with _naming(self._target):
            return super().write(data)


@contextmanager
def _open_target(target: str, *, force: bool) -> Iterator[BinaryIO]:
    if target == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    check_target(target, force=force)
    if _is_special(target):
        with io.BufferedWriter(_TargetFile(target, "w", target)) as file:
            yield file
        return
    final = os.path.realpath(target)  # a symbolic link keeps pointing where it does
    unfinished = f"{final}.{os.getpid()}.tmp"
    try:
        with io.BufferedWriter(_TargetFile(unfinished, "x", target)) as file:
            yield file
            file.flush()
            with _naming(target):
                os.fsync(file.fileno())
        if not force and os.path.exists(final):
            raise FileExistsError(f"{target} was created by someone else in the meantime (--force overwrites it)")
        os.replace(unfinished, final)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


@contextmanager
def _npy_writer(
    file: BinaryIO, dtype: np.dtype[Any], columns: int | None, rows: int | None
) -> Iterator[Callable[[Array], None]]:
    """Write an array whose number of rows may become known only at the end."""
    tail = () if columns is None else (columns,)
    if rows is not None:
        file.write(_npy_header(dtype, (rows, *tail)))
        yield lambda block: _write_all(file, block)
        return
    # The header, which comes first, states the number of rows: they wait in a temporary file until they are counted.
    with tempfile.TemporaryFile() as waiting:
        yield lambda block: _write_all(waiting, block)
        counted = waiting.tell() // (dtype.itemsize * math.prod(tail))
        file.write(_npy_header(dtype, (counted, *tail)))
        waiting.seek(0)
        shutil.copyfileobj(waiting, file)


def _write_all(file: IO[bytes], block: Array) -> None:
    file.write(np.ascontiguousarray(block).data)


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue()
