"""Sizes of a Wan transformer, as its config.json states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svdit.exporter.models.config import TransformerConfig
from svdit.plans.errors import complain
from svdit.plans.fields import boolean, integer, integers, number, shown
from svdit.plans.geometry import Geometry

QK_NORM = "rms_norm_across_heads"
ROPE_THETA = 10_000.0
REFERENCE_LATENT = (21, 90, 160)
"""Latent frames, rows and columns of the reference video, 81 x 720 x 1280."""
TEXT_TOKENS = 512
"""Prompt tokens that Wan's pipeline passes to cross-attention, padding included."""
IMAGE_TOKENS = 257
"""Tokens of the first frame that image-to-video models see in cross-attention: CLIP's."""
DEFAULT_TILE = (1, 8, 16)


@dataclass(frozen=True)
class WanConfig(TransformerConfig):
    """The constructor arguments of diffusers' WanTransformer3DModel; image-to-video models have an `image_dim`."""

    class_name: ClassVar[str] = "WanTransformer3DModel"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = QK_NORM
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "patch_size", integers(self.patch_size, "patch_size", 3, low=1))
        for name in (
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "text_dim",
            "freq_dim",
            "ffn_dim",
            "num_layers",
            "rope_max_seq_len",
        ):
            integer(getattr(self, name), name, low=1)
        put(self, "out_channels", integer(self.out_channels or self.in_channels, "out_channels", low=1))
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise complain(name, getattr(self, name), "an even number")
        boolean(self.cross_attn_norm, "cross_attn_norm")
        if number(self.eps, "eps") <= 0:
            raise complain("eps", self.eps, "a positive number")
        if self.qk_norm != QK_NORM:
            raise complain("qk_norm", shown(self.qk_norm), shown(QK_NORM))
        if self.pos_embed_seq_len is not None:
            hint = "models of a first and a last frame are not supported"
            raise complain("pos_embed_seq_len", shown(self.pos_embed_seq_len), "null", hint)
        if self.image_dim is not None:
            integer(self.image_dim, "image_dim", low=1)
        expected = None if self.image_dim is None else self.width
        if self.added_kv_proj_dim != expected:
            hint = "null for text-to-video, the width for image-to-video"
            raise complain("added_kv_proj_dim", shown(self.added_kv_proj_dim), shown(expected), hint)
        if self.in_channels != self.out_channels and self.image_dim is None:
            raise complain("in_channels", self.in_channels, f"out_channels, {self.out_channels}, without image_dim")

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.patch_size

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def geometry(self, latent: tuple[int, int, int]) -> Geometry:
        """Attention geometry for latents of (f, h, w). Raises SvditError when patches do not divide them."""
        grid, heads = self.grid(latent), self.num_attention_heads
        return Geometry(grid, 0, "none", self.num_layers, heads, self.attention_head_dim)

    def rope_split(self) -> tuple[int, int, int]:
        """Channels of a head that carry time, row and column positions."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side
