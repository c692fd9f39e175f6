"""In one process with other libraries that bring threads and runtimes of their own, and with the caller's settings."""

from __future__ import annotations

import importlib.util
import platform

import pytest

# One script for all: the other library first or second, threads of both, then a forked child that uses both again.
_TOGETHER = """
import json, os, sys, threading, warnings
warnings.simplefilter("ignore")  # what the other library warns of is not the point
first, other = sys.argv[1:3]

def use_torch():
    import torch
    total = float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())
    return total, torch.get_num_threads(), torch.get_num_interop_threads()

def use_onnxruntime():
    import onnxruntime
    return onnxruntime.get_available_providers(), onnxruntime.SessionOptions().intra_op_num_threads

def use_sklearn():
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.ensemble import IsolationForest
    x = np.random.default_rng(0).normal(size=(2000, 4))
    centres = KMeans(4, n_init=1, random_state=0).fit(x).cluster_centers_
    return centres.shape, len(IsolationForest(n_estimators=20, n_jobs=2, random_state=0).fit(x).predict(x[:5]))

def use_numba():
    import numba, numpy as np
    @numba.njit(parallel=True)
    def total(x):
        s = 0.0
        for i in numba.prange(x.size):
            s += x[i]
        return s
    return float(total(np.ones(10_000))), numba.get_num_threads()

def use_jax():
    import jax.numpy as jnp
    return float(jnp.ones((300, 300)).sum())

def use_nvpflow():
    import numpy as np, nvpflow
    flow = nvpflow.build(8, 2, (32,), seed=1)
    flow.num_threads = 2
    x = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float32)
    total = float(flow.log_prob(x).astype(np.float64).sum())
    flow.fit(x[:2000], epochs=1, progress=False)
    return total

uses = {"nvpflow": use_nvpflow, "other": globals()["use_" + other]}
order = ["nvpflow", "other"] if first == "nvpflow" else ["other", "nvpflow"]
expected = {name: json.dumps(uses[name]()) for name in order}
again = {name: json.dumps(uses[name]()) for name in order}
assert again == expected, (expected, again)

failed = []
def check(name):
    if json.dumps(uses[name]()) != expected[name]:
        failed.append(name)
threads = [threading.Thread(target=check, args=(name,)) for name in order * 2]
[t.start() for t in threads]
[t.join() for t in threads]
assert not failed, failed

child = os.fork() if sys.argv[3] == "fork" else None
if child == 0:
    # What the other library can do in a child of a process with threads is its own affair; nvpflow works.
    os._exit(0 if json.dumps(use_nvpflow()) == expected["nvpflow"] else 1)
if child is not None:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert {name: json.dumps(uses[name]()) for name in order} == expected
print("done")
"""


@pytest.mark.parametrize("first", ["nvpflow", "other"], ids=["imported before", "imported after"])
@pytest.mark.parametrize("library", ["torch", "onnxruntime", "sklearn", "numba", "jax"])
def test_other_libraries_with_threads(run_python, library, first) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    assert run_python(_TOGETHER, first, library, "fork", timeout=300).strip() == "done"


def test_thread_counts_of_others_stay(run_python) -> None:
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    script = """
import os
import numpy as np
from threadpoolctl import threadpool_info
np.ones((300, 300)) @ np.ones((300, 300))
environment, before = dict(os.environ), threadpool_info()
import nvpflow
flow = nvpflow.build(8, 2, (32,))
flow.num_threads = 2
flow.log_prob(np.ones((20_000, 8), np.float32))
assert threadpool_info() == before, (before, threadpool_info())  # no runtime of ours in it, either
assert dict(os.environ) == environment
print("done")
"""
    assert run_python(script).strip() == "done"


# Machine code that returns the register which holds rounding, masks and flush-to-zero.
_READ_CONTROL = {
    "x86_64": "0fae5c24fc8b4424fcc3",  # stmxcsr [rsp-4]; mov eax, [rsp-4]; ret
    "aarch64": "00443bd5c0035fd6",  # mrs x0, fpcr; ret
}


@pytest.mark.skipif(platform.machine() not in _READ_CONTROL, reason="the register is read on x86-64 and aarch64")
def test_the_floating_point_mode_stays_as_the_caller_set_it(run_python) -> None:
    """Read before and after every kind of call, under the default mode and under one that flushes to zero."""
    script = """
import ctypes, mmap, sys
import numpy as np
code = bytes.fromhex(sys.argv[1])
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(code)
read = ctypes.CFUNCTYPE(ctypes.c_uint32)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
flags = 0x3F if len(code) == 10 else 0  # MXCSR's lowest bits tell what happened, not what shall happen
mode = lambda: read() & ~flags
before = mode()
assert before == (0x1F80 if flags else before)
import nvpflow
assert mode() == before, "import"
for dtype in ("float32", "float64"):
    flow = nvpflow.build(8, 2, (32,), "gelu", dtype=dtype)
    flow.num_threads = 2
    x = np.random.default_rng(0).normal(size=(5000, 8)).astype(dtype) * 1e-30
    for rows in (1, 7, 5000):
        for name, call in {
            "log_prob": lambda: flow.log_prob(x[:rows]),
            "inverse": lambda: flow.inverse(x[:rows]),
            "sample": lambda: flow.sample(rows, seed=1),
            "gradient": lambda: flow.nll_gradient(x[:rows]),
        }.items():
            call()
            assert mode() == before, name
    flow.fit(x[:1000] * 1e30, epochs=1, progress=False)
    assert mode() == before, "fit"
print("done")
"""
    assert run_python(script, _READ_CONTROL[platform.machine()]).strip() == "done"
