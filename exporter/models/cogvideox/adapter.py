"""CogVideoX1.5 text-to-video for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from svdit.exporter.models.base import Sampling
from svdit.exporter.models.cogvideox.config import DEFAULT_TILE, PUBLISHED, REFERENCE_LATENT
from svdit.exporter.models.transformer import Parts, TransformerAdapter
from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry


class CogVideoXAdapter(TransformerAdapter):
    """A diffusers CogVideoXPipeline folder, or its transformer folder alone."""

    name = "cogvideox1.5"
    published = PUBLISHED
    tile = DEFAULT_TILE
    latent = REFERENCE_LATENT

    def parts(self) -> Parts:
        from svdit.exporter.models.cogvideox.model import CogVideoXDenoiser, constants
        from svdit.exporter.models.cogvideox.weights import stored_shapes

        return Parts(CogVideoXDenoiser, constants, stored_shapes)

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        config = self.config(checkpoint)
        return config.max_text_seq_length, config.text_embed_dim

    def check_geometry(self, checkpoint: Path, geometry: Geometry) -> None:
        super().check_geometry(checkpoint, geometry)
        limits = zip((1, 2), ("sample_height", "sample_width"), self.config(checkpoint).largest(), strict=True)
        for axis, name, largest in limits:
            if geometry.grid[axis] > largest:
                raise complain(
                    f"plan geometry.grid[{axis}]",
                    geometry.grid[axis],
                    f"at most {largest}, the {name} of the checkpoint in patches",
                    "diffusers' pipeline makes no positions beyond that",
                )

    def sampling(self, checkpoint: Path) -> Sampling:
        return Sampling(steps=50, guidance_scale=6.0, scheduler=partial(self.scheduler, checkpoint), cfg="batch")
