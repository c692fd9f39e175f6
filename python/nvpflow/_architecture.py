"""From the options of `nvpflow.build` to the layers of a flow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvpflow import _bases, _checks
from nvpflow._bases import NORMAL, Uniform
from nvpflow._core import FlowSpec
from nvpflow._networks import Network
from nvpflow._spec import begins_with_standardize, untransformed, whitens
from nvpflow._text import counted
from nvpflow._transforms import Transform
from nvpflow.layers import (
    MLP,
    ActNorm,
    Additive,
    Affine,
    Bounds,
    Coupling,
    Layer,
    LULinear,
    Permutation,
    ResidualNet,
    Spline,
    Standardize,
    members,
)

TRANSFORMS = ("affine", "additive", "spline")
SCALES = ("tanh", "softsign", "atan", "sigmoid", "softplus", "exp")
MASKS = ("halves", "checkered", "random", "log2")
MIXINGS = ("reverse", "permutation", "lu")
NETWORKS = ("mlp", "residual")
# Options by their names that the command line and the estimators have, too.
OPTIONS = (
    "transform",
    "scale",
    "scale_bound",
    "num_bins",
    "tail_bound",
    "mask",
    "mixing",
    "actnorm",
    "network",
    "num_blocks",
    "layer_norm",
    "base",
)
_UNBOUNDED = ("softplus", "exp")
_ARTICLES = {"additive": "an additive", "spline": "a spline"}
_PAIRS = {"halves": ("second_half", "first_half"), "checkered": ("odd", "even")}
Places = NDArray[np.bool_]
_STREAM = 0x6E76706C  # beside the seed, so that no other use of it draws these numbers


@dataclass(frozen=True)
class Options:
    """What makes a flow, by the names and defaults of `nvpflow.build`."""

    num_flows: int = 4
    hidden_sizes: Sequence[int] = (256,)
    activation: str = "relu"
    context_size: int = 0
    transform: str = "affine"
    scale: str = "tanh"
    scale_bound: float = 1.0
    num_bins: int = 8
    tail_bound: float = 3.0
    mask: Any = "halves"
    mixing: str | None = None
    actnorm: bool = False
    network: str = "mlp"
    num_blocks: int = 2
    layer_norm: bool = False
    base: Any = NORMAL
    standardize_context: bool | None = None
    bounds: Bounds | None = None

    def checked(self, *, beside_layers: bool = False) -> Options:
        """Return the options with values of the right types; what contradicts another is refused.

        beside_layers: these say what the couplings are.
        """
        mask = self.mask
        if not isinstance(mask, (np.ndarray, list, tuple, str)):
            raise TypeError(f"mask is {_checks.describe(mask)}, expected a string or bools [num_flows, input_size]")
        mask = _choice("mask", mask, MASKS) if isinstance(mask, str) else mask
        context = self.standardize_context
        found = Options(
            num_flows=_checks.integer("num_flows", self.num_flows),
            hidden_sizes=_checks.sizes("hidden_sizes", self.hidden_sizes),
            activation=_checks.text("activation", self.activation),
            context_size=_checks.integer("context_size", self.context_size),
            transform=_choice("transform", self.transform, TRANSFORMS),
            scale=_choice("scale", self.scale, SCALES),
            scale_bound=_checks.real("scale_bound", self.scale_bound),
            num_bins=_checks.integer("num_bins", self.num_bins),
            tail_bound=_checks.real("tail_bound", self.tail_bound),
            mask=mask,
            mixing=None if self.mixing is None else _choice("mixing", self.mixing, MIXINGS, " or None"),
            actnorm=_checks.boolean("actnorm", self.actnorm),
            network=_choice("network", self.network, NETWORKS),
            num_blocks=_checks.integer("num_blocks", self.num_blocks),
            layer_norm=_checks.boolean("layer_norm", self.layer_norm),
            base=_bases.checked(self.base),
            standardize_context=None if context is None else _checks.boolean("standardize_context", context),
            bounds=self.bounds,
        )
        for name, message in (*found._contradictions(), *(() if beside_layers else found._leaving())):
            raise ValueError(f"{name} is {getattr(found, name)!r} {message}")
        return found

    def _leaving(self) -> Iterator[tuple[str, str]]:
        """Yield options that carry rows out of a bounded base."""
        if not _bases.is_bounded(self.base):
            return
        under, way_out = f"with base={self.base!r}, expected", "; nvpflow.build(layers=) makes such a flow all the same"
        if self.transform != "spline":
            yield "transform", f"{under} 'spline': other couplings carry rows out of the interval{way_out}"
        if self.actnorm:
            yield "actnorm", f"{under} False: it carries rows out of the interval{way_out}"
        if self.bounds is not None:
            yield "bounds", f"{under} it left out: behind it columns fill no interval{way_out}"
        if self.mixing == "lu":
            yield "mixing", f"{under} another or None: it carries rows out of the interval{way_out}"

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.transform != "affine":
            for name in self._changed("scale", "scale_bound"):
                yield (
                    name,
                    f"with transform={self.transform!r}, expected it left out: {_ARTICLES[self.transform]} coupling "
                    "has no scale",
                )
        if self.transform != "spline":
            for name in self._changed("num_bins", "tail_bound"):
                yield name, f"with transform={self.transform!r}, expected transform='spline' for it"
        elif isinstance(self.base, Uniform) and self._changed("tail_bound"):
            yield "tail_bound", f"with base={self.base!r}, expected it left out: splines reach as far as the base"
        if self.scale in _UNBOUNDED and self._changed("scale_bound"):
            yield "scale_bound", f"with scale={self.scale!r}, expected it left out: that function has no bound"
        if self.network == "residual":
            if len(self.hidden_sizes) != 1:
                yield (
                    "hidden_sizes",
                    "with network='residual', expected one width such as (64,), which all blocks have; num_blocks says "
                    "how many they are",
                )
            if self.layer_norm:
                yield "layer_norm", "with network='residual', expected False; it belongs to network='mlp'"
        elif self._changed("num_blocks"):
            yield "num_blocks", "with network='mlp', expected network='residual' for it; an mlp has hidden_sizes"

    def _changed(self, *names: str) -> list[str]:
        return [name for name in names if _differs(getattr(self, name), getattr(_DEFAULTS, name))]

    def changed(self) -> list[str]:
        """Return the names of the options that are not at their defaults."""
        return self._changed(*vars(self))


_DEFAULTS = Options()


def spec_of(
    input_size: int, options: Options, *, standardize: bool, whiten: bool = False, dtype: str, seed: int
) -> FlowSpec:
    """Return the spec of a flow with checked options; the same one for the same seed, which draws what is random.

    whiten: behind the standardize layer, by the covariance.
    """
    plain = {"num_flows", "hidden_sizes", "activation", "scale_bound"}
    if whiten and _bases.is_bounded(options.base):
        raise ValueError(
            f"standardize is 'covariance' with base={options.base!r}, expected another: it carries rows out of the "
            "interval"
        )
    if plain.issuperset(options.changed()) and not whiten:
        return FlowSpec(
            input_size,
            options.num_flows,
            options.hidden_sizes,
            options.activation,
            options.scale_bound,
            standardize,
            dtype,
        )
    # The checks of sizes that every flow shares, before layers are made.
    FlowSpec(max(input_size, 2) if options.context_size > 0 else input_size, options.num_flows, (), dtype=dtype)
    layers: list[Layer] = [] if options.bounds is None else [options.bounds]
    layers += [Standardize()] if standardize else []
    if whiten:
        layers.append(LULinear(whitens=True))
    of_context = options.standardize_context
    spec = FlowSpec.from_layers(
        input_size,
        [*layers, *_steps(input_size, options, seed)],
        dtype,
        options.context_size,
        standardize and options.context_size > 0 if of_context is None else of_context,
        options.base,
    )
    if not isinstance(options.mask, str) and options.num_flows > 1:  # one coupling cannot transform all
        _check_all_transformed(spec, options)
    return spec


def _check_all_transformed(spec: FlowSpec, options: Options) -> None:
    """Refuse a mask of two couplings or more that leaves columns, or combinations of them, as the base has them."""
    what = "normally distributed" if spec.base == NORMAL else _bases.in_words(spec.base)
    way_out = f"for {what}; layers= builds such a flow all the same"
    count = int(np.sum(options.mask))
    # A linear layer mixes all columns, but each coupling bends no more directions than it transforms features.
    if (options.mixing == "lu" or whitens(spec)) and count < spec.input_size:
        raise ValueError(
            f"mask transforms {counted(count, 'feature')} in all couplings together, expected at least "
            f"{spec.input_size}, one for each column: the flow would take "
            f"{counted(spec.input_size - count, 'linear combination')} of the columns {way_out}"
        )
    left, _ = untransformed(spec)
    if left.size:
        columns = ", ".join(str(column + 1) for column in left[:5]) + (", ..." if left.size > 5 else "")
        moved = "" if options.mixing is None else f", at the place where mixing={options.mixing!r} puts it"
        raise ValueError(
            f"mask never transforms column{'s' if left.size > 1 else ''} {columns}, expected each column True in some "
            f"row{moved}: the flow would take it {way_out}"
        )


def spec_of_layers(
    input_size: int, layers: Iterable[Layer], options: Options, *, standardize: bool | str | None, dtype: str
) -> FlowSpec:
    """Return the spec of given layers, beside which options that are not at their defaults are refused."""
    kept = ("context_size", "standardize_context", "base")
    for name in options.changed():
        if name not in kept:
            value = _checks.describe(getattr(options, name))
            raise ValueError(f"{name} is {value} beside layers, expected it left out: layers say what the flow is")
    of_context = bool(options.standardize_context)
    spec = FlowSpec.from_layers(input_size, layers, dtype, options.context_size, of_context, options.base)
    begins = begins_with_standardize(spec)
    if standardize is not None and standardize is not True and begins != bool(standardize):
        put = "put one in front of" if standardize else "leave it out of"
        raise ValueError(
            f"standardize is {standardize!r}, expected True beside layers that begin "
            f"with {spec.layers[0]!r}; {put} them"
        )
    if standardize == "covariance" and not whitens(spec):
        raise ValueError("standardize is 'covariance' beside layers, expected LULinear(whitens=True) among them")
    return spec


def _differs(value: Any, default: Any) -> bool:
    """Tell whether an option, which may be an array, is not at its default."""
    return isinstance(value, np.ndarray) or bool(value != default)


def _choice(name: str, value: Any, known: Sequence[str], more: str = "") -> str:
    text = _checks.text(name, value)
    if text not in known:
        raise ValueError(f"{name} is {_checks.shortened(repr(text))}, expected one of {', '.join(known)}{more}")
    return text


def _transform(options: Options) -> Transform:
    if options.transform == "additive":
        return Additive()
    if options.transform == "spline" and isinstance(options.base, Uniform):
        return Spline(options.num_bins, interval=(options.base.low, options.base.high), boundary="free")
    if options.transform == "spline":
        return Spline(options.num_bins, options.tail_bound)
    try:
        return Affine(options.scale, None if options.scale in _UNBOUNDED else options.scale_bound)
    except ValueError as error:  # which names the argument of Affine
        raise ValueError(str(error).replace("bound is", "scale_bound is", 1)) from None


def _network(options: Options) -> Network:
    if options.network == "mlp":
        return MLP(options.hidden_sizes, options.activation, options.layer_norm)
    gates = options.context_size > 0
    return ResidualNet(options.hidden_sizes[0], options.num_blocks, options.activation, context_gates=gates)


def _steps(input_size: int, options: Options, seed: int) -> Iterator[Layer]:
    """Yield actnorm, mixing and coupling of each step, and the last mixing.

    Couplings come in pairs: what the first leaves as it is, the second transforms.
    """
    if options.mixing is not None and input_size == 1:
        raise ValueError(f"mixing is {options.mixing!r} with input_size 1, expected None: there is nothing to mix")
    draw = _Draw(seed)
    given = _given_masks(input_size, options)
    transform, network = _transform(options), _network(options)
    left: Places | None = None  # what the first coupling of a pair has left as it was, at its present places
    for k in range(options.num_flows):
        if options.actnorm:
            yield ActNorm()
        if options.mixing is not None:
            order = _order(input_size, options, left, draw)
            left = None if left is None else left[order]
            yield from _mixing(order, options)
        transformed = _set(input_size, options.mask, k // 2, left, draw) if given is None else _indices(given[k])
        yield Coupling(transformed, transform, network)
        left = None
        if k % 2 == 0:
            left = np.ones(input_size, np.bool_)
            left[members(transformed, input_size)] = False
    if options.mixing is not None:
        yield from _mixing(_order(input_size, options, None, draw), options)


class _Draw:
    """Random orders, the same ones for a seed with every NumPy: only raw bits are promised to stay as they are."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64([_STREAM, seed])

    def shuffled(self, values: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = values[np.argsort(self._bits.random_raw(len(values)), kind="stable")]
        return found


def _order(input_size: int, options: Options, left: Places | None, draw: _Draw) -> NDArray[np.intp]:
    """Return the order of a permutation."""
    every = np.arange(input_size)
    if options.mixing == "reverse":
        return every[::-1]
    if left is None or not isinstance(options.mask, str) or options.mask not in _PAIRS:
        return draw.shuffled(every)
    # What is left goes where the second coupling of the pair transforms.
    order = np.empty_like(every)
    second = np.zeros(input_size, np.bool_)
    second[members(_PAIRS[options.mask][1], input_size)] = True
    order[second], order[~second] = draw.shuffled(every[left]), draw.shuffled(every[~left])
    return order


def _mixing(order: NDArray[np.intp], options: Options) -> Iterator[Layer]:
    yield Permutation(order)
    if options.mixing == "lu":
        yield LULinear()


def _set(input_size: int, mask: str, pair: int, left: Places | None, draw: _Draw) -> str | tuple[int, ...]:
    """Return what a coupling transforms: all that is left by the one before, if that was the first of a pair."""
    if input_size == 1:
        return "all"
    if mask == "log2":  # one bit of the features' numbers after another, so that any two of them part somewhere
        bit = pair % (input_size - 1).bit_length()
        return _indices(np.arange(input_size) >> bit & 1 == 1 if left is None else left)
    if mask == "random":
        drawn = draw.shuffled(np.arange(input_size))[input_size // 2 :] if left is None else np.flatnonzero(left)
        return tuple(np.sort(drawn).tolist())
    names = _PAIRS[mask]
    if left is None:
        return names[0]
    return next(name for name in names if np.isin(np.flatnonzero(left), members(name, input_size)).all())


def _indices(row: Places) -> tuple[int, ...]:
    return tuple(np.flatnonzero(row).tolist())


def _given_masks(input_size: int, options: Options) -> Places | None:
    """Return masks that were given as an array, [num_flows, D], true where a feature is transformed."""
    if isinstance(options.mask, str):
        return None
    masks = np.asarray(options.mask)
    shape = (options.num_flows, input_size)
    if masks.dtype != np.bool_ or masks.shape != shape:
        raise ValueError(
            f"mask has dtype {masks.dtype} and shape {masks.shape}, expected bools of shape {shape}: a row for each "
            "coupling, True where a feature is transformed"
        )
    for k, count in enumerate(masks.sum(axis=1)):
        if count == 0:
            raise ValueError(f"mask[{k}] is all False, expected a feature that is transformed")
        if count == input_size and options.context_size == 0:
            raise ValueError(f"mask[{k}] is all True, expected a feature that the others depend on")
    return masks
