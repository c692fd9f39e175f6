"""Rows that are not an array: frames, whose columns have names and types, and other things that people pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks

Array = NDArray[Any]

_DATES = ("date", "time", "duration", "period", "timestamp")  # beginnings of such types' names, in any library


@dataclass(frozen=True)
class Problem:
    """A column that cannot be read as numbers."""

    column: int
    text: str
    remedy: str
    kind: str = "type"


class Frame:
    """A frame of pandas, polars or pyarrow, or of another library that is used as they are.

    Parameters
    ----------
    frame
        The frame.
    name
        Of the argument, for messages.

    Attributes
    ----------
    names
        Of its columns, where they are strings.
    width
        How many columns there are.
    """

    def __init__(self, frame: Any, name: str = "x") -> None:
        self._frame = frame
        named = getattr(frame, "column_names", None) if _library(frame) == "pyarrow" else frame.columns
        given: list[Any] = list(named if named is not None else frame.columns)
        self.width = len(given)
        strings = sum(isinstance(name, str) for name in given)
        if 0 < strings < len(given):
            raise TypeError(
                f"{name} has columns with names of several types ({_checks.shortened(repr(given))}), expected strings; "
                f"rename them, {name}.columns = {name}.columns.astype(str) for example"
            )
        self.names = [str(name) for name in given] if strings else None
        if twice := _checks.repeated(self.names or ()):
            raise ValueError(
                f"{name} has two columns of one name: {twice}, expected a name for each; rename or drop one"
            )

    def column(self, number: int) -> Any:
        """Return a column, in the library's own form."""
        if _library(self._frame) == "polars":
            return self._frame.to_series(number)
        return self._frame.column(number) if _library(self._frame) == "pyarrow" else self._frame.iloc[:, number]

    def _types(self) -> list[Any]:
        if _library(self._frame) == "pyarrow":
            return list(self._frame.schema.types)
        return list(self._frame.dtypes)

    def problems(self) -> list[Problem]:
        """Return the columns that do not hold real numbers, and the way out of each."""
        found = []
        for i, dtype in enumerate(self._types()):
            kind = _kind(dtype)
            if kind in "iufb":
                continue
            text = f"is {dtype}"
            if kind == "M":
                remedy = "convert it to seconds, from its first moment on, or drop it"
            else:
                remedy = "encode it as numbers, or drop it"
            found.append(Problem(i, text, remedy))
        return found

    def array(self, columns: Sequence[int] | None = None) -> Array:
        """Return these columns (None: all) as an array [N, D], of the narrowest dtype that holds all.

        Nulls are NaN, false and true are 0 and 1.
        """
        wanted = range(self.width) if columns is None else columns
        types = self._types()
        plain = all(isinstance(dtype, np.dtype) and dtype.kind != "b" for dtype in types)
        if self.width and len(wanted) == self.width and plain:
            return np.asarray(self._frame)
        parts = [self._numbers(i, types[i]) for i in wanted]
        return np.column_stack(parts) if parts else np.empty((len(self._frame), 0), np.float32)

    def _numbers(self, number: int, dtype: Any) -> Array:
        column = self.column(number)
        if _kind(dtype) == "b":
            return _truths(column)
        if isinstance(dtype, np.dtype) or _library(self._frame) != "pandas":
            return np.asarray(column.to_numpy())
        plain = getattr(dtype, "numpy_dtype", None)
        if plain is None:  # sparse
            return np.asarray(column)
        if plain.kind != "f" and column.isna().any():
            plain = np.dtype(np.float64)
        return np.asarray(
            column.to_numpy(dtype=plain, na_value=np.nan) if plain.kind == "f" else column.to_numpy(plain)
        )


def _truths(column: Any) -> Array:
    """Return a column of false, true and perhaps nulls as the numbers 0, 1 and NaN."""
    values = np.asarray(column.to_numpy())
    if values.dtype == bool:
        return values.astype(np.uint8)
    # Each library has a null of its own, and none of them is equal to itself or to a bool.
    return np.array([float(v) if isinstance(v, (bool, np.bool_)) else np.nan for v in values], np.float32)


def _library(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def _kind(dtype: Any) -> str:
    """Return NumPy's letter for the kind of a column's type: i, u, f are real numbers, M dates, b bool, O the rest."""
    text = str(dtype).lower()
    kind = getattr(dtype, "kind", None)
    if isinstance(kind, str):
        return "M" if kind == "m" or text.startswith(_DATES) else kind
    if text.startswith("bool"):
        return "b"
    if text.startswith(_DATES):
        return "M"
    if text.startswith(("int", "uint")) and not text.endswith("128"):  # NumPy's end at 64 bits
        return "i"
    return "f" if text.startswith(("float", "double", "halffloat")) else "O"


def inspect(value: object, name: str = "x") -> Frame | None:
    """Return the frame that `value` is, or None."""
    if isinstance(value, (np.ndarray, list, tuple, int, float)) or type(value).__name__ == "LazyFrame":
        return None  # to ask a LazyFrame for its columns would be a warning of polars
    try:
        is_table = hasattr(value, "columns") and (hasattr(value, "dtypes") or hasattr(value, "schema"))
        is_frame = is_table and (hasattr(value, "__array__") or hasattr(value, "__dataframe__"))
        return Frame(value, name) if is_frame else None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} has a column whose name is not UTF-8 ({_checks.shortened(repr(error.object))}), expected strings; "
            f"rename it, {name}.rename_columns([...])"
        ) from error


def labels(names: Sequence[str] | None, count: int, column: str = "column") -> list[str]:
    """Return how messages call the columns: by name, or by number counted from 1."""
    if names:
        return [f"{column} {_checks.shortened(repr(name))}" for name in names]
    return [f"{column} {i + 1}" for i in range(count)]


def read(
    name: str, value: Any, expected: Sequence[str] | None, source: str = "column_names"
) -> tuple[Any, list[str] | None]:
    """Return rows as an array, and the names of their columns where they came in a frame.

    Parameters
    ----------
    name
        Of the argument, for messages.
    value
        An array, which is returned as it is; a frame, whose columns must be numbers; or what else people try.
    expected
        Names that the columns of a frame must have, in this order; None or empty: any.
    source
        Of these names: "column_names", or "context_names" for a context.

    Raises
    ------
    TypeError
        Columns that are not numbers are named, all in one message, with the way out. Or `value` is not a table.
    ValueError
        The names or their order differ.
    """
    if isinstance(value, np.ndarray):
        return value, None
    frame = inspect(value, name)
    if frame is None:
        refuse(name, value, source)
        if expected and (row := _labels_of_row(value)):
            check_names(name, row, expected, source)
        return value, None
    if text := not_numbers(name, value):
        raise TypeError(text)
    if frame.names is not None and expected:
        check_names(name, frame.names, expected, source)
    return frame.array(), frame.names


def _labels_of_row(value: Any) -> list[str]:
    """Return the labels of one row of a frame of pandas, which is a Series; empty where they are no names."""
    if _library(value) != "pandas" or getattr(value, "ndim", 0) != 1:
        return []
    labels = list(value.index)
    return labels if all(isinstance(label, str) for label in labels) else []


def rows(value: Any, name: str, expected: Sequence[str] | None, source: str) -> Any:
    """Return `read`'s array: what the compiled methods call where an argument is not an array."""
    return read(name, value, expected, source)[0]


def not_numbers(name: str, value: Any) -> str | None:
    """Return what to say of a frame whose columns are not all numbers, with the ways out; None where they are."""
    frame = inspect(value, name)
    bad = [] if frame is None else frame.problems()
    if frame is None or not bad:
        return None
    called = labels(frame.names, frame.width)
    lines = [f"{called[problem.column]} {problem.text}: {problem.remedy}" for problem in bad]
    if len(lines) == 1:
        return f"{name}: {lines[0]}"
    return f"{name}, {len(lines)} columns that are not numbers:\n" + "\n".join(f"  {line}." for line in lines)


def check_names(name: str, given: Sequence[str], expected: Sequence[str], source: str) -> None:
    """Check that a frame's columns have the names that the flow knows, in the same order."""
    if list(given) == list(expected):
        return
    missing = [column for column in expected if column not in given]
    unknown = [column for column in given if column not in expected]
    if not missing and (unknown or len(given) != len(expected)):
        wrong = f"has columns that the flow was not trained with ({_listed(unknown or given)})"
    elif missing:
        wrong = f"lacks columns that the flow was trained with ({_listed(missing)})"
        if unknown:
            wrong += f" and has others ({_listed(unknown)})"
    else:
        at = next(i for i, pair in enumerate(zip(given, expected, strict=True)) if pair[0] != pair[1])
        wrong = (
            f"has columns in another order: column {at + 1} is {_quoted(given[at])}, the flow was trained with "
            f"{_quoted(expected[at])} there"
        )
    of_rows = "x" if source == "column_names" else "context"
    frame = name if name.isidentifier() else of_rows
    way = f"take them by name, {frame}[list(flow.{source})]" if not missing else "rename them"
    raise ValueError(f"{name} {wrong}; {way}, or pass an array, without names, if only the names differ")


def _quoted(text: str) -> str:
    return _checks.shortened(repr(text))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(_quoted, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def refuse(name: str, value: Any, source: str = "column_names") -> None:
    """Raise TypeError for what people pass in place of rows, with what to pass instead; return for all else.

    `source` tells rows from contexts, as in `read`.
    """
    if isinstance(value, (list, tuple, int, float, np.generic)) or hasattr(value, "__dlpack__"):
        return
    kind = type(value).__name__
    bases = {base.__name__ for base in type(value).__mro__}
    way = None
    expected, argument = ("contexts [N, C] or [C]", "context") if source == "context_names" else ("rows [N, D]", "x")
    if isinstance(value, (str, bytes, os.PathLike)) or hasattr(value, "readline"):
        way = "read the file first, numpy.load(path) or pandas.read_csv(path); the command `nvpflow fit` takes files"
    elif hasattr(value, "toarray"):
        way = f"{argument}.toarray(), for sparse ones are not read"
    elif value is None:
        way = "an array of shape [N, D]"
    elif "DataLoader" in bases:
        way = (
            "all rows at once, torch.cat([batch[0] for batch in loader]), and give batch_size; for a loop of your own "
            "over batches take nvpflow.torch.FlowModule"
        )
    elif "Dataset" in bases or hasattr(value, "tensors"):
        way = "its rows as one tensor, dataset.tensors[0] or torch.stack([item[0] for item in dataset])"
    elif "LazyFrame" in bases:
        way = f"its rows, {argument}.collect()"
    elif isinstance(value, Mapping) and argument == "context":
        way = "take the numbers by name, [context[name] for name in flow.context_names]; a frame holds many"
    elif isinstance(value, Mapping):
        way = "one array, numpy.column_stack(list(x.values())), or a frame, pandas.DataFrame(x)"
    elif isinstance(value, Iterator):
        way = f"all rows at once, numpy.stack(list({argument}))"
    elif hasattr(value, "log_prob") and hasattr(value, "sample"):
        way = "rows drawn from it: a flow learns from samples"
    elif isinstance(value, (set, frozenset)):
        way = "a list, which has an order"
    if way is not None:
        raise TypeError(f"{name} is {_article(kind)} {kind}, expected {expected} in an array or a frame: {way}")


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"
