"""Misuse that once crashed, hung or lost something."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import nvpflow
import pytest
from nvpflow import _core


class ForgetsToInitialise(nvpflow.Flow):
    def __init__(self) -> None:  # super().__init__ is left out on purpose
        pass


def test_a_subclass_that_forgets_to_initialise_is_told():
    with pytest.raises(TypeError, match="__init__"):
        ForgetsToInitialise()


def test_an_uninitialised_flow_is_an_error_not_a_crash():
    flow = nvpflow.Flow.__new__(nvpflow.Flow)
    for use in (
        lambda: flow.num_parameters,
        lambda: flow.spec,
        lambda: flow.num_threads,
        lambda: repr(flow),
        lambda: flow.log_prob(np.zeros((1, 2), np.float32)),
        lambda: flow.nll(np.zeros((1, 2), np.float32)),
        lambda: flow.save("nowhere"),
        lambda: flow.parameters(),
        lambda: flow.fit(np.zeros((10, 2), np.float32), batch_size=5),
    ):
        with pytest.raises(TypeError, match="never initialised"):
            use()


def test_an_uninitialised_spec_is_refused():
    with pytest.raises(ValueError, match="input_size"):
        nvpflow.Flow(_core.FlowSpec.__new__(_core.FlowSpec))


def test_lists_of_numpy_numbers_keep_their_dtype():
    flow = nvpflow.build(2, standardize=False)
    rows = np.zeros((2, 2))
    for wide in ([rows[0], rows[1]], (rows[0],), [[np.float64(0), np.float64(1)]]):
        with pytest.raises(TypeError, match="float64"):
            flow.log_prob(wide)
    assert flow.log_prob([rows.astype(np.float32)[0]]).shape == (1,)
    assert flow.log_prob([[0, 1.5], [True, 2]]).shape == (2,)


def test_numbers_too_large_for_the_dtype_are_refused():
    with pytest.raises(ValueError, match="expected a number that float32 holds"):
        nvpflow.build(2, standardize=False).log_prob([[1e300, 0.0]])
    assert np.isnan(nvpflow.build(2).log_prob([[float("inf"), 0.0]])[0])
    wide = nvpflow.build(2, dtype="float64")
    assert wide.log_prob([[1e150, 0.0]]) == wide.log_prob(np.array([[1e150, 0.0]]))


def test_masked_values_do_not_come_in_as_data():
    flow = nvpflow.build(2)
    values = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="masked"):
        flow.log_prob(np.ma.masked_array(values, mask=[[0, 0], [0, 1], [0, 0]]))
    np.testing.assert_array_equal(flow.log_prob(np.ma.masked_array(values)), flow.log_prob(values))


@pytest.mark.parametrize("spoil", ["checkpoint folder", "validation", "columns"])
def test_a_fit_that_finishes_no_epoch_leaves_the_flow_as_it_was(tmp_path, spoil):
    rows = np.random.default_rng(0).normal(3.0, 2.0, size=(500, 3))
    flow = nvpflow.build(3, 2, (8,), standardize=True, dtype="float64")
    before = flow.parameters()["flow_0_scale.kernel"].copy()
    validation = np.full((1, 3), 1e200) if spoil == "validation" else None
    x = rows * [1, 1, 1e300] if spoil == "columns" else rows
    checkpoint = str(tmp_path / "missing" / "run") if spoil == "checkpoint folder" else None
    with pytest.raises((OSError, ValueError, nvpflow.TrainingError)):
        flow.fit(x, validation=validation, checkpoint=checkpoint, epochs=2, progress=False)
    assert not flow.parameters()["standardize_0.mean"].any()
    np.testing.assert_array_equal(flow.parameters()["flow_0_scale.kernel"], before)


def test_a_run_of_endless_epochs_has_a_learning_rate():
    rows = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    options = {"learning_rate": 1e-3, "callback": lambda record: False, "progress": False}
    history = nvpflow.build(3, 2, (8,)).fit(rows, epochs=2**62, **options)
    assert history.learning_rate[0] == pytest.approx(1e-3)


def _wait_for_child(pid: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 on forks beside threads: that is the test
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX on the same, where a test has imported it
@pytest.mark.parametrize("busy_with", ["log_prob", "set_parameters"])
def test_a_child_forked_while_others_work_can_do_everything(busy_with):
    flow = nvpflow.build(4, 2, (16,), seed=3)
    x = np.zeros((100_000, 4), np.float32)
    parameters = {name: value.copy() for name, value in flow.parameters().items()}
    expected = flow.log_prob(x[:10])
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if busy_with == "log_prob":
                flow.log_prob(x)
            else:
                flow.set_parameters(parameters)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    flow.set_parameters(parameters)
                    flow.nll_gradient(x)
                    flow.fit(
                        np.random.default_rng(0).normal(size=x.shape).astype(np.float32),
                        epochs=1,
                        batch_size=50_000,
                        progress=False,
                    )
                    flow.set_parameters(parameters)
                    status = 0 if np.array_equal(flow.log_prob(x[:10]), expected) else 2
                finally:
                    os._exit(status)
            assert _wait_for_child(pid, 60) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("call", ["flow.log_prob(x)", "flow.fit(x, epochs=10**6, progress=False)"])
def test_the_interpreter_can_end_while_daemon_threads_are_in_calls(call):
    script = f"""
import threading, time, numpy as np, nvpflow
flow = nvpflow.build(3, 2, (64,))
x = np.random.default_rng(0).normal(size=(100_000, 3)).astype(np.float32)
def work():
    while True:
        {call}
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_what_is_left_to_the_interpreters_end_can_use_a_flow(run_python, tmp_path) -> None:
    script = """
import sys
import numpy as np, nvpflow
class Keeper:
    def __init__(self):
        self.flow, self.rows = nvpflow.build(16, 4, (64,)), np.zeros((20_000, 16), np.float32)
    def __del__(self, path=sys.argv[1]):
        self.flow.save(path)
        self.flow.log_prob(self.rows)
        self.flow.column_names
        self.flow._copy_flat_parameters()
        print("done")
kept = Keeper()  # which goes with this module, when the interpreter has begun to end
"""
    assert run_python(script, tmp_path / "model") == "done\n"


def test_snapshots_are_whole_while_another_thread_replaces_the_parameters():
    import copy
    import pickle

    flow = nvpflow.build(16, 4, (256, 256))
    sets = [np.full(flow.num_parameters, value, np.float32) for value in (0.0, 1.0)]
    flow._set_flat_parameters(sets[0])
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for values in sets:
                flow._set_flat_parameters(values)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(60):
            for taken in (copy.copy(flow), pickle.loads(pickle.dumps(flow))):
                flat = taken._copy_flat_parameters()
                assert flat.min() == flat.max()
    finally:
        stop.set()
        thread.join()


# ------------------------------------------------------------------------------------------------- what is not taken


def test_masked_values_are_nowhere_taken_for_data() -> None:
    flow = nvpflow.build(3, 2, (8,), standardize=True)
    rows = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    hidden = np.ma.array(rows, mask=np.zeros(rows.shape, bool))
    flow.fit(hidden, epochs=1, batch_size=50, progress=False)  # nothing is masked yet
    hidden[3, 1] = np.ma.masked
    hidden.data[3, 1] = 1e6
    parameters = {name: np.ma.array(value, mask=True) for name, value in flow.parameters().items()}
    for call in (
        lambda: flow.fit(hidden, epochs=1, batch_size=50, progress=False),
        lambda: flow.fit(rows, validation=hidden, epochs=1, batch_size=50, progress=False),
        lambda: flow.log_prob(hidden),
        lambda: flow.certify(hidden),
        lambda: flow.set_parameters(parameters),
    ):
        with pytest.raises(ValueError, match="masked"):
            call()


def test_what_is_not_about_the_argument_comes_through() -> None:
    class Interrupted:
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise self.error("while converting")

    flow = nvpflow.build(4, 2, (8,))
    for error in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(error, match="while converting"):
            flow.log_prob(Interrupted(error))


NO_MEMORY = """
import _testcapi
import numpy as np, nvpflow

class Foreign:
    def __init__(self, values): self.values = values
    def __dlpack_device__(self): return (1, 0)
    def __dlpack__(self, **options): return self.values.__dlpack__(**options)

class Namespace:
    from_dlpack = staticmethod(lambda given: np.array(np.from_dlpack(given)))

class Standard(Foreign):
    def __array_namespace__(self): return Namespace

flow = nvpflow.build(3, 2, (4,))
x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
g, out, z = x[:, 0].copy(), np.empty(5, np.float32), np.empty_like(x)
listed, long = x[0].tolist(), np.tile(x, (10, 1)).tolist()
calls = {
    "an array": lambda: flow.log_prob(x),
    "one row": lambda: flow.log_prob(x[0]),
    "a list": lambda: flow.log_prob(listed),
    "a long list": lambda: flow.log_prob(long),
    "a layout to copy": lambda: flow.log_prob(x[::-1]),
    "a dtype to convert": lambda: flow.inverse(x.astype(np.float16)),
    "two results": lambda: flow.forward(x),
    "given results": lambda: flow.forward(x, out=(z, out)),
    "a buffer": lambda: flow.log_prob(memoryview(x), out=memoryview(out)),
    "DLPack": lambda: flow.log_prob(Foreign(x), out=out),
    "DLPack without elements": lambda: flow.log_prob(Foreign(x[:0])),
    "a library of the standard": lambda: flow.forward(Standard(x)),
    "gradients": lambda: flow.vjp(x, x, g),
    "a sample": lambda: flow.sample(5, seed=1),
    "the parameters": flow._flat_parameters,
    "a refused shape": lambda: flow.log_prob(x[:, :2]),
    "a refused dtype": lambda: flow.log_prob(x.astype(complex)),
    "a refused out": lambda: flow.log_prob(x, out=x[:, 0]),
}

def outcome(call):
    try:
        result = call()
    except (TypeError, ValueError) as error:
        return str(error)
    return [np.asarray(part).tobytes() for part in (result if isinstance(result, tuple) else (result,))]

arm, disarm, failures = _testcapi.set_nomemory, _testcapi.remove_mem_hooks, 0
for name, call in calls.items():
    expected = outcome(call)
    for n in range(300):
        arm(n, n + 1)
        try:
            call()
        except Exception as error:
            disarm()
            failures += isinstance(error, MemoryError)
        disarm()
        assert outcome(call) == expected, (name, n)
assert failures > 3 * len(calls)
print("done")
"""


def test_the_want_of_memory_is_an_exception_wherever_it_comes(run_python) -> None:
    """Python's n-th allocation in a call fails, for every n; the flow can be used on."""
    pytest.importorskip("_testcapi", reason="this Python was built without its test modules")
    assert run_python(NO_MEMORY) == "done\n"


def test_rows_without_room_for_a_copy_are_a_memory_error() -> None:
    flow = nvpflow.build(3, 2, (8,))
    for dtype in (np.float32, np.float16):
        with pytest.raises(MemoryError, match="Unable to allocate"):
            flow.log_prob(np.broadcast_to(np.zeros(3, dtype), (2**50, 3)))
    with pytest.raises(MemoryError, match="Unable to allocate"):
        flow.sample(2**50)
    assert flow.log_prob(np.zeros((1, 3), np.float32)).shape == (1,)


def test_a_numpy_without_its_c_interface_is_an_import_error(run_python) -> None:
    done = run_python(
        """
import sys, types
import numpy
for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
    sys.modules[name] = types.ModuleType(name)
try:
    import nvpflow
except ImportError as error:
    print(error)
"""
    )
    assert "nvpflow's compiled part cannot be imported" in done


def test_an_empty_path_is_no_checkpoint() -> None:
    flow = nvpflow.build(4, 2, (8,))
    with pytest.raises(ValueError, match="checkpoint is an empty path"):
        flow.fit(np.zeros((50, 4), np.float32), batch_size=10, checkpoint="", progress=False)
    with pytest.raises(ValueError, match=r"learning_rate is an integer of \d+ bits"):
        flow.fit(np.zeros((50, 4), np.float32), batch_size=10, learning_rate=10**400, progress=False)


def test_what_has_been_made_is_not_made_again_in_silence() -> None:
    spec = _core.FlowSpec(2)
    flow = nvpflow.Flow(spec)
    before = flow.parameters()["flow_0_scale.kernel"].copy()
    for again in (
        lambda: flow.__init__(_core.FlowSpec(5)),
        lambda: flow.__init__(flow.spec, 7),
        lambda: spec.__init__(5),
        lambda: spec.__setstate__(_core.FlowSpec(5).to_json()),
    ):
        with pytest.raises(TypeError, match="has been made already"):
            again()
    assert flow.spec == spec
    np.testing.assert_array_equal(flow.parameters()["flow_0_scale.kernel"], before)


def test_a_dtype_that_a_flow_cannot_have_is_named() -> None:
    for dtype in ("float16", np.int32, "complex64"):
        with pytest.raises(
            ValueError, match=f"dtype is '{np.dtype(dtype)}', expected one of float32, float64"
        ) as error:
            nvpflow.build(2).astype(dtype)
        assert not isinstance(error.value, nvpflow.FileFormatError)


@pytest.mark.parametrize(
    ("dtype", "tiny", "message"),
    [("float32", 1e-39, r"standard deviation too small for float32 in column 2"), ("float64", 1e-309, "in column 2")],
)
def test_a_column_too_narrow_for_the_dtype_is_named(dtype, tiny, message) -> None:
    x = np.random.default_rng(0).normal(size=(500, 3))
    x[:, 1] *= tiny
    flow = nvpflow.build(3, 2, (8,), standardize=True, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        flow.fit(x.astype(dtype), epochs=1, progress=False)
    assert not flow.parameters()["standardize_0.mean"].any()
