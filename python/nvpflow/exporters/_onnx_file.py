"""ONNX files of flows: written when onnxruntime has given the flow's own results."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import onnx
    import onnxruntime
except ImportError as error:
    raise ImportError(
        "nvpflow.exporters.to_onnx needs onnx, and onnxruntime to check the file: pip install onnx onnxruntime"
    ) from error

from nvpflow import _output
from nvpflow._bases import Mixture, StudentT, Uniform
from nvpflow.exporters._onnx import model_of
from nvpflow.exporters._weights import context_statistics
from nvpflow.flow import Flow

_ROWS = 256
_MOST_BYTES = 2**31 - 2**24  # of the weights in a file; the graph around them has the rest of its 2 GiB
# |onnxruntime - flow| / (1 + |flow|), beside what as small a change of the rows makes.
_TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
_SENSITIVITY = 64.0

Arrays = dict[str, NDArray[Any]]


def write(flow: Flow, path: str, method: str) -> float:
    """Write one method of a flow; return the largest difference between onnxruntime and the flow."""
    spec = flow.spec
    if (size := flow.num_parameters * np.dtype(spec.dtype).itemsize) > _MOST_BYTES:
        raise ValueError(f"flow has {size:,} bytes of weights, expected at most {_MOST_BYTES:,}: an ONNX file has 2 GB")
    target = "./-" if path == "-" else path  # which is no pipe here
    _output.check_target(target, force=True)
    model = model_of(flow, method)
    onnx.checker.check_model(model, full_check=True)
    difference = _largest_difference(flow, model, method)
    if method == "sample":  # its latents were an output for the comparison
        del model.graph.output[-1], model.graph.node[-1]
    _output.write_bytes(target, model.SerializeToString(), force=True)
    return difference


def _largest_difference(flow: Flow, model: Any, method: str) -> float:
    given = _rows(flow, method)
    found = _run(model, given)
    if method == "sample":
        given = {name: value for name, value in given.items() if name != "n"} | {"z": found.pop("z")}
        latents = given["z"]
        assert latents.shape == (_ROWS, flow.spec.input_size)
    expected, moved = _results(flow, method, given), _results(flow, method, _pushed(given))
    worst = 0.0
    for name, value in expected.items():
        difference, spread = _distance(found[name], value), _distance(moved[name], value)
        over = np.flatnonzero(~(difference <= _TOLERANCE[flow.spec.dtype] + _SENSITIVITY * spread))
        if len(over):
            i = over[0]
            raise RuntimeError(
                f"onnxruntime {onnxruntime.__version__} has {name} {found[name][i]} where the flow has {value[i]}, in "
                f"{len(over)} of {_ROWS} rows; the file is not written. Please report it with the flow's spec"
            )
        worst = max(worst, float(difference.max()))
    return worst


def _rows(flow: Flow, method: str) -> Arrays:
    """Return rows as the flow draws them, a quarter of them further out, or latents; and contexts of unit scale."""
    spec, rng, given = flow.spec, np.random.default_rng(0), {}
    if spec.context_size:
        contexts = rng.normal(size=(_ROWS, spec.context_size))
        if (statistics := context_statistics(flow)) is not None:
            mean, log_std = (values.astype(np.float64) for values in statistics)
            contexts = contexts * np.exp(log_std) + mean
        given["context"] = contexts.astype(spec.dtype)
    if method == "sample":
        return given or {"n": np.array([_ROWS])}
    z = flow._noise(_ROWS, 0)
    if method == "inverse":
        if not isinstance(spec.base, Uniform):
            z[::4] *= 2
        return {"z": z} | given
    x = flow.inverse(z, context=given.get("context"))
    x[::4] += x[::4] - x.mean(axis=0)
    return {"x": x} | given


def _pushed(given: Arrays) -> Arrays:
    """Return the same numbers up to a few units in the last place."""
    rng = np.random.default_rng(1)
    return {
        name: (value * (1 + 4 * np.finfo(value.dtype).eps * rng.choice([-1, 1], size=value.shape))).astype(value.dtype)
        for name, value in given.items()
    }


def _results(flow: Flow, method: str, given: Arrays) -> Arrays:
    """Return what the flow has for the outputs of the file."""
    context = given.get("context")
    if method == "log_prob":
        return {"log_prob": flow.log_prob(given["x"], context=context)}
    if method == "forward":
        return dict(zip(("z", "log_det"), flow.forward(given["x"], context=context), strict=True))
    x, log_det = flow.inverse(given["z"], with_log_det=True, context=context)
    if method == "inverse":
        return {"x": x, "log_det": log_det}
    if isinstance(flow.spec.base, (StudentT, Mixture)):
        return {"x": x, "log_prob": flow.log_prob(x, context=context)}
    return {"x": x, "log_prob": _log_density(flow, given["z"]) - log_det}


def _log_density(flow: Flow, z: NDArray[Any]) -> NDArray[Any]:
    size, base = flow.spec.input_size, flow.spec.base
    if isinstance(base, Uniform):
        return np.full(len(z), -size * np.log(base.high - base.low), z.dtype)
    density: NDArray[Any] = -0.5 * (size * np.log(2 * np.pi) + (z * z).sum(axis=1))
    return density


def _distance(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest |a - b| / (1 + |b|) of each row; 0 of equal infinities."""
    far: NDArray[np.float64]
    with np.errstate(invalid="ignore"):
        far = np.abs(a.astype(np.float64) - b) / (1 + np.abs(b.astype(np.float64)))
    far[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
    largest: NDArray[np.float64] = far.reshape(len(b), -1).max(axis=1)
    return largest


def _run(model: Any, given: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, given), strict=True))
    except Exception as error:  # of classes that onnxruntime does not export by name
        if isinstance(error, MemoryError):
            raise
        raise RuntimeError(
            f"onnxruntime {onnxruntime.__version__} cannot run the model: {error}; the file is not written"
        ) from error
