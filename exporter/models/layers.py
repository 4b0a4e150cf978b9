"""Layers that several models have, under diffusers' parameter names.

Shape letters: B batch, N tokens, H heads, D head width, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (2i, 2i + 1) of x [B, N, H, D] in float32; cos and sin [1, N, 1, D / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def add_token_buffers(module: nn.Module, video_tokens: int, tokens: int, half: int) -> None:
    """Room for what depends on the size of the video, not stored with the weights.

    `order` and `inverse` int64 [video_tokens] (raster to tile order and back), `rope_cos` and `rope_sin`
    [1, tokens, 1, half].
    """
    for name in ("order", "inverse"):
        module.register_buffer(name, torch.empty(video_tokens, dtype=torch.int64), persistent=False)
    for name in ("rope_cos", "rope_sin"):
        module.register_buffer(name, torch.empty(1, tokens, 1, half), persistent=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class FeedForward(nn.Module):
    """Two linear layers with a tanh GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(width, inner)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](functional.gelu(self.net[0]["proj"](x), approximate="tanh"))
