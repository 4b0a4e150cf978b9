"""Where `tiny` differs from Wan: its latents are the pixels themselves, its text a table of caption words."""

from __future__ import annotations

import numpy as np
import torch


def embed_captions(table: torch.Tensor, tokens: list[list[int] | None], length: int) -> torch.Tensor:
    """Rows of the caption table [B, length, width]; None is the unconditional caption, all zeros."""
    result = torch.zeros(len(tokens), length, table.shape[1])
    for i, row in enumerate(tokens):
        if row is not None:
            result[i] = table[row]
    return result


def pixels(latents: torch.Tensor) -> np.ndarray:
    """Values in [-1, 1], [B, 3, f, h, w], to uint8 [B, f, h, w, 3]."""
    scaled = ((latents.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().numpy()
