"""Whatever is passed to the Python API, it gives the right result or an exception that its documentation names."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import nvpflow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_same_bits, unit_data

SIZE = 3
METHODS = ("forward", "inverse", "log_prob")
FLOWS = {
    name: nvpflow.build(SIZE, 2, (4,), "tanh", standardize=False, dtype=name, seed=3)  # float64 into float32 is refused
    for name in ("float32", "float64")
}
REFUSALS = (TypeError, ValueError)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
thorough = settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

dtypes = st.sampled_from(
    ["float32", "float64", "float16", ">f4", ">f8", "int8", "uint16", "int32", "int64", "bool", "complex64"]
)


@st.composite
def views(draw) -> np.ndarray:
    """An array of any shape that looks at its memory by any steps: negative, zero, overlapping, unaligned."""
    kind = np.dtype(draw(dtypes))
    shape = draw(st.lists(st.integers(0, 5), max_size=3)) + draw(st.sampled_from([[], [SIZE], [SIZE], [SIZE]]))
    item = kind.itemsize
    steps = [
        draw(st.sampled_from([0, item, 2 * item, 3 * item, SIZE * item, item + 1, -item, -SIZE * item])) for _ in shape
    ]
    if draw(st.booleans()):  # C order, which steps at random hardly meet
        steps = [item * math.prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape))]
    low = sum(min(0, step * (n - 1)) for n, step in zip(shape, steps, strict=True) if n > 0)
    high = sum(max(0, step * (n - 1)) for n, step in zip(shape, steps, strict=True) if n > 0)
    shift = draw(st.sampled_from([0, 0, 0, 1, 4]))
    memory = np.zeros(high - low + item + shift, np.uint8)
    values = unit_data(1, (memory.size - shift) // item, draw(st.integers(0, 9)))[0]
    with np.errstate(invalid="ignore"):
        filled = values.astype(kind) if kind.kind != "b" else values > 0
    memory[shift : shift + filled.nbytes] = np.frombuffer(filled.tobytes(), np.uint8)
    view = np.ndarray(tuple(shape), kind, memory, shift - low, tuple(steps))
    view.flags.writeable = draw(st.booleans()) or view.size == 0
    return view


def results(flow: nvpflow.Flow, method: str, x: Any, **options: Any) -> tuple:
    with np.errstate(invalid="ignore"):  # NumPy warns where it converts a signalling NaN
        result = getattr(flow, method)(x, **options)
    return result if isinstance(result, tuple) else (result,)


def is_input(x: np.ndarray, dtype: str) -> bool:
    """What the documentation takes: [B, D] or [D], of a dtype that NumPy converts safely."""
    return x.ndim in (1, 2) and x.shape[-1] == SIZE and np.can_cast(x.dtype, dtype, "safe")


def check_input(dtype: str, method: str, x: np.ndarray) -> None:
    flow = FLOWS[dtype]
    before = x.tobytes()
    if not is_input(x, dtype):
        with pytest.raises(REFUSALS, match=r"^[xz] "):
            results(flow, method, x)
        return
    with np.errstate(invalid="ignore"):
        copy = np.ascontiguousarray(x).astype(dtype).reshape(x.shape)
    for came, wanted in zip(results(flow, method, x), results(flow, method, copy), strict=True):
        assert_same_bits(came, wanted, method)
    assert x.tobytes() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOWS)
@quick
@given(x=views())
def test_any_array_is_read_right_or_refused(dtype, method, x) -> None:
    check_input(dtype, method, x)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@thorough
@given(dtype=st.sampled_from(sorted(FLOWS)), x=views())
def test_many_more_arrays_are_read_right_or_refused(dtype, method, x) -> None:
    check_input(dtype, method, x)


def check_out(method: str, rows: int | None, out: Any, dtype: str = "float32") -> None:
    """`out` takes the result if it is what is documented; otherwise it is refused and stays as it is."""
    flow = FLOWS[dtype]
    x = unit_data(rows or 1, SIZE, 1, dtype)
    x = x if rows is not None else x[0]
    expected = results(flow, method, x)
    given_arrays = out if isinstance(out, tuple) else (out,)
    before = [array.tobytes() for array in given_arrays]
    good = len(given_arrays) == len(expected) and all(
        array.shape == np.shape(wanted)
        and array.dtype == np.dtype(dtype)
        and array.dtype.isnative
        and array.flags.c_contiguous
        and array.flags.aligned
        and array.flags.writeable
        for array, wanted in zip(given_arrays, expected, strict=False)
    )
    good = good and not any(np.shares_memory(a, b) for i, a in enumerate(given_arrays) for b in given_arrays[:i])
    if not good:
        with pytest.raises(REFUSALS, match="out"):
            results(flow, method, x, out=out)
        assert [array.tobytes() for array in given_arrays] == before
        return
    for came, array, wanted in zip(results(flow, method, x, out=out), given_arrays, expected, strict=True):
        assert came is array
        assert_same_bits(array, wanted, method)


@quick
@given(rows=st.none() | st.integers(0, 4), method=st.sampled_from(["inverse", "log_prob"]), out=views())
def test_any_out_is_written_right_or_refused(rows, method, out) -> None:
    check_out(method, rows, out)


@quick
@given(rows=st.none() | st.integers(0, 4), out=st.tuples(views(), views()))
def test_any_pair_of_outs_is_written_right_or_refused(rows, out) -> None:
    check_out("forward", rows, out)


@pytest.mark.parametrize("method", METHODS)
@quick
@given(
    rows=st.integers(0, 5),
    places=st.lists(st.integers(0, 60), min_size=3, max_size=3),
)
def test_pieces_of_one_memory_are_told_apart(method, rows, places) -> None:
    """x and every out lie anywhere in one array: exactly those that share a byte are refused."""
    memory = unit_data(1, 100, 4, "float32")[0]
    flow = FLOWS["float32"]

    def piece(at: int, shape: tuple[int, ...]) -> np.ndarray:
        return memory[at : at + math.prod(shape)].reshape(shape)

    x = piece(places[0], (rows, SIZE))
    matrix, vector = piece(places[1], (rows, SIZE)), piece(places[2], (rows,))
    outs = {"forward": (matrix, vector), "inverse": (matrix,), "log_prob": (vector,)}[method]
    expected = results(flow, method, x.copy())
    out = outs if len(outs) > 1 else outs[0]
    pieces = (x, *outs)
    shared = any(np.may_share_memory(a, b) and a.size and b.size for i, a in enumerate(pieces) for b in pieces[:i])
    before = memory.copy()
    if shared:
        with pytest.raises(ValueError, match="overlaps"):
            results(flow, method, x, out=out)
        np.testing.assert_array_equal(memory, before)
        return
    for came, wanted in zip(results(flow, method, x, out=out), expected, strict=True):
        assert_same_bits(came, wanted, method)


numbers = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    st.none(),
    st.sampled_from(["", "3", "cosine", b"4"]),
)


@quick
@given(
    options=st.fixed_dictionaries(
        {"epochs": st.integers(-1, 2) | st.sampled_from([True, 1.0, "2", None, -(2**70)])},
        optional={
            "validation": numbers,
            "batch_size": numbers,
            "learning_rate": numbers,
            "schedule": st.sampled_from(["cosine", "constant", "step", "", 3, None]),
            "weight_decay": numbers,
            "clip_norm": numbers,
            "averaging": numbers,
            "patience": numbers,
            "max_round_trip": numbers,
            "seed": numbers,
            "num_threads": numbers,
        },
    )
)
def test_any_options_of_fit_train_or_are_refused(options) -> None:
    flow = nvpflow.build(SIZE, 1, (4,), dtype="float64", seed=1)
    before = flow._copy_flat_parameters()
    try:
        history = flow.fit(unit_data(40, SIZE, 5), progress=False, **options)
    except REFUSALS:
        np.testing.assert_array_equal(flow._copy_flat_parameters(), before, "refused, and yet trained")
    except nvpflow.TrainingError:
        pass  # a learning rate of 1e300 is no mistake of form
    else:
        assert 1 <= len(history.train_loss) <= int(options["epochs"])
    assert np.isfinite(flow._copy_flat_parameters()).all()


@quick
@given(
    options=st.fixed_dictionaries(
        {"input_size": st.integers(-1, 9) | numbers},
        optional={
            "num_flows": numbers,
            "hidden_sizes": st.lists(numbers, max_size=3) | numbers,
            "activation": st.sampled_from(["relu", "gelu", "RELU", "", 3, None]),
            "scale_bound": numbers,
            "standardize": numbers,
            "dtype": st.sampled_from(["float32", "float64", "float16", np.float32, np.dtype("f8"), "int8", 3]),
            "seed": numbers,
            "device": st.sampled_from(["cpu", "gpu", "", 0, None]),
            "precision": st.sampled_from(["float32", "tf32", "", 1]),
            "weights": st.sampled_from(["full", "bfloat16", "half", 1]),
        },
    )
)
def test_any_options_of_build_give_a_flow_or_are_refused(options) -> None:
    try:
        flow = nvpflow.build(**options)
    except (*REFUSALS, MemoryError):
        return
    x = unit_data(4, flow.spec.input_size, 6, flow.spec.dtype)
    z, _ = flow.forward(x)
    np.testing.assert_allclose(flow.inverse(z), x, rtol=1e-3, atol=1e-3)


@quick
@given(
    content=st.binary(max_size=300)
    | st.builds(lambda n, text: n.to_bytes(8, "little") + b"{" + text, st.integers(0, 300), st.binary(max_size=300))
)
def test_any_bytes_of_a_file_are_refused(tmp_path, content) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    with pytest.raises(nvpflow.FileFormatError, match="any"):
        nvpflow.load(path)
