"""Flows on a CUDA device; where there is none, on the emulated one (a build with NVPFLOW_CUDA=EMULATED)."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import nvpflow
import pytest
from nvpflow import _core
from nvpflow.layers import MLP, Affine, Coupling, ElementSpline, Spline
from oracle import unit_data

gpu = pytest.mark.gpu
BUDGET = {"float32": 1e-5, "float64": 1e-12}
# Of the log-density at data of unit scale: 11 and 8 significant bits in every factor.
MODE_BUDGET = {"tf32": 1e-2, "bfloat16": 1e-1}


def close(result, expected, dtype: str, factor: float = 1) -> bool:
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    return bool(np.all(np.abs(result - expected) <= factor * BUDGET[dtype] * (1 + np.abs(expected))))


def host(array) -> np.ndarray:
    """Any library's array as NumPy's."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np.asarray(array)
    if isinstance(array, nvpflow.cuda.DeviceArray):
        return array.numpy()
    return _core._host_array(array.detach() if hasattr(array, "detach") else array)


class InterfaceAlone:
    """A library that has __cuda_array_interface__ and nothing else."""

    def __init__(self, array, **changes):
        self._array, self._changes = array, changes

    @property
    def __cuda_array_interface__(self):
        return {**self._array.__cuda_array_interface__, **self._changes}


class UnversionedDlpack:
    """A library from before DLPack 1.0, which refuses max_version."""

    def __init__(self, array):
        self._array = array
        self.streams = []

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self._array.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.fixture
def pair(make_flow):
    """A flow on the CPU, the same one on the device, the oracle, and rows."""

    def make(dtype="float32", rows=200, **options):
        flow, oracle = make_flow(6, 3, (20,), dtype=dtype, standardize=True, kernel_scale=0.5, **options)
        return flow, flow.to("cuda"), oracle, unit_data(rows, 6, seed=5, dtype=dtype)

    return make


# ---- without a device ------------------------------------------------------------------------------------------------


def _reasons_in_child(queue):
    try:
        nvpflow.build(4, device="cuda")
        error = None
    except nvpflow.CudaError as raised:
        error = str(raised)
    queue.put((nvpflow.cuda.why_unavailable(), nvpflow.cuda.device_count(), error))


@pytest.mark.skipif(nvpflow.cuda.is_available(), reason="there is a device")
class TestWithoutDevice:
    def test_reason_is_given_once_and_everywhere(self):
        reason = nvpflow.cuda.why_unavailable()
        assert reason
        assert "\n" not in reason
        assert nvpflow.cuda.device_count() == 0
        with pytest.raises(nvpflow.CudaError) as error:
            nvpflow.build(4, device="cuda")
        assert reason in str(error.value)

    def test_every_way_to_a_device_says_so(self, tmp_path):
        flow = nvpflow.build(4)
        flow.save(tmp_path / "flow.safetensors")
        for call in (
            lambda: flow.to("cuda"),
            lambda: flow.to("cuda:1"),
            lambda: nvpflow.load(tmp_path / "flow.safetensors", device="cuda"),
            lambda: nvpflow.cuda.array(np.zeros(3)),
        ):
            with pytest.raises(nvpflow.CudaError):
                call()

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_hears_the_same_reason(self):
        reason = nvpflow.cuda.why_unavailable()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_reasons_in_child, args=(queue,))
        child.start()
        assert queue.get() == (reason, 0, f"CUDA cannot be used: {reason}")
        child.join()
        assert child.exitcode == 0

    def test_command_line_says_so(self, tmp_path):
        flow = nvpflow.build(4)
        flow.save(tmp_path / "flow.safetensors")
        command = ["sample", str(tmp_path / "flow.safetensors"), "-n", "1", "--device", "cuda"]
        result = subprocess.run([sys.executable, "-m", "nvpflow", *command], capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert "CUDA" in result.stderr


def test_names_of_devices_and_precisions_are_checked():
    for bad in ("gpu", "cuda:", "cuda:-1", "CUDA", ""):
        with pytest.raises(ValueError, match="device is"):
            nvpflow.build(4, device=bad)
    with pytest.raises(TypeError, match="device"):
        nvpflow.build(4, device=0)
    with pytest.raises(ValueError, match="precision is 'half'"):
        nvpflow.build(4, precision="half")
    with pytest.raises(ValueError, match="only CUDA devices have"):
        nvpflow.build(4, precision="tf32")


def test_a_flow_on_the_cpu_says_where_it_is():
    flow = nvpflow.build(4)
    assert (flow.device, flow.precision) == ("cpu", "float32")
    moved = flow.to("cpu")
    assert moved == flow
    assert moved is not flow
    assert "device" not in repr(flow)


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("readelf") is None, reason="needs readelf")
def test_the_extension_needs_no_library_of_cuda():
    dynamic = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]\n") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed
    known = ("libc.", "libm.", "libstdc++.", "libgcc_s.", "libpthread.", "libdl.", "librt.", "ld-linux", "libgomp.")
    assert [name for name in needed if not name.startswith(known)] == []


def test_importing_starts_no_cuda(run_python):
    script = """
        import pathlib
        import nvpflow
        nvpflow.build(4).sample(10)
        maps = pathlib.Path("/proc/self/maps")
        print(maps.exists() and "libcuda" in maps.read_text())
    """
    assert run_python(textwrap.dedent(script)).strip() == "False"


# ---- values ----------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestValues:
    def test_against_the_oracle(self, pair, dtype):
        _, flow, oracle, x = pair(dtype)
        z, log_det = flow.forward(x)
        expected_z, expected_log_det = oracle.forward(x)
        assert close(z, expected_z, dtype)
        assert close(log_det, expected_log_det, dtype)
        assert close(flow.log_prob(x), oracle.log_prob(x), dtype)
        assert close(flow.inverse(z), x, dtype)

    def test_as_on_the_cpu(self, pair, dtype):
        cpu, flow, _, x = pair(dtype)
        assert close(flow.sample(300, seed=3, start=7), cpu.sample(300, seed=3, start=7), dtype, 2)
        assert flow.nll(x) == pytest.approx(cpu.nll(x), rel=BUDGET[dtype])
        nll, gradient = flow.nll_gradient(x)
        expected_nll, expected = cpu.nll_gradient(x)
        assert nll == pytest.approx(expected_nll, rel=BUDGET[dtype])
        assert close(gradient, expected, dtype, 10)
        cotangents = unit_data(len(x), 6, seed=8, dtype=dtype), unit_data(len(x), 2, seed=9, dtype=dtype)[:, 0].copy()
        for direction in ("forward", "inverse"):
            results = flow.vjp(x, *cotangents, direction=direction)
            for result, value in zip(results, cpu.vjp(x, *cotangents, direction=direction), strict=True):
                assert close(result, value, dtype, 10 * len(x) ** 0.5)

    def test_one_row_and_none(self, pair, dtype):
        _, flow, _, x = pair(dtype)
        assert flow.log_prob(x[0]).shape == ()
        assert flow.log_prob(x[0]) == flow.log_prob(x)[0]
        assert flow.log_prob(x[:0]).shape == (0,)
        assert flow.sample(0).shape == (0, 6)
        with pytest.raises(ValueError, match="no rows"):
            flow.nll(x[:0])

    def test_chunks_of_a_long_array_do_not_show(self, pair, dtype):
        _, flow, _, x = pair(dtype, rows=3001)
        together = flow.log_prob(x)
        for start in (0, 1, 1700, 3000):
            assert np.array_equal(flow.log_prob(x[start : start + 1]), together[start : start + 1])
        samples = flow.sample(3001, seed=1)
        assert np.array_equal(samples[2000:], flow.sample(1001, seed=1, start=2000))


TWO = {"scale_network": MLP((9,), "gelu", layer_norm=True), "translation_network": MLP((5, 7), "silu")}
KINDS = {
    "lu": {"mixing": "lu", "actnorm": True, "mask": "random"},
    "layer_norm": {"layer_norm": True, "mixing": "lu"},
    "two networks": {"layers": [Coupling("odd", Affine(), **TWO), Coupling("even", Affine(), **TWO)]},
    "residual": {"network": "residual", "hidden_sizes": (12,), "activation": "gelu"},
    "context": {"context_size": 3, "standardize_context": True},
    "gates": {"network": "residual", "hidden_sizes": (12,), "context_size": 9, "mixing": "lu"},
    "splines": {"transform": "spline", "mixing": "lu", "network": "residual", "hidden_sizes": (12,)},
    "splines given a context": {"transform": "spline", "num_bins": 5, "context_size": 3, "hidden_sizes": (12,)},
    "splines of each feature": {
        "layers": [
            ElementSpline("all", Spline(3, boundary="free", tails="slope")),
            Coupling("odd", Spline(10, 2.0, boundary="free", tails="slope")),
            Coupling("even", Spline(derivative="exp", size_bound=3.0, min_derivative=0.0), inverse=True),
            ElementSpline("odd", inverse=True),
        ]
    },
}


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_and_network_as_on_the_cpu(kind, dtype):
    options = {"dtype": dtype} | KINDS[kind]
    cpu = nvpflow.build(5, **options) if "layers" in options else nvpflow.build(5, 3, **options)
    rng = np.random.default_rng(1)  # away from the identity
    moved = {n: v + rng.normal(0, 0.1, v.shape) for n, v in cpu.parameters().items() if not n.endswith(".sign")}
    cpu.set_parameters({n: moved.get(n, v).astype(dtype) for n, v in cpu.parameters().items()})
    flow, x, cotangent = cpu.to("cuda"), unit_data(300, 5, seed=2, dtype=dtype), unit_data(300, 5, seed=3, dtype=dtype)
    size = cpu.spec.context_size
    given = {"context": unit_data(300, size, seed=4, dtype=dtype)} if size else {}
    one = {"context": given["context"][0]} if size else {}
    weights, few = np.arange(300) % 5 / 2, np.arange(299, 0, -2)

    def filled(f):
        return np.full(f.num_parameters, 0.5, dtype)

    for call in (
        lambda f: [*f.forward(x, **given), f.inverse(x, **given), f.log_prob(x, **given)],
        lambda f: [f.sample(300, seed=3, **one), f.log_prob(x, **one)],
        lambda f: [*f.nll_gradient(x, **given)],
        lambda f: [*f.nll_gradient(x, weights, **given), f.nll(x, weights, **given), f.nll(x, weights, **one)],
        lambda f: [*f.nll_gradient(x, weights, index=few, total_rows=200, out=filled(f), accumulate=True, **given)],
        lambda f: [*f.vjp(x, cotangent, cotangent[:, 0].copy(), direction="inverse", **given)],
        lambda f: [*f.log_prob_vjp(x, cotangent[:, 0].copy(), **given)],
    ):
        for result, value in zip(call(flow), call(cpu), strict=True):
            assert close(np.asarray(result), np.asarray(value), dtype, 10 * len(x) ** 0.5)


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_finite_rows_are_never_nan(pair, dtype):
    cpu, cuda, _, x = pair(dtype)
    largest = np.finfo(dtype).max
    x[3::7] = largest
    x[5::7, 2] = -largest
    x[11] = np.nan
    expected = cpu.log_prob(x)
    odd = ~np.isfinite(expected)
    assert np.array_equal(cuda.log_prob(x)[odd], expected[odd], equal_nan=True)
    assert np.count_nonzero(np.isnan(expected)) == 1
    finite = np.isfinite(x).all(axis=1)
    for results in (cuda.forward(x), cuda.inverse(x, with_log_det=True)):
        for result in results:
            assert not np.isnan(result[finite]).any()
            assert np.isnan(result[11]).all()


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vector_jacobian_products_of_what_is_wanted(pair, dtype):
    cpu, flow, _, x = pair(dtype)
    cotangent = np.linspace(-1, 1, len(x)).astype(dtype)
    calls = {
        "log_prob": lambda f, **options: f.log_prob_vjp(x, cotangent, **options),
        "forward": lambda f, **options: f.vjp(x, x, cotangent, **options),
        "inverse": lambda f, **options: f.vjp(x, x, cotangent, direction="inverse", **options),
    }
    for call in calls.values():
        both, expected = call(flow), call(cpu)
        for got, want in zip(both, expected, strict=True):
            assert np.abs(got - want).max() <= 100 * BUDGET[dtype] * np.abs(want).max()
        only_x, none = call(flow, wrt="x")
        assert none is None
        assert np.array_equal(only_x, both[0])
        none, only_parameters = call(flow, wrt="parameters")
        assert none is None
        assert np.array_equal(only_parameters, both[1])
        out = np.full_like(x, np.nan), np.full(flow.num_parameters, np.nan, dtype)
        assert call(flow, out=out)[1] is out[1]
        assert np.array_equal(out[0], both[0])
    value, grads = flow._log_prob_and_vjp(x, cotangent)
    assert np.array_equal(value, flow.log_prob(x))
    assert all(map(np.array_equal, grads, flow.log_prob_vjp(x, cotangent)))


@gpu
@pytest.mark.skipif(
    nvpflow.cuda.is_available() and nvpflow.cuda.device_name() == "emulated device", reason="slow on the emulator"
)
def test_many_full_chunks(pair):
    cpu, flow, oracle, x = pair(rows=1_000_000)
    together = flow.log_prob(x)
    assert close(together, cpu.log_prob(x), "float32", 2)
    assert np.array_equal(together[777_777:], flow.log_prob(x[777_777:]))
    assert close(together[-50:], oracle.log_prob(x[-50:]), "float32")
    assert np.array_equal(flow.log_prob(nvpflow.cuda.array(x)).numpy(), together)


@gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_other_precisions_keep_their_budgets(pair, precision):
    cpu, _, oracle, x = pair()
    flow = cpu.to("cuda", precision)
    assert flow.precision == precision
    assert f"precision={precision!r}" in repr(flow)
    expected = oracle.log_prob(x)
    worst = np.max(np.abs(flow.log_prob(x) - expected) / (1 + np.abs(expected)))
    assert worst <= MODE_BUDGET[precision]
    with pytest.raises(ValueError, match="float64"):
        nvpflow.build(4, dtype="float64", device="cuda", precision=precision)


# ---- training --------------------------------------------------------------------------------------------------------


@gpu
def test_weights_of_rows_are_taken_in_chunks_and_ones_are_none(pair):
    cpu, cuda, _, _ = pair("float32")
    x = unit_data(70_000, cpu.spec.input_size, seed=5, dtype="float32")
    w = np.random.default_rng(0).gamma(1.0, size=len(x)) * (np.arange(len(x)) % 3 > 0)
    assert cuda.nll(x, w) == pytest.approx(cpu.nll(x, w), rel=1e-5)
    loss, gradient = cuda.nll_gradient(x)
    same, of_ones = cuda.nll_gradient(x, np.ones(len(x)))
    assert (same, cuda.nll(x, np.ones(len(x)))) == (loss, cuda.nll(x))
    np.testing.assert_array_equal(of_ones, gradient)
    with pytest.raises(ValueError, match="x is on a CUDA device, expected arrays of the host where rows have weights"):
        cuda.nll(nvpflow.cuda.array(x), w)


@gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fit_follows_the_cpu(dtype, weighted):
    x = 3 + 2 * unit_data(500, 4, seed=1, dtype=dtype)
    weights = np.arange(500) % 4 / 2 if weighted else None
    options = {"epochs": 3, "batch_size": 50, "clip_norm": 1.0, "weight_decay": 0.01, "progress": False}
    cpu = nvpflow.build(4, 2, (16,), standardize=True, dtype=dtype)
    cuda = cpu.to("cuda")
    options["sample_weight"] = weights
    expected, history = cpu.fit(x, **options), cuda.fit(x, **options)
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(history.train_loss, expected.train_loss, rtol=tolerance)
    np.testing.assert_allclose(history.validation_loss, expected.validation_loss, rtol=tolerance)
    np.testing.assert_allclose(history.gradient_norm, expected.gradient_norm, rtol=100 * tolerance)
    assert history.best_epoch == expected.best_epoch
    assert cuda.nll(x) == pytest.approx(cpu.nll(x), rel=tolerance)


@gpu
def test_fit_takes_device_arrays_and_checkpoints(tmp_path):
    x = unit_data(300, 4, seed=2, dtype="float32")
    options = {"batch_size": 64, "schedule": "constant", "progress": False, "validation": x[:50]}
    whole, halves, from_device = (nvpflow.build(4, 2, (8,), device="cuda") for _ in range(3))
    whole.fit(x, epochs=3, **options)
    for epochs in (1, 3):
        halves.fit(x, epochs=epochs, checkpoint=tmp_path / "checkpoint", **options)
    from_device.fit(nvpflow.cuda.array(x), epochs=3, **options)
    assert whole == halves
    assert whole == from_device


@gpu
def test_divergence_names_the_step_and_keeps_the_weights():
    flow = nvpflow.build(4, 2, (8,), device="cuda")
    before = flow._copy_flat_parameters()
    with pytest.raises(nvpflow.TrainingError, match="step"):
        flow.fit(unit_data(200, 4, seed=3, dtype="float32"), learning_rate=1e30, batch_size=20, progress=False)
    assert np.array_equal(flow._copy_flat_parameters(), before)


# ---- a flow as an object ---------------------------------------------------------------------------------------------


@gpu
def test_copies_files_and_pickles(pair, tmp_path):
    cpu, flow, _, x = pair()
    assert flow == cpu
    for other in (copy.copy(flow), copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), flow.to("cuda:0")):
        assert (other.device, other.precision) == (flow.device, flow.precision)
        assert other == flow
        assert np.array_equal(other.log_prob(x), flow.log_prob(x))
    flow.save(tmp_path / "flow.safetensors")
    cpu.save(tmp_path / "cpu.safetensors")
    assert (tmp_path / "flow.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    loaded = nvpflow.load(tmp_path / "flow.safetensors", device="cuda")
    assert loaded == flow
    assert loaded.device == "cuda:0"
    assert "device='cuda:0'" in repr(loaded)


@gpu
def test_parameters_change_for_later_calls(pair):
    cpu, flow, _, x = pair()
    for factor in (0.5, 2.0, 0.25):
        changed = {name: np.float32(factor) * value for name, value in flow.parameters().items()}
        flow.set_parameters(changed)
        cpu.set_parameters(changed)
        assert close(flow.log_prob(x), cpu.log_prob(x), "float32", 2)


@gpu
def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match="device is 'cuda:99', but this process sees"):
        nvpflow.build(4, device="cuda:99")
    with pytest.raises(ValueError, match="device is 'cuda:99'"):
        nvpflow.cuda.device_name(99)
    assert nvpflow.cuda.device_name(0)


@gpu
def test_threads_share_a_flow_while_its_parameters_change(pair):
    _, flow, _, x = pair()
    sets = [{name: np.float32(f) * v for name, v in flow.parameters().items()} for f in (1.0, 0.5)]
    expected = []
    for parameters in sets:
        flow.set_parameters(parameters)
        expected.append(flow.log_prob(x).tobytes())
    stop = threading.Event()

    def read() -> int:
        wrong = 0
        while not stop.is_set():
            wrong += flow.log_prob(x).tobytes() not in expected
        return wrong

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        for i in range(10):
            flow.set_parameters(sets[i % 2])
        stop.set()
        assert [reader.result() for reader in readers] == [0, 0, 0]


def _in_child(flow, cpu, x, queue):
    try:
        flow.log_prob(x)
        queue.put("no error")
    except nvpflow.CudaError as error:
        queue.put(str(error))
    try:
        queue.put(f"no error, {nvpflow.cuda.device_count()} devices")
    except nvpflow.CudaError as error:
        queue.put(str(error))
    queue.put(nvpflow.cuda.why_unavailable())
    queue.put(cpu.log_prob(x).tolist())


@gpu
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_the_cpu_alone(pair):
    cpu, flow, _, x = pair()
    flow.log_prob(x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(flow, cpu, x[:3], queue))
    child.start()
    for _ in ("a call", "device_count", "why_unavailable"):
        assert "CUDA was used before this process was forked" in queue.get()
    assert queue.get() == cpu.log_prob(x[:3]).tolist()
    child.join()
    assert child.exitcode == 0


@gpu
def test_out_of_memory_says_how_much_and_harms_nothing(pair, monkeypatch, tmp_path):
    _, flow, _, x = pair()
    before = flow.log_prob(x)
    if nvpflow.cuda.device_name() == "emulated device":
        monkeypatch.setenv("NVPFLOW_EMULATED_BYTES", "100000")
        with pytest.raises(MemoryError, match="bytes"):
            flow.fit(unit_data(10_000, 6, seed=1, dtype="float32"), epochs=1, progress=False)
        with pytest.raises(MemoryError, match="bytes"):
            nvpflow.cuda.array(np.zeros((10_000, 6), np.float32))
    else:
        with (tmp_path / "holes").open("wb") as file:
            file.truncate(1 << 40)  # takes no room on the disk
        rows = np.memmap(tmp_path / "holes", np.float32, "r")
        with pytest.raises(MemoryError, match="bytes"):
            nvpflow.cuda.array(rows)
    assert np.array_equal(flow.log_prob(x), before)


@gpu
def test_command_line(tmp_path):
    np.save(tmp_path / "rows.npy", unit_data(300, 4, seed=4, dtype="float32"))

    def run(*arguments):
        command = [sys.executable, "-m", "nvpflow", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300).stdout

    run("fit", "rows.npy", "-o", "m.safetensors", "--epochs", 1, "--hidden-sizes", 8, "--device", "cuda")
    run("score", "m.safetensors", "rows.npy", "-o", "cuda.npy", "--device", "cuda:0")
    run("score", "m.safetensors", "rows.npy", "-o", "cpu.npy")
    assert close(np.load(tmp_path / "cuda.npy"), np.load(tmp_path / "cpu.npy"), "float32", 2)
    run("sample", "m.safetensors", "-n", 5, "-o", "s.npy", "--device", "cuda")
    assert np.load(tmp_path / "s.npy").shape == (5, 4)


# ---- arrays on the device ------------------------------------------------------------------------------------------


def library_arrays():
    """Names of array makers; those of libraries that are not there, or see no device, skip."""
    return ["nvpflow", "interface", "unversioned", "torch", "cupy", "jax"]


def to_library(name: str, x: np.ndarray):
    if name == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device")
        return torch.from_numpy(x).cuda()
    if name == "cupy":
        cupy = pytest.importorskip("cupy")
        try:
            return cupy.asarray(x)
        except cupy.cuda.runtime.CUDARuntimeError:
            pytest.skip("CuPy sees no CUDA device")
    if name == "jax":
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("JAX sees no CUDA device")
        if x.dtype == np.float64:
            pytest.skip("JAX has float64 off")
        return jax.device_put(x)
    array = nvpflow.cuda.array(x)
    return {"nvpflow": array, "interface": InterfaceAlone(array), "unversioned": UnversionedDlpack(array)}[name]


@gpu
@pytest.mark.parametrize("library", library_arrays())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestDeviceArrays:
    def test_results_are_those_of_numpy_arrays_and_of_the_callers_kind(self, pair, library, dtype):
        _, flow, _, x = pair(dtype)
        rows = to_library(library, x)
        kind = nvpflow.cuda.DeviceArray if library in ("interface", "unversioned") else type(rows)
        z, log_det = flow.forward(rows)
        expected_z, expected_log_det = flow.forward(x)
        assert isinstance(z, kind)
        assert isinstance(log_det, kind)
        assert np.array_equal(host(z), expected_z)
        assert np.array_equal(host(log_det), expected_log_det)
        assert np.array_equal(host(flow.log_prob(rows)), flow.log_prob(x))
        assert np.array_equal(host(flow.inverse(z)), flow.inverse(expected_z))
        both = flow.inverse(z, with_log_det=True)
        assert np.array_equal(host(both[1]), flow.inverse(expected_z, with_log_det=True)[1])
        assert flow.nll(rows) == pytest.approx(flow.nll(x), rel=1e-12)

    def test_gradients(self, pair, library, dtype):
        _, flow, _, x = pair(dtype)
        rows = to_library(library, x)
        nll, gradient = flow.nll_gradient(rows)
        expected_nll, expected = flow.nll_gradient(x)
        assert nll == pytest.approx(expected_nll, rel=BUDGET[dtype])
        assert close(host(gradient), expected, dtype, 10)
        ones = np.ones(len(x), dtype)
        got = flow.vjp(rows, rows, to_library(library, ones))
        for result, value in zip(got, flow.vjp(x, x, ones), strict=True):
            assert close(host(result), value, dtype, 10 * len(x) ** 0.5)

    def test_one_row(self, pair, library, dtype):
        _, flow, _, x = pair(dtype)
        row = to_library(library, x[3].copy())
        assert host(flow.log_prob(row)).shape == ()
        assert host(flow.log_prob(row)) == flow.log_prob(x[3])

    def test_into_the_callers_memory(self, pair, library, dtype):
        if library == "jax":
            pytest.skip("JAX arrays cannot be written")
        _, flow, _, x = pair(dtype)
        rows = to_library(library, x)
        out = to_library(library, np.zeros(len(x), dtype))
        assert flow.log_prob(rows, out=out) is out
        source = out._array if hasattr(out, "_array") else out
        assert np.array_equal(host(source), flow.log_prob(x))
        sampled = to_library(library, np.zeros_like(x))
        assert flow.sample(len(x), seed=4, out=sampled) is sampled
        source = sampled._array if hasattr(sampled, "_array") else sampled
        assert np.array_equal(host(source), flow.sample(len(x), seed=4))


@gpu
class TestDeviceArrayErrors:
    def test_wrong_place(self, pair):
        cpu, flow, _, x = pair()
        rows = nvpflow.cuda.array(x)
        with pytest.raises(ValueError, match="flow on the CPU"):
            cpu.log_prob(rows)
        with pytest.raises(ValueError, match="host's memory"):
            flow.log_prob(rows, out=np.zeros(len(x), np.float32))
        with pytest.raises(TypeError, match=r"^out is list, expected an array on cuda:0"):
            flow.log_prob(rows, out=[0.0] * len(x))
        with pytest.raises(ValueError, match=r"^out is .* on a CUDA device, the input in the host's memory"):
            flow.log_prob(x, out=nvpflow.cuda.array(np.zeros(len(x), np.float32)))
        with pytest.raises(ValueError, match="in one place"):
            flow.vjp(rows, x)
        with pytest.raises(ValueError, match="in one place"):
            flow.vjp(x, rows)
        if nvpflow.cuda.device_count() > 1:
            with pytest.raises(ValueError, match="x is on cuda:1, the flow on cuda:0"):
                flow.log_prob(nvpflow.cuda.array(x, "cuda:1"))

    def test_the_second_of_two_inputs(self, pair):
        _, flow, _, x = pair()
        rows, ones = nvpflow.cuda.array(x), np.ones(len(x), np.float32)
        with pytest.raises(ValueError, match=r"^grad_log_det is on the CPU, x on cuda:0"):
            flow.vjp(rows, None, ones)
        with pytest.raises(ValueError, match=r"^grad_log_det has shape \(3,\), expected \(200,\)"):
            flow.vjp(rows, None, nvpflow.cuda.array(ones[:3]))
        with pytest.raises(ValueError, match=r"^grad_log_det is on a CUDA device, x in the host's memory"):
            flow.vjp(x, None, nvpflow.cuda.array(ones))

    def test_what_an_array_says_of_itself(self, pair):
        _, _, _, x = pair()
        array = nvpflow.cuda.array(x)
        assert repr(array) == "DeviceArray(shape=(200, 6), dtype='float32', device='cuda:0')"
        with pytest.raises(TypeError, match="another dtype than float32 or float64"):
            _core._host_array(InterfaceAlone(array, typestr="<i4"))

    def test_wrong_dtype_and_shape(self, pair):
        _, flow, _, x = pair()
        with pytest.raises(TypeError, match="x has dtype float64, expected float32"):
            flow.log_prob(nvpflow.cuda.array(x.astype(np.float64)))
        with pytest.raises(ValueError, match=r"x has shape \(200, 5\), expected \(B, 6\)"):
            flow.log_prob(nvpflow.cuda.array(x[:, :5].copy()))
        with pytest.raises(ValueError, match=r"out has shape \(3,\), expected \(200,\)"):
            flow.log_prob(nvpflow.cuda.array(x), out=nvpflow.cuda.array(np.zeros(3, np.float32)))
        with pytest.raises(TypeError, match="expected float32 or float64"):
            nvpflow.cuda.array(np.zeros(3, np.int64))

    def test_strides_and_read_only(self, pair):
        _, flow, _, x = pair()
        rows = nvpflow.cuda.array(x)
        with pytest.raises(ValueError, match="not C-contiguous"):
            flow.log_prob(InterfaceAlone(rows, strides=(4, 800)))
        result = flow.log_prob(InterfaceAlone(rows, strides=(24, 4)))
        assert np.array_equal(host(result), flow.log_prob(x))
        address = nvpflow.cuda.array(np.zeros(len(x), np.float32))
        pointer = address.__cuda_array_interface__["data"][0]
        with pytest.raises(ValueError, match="read-only"):
            flow.log_prob(rows, out=InterfaceAlone(address, data=(pointer, True)))

    def test_overlap(self, pair):
        _, flow, _, x = pair()
        rows = nvpflow.cuda.array(x)
        with pytest.raises(ValueError, match="overlaps"):
            flow.forward(rows, out=(rows, nvpflow.cuda.array(np.zeros(len(x), np.float32))))

    def test_capsules(self, pair):
        _, flow, _, x = pair()
        rows = UnversionedDlpack(nvpflow.cuda.array(x))
        flow.log_prob(rows)
        assert rows.streams == [1]  # the legacy default stream: what an unknown library means by none
        array = nvpflow.cuda.array(x)
        assert "dltensor_versioned" in repr(array.__dlpack__(max_version=(1, 0)))
        assert "dltensor_versioned" not in repr(array.__dlpack__())
        with pytest.raises(BufferError):
            array.__dlpack__(dl_device=(1, 0))
        with pytest.raises(ValueError, match="stream is 0"):
            array.__dlpack__(stream=0)

    def test_results_outlive_inputs_and_flow(self, pair):
        _, flow, _, x = pair()
        expected = flow.log_prob(x)
        result = flow.log_prob(nvpflow.cuda.array(x))
        del flow
        assert np.array_equal(result.numpy(), expected)


# ---- with PyTorch on a device ----------------------------------------------------------------------------------------


@gpu
class TestTorch:
    def test_own_stream_and_graph(self, pair):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device")
        _, flow, _, x = pair()
        expected = flow.log_prob(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            rows = torch.from_numpy(x).cuda(non_blocking=True)
            result = flow.log_prob(rows * 1)
        stream.synchronize()
        assert np.array_equal(result.cpu().numpy(), expected)

        out = torch.empty(len(x), device="cuda")
        static = torch.from_numpy(x).cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            flow.log_prob(static, out=out)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            flow.log_prob(static, out=out)
        out.fill_(float("nan"))
        static.copy_(torch.from_numpy(x[::-1].copy()))
        graph.replay()
        torch.cuda.synchronize()
        assert np.array_equal(out.cpu().numpy(), expected[::-1])

    def test_current_device_is_put_back(self, pair):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device")
        _, flow, _, x = pair()
        last = torch.cuda.device_count() - 1
        torch.cuda.set_device(last)
        flow.log_prob(x)
        assert torch.cuda.current_device() == last
        torch.cuda.set_device(0)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_module_trains_as_on_the_cpu(self, pair, dtype):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device")
        from nvpflow.torch import FlowModule

        cpu, _, _, x = pair(dtype)
        modules = FlowModule(cpu), FlowModule(cpu).cuda()
        optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in modules]
        for turn in range(3):  # the gradient is formed alone, with the value, and together with that of the rows
            rows = [torch.from_numpy(x).to(next(m.parameters()).device).requires_grad_(turn == 2) for m in modules]
            for module, optimizer, some in zip(modules, optimizers, rows, strict=True):
                optimizer.zero_grad()
                log_prob = module.log_prob(some)
                assert log_prob.device == some.device
                (-log_prob.mean()).backward()
            assert close(host(log_prob), modules[0].log_prob(rows[0]).detach().numpy(), dtype, 10)
            if turn == 2:
                assert close(host(rows[1].grad), rows[0].grad.numpy(), dtype, 10)
            trained = ([p for p in module.parameters() if p.requires_grad] for module in modules)
            for on_cpu, on_cuda in zip(*trained, strict=True):
                assert on_cuda.grad.device == on_cuda.device
                assert close(host(on_cuda.grad), on_cpu.grad.numpy(), dtype, 10)
            for optimizer in optimizers:
                optimizer.step()

    def test_gradients_wanted_by_torch_are_refused_by_torch(self, pair):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device")
        _, flow, _, x = pair()
        rows = torch.from_numpy(x).cuda().requires_grad_()
        with pytest.raises(ValueError, match=r"^x requires grad"):
            flow.log_prob(rows)


class SaysOtherwise:
    """DLPack that says a device, and then hands out an array of the host."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **_):
        return np.zeros((4, 6), np.float32).__dlpack__()


@gpu
class TestArraysThatLie:
    @pytest.fixture
    def flow(self):
        return nvpflow.build(6, 2, (8,), device="cuda")

    @pytest.fixture
    def array(self):
        return nvpflow.cuda.array(unit_data(4, 6, 0, "float32"))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"shape": (-1, 6)}, ValueError, "shape"),
            ({"shape": (2**62, 6)}, ValueError, "shape"),
            ({"data": (0, False)}, ValueError, "nowhere"),
            ({"mask": object()}, TypeError, "mask"),
        ],
    )
    def test_interface(self, flow, array, changes, error, message):
        with pytest.raises(error, match=f"^x has .*{message}"):
            flow.log_prob(InterfaceAlone(array, **changes))

    @pytest.mark.parametrize(
        "changes",
        [
            {"shape": None},
            {"shape": 24},
            {"shape": ("4", 6)},
            {"shape": (2**70, 6)},
            {"typestr": None},
            {"typestr": 4},
            {"typestr": ">f4"},
            {"typestr": "<f"},
            {"typestr": "<i4"},
            {"typestr": "<f16"},
            {"data": None},
            {"data": ()},
            {"data": (1,)},
            {"data": ("address", False)},
            {"data": (2**80, False)},
            {"strides": 4},
            {"strides": (4,)},
            {"strides": ("a", "b")},
            {"stream": 0},
            {"stream": "one"},
            {"stream": 2**80},
            {"stream": 1.5},
        ],
        ids=str,
    )
    def test_interface_of_wrong_types(self, flow, array, changes):
        with pytest.raises((TypeError, ValueError), match=r"^x\b"):
            flow.log_prob(InterfaceAlone(array, **changes))

    @pytest.mark.parametrize("says", [None, 3, [], {}, {"shape": (4, 6)}], ids=str)
    def test_no_interface(self, flow, says):
        class Odd:
            __cuda_array_interface__ = says

        with pytest.raises(TypeError, match=r"^x\b"):
            flow.log_prob(Odd())

    @pytest.mark.parametrize("stream", [0, -2, -5])
    def test_streams_that_dlpack_has_not(self, array, stream):
        with pytest.raises(ValueError, match=rf"^stream is {stream},"):
            array.__dlpack__(stream=stream)

    @pytest.mark.parametrize(
        "options", [{"stream": "1"}, {"stream": 1.5}, {"max_version": 1}, {"max_version": ("a", 0)}], ids=str
    )
    def test_dlpack_options_of_wrong_types(self, array, options):
        (name,) = options
        with pytest.raises(TypeError, match=rf"^{name} is"):
            array.__dlpack__(**options)

    @pytest.mark.parametrize("dtype", [">f4", ">f8", "float16", "int32", "complex64"])
    def test_dtypes_that_no_flow_has(self, dtype):
        with pytest.raises(TypeError, match=r"^values has dtype"):
            nvpflow.cuda.array(np.zeros(3, dtype))

    def test_misaligned(self, flow, array):
        pointer, _ = array.__cuda_array_interface__["data"]
        with pytest.raises(ValueError, match="between two"):
            flow.log_prob(InterfaceAlone(array, data=(pointer + 2, False), shape=(3, 6)))

    def test_dlpack_of_the_host(self, flow):
        with pytest.raises(ValueError, match="x is on the CPU"):
            flow.log_prob(SaysOtherwise())

    def test_an_output_on_another_device(self, flow):
        if nvpflow.cuda.device_count() < 2:
            pytest.skip("needs two devices")
        out = nvpflow.cuda.array(np.zeros((4, 6), np.float32), "cuda:1")
        with pytest.raises(ValueError, match="out is on cuda:1"):
            flow.sample(4, seed=1, out=out)

    def test_no_array_without_memory(self):
        with pytest.raises(TypeError, match=r"made by nvpflow\.cuda\.array"):
            nvpflow.cuda.DeviceArray()
        with pytest.raises(TypeError):
            nvpflow.cuda.DeviceArray.__new__(nvpflow.cuda.DeviceArray)

    def test_numpy_does_not_wrap_it(self, array):
        with pytest.raises(TypeError, match=r"copy it with \.numpy\(\)"):
            np.asarray(array)

    def test_a_device_that_is_not_there(self):
        with pytest.raises(ValueError, match="device is 'cuda:99', but this process sees"):
            nvpflow.cuda.array(np.zeros(3, np.float32), device="cuda:99")


@pytest.fixture
def _emulator() -> None:
    if nvpflow.cuda.device_name() != "emulated device":
        pytest.skip("a stream that is any number is the emulator's")


@gpu
@pytest.mark.usefixtures("_emulator")
class TestStreamsOfSeveralArrays:
    """Work of the emulated device runs only when somebody waits, so that an order nobody asked for shows as poison."""

    def test_a_second_input_is_waited_for(self):
        flow = nvpflow.build(6, 2, (8,), device="cuda")
        x = nvpflow.cuda.array(unit_data(20, 6, 0, "float32"))
        gradient, log_det = flow.forward(InterfaceAlone(x, stream=777))
        assert np.all(np.isfinite(flow.vjp(x, gradient)[0].numpy()))
        assert np.all(np.isfinite(flow.vjp(x, None, log_det)[0].numpy()))

    def test_an_output_is_seen_by_its_own_stream(self):
        flow = nvpflow.build(6, 2, (8,), device="cuda")
        x = nvpflow.cuda.array(unit_data(20, 6, 0, "float32"))
        out = nvpflow.cuda.array(np.full(20, 7, np.float32))
        flow.log_prob(InterfaceAlone(x, stream=777), out=out)
        assert np.array_equal(out.numpy(), flow.log_prob(x).numpy())


STREAM = 777  # which the emulated device takes any number for


class Lent:
    """An array as a library lends it: by DLPack, on the stream that its consumer asks for."""

    requires_grad = False

    def __init__(self, array):
        self.array, self.streams = array, []

    def is_neg(self):
        return False

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, max_version=None):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream, max_version=max_version)

    def data_ptr(self):
        return self.array.__cuda_array_interface__["data"][0]

    def get_device(self):
        return 0

    def is_contiguous(self):
        return True

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    flags = types.SimpleNamespace(c_contiguous=True)
    device = types.SimpleNamespace(id=0)

    def new_empty(self, shape, dtype):
        assert dtype == self.dtype
        return type(self)(nvpflow.cuda.array(np.full(shape, np.nan, self.array.dtype)))

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.data_ptr())

    def numpy(self) -> np.ndarray:
        """Waits for the library's stream, and for no other."""
        return _core._host_array(InterfaceAlone(self.array, stream=STREAM))


@gpu
@pytest.mark.usefixtures("_emulator")
class TestLibrariesThatAreNotThere:
    """What nvpflow asks of the libraries that have arrays of a device, of stand-ins for them on the emulated one."""

    @pytest.fixture
    def flow(self):
        return nvpflow.build(6, 2, (8,), device="cuda")

    @pytest.fixture
    def x(self):
        return unit_data(20, 6, 0, "float32")

    @pytest.fixture
    def stand_in(self, monkeypatch):
        """Puts a module in the place of a library; returns the type of its arrays."""

        def make(name, **members):
            module = types.ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
            return type("ndarray", (Lent,), {"__module__": name})

        return make

    def test_torch(self, flow, x, stand_in):
        stream = types.SimpleNamespace(cuda_stream=STREAM)
        cuda = types.SimpleNamespace(current_stream={0: stream}.__getitem__)
        written = []
        graph = types.SimpleNamespace(increment_version=written.append)
        autograd = types.SimpleNamespace(forward_ad=types.SimpleNamespace(_current_level=-1), graph=graph)
        tensor = stand_in("torch", cuda=cuda, float32="float32", autograd=autograd)
        rows = tensor(nvpflow.cuda.array(x))
        z, log_det = flow.forward(rows)
        assert rows.streams == [STREAM]
        assert type(z) is type(log_det) is tensor
        expected_z, expected_log_det = flow.forward(x)
        assert np.array_equal(z.numpy(), expected_z)
        assert np.array_equal(log_det.numpy(), expected_log_det)
        out = tensor(nvpflow.cuda.array(np.zeros(20, np.float32)))
        assert written == []
        assert flow.log_prob(rows, out=out) is out
        assert written == [out]
        assert np.array_equal(out.numpy(), flow.log_prob(x))
        assert flow.log_prob(tensor(nvpflow.cuda.array(x[3]))).numpy() == flow.log_prob(x[3])
        tensor.new_empty = lambda self, shape, dtype: tensor(nvpflow.cuda.array(np.zeros(1, dtype)))
        with pytest.raises(TypeError, match=r"x.new_empty\(\) returned an array of shape \(1,\)"):
            flow.log_prob(rows)

    def test_cupy(self, flow, x, stand_in):
        entered = []

        class Device:
            def __init__(self, index):
                self.index = index

            def __enter__(self):
                entered.append(self.index)

            def __exit__(self, *_):
                entered.remove(self.index)

        def empty(shape, dtype):
            assert entered == [0]
            if full:
                raise MemoryError("the pool is empty")
            shape = shape[:1] if short else shape
            return ndarray(nvpflow.cuda.array(np.full(shape, np.nan, dtype)))

        stream = types.SimpleNamespace(ptr=STREAM)
        cuda = types.SimpleNamespace(get_current_stream={0: stream}.__getitem__, Device=Device)
        ndarray = stand_in("cupy", cuda=cuda, empty=empty)
        full, short, rows = False, False, ndarray(nvpflow.cuda.array(x))
        result = flow.log_prob(rows)
        assert type(result) is ndarray
        assert rows.streams == [STREAM]
        assert entered == []
        assert np.array_equal(result.numpy(), flow.log_prob(x))
        short = True
        with pytest.raises(TypeError, match=r"cupy.empty\(\) returned an array of shape \(20,\)"):
            flow.forward(rows)
        full = True
        with pytest.raises(MemoryError, match=r"^the pool is empty$"):
            flow.log_prob(rows)
        assert entered == []

    def test_jax(self, flow, x, stand_in):
        taken = []
        array = stand_in("jax", dlpack=types.SimpleNamespace(from_dlpack=lambda own: taken.append(own) or "JAX's"))
        rows = array(nvpflow.cuda.array(x))
        assert flow.log_prob(rows) == "JAX's"
        assert rows.streams == [1]
        assert np.array_equal(taken[0].numpy(), flow.log_prob(x))
        with pytest.raises(ValueError, match=r"^out is read-only"):
            flow.log_prob(rows, out=array(nvpflow.cuda.array(np.zeros(20, np.float32))))
