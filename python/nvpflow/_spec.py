"""`FlowSpec` with arguments that are checked here: the functions that pybind11 makes name none in their messages."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvpflow import _checks, _core, _hints
from nvpflow._core import FileFormatError, FlowSpec

__all__ = ["Coupling", "FlowSpec", "Standardize", "begins_with_standardize", "in_words", "regular"]

MOST_LAYERS = 1 << 16


@dataclass(frozen=True)
class Coupling:
    """An affine coupling layer: ``y_b = x_b * exp(s) + t``, ``s = B tanh(u / B)``, ``[u, t] = MLP(x_a)``; y_a = x_a.

    Parameters
    ----------
    swapped
        False: a is the first half of the features, ``[0, D // 2)``, and b the second. True: the other way round.
    hidden_sizes
        Units of each hidden layer, each at least 1. None of them: u and t are linear in x_a.
    activation
        What follows each hidden layer, as in `nvpflow.build`.
    scale_bound
        B, the largest log-scale; positive and finite.

    Raises
    ------
    TypeError, ValueError
        A value is of the wrong type or out of range. The flow's dtype may bound `scale_bound` further.

    References
    ----------
    Dinh et al., Density estimation using Real NVP, 2017, eq. 7-8.
    """

    swapped: bool = False
    hidden_sizes: tuple[int, ...] = (256,)
    activation: str = "relu"
    scale_bound: float = 1.0

    def __post_init__(self) -> None:
        sizes = _checks.sizes("hidden_sizes", self.hidden_sizes)
        for i, size in enumerate(sizes):
            if size < 1:
                raise ValueError(f"hidden_sizes[{i}] is {size}, expected at least 1")
        activation = _checks.text("activation", self.activation)
        if activation not in _core.activation_names():
            known = ", ".join(_core.activation_names())
            raise ValueError(f"activation is {activation[:80]!r}, expected one of {known}")
        bound = _checks.real("scale_bound", self.scale_bound)
        if not 0 < bound < math.inf:
            raise ValueError(f"scale_bound is {bound}, expected finite and > 0")
        checked = {"swapped": _checks.boolean("swapped", self.swapped), "hidden_sizes": sizes, "scale_bound": bound}
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Standardize:
    """``y = (x - mean) * exp(-log_std)``, one mean and log_std per feature, which `fit` sets from the data."""


Layer = Coupling | Standardize
KINDS: dict[str, type[Layer]] = {"coupling": Coupling, "standardize": Standardize}
for _kind in KINDS.values():
    _kind.__module__ = "nvpflow.layers"  # where users and pickles find it


def layers_of(spec: FlowSpec) -> tuple[Layer, ...]:
    """Return the layers, the one first applied to data first."""
    found = []
    for entry in json.loads(spec.to_json())["layers"]:
        kind: Any = KINDS[entry.pop("kind")]
        found.append(kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}))
    return tuple(found)


def from_layers(input_size: int, layers: Iterable[Layer], dtype: str = "float32") -> FlowSpec:
    """Return the spec of a flow with these layers of `nvpflow.layers`, the one first applied to data first.

    Parameters
    ----------
    input_size
        D, the number of features, at least 2.
    layers
        At least one of them is a coupling. They may differ in every field.
    dtype
        "float32" or "float64".

    Raises
    ------
    TypeError
        `layers` has no order, or holds something else than a layer.
    ValueError
        A field of a layer is out of range, or there is no coupling.
    """
    size, name = _checks.integer("input_size", input_size), _checks.dtype_name("dtype", dtype)
    array = isinstance(layers, np.ndarray)  # of any shape: one of a single layer is no sequence
    if array or isinstance(layers, (str, bytes, Set, Mapping)) or not isinstance(layers, Iterable):  # or has no order
        raise TypeError(f"layers is {_checks.describe(layers)}, expected a sequence of layers of nvpflow.layers")
    names = {kind: name for name, kind in KINDS.items()}
    entries = []
    for i, layer in enumerate(layers):
        kind = next((kind for kind in KINDS.values() if isinstance(layer, kind)), None)
        if kind is None:
            raise TypeError(f"layers[{i}] is {_checks.describe(layer)}, expected a layer of nvpflow.layers")
        if i == MOST_LAYERS:
            raise ValueError(f"layers holds more than {MOST_LAYERS} layers, expected at most that many")
        entries.append({"kind": names[kind]} | dataclasses.asdict(layer))
    text = json.dumps({"input_size": size, "dtype": name, "layers": entries})
    try:
        return FlowSpec.from_json(text)
    except FileFormatError as error:  # no file is in question
        raise ValueError(str(error)) from None


def from_json(text: str) -> FlowSpec:
    """Return the spec that `to_json` was called on; pickles name this function."""
    return FlowSpec.from_json(text)


def regular(spec: FlowSpec) -> dict[str, Any] | None:
    """Return the arguments of `FlowSpec` that make this spec; None where only its layers say what it is."""
    names = ("input_size", "num_flows", "hidden_sizes", "activation", "scale_bound", "standardize", "dtype")
    try:
        arguments = {name: getattr(spec, name) for name in names}
    except AttributeError:  # no one value for all couplings
        return None
    return arguments if FlowSpec(**arguments) == spec else None


def begins_with_standardize(spec: FlowSpec) -> bool:
    """Tell whether a standardize layer is the first one, which `fit` sets and which the units of x come from."""
    return isinstance(spec.layers[0], Standardize)


def in_words(spec: FlowSpec, between: str = ", ") -> dict[str, str]:
    """Return what couplings are, for tables; where they differ all values, in the order of the layers.

    between: stands between the sizes of hidden layers.
    """
    layers = [layer for layer in spec.layers if isinstance(layer, Coupling)]
    found = {
        "hidden layers": [between.join(map(str, layer.hidden_sizes)) or "none" for layer in layers],
        "activation": [layer.activation for layer in layers],
        "scale bound": [f"{layer.scale_bound:g}" for layer in layers],
    }
    return {name: " / ".join(dict.fromkeys(values)) for name, values in found.items()}


def _completed(spec: type[FlowSpec]) -> None:
    """Give the compiled class functions of Python: those that pybind11 makes name no argument in their messages."""
    initialise, read_json, write_json, convert = spec.__init__, spec.from_json, spec.to_json, spec.with_dtype

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

    def __repr__(self: FlowSpec) -> str:
        arguments = regular(self)
        if arguments is not None:
            return f"FlowSpec({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
        listed = ", ".join(map(repr, layers_of(self)))
        return f"FlowSpec.from_layers(input_size={self.input_size}, layers=[{listed}], dtype={self.dtype!r})"

    def __reduce__(self: FlowSpec) -> tuple[Any, tuple[str]]:
        return from_json, (write_json(self),)

    static: dict[str, Any] = {"from_json": read, "from_layers": from_layers}
    bound: dict[str, Any] = {"__init__": __init__, "to_json": write, "with_dtype": with_dtype}
    for name, function in (static | bound).items():
        if name != "from_layers":  # its own name is a module's
            function.__name__, function.__qualname__ = name, f"FlowSpec.{name}"
        explained: Any = _hints.explained(function)
        setattr(spec, name, staticmethod(explained) if name in static else explained)
    plain: dict[str, Any] = {"__repr__": __repr__, "__reduce__": __reduce__, "layers": property(layers_of)}
    for name, member in plain.items():
        setattr(spec, name, member)


_completed(FlowSpec)
