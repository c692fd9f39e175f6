"""State dicts: tensors without their objects, in whose places stand-ins are put.

What a tensor is called tells where it was, and which tensors are beside it of which class its owner was. Stand-ins have
the attributes that the importers of live objects read, so that there is one way from each library to here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

import nvpflow.importers._nflows as _nflows
import nvpflow.importers._torch as _torch
import nvpflow.importers._zuko as _zuko
from nvpflow import _checks
from nvpflow.flow import Flow
from nvpflow.importers._activations import checked
from nvpflow.importers._parity import imported
from nvpflow.importers._recipe import Array
from nvpflow.importers._refusal import refused

LIBRARIES = ("zuko", "nflows")


def from_state_dict(
    tensors: Mapping[str, Any],
    library: str,
    *,
    activation: str = "relu",
    slope: float = 1e-3,
    tail_bound: float | None = None,
    prefix: str = "",
    dtype: DTypeLike = "float32",
) -> Flow:
    """Return the flow of a state dict: of the tensors of a model, by their names, without its code.

    What no tensor tells is taken for granted, and `Flow.import_report` lists it. Nothing can be compared: prefer the
    live model, and `from_zuko` or `from_nflows`.

    Parameters
    ----------
    tensors
        What ``model.state_dict()`` returns, or arrays of NumPy under the same names.
    library
        "zuko" or "nflows": what the model is of.
    activation
        Of the hidden layers, as in `nvpflow.build`.
    slope
        The ``slope`` of zuko's transforms.
    tail_bound
        How far splines reach. None: 5, the default of zuko; of nflows it must be given.
    prefix
        What the names of the flow's tensors begin with where the flow is a part of a model, such as ``"flow."``.
        Tensors of other names are not read.
    dtype
        Of the flow, "float32" or "float64".

    Returns
    -------
    Flow
        On the CPU. Each of the tensors has its place in it.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, the tensors are not of a flow of `library`, or a part of it has no counterpart here. The
        message begins with its path.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise TypeError(f"tensors is {_checks.describe(tensors)}, expected what model.state_dict() returns")
    if _checks.text("library", library) not in LIBRARIES:
        raise ValueError(f"library is {library!r}, expected one of {', '.join(LIBRARIES)}")
    tensors = _under(tensors, _checks.text("prefix", prefix))
    checked("activation", _checks.text("activation", activation))
    if not 0 < _checks.real("slope", slope) < 1:
        raise ValueError(f"slope is {slope}, expected more than 0 and less than 1")
    if tail_bound is not None and not 0 < _checks.real("tail_bound", tail_bound) < math.inf:
        raise ValueError(f"tail_bound is {tail_bound}, expected finite and > 0")
    if library == "zuko":
        reader: _Reader = _ZukoReader(tensors, activation, tail_bound, slope)
        recipe, _ = _zuko.recipe_of(reader.model())
    else:
        reader = _NflowsReader(tensors, activation, tail_bound, slope)
        recipe = _nflows.recipe_of(reader.model())
    reader.check_all_taken()
    recipe.assumed = list(dict.fromkeys(reader.assumed))
    return imported(recipe, _NO_CODE.format(library), dtype=dtype, check=True)


def _under(tensors: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Return the tensors whose names begin with a prefix, without it."""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if tensors and not found:
        first = sorted({name.partition(".")[0] + "." for name in tensors})[:5]
        known = ", ".join(_checks.shortened(repr(name)) for name in first)
        raise ValueError(f"prefix is {prefix!r}, expected what names of tensors begin with: {known}")
    return found


_NO_CODE = (
    "a state dict holds tensors and no code, so log p, z and x were not compared with those of {}; each tensor has its "
    "place here, with the shape that it must have; layers without tensors leave no trace in a state dict"
)


_LIVE = "import the live model"
_DEEPEST = 64  # modules within modules; names come from anybody's file
_SMALL = 2**20  # numbers of a view that may be larger than what it views


def _numbers(name: str, value: Any) -> Array:
    """Return a tensor of real numbers in float64."""
    plain = value if isinstance(value, np.ndarray) else None
    try:
        if hasattr(value, "detach") and not value.is_complex() and value.numel() <= max(_stored(value), _SMALL):
            plain = value.detach().cpu().double().numpy()
    except Exception as error:  # of a layout or a device that has no numbers to read
        raise ValueError(f"tensors[{name!r}] cannot be read ({type(error).__name__}), expected real numbers") from error
    if plain is None or plain.dtype.kind not in "biuf":
        raise ValueError(f"tensors[{name!r}] is {_checks.describe(value)}, expected a tensor of real numbers")
    return _torch.array(plain)


def _stored(tensor: Any) -> int:
    """Return how many numbers a tensor has in memory: a file of few bytes can hold a view of any size."""
    return int(tensor.untyped_storage().nbytes() // tensor.element_size())


class _StandIn:
    """In the place of an object of a class of the source."""

    def __init__(self, kind: str, **attributes: Any) -> None:
        self._stands_for = kind
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:  # what importers look for, and a stand-in has not
        raise AttributeError(name)


class _Reader:
    """The tensors, and which of them have found their place."""

    def __init__(self, tensors: Mapping[str, Any], activation: str, tail_bound: float | None, slope: float) -> None:
        for name in tensors:
            if name.count(".") > _DEEPEST:
                raise ValueError(f"tensors holds {_checks.shortened(name)}, expected names of at most {_DEEPEST} dots")
        self._tensors = {name: value for name, value in tensors.items() if not name.endswith(".num_batches_tracked")}
        self._taken: set[str] = set()
        self.activation, self.tail_bound, self.slope = activation, tail_bound, slope
        self.assumed: list[str] = []

    def model(self) -> _StandIn:
        """Return what stands for the flow."""
        raise NotImplementedError

    def check_all_taken(self) -> None:
        """Refuse tensors that no place was found for."""
        left = [name for name in self._tensors if name not in self._taken]
        if left:
            shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise ValueError(f"tensors holds {shown}, expected none of these in a flow of couplings; {_LIVE}")

    def parts(self, prefix: str) -> set[str]:
        """Return the next part of the names that begin with a prefix."""
        return {name[len(prefix) :].partition(".")[0] for name in self._tensors if name.startswith(prefix)}

    def misnamed(self, first: str, whose: str) -> ValueError:
        """Return the error to raise where no name begins as a library's do: the flow may be part of a model."""
        outer = sorted(self.parts(""))
        found = ", ".join(outer[:5]) or "nothing"
        within = next((f"{part}." for part in outer if self.parts(f"{part}.{first}")), None)
        do = within and f"; where the flow is a part of the model, give prefix={within!r}"
        return ValueError(f"tensors holds {found}, expected names that begin with {first}, {whose}{do or ''}")

    def tensor(self, name: str, *shape: int | None) -> Array:
        """Return a tensor in float64 and take note that it was used; shape: what it must have, None any length."""
        if name not in self._tensors:
            raise ValueError(f"tensors lacks {name}, expected it beside the others of its layer")
        self._taken.add(name)
        found = _numbers(name, self._tensors[name])
        if len(shape) != found.ndim or any(n not in (None, m) for n, m in zip(shape, found.shape, strict=True)):
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"tensors[{name!r}] has shape {found.shape}, expected ({expected})")
        return found

    def those_of(self, prefix: str, *names: str, shape: tuple[int | None, ...] = (None,)) -> dict[str, Array]:
        """Return tensors of one shape behind a prefix by their names."""
        return {name: self.tensor(prefix + name, *shape) for name in names}

    def numbers(self, prefix: str) -> list[int]:
        """Return the numbers that come next in the names that begin with a prefix, ascending."""
        return sorted(int(part) for part in self.parts(prefix) if part.isdecimal() and len(part) < 10)

    def numbered(self, prefix: str) -> Iterator[tuple[int, str]]:
        """Yield numbers and prefixes of the members of a list, without a gap."""
        for i, number in enumerate(self.numbers(prefix)):
            if i != number:
                raise ValueError(
                    f"tensors holds none of {prefix}{i}, expected some beside {prefix}{number}: a layer without "
                    f"tensors leaves no trace in a state dict; {_LIVE}"
                )
            yield i, f"{prefix}{i}."

    def linear(self, prefix: str) -> _StandIn:
        """Return a Linear; without a tensor for its bias it is taken to have none."""
        weight = self.tensor(f"{prefix}weight", None, None)
        if len(weight) == 0:
            raise ValueError(f"tensors['{prefix}weight'] has shape {weight.shape}, expected an output at least")
        bias = self.tensor(f"{prefix}bias", len(weight)) if f"{prefix}bias" in self._tensors else None
        if bias is None:
            self.assume(f"{prefix[:-1]} without a bias")
        mask = {"mask": self.tensor(f"{prefix}mask", *weight.shape)} if f"{prefix}mask" in self._tensors else {}
        return _StandIn("Linear", weight=weight, bias=bias, **mask)

    def each_of(self, path: str, outputs: int, features: int) -> int:
        """Return how many numbers a network has for each of so many features."""
        each, rest = divmod(outputs, max(features, 1))
        if features == 0 or each == 0 or rest:
            raise refused(path, f"of {outputs} outputs for {features} features", "as many outputs for each feature")
        return each

    def assume(self, text: str) -> None:
        """Take something for granted."""
        self.assumed.append(text)

    def assume_activation(self) -> None:
        self.assume(f"activation {self.activation!r}")


# ----------------------------------------------------------------------------------------------------------- zuko


class _ZukoReader(_Reader):
    def model(self) -> _StandIn:
        if not self.parts("transform."):
            raise self.misnamed("transform.", "those of a zuko Flow")
        return _StandIn("Flow", transform=self._transform("transform."), base=self._base())

    def _base(self) -> _StandIn:
        found = sorted(self.parts("base."))
        known: dict[tuple[str, ...], str] = {("loc", "scale"): "DiagNormal", ("_0", "_1"): "DiagNormal"}
        known[("lower", "upper")] = "BoxUniform"
        if tuple(found) not in known:
            raise refused("flow.base", f"of tensors {', '.join(found) or 'none'}", "loc and scale, or lower and upper")
        if found[0] == "_0":
            self.assume("base DiagNormal")
        return _StandIn(known[tuple(found)], **self.those_of("base.", *found))

    def _transform(self, prefix: str) -> _StandIn:
        parts = self.parts(prefix)
        if "transforms" in parts:
            several = [self._transform(below) for _, below in self.numbered(f"{prefix}transforms.")]
            return _StandIn("LazyComposedTransform", transforms=several)
        if parts == {"transform"}:
            return _StandIn("LazyInverse", transform=self._transform(f"{prefix}transform."))
        if "hyper" not in parts:
            what = ", ".join(sorted(parts))
            raise refused(f"flow.{prefix[:-1]}", f"of tensors {what}", "mask or order, and hyper", _LIVE)
        hyper = self._network(f"{prefix}hyper.")
        outputs = len(hyper[-1].weight)
        if "mask" in parts:
            mask = self.tensor(f"{prefix}mask", None)
            univariate = self._univariate(f"flow.{prefix[:-1]}", outputs, int((mask == 0).sum()))
            return _StandIn("GeneralCouplingTransform", mask=mask, hyper=hyper, **univariate)
        if "order" in parts:
            order = self.tensor(f"{prefix}order", None)
            for number in self.numbers(f"{prefix}hyper."):
                self.tensor(f"{prefix}hyper.{number}.mask", None, None)  # without it all would see all
            univariate = self._univariate(f"flow.{prefix[:-1]}", outputs, len(order))
            return _StandIn("MaskedAutoregressiveTransform", order=order, hyper=hyper, **univariate)
        raise refused(f"flow.{prefix[:-1]}", "without mask and order", "one of them", _LIVE)

    def _univariate(self, path: str, outputs: int, features: int) -> dict[str, Any]:
        """Return what is done to each of so many features, from how many numbers there are for each."""
        each = self.each_of(path, outputs, features)
        if each == 1:
            return {"univariate": _StandIn("AdditiveTransform", keywords={}), "shapes": ((),), "total": each}
        self.assume(f"slope {self.slope:g}")
        if each == 2:
            affine = _StandIn("MonotonicAffineTransform", keywords={"slope": self.slope})
            return {"univariate": affine, "shapes": ((), ()), "total": each}
        bound = 5.0 if self.tail_bound is None else self.tail_bound
        self.assume(f"splines from -{bound:g} to {bound:g}")
        spline = _StandIn("MonotonicRQSTransform", keywords={"slope": self.slope, "bound": bound})
        bins, rest = divmod(each + 1, 3)
        if rest:
            raise refused(path, f"of {each} numbers for each feature", "1, 2 or 3 K - 1, those of a spline")
        return {"univariate": spline, "shapes": ((bins,), (bins,), (bins - 1,)), "total": each}

    def _network(self, prefix: str) -> list[Any]:
        """Return the layers of an MLP: those without tensors are an activation, and behind it perhaps a LayerNorm."""
        numbers = self.numbers(prefix)
        if not numbers:
            raise refused(f"flow.{prefix[:-1]}", "without layers", "a Linear at least", _LIVE)
        modules: list[Any] = []
        for i, number in enumerate(numbers):
            between = number - len(modules)
            if between not in ((1, 2) if i else (0,)):
                raise refused(f"flow.{prefix}{number}", f"behind {between} layers", "an activation, or a LayerNorm too")
            modules += [self.activation, _StandIn("LayerNorm", dim=-1, eps=1e-5)][:between]
            modules.append(self.linear(f"{prefix}{number}."))
        if len(numbers) > 1:
            self.assume_activation()
        return modules


# --------------------------------------------------------------------------------------------------------- nflows


class _NflowsReader(_Reader):
    def model(self) -> _StandIn:
        if not self.parts("_transform."):
            raise self.misnamed("_transform.", "as those of an nflows Flow")
        self._size = self._features()
        return _StandIn("Flow", _transform=self._transform("_transform."), _distribution=self._base())

    def _features(self) -> int:
        """Return how many features the first coupling has; 0 without one."""
        last = ".transform_features"
        first = next((name.removesuffix(last) for name in self._tensors if name.endswith(last)), None)
        names = ("identity_features", "transform_features")
        return 0 if first is None else sum(len(v) for v in self.those_of(f"{first}.", *names).values())

    def _base(self) -> _StandIn:
        parts = self.parts("_distribution.")
        if "_log_z" in parts:  # a constant
            self.tensor("_distribution._log_z")
        if parts <= {"_log_z"}:
            self.assume("base StandardNormal")
            return _StandIn("StandardNormal")
        if {"mean_", "log_std_"} <= parts:
            moments = self.those_of("_distribution.", "mean_", "log_std_", shape=(1, self._size))
            return _StandIn("DiagonalNormal", **moments)
        raise refused("flow._distribution", f"of tensors {', '.join(sorted(parts))}", "none, or mean_ and log_std_")

    def _transform(self, prefix: str) -> _StandIn:
        parts = self.parts(prefix)
        if "_transforms" in parts:
            several = [self._transform(below) for _, below in self.numbered(f"{prefix}_transforms.")]
            return _StandIn("CompositeTransform", _transforms=several)
        if parts == {"_transform"}:
            return _StandIn("InverseTransform", _transform=self._transform(f"{prefix}_transform."))
        if "transform_features" in parts:
            return self._coupling(prefix)
        if "unnormalized_widths" in parts:
            return self._cdf(prefix)
        for kind, (shapes, constants) in _NFLOWS.items():
            own = {name for name in shapes if "." not in name}
            if own <= parts:
                for text in (f"{name} {value:g} of {kind}" for name, value in constants.items()):
                    self.assume(text)
                return self._stand_in(kind, prefix, shapes, constants)
        what = ", ".join(sorted(parts))
        raise refused(f"flow.{prefix[:-1]}", f"of tensors {what}", "those of a transform that is known here")

    def _stand_in(
        self, kind: str, prefix: str, shapes: dict[str, tuple[str | None, ...]], constants: dict[str, float]
    ) -> _StandIn:
        made = _StandIn(kind, **constants)
        extents = {None: None, "D": self._size, "T": self._size * (self._size - 1) // 2}
        for name, shape in shapes.items():
            found = self.tensor(prefix + name, *(extents[n] for n in shape))
            owner, _, own = name.rpartition(".")
            if owner:
                setattr(made, owner, _StandIn("HouseholderSequence", **{own: found}))
            else:
                setattr(made, name, found)
        if kind == "ActNorm":
            self.tensor(f"{prefix}initialized")
        return made

    def _coupling(self, prefix: str) -> _StandIn:
        path = f"flow.{prefix[:-1]}"
        features = self.those_of(prefix, "identity_features", "transform_features")
        if any((np.diff(v) <= 0).any() for v in features.values()) or set().union(*features.values()) != set(
            range(sum(map(len, features.values())))
        ):
            raise refused(path, "of features that are not all of them, once and ascending", "those of nflows")
        net = self._network(f"{prefix}transform_net.")
        outputs = len((net.final_layer if hasattr(net, "final_layer") else net._output_layer).weight)
        each = self.each_of(path, outputs, len(features["transform_features"]))
        kind = {1: "AdditiveCouplingTransform", 2: "AffineCouplingTransform"}.get(each)
        if kind is not None:
            if each == 2:
                self.assume("scale sigmoid(u + 2) + 0.001, that of version 0.14")
            return _StandIn(kind, transform_net=net, **features)
        own = None
        if "unconditional_transform" in self.parts(prefix):
            own = self._cdf(f"{prefix}unconditional_transform.")
        kind = "PiecewiseRationalQuadraticCouplingTransform"
        spline = self._spline(path, each)
        return _StandIn(kind, transform_net=net, unconditional_transform=own, **features, **spline)

    def _spline(self, path: str, each: int) -> dict[str, Any]:
        """Return the constants of a spline from how many numbers it has for each feature."""
        bins, rest = divmod(each + 1, 3)
        if rest not in (0, 2) or (rest == 2 and bins < 1):
            raise refused(path, f"of {each} numbers for each feature", "3 K - 1 or 3 K + 1, those of a spline")
        bounded = rest == 2
        if not bounded and self.tail_bound is None:
            raise ValueError(f"tail_bound is None, expected a number: {path} has splines, and no tensor holds it")
        self.assume("splines on [0, 1]" if bounded else f"splines from -{self.tail_bound:g} to {self.tail_bound:g}")
        self.assume("smallest widths, heights and derivatives of splines 0.001")
        sizes = dict.fromkeys(("min_bin_width", "min_bin_height", "min_derivative"), 1e-3)
        return {"num_bins": bins, "tails": None if bounded else "linear", "tail_bound": self.tail_bound, **sizes}

    def _cdf(self, prefix: str) -> _StandIn:
        names = [f"unnormalized_{name}" for name in ("widths", "heights", "derivatives")]
        raw = self.those_of(prefix, *names, shape=(None, None))
        spline = self._spline(f"flow.{prefix[:-1]}", sum(values.shape[-1] for values in raw.values()))
        return _StandIn("PiecewiseRationalQuadraticCDF", **raw, **spline)

    def _network(self, prefix: str) -> _StandIn:
        parts = self.parts(prefix)
        self.assume_activation()
        if "initial_layer" in parts:
            first, last = (self.linear(f"{prefix}{name}.") for name in ("initial_layer", "final_layer"))
            blocks = [self._block(below) for _, below in self.numbered(f"{prefix}blocks.")]
            sizes = {"hidden_features": len(first.weight)}
            return _StandIn("ResidualNet", initial_layer=first, blocks=blocks, final_layer=last, **sizes)
        if "_input_layer" in parts:
            first, last = (self.linear(f"{prefix}{name}.") for name in ("_input_layer", "_output_layer"))
            hidden = [self.linear(below) for _, below in self.numbered(f"{prefix}_hidden_layers.")]
            layers = {"_input_layer": first, "_hidden_layers": hidden, "_output_layer": last}
            return _StandIn("MLP", _activation=self.activation, **layers)
        what = ", ".join(sorted(parts))
        raise refused(f"flow.{prefix[:-1]}", f"of tensors {what}", "those of a ResidualNet or MLP of nflows.nn.nets")

    def _block(self, prefix: str) -> _StandIn:
        linears = [self.linear(below) for _, below in self.numbered(f"{prefix}linear_layers.")]
        units = len(linears[0].weight) if linears else None
        norms = [self._batch_norm(below, units) for _, below in self.numbered(f"{prefix}batch_norm_layers.")]
        if len(linears) != 2 or len(norms) not in (0, 2):
            what = f"of {len(linears)} linear layers and {len(norms)} batch normalizations"
            raise refused(f"flow.{prefix[:-1]}", what, "2 linear layers, and 2 or none")
        layers: dict[str, Any] = {"linear_layers": linears, "batch_norm_layers": norms, "use_batch_norm": bool(norms)}
        if "context_layer" in self.parts(prefix):
            layers["context_layer"] = self.linear(f"{prefix}context_layer.")
        return _StandIn("ResidualBlock", activation=self.activation, **layers)

    def _batch_norm(self, prefix: str, units: int | None) -> _StandIn:
        self.assume("eps 0.001 of BatchNorm1d")
        names = ("weight", "bias", "running_mean", "running_var")
        return _StandIn("BatchNorm1d", eps=1e-3, **self.those_of(prefix, *names, shape=(units,)))


# By the class of a transform: the shapes of its tensors, of D features and T = D (D - 1) / 2, and constants that are in
# none. The first one whose tensors are there is it.
_NFLOWS: dict[str, tuple[dict[str, tuple[str | None, ...]], dict[str, float]]] = {
    "Permutation": ({"_permutation": ("D",)}, {}),
    "LULinear": (
        {"lower_entries": ("T",), "upper_entries": ("T",), "unconstrained_upper_diag": ("D",), "bias": ("D",)},
        {"eps": 1e-3},
    ),
    "SVDLinear": (
        {
            "unconstrained_diagonal": ("D",),
            "bias": ("D",),
            "orthogonal_1.q_vectors": (None, "D"),
            "orthogonal_2.q_vectors": (None, "D"),
        },
        {"eps": 1e-3},
    ),
    "QRLinear": (
        {"upper_entries": ("T",), "log_upper_diag": ("D",), "bias": ("D",), "orthogonal.q_vectors": (None, "D")},
        {},
    ),
    "NaiveLinear": ({"_weight": ("D", "D"), "bias": ("D",)}, {}),
    "HouseholderSequence": ({"q_vectors": (None, "D")}, {}),
    "ActNorm": ({"log_scale": ("D",), "shift": ("D",)}, {}),
    "BatchNorm": (
        {"unconstrained_weight": ("D",), "bias": ("D",), "running_mean": ("D",), "running_var": ("D",)},
        {"eps": 1e-5},
    ),
    "PointwiseAffineTransform": ({"_shift": ("D",), "_scale": ("D",)}, {}),
}
