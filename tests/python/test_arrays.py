"""The boundary: which arrays are taken in place, which are converted, which are refused, and what the message names."""

from __future__ import annotations

import gc
import re
import sys
import tracemalloc

import numpy as np
import pytest
from oracle import assert_same_bits, assert_within_budget, unit_data

SIZE = 6
DTYPES = ("float32", "float64")
METHODS = ("forward", "inverse", "inverse_with_log_det", "log_prob", "log_probability")


@pytest.fixture(params=DTYPES)
def pair(make_flow, request):
    return make_flow(SIZE, 3, (9,), "silu", dtype=request.param, standardize=True)


@pytest.fixture
def flow32(make_flow):
    return make_flow(SIZE, 3, (9,), "silu", dtype="float32")[0]


@pytest.fixture
def flow64(make_flow):
    return make_flow(SIZE, 3, (9,), "silu", dtype="float64")[0]


def call(flow, method: str, x, out=None) -> tuple:
    """The method's results as a tuple; `out` is a tuple of as many arrays."""
    if method == "inverse_with_log_det":
        return flow.inverse(x, with_log_det=True, **({} if out is None else {"out": out}))
    given = {} if out is None else {"out": out if method == "forward" else out[0]}
    result = getattr(flow, method)(x, **given)
    return result if isinstance(result, tuple) else (result,)


def empty_out(method: str, dtype: str, rows: int | None) -> tuple:
    """Arrays filled with NaN that `call` may write to; rows None: one row without a batch axis."""
    batch = () if rows is None else (rows,)
    matrix, vector = np.full((*batch, SIZE), np.nan, dtype), np.full(batch, np.nan, dtype)
    if method in ("forward", "inverse_with_log_det"):
        return matrix, vector
    return (matrix,) if method == "inverse" else (vector,)


# ---------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_and_a_row(pair, method) -> None:
    flow, _ = pair
    dtype = flow.spec.dtype
    x = unit_data(5, SIZE, 1, dtype)
    of_batch = call(flow, method, x)
    for result, poisoned in zip(of_batch, empty_out(method, dtype, 5), strict=True):
        assert isinstance(result, np.ndarray)
        assert (result.shape, result.dtype) == (poisoned.shape, np.dtype(dtype))
        assert result.flags.c_contiguous
        assert result.flags.writeable
    for row in range(5):
        for result, expected in zip(call(flow, method, x[row]), of_batch, strict=True):
            assert np.shape(result) == expected.shape[1:]
            assert np.asarray(result).dtype == np.dtype(dtype)
            assert_same_bits(result, expected[row], f"row {row}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [None, 0, 1, 37])
def test_out_takes_the_same_bits_and_is_returned(pair, method, rows) -> None:
    flow, _ = pair
    dtype = flow.spec.dtype
    x = unit_data(1, SIZE, 2, dtype)[0] if rows is None else unit_data(rows, SIZE, 2, dtype)
    expected = call(flow, method, x)
    out = empty_out(method, dtype, rows)
    results = call(flow, method, x, out)
    for result, given, reference in zip(results, out, expected, strict=True):
        assert result is given
        assert_same_bits(given, reference, method)


@pytest.mark.parametrize("method", METHODS)
def test_batch_zero(pair, method) -> None:
    flow, _ = pair
    for result, expected in zip(
        call(flow, method, np.empty((0, SIZE), flow.spec.dtype)), empty_out(method, flow.spec.dtype, 0), strict=True
    ):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


def test_sample_shapes(pair) -> None:
    flow, _ = pair
    dtype = flow.spec.dtype
    assert flow.sample(0, seed=1).shape == (0, SIZE)
    drawn = flow.sample(7, seed=1)
    assert (drawn.shape, drawn.dtype) == ((7, SIZE), np.dtype(dtype))
    out = np.full((7, SIZE), np.nan, dtype)
    assert flow.sample(7, seed=1, out=out) is out
    assert_same_bits(out, drawn)
    with pytest.raises(ValueError, match=r"out.*\(6, 6\).*\(7, 6\)"):
        flow.sample(7, seed=1, out=np.empty((6, SIZE), dtype))
    with pytest.raises(ValueError, match=r"n.*-1"):
        flow.sample(-1)
    with pytest.raises((ValueError, OverflowError, MemoryError), match=r"\bn\b"):
        flow.sample(2**62)
    with pytest.raises(TypeError, match=r"\bn\b"):
        flow.sample(1.5)
    with pytest.raises((ValueError, OverflowError), match=r"start.*-1"):
        flow.sample(2, seed=1, start=-1)
    with pytest.raises((ValueError, OverflowError), match=r"seed"):
        flow.sample(2, seed=-1)
    with pytest.raises(ValueError, match=rf"^seed is {2**64}, expected an integer from 0 to 2\*\*64 - 1$"):
        flow.sample(2, seed=2**64)
    if hasattr(sys, "get_int_max_str_digits"):
        with pytest.raises(ValueError, match=r"^seed is a number of thousands of digits, expected an integer"):
            flow.sample(2, seed=10 ** (sys.get_int_max_str_digits() + 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((), r"\(\)"),
        ((2, 3, 6), r"\(2, 3, 6\)"),
        ((4, 5), r"\(4, 5\)"),
        ((4, 7), r"\(4, 7\)"),
        ((5,), r"\(5,\)"),
        ((6, 0), r"\(6, 0\)"),
    ],
)
def test_a_wrong_shape_is_refused(pair, method, shape, shown) -> None:
    flow, _ = pair
    name = "z" if method.startswith("inverse") else "x"
    with pytest.raises(ValueError, match=rf"^{name}\b.*{shown}.*6"):
        call(flow, method, np.zeros(shape, flow.spec.dtype))


@pytest.mark.parametrize("shape", [(), (4,), (6,), (1,), (5, 1), (5, 5), (1, 5), (0, 5)])
def test_a_cotangent_of_another_shape_is_refused(pair, shape) -> None:
    """One number for each row; for a row without a batch axis a number."""
    flow, _ = pair
    dtype = flow.spec.dtype
    x = unit_data(5, SIZE, 2, dtype)
    with pytest.raises(ValueError, match=rf"^grad_log_prob has shape {re.escape(str(shape))}, expected \(5,\)$"):
        flow.log_prob_vjp(x, np.zeros(shape, dtype))
    if shape != ():
        with pytest.raises(ValueError, match=rf"^grad_log_det has shape {re.escape(str(shape))}, expected \(\)$"):
            flow.vjp(x[0], x[0], np.zeros(shape, dtype))


# ---------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "float16", "bool"])
def test_a_safe_dtype_is_converted(pair, method, dtype) -> None:
    flow, _ = pair
    x = (unit_data(9, SIZE, 3) * 2 > 0.5).astype(dtype)
    results = call(flow, method, x)
    for result, expected in zip(results, call(flow, method, x.astype(flow.spec.dtype)), strict=True):
        assert_same_bits(result, expected, dtype)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_wider_dtypes_are_safe_for_float64(flow64, dtype) -> None:
    x = np.arange(12).reshape(2, SIZE).astype(dtype) / 4
    x = x.astype(dtype)
    assert_same_bits(flow64.log_prob(x), flow64.log_prob(x.astype("float64")), dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "int32", "int64", "uint32", "longdouble"])
def test_an_unsafe_dtype_is_refused_with_the_way_out(flow32, method, dtype) -> None:
    """The message names the argument, both dtypes and the conversion to write."""
    x = np.zeros((2, SIZE), dtype)
    name = "z" if method.startswith("inverse") else "x"
    with pytest.raises(TypeError, match=rf"^{name}\b.*{np.dtype(dtype)}.*float32") as raised:
        call(flow32, method, x)
    assert "asarray" in str(raised.value) or "astype" in str(raised.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, SIZE), complex),
        np.zeros((2, SIZE), object),
        np.full((2, SIZE), "1"),
        np.zeros((2, SIZE), "datetime64[s]"),
        np.zeros((2, SIZE), [("a", "f4")]),
        "abc",
        None,
        {"x": 1},
        [["a"] * SIZE],
        [[None] * SIZE],
    ],
    ids=["complex", "object", "str", "datetime", "record", "a string", "None", "dict", "list of str", "list of None"],
)
def test_what_is_no_array_of_numbers_is_refused(pair, method, x) -> None:
    flow, _ = pair
    name = "z" if method.startswith("inverse") else "x"
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        call(flow, method, x)


def test_lists_have_no_dtype_and_become_the_models(pair) -> None:
    flow, _ = pair
    x = [[0.5, -1.0, 2, 0, 1.25, -0.75], [1, 2, 3, 4, 5, 6]]
    assert_same_bits(flow.log_prob(x), flow.log_prob(np.array(x, flow.spec.dtype)), "list of lists")
    assert_same_bits(flow.log_prob(tuple(x[0])), flow.log_prob(np.array(x[0], flow.spec.dtype)), "tuple")
    with pytest.raises((TypeError, ValueError), match=r"^x\b"):
        flow.log_prob([[1.0, 2.0], [3.0]])


def test_other_byte_order_is_converted(pair) -> None:
    flow, _ = pair
    x = unit_data(5, SIZE, 4, flow.spec.dtype)
    swapped = x.astype(x.dtype.newbyteorder())
    assert_same_bits(flow.log_prob(swapped), flow.log_prob(x), "byte-swapped")


# ---------------------------------------------------------------------------------------------- layouts


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    rows, columns = x.shape
    padded = np.full((rows, columns + 3), 7, x.dtype)
    padded[:, 1 : columns + 1] = x
    spread = np.full((2 * rows, columns), 7, x.dtype)
    spread[::2] = x
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    unaligned = buffer[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    locked = x.copy()
    locked.flags.writeable = False
    return {
        "Fortran order": np.asfortranarray(x),
        "columns of a wider array": padded[:, 1 : columns + 1],
        "every second row": spread[::2],
        "reversed": x[::-1].copy()[::-1],
        "unaligned": unaligned,
        "read-only": locked,
        "broadcast": np.broadcast_to(x[0], x.shape),
    }


@pytest.mark.parametrize("method", METHODS)
def test_any_layout_of_the_input_is_read(pair, method) -> None:
    flow, _ = pair
    x = unit_data(21, SIZE, 5, flow.spec.dtype)
    for layout, view in layouts(x).items():
        before = view.copy()
        expected = call(flow, method, np.array(view, order="C"))
        for result, reference in zip(call(flow, method, view), expected, strict=True):
            assert_same_bits(result, reference, layout)
        assert_same_bits(view, before, f"{layout}: the input")


def test_a_row_may_be_strided(pair) -> None:
    flow, _ = pair
    x = unit_data(4, 2 * SIZE, 6, flow.spec.dtype)
    assert_same_bits(flow.log_prob(x[1, ::2]), flow.log_prob(x[1, ::2].copy()))


def test_subclasses_give_and_take_plain_values(pair) -> None:
    class Named(np.ndarray):
        pass

    flow, _ = pair
    x = unit_data(5, SIZE, 7, flow.spec.dtype)
    for result, expected in zip(flow.forward(x.view(Named)), flow.forward(x), strict=True):
        assert type(result) is np.ndarray
        assert_same_bits(result, expected)


def test_objects_that_offer_an_array(pair) -> None:
    class Table:
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return np.array(self.values, dtype=dtype)

    flow, _ = pair
    x = unit_data(5, SIZE, 8, flow.spec.dtype)
    assert_same_bits(flow.log_prob(Table(x)), flow.log_prob(x))
    assert_same_bits(flow.log_prob(memoryview(x)), flow.log_prob(x))


# ---------------------------------------------------------------------------------------------- out=


def bad_outs(good: np.ndarray) -> dict[str, tuple[object, str]]:
    """Arrays that must not be written to, each with a word the message must hold."""
    other = "float64" if good.dtype == np.float32 else "float32"
    locked = good.copy()
    locked.flags.writeable = False
    buffer = np.zeros(good.nbytes + 1, np.uint8)
    bad: dict[str, tuple[object, str]] = {
        "dtype": (good.astype(other), other),
        "longer": (np.zeros((len(good) + 1, *good.shape[1:]), good.dtype), "shape"),
        "shorter": (np.zeros((len(good) - 1, *good.shape[1:]), good.dtype), "shape"),
        "extra axis": (np.zeros((*good.shape, 1), good.dtype), "shape"),
        "read-only": (locked, "read-only|writ"),
        "strided": (np.repeat(good, 2, axis=0)[::2], "contiguous"),
        "unaligned": (buffer[1:].view(good.dtype).reshape(good.shape), "align"),
        "byte order": (good.astype(good.dtype.newbyteorder()), "byte|dtype|[<>]f"),
        "a list": (good.tolist(), "list"),
        "a string": ("out", "str"),
    }
    if good.ndim == 2:
        bad["Fortran order"] = (np.asfortranarray(good), "contiguous")
    return bad


@pytest.mark.parametrize("method", METHODS)
def test_out_that_cannot_be_written_is_refused(pair, method) -> None:
    flow, _ = pair
    dtype = flow.spec.dtype
    x = unit_data(5, SIZE, 10, dtype)
    for position in range(len(empty_out(method, dtype, 5))):
        for case, (bad, word) in bad_outs(np.zeros_like(empty_out(method, dtype, 5)[position])).items():
            if case == "dtype" and dtype == "float32" and method.startswith("inverse") and position == 0:
                continue  # this flow standardizes: its rows of data may be float64
            out = list(empty_out(method, dtype, 5))
            out[position] = bad
            with pytest.raises((TypeError, ValueError), match=rf"\bout\b.*({word})"):
                call(flow, method, x, tuple(out))
            untouched = [array for i, array in enumerate(out) if i != position]
            assert all(np.all(np.isnan(array)) for array in untouched), case


@pytest.mark.parametrize("method", ["forward", "inverse_with_log_det"])
def test_out_of_two_results_is_a_pair(pair, method) -> None:
    flow, _ = pair
    dtype = flow.spec.dtype
    x = unit_data(5, SIZE, 11, dtype)
    z, log_det = empty_out(method, dtype, 5)
    for bad in (z, (z,), (z, log_det, z), (log_det, z), 3):
        with pytest.raises((TypeError, ValueError), match=r"\bout\b"):
            call(flow, method, x, bad)
    # Either of the two may be left to the call.
    expected = call(flow, method, x)
    for out in ((z, None), (None, log_det), (None, None)):
        for result, given, reference in zip(call(flow, method, x, out), out, expected, strict=True):
            assert given is None or result is given
            assert_same_bits(result, reference, method)


@pytest.mark.parametrize("method", METHODS)
def test_out_must_not_overlap_the_input(pair, method) -> None:
    flow, _ = pair
    dtype = flow.spec.dtype
    memory = np.zeros(20 * SIZE, dtype)
    memory[: 5 * SIZE] = unit_data(5, SIZE, 12, dtype).ravel()
    x = memory[: 5 * SIZE].reshape(5, SIZE)
    before = memory.copy()
    outs = empty_out(method, dtype, 5)
    for position, good in enumerate(outs):
        for start in (0, 1, 5 * SIZE - 1):
            overlapping = memory[start : start + good.size].reshape(good.shape)
            out = list(outs)
            out[position] = overlapping
            with pytest.raises(ValueError, match=r"\bout\b.*overlap|overlap.*\bout\b"):
                call(flow, method, x, tuple(out))
        # Directly behind the input there is no overlap.
        out = list(outs)
        out[position] = memory[5 * SIZE : 5 * SIZE + good.size].reshape(good.shape)
        call(flow, method, x, tuple(out))
        assert not np.any(np.isnan(out[position]))
        memory[...] = before


@pytest.mark.parametrize("method", ["forward", "inverse_with_log_det"])
def test_outs_must_not_overlap_each_other(pair, method) -> None:
    flow, _ = pair
    dtype = flow.spec.dtype
    x = unit_data(5, SIZE, 13, dtype)
    memory = np.zeros(6 * SIZE, dtype)
    with pytest.raises(ValueError, match=r"\bout\b.*overlap|overlap.*\bout\b"):
        call(flow, method, x, (memory[: 5 * SIZE].reshape(5, SIZE), memory[5 * SIZE - 1 : 5 * SIZE + 4]))
    call(flow, method, x, (memory[: 5 * SIZE].reshape(5, SIZE), memory[5 * SIZE : 5 * SIZE + 5]))


def test_an_input_that_is_copied_may_share_memory_with_out(pair) -> None:
    """The kernels read the copy: refusing would be right too, a wrong result would not."""
    flow, _ = pair
    x = unit_data(5, SIZE, 14, flow.spec.dtype)
    expected = flow.inverse(x[::-1].copy())
    assert_same_bits(flow.inverse(x[::-1], out=x), expected)


# ---------------------------------------------------------------------------------------------- calling conventions


def test_keyword_and_unknown_arguments(flow64) -> None:
    x = unit_data(3, SIZE, 15)
    assert_same_bits(flow64.log_prob(x=x), flow64.log_prob(x))
    assert_same_bits(flow64.forward(x=x)[0], flow64.forward(x)[0])
    assert_same_bits(flow64.inverse(z=x), flow64.inverse(x))
    for method in ("forward", "inverse", "log_prob", "nll", "nll_gradient", "vjp"):
        with pytest.raises(TypeError, match=method):
            getattr(flow64, method)()
        with pytest.raises(TypeError, match="nonsense"):
            getattr(flow64, method)(x, nonsense=1)
    with pytest.raises(TypeError):
        flow64.log_prob(x, np.empty(3))  # out is keyword-only
    with pytest.raises(TypeError):
        flow64.forward(x, (np.empty_like(x), np.empty(3)))
    with pytest.raises(TypeError):
        flow64.log_prob(x, x=x)


def test_out_none_is_no_out(flow64) -> None:
    x = unit_data(3, SIZE, 16)
    assert_same_bits(flow64.log_prob(x, out=None), flow64.log_prob(x))
    assert_same_bits(flow64.forward(x, out=None)[0], flow64.forward(x)[0])
    assert_same_bits(flow64.inverse(x, out=None), flow64.inverse(x))


# ---------------------------------------------------------------------------------------------- references and memory


def test_calls_leave_no_references_behind(flow64) -> None:
    x, row = unit_data(5, SIZE, 17), unit_data(1, SIZE, 18)[0]
    converted = np.asfortranarray(x)
    out, log_det = np.empty((5, SIZE)), np.empty(5)
    wrong = np.zeros((5, SIZE), complex)
    watched = (x, row, converted, out, log_det, wrong, flow64, None, np.dtype("float64"))

    def once() -> None:
        flow64.forward(x)
        flow64.forward(x, out=(out, log_det))
        flow64.inverse(x, with_log_det=True, out=(out, log_det))
        flow64.inverse(row)
        flow64.log_prob(row)
        flow64.log_prob(converted)
        flow64.log_prob(x, out=log_det)
        flow64.sample(5, seed=1, out=out)
        flow64.nll_gradient(x)
        flow64.vjp(x, out, log_det)
        for bad in (wrong, x[:, :3]):
            with pytest.raises((TypeError, ValueError)):
                flow64.log_prob(bad)
        with pytest.raises(ValueError, match="overlap"):
            flow64.inverse(out, out=out)

    once()
    before = [sys.getrefcount(value) for value in watched]
    for _ in range(1000):
        once()
    after = [sys.getrefcount(value) for value in watched]
    for name, first, last in zip(
        ("x", "row", "converted", "out", "log_det", "wrong", "flow", "None", "dtype"), before, after, strict=True
    ):
        assert abs(last - first) < 100, f"{name}: {first} references before 1000 calls, {last} after"


def test_memory_does_not_grow(flow64) -> None:
    x = unit_data(100, SIZE, 19)
    converted = np.asfortranarray(x)

    def work() -> None:
        for _ in range(300):
            flow64.forward(x)
            flow64.inverse(converted, with_log_det=True)
            flow64.log_prob(x[0])
            flow64.sample(10, seed=1)
            flow64.vjp(x, x)
            flow64.parameters()
            with pytest.raises(TypeError):
                flow64.log_prob("x")

    work()
    gc.collect()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        work()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One leaked array per call would be 300 times 800 bytes or more.
    assert after - before < 20_000


def test_resident_memory_does_not_grow(run_python) -> None:
    """What Python's allocator does not see: the extension's own memory."""
    output = run_python(
        """
import numpy as np, nvpflow
flow = nvpflow.build(input_size=32, num_flows=2, hidden_sizes=(64,))
flow.num_threads = 1
x = np.ones((4096, 32), np.float32)
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
def work(times):
    for _ in range(times):
        flow.forward(x); flow.nll_gradient(x); flow.vjp(x, x); flow.sample(100, seed=1)
        flow.set_parameters(flow.parameters())
        nvpflow.build(input_size=32, num_flows=2, hidden_sizes=(64,), seed=1)
work(30)
before = resident()
work(150)
print(resident() - before)
"""
    )
    # One leaked [4096, 32] array per turn would be 75 MiB.
    assert int(output) < 8 * 1024, f"grew by {output} KiB"


def test_results_agree_with_the_oracle_through_every_entrance(pair) -> None:
    flow, oracle = pair
    x = unit_data(13, SIZE, 20, flow.spec.dtype)
    expected = oracle.log_prob(x)
    for entrance in (x, np.asfortranarray(x), x.astype(x.dtype.newbyteorder()), x.tolist()):
        assert_within_budget(flow.log_prob(entrance), expected, flow.spec.dtype)
