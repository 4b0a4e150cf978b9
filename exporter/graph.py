"""ONNX rewrites, one function each: an onnx_ir model in, the same model changed.

`trace` gives a model whose parameters and constants have no values; the rewrites below tidy it, name it and
bind its values; attention nodes are replaced by portable.py.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from svdit.exporter.node_builder import Constants, NodeBuilder
from svdit.exporter.op_schema import DOMAIN, OP_TYPE

if TYPE_CHECKING:
    import torch

    from svdit.exporter.models.base import StoredTensor
    from svdit.plans.bundle import TensorSpec

OPSET = 20
"""ONNX opset of every graph: the first one with Gelu."""
EXAMPLE_ROWS = 2
"""Of a free dimension while tracing; the tracer takes 0 and 1 for special cases."""
STORED_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the module path of a node."""


def trace(module: torch.nn.Module, inputs: Sequence[TensorSpec], output: str) -> ir.Model:
    """Export a module without values. `inputs` are forward's arguments in order; the first dimension may be free.

    Parameters and buffers become initializers under their own names; nothing in them is valid yet.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    def example(spec: TensorSpec) -> torch.Tensor:
        shape = [EXAMPLE_ROWS if isinstance(size, str) else size for size in spec.shape]
        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="cpu")

    names = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    free = {name: torch.export.Dim(name, min=1) for name in names}
    dims = tuple({i: free[n] for i, n in enumerate(spec.shape) if n in free} for spec in inputs)
    with FakeTensorMode(shape_env=ShapeEnv()), _quiet():
        module._apply(fake)
        program = torch.onnx.export(
            module,
            tuple(map(example, inputs)),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[output],
            dynamic_shapes=dims if free else None,
        )
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence notices about packages that nobody needs here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def simplify(model: ir.Model) -> ir.Model:
    """Fold shape arithmetic and merge equal nodes; initializers are not looked at."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    graph = model.graph
    initializers = list(graph.initializers.values())
    num_inputs = len(graph.inputs)
    for value in initializers:  # as inputs nobody can read the values that they do not have
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
    with _quiet():
        skip_no_ops(model)
        state_shapes(model)
        for _ in range(2):  # merging equal nodes opens the way for more folding
            fold_constants(model)
            common.RemoveUnusedNodesPass()(model)
            common.CommonSubexpressionEliminationPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.DeduplicateInitializersPass()(model)
    for value in list(graph.inputs)[num_inputs:]:
        graph.inputs.remove(value)
        if value.uses():
            graph.initializers[value.name] = value
    return model


def skip_no_ops(model: ir.Model) -> ir.Model:
    """Remove casts to the type a value has, and reshapes of vectors to vectors."""
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        is_cast = node.op_type == "Cast" and source.dtype == node.attributes["to"].as_int()
        is_reshape = node.op_type == "Reshape" and source.shape is not None and len(source.shape) == 1
        if is_cast or (is_reshape and node.outputs[0].shape in (None, source.shape) and _is_flat(node.inputs[1])):
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
    return model


def state_shapes(model: ir.Model) -> ir.Model:
    """Give reshapes of tensors with one free dimension a constant shape, so that no shape is computed when running."""
    for node in list(model.graph):
        shape = node.outputs[0].shape if node.op_type == "Reshape" else None
        if shape is None or sum(isinstance(n, ir.SymbolicDim) for n in shape) != 1:
            continue
        sizes = np.array([-1 if isinstance(n, ir.SymbolicDim) else n for n in shape], dtype=np.int64)
        constant = ir.node("Constant", [], {"value": ir.tensor(sizes)})
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
    return model


def fill_by_arithmetic(model: ir.Model) -> ir.Model:
    """Compute constants that have a row for every row of the inputs from an input itself, not from its shape.

    Then nothing in the graph depends on shapes, and a run of it can be captured once for each batch.
    """
    for node in [node for node in model.graph if node.op_type == "Expand"]:
        value, out = ir.convenience.get_const_tensor(node.inputs[0]), node.outputs[0]
        if value is None or value.size != 1 or not isinstance(out.shape[0], ir.SymbolicDim):
            raise AssertionError(f"{node.name}: an Expand that is no constant with a row for every row of the inputs")
        rows = next(x for x in model.graph.inputs if len(x.shape) == 1 and isinstance(x.shape[0], ir.SymbolicDim))
        build = NodeBuilder(Constants(model.graph, f"{node.name}/"), node.name)
        never = build.add("Less", [rows, rows], rows.shape, dtype=ir.DataType.BOOL)
        zeros = build.add("Cast", [never], rows.shape, dtype=out.dtype, to=int(out.dtype))
        zeros = build.reshape(zeros, [*rows.shape, *[1] * (len(out.shape) - 1)], "by_row")
        filled = build.constant(np.broadcast_to(value.numpy(), (1, *out.shape[1:])), "value")
        result = build.add("Add", [zeros, filled], out.shape)
        model.graph.insert_before(node, build.nodes)
        out.replace_all_uses_with(result)
        model.graph.remove(node, safe=True)
    return drop_unused(model)


def _is_flat(shape: ir.Value) -> bool:
    """Whether a Reshape's second input is the constant [-1]."""
    value = ir.convenience.get_const_tensor(shape)
    return value is not None and value.numpy().tolist() == [-1]


def name_nodes(model: ir.Model) -> ir.Model:
    """Name every node, and its first output, "module path/operator", numbered where that is not unique."""
    outputs = {id(value) for value in model.graph.outputs}
    taken = {value.name for value in [*model.graph.inputs, *model.graph.outputs]} | set(model.graph.initializers)
    scope_of: dict[ir.Node, str] = {}
    for node in model.graph:
        scope_of[node] = scope = _scope(node, scope_of)
        stem = f"{scope}/{node.op_type}" if scope else node.op_type
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        node.name = name
        for i, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = name if i == 0 else f"{name}:{i}"
        node.metadata_props.clear()
        node.doc_string = None
    names = dict(model.graph.initializers)
    for i, value in enumerate(v for v in names.values() if v.const_value is not None):  # made by folding
        model.graph.initializers.pop(value.name)
        value.name = f"constants/{i}"
        model.graph.register_initializer(value)
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


def _scope(node: ir.Node, scope_of: Mapping[ir.Node, str]) -> str:
    """Module path of the module that a node lies in; nodes made by folding take the one of their first input."""
    text = node.metadata_props.get(SCOPES)
    if text:
        modules = [scope for scope in ast.literal_eval(text)[:-1] if scope]  # the last entry is the call itself
        return modules[-1] if modules else ""
    producers = [value.producer() for value in node.inputs if value is not None]
    return next((scope_of[p] for p in producers if p in scope_of), "")


def bind_constants(model: ir.Model, values: Mapping[str, np.ndarray]) -> ir.Model:
    """Give initializers their values; those of `values` that the graph does not use are left out."""
    for name, value in values.items():
        target = model.graph.initializers.get(name)
        if target is not None:
            target.const_value = ir.Tensor(value, name=name)
    return model


def bind_weights(model: ir.Model, parameters: Mapping[str, StoredTensor]) -> ir.Model:
    """Point initializers at the bytes in the checkpoint's files, with a Cast where the graph wants another type.

    Locations are bare file names: the files, or links to them, must lie beside the graph.
    """
    graph = model.graph
    casts = []
    for name, stored in parameters.items():
        value = graph.initializers.get(name)
        if value is None:
            raise AssertionError(f"the graph does not use the parameter {name}")
        dtype = STORED_TYPES[stored.dtype]
        file, shape = stored.file, value.shape
        tensor = ir.ExternalTensor(
            file.name, stored.offset, stored.length, dtype, shape=shape, name=name, base_dir=file.parent
        )
        if value.dtype != dtype:
            cast = ir.node("Cast", [value], {"to": int(value.dtype)}, name=f"{name}/Cast")
            cast.outputs[0].name = f"{name}/Cast"
            cast.outputs[0].dtype, cast.outputs[0].shape = value.dtype, value.shape
            users = [(use.node, use.idx) for use in value.uses() if use.node is not cast]
            for node, index in users:
                node.replace_input_with(index, cast.outputs[0])
            value.dtype = dtype
            casts.append(cast)
        value.const_value = tensor
    if casts:
        graph.insert_before(graph[0], casts)
    unbound = [value.name for value in graph.initializers.values() if value.const_value is None]
    if unbound:
        raise AssertionError(f"initializers without a value: {unbound[:5]}")
    return model


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """SparseAttention nodes, in the order of the layers."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]


def drop_unused(model: ir.Model) -> ir.Model:
    """Remove nodes, initializers and inputs that no output needs."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    graph = model.graph
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    return model


def weight_files(parameters: Mapping[str, StoredTensor]) -> list[Path]:
    """The files that the weights lie in, each once."""
    return sorted({stored.file for stored in parameters.values()})
