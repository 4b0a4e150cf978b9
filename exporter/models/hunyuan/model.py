"""HunyuanVideo's denoiser with its video tokens in tile order and its joint attention left to a function.

The parameters are those of diffusers' HunyuanVideoTransformer3DModel under the same names; the patch embedding alone
is seen as a matrix instead of a Conv3d kernel (same bytes). Differences that do not change the result: video tokens
are permuted once before the patch embedding and once after the last projection; RoPE is a pair of permuted constants,
with angle 0 for the text; the mask of the joint attention is the number of valid text tokens; the single blocks keep
video and text in one tensor.

Shape letters: B batch, V video tokens, L text tokens, N = V + L, H heads, D head width, C width H * D,
P patch features, E text width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from svdit.exporter.models.hunyuan.config import EPS, TIME_CHANNELS, TOKEN_REPLACE, HunyuanConfig
from svdit.exporter.models.hunyuan.text import TextRefiner, TwoLayers, wave
from svdit.exporter.models.layers import FeedForward, RMSNorm, add_token_buffers, apply_rope
from svdit.exporter.token_order import patches_of, permute_tokens, video_of

if TYPE_CHECKING:
    from svdit.exporter.models.base import AttentionFn
    from svdit.plans.tiles import Tiling

    Still = tuple[Tensor, Tensor]
    """A condition [B, C], and which tokens have it: bool [1, tokens, 1]."""


def constants(config: HunyuanConfig, tiling: Tiling) -> dict[str, np.ndarray]:
    """Values of the denoiser's buffers, by buffer name."""
    cos, sin = rope_tables(config, tiling)
    half = TIME_CHANNELS // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
    return {
        "order": tiling.order,
        "inverse": tiling.inverse,
        "rope_cos": cos,
        "rope_sin": sin,
        "frequencies": torch.exp(exponent).numpy(),
        **first_frame(config, tiling),
    }


def first_frame(config: HunyuanConfig, tiling: Tiling) -> dict[str, np.ndarray]:
    """bool [1, V, 1] and [1, N, 1]: which tokens are the first frame's, in models that replace them."""
    if config.image_condition_type != TOKEN_REPLACE:
        return {}
    _, h, w = tiling.geometry.grid
    video = tiling.order < h * w
    joint = np.concatenate([video, np.zeros(tiling.geometry.text_tokens, dtype=bool)])
    return {"first_video": video[None, :, None], "first_joint": joint[None, :, None]}


def rope_tables(config: HunyuanConfig, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin float32 [1, N, 1, D / 2]: video tokens in tile order, then the text, which does not turn."""
    positions = np.unravel_index(tiling.order, tiling.geometry.grid)
    parts = []
    for position, dim in zip(positions, config.rope_axes_dim, strict=True):
        frequencies = 1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        parts.append(np.outer(position, frequencies))
    angle = np.concatenate(parts, axis=1)
    angle = np.concatenate([angle, np.zeros((tiling.geometry.text_tokens, angle.shape[1]))])[None, :, None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalisation without weights, in float32, then scale and shift [B, 1 or tokens, C] in the type of x."""
    normed = functional.layer_norm(x.float(), x.shape[-1:], None, None, EPS).to(x.dtype)
    return normed * (1 + scale) + shift


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the condition [B, C]; the name `linear` is diffusers'."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, condition: Tensor, still: Still | None = None) -> tuple[Tensor, ...]:
        """`count` tensors [B, 1, C], or [B, tokens, C] where some tokens have another condition, `still`."""
        parts = self._parts(condition)
        if still is None:
            return parts
        other, chosen = still
        return tuple(torch.where(chosen, b, a) for a, b in zip(parts, self._parts(other), strict=True))

    def _parts(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(functional.silu(condition)).unsqueeze(1).chunk(self.count, dim=2)


class Attention(nn.Module):
    """Joint attention of a single block: one set of projections for video and text, no output projection."""

    def __init__(self, config: HunyuanConfig, layer: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.layer = layer
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(config.width, config.width))
        self.norm_q = RMSNorm(config.attention_head_dim, EPS)
        self.norm_k = RMSNorm(config.attention_head_dim, EPS)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, tokens, H, D] of x [B, tokens, C]."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionFn,
        stage: Tensor,
        text_len: Tensor,
    ) -> Tensor:
        """x [B, N, C] to [B, N, C]."""
        q, k, v = self.project(x)
        return attention(apply_rope(q, *rope), apply_rope(k, *rope), v, self.layer, stage, text_len).flatten(2)


class JointAttention(Attention):
    """Joint attention of a double block: video and text each with their own projections, in and out."""

    def __init__(self, config: HunyuanConfig, layer: int) -> None:
        super().__init__(config, layer)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            self.add_module(name, nn.Linear(config.width, config.width))
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])
        self.norm_added_q = RMSNorm(config.attention_head_dim, EPS)
        self.norm_added_k = RMSNorm(config.attention_head_dim, EPS)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, H, D] of text [B, L, C]."""
        linear = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (to(text).unflatten(-1, (self.heads, -1)) for to in linear)
        return self.norm_added_q(q), self.norm_added_k(k), v

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionFn,
        stage: Tensor,
        text_len: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x [B, V, C] and text [B, L, C] to the same shapes."""
        pairs = zip(self.project(x), self.project_text(text), strict=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        out = attention(apply_rope(q, *rope), apply_rope(k, *rope), v, self.layer, stage, text_len).flatten(2)
        video, text = out.split([x.shape[1], text.shape[1]], dim=1)
        return self.to_out[0](video), self.to_add_out(text)


class DoubleBlock(nn.Module):
    """Video and text side by side: joint attention, then a feed-forward for each."""

    def __init__(self, config: HunyuanConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = Modulation(config.width, 6)
        self.norm1_context = Modulation(config.width, 6)
        self.attn = JointAttention(config, layer)
        self.ff = FeedForward(config.width, config.mlp_width)
        self.ff_context = FeedForward(config.width, config.mlp_width)

    def forward(
        self, x: Tensor, text: Tensor, condition: Tensor, still: Still | None, *joint: object
    ) -> tuple[Tensor, Tensor]:
        """x [B, V, C], text [B, L, C], condition [B, C]; `joint` is what the attention takes besides."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(condition, still)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = self.norm1_context(condition)
        attended, t_attended = self.attn(normalised(x, shift, scale), normalised(text, t_shift, t_scale), *joint)
        x = x + attended * gate
        text = text + t_attended * t_gate
        x = x + self.ff(normalised(x, ff_shift, ff_scale)) * ff_gate
        text = text + self.ff_context(normalised(text, t_ff_shift, t_ff_scale)) * t_ff_gate
        return x, text


class SingleBlock(nn.Module):
    """Video and text as one sequence: attention and feed-forward in parallel, one projection of both."""

    def __init__(self, config: HunyuanConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.norm = Modulation(config.width, 3)
        self.proj_mlp = nn.Linear(config.width, config.mlp_width)
        self.proj_out = nn.Linear(config.width + config.mlp_width, config.width)

    def forward(self, x: Tensor, condition: Tensor, still: Still | None, *joint: object) -> Tensor:
        """x [B, N, C], condition [B, C]; `joint` is what the attention takes besides."""
        shift, scale, gate = self.norm(condition, still)
        normed = normalised(x, shift, scale)
        inner = functional.gelu(self.proj_mlp(normed), approximate="tanh")
        both = torch.cat([self.attn(normed, *joint), inner], dim=2)
        return x + self.proj_out(both) * gate


class Condition(nn.Module):
    """Time step, pooled prompt and, in distilled models, guidance scale, where one is given, to one vector."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(TIME_CHANNELS, config.width)
        self.text_embedder = TwoLayers(config.pooled_projection_dim, config.width)
        self.guidance_embedder = TwoLayers(TIME_CHANNELS, config.width) if config.guidance_embeds else None

    def forward(self, time: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """time and guidance [B, 256] (waves), pooled [B, pooled width], to [B, C]."""
        condition = self.timestep_embedder(time)
        if self.guidance_embedder is not None and guidance is not None:
            condition = condition + self.guidance_embedder(guidance)
        return condition + self.text_embedder(pooled)


class HunyuanDenoiser(nn.Module):
    """One call of the transformer, [B, C, f, h, w] -> [B, C, f, h, w].

    hidden_states [B, C, f, h, w], timestep [B], encoder_hidden_states [B, L, E], stage int32 [1],
    encoder_attention_mask [B, L] (1 for valid text tokens, then 0), pooled_projections [B, pooled width],
    guidance [B] (1000 times the guidance scale) where the model has guidance_embeds.

    Input and output are float32; `dtype` is what the blocks compute in. `attention` may be replaced; its layers are
    the double blocks, then the single blocks.
    """

    def __init__(self, config: HunyuanConfig, tiling: Tiling, attention: AttentionFn, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.grid = tiling.geometry.grid
        self.text_tokens = tiling.geometry.text_tokens
        self.dtype = dtype
        self.attention = attention
        tokens, half = tiling.geometry.tokens, config.attention_head_dim // 2
        video_tokens, features = tiling.geometry.video_tokens, math.prod(config.patch)
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(config.in_channels * features, config.width)})
        self.context_embedder = TextRefiner(config)
        self.time_text_embed = Condition(config)
        double = config.num_layers
        self.transformer_blocks = nn.ModuleList([DoubleBlock(config, i) for i in range(double)])
        self.single_transformer_blocks = nn.ModuleList(
            [SingleBlock(config, double + i) for i in range(config.num_single_layers)]
        )
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.out_channels * features)
        add_token_buffers(self, video_tokens, tokens, half)
        self.register_buffer("frequencies", torch.empty(TIME_CHANNELS // 2), persistent=False)
        if config.image_condition_type == TOKEN_REPLACE:
            for name, count in (("first_video", video_tokens), ("first_joint", tokens)):
                self.register_buffer(name, torch.empty(1, count, 1, dtype=torch.bool), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        stage: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        text_len = encoder_attention_mask.sum(dim=1, dtype=torch.int32)
        time = wave(timestep, self.frequencies).to(self.dtype)
        scale = None if guidance is None else wave(guidance, self.frequencies).to(self.dtype)
        pooled = pooled_projections.to(self.dtype)
        condition = self.time_text_embed(time, pooled, scale)
        still_video = still_joint = None
        if self.config.image_condition_type == TOKEN_REPLACE:
            start = wave(torch.zeros_like(timestep), self.frequencies).to(self.dtype)
            still = self.time_text_embed(start, pooled, None)
            still_video, still_joint = (still, self.first_video), (still, self.first_joint)
        text = self.context_embedder(encoder_hidden_states.to(self.dtype), time, encoder_attention_mask)
        x = permute_tokens(patches_of(hidden_states.to(self.dtype), self.grid, self.config.patch), self.order)
        x = self.x_embedder["proj"](x)
        joint = ((self.rope_cos, self.rope_sin), self.attention, stage, text_len)
        for block in self.transformer_blocks:
            x, text = block(x, text, condition, still_video, *joint)
        x = torch.cat([x, text], dim=1)
        for block in self.single_transformer_blocks:
            x = block(x, condition, still_joint, *joint)
        x = x.split([self.order.shape[0], self.text_tokens], dim=1)[0]
        scale, shift = self.norm_out(condition)
        x = self.proj_out(normalised(x, shift, scale))
        return video_of(permute_tokens(x, self.inverse), self.grid, self.config.patch).float()
