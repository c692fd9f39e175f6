"""What every kind of file of `nvpflow.data_io` gives: blocks of rows, and all that is wrong with the table."""

from __future__ import annotations

import io
import select
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from numpy.typing import NDArray

from nvpflow import _checks
from nvpflow._text import counted

Array = NDArray[Any]

BLOCK_VALUES = 1 << 20
TRUTHS = {"true": 1.0, "false": 0.0}  # words that are numbers
SHOWN = 3  # of the rows in which something was found


class DataError(ValueError):
    """A table cannot be used; the message names the file and everything that is wrong with it."""


@dataclass
class Piece:
    """A block as a source gives it: the rows of the columns asked for, what is handed on, and where its rows are."""

    rows: Array
    passed: Any  # a pyarrow.Table, or None
    labels: Callable[[Sequence[int]], list[int]]


class Source(Protocol):
    """A kind of file."""

    name: str
    names: list[str] | None
    width: int
    rows: int | None
    unit: str
    notes: Sequence[str]

    def mapped(self) -> Array | None:
        """Return the rows as one memory-mapped array, where the file allows it."""

    def index_column(self) -> int | None:
        """Return the column that pandas wrote a frame's index to."""

    def pieces(self, used: Sequence[int], passed: Sequence[int], typed: bool, problems: Problems) -> Iterator[Piece]:
        """Yield the table; columns that are not numbers go to `problems`."""


@dataclass
class _Cells:
    """Cells of a column: how often and where first; of those that are not numbers the kind and an example or type."""

    count: int = 0
    first: list[int] = field(default_factory=list)
    kind: str = ""
    example: str = ""

    def add(self, count: int, first: Sequence[int]) -> None:
        self.count += count
        self.first += list(first)[: SHOWN - len(self.first)]


# Kinds of cells that are not numbers, and the remedy where it is not to leave the column out.
WAYS_OUT = {
    "dates": "a date becomes a number as, for example, seconds since the first one",
    "numbers with a decimal comma": "write them with a point (pandas: read_csv(decimal=','))",
}


class Problems:
    """All that is wrong with a table, for one message."""

    def __init__(self, name: str, unit: str) -> None:
        self.name = name
        self.unit = unit
        self.general: list[str] = []
        self.ragged = _Cells()
        self.wrong: dict[int, _Cells] = {}
        self.missing: dict[int, _Cells] = {}
        self.incomplete = 0  # rows with missing cells
        self.in_place = False  # no row may be left out
        self.names: list[str] | None = None
        self.notes: list[str] = []
        self.needless: set[int] = set()  # columns that another remedy leaves out
        self.needed: set[int] = set()  # columns that cannot be left out

    def __bool__(self) -> bool:
        return bool(self.general or self.ragged.count or self.wrong or self.missing)

    def add_wrong(self, column: int, kind: str, count: int, first: Sequence[int], example: str = "") -> None:
        """Note cells of a column that are not numbers."""
        cells = self.wrong.setdefault(column, _Cells(kind=kind, example=example))
        cells.add(count, first)

    def add_missing(self, column: int, count: int, first: Sequence[int]) -> None:
        """Note cells of a column that are empty."""
        self.missing.setdefault(column, _Cells()).add(count, first)

    def raise_all(self) -> None:
        """Raise a DataError for everything that was found."""
        if self:
            for column in self.needless:
                self.wrong.pop(column, None)
                self.missing.pop(column, None)
            parts = [*self.general, *self._ragged(), *self._wrong(), *self._missing(), *self.notes]
            if self.unit == "row" and self.missing:
                parts.append("rows are counted from 0")
            raise DataError(f"{self.name}: {'; '.join(parts)}")

    def _ragged(self) -> Iterator[str]:
        if self.ragged.count:
            more = self.ragged.count - 1
            yield self.ragged.example + (f" (and {counted(more, 'more line')} like it)" if more else "")

    def _wrong(self) -> Iterator[str]:
        if not self.wrong:
            return
        shown = []
        for column, cells in sorted(self.wrong.items()):
            found = (
                f"first {_checks.shortened(repr(cells.example))}, {self._where(cells)}"
                if cells.first
                else cells.example
            )
            shown.append(f"{self.column(column)} holds {cells.kind} ({found})")
        ways = [way for kind, way in WAYS_OUT.items() if any(cells.kind == kind for cells in self.wrong.values())]
        spare = [option_value(self.names[i] if self.names else str(i + 1)) for i in sorted({*self.wrong} - self.needed)]
        if spare:
            ways.append(f"--drop {','.join(spare)} leaves them out")
        if self.needed & {*self.wrong}:
            ways.append("encode those of the context as numbers")
        yield f"{', '.join(shown)}: expected numbers; {'; '.join(ways)}"

    def _missing(self) -> Iterator[str]:
        if self.missing:
            shown = ", ".join(
                f"{self.column(column)} ({self._where(cells)})" for column, cells in sorted(self.missing.items())
            )
            rows = counted(self.incomplete, "row")
            ways = f"--missing skip leaves {rows} out, --missing nan takes the cells as NaN"
            if self.in_place:
                ways = f"--missing nan takes them as NaN, and gives NaN for {rows}"
            yield f"missing cells in {shown}: {ways}"

    def _where(self, cells: _Cells) -> str:
        unit = self.unit if cells.count == 1 else f"{self.unit}s"
        listed = ", ".join(map(str, cells.first)) + (", ..." if cells.count > len(cells.first) else "")
        return f"{unit} {listed}" if cells.count <= len(cells.first) else f"{cells.count:,} cells, {unit} {listed}"

    def column(self, number: int) -> str:
        """Return a column's name, or its number counted from 1."""
        if self.names is not None and self.names[number]:
            return _checks.shortened(repr(self.names[number]))
        return f"column {number + 1}"


def numbered(first: int, rows: Sequence[int]) -> list[int]:
    """Return the numbers, counted from 0, of rows of a block that begins at `first`."""
    return [first + row for row in rows]


def option_value(name: str) -> str:
    """Return a name as a list of an option takes it, in one word of the shell."""
    import shlex

    return shlex.quote('"' + name.replace('"', '""') + '"') if any(mark in name for mark in ',"') else shlex.quote(name)


def rows_per_block(columns: int) -> int:
    """Return how many rows of so many columns make a block of some megabytes."""
    return max(1, BLOCK_VALUES // max(1, columns))


class Stream(io.RawIOBase):
    """A stream that can be looked into before it is read; one that does not block is waited for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._head = b""
        self._rest = stream

    def peek(self, size: int) -> bytes:
        """Return the next bytes, as many as asked for if there are so many, and leave them there."""
        while len(self._head) < size and (more := self._next(size - len(self._head))):
            self._head += more
        return self._head[:size]

    def _next(self, size: int) -> bytes:
        while (data := self._rest.read(size)) is None:  # nothing there yet
            select.select([self._rest], [], [])
        return data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._next(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
