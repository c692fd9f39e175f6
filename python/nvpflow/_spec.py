"""`FlowSpec` with arguments that are checked here: the functions that pybind11 makes name none in their messages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _bases, _checks, _hints
from nvpflow._bases import NORMAL, Base
from nvpflow._core import FileFormatError, FlowSpec
from nvpflow._expression import from_json as part_of
from nvpflow._text import counted
from nvpflow.layers import Bounds, Coupling, Layer, LULinear, Spline, Standardize, checked, layer_of

__all__ = [
    "FlowSpec",
    "begins_with_standardize",
    "bounds_of",
    "in_words",
    "regular",
    "standardize_name",
    "untransformed",
    "whitens",
]

MOST_LAYERS = 1 << 16
_SHOWN_LAYERS, _SHOWN_ENDS = 512, 3  # of a repr: all of so many layers, else so many of the first and of the last


def layers_of(spec: FlowSpec) -> tuple[Layer, ...]:
    """Return the layers, the one first applied to data first."""
    return tuple(map(layer_of, json.loads(spec._to_full_json())["layers"]))


def base_of(spec: FlowSpec) -> Base:
    """Return the base of a spec."""
    return part_of(_bases.KINDS, json.loads(spec._to_full_json())["base"])


def from_layers(
    input_size: int,
    layers: Iterable[Layer],
    dtype: str = "float32",
    context_size: int = 0,
    standardize_context: bool = False,
    base: str | Base = "normal",
) -> FlowSpec:
    """Return the spec of a flow with these layers of `nvpflow.layers`, the one first applied to data first.

    Parameters
    ----------
    input_size
        D, the number of features, at least 2; at least 1 with a context.
    layers
        At least one of them is a coupling. They may differ in every field.
    dtype
        "float32" or "float64".
    context_size
        C, how many numbers condition each row; 0: none.
    standardize_context
        Standardize the context by a mean and a standard deviation per number, which `fit` sets from the data.
    base
        What latents are: "normal", "uniform" for ``Uniform(0, 1)``, "student_t", "mixture", or an object of
        `nvpflow.layers`.

    Raises
    ------
    TypeError
        `layers` has no order, or holds something else than a layer; `base` is none.
    ValueError
        A field of a layer does not go with the sizes or the dtype, or there is no coupling.
    """
    size, name = _checks.integer("input_size", input_size), _checks.dtype_name("dtype", dtype)
    context = _checks.integer("context_size", context_size)
    standardized = _checks.boolean("standardize_context", standardize_context)
    latents = _bases.checked(base)
    array = isinstance(layers, np.ndarray)  # of any shape: one of a single layer is no sequence
    if array or isinstance(layers, (str, bytes, Set, Mapping)) or not isinstance(layers, Iterable):  # or has no order
        raise TypeError(f"layers is {_checks.describe(layers)}, expected a sequence of layers of nvpflow.layers")
    entries = []
    for i, given in enumerate(layers):
        layer = checked(f"layers[{i}]", given)
        if i == MOST_LAYERS:
            raise ValueError(f"layers holds more than {MOST_LAYERS} layers, expected at most that many")
        masked = getattr(layer, "_mask_size", None)
        if masked not in (None, size):
            name = f"layers[{i}].{layer._masked}"
            raise ValueError(f"{name} is a mask of {masked} features, expected {size}, the input_size")
        entries.append(layer._to_json())
    document = {
        "input_size": size,
        "context_size": context,
        "standardize_context": standardized,
        "dtype": name,
        "base": latents._to_json(),
        "layers": entries,
    }
    try:
        return FlowSpec.from_json(json.dumps(document))
    except FileFormatError as error:  # no file is in question
        raise ValueError(str(error)) from None


def from_json(text: str) -> FlowSpec:
    """Return the spec that `to_json` was called on; pickles name this function."""
    return FlowSpec.from_json(text)


def regular(spec: FlowSpec) -> dict[str, Any] | None:
    """Return the arguments of `FlowSpec` that make this spec; None where only its layers say what it is."""
    if spec.context_size:
        return None
    names = ("input_size", "num_flows", "hidden_sizes", "activation", "scale_bound", "standardize", "dtype")
    try:
        arguments = {name: getattr(spec, name) for name in names}
    except AttributeError:  # no one value for all couplings
        return None
    return arguments if FlowSpec(**arguments) == spec else None


def _repr(spec: FlowSpec) -> str:
    """Return the call that makes a spec, of long ones the most of it."""
    arguments = regular(spec)
    if arguments is not None:
        return f"FlowSpec({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    lines = "".join(f"\n    {line}," for line in _shown(layers_of(spec)))
    rest = [f"dtype={spec.dtype!r}"]
    if spec.context_size:
        rest += [f"context_size={spec.context_size}", f"standardize_context={spec.standardize_context}"]
    if (base := base_of(spec)) != NORMAL:
        rest.append(f"base={base!r}")
    listed = f"[{lines}\n]" if lines else "[]"
    return f"FlowSpec.from_layers({spec.input_size}, {listed}, {', '.join(rest)})"


def _shown(layers: Sequence[Layer]) -> list[str]:
    """Return each layer for `repr`, or the first and the last and how many are between."""
    if len(layers) <= _SHOWN_LAYERS:
        return [repr(layer) for layer in layers]
    first, last = layers[:_SHOWN_ENDS], layers[-_SHOWN_ENDS:]
    return [*map(repr, first), f"... {len(layers) - 2 * _SHOWN_ENDS:,} more ...", *map(repr, last)]


def bounds_of(spec: FlowSpec) -> Bounds | None:
    """Return the bounds of the columns, which are the first layer where there are some."""
    first = spec.layers[0]
    return first if isinstance(first, Bounds) else None


def begins_with_standardize(spec: FlowSpec) -> bool:
    """Tell whether a standardize layer is the first one but for bounds: `fit` sets it, and units come from it."""
    return isinstance(spec.layers[0 if bounds_of(spec) is None else 1], Standardize)


def standardize_name(spec: FlowSpec) -> str:
    """Return how the tensors of that layer are called, "standardize_0"."""
    return f"standardize_{0 if bounds_of(spec) is None else 1}"


def whitens(spec: FlowSpec) -> bool:
    """Tell whether a layer is set from the covariance of the rows, as `build(standardize="covariance")` puts one."""
    return any(isinstance(layer, LULinear) and layer.whitens for layer in spec.layers)


def untransformed(spec: FlowSpec) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the columns of x that a flow only shifts and scales, and their places in z; none where one mixes columns.

    Such a column is normally distributed under the flow, behind its bounds, and independent of all others and of a
    context.
    """
    at = np.arange(spec.input_size)  # the column at each place
    free = np.ones(spec.input_size, np.bool_)  # by column
    for layer in spec.layers:
        free[at[layer._changed(spec.input_size)]] = False
        at = at[layer._order(spec.input_size)]
    places = np.flatnonzero(free[at])
    return at[places], places


def in_words(spec: FlowSpec, between: str = ", ") -> dict[str, str]:
    """Return what couplings and splines are, for tables; where they differ all values, in the order of the layers.

    between: stands between the sizes of hidden layers. What no layer has is left out.
    """
    layers = [layer for layer in spec.layers if isinstance(layer, Coupling)]
    affine = [layer.transform for layer in layers if not isinstance(layer.transform, Spline)]
    found = {
        "hidden layers": [" and ".join(n._sizes_in_words(between) for n in layer._networks()) for layer in layers],
        "activation": [" and ".join(dict.fromkeys(n.activation for n in layer._networks())) for layer in layers],
        "scale bound": [transform._bound_in_words() for transform in affine],
        "splines": [spline._in_words() for spline in splines(spec)],
    }
    return {name: " / ".join(dict.fromkeys(values)) for name, values in found.items() if values}


def bounds_in_words(spec: FlowSpec, labels: Sequence[str]) -> str:
    """Return what columns hold, "share (0, 1), rooms integers from 0 on"; "" where nothing is said of any."""
    bounds = bounds_of(spec)
    if bounds is None:
        return ""
    said = [j for j in range(len(bounds.low)) if j in bounds.discrete or not bounds.is_free(j)]
    return ", ".join(f"{labels[j]} {support_in_words(bounds, j)}" for j in said)


def support_in_words(bounds: Bounds, column: int) -> str:
    """Return what a column holds: an interval without its edges, "(0, inf)", or "integers from 0 to 6"."""
    low, high = bounds.low[column], bounds.high[column]
    if column not in bounds.discrete:
        return f"({-math.inf if low is None else low:g}, {math.inf if high is None else high:g})"
    if low is None:
        return "integers" if high is None else f"integers up to {high - 0.5:.17g}"
    return f"integers from {low + 0.5:.17g} " + ("on" if high is None else f"to {high - 0.5:.17g}")


def splines(spec: FlowSpec) -> list[Spline]:
    """Return the splines of couplings and of features by themselves, in the order of the layers."""
    return [spline for layer in spec.layers for spline in layer._splines()]


def kinds_in_words(spec: FlowSpec) -> str:
    """Return how many layers of each kind there are but for the first ones: "4 affine couplings, 5 permutations"."""
    counts: dict[str, int] = {}
    for layer in spec.layers:
        noun = layer._in_words()
        counts[noun] = counts.get(noun, 0) + 1
    return ", ".join(counted(count, noun) for noun, count in counts.items() if noun)


def _completed(spec: type[FlowSpec]) -> None:
    """Give the compiled class functions of Python: those that pybind11 makes name no argument in their messages."""
    initialise, read_json, write_json, convert = spec.__init__, spec.from_json, spec.to_json, spec.with_dtype
    set_state: Any = spec.__setstate__  # type: ignore[attr-defined]

    def __init__(
        self: FlowSpec,
        input_size: int,
        num_flows: int = 4,
        hidden_sizes: Sequence[int] = (256,),
        activation: str = "relu",
        scale_bound: float = 1.0,
        standardize: bool = False,
        dtype: str = "float32",
    ) -> None:
        initialise(
            self,
            _checks.integer("input_size", input_size),
            _checks.integer("num_flows", num_flows),
            _checks.sizes("hidden_sizes", hidden_sizes),
            _checks.text("activation", activation),
            _checks.real("scale_bound", scale_bound),
            _checks.boolean("standardize", standardize),
            _checks.dtype_name("dtype", dtype),
        )

    def read(text: str) -> FlowSpec:
        """Return the spec that `to_json` was called on."""
        return read_json(_checks.text("text", text))

    def write(self: FlowSpec) -> str:
        """Return the spec as JSON."""
        return write_json(self)

    def with_dtype(self: FlowSpec, dtype: str) -> FlowSpec:
        """Return the spec of the same layers in another dtype, "float32" or "float64"."""
        return convert(self, _checks.dtype_name("dtype", dtype))

    def __reduce__(self: FlowSpec) -> tuple[Any, tuple[str]]:
        return from_json, (write_json(self),)

    def __setstate__(self: FlowSpec, state: str) -> None:
        set_state(self, _checks.text("the pickled FlowSpec", state))

    static: dict[str, Any] = {"from_json": read, "from_layers": from_layers}
    bound: dict[str, Any] = {"__init__": __init__, "to_json": write, "with_dtype": with_dtype}
    for name, function in (static | bound).items():
        if name != "from_layers":  # its own name is a module's
            function.__name__, function.__qualname__ = name, f"FlowSpec.{name}"
        explained: Any = _hints.explained(function)
        setattr(spec, name, staticmethod(explained) if name in static else explained)
    plain: dict[str, Any] = {
        "__repr__": _repr,
        "__reduce__": __reduce__,
        "__setstate__": __setstate__,
        "layers": property(layers_of),
        "base": property(base_of),
    }
    for name, member in plain.items():
        setattr(spec, name, member)


_completed(FlowSpec)
