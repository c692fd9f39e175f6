"""Layers as objects: what `FlowSpec.layers` gives, what `FlowSpec.from_layers` takes, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle
import re
from typing import get_args

import numpy as np
import nvpflow
import pytest
from nvpflow import _bases
from nvpflow import layers as L
from nvpflow._networks import Network
from nvpflow._transforms import Transform
from nvpflow.layers import (
    MLP,
    ActNorm,
    Additive,
    Affine,
    Coupling,
    ElementSpline,
    LULinear,
    Permutation,
    ResidualNet,
    Spline,
    Standardize,
)

FIRST = Coupling(network=MLP((8,)))
SECOND = Coupling("first_half", Affine("tanh", 2.5), MLP((16, 3), "silu"))

TRANSFORMS = [
    Affine(),
    Affine("tanh", 1.9),
    Affine("tanh", factor=3, divisor=2),
    Affine("softsign", 6.907755),
    *(Affine("atan", bound) for bound in (0.1, 1.0, 1.7, 3.0)),
    Affine("atan", factor=0.636 * 2, divisor=1),
    Affine("identity"),
    Affine("sigmoid"),
    Affine("sigmoid", 2.3, negated=True),
    Affine("sigmoid", low=0.001, high=1.001, offset=2),
    Affine("sigmoid", low=0, high=1, offset=2, negated=True),  # no bound on s
    Affine("softplus"),
    Affine("softplus", low=0, high=3, offset=0),
    Affine("softplus", low=0.01, high=math.inf, offset=0.52546, negated=True),
    Additive(),
]
SPLINES = [
    Spline(),
    Spline(16, 5),
    Spline(1),
    Spline(256, interval=(-1, 3)),
    Spline(10, derivative_offset=0),
    Spline(
        4, derivative="exp", derivative_bound=5, min_derivative=0, size_bound=3.4, min_bin_width=0, min_bin_height=0
    ),
    Spline(derivative="exp"),
    Spline(5, 0.5, derivative_gain=1.44, min_derivative=0.01),
    Spline(2, derivative_offset=0.5, min_derivative=1),
    Spline(3, boundary="free", tails="slope", min_bin_width=0.33),
]
NETWORKS = [
    MLP(()),
    MLP((64, 64), "gelu", layer_norm=True),
    ResidualNet(),
    ResidualNet(9, 0, "tanh", block_affines=True),
]
SETS = ["first_half", "second_half", "even", "odd", (0,), (1, 2, 4)]
LAYERS = [
    Standardize(),
    ActNorm(),
    ActNorm(inverse=True),
    LULinear(),
    LULinear(inverse=True),
    Permutation((3, 0, 4, 1, 2)),
    *(Coupling(transform=transform) for transform in (*TRANSFORMS, *SPLINES)),
    *(ElementSpline("odd", spline) for spline in SPLINES),
    ElementSpline("all", inverse=True),
    *(Coupling(network=network) for network in NETWORKS),
    *(Coupling(features, inverse=True) for features in SETS),
    *(ElementSpline(features) for features in SETS if features != "odd"),
    Coupling(scale_network=MLP((3,), "tanh"), translation_network=MLP((4, 4), "relu")),
]


def irregular() -> nvpflow.FlowSpec:
    return nvpflow.FlowSpec.from_layers(5, [Standardize(), FIRST, SECOND], "float64")


def refused(call, error: type[Exception], message: str) -> None:
    """The call fails with exactly this message."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_kind_and_field_comes_back(layer) -> None:
    """From a spec, its JSON, a pickle, a copy and the text that it prints."""
    spec = nvpflow.FlowSpec.from_layers(5, [layer, FIRST])
    assert spec.layers == (layer, FIRST)
    for other in (nvpflow.FlowSpec.from_json(spec.to_json()), pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert other == spec
        assert other.layers == spec.layers
    for other in (spec.layers[0], copy.copy(layer), copy.deepcopy(layer), eval(repr(layer), vars(L))):
        assert other == layer
        assert hash(other) == hash(layer)
        assert repr(other) == repr(layer)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(layer, protocol)) == layer


def test_a_sigmoid_whose_bound_cannot_be_asked_for_prints_its_constants() -> None:
    affine = Affine("sigmoid", low=1e-320, high=1, offset=2)
    assert eval(repr(affine), vars(L)) == affine


def test_all_layers_differ() -> None:
    kinds = [*LAYERS, FIRST, SECOND, Coupling("all"), Coupling((2, 3, 4))]
    assert len(set(kinds)) == len(set(map(repr, kinds))) == len(kinds)


def test_a_spec_prints_a_line_a_layer_and_evaluates() -> None:
    spec = nvpflow.FlowSpec.from_layers(5, [ActNorm(), *LAYERS], "float64")
    assert len(repr(spec).splitlines()) == 3 + len(LAYERS)
    assert eval(repr(spec), vars(L) | {"FlowSpec": nvpflow.FlowSpec}) == spec
    assert repr(nvpflow.FlowSpec.from_layers(4, [FIRST, Permutation((1, 0, 3, 2)), Coupling("odd")])) == (
        "FlowSpec.from_layers(4, [\n"
        "    Coupling('second_half', Affine('tanh', bound=1.0), MLP((8,), 'relu')),\n"
        "    Permutation((1, 0, 3, 2)),\n"
        "    Coupling('odd', Affine('tanh', bound=1.0), MLP((256,), 'relu')),\n"
        "], dtype='float32')"
    )


def test_context_sizes_come_back() -> None:
    layers = [Coupling("all", Affine("exp"), ResidualNet(4, context_gates=True))]
    spec = nvpflow.FlowSpec.from_layers(1, layers, context_size=3, standardize_context=True)
    assert (spec.input_size, spec.context_size, spec.standardize_context, spec.layers) == (1, 3, True, tuple(layers))
    assert eval(repr(spec), vars(L) | {"FlowSpec": nvpflow.FlowSpec}) == spec
    assert nvpflow.FlowSpec.from_json(spec.to_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_layers_come_back_as_they_were_given() -> None:
    spec = irregular()
    assert spec.layers == (Standardize(), FIRST, SECOND)
    assert (spec.input_size, spec.dtype, spec.num_flows, spec.standardize) == (5, "float64", 2, True)
    assert nvpflow.FlowSpec.from_json(spec.to_json()) == spec


def test_a_regular_spec_is_the_one_of_its_arguments() -> None:
    spec = nvpflow.FlowSpec(4, 2, (8,), "tanh", 3.0, True)
    half = Coupling(transform=Affine("tanh", 3), network=MLP((8,), "tanh"))
    layers = [Standardize(), half, dataclasses.replace(half, transformed="first_half")]
    assert nvpflow.FlowSpec.from_layers(4, layers) == spec
    assert spec.layers == tuple(layers)
    assert repr(spec).startswith("FlowSpec(input_size=4, num_flows=2, ")
    assert json.loads(spec.to_json()).keys() == {"input_size", "dtype", "layers"}  # as an older library reads it


# --------------------------------------------------------------------------------------------------- what a layer means


def test_masks_say_which_features_are_transformed() -> None:
    mask = [False, True, True, False, True]
    for given in (mask, np.array(mask), tuple(map(np.bool_, mask)), [1, 2, 4], np.array([1, 2, 4]), range(1, 5)):
        expected = (1, 2, 3, 4) if isinstance(given, range) else (1, 2, 4)
        layer = Coupling(given)
        assert layer.transformed == expected
        assert layer == Coupling(expected)
    refused(
        lambda: nvpflow.FlowSpec.from_layers(4, [FIRST, Coupling([False, True, False])]),
        ValueError,
        "layers[1].transformed is a mask of 3 features, expected 4, the input_size",
    )
    assert nvpflow.FlowSpec.from_layers(5, [Coupling(np.array(mask))]).layers == (Coupling((1, 2, 4)),)


@pytest.mark.parametrize(("function", "limit"), [("tanh", 1.0), ("softsign", 1.0), ("atan", math.pi / 2)])
@pytest.mark.parametrize("bound", [0.5, 1.0, 3.0])
def test_bounded_functions_have_slope_one(function, limit, bound) -> None:
    affine = Affine(function, bound)
    assert affine.factor == affine.divisor
    assert affine.factor * limit == pytest.approx(bound)
    assert affine.bound == pytest.approx(bound)


@pytest.mark.parametrize("bound", [0.5, 1.0, 3.0])
def test_a_bounded_sigmoid_is_one_at_zero(bound) -> None:
    affine = Affine("sigmoid", bound)
    assert affine.low * affine.high == pytest.approx(1)
    assert affine.bound == pytest.approx(bound)
    assert affine.low + (affine.high - affine.low) / (1 + math.exp(-affine.offset)) == pytest.approx(1)


def test_functions_without_a_bound() -> None:
    assert Affine("exp") == Affine("identity")
    softplus = Affine("softplus")
    assert (softplus.low, softplus.high, softplus.negated) == (0.01, math.inf, False)
    assert math.log1p(math.exp(softplus.offset)) + softplus.low == pytest.approx(1)
    assert Affine("identity").bound == softplus.bound == math.inf
    assert Affine("sigmoid", low=0, high=1, offset=2).bound == math.inf
    assert Affine("sigmoid", low=0.5, high=4, offset=2).bound == math.log(4)
    assert Affine("identity").factor is Affine().low is Affine().negated is None


def test_splines() -> None:
    assert (Spline().tail_bound, Spline().interval, Spline(interval=(0, 1)).tail_bound) == (3, (-3, 3), None)
    assert repr(Spline(16, tail_bound=5)) == "Spline(16, tail_bound=5.0)"
    assert repr(Spline(interval=(0, 1), tails="slope")) == "Spline(8, interval=(0.0, 1.0), tails='slope')"
    assert Spline(tail_bound=2) == Spline(interval=(-2, 2)) != Spline()
    for gain, least in ((1.0, 1e-3), (1.5, 0.2), (1e-3, 1e-3)):
        offset = Spline(derivative_gain=gain, min_derivative=least).derivative_offset
        assert least + gain * np.logaddexp(0, offset) == pytest.approx(1)
    assert (Spline().derivative_gain, Spline().derivative_bound) == (1, None)
    exp = Spline(derivative="exp")
    assert (exp.derivative_offset, exp.derivative_gain, exp.derivative_bound) == (None, None, -math.log(1e-3))
    assert ElementSpline([False, True, True]) == ElementSpline([1, 2], Spline())
    refused(
        lambda: nvpflow.FlowSpec.from_layers(4, [ElementSpline([True, False]), FIRST]),
        ValueError,
        "layers[0].features is a mask of 2 features, expected 4, the input_size",
    )


def test_tensors_of_splines() -> None:
    """Names and shapes; what has no inner knot and no free end has no derivatives."""
    spline, free = Spline(4), Spline(2, boundary="free")
    layers = [ElementSpline([0, 2], free), Coupling([1, 3], spline, MLP((3,))), Coupling("odd", Spline(1), MLP((3,)))]
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_layers(5, layers), 0)
    shapes = {name: value.shape for name, value in flow.parameters().items()}
    heads = {name: shape for name, shape in shapes.items() if "dense" not in name and name.endswith("kernel")}
    assert heads == {
        "flow_0_widths.kernel": (3, 8),
        "flow_0_heights.kernel": (3, 8),
        "flow_0_derivatives.kernel": (3, 6),
        "flow_1_widths.kernel": (3, 2),
        "flow_1_heights.kernel": (3, 2),
    }
    alone = {name: shape for name, shape in shapes.items() if name.startswith("spline")}
    assert alone == {"spline_0.widths": (2, 2), "spline_0.heights": (2, 2), "spline_0.derivatives": (3, 2)}
    assert not any(flow.parameters()[name].any() for name in alone)
    assert list(shapes)[:3] == list(alone)


def test_the_network_of_a_layer_behind_permutations() -> None:
    """It is found by the index among all layers, and reads the columns as they stand before its layer."""
    layers = [Standardize(), Permutation((3, 0, 4, 1, 2)), FIRST, Permutation((1, 0, 2, 4, 3)), Coupling("odd")]
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_layers(5, layers, "float64"), 1)
    parameters = {name: value + 0.1 for name, value in flow.parameters().items()}
    flow.set_parameters(parameters)
    x = np.random.default_rng(0).normal(size=(40, 5))
    for index, name in ((2, "flow_0"), (4, "flow_1")):
        plain = nvpflow.Flow(nvpflow.FlowSpec.from_layers(5, [layers[index]], "float64"))
        plain.set_parameters({key: parameters[key.replace("flow_0", name)] for key in plain.parameters()})
        for found, expected in zip(flow._conditioner(index, x), plain._conditioner(0, x), strict=True):
            np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------------- properties of a spec


def test_a_property_answers_where_all_couplings_agree() -> None:
    spec = nvpflow.FlowSpec.from_layers(4, [Coupling(network=MLP((8,))), Coupling(network=MLP((9,)))])
    assert spec.activation == "relu"
    assert spec.scale_bound == 1.0
    with pytest.raises(AttributeError, match=r"hidden_sizes differs between the coupling layers; read .* spec\.layers"):
        _ = spec.hidden_sizes


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Coupling(transform=Additive()), "scale_bound"),
        (Coupling(transform=Affine("softsign")), "scale_bound"),
        (Coupling(transform=Spline()), "scale_bound"),
        (Coupling(scale_network=MLP((8,)), translation_network=MLP((9,))), "hidden_sizes"),
        (Coupling(scale_network=MLP((), "tanh"), translation_network=MLP(())), "activation"),
    ],
)
def test_a_property_that_a_coupling_does_not_have(layer, name) -> None:
    spec = nvpflow.FlowSpec.from_layers(4, [layer])
    with pytest.raises(AttributeError, match=rf"{name}; read spec\.layers"):
        getattr(spec, name)


def test_with_dtype_changes_the_dtype_only() -> None:
    spec = irregular().with_dtype("float32")
    assert (spec.dtype, spec.layers) == ("float32", irregular().layers)
    tiny = nvpflow.FlowSpec.from_layers(2, [Coupling(transform=Affine("tanh", 1e-300))], "float64")
    with pytest.raises(ValueError, match=r"layers\[0\]\.scale_bound is 1e-300, expected finite and > 0 in float32"):
        tiny.with_dtype("float32")
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of"):
        tiny.with_dtype("int8")


def test_a_spec_that_was_never_initialised_says_so() -> None:
    spec = nvpflow.FlowSpec.__new__(nvpflow.FlowSpec)
    assert repr(spec) == "FlowSpec.from_layers(0, [], dtype='float32')"
    with pytest.raises(AttributeError, match="hidden_sizes belongs to coupling layers, and this spec has none"):
        _ = spec.hidden_sizes
    with pytest.raises(ValueError, match="input_size is 0"):
        nvpflow.Flow(spec)


# ------------------------------------------------------------------------------------------------------ what is refused

FUNCTIONS = "tanh, softsign, atan, identity, sigmoid, softplus, exp"
FEATURES = "expected one of first_half, second_half, even, odd, all, ascending indices, or a mask of bools"
FACTORS = "expected all of factor and divisor, or only bound"
BOUNDS = "expected all of low, high and offset, or only bound"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Affine("cosh"), f"function is 'cosh', expected one of {FUNCTIONS}"),
        *(
            (lambda v=v: Affine("tanh", v), f"bound is {float(v)}, expected finite and > 0")
            for v in (0, -1, math.nan, math.inf)
        ),
        (lambda: Affine("sigmoid", 701), "bound is 701.0, expected at most 700 with function='sigmoid'"),
        (
            lambda: Affine("exp", 2),
            "bound is 2.0 with function='identity', expected no constant: s is u itself, without a bound",
        ),
        (
            lambda: Affine("softplus", 2),
            "bound is 2.0 with function='softplus', expected all of low, high and offset, or none",
        ),
        (lambda: Affine("tanh", low=0), f"low is 0.0 with function='tanh', {FACTORS}"),
        (lambda: Affine("sigmoid", factor=1), f"factor is 1.0 with function='sigmoid', {BOUNDS}"),
        (lambda: Affine("atan", factor=2), f"divisor missing with function='atan', factor=2.0, {FACTORS}"),
        (lambda: Affine("tanh", 1, factor=2), f"bound is 1.0 with function='tanh', factor=2.0, {FACTORS}"),
        (lambda: Affine("sigmoid", low=0), f"high and offset missing with function='sigmoid', low=0.0, {BOUNDS}"),
        (lambda: Affine("tanh", factor=-1, divisor=1), "factor is -1.0, expected finite and > 0"),
        (lambda: Affine("tanh", factor=1, divisor=math.inf), "divisor is inf, expected finite and > 0"),
        (lambda: Affine("sigmoid", low=-1, high=1, offset=0), "low is -1.0, expected finite and >= 0"),
        (lambda: Affine("sigmoid", low=2, high=1, offset=0), "high is 1.0, expected finite and > low, which is 2.0"),
        (
            lambda: Affine("sigmoid", low=0, high=math.inf, offset=0),
            "high is inf, expected finite and > low, which is 0.0",
        ),
        (lambda: Affine("softplus", low=2, high=1, offset=0), "high is 1.0, expected > low, which is 2.0"),
        (lambda: Affine("softplus", low=0, high=1, offset=math.nan), "offset is nan, expected finite"),
        (
            lambda: Affine("tanh", negated=True),
            "negated is True with function='tanh', expected sigmoid or softplus for it",
        ),
        (lambda: MLP((3, 0)), "hidden_sizes[1] is 0, expected at least 1"),
        (
            lambda: MLP((2, 1), layer_norm=True),
            "hidden_sizes[1] is 1, expected at least 2 with layer_norm: one number has no variance",
        ),
        (lambda: ResidualNet(0), "hidden_size is 0, expected at least 1"),
        (lambda: ResidualNet(1, -1), "num_blocks is -1, expected at least 0"),
        (lambda: Coupling("half"), f"transformed is 'half', {FEATURES}"),
        (lambda: Coupling([]), "transformed holds no feature, expected at least one"),
        (lambda: Coupling([False, False]), "transformed holds no feature, expected at least one"),
        (lambda: Coupling([-1, 2]), "transformed[0] is -1, expected at least 0"),
        (lambda: Coupling([0, 1, 1]), "transformed[2] is 1 after 1, expected ascending indices; a mask holds bools"),
        (lambda: Permutation([]), "order is empty, expected each of 0 to D - 1 once"),
        (lambda: Permutation([0, 2]), "order[1] is 2, expected 0 to 1: each of them once"),
        (lambda: Permutation([1, 0, 1]), "order[2] is 1 again, expected each of 0 to 2 once"),
        (
            lambda: Coupling(scale_network=MLP()),
            "translation_network is None beside scale_network, expected both of them",
        ),
        (
            lambda: Coupling(network=MLP(), scale_network=MLP(), translation_network=MLP()),
            "scale_network and translation_network given beside network, expected only network, or only the networks "
            "of both heads",
        ),
        *((lambda v=v: Spline(v), f"num_bins is {v}, expected 1 to 256") for v in (0, -1, 257)),
        *(
            (lambda v=v: Spline(tail_bound=v), f"tail_bound is {float(v)}, expected finite and > 0")
            for v in (0, math.inf)
        ),
        (
            lambda: Spline(8, 3, interval=(0, 1)),
            "tail_bound is 3 beside interval=(0, 1), expected only one of them",
        ),
        *(
            (
                lambda v=v: Spline(interval=v),
                f"interval is ({float(v[0])}, {float(v[1])}), expected two finite numbers, the first below the second",
            )
            for v in ((1, 1), (2, 1), (-math.inf, 1), (0, math.nan))
        ),
        (
            lambda: Spline(4, min_bin_width=0.25),
            "min_bin_width is 0.25 with num_bins=4, expected less than 1 / num_bins, 0.25",
        ),
        (lambda: Spline(min_bin_height=-1), "min_bin_height is -1.0, expected finite and >= 0"),
        (lambda: Spline(min_derivative=math.inf), "min_derivative is inf, expected finite and >= 0"),
        (lambda: Spline(size_bound=0), "size_bound is 0.0, expected finite and > 0"),
        (lambda: Spline(derivative_gain=0), "derivative_gain is 0.0, expected finite and > 0"),
        (lambda: Spline(derivative_offset=math.nan), "derivative_offset is nan, expected finite"),
        (
            lambda: Spline(min_derivative=1),
            "derivative_offset missing with min_derivative=1.0, expected a number: no derivative can be 1 at u = 0",
        ),
        (lambda: Spline(derivative="relu"), "derivative is 'relu', expected one of softplus, exp"),
        (
            lambda: Spline(derivative_bound=2),
            "derivative_bound is 2 with derivative='softplus', expected it left out",
        ),
        (
            lambda: Spline(derivative="exp", derivative_gain=2),
            "derivative_gain is 2 with derivative='exp', expected it left out",
        ),
        (
            lambda: Spline(derivative="exp", derivative_bound=math.inf),
            "derivative_bound is inf, expected finite and > 0",
        ),
        (lambda: Spline(boundary="zero"), "boundary is 'zero', expected one of one, free"),
        (lambda: Spline(tails="linear"), "tails is 'linear', expected one of identity, slope"),
        (lambda: ElementSpline("half"), f"features is 'half', {FEATURES}"),
        (lambda: ElementSpline([2, 1]), "features[1] is 1 after 2, expected ascending indices; a mask holds bools"),
        (
            lambda: Coupling(transform=Spline(), scale_network=MLP(), translation_network=MLP()),
            "scale_network and translation_network given with transform=Spline(8), expected only network: it gives all "
            "of a spline",
        ),
        (
            lambda: Coupling(transform=Additive(), translation_network=MLP()),
            "translation_network given with transform=Additive(), expected only network: there is one head",
        ),
    ],
)
def test_values_out_of_range(call, message) -> None:
    refused(call, ValueError, message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Affine(3), "function is 3 (int), expected a string"),
        (lambda: Affine("tanh", "1"), "bound is '1' (str), expected a real number"),
        (lambda: Affine("sigmoid", negated=1), "negated is 1 (int), expected True or False"),
        (lambda: MLP(8), "hidden_sizes is 8 (int), expected a sequence of integers such as (128, 128)"),
        (lambda: MLP((8,), 3), "activation is 3 (int), expected a string"),
        (lambda: MLP((8,), layer_norm="yes"), "layer_norm is 'yes' (str), expected True or False"),
        (lambda: ResidualNet(8.0), "hidden_size is 8.0 (float), expected an integer"),
        (lambda: ResidualNet(8, True), "num_blocks is True (bool), expected an integer"),
        (lambda: ResidualNet(8, context_gates=0), "context_gates is 0 (int), expected True or False"),
        (lambda: ResidualNet(8, block_affines=None), "block_affines is None (NoneType), expected True or False"),
        (lambda: ActNorm(1), "inverse is 1 (int), expected True or False"),
        (lambda: LULinear("no"), "inverse is 'no' (str), expected True or False"),
        (lambda: Permutation(3), "order is 3 (int), expected a sequence of integers such as (2, 0, 1)"),
        (lambda: Permutation([0, 1.0]), "order[1] is 1.0 (float), expected an integer"),
        (lambda: Coupling(3), f"transformed is 3 (int), {FEATURES}"),
        (lambda: Coupling({0, 1}), f"transformed is {{0, 1}} (set), {FEATURES}"),
        (lambda: Coupling([0, True]), "transformed[1] is True (bool), expected an integer"),
        (
            lambda: Coupling(np.eye(2, dtype=bool)),
            "transformed has 2 dimensions, expected one: a sequence of integers such as (0, 2, 3)",
        ),
        (lambda: Coupling(inverse=1), "inverse is 1 (int), expected True or False"),
        (
            lambda: Coupling(transform="affine"),
            "transform is 'affine' (str), expected Affine, Additive or Spline of nvpflow.layers",
        ),
        (lambda: ElementSpline("odd", 8), "spline is 8 (int), expected Spline of nvpflow.layers"),
        (lambda: ElementSpline("odd", inverse=1), "inverse is 1 (int), expected True or False"),
        (lambda: Spline(8.0), "num_bins is 8.0 (float), expected an integer"),
        (lambda: Spline(tail_bound="3"), "tail_bound is '3' (str), expected a real number"),
        (lambda: Spline(interval=3), "interval is 3 (int), expected two numbers, (lower, upper)"),
        (lambda: Spline(interval=(1, 2, 3)), "interval is (1, 2, 3) (tuple), expected two numbers, (lower, upper)"),
        (lambda: Spline(interval=(0, "1")), "interval[1] is '1' (str), expected a real number"),
        (lambda: Spline(tails=None), "tails is None (NoneType), expected a string"),
        (lambda: Coupling(network=(8,)), "network is (8,) (tuple), expected MLP or ResidualNet of nvpflow.layers"),
        (
            lambda: Coupling(scale_network=MLP(), translation_network=ResidualNet()),
            "translation_network is ResidualNet(256) (ResidualNet), expected MLP of nvpflow.layers",
        ),
    ],
)
def test_values_of_a_wrong_type(call, message) -> None:
    refused(call, TypeError, message)


def test_layers_are_immutable() -> None:
    for layer, name in ((FIRST, "transformed"), (Affine(), "factor"), (MLP(), "activation"), (ActNorm(), "inverse")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(layer, name, getattr(layer, name))


def test_what_does_not_go_with_the_sizes() -> None:
    def of(layer, **options):
        return lambda: nvpflow.FlowSpec.from_layers(4, [layer, FIRST], **options)

    refused(of(Coupling([4])), ValueError, "layers[0].transformed[0] is 4, expected 0 to 3")
    refused(
        of(Coupling("all")),
        ValueError,
        "layers[0].transformed holds all features, expected one less at least: without a context nothing says how to "
        "transform them",
    )
    refused(of(Permutation([1, 0])), ValueError, "layers[0].order has 2 entries, expected each of 0 to 3 once")
    refused(
        of(Coupling(network=ResidualNet(context_gates=True))),
        ValueError,
        "layers[0].network.context_gates is true, expected false where context_size is 0",
    )
    refused(
        of(Standardize(), standardize_context=True),
        ValueError,
        "standardize_context is true, expected false where context_size is 0",
    )
    refused(of(Standardize(), context_size=-1), ValueError, "context_size is -1, expected 0 to 1048576")
    refused(of(Standardize(), context_size=1.0), TypeError, "context_size is 1.0 (float), expected an integer")
    with pytest.raises(ValueError, match="lu_linear with input_size 5000, expected at most 4096"):
        nvpflow.FlowSpec.from_layers(5000, [LULinear(), FIRST])
    with pytest.raises(ValueError, match=r"factor is 1e\+300, expected finite and > 0 in float32"):
        of(Coupling(transform=Affine("atan", factor=1e300, divisor=1)))()


def test_what_is_no_list_of_layers_is_refused() -> None:
    from_layers = nvpflow.FlowSpec.from_layers
    with pytest.raises(ValueError, match="layers has no coupling, expected at least one"):
        from_layers(4, [Standardize()])
    with pytest.raises(TypeError, match=r"layers\[1\] is 3 \(int\), expected a layer"):
        from_layers(4, [FIRST, 3])
    with pytest.raises(TypeError, match=r"layers\[0\] is .*, expected a layer of nvpflow.layers; write ActNorm\(\)"):
        from_layers(4, [ActNorm, FIRST])
    with pytest.raises(TypeError, match=r"layers is Coupling.* expected a sequence of layers"):
        from_layers(4, FIRST)
    with pytest.raises(ValueError, match=r"layers\[0\]\.hidden_sizes\[0\] is 2097152, expected 1 to 1048576"):
        from_layers(4, [Coupling(network=MLP((1 << 21,)))])
    with pytest.raises(ValueError, match="layers holds more than 65536 layers"):
        from_layers(4, itertools.repeat(FIRST))
    for unordered in ({FIRST, SECOND}, {FIRST: 1}, np.array(3), 5):
        with pytest.raises(TypeError, match=r"expected a sequence of layers of nvpflow\.layers"):
            from_layers(4, unordered)
    with pytest.raises(ValueError, match="activation is 'mish', expected one of relu"):
        MLP(activation="mish")


def test_a_text_of_many_objects_is_read_in_linear_time() -> None:
    """A few hundred kilobytes took minutes: each object that ended looked through all before it."""
    entry = '{"kind":"standardize"}'
    text = f'{{"input_size":4,"dtype":"float32","layers":[{",".join([entry] * 400_000)}]}}'
    with pytest.raises(nvpflow.FileFormatError, match="layers holds 400000 layers, expected at most 65536"):
        nvpflow.FlowSpec.from_json(text)


def test_names_from_a_file_are_quoted_printably_and_whole() -> None:
    for name, quoted in (("\x1b[31mRED", r"'\\x1b\[31mRED'"), ("a\0b", r"'a\\x00b'"), ("x" * 70, f"'{'x' * 70}'")):
        document = json.loads(nvpflow.FlowSpec(4, 1).to_json())
        document["layers"][0]["activation"] = name
        with pytest.raises(
            nvpflow.FileFormatError, match=rf"layers\[0\]\.activation is {quoted}, expected one of relu"
        ):
            nvpflow.FlowSpec.from_json(json.dumps(document))


def test_a_hidden_size_that_is_no_number_is_named_by_its_place() -> None:
    text = nvpflow.FlowSpec(4, 2, (3, 5)).to_json()
    with pytest.raises(
        nvpflow.FileFormatError, match=r"^layers\[1\]\.hidden_sizes\[1\] is 'null', expected a whole number$"
    ):
        nvpflow.FlowSpec.from_json(text[: (at := text.rindex("5]"))] + "null" + text[at + 1 :])


@pytest.mark.parametrize("count", [512, 513, 10_000])
def test_repr_makes_the_spec_again_unless_it_is_long(count) -> None:
    layers = [Coupling("odd" if i % 2 else "even", network=MLP((3,) if i % 3 else (4,))) for i in range(count)]
    spec = nvpflow.FlowSpec.from_layers(4, layers)
    shown = [repr(layer) for layer in layers]
    if count <= 512:
        assert eval(repr(spec), vars(L) | {"FlowSpec": nvpflow.FlowSpec}) == spec
    else:
        shown = [*shown[:3], f"... {count - 6:,} more ...", *shown[-3:]]
    lines = "".join(f"\n    {line}," for line in shown)
    assert repr(spec) == f"FlowSpec.from_layers(4, [{lines}\n], dtype='float32')"
    assert repr(spec) in repr(nvpflow.Flow(spec))


@pytest.mark.parametrize(
    ("layer", "changed", "message"),
    [
        (Standardize(), {"a": 1}, r"the pickled Standardize is \{'a': 1\} \(dict\), expected a dict of nothing"),
        (ActNorm(), {"inverse": 1}, r"inverse is 1 \(int\), expected True or False"),
        (Permutation((1, 0)), {"order": (0, 0)}, r"order\[1\] is 0 again"),
        (MLP(), {"hidden_sizes": "8"}, r"hidden_sizes is '8' \(str\), expected a sequence of integers"),
        (Affine(), {"factor": -1.0}, r"factor is -1\.0"),
        (Spline(), {"tails": "linear"}, r"tails is 'linear', expected one of identity, slope"),
        (ElementSpline("odd"), {"spline": 5}, r"spline is 5 \(int\), expected Spline"),
        (Coupling(), {"network": 5}, r"network is 5 \(int\), expected MLP or ResidualNet"),
        (Coupling(), {"_mask_size": "4"}, r"_mask_size is '4' \(str\), expected an integer"),
        (
            Coupling(),
            {"more": 1},
            "the pickled Coupling is .*, expected a dict of transformed, transform, netw",
        ),
    ],
)
def test_an_odd_pickle_of_a_layer_is_refused(layer, changed, message) -> None:
    kind = type(layer)
    with pytest.raises((TypeError, ValueError), match=message):
        kind.__new__(kind).__setstate__(vars(layer) | changed)
    for odd in (5, None, "state", {}) if vars(layer) else (5, None, "state"):
        expected = rf"the pickled {kind.__name__} is {re.escape(repr(odd))} \(\w+\), expected a dict of "
        with pytest.raises(TypeError, match=expected):
            kind.__new__(kind).__setstate__(odd)


def test_odd_numbers_and_texts_are_named() -> None:
    with pytest.raises(TypeError, match="hidden_sizes has 2 dimensions, expected one"):
        MLP(np.array([[3, 4]]))
    with pytest.raises(TypeError, match=r"input_size is array.*, expected an integer"):
        nvpflow.FlowSpec.from_layers(np.array([4, 5]), [FIRST])
    for make in (MLP, lambda **options: nvpflow.FlowSpec(4, **options)):
        with pytest.raises(ValueError, match=r"activation is '\\ud800' \(str\), expected valid Unicode"):
            make(activation="\ud800")


@pytest.mark.parametrize(
    ("part", "kinds"),
    [
        (("layers", 0), L.KINDS),
        (("layers", 0, "transform"), get_args(Transform)),
        (("layers", 0, "network"), get_args(Network)),
        (("base",), _bases.KINDS),
    ],
)
def test_python_and_the_extension_know_the_same_kinds(part, kinds) -> None:
    document = json.loads(nvpflow.FlowSpec(2)._to_full_json())
    entry = document
    for name in part:
        entry = entry[name]
    entry["kind"] = "x"
    with pytest.raises(nvpflow.FileFormatError) as refused:
        nvpflow.FlowSpec.from_json(json.dumps(document))
    known = str(refused.value).partition("expected one of ")[2].split(", ")
    assert sorted(known) == sorted(kind._kind for kind in kinds)
