"""Networks of users' own making, modules of PyTorch in a row: normflows and FrEIA take any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import nvpflow.importers._torch as _torch
from nvpflow.importers._recipe import Dense, Net, mlp
from nvpflow.importers._refusal import kind_of, refused, refused_kind

_KNOWN = "Linear layers, an activation after each but the last, Dropout and BatchNorm1d"


@dataclass
class _Reading:
    """What has been seen of a row of modules."""

    dense: list[Dense] = field(default_factory=list)
    activations: list[tuple[str, Any]] = field(default_factory=list)
    affine: tuple[Any, Any] | None = None  # a BatchNorm1d behind an activation, for the next Linear
    dropped: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


def network(path: str, module: Any) -> Net:
    """Return a network of dense layers, an activation after each but the last."""
    net, after = network_and_rest(path, module)
    for at, part in after:
        raise refused(at, f"a {kind_of(part)} behind the last Linear", "a linear last layer")
    return net


def network_and_rest(path: str, module: Any) -> tuple[Net, list[tuple[str, Any]]]:
    """Return such a network, and what comes behind its last dense layer."""
    parts = list(_flat(path, module))
    linears = [i for i, (_, part) in enumerate(parts) if kind_of(part) == "Linear"]
    if not linears:
        raise refused_kind(path, module, _KNOWN, "another network has no counterpart here")
    seen, end = _Reading(), linears[-1] + 1
    while end < len(parts) and kind_of(parts[end][1]) in ("BatchNorm1d", "Dropout"):
        end += 1
    for at, part in parts[:end]:
        _read(seen, at, part)
    *hidden, last = seen.dense
    name = _torch.one_activation(seen.activations)
    return mlp(hidden, last, name, dropped=seen.dropped, folded=seen.folded), parts[end:]


def _flat(path: str, module: Any) -> Iterator[tuple[str, Any]]:
    """Yield modules with their paths; those without effect are left out."""
    kind = kind_of(module)
    if kind in ("Sequential", "ModuleList"):
        for i, part in enumerate(module):
            yield from _flat(f"{path}[{i}]", part)
    elif kind == "MLP" and kind_of(getattr(module, "net", None)) == "Sequential":
        yield from _flat(f"{path}.net", module.net)
    elif kind not in ("Identity", "Flatten"):
        yield path, module


def _read(seen: _Reading, path: str, module: Any) -> None:
    kind = kind_of(module)
    if kind == "Linear":
        if len(seen.activations) != len(seen.dense):
            raise refused(path, "a Linear right behind another one", _KNOWN)
        dense = _torch.dense(path, module)
        if seen.affine is not None:
            scale, shift = seen.affine
            dense, seen.affine = Dense(dense.kernel * scale[:, None], dense.bias + shift @ dense.kernel), None
        seen.dense.append(dense)
    elif kind == "BatchNorm1d":
        scale, shift = _torch.batch_norm(path, module)
        if len(seen.dense) > len(seen.activations):
            seen.dense[-1] = seen.dense[-1].scaled(scale, shift)
        elif seen.affine is None:
            seen.affine = scale, shift
        else:
            seen.affine = seen.affine[0] * scale, seen.affine[1] * scale + shift
        seen.folded += ("BatchNorm1d in networks, as it acts after training",)
    elif kind in ("Dropout", "AlphaDropout"):
        seen.dropped += _torch.dropout_note(module)
    elif len(seen.dense) != len(seen.activations) + 1 or seen.affine is not None:
        raise refused_kind(path, module, _KNOWN)
    else:
        seen.activations.append((path, module))


def of_features(net: Net, rows: Any) -> Net:
    """Return a network for inputs of which only these can be other than zero."""
    first = "coupling_dense_0.kernel"
    if first not in net.tensors:
        return Net(net.network, net.tensors, net.last.of_inputs(rows), net.dropped, net.folded)
    kernel = net.tensors[first][np.asarray(rows, np.intp)]
    return Net(net.network, {**net.tensors, first: kernel}, net.last, net.dropped, net.folded)


def inputs_of(net: Net) -> int:
    """Return how many numbers a network takes."""
    return len(net.tensors.get("coupling_dense_0.kernel", net.last.kernel))


def with_nothing_at(net: Net, before: int, size: int, places: Any) -> Net:
    """Return a network with more inputs, none of which has an effect.

    The first `before` inputs stay, the others go to these places of `size` ones behind them.
    """

    def spread(kernel: Any) -> Any:
        wide = np.zeros((before + size, kernel.shape[1]))
        wide[:before] = kernel[:before]
        wide[before + np.asarray(places, np.intp)] = kernel[before:]
        return wide

    first = "coupling_dense_0.kernel"
    if first not in net.tensors:
        last = Dense(spread(net.last.kernel), net.last.bias)
        return Net(net.network, net.tensors, last, net.dropped, net.folded)
    return Net(net.network, {**net.tensors, first: spread(net.tensors[first])}, net.last, net.dropped, net.folded)
