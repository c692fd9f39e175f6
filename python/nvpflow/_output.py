"""Files that the command line and the exporters write: whole or not at all, with the modes of those they replace."""

from __future__ import annotations

import csv
import io
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from nvpflow._source import Array, DataError
from nvpflow.data_io import is_special

KINDS = ("csv", "npy", "parquet")


def output_format(target: str, asked: str | None) -> str:
    """Return "csv", "npy" or "parquet": what was asked for, else what the target's name says, else CSV for a pipe."""
    if asked is not None:
        return asked
    suffix = Path(target).suffix
    if suffix[1:] in KINDS:
        return suffix[1:]
    if target == "-" or is_special(target):
        return "csv"
    raise DataError(f"{target}: unknown kind of table {suffix!r}, expected .npy, .csv or .parquet (or give --format)")


def check_target(target: str, *, force: bool) -> None:
    """Refuse a target that could not be written in the end; called before the work is done."""
    folder = os.path.dirname(os.path.realpath(target))
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target} is a directory, expected a file name")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{target}: there is no folder {folder}")
    if is_special(target):
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{target}: no permission to write there")
        return
    try:
        exists = stat.S_ISREG(os.stat(target).st_mode)  # a name that is too long fails here
    except FileNotFoundError:
        exists = False
    if exists and not force:
        raise FileExistsError(f"{target} exists already (--force overwrites it)")
    if not os.access(folder, os.W_OK) or (exists and not os.access(target, os.W_OK)):
        raise PermissionError(f"{target}: no permission to write there")


def check_distinct(target: str, sources: dict[str, str | None], option: str = "-o") -> None:
    """Refuse to write over a file that the same command reads, also with --force."""
    for name, source in sources.items():
        if source is not None and "-" not in (source, target) and os.path.realpath(source) == os.path.realpath(target):
            raise DataError(f"{option}: {target} is {name} too; give the output a file of its own")


def write_text(target: str, text: str, *, force: bool) -> None:
    """Write a whole file of UTF-8 text, or to standard output for `-`; what no UTF-8 is, a file's name, is escaped."""
    with _open_target(target, force=force) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_bytes(target: str, data: bytes, *, force: bool) -> None:
    """Write a whole file."""
    with _open_target(target, force=force) as file:
        file.write(data)


@contextmanager
def create_table(
    target: str,
    *,
    kind: str,
    dtype: str,
    columns: int | None,
    rows: int | None,
    names: Sequence[str] | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
    force: bool = False,
) -> Iterator[Callable[..., None]]:
    """Open `target` for writing and give the function that appends a block of rows.

    Parameters
    ----------
    target
        A path, or `-` for standard output.
    kind
        "csv" (as many digits as `dtype` needs to be read back exactly), "npy" or "parquet".
    dtype
        Of the blocks; of a `.npy` as a whole.
    columns
        None: blocks are [n], the table has one dimension.
    rows
        How many rows will come in all; None where that is not known.
    names
        Of the columns, for a CSV's header and for Parquet. None: no header; Parquet counts the columns.
    metadata
        Of a Parquet file.
    force
        Replace an existing file.

    Yields
    ------
    function
        Takes a block [n] and a table of Arrow whose columns come before it, with the block's name; or a block and,
        optionally, an array [n, C] whose columns come behind it.
    """
    if kind != "csv" and target == "-" and sys.stdout.isatty():
        raise DataError(f"not writing binary .{kind} to a terminal; redirect standard output or give -o FILE")
    with _open_target(target, force=force) as file:
        if kind == "csv":
            if names is not None:
                file.write(_header(names))
            yield _csv_writer(file)
        elif kind == "npy":
            with _npy_writer(file, np.dtype(dtype), columns, rows) as write:
                yield write
        else:
            with _parquet_writer(file, dtype, columns, names, metadata) as write:
                yield write


# ----------------------------------------------------------------------------------------------------------- files


@contextmanager
def _naming(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = target
        raise


class _TargetFile(io.FileIO):
    """A file whose failing writes name the target: Python names a file only where opening it fails."""

    def __init__(self, file: str | int, target: str) -> None:
        super().__init__(file, "w")
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
    if is_special(target):
        with io.BufferedWriter(_TargetFile(target, target)) as file:
            yield file
        return
    with replacing(target, force=force) as file:
        yield file


@contextmanager
def replacing(target: str, *, force: bool) -> Iterator[BinaryIO]:
    """Write beside a file and rename, as `Flow.save` does: the same names, and the mode of a file that was there."""
    final = os.path.realpath(target)  # a symbolic link keeps pointing where it does
    mode = stat.S_IMODE(os.stat(final).st_mode) if os.path.exists(final) else None
    # Not derived from the target's name, which may be as long as the file system allows.
    name = f".nvpflow-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    unfinished = os.path.join(os.path.dirname(final), name)
    with _naming(target):
        allowed = 0o666 if mode is None else mode & 0o666  # less the umask
        number = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, allowed)
    try:
        with io.BufferedWriter(_TargetFile(number, target)) as file:
            if mode is not None:
                os.fchmod(number, mode)
            yield file
            file.flush()
            with _naming(target):
                os.fsync(number)
        if not force and os.path.exists(final):
            raise FileExistsError(f"{target} was created by someone else in the meantime (--force overwrites it)")
        with _naming(target):
            os.replace(unfinished, final)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


# ----------------------------------------------------------------------------------------------------------- kinds


def _header(names: Sequence[str]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(names)
    return line.getvalue().encode(errors="backslashreplace")


def _csv_writer(file: BinaryIO) -> Callable[..., None]:
    def write(block: Array, passed: Any = None, name: str = "", behind: Array | None = None) -> None:
        if passed is not None:
            from nvpflow import _arrow

            file.write(_arrow.csv_bytes(_arrow.appended(passed, name, block)))
            return
        digits = "%.9g" if block.dtype == np.float32 else "%.17g"
        columns = [digits] * (block.shape[1] if block.ndim == 2 else 1)
        if behind is None:
            cells = block.ravel().tolist()
        else:
            columns += ["%s"] * behind.shape[1]
            cells = [
                cell
                for row, last in zip(block.tolist(), behind.tolist(), strict=True)
                for cell in (*row, *map(_shortest, last))
            ]
        file.write(((",".join(columns) + "\n") * len(block) % tuple(cells)).encode())

    return write


def _shortest(value: float) -> str:
    """Write a number from a table as people do, such that it reads back exactly: 0.1, 5."""
    return repr(value).removesuffix(".0")


@contextmanager
def _parquet_writer(
    file: BinaryIO,
    dtype: str,
    columns: int | None,
    names: Sequence[str] | None,
    metadata: Mapping[bytes, bytes] | None,
) -> Iterator[Callable[..., None]]:
    try:
        from nvpflow import _arrow
    except ImportError as error:
        raise ImportError("writing .parquet needs pyarrow: pip install pyarrow") from error
    table = _arrow.ParquetTable(file, metadata)
    written = False

    def write(block: Array, passed: Any = None, name: str = "", behind: Array | None = None) -> None:
        nonlocal written
        written = True
        if passed is not None:
            table.write(_arrow.appended(passed, name, block))
            return
        flat = block if block.ndim == 2 else block[:, None]
        own, last = flat.shape[1], np.empty((len(flat), 0)) if behind is None else behind
        given = names or [f"column_{i + 1}" for i in range(own + last.shape[1])]
        rows = _arrow.table_of(flat, given[:own], range(own))
        for called, column in zip(given[own:], last.T, strict=True):
            rows = _arrow.appended(rows, called, column)
        table.write(rows)

    yield write
    if not written:
        write(np.empty((0, len(names) if names else columns or 1), dtype))
    table.close()


@contextmanager
def _npy_writer(
    file: BinaryIO, dtype: np.dtype[Any], columns: int | None, rows: int | None
) -> Iterator[Callable[..., None]]:
    """Write an array whose number of rows may become known only at the end."""
    tail = () if columns is None else (columns,)
    if rows is not None:
        file.write(_npy_header(dtype, (rows, *tail)))
        yield partial(_write_all, file, dtype)
        return
    # The header, which comes first, states the number of rows: they wait in a temporary file until they are counted.
    with tempfile.TemporaryFile() as waiting:
        yield partial(_write_all, waiting, dtype)
        counted = waiting.tell() // (dtype.itemsize * math.prod(tail))
        file.write(_npy_header(dtype, (counted, *tail)))
        waiting.seek(0)
        shutil.copyfileobj(waiting, file)


def _write_all(file: IO[bytes], dtype: np.dtype[Any], block: Array, behind: Array | None = None) -> None:
    whole = block if behind is None else np.hstack([block, behind])
    file.write(np.ascontiguousarray(whole, dtype=dtype).data)


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue()
