"""The formula as an ONNX model, for the runtimes that read one; all shapes are fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import formula
import numpy as np

OPSET = 18


class _Value:
    """What a node gives, under a generated name, with the operators that the formula uses on arrays."""

    __array_ufunc__ = None  # ndarray + _Value comes here

    def __init__(self, graph: _Graph, name: str, shape: tuple[int, ...]) -> None:
        self.graph, self.name, self.shape = graph, name, shape
        self.ndim = len(shape)

    def _with(self, kind: str, other: Any) -> _Value:
        other = self.graph.value(other)
        return self.graph.node(kind, self, other, shape=np.broadcast_shapes(self.shape, other.shape))

    def __add__(self, other: Any) -> _Value:
        return self._with("Add", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> _Value:
        return self._with("Sub", other)

    def __rsub__(self, other: Any) -> _Value:
        return self.graph.value(other) - self

    def __mul__(self, other: Any) -> _Value:
        return self._with("Mul", other)

    def __truediv__(self, other: Any) -> _Value:
        return self._with("Div", other)

    def __le__(self, other: Any) -> _Value:
        return self._with("LessOrEqual", other)

    def __ge__(self, other: Any) -> _Value:
        return self._with("GreaterOrEqual", other)

    def __eq__(self, other: Any) -> _Value:  # type: ignore[override]
        return self._with("Equal", other)

    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> _Value:
        return self.graph.node("Neg", self)

    def __matmul__(self, kernel: np.ndarray) -> _Value:
        return self.graph.node("MatMul", self, kernel, shape=(*self.shape[:-1], kernel.shape[1]))

    def __getitem__(self, rows: slice) -> _Value:
        first, last, _ = rows.indices(self.shape[0])
        ends = (np.array([bound]) for bound in (first, last, 0))
        return self.graph.node("Slice", self, *ends, shape=(last - first, *self.shape[1:]))

    @property
    def T(self) -> _Value:
        return self.graph.node("Transpose", self, shape=self.shape[::-1])

    def reshape(self, *shape: int) -> _Value:
        return self.graph.node("Reshape", self, np.array(shape), shape=shape)

    def sum(self, axis: int) -> _Value:
        return self._over(axis, "ReduceSum")

    def all(self, axis: int) -> _Value:
        return self._as("FLOAT")._over(axis, "ReduceMin")._as("BOOL")

    def count(self, axis: int) -> _Value:
        return self._as("INT64")._over(axis, "ReduceSum")

    def _over(self, axis: int, kind: str) -> _Value:
        shape = self.shape[:axis] + self.shape[axis + 1 :]
        return self.graph.node(kind, self, np.array([axis]), shape=shape, keepdims=0)

    def _as(self, kind: str) -> _Value:
        from onnx import TensorProto

        return self.graph.node("Cast", self, to=getattr(TensorProto, kind))


class _Graph:
    """Nodes and constants."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def value(self, given: Any) -> _Value:
        """Numbers and arrays as constants: float32, or the integers that operators take."""
        from onnx import numpy_helper

        if isinstance(given, _Value):
            return given
        array = np.asarray(given)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return _Value(self, self.constants[-1].name, array.shape)

    def nodes_of(self, kind: str, *inputs: Any, shapes: Sequence[tuple[int, ...]], **attributes: Any) -> list[_Value]:
        from onnx import helper

        names = [f"n{len(self.nodes)}_{i}" for i in range(len(shapes))]
        self.nodes.append(helper.make_node(kind, [self.value(i).name for i in inputs], names, **attributes))
        return [_Value(self, name, shape) for name, shape in zip(names, shapes, strict=True)]

    def node(self, kind: str, *inputs: Any, shape: tuple[int, ...] | None = None, **attributes: Any) -> _Value:
        return self.nodes_of(kind, *inputs, shapes=[inputs[0].shape if shape is None else shape], **attributes)[0]

    def rename(self, value: _Value, name: str) -> None:
        """Give a result the name of an output."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if known == value.name else known for known in names]

    # -- what formula.Arrays asks for

    def arrays(self) -> formula.Arrays:
        module = SimpleNamespace(
            **{name: self._function(name.capitalize()) for name in ("abs", "exp", "log", "sqrt", "tanh")},
            concatenate=self._concatenate,
            cumsum=lambda x, axis: self.node("CumSum", x, np.array(axis)),
            where=lambda condition, yes, no: self.node("Where", condition, yes, no),
        )
        return formula.Arrays(
            module,
            dense=lambda x, kernel, bias: self.node("Gemm", x, kernel, bias, shape=(x.shape[0], kernel.shape[1])),
            relu=lambda u: self.node("Relu", u),
            sigmoid=lambda u: self.node("Sigmoid", u),
            columns=self._columns,
            dense_transposed=self._dense_transposed,
            softmax=lambda u: self.node("Softmax", u, axis=0),
            softplus=self._function("Softplus"),
            pick=self._pick,
            clip=lambda x, low, high: self.node("Clip", x, low, high),
            count=lambda conditions: conditions.count(axis=0),
            split=self._split,
            total=self._total,
        )

    def _function(self, kind: str) -> Callable[[_Value], _Value]:
        return lambda u: self.node(kind, u)

    def _dense_transposed(self, x: _Value, kernel: np.ndarray, bias: np.ndarray) -> _Value:
        shape = (kernel.shape[1], x.shape[0])
        return self.node("Gemm", kernel, x, bias[:, None], shape=shape, transA=1, transB=1)

    def _pick(self, values: _Value, places: _Value) -> _Value:
        index = places.reshape(1, *places.shape)
        return self.node("GatherElements", values, index, shape=index.shape, axis=0).reshape(*places.shape)

    def _concatenate(self, parts: Sequence[_Value], axis: int) -> _Value:
        shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
        return self.node("Concat", *parts, shape=shape, axis=axis)

    def _columns(self, x: _Value, indices: slice | list[int]) -> _Value:
        if isinstance(indices, slice):
            wanted = range(x.shape[1])[indices]
            ends = (np.array([bound]) for bound in (indices.start, indices.stop, 1, indices.step))
            return self.node("Slice", x, *ends, shape=(x.shape[0], len(wanted)))
        return self.node("Gather", x, np.array(indices), shape=(x.shape[0], len(indices)), axis=1)

    def _split(self, x: _Value, at: int) -> list[_Value]:
        sizes = [at, x.shape[1] - at]
        return self.nodes_of("Split", x, np.array(sizes), shapes=[(x.shape[0], size) for size in sizes], axis=1)

    def _total(self, terms: Sequence[Any]) -> _Value:
        values = [self.value(term) for term in terms]
        shape = np.broadcast_shapes(*(value.shape for value in values))
        return self.node("Sum", *values, shape=shape) if len(values) > 1 else values[0]


def build(flow: formula.Flow, parameters: Mapping[str, np.ndarray], op: str, *given: np.ndarray) -> bytes:
    """The serialized model of one of log_prob, forward (two outputs) and inverse; inputs "x", and "c" for a context."""
    from onnx import TensorProto, helper

    graph = _Graph()
    inputs = [_Value(graph, name, array.shape) for name, array in zip("xc", given, strict=False)]
    results = formula.run(graph.arrays(), flow, parameters, op, *inputs)
    named = {"inverse": ["y"], "forward": ["y", "log_det"], "log_prob": ["log_prob"]}[op]
    outputs = dict(zip(named, results if op == "forward" else [results], strict=True))
    for name, value in outputs.items():
        graph.rename(value, name)

    def described(name: str, value: _Value) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)

    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "flow",
            [described(value.name, value) for value in inputs],
            [described(name, value) for name, value in outputs.items()],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=9,  # what every runtime of the last years reads; the helper would write the newest
    )
    return model.SerializeToString()
