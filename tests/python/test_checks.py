"""The checks that Python makes before the extension sees an argument: where the limits are, what the message says."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import nvpflow
import pytest


@pytest.fixture(scope="module")
def flow() -> nvpflow.Flow:
    return nvpflow.build(3, 2, (4,), dtype="float64")


def refused(call, error: type[Exception], message: str) -> None:
    """The call fails with exactly this message."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


# ---- one value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "shown"), [(60, "x" * 58), (61, None)])
def test_long_values_are_cut_in_messages(length, shown) -> None:
    value = ("x" * (length - 2)).encode()[:-1]  # whose repr, b'xxx', has this length
    text = repr(value) if shown is not None else f"b'{'x' * 55}..."
    assert len(repr(value)) == length
    refused(lambda: nvpflow.build(3, activation=value), TypeError, f"activation is {text} (bytes), expected a string")


def test_integers_fit_64_bits() -> None:
    """What fits goes on to the extension, which knows the limits of a model."""
    limits = f"expected {-(2**63)} to {2**63 - 1}"
    for number in (2**63 - 1, -(2**63)):
        refused(lambda n=number: nvpflow.build(3, n), ValueError, f"num_flows is {number}, expected 1 to 65535")
    for number in (2**63, -(2**63) - 1):
        refused(lambda n=number: nvpflow.build(3, n), ValueError, f"num_flows is {number} (int), {limits}")


def test_a_seed_has_64_bits_and_no_sign() -> None:
    limits = f"expected 0 to {2**64 - 1}"
    seeds = [nvpflow.build(3, 2, (4,), seed=seed) for seed in (0, 1, 2**64 - 1)]
    assert seeds[0] != seeds[1] != seeds[2] != seeds[0]
    for number in (2**64, -1):
        refused(lambda n=number: nvpflow.build(3, seed=n), ValueError, f"seed is {number} (int), {limits}")


def test_threads_fit_32_bits(flow) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 3))
    for number in (2**31, -(2**31) - 1):
        message = f"num_threads is {number} (int), expected {-(2**31)} to {2**31 - 1}"
        refused(lambda n=number: flow.fit(rows, num_threads=n, progress=False), ValueError, message)
    for number in (-(2**31), -1):
        with pytest.raises(ValueError, match=rf"^num_threads is {number}, expected"):
            flow.fit(rows, num_threads=number, progress=False)


@pytest.mark.parametrize("value", [np.int8(5), np.uint64(5), np.array(5)])
def test_integers_of_numpy_are_integers(value) -> None:
    assert nvpflow.build(value).spec.input_size == 5


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "True (bool)"),
        (np.True_, f"{np.True_!r} ({type(np.True_).__name__})"),
        (3.0, "3.0 (float)"),
        ("3", "'3' (str)"),
        (None, "None (NoneType)"),
    ],
)
def test_what_is_no_integer_is_refused(value, shown) -> None:
    refused(lambda: nvpflow.build(value), TypeError, f"input_size is {shown}, expected an integer")


@pytest.mark.parametrize("value", [2, 2.0, np.int8(2), np.float32(2), np.float64(2)])
def test_numbers_of_numpy_are_real_numbers(value) -> None:
    spec = nvpflow.build(3, scale_bound=value).spec
    assert type(spec.scale_bound) is float
    assert spec.scale_bound == 2


@pytest.mark.parametrize("value", [True, np.True_, "2", None, 2j, Fraction(2), np.array(2.0)])
def test_what_is_no_real_number_is_refused(value) -> None:
    message = f"scale_bound is {value!r} ({type(value).__name__}), expected a real number"
    refused(lambda: nvpflow.build(3, scale_bound=value), TypeError, message)


def test_an_integer_beyond_all_floats_is_told_by_its_bits() -> None:
    message = "scale_bound is an integer of 1025 bits, expected at most 1024"
    refused(lambda: nvpflow.build(3, scale_bound=2**1024), ValueError, message)


@pytest.mark.parametrize("value", [True, np.True_, False, np.False_])
def test_a_bool_of_numpy_is_a_bool(value) -> None:
    assert nvpflow.build(3, standardize=value).spec.standardize is bool(value)


@pytest.mark.parametrize("value", [1, 0, np.array(True)])
def test_what_is_no_bool_is_refused(value) -> None:
    expected = "expected True, False, 'mean', 'robust' or 'covariance'"
    message = f"standardize is {value!r} ({type(value).__name__}), {expected}"
    refused(lambda: nvpflow.build(3, standardize=value), TypeError, message)
    message = f"standardize is 'no', {expected}"
    refused(lambda: nvpflow.build(3, standardize="no"), ValueError, message)


@pytest.mark.parametrize("value", ["float32", "f4", np.float32, np.dtype("float32"), np.dtype(">f4")])
def test_any_name_of_a_dtype(value) -> None:
    assert nvpflow.build(3, dtype=value).spec.dtype == "float32"


@pytest.mark.parametrize("value", [None, "single precision", 32])
def test_what_names_no_dtype_is_refused(value) -> None:
    message = f"dtype is {value!r} ({type(value).__name__}), expected a dtype, 'float32' or 'float64'"
    refused(lambda: nvpflow.build(3, dtype=value), TypeError, message)


def test_paths(flow, tmp_path) -> None:
    for path in (tmp_path / "model", str(tmp_path / "model")):
        flow.save(path)
        assert nvpflow.load(path) == flow
    for path in (3, None, b"model", [Path("model")]):
        message = f"path is {path!r} ({type(path).__name__}), expected a str or an os.PathLike"
        refused(lambda p=path: nvpflow.load(p), TypeError, message)


# ---- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [(5, 7), [5, 7], np.array([5, 7]), np.array([5, 7], "uint8")])
def test_any_sequence_of_sizes(value) -> None:
    assert nvpflow.build(3, 2, value).spec.hidden_sizes == (5, 7)


@pytest.mark.parametrize("value", ["57", b"57", 5, None, {5, 7}, {5: 7}, iter((5, 7))])
def test_what_is_no_sequence_of_sizes_is_refused(value) -> None:
    message = r"^hidden_sizes is .*, expected a sequence of integers such as \(128, 128\)"
    with pytest.raises(TypeError, match=message):
        nvpflow.build(3, 2, value)


def test_the_wrong_one_of_the_sizes_is_named() -> None:
    message = "hidden_sizes[1] is 7.0 (float), expected an integer"
    refused(lambda: nvpflow.build(3, 2, (5, 7.0, 9.0)), TypeError, message)


@pytest.mark.parametrize("value", [("a", "b", "c"), ["a", "b", "c"], np.array(["a", "b", "c"]), iter("abc")])
def test_any_ordered_names_of_columns(flow, value) -> None:
    flow.column_names = value
    assert flow.column_names == ("a", "b", "c")
    assert {type(name) for name in flow.column_names} == {str}
    flow.column_names = None
    assert flow.column_names is None


@pytest.mark.parametrize("value", ["abc", b"abc", {"a", "b", "c"}, dict.fromkeys("abc"), frozenset("abc"), 3])
def test_names_of_columns_without_an_order_are_refused(flow, value) -> None:
    with pytest.raises(TypeError, match=r"^column_names is .*, expected a sequence of strings or None"):
        flow.column_names = value


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_parameters_may_lie_in_any_order_and_safe_dtype(flow) -> None:
    before = {name: value.copy() for name, value in flow.parameters().items()}
    kernel = np.arange(before["flow_0_scale.kernel"].size).reshape(before["flow_0_scale.kernel"].shape)
    for value in (kernel, kernel.astype("float32"), np.asfortranarray(kernel.astype("float64")), kernel.tolist()):
        flow.set_parameters({**before, "flow_0_scale.kernel": value})
        np.testing.assert_array_equal(flow.parameters()["flow_0_scale.kernel"], kernel)
    flow.set_parameters(before)


@pytest.mark.parametrize(
    ("dtype", "hint"), [("float64", True), ("int64", True), ("uint32", True), ("complex64", False)]
)
def test_a_dtype_that_loses_digits_is_refused_with_the_way_out_if_there_is_one(dtype, hint) -> None:
    flow = nvpflow.build(3, 2, (4,))
    values = {**flow.parameters(), "flow_1_scale.bias": np.zeros(1, dtype)}
    message = f"parameters['flow_1_scale.bias'] has dtype {dtype}, which NumPy does not convert to float32 safely"
    message += "; convert it yourself: np.asarray(..., dtype=np.float32)" * hint
    refused(lambda: flow.set_parameters(values), TypeError, message)


def test_masked_parameters_are_taken_while_no_value_is_masked(flow) -> None:
    given = dict(flow.parameters())
    flow.set_parameters({**given, "flow_1_scale.bias": np.ma.masked_array([0.5], mask=[False])})
    assert flow.parameters()["flow_1_scale.bias"] == 0.5
    hidden = np.ma.masked_array([0.25], mask=[True])
    message = "parameters['flow_1_scale.bias'] is a masked array with masked values, expected none; fill or remove them"
    refused(lambda: flow.set_parameters({**given, "flow_1_scale.bias": hidden}), ValueError, message)
    assert flow.parameters()["flow_1_scale.bias"] == 0.5


@pytest.mark.parametrize("shape", [(), (2, 2), (2, 3, 3), (3, 0)])
def test_rows_of_another_shape_are_refused(flow, shape) -> None:
    with pytest.raises(ValueError, match=rf"^x has shape {re.escape(str(shape))}, expected \[N, 3\]$"):
        flow.certify(np.zeros(shape))


def test_wrong_names_of_parameters_are_listed_up_to_five(flow) -> None:
    given = dict(flow.parameters())
    names = list(given)
    for count in (1, 5, 6, len(names)):
        listed = ", ".join(map(repr, names[:5][:count])) + (f" and {count - 5} more" if count > 5 else "")
        few = {name: given[name] for name in names[count:]}
        refused(lambda few=few: flow.set_parameters(few), ValueError, f"parameters lacks {listed}")
        others = {f"other.{name}": value for name, value in list(given.items())[:count]}
        listed = ", ".join(map(repr, list(others)[:5])) + (f" and {count - 5} more" if count > 5 else "")
        message = f"parameters holds {listed}, expected names of this flow's parameters only"
        refused(lambda many={**given, **others}: flow.set_parameters(many), ValueError, message)
