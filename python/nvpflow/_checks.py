"""Checks of arguments before they reach the extension: errors name the argument, what came and what was expected."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nvpflow._core import Flow, FlowSpec


def describe(value: object) -> str:
    """Return the value and its type for a message, cut to a length that a message can bear."""
    return f"{shortened(repr(value))} ({type(value).__name__})"


def shortened(text: str) -> str:
    """Return the text, cut to a length that a message can bear."""
    return text if len(text) <= 60 else text[:57] + "..."


def integer(name: str, value: Any, *, bits: int = 64, unsigned: bool = False) -> int:
    """Return `value` as an int that fits so many bits; bool is refused, it is almost always a mistake."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {describe(value)}, expected an integer")
    try:
        number = operator.index(value)
    except TypeError:  # an array of more than one element, for example
        raise TypeError(f"{name} is {describe(value)}, expected an integer") from None
    low, high = (0, 2**bits) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    if not low <= number < high:
        raise ValueError(f"{name} is {describe(number)}, expected {low} to {high - 1}")
    return number


def count(name: str, value: Any) -> int:
    """Return how many rows to draw; a shape, as other libraries take one, is answered with what works here."""
    if isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is {describe(value)}, expected an integer; rows have one axis: sample(5) draws five")
    number = integer(name, value)
    if number < 0:
        raise ValueError(f"{name} is {number}, expected 0 or more")
    return number


def real(name: str, value: Any) -> float:
    """Return `value`, any real number but a bool, as a float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {describe(value)}, expected a real number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer of {int(value).bit_length()} bits, expected at most 1024") from None


def boolean(name: str, value: Any) -> bool:
    """Return `value`, which must be a bool: 1, "no" or an array are not taken for one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {describe(value)}, expected True or False")
    return bool(value)


def text(name: str, value: Any) -> str:
    """Return `value`, which must be a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {describe(value)}, expected a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} is {describe(value)}, expected valid Unicode") from None
    return value


def sizes(name: str, value: Any, *, example: str = "(128, 128)") -> tuple[int, ...]:
    """Return a sequence of integers as a tuple; a single integer is refused, not wrapped."""
    wanted = f"a sequence of integers such as {example}"
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise TypeError(f"{name} is {describe(value)}, expected {wanted}")
    if isinstance(value, np.ndarray) and value.ndim != 1:
        raise TypeError(f"{name} has {value.ndim} dimensions, expected one: {wanted}")
    return tuple(integer(f"{name}[{i}]", item) for i, item in enumerate(value))


def standardize(value: Any) -> tuple[bool, str]:
    """Return whether there is to be a standardize layer, and which statistics `fit` is to set it from."""
    expected = "expected True, False, 'mean', 'robust' or 'covariance'"
    if isinstance(value, str):
        if value not in ("mean", "robust", "covariance"):
            raise ValueError(f"standardize is {value!r}, {expected}")
        return True, "auto" if value == "covariance" else value
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"standardize is {describe(value)}, {expected}")
    return bool(value), "auto"


def column_names(name: str, value: Any) -> list[str]:
    """Return a sequence of strings as a list, empty for None; a single string is refused, not taken apart."""
    if value is None:
        return []
    if isinstance(value, (str, bytes, Set, Mapping)) or not isinstance(value, Iterable):  # those have no order
        raise TypeError(f"{name} is {describe(value)}, expected a sequence of strings or None")
    return [text(f"{name}[{i}]", item) for i, item in enumerate(value)]


def repeated(names: Sequence[str]) -> str:
    """Return what to say of columns that share a name, "columns 1 and 3 are both called 'a'"; empty: none do."""
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if name and first.setdefault(name, i) != i:
            return f"columns {first[name] + 1} and {i + 1} are both called {shortened(repr(name))}"
    return ""


def dtype_name(name: str, value: DTypeLike) -> str:
    """Return the name NumPy gives to a dtype: np.float32 and "f4" both give "float32"."""
    message = f"{name} is {describe(value)}, expected a dtype, 'float32' or 'float64'"
    if value is None:  # float64 to NumPy, not a choice the caller made
        raise TypeError(message)
    try:
        return np.dtype(value).name
    except (TypeError, UnicodeError):
        raise TypeError(message) from None


def path(name: str, value: str | os.PathLike[str]) -> str:
    """Return a path as a str."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {describe(value)}, expected a str or an os.PathLike")
    return os.fsdecode(value)


def array(name: str, value: ArrayLike, dtype: DTypeLike) -> NDArray[Any]:
    """Return `value` as a C-contiguous array of `dtype`: itself where it is one, a copy where NumPy calls that safe."""
    wanted = np.dtype(dtype)
    given = _as_array(name, value)
    if not np.can_cast(given.dtype, wanted, "safe"):
        hint = f"; convert it yourself: np.asarray(..., dtype=np.{wanted})" if given.dtype.kind in "fiu" else ""
        raise TypeError(f"{name} has dtype {given.dtype}, which NumPy does not convert to {wanted} safely{hint}")
    return np.asarray(given, dtype=wanted, order="C")


def _as_array(name: str, value: Any) -> NDArray[Any]:
    """Return `value` as NumPy reads it, in its own dtype."""
    unmasked(name, value)
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # ragged lists and the like
        raise TypeError(f"{name} cannot be read as an array of numbers") from error


def numbers(name: str, value: Any) -> NDArray[Any]:
    """Return `value` as an array of real numbers in its own dtype; false and true are 0 and 1."""
    given = _as_array(name, value)
    if given.dtype.kind == "b":
        return given.astype(np.uint8)
    if given.dtype.kind not in "fiu":
        way = "; encode text as numbers: a category as columns of 0 and 1" if given.dtype.kind in "US" else ""
        raise TypeError(f"{name} has dtype {given.dtype}, expected real numbers{way}")
    return given


def reshaped(name: str, shape: tuple[int, ...], columns: int) -> str:
    """Return what to say of numbers that were to be rows of one column; "" of all else."""
    return f"; np.reshape({name}, (-1, 1)) makes a row of each number" if columns == 1 == len(shape) else ""


def unmasked(name: str, value: object) -> None:
    """Check that no value is hidden by a mask: NumPy's conversions would bring it back."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(f"{name} is a masked array with masked values, expected none; fill or remove them")


def rows(name: str, value: ArrayLike, spec: FlowSpec, *, one_row: bool = False) -> NDArray[Any]:
    """Return rows of data [N, D] as a C-contiguous array of the spec's dtype, or of float64 where the flow takes that.

    one_row: [D] is taken for [1, D].
    """
    given = _as_array(name, value)
    dtype = np.dtype(spec.dtype)
    if spec._takes_float64_rows and not np.can_cast(given.dtype, dtype, "safe"):
        dtype = np.dtype(np.float64)
    if not np.can_cast(given.dtype, dtype, "safe"):
        way = _way_out(name, given, spec)
        raise TypeError(f"{name} has dtype {given.dtype}, which NumPy does not convert to {dtype} safely{way}")
    found = np.asarray(given, dtype=dtype, order="C")
    found = found[None] if one_row and found.ndim == 1 else found
    if found.ndim != 2 or found.shape[1] != spec.input_size:
        raise ValueError(f"{name} has shape {found.shape}, expected [N, {spec.input_size}]")
    return found


def _way_out(name: str, given: NDArray[Any], spec: FlowSpec) -> str:
    if given.dtype.kind not in "fiu":
        return ""
    if given.dtype.kind == "f" and given.dtype.itemsize > 8:
        return "; convert it yourself: np.asarray(..., dtype=np.float64)"
    if spec._is_bounded:
        return (
            f"; convert it with {name}.astype(np.float32), which carries no row out of the base's interval, or build "
            "the flow with dtype='float64' (flow.astype('float64') gives a copy)"
        )
    return (
        "; build the flow with standardize=True, which takes float64 rows as they are, or with dtype='float64' "
        "(flow.astype('float64') gives a copy); a cast to float32 loses digits where values are large beside their "
        "spread"
    )


def whole_mean(flow: Flow) -> None:
    """Check that the flow's dtype holds its mean: parameters that another library owns have no low part."""
    if flow._mean_low() is not None:
        raise ValueError(
            "flow has a standardize_0.mean_low, because float32 does not hold the means of its data, and float32 rows "
            "would lose their digits here; pass flow.astype('float64')"
        )


def no_discrete(name: str, spec: FlowSpec) -> None:
    """Check that no column is discrete: what rounds samples and scores integers alone is nvpflow's own."""
    if columns := getattr(spec.layers[0], "discrete", ()):
        shown = ", ".join(str(column + 1) for column in columns[:12]) + (", ..." if len(columns) > 12 else "")
        raise ValueError(
            f"{name} has discrete columns ({shown}), expected none: their samples are rounded, and fit adds noise to "
            "them; train and run this flow by nvpflow.Flow, or by nvpflow in C++ or C"
        )


def names(name: str, given: Iterable[str], expected: Sequence[str]) -> None:
    """Check that `given` holds the names that a flow's parameters have."""
    found, known = dict.fromkeys(given), frozenset(expected)
    if missing := [key for key in expected if key not in found]:
        raise ValueError(f"{name} lacks {_listed(missing)}")
    if unknown := [key for key in found if key not in known]:
        raise ValueError(f"{name} holds {_listed(unknown)}, expected names of this flow's parameters only")


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
