"""Sizes of a CogVideoX1.5 transformer, as its config.json states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svdit.exporter.models.config import TransformerConfig
from svdit.plans.errors import complain
from svdit.plans.fields import boolean, integer, number, shown
from svdit.plans.geometry import Geometry

QK_NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
TIME_PERIOD = 10_000.0
"""Longest period of the sinusoids that embed the time step."""
REFERENCE_LATENT = (22, 96, 170)
"""Latent frames, rows and columns of the reference video, 81 x 768 x 1360: 21 frames and one of padding."""
DEFAULT_TILE = (1, 8, 16)
SUPPORTED = "CogVideoX1.5 is supported"


@dataclass(frozen=True)
class CogVideoXConfig(TransformerConfig):
    """The constructor arguments of diffusers' CogVideoXTransformer3DModel, in the forms of 1.5.

    The defaults are those of the class, which are CogVideoX 1.0 and so refused: PUBLISHED has what 1.5 needs.
    Image-to-video has an `ofs_embed_dim`.
    """

    class_name: ClassVar[str] = "CogVideoXTransformer3DModel"
    supported: ClassVar[str] = SUPPORTED
    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self) -> None:
        if self.patch_size_t is None:
            raise complain("patch_size_t", "null, which is CogVideoX 1.0", "patches in time", SUPPORTED)
        for name in (
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "out_channels",
            "time_embed_dim",
            "text_embed_dim",
            "num_layers",
            "sample_width",
            "sample_height",
            "patch_size",
            "patch_size_t",
            "max_text_seq_length",
        ):
            integer(getattr(self, name), name, low=1)
        if self.ofs_embed_dim is None and self.in_channels != self.out_channels:
            hint = "more channels go with ofs_embed_dim, image-to-video"
            raise complain("in_channels", self.in_channels, f"out_channels, {self.out_channels}", hint)
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            expected = f"null or time_embed_dim, {self.time_embed_dim}"
            raise complain("ofs_embed_dim", shown(self.ofs_embed_dim), expected, "the two are added")
        if self.attention_head_dim % 16:
            raise complain("attention_head_dim", self.attention_head_dim, "a multiple of 16, so that RoPE has pairs")
        boolean(self.flip_sin_to_cos, "flip_sin_to_cos")
        boolean(self.attention_bias, "attention_bias")
        if 2 * number(self.freq_shift, "freq_shift") >= self.width:
            raise complain("freq_shift", self.freq_shift, f"less than half the width, {self.width // 2}")
        if number(self.norm_eps, "norm_eps") <= 0:
            raise complain("norm_eps", self.norm_eps, "a positive number")
        for name, only in ONLY.items():
            if getattr(self, name) != only:
                raise complain(name, shown(getattr(self, name)), shown(only), SUPPORTED)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of one token."""
        return self.patch_size_t, self.patch_size, self.patch_size

    @property
    def patch_features(self) -> int:
        """Numbers in one patch of one channel."""
        return self.patch_size_t * self.patch_size**2

    def geometry(self, latent: tuple[int, int, int]) -> Geometry:
        """Attention geometry for latents of (f, h, w). Raises SvditError when patches do not divide them."""
        text, heads = self.max_text_seq_length, self.num_attention_heads
        return Geometry(self.grid(latent), text, "before", self.num_layers, heads, self.attention_head_dim)

    def largest(self) -> tuple[int, int]:
        """Most token rows and columns: diffusers' pipeline makes positions up to the sample size, and no more."""
        return self.sample_height // self.patch_size, self.sample_width // self.patch_size

    def rope_split(self) -> tuple[int, int, int]:
        """Channels of a head that carry time, row and column positions."""
        side = self.attention_head_dim // 8 * 3
        return self.attention_head_dim // 4, side, side


ONLY = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
}
"""Arguments of which one value is supported."""
PUBLISHED = CogVideoXConfig(
    num_attention_heads=48,
    num_layers=42,
    sample_width=170,
    sample_height=96,
    sample_frames=81,
    patch_size_t=2,
    use_rotary_positional_embeddings=True,
)
"""CogVideoX1.5-5B at its reference size."""
