"""`tiny` for the exporter, the runners and the search: a small flavour of Wan whose weights are shipped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter.models.base import Sampling
from svdit.exporter.models.tiny.config import DEFAULT_TILE, PUBLISHED, Captions
from svdit.exporter.models.tiny.prompts import tokens_of
from svdit.exporter.models.wan.adapter import WanAdapter
from svdit.plans.errors import complain

if TYPE_CHECKING:
    import numpy as np
    import torch

STEPS = 25
GUIDANCE_SCALE = 3.0


class TinyAdapter(WanAdapter):
    """A folder with transformer/, scheduler/ and captions/."""

    name = "tiny"
    published = PUBLISHED
    tile = DEFAULT_TILE
    factors = (1, 1, 1)
    pipeline_class = None

    def packaged_checkpoint(self) -> Path | None:
        return Path(__file__).with_name("checkpoint")

    def captions(self, checkpoint: Path) -> Captions:
        """The caption vocabulary. Raises SvditError where it contradicts the transformer's text_dim."""
        captions = Captions.read(self.captions_folder(checkpoint))
        text_dim = self.config(checkpoint).text_dim
        if captions.width != text_dim:
            where = f"{self.captions_folder(checkpoint) / 'config.json'}: $.width"
            raise complain(where, captions.width, f"{text_dim}, the transformer's text_dim")
        return captions

    def captions_folder(self, checkpoint: Path) -> Path:
        folder = Path(checkpoint) / "captions"
        if not (folder / "config.json").is_file():
            raise complain(
                f"checkpoint {checkpoint}",
                "no captions/config.json",
                "a tiny checkpoint folder with transformer/, scheduler/ and captions/",
            )
        return folder

    def reference_latent(self, checkpoint: Path) -> tuple[int, int, int]:
        return self.captions(checkpoint).video

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        captions = self.captions(checkpoint)
        return captions.tokens, captions.width

    def sampling(self, checkpoint: Path) -> Sampling:
        walk = partial(self._walk_sigmas, checkpoint)
        return Sampling(STEPS, GUIDANCE_SCALE, partial(self.scheduler, checkpoint), cfg="batch", walk_sigmas=walk)

    def _walk_sigmas(self, checkpoint: Path, steps: int) -> list[float]:
        """The scheduler's own levels end at almost none, so those of a short run leave its last step nothing to do."""
        import numpy as np

        scheduler = self.scheduler(checkpoint)
        levels = np.linspace(scheduler.sigma_max, scheduler.sigma_min, STEPS)  # before the shift, as the scheduler does
        return levels[np.arange(steps) * STEPS // steps].tolist()

    def encode_prompts(self, checkpoint: Path, prompts: list[str]) -> torch.Tensor:
        from svdit.exporter.models.tiny.model import embed_captions
        from svdit.exporter.models.tiny.weights import caption_table

        captions = self.captions(checkpoint)
        tokens = [tokens_of(prompt, captions) if prompt.strip() else None for prompt in prompts]
        return embed_captions(caption_table(self.captions_folder(checkpoint), captions), tokens, captions.tokens)

    def decode(self, checkpoint: Path, latents: torch.Tensor) -> np.ndarray:
        from svdit.exporter.models.tiny.model import pixels

        if latents.ndim != 5 or latents.shape[1] != self.published.out_channels:
            raise complain("latents", list(latents.shape), f"[B, {self.published.out_channels}, f, h, w]")
        return pixels(latents)
