"""Flows of zuko; compared with version 1.6."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

import nvpflow.importers._activations as _activations
import nvpflow.importers._torch as _torch
from nvpflow import _bases
from nvpflow._bases import NORMAL
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
    actnorm,
    affine_heads,
    coupling,
    diagonal,
    element_spline,
    inverted,
    linear,
    mixture,
    permutation,
    spline_columns,
    spline_heads,
    student_t,
)
from nvpflow.importers._refusal import attribute, described, kind_of, named, refused, refused_kind, way_of_tensors
from nvpflow.layers import Additive, Affine, Spline

_SLOPE, _BOUND = 1e-3, 5.0  # zuko's defaults


def from_zuko(model: Any, *, dtype: DTypeLike = "float32", check: bool = True) -> Flow:
    """Return the flow of a `zuko.flows.Flow` of couplings, with its weights.

    Parameters
    ----------
    model
        ``zuko.flows.RealNVP``, ``NICE``, ``MAF`` and ``NSF`` with ``passes=2``, or a ``Flow`` of
        ``GeneralCouplingTransform`` and what the guide lists; trained or not, on any device. It stays as it is.
    dtype
        Of the flow, "float32" or "float64".
    check
        Raise `ParityError` where the two differ. False: the report says so, and the flow is returned.

    Returns
    -------
    Flow
        On the CPU; `Flow.import_report` says how exactly it agrees with `model`.

    Raises
    ------
    TypeError
        `model` is not a flow of zuko.
    ValueError
        A part of it has no counterpart here; the message begins with its path.
    ParityError
        The flow is not `model`.
    """
    if not (hasattr(model, "transform") and hasattr(model, "base") and hasattr(model, "parameters")):
        raise TypeError(
            f"model is {described(model)}, expected a zuko.flows.Flow, such as zuko.flows.RealNVP(...)"
            f"{way_of_tensors(model)}"
        )
    recipe, latents = recipe_of(model)
    recipe.version = _torch.version_of("zuko")
    return imported(recipe, ZukoPeer(model, latents), dtype=dtype, check=check)


class Latents(NamedTuple):
    """The base: nvpflow's, and by what latents there are shifted and scaled [D] where they are not those here."""

    own: OfBase
    loc: Array | float = 0.0
    scale: Array | None = None


def recipe_of(model: Any, name: str = "flow") -> tuple[Recipe, Latents]:
    """Return what a flow of zuko is; model: live, or of tensors."""
    walk = _Walk(_sizes(name, model))
    steps = walk.transform(f"{name}.transform", model.transform)
    latents = _latents(f"{name}.base", model.base, walk.size)
    if latents.scale is not None:
        at = At(f"{name}.base", kind_of(model.base))
        steps.append(actnorm(at, np.log(latents.scale), latents.loc, inverse=True))
    recipe = Recipe("zuko", "", walk.size.features, walk.size.context, steps, *latents.own)
    recipe.identities = walk.identities
    return recipe, latents


class _Sizes(NamedTuple):
    features: int
    context: int


def _sizes(name: str, model: Any) -> _Sizes:
    """Return how many features and numbers of a context there are, from the first layer that tells."""
    for path, layer in _leaves(f"{name}.transform", model.transform):
        if kind_of(layer) == "GeneralCouplingTransform":
            mask = _mask(path, layer)
            return _Sizes(
                len(mask), _torch.dense_layers(f"{path}.hyper", layer.hyper)[0].kernel.shape[0] - int(mask.sum())
            )
        if kind_of(layer) == "MaskedAutoregressiveTransform":
            hyper = _torch.dense_layers(f"{path}.hyper", layer.hyper)
            features = len(hyper[-1].bias) // attribute(path, layer, "total")
            return _Sizes(features, len(hyper[0].kernel) - features)
        if kind_of(layer) == "ElementWiseTransform" and hasattr(layer, "hyper"):
            hyper = _torch.dense_layers(f"{path}.hyper", layer.hyper)
            return _Sizes(len(hyper[-1].bias) // attribute(path, layer, "total"), len(hyper[0].kernel))
    raise refused(f"{name}.transform", f"{named(kind_of(model.transform))} without a coupling", _KNOWN)


_KNOWN = "GeneralCouplingTransform or MaskedAutoregressiveTransform with passes=2 of zuko.flows"


def _leaves(path: str, transform: Any) -> list[tuple[str, Any]]:
    """Return the transforms that are not made of others, with their paths, data side first."""
    if kind_of(transform) == "LazyComposedTransform":
        parts = ((f"{path}.transforms[{i}]", part) for i, part in enumerate(transform.transforms))
        return [leaf for at, part in parts for leaf in _leaves(at, part)]
    if kind_of(transform) == "LazyInverse":
        return _leaves(f"{path}.transform", transform.transform)[::-1]
    return [(path, transform)]


class _Walk:
    """One pass over the transforms of a flow."""

    def __init__(self, size: _Sizes) -> None:
        self.size = size
        self.identities: list[At] = []

    def transform(self, path: str, transform: Any) -> list[Step]:
        kind = kind_of(transform)
        if kind == "LazyComposedTransform":
            parts = enumerate(transform.transforms)
            return [step for i, part in parts for step in self.transform(f"{path}.transforms[{i}]", part)]
        if kind == "LazyInverse":
            return inverted(self.transform(f"{path}.transform", transform.transform))
        read = {
            "GeneralCouplingTransform": self._coupling,
            "MaskedAutoregressiveTransform": self._two_passes,
            "ElementWiseTransform": self._elementwise,
            "UnconditionalTransform": self._unconditional,
            "Unconditional": self._unconditional,
        }.get(kind)
        if read is None:
            raise refused_kind(path, transform, _KNOWN)
        return read(At(path, kind), transform)

    def _coupling(self, at: At, transform: Any) -> list[Step]:
        mask = _mask(at.path, transform)
        transformed = np.flatnonzero(~mask)
        if len(mask) != self.size.features:
            raise refused(at.path, f"of {len(mask)} features", f"{self.size.features}, as in the other layers")
        univariate = _univariate(at.path, transform)
        net = _torch.sequential(f"{at.path}.hyper", transform.hyper)
        heads = univariate.heads(net.last, np.arange(len(transformed)))
        return [coupling(at, transformed, univariate.transform, net, heads)]

    def _two_passes(self, at: At, transform: Any) -> list[Step]:
        """Group 1 given group 0, which has not changed yet; then group 0, given the context alone."""
        groups = _groups(at.path, transform)
        univariate = _univariate(at.path, transform)
        net = _torch.sequential(f"{at.path}.hyper", transform.hyper)
        features, context = self.size
        steps = []
        for i, group in reversed(list(enumerate(groups))):
            if i or context:  # the kernel's mask is zero where a group must not look
                others = np.setdiff1d(np.arange(features), group)
                part = _of_inputs(net, np.concatenate([others, features + np.arange(context)]))
                steps.append(coupling(at, group, univariate.transform, part, univariate.heads(part.last, group)))
            else:
                constants = _of_nothing(net).reshape(features, -1)[group]
                steps += univariate.by_itself(at, group, constants, features)
        return steps

    def _elementwise(self, at: At, transform: Any) -> list[Step]:
        univariate = _univariate(at.path, transform)
        features = np.arange(self.size.features)
        if hasattr(transform, "hyper"):
            net = _torch.sequential(f"{at.path}.hyper", transform.hyper)
            return [coupling(at, features, univariate.transform, net, univariate.heads(net.last, features))]
        constants = [_torch.array(part).reshape(len(features), -1) for part in transform.phi]
        return univariate.by_itself(at, features, np.concatenate(constants, axis=1), len(features))

    def _unconditional(self, at: At, transform: Any) -> list[Step]:
        """Read a transform of fixed arguments; it is made by calling it, and its attributes tell all."""
        function = getattr(transform, "f", None) or transform.meta
        name = getattr(function, "__name__", kind_of(function))
        if name not in _FIXED:
            raise refused(at.path, f"an UnconditionalTransform of {name}", f"one of {', '.join(_FIXED)}")
        at = At(at.path, f"{at.kind}({name})")
        trained = any(True for _ in transform.parameters())
        steps = _FIXED[name](at, _torch.without_gradients(lambda: transform()), self.size.features, trained)
        if not steps:
            self.identities.append(at)
        return steps


def _diagonal(at: At, scale: Any, shift: Any, size: int, trained: bool) -> list[Step]:
    numbers = (np.broadcast_to(_torch.array(value), (size,)) for value in (scale, shift))
    return diagonal(at, *numbers, trained=trained)


def _linear(at: At, matrix: Array, size: int) -> list[Step]:
    return linear(at, matrix, np.zeros(size))


# By the name of a transform: what it becomes, from the object, the number of features and whether it is trained.
_FIXED: dict[str, Callable[[At, Any, int, bool], list[Step]]] = {
    "IdentityTransform": lambda *_: [],
    "PermutationTransform": lambda at, made, *_: [permutation(at, _torch.indices(made.order))],
    "RotationTransform": lambda at, made, size, _: _linear(at, _torch.array(made.R), size),
    "LULinearTransform": lambda at, made, size, _: _linear(at, _torch.array(made.L) @ _torch.array(made.U), size),
    "MonotonicAffineTransform": lambda at, made, *rest: _diagonal(at, made.scale, made.shift, *rest),
    "AffineTransform": lambda at, made, *rest: _diagonal(at, made.scale, made.loc, *rest),
    "AdditiveTransform": lambda at, made, *rest: _diagonal(at, 1.0, made.shift, *rest),
}


def _mask(path: str, transform: Any) -> NDArray[np.bool_]:
    """Return the mask of a coupling, True where a feature stays as it is."""
    found: NDArray[np.bool_] = _torch.array(attribute(path, transform, "mask")) > 0
    return found


def _groups(path: str, transform: Any) -> list[NDArray[np.intp]]:
    """Return the features of each pass; refuse more than two passes."""
    order = getattr(transform, "order", None)
    if order is None:
        raise refused(path, "a MaskedAutoregressiveTransform of an adjacency matrix", "one with passes=2")
    passes = _torch.indices(order)
    if passes.max() > 1:
        count = int(passes.max()) + 1
        raise refused(
            path,
            f"a MaskedAutoregressiveTransform of {count} passes",
            "passes=2, which is a coupling",
            "train it with passes=2, or a flow of nvpflow.build, whose samples take one pass",
        )
    return [np.flatnonzero(passes == i) for i in range(int(passes.max()) + 1)]


# ---------------------------------------------------------------------------------------------------- univariates


class _Univariate(NamedTuple):
    """What is done to each transformed feature, from numbers that stand feature by feature."""

    transform: Transform

    def heads(self, last: Dense, features: NDArray[np.intp]) -> dict[str, Dense]:
        """Return the heads for features, which are counted as the network's outputs are."""
        if isinstance(self.transform, Additive):
            return {"translation": last.of_outputs(features)}
        if isinstance(self.transform, Affine):
            return affine_heads(last, scale=2 * features + 1, translation=2 * features)
        count = 3 * self.transform.num_bins - 1
        chosen = (features[:, None] * count + np.arange(count)).ravel()
        return spline_heads(last.of_outputs(chosen), len(features), self.transform)

    def by_itself(self, at: At, features: NDArray[np.intp], numbers: Array, size: int) -> list[Step]:
        """Return the steps where the numbers [feature, parameter] are constants."""
        if isinstance(self.transform, Spline):
            columns = spline_columns(1, self.transform)
            raw = (numbers[:, columns[name][:, 0]] for name in ("widths", "heights", "derivatives"))
            return [element_spline(at, features, self.transform, *raw)]
        log_scale, shift = np.zeros(size), np.zeros(size)
        shift[features] = numbers[:, 0]
        if isinstance(self.transform, Affine):
            assert self.transform.factor is not None
            u = numbers[:, 1]
            log_scale[features] = u / (1 + np.abs(u) / self.transform.factor)
        return [actnorm(at, log_scale, shift)]


def _univariate(path: str, transform: Any) -> _Univariate:
    univariate = attribute(path, transform, "univariate")
    function = getattr(univariate, "func", univariate)
    name, given = getattr(function, "__name__", kind_of(function)), dict(getattr(univariate, "keywords", {}))
    known = {"MonotonicAffineTransform": ("slope",), "MonotonicRQSTransform": ("slope", "bound")}
    known["AdditiveTransform"] = ()
    if name not in known:
        raise refused(
            f"{path}.univariate", name, f"one of {', '.join(known)}", "other maps have no closed inverse here"
        )
    if getattr(univariate, "args", ()) or not set(given) <= set(known[name]):
        raise refused(
            f"{path}.univariate", f"{name} with other arguments", f"{' and '.join(known[name]) or 'none'} by name"
        )
    if name == "AdditiveTransform":
        return _Univariate(Additive())
    bound = abs(math.log(given.get("slope", _SLOPE)))
    if name == "MonotonicAffineTransform":
        return _Univariate(Affine("softsign", bound=bound))
    bins = int(attribute(path, transform, "shapes")[0][0])
    return _Univariate(
        Spline(
            bins,
            float(given.get("bound", _BOUND)),
            min_bin_width=0.0,
            min_bin_height=0.0,
            min_derivative=0.0,
            derivative="exp",
            derivative_bound=bound,
            size_bound=bound / 2,
        )
    )


def _of_inputs(net: Net, rows: NDArray[np.intp]) -> Net:
    """Return a network for inputs of which the others are of no account."""
    first = "coupling_dense_0"
    if f"{first}.kernel" not in net.tensors:
        return net.__class__(net.network, net.tensors, net.last.of_inputs(rows), net.dropped, net.folded)
    kernel = net.tensors[f"{first}.kernel"][rows]
    return net.__class__(net.network, {**net.tensors, f"{first}.kernel": kernel}, net.last, net.dropped, net.folded)


def _of_nothing(net: Net) -> Array:
    """Return what a network gives whose inputs are of no account: a constant [outputs]."""
    h: Array | None = None
    for j in range(len(net.tensors) // 2):
        bias = net.tensors[f"coupling_dense_{j}.bias"]
        h = bias if h is None else h @ net.tensors[f"coupling_dense_{j}.kernel"] + bias
        h = _activations.computed(net.network.activation, h)
    return net.last.bias if h is None else h @ net.last.kernel + net.last.bias


# ----------------------------------------------------------------------------------------------------------- base


def _latents(path: str, base: Any, size: _Sizes) -> Latents:
    """Return the base: DiagNormal of any mean and scale, BoxUniform of one interval, or what a call of it makes."""
    name = kind_of(base)
    if name in ("UnconditionalDistribution", "Unconditional"):
        name = getattr(getattr(base, "f", None) or base.meta, "__name__", name)
    if name not in ("DiagNormal", "BoxUniform"):
        return _made(path, name, base, size.features)
    keys = ("loc", "scale") if name == "DiagNormal" else ("lower", "upper")
    low, high = (_argument(path, base, i, key, size.features) for i, key in enumerate(keys))
    if name == "DiagNormal":
        return _scaled(OfBase(NORMAL), low, high)
    if np.ptp(low) > 0 or np.ptp(high) > 0:
        raise refused(
            path, "a BoxUniform of different intervals", "one interval for all features", "scale the columns first"
        )
    return Latents(OfBase(_bases.Uniform(float(low[0]), float(high[0]))))


def _scaled(own: OfBase, loc: Array, scale: Array) -> Latents:
    return Latents(own) if np.all(loc == 0) and np.all(scale == 1) else Latents(own, loc, scale)


def _made(path: str, name: str, base: Any, features: int) -> Latents:
    """Read a StudentT of each feature, or a mixture of normal distributions, off the distribution that is made."""
    dist: Any = None
    if callable(base) and not hasattr(base, "hyper"):  # else it depends on the context
        dist = _torch.without_gradients(lambda: base())
    if kind_of(dist) == "Independent" and kind_of(dist.base_dist) == "StudentT":
        numbers = (_torch.array(getattr(dist.base_dist, key)) for key in ("df", "loc", "scale"))
        df, loc, scale = (np.broadcast_to(values, (features,)).copy() for values in numbers)
        return _scaled(student_t(path, df), loc, scale)
    logits: Any = None
    parts: Any = None
    if kind_of(dist) == "Mixture":
        logits, parts = dist.logits, dist.base
    elif kind_of(dist) == "MixtureSameFamily":
        logits, parts = dist.mixture_distribution.logits, dist.component_distribution
    scales = getattr(parts, "scale_tril", None)
    if scales is None and kind_of(getattr(parts, "base_dist", None)) == "Normal":
        scales = parts.base_dist.scale
    if scales is None:
        raise refused(
            path,
            named(name),
            "DiagNormal, BoxUniform, an Independent of StudentT, or GMM or another mixture of normal distributions",
            f"other bases have no counterpart here: there are {', '.join(_bases.NAMES)}",
        )
    count = (len(logits), features)
    loc, found = np.broadcast_to(_torch.array(parts.mean), count), _torch.array(scales)
    return Latents(mixture(path, _torch.array(logits), loc, np.broadcast_to(found, count + found.shape[2:])))


def _argument(path: str, base: Any, i: int, name: str, count: int) -> Array:
    found = getattr(base, f"_{i}", getattr(base, name, None))
    if found is None:
        raise refused(path, f"a distribution without {name}", f"{name} [{count}]")
    numbers = _torch.array(found)
    if numbers.shape not in ((), (1,), (count,)):
        raise refused(f"{path}.{name}", f"of shape {numbers.shape}", f"({count},)")
    return np.broadcast_to(numbers, (count,)).copy()


# --------------------------------------------------------------------------------------------------------- parity


class ZukoPeer:
    """The flow in float64: `forward`, `inverse` and `log_prob` as zuko computes them.

    embed: what makes the context that the flow is given of that of nvpflow's flow; None: they are one.
    """

    def __init__(self, model: Any, latents: Latents, embed: Any = None) -> None:
        self._model = _torch.in_double("flow", model)
        self._embed = None if embed is None else _torch.in_double("embedding_net", embed)
        self._loc, self._scale = (0.0, np.ones(1)) if latents.scale is None else (latents.loc, latents.scale)

    def _distribution(self, context: Array | None) -> Any:
        given = _torch.tensor(context)
        if given is None:
            return self._model()
        return self._model(given if self._embed is None else self._embed(given))

    def forward(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        def call() -> Any:
            return self._distribution(context).transform.call_and_ladj(_torch.tensor(x))

        z, log_det = map(_torch.array, _torch.without_gradients(call))
        return (z - self._loc) / self._scale, log_det - np.sum(np.log(self._scale))

    def inverse(self, z: Array, context: Array | None) -> Array:
        def call() -> Any:
            return self._distribution(context).transform.inv(_torch.tensor(z * self._scale + self._loc))

        return _torch.array(_torch.without_gradients(call))

    def log_prob(self, x: Array, context: Array | None) -> Array:
        return _torch.array(_torch.without_gradients(lambda: self._distribution(context).log_prob(_torch.tensor(x))))
