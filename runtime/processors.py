"""diffusers' attention processors with the attention itself replaced: projections, norms and RoPE stay the model's own.

Every processor calls `attention(q, k, v)`, all [B, N, H, D] in the model's own token order, text tokens included.
Each takes the arguments of the diffusers processor it stands in for; diffusers picks them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


class SparseProcessor:
    """What the three have in common: the attention of one layer."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention


class WanSparseProcessor(SparseProcessor):
    """For `attn1` of a Wan block: video tokens only."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = _rotate_pairs(q, *rotary_emb), _rotate_pairs(k, *rotary_emb)
        out = self.attention(q, k, v).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


class CogVideoXSparseProcessor(SparseProcessor):
    """For `attn1` of a CogVideoX block: text tokens, then video tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, V, C] and text [B, L, C] -> the same."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (linear(joint).unflatten(2, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], image_rotary_emb, sequence_dim=1)], dim=1)
                for x in (q, k)
            )
        out = self.attention(q, k, v).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


class HunyuanVideoSparseProcessor(SparseProcessor):
    """For `attn` of HunyuanVideo's double and single blocks: video tokens, then text tokens.

    Padding among the text keys is hidden by the attention itself, so `attention_mask` is not read.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, V, C] and text [B, L, C] -> the same."""
        video = hidden_states.shape[1]
        double = attn.add_q_proj is not None  # text has projections of its own
        joint = hidden_states if double else torch.cat([hidden_states, encoder_hidden_states], dim=1)
        q, k, v = (linear(joint).unflatten(2, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        if double:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk, tv = (linear(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for linear in projections)
            q = torch.cat([q, _normed(attn.norm_added_q, tq)], dim=1)
            k = torch.cat([k, _normed(attn.norm_added_k, tk)], dim=1)
            v = torch.cat([v, tv], dim=1)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([apply_rotary_emb(x[:, :video], image_rotary_emb, sequence_dim=1), x[:, video:]], dim=1)
                for x in (q, k)
            )
        out = self.attention(q, k, v).flatten(2, 3).to(q.dtype)
        out, text_out = out[:, :video], out[:, video:]
        if getattr(attn, "to_out", None) is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return out, text_out


def _normed(norm: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i + 1) of x [B, N, H, D]; cos, sin [1, N, 1, D], each angle given twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
