"""The pieces of a RealNVP flow as free functions: NumPy in, NumPy out, on the same kernels as `nvpflow.Flow`.

They are for reading, checking and porting weights; for speed use a `Flow`, which sets up its weights once. Names and
meaning are those of ``NormalizingFlow`` in Edifice, a library of neural networks in Elixir. Formulas: Dinh,
Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017), equations 3, 7 and 8.

Arrays are float32 or float64; the first argument's dtype is that of the results, and weights must convert to it
safely. A dense layer is a pair ``(kernel [in, out], bias [out])``.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _checks, _sample_weight
from nvpflow._core import FlowSpec
from nvpflow.flow import Flow

__all__ = [
    "affine_coupling_layer",
    "inverse_coupling_layer",
    "log_det_jacobian",
    "log_probability",
    "nll_loss",
    "total_log_det_jacobian",
]

Dense: TypeAlias = tuple[ArrayLike, ArrayLike]


def affine_coupling_layer(
    x: ArrayLike,
    hidden: Sequence[Dense],
    scale: Dense,
    translation: Dense,
    *,
    even: bool = True,
    activation: str = "relu",
    scale_bound: float = 1.0,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Apply one coupling layer in the direction of the latents: ``y_b = x_b * exp(s) + t``, ``y_a = x_a``.

    With ``g`` the hidden layers' output on ``x_a``, ``s = scale_bound * tanh((g W_s + c_s) / scale_bound)`` and
    ``t = g W_t + c_t``.

    Parameters
    ----------
    x
        Input [B, D], D >= 2.
    hidden
        Hidden layers, first to last; may be empty.
    scale, translation
        Output layers for s and t.
    even
        True: a is the first half ``x[:, :D // 2]`` and b the second. False: the other way round.
    activation
        Of the hidden layers.
    scale_bound
        Largest absolute value of s.

    Returns
    -------
    y
        Output [B, D]; columns keep their places.
    s
        Log-scales, one per transformed column; their sum over columns is ``log|det dy/dx|``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.
    """
    rows = _rows("x", x)
    flow = _coupling(rows, hidden, scale, translation, even, activation, scale_bound)
    return flow.forward(rows)[0], flow._conditioner(0, rows)[0]


def inverse_coupling_layer(
    y: ArrayLike,
    hidden: Sequence[Dense],
    scale: Dense,
    translation: Dense,
    half_size: int | None = None,
    even: bool = True,
    *,
    activation: str = "relu",
    scale_bound: float = 1.0,
) -> NDArray[Any]:
    """Undo `affine_coupling_layer`: ``x_b = (y_b - t) * exp(-s)``, ``x_a = y_a``.

    Parameters
    ----------
    y
        Output of the layer [B, D].
    hidden, scale, translation, even, activation, scale_bound
        As for `affine_coupling_layer`.
    half_size
        ``D // 2``: an argument of Edifice's function, whose names and arguments are a promise here. None: not checked.

    Returns
    -------
    ndarray
        x [B, D].

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.
    """
    rows = _rows("y", y)
    if half_size is not None and _checks.integer("half_size", half_size) != rows.shape[1] // 2:
        raise ValueError(f"half_size={half_size} for {rows.shape[1]} columns, expected {rows.shape[1] // 2}")
    inverse: NDArray[Any] = _coupling(rows, hidden, scale, translation, even, activation, scale_bound).inverse(rows)
    return inverse


def log_det_jacobian(scale: ArrayLike) -> NDArray[Any]:
    """Return the log-determinant of a coupling layer's Jacobian: its log-scales [B, n] summed to [B]."""
    log_scale = _rows("scale", scale)
    return np.asarray(log_scale.sum(axis=1, dtype=np.float64), dtype=log_scale.dtype)


def total_log_det_jacobian(scales: Sequence[ArrayLike]) -> NDArray[Any]:
    """Return the log-determinant of a whole flow: the log-scales [B, n_k] of all its layers summed to [B]."""
    layers = [_rows(f"scales[{i}]", scale) for i, scale in enumerate(scales)]
    if not layers:
        raise ValueError("scales is empty, expected the log-scales of at least one layer")
    if len({layer.shape[0] for layer in layers}) > 1:
        raise ValueError(f"scales have {[layer.shape[0] for layer in layers]} rows, expected the same number in each")
    total = np.sum([layer.sum(axis=1, dtype=np.float64) for layer in layers], axis=0)
    return np.asarray(total, dtype=np.result_type(*layers))


def log_probability(z: ArrayLike, total_log_det: ArrayLike) -> NDArray[Any]:
    """Return ``log p(x) = log N(z; 0, I) + log|det dz/dx|`` in nats (the change of variables).

    Parameters
    ----------
    z
        Latents [B, D].
    total_log_det
        Log-determinants [B] of the map from x to z.

    Returns
    -------
    ndarray
        [B], of z's dtype, summed in float64.
    """
    latent = _rows("z", z)
    return _log_probability(latent, total_log_det).astype(latent.dtype)


def nll_loss(z: ArrayLike, total_log_det: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """Return the negative log-likelihood in nats: minus the batch's mean of `log_probability`; B is at least 1.

    sample_weight [B]: the mean is by weight; at least 0, not all 0. A row of weight 0 is not looked at.
    """
    latent = _rows("z", z)
    if len(latent) == 0:
        raise ValueError("z has no rows, expected at least one: the mean over an empty batch is not defined")
    log_p = _log_probability(latent, total_log_det)
    if sample_weight is None:
        return -float(log_p.mean())
    weights = _sample_weight.read(sample_weight, len(latent))
    counts = weights > 0
    return -float(np.average(log_p[counts], weights=weights[counts]))


def _log_probability(latent: NDArray[Any], total_log_det: ArrayLike) -> NDArray[np.float64]:
    log_det = _checks.array("total_log_det", total_log_det, latent.dtype)
    if log_det.shape != latent.shape[:1]:
        raise ValueError(f"total_log_det has shape {log_det.shape}, expected {latent.shape[:1]}: one for each row of z")
    squares = np.square(latent, dtype=np.float64).sum(axis=1)
    return np.asarray(log_det - 0.5 * (latent.shape[1] * math.log(2 * math.pi) + squares), dtype=np.float64)


def _rows(name: str, value: ArrayLike) -> NDArray[Any]:
    rows = np.asarray(value, order="C")
    if rows.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} has dtype {rows.dtype}, expected float32 or float64")
    if rows.ndim != 2:
        raise ValueError(f"{name} has shape {rows.shape}, expected two dimensions [B, D]")
    return rows


def _dense(name: str, layer: Any, like: NDArray[Any], inputs: int, outputs: int | None) -> dict[str, NDArray[Any]]:
    """Check a dense layer; `outputs` None: as many as its kernel has."""
    try:
        kernel, bias = layer
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {_checks.describe(layer)}, expected a pair (kernel, bias)") from None
    kernel = _checks.array(f"{name} kernel", kernel, like.dtype)
    bias = _checks.array(f"{name} bias", bias, like.dtype)
    if kernel.ndim != 2 or kernel.shape[0] != inputs or kernel.shape[1] != (outputs or kernel.shape[1]):
        raise ValueError(f"{name} kernel has shape {kernel.shape}, expected ({inputs}, {outputs or 'out'})")
    if bias.shape != kernel.shape[1:]:
        raise ValueError(f"{name} bias has shape {bias.shape}, expected {kernel.shape[1:]}")
    return {"kernel": kernel, "bias": bias}


def _coupling(
    rows: NDArray[Any],
    hidden: Sequence[Dense],
    scale: Dense,
    translation: Dense,
    even: bool,
    activation: str,
    scale_bound: float,
) -> Flow:
    """Build the flow that is this one layer."""
    columns = rows.shape[1]
    if columns < 2:
        raise ValueError(f"a row has {columns} column(s), expected at least 2: a coupling layer splits them in two")
    first, second = columns // 2, columns - columns // 2
    inputs, outputs = (first, second) if _checks.boolean("even", even) else (second, first)

    layers: dict[str, dict[str, NDArray[Any]]] = {}
    for i, layer in enumerate(hidden):
        dense = layers[f"coupling_dense_{i}"] = _dense(f"hidden[{i}]", layer, rows, inputs, None)
        inputs = dense["bias"].shape[0]
    layers["scale"] = _dense("scale", scale, rows, inputs, outputs)
    layers["translation"] = _dense("translation", translation, rows, inputs, outputs)

    coupling = {
        "kind": "coupling",
        "swapped": not even,
        "hidden_sizes": [layers[f"coupling_dense_{i}"]["bias"].shape[0] for i in range(len(hidden))],
        "activation": _checks.text("activation", activation),
        "scale_bound": _checks.real("scale_bound", scale_bound),
    }
    spec = {"input_size": columns, "dtype": rows.dtype.name, "layers": [coupling]}
    flow = Flow(FlowSpec.from_json(json.dumps(spec)))
    flow.set_parameters({f"flow_0_{name}.{part}": dense[part] for name, dense in layers.items() for part in dense})
    return flow
