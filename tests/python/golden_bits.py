"""What flows of the default family compute, bit for bit: results stored per instruction set, and the code to make them.

The stored results guard changes of structure: whoever moves code runs `pytest tests/python/test_golden_bits.py` and
sees whether a single bit has moved. Rows and weights come from integer arithmetic, so that no generator of random
numbers can change them. To store the results of another instruction set, or of a change that is meant to move bits:

    NVPFLOW_ISA=avx2 python tests/python/golden_bits.py --write
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import nvpflow
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "data" / "golden_bits"
ROWS = 83  # prime: whole tiles, a tile that is not full, and a few rows that are left
FEW = (1, 2, 7)  # batches on the path of a few rows
WEIGHTS_SPREAD = 1.5


def coupling(
    swapped: bool, hidden_sizes: list[int], activation: str = "relu", scale_bound: float = 1.0
) -> dict[str, Any]:
    return {
        "kind": "coupling",
        "swapped": swapped,
        "hidden_sizes": hidden_sizes,
        "activation": activation,
        "scale_bound": scale_bound,
    }


def regular(num_flows: int, hidden_sizes: list[int], *how: Any) -> list[dict[str, Any]]:
    return [coupling(k % 2 == 1, hidden_sizes, *how) for k in range(num_flows)]


STANDARDIZE = {"kind": "standardize"}
SPECS: dict[str, tuple[int, str, list[dict[str, Any]]]] = {
    "one_hidden_layer": (16, "float32", regular(4, [128])),
    "two_hidden_layers": (6, "float32", [STANDARDIZE, *regular(8, [64, 64])]),
    "odd_tanh_bound_2": (7, "float32", [STANDARDIZE, *regular(3, [33, 17], "tanh", 2.0)]),
    "no_hidden_layer": (3, "float32", regular(2, [])),
    "wide": (64, "float32", regular(2, [256, 200], "leaky_relu")),
    "gelu_float64": (5, "float64", [STANDARDIZE, *regular(4, [24, 9], "gelu", 0.5)]),
    "relu_float64": (17, "float64", regular(3, [65])),
    "couplings_differ": (
        9,
        "float32",
        [
            coupling(False, [20], "silu", 1.0),
            coupling(True, [12, 31], "softplus", 3.0),
            STANDARDIZE,
            coupling(True, [], "relu", 7.0),
            coupling(False, [16], "sigmoid", 0.25),
            coupling(True, [8], "elu", 1.0),
        ],
    ),
}


def uniform(count: int, stream: int) -> NDArray[np.float64]:
    """Numbers in [-1, 1) that look random: the finaliser of SplitMix64 on a counter, in exact integer arithmetic."""
    value = (np.arange(count, dtype=np.uint64) + np.uint64(1 + 1_000_003 * stream)) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return (value >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0  # 24 bits: exact in float32


def make_flow(name: str) -> nvpflow.Flow:
    input_size, dtype, layers = SPECS[name]
    text = json.dumps({"input_size": input_size, "dtype": dtype, "layers": layers})
    flow = nvpflow.Flow(nvpflow.FlowSpec.from_json(text))
    flow.set_parameters(
        {
            key: (uniform(value.size, 100 + at) * spread(key, value)).reshape(value.shape).astype(dtype)
            for at, (key, value) in enumerate(flow.parameters().items())
        }
    )
    return flow


def spread(key: str, value: NDArray[Any]) -> float:
    """Of a parameter's values: kernels about as large as those of trained flows, in powers of two (no rounding)."""
    if not key.endswith(".kernel"):
        return 0.25
    return WEIGHTS_SPREAD * 2.0 ** -np.ceil(np.log2(value.shape[0]) / 2)


def rows_of(flow: nvpflow.Flow, count: int, stream: int) -> NDArray[Any]:
    size = flow.spec.input_size
    return (2.0 * uniform(count * size, stream)).reshape(count, size).astype(flow.spec.dtype)


def results(name: str) -> dict[str, NDArray[Any]]:
    """Everything that the guard compares for one flow, as arrays."""
    flow = make_flow(name)
    x = rows_of(flow, ROWS, 1)
    found: dict[str, NDArray[Any]] = {}
    found["z"], found["log_det"] = flow.forward(x)
    found["x"], found["inverse_log_det"] = flow.inverse(x, with_log_det=True)
    found["log_prob"] = flow.log_prob(x)
    for few in FEW:
        found[f"log_prob_{few}"] = flow.log_prob(x[:few])
        found[f"z_{few}"], found[f"log_det_{few}"] = flow.forward(x[:few])
        found[f"x_{few}"] = flow.inverse(x[:few])
    found["one_row"] = np.asarray(flow.log_prob(x[-1]))
    found["sample"] = flow.sample(ROWS, seed=7, start=5)
    loss, found["nll_gradient"] = flow.nll_gradient(x)
    found["nll"] = np.array([loss, flow.nll(x)])
    cotangents = rows_of(flow, ROWS, 2), rows_of(flow, ROWS, 3)[:, 0].copy()
    for direction in ("forward", "inverse"):
        found[f"vjp_{direction}_x"], found[f"vjp_{direction}"] = flow.vjp(x, *cotangents, direction=direction)
    poisoned = x.copy()
    poisoned[3, 0], poisoned[50, -1] = np.nan, np.inf
    found["poisoned"] = flow.log_prob(poisoned)
    if flow.spec.dtype == "float32":
        rounded = flow.to("cpu", weights="bfloat16")
        found["bfloat16"], found["bfloat16_1"] = rounded.log_prob(x), rounded.log_prob(x[:1])
    found |= trained(flow)
    found["file"] = np.frombuffer(file_digest(make_flow(name)), np.uint8)
    return found


def trained(flow: nvpflow.Flow) -> dict[str, NDArray[Any]]:
    """Weights and losses of a short training run from the given weights, with every option written out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvpflow.DataWarning)  # few rows for so many columns
        history = flow.fit(
            rows_of(flow, 300, 4),
            validation=rows_of(flow, 40, 5),
            epochs=2,
            batch_size=64,
            learning_rate=2.0**-9,
            schedule="cosine",
            weight_decay=2.0**-7,
            clip_norm=4.0,
            averaging=None,
            seed=3,
            progress=False,
            num_threads=1,
        )
    losses = [history.train_loss, history.validation_loss, history.gradient_norm]
    return {"fit": np.concatenate([value.ravel() for value in flow.parameters().values()]), "losses": np.array(losses)}


def file_digest(flow: nvpflow.Flow) -> bytes:
    """SHA-256 of the saved file, in which the library's version is left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        flow.save(path)
        content = path.read_bytes()
    return hashlib.sha256(re.sub(rb'("nvpflow\.library_version":")[^"]*"', rb'\1"', content)).digest()


def stored(isa: str) -> Path:
    return FOLDER / f"{isa}.npz"


def digest(value: NDArray[Any]) -> NDArray[np.uint8]:
    """What is stored of an array: its bytes where they are few, else their SHA-256."""
    if value.dtype.kind == "f":
        value = np.where(np.isnan(value), value.dtype.type("nan"), value)  # which NaN it is says nothing
    content = np.ascontiguousarray(value).tobytes()
    return np.frombuffer(content if len(content) <= 1024 else hashlib.sha256(content).digest(), np.uint8)


def compute() -> dict[str, NDArray[np.uint8]]:
    return {f"{name}/{key}": digest(value) for name in SPECS for key, value in results(name).items()}


def differences() -> list[str]:
    """Names of the results that differ from the stored ones of this process's instruction set, or are not stored."""
    with np.load(stored(nvpflow.cpu_isa())) as file:
        expected = {name: file[name] for name in file.files}
    found = compute()
    missing = [f"{name} is stored and not computed" for name in expected.keys() - found.keys()]
    return sorted(missing) + [
        name for name, value in found.items() if name not in expected or not np.array_equal(value, expected[name])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store this instruction set's results")
    if parser.parse_args().write:
        FOLDER.mkdir(exist_ok=True)
        np.savez_compressed(stored(nvpflow.cpu_isa()), **compute())
    else:
        print("\n".join(differences()) or "the same bits")


if __name__ == "__main__":
    main()
