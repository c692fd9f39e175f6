"""Nodes of an ONNX graph as values with arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
IR_VERSION = 9  # what runtimes of the last years read; the helper would write the newest


class Value:
    """What a node gives, under a generated name. Arrays and numbers beside it become constants of its dtype."""

    __array_ufunc__ = None  # ndarray + Value comes here

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def node(self, kind: str, *others: Any, **attributes: Any) -> Value:
        """Apply an operator to this and other inputs."""
        return self.graph.node(kind, self, *others, **attributes)

    def __add__(self, other: Any) -> Value:
        return self.node("Add", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self.node("Sub", other)

    def __rsub__(self, other: Any) -> Value:
        return self.graph.node("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.node("Mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return self.node("Div", other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.graph.node("Div", other, self)

    def __neg__(self) -> Value:
        return self.node("Neg")

    def sum(self, *, keepdims: int = 0) -> Value:
        """Over the last axis."""
        return self.node("ReduceSum", self.graph.indices(-1), keepdims=keepdims)

    def count(self) -> Value:
        """Of a condition, how often it holds along the last axis, which stays: int64."""
        return self.node("Cast", to=TensorProto.INT64).sum(keepdims=1)

    def any(self) -> Value:
        """Of a condition, whether it holds somewhere along the last axis."""
        return self.count().node("Squeeze", self.graph.indices(-1)).node("Greater", self.graph.indices(0))

    def where(self, condition: Value, other: Any) -> Value:
        """Return `other` where a condition holds."""
        return self.graph.node("Where", condition, other, self)

    def beside(self, other: Value) -> Value:
        """Join along the last axis."""
        return self.node("Concat", other, axis=-1)

    def columns(self, places: NDArray[Any]) -> Value:
        """Of the last axis."""
        return self.node("Gather", self.graph.indices(*places.tolist()), axis=-1)

    def slice(self, start: int, stop: int) -> Value:
        """Of the last axis."""
        indices = self.graph.indices
        return self.node("Slice", indices(start), indices(stop), indices(-1))

    def by_feature(self, p: int, n: int) -> Value:
        """[batch, p n] -> [batch, n, p]."""
        return self.node("Reshape", self.graph.indices(0, p, n)).node("Transpose", perm=[0, 2, 1])


class Graph:
    """Nodes and constants, of floating-point numbers of one dtype and of the integers that operators take."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.type = TensorProto.FLOAT if dtype == "float32" else TensorProto.DOUBLE
        self._nodes: list[Any] = []
        self._constants: dict[bytes, Any] = {}

    def constant(self, values: Any) -> Value:
        """Return an array or a number as a constant of the graph's dtype."""
        return self._constant(np.asarray(values, self.dtype))

    def indices(self, *values: int) -> Value:
        """Return a vector of int64."""
        return self._constant(np.array(values, np.int64))

    def _constant(self, array: NDArray[Any]) -> Value:
        key = repr((array.dtype, array.shape)).encode() + array.tobytes()
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(np.ascontiguousarray(array), f"c{len(self._constants)}")
        return Value(self, self._constants[key].name)

    def node(self, kind: str, *inputs: Any, **attributes: Any) -> Value:
        """Add a node with one output."""
        names = [(given if isinstance(given, Value) else self.constant(given)).name for given in inputs]
        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, names, [name], **attributes))
        return Value(self, name)

    def zeros(self, shape: Value) -> Value:
        """Return zeros of a shape."""
        return self.node("ConstantOfShape", shape, value=helper.make_tensor("zero", self.type, [1], [0.0]))

    def floats(self, name: str, *axes: str | int) -> Any:
        """Describe an input or an output of the graph's dtype; an axis with a name has any length."""
        return helper.make_tensor_value_info(name, self.type, axes)

    def integer(self, name: str) -> Any:
        """Describe an input of one int64."""
        return helper.make_tensor_value_info(name, TensorProto.INT64, [1])

    def model(self, name: str, inputs: Sequence[Any], outputs: Mapping[str, tuple[Value, Any]]) -> Any:
        """Return the model whose outputs are named values, each with its description."""
        from nvpflow import __version__

        ends = [helper.make_node("Identity", [value.name], [called]) for called, (value, _) in outputs.items()]
        graph = helper.make_graph(
            [*self._nodes, *ends],
            name,
            inputs,
            [about for _, about in outputs.values()],
            list(self._constants.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="nvpflow",
            producer_version=__version__,
        )
