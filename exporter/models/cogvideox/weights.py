"""Name table of CogVideoX1.5: the denoiser's parameters are diffusers' tensors, same names and same shapes.

| parameter | checkpoint key | stored as |
| --- | --- | --- |
| patch_embed.proj.weight [C, P] | the same | a matrix already: 1.5 has no convolution here |
| everything else | the same | the same shape |

Nothing stays float32 in half precision: diffusers keeps no part of this class in float32 either.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter.models.base import StoredTensor
from svdit.exporter.weights import match, stored_tensors

if TYPE_CHECKING:
    import torch


def find_weights(module: torch.nn.Module, folder: Path) -> dict[str, StoredTensor]:
    """Where each parameter of the denoiser lies. Raises SvditError unless the files hold exactly these."""
    expected = {name: (name, tuple(parameter.shape)) for name, parameter in module.named_parameters()}
    return match(expected, stored_tensors(folder), folder)
