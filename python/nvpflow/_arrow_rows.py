"""Rows of tables that speak Arrow's C stream interface: the compiled part gathers them from the columns."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _core

Array = NDArray[Any]

_DTYPES = {  # of Arrow's letters; false and true are 0 and 1
    "b": "uint8",
    "c": "int8",
    "C": "uint8",
    "s": "int16",
    "S": "uint16",
    "i": "int32",
    "I": "uint32",
    "l": "int64",
    "L": "uint64",
    "e": "float16",
    "f": "float32",
    "g": "float64",
}


@functools.lru_cache(maxsize=64)
def _common(formats: tuple[str, ...]) -> np.dtype[Any] | None:
    """Return the narrowest dtype that holds all columns; None where one is not of plain numbers, or there is none."""
    if not formats or "" in formats:
        return None
    return np.result_type(*(_DTYPES[letter] for letter in formats))


class ArrowRows:
    """The columns of a table, which become rows [N, D] of the dtype that is asked for. Nulls are NaN.

    The dtype goes by the types of the columns alone, and so not by whether a part of a table holds nulls.
    """

    def __init__(self, columns: _core.ArrowColumns, common: np.dtype[Any]) -> None:
        self._columns = columns
        self._common = common
        self._overflowed = False

    def converted(self, dtype: str, *, wide: bool = False) -> Array:
        """Return the rows; wide: in float64 where `dtype` rounds."""
        if wide and not np.can_cast(self._common, dtype, "safe"):
            dtype = "float64"
        rows, self._overflowed = self._columns.gather(dtype, self._common == np.float64)
        return rows

    def are_finite(self, rows: Array) -> NDArray[np.bool_]:
        """Tell which rows hold finite numbers alone, also where those that `converted` gave overflowed."""
        exact = self._columns.gather("float64", True)[0] if self._overflowed else rows
        return np.asarray(np.isfinite(exact).all(axis=1))


def read(table: Any) -> ArrowRows | None:
    """Return a table's rows; None where it does not speak Arrow's stream interface, or has other columns than numbers.

    Parameters
    ----------
    table
        With the columns of the rows alone, in their order.
    """
    if not hasattr(table, "__arrow_c_stream__"):
        return None
    columns = _core._arrow_columns(table)
    common = _common(columns.formats)
    return None if common is None else ArrowRows(columns, common)


def arrow_array(values: Array) -> Any:
    """Return numbers [N] as an Arrow array that looks at them: `pyarrow.array` copies, and imports pandas."""
    import pyarrow as pa

    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
