"""`svdit::SparseAttention`, version 1, as ONNX sees it: the one table of its inputs, attributes and output.

The meaning of each entry is docs/op.md. Shape letters: B batch, N tokens, H heads, D head width, S stages,
nT tiles of the sequence, P patterns, nnz listed key tiles, M work items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "svdit"
OP_TYPE = "SparseAttention"
OP_VERSION = 1


@dataclass(frozen=True)
class Port:
    """One input or output."""

    name: str
    dtype: str
    """"T" or a tensor type in ONNX spelling."""
    shape: str
    about: str


@dataclass(frozen=True)
class Attribute:
    """One attribute; `default` None means that every node must carry it."""

    name: str
    kind: str
    """ONNX attribute type: INT, INTS, FLOAT, STRING, STRINGS."""
    default: object
    about: str


TYPES = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
"""What T may be."""

INPUTS = (
    Port("Q", "T", "B,N,H,D", "queries, tokens in tile order"),
    Port("K", "T", "B,N,H,D", "keys"),
    Port("V", "T", "B,N,H,D", "values"),
    Port("stage", "tensor(int32)", "1", "row of head_pattern and work_order to use"),
    Port("text_len", "tensor(int32)", "B", "valid text tokens of each batch element"),
    Port("head_pattern", "tensor(int32)", "S,H", "pattern id of each head; 0 full, 1 skip"),
    Port("tile_offsets", "tensor(int32)", "nT+1", "first sequence position of each tile, and N"),
    Port("row_offsets", "tensor(int32)", "P,nT+1", "where each query tile's list lies in tile_index"),
    Port("tile_index", "tensor(int32)", "nnz", "key tiles, ascending in each list"),
    Port("work_order", "tensor(int32)", "S,M", "(head << 16) | query tile of each work item, then -1"),
)
OUTPUTS = (Port("O", "T", "B,N,H,D", "attention output in the order of Q"),)
ATTRIBUTES = (
    Attribute("scale", "FLOAT", None, "factor on Q K^T before the softmax"),
    Attribute("text_tokens", "INT", 0, "text tokens in the sequence"),
    Attribute("text_first", "INT", 0, "1 when the text comes before the video"),
    Attribute("patterns", "STRINGS", None, "name of each pattern id in the plan; for people"),
    Attribute("grid", "INTS", None, "token grid T, H, W; for people"),
    Attribute("tile", "INTS", None, "tokens of a tile along T, H, W; for people"),
    Attribute("plugin_namespace", "STRING", "", "namespace in which TensorRT looks for the plugin"),
)


def schema() -> onnx.defs.OpSchema:
    """The table above as an ONNX operator schema."""
    from onnx import defs, helper

    kinds = defs.OpSchema.AttrType
    attributes = [
        defs.OpSchema.Attribute(a.name, getattr(kinds, a.kind), a.about)
        if a.default is None
        else defs.OpSchema.Attribute(a.name, helper.make_attribute(a.name, a.default), a.about)
        for a in ATTRIBUTES
    ]
    return defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        OP_VERSION,
        doc="Block-sparse attention over tiles of video tokens; see docs/op.md of svdit.",
        inputs=[defs.OpSchema.FormalParameter(p.name, p.dtype, f"[{p.shape}] {p.about}") for p in INPUTS],
        outputs=[defs.OpSchema.FormalParameter(p.name, p.dtype, f"[{p.shape}] {p.about}") for p in OUTPUTS],
        type_constraints=[("T", list(TYPES), "type of Q, K, V and O")],
        attributes=attributes,
    )


def register_schema() -> None:
    """Make onnx.checker know the operator; safe to call any number of times."""
    from onnx import defs

    if not defs.has(OP_TYPE, OP_VERSION, DOMAIN):
        defs.register_schema(schema())
