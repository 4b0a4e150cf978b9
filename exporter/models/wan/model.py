"""Wan's denoiser with its video tokens in tile order and its self-attention left to a function.

The parameters are those of diffusers' WanTransformer3DModel under the same names; the patch embedding alone
is seen as a matrix instead of a Conv3d kernel (same bytes). Differences that do not change the result: video
tokens are permuted once before the patch embedding and once after the last projection, RoPE is a pair of
permuted constants applied with stack instead of strided assignment, RMSNorm is written out.

Shape letters: B batch, N video tokens, H heads, D head width, C width H * D, L text tokens, P patch features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from svdit.exporter.models.layers import FeedForward, RMSNorm, add_token_buffers, apply_rope
from svdit.exporter.models.wan.config import ROPE_THETA, WanConfig
from svdit.exporter.token_order import patches_of, permute_tokens, video_of

if TYPE_CHECKING:
    from svdit.exporter.models.base import AttentionFn
    from svdit.plans.tiles import Tiling

IMAGE_EPS = 1e-5
"""Of the norms around the image's tokens."""


def constants(config: WanConfig, tiling: Tiling) -> dict[str, np.ndarray]:
    """Values of the denoiser's buffers, by buffer name."""
    cos, sin = rope_tables(config, tiling)
    half = config.freq_dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
    return {
        "order": tiling.order,
        "inverse": tiling.inverse,
        "rope_cos": cos,
        "rope_sin": sin,
        "condition_embedder.frequencies": torch.exp(exponent).numpy(),
    }


def rope_tables(config: WanConfig, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin float32 [1, N, 1, D / 2] of the axial rotary embedding, tokens in tile order."""
    positions = np.unravel_index(tiling.order, tiling.geometry.grid)
    parts = []
    for position, dim in zip(positions, config.rope_split(), strict=True):
        frequencies = 1.0 / ROPE_THETA ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        parts.append(np.outer(position, frequencies))
    angle = np.concatenate(parts, axis=1)[None, :, None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class LayerNorm(nn.Module):
    """Layer normalisation in float32, with or without scale and shift."""

    def __init__(self, width: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return functional.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps)


class Attention(nn.Module):
    """Projections and normalised heads, shared by self- and cross-attention."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = RMSNorm(width, config.eps)
        self.norm_k = RMSNorm(width, config.eps)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x and keys, values of context, each [B, tokens, H, D]."""
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        return tuple(t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))


class SelfAttention(Attention):
    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionFn,
        layer: int,
        stage: Tensor,
        text_len: Tensor,
    ) -> Tensor:
        q, k, v = self.project(x, x)
        out = attention(apply_rope(q, *rope), apply_rope(k, *rope), v, layer, stage, text_len)
        return self.to_out[0](out.flatten(2))


class CrossAttention(Attention):
    """Video tokens attend to the text, and on their own to the image where there is one: N x L, always dense."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.image_dim is not None:
            self.add_k_proj = nn.Linear(config.width, config.width)
            self.add_v_proj = nn.Linear(config.width, config.width)
            self.norm_added_k = RMSNorm(config.width, config.eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x, text))
        out = self.attend(q, k, v)
        if image is not None:
            pair = self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)
            out = out + self.attend(q, *(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in pair))
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, H, tokens, D]."""
        if torch.compiler.is_exporting():  # a plainer graph than the exporter's own expansion
            return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v
        return functional.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; modulation and residual sums in float32."""

    def __init__(self, config: WanConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm1 = LayerNorm(config.width, config.eps, affine=False)
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = LayerNorm(config.width, config.eps, affine=True) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(config.width, config.ffn_dim)
        self.norm3 = LayerNorm(config.width, config.eps, affine=False)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.width))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        image: Tensor | None,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionFn,
        stage: Tensor,
        text_len: Tensor,
    ) -> Tensor:
        modulated = self.scale_shift_table.float() + modulation.float()
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulated.chunk(6, 1)
        normed = (self.norm1(x) * (1 + scale) + shift).to(x.dtype)
        attended = self.attn1(normed, rope, attention, self.layer, stage, text_len)
        x = (x.float() + attended.float() * gate).to(x.dtype)
        x = x + self.attn2(self.norm2(x.float()).to(x.dtype), text, image)
        normed = (self.norm3(x) * (1 + ff_scale) + ff_shift).to(x.dtype)
        return (x.float() + self.ffn(normed).float() * ff_gate).to(x.dtype)


class TwoLayers(nn.Module):
    """linear_1, an activation, linear_2."""

    def __init__(self, wide_in: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(wide_in, width)
        self.activation = activation
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ImageEmbedder(nn.Module):
    """CLIP's tokens of the first frame [B, I, E] to the width of the blocks."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.image_dim, IMAGE_EPS, affine=True)
        first = nn.ModuleDict({"proj": nn.Linear(config.image_dim, config.image_dim)})
        inner = nn.ModuleList([first, nn.Identity(), nn.Linear(config.image_dim, config.width)])
        self.ff = nn.ModuleDict({"net": inner})
        self.norm2 = LayerNorm(config.width, IMAGE_EPS, affine=True)

    def forward(self, image: Tensor) -> Tensor:
        net = self.ff["net"]
        x = net[2](functional.gelu(net[0]["proj"](self.norm1(image).to(image.dtype))))
        return self.norm2(x).to(x.dtype)


class ConditionEmbedder(nn.Module):
    """Time step, text and, in image-to-video models, the first frame to the width of the blocks."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.time_embedder = TwoLayers(config.freq_dim, config.width, nn.SiLU())
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = TwoLayers(config.text_dim, config.width, nn.GELU(approximate="tanh"))
        self.image_embedder = None if config.image_dim is None else ImageEmbedder(config)
        self.register_buffer("frequencies", torch.empty(config.freq_dim // 2), persistent=False)

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """timestep [B], text [B, L, E] to time [B, C], modulation [B, 6, C], text [B, L, C]."""
        angle = timestep.float()[:, None] * self.frequencies[None]
        time = self.time_embedder(torch.cat([angle.cos(), angle.sin()], dim=-1)).to(text.dtype)
        modulation = self.time_proj(functional.silu(time)).unflatten(1, (6, -1))
        return time, modulation, self.text_embedder(text)


class WanDenoiser(nn.Module):
    """hidden_states [B, C, f, h, w], timestep [B], encoder_hidden_states [B, L, E], stage int32 [1] -> [B, C, f, h, w].

    Image-to-video models take encoder_hidden_states_image [B, 257, image width] besides, and more channels than they
    give: latents, mask and the latents of the first frame.
    Input and output are float32; `dtype` is what the blocks compute in. `attention` may be replaced.
    """

    def __init__(self, config: WanConfig, tiling: Tiling, attention: AttentionFn, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.grid = tiling.geometry.grid
        self.dtype = dtype
        self.attention = attention
        tokens, half = tiling.geometry.tokens, config.attention_head_dim // 2
        features = math.prod(config.patch)
        self.patch_embedding = nn.Linear(config.in_channels * features, config.width)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.num_layers)])
        self.norm_out = LayerNorm(config.width, config.eps, affine=False)
        self.proj_out = nn.Linear(config.width, config.out_channels * features)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.width))
        add_token_buffers(self, tokens, tokens, half)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        stage: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Tensor:
        text_len = torch.zeros_like(timestep, dtype=torch.int32)
        time, modulation, text = self.condition_embedder(timestep, encoder_hidden_states.to(self.dtype))
        image = None
        if encoder_hidden_states_image is not None:
            image = self.condition_embedder.image_embedder(encoder_hidden_states_image.to(self.dtype))
        x = permute_tokens(patches_of(hidden_states.to(self.dtype), self.grid, self.config.patch), self.order)
        x = self.patch_embedding(x)
        for block in self.blocks:
            x = block(x, text, image, modulation, (self.rope_cos, self.rope_sin), self.attention, stage, text_len)
        shift, scale = (self.scale_shift_table.float() + time.float().unsqueeze(1)).chunk(2, 1)
        x = self.proj_out((self.norm_out(x) * (1 + scale) + shift).to(x.dtype))
        return video_of(permute_tokens(x, self.inverse), self.grid, self.config.patch, channels_first=False).float()
