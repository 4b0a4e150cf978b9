"""Attention functions for a torch denoiser: dense, by the op, or dense arithmetic under a plan's masks.

Every function here has the adapters' signature (q, k, v [B, N, H, D] in tile order, layer, stage int32 [1],
text_len int32 [B]) -> [B, N, H, D].
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from svdit.plans.errors import complain
from svdit.plans.schema import Plan
from svdit.plans.tables import Tables, tables_of
from svdit.plans.tiles import Tiling
from svdit.trt_plugins import cuda_library, torch_op

METHODS = ("auto", "op", "masked")


def text_bias(tiling: Tiling, text_len: torch.Tensor | None) -> torch.Tensor | None:
    """Bool [B, 1, 1, N], False on text keys from text_len[b] on; None for models without text tokens."""
    text = tiling.geometry.text_tokens
    if text == 0 or text_len is None:
        return None
    total = tiling.geometry.tokens
    first = 0 if tiling.text_first else total - text
    place = torch.arange(total, device=text_len.device) - first
    padding = (place >= text_len[:, None]) & (place >= 0) & (place < text)
    return ~padding[:, None, None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """torch's scaled dot-product attention on [B, N, H, D]; keep: bool, broadcastable to [B, H, N, N]."""
    out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=keep)
    return out.transpose(1, 2)


class DenseAttention:
    """Every query sees every key, padding text keys aside."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        stage: torch.Tensor,
        text_len: torch.Tensor | None,
    ) -> torch.Tensor:
        return attend(q, k, v, text_bias(self.tiling, text_len))


class PlacedTables:
    """The tables of a plan on a device."""

    def __init__(self, tables: Tables, device: str | torch.device) -> None:
        def put(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array, dtype=torch.int32).contiguous().to(device)

        self._shared = [put(a) for a in (tables.tile_offsets, tables.row_offsets, tables.tile_index)]
        self._head_pattern = [put(a) for a in tables.head_pattern]
        self._work_order = [put(a) for a in tables.work_order]

    def of(self, layer: int) -> tuple[torch.Tensor, ...]:
        """head_pattern, tile_offsets, row_offsets, tile_index, work_order: as the operator takes them."""
        return self._head_pattern[layer], *self._shared, self._work_order[layer]


class OpAttention:
    """The op `svdit::sparse_attention`: only the kept keys are read."""

    def __init__(self, plan: Plan, device: str = "cpu") -> None:
        torch_op.load()
        self.tables = tables_of(plan)
        self.placed = PlacedTables(self.tables, device)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        stage: torch.Tensor,
        text_len: torch.Tensor | None,
    ) -> torch.Tensor:
        text = self.tables.text_tokens
        if text_len is None:
            text_len = torch.full((q.shape[0],), text, dtype=torch.int32, device=q.device)
        return torch.ops.svdit.sparse_attention(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            stage,
            text_len,
            *self.placed.of(layer),
            q.shape[-1] ** -0.5,
            text,
            self.tables.text_first,
        )


class MaskedAttention:
    """A plan as boolean masks for torch's dense attention: no arithmetic saved, any device, any dtype.

    Meant for judging plans on a GPU without a built kernel, and as an independent check of the op.
    Memory: one bool [H, N, N] mask at a time, rebuilt per call from tile masks.
    """

    def __init__(self, plan: Plan, device: str = "cpu") -> None:
        self.tiling = plan.tiling()
        names = sorted({name for stage in plan.stages for row in stage.layers for name in row})
        masks = torch.stack([torch.as_tensor(self.tiling.mask(plan.pattern(name))) for name in names])
        self.masks = masks.to(device)
        index = [[[names.index(name) for name in row] for row in stage.layers] for stage in plan.stages]
        self.head_mask = torch.tensor(index, device=device)
        sizes = torch.as_tensor(self.tiling.sizes, dtype=torch.int64)
        self.tile_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        stage: torch.Tensor,
        text_len: torch.Tensor | None,
    ) -> torch.Tensor:
        heads = self.head_mask[stage.to(torch.int64)[0], layer]
        return masked_attention(q, k, v, self.masks[heads], self.tile_of, text_bias(self.tiling, text_len))


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head_masks: torch.Tensor,
    tile_of: torch.Tensor,
    text: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of head h under tile mask head_masks[h] ([H, nT, nT] bool); tile_of [N] maps tokens to tiles.

    Rows that keep nothing give zeros (torch would give NaN on some backends).
    """
    keep = head_masks[:, tile_of][:, :, tile_of][None]
    if text is not None:
        keep = keep & text
    empty = ~keep.any(-1)
    out = attend(q, k, v, keep | empty[..., None])
    return out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)


def plan_attention(
    plan: Plan, device: str = "cpu", method: str = "auto", dtype: str = "float32"
) -> OpAttention | MaskedAttention:
    """The plan's attention by `method`: "op", "masked", or "auto".

    auto is the op on the CPU, and on a GPU in half precision where the compiled kernel is found; otherwise masked.
    """
    if method not in METHODS:
        raise complain("attention", repr(method), f"one of {', '.join(METHODS)}")
    if method == "auto":
        kernel = dtype != "float32" and cuda_library.find() is not None
        method = "op" if torch.device(device).type == "cpu" or kernel else "masked"
    return OpAttention(plan, device) if method == "op" else MaskedAttention(plan, device)
