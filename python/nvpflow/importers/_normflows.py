"""Flows of normflows 1.7: `NormalizingFlow` and `ConditionalNormalizingFlow`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import nvpflow.importers._nflows as _nflows
import nvpflow.importers._sequential as _sequential
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
    coupling_of_two,
    inverted,
    linear,
    lu_linear,
    mixture,
    permutation,
)
from nvpflow.importers._refusal import attribute, described, kind_of, refused, refused_kind
from nvpflow.layers import Additive, Affine


def from_normflows(model: Any, *, dtype: DTypeLike = "float32", check: bool = True) -> Flow:
    """Return the flow of a `normflows.NormalizingFlow` of couplings, with its weights as they act after training.

    Parameters
    ----------
    model
        A ``NormalizingFlow``, or a ``ConditionalNormalizingFlow``, whose flows are couplings and what the guide lists,
        over a DiagGaussian, GaussianMixture or Uniform; on any device, in either mode. It stays as it is.
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
        `model` is no flow of normflows.
    ValueError
        A part of it has no counterpart here; the message begins with its path.
    ParityError
        The flow is not `model`.
    """
    if not (hasattr(model, "flows") and hasattr(model, "q0")):
        raise TypeError(f"model is {described(model)}, expected a normflows.NormalizingFlow of q0 and flows")
    walk = _Walk(*_sizes(model))
    steps = [
        step
        for i, flow in reversed(list(enumerate(model.flows)))
        for step in inverted(walk.flow(f"flow.flows[{i}]", flow))
    ]
    base, more = _latents("flow.q0", model.q0, walk)
    recipe = Recipe("normflows", _torch.version_of("normflows"), walk.features, walk.context, [*steps, *more], *base)
    return imported(recipe, _NormflowsPeer(model, more), dtype=dtype, check=check)


_KNOWN = (
    "an AffineCouplingBlock, MaskedAffineFlow, CoupledRationalQuadraticSpline, AffineConstFlow, ActNorm, Permute, "
    "InvertibleAffine or LULinearPermute"
)
_INSTEAD = {
    "BatchNorm": "it normalizes by the batch at hand and has no inverse; train with ActNorm",
    "Circular": "circular splines have no counterpart here",
    "Autoregressive": "it takes D passes one way; train couplings, or a flow of nvpflow.build",
    "CCAffineConst": "class-conditional layers have no counterpart here",
    "GlowBlock": "flows of images have no counterpart here",
    "Squeeze": "flows of images have no counterpart here",
    "Invertible1x1Conv": "flows of images have no counterpart here",
    "Planar": "it has no closed inverse",
    "Radial": "it has no closed inverse",
    "Residual": "it has no closed inverse",
}


def _sizes(model: Any) -> tuple[int, int]:
    """Return how many features and numbers of a context there are."""
    shape = (model.q0.dim,) if kind_of(model.q0) == "GaussianMixture" else getattr(model.q0, "shape", None)
    if shape is None:
        raise refused_kind("flow.q0", model.q0, _BASES, _NO_BASE)
    if len(shape) != 1:
        raise refused("flow.q0", f"a {kind_of(model.q0)} of shape {tuple(shape)}", "one of rows, (D,)")
    context = 0
    for i, flow in enumerate(model.flows):
        net = getattr(getattr(flow, "prqct", None), "transform_net", None)
        if (size := getattr(net, "context_features", None)) is not None:
            context = context or int(size)
            if size != context:
                raise refused(
                    f"flow.flows[{i}]", f"a coupling under {size} numbers of context", f"{context}, as before"
                )
    if (encoder := getattr(model.q0, "context_encoder", None)) is not None:
        context = context or _sequential.inputs_of(_sequential.network("flow.q0.context_encoder", encoder))
    return int(shape[0]), context


class _Walk:
    """One pass over the flows, which are read here as normflows does, from latent to data."""

    def __init__(self, features: int, context: int) -> None:
        self.features, self.context = features, context

    def flow(self, path: str, flow: Any) -> list[Step]:
        kind = kind_of(flow)
        if kind == "Reverse":
            return inverted(self.flow(f"{path}.flow", flow.flow))
        if kind == "Composite":
            parts = enumerate(flow._flows)
            return [step for i, part in parts for step in self.flow(f"{path}._flows[{i}]", part)]
        read = {
            "AffineCouplingBlock": self._block,
            "MaskedAffineFlow": self._masked,
            "CoupledRationalQuadraticSpline": self._spline,
            "AffineConstFlow": self._diagonal,
            "ActNorm": self._diagonal,
            "Permute": self._permute,
            "InvertibleAffine": self._matrix,
            "LULinearPermute": self._lu_linear,
        }.get(kind)
        if read is None:
            do = next((text for name, text in _INSTEAD.items() if name in kind), "")
            raise refused_kind(path, flow, _KNOWN, do)
        return read(At(path, kind), flow)

    def _block(self, at: At, block: Any) -> list[Step]:
        affine = block.flows[1]
        conditioning, transformed = _split(f"{at.path}.flows[0].mode", block.flows[0].mode, self.features)
        net = _sequential.network(f"{at.path}.flows[1].param_map", affine.param_map)
        self._check_sizes(at, net, len(conditioning), len(transformed) * (1 + bool(affine.scale)))
        count = np.arange(len(transformed))
        if not affine.scale:
            heads = {"translation": net.last.of_outputs(count)}
            return [coupling(at, transformed, Additive(), net, heads)]
        how = _scale_map(f"{at.path}.flows[1].scale_map", affine.scale_map)
        heads = affine_heads(net.last, scale=2 * count + 1, translation=2 * count)
        return [coupling(at, transformed, how, net, heads)]

    def _masked(self, at: At, flow: Any) -> list[Step]:
        mask = _torch.array(flow.b).ravel()
        if len(mask) != self.features or not np.all((mask == 0) | (mask == 1)):
            raise refused(f"{at.path}.b", f"a mask {mask.tolist()}", f"{self.features} numbers 0 and 1")
        stays, moves = np.flatnonzero(mask == 1), np.flatnonzero(mask == 0)
        if not len(stays) or not len(moves):
            raise refused(f"{at.path}.b", f"all {mask[0]:g}", "features that stay, 1, and features that change, 0")
        nets = {}
        for name in ("s", "t"):
            if hasattr(getattr(flow, name), "named_modules"):  # else torch.zeros_like
                net, after = _sequential.network_and_rest(f"{at.path}.{name}", getattr(flow, name))
                self._check_sizes(at, net, self.features, self.features)
                nets[name] = _sequential.of_features(net, stays), after
        return [self._of_nets(at, moves, nets)]

    def _of_nets(self, at: At, moves: Any, nets: dict[str, tuple[Net, list[tuple[str, Any]]]]) -> Step:
        """Return the coupling of networks that give a number for each feature, those of `moves` among them."""
        for place, part in nets.get("t", (None, []))[1]:
            raise refused(place, f"a {kind_of(part)} behind the last Linear", "a linear translation")
        if not nets:
            raise refused(
                at.path, "a MaskedAffineFlow without s and t", "one of them", "it is the identity; leave it out"
            )
        if "s" not in nets:
            net = nets["t"][0]
            return coupling(at, moves, Additive(), net, {"translation": net.last.of_outputs(moves)})
        scale, how = nets["s"][0], _after(nets["s"][1])
        if "t" not in nets:
            last = scale.last.of_outputs(moves)
            heads = {"scale": last, "translation": Dense(np.zeros_like(last.kernel), np.zeros_like(last.bias))}
            return coupling(at, moves, how, scale, heads)
        parts = {"scale": scale, "translation": nets["t"][0]}
        chosen = {
            name: Net(net.network, net.tensors, net.last.of_outputs(moves), net.dropped, net.folded)
            for name, net in parts.items()
        }
        return coupling_of_two(at, moves, how, chosen)

    def _check_sizes(self, at: At, net: Net, inputs: int, outputs: int) -> None:
        found = _sequential.inputs_of(net), len(net.last.bias)
        if found != (inputs, outputs):
            raise refused(at.path, f"of a network {found[0]} -> {found[1]}", f"{inputs} -> {outputs}")

    def _spline(self, at: At, flow: Any) -> list[Step]:
        """Normflows' forward is the inverse of the transform that it shares with nflows."""
        net = flow.prqct.transform_net
        if getattr(net, "preprocessing", None) is not None:
            raise refused_kind(f"{at.path}.prqct.transform_net.preprocessing", net.preprocessing, "None")
        walk = _nflows._Walk(self.features, self.context)
        return inverted(walk.transform(f"{at.path}.prqct", flow.prqct))

    def _diagonal(self, at: At, flow: Any) -> list[Step]:
        if float(getattr(flow, "data_dep_init_done", 1.0)) == 0:
            raise refused(at.path, "an ActNorm that no batch has initialized yet", "one after its first batch")
        found = [_torch.array(value).ravel() for value in (flow.s, flow.t)]
        return [actnorm(at, *(np.broadcast_to(value, (self.features,)) for value in found))]

    def _permute(self, at: At, flow: Any) -> list[Step]:
        if flow.mode == "shuffle":
            return [permutation(at, _torch.indices(flow.perm))]
        if flow.mode != "swap":
            raise refused(f"{at.path}.mode", repr(flow.mode), "'shuffle' or 'swap'")
        return [permutation(at, np.roll(np.arange(self.features), -(self.features // 2)))]

    def _matrix(self, at: At, flow: Any) -> list[Step]:
        """From data to latent it is ``z @ W``."""
        if flow.use_lu:
            lower, upper = np.tril(_torch.array(flow.L), -1), np.triu(_torch.array(flow.U), 1)
            diagonal = np.diag(_torch.array(flow.sign_S) * np.exp(_torch.array(flow.log_S)))
            weight = _torch.array(flow.P) @ (lower + np.eye(self.features)) @ (upper + diagonal)
        else:
            weight = _torch.array(flow.W)
        return inverted(linear(at, weight.T, np.zeros(self.features)))

    def _lu_linear(self, at: At, flow: Any) -> list[Step]:
        part = flow.linear
        diagonal = np.logaddexp(0.0, _torch.array(part.unconstrained_upper_diag)) + part.eps
        triangles = _torch.array(part.lower_entries), _torch.array(part.upper_entries)
        order = permutation(at, _torch.indices(flow.permutation._permutation))
        return inverted([order, lu_linear(at, *triangles, diagonal, _torch.array(part.bias))])


def _split(path: str, mode: str, features: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return what a Split leaves as it is, and what the coupling changes."""
    every: NDArray[np.intp] = np.arange(features)
    if mode in ("channel", "channel_inv"):
        parts = every[: -(-features // 2)], every[-(-features // 2) :]
        return parts if mode == "channel" else (parts[1], parts[0])
    if mode in ("checkerboard", "checkerboard_inv"):
        if features % 2:
            raise refused(path, f"{mode!r} of {features} features", "an even number of features")
        return (every[1::2], every[::2]) if mode == "checkerboard" else (every[::2], every[1::2])
    raise refused(path, repr(mode), "'channel', 'channel_inv', 'checkerboard' or 'checkerboard_inv'")


def _scale_map(path: str, name: str) -> Transform:
    """Return the scale from latent to data."""
    known = {
        "exp": Affine("identity"),
        "sigmoid": Affine("sigmoid", low=0.0, high=1.0, offset=2.0, negated=True),
        "sigmoid_inv": Affine("sigmoid", low=0.0, high=1.0, offset=2.0),
    }
    if name not in known:
        raise refused(path, repr(name), f"one of {', '.join(known)}")
    return known[name]


def _after(parts: list[tuple[str, Any]]) -> Affine:
    """Return the log-scale of what stands behind the last Linear of s: nothing, or tanh between two factors."""
    factors = {"before": 1.0, "behind": 1.0}
    found, place = "identity", "before"
    for path, part in parts:
        kind = kind_of(part)
        if kind == "ConstScaleLayer":
            factors[place] *= float(_torch.array(attribute(path, part, "scale")))
        elif kind == "Tanh" and found == "identity":
            found, place = "tanh", "behind"
        else:
            raise refused(path, f"a {kind} behind the last Linear of s", "output_fn=None or 'tanh'")
    if found == "identity" and parts:
        raise refused(parts[0][0], "a ConstScaleLayer without output_fn", "output_fn=None or 'tanh'")
    if found == "identity":
        return Affine("identity")
    if not (factors["before"] > 0 and factors["behind"] > 0):
        raise refused(parts[0][0], f"a scale of {factors['before'] * factors['behind']:g}", "scales above 0")
    return Affine("tanh", factor=factors["behind"], divisor=1 / factors["before"])


# ----------------------------------------------------------------------------------------------------------- base

_BASES = "a DiagGaussian, ConditionalDiagGaussian, GaussianMixture or Uniform"
_NO_BASE = f"other bases have no counterpart here: there are {', '.join(_bases.NAMES)}"


def _latents(path: str, base: Any, walk: _Walk) -> tuple[OfBase, list[Step]]:
    """Return the base, and the layers between its latents and normflows'."""
    at, size = At(path, kind_of(base)), walk.features
    if at.kind == "DiagGaussian":
        loc, log_scale = (_torch.array(v).ravel() for v in (base.loc, base.log_scale))
        if base.temperature is not None:
            log_scale = log_scale + math.log(base.temperature)
        if not loc.any() and not log_scale.any():
            return OfBase(NORMAL), []
        return OfBase(NORMAL), [actnorm(at, log_scale, loc, inverse=True)]
    if at.kind == "ConditionalDiagGaussian":
        net = _sequential.network(f"{path}.context_encoder", base.context_encoder)
        count = np.arange(size)
        heads = affine_heads(net.last, scale=size + count, translation=count)
        return OfBase(NORMAL), [coupling(at, np.arange(size), Affine("identity"), net, heads, inverse=True)]
    if at.kind == "Uniform":
        low, high = (np.broadcast_to(_torch.array(v).ravel(), (size,)) for v in (base.low, base.high))
        if np.ptp(low) > 0 or np.ptp(high) > 0:
            raise refused(path, "a Uniform of different intervals", "one interval for all features")
        return OfBase(_bases.Uniform(float(low[0]), float(high[0]))), []
    if at.kind == "GaussianMixture":
        logits, loc, log_scale = (_torch.array(v)[0] for v in (base.weight_scores, base.loc, base.log_scale))
        return mixture(path, logits, loc, np.exp(log_scale)), []
    raise refused_kind(path, base, _BASES, _NO_BASE)


# --------------------------------------------------------------------------------------------------------- parity


class _NormflowsPeer:
    """The flow in float64."""

    def __init__(self, model: Any, of_base: list[Step]) -> None:
        self._model = _torch.in_double("flow", model)
        self._is_conditional = kind_of(model).startswith("Conditional")
        q0 = self._model.q0
        if kind_of(q0) == "Uniform":  # whose bounds are no buffers
            q0.low, q0.high = q0.low.double(), q0.high.double()
            q0.log_prob_val = -q0.d * np.log(float(q0.high - q0.low))
        self._of_base = of_base[0] if of_base else None

    def _call(self, method: str, rows: Array, context: Array | None) -> Any:
        given = [_torch.tensor(rows)] + ([_torch.tensor(context)] if self._is_conditional else [])
        return _torch.without_gradients(lambda: getattr(self._model, method)(*given))

    def forward(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        z, log_det = _torch.without_gradients(lambda: self._inverse_and_log_det(x, context))
        loc, log_scale = self._latents(context, z.shape)
        return (_torch.array(z) - loc) * np.exp(-log_scale), _torch.array(log_det) - log_scale.sum(axis=1)

    def _inverse_and_log_det(self, x: Array, context: Array | None) -> Any:
        """As the method of normflows by this name, which adds up in float32."""
        z, more = _torch.tensor(x), {"context": _torch.tensor(context)} if self._is_conditional else {}
        log_det = 0.0 * z[:, 0]
        for flow in reversed(self._model.flows):
            z, step = flow.inverse(z, **more)
            log_det = log_det + step
        return z, log_det

    def inverse(self, z: Array, context: Array | None) -> Array:
        loc, log_scale = self._latents(context, z.shape)
        return _torch.array(self._call("forward", z * np.exp(log_scale) + loc, context))

    def log_prob(self, x: Array, context: Array | None) -> Array:
        return _torch.array(self._call("log_prob", x, context))

    def _latents(self, context: Array | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Return mean and log of the standard deviation of latents there, which are a layer here."""
        if self._of_base is None:
            return np.zeros(shape), np.zeros(shape)
        if kind_of(self._model.q0) == "ConditionalDiagGaussian":
            encoder = self._model.q0.context_encoder
            found = _torch.array(_torch.without_gradients(lambda: encoder(_torch.tensor(context))))
            return found[:, : shape[1]], found[:, shape[1] :]
        tensors = self._of_base.tensors
        return np.broadcast_to(tensors["shift"], shape), np.broadcast_to(tensors["log_scale"], shape)
