"""Layers as objects: what `FlowSpec.layers` gives, what `FlowSpec.from_layers` takes, and what is refused."""

from __future__ import annotations

import pickle

import nvpflow
import pytest
from nvpflow.layers import Coupling, Standardize

FIRST = Coupling(hidden_sizes=(8,))
SECOND = Coupling(swapped=True, hidden_sizes=(16, 3), activation="silu", scale_bound=2.5)


def irregular() -> nvpflow.FlowSpec:
    return nvpflow.FlowSpec.from_layers(5, [Standardize(), FIRST, SECOND], "float64")


def test_layers_come_back_as_they_were_given() -> None:
    spec = irregular()
    assert spec.layers == (Standardize(), FIRST, SECOND)
    assert (spec.input_size, spec.dtype, spec.num_flows, spec.standardize) == (5, "float64", 2, True)
    assert nvpflow.FlowSpec.from_json(spec.to_json()) == spec


def test_a_regular_spec_is_the_one_of_its_arguments() -> None:
    spec = nvpflow.FlowSpec(4, 2, (8,), "tanh", 3.0, True)
    layers = [Standardize(), Coupling(False, (8,), "tanh", 3.0), Coupling(True, (8,), "tanh", 3.0)]
    assert nvpflow.FlowSpec.from_layers(4, layers) == spec
    assert spec.layers == tuple(layers)


def test_repr_and_pickle_give_the_same_again() -> None:
    names = {"FlowSpec": nvpflow.FlowSpec, "Coupling": Coupling, "Standardize": Standardize}
    for value in (irregular(), nvpflow.FlowSpec(4), FIRST, SECOND, Standardize()):
        assert eval(repr(value), names) == value
        assert pickle.loads(pickle.dumps(value)) == value
        assert hash(pickle.loads(pickle.dumps(value))) == hash(value)
    assert FIRST != SECOND
    assert Standardize() != FIRST
    assert FIRST != "a coupling"


def test_a_property_answers_where_all_couplings_agree() -> None:
    spec = nvpflow.FlowSpec.from_layers(4, [Coupling(hidden_sizes=(8,)), Coupling(hidden_sizes=(9,))])
    assert spec.activation == "relu"
    assert spec.scale_bound == 1.0
    with pytest.raises(AttributeError, match=r"hidden_sizes differs between the coupling layers; read .* spec\.layers"):
        _ = spec.hidden_sizes


def test_with_dtype_changes_the_dtype_only() -> None:
    spec = irregular().with_dtype("float32")
    assert (spec.dtype, spec.layers) == ("float32", irregular().layers)
    with pytest.raises(ValueError, match=r"layers\[0\]\.scale_bound is 1e-300, expected finite and > 0 in float32"):
        nvpflow.FlowSpec.from_layers(2, [Coupling(scale_bound=1e-300)], "float64").with_dtype("float32")
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of"):
        spec.with_dtype("int8")


def test_what_is_no_list_of_layers_is_refused() -> None:
    from_layers = nvpflow.FlowSpec.from_layers
    with pytest.raises(ValueError, match="layers has no coupling, expected at least one"):
        from_layers(4, [Standardize()])
    with pytest.raises(TypeError, match=r"layers\[1\] is int, expected a layer"):
        from_layers(4, [FIRST, 3])
    with pytest.raises(TypeError, match="layers is Coupling, expected a sequence of layers"):
        from_layers(4, FIRST)
    with pytest.raises(ValueError, match=r"layers\[0\]\.hidden_sizes\[0\] is 0, expected 1 to"):
        from_layers(4, [Coupling(hidden_sizes=(0,))])
    with pytest.raises(ValueError, match="activation is 'mish', expected one of relu"):
        Coupling(activation="mish")
    with pytest.raises(TypeError, match="swapped"):
        Coupling(swapped="yes")
    with pytest.raises(AttributeError):
        FIRST.swapped = True
