"""Arrays of other libraries in the host's memory: taken where they are, answered in kind, refused by name."""

from __future__ import annotations

import array
import ctypes
import gc
import os
import platform
import shutil
import subprocess
import threading
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from oracle import assert_same_bits, unit_data

SIZE = 6
LIBRARIES = ("torch", "jax", "cupy", "array_api_strict")  # the last: nothing but the array API standard


@pytest.fixture
def flow(make_flow):
    return make_flow(SIZE, 3, (9,), "silu", dtype="float32", standardize=True)[0]


def library(name: str):
    """The library as a module; skips the test where it is not installed."""
    return pytest.importorskip(name, reason=f"{name} is not installed")


def to_library(name: str, x: np.ndarray):
    """The rows as the library's array in the host's memory; of JAX and PyTorch without a copy where they can."""
    module = library(name)
    if name == "torch":
        return module.from_numpy(x)
    if name == "jax":
        return module.numpy.asarray(x)
    if name == "array_api_strict":
        return module.asarray(x)
    try:  # CuPy has arrays of the host as pinned memory alone, which NumPy wraps
        return module.asarray(x)
    except module.cuda.runtime.CUDARuntimeError:
        pytest.skip("CuPy sees no CUDA device")


def host(values) -> np.ndarray:
    return np.asarray(values)


class Counting:
    """A library of its own: DLPack alone, in the form asked for; counts what is asked of it."""

    def __init__(self, values: np.ndarray, *, versioned: bool = True) -> None:
        self._values, self._versioned = values, versioned
        self.calls: list[dict] = []

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        self.calls.append(options)
        if not self._versioned and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self._values.__dlpack__(**options)


def peak_of(call) -> int:
    """Bytes of NumPy's and Python's memory that a call takes at most."""
    call()
    gc.collect()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- in place, in kind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("rows", [None, 0, 1, 7])
def test_results_have_the_bits_of_numpy_and_the_callers_kind(flow, name, rows):
    x = unit_data(rows or 1, SIZE, 1, "float32")
    x = x[0] if rows is None else x[:rows]
    given = to_library(name, x)
    pairs = [
        (flow.log_prob(given), flow.log_prob(x)),
        (flow.inverse(given), flow.inverse(x)),
        *zip(flow.forward(given), flow.forward(x), strict=True),
        *zip(flow.inverse(given, with_log_det=True), flow.inverse(x, with_log_det=True), strict=True),
        *zip(flow.vjp(given, given), flow.vjp(x, x), strict=True),
        *zip(flow.log_prob_vjp(given, flow.log_prob(given)), flow.log_prob_vjp(x, flow.log_prob(x)), strict=True),
    ]
    if rows:
        pairs.append((flow.nll_gradient(given)[1], flow.nll_gradient(x)[1]))
        assert flow.nll_gradient(given)[0] == flow.nll_gradient(x)[0] == flow.nll(given)
    for result, expected in pairs:
        assert type(result) is type(given)
        assert host(result).shape == np.shape(expected)
        assert_same_bits(host(result), np.asarray(expected))


@pytest.mark.parametrize("name", ["torch", "jax", "numpy", "dlpack", "buffer"])
def test_rows_are_read_where_they_are(flow, name):
    """The kernels take no memory; a layout that must be copied takes the size of the rows."""
    x = unit_data(20_000, SIZE, 2, "float32")
    out = np.empty(len(x), np.float32)
    given = {"numpy": x, "dlpack": Counting(x), "buffer": memoryview(x)}.get(name)
    given = to_library(name, x) if given is None else given
    assert peak_of(lambda: flow.log_prob(given, out=out)) < 10_000
    strided = np.asfortranarray(x)
    given = {"numpy": strided, "dlpack": Counting(strided), "buffer": memoryview(strided)}.get(name)
    if given is None:
        given = library("torch").from_numpy(strided) if name == "torch" else None
    if given is not None:
        assert peak_of(lambda: flow.log_prob(given, out=out)) > x.nbytes


COUNTING = """
import ctypes, sys
import numpy as np
import nvpflow

class Foreign:
    def __init__(self, values): self.values = values
    def __dlpack_device__(self): return (1, 0)
    def __dlpack__(self, **options): return self.values.__dlpack__(**options)

def array_of(name, values):
    if name == "numpy":
        return values
    if name == "dlpack":
        return Foreign(values)
    if name == "buffer":
        return memoryview(values)
    import warnings; warnings.simplefilter("ignore")
    module = __import__(name)
    if name == "torch":
        return module.from_numpy(values)
    return module.numpy.asarray(values) if name == "jax" else module.asarray(values)

preloaded = ctypes.CDLL(None)
preloaded.allocations_disarm.restype = ctypes.c_long

def allocations(call):
    "Requests of 20 kB or more in a call that is not the first of its kind."
    call(), call()
    preloaded.allocations_arm(ctypes.c_size_t(20_000))
    result = call()
    count = preloaded.allocations_disarm()
    del result
    return count

name = sys.argv[1]
flow = nvpflow.build(6, 3, (9,))
flow.num_threads = 1
rows = np.random.default_rng(0).normal(size=(20_000, 6)).astype(np.float32)
x, out, z = array_of(name, rows), np.empty(20_000, np.float32), np.empty_like(rows)
assert allocations(lambda: np.empty(5000, np.float32)) == 1  # it counts
print("in place", allocations(lambda: flow.log_prob(x, out=out)), allocations(lambda: flow.forward(x, out=(z, out))))
print("results", allocations(lambda: flow.log_prob(x)), allocations(lambda: flow.forward(x)))
if name != "jax":  # whose arrays have one layout
    strided = array_of(name, np.asfortranarray(rows))
    print("copied", allocations(lambda: flow.log_prob(strided, out=out)))
"""


@pytest.fixture(scope="session")
def count_allocations(tmp_path_factory, run_python):
    """Runs COUNTING for a library, with every allocation of the process counted."""
    if platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None:
        pytest.skip("preloads a library made by cc under the functions of glibc")
    if os.environ.get("NVPFLOW_SANITIZED"):
        pytest.skip("a sanitizer's own library is preloaded")
    library = tmp_path_factory.mktemp("allocations") / "allocations.so"
    source = Path(__file__).parent / "preloaded" / "allocations.c"
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return lambda name: run_python(COUNTING, name, env={"LD_PRELOAD": str(library)}).splitlines()


@pytest.mark.parametrize("name", ["numpy", "dlpack", "buffer", "torch", "jax", "array_api_strict"])
def test_no_memory_is_taken_but_that_of_the_results(count_allocations, name):
    """Of all the process's allocators: a result is one allocation, a layout that must be copied is one more."""
    if name in LIBRARIES:
        library(name)
    in_place, results, *copied = count_allocations(name)
    assert in_place == "in place 0 0"
    assert results == "results 1 2"
    assert copied == ([] if name == "jax" else ["copied 1"])


def test_results_for_torch_are_memory_of_torch(flow):
    torch = library("torch")
    x = torch.from_numpy(unit_data(20_000, SIZE, 3, "float32"))
    assert peak_of(lambda: flow.forward(x)) < 10_000
    out = torch.full((len(x),), torch.nan)
    address = out.data_ptr()
    assert flow.log_prob(x, out=out) is out
    assert out.data_ptr() == address
    assert_same_bits(out.numpy(), flow.log_prob(x.numpy()))
    z, log_det = torch.empty(20_000, SIZE), torch.empty(20_000)
    assert flow.forward(x, out=(z, log_det))[0] is z
    assert_same_bits(z.numpy(), flow.forward(x.numpy())[0])
    # Results of NumPy's rows into PyTorch's memory, and the other way round.
    assert flow.log_prob(x.numpy(), out=out) is out
    into = np.empty(20_000, np.float32)
    assert flow.log_prob(x, out=into) is into


def test_results_for_jax_are_taken_over_by_jax(flow):
    """JAX owns the memory that the kernels wrote to: while the result lives, so does that memory, and no copy of it."""
    jax = library("jax")
    x = jax.numpy.asarray(unit_data(20_000, SIZE, 4, "float32"))
    flow.inverse(x)
    gc.collect()
    tracemalloc.start()
    try:
        result = flow.inverse(x)
        assert tracemalloc.get_traced_memory()[0] > result.nbytes
        expected = np.array(result)
        del result
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < expected.nbytes + 10_000  # `expected` itself
    finally:
        tracemalloc.stop()
    assert_same_bits(expected, flow.inverse(np.asarray(x)))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_results_outlive_input_and_flow(make_flow, name):
    flow = make_flow(SIZE, 3, (9,), dtype="float32")[0]
    x = unit_data(500, SIZE, 5, "float32")
    expected = flow.forward(x)
    given = to_library(name, x.copy())
    results = flow.forward(given)
    del given, flow
    gc.collect()
    noise = [np.full(x.shape, 7, np.float32) for _ in range(50)]  # reuses what was freed too early
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(host(result), wanted)
    assert noise[0][0, 0] == 7


def test_inputs_are_held_during_the_call_and_no_longer(flow):
    torch = library("torch")
    x = torch.from_numpy(unit_data(100, SIZE, 6, "float32"))
    seen = weakref.ref(x)
    result = flow.log_prob(x)
    del x
    gc.collect()
    assert seen() is None
    assert result.shape == (100,)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_layouts(flow, name):
    module = library(name)
    wide = unit_data(40, 2 * SIZE, 7, "float32")
    given = module.from_numpy(wide) if name == "torch" else module.numpy.asarray(wide)
    for view in ((slice(None, None, 3), slice(None, None, 2)), (slice(5, 6), slice(0, SIZE)), (3, slice(0, SIZE))):
        assert_same_bits(host(flow.log_prob(given[view])), np.asarray(flow.log_prob(wide[view])))
    narrow = given[:, :SIZE]
    assert_same_bits(host(flow.log_prob(narrow.T.reshape(SIZE, -1).T)), flow.log_prob(wide[:, :SIZE]))
    if name == "torch":
        row = narrow[:1].expand(9, SIZE)
        assert_same_bits(flow.log_prob(row).numpy(), flow.log_prob(np.repeat(wide[:1, :SIZE], 9, axis=0)))


def test_signs_that_torch_has_put_off(flow):
    """A view like x.conj().imag is negative to PyTorch alone: its memory, which DLPack hands out, is not."""
    torch = library("torch")
    x = torch.from_numpy(unit_data(5, SIZE, 8, "float32"))
    lazy = torch.complex(torch.zeros_like(x), x).conj().imag
    assert lazy.is_neg()
    assert_same_bits(flow.log_prob(lazy).numpy(), flow.log_prob(-x.numpy()))
    with pytest.raises(ValueError, match=r"^out .*is_neg"):
        flow.log_prob(x, out=torch.complex(torch.zeros(5), torch.zeros(5)).conj().imag)


def test_subclasses_of_tensors(flow):
    torch = library("torch")
    x = torch.from_numpy(unit_data(5, SIZE, 9, "float32"))
    expected = flow.log_prob(x)
    assert torch.equal(flow.log_prob(torch.nn.Parameter(x, requires_grad=False)), expected)


DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES += ("float16", "float32", "float64", "complex64", "complex128")


@pytest.mark.parametrize("of_flow", ["float32", "float64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_means_the_same_by_dlpack(make_flow, of_flow, dtype):
    """The results or the words of the refusal that NumPy's own array of these values gets."""
    flow = make_flow(SIZE, 3, (9,), "silu", dtype=of_flow)[0]
    x = (np.arange(4 * SIZE).reshape(4, SIZE) % 5).astype(dtype)
    if np.can_cast(x.dtype, of_flow, "safe"):
        assert_same_bits(flow.log_prob(Counting(x)), flow.log_prob(x))
        return
    with pytest.raises(TypeError, match=rf"^x has dtype {dtype}, expected {of_flow}") as expected:
        flow.log_prob(x)
    with pytest.raises(TypeError) as raised:
        flow.log_prob(Counting(x))
    assert str(raised.value) == str(expected.value)


class Standard:
    """An array of a library that has the array API standard's from_dlpack, and nothing else that nvpflow knows."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __array_namespace__(self):
        return Namespace


class Namespace:
    @staticmethod
    def from_dlpack(given: np.ndarray) -> Standard:
        """Takes the memory over: what it is a part of is as large as need be."""
        whole = given.base
        assert whole.ctypes.data <= given.ctypes.data
        assert (
            given.ctypes.data + given.nbytes
            <= whole.ctypes.data + whole.nbytes
            <= whole.ctypes.data + given.nbytes + 64
        )
        return Standard(np.from_dlpack(given))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [None, 0, 1, 7, 1000])
def test_results_for_any_library_of_the_standard(make_flow, dtype, rows):
    """Taken over by its from_dlpack, whatever that does: writable, aligned as the strictest of them wants it."""
    flow = make_flow(SIZE, 3, (9,), "silu", dtype=dtype)[0]
    x = unit_data(rows or 1, SIZE, 1, dtype)
    x = x[0] if rows is None else x[:rows]
    for _ in range(8):  # wherever the memory happens to begin
        results = (*flow.forward(Standard(x)), *flow.vjp(Standard(x), x))
        for result, expected in zip(results, (*flow.forward(x), *flow.vjp(x, x)), strict=True):
            assert type(result) is Standard
            assert_same_bits(result.values, np.asarray(expected))
            assert result.values.ctypes.data % 64 == 0
            assert result.values.flags.writeable


@pytest.mark.parametrize("kind", ["memoryview", "ctypes", "array.array"])
def test_buffers(flow, kind):
    x = unit_data(4, SIZE, 10, "float32")
    if kind == "memoryview":
        given = memoryview(x)
    elif kind == "ctypes":
        given = (ctypes.c_float * SIZE * 4)(*map(tuple, x))
    else:
        given, x = array.array("f", x[0].tobytes()), x[0]
    assert_same_bits(np.asarray(flow.log_prob(given)), np.asarray(flow.log_prob(x)))
    log_prob, z = ((ctypes.c_float * 4)(), (ctypes.c_float * SIZE * 4)()) if x.ndim == 2 else (ctypes.c_float(), None)
    assert flow.log_prob(given, out=log_prob) is log_prob
    assert_same_bits(np.asarray(log_prob), np.asarray(flow.log_prob(x)))
    if z is not None:
        assert flow.inverse(given, out=z) is z
        assert_same_bits(np.asarray(z), flow.inverse(x))


def test_a_buffer_that_is_not_contiguous_is_no_output(flow):
    memory = np.full(8, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"^out is not C-contiguous"):
        flow.log_prob(unit_data(4, SIZE, 10, "float32"), out=memoryview(memory)[::2])
    assert np.isnan(memory).all()


def test_threads_share_rows_of_torch(flow):
    torch = library("torch")
    x = torch.from_numpy(unit_data(300, SIZE, 11, "float32"))
    expected = flow.log_prob(x)
    wrong: list[int] = []

    def work():
        for i in range(200):
            result = flow.log_prob(x[: 1 + i])
            if not torch.equal(result, expected[: 1 + i]):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_imported_that_the_caller_has_not(run_python):
    output = run_python(
        """
import sys
import numpy as np, nvpflow
class Foreign:
    def __dlpack_device__(self): return (1, 0)
    def __dlpack__(self, **options): return np.ones((3, 2), np.float32).__dlpack__(**options)
flow = nvpflow.build(2)
assert type(flow.log_prob(Foreign())) is np.ndarray
assert type(flow.log_prob(memoryview(np.ones((3, 2), np.float32)))) is np.ndarray
print([name for name in ("torch", "jax", "jaxlib", "cupy") if name in sys.modules])
"""
    )
    assert output.strip() == "[]"


# ---- refused by name -------------------------------------------------------------------------------------------------


def test_rows_that_require_grad_are_sent_to_the_module(flow):
    torch = library("torch")
    x = torch.zeros(3, SIZE, requires_grad=True)
    with pytest.raises(ValueError, match=r"^x requires grad.*FlowModule.*x\.detach\(\)"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match=r"^out requires grad"):
        flow.log_prob(x.detach(), out=torch.zeros(3, requires_grad=True))
    assert_same_bits(flow.log_prob(x.detach()).numpy(), flow.log_prob(np.zeros((3, SIZE), np.float32)))


@pytest.mark.parametrize("dtype", ["float64", "int32", "int64", "bfloat16", "complex64", "float8_e4m3fn"])
def test_dtypes_of_torch_that_lose_digits(make_flow, dtype):
    torch = library("torch")
    flow = make_flow(SIZE, dtype="float32")[0]
    with pytest.raises(TypeError, match=rf"^x (has|cannot).*{'' if 'float8' in dtype else dtype}"):
        flow.log_prob(torch.zeros(3, SIZE).to(getattr(torch, dtype)))


def test_the_way_out_is_written_in_the_callers_library(make_flow):
    """A flow of float64 takes what float32 loses, but no dtype beyond it."""
    wide, flow = (make_flow(SIZE, dtype=dtype)[0] for dtype in ("float64", "float32"))
    x = np.zeros((3, SIZE), np.int32)
    for name, way_out in (
        ("numpy", "z.astype(np.float32)"),
        ("torch", "z.to(torch.float32)"),
        ("jax", "z.astype(jnp.float32)"),
    ):
        given = x if name == "numpy" else to_library(name, x)
        expected = "has dtype int32, expected float32, the flow's dtype, or one that converts to it without loss; "
        with pytest.raises(TypeError) as raised:
            flow.inverse(given)
        assert str(raised.value) == f"z {expected}convert it with {way_out}"
        with pytest.raises(TypeError) as raised:
            flow.log_prob(given)
        assert str(raised.value).startswith(f"x {expected}build the flow with standardize=True")
    if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:  # elsewhere it is float64 under another name
        with pytest.raises(TypeError, match=r"convert it with x\.astype\(np\.float64\)$"):
            wide.log_prob(x.astype(np.longdouble))


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint8", "int16", "bool"])
def test_dtypes_of_torch_that_convert(flow, dtype):
    torch = library("torch")
    x = (torch.arange(3 * SIZE) % 3).reshape(3, SIZE).to(getattr(torch, dtype))
    result = flow.log_prob(x)
    assert result.dtype == torch.float32
    assert_same_bits(result.numpy(), flow.log_prob(x.numpy()))


def test_jax_without_float64_is_told_so(make_flow):
    jax = library("jax")
    flow = make_flow(SIZE, dtype="float64")[0]
    if jax.config.jax_enable_x64:
        pytest.skip("JAX has float64 on")
    with pytest.raises(TypeError, match="jax_enable_x64"):
        flow.log_prob(jax.numpy.zeros((3, SIZE)))


def test_jax_with_float64_takes_the_results_of_a_float64_flow(run_python):
    library("jax")
    output = run_python(
        """
import warnings; warnings.simplefilter("ignore")
import jax, numpy as np, nvpflow
flow = nvpflow.build(3, 2, (4,), dtype="float64")
x = np.random.default_rng(0).normal(size=(5, 3))
result = flow.log_prob(jax.numpy.asarray(x))
assert result.dtype == np.float64 and isinstance(result, jax.Array)
np.testing.assert_array_equal(np.asarray(result), flow.log_prob(x))
print("done")
""",
        env={"JAX_ENABLE_X64": "1"},
    )
    assert output == "done\n"


def test_what_has_no_memory_here(flow):
    torch = library("torch")
    for x in (torch.zeros(3, SIZE, device="meta"), torch.eye(SIZE).to_sparse()):
        with pytest.raises((TypeError, ValueError), match=r"^x\b"):
            flow.log_prob(x)


def test_read_only_outputs(flow):
    x = unit_data(3, SIZE, 12, "float32")
    locked = np.empty(3, np.float32)
    locked.flags.writeable = False
    assert_same_bits(flow.log_prob(Counting(x)), flow.log_prob(x))
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 1):  # whose capsules can say so
        with pytest.raises(ValueError, match=r"^out is read-only"):
            flow.log_prob(x, out=Counting(locked))
    jax = library("jax")
    with pytest.raises(ValueError, match=r"^out is read-only"):
        flow.log_prob(x, out=jax.numpy.zeros(3))


def test_outputs_of_torch_are_checked_as_numpys_are(flow):
    torch = library("torch")
    x = torch.from_numpy(unit_data(4, SIZE, 13, "float32"))
    for out, word in (
        (torch.empty(4, dtype=torch.float64), "dtype"),
        (torch.empty(5), "shape"),
        (torch.empty(8)[::2], "contiguous"),
        (x[0, :4], "overlap"),
        (torch.empty(4, device="meta"), "out"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^out\b.*{word}|^{word}"):
            flow.log_prob(x, out=out)


@pytest.mark.skipif(nvpflow.cuda.is_available(), reason="there is a device")
def test_arrays_of_a_device_go_to_a_flow_on_one(flow):
    class OnDevice:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **options):
            raise AssertionError("must not be asked")

    class Interface:
        __cuda_array_interface__ = {"shape": (3, SIZE), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012

    for x in (OnDevice(), Interface()):
        with pytest.raises(ValueError, match=r"^x is on a CUDA device, the flow on the CPU; move the flow"):
            flow.log_prob(x)
        with pytest.raises(ValueError, match=r"^out is .* on a CUDA device"):
            flow.log_prob(np.zeros((3, SIZE), np.float32), out=x)
        with pytest.raises(ValueError, match=r"^grad_log_prob is on a CUDA device, x in the host's memory"):
            flow.log_prob_vjp(np.zeros((3, SIZE), np.float32), x)


# ---- the DLPack protocol ---------------------------------------------------------------------------------------------


def test_versions_are_negotiated(flow):
    x = unit_data(3, SIZE, 14, "float32")
    expected = flow.log_prob(x)
    new, old = Counting(x), Counting(x, versioned=False)
    assert_same_bits(flow.log_prob(new), expected)
    assert [set(call) for call in new.calls] == [{"max_version"}]
    assert new.calls[0]["max_version"][0] == 1
    assert_same_bits(flow.log_prob(old), expected)
    assert [set(call) for call in old.calls] == [{"max_version"}, set()]


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


class Capsule:
    """An object whose capsule holds whatever the test says; counts deletions and where they happened."""

    def __init__(self, values: np.ndarray, *, versioned=False, major=1, flags=0, said=(1, 0), name=None, **changes):
        self._values, self._said, self.deleted_by = values, said, []
        shape = changes.pop("shape", values.shape)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        fields = {
            "data": values.ctypes.data, "device_type": 1, "ndim": len(shape), "code": 2, "bits": 32, "lanes": 1,
            "shape": self._shape,
        }  # fmt: skip
        tensor = Tensor(**{**fields, **changes})
        deleter = Deleter(lambda _: self.deleted_by.append(threading.get_ident()))
        if versioned:
            self._managed = ManagedVersioned(major, 0, None, deleter, flags, tensor)
        else:
            self._managed = Managed(tensor, None, deleter)
        self._name = name or (b"dltensor_versioned" if versioned else b"dltensor")

    def __dlpack_device__(self):
        return self._said

    def __dlpack__(self, **options):
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self._managed), self._name, None)


@pytest.mark.parametrize("versioned", [False, True])
def test_capsules_are_deleted_once_when_the_call_is_over(flow, versioned):
    x = unit_data(3, SIZE, 15, "float32")
    capsule = Capsule(x, versioned=versioned)
    assert_same_bits(flow.log_prob(capsule), flow.log_prob(x))
    assert capsule.deleted_by == [threading.get_ident()]
    shifted = Capsule(x, versioned=versioned, shape=(2, SIZE), byte_offset=4 * SIZE)
    assert_same_bits(flow.log_prob(shifted), flow.log_prob(x[1:]))
    empty = Capsule(x, versioned=versioned, shape=(0, SIZE), data=None)
    assert flow.log_prob(empty).shape == (0,)
    assert len(shifted.deleted_by) == len(empty.deleted_by) == 1


def test_pinned_memory_is_the_hosts(flow):
    x, out = unit_data(3, SIZE, 15, "float32"), np.zeros(3, np.float32)
    pinned = {"device_type": 3, "said": (3, 0)}
    assert_same_bits(flow.log_prob(Capsule(x, **pinned)), flow.log_prob(x))
    flow.log_prob(x, out=Capsule(out, **pinned))
    assert_same_bits(out, flow.log_prob(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"code": 4, "bits": 16}, "has dtype bfloat16"),
        ({"code": 4, "bits": 8}, "has dtype bfloat8"),
        ({"code": 10, "bits": 8}, "has a dtype that NumPy lacks"),
        ({"code": 2, "bits": 128}, "has a dtype that NumPy lacks"),
    ],
    ids=str,
)
def test_dtypes_that_numpy_lacks(flow, options, told):
    x = unit_data(3, SIZE, 15, "float32")
    message = f"^x {told}, expected float32 or float64, or a dtype that converts to the flow's without loss$"
    with pytest.raises(TypeError, match=message):
        flow.log_prob(Capsule(x, **options))


def test_the_memory_of_what_has_no_elements_is_not_looked_at(flow):
    x = unit_data(3, SIZE, 15, "float32")
    for shape in ((0, SIZE), (0,), (0, 0), (3, 0)):
        for data in (None, 8, x.ctypes.data):
            capsule = Capsule(x, shape=shape, data=data)
            if shape == (0, SIZE):
                assert flow.inverse(capsule).shape == shape
                continue
            with pytest.raises(ValueError, match=rf"^z has shape \({', '.join(map(str, shape))},?\), expected"):
                flow.inverse(capsule)


def test_as_many_axes_as_any_numpy_has(flow):
    with pytest.raises(ValueError, match=rf"^x has shape \({', '.join('1' * 32)}\), expected"):
        flow.log_prob(Capsule(np.zeros(1, np.float32), shape=(1,) * 32))


def test_one_element_needs_memory_too(flow):
    x = unit_data(1, SIZE, 15, "float32")
    message = r"^grad_log_prob\.__dlpack__\(\) gave a tensor of an impossible form$"
    with pytest.raises(TypeError, match=message):
        flow.log_prob_vjp(x, Capsule(x, shape=(1,), data=None))


def test_the_read_only_flag_is_honoured(flow):
    x = unit_data(3, SIZE, 16, "float32")
    out = Capsule(np.zeros(3, np.float32), versioned=True, flags=1)
    with pytest.raises(ValueError, match=r"^out is read-only"):
        flow.log_prob(x, out=out)
    assert len(out.deleted_by) == 1
    writable = Capsule(np.zeros(3, np.float32), versioned=True)
    assert flow.log_prob(x, out=writable) is writable
    assert_same_bits(writable._values, flow.log_prob(x))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ndim": -1}, TypeError),
        ({"ndim": 2**30}, TypeError),
        ({"shape": (1,) * 33}, TypeError),
        ({"lanes": 4}, TypeError),
        ({"lanes": 0}, TypeError),
        ({"shape": (-3, SIZE)}, TypeError),
        ({"shape": (2**62, SIZE)}, TypeError),
        ({"shape": (2**40, 2**40)}, TypeError),
        ({"data": None}, TypeError),
        ({"code": 9}, TypeError),
        ({"code": 2, "bits": 24}, TypeError),
        ({"code": 4, "bits": 16}, TypeError),
        ({"device_type": 2}, ValueError),
        ({"name": b"dltensor_of_the_future"}, TypeError),
        ({"name": b"used_dltensor"}, TypeError),
        ({"versioned": True, "major": 2}, (BufferError, TypeError)),
        ({"said": (7, 0)}, TypeError),
        ({"said": "cpu"}, TypeError),
        ({"said": None}, TypeError),
        ({"said": ()}, TypeError),
        ({"said": (2**40, 0)}, TypeError),
    ],
    ids=str,
)
def test_capsules_of_an_impossible_form(flow, options, error):
    x = unit_data(3, SIZE, 17, "float32")
    with pytest.raises(error, match=r"^x\b"):
        flow.log_prob(Capsule(x, **options))
    with pytest.raises(error, match=r"^out\b"):
        flow.log_prob(x, out=Capsule(np.zeros(3, np.float32), **options))


@pytest.mark.parametrize("answer", [None, 3, "dltensor", object()], ids=["None", "int", "str", "object"])
def test_what_is_no_capsule(flow, answer):
    class Odd:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            return answer

    with pytest.raises(TypeError, match=r"^x\.__dlpack__\(\) returned .*expected a DLPack capsule"):
        flow.log_prob(Odd())


def test_errors_of_the_producer_keep_their_cause(flow):
    class Broken:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            raise RuntimeError("the tensor is on strike")

    with pytest.raises(TypeError, match=r"^x cannot be read by DLPack") as raised:
        flow.log_prob(Broken())
    assert "on strike" in str(raised.value.__cause__)


# ---------------------------------------------------------------------------------------------- nothing silent


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own forward mode
@pytest.mark.parametrize("gradients", [True, False])
def test_a_tangent_of_pytorchs_forward_mode_is_refused(flow, gradients) -> None:
    torch = library("torch")
    forward_ad = torch.autograd.forward_ad
    x = torch.from_numpy(unit_data(4, SIZE, 0, "float32"))
    cotangent = torch.ones(4)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        dual_cotangent = forward_ad.make_dual(cotangent, torch.ones_like(cotangent))
        assert forward_ad.unpack_dual(torch.exp(dual)).tangent is not None
        for call in (
            lambda: flow.log_prob(dual),
            lambda: flow.forward(dual),
            lambda: flow.inverse(dual),
            lambda: flow.nll(dual),
            lambda: flow.nll_gradient(dual),
            lambda: flow.vjp(dual, x),
            lambda: flow.log_prob_vjp(x, dual_cotangent),
            lambda: flow.log_prob(x, out=dual_cotangent),
            lambda: flow.fit(dual, progress=False),
            lambda: flow.certify(dual),
        ):
            with pytest.raises(ValueError, match=r"has a tangent of forward-mode.*detach\(\)"):
                call()
        assert torch.equal(flow.log_prob(dual.detach()), flow.log_prob(x))  # no tangent, though a level is open


def test_pytorch_is_told_what_was_written_to_its_tensors(flow) -> None:
    torch = library("torch")
    x = torch.from_numpy(unit_data(4, SIZE, 0, "float32"))
    count = flow.num_parameters
    calls = {
        "log_prob": lambda out: flow.log_prob(x, out=out[0]),
        "forward": lambda out: flow.forward(x, out=(out[1], out[0])),
        "inverse": lambda out: flow.inverse(x, out=out[1]),
        "inverse pair": lambda out: flow.inverse(x, with_log_det=True, out=(out[1], out[0])),
        "sample": lambda out: flow.sample(4, seed=1, out=out[1]),
        "vjp": lambda out: flow.vjp(x, x, out=(out[1], out[2])),
        "log_prob_vjp": lambda out: flow.log_prob_vjp(x, torch.ones(4), out=(out[1], out[2])),
    }
    for name, call in calls.items():
        outs = [torch.ones(4), torch.ones(4, SIZE), torch.ones(count)]
        weight = torch.ones((), requires_grad=True)
        losses = [(weight * out).sum() for out in outs]  # whose backward passes need `out` as it was
        call(outs)
        written = [bool((out != 1).any()) for out in outs]
        assert any(written), name
        for out, loss, was_written in zip(outs, losses, written, strict=True):
            assert out._version == int(was_written), name
            if was_written:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
    with torch.inference_mode():  # whose tensors count no versions
        assert flow.log_prob(x, out=torch.ones(4)).shape == (4,)


@pytest.mark.parametrize("wrong", ["size", "shape", "dtype", "strides", "place", "kind"])
def test_what_a_subclass_of_tensor_allocates_is_looked_at(flow, wrong) -> None:
    torch = library("torch")
    made = {
        "size": lambda shape: torch.empty(1),
        "shape": lambda shape: torch.empty(*reversed(shape), 1),
        "dtype": lambda shape: torch.empty(shape, dtype=torch.float64),
        "strides": lambda shape: torch.empty(*shape, 2)[..., 0],
        "place": lambda shape: torch.empty(shape, device="meta"),
        "kind": lambda shape: "a tensor",
    }[wrong]

    class Liar(torch.Tensor):
        def new_empty(self, shape, **options):
            return made(shape)

    x = torch.from_numpy(unit_data(100, SIZE, 0, "float32")).as_subclass(Liar)
    for call in (flow.log_prob, flow.forward, flow.inverse, flow.nll_gradient, lambda x: flow.log_prob_vjp(x, x[:, 0])):
        with pytest.raises(TypeError, match=r"new_empty\(\) (returned an array of shape|did not return an array)"):
            call(x)


def test_a_list_that_gives_itself_is_an_answer_or_an_error(run_python) -> None:
    script = """
import nvpflow
class Liar(list):
    asked = 0
    def __iter__(self):
        Liar.asked += 1
        return iter([1.0, 2.0, 3.0, 4.0] if Liar.asked < 2 else [self, self])
flow = nvpflow.build(4, 1, (4,), standardize=False)  # takes no float64: asks whether the numbers are Python's own
assert flow.log_prob(Liar([1.0, 2.0, 3.0, 4.0])) == flow.log_prob([1.0, 2.0, 3.0, 4.0])
endless = [1.0, 2.0, 3.0]
endless.append(endless)
class Hidden(list):
    def __iter__(self):
        return iter([1.0, 2.0, 3.0, 4.0])
try:
    flow.log_prob(Hidden(endless))
except TypeError as error:
    print(error)
class Endless(type):
    @property
    def __mro__(cls):
        while True:
            yield cls
class Row(metaclass=Endless):
    def __dlpack__(self, **options):
        raise BufferError
    def __dlpack_device__(self):
        return 1, 0
try:
    flow.log_prob(Row())
except (TypeError, BufferError) as error:
    print(error)
"""
    assert len(run_python(script).splitlines()) == 2
