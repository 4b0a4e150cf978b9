"""A model that is one SparseAttention node: for tests, for timing, and to look at in a viewer."""

from __future__ import annotations

import onnx_ir as ir

from svdit.exporter.attention import UniqueTables, attributes
from svdit.exporter.graph import OPSET
from svdit.exporter.op_schema import DOMAIN, INPUTS, OP_TYPE, OP_VERSION, OUTPUTS
from svdit.plans.tables import Tables

IR_VERSION = 10


def op_model(
    tables: Tables, batch: int | str, head_dim: int, layer: int = 0, scale: float | None = None, dtype: str = "FLOAT"
) -> ir.Model:
    """Inputs Q, K, V [B, N, H, D], stage and text_len; output O; the tables of one layer as initializers.

    `batch` is a number, or the name of a free dimension.
    """
    tokens, heads = int(tables.tile_offsets[-1]), tables.head_pattern[layer].shape[1]
    real, integer = ir.DataType[dtype], ir.DataType.INT32
    shapes = {"stage": [1], "text_len": [batch]}
    inputs = [
        ir.Value(
            name=port.name,
            type=ir.TensorType(real if port.dtype == "T" else integer),
            shape=ir.Shape(shapes.get(port.name, [batch, tokens, heads, head_dim])),
        )
        for port in INPUTS[:5]
    ]
    unique = UniqueTables(tables)
    head_pattern, work_order = unique.of_layer[layer]
    names = (head_pattern, "tile_offsets", "row_offsets", "tile_index", work_order)
    constants = []
    for port, name in zip(INPUTS[5:], names, strict=True):
        tensor = ir.Tensor(unique.values[name], name=port.name)
        constants.append(ir.Value(name=port.name, type=ir.TensorType(integer), shape=tensor.shape, const_value=tensor))
    node = ir.node(
        OP_TYPE,
        [*inputs, *constants],
        attributes(tables, head_dim**-0.5 if scale is None else scale),
        domain=DOMAIN,
        version=OP_VERSION,
        name=f"attention/{OP_TYPE}",
    )
    output = node.outputs[0]
    output.name, output.dtype, output.shape = OUTPUTS[0].name, real, inputs[0].shape
    graph = ir.Graph(
        inputs, [output], nodes=[node], initializers=constants, opset_imports={"": OPSET, DOMAIN: OP_VERSION}, name="op"
    )
    return ir.Model(graph, ir_version=IR_VERSION)
