"""CogVideoX1.5's denoiser with its video tokens in tile order and its attention left to a function.

The parameters are those of diffusers' CogVideoXTransformer3DModel under the same names. Differences that do not
change the result: video tokens are permuted once before the patch embedding and once after the last projection;
RoPE is a pair of permuted constants over the joint sequence, 1 and 0 for text, so that nothing is assigned into
a slice; channels come before frames, as for every model here, where diffusers' class has frames first.

Text comes before the video in the joint sequence. There is no mask: padding tokens of the text attend and are
attended, so text_len is always L.

Shape letters: B batch, N tokens (L of text, then V of video), H heads, D head width, C width H * D, T width of
the time embedding, P patch features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from svdit.exporter.models.cogvideox.config import QK_NORM_EPS, ROPE_THETA, TIME_PERIOD, CogVideoXConfig
from svdit.exporter.models.layers import FeedForward, add_token_buffers, apply_rope
from svdit.exporter.token_order import patches_of, permute_tokens, video_of

if TYPE_CHECKING:
    from svdit.exporter.models.base import AttentionFn
    from svdit.plans.tiles import Tiling


def constants(config: CogVideoXConfig, tiling: Tiling) -> dict[str, np.ndarray]:
    """Values of the denoiser's buffers, by buffer name."""
    cos, sin = rope_tables(config, tiling)
    ofs = {}
    if config.ofs_embed_dim is not None:
        ofs["ofs_frequencies"] = frequencies(config, config.ofs_embed_dim)
    return {
        "order": tiling.order,
        "inverse": tiling.inverse,
        "rope_cos": cos,
        "rope_sin": sin,
        "frequencies": frequencies(config, config.width),
        **ofs,
    }


def frequencies(config: CogVideoXConfig, channels: int) -> np.ndarray:
    """float32 [channels / 2], of the sines and cosines that embed one number."""
    half = channels // 2
    exponent = -math.log(TIME_PERIOD) * torch.arange(half, dtype=torch.float32) / (half - config.freq_shift)
    return torch.exp(exponent).numpy()


def rope_tables(config: CogVideoXConfig, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin float32 [1, N, 1, D / 2]: no rotation for the text, then the video's tokens in tile order.

    Positions are plain integers along each axis (grid_type "slice"), the arithmetic is in float32, both as in
    diffusers' pipeline.
    """
    positions = np.unravel_index(tiling.order, tiling.geometry.grid)
    parts = []
    for position, dim in zip(positions, config.rope_split(), strict=True):
        frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        parts.append(torch.outer(torch.from_numpy(position).float(), frequencies))
    video = torch.cat(parts, dim=1)
    text = torch.zeros(tiling.geometry.text_tokens, video.shape[1])
    angle = torch.cat([text, video])[None, :, None, :]
    return angle.cos().numpy(), angle.sin().numpy()


class PatchEmbed(nn.Module):
    """Projections of the text and of the video's patches to the width of the blocks."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.in_channels * config.patch_features, config.width)
        self.text_proj = nn.Linear(config.text_embed_dim, config.width)

    def forward(self, text: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self.text_proj(text), self.proj(patches)


class TimeEmbedding(nn.Module):
    """Sinusoids [B, `wide_in`] to the time embedding [B, T]."""

    def __init__(self, config: CogVideoXConfig, wide_in: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(wide_in, config.time_embed_dim)
        self.linear_2 = nn.Linear(config.time_embed_dim, config.time_embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(x)))


class JointNorm(nn.Module):
    """One layer norm for both streams; shift, scale and gate of each stream from the time embedding."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, text: Tensor, video: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """text [B, L, C], video [B, V, C], time [B, T] to the joint [B, N, C] and both gates [B, 1, C]."""
        modulation = self.linear(functional.silu(time)).unsqueeze(1)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=2)
        text = self.norm(text) * (1 + text_scale) + text_shift
        video = self.norm(video) * (1 + scale) + shift
        return torch.cat([text, video], dim=1), text_gate, gate


class SelfAttention(nn.Module):
    """Attention over text and video, with layer norms over the channels of each head."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        width, dim = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(width, width, bias=config.attention_bias)
        self.to_k = nn.Linear(width, width, bias=config.attention_bias)
        self.to_v = nn.Linear(width, width, bias=config.attention_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.LayerNorm(dim, QK_NORM_EPS)
        self.norm_k = nn.LayerNorm(dim, QK_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionFn,
        layer: int,
        stage: Tensor,
        text_len: Tensor,
    ) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = apply_rope(self.norm_q(q), *rope), apply_rope(self.norm_k(k), *rope)
        return self.to_out[0](attention(q, k, v, layer, stage, text_len).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward over the joint sequence; each stream keeps its own residual."""

    def __init__(self, config: CogVideoXConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.text_tokens = config.max_text_seq_length
        self.norm1 = JointNorm(config)
        self.attn1 = SelfAttention(config)
        self.norm2 = JointNorm(config)
        self.ff = FeedForward(config.width, 4 * config.width)

    def forward(
        self,
        text: Tensor,
        video: Tensor,
        time: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionFn,
        stage: Tensor,
        text_len: Tensor,
    ) -> tuple[Tensor, Tensor]:
        joint, text_gate, gate = self.norm1(text, video, time)
        out = self.attn1(joint, rope, attention, self.layer, stage, text_len)
        text = text + text_gate * out[:, : self.text_tokens]
        video = video + gate * out[:, self.text_tokens :]
        joint, text_gate, gate = self.norm2(text, video, time)
        out = self.ff(joint)
        return text + text_gate * out[:, : self.text_tokens], video + gate * out[:, self.text_tokens :]


class OutputNorm(nn.Module):
    """The last layer norm, shifted and scaled by the time embedding."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.linear(functional.silu(time)).unsqueeze(1).chunk(2, dim=2)
        return self.norm(x) * (1 + scale) + shift


class CogVideoXDenoiser(nn.Module):
    """hidden_states [B, C, f, h, w], timestep [B], encoder_hidden_states [B, L, E], stage int32 [1] -> [B, C, f, h, w].

    Image-to-video models take ofs [B] besides, and twice the channels they give: latents and those of the first frame.

    NOTE diffusers' class has [B, f, C, h, w] on both sides: swap axes 1 and 2 of what its pipeline passes.
    Input and output are float32; `dtype` is what everything else computes in. `attention` may be replaced.
    """

    def __init__(self, config: CogVideoXConfig, tiling: Tiling, attention: AttentionFn, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.grid = tiling.geometry.grid
        self.dtype = dtype
        self.attention = attention
        geometry, half = tiling.geometry, config.attention_head_dim // 2
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimeEmbedding(config, config.width)
        self.ofs_embedding = None
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimeEmbedding(config, config.ofs_embed_dim)
            half_ofs = torch.empty(config.ofs_embed_dim // 2)
            self.register_buffer("ofs_frequencies", half_ofs, persistent=False)
        self.transformer_blocks = nn.ModuleList([Block(config, i) for i in range(config.num_layers)])
        self.norm_final = nn.LayerNorm(config.width, config.norm_eps)
        self.norm_out = OutputNorm(config)
        self.proj_out = nn.Linear(config.width, config.out_channels * config.patch_features)
        add_token_buffers(self, geometry.video_tokens, geometry.tokens, half)
        self.register_buffer("frequencies", torch.empty(config.width // 2), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        stage: Tensor,
        ofs: Tensor | None = None,
    ) -> Tensor:
        text_len = torch.full_like(timestep, self.config.max_text_seq_length, dtype=torch.int32)
        time = self.time_embedding(self.sinusoids(timestep, self.frequencies).to(self.dtype))
        if ofs is not None:
            time = time + self.ofs_embedding(self.sinusoids(ofs, self.ofs_frequencies).to(self.dtype))
        patches = permute_tokens(patches_of(hidden_states.to(self.dtype), self.grid, self.config.patch), self.order)
        text, video = self.patch_embed(encoder_hidden_states.to(self.dtype), patches)
        rope = (self.rope_cos, self.rope_sin)
        for block in self.transformer_blocks:
            text, video = block(text, video, time, rope, self.attention, stage, text_len)
        out = self.proj_out(self.norm_out(self.norm_final(video), time))
        return video_of(permute_tokens(out, self.inverse), self.grid, self.config.patch).float()

    def sinusoids(self, x: Tensor, frequencies: Tensor) -> Tensor:
        """x [B] times the frequencies [F] to float32 [B, 2 F]."""
        angle = x.float()[:, None] * frequencies[None]
        parts = (angle.cos(), angle.sin()) if self.config.flip_sin_to_cos else (angle.sin(), angle.cos())
        return torch.cat(parts, dim=-1)
