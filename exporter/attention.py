"""Self-attention as nodes of a traced graph, and the constants that they share.

What computes attention in torch is in svdit.runtime.attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svdit.exporter.op_schema import DOMAIN, OP_TYPE, OP_VERSION

if TYPE_CHECKING:
    import numpy as np

    from svdit.plans.tables import Tables


class SymbolicAttention(nn.Module):
    """One `svdit::SparseAttention` node a layer; the tables become initializers `attention.<name>`."""

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.tables = tables
        self.unique = UniqueTables(tables)
        for name, value in self.unique.values.items():
            self.register_buffer(name, torch.empty(value.shape, dtype=torch.int32, device="meta"), persistent=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        # Not forward(): the node then carries the scope of the layer that calls it, not of this shared module.
        head_pattern, work_order = self.unique.of_layer[layer]
        constants = [getattr(self, n) for n in (head_pattern, "tile_offsets", "row_offsets", "tile_index", work_order)]
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP_TYPE}",
            (q, k, v, stage, text_len, *constants),
            attributes(self.tables, q.shape[-1] ** -0.5),
            dtype=q.dtype,
            shape=q.shape,
            version=OP_VERSION,
        )


def attributes(tables: Tables, scale: float) -> dict:
    """Attributes of a SparseAttention node."""
    return {
        "scale": float(scale),
        "text_tokens": int(tables.text_tokens),
        "text_first": int(tables.text_first),
        "patterns": list(tables.pattern_names),
        "grid": [int(n) for n in tables.grid],
        "tile": [int(n) for n in tables.tile],
        "plugin_namespace": "",
    }


class UniqueTables:
    """Tables by name with equal ones merged: layers with the same rows share one constant."""

    def __init__(self, tables: Tables) -> None:
        self.values: dict[str, np.ndarray] = {
            name: getattr(tables, name) for name in ("tile_offsets", "row_offsets", "tile_index")
        }
        self.of_layer: list[tuple[str, str]] = []
        """Names of head_pattern and work_order of each layer."""
        seen: dict[tuple[str, bytes], str] = {}
        for layer, arrays in enumerate(zip(tables.head_pattern, tables.work_order, strict=True)):
            names = []
            for kind, array in zip(("head_pattern", "work_order"), arrays, strict=True):
                name = seen.setdefault((kind, array.tobytes()), f"{kind}_{layer}")
                self.values[name] = array
                names.append(name)
            self.of_layer.append((names[0], names[1]))
