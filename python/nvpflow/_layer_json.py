"""Layers of `nvpflow.layers` as entries of a spec's JSON, format 1.1, and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nvpflow import _checks
from nvpflow._networks import Network
from nvpflow._splines import Spline
from nvpflow._transforms import Transform
from nvpflow.layers import (
    MLP,
    ActNorm,
    Additive,
    Affine,
    Bounds,
    Coupling,
    ElementSpline,
    Layer,
    LULinear,
    Permutation,
    ResidualNet,
    Standardize,
)

_PLAIN: dict[str, type[Layer]] = {
    "standardize": Standardize,
    "actnorm": ActNorm,
    "permutation": Permutation,
    "lu_linear": LULinear,
    "bounds": Bounds,
}
_NAMES: dict[type, str] = {kind: name for name, kind in _PLAIN.items()}
_NAMES |= {Coupling: "coupling", ElementSpline: "element_spline"}


def kind_of(layer: Layer) -> str:
    """Return the name of a layer's kind, "coupling"."""
    return _NAMES[type(layer)]


def checked(name: str, layer: object) -> Layer:
    """Return what must be a layer; a class that derives from one is none."""
    if type(layer) not in _NAMES:
        hint = f"; write {layer.__name__}()" if isinstance(layer, type) and layer in _NAMES else ""
        raise TypeError(f"{name} is {_checks.describe(layer)}, expected a layer of nvpflow.layers{hint}")
    return layer  # type: ignore[return-value]


def to_json(layer: Layer) -> dict[str, Any]:
    """Return what JSON holds of a layer."""
    entry: dict[str, Any] = {"kind": kind_of(layer)}
    if isinstance(layer, ElementSpline):
        return entry | {
            "inverse": layer.inverse,
            "features": layer.features,
            "spline": _spline_to_json(layer.spline),
        }
    if isinstance(layer, LULinear) and not layer.whitens:  # as it was before there was such a field
        return entry | {"inverse": layer.inverse}
    if not isinstance(layer, Coupling):
        return entry | dataclasses.asdict(layer)
    entry |= {
        "inverse": layer.inverse,
        "transformed": layer.transformed,
        "transform": _transform_to_json(layer.transform),
    }
    networks = {name: getattr(layer, name) for name in ("network", "scale_network", "translation_network")}
    return entry | {name: _network_to_json(network) for name, network in networks.items() if network is not None}


def from_json(entry: dict[str, Any]) -> Layer:
    """Return the layer of an entry that the extension wrote."""
    fields = dict(entry)
    kind = fields.pop("kind")
    if kind == "element_spline":
        return ElementSpline(**fields | {"spline": _spline_from_json(fields["spline"])})
    if kind != "coupling":
        return _PLAIN[kind](**fields)
    fields["transform"] = _transform_from_json(fields["transform"])
    for name in ("network", "scale_network", "translation_network"):
        if name in fields:
            fields[name] = _network_from_json(fields[name])
    return Coupling(**fields)


def _transform_to_json(transform: Transform) -> dict[str, Any]:
    if isinstance(transform, Additive):
        return {"kind": "additive"}
    if isinstance(transform, Spline):
        return {"kind": "spline"} | _spline_to_json(transform)
    constants = {name: value for name, value in dataclasses.asdict(transform).items() if value is not None}
    if constants.get("high") == math.inf:
        constants["high"] = None  # JSON has no infinity
    return {"kind": "affine", "log_scale": constants}


def _transform_from_json(entry: dict[str, Any]) -> Transform:
    if entry["kind"] == "additive":
        return Additive()
    if entry["kind"] == "spline":
        return _spline_from_json({name: value for name, value in entry.items() if name != "kind"})
    constants = dict(entry["log_scale"])
    if "high" in constants and constants["high"] is None:
        constants["high"] = math.inf
    return Affine(**constants)


def _spline_to_json(spline: Spline) -> dict[str, Any]:
    fields = dataclasses.asdict(spline)
    derivative = {"function": fields.pop("derivative")}
    for name in ("offset", "gain", "bound"):
        if (value := fields.pop(f"derivative_{name}")) is not None:
            derivative[name] = value
    fields["lower"], fields["upper"] = fields.pop("interval")
    return fields | {"derivative": derivative}


def _spline_from_json(entry: dict[str, Any]) -> Spline:
    fields = dict(entry)
    derivative = dict(fields.pop("derivative"))
    interval = fields.pop("lower"), fields.pop("upper")
    constants = {"derivative": derivative.pop("function")} | {f"derivative_{k}": v for k, v in derivative.items()}
    return Spline(interval=interval, **fields, **constants)


def _network_to_json(network: Network) -> dict[str, Any]:
    return {"kind": "mlp" if isinstance(network, MLP) else "residual"} | dataclasses.asdict(network)


def _network_from_json(entry: dict[str, Any]) -> Network:
    fields = dict(entry)
    return MLP(**fields) if fields.pop("kind") == "mlp" else ResidualNet(**fields)
