"""Name table of CogVideoX1.5: the denoiser's parameters are diffusers' tensors, same names and same shapes.

| parameter | checkpoint key | stored as |
| --- | --- | --- |
| patch_embed.proj.weight [C, P] | the same | a matrix already: 1.5 has no convolution here |
| everything else | the same | the same shape |

Nothing stays float32 in half precision: diffusers keeps no part of this class in float32 either.
"""

from __future__ import annotations

from svdit.exporter.models.cogvideox.config import CogVideoXConfig


def stored_shapes(config: CogVideoXConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the checkpoint stores in another shape than the denoiser's: none."""
    return {}
