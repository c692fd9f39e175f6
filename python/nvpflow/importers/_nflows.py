"""Flows of nflows 0.14 and of its forks: those inside glasflow and nessai, pyknos, the newer master."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

import nvpflow.importers._torch as _torch
from nvpflow import _bases
from nvpflow._bases import NORMAL, Base
from nvpflow._transforms import Transform
from nvpflow.flow import Flow
from nvpflow.importers._parity import imported
from nvpflow.importers._recipe import (
    Array,
    At,
    Block,
    Dense,
    Net,
    Recipe,
    Step,
    actnorm,
    affine_heads,
    coupling,
    diagonal,
    element_spline,
    inverted,
    linear,
    lu_linear,
    mlp,
    permutation,
    residual,
    spline_heads,
)
from nvpflow.importers._refusal import (
    attribute,
    described,
    kind_of,
    library_of,
    named,
    refused,
    refused_kind,
    way_of_tensors,
)
from nvpflow.layers import ActNorm, Additive, Affine, Coupling, Spline


def from_nflows(model: Any, *, dtype: DTypeLike = "float32", check: bool = True) -> Flow:
    """Return the flow of an `nflows.flows.Flow` of couplings, with its weights as they act after training.

    Parameters
    ----------
    model
        A ``Flow`` of nflows, or of glasflow's and nessai's versions of it, whose transforms are couplings and what the
        guide lists. On any device, in either mode. It stays as it is.
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
        `model` is not a flow of nflows.
    ValueError
        A part of it has no counterpart here; the message begins with its path.
    ParityError
        The flow is not `model`.
    """
    if not (hasattr(model, "_transform") and hasattr(model, "_distribution")):
        raise TypeError(
            f"model is {described(model)}, expected an nflows.flows.Flow, such as SimpleRealNVP(...)"
            f"{way_of_tensors(model)}"
        )
    embedding = getattr(model, "_embedding_net", None)
    if embedding is not None and kind_of(embedding) != "Identity":
        raise refused_kind(
            "flow._embedding_net",
            embedding,
            "Identity: nvpflow's flow is given the context that the embedding makes",
            "import nflows.flows.Flow(flow._transform, flow._distribution) and embed contexts by flow._embedding_net",
        )
    recipe = recipe_of(model)
    library = library_of(model)
    recipe.library = library if library in ("glasflow", "nessai", "pyknos") else "nflows"
    recipe.version = _torch.version_of(recipe.library)
    return imported(recipe, NflowsPeer(model, recipe), dtype=dtype, check=check)


def recipe_of(model: Any, name: str = "flow") -> Recipe:
    """Return what a flow of nflows is; model: live, or of tensors."""
    walk = _Walk(*_sizes(f"{name}._transform", model._transform))
    steps = walk.transform(f"{name}._transform", model._transform)
    base, more = _latents(f"{name}._distribution", model._distribution, walk)
    recipe = Recipe("nflows", "", walk.features, walk.context, [*steps, *more], base)
    recipe.identities = walk.identities
    return recipe


_KNOWN = "an Affine, Additive or PiecewiseRationalQuadratic CouplingTransform, or a permutation or linear transform"


def _leaves(path: str, transform: Any) -> list[tuple[str, Any]]:
    """Return the transforms that are not made of others, with their paths."""
    if hasattr(transform, "_transforms") and kind_of(transform) != "MultiscaleCompositeTransform":
        parts = ((f"{path}._transforms[{i}]", part) for i, part in enumerate(transform._transforms))
        return [leaf for at, part in parts for leaf in _leaves(at, part)]
    if kind_of(transform) == "InverseTransform":
        return _leaves(f"{path}._transform", transform._transform)
    return [(path, transform)]


def _sizes(path: str, transform: Any) -> tuple[int, int]:
    """Return how many features and numbers of a context there are, from the first coupling."""
    for at, layer in _leaves(path, transform):
        if hasattr(layer, "transform_features"):
            kept, changed = len(layer.identity_features), len(layer.transform_features)
            return kept + changed, _inputs(f"{at}.transform_net", layer.transform_net) - kept
        if "Masked" in kind_of(layer):  # by name, not "without a coupling": most flows without one are these
            raise _unknown(at, layer)
    raise refused(path, f"{named(kind_of(transform))} without a coupling", _KNOWN)


def _unknown(path: str, transform: Any) -> ValueError:
    """Return the error to raise for a transform whose class has no reader."""
    kind = kind_of(transform)
    return refused_kind(path, transform, _KNOWN, _INSTEAD.get(kind, _INSTEAD["Masked"] if "Masked" in kind else ""))


class _Walk:
    """One pass over the transforms of a flow."""

    def __init__(self, features: int, context: int) -> None:
        self.features, self.context = features, context
        self.identities: list[At] = []

    def transform(self, path: str, transform: Any) -> list[Step]:
        kind = kind_of(transform)
        if kind in ("CompositeTransform", "CompositeCDFTransform"):
            parts = enumerate(transform._transforms)
            return [step for i, part in parts for step in self.transform(f"{path}._transforms[{i}]", part)]
        if kind == "InverseTransform":
            return inverted(self.transform(f"{path}._transform", transform._transform))
        at = At(path, kind)
        if kind == "IdentityTransform":
            self.identities.append(at)
            return []
        if hasattr(transform, "transform_features"):
            return self._coupling(at, transform)
        read = _READERS.get(kind)
        if read is None:
            raise _unknown(path, transform)
        return read(at, transform, self.features)

    def _coupling(self, at: At, transform: Any) -> list[Step]:
        kept, changed = map(_torch.indices, (transform.identity_features, transform.transform_features))
        if len(kept) + len(changed) != self.features:
            raise refused(
                at.path, f"of {len(kept) + len(changed)} features", f"{self.features}, as in the other layers"
            )
        inputs = _inputs(f"{at.path}.transform_net", transform.transform_net)
        if inputs - len(kept) != self.context:
            raise refused(
                at.path,
                f"a coupling under {inputs - len(kept)} numbers of context",
                f"{self.context}, as in the first coupling",
                "all couplings of a flow have one context here",
            )
        net = _network(f"{at.path}.transform_net", transform.transform_net)
        how, heads = _heads(at, transform, net, len(changed))
        return [coupling(at, changed, how, net, heads), *_unconditional(at, transform, kept)]


# ------------------------------------------------------------------------------------------------------ couplings


def _heads(at: At, transform: Any, net: Net, count: int) -> tuple[Transform, dict[str, Dense]]:
    """Return what a coupling does to so many features, and its heads."""
    first = np.arange(count)
    if at.kind == "AdditiveCouplingTransform":
        return Additive(), {"translation": net.last.of_outputs(first)}
    if at.kind == "AffineCouplingTransform":
        heads = affine_heads(net.last, scale=count + first, translation=first)
        return _log_scale(f"{at.path}.scale_activation", getattr(transform, "scale_activation", None)), heads
    if "RationalQuadratic" not in at.kind:
        raise refused_kind(at.path, transform, _KNOWN)
    spline = _spline(at.path, transform, int(attribute(at.path, transform, "num_bins")))
    hidden = getattr(transform.transform_net, "hidden_features", None)
    if hidden is None:
        return spline, spline_heads(net.last, count, spline)
    return spline, spline_heads(net.last, count, spline, size_factor=1 / math.sqrt(hidden))


def _log_scale(path: str, scale: Callable[[Any], Any] | None) -> Affine:
    """Return the log-scale of a function from what the network gives to the scale; None: that of version 0.14."""
    usual = Affine("sigmoid", low=1e-3, high=1.001, offset=2.0)
    if scale is None:
        return usual
    probes = np.array([-9.0, -4.0, -1.5, -0.3, 0.0, 0.4, 1.7, 2.5, 5.0, 12.0])
    try:
        found = np.log(_torch.array(scale(_torch.tensor(probes))))
    except Exception as error:
        raise refused(path, f"a function that fails on numbers ({type(error).__name__})", "one of tensors") from error
    largest = float(found[-1])
    known = [
        (usual, np.log(1e-3 + 1 / (1 + np.exp(-(probes + 2))))),
        (Affine("softplus", low=1e-3, high=3.0, offset=0.0), np.log(np.minimum(np.logaddexp(0, probes) + 1e-3, 3.0))),
        (Affine("identity"), probes),
    ]
    if 0 < largest < math.inf:  # glasflow's "log3" and the like
        bound = largest / math.tanh(probes[-1] / 2)
        known.append((Affine("tanh", factor=bound, divisor=2.0), bound * np.tanh(probes / 2)))
    for affine, expected in known:
        if np.all(np.abs(found - expected) <= 1e-9 * (1 + np.abs(expected))):
            return affine
    names = "sigmoid(u + 2) + 0.001, min(softplus(u) + 0.001, 3), exp(u), exp(N tanh(u / 2))"
    raise refused(path, str(getattr(scale, "__name__", kind_of(scale))), f"what computes one of {names}")


def _spline(path: str, transform: Any, bins: int) -> Spline:
    if transform.tails not in ("linear", None):
        raise refused(f"{path}.tails", repr(transform.tails), "'linear' or None")
    bounded = transform.tails is None
    interval = (0.0, 1.0) if bounded else (-float(transform.tail_bound), float(transform.tail_bound))
    return Spline(
        bins,
        interval=interval,
        min_bin_width=float(transform.min_bin_width),
        min_bin_height=float(transform.min_bin_height),
        min_derivative=float(transform.min_derivative),
        derivative_offset=0.0,
        boundary="free" if bounded else "one",
    )


def _unconditional(at: At, transform: Any, kept: ArrayLike) -> list[Step]:
    """Return the spline that a coupling applies to the features that it reads, after it has read them."""
    own = getattr(transform, "unconditional_transform", None)
    if own is None:
        return []
    at = At(f"{at.path}.unconditional_transform", kind_of(own))
    if at.kind != "PiecewiseRationalQuadraticCDF":
        raise refused_kind(at.path, own, "a PiecewiseRationalQuadraticCDF")
    return [_cdf(at, own, kept)]


def _cdf(at: At, transform: Any, features: ArrayLike) -> Step:
    raw = [_torch.array(getattr(transform, f"unnormalized_{name}")) for name in ("widths", "heights", "derivatives")]
    return element_spline(at, features, _spline(at.path, transform, raw[0].shape[-1]), *raw)


# ------------------------------------------------------------------------------------------------ other transforms


def _permutation(at: At, transform: Any, _: int) -> list[Step]:
    return [permutation(at, _torch.indices(transform._permutation))]


def _pointwise_affine(at: At, transform: Any, size: int) -> list[Step]:
    scale, shift = (np.broadcast_to(_torch.array(v), (size,)) for v in (transform._scale, transform._shift))
    return diagonal(at, scale, shift, trained=False)


def _actnorm(at: At, transform: Any, _: int) -> list[Step]:
    return [actnorm(at, _torch.array(transform.log_scale), _torch.array(transform.shift))]


def _batch_norm(at: At, transform: Any, _: int) -> list[Step]:
    scale = (np.logaddexp(0.0, _torch.array(transform.unconstrained_weight)) + transform.eps) / np.sqrt(
        _torch.array(transform.running_var) + transform.eps
    )
    shift = _torch.array(transform.bias) - _torch.array(transform.running_mean) * scale
    found = actnorm(at, np.log(scale), shift)
    note = "BatchNorm between layers, as it acts after training, in an ActNorm"
    return [at.step(found.layer, found.tensors, folded=(note,))]


def _lu_linear(at: At, transform: Any, _: int) -> list[Step]:
    diagonal_of_u = np.logaddexp(0.0, _torch.array(transform.unconstrained_upper_diag)) + transform.eps
    triangles = _torch.array(transform.lower_entries), _torch.array(transform.upper_entries)
    return [lu_linear(at, *triangles, diagonal_of_u, _torch.array(transform.bias))]


def _naive_linear(at: At, transform: Any, _: int) -> list[Step]:
    return linear(at, _torch.array(transform._weight), _torch.array(transform.bias))


def _svd_linear(at: At, transform: Any, _: int) -> list[Step]:
    middle = np.logaddexp(0.0, _torch.array(transform.unconstrained_diagonal)) + transform.eps
    first, last = _householder(transform.orthogonal_2), _householder(transform.orthogonal_1)
    return linear(at, last @ (middle[:, None] * first), _torch.array(transform.bias))


def _qr_linear(at: At, transform: Any, size: int) -> list[Step]:
    upper = np.diag(np.exp(_torch.array(transform.log_upper_diag)))
    upper[np.triu_indices(size, 1)] = _torch.array(transform.upper_entries)
    return linear(at, _householder(transform.orthogonal) @ upper, _torch.array(transform.bias))


def _orthogonal(at: At, transform: Any, size: int) -> list[Step]:
    return linear(at, _householder(transform), np.zeros(size))


def _householder(sequence: Any) -> Array:
    """Return the matrix of reflections, the first one applied first."""
    vectors = _torch.array(sequence.q_vectors)
    matrix = np.eye(vectors.shape[1])
    for q in vectors:
        matrix -= np.outer(2 / (q @ q) * q, q @ matrix)
    return matrix


_READERS: dict[str, Callable[[At, Any, int], list[Step]]] = {
    **dict.fromkeys(("Permutation", "RandomPermutation", "ReversePermutation"), _permutation),
    **dict.fromkeys(("PointwiseAffineTransform", "AffineTransform", "AffineScalarTransform"), _pointwise_affine),
    "ActNorm": _actnorm,
    "BatchNorm": _batch_norm,
    "LULinear": _lu_linear,
    "NaiveLinear": _naive_linear,
    "SVDLinear": _svd_linear,
    "QRLinear": _qr_linear,
    "HouseholderSequence": _orthogonal,
    "PiecewiseRationalQuadraticCDF": lambda at, transform, size: [_cdf(at, transform, np.arange(size))],
}
_INSTEAD = {
    "Masked": "it takes D passes one way; train couplings, or a flow of nvpflow.build",
    "MultiscaleCompositeTransform": "flows of images have no counterpart here",
    "SqueezeTransform": "flows of images have no counterpart here",
    "OneByOneConvolution": "flows of images have no counterpart here",
    "Logit": "transform the data yourself and add the log-derivative to log p",
    "Sigmoid": "transform the data yourself and add the log-derivative to log p",
}


# ------------------------------------------------------------------------------------------------------- networks


def _inputs(path: str, net: Any) -> int:
    """Return how many numbers a network takes, those of the context among them."""
    for name in ("initial_layer", "_input_layer"):
        if hasattr(net, name):
            return len(_torch.dense(f"{path}.{name}", getattr(net, name)).kernel)
    if hasattr(net, "spline_predictor"):
        return len(_torch.dense(f"{path}.spline_predictor[0]", net.spline_predictor[0]).kernel)
    raise refused_kind(path, net, "ResidualNet or MLP of nflows.nn.nets")


def _network(path: str, net: Any) -> Net:
    if hasattr(net, "blocks") and hasattr(net, "initial_layer") and hasattr(net, "final_layer"):
        return _residual(path, net)
    if hasattr(net, "_hidden_layers") and hasattr(net, "_output_layer"):
        return _mlp(path, net)
    if hasattr(net, "spline_predictor"):  # sbi's, for one feature: it takes the context alone
        return _torch.sequential(f"{path}.spline_predictor", net.spline_predictor)
    raise refused_kind(path, net, "ResidualNet or MLP of nflows.nn.nets")


def _mlp(path: str, net: Any) -> Net:
    if getattr(net, "_activate_output", False):
        raise refused(path, "an MLP with activate_output=True", "a linear last layer")
    dropped = tuple(note for layer in getattr(net, "_dropout_layers", ()) for note in _torch.dropout_note(layer))
    hidden = [_torch.dense(f"{path}._input_layer", net._input_layer)]
    hidden += [_torch.dense(f"{path}._hidden_layers[{i}]", layer) for i, layer in enumerate(net._hidden_layers)]
    last = _torch.dense(f"{path}._output_layer", net._output_layer)
    name = "_activation" if hasattr(net, "_activation") else "_activation_fn"  # glasflow's
    return mlp(hidden, last, _torch.activation(f"{path}.{name}", getattr(net, name)), dropped=dropped)


def _residual(path: str, net: Any) -> Net:
    activations, blocks = [], []
    dropped: tuple[str, ...] = ()
    for i, block in enumerate(net.blocks):
        at = f"{path}.blocks[{i}]"
        if not hasattr(block, "linear_layers"):
            raise refused_kind(at, block, "a ResidualBlock of two linear layers")
        activations.append((f"{at}.activation", block.activation))
        blocks.append(_block(at, block))
        dropped += _torch.dropout_note(getattr(block, "dropout", None))
    initial, last = (_torch.dense(f"{path}.{name}", getattr(net, name)) for name in ("initial_layer", "final_layer"))
    note = "BatchNorm1d in residual blocks, as it acts after training"
    folded = (note,) * sum(block.affine is not None for block in blocks)
    return residual(initial, blocks, last, _torch.one_activation(activations), dropped=dropped, folded=folded)


def _block(path: str, block: Any) -> Block:
    """Return a block; its second batch normalization becomes part of the dense layer before it, the first cannot."""
    first, second = (_torch.dense(f"{path}.linear_layers[{i}]", block.linear_layers[i]) for i in range(2))
    gate = getattr(block, "context_layer", None)
    affine = None
    if block.use_batch_norm:
        norms = [_torch.batch_norm(f"{path}.batch_norm_layers[{i}]", block.batch_norm_layers[i]) for i in range(2)]
        affine, first = norms[0], first.scaled(*norms[1])
    return Block(first, second, affine, None if gate is None else _torch.dense(f"{path}.context_layer", gate))


# ----------------------------------------------------------------------------------------------------------- base


def _latents(path: str, base: Any, walk: _Walk) -> tuple[Base, list[Step]]:
    """Return the base, and the layers between its latents and nflows'."""
    at = At(path, kind_of(base))
    if at.kind == "StandardNormal":
        return NORMAL, []
    if at.kind == "DiagonalNormal":
        mean, log_std = (_torch.array(v).ravel() for v in (base.mean_, base.log_std_))
        return NORMAL, [actnorm(at, log_std, mean, inverse=True)]
    if at.kind == "MultivariateNormal" and hasattr(base, "_var"):  # nessai's
        log_std = np.full(walk.features, 0.5 * math.log(base._var))
        return NORMAL, [actnorm(at, log_std, np.zeros(walk.features), inverse=True)]
    if at.kind == "ConditionalDiagonalNormal":
        return NORMAL, [_conditional_normal(at, base, walk)]
    if at.kind in ("BoxUniform", "MultivariateUniform"):  # the second one is glasflow's
        uniform = getattr(base, "base_dist", base)
        low, high = (np.broadcast_to(_torch.array(v), (walk.features,)) for v in (uniform.low, uniform.high))
        if np.ptp(low) > 0 or np.ptp(high) > 0:
            raise refused(path, f"a {at.kind} of different intervals", "one interval for all features")
        return _bases.Uniform(float(low[0]), float(high[0])), []
    raise refused_kind(
        path,
        base,
        "StandardNormal, DiagonalNormal, ConditionalDiagonalNormal with a Linear or BoxUniform",
        f"other bases have no counterpart here: there are {', '.join(_bases.NAMES)}",
    )


def _conditional_normal(at: At, base: Any, walk: _Walk) -> Step:
    """Return the coupling of all features, given the context, from latents here to those of the base."""
    size = walk.features
    if kind_of(base._context_encoder) != "Linear":
        raise refused_kind(f"{at.path}._context_encoder", base._context_encoder, "a Linear")
    net = mlp([], _torch.dense(f"{at.path}._context_encoder", base._context_encoder), "relu")
    heads = affine_heads(net.last, scale=size + np.arange(size), translation=np.arange(size))
    layer = Coupling("all", Affine("identity"), net.network, inverse=True)
    return at.step(layer, {f"{name}.{part}": v for name, d in heads.items() for part, v in d._asdict().items()})


# --------------------------------------------------------------------------------------------------------- parity


class NflowsPeer:
    """The flow in float64: `forward`, `inverse` and `log_prob` as nflows computes them.

    embed: what makes the context that the flow is given of that of nvpflow's flow; None: they are one.
    """

    def __init__(self, model: Any, recipe: Recipe, embed: Any = None) -> None:
        self._model = _torch.in_double("flow", model)
        if hasattr(self._model, "_embedding_net"):
            self._model._embedding_net = _torch.identity()
        base = self._model._distribution
        if kind_of(base) == "StandardNormal":  # whose constant sbi rounds to float32
            base._log_z = _torch.tensor(np.array(0.5 * np.prod(base._shape) * math.log(2 * math.pi)))
        self._embed = None if embed is None else _torch.in_double("embedding_net", embed)
        last = recipe.steps[-1]
        self._of_base = last.tensors if isinstance(last.layer, ActNorm) and last.path.endswith("._distribution") else {}

    def forward(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        given = _torch.tensor(x), self._embedded(context)
        z, log_det = map(_torch.array, _torch.without_gradients(lambda: self._model._transform(*given)))
        mean, log_std = self._latents(context)
        return (z - mean) * np.exp(-log_std), log_det - np.sum(np.broadcast_to(log_std, z.shape), axis=1)

    def inverse(self, z: Array, context: Array | None) -> Array:
        mean, log_std = self._latents(context)
        given = _torch.tensor(z * np.exp(log_std) + mean), self._embedded(context)
        return _torch.array(_torch.without_gradients(lambda: self._model._transform.inverse(*given)[0]))

    def log_prob(self, x: Array, context: Array | None) -> Array:
        given = _torch.tensor(x), self._embedded(context)
        return _torch.array(_torch.without_gradients(lambda: self._model.log_prob(*given)))

    def _embedded(self, context: Array | None) -> Any:
        given, embed = _torch.tensor(context), self._embed
        if given is None or embed is None:
            return given
        return _torch.without_gradients(lambda: embed(given))

    def _latents(self, context: Array | None) -> tuple[Array, Array]:
        """Return mean and log of the standard deviation of latents there, which are a layer here."""
        base = self._model._distribution
        if kind_of(base) == "ConditionalDiagonalNormal":
            found = _torch.without_gradients(lambda: base._compute_params(self._embedded(context)))
            mean, log_std = map(_torch.array, found)
            return mean, log_std
        return np.asarray(self._of_base.get("shift", 0.0)), np.asarray(self._of_base.get("log_scale", 0.0))
