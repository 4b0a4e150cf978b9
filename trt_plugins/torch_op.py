"""`torch.ops.svdit.sparse_attention`: schema, CPU and CUDA implementation, shape function.

Importing this module registers nothing; call `load()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdit.trt_plugins import cuda_op, reference

NAME = "svdit::sparse_attention"
SCHEMA = (
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor stage, Tensor text_len, Tensor head_pattern, "
    "Tensor tile_offsets, Tensor row_offsets, Tensor tile_index, Tensor work_order, "
    "float scale, int text_tokens, bool text_first) -> Tensor"
)

_library: torch.library.Library | None = None


def load() -> None:
    """Register the operator; safe to call any number of times."""
    global _library  # noqa: PLW0603
    if _library is not None:
        return
    library = torch.library.Library("svdit", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("sparse_attention", reference.sparse_attention, "CPU")
    library.impl("sparse_attention", cuda_op.sparse_attention, "CUDA")  # looks for its library when called
    torch.library.register_fake(NAME, _fake, lib=library)
    _library = library


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    reference.check_tensors(q, k, v, *rest[:7])
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
