"""Flows of distrax, which are functions: their layers are declared, and their weights given as arrays."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import nvpflow.importers._jax as _jax
import nvpflow.importers._torch as _torch
from nvpflow import _checks
from nvpflow._bases import NORMAL
from nvpflow.flow import Flow
from nvpflow.importers._parity import imported
from nvpflow.importers._recipe import (
    Array,
    At,
    Dense,
    Recipe,
    Step,
    affine_heads,
    coupling,
    mlp,
    permutation,
)
from nvpflow.importers._refusal import refused, refused_kind
from nvpflow.layers import MLP, Additive, Affine, Coupling, Layer, Permutation, Spline, members

Weights = Sequence[Sequence[tuple[Any, Any]]]


def from_distrax(
    layers: Sequence[Layer],
    weights: Weights,
    make: Callable[[Weights], Any] | None = None,
    *,
    input_size: int,
    context_size: int = 0,
    dtype: DTypeLike = "float32",
    check: bool = True,
) -> Flow:
    """Return the flow of couplings of distrax that you declare: its conditioners are functions, which nobody can read.

    Parameters
    ----------
    layers
        The layers as they are here, from data to latent: `nvpflow.layers.Coupling` with one `MLP`, and `Permutation`.
        The guide says what a ``Chain`` of ``MaskedCoupling`` is.
    weights
        Of each coupling in this order the dense layers of its conditioner: (w [in, out], b [out]), as Haiku and Flax
        have them. Its inputs are all D features, those that change set to zero, and then the context. Its outputs are
        ``[D, P]``: of an affine coupling shift and raw scale of each feature, of a spline widths, heights and
        ``num_bins + 1`` slopes.
    make
        Returns the ``distrax.Transformed`` of such weights, and for a context the one under ``make(weights, c)`` [C].
        The two are then compared. None: nothing is.
    input_size, context_size
        D and C.
    dtype
        Of the flow, "float32" or "float64".
    check
        Raise `ParityError` where the two differ. False: the report says so, and the flow is returned.

    Returns
    -------
    Flow
        On the CPU, with the normal base; `Flow.import_report` says how exactly it agrees with what `make` returns.

    Raises
    ------
    TypeError, ValueError
        A layer has no counterpart there, or weights have other sizes; the message begins with the place.
    ParityError
        The flow is not what `make` returns.
    """
    size, context = _checks.integer("input_size", input_size), _checks.integer("context_size", context_size)
    given = [[(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in net] for net in weights]
    steps, left = [], list(enumerate(given))
    for i, layer in enumerate(layers):
        at = At(f"layers[{i}]", "MaskedCoupling" if isinstance(layer, Coupling) else "Permute")
        if isinstance(layer, Permutation):
            steps.append(permutation(at, layer.order))
        elif isinstance(layer, Coupling):
            if not left:
                raise refused("weights", f"of {len(given)} couplings", "an entry for each coupling of layers")
            k, net = left.pop(0)
            steps.append(_coupling(at, layer, f"weights[{k}]", net, size, context))
        else:
            raise refused_kind(at.path, layer, "a Coupling or Permutation of nvpflow.layers")
    if left:
        raise refused("weights", f"of {len(given)} couplings", f"{len(given) - len(left)}, as layers has")
    recipe = Recipe("distrax", _torch.version_of("distrax"), size, context, steps, NORMAL)
    recipe.assumed.append("layers are as declared")
    peer = "no function that makes the distribution" if make is None else _DistraxPeer(make, given)
    return imported(recipe, peer, dtype=dtype, check=check)


def _coupling(at: At, layer: Coupling, path: str, net: list[tuple[Array, Array]], size: int, context: int) -> Step:
    if not isinstance(layer.network, MLP) or layer.network.layer_norm:
        raise refused(f"{at.path}.network", repr(layer.network), "an MLP without layer_norm")
    b = members(layer.transformed, size)
    stays = np.setdiff1d(np.arange(size), b)
    widths = [size + context, *layer.network.hidden_sizes, size * _count(layer)]
    shapes, expected = [w.shape for w, _ in net], list(itertools.pairwise(widths))
    if shapes != expected:
        raise refused(path, f"of kernels {shapes}", f"{expected}")
    dense = [Dense(w, b) for w, b in net]
    dense[0] = dense[0].of_inputs(np.concatenate([stays, size + np.arange(context)]))
    *hidden, last = dense
    heads = _heads(layer, last, b)
    return coupling(at, b, layer.transform, mlp(hidden, last, layer.network.activation), heads, inverse=layer.inverse)


def _count(layer: Coupling) -> int:
    """Return P, how many numbers a feature takes there."""
    if isinstance(layer.transform, Spline):
        return 3 * layer.transform.num_bins + 1
    return 1 if isinstance(layer.transform, Additive) else 2


def _heads(layer: Coupling, last: Dense, b: NDArray[np.intp]) -> dict[str, Dense]:
    if isinstance(layer.transform, Additive):
        return {"translation": last.of_outputs(b)}
    if isinstance(layer.transform, Affine):
        return affine_heads(last, scale=2 * b + 1, translation=2 * b)
    bins, count = layer.transform.num_bins, _count(layer)
    ends = {"widths": (0, bins), "heights": (bins, 2 * bins), "derivatives": (2 * bins, count)}
    if layer.transform.boundary == "one":  # the slopes at both ends are not read
        ends["derivatives"] = 2 * bins + 1, count - 1
    places = {name: (b[None, :] * count + np.arange(*ends[name])[:, None]).ravel() for name in ends}
    return {name: last.of_outputs(columns) for name, columns in places.items() if len(columns)}


class _DistraxPeer:
    """The distribution in float64."""

    def __init__(self, make: Callable[..., Any], weights: list[list[tuple[Array, Array]]]) -> None:
        self._make, self._weights = make, weights

    def _mapped(self, call: Callable[[Any, Any], Any], rows: Array, context: Array | None) -> Any:
        """Call a function of a distribution and a row for all rows."""
        jax = sys.modules["jax"]
        with _jax.in_float64():
            weights = jax.tree_util.tree_map(jax.numpy.asarray, self._weights)

            def of_row(row: Any, *c: Any) -> Any:
                return call(self._make(weights, *c), row)

            given = [jax.numpy.asarray(v) for v in (rows, context) if v is not None]
            return jax.tree_util.tree_map(np.asarray, jax.jit(jax.vmap(of_row))(*given))

    def forward(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        z, log_det = self._mapped(lambda d, row: d.bijector.inverse_and_log_det(row), x, context)
        return z, log_det

    def inverse(self, z: Array, context: Array | None) -> Array:
        found: Array = self._mapped(lambda d, row: d.bijector.forward(row), z, context)
        return found

    def log_prob(self, x: Array, context: Array | None) -> Array:
        found: Array = self._mapped(lambda d, row: d.log_prob(row), x, context)
        return found
