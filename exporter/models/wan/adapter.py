"""Wan 2.1 (1.3B and 14B, text-to-video and image-to-video) for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.exporter.models.base import Sampling
from svdit.exporter.models.transformer import Parts, TransformerAdapter
from svdit.exporter.models.wan.config import DEFAULT_TILE, IMAGE_TOKENS, REFERENCE_LATENT, TEXT_TOKENS, WanConfig
from svdit.plans.bundle import TensorSpec
from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import torch

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

    def inputs(self, checkpoint: Path, geometry: Geometry, batch: int | str) -> tuple[TensorSpec, ...]:
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

    def texts(self, pipe: Any, prompts: list[str], tokens: int) -> dict[str, torch.Tensor]:
        """Text is in cross-attention alone, at the pipeline's own length."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": TEXT_TOKENS}
        return {"encoder_hidden_states": pipe.encode_prompt(prompts, **options)[0]}

    def frames(self, pipe: Any, latents: torch.Tensor, checkpoint: Path) -> torch.Tensor:
        config = pipe.vae.config
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype)).sample

    def sampling(self, checkpoint: Path) -> Sampling:
        return Sampling(steps=50, guidance_scale=5.0, scheduler=partial(self.scheduler, checkpoint), cfg="calls")
