"""The options of `nvpflow.build`: which layers they make, and what is refused."""

from __future__ import annotations

import itertools
import re

import numpy as np
import nvpflow
import pytest
from nvpflow import _spec
from nvpflow._architecture import MASKS, MIXINGS, Options, spec_of
from nvpflow.layers import (
    MLP,
    ActNorm,
    Additive,
    Affine,
    Coupling,
    LULinear,
    Permutation,
    ResidualNet,
    Spline,
    Standardize,
    Uniform,
)


def spec(
    input_size=6, num_flows=4, hidden_sizes=(8,), *, standardize=True, dtype="float32", seed=0, **options
) -> nvpflow.FlowSpec:
    """What `build` hands to Flow."""
    checked = Options(num_flows, hidden_sizes, **options).checked()
    return spec_of(input_size, checked, standardize=standardize, dtype=dtype, seed=seed)


def couplings(of: nvpflow.FlowSpec) -> list[Coupling]:
    return [layer for layer in of.layers if isinstance(layer, Coupling)]


def refused(error: type[Exception], message: str, *arguments, **options) -> None:
    """`build` fails with exactly this message."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        nvpflow.build(*arguments, **options)


# ------------------------------------------------------------------------------------------------------- what it makes


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("columns", [2, 5])
def test_plain_arguments_give_the_plain_flow(columns, standardize) -> None:
    """Also where the other options are given at their defaults; the weights are those of the spec and the seed."""
    expected = nvpflow.FlowSpec(columns, 3, (8, 4), "silu", 2.0, standardize, "float64")
    plain = {"transform": "affine", "scale": "tanh", "mask": "halves", "mixing": None, "actnorm": False}
    plain |= {"num_bins": 8, "tail_bound": 3.0}
    plain |= {"network": "mlp", "num_blocks": 2, "layer_norm": False, "context_size": 0, "standardize_context": None}
    for options in ({}, plain):
        flow = nvpflow.build(
            columns, 3, (8, 4), "silu", scale_bound=2, standardize=standardize, dtype="float64", seed=5, **options
        )
        assert flow.spec == expected
        assert flow == nvpflow.Flow(expected, 5)
    assert '"swapped":false' in flow.spec.to_json()  # which older libraries read


def test_networks_and_transforms() -> None:
    mlp = MLP((8, 8), "relu", layer_norm=True)
    assert [layer.network for layer in couplings(spec(hidden_sizes=(8, 8), layer_norm=True))] == [mlp] * 4
    residual = ResidualNet(16, 3, "silu")
    of = spec(hidden_sizes=(16,), activation="silu", network="residual", num_blocks=3)
    assert [layer.network for layer in couplings(of)] == [residual] * 4
    assert {layer.transform for layer in couplings(spec(transform="additive"))} == {Additive()}
    assert {layer.transform for layer in couplings(spec(transform="spline"))} == {Spline()}
    of = spec(transform="spline", num_bins=5, tail_bound=4)
    assert {layer.transform for layer in couplings(of)} == {Spline(5, 4)}
    of = spec(transform="spline", num_bins=5, base=Uniform(-1, 2), standardize=False)
    assert {layer.transform for layer in couplings(of)} == {Spline(5, interval=(-1, 2), boundary="free")}
    for scale in ("softsign", "atan", "sigmoid"):
        assert {layer.transform for layer in couplings(spec(scale=scale, scale_bound=2))} == {Affine(scale, 2)}
    for scale in ("softplus", "exp"):
        assert {layer.transform for layer in couplings(spec(scale=scale))} == {Affine(scale)}


def test_a_step_is_actnorm_mixing_coupling() -> None:
    kinds = [type(layer) for layer in spec(num_flows=2, actnorm=True, mixing="lu").layers]
    step = [ActNorm, Permutation, LULinear, Coupling]
    assert kinds == [Standardize, *step, *step, Permutation, LULinear]
    kinds = [type(layer) for layer in spec(num_flows=2, mixing="permutation", standardize=False).layers]
    assert kinds == [Permutation, Coupling] * 2 + [Permutation]
    orders = {layer.order for layer in spec(mixing="reverse").layers if isinstance(layer, Permutation)}
    assert orders == {(5, 4, 3, 2, 1, 0)}


def test_masks() -> None:
    assert [layer.transformed for layer in couplings(spec(mask="checkered"))] == ["odd", "even"] * 2
    first, second, *_ = couplings(spec(7, mask="random"))
    assert sorted(first.transformed + second.transformed) == list(range(7))
    assert (len(first.transformed), len(second.transformed)) == (4, 3)
    mask = np.array([[True, False, False], [False, True, True]])
    for given in (mask, mask.tolist()):
        of = nvpflow.build(3, 2, (4,), mask=given).spec
        assert [layer.transformed for layer in couplings(of)] == [(0,), (1, 2)]


def test_log2_masks_follow_the_binary_digits_of_columns() -> None:
    found = [layer.transformed for layer in couplings(spec(5, 8, mask="log2"))]
    digits = [(1, 3), (0, 2, 4), (2, 3), (0, 1, 4), (4,), (0, 1, 2, 3)]
    assert found == [*digits, *digits[:2]]
    assert [layer.transformed for layer in couplings(spec(2, 4, mask="log2"))] == [(1,), (0,)] * 2


@pytest.mark.parametrize("columns", range(2, 18))
def test_log2_masks_part_every_two_columns(columns) -> None:
    """Both ways within 2 ceil(log2 D) couplings: each conditions the other."""
    count = 2 * int(np.ceil(np.log2(columns)))
    sets = [set(layer.transformed) for layer in couplings(spec(columns, count, mask="log2"))]
    for a, b in itertools.permutations(range(columns), 2):
        assert any(a in members and b not in members for members in sets)


@pytest.mark.parametrize("mixing", [None, *MIXINGS])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("columns", [2, 3, 4, 7, 8])
def test_two_couplings_transform_every_feature(columns, mask, mixing) -> None:
    """Whatever stands between them; an LU layer starts as the identity."""
    features = np.arange(columns)
    transformed = []
    for layer in spec(columns, 6, mask=mask, mixing=mixing, seed=columns).layers:
        if isinstance(layer, Permutation):
            features = features[list(layer.order)]
        elif isinstance(layer, Coupling):
            half = columns // 2
            places = {"first_half": slice(half), "second_half": slice(half, None), "odd": slice(1, None, 2)}
            places |= {"even": slice(0, None, 2)}
            named = isinstance(layer.transformed, str)
            transformed.append(features[places[layer.transformed] if named else list(layer.transformed)])
    for pair in range(3):
        assert set(np.concatenate(transformed[2 * pair : 2 * pair + 2])) == set(range(columns))


def test_masks_that_leave_columns_alone() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    nvpflow.build(3, 2, (4,), mask=mask, mixing="lu")  # which mixes the columns
    nvpflow.build(3, 1, (4,), mask=mask[1:], mixing="lu")  # with one coupling some are always left
    columns = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]], bool)
    nvpflow.build(4, 4, (4,), mask=columns, mixing="reverse", actnorm=True)


def test_couplings_bend_no_more_directions_than_they_transform() -> None:
    """What LU layers cannot mend: z is a linear map of x, but for as many directions as couplings transform."""
    one, two = (Coupling(places, network=MLP((4,))) for places in ([0], [0, 2]))
    flow = nvpflow.build(5, layers=[LULinear(), one, LULinear(), two, LULinear()], dtype="float64")
    random = np.random.default_rng(0)
    drawn = {name: value + random.normal(size=value.shape) for name, value in flow.parameters().items()}
    flow.set_parameters(drawn | {name: flow.parameters()[name] for name in drawn if name.endswith(".sign")})
    x = random.normal(size=(400, 5))
    design = np.column_stack([np.ones(400), x])
    z, _ = flow.forward(x)
    left = z - design @ np.linalg.lstsq(design, z, rcond=None)[0]
    singular = np.linalg.svd(left, compute_uv=False)
    assert (singular[:3] > 1e-3 * singular[0]).all()
    assert (singular[3:] < 1e-9 * singular[0]).all()


def test_untransformed_columns_are_found_where_they_lie() -> None:
    def found(*layers):
        columns, places = _spec.untransformed(nvpflow.FlowSpec.from_layers(4, layers))
        return columns.tolist(), places.tolist()

    assert found(Coupling([1])) == ([0, 2, 3], [0, 2, 3])
    assert found(Permutation([2, 0, 3, 1]), Coupling([1]), ActNorm()) == ([2, 3, 1], [0, 2, 3])
    assert found(Coupling([1]), Permutation([2, 0, 3, 1]), Coupling([0, 3])) == ([0, 3], [1, 2])
    assert found(Coupling("odd"), Coupling("even")) == ([], [])
    assert found(LULinear(), Coupling([1])) == ([], [])


def test_what_is_random_comes_from_the_seed_and_is_in_the_spec() -> None:
    for options in ({"mask": "random"}, {"mixing": "permutation"}, {"mixing": "lu", "mask": "checkered"}):
        one, same, other = (spec(9, seed=seed, **options) for seed in (3, 3, 4))
        assert one == same != other
        assert nvpflow.FlowSpec.from_json(one.to_json()) == one
    assert nvpflow.build(9, 4, (8,), mask="random", seed=3).spec == spec(9, mask="random", seed=3)
    # The very orders: no NumPy may draw others, or a seed would not give the same flow everywhere.
    orders = [
        layer.order for layer in spec(4, 2, mixing="permutation", seed=7).layers if isinstance(layer, Permutation)
    ]
    assert orders == [(3, 0, 2, 1), (1, 0, 3, 2), (1, 0, 3, 2)]


def test_contexts() -> None:
    of = spec(3, 2, (8,), context_size=2)
    assert (of.context_size, of.standardize_context) == (2, True)
    assert [layer.transformed for layer in couplings(of)] == ["second_half", "first_half"]
    assert spec(3, context_size=2, standardize_context=False).standardize_context is False
    assert spec(3, context_size=2, standardize=False).standardize_context is False
    of = spec(1, 2, (8,), context_size=2, transform="spline")
    assert [(layer.transformed, layer.transform) for layer in couplings(of)] == [("all", Spline())] * 2
    of = spec(1, 2, (8,), context_size=2, network="residual")
    assert [layer.transformed for layer in couplings(of)] == ["all", "all"]
    assert [layer.network for layer in couplings(of)] == [ResidualNet(8, context_gates=True)] * 2


def test_given_layers() -> None:
    layers = [Standardize(), Coupling("odd", network=MLP((4,))), ActNorm(), Coupling("even", Additive(), MLP((4,)))]
    flow = nvpflow.build(4, layers=layers, dtype="float64", seed=2, standardize="robust")
    assert flow.spec == nvpflow.FlowSpec.from_layers(4, layers, "float64")
    assert flow == nvpflow.Flow(flow.spec, 2)
    assert "standardize='robust'" in repr(flow)
    assert nvpflow.build(4, layers=layers[1:], standardize=False).spec.layers == tuple(layers[1:])
    assert nvpflow.build(4, layers=iter(layers[1:])).spec.layers == tuple(layers[1:])


def test_built_flows_compute() -> None:
    """Density, samples and training of what the options make; the inverse undoes the map."""
    x = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    options = {
        "transform": ("affine", "additive", "spline"),
        "mask": ("checkered", "random", "log2"),
        "mixing": (None, "permutation"),
    }
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        flow = nvpflow.build(5, 4, (8,), seed=1, actnorm=True, **chosen)
        before = flow.nll(x)
        flow.fit(3 * x, epochs=2, progress=False)
        assert flow.nll(3 * x) < before + 10
        back = flow.inverse(flow.forward(x)[0])
        assert np.abs(back - x).max() < 1e-4
        assert flow.sample(7, seed=0).shape == (7, 5)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "nice"}, "transform is 'nice', expected one of affine, additive, spline"),
        *(
            (
                {"transform": "spline", **options},
                f"{name} is {value!r} with transform='spline', expected it left out: a spline coupling has no scale",
            )
            for options in ({"scale": "exp"}, {"scale_bound": 2.0})
            for name, value in options.items()
        ),
        *(
            (
                {"transform": transform, **options},
                f"{name} is {value!r} with transform={transform!r}, expected transform='spline' for it",
            )
            for transform in ("affine", "additive")
            for options in ({"num_bins": 4}, {"tail_bound": 5.0})
            for name, value in options.items()
        ),
        (
            {"transform": "spline", "base": "uniform", "tail_bound": 2},
            "tail_bound is 2.0 with base=Uniform(0.0, 1.0), expected it left out: splines reach as far as the base",
        ),
        ({"transform": "spline", "num_bins": 0}, "num_bins is 0, expected 1 to 256"),
        ({"transform": "spline", "tail_bound": -1}, "tail_bound is -1.0, expected finite and > 0"),
        ({"scale": "cosh"}, "scale is 'cosh', expected one of tanh, softsign, atan, sigmoid, softplus, exp"),
        ({"mask": "half"}, "mask is 'half', expected one of halves, checkered, random, log2"),
        ({"mixing": "none"}, "mixing is 'none', expected one of reverse, permutation, lu or None"),
        ({"network": "resnet"}, "network is 'resnet', expected one of mlp, residual"),
        (
            {"transform": "additive", "scale": "exp"},
            "scale is 'exp' with transform='additive', expected it left out: an additive coupling has no scale",
        ),
        (
            {"transform": "additive", "scale_bound": 2},
            "scale_bound is 2.0 with transform='additive', expected it left out: an additive coupling has no scale",
        ),
        (
            {"scale": "exp", "scale_bound": 2},
            "scale_bound is 2.0 with scale='exp', expected it left out: that function has no bound",
        ),
        (
            {"network": "residual", "hidden_sizes": (8, 8)},
            "hidden_sizes is (8, 8) with network='residual', expected one width such as (64,), which all blocks have; "
            "num_blocks says how many they are",
        ),
        (
            {"network": "residual", "layer_norm": True},
            "layer_norm is True with network='residual', expected False; it belongs to network='mlp'",
        ),
        (
            {"num_blocks": 3},
            "num_blocks is 3 with network='mlp', expected network='residual' for it; an mlp has hidden_sizes",
        ),
        ({"num_blocks": -1, "network": "residual"}, "num_blocks is -1, expected at least 0"),
        ({"num_flows": 0, "mask": "random"}, "num_flows is 0, expected 1 to 65536"),
        (
            {"mask": np.ones((2, 3), bool), "num_flows": 2},
            "mask has dtype bool and shape (2, 3), expected bools of shape (2, 4): a row for each coupling, True where "
            "a feature is transformed",
        ),
        (
            {"mask": np.zeros((1, 4)), "num_flows": 1},
            "mask has dtype float64 and shape (1, 4), expected bools of shape (1, 4): a row for each coupling, True "
            "where a feature is transformed",
        ),
        (
            {"mask": np.ones((1, 4), bool), "num_flows": 1},
            "mask[0] is all True, expected a feature that the others depend on",
        ),
        (
            {"mask": np.zeros((1, 4), bool), "num_flows": 1},
            "mask[0] is all False, expected a feature that is transformed",
        ),
        (
            {"mask": np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]], bool), "num_flows": 3},
            "mask never transforms columns 3, 4, expected each column True in some row: the flow would take it for "
            "normally distributed; layers= builds such a flow all the same",
        ),
        (  # place 0 is column 4 first, and then column 1
            {"mask": np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool), "num_flows": 2, "mixing": "reverse"},
            "mask never transforms column 3, expected each column True in some row, at the place where "
            "mixing='reverse' puts it: the flow would take it for normally distributed; layers= builds such a "
            "flow all the same",
        ),
        (
            {"mask": np.array([[1, 0, 0, 0], [0, 1, 1, 0]], bool), "num_flows": 2, "mixing": "lu"},
            "mask transforms 3 features in all couplings together, expected at least 4, one for each column: the flow "
            "would take 1 linear combination of the columns for normally distributed; layers= builds such a flow all "
            "the same",
        ),
        ({"context_size": -1}, "context_size is -1, expected 0 to 1048576"),
        ({"standardize_context": True}, "standardize_context is true, expected false where context_size is 0"),
        ({"scale": "atan", "scale_bound": -1}, "scale_bound is -1.0, expected finite and > 0"),
        (
            {"scale": "sigmoid", "scale_bound": 999},
            "scale_bound is 999.0, expected at most 700 with function='sigmoid'",
        ),
        (
            {"layers": [Coupling()], "num_flows": 8},
            "num_flows is 8 (int) beside layers, expected it left out: layers say what the flow is",
        ),
        (
            {"layers": [Coupling()], "mixing": "lu"},
            "mixing is 'lu' (str) beside layers, expected it left out: layers say what the flow is",
        ),
        (
            {"layers": [ActNorm(), Coupling()], "standardize": "robust"},
            "standardize is 'robust', expected True beside layers that begin with ActNorm(); put one in front of them",
        ),
        (
            {"layers": [Standardize(), Coupling()], "standardize": False},
            "standardize is False, expected True beside layers that begin with Standardize(); leave it out of them",
        ),
    ],
)
def test_values_that_are_refused(options, message) -> None:
    refused(ValueError, message, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": 1}, "transform is 1 (int), expected a string"),
        ({"mask": None}, "mask is None (NoneType), expected a string or bools [num_flows, input_size]"),
        ({"mixing": True}, "mixing is True (bool), expected a string"),
        ({"num_bins": 8.0}, "num_bins is 8.0 (float), expected an integer"),
        ({"tail_bound": "3"}, "tail_bound is '3' (str), expected a real number"),
        ({"actnorm": 1}, "actnorm is 1 (int), expected True or False"),
        ({"layer_norm": "yes"}, "layer_norm is 'yes' (str), expected True or False"),
        ({"num_blocks": 2.0, "network": "residual"}, "num_blocks is 2.0 (float), expected an integer"),
        ({"context_size": "2"}, "context_size is '2' (str), expected an integer"),
        ({"standardize_context": 1}, "standardize_context is 1 (int), expected True or False"),
        ({"layers": 5}, "layers is 5 (int), expected a sequence of layers of nvpflow.layers"),
    ],
)
def test_values_of_a_wrong_type(options, message) -> None:
    refused(TypeError, message, 4, **options)


def test_one_column_needs_a_context() -> None:
    message = (
        "input_size is 1, expected at least 2: a coupling layer needs a part to condition on and a part to transform; "
        "a flow with a context may have 1"
    )
    refused(ValueError, message, 1)
    refused(ValueError, message, 1, mixing="lu")
    with pytest.raises(ValueError, match="mixing is 'lu' with input_size 1, expected None: there is nothing to mix"):
        spec(1, context_size=2, mixing="lu")
