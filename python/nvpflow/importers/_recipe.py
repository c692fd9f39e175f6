"""The vocabulary of importers: steps, a layer of `nvpflow.layers` each with its tensors, and the flow made of them.

All tensors are float64 arrays of NumPy in the order that nvpflow has them, kernels [in, out]. An importer reads the
layers of a source in the order from data to latent, makes of each one step or more, and hands a `Recipe` to
`nvpflow.importers._parity.imported`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvpflow import _bases
from nvpflow._bases import NORMAL, Base
from nvpflow._core import FlowSpec
from nvpflow._import_report import Imported
from nvpflow._networks import Network
from nvpflow._transforms import Transform
from nvpflow.flow import Flow
from nvpflow.importers._refusal import named, refused
from nvpflow.layers import (
    MLP,
    ActNorm,
    Affine,
    Bounds,
    Coupling,
    ElementSpline,
    Layer,
    LULinear,
    Permutation,
    ResidualNet,
    Spline,
    Standardize,
    prefixes,
)

Array = NDArray[np.float64]
_LARGEST_LINEAR = 4096  # features of an LULinear layer

# ------------------------------------------------------------------------------------------------------- networks


class Dense(NamedTuple):
    """A dense layer: ``y = x @ kernel + bias``."""

    kernel: Array  # [in, out]
    bias: Array  # [out]

    @classmethod
    def of(cls, weight: ArrayLike, bias: ArrayLike | None) -> Dense:
        """Return the layer of a weight [out, in], as PyTorch and Equinox have them; without a bias it is zero."""
        kernel = np.array(np.asarray(weight, np.float64).T, order="C")
        return cls(kernel, np.zeros(kernel.shape[1]) if bias is None else np.array(bias, np.float64).ravel())

    def of_inputs(self, rows: ArrayLike) -> Dense:
        """Return the layer for inputs of which only these can be other than zero."""
        return Dense(self.kernel[np.asarray(rows, np.intp)], self.bias)

    def of_outputs(self, columns: ArrayLike) -> Dense:
        """Return the layer of these outputs alone, in this order."""
        chosen = np.asarray(columns, np.intp)
        return Dense(self.kernel[:, chosen], self.bias[chosen])

    def scaled(self, factor: Array | float, shift: Array | float = 0.0) -> Dense:
        """Return the layer that gives ``y * factor + shift``; numbers, or one an output."""
        return Dense(self.kernel * factor, self.bias * factor + shift)


@dataclass(frozen=True)
class Net:
    """A network without heads: the outputs of `last` are what heads are chosen from."""

    network: Network
    tensors: Mapping[str, Array]
    """All but those of the heads, by their names within a coupling."""
    last: Dense
    dropped: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


def mlp(hidden: Sequence[Dense], last: Dense, activation: str, *, layer_norm: bool = False, **notes: Any) -> Net:
    """Return the network of dense layers, an activation after each but the last."""
    network = MLP([len(dense.bias) for dense in hidden], activation, layer_norm)
    return Net(network, _denses((f"coupling_dense_{j}", dense) for j, dense in enumerate(hidden)), last, **notes)


class Block(NamedTuple):
    """A residual block, ``h += (W_1 act(W_0 act(A(h)) + b_0) + b_1) * sigmoid(gate(c))``."""

    dense_0: Dense
    dense_1: Dense
    affine: tuple[Array, Array] | None = None
    """A: scale and shift of each unit; all blocks of a network have one or none has."""
    gate: Dense | None = None
    """Likewise."""


def residual(initial: Dense, blocks: Sequence[Block], last: Dense, activation: str, **notes: Any) -> Net:
    """Return the network of residual blocks."""
    gated, has_affine = (any(getattr(b, name) is not None for b in blocks) for name in ("gate", "affine"))
    tensors = _denses([("initial", initial)])
    for j, block in enumerate(blocks):
        if block.affine is not None:
            tensors |= dict(zip((f"block_{j}_affine.scale", f"block_{j}_affine.shift"), block.affine, strict=True))
        tensors |= _denses([(f"block_{j}_dense_0", block.dense_0), (f"block_{j}_dense_1", block.dense_1)])
        if block.gate is not None:
            tensors |= _denses([(f"block_{j}_context", block.gate)])
    network = ResidualNet(len(initial.bias), len(blocks), activation, gated, has_affine)
    return Net(network, tensors, last, **notes)


def _denses(named: Iterable[tuple[str, Dense]]) -> dict[str, Array]:
    return {f"{name}.{part}": value for name, dense in named for part, value in dense._asdict().items()}


# ---------------------------------------------------------------------------------------------------------- heads


def affine_heads(last: Dense, *, scale: ArrayLike, translation: ArrayLike) -> dict[str, Dense]:
    """Return the heads of an affine coupling from the outputs that are each, in the order of its features."""
    return {"scale": last.of_outputs(scale), "translation": last.of_outputs(translation)}


def spline_heads(last: Dense, count: int, spline: Spline, *, size_factor: float = 1.0) -> dict[str, Dense]:
    """Return the heads of a spline coupling of so many features from outputs ``[features, parameters]``.

    size_factor: what raw widths and heights are multiplied by.
    """
    widths = {"widths": size_factor, "heights": size_factor, "derivatives": 1.0}
    columns = spline_columns(count, spline)
    return {name: last.of_outputs(columns[name].ravel()).scaled(factor) for name, factor in widths.items()}


def spline_columns(count: int, spline: Spline) -> dict[str, NDArray[np.intp]]:
    """Return which outputs ``[features, parameters]``, counted through, each head of a spline takes: [number, feature].

    A feature's parameters there are widths, heights and derivatives, as in all libraries.
    """
    bins = spline.num_bins
    numbers = {"widths": bins, "heights": bins, "derivatives": bins - 1 if spline.boundary == "one" else bins + 1}
    whole = np.arange(count * sum(numbers.values())).reshape(count, -1)
    parts = np.split(whole, np.cumsum(list(numbers.values()))[:-1], axis=1)
    return {name: part.T for name, part in zip(numbers, parts, strict=True)}


# ---------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Step:
    """A layer here, and the tensors of it by their names behind its prefix, "scale.kernel"."""

    layer: Layer
    tensors: Mapping[str, Array]
    path: str
    """Of the layer of the source."""
    kind: str
    """Its class."""
    dropped: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


class At(NamedTuple):
    """Where in the source a step comes from."""

    path: str
    kind: str

    def step(self, layer: Layer, tensors: Mapping[str, Array], **notes: Any) -> Step:
        """Return a step that comes from here."""
        return Step(layer, tensors, self.path, self.kind, **notes)


def coupling(
    at: At, transformed: ArrayLike, transform: Transform, net: Net, heads: Mapping[str, Dense], *, inverse: bool = False
) -> Step:
    """Return a coupling of ascending features with one network."""
    layer = Coupling(np.asarray(transformed).tolist(), transform, net.network, inverse=inverse)
    tensors = {**net.tensors, **_denses(heads.items())}
    return at.step(layer, tensors, dropped=net.dropped, folded=net.folded)


def coupling_of_two(at: At, transformed: ArrayLike, transform: Affine, nets: Mapping[str, Net], **options: Any) -> Step:
    """Return an affine coupling with two networks, "scale" and "translation", whose last layers are the heads."""
    tensors: dict[str, Array] = {}
    for name, net in nets.items():
        tensors |= {key.replace("coupling_", f"{name}_"): value for key, value in net.tensors.items()}
        tensors |= _denses([(name, net.last)])
    networks: dict[str, Any] = {f"{name}_network": net.network for name, net in nets.items()}
    layer = Coupling(np.asarray(transformed).tolist(), transform, **networks, **options)
    dropped, folded = (tuple(t for net in nets.values() for t in getattr(net, kind)) for kind in ("dropped", "folded"))
    return at.step(layer, tensors, dropped=dropped, folded=folded)


def element_spline(
    at: At,
    features: ArrayLike,
    spline: Spline,
    widths: ArrayLike,
    heights: ArrayLike,
    derivatives: ArrayLike,
    *,
    inverse: bool = False,
) -> Step:
    """Return a spline of each feature by itself from raw numbers [features, number of them]."""
    given = {"widths": widths, "heights": heights, "derivatives": derivatives}
    tensors = {name: np.array(np.asarray(value, np.float64).T, order="C") for name, value in given.items()}
    return at.step(ElementSpline(np.asarray(features).tolist(), spline, inverse=inverse), tensors)


def permutation(at: At, order: ArrayLike) -> Step:
    """Return ``y[j] = x[order[j]]``."""
    return at.step(Permutation(np.asarray(order).tolist()), {})


def actnorm(at: At, log_scale: ArrayLike, shift: ArrayLike, *, inverse: bool = False) -> Step:
    """Return ``y = x * exp(log_scale) + shift``, which training changes."""
    tensors = {"log_scale": np.array(log_scale, np.float64).ravel(), "shift": np.array(shift, np.float64).ravel()}
    return at.step(ActNorm(inverse=inverse), tensors)


def standardize(at: At, mean: ArrayLike, log_std: ArrayLike) -> Step:
    """Return ``y = (x - mean) * exp(-log_std)``, which training leaves alone; `fit` sets one that comes first."""
    tensors = {"mean": np.array(mean, np.float64).ravel(), "log_std": np.array(log_std, np.float64).ravel()}
    return at.step(Standardize(), tensors)


def diagonal(at: At, scale: ArrayLike, shift: ArrayLike, *, trained: bool) -> list[Step]:
    """Return ``y = x * scale + shift`` for numbers [D] of any sign; not trained where it was not."""
    factors, shifts = np.array(scale, np.float64), np.array(shift, np.float64)
    if not np.all(np.isfinite(factors) & (factors != 0)):
        raise refused(at.path, "a scale that holds 0, NaN or infinity", "finite numbers that are not 0")
    if np.any(factors < 0):
        return linear(at, np.diag(factors), shifts)
    if trained:
        return [actnorm(at, np.log(factors), shifts)]
    return [standardize(at, -shifts / factors, -np.log(factors))]


def lu_linear(at: At, lower: Array, upper: Array, diagonal: Array, bias: Array) -> Step:
    """Return ``y = L U x + bias`` from the numbers below and above the diagonals, by rows, and the diagonal of U."""
    tensors = {
        "lower": lower,
        "upper": upper,
        "log_diagonal": np.log(np.abs(diagonal)),
        "sign": np.where(diagonal < 0, -1.0, 1.0),
        "bias": bias,
    }
    return at.step(LULinear(), tensors)


def linear(at: At, matrix: ArrayLike, bias: ArrayLike) -> list[Step]:
    """Return ``y = matrix @ x + bias`` for any invertible matrix: ``P L U``, an LULinear and a permutation."""
    w, b = np.array(matrix, np.float64), np.array(bias, np.float64)
    size = len(w)
    if size > _LARGEST_LINEAR:
        raise refused(
            at.path, f"a matrix of {size:,} features", f"at most {_LARGEST_LINEAR:,}", "its inverse takes D^3 work"
        )
    order, lower, upper = factored(w)
    below, above = np.tril_indices(size, -1), np.triu_indices(size, 1)
    diagonal = np.diag(upper)
    if not np.all(np.isfinite(w)) or np.any(np.abs(diagonal) <= size * np.finfo(np.float64).eps * np.abs(w).max()):
        raise refused(at.path, "a singular matrix to the precision of float64", "an invertible one")
    before = np.empty(size)
    before[order] = b  # the permutation takes it to where it belongs
    steps = [lu_linear(at, lower[below], upper[above], diagonal, before)]
    return steps if np.array_equal(order, np.arange(size)) else [*steps, permutation(at, order)]


def factored(matrix: Array) -> tuple[NDArray[np.intp], Array, Array]:
    """Return order, L and U with ``(matrix @ x)[i] = (L U x)[order[i]]``: Gaussian elimination, the largest pivot."""
    work, rows = matrix.copy(), np.arange(len(matrix))
    for k in range(len(work) - 1):
        best = k + int(np.argmax(np.abs(work[k:, k])))
        work[[k, best]], rows[[k, best]] = work[[best, k]], rows[[best, k]]
        if work[k, k] != 0:
            work[k + 1 :, k] /= work[k, k]
            work[k + 1 :, k + 1 :] -= np.outer(work[k + 1 :, k], work[k, k + 1 :])
    return np.argsort(rows), np.tril(work, -1) + np.eye(len(work)), np.triu(work)


def inverted(steps: Sequence[Step]) -> list[Step]:
    """Return the steps of the inverse map."""
    return [_inverted(step) for step in reversed(steps)]


def _inverted(step: Step) -> Step:
    if isinstance(step.layer, Permutation):
        order = np.argsort(step.layer.order)
        return dataclasses.replace(step, layer=Permutation(order))
    if isinstance(step.layer, Standardize):
        mean, log_std = step.tensors["mean"], step.tensors["log_std"]
        turned = {"mean": -mean * np.exp(-log_std), "log_std": -log_std}
        return dataclasses.replace(step, tensors=turned)
    assert not isinstance(step.layer, Bounds)  # which no importer makes
    return dataclasses.replace(step, layer=dataclasses.replace(step.layer, inverse=not step.layer.inverse))


# ----------------------------------------------------------------------------------------------------------- base


class OfBase(NamedTuple):
    """A base with its tensors by their names, "base.log_df"."""

    base: Base
    tensors: Mapping[str, Array] = MappingProxyType({})


def student_t(path: str, df: ArrayLike) -> OfBase:
    """Return Student's t distribution with degrees of freedom [D]."""
    given = np.array(df, np.float64)
    if not np.all((given >= _LEAST_DF) & (given <= 1 / _LEAST_DF)):
        raise refused(path, f"of degrees of freedom {given.tolist()}", f"{_LEAST_DF:g} to {1 / _LEAST_DF:g}")
    return OfBase(_bases.StudentT(float(given.flat[0])), {"base.log_df": np.log(given)})


_LEAST_DF = 1e-18  # smaller and larger ones count as these


def mixture(path: str, logits: ArrayLike, means: ArrayLike, scales: ArrayLike) -> OfBase:
    """Return a mixture of normal distributions: logits [M], means [M, D], scales [M, D] or factors F [M, D, D]."""
    loc, factors = np.array(means, np.float64), np.array(scales, np.float64)
    diagonal = factors if factors.ndim == 2 else np.diagonal(factors, axis1=1, axis2=2)
    if not np.all(np.isfinite(factors)) or np.any(diagonal <= 0):
        raise refused(path, "a mixture with scales that are not above 0", "finite ones above 0")
    tensors = {"base.logits": np.array(logits, np.float64), "base.means": loc, "base.log_scales": np.log(diagonal)}
    if factors.ndim == 2:
        return OfBase(_bases.Mixture(len(loc)), tensors)
    rows, columns = np.tril_indices(loc.shape[1], -1)
    tensors["base.lower"] = (factors / diagonal[:, None])[:, rows, columns]
    return OfBase(_bases.Mixture(len(loc), "full"), tensors)


# ------------------------------------------------------------------------------------------------------- the flow


@dataclass
class Recipe:
    """All that an importer has read."""

    library: str
    version: str
    input_size: int
    context_size: int
    steps: list[Step]
    """From data to latent."""
    base: Base = NORMAL
    base_tensors: Mapping[str, Array] = field(default_factory=dict)
    context: tuple[Array, Array] | None = None
    """Mean and log of the standard deviation [C] by which the context is standardized."""
    identities: list[At] = field(default_factory=list)
    """Layers of the source that nothing stands for."""
    assumed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)

    def layers(self) -> tuple[Imported, ...]:
        """Return what each layer of the source became."""
        became: dict[At, list[str]] = {}
        for step in self.steps:
            became.setdefault(At(step.path, step.kind), []).append(_in_words(step.layer, self.input_size))
        return tuple(Imported(at.path, at.kind, tuple(words)) for at, words in became.items()) + tuple(
            Imported(at.path, at.kind, ()) for at in self.identities
        )

    def notes(self, kind: str) -> tuple[str, ...]:
        """Return what was dropped or folded, each text once, with how often it came up."""
        counts: dict[str, int] = {}
        for text in [*getattr(self, kind), *(text for step in self.steps for text in getattr(step, kind))]:
            counts[text] = counts.get(text, 0) + 1
        return tuple(text if count == 1 else f"{text} ({count} times)" for text, count in counts.items())


def flow_of(recipe: Recipe) -> Flow:
    """Return the float64 flow of a recipe."""
    if not any(isinstance(step.layer, Coupling) for step in recipe.steps):
        raise ValueError(
            f"the flow of {recipe.library} has no coupling, expected at least one: without one it is a fixed map of a "
            f"{_bases.in_words(recipe.base)} distribution"
        )
    spec = FlowSpec.from_layers(
        recipe.input_size,
        [step.layer for step in recipe.steps],
        "float64",
        recipe.context_size,
        recipe.context is not None,
        recipe.base,
    )
    flow = Flow(spec)
    flow.set_parameters(_tensors(recipe, {name: shape for name, shape, _ in flow._layout()}))
    return flow


def _tensors(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return the tensors of all steps by their names in the flow, where they have these shapes."""
    found = dict(recipe.base_tensors)
    if recipe.context is not None:
        found |= dict(zip(("context.mean", "context.log_std"), recipe.context, strict=True))
    for step, prefix in zip(recipe.steps, prefixes([step.layer for step in recipe.steps]), strict=True):
        for name, values in step.tensors.items():
            if not np.all(np.isfinite(values)):
                raise refused(step.path, f"{named(step.kind)} with NaN or infinity in {name}", "finite weights")
            if values.shape != shapes[prefix + name]:
                what = f"{named(step.kind)} whose {name} has shape {values.shape}"
                why = f"the flow has {recipe.input_size} features and {recipe.context_size} numbers of context"
                raise refused(step.path, what, f"{shapes[prefix + name]}", f"{why}, which all of its layers have")
            found[prefix + name] = values
    return found


def _in_words(layer: Layer, input_size: int) -> str:
    return layer._became(input_size) + (", inverse" if getattr(layer, "inverse", False) else "")
