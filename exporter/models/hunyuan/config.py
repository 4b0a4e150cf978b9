"""Sizes of a HunyuanVideo transformer, as its config.json states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svdit.exporter.models.config import TransformerConfig
from svdit.plans.errors import complain
from svdit.plans.fields import boolean, integer, integers, number, shown
from svdit.plans.geometry import Geometry

QK_NORM = "rms_norm"
EPS = 1e-6
"""Of every norm; the class has no option for it."""
TIME_CHANNELS = 256
"""Sines and cosines of a time step or a guidance scale, together."""
REFINER_RATIO = 4
"""Inner width of the text refiner's feed-forward over its width."""
REFERENCE_LATENT = (33, 90, 160)
"""Latent frames, rows and columns of the reference video, 129 x 720 x 1280."""
TOKEN_REPLACE = "token_replace"
"""Image-to-video whose first frame is given and so modulated as at time 0."""
IMAGE_CONDITIONS = (None, "latent_concat", TOKEN_REPLACE)
TEXT_TOKENS = dict(zip(IMAGE_CONDITIONS, (256, 288 + 252, 144 + 252), strict=True))
"""What the pipelines of each pass unless told otherwise, padding included. Image-to-video puts every second or every
fourth of the image's 576 tokens before the prompt, whose last header of four tokens is cut out."""
DEFAULT_TILE = (1, 8, 16)


@dataclass(frozen=True)
class HunyuanConfig(TransformerConfig):
    """The constructor arguments of diffusers' HunyuanVideoTransformer3DModel."""

    class_name: ClassVar[str] = "HunyuanVideoTransformer3DModel"
    in_channels: int = 16
    out_channels: int | None = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = QK_NORM
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    image_condition_type: str | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in (
            "in_channels",
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "num_single_layers",
            "num_refiner_layers",
            "patch_size",
            "patch_size_t",
            "text_embed_dim",
            "pooled_projection_dim",
        ):
            integer(getattr(self, name), name, low=1)
        put(self, "out_channels", integer(self.out_channels or self.in_channels, "out_channels", low=1))
        for name in ("mlp_ratio", "rope_theta"):
            if number(getattr(self, name), name) <= 0:
                raise complain(name, getattr(self, name), "a positive number")
        boolean(self.guidance_embeds, "guidance_embeds")
        if self.qk_norm != QK_NORM:
            raise complain("qk_norm", shown(self.qk_norm), shown(QK_NORM))
        put(self, "rope_axes_dim", integers(self.rope_axes_dim, "rope_axes_dim", 3, low=2))
        for i, dim in enumerate(self.rope_axes_dim):
            if dim % 2:
                raise complain(f"rope_axes_dim[{i}]", dim, "an even number")
        if sum(self.rope_axes_dim) != self.attention_head_dim:
            expected = f"attention_head_dim, {self.attention_head_dim}, as the sum"
            raise complain("rope_axes_dim", list(self.rope_axes_dim), expected)
        if self.image_condition_type not in IMAGE_CONDITIONS:
            expected = "one of " + ", ".join(map(shown, IMAGE_CONDITIONS))
            raise complain("image_condition_type", shown(self.image_condition_type), expected)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_tokens(self) -> int:
        """What the pipeline passes when it is not told another number."""
        return TEXT_TOKENS[self.image_condition_type]

    @property
    def mlp_width(self) -> int:
        """Inner width of the feed-forward layers of both kinds of blocks."""
        return int(self.width * self.mlp_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.patch_size_t, self.patch_size, self.patch_size

    def geometry(self, latent: tuple[int, int, int]) -> Geometry:
        """Attention geometry for latents of (f, h, w). Raises SvditError when patches do not divide them."""
        layers = self.num_layers + self.num_single_layers
        grid, heads = self.grid(latent), self.num_attention_heads
        return Geometry(grid, self.text_tokens, "after", layers, heads, self.attention_head_dim)
