"""Modules of PyTorch as importers read them: arrays, dense layers, activations, and a copy that computes in float64.

PyTorch is not imported here: who has a module has it loaded.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nvpflow.importers._activations as _activations
from nvpflow import _checks
from nvpflow.importers._recipe import Dense, Net, mlp
from nvpflow.importers._refusal import kind_of, named, refused, refused_kind

Array = NDArray[np.float64]


def array(tensor: Any) -> Array:
    """Return a tensor, or an array that stands for one, in float64."""
    given = tensor.detach().cpu().double().numpy() if hasattr(tensor, "detach") else tensor
    return np.array(given, np.float64)


def indices(tensor: Any) -> NDArray[np.intp]:
    """Return a tensor of integers or bools as indices."""
    return np.asarray(array(tensor), np.intp)


def dense(path: str, module: Any) -> Dense:
    """Return a Linear."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2 or not hasattr(module, "bias"):
        raise refused(path, named(kind_of(module)), "a Linear of a weight [out, in]")
    return Dense.of(array(weight), None if module.bias is None else array(module.bias))


def batch_norm(path: str, module: Any) -> tuple[Array, Array]:
    """Return scale and shift of a BatchNorm1d after training."""
    if module.running_mean is None:
        raise refused(path, f"{named(kind_of(module))} of batch statistics", "track_running_stats=True")
    std = np.sqrt(array(module.running_var) + module.eps)
    weight, bias = (1.0, 0.0) if module.weight is None else (array(module.weight), array(module.bias))
    scale = weight / std
    return scale, bias - array(module.running_mean) * scale


def activation(path: str, source: Any) -> str:
    """Return the name of an activation that is a module or a function of tensors."""
    if isinstance(source, str):
        return _activations.recognised(path, source)
    return _activations.recognised(path, source, lambda values: array(source(tensor(values))))


def one_activation(found: Sequence[tuple[str, Any]], otherwise: str = "relu") -> str:
    """Return the activation that all of a network have, each given with its path; `otherwise` where there is none."""
    names = [activation(path, source) for path, source in found]
    for (path, _), name in zip(found, names, strict=True):
        if name != names[0]:
            raise refused(path, name, f"{names[0]}, as before it", "a network here has one activation")
    return names[0] if names else otherwise


def dropout_note(module: Any) -> tuple[str, ...]:
    """Return what to say of a Dropout that is left out; nothing of one without effect."""
    share = 0.0 if module is None else module.p
    return (f"dropout of p = {share:g}, which acts in training only",) if share > 0 else ()


def dense_layers(path: str, modules: Any) -> list[Dense]:
    """Return the dense layers of a Sequential, those of MaskedLinear with their masks on."""
    if not hasattr(modules, "__iter__"):
        raise refused_kind(path, modules, "dense layers and activations in a row")
    found = []
    for i, module in enumerate(modules):
        if kind_of(module) == "Residual":
            raise refused(f"{path}[{i}]", "a Residual block", "plain layers", "train it with residual=False")
        if getattr(module, "weight", None) is None:
            continue
        layer = dense(f"{path}[{i}]", module)
        mask = getattr(module, "mask", None)
        found.append(layer if mask is None else Dense(layer.kernel * array(mask).T, layer.bias))
    return found


def sequential(path: str, modules: Any) -> Net:
    """Return an MLP: dense layers, an activation and perhaps zuko's LayerNorm after each but the last."""
    activations: list[tuple[str, Any]] = []
    dropped: tuple[str, ...] = ()
    order = ""
    *hidden, last = dense_layers(path, modules)
    for i, module in enumerate(modules):
        kind = kind_of(module)
        if kind == "Dropout":
            dropped += dropout_note(module)
        elif kind == "LayerNorm":
            order += "n"
            if module.dim not in (-1, (-1,)) or module.eps != 1e-5:
                raise refused(f"{path}[{i}]", f"a LayerNorm of dim={module.dim}, eps={module.eps}", "dim=-1, eps=1e-5")
        elif getattr(module, "weight", None) is not None:
            order += "d"
        else:
            order += "a"
            activations.append((f"{path}[{i}]", module))
    if order not in ("da" * len(hidden) + "d", "dan" * len(hidden) + "d"):
        kinds = ", ".join(map(kind_of, modules))
        raise refused(path, f"of {kinds}", "Linear and an activation in turns, a Linear at the end")
    return mlp(hidden, last, one_activation(activations), layer_norm="n" in order, dropped=dropped)


def tensor(values: Array | None) -> Any:
    """Return an array as a tensor."""
    return None if values is None else sys.modules["torch"].from_numpy(np.ascontiguousarray(values))


def in_double(name: str, module: Any) -> Any:
    """Return a copy of a module that computes in float64, on the CPU, as after training."""
    try:
        found = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be copied ({type(error).__name__}: {_checks.shortened(str(error))}), expected a module "
            "without cached results; call .train() and .eval() of it first"
        ) from error
    return found.cpu().double().eval()


def identity() -> Any:
    """Return a module that gives what it is given."""
    return sys.modules["torch"].nn.Identity()


def without_gradients(call: Callable[[], Any]) -> Any:
    """Return what a call gives while PyTorch records nothing; what the source warns of is not its user's doing."""
    with sys.modules["torch"].no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def version_of(library: str) -> str:
    """Return the version of a package that is loaded or installed, "" where it is not known."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return str(getattr(sys.modules.get(library), "__version__", None) or version(library))
    except PackageNotFoundError:
        return ""
