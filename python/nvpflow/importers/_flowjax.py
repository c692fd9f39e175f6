"""Flows of flowjax 18 and newer: a `Transformed` distribution of couplings."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

import nvpflow.importers._activations as _activations
import nvpflow.importers._jax as _jax
import nvpflow.importers._torch as _torch
from nvpflow import _bases
from nvpflow._bases import NORMAL
from nvpflow._splines import _identity_offset
from nvpflow._transforms import Transform
from nvpflow.flow import Flow
from nvpflow.importers._parity import imported
from nvpflow.importers._recipe import (
    Array,
    At,
    Dense,
    Net,
    OfBase,
    Recipe,
    Step,
    coupling,
    diagonal,
    inverted,
    linear,
    mixture,
    mlp,
    permutation,
    student_t,
)
from nvpflow.importers._refusal import described, kind_of, library_of, named, refused, refused_kind
from nvpflow.layers import Additive, Affine, Spline


def from_flowjax(dist: Any, *, dtype: DTypeLike = "float32", check: bool = True) -> Flow:
    """Return the flow of a distribution of flowjax, such as `flowjax.flows.coupling_flow` makes.

    Parameters
    ----------
    dist
        A ``Transformed`` of couplings and what the guide lists, over a StandardNormal, Normal, MultivariateNormal or
        Uniform of shape (D,), with a ``cond_shape`` of None or (C,). It stays as it is.
    dtype
        Of the flow, "float32" or "float64".
    check
        Raise `ParityError` where the two differ. False: the report says so, and the flow is returned.

    Returns
    -------
    Flow
        On the CPU; `Flow.import_report` says how exactly it agrees with `dist`.

    Raises
    ------
    TypeError
        `dist` is no transformed distribution of flowjax.
    ValueError
        A part of it has no counterpart here; the message begins with its path.
    ParityError
        The flow is not `dist`.

    Notes
    -----
    Splines of flowjax 17 and older have end bins of half the width. They are refused.
    """
    if not (hasattr(dist, "base_dist") and hasattr(dist, "bijection")) or library_of(dist) != "flowjax":
        raise TypeError(f"dist is {described(dist)}, expected a Transformed distribution of flowjax")
    if len(dist.shape) != 1:
        raise refused("dist", f"of shape {dist.shape}", "one of rows, (D,)")
    if dist.cond_shape is not None and len(dist.cond_shape) != 1:
        raise refused("dist", f"of cond_shape {dist.cond_shape}", "None or (C,)")
    walk = _Walk(dist.shape[0], 0 if dist.cond_shape is None else dist.cond_shape[0])
    with _jax.in_float64():  # of numbers that are made of others: softplus of a scale
        steps, base = walk.distribution("dist", sys.modules["paramax"].unwrap(_doubled(dist)))
    recipe = Recipe("flowjax", _torch.version_of("flowjax"), walk.features, walk.context, steps, *base)
    recipe.identities = walk.identities
    return imported(recipe, _FlowjaxPeer(dist), dtype=dtype, check=check)


_KNOWN = (
    "a Coupling, Chain, Scan, Invert, Permute, Flip, Identity, Affine, Loc, Scale, TriangularAffine or "
    "AdditiveCondition"
)
_BASES = "a StandardNormal, Normal, MultivariateNormal, StudentT, Uniform or a VmapMixture of normal distributions"
_INSTEAD = {
    "MaskedAutoregressive": "it takes D passes one way; train coupling_flow, or a flow of nvpflow.build",
    "BlockAutoregressiveNetwork": "it has no closed inverse",
    "NumericalInverse": "it has no closed inverse",
    "Planar": "it has no closed inverse",
    "Exp": "transform the data yourself and add the log-derivative to log p",
    "Sigmoid": "transform the data yourself and add the log-derivative to log p",
    "Tanh": "transform the data yourself and add the log-derivative to log p",
    "EmbedCondition": "embed contexts yourself, and import the bijection in it",
}


class _Walk:
    """One pass over the distribution. Steps of a bijection are those of its transform, from latent to data."""

    def __init__(self, features: int, context: int) -> None:
        self.features, self.context = features, context
        self.identities: list[At] = []

    def distribution(self, path: str, dist: Any) -> tuple[list[Step], OfBase]:
        """Return the steps from data to latent, and the base."""
        kind = kind_of(dist)
        if kind == "Uniform":
            low = _numbers(dist.bijection.loc, self.features)
            high = low + _numbers(dist.bijection.scale, self.features)
            if np.ptp(low) > 0 or np.ptp(high) > 0:
                raise refused(path, "a Uniform of different intervals", "one interval for all features")
            return [], OfBase(_bases.Uniform(float(low[0]), float(high[0])))
        if kind == "StandardNormal":
            return [], OfBase(NORMAL)
        if kind == "_StandardStudentT":
            return [], student_t(path, _numbers(dist.df, self.features))
        if kind == "VmapMixture":
            return [], self._mixture(path, dist)
        if not (hasattr(dist, "base_dist") and hasattr(dist, "bijection")):
            do = f"other bases have no counterpart here: there are {', '.join(_bases.NAMES)}"
            raise refused_kind(path, dist, _BASES, do)
        steps = inverted(self.bijection(f"{path}.bijection", dist.bijection))
        more, base = self.distribution(f"{path}.base_dist", dist.base_dist)
        return [*steps, *more], base

    def _mixture(self, path: str, dist: Any) -> OfBase:
        """Read normal distributions whose arrays have an axis of components in front."""
        parts = dist.dist
        kinds = kind_of(parts), kind_of(getattr(parts, "base_dist", None)), kind_of(getattr(parts, "bijection", None))
        count = (len(_array(dist.log_normalized_weights)), self.features)
        if kinds[1:] == ("StandardNormal", "Affine"):
            loc, scale = (np.broadcast_to(_array(v), count) for v in (parts.bijection.loc, parts.bijection.scale))
        elif kinds[1:] == ("StandardNormal", "TriangularAffine") and parts.bijection.lower:
            loc, scale = np.broadcast_to(_array(parts.bijection.loc), count), _array(parts.bijection.triangular)
        else:
            raise refused(f"{path}.dist", named(kinds[0]), "a Normal or MultivariateNormal")
        return mixture(path, _array(dist.log_normalized_weights), loc, scale)

    def bijection(self, path: str, bijection: Any) -> list[Step]:
        kind = kind_of(bijection)
        if kind == "Invert":
            return inverted(self.bijection(f"{path}.bijection", bijection.bijection))
        if kind == "Chain":
            parts = enumerate(bijection.bijections)
            return [step for i, part in parts for step in self.bijection(f"{path}.bijections[{i}]", part)]
        if kind == "Scan":
            parts = enumerate(_unstacked(bijection.bijection))
            return [step for i, part in parts for step in self.bijection(f"{path}.bijection[{i}]", part)]
        read: dict[str, Callable[[At, Any], list[Step]]] = {
            "Coupling": self._coupling,
            "Permute": self._permute,
            "Flip": lambda at, _: [permutation(at, np.arange(self.features)[::-1])],
            "Identity": self._identity,
            "Affine": lambda at, b: self._diagonal(at, b.scale, b.loc),
            "Loc": lambda at, b: self._diagonal(at, 1.0, b.loc),
            "Scale": lambda at, b: self._diagonal(at, b.scale, 0.0),
            "TriangularAffine": lambda at, b: linear(at, _array(b.triangular), _numbers(b.loc, self.features)),
            "AdditiveCondition": self._shift,
        }
        if kind not in read:
            do = next((text for name, text in _INSTEAD.items() if name in kind), "")
            raise refused_kind(path, bijection, _KNOWN, do)
        return read[kind](At(path, kind), bijection)

    def _coupling(self, at: At, bijection: Any) -> list[Step]:
        kept, size = bijection.untransformed_dim, bijection.dim
        if size != self.features:
            raise refused(at.path, f"of {size} features", f"{self.features}, as the distribution")
        net = _network(f"{at.path}.conditioner", bijection.conditioner)
        inputs = len(net.tensors.get("coupling_dense_0.kernel", net.last.kernel))
        if inputs != kept + self.context:
            raise refused(f"{at.path}.conditioner", f"of {inputs} inputs", f"{kept + self.context}")
        moves = np.arange(kept, size)
        raw = _raw(at.path, bijection, len(moves))
        transform, numbers = _transform(f"{at.path}.transformer", raw)
        return [coupling(at, moves, transform, net, {n: column.head(net.last, raw) for n, column in numbers.items()})]

    def _identity(self, at: At, _: Any) -> list[Step]:
        self.identities.append(at)
        return []

    def _permute(self, at: At, bijection: Any) -> list[Step]:
        (order,) = bijection.permutation
        return [permutation(at, np.asarray(order))]

    def _diagonal(self, at: At, scale: Any, loc: Any) -> list[Step]:
        return diagonal(at, *(_numbers(v, self.features) for v in (scale, loc)), trained=True)

    def _shift(self, at: At, bijection: Any) -> list[Step]:
        """All features move by what a network makes of the condition."""
        net = _network(f"{at.path}.module", bijection.module)
        last = net.last
        if len(last.bias) == 1:
            last = last.of_outputs(np.zeros(self.features, np.intp))
        return [coupling(at, np.arange(self.features), Additive(), net, {"translation": last})]


def _array(values: Any) -> Array:
    return np.array(values, np.float64)


def _numbers(values: Any, size: int) -> Array:
    return np.broadcast_to(_array(values), (size,))


def _unstacked(tree: Any) -> list[Any]:
    """Return the bijections whose arrays are stacked along a first axis."""
    tools = sys.modules["jax"].tree_util
    counts = {leaf.shape[0] for leaf in tools.tree_leaves(tree) if _is_array(leaf)}
    (count,) = counts
    return [tools.tree_map(lambda leaf, i=i: leaf[i] if _is_array(leaf) else leaf, tree) for i in range(count)]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic)


# ------------------------------------------------------------------------------------------------------- networks


def _network(path: str, net: Any) -> Net:
    """Return a Linear or an MLP of Equinox."""
    if kind_of(net) == "Linear":
        return mlp([], _dense(path, net), "relu")
    if kind_of(net) != "MLP":
        raise refused_kind(path, net, "an MLP or a Linear of Equinox")
    layers = list(net.layers)
    if getattr(net, "scan", False) and len(layers) == 3:
        layers = [layers[0], *_unstacked(layers[1]), layers[2]]
    *hidden, last = (_dense(f"{path}.layers[{i}]", layer) for i, layer in enumerate(layers))
    probes = np.array([-2.0, -0.5, 0.0, 0.3, 3.0])
    if not np.allclose(_called(net.final_activation)(probes), probes, atol=1e-6):
        raise refused(f"{path}.final_activation", str(net.final_activation), "the identity")
    if not hidden:
        return mlp([], last, "relu")
    activation = _activations.recognised(f"{path}.activation", net.activation, _called(net.activation))
    return mlp(hidden, last, activation)


def _called(function: Any) -> Callable[[Array], Array]:
    """Return a function of arrays of NumPy for one of JAX."""
    return lambda values: _array(function(sys.modules["jax"].numpy.asarray(values)))


def _dense(path: str, layer: Any) -> Dense:
    if kind_of(layer) != "Linear" or np.ndim(layer.weight) != 2:
        raise refused_kind(path, layer, "a Linear of a weight [out, in]")
    return Dense.of(_array(layer.weight), None if layer.bias is None else _array(layer.bias))


# ----------------------------------------------------------------------------------------------------- transformers


class _Raw(NamedTuple):
    """The transformer that a network's zeros make, and how its outputs enter."""

    transformer: Any
    places: Any
    """The same tree, with the number of the output that is added to each element."""
    outputs: int
    """Those for each feature."""
    features: int


class _Column(NamedTuple):
    """Which outputs of a feature a head takes, and what is added to them."""

    places: NDArray[np.intp]  # [p]
    shift: Array  # [p]

    def head(self, last: Dense, raw: _Raw) -> Dense:
        """Return the head, parameter by parameter."""
        outputs = (self.places[:, None] + raw.outputs * np.arange(raw.features)).ravel()
        return last.of_outputs(outputs).scaled(1.0, np.repeat(self.shift, raw.features))


def _raw(path: str, bijection: Any, features: int) -> _Raw:
    """Ask the constructor of a coupling which output goes where: the order is that of its fields."""
    outputs = bijection.conditioner.out_size
    count = outputs // features
    make, numpy, tools = bijection.transformer_constructor, sys.modules["jax"].numpy, sys.modules["jax"].tree_util
    start, numbered = make(numpy.zeros(count)), make(numpy.arange(1.0, count + 1))

    def place(before: Any, after: Any) -> Any:
        return np.rint(_array(after) - _array(before)).astype(np.intp) - 1 if _is_array(before) else before

    return _Raw(start, tools.tree_map(place, start, numbered), count, features)


def _transform(path: str, raw: _Raw) -> tuple[Transform, dict[str, _Column]]:
    kind = kind_of(raw.transformer)
    if kind == "Affine":
        return _affine(path, raw)
    if kind == "Loc":
        return Additive(), {"translation": _column(f"{path}.loc", raw.transformer.loc, raw.places.loc)}
    if kind == "RationalQuadraticSpline":
        return _spline(path, raw)
    raise refused(path, f"a {kind}", "an Affine, Loc or RationalQuadraticSpline", "other maps have no counterpart here")


def _column(path: str, start: Any, places: Any) -> _Column:
    """Return where an array of raw numbers comes from; a frozen one comes from nowhere."""
    if not _is_array(start) or np.any(np.asarray(places) < 0):
        raise refused(path, f"a {kind_of(start)} that the network does not give", "an array that it gives")
    return _Column(np.ravel(places).astype(np.intp), np.ravel(_array(start)))


def _affine(path: str, raw: _Raw) -> tuple[Transform, dict[str, _Column]]:
    start, places = raw.transformer, raw.places
    if kind_of(start.scale) != "Parameterize":
        raise refused(f"{path}.scale", f"a {kind_of(start.scale)}", "a Parameterize of softplus(u) + number or exp(u)")
    translation = _column(f"{path}.loc", start.loc, places.loc)
    scale = _column(f"{path}.scale", start.scale.args[0], places.scale.args[0])
    probes = np.array([-4.0, -1.0, 0.0, 0.5, 3.0])
    found = _called(start.scale.fn)(probes)
    if np.allclose(found, np.exp(probes), rtol=1e-5):
        return Affine("identity"), {"scale": scale, "translation": translation}
    low = _least(f"{path}.scale", start.scale.fn)
    offset = float(scale.shift[0])
    heads = {"scale": _Column(scale.places, np.zeros(1)), "translation": translation}
    return Affine("softplus", low=low, high=math.inf, offset=offset), heads


def _least(path: str, function: Any) -> float:
    """Return the number that a function adds to softplus; refuse another function."""
    probes = np.array([-4.0, -1.0, 0.0, 0.5, 3.0, 20.0])
    low = float(_called(function)(np.array([-200.0]))[0])
    if low < 0 or not np.allclose(_called(function)(probes), low + np.logaddexp(0, probes), rtol=1e-5):
        raise refused(path, "another function", "softplus(u) + a number, or exp(u) for a scale")
    return _short(low)


def _short(value: float) -> float:
    """Return the decimal that float32 holds of it, 0.01 for 0.009999999776."""
    short = float(f"{value:.7g}")
    return short if np.float32(short) == np.float32(value) else value


def _spline(path: str, raw: _Raw) -> tuple[Transform, dict[str, _Column]]:
    start, places = raw.transformer, raw.places
    if kind_of(start.x_pos) != "RealToIncreasingOnInterval" or kind_of(start.derivatives) != "Parameterize":
        raise refused(path, "a RationalQuadraticSpline of another version", "one of flowjax 18 or newer")
    bins, (lower, upper) = start.knots + 1, start.interval
    widths = _column(f"{path}.x_pos", start.x_pos.arr, places.x_pos.arr)
    heights = _column(f"{path}.y_pos", start.y_pos.arr, places.y_pos.arr)
    derivatives = _column(f"{path}.derivatives", start.derivatives.args[0], places.derivatives.args[0])
    if len(widths.places) != bins or len(derivatives.places) != bins + 1:
        raise refused(path, "a RationalQuadraticSpline of another version", "one of flowjax 18 or newer")
    least, span = _least(f"{path}.derivatives", start.derivatives.fn), float(upper) - float(lower)
    offset = _identity_offset(least, 1.0) or 0.0
    spline = Spline(
        bins,
        interval=(float(lower), float(upper)),
        min_bin_width=float(start.x_pos.min_width) / span,
        min_bin_height=float(start.y_pos.min_width) / span,
        min_derivative=least,
        derivative_offset=offset,
        boundary="free",
    )
    derivatives = _Column(derivatives.places, derivatives.shift - offset)
    return spline, {"widths": widths, "heights": heights, "derivatives": derivatives}


# --------------------------------------------------------------------------------------------------------- parity


class _FlowjaxPeer:
    """The distribution in float64."""

    def __init__(self, dist: Any) -> None:
        with _jax.in_float64():
            self._dist = sys.modules["paramax"].unwrap(_doubled(dist))
            self._parts, base = [], self._dist
            while hasattr(base, "base_dist") and kind_of(base) != "Uniform":
                self._parts.append(base.bijection)
                base = base.base_dist

    def _mapped(self, function: Callable[..., Any], rows: Array, context: Array | None) -> Any:
        """Call a function of a row and its condition, or None, for all rows."""
        jax = sys.modules["jax"]
        with _jax.in_float64():
            given = [jax.numpy.asarray(v) for v in (rows, context) if v is not None]
            found = jax.jit(jax.vmap(lambda x, c=None: function(x, c)))(*given)
            return jax.tree_util.tree_map(np.asarray, found)

    def forward(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        def walk(row: Any, condition: Any) -> tuple[Any, Any]:
            log_det = 0.0
            for bijection in self._parts:
                row, step = bijection.inverse_and_log_det(row, condition)
                log_det = log_det + step
            return row, log_det

        z, log_det = self._mapped(walk, x, context)
        return z, log_det

    def inverse(self, z: Array, context: Array | None) -> Array:
        def walk(row: Any, condition: Any) -> Any:
            for bijection in reversed(self._parts):
                row, _ = bijection.transform_and_log_det(row, condition)
            return row

        found: Array = self._mapped(walk, z, context)
        return found

    def log_prob(self, x: Array, context: Array | None) -> Array:
        found: Array = self._mapped(self._dist._log_prob, x, context)
        return found


def _doubled(dist: Any) -> Any:
    """Return a distribution of float64 arrays, those in the constructors of its couplings among them."""
    jax = sys.modules["jax"]
    equinox, utils = sys.modules["equinox"], sys.modules["flowjax.utils"]

    def cast(leaf: Any) -> Any:
        if kind_of(leaf) == "Coupling":
            return couple(leaf)
        return jax.numpy.asarray(_array(leaf)) if equinox.is_inexact_array(leaf) else leaf

    def couple(coupling: Any) -> Any:
        count = coupling.conditioner.out_size // (coupling.dim - coupling.untransformed_dim)
        make = coupling.transformer_constructor
        try:
            start = make(jax.numpy.zeros(count, np.float32))
        except TypeError:
            start = make(jax.numpy.zeros(count))
        frozen = sys.modules["paramax"].NonTrainable
        constructor, _ = utils.get_ravelled_pytree_constructor(
            jax.tree_util.tree_map(cast, start),
            filter_spec=equinox.is_inexact_array,
            is_leaf=lambda leaf: isinstance(leaf, frozen),
        )
        net = jax.tree_util.tree_map(cast, coupling.conditioner)
        return equinox.tree_at(lambda c: (c.transformer_constructor, c.conditioner), coupling, (constructor, net))

    return jax.tree_util.tree_map(cast, dist, is_leaf=lambda leaf: kind_of(leaf) == "Coupling")
