"""Attention errors as the rest of the network sees them: after the layer's output projection.

Letters: L layers, B batch, N tokens, H heads, D head width, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROWS = 1 << 14
"""Tokens that are projected at once."""


def output_weights(model: nn.Module) -> list[Tensor]:
    """Weight [C, H * D] of the output projection of each self-attention layer, in the order of the layers.

    The denoisers of the exporter name their modules as diffusers does. Where text has a projection of its own
    (HunyuanVideo's double blocks) it is that of the video; where attention and feed-forward share one (its single
    blocks), the part that the attention goes through.
    """
    blocks = [*getattr(model, "transformer_blocks", getattr(model, "blocks", ()))]
    joint = [getattr(block, "attn1", None) or block.attn for block in blocks]
    weights = [attention.to_out[0].weight for attention in joint]
    for block in getattr(model, "single_transformer_blocks", ()):
        weights.append(block.proj_out.weight[:, : block.attn.to_q.out_features])
    return weights


def projected_heads(weight: Tensor, heads: int) -> Tensor:
    """float32 [H, D, D]: |x R_h| = |W_h x| for outputs x of head h, which are thus measured at their own width."""
    parts = weight.double().unflatten(1, (heads, -1)).transpose(0, 1)  # [H, C, D]
    values, vectors = torch.linalg.eigh(parts.transpose(1, 2) @ parts)
    return (vectors * values.clamp_min(0.0).sqrt()[:, None]).float()


def output_power(out: Tensor, weight: Tensor) -> float:
    """Sum of squares of the projected layer output, bias aside, over B * N * D * H: the share 1 of a head's error."""
    rows = out.flatten(2).flatten(0, 1)
    total = sum(linear(part, weight.to(part.dtype)).double().square().sum() for part in rows.split(ROWS))
    return float(total) / rows.numel()
