"""Wan 2.1 (1.3B and 14B, text-to-video and image-to-video) for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from svdit.exporter.models.base import Sampling
from svdit.exporter.models.transformer import Parts, TransformerAdapter
from svdit.exporter.models.wan.config import DEFAULT_TILE, IMAGE_TOKENS, REFERENCE_LATENT, TEXT_TOKENS, WanConfig
from svdit.plans.bundle import TensorSpec
from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry

IMAGE = "encoder_hidden_states_image"


class WanAdapter(TransformerAdapter):
    """A folder of diffusers' WanPipeline or WanImageToVideoPipeline, or its transformer folder alone."""

    name = "wan2.1"
    published = WanConfig()
    tile = DEFAULT_TILE
    latent = REFERENCE_LATENT
    vae_keys = ("scale_factor_temporal", "scale_factor_spatial")

    def parts(self) -> Parts:
        from svdit.exporter.models.wan.model import WanDenoiser, constants
        from svdit.exporter.models.wan.weights import keeps_float32, stored_shapes

        return Parts(WanDenoiser, constants, stored_shapes, keeps_float32)

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        return TEXT_TOKENS, self.config(checkpoint).text_dim

    def inputs(self, checkpoint: Path, geometry: Geometry, batch: int) -> tuple[TensorSpec, ...]:
        """The common four and, for image-to-video, encoder_hidden_states_image."""
        width = self.config(checkpoint).image_dim
        image = () if width is None else (TensorSpec(IMAGE, "float32", (batch, IMAGE_TOKENS, width)),)
        return (*super().inputs(checkpoint, geometry, batch), *image)

    def check_geometry(self, checkpoint: Path, geometry: Geometry) -> None:
        super().check_geometry(checkpoint, geometry)
        longest = self.config(checkpoint).rope_max_seq_len
        for axis, size in enumerate(geometry.grid):
            if size > longest:
                raise complain(f"plan geometry.grid[{axis}]", size, f"at most rope_max_seq_len, {longest}")

    def sampling(self, checkpoint: Path) -> Sampling:
        return Sampling(steps=50, guidance_scale=5.0, scheduler=partial(self.scheduler, checkpoint), cfg="calls")
