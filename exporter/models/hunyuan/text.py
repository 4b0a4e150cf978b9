"""HunyuanVideo's text refiner: two small transformer blocks over the prompt, always dense.

Shape letters: B batch, L text tokens, H heads, C width, E text width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from svdit.exporter.models.hunyuan.config import EPS, REFINER_RATIO, TIME_CHANNELS, HunyuanConfig

FORBIDDEN = 1e30
"""Taken from the score of a pair that must not see each other: exp gives exactly 0 beside key 0."""


def wave(x: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines, then sines, of x [B] times the frequencies [F], float32 [B, 2 F]."""
    angle = x.float()[:, None] * frequencies[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TwoLayers(nn.Module):
    """linear_1, SiLU, linear_2."""

    def __init__(self, wide_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(wide_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(x)))


class LayerNorm(nn.Module):
    """Layer normalisation with scale and shift, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), EPS)
        return normed.to(x.dtype)


class RefinerAttention(nn.Module):
    """Self-attention of the prompt."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(config.width, config.width))
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, C], bias [B, 1, L, L] added to the scores."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        if torch.compiler.is_exporting():  # a plainer graph than the exporter's own expansion
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            out = torch.softmax(scores.float() + bias, dim=-1).to(v.dtype) @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class RefinerFeedForward(nn.Module):
    """Two linear layers with a SiLU between them; the names are diffusers'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = REFINER_RATIO * width
        first = nn.ModuleDict({"proj": nn.Linear(width, inner)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](functional.silu(self.net[0]["proj"](x)))


class Gates(nn.Module):
    """Gates of attention and feed-forward; the name `linear` is diffusers'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        gate, ff_gate = self.linear(functional.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        return gate, ff_gate


class RefinerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and a gate."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width)
        self.attn = RefinerAttention(config)
        self.norm2 = LayerNorm(config.width)
        self.ff = RefinerFeedForward(config.width)
        self.norm_out = Gates(config.width)

    def forward(self, x: Tensor, condition: Tensor, bias: Tensor) -> Tensor:
        gate, ff_gate = self.norm_out(condition)
        x = x + self.attn(self.norm1(x), bias) * gate
        return x + self.ff(self.norm2(x)) * ff_gate


class RefinerCondition(nn.Module):
    """Time step and mean of the valid text tokens to one vector."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(TIME_CHANNELS, config.width)
        self.text_embedder = TwoLayers(config.text_embed_dim, config.width)

    def forward(self, time: Tensor, mean: Tensor) -> Tensor:
        return self.timestep_embedder(time) + self.text_embedder(mean)


class TextRefiner(nn.Module):
    """Prompt embeddings [B, L, E] to the text tokens [B, L, C] of the blocks."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.time_text_embed = RefinerCondition(config)
        self.proj_in = nn.Linear(config.text_embed_dim, config.width)
        blocks = nn.ModuleList([RefinerBlock(config) for _ in range(config.num_refiner_layers)])
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def forward(self, text: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """text [B, L, E], time [B, 256] (waves), mask [B, L]: 1 for valid tokens."""
        weight = mask.float().unsqueeze(-1)
        mean = ((text.float() * weight).sum(dim=1) / weight.sum(dim=1)).to(text.dtype)
        condition = self.time_text_embed(time, mean)
        bias = self.bias(mask)
        x = self.proj_in(text)
        for block in self.token_refiner["refiner_blocks"]:
            x = block(x, condition, bias)
        return x

    @staticmethod
    def bias(mask: Tensor) -> Tensor:
        """float32 [B, 1, L, L]: 0 between valid tokens and for key 0, -FORBIDDEN for every other pair."""
        valid = mask.float()
        bias = (valid[:, None, :, None] * valid[:, None, None, 1:] - 1) * FORBIDDEN
        return torch.cat([torch.zeros_like(bias[..., :1]), bias], dim=-1)
