"""Peak memory of a training step: parameter-sized arrays and one tile, whatever the batch."""

from __future__ import annotations

import json
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")

# Resets the high-water mark after everything that is not the step has been allocated and touched.
_MEASURE = """
import json, sys
import numpy as np, nvpflow
size, flows, hidden, rows, threads, what, transform = json.loads(sys.argv[1])
def status(key):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
flow = nvpflow.build(input_size=size, num_flows=flows, hidden_sizes=hidden, transform=transform, seed=1)
flow.num_threads = threads
x = np.random.default_rng(0).standard_normal((rows, size), np.float32)
small = x[:64].copy()
flow.log_prob(small)  # the runtime of the threads and the packed parameters are there before the measurement
# So is what NumPy loads when it is first asked for quantiles and random numbers: a fit looks at the data as this does.
nvpflow.check_data(small if what == "look" else x)
grad = np.ones_like(x) if what == "vjp" else None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
if what == "nll_gradient":
    flow.nll_gradient(x)
elif what == "vjp":
    flow.vjp(x, grad, np.ones(rows, np.float32))
elif what == "look":
    nvpflow.check_data(x)
else:
    flow.fit(x, validation=None, epochs=2, batch_size=min(rows, int(what)), progress=False)
print(json.dumps({"peak": status("VmHWM") - before, "parameters": 4 * flow.num_parameters}))
"""

MIB = 2**20
SIZE, HIDDEN = 16, (64,)


# Arrays of the parameters' size that live during the call, beyond the flow itself. A gradient: the result and the
# transposed weights. A fit: the parameters in training, packed and transposed, the gradient, two moments, the best yet,
# the average.
COPIES = {"nll_gradient": 2, "256": 8, "65536": 8}


def measure(
    run_python,
    flows: int,
    rows: int,
    what: str,
    threads: int = 2,
    size: int = SIZE,
    hidden: tuple[int, ...] = HIDDEN,
    transform: str = "affine",
) -> tuple[int, int]:
    """Peak growth of resident memory over the call, and the parameters' size, in bytes."""
    result = json.loads(run_python(_MEASURE, json.dumps([size, flows, hidden, rows, threads, what, transform])))
    return result["peak"], result["parameters"]


def tile(flows: int, size: int = SIZE, hidden: tuple[int, ...] = HIDDEN, rows: int = 128) -> int:
    """A tile's activations, every layer's with its cotangent, in bytes; a tile has at most 8 vectors of 16 rows."""
    return rows * 4 * flows * (2 * sum(hidden) + 6 * size)


@pytest.mark.parametrize(
    "what", ["nll_gradient", "256", "65536"], ids=["gradient", "fit of small batches", "fit of one batch"]
)
@pytest.mark.parametrize("flows", [4, 64])
def test_a_step_needs_parameters_and_a_tile(run_python, flows, what) -> None:
    threads = 2
    peak, parameters = measure(run_python, flows, 65_536, what, threads)
    # The rest: stacks, the interpreter's own arrays, the allocator's rounding.
    bound = COPIES[what] * parameters + threads * tile(flows) + 6 * MIB
    assert peak <= bound, f"{peak / MIB:.1f} MiB for {parameters / MIB:.1f} MiB of parameters"
    # What a framework would keep: every hidden activation of the batch.
    assert bound < 65_536 * sum(HIDDEN) * 4 * flows / 4


@pytest.mark.parametrize("rows", [65_536, 524_288])
def test_a_look_at_the_data_needs_a_sample_of_it(run_python, rows) -> None:
    """8,192 rows of 16 columns, in float64: the rows, those that are finite, sorted and standardized."""
    peak, _ = measure(run_python, 4, rows, "look")
    sample = (1 << 17) * 8
    assert peak <= 4.5 * sample + MIB, f"{peak / MIB:.1f} MiB"


@pytest.mark.parametrize("what", ["nll_gradient", "256"])
def test_depth_costs_parameters_and_a_tile(run_python, what) -> None:
    """The benchmark's configuration C with 64 couplings and with 8: its growth is that of COPIES and of one tile."""
    c = {"size": 64, "hidden": (256, 256)}
    (shallow, few), (deep, many) = (measure(run_python, flows, 4096, what, 1, **c) for flows in (8, 64))
    allowed = COPIES[what] * (many - few) + tile(64 - 8, **c) + 2 * MIB
    assert deep - shallow <= allowed, f"{(deep - shallow) / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"


@pytest.mark.parametrize("flows", [4, 64])
@pytest.mark.parametrize("what", ["nll_gradient", "vjp"])
@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_memory_does_not_grow_with_the_batch(run_python, flows, what, transform) -> None:
    small, _ = measure(run_python, flows, 256, what, transform=transform)
    large, _ = measure(run_python, flows, 65_536, what, transform=transform)
    # vjp returns grad_x, one array of the input's size; the log_det cotangent was allocated inside the measurement.
    results = 65_536 * (SIZE + 1) * 4 if what == "vjp" else 0
    assert large - small <= results + 4 * MIB, f"{small / MIB:.1f} MiB for 256 rows, {large / MIB:.1f} MiB for 65,536"


def test_scoring_needs_no_memory_beyond_the_result(run_python) -> None:
    script = _MEASURE.replace("flow.nll_gradient(x)", "flow.log_prob(x)")
    assert script != _MEASURE
    result = json.loads(run_python(script, json.dumps([SIZE, 8, HIDDEN, 262_144, 2, "nll_gradient", "affine"])))
    assert result["peak"] <= 262_144 * 4 + 3 * MIB
