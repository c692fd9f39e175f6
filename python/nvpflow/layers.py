"""The layers that flows are made of, and the distributions of their latents.

`FlowSpec.layers` holds them in order, the one first applied to data first. `FlowSpec.from_layers` and `nvpflow.build`
take them. `Normal`, `Uniform`, `StudentT` and `Mixture` are the bases: `FlowSpec.base`. All are immutable, compare
by value, and print as the call that makes them.

>>> import nvpflow
>>> from nvpflow.layers import MLP, Affine, Coupling, Permutation, Standardize
>>> first = Coupling("odd", network=MLP((8,)))
>>> second = Coupling([0, 2, 3], Affine("softsign", bound=2), MLP((16, 16), "silu"))
>>> spec = nvpflow.FlowSpec.from_layers(4, [Standardize(), first, Permutation([3, 1, 0, 2]), second])
>>> spec.layers[3].network
MLP((16, 16), 'silu')
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from nvpflow import _checks
from nvpflow._bases import Mixture, Normal, StudentT, Uniform
from nvpflow._expression import Kind, from_json
from nvpflow._networks import MLP, Network, ResidualNet
from nvpflow._splines import Spline
from nvpflow._transforms import Additive, Affine, Transform

__all__ = [
    "MLP",
    "ActNorm",
    "Additive",
    "Affine",
    "Bounds",
    "Coupling",
    "ElementSpline",
    "LULinear",
    "Mixture",
    "Normal",
    "Permutation",
    "ResidualNet",
    "Spline",
    "Standardize",
    "StudentT",
    "Uniform",
]

_SETS = ("first_half", "second_half", "even", "odd", "all")


class _LayerKind(Kind):
    """What the package asks of a layer, answered for one that mixes all features."""

    _noun: ClassVar[str] = ""  # what it is called in summaries; "" of one that is first and has a line of its own there
    _masked: ClassVar[str] = ""  # the argument that may be a mask of features

    def _prefix(self, index: int, couplings: int) -> str:
        """Return what the names of its tensors begin with; couplings: in front of it."""
        return f"{self._kind}_{index}."

    def _in_words(self) -> str:
        """Return what it is called in summaries, "permutation"."""
        return self._noun

    def _became(self, input_size: int) -> str:
        """Return what an importer has made."""
        return type(self).__name__

    def _changed(self, input_size: int) -> NDArray[np.intp]:
        """Return the places of the features that leave as more than shifted and scaled."""
        return np.arange(input_size)

    def _order(self, input_size: int) -> NDArray[np.intp]:
        """Return the places that features come from."""
        return np.arange(input_size)

    def _splines(self) -> tuple[Spline, ...]:
        return ()


class _ByFeature(_LayerKind):
    """A layer that only shifts and scales each feature by itself, if need be behind its bounds."""

    def _changed(self, input_size: int) -> NDArray[np.intp]:
        return np.arange(0)


@dataclass(frozen=True, init=False, repr=False)
class Coupling(_LayerKind):
    """A coupling layer: ``y_b = transform(x_b; network([x_a, c]))``, ``y_a = x_a``; b is `transformed`, a the others.

    Parameters
    ----------
    transformed
        b: "second_half" (the default), "first_half", "odd", "even", "all", ascending indices, or a mask of bools, one a
        feature, True where the feature is transformed. Halves are split at ``D // 2``; odd is 1, 3, 5, ...; "all" needs
        a context. Some libraries' masks are True where a feature stays as it is: invert these.
    transform
        `Affine` (the default), `Additive` or `Spline`.
    network
        `MLP` (the default) or `ResidualNet`: one network that gives all parameters of the transform.
    inverse
        False: the formula is read from data to latent. True: from latent to data.
    scale_network, translation_network
        In place of `network`, two of kind `MLP`: one for the scale and one for the translation. Affine couplings only.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected. What depends on the number of features is checked by
        `FlowSpec.from_layers`.

    References
    ----------
    Dinh et al., Density estimation using Real NVP, 2017, eq. 7-8; NICE: Non-linear independent components estimation,
    2015. Durkan et al., Neural spline flows, 2019.
    """

    _kind = "coupling"
    _masked = "transformed"
    _by_position = 3

    transformed: str | tuple[int, ...]
    transform: Transform
    network: Network | None
    inverse: bool = False
    scale_network: MLP | None = None
    translation_network: MLP | None = None
    # How many features the mask was for, which must be the flow's number; it says nothing else of the layer.
    _mask_size: int | None = field(default=None, init=False, compare=False)

    def __init__(
        self,
        transformed: str | Sequence[int] | Sequence[bool] | NDArray[Any] = "second_half",
        transform: Transform | None = None,
        network: Network | None = None,
        *,
        inverse: bool = False,
        scale_network: MLP | None = None,
        translation_network: MLP | None = None,
    ) -> None:
        transform = Affine() if transform is None else transform
        if not isinstance(transform, (Affine, Additive, Spline)):
            raise TypeError(
                f"transform is {_checks.describe(transform)}, expected Affine, Additive or Spline of nvpflow.layers"
            )
        heads = {"scale_network": scale_network, "translation_network": translation_network}
        if scale_network is None and translation_network is None:
            network = MLP() if network is None else network
            if not isinstance(network, (MLP, ResidualNet)):
                raise TypeError(
                    f"network is {_checks.describe(network)}, expected MLP or ResidualNet of nvpflow.layers"
                )
        else:
            _check_heads(transform, network, heads)
        features, mask_size = _features("transformed", transformed)
        self._set(
            transformed=features,
            transform=transform,
            network=network,
            inverse=_checks.boolean("inverse", inverse),
            **heads,
            _mask_size=mask_size,
        )

    def _named_networks(self) -> dict[str, Network]:
        """Return the networks by the names of their arguments."""
        names = ("network", "scale_network", "translation_network")
        return {name: network for name in names if (network := getattr(self, name)) is not None}

    def _networks(self) -> list[Network]:
        return list(self._named_networks().values())

    def _fields_to_json(self) -> dict[str, Any]:
        entry = {"inverse": self.inverse, "transformed": self.transformed, "transform": self.transform._to_json()}
        return entry | {name: network._to_json() for name, network in self._named_networks().items()}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Coupling:
        parts: dict[str, Any] = {"transform": from_json(get_args(Transform), fields["transform"])}
        for name in ("network", "scale_network", "translation_network"):
            if name in fields:
                parts[name] = from_json(get_args(Network), fields[name])
        return cls(**fields | parts)

    def _prefix(self, index: int, couplings: int) -> str:
        return f"flow_{couplings}_"

    def _in_words(self) -> str:
        return f"{self.transform._kind} coupling"

    def _became(self, input_size: int) -> str:
        function = f" {self.transform.function}" if isinstance(self.transform, Affine) else ""
        of = f"{len(members(self.transformed, input_size))} of {input_size} features"
        return f"{self.transform._kind}{function} coupling of {of}, {' and '.join(map(repr, self._networks()))}"

    def _changed(self, input_size: int) -> NDArray[np.intp]:
        return members(self.transformed, input_size)

    def _splines(self) -> tuple[Spline, ...]:
        return (self.transform,) if isinstance(self.transform, Spline) else ()


@dataclass(frozen=True, repr=False)
class Standardize(_ByFeature):
    """``y = (x - mean) * exp(-log_std)``, one mean and log_std per feature, which `fit` sets from the data."""

    _kind = "standardize"


@dataclass(frozen=True, repr=False)
class ActNorm(_ByFeature):
    """``y = x * exp(log_scale) + shift``, one log_scale and shift per feature, which training changes.

    Parameters
    ----------
    inverse
        False: the formula is read from data to latent. True: from latent to data.

    Raises
    ------
    TypeError
        `inverse` is not a bool.

    References
    ----------
    Kingma and Dhariwal, Glow: Generative flow with invertible 1x1 convolutions, 2018.
    """

    _kind = "actnorm"
    _noun = "actnorm layer"

    inverse: bool = False

    def __post_init__(self) -> None:
        self._set(inverse=_checks.boolean("inverse", self.inverse))


@dataclass(frozen=True, init=False, repr=False)
class Permutation(_LayerKind):
    """``y[j] = x[order[j]]``: the features in another order; no arithmetic runs for it.

    Parameters
    ----------
    order
        Each of ``0 .. D - 1`` once; a sequence or an array of integers.

    Raises
    ------
    TypeError, ValueError
        Naming the entry, what came and what was expected.
    """

    _kind = _noun = "permutation"
    _by_position = 1

    order: tuple[int, ...]

    def __init__(self, order: Sequence[int] | NDArray[Any]) -> None:
        places = _checks.sizes("order", order, example="(2, 0, 1)")
        if not places:
            raise ValueError("order is empty, expected each of 0 to D - 1 once")
        seen = set()
        for j, place in enumerate(places):
            if not 0 <= place < len(places):
                raise ValueError(f"order[{j}] is {place}, expected 0 to {len(places) - 1}: each of them once")
            if place in seen:
                raise ValueError(f"order[{j}] is {place} again, expected each of 0 to {len(places) - 1} once")
            seen.add(place)
        self._set(order=places)

    def _changed(self, input_size: int) -> NDArray[np.intp]:
        return np.arange(0)

    def _order(self, input_size: int) -> NDArray[np.intp]:
        return np.array(self.order, np.intp)


@dataclass(frozen=True, repr=False)
class LULinear(_LayerKind):
    """``y = L U x + bias``, L unit lower and U upper triangular; it starts as the identity.

    The diagonal of U is ``sign * exp(log_diagonal)``; training changes all but the signs.

    Parameters
    ----------
    inverse
        False: the formula is read from data to latent. True: from latent to data.
    whitens
        True: the layer is not trained. `Flow.fit` and `Flow.initialize_from` set it from the covariance of all rows as
        they arrive here. It is shrunk as by Ledoit and Wolf, or as left-out rows are likelier by. What leaves
        has mean 0 and unit covariance. New couplings of its flow are the identity: behind a `Standardize` the flow
        begins as a Gaussian.

    Raises
    ------
    TypeError
        `inverse` or `whitens` is not a bool.

    References
    ----------
    Kingma and Dhariwal, Glow: Generative flow with invertible 1x1 convolutions, 2018, section 3.2.
    Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.
    """

    _kind = "lu_linear"
    _noun = "LU layer"

    inverse: bool = False
    whitens: bool = False

    def __post_init__(self) -> None:
        inverse, whitens = _checks.boolean("inverse", self.inverse), _checks.boolean("whitens", self.whitens)
        self._set(inverse=inverse, whitens=whitens)

    def _fields_to_json(self) -> dict[str, Any]:
        whitens = {"whitens": True} if self.whitens else {}  # else as it was before there was such a field
        return {"inverse": self.inverse} | whitens


@dataclass(frozen=True, init=False, repr=False)
class ElementSpline(_LayerKind):
    """A spline of each feature by itself: its raw numbers are parameters, and no network makes them.

    It bends the marginal distributions, beside couplings that bend what depends on the other features. A new one is
    the identity, where the spline of raw zeros is.

    Parameters
    ----------
    features
        Which ones, as `transformed` of `Coupling`; "all" needs no context.
    spline
        What it does to them. None: ``Spline()``.
    inverse
        False: the formula is read from data to latent. True: from latent to data.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.

    References
    ----------
    Durkan et al., Neural spline flows, 2019, section 3.2.
    """

    _kind = "element_spline"
    _noun = "spline layer"
    _masked = "features"
    _by_position = 2

    features: str | tuple[int, ...]
    spline: Spline
    inverse: bool = False
    # As in Coupling.
    _mask_size: int | None = field(default=None, init=False, compare=False)

    def __init__(
        self,
        features: str | Sequence[int] | Sequence[bool] | NDArray[Any],
        spline: Spline | None = None,
        *,
        inverse: bool = False,
    ) -> None:
        spline = Spline() if spline is None else spline
        if not isinstance(spline, Spline):
            raise TypeError(f"spline is {_checks.describe(spline)}, expected Spline of nvpflow.layers")
        chosen, mask_size = _features("features", features)
        self._set(features=chosen, spline=spline, inverse=_checks.boolean("inverse", inverse), _mask_size=mask_size)

    def _fields_to_json(self) -> dict[str, Any]:
        return {"inverse": self.inverse, "features": self.features, "spline": self.spline._fields_to_json()}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> ElementSpline:
        return cls(**fields | {"spline": Spline._from_fields(dict(fields["spline"]))})

    def _prefix(self, index: int, couplings: int) -> str:
        return f"spline_{index}."

    def _became(self, input_size: int) -> str:
        return f"spline of {len(members(self.features, input_size))} features by themselves"

    def _changed(self, input_size: int) -> NDArray[np.intp]:
        return members(self.features, input_size)

    def _splines(self) -> tuple[Spline, ...]:
        return (self.spline,)


@dataclass(frozen=True, init=False, repr=False)
class Bounds(_ByFeature):
    """Brings columns of data that cannot lie beyond some number to the whole line. Only as a flow's first layer.

    It also says which columns are discrete.

    * two bounds: ``y = log(x - low) - log(high - x)``
    * a lower one: ``y = log(x - low)``
    * an upper one: ``y = -log(high - x)``
    * none: ``y = x``

    It is computed in float64, also of float32 rows, and rounded once. A row outside or on an edge has log p = -inf,
    infinite latents and zero gradients. Samples lie inside, never on an edge.

    A discrete column holds integers, each of which stands for its cell, from n - 1/2 to n + 1/2. `Flow.fit` adds noise
    that is uniform on the cell. log p of an integer is that of the cell by the density at its middle, -inf of any other
    number. Samples are rounded. `Flow.forward` and `Flow.inverse` take and give any number.

    Parameters
    ----------
    low, high
        Of each column, None where there is no bound: sequences [D] of numbers and None. At least one is a number, or a
        column is discrete. Those of a discrete column are edges of cells: -0.5 for integers from 0 on.
    discrete
        The columns of integers, counted from 0, ascending.

    Raises
    ------
    TypeError, ValueError
        Naming the entry, what came and what was expected.

    Examples
    --------
    >>> from nvpflow.layers import Bounds
    >>> Bounds([0, 0, None], [1, None, None])  # a share, a duration and a number of any sign
    Bounds((0.0, 0.0, None), (1.0, None, None))
    >>> Bounds([-0.5, None], [None, None], discrete=[0])  # a count and a number of any sign
    Bounds((-0.5, None), (None, None), discrete=(0,))
    """

    _kind = "bounds"
    _by_position = 2

    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    discrete: tuple[int, ...] = ()

    def __init__(
        self, low: Sequence[float | None], high: Sequence[float | None], *, discrete: Sequence[int] = ()
    ) -> None:
        lows, highs = _ends("low", low, -math.inf), _ends("high", high, math.inf)
        if len(lows) != len(highs):
            raise ValueError(f"high has {len(highs)} entries, expected {len(lows)}, as low has")
        columns = _checks.sizes("discrete", discrete, example="(0, 2)")
        if not columns and not any(value is not None for value in (*lows, *highs)):
            raise ValueError("low and high hold no number, expected a bound of one column at least")
        for j, (a, b) in enumerate(zip(lows, highs, strict=True)):
            if a is not None and b is not None and not a < b:
                raise ValueError(f"high[{j}] is {b:g}, expected more than low[{j}], which is {a:g}")
        _check_discrete(columns, lows, highs)
        self._set(low=lows, high=highs, discrete=columns)

    def _fields_to_json(self) -> dict[str, Any]:
        discrete = {"discrete": self.discrete} if self.discrete else {}  # else as it was before there was such a field
        return {"low": self.low, "high": self.high} | discrete

    def is_free(self, column: int) -> bool:
        """Tell whether a column, counted from 0, has no bound."""
        return self.low[column] is self.high[column] is None


def _check_discrete(columns: tuple[int, ...], low: tuple[float | None, ...], high: tuple[float | None, ...]) -> None:
    for i, j in enumerate(columns):
        if not 0 <= j < len(low):
            raise ValueError(f"discrete[{i}] is {j}, expected 0 to {len(low) - 1}")
        if i > 0 and j <= columns[i - 1]:
            raise ValueError(f"discrete[{i}] is {j} after {columns[i - 1]}, expected ascending columns")
        for name, edge in (("low", low[j]), ("high", high[j])):
            if edge is not None and math.floor(edge) != edge - 0.5:
                raise ValueError(
                    f"{name}[{j}] is {edge:g} of a discrete column, expected the edge of an integer's cell, such as "
                    "-0.5"
                )


def _ends(name: str, values: Any, none: float) -> tuple[float | None, ...]:
    """Return ends of intervals, None for the infinite one that stands for none."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)) or np.ndim(values) != 1:
        raise TypeError(f"{name} is {_checks.describe(values)}, expected a sequence of numbers and None, one a column")
    return tuple(end(f"{name}[{j}]", value, none) for j, value in enumerate(values))


def end(name: str, value: Any, none: float) -> float | None:
    """Return one end of an interval, which is finite, or None also for the infinite number that stands for it."""
    if value is None:
        return None
    number = _checks.real(name, value)
    if number == none:
        return None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, expected a finite number or None")
    return number


Layer = Coupling | ElementSpline | Standardize | ActNorm | Permutation | LULinear | Bounds
KINDS: tuple[type[Layer], ...] = get_args(Layer)


def checked(name: str, value: object) -> Layer:
    """Return what must be a layer; a class that derives from one is none."""
    if type(value) not in KINDS:
        hint = f"; write {value.__name__}()" if isinstance(value, type) and value in KINDS else ""
        raise TypeError(f"{name} is {_checks.describe(value)}, expected a layer of nvpflow.layers{hint}")
    return value  # type: ignore[return-value]


def layer_of(entry: Mapping[str, Any]) -> Layer:
    """Return the layer that an entry of a spec's JSON holds, format 1.1."""
    return from_json(KINDS, entry)


def prefixes(layers: Iterable[Layer]) -> Iterator[str]:
    """Yield what the names of each layer's tensors begin with."""
    couplings = 0
    for index, layer in enumerate(layers):
        yield layer._prefix(index, couplings)
        couplings += isinstance(layer, Coupling)


def members(transformed: str | tuple[int, ...], input_size: int) -> NDArray[np.intp]:
    """Return the indices of a feature set of so many features, ascending."""
    if not isinstance(transformed, str):
        return np.array(transformed, np.intp)
    half = input_size // 2
    slices = {"first_half": slice(half), "second_half": slice(half, None), "all": slice(None)}
    slices |= {"even": slice(0, None, 2), "odd": slice(1, None, 2)}
    return np.arange(input_size)[slices[transformed]]


def _check_heads(transform: Transform, network: object, heads: dict[str, MLP | None]) -> None:
    given = " and ".join(name for name, value in heads.items() if value is not None)
    if isinstance(transform, Additive):
        raise ValueError(f"{given} given with transform=Additive(), expected only network: there is one head")
    if isinstance(transform, Spline):
        raise ValueError(f"{given} given with transform={transform!r}, expected only network: it gives all of a spline")
    if network is not None:
        raise ValueError(f"{given} given beside network, expected only network, or only the networks of both heads")
    for name, value in heads.items():
        if value is None:
            raise ValueError(f"{name} is None beside {given}, expected both of them")
        if not isinstance(value, MLP):
            raise TypeError(f"{name} is {_checks.describe(value)}, expected MLP of nvpflow.layers")


def _features(name: str, value: Any) -> tuple[str | tuple[int, ...], int | None]:
    """Return a feature set as a name or indices, and how many features it is a mask of."""
    expected = f"expected one of {', '.join(_SETS)}, ascending indices, or a mask of bools"
    if isinstance(value, str):
        if value not in _SETS:
            raise ValueError(f"{name} is {_checks.shortened(repr(value))}, {expected}")
        return value, None
    if isinstance(value, bytes) or not isinstance(value, (Sequence, np.ndarray)):
        raise TypeError(f"{name} is {_checks.describe(value)}, {expected}")
    entries: Any = value if isinstance(value, np.ndarray) else np.asarray(value) if _are_bools(value) else None
    if entries is not None and entries.dtype == np.bool_ and entries.ndim == 1:
        indices, size = tuple(np.flatnonzero(entries).tolist()), len(entries)
    else:
        indices, size = _checks.sizes(name, value, example="(0, 2, 3)"), None
    if not indices:
        raise ValueError(f"{name} holds no feature, expected at least one")
    for i, index in enumerate(indices):
        if index < 0:
            raise ValueError(f"{name}[{i}] is {index}, expected at least 0")
        if i > 0 and index <= indices[i - 1]:
            raise ValueError(
                f"{name}[{i}] is {index} after {indices[i - 1]}, expected ascending indices; a mask holds bools"
            )
    return indices, size


def _are_bools(values: Sequence[Any]) -> bool:
    return len(values) > 0 and all(isinstance(value, (bool, np.bool_)) for value in values)
