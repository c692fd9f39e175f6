"""`FlowSpec` with arguments that are checked here: the functions that pybind11 makes name none in their messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nvpflow import _checks, _hints
from nvpflow._core import FlowSpec


def with_dtype(spec: FlowSpec, dtype: str) -> FlowSpec:
    """Return the spec of the same model in another dtype."""
    return FlowSpec.from_json(json.dumps(json.loads(spec.to_json()) | {"dtype": dtype}))


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
    return bool(json.loads(spec.to_json())["layers"][0]["kind"] == "standardize")


def in_words(spec: FlowSpec, between: str = ", ") -> dict[str, str]:
    """Return what couplings are, for tables; where they differ all values, in the order of the layers.

    between: stands between the sizes of hidden layers.
    """
    layers = [layer for layer in json.loads(spec.to_json())["layers"] if layer["kind"] == "coupling"]
    found = {
        "hidden layers": [between.join(map(str, layer["hidden_sizes"])) or "none" for layer in layers],
        "activation": [layer["activation"] for layer in layers],
        "scale bound": [f"{layer['scale_bound']:g}" for layer in layers],
    }
    return {name: " / ".join(dict.fromkeys(values)) for name, values in found.items()}


def _completed(spec: type[FlowSpec]) -> None:
    """Give the compiled class functions of Python for those that pybind11 makes, whose messages name no argument."""
    initialise, from_json, to_json = spec.__init__, spec.from_json, spec.to_json

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

    for name, function in (("__init__", __init__), ("from_json", read), ("to_json", write)):
        function.__name__, function.__qualname__ = name, f"FlowSpec.{name}"
        made: Any = staticmethod(function) if name == "from_json" else function
        setattr(spec, name, made)


_completed(FlowSpec)
