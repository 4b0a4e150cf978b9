"""Reading exported graphs in tests: weights resolved by hand from the safetensors files, ops run in Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from svdit.trt_plugins import torch_op


def dense(q, k, v, layer, stage, text_len):
    """Every token attends to every token: torch's attention on [B, N, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def load_resolved(path: Path) -> onnx.ModelProto:
    """The model with every external tensor read from its file and put inside."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = external(tensor)
            with open(path.parent / where["location"], "rb") as file:
                file.seek(int(where["offset"]))
                tensor.raw_data = file.read(int(where["length"]))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


class SparseAttention(OpRun):
    """svdit::SparseAttention through the torch operator, for onnx's reference evaluator."""

    op_domain = "svdit"

    def _run(self, *inputs, scale, text_tokens, text_first, patterns, grid, tile, plugin_namespace):
        torch_op.load()
        tensors = [torch.from_numpy(np.array(x)) for x in inputs]
        result = torch.ops.svdit.sparse_attention(*tensors, scale, text_tokens, bool(text_first))
        return (result.numpy(),)


def run_in_python(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of a graph, computed by onnx's own reference implementation."""
    return ReferenceEvaluator(load_resolved(path), new_ops=[SparseAttention]).run(None, feed)[0]
