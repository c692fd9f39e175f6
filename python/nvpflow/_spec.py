"""`FlowSpec` with arguments that are checked here: the functions that pybind11 makes name none in their messages."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from nvpflow import _checks, _hints
from nvpflow._core import Coupling, FlowSpec, Standardize

__all__ = ["Coupling", "FlowSpec", "Standardize", "begins_with_standardize", "in_words", "regular"]


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
    """Give the compiled class functions of Python for those that pybind11 makes, whose messages name no argument."""
    initialise, from_json, to_json = spec.__init__, spec.from_json, spec.to_json
    from_layers, with_dtype = spec.from_layers, spec.with_dtype

    @_hints.explained
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
        return from_json(_checks.text("text", text))

    def write(self: FlowSpec) -> str:
        """Return the spec as JSON."""
        return to_json(self)

    @_hints.explained
    def of_layers(input_size: int, layers: Iterable[Coupling | Standardize], dtype: str = "float32") -> FlowSpec:
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
            A layer is none.
        ValueError
            A field of a layer is out of range, or there is no coupling.
        """
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"layers is {type(layers).__name__}, expected a sequence of layers of nvpflow.layers")
        size, name = _checks.integer("input_size", input_size), _checks.dtype_name("dtype", dtype)
        return from_layers(size, layers, name)

    @_hints.explained
    def of_dtype(self: FlowSpec, dtype: str) -> FlowSpec:
        """Return the spec of the same layers in another dtype, "float32" or "float64"."""
        return with_dtype(self, _checks.dtype_name("dtype", dtype))

    static: dict[str, Any] = {"from_json": read, "from_layers": of_layers}
    bound: dict[str, Any] = {"__init__": __init__, "to_json": write, "with_dtype": of_dtype}
    function: Any
    for name, function in (static | bound).items():
        for part in (function, inspect.unwrap(function)):  # Python's own messages have the inner one's name
            part.__name__, part.__qualname__ = name, f"FlowSpec.{name}"
        made: Any = staticmethod(function) if name in static else function
        setattr(spec, name, made)


def _checked(coupling: type[Coupling]) -> None:
    """Give Coupling a constructor whose messages name the argument."""
    initialise = coupling.__init__

    @_hints.explained
    def __init__(
        self: Coupling,
        swapped: bool = False,
        hidden_sizes: Sequence[int] = (256,),
        activation: str = "relu",
        scale_bound: float = 1.0,
    ) -> None:
        """Make an affine coupling layer.

        Parameters
        ----------
        swapped
            False: the first half of the features, ``[0, D // 2)``, conditions the second half. True: the second half
            conditions the first.
        hidden_sizes
            Units of each hidden layer, each at least 1. None of them: the heads are linear.
        activation
            What follows each hidden layer: one of `nvpflow.Flow`'s activations.
        scale_bound
            B, the largest log-scale; positive and finite in the flow's dtype.

        Raises
        ------
        ValueError
            The activation is not known. Sizes and the bound are checked with the spec.
        """
        initialise(
            self,
            _checks.boolean("swapped", swapped),
            _checks.sizes("hidden_sizes", hidden_sizes),
            _checks.text("activation", activation),
            _checks.real("scale_bound", scale_bound),
        )

    __init__.__qualname__ = "Coupling.__init__"
    setattr(coupling, "__init__", __init__)  # noqa: B010


_completed(FlowSpec)
_checked(Coupling)
