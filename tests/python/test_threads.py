"""Many threads, forks and processes on one flow; the GIL; what a pickle carries."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import pickletools
import platform
import shutil
import subprocess
import sysconfig
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import nvpflow
import pytest
from oracle import assert_same_bits, random_parameters, unit_data


def weights(flow, seed: int) -> dict[str, np.ndarray]:
    shapes = {name: value.shape for name, value in flow.parameters().items()}
    return {name: value.astype(flow.spec.dtype) for name, value in random_parameters(shapes, seed).items()}


# ---------------------------------------------------------------------------------------------- threads


_MODES = """
import ctypes, sys, warnings
import numpy as np, nvpflow
from oracle import random_parameters, unit_data

warnings.simplefilter("ignore", nvpflow.DataWarning)  # rows this small are what is wanted here
if sys.argv[1] == "flush":
    import torch
    change, restore = lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)
    if not change():
        print("done")  # this processor cannot
        raise SystemExit
    restore()
else:
    libm = ctypes.CDLL(None)
    upward = {"x86_64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}[__import__("platform").machine()]
    change, restore = lambda: libm.fesetround(upward), lambda: libm.fesetround(0)

def everything(flow, threads):
    flow.num_threads = threads
    z, log_det = flow.forward(x)
    made = nvpflow.build(4, 2, (16,), seed=1, standardize=True)
    made.fit(x[:4000] * np.float32(1), epochs=2, batch_size=1500, progress=False, num_threads=threads)
    results = z, log_det, flow.log_prob(x), flow.log_prob(x[:1]), flow.inverse(x), flow.sample(3000, seed=1)
    loss, gradient = flow.nll_gradient(x)
    return repr(loss), *(r.tobytes() for r in (*results, gradient, made._copy_flat_parameters()))

if sys.argv[2] == "before":
    change()  # the threads start in it
flow = nvpflow.build(4, 2, (16,), seed=1)
parameters = random_parameters({n: v.shape for n, v in flow.parameters().items()}, 1)
x = unit_data(30_000, 4, 1, "float32")
x[::2] *= np.float32(1e-40)
parameters = {n: v.astype(np.float32) for n, v in parameters.items()}
for name in parameters:  # subnormal results of subnormal rows
    if name.endswith("translation.bias") or "dense" in name:
        parameters[name] = parameters[name] * np.float32(1e-38)
restore()
flow.set_parameters(parameters)
expected = everything(flow, 1)
if sys.argv[2] == "before":
    change()
    first = [everything(flow, t) for t in (3, 2, 1)]
    restore()
else:
    first = [everything(flow, t) for t in (2, 3)]
    change()
    first += [everything(flow, t) for t in (1, 2, 3, 2)]
    if sys.argv[1] != "flush":
        assert libm.fegetround() == upward, "the caller's mode is not the caller's any more"
    restore()
assert all(f == expected for f in first), [f == expected for f in first]
print("done")
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["flush", "round"])
def test_bits_do_not_depend_on_the_callers_floating_point_mode(run_python, what, when) -> None:
    """Other libraries change the mode of their thread; those of the pool keep the one that they were born with."""
    if what == "flush":
        pytest.importorskip("torch")
    assert run_python(_MODES, what, when).strip().endswith("done")


@pytest.mark.parametrize("rows", [1, 40, 3000], ids=["one row", "small batch", "threaded batch"])
def test_calls_see_the_old_or_the_new_parameters_whole(make_flow, rows) -> None:
    flow, _ = make_flow(12, 4, (48,), "relu", dtype="float32")
    flow.num_threads = 2
    x = unit_data(rows, 12, 1, "float32")
    sets = [weights(flow, seed) for seed in (1, 2)]

    def everything() -> bytes:
        z, log_det = flow.forward(x)
        return z.tobytes() + log_det.tobytes()

    answers = set()
    for parameters in sets:
        flow.set_parameters(parameters)
        answers.add(everything())
    assert len(answers) == 2

    done = threading.Event()
    seen: list[set[bytes]] = [set() for _ in range(4)]
    returned = []

    def reader(mine: set[bytes]) -> None:
        while not done.is_set():
            mine.add(everything())
        returned.append(mine)

    readers = [threading.Thread(target=reader, args=(mine,)) for mine in seen]
    for thread in readers:
        thread.start()
    deadline, patience = time.monotonic() + 1.5, time.monotonic() + 60
    turn = 0
    # On a busy machine until the readers have met both sets.
    while time.monotonic() < deadline or (any(len(mine) < 2 for mine in seen) and time.monotonic() < patience):
        # Each set twice: the flow keeps two copies and writes them in turn, which would else hold one set each, always.
        flow.set_parameters(sets[turn // 2 % 2])
        turn += 1
    done.set()
    for thread in readers:
        thread.join()
    assert len(returned) == 4, "a reader raised"
    for mine in seen:
        assert mine <= answers, "a result that belongs to neither set of parameters"
    assert set().union(*seen) == answers, "the readers never met the other set: the test says nothing"


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_swap_and_reload_under_load_show_one_model_or_the_other(make_flow, tmp_path, seconds) -> None:
    flow, _ = make_flow(12, 4, (48,), "relu", dtype="float32", seed=1)
    other, _ = make_flow(12, 4, (48,), "relu", dtype="float32", seed=2)
    flow.num_threads = 2
    paths = [tmp_path / "a", tmp_path / "b"]
    inputs = {rows: unit_data(rows, 12, rows, "float32") for rows in (1, 64, 3000)}
    answers: dict[int, set[bytes]] = {rows: set() for rows in inputs}
    for model, path in zip((flow, other), paths, strict=True):
        model.save(path)
        for rows, x in inputs.items():
            answers[rows].add(model.log_prob(x).tobytes())
    done = threading.Event()
    seen: dict[int, set[bytes]] = {rows: set() for rows in inputs}
    returned = []

    def reader(rows: int) -> None:
        while not done.is_set():
            seen[rows].add(flow.log_prob(inputs[rows]).tobytes())
        returned.append(rows)

    readers = [threading.Thread(target=reader, args=(rows,)) for rows in inputs]
    for thread in readers:
        thread.start()
    deadline, patience = time.monotonic() + seconds, time.monotonic() + seconds + 60
    replaced = 0
    try:
        # On a busy machine until the readers have met both models.
        while time.monotonic() < deadline or (
            any(len(mine) < 2 for mine in seen.values()) and time.monotonic() < patience
        ):
            # In threes, so that each of the two copies that a flow keeps holds now one model and now the other.
            if replaced % 3 == 0:
                flow.reload(paths[replaced // 3 % 2])
                # What is not there, or damaged, changes nothing.
                with pytest.raises(FileNotFoundError):
                    flow.reload(tmp_path / "missing")
            else:
                flow.swap(other)
            replaced += 1
    finally:
        done.set()
        for thread in readers:
            thread.join()
    assert len(returned) == len(readers), "a reader raised"
    for rows, mine in seen.items():
        assert mine <= answers[rows], f"{rows} rows: a result that belongs to neither model"
        assert mine == answers[rows], f"{rows} rows: the reader met one model alone: the test says nothing"


def test_swap_exchanges_and_reload_replaces_or_nothing_changes(make_flow, tmp_path) -> None:
    a, _ = make_flow(5, 2, (7,), dtype="float32", seed=1)
    b, _ = make_flow(5, 2, (7,), dtype="float32", seed=2)
    x = unit_data(9, 5, 1, "float32")
    of_a, of_b = a.log_prob(x), b.log_prob(x)
    a.swap(b)
    assert_same_bits(a.log_prob(x), of_b, "a")
    assert_same_bits(b.log_prob(x), of_a, "b")
    a.swap(a)
    b.save(tmp_path / "b")
    a.reload(tmp_path / "b")
    assert a == b
    wider = nvpflow.build(5, 2, (8,), standardize=False)
    wider.save(tmp_path / "wider")
    (tmp_path / "broken").write_bytes((tmp_path / "b").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^layers\[0\]\.hidden_sizes is \[8\] in other, expected \[7\]$"):
        a.swap(wider)
    with pytest.raises(nvpflow.FileFormatError, match=r"hidden_sizes is \[8\] in the file, expected \[7\]"):
        a.reload(tmp_path / "wider")
    with pytest.raises(nvpflow.FileFormatError):
        a.reload(tmp_path / "broken")
    with pytest.raises(TypeError):
        a.swap(None)
    assert_same_bits(a.log_prob(x), of_a, "a after what failed")


def _calls(flow, seed: int, seconds: float) -> int:
    x, out = unit_data(200, 16, seed, "float32"), np.empty(200, np.float32)
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        flow.log_prob(x, out=out)
        count += 1
    return count


@pytest.mark.slow
@pytest.mark.skipif(nvpflow.available_threads() < 2, reason="needs two processors")
def test_two_threads_on_one_flow_do_at_least_1_8_times_the_work_of_one(make_flow) -> None:
    flow, _ = make_flow(16, 4, (128,), dtype="float32")
    flow.num_threads = 1
    # The most calls of several tries: others may be computing here, and can only take away from each.
    alone = threads = processes = 0
    with (
        ThreadPoolExecutor(2) as pool,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as elsewhere,
    ):

        def together(first, second) -> int:
            futures = [executor.submit(_calls, flow, seed, 0.3) for seed, executor in enumerate((first, second))]
            return sum(future.result() for future in futures)

        together(elsewhere, pool)  # starts the process
        for _ in range(60):
            alone = max(alone, _calls(flow, 0, 0.3))
            threads = max(threads, together(pool, pool))
            processes = max(processes, together(elsewhere, pool))  # which share nothing: what this machine gives
            if threads >= 1.8 * alone:
                break
    if max(threads, processes) < 1.8 * alone:
        pytest.skip(f"no two processors are free: two processes do {processes / alone:.2f} times the work of one")
    assert threads >= 1.8 * alone


AVAILABLE = "import nvpflow; print(nvpflow.available_threads())"


@pytest.mark.parametrize(
    ("own", "openmp", "limit"),
    [
        (None, None, None),
        ("1", None, 1),
        (None, "1", 1),
        (None, " 1 ", 1),
        (None, "1,4", 1),
        ("1", "4", 1),  # our own counts
        ("4000", "1", None),  # also where it sets no limit
        ("", "1", 1),
        (None, "0", None),  # what OpenMP itself takes for nothing
        (None, "-2", None),
        (None, "many", None),
        (None, "1x", None),
        (None, "99999999999999999999", None),
    ],
)
def test_the_environment_bounds_the_threads(run_python, monkeypatch, own, openmp, limit) -> None:
    for name, value in (("NVPFLOW_NUM_THREADS", own), ("OMP_NUM_THREADS", openmp)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    found = int(run_python(AVAILABLE))
    monkeypatch.delenv("NVPFLOW_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert found == (limit or int(run_python(AVAILABLE)))


@pytest.mark.parametrize("value", ["0", "-1", "four", "4,2", "1.5", "99999999999999999999"])
def test_a_number_of_threads_that_is_none_is_told_when_a_flow_is_made(run_python, value) -> None:
    script = """
import nvpflow
from nvpflow._core import FlowSpec
FlowSpec(2)
for make in (lambda: nvpflow.build(2), nvpflow.available_threads):
    try:
        make()
    except RuntimeError as error:
        print(error)
"""
    told = run_python(script, env={"NVPFLOW_NUM_THREADS": value})
    assert (
        told
        == 2 * f'NVPFLOW_NUM_THREADS is "{value}", expected a whole number of threads from 1 on; change or unset it\n'
    )


def test_set_before_the_first_flow_counts_and_num_threads_wins(run_python) -> None:
    script = """
import os, nvpflow
os.environ["NVPFLOW_NUM_THREADS"] = "1"  # after the import, before the first flow
flow = nvpflow.build(2)
assert nvpflow.available_threads() == 1 and flow.num_threads == 0
os.environ["NVPFLOW_NUM_THREADS"] = "2"
assert nvpflow.available_threads() == 1
flow.num_threads = 3
assert flow.num_threads == 3
print(flow.sample(5000, seed=1).shape)
"""
    assert run_python(script) == "(5000, 2)\n"


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has its GIL")
def test_a_free_threaded_python_stays_free_threaded(run_python) -> None:
    # run_python makes the warning that a module needs the GIL an error.
    assert run_python("import sys, nvpflow; print(sys._is_gil_enabled())").strip() == "False"


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of one epoch
def test_parameters_are_views_that_outlive_the_flow(make_flow) -> None:
    flow, _ = make_flow(5, 2, (7,), dtype="float32")
    held = flow.parameters()
    new = weights(flow, 8)
    flow.set_parameters(new)
    for name, value in held.items():
        assert_same_bits(value, new[name], name)
    flow.fit(unit_data(200, 5, 2, "float32"), epochs=1, batch_size=50, progress=False)
    fitted = {name: value.copy() for name, value in flow.parameters().items()}
    assert any(np.any(fitted[name] != new[name]) for name in new)
    del flow
    gc.collect()
    for name, value in held.items():
        assert_same_bits(value, fitted[name], f"{name} after the flow is gone")


def test_every_method_at_once(make_flow) -> None:
    flow, _ = make_flow(9, 3, (30,), "gelu", dtype="float32", standardize=True)
    x = unit_data(1500, 9, 3, "float32")
    calls = {
        "forward": lambda: flow.forward(x)[0],
        "inverse": lambda: flow.inverse(x),
        "log_prob": lambda: flow.log_prob(x),
        "sample": lambda: flow.sample(700, seed=4),
        "nll_gradient": lambda: flow.nll_gradient(x)[1],
        "vjp": lambda: flow.vjp(x, x)[0],
        "pickle": lambda: pickle.loads(pickle.dumps(flow)).log_prob(x),
    }
    expected = {name: call() for name, call in calls.items()}
    with ThreadPoolExecutor(8) as pool:
        futures = [(name, pool.submit(call)) for _ in range(12) for name, call in calls.items()]
        for name, future in futures:
            assert_same_bits(future.result(), expected[name], name)


@pytest.mark.parametrize("work", ["forward", "inverse", "log_prob", "sample", "nll_gradient", "vjp", "nll"])
def test_python_runs_on_while_a_call_computes(make_flow, work) -> None:
    """A call that held the GIL would stop the counting thread from its first to its last moment."""
    flow, _ = make_flow(32, 8, (256, 256), "tanh", dtype="float64")
    flow.num_threads = 1
    rows = 20_000
    x = unit_data(rows, 32, 5)
    calls = {
        "forward": lambda: flow.forward(x),
        "inverse": lambda: flow.inverse(x),
        "log_prob": lambda: flow.log_prob(x),
        "sample": lambda: flow.sample(rows, seed=1),
        "nll_gradient": lambda: flow.nll_gradient(x),
        "vjp": lambda: flow.vjp(x, x),
        "nll": lambda: flow.nll(x),
    }
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    clock = threading.Thread(target=tick)
    clock.start()
    try:
        start = time.monotonic()
        calls[work]()
        end = time.monotonic()
    finally:
        stop.set()
        clock.join()
    inside = [t for t in ticks if start < t < end]
    # A call that keeps the GIL leaves at most a tick at each end; on a busy machine the ticks are few.
    assert len(inside) > 3


HELD = """
import copy, ctypes, pickle, sys
import numpy as np, nvpflow

preloaded = ctypes.CDLL(None)
preloaded.gil_disarm.restype = ctypes.c_long

def held(call):
    "Copies and frees of 1 MB or more, and locks taken, while this thread held the GIL."
    call()
    preloaded.gil_arm(ctypes.c_size_t(1 << 20))
    result = call()
    frees, locks = ctypes.c_long(), ctypes.c_long()
    copies = preloaded.gil_disarm(ctypes.byref(frees), ctypes.byref(locks))
    del result
    return copies, frees.value, locks.value

bits = bytearray(1 << 21)
assert held(lambda: bytes(bits))[0] == 1  # it counts
assert held(lambda: len(bytearray(1 << 21)))[1] == 1
flow, other = nvpflow.build(64, 2, (800, 800)), nvpflow.build(64, 2, (800, 800), seed=1)
flow.column_names = [f"c{i}" for i in range(64)]
flow.save(sys.argv[1])
values = {name: value.copy() for name, value in flow.parameters().items()}
flat = flow._copy_flat_parameters()
x = np.zeros((3, 64), np.float32)
names = flow.column_names
pickled = {protocol: pickle.dumps(flow, protocol) for protocol in (4, 5)}
many = [copy.copy(flow) for _ in range(3)]
calls = {
    "build": lambda: nvpflow.build(64, 2, (800, 800)),
    "load": lambda: nvpflow.load(sys.argv[1]),
    "reload": lambda: flow.reload(sys.argv[1]),
    "save": lambda: flow.save(sys.argv[1]),
    "copy": lambda: copy.copy(flow),
    "to": lambda: flow.to("cpu"),
    "astype": lambda: flow.astype("float64"),
    "==": lambda: flow == flow,
    "reduce": lambda: flow.__reduce__(),
    "dumps": lambda: pickle.dumps(flow, 4),
    "dumps 5": lambda: pickle.dumps(flow, 5),
    "loads": lambda: pickle.loads(pickled[4]),
    "loads 5": lambda: pickle.loads(pickled[5]),
    "destroy": lambda: many.pop() and None,
    "set_parameters": lambda: flow.set_parameters(values),
    "set_flat": lambda: flow._set_flat_parameters(flat),
    "has_flat": lambda: flow._has_flat_parameters(flat),
    "swap": lambda: flow.swap(other),
    "parameters": lambda: flow.parameters(),
    "repr": lambda: repr(flow),
    "names": lambda: flow.column_names,
    "set names": lambda: setattr(flow, "column_names", names),
    "nll_gradient": lambda: flow.nll_gradient(x),
}
for name, call in calls.items():
    found = held(call)
    # NumPy converts, and frees what it has converted.
    if found != (0, 0, 0) and (name, found[::2]) != ("astype", (0, 0)):
        print(name, *found)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None or bool(os.environ.get("NVPFLOW_SANITIZED")),
    reason="preloads a library made by cc under the functions of glibc",
)
@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="there is no GIL")
def test_nothing_long_is_done_under_the_gil(run_python, tmp_path) -> None:
    """Copies of the parameters, and waits for a thread that sets them, let other threads of Python run."""
    library = tmp_path / "gil.so"
    source = Path(__file__).parent / "preloaded" / "gil.c"
    flags = ["-O1", "-fno-builtin", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, source], check=True)
    assert run_python(HELD, tmp_path / "model", env={"LD_PRELOAD": str(library)}) == ""


@pytest.mark.filterwarnings("ignore:the flow is worse than a Gaussian")  # of five epochs
def test_python_runs_on_while_a_flow_is_fitted(make_flow) -> None:
    flow, _ = make_flow(16, 4, (128, 128), "tanh", dtype="float32")
    x = unit_data(20_000, 16, 6, "float32")
    counted = 0
    fitted = threading.Event()

    def train() -> None:
        flow.fit(x, epochs=5, progress=False)
        fitted.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    while not fitted.is_set() and trainer.is_alive():
        counted += 1
        time.sleep(0.002)
    trainer.join()
    assert fitted.is_set()
    assert counted > 3


# ---------------------------------------------------------------------------------------------- processes

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this system")


@needs_fork
def test_a_forked_child_computes_the_same_and_exits(run_python) -> None:
    """libgomp's threads do not survive a fork: a child that waited for them would hang."""
    output = run_python(
        """
import os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads
import numpy as np, nvpflow
warnings.simplefilter("ignore", nvpflow.DataWarning)  # one epoch is worse than a Gaussian
flow = nvpflow.build(input_size=16, num_flows=4, hidden_sizes=(64,), seed=1)
flow.num_threads = 2
x = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
expected = flow.forward(x)[0], flow.nll_gradient(x)[1]
child = os.fork()
if child == 0:
    signal.alarm(40)  # a hang ends as a failure
    same = np.array_equal(flow.forward(x)[0], expected[0]) and np.array_equal(flow.nll_gradient(x)[1], expected[1])
    flow.num_threads = 4
    same = same and np.array_equal(flow.forward(x)[0], expected[0])
    history = flow.fit(x[:2000], epochs=1, progress=False)
    grandchild = os.fork()
    if grandchild == 0:
        flow.forward(x)
        os._exit(0)
    _, status = os.waitpid(grandchild, 0)
    os._exit(0 if same and len(history.epoch) == 1 and status == 0 else 3)
_, status = os.waitpid(child, 0)
after = np.array_equal(flow.forward(x)[0], expected[0])
print(status, after)
"""
    )
    assert output.split() == ["0", "True"]


@needs_fork
def test_a_child_can_be_the_first_to_compute(run_python) -> None:
    output = run_python(
        """
import os, signal, numpy as np, nvpflow
flow = nvpflow.build(input_size=16, num_flows=4, hidden_sizes=(64,), seed=1)
flow.num_threads = 2
x = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
child = os.fork()  # before any call: no thread has been started yet
if child == 0:
    signal.alarm(40)
    flow.log_prob(x)
    flow.nll_gradient(x)
    flow.swap(nvpflow.build(input_size=16, num_flows=4, hidden_sizes=(64,), seed=2))
    os._exit(0)
print(os.waitpid(child, 0)[1], np.isfinite(flow.log_prob(x)).all())
"""
    )
    assert output.split() == ["0", "True"]


def _score(flow, x):
    return flow.log_prob(x), flow.num_threads


@pytest.mark.parametrize("method", [m for m in ("spawn", "forkserver") if m in multiprocessing.get_all_start_methods()])
def test_a_flow_travels_to_another_process(make_flow, method) -> None:
    flow, _ = make_flow(6, 2, (9,), "elu", dtype="float32", standardize=True)
    flow.num_threads = 2
    x = unit_data(50, 6, 7, "float32")
    with multiprocessing.get_context(method).Pool(1) as pool:
        log_prob, threads = pool.apply(_score, (flow, x))
    assert_same_bits(log_prob, flow.log_prob(x), method)
    assert threads == 2


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pickle_carries_the_whole_model(make_flow, dtype, protocol) -> None:
    flow, _ = make_flow(5, 3, (7, 6), "softplus", dtype=dtype, standardize=True, scale_bound=1.5)
    flow.num_threads = 3
    again = pickle.loads(pickle.dumps(flow, protocol))
    assert type(again) is type(flow)
    assert again == flow
    assert again.spec == flow.spec
    assert again.num_threads == 3
    x = unit_data(33, 5, 8, dtype)
    assert_same_bits(again.log_prob(x), flow.log_prob(x), "log_prob")
    again.set_parameters(weights(again, 9))
    assert again != flow


def test_a_pickle_names_public_modules() -> None:
    """Files of older versions name `nvpflow.flow._unpickle`, and those of this one do so too."""
    flow = nvpflow.build(2, 1, (3,))
    named = {argument for _, argument, _ in pickletools.genops(pickle.dumps(flow)) if isinstance(argument, str)}
    assert {name for name in named if name.startswith("nvpflow")} == {"nvpflow.flow"}
    assert {"Flow", "_unpickle"} <= named
    state = flow.__reduce__()[1]
    assert nvpflow.flow._unpickle(*state) == flow
    assert nvpflow.flow._unpickle(*state[:4]) == flow  # as versions without devices, names and thresholds wrote it
    whole = flow._copy_flat_parameters()  # as versions that wrote the weights as one array
    assert nvpflow.flow._unpickle(*state[:2], whole, *state[3:]) == flow
    with pytest.raises(ValueError, match=r"the pickle holds 0 bytes of weights, expected \d+"):
        nvpflow.flow._unpickle(*state[:2], (), *state[3:])


@pytest.mark.parametrize(
    ("place", "odd", "message"),
    [
        (0, 5, r"the pickled class is 5 \(int\), expected nvpflow\.Flow"),
        (1, 5, r"the pickled spec is 5 \(int\), expected a string"),
        (2, None, r"the pickled array of weights is None \(NoneType\), expected an array \(\d+,\) of float32"),
        (2, np.zeros(3), r"the pickled array of weights has shape \(3,\) and dtype float64, expected an array"),
        (2, ("a",), r"the pickled weights hold 'a' \(str\), expected bytes"),
        (2, (bytes(1 << 20),), r"the pickle holds 1048576 bytes of weights, expected \d+"),
        (3, "two", r"the pickled num_threads is 'two' \(str\), expected an integer"),
        (4, None, r"device is None \(NoneType\), expected a string"),
        (7, [1], r"the pickled column_names\[0\] is 1 \(int\), expected a string"),
        (8, 5, r"the pickled threshold is 5 \(int\), expected \(log_p, quantile\) or None"),
        (8, ("low", None), r"the pickled threshold's log_p is 'low' \(str\), expected a real number"),
        (8, (1.0, "one"), r"the pickled threshold's quantile is 'one' \(str\), expected a real number"),
        (9, None, r"standardize is None \(NoneType\), expected a string"),
        (
            10,
            np.zeros(3),
            r"the pickled mean_low has shape \(3,\) and dtype float64, expected an array \(2,\) of float32",
        ),
    ],
)
def test_an_odd_pickle_of_a_flow_is_refused(place, odd, message) -> None:
    state = list(nvpflow.build(2, 1, (3,)).__reduce__()[1])
    state[place] = odd
    with pytest.raises((TypeError, ValueError), match=message):
        nvpflow.flow._unpickle(*state)


def test_an_odd_pickle_of_a_spec_is_refused() -> None:
    with pytest.raises(TypeError, match=r"the pickled FlowSpec is 5 \(int\), expected a string"):
        nvpflow.FlowSpec.__new__(nvpflow.FlowSpec).__setstate__(5)
    with pytest.raises(nvpflow.FileFormatError, match="input_size is missing"):
        nvpflow.FlowSpec.__new__(nvpflow.FlowSpec).__setstate__("{}")


def test_a_spec_can_be_pickled_hashed_and_compared() -> None:
    spec = nvpflow.FlowSpec(5, 3, (7, 6), "silu", 1.5, True, "float64")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert nvpflow.FlowSpec.from_json(spec.to_json()) == spec
    assert len({spec, nvpflow.FlowSpec(5, 3, (7, 6), "silu", 1.5, True, "float64")}) == 1
    assert spec != nvpflow.FlowSpec(5, 3, (7, 6), "silu", 1.5, True, "float32")
    assert spec != "spec"
