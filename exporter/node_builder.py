"""Adds nodes in front of an existing one, with names, types and shapes, and equal constants shared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Dim = int | ir.SymbolicDim
"""A free dimension is symbolic; only the batch may be one."""


class Constants:
    """Initializers of one graph by content: asking twice for equal arrays gives one initializer."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self._known: dict[tuple, ir.Value] = {}

    def get(self, array: np.ndarray, stem: str) -> ir.Value:
        """The initializer that holds `array`; `stem` names a new one."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = f"{self.prefix}{stem}_{len(self._known)}"
            value = ir.Value(
                name=name,
                const_value=ir.Tensor(array, name=name),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                shape=ir.Shape(array.shape),
            )
            self.graph.register_initializer(value)
            self._known[key] = value
        return self._known[key]


class NodeBuilder:
    """Collects the nodes that will replace one node; names begin with that node's module path."""

    def __init__(self, constants: Constants, scope: str) -> None:
        self.constants = constants
        self.scope = scope
        self.nodes: list[ir.Node] = []
        self._counts: dict[str, int] = {}

    def ints(self, *numbers: int) -> ir.Value:
        """An int64 vector constant."""
        return self.constants.get(np.array(numbers, dtype=np.int64), "ints")

    def constant(self, array: np.ndarray, stem: str) -> ir.Value:
        return self.constants.get(array, stem)

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[Dim],
        *,
        label: str = "",
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: object,
    ) -> ir.Value:
        """A node with one output of the given shape; its type is the first input's unless `dtype` says another."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=self._name(label or op_type))
        return self._keep(node, [shape], dtype or inputs[0].dtype)[0]

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int, label: str) -> list[ir.Value]:
        """Parts of x along an axis."""
        if len(sizes) == 1:
            return [x]
        shapes = [[*x.shape[:axis], size, *x.shape[axis + 1 :]] for size in sizes]
        inputs = [x, self.ints(*sizes)]
        node = ir.node("Split", inputs, {"axis": axis}, num_outputs=len(sizes), name=self._name(label))
        return self._keep(node, shapes, x.dtype)

    def concat(self, parts: Sequence[ir.Value], axis: int, label: str) -> ir.Value:
        """Parts joined along an axis."""
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.add("Concat", parts, shape, label=label, axis=axis)

    def slice(self, x: ir.Value, start: int, stop: int, axis: int, label: str) -> ir.Value:
        """x[start:stop] along an axis; x itself when that is all of it."""
        if (start, stop) == (0, x.shape[axis]):
            return x
        shape = [*x.shape[:axis], stop - start, *x.shape[axis + 1 :]]
        return self.add("Slice", [x, self.ints(start), self.ints(stop), self.ints(axis)], shape, label=label)

    def take(self, x: ir.Value, index: np.ndarray, axis: int, label: str) -> ir.Value:
        """Positions `index` along an axis: nothing, a Slice or a Gather."""
        start, count = int(index[0]), len(index)
        if np.array_equal(index, np.arange(start, start + count)):
            return self.slice(x, start, start + count, axis, label)
        shape = [*x.shape[:axis], count, *x.shape[axis + 1 :]]
        table = self.constant(index.astype(np.int32), "index")
        return self.add("Gather", [x, table], shape, label=label, axis=axis)

    def reshape(self, x: ir.Value, shape: Sequence[Dim], label: str) -> ir.Value:
        """x in a shape of which one dimension may be free."""
        sizes = [-1 if isinstance(n, ir.SymbolicDim) else n for n in shape]
        return self.add("Reshape", [x, self.ints(*sizes)], shape, label=label)

    def sizes(self, like: ir.Value, shape: Sequence[Dim], label: str) -> ir.Value:
        """int64 vector of a shape whose first dimension is that of `like`, also where it is free."""
        if not isinstance(shape[0], ir.SymbolicDim):
            return self.ints(*shape)
        rows = self.add("Shape", [like], [1], label=f"{label}/num_rows", dtype=ir.DataType.INT64, start=0, end=1)
        return self.concat([rows, self.ints(*shape[1:])], 0, f"{label}/sizes")

    def transpose(self, x: ir.Value, perm: Sequence[int], label: str) -> ir.Value:
        return self.add("Transpose", [x], [x.shape[i] for i in perm], label=label, perm=list(perm))

    def _keep(self, node: ir.Node, shapes: Sequence[Sequence[Dim]], dtype: ir.DataType) -> list[ir.Value]:
        for i, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = node.name if i == 0 else f"{node.name}:{i}"
            value.dtype = dtype
            value.shape = ir.Shape([n if isinstance(n, ir.SymbolicDim) else int(n) for n in shape])
        self.nodes.append(node)
        return list(node.outputs)

    def _name(self, label: str) -> str:
        count = self._counts[label] = self._counts.get(label, 0) + 1
        return f"{self.scope}/{label}" if count == 1 else f"{self.scope}/{label}_{count}"
