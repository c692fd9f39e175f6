"""The flow as an ONNX model, for the runtimes that read one. Both heads are one matrix; the batch size is fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

OPSET = 18


class _Graph:
    """Nodes and constants under generated names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        from onnx import helper

        names = [f"n{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        return self.node("Split", value, self.constant(np.array(sizes, np.int64)), outputs=len(sizes), axis=1)

    def row_sum(self, value: str) -> str:
        return self.node("ReduceSum", value, self.constant(np.array([1], np.int64)), keepdims=0)


def _scale_and_shift(graph: _Graph, dense: Sequence[tuple[np.ndarray, np.ndarray]], passed: str) -> tuple[str, str]:
    hidden = passed
    for kernel, bias in dense[:-1]:
        hidden = graph.node("Relu", graph.node("Gemm", hidden, graph.constant(kernel), graph.constant(bias)))
    kernel, bias = dense[-1]
    moved = bias.size // 2
    heads = graph.node("Gemm", hidden, graph.constant(kernel), graph.constant(bias))
    raw, shift = graph.split(heads, [moved, moved])
    return graph.node("Tanh", raw), shift


def build(layers: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], op: str, batch: int, size: int) -> bytes:
    """The serialized model of one of log_prob, forward (two outputs) and inverse; input "x" [batch, size]."""
    from onnx import TensorProto, helper

    graph = _Graph()
    halves = graph.split("x", [size // 2, size - size // 2])
    scales = []
    order = list(enumerate(layers))
    for k, dense in order if op != "inverse" else reversed(order):
        passed, moved = (0, 1) if k % 2 == 0 else (1, 0)
        scale, shift = _scale_and_shift(graph, dense, halves[passed])
        if op == "inverse":
            grown = graph.node("Exp", graph.node("Neg", scale))
            halves[moved] = graph.node("Mul", graph.node("Sub", halves[moved], shift), grown)
        else:
            grown = graph.node("Exp", scale)
            halves[moved] = graph.node("Add", graph.node("Mul", halves[moved], grown), shift)
            scales.append(graph.row_sum(scale))
    outputs = {"inverse": ["y"], "forward": ["y", "log_det"], "log_prob": ["log_prob"]}[op]
    if op != "log_prob":
        graph.nodes.append(helper.make_node("Concat", halves, ["y"], axis=1))
    if op == "forward":
        graph.nodes.append(helper.make_node("Sum", scales, ["log_det"]))
    if op == "log_prob":
        squares = [graph.row_sum(graph.node("Mul", half, half)) for half in halves]
        norm = graph.node("Mul", graph.node("Add", *squares), graph.constant(np.float32(-0.5).reshape(1)))
        constant = graph.constant(np.float32(-0.5 * size * math.log(2 * math.pi)).reshape(1))
        graph.nodes.append(helper.make_node("Sum", [norm, constant, *scales], ["log_prob"]))

    shapes = {"y": [batch, size], "log_det": [batch], "log_prob": [batch]}
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "real_nvp",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, size])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=9,  # what every runtime of the last years reads; the helper would write the newest
    )
    return model.SerializeToString()
