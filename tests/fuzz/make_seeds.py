"""Writes the inputs that the fuzzer starts from: python tests/fuzz/make_seeds.py FOLDER."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import nvpflow
from nvpflow import _core
from nvpflow import layers as L

# The run of Run in file.cpp, as checkpoint.cpp describes it.
RUN = {
    "flow": json.loads(nvpflow.FlowSpec(2, 1, (2,)).to_json()),
    "x": "100 rows with fingerprint 0000000000000007",
    "validation rows": 10,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "patience": 0,
    "validation": 0.1,
    "max_round_trip": 0.0,
    "seed": 0,
    "epochs": 100,
}
# One epoch of 3 steps: its losses, rate, norm and seconds; there is no max_round_trip.
HISTORY = (1.0, 2.0, 0.25, 1e-3, 5.0, 6.0, float("nan"))


# Every kind of layer, network and log-scale, small, and a base with numbers.
WIDE = nvpflow.FlowSpec.from_layers(
    3,
    [
        L.Standardize(),
        L.Permutation([2, 0, 1]),
        L.LULinear(),
        L.Coupling("odd", L.Affine("softsign", 2.0), L.ResidualNet(2, 1, context_gates=True, block_affines=True)),
        L.ActNorm(inverse=True),
        L.Coupling([0, 2], L.Affine("sigmoid", 2.0), L.MLP((2,), "tanh", layer_norm=True), inverse=True),
        L.Coupling("all", L.Affine("softplus"), scale_network=L.MLP(()), translation_network=L.MLP((1,))),
        L.Coupling("even", L.Additive(), L.MLP(())),
        L.Coupling([1], L.Spline(2), L.MLP((1,))),
        L.ElementSpline("odd", L.Spline(3, derivative="exp", size_bound=2.0, boundary="free", tails="slope")),
    ],
    context_size=2,
    standardize_context=True,
    base="uniform",
)


def write(path: Path, metadata: dict[str, str], tensors: list[tuple[str, str, list[int]]]) -> None:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, dtype, shape in tensors:
        count = 1
        for extent in shape:
            count *= extent
        code = "f" if dtype == "F32" else "d"
        number = 1.0 if name.endswith(".sign") else 0.25
        values = struct.pack(f"<{count}{code}", *(HISTORY if name == "history" else [number] * count))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    models = {
        "plain": nvpflow.build(2, 1, (), standardize=False),
        "deep": nvpflow.build(5, 3, (4, 3), "gelu"),
        "float64": nvpflow.build(3, 2, (2,), "tanh", dtype="float64", scale_bound=0.5, standardize=False),
    }
    models["named"] = nvpflow.build(3, 1, (), dtype="float64", standardize=False)
    models["named"].column_names = ("a", "", "\u00f6")
    for name, flow in models.items():
        flow.save(folder / name)
        dtype = "F32" if flow.spec.dtype == "float32" else "F64"
        write(folder / f"{name}_alone", {}, [(n, dtype, list(v.shape)) for n, v in flow.parameters().items()])
    metadata = {
        "nvpflow.format_version": "1.1",
        "nvpflow.dtype": "float32",
        "nvpflow.spec": WIDE.to_json(),
        "nvpflow.column_names": '["a","","\u00f6"]',
        "nvpflow.context_names": '["b","c\\"d"]',
    }
    write(folder / "wide", metadata, [(name, "F32", list(shape)) for name, shape, _ in _core._layout_of(WIDE)])
    arrays = [(name, "F32", [10]) for name in ("parameters", "best_parameters", "first_moment", "second_moment")]
    training = json.dumps({"key": RUN, "adam_steps": 3, "best_epoch": 1})
    write(
        folder / "checkpoint",
        {"nvpflow.training": training},
        [("history", "F64", [1, 7]), ("best_loss", "F64", [1]), *arrays],
    )
    # Short descriptions of much: what they name must not be built before it is known to be there.
    layers = [{"kind": "coupling", "swapped": False, "hidden_sizes": [1] * 800, "activation": "relu", "scale_bound": 1}]
    spec = json.dumps({"input_size": 2, "dtype": "float32", "layers": layers}, separators=(",", ":"))
    metadata = {"nvpflow.format_version": "1.0", "nvpflow.dtype": "float32", "nvpflow.spec": spec}
    write(folder / "many_tensors", metadata, [])
    write(folder / "many_objects", metadata | {"nvpflow.spec": "[" + ",".join(["{}"] * 1000) + "]"}, [])
    tensors = [(name, "F32", list(values.shape)) for name, values in models["plain"].parameters().items()]
    small = {
        "nvpflow.spec": models["plain"].spec.to_json(),
        "nvpflow.column_names": "[" + ",".join(['""'] * 4000) + "]",
    }
    write(folder / "many_names", metadata | small, tensors)
    deep = json.dumps({"key": {"flow": "DEEP"}, "adam_steps": 0, "best_epoch": 0})
    write(folder / "deep_checkpoint", {"nvpflow.training": deep.replace('"DEEP"', "[" * 2000 + "]" * 2000)}, [])


if __name__ == "__main__":
    main()
