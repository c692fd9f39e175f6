"""Writes the golden model files of this folder and what they compute, from the published formulas alone.

Nothing here imports nvpflow or the oracle of the tests: a change of the file format or of the model that would
misread old files shows up as a difference to these bytes. The files are committed; run this only to add to them.

    golden_edifice_v0.safetensors   tensors alone, as Edifice writes them: no metadata, sorted by name, no padding
    golden_v1_f32.safetensors       format 1.0, standardize layer, odd input_size, tanh, scale_bound 2
    golden_v1_f64.safetensors       the same in float64
    golden_expected.npz             x of each in its dtype, and z, log_det and log_prob in float64: "edifice_v0_x", ..
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
ROWS = 16
DTYPE_NAMES = {np.dtype(np.float32): ("F32", "float32"), np.dtype(np.float64): ("F64", "float64")}
ACTIVATIONS = {"relu": lambda u: np.maximum(u, 0.0), "tanh": np.tanh}


def write_safetensors(path, tensors, metadata=None, alignment=1):
    """Tensors in the order given, without gaps; the header is padded with spaces to a multiple of `alignment`."""
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, value in tensors.items():
        end = offset + value.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[value.dtype][0],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def halves(input_size, swapped):
    first, second = slice(0, input_size // 2), slice(input_size // 2, input_size)
    return (second, first) if swapped else (first, second)


def make_parameters(spec, rng):
    """Random parameters in layer order, large enough that every part of the formulas counts."""
    size, dtype = spec["input_size"], spec["dtype"]
    parameters, k = {}, 0

    def add(name, *shape, spread):
        parameters[name] = rng.normal(0.0, spread, shape).astype(dtype)

    for i, layer in enumerate(spec["layers"]):
        if layer["kind"] == "standardize":
            add(f"standardize_{i}.mean", size, spread=1.0)
            add(f"standardize_{i}.log_std", size, spread=0.5)
            continue
        a, b = halves(size, layer["swapped"])
        width, outputs = a.stop - a.start, b.stop - b.start
        for j, hidden in enumerate(layer["hidden_sizes"]):
            add(f"flow_{k}_coupling_dense_{j}.kernel", width, hidden, spread=1.0 / math.sqrt(width))
            add(f"flow_{k}_coupling_dense_{j}.bias", hidden, spread=0.3)
            width = hidden
        for head in ("scale", "translation"):
            add(f"flow_{k}_{head}.kernel", width, outputs, spread=1.0 / math.sqrt(width))
            add(f"flow_{k}_{head}.bias", outputs, spread=0.3)
        k += 1
    return parameters


def forward(spec, parameters, x):
    """z [B, D] and log|det dz/dx| [B] in float64, on the parameters as they are stored."""
    p = {name: value.astype(np.float64) for name, value in parameters.items()}
    y, log_det, k = x.astype(np.float64), np.zeros(len(x)), 0
    for i, layer in enumerate(spec["layers"]):
        if layer["kind"] == "standardize":
            mean, log_std = p[f"standardize_{i}.mean"], p[f"standardize_{i}.log_std"]
            y = (y - mean) * np.exp(-log_std)
            log_det = log_det - log_std.sum()
            continue
        a, b = halves(spec["input_size"], layer["swapped"])
        g = y[:, a]
        for j in range(len(layer["hidden_sizes"])):
            dense = f"flow_{k}_coupling_dense_{j}"
            g = ACTIVATIONS[layer["activation"]](g @ p[f"{dense}.kernel"] + p[f"{dense}.bias"])
        bound = layer["scale_bound"]
        s = bound * np.tanh((g @ p[f"flow_{k}_scale.kernel"] + p[f"flow_{k}_scale.bias"]) / bound)
        t = g @ p[f"flow_{k}_translation.kernel"] + p[f"flow_{k}_translation.bias"]
        y = y.copy()
        y[:, b] = y[:, b] * np.exp(s) + t
        log_det = log_det + s.sum(axis=1)
        k += 1
    return y, log_det


def expected(name, spec, parameters, rng):
    x = rng.normal(size=(ROWS, spec["input_size"])).astype(spec["dtype"])
    z, log_det = forward(spec, parameters, x)
    log_prob = -0.5 * (spec["input_size"] * math.log(2.0 * math.pi) + (z * z).sum(axis=1)) + log_det
    return {f"{name}_x": x, f"{name}_z": z, f"{name}_log_det": log_det, f"{name}_log_prob": log_prob}


def coupling(k, hidden_sizes, activation, scale_bound):
    return {
        "kind": "coupling",
        "swapped": k % 2 == 1,
        "hidden_sizes": hidden_sizes,
        "activation": activation,
        "scale_bound": scale_bound,
    }


def main():
    rng = np.random.default_rng(20240229)
    arrays = {}

    spec = {"input_size": 6, "dtype": "float32", "layers": [coupling(k, [5], "relu", 1.0) for k in range(3)]}
    parameters = make_parameters(spec, rng)
    by_name = {name: parameters[name] for name in sorted(parameters)}
    write_safetensors(FOLDER / "golden_edifice_v0.safetensors", by_name)
    arrays |= expected("edifice_v0", spec, parameters, rng)

    for name, dtype in (("v1_f32", "float32"), ("v1_f64", "float64")):
        layers = [{"kind": "standardize"}] + [coupling(k, [4, 3], "tanh", 2.0) for k in range(2)]
        spec = {"input_size": 5, "dtype": dtype, "layers": layers}
        parameters = make_parameters(spec, rng)
        metadata = {
            "nvpflow.format_version": "1.0",
            "nvpflow.library_version": "0.1.0",
            "nvpflow.dtype": dtype,
            "nvpflow.spec": json.dumps(spec, separators=(",", ":")),
        }
        write_safetensors(FOLDER / f"golden_{name}.safetensors", parameters, metadata, alignment=64)
        arrays |= expected(name, spec, parameters, rng)

    np.savez(FOLDER / "golden_expected.npz", **arrays)


if __name__ == "__main__":
    main()
