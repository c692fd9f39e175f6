"""Invertible networks of FrEIA 0.2 and of its main branch: `SequenceINN`, and a `GraphINN` that is a chain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

import nvpflow.importers._sequential as _sequential
import nvpflow.importers._torch as _torch
from nvpflow import _bases
from nvpflow._bases import Base, Uniform
from nvpflow.flow import Flow
from nvpflow.importers._parity import imported
from nvpflow.importers._recipe import (
    Array,
    At,
    Net,
    Recipe,
    Step,
    actnorm,
    affine_heads,
    coupling,
    coupling_of_two,
    diagonal,
    linear,
    permutation,
)
from nvpflow.importers._refusal import attribute, described, kind_of, refused, refused_kind
from nvpflow.layers import Additive, Affine


def from_freia(model: Any, *, base: str | Base = "normal", dtype: DTypeLike = "float32", check: bool = True) -> Flow:
    """Return the flow of an invertible network of FrEIA, with its weights as they act after training.

    Versions of FrEIA that are called alike clamp their scales in different ways: the blocks at hand are asked which one
    they have.

    Parameters
    ----------
    model
        A ``SequenceINN``, or a ``GraphINN`` that is a chain of one input and one output, of rows, from data to latent.
        On any device, in either mode. It stays as it is.
    base
        The distribution of the latents, which a network of FrEIA does not have: "normal", "uniform" or a base of
        `nvpflow.layers`.
    dtype
        Of the flow, "float32" or "float64".
    check
        Raise `ParityError` where the two differ. False: the report says so, and the flow is returned.

    Returns
    -------
    Flow
        On the CPU; `Flow.import_report` says how exactly it agrees with `model`. Where the network has conditions, they
        are its context, side by side in the order in which calls of the network take them.

    Raises
    ------
    TypeError
        `model` is no network of FrEIA.
    ValueError
        A part of it has no counterpart here; the message begins with its path.
    ParityError
        The flow is not `model`.
    """
    latents = _bases.checked(base)
    if isinstance(latents, (_bases.StudentT, _bases.Mixture)):
        raise ValueError(f"base is {latents!r}, expected the normal or a uniform one: a network of FrEIA has no other")
    parts, sizes = _parts(model)
    walk = _Walk(int(np.prod(model.dims_in[0])), sizes)
    steps = [step for part in parts for step in walk.part(part)]
    recipe = Recipe("FrEIA", _torch.version_of("FrEIA"), walk.features, walk.context, steps, latents)
    recipe.assumed.append(f"latents are {_bases.in_words(latents)}: base={latents!r}")
    return imported(recipe, _FreiaPeer(model, latents, sizes), dtype=dtype, check=check)


class _Part(NamedTuple):
    """A module of a network, and which of its conditions it is given."""

    path: str
    module: Any
    conditions: tuple[int, ...]


def _parts(model: Any) -> tuple[list[_Part], list[int]]:
    """Return the modules in their order, and the sizes of the conditions."""
    if kind_of(model) == "SequenceINN":
        chosen = [() if given is None else (int(given),) for given in model.conditions]
        modules = zip(model.module_list, chosen, strict=True)
        parts = [_Part(f"flow.module_list[{i}]", module, given) for i, (module, given) in enumerate(modules)]
    elif hasattr(model, "node_list") and hasattr(model, "in_nodes"):
        parts = _chain(model)
    else:
        raise TypeError(f"model is {described(model)}, expected a SequenceINN or GraphINN of FrEIA")
    sizes: dict[int, int] = {}
    for part in parts:
        shapes = part.module.dims_c or []
        for i, shape in zip(part.conditions, shapes, strict=True):
            if len(shape) != 1:
                raise refused(part.path, f"under a condition of shape {tuple(shape)}", "a condition of rows, (C,)")
            if sizes.setdefault(i, int(shape[0])) != shape[0]:
                raise refused(part.path, f"under {shape[0]} numbers of condition {i}", f"{sizes[i]}, as before")
    if sizes and set(sizes) != set(range(max(sizes) + 1)):
        unused = sorted(set(range(max(sizes) + 1)) - set(sizes))
        raise refused("flow", f"a network that no module asks for condition {unused[0]}", "conditions that are used")
    return parts, [sizes[i] for i in sorted(sizes)]


def _chain(model: Any) -> list[_Part]:
    if len(model.in_nodes) != 1 or len(model.out_nodes) != 1:
        count = f"{len(model.in_nodes)} inputs and {len(model.out_nodes)} outputs"
        raise refused("flow", f"a GraphINN of {count}", "one of each", "split and joined data have no counterpart here")
    special = [*model.in_nodes, *model.out_nodes, *model.condition_nodes]
    parts, before = [], model.in_nodes[0]
    for node in model.node_list:
        if any(node is other for other in special):
            continue
        path = f"flow.node_list[{node.name!r}]"
        if len(node.inputs) != 1 or node.inputs[0][0] is not before or len(node.outputs) != 1:
            raise refused(path, "a node off the chain", "nodes of one input and one output, one after the other")
        chosen = tuple(next(i for i, c in enumerate(model.condition_nodes) if c is given) for given in node.conditions)
        parts.append(_Part(path, node.module, chosen))
        before = node
    return parts


_KNOWN = (
    "a NICE, RNVP or GLOW CouplingBlock, an AffineCouplingOneSided, ConditionalAffineTransform, AllInOneBlock, "
    "ActNorm, LearnedElementwiseScaling, PermuteRandom, FixedLinearTransform, OrthogonalTransform or HouseholderPerm"
)
_INSTEAD = {
    "GINCouplingBlock": "log-scales whose mean is taken off have no counterpart here; train GLOWCouplingBlock",
    "RationalQuadraticSpline": "its interval is learned for each feature, which splines here do not have",
    "LinearSpline": "piecewise linear maps have no counterpart here",
    "IResNetLayer": "it has no closed inverse",
    "InvertibleSigmoid": "transform the data yourself and add the log-derivative to log p",
    "Split": "split and joined data have no counterpart here",
    "Concat": "split and joined data have no counterpart here",
    "GaussianMixtureModel": f"other bases have no counterpart here: there are {', '.join(_bases.NAMES)}",
}
_PROBES = np.array([-9.0, -3.0, -1.0, -0.3, 0.0, 0.2, 0.7, 2.0, 5.0])


class _Walk:
    """One pass over the modules, from data to latent."""

    def __init__(self, features: int, sizes: Sequence[int]) -> None:
        self.features, self.context = features, sum(sizes)
        ends = np.cumsum([0, *sizes])
        self._places = [np.arange(first, last) for first, last in itertools.pairwise(ends)]

    def part(self, part: _Part) -> list[Step]:
        path, module, _ = part
        shape = module.dims_in if np.ndim(module.dims_in[0]) == 0 else module.dims_in[0]  # the first of ActNorm
        if tuple(shape) != (self.features,):
            raise refused(path, f"of data of shape {tuple(shape)}", f"rows of {self.features} features")
        read: dict[str, Callable[[At, _Part], list[Step]]] = {
            "NICECouplingBlock": self._both_halves,
            "RNVPCouplingBlock": self._both_halves,
            "GLOWCouplingBlock": self._both_halves,
            "AffineCouplingOneSided": self._one_side,
            "ConditionalAffineTransform": self._of_condition,
            "AllInOneBlock": self._all_in_one,
            "ActNorm": self._actnorm,
            "LearnedElementwiseScaling": self._scaling,
            "PermuteRandom": self._permute,
            "FixedLinearTransform": self._fixed_linear,
            "OrthogonalTransform": self._orthogonal,
            "HouseholderPerm": self._householder,
        }
        kind = kind_of(module)
        if kind not in read:
            do = next((text for name, text in _INSTEAD.items() if name in kind), "")
            raise refused_kind(path, module, _KNOWN, do)
        return read[kind](At(path, kind), part)

    # -- couplings

    def _net(self, part: _Part, name: str, given: int, outputs: int) -> Net:
        """Return a network of so many features and the conditions of its module, for all of the context."""
        path = f"{part.path}.{name}"
        net = _sequential.network(path, getattr(part.module, name))
        places = np.concatenate([[], *(self._places[i] for i in part.conditions)]).astype(np.intp)
        found = _sequential.inputs_of(net), len(net.last.bias)
        if found != (given + len(places), outputs):
            raise refused(path, f"a network {found[0]} -> {found[1]}", f"{given + len(places)} -> {outputs}")
        return _sequential.with_nothing_at(net, given, self.context, places)

    def _both_halves(self, at: At, part: _Part) -> list[Step]:
        """Part 1 given part 2, then part 2 given what part 1 has become."""
        module, every = part.module, np.arange(self.features)
        first, second = every[: module.split_len1], every[module.split_len1 :]
        steps = []
        for moves, stays, number in ((first, second, "2"), (second, first, "1")):
            if not len(moves):
                continue
            count = np.arange(len(moves))
            if at.kind == "NICECouplingBlock":
                net = self._net(part, {"2": "F", "1": "G"}[number], len(stays), len(moves))
                steps.append(coupling(at, moves, Additive(), net, {"translation": net.last}))
            elif at.kind == "RNVPCouplingBlock":
                names = {"scale": f"subnet_s{number}", "translation": f"subnet_t{number}"}
                nets = {head: self._net(part, name, len(stays), len(moves)) for head, name in names.items()}
                steps.append(coupling_of_two(at, moves, _clamp(at.path, module), nets))
            else:
                net = self._net(part, f"subnet{number}", len(stays), 2 * len(moves))
                heads = affine_heads(net.last, scale=count, translation=len(moves) + count)
                steps.append(coupling(at, moves, _clamp(at.path, module), net, heads))
        return steps

    def _one_side(self, at: At, part: _Part) -> list[Step]:
        stays, count = part.module.split_len1, part.module.split_len2
        net = self._net(part, "subnet", stays, 2 * count)
        heads = affine_heads(net.last, scale=np.arange(count), translation=count + np.arange(count))
        return [coupling(at, stays + np.arange(count), _clamp(at.path, part.module), net, heads)]

    def _of_condition(self, at: At, part: _Part) -> list[Step]:
        every = np.arange(self.features)
        net = self._net(part, "subnet", 0, 2 * self.features)
        heads = affine_heads(net.last, scale=every, translation=self.features + every)
        return [coupling(at, every, _clamp(at.path, part.module), net, heads)]

    def _all_in_one(self, at: At, part: _Part) -> list[Step]:
        module = part.module
        if module.GIN:
            raise refused(
                at.path, "an AllInOneBlock with gin_block=True", "gin_block=False", _INSTEAD["GINCouplingBlock"]
            )
        stays, moves = module.splits
        net = self._net(part, "subnet", stays, 2 * moves)
        places, count = stays + np.arange(moves), np.arange(moves)
        heads = affine_heads(net.last.scaled(0.1), scale=count, translation=moves + count)
        note = "the factor 0.1 of an AllInOneBlock's network"
        net = Net(net.network, net.tensors, net.last, net.dropped, (*net.folded, note))
        scale = _torch.without_gradients(lambda: module.global_scale_activation(module.global_scale.double()))
        log_scale, shift = np.log(_torch.array(scale)).ravel(), _torch.array(module.global_offset).ravel()
        mixing = self._mixing(at, module)
        steps = [coupling(at, places, _all_in_one_clamp(at.path, module), net, heads), actnorm(at, log_scale, shift)]
        before = self._matrix(at, mixing.T) if getattr(module, "reverse_pre_permute", False) else []
        return [*before, *steps, *self._matrix(at, mixing)]

    def _mixing(self, at: At, module: Any) -> Array:
        """Return the matrix that an AllInOneBlock ends with, whose determinant FrEIA takes for 1."""
        if module.householder:
            matrix = _torch.array(module.w_0)
            for v in _torch.array(module.vk_householder):
                matrix = matrix @ (np.eye(len(v)) - 2 * np.outer(v, v) / (v @ v))
        elif module.w_perm.ndim == 1:
            matrix = np.eye(self.features)[_torch.indices(module.w_perm)]
        else:
            matrix = _torch.array(module.w_perm).reshape(self.features, self.features)
        return _checked_orthogonal(f"{at.path}.w_perm", matrix)

    # -- the rest

    def _matrix(self, at: At, matrix: Array, bias: ArrayLike = 0.0) -> list[Step]:
        """Return ``y = matrix @ x + bias``; a permutation where it is one."""
        shift = np.broadcast_to(np.asarray(bias, np.float64), (self.features,))
        if np.all((matrix == 0) | (matrix == 1)) and not shift.any() and np.all(matrix.sum(axis=1) == 1):
            return [permutation(at, matrix.argmax(axis=1))]
        return linear(at, matrix, shift)

    def _actnorm(self, at: At, part: _Part) -> list[Step]:
        module = part.module
        if getattr(module, "init_on_next_batch", False):
            raise refused(at.path, "an ActNorm that no batch has initialized yet", "one after its first batch")
        if hasattr(module, "log_scale"):  # since 2023: (x - loc) exp(-log_scale)
            return [actnorm(at, _torch.array(module.log_scale), _torch.array(module.loc), inverse=True)]
        scale, bias = (_torch.array(attribute(at.path, module, name)) for name in ("scale", "bias"))
        return [actnorm(at, scale, bias)]

    def _scaling(self, at: At, part: _Part) -> list[Step]:
        s = _torch.array(part.module.s).ravel()
        return [actnorm(at, s, np.zeros_like(s))]

    def _permute(self, at: At, part: _Part) -> list[Step]:
        return [permutation(at, _torch.indices(part.module.perm))]

    def _fixed_linear(self, at: At, part: _Part) -> list[Step]:
        matrix, bias = _torch.array(part.module.M).T, np.ravel(_torch.array(part.module.b))
        return self._matrix(at, matrix, bias)

    def _orthogonal(self, at: At, part: _Part) -> list[Step]:
        """``(x @ weights + bias) exp(log_scaling)``."""
        module = part.module
        log_scale = _torch.array(_torch.without_gradients(lambda: module._log_e(module.scaling.double()))).ravel()
        matrix = _checked_orthogonal(f"{at.path}.weights", _torch.array(module.weights).T)
        steps = self._matrix(at, matrix, _torch.array(module.bias).ravel())
        return [*steps, *diagonal(at, np.exp(log_scale), np.zeros(self.features), trained=True)]

    def _householder(self, at: At, part: _Part) -> list[Step]:
        module = part.module
        if module.conditional:
            raise refused(
                at.path, "a HouseholderPerm under a condition", "one without", "its matrix would depend on rows"
            )
        matrix = np.eye(self.features)
        if module.fixed:
            matrix = _torch.array(module.W)
        else:
            for v in _torch.array(module.Vs):
                matrix = matrix @ (np.eye(len(v)) - 2 * np.outer(v, v) / (v @ v))
        return self._matrix(at, _checked_orthogonal(f"{at.path}.Vs", matrix).T)


def _clamp(path: str, module: Any) -> Affine:
    """Return the log-scale of a block, found by calling its function: versions of one name differ."""
    bound = float(module.clamp)
    if bound <= 0:
        raise refused(f"{path}.clamp", f"{bound:g}", "a number above 0")
    known = {
        "0.636 atan(u)": (Affine("atan", factor=0.636 * bound, divisor=1.0), 0.636 * np.arctan(_PROBES)),
        "tanh(u)": (Affine("tanh", factor=bound, divisor=1.0), np.tanh(_PROBES)),
        "2 sigmoid(u) - 1": (Affine("tanh", factor=bound, divisor=2.0), np.tanh(_PROBES / 2)),
        "u": (Affine("identity"), _PROBES / bound),
    }
    function = attribute(path, module, "f_clamp")
    found = _torch.array(_torch.without_gradients(lambda: function(_torch.tensor(_PROBES))))
    return _one_of(f"{path}.f_clamp", found, known)


def _all_in_one_clamp(path: str, module: Any) -> Affine:
    """Return the log-scale of an AllInOneBlock by what it gives for zeros: 0.2 of the registry and main differ."""
    bound = float(module.clamp)
    known = {
        "clamp tanh(0.1 u)": (Affine("tanh", factor=bound, divisor=1.0), bound * np.tanh(0.1 * _PROBES)),
        "clamp tanh(0.1 u / clamp)": (
            Affine("tanh", factor=bound, divisor=bound),
            bound * np.tanh(0.1 * _PROBES / bound),
        ),
        "clamp 0.636 atan(0.1 u)": (
            Affine("atan", factor=0.636 * bound, divisor=1.0),
            0.636 * bound * np.arctan(0.1 * _PROBES),
        ),
    }
    raw = np.stack([_PROBES, np.zeros_like(_PROBES)], axis=1)
    zeros = _torch.tensor(np.zeros((len(_PROBES), 1)))
    call = attribute(path, module, "_affine")
    found = _torch.array(_torch.without_gradients(lambda: call(zeros, _torch.tensor(raw))[1]))
    return _one_of(f"{path}._affine", found, known)


def _one_of(path: str, found: Array, known: dict[str, tuple[Affine, Array]]) -> Affine:
    for affine, expected in known.values():
        if np.all(np.abs(found - expected) <= 1e-6 * (1 + np.abs(expected))):
            return affine
    raise refused(path, "another function", f"what computes {', '.join(known)}")


def _checked_orthogonal(path: str, matrix: Array) -> Array:
    off = float(np.abs(matrix @ matrix.T - np.eye(len(matrix))).max())
    if not off <= 1e-5:
        way = (
            "FrEIA takes the logarithm of its determinant for 0; make it orthogonal first, FrEIA.modules.orthogonal has"
        )
        raise refused(path, f"off an orthogonal matrix by {off:.1e}", "at most 1e-5", f"{way} orth_correction")
    return matrix


# --------------------------------------------------------------------------------------------------------- parity


class _FreiaPeer:
    """The network in float64, with the base that it is said to have."""

    def __init__(self, model: Any, base: Base, sizes: Sequence[int]) -> None:
        self._model, self._base = _torch.in_double("flow", model), base
        self._ends = np.cumsum(sizes)[:-1]
        self._is_conditional = bool(sizes)

    def _call(self, rows: Array, context: Array | None, *, rev: bool) -> tuple[Array, Array]:
        parts = [] if context is None else np.split(context, self._ends, axis=1)
        conditions = {"c": [_torch.tensor(part) for part in parts]} if self._is_conditional else {}
        found = _torch.without_gradients(lambda: self._model(_torch.tensor(rows), rev=rev, **conditions))
        values = found[0] if hasattr(found[0], "detach") else found[0][0]
        return _torch.array(values), np.broadcast_to(_torch.array(found[1]), len(rows))

    def forward(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        return self._call(x, context, rev=False)

    def inverse(self, z: Array, context: Array | None) -> Array:
        return self._call(z, context, rev=True)[0]

    def log_prob(self, x: Array, context: Array | None) -> Array:
        z, log_det = self.forward(x, context)
        if isinstance(self._base, Uniform):
            inside = np.all((z >= self._base.low) & (z <= self._base.high), axis=1)
            size = z.shape[1] * np.log(self._base.high - self._base.low)
            return np.where(inside, log_det - size, -np.inf)
        log_p: Array = log_det - 0.5 * np.sum(z * z + np.log(2 * np.pi), axis=1)
        return log_p
