"""CogVideoX1.5, text-to-video and image-to-video, for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.exporter.models.base import Sampling
from svdit.exporter.models.cogvideox.config import DEFAULT_TILE, PUBLISHED, REFERENCE_LATENT
from svdit.exporter.models.transformer import Parts, TransformerAdapter
from svdit.plans.bundle import TensorSpec
from svdit.plans.errors import complain
from svdit.plans.fields import array, integer
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import torch


class CogVideoXAdapter(TransformerAdapter):
    """A folder of diffusers' CogVideoXPipeline or CogVideoXImageToVideoPipeline, or its transformer folder alone."""

    name = "cogvideox1.5"
    published = PUBLISHED
    tile = DEFAULT_TILE
    latent = REFERENCE_LATENT
    pads_frames = True

    def parts(self) -> Parts:
        from svdit.exporter.models.cogvideox.model import CogVideoXDenoiser, constants
        from svdit.exporter.models.cogvideox.weights import stored_shapes

        return Parts(CogVideoXDenoiser, constants, stored_shapes)

    def vae_factors(self, config: dict) -> tuple[int, int, int]:
        side = 2 ** (len(array(config.get("block_out_channels", [0] * 4), "block_out_channels", "widths")) - 1)
        return integer(config.get("temporal_compression_ratio", 4), "temporal_compression_ratio", low=1), side, side

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        config = self.config(checkpoint)
        return config.max_text_seq_length, config.text_embed_dim

    def inputs(self, checkpoint: Path, geometry: Geometry, batch: int | str) -> tuple[TensorSpec, ...]:
        """The common four and, for image-to-video, ofs."""
        ofs = () if self.config(checkpoint).ofs_embed_dim is None else (TensorSpec("ofs", "float32", (batch,)),)
        return (*super().inputs(checkpoint, geometry, batch), *ofs)

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

    def texts(self, pipe: Any, prompts: list[str], tokens: int) -> dict[str, torch.Tensor]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": tokens}
        return {"encoder_hidden_states": pipe.encode_prompt(prompts, **options)[0]}

    def frames(self, pipe: Any, latents: torch.Tensor, checkpoint: Path) -> torch.Tensor:
        """Without the frames that fill up the first patch: as in the pipeline, for the shortest video of this grid."""
        padding = self.config(checkpoint).patch_size_t - 1
        return pipe.decode_latents(latents[:, :, padding:].transpose(1, 2).to(pipe.vae.dtype))

    def scheduler(self, checkpoint: Path) -> object:
        """As in the folder; the DPM scheduler of these models gets the interface that all others have."""
        from svdit.exporter.models.cogvideox.scheduler import with_memory

        return with_memory(super().scheduler(checkpoint))

    def sampling(self, checkpoint: Path) -> Sampling:
        return Sampling(steps=50, guidance_scale=6.0, scheduler=partial(self.scheduler, checkpoint), cfg="batch")
