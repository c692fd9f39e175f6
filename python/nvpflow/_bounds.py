"""Bounds of columns and discrete ones: how users give them, and what becomes of rows behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks
from nvpflow._spec import support_in_words
from nvpflow.layers import Bounds, end

Array = NDArray[Any]
Pair = tuple[float | None, float | None]
BoundsArgument = Bounds | Mapping[str, Pair] | Mapping[int, Pair] | Sequence[Pair | None] | None
DiscreteArgument = Sequence[str] | Sequence[int] | None

_EXAMPLE = "{'share': (0, 1), 'duration': (0, None)}"


def checked(value: Any, size: int, names: Sequence[str] | None, discrete: Any = None) -> Bounds | None:
    """Return the layer that `bounds` and `discrete` of `nvpflow.build` ask for; None where they ask for nothing.

    A dict is by name or by index from 0, a sequence has an entry for each column. `names` are those of the columns,
    where they have some.
    """
    columns = _discrete(discrete, size, names)
    if isinstance(value, Bounds):
        if columns:
            raise ValueError(
                f"discrete is {_checks.shortened(repr(discrete))} beside bounds={value!r}, expected one of them; the "
                "layer has discrete= itself"
            )
        return _of_size(value, size)
    ends = {} if value is None else _pairs(value, size, names)
    if not ends and not columns:
        return None
    for j in columns:
        if j in ends:
            ends[j] = _cells(j, *ends[j])
    return Bounds(*zip(*(ends.get(j, (None, None)) for j in range(size)), strict=True), discrete=columns)


def _discrete(value: Any, size: int, names: Sequence[str] | None) -> tuple[int, ...]:
    """Return the places of columns that are called by name or by index from 0, ascending."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise TypeError(
            f"discrete is {_checks.describe(value)}, expected a sequence of columns such as ['count', 'rooms'] or "
            "[0, 3]"
        )
    columns = [column_of("discrete", key, size, names) for key in value]
    for i, column in enumerate(columns):
        if column in columns[:i]:
            raise ValueError(f"discrete names column {column + 1} twice, expected it once")
    return tuple(sorted(columns))


def _cells(column: int, low: float | None, high: float | None) -> Pair:
    """Return the edges of the cells of the least and the largest integer."""
    for value in (low, high):
        if value is not None and value != round(value):
            raise ValueError(
                f"the bounds of discrete column {column + 1} are ({_shown(low)}, {_shown(high)}), expected integers: "
                "the least and the largest that it holds"
            )
    return None if low is None else low - 0.5, None if high is None else high + 0.5


def _shown(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"


def _pairs(value: Any, size: int, names: Sequence[str] | None) -> dict[int, Pair]:
    """Return the intervals of the columns that have one."""
    if isinstance(value, Mapping):
        pairs: dict[int, Any] = {}
        for key, pair in value.items():
            column = column_of("bounds", key, size, names)
            if column in pairs:
                raise ValueError(f"bounds names column {column + 1} twice, by name and by index; expected it once")
            pairs[column] = pair
        entries = [(f"bounds[{key!r}]", pair) for key, pair in value.items()]
        return dict(zip(pairs, (_pair(name, pair) for name, pair in entries), strict=True))
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise TypeError(
            f"bounds is {_checks.describe(value)}, expected a dict such as {_EXAMPLE}, or a pair or None for each "
            "column"
        )
    if len(value) != size:
        raise ValueError(f"bounds has {len(value)} entries, expected {size}, a pair or None for each column")
    return {j: _pair(f"bounds[{j}]", pair) for j, pair in enumerate(value) if pair is not None}


def _of_size(bounds: Bounds, size: int) -> Bounds:
    if len(bounds.low) != size:
        raise ValueError(f"bounds is of {len(bounds.low)} columns, expected {size}")
    return bounds


def column_of(argument: str, key: Any, size: int, names: Sequence[str] | None) -> int:
    """Return the place of a column that `argument` calls by its name or by its index from 0."""
    if isinstance(key, str):
        if not names:
            raise ValueError(
                f"{argument} names column {key!r}, but the columns have no names; give column_names, or an index from 0"
            )
        if key not in names:
            shown = ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")
            raise ValueError(f"{argument} names column {key!r}, expected one of {shown}")
        return list(names).index(key)
    column = _checks.integer(f"a column of {argument}", key)
    if not 0 <= column < size:
        raise ValueError(f"{argument} names column {column}, expected 0 to {size - 1}, counted from 0, or a name")
    return column


def _pair(name: str, pair: Any) -> Pair:
    is_pair = isinstance(pair, (Sequence, np.ndarray)) and not isinstance(pair, (str, bytes)) and len(pair) == 2
    if not is_pair:
        raise TypeError(f"{name} is {_checks.describe(pair)}, expected a pair (low, high), None where there is no end")
    low, high = end(f"{name}[0]", pair[0], -np.inf), end(f"{name}[1]", pair[1], np.inf)
    if low is high is None:
        raise ValueError(f"{name} is {_checks.describe(pair)}, expected a number at one end at least")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"{name} is ({low:g}, {high:g}), expected its first number to be the smaller one")
    return low, high


def ends(bounds: Bounds) -> tuple[Array, Array]:
    """Return both ends [D], infinite where there is none."""
    low = np.array([-np.inf if value is None else value for value in bounds.low])
    return low, np.array([np.inf if value is None else value for value in bounds.high])


def of_columns(bounds: Bounds, columns: Sequence[int]) -> Bounds | None:
    """Return the bounds of some of the columns; None where these have none."""
    low, high = tuple(bounds.low[j] for j in columns), tuple(bounds.high[j] for j in columns)
    discrete = tuple(i for i, j in enumerate(columns) if j in bounds.discrete)
    nothing = not discrete and all(value is None for value in (*low, *high))
    return None if nothing else Bounds(low, high, discrete=discrete)


def inside(bounds: Bounds, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return the least and the largest numbers [D] of a dtype that lie inside."""
    low, high = ends(bounds)
    most = np.finfo(dtype).max
    least, largest = (np.clip(values, -most, most).astype(dtype) for values in (low, high))
    infinity = dtype.type(np.inf)
    least = np.where(np.isfinite(low) & (least <= low), np.nextafter(least, infinity), least)
    return least, np.where(np.isfinite(high) & (largest >= high), np.nextafter(largest, -infinity), largest)


def interval(bounds: Bounds, column: int) -> str:
    """Return a column's interval in words, or its integers."""
    return support_in_words(bounds, column)


def contains(bounds: Bounds, rows: Array) -> NDArray[np.bool_]:
    """Tell of each number of rows [n, D] whether its column can hold it.

    That is: neither outside nor on an edge, and an integer where the column is discrete. NaN is not.
    """
    low, high = ends(bounds)
    inside: NDArray[np.bool_] = (rows > low) & (rows < high)
    for j in bounds.discrete:
        inside[:, j] &= rows[:, j] == np.rint(rows[:, j])
    return inside


def forward(bounds: Bounds, rows: Array) -> NDArray[np.float64]:
    """Return rows [n, D] behind the bounds; what is outside is NaN or infinite."""

    def changed(x: Array, low: float | None, high: float | None) -> Array:
        of_low: Array = np.log(x - low) if low is not None else np.zeros_like(x)
        return of_low if high is None else of_low - np.log(high - x)

    return _by_column(bounds, rows, changed, free=None)


def inverse(bounds: Bounds, rows: Array) -> NDArray[np.float64]:
    """Return rows [n, D] in front of the bounds."""

    def changed(y: Array, low: float | None, high: float | None) -> Array:
        found: Array
        if low is None or high is None:
            found = high - np.exp(-y) if low is None else low + np.exp(y)
        else:
            e = np.exp(-np.abs(y))
            distance = (high - low) * (e / (1 + e))
            found = np.where(y < 0, low + distance, high - distance)
        return found

    return _by_column(bounds, rows, changed, free=None)


def slopes(bounds: Bounds, rows: Array) -> NDArray[np.float64]:
    """Return dx / dy of rows [n, D] behind the bounds."""

    def changed(y: Array, low: float | None, high: float | None) -> Array:
        found: Array = np.exp(-y if low is None else y)
        if low is not None and high is not None:
            e = np.exp(-np.abs(y))
            found = (high - low) * e / (1 + e) ** 2
        return found

    return _by_column(bounds, rows, changed, free=1.0)


def _by_column(bounds: Bounds, rows: Array, changed: Callable[..., Array], free: float | None) -> NDArray[np.float64]:
    """Return what each column with bounds is changed to, in float64; free: what the others become, None: themselves."""
    found = np.array(rows, dtype=np.float64)
    with np.errstate(all="ignore"):
        for j, (low, high) in enumerate(zip(bounds.low, bounds.high, strict=True)):
            if low is not None or high is not None:
                found[:, j] = changed(found[:, j].copy(), low, high)
            elif free is not None:
                found[:, j] = free
    return found


def in_front(bounds: Bounds | None, mean: Array, std: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation [D] of rows whose own, behind the bounds, are given; to first order."""
    if bounds is None:
        return mean, std
    return inverse(bounds, mean[None])[0], std * slopes(bounds, mean[None])[0]
