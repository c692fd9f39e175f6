"""Layers as objects: what `FlowSpec.layers` gives, what `FlowSpec.from_layers` takes, and what is refused."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
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
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(value, protocol)) == value
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
    with pytest.raises(TypeError, match=r"layers\[1\] is 3 \(int\), expected a layer"):
        from_layers(4, [FIRST, 3])
    with pytest.raises(TypeError, match=r"layers is Coupling.* expected a sequence of layers"):
        from_layers(4, FIRST)
    with pytest.raises(ValueError, match=r"layers\[0\]\.hidden_sizes\[0\] is 2097152, expected 1 to 1048576"):
        from_layers(4, [Coupling(hidden_sizes=(1 << 21,))])
    with pytest.raises(ValueError, match="layers holds more than 65536 layers"):
        from_layers(4, itertools.repeat(FIRST))
    for unordered in ({FIRST, SECOND}, {FIRST: 1}, np.array(3), 5):
        with pytest.raises(TypeError, match=r"expected a sequence of layers of nvpflow\.layers"):
            from_layers(4, unordered)
    with pytest.raises(ValueError, match=r"hidden_sizes\[1\] is 0, expected at least 1"):
        Coupling(hidden_sizes=(3, 0))
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"scale_bound is {bound}, expected finite and > 0"):
            Coupling(scale_bound=bound)
    with pytest.raises(ValueError, match="activation is 'mish', expected one of relu"):
        Coupling(activation="mish")
    with pytest.raises(TypeError, match="swapped"):
        Coupling(swapped="yes")
    with pytest.raises(AttributeError):
        FIRST.swapped = True


def test_a_spec_that_was_never_initialised_says_so() -> None:
    spec = nvpflow.FlowSpec.__new__(nvpflow.FlowSpec)
    assert repr(spec) == "FlowSpec.from_layers(input_size=0, layers=[], dtype='float32')"
    with pytest.raises(AttributeError, match="hidden_sizes belongs to coupling layers, and this spec has none"):
        _ = spec.hidden_sizes
    with pytest.raises(ValueError, match="input_size is 0"):
        nvpflow.Flow(spec)


def test_a_text_of_many_objects_is_read_in_linear_time() -> None:
    """A few hundred kilobytes took minutes: each object that ended looked through all before it."""
    entry = '{"kind":"standardize"}'
    text = f'{{"input_size":4,"dtype":"float32","layers":[{",".join([entry] * 400_000)}]}}'
    with pytest.raises(nvpflow.FileFormatError, match="layers holds 400000 layers, expected at most 65536"):
        nvpflow.FlowSpec.from_json(text)


def test_names_from_a_file_are_quoted_printably_and_whole() -> None:
    for name, quoted in (("\x1b[31mRED", r"'\\x1b\[31mRED'"), ("a\0b", r"'a\\x00b'"), ("x" * 70, f"'{'x' * 70}'")):
        entry = Coupling().__dict__ | {"kind": "coupling", "activation": name}
        text = json.dumps({"input_size": 4, "dtype": "float32", "layers": [entry]})
        with pytest.raises(
            nvpflow.FileFormatError, match=rf"layers\[0\]\.activation is {quoted}, expected one of relu"
        ):
            nvpflow.FlowSpec.from_json(text)


def test_odd_numbers_and_texts_are_named() -> None:
    with pytest.raises(TypeError, match="hidden_sizes has 2 dimensions, expected one"):
        Coupling(hidden_sizes=np.array([[3, 4]]))
    with pytest.raises(TypeError, match="input_size must be an integer, got array"):
        nvpflow.FlowSpec.from_layers(np.array([4, 5]), [FIRST])
    for make in (Coupling, lambda **options: nvpflow.FlowSpec(4, **options)):
        with pytest.raises(ValueError, match=r"activation is '\\ud800' \(str\), which is not valid Unicode"):
            make(activation="\ud800")
