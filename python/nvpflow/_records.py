"""What `History` and `DensityHistory` share: records as arrays of one length, beside what a run was as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from nvpflow import _html

Self = TypeVar("Self", bound="Records")


class Column(NamedTuple):
    """A column of the table of records."""

    heading: str
    name: str
    width: int
    format: str


class Records:
    """The base of a frozen dataclass whose fields are annotated as arrays of NumPy, and as numbers and texts."""

    _COUNTER: ClassVar[str]
    """The array that numbers the records, "epoch"; `best_epoch` is the number of the best one, 0 of none."""
    _WHAT: ClassVar[str]
    """What messages call it, "the history"."""
    _COLUMNS: ClassVar[tuple[Column, ...]]
    _LATER: ClassVar[frozenset[str]] = frozenset()
    """Fields that older versions did not have."""

    @classmethod
    def _arrays(cls) -> dict[str, Any]:
        """Return the dtype of each array."""
        kinds: Any = fields(cls)  # type: ignore[arg-type]
        return {
            field.name: np.int64 if field.type == "NDArray[np.int64]" else np.float64
            for field in kinds
            if str(field.type).startswith("NDArray")
        }

    @classmethod
    def _scalars(cls) -> dict[str, Callable[[Any], Any]]:
        """Return what makes each other field of a number, a text or a dict."""
        kinds: Any = fields(cls)  # type: ignore[arg-type]
        return {field.name: _KINDS[field.type] for field in kinds if not str(field.type).startswith("NDArray")}

    @classmethod
    def _of_records(cls: type[Self], records: list[Mapping[str, Any]], rest: Mapping[str, Any]) -> Self:
        """Return what the compiled loop tells; its records have the names of the arrays here."""
        values: dict[str, Any] = {
            name: np.array([record[name] for record in records], dtype=dtype) for name, dtype in cls._arrays().items()
        }
        return cls(**values, **{name: kind(rest[name]) for name, kind in cls._scalars().items()})

    def __len__(self) -> int:
        """Return the number of records."""
        return len(getattr(self, self._COUNTER))

    def _marked(self) -> list[tuple[str, int]]:
        """Return the first, the best and the last record, by index."""
        at_best = np.flatnonzero(getattr(self, self._COUNTER) == getattr(self, f"best_{self._COUNTER}"))
        marks = [("first", 0), *(("best", int(i)) for i in at_best), ("last", len(self) - 1)]
        return marks if len(self) else []

    def _columns(self) -> tuple[Column, ...]:
        return self._COLUMNS

    def _said(self) -> list[str]:
        """Return the sentences of a summary: the first one stands above the table, the others below it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return a table of the first, the best and the last record."""
        columns, (summary, *more) = self._columns(), self._said()
        lines = ["       " + "".join(f"  {column.heading:>{column.width}}" for column in columns)]
        for mark, i in self._marked():
            numbers = (f"{getattr(self, c.name)[i]:{c.format}}" for c in columns)
            row = (f"  {number:>{column.width}}" for number, column in zip(numbers, columns, strict=True))
            lines.append(f"  {mark:<5}" + "".join(row))
        return "\n".join([f"{type(self).__name__}: {summary}", *lines, *more])

    def _repr_html_(self) -> str:
        """Return a table of the first, the best and the last record, for notebooks."""
        columns = self._columns()
        lines = [
            (mark, *(f"{getattr(self, column.name)[i]:{column.format}}" for column in columns))
            for mark, i in self._marked()
        ]
        head = ("", *(column.heading for column in columns))
        return _html.table(f"{type(self).__name__}: {'; '.join(self._said())}", head, lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as lists and numbers of Python, NaN where nothing was measured."""
        kinds: Any = fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in kinds}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """Return the history that `to_dict` has made `values` of, also by way of JSON (None stands for NaN).

        Raises
        ------
        ValueError
            `values` is not what `to_dict` returns.
        """
        arrays, scalars, what = cls._arrays(), cls._scalars(), cls._WHAT
        needed = [name for name in [*arrays, *scalars] if name not in cls._LATER]
        if set(values) - cls._LATER != set(needed):
            raise ValueError(f"{what} holds {', '.join(map(str, values))}, expected {', '.join(needed)}")
        try:
            given: dict[str, Any] = {name: np.array(values[name], dtype=dtype) for name, dtype in arrays.items()}
            given |= {name: kind(values[name]) for name, kind in scalars.items() if name in values}
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{what} holds something else ({error}), expected lists of numbers of one length"
            ) from error
        if any(given[name].shape != (len(given[cls._COUNTER]),) for name in arrays):
            lengths = {name: given[name].shape for name in arrays}
            raise ValueError(f"{what}'s lists have shapes {lengths}, expected one length")
        return cls(**given)


def _measured(value: Any) -> float | None:
    """Return a number, or None for what was not measured, which the compiled loop calls infinite."""
    return None if value is None or math.isinf(value) else float(value)


_KINDS: dict[Any, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "float | None": _measured,
    "str": str,
    "dict[str, str]": dict,
}
