"""The output errors of many tile patterns from a single pass over the attention scores.

Softmax over a union of key tiles is a quotient of two sums over those tiles. So the numerator and
denominator of every (query row, key tile) pair are computed once, and each pattern costs only a small matrix
product with its 0/1 mask: about M / t of the scores' arithmetic for M patterns on tiles of t tokens.

Letters: B batch, N tokens, H heads, D head width, M patterns, nT tiles, t largest tile, Q query tiles of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svdit.plans.tiles import Tiling

CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 1 << 30}
"""Largest score block; small enough for a CPU's caches to help, large enough to fill a GPU."""


@dataclass(frozen=True)
class TileErrors:
    """Sums over the measured query rows of all batch elements, float64 on the CPU.

    error  [H, M]  squared output error of each pattern
    power  [H]     squared dense output
    count  number of summed output values (rows * D)
    mass   [H, nT, nT]  attention mass that query tiles give to key tiles, mean over rows; rows that were
           not measured are zero
    """

    error: np.ndarray
    power: np.ndarray
    count: int
    mass: np.ndarray


class TileErrorMeter:
    """Measures patterns of one tiling. Its tensors live on `device`."""

    def __init__(self, tiling: Tiling, device: str = "cpu") -> None:
        sizes = torch.as_tensor(tiling.sizes, dtype=torch.int64)
        starts = torch.as_tensor(tiling.tile_offsets[:-1], dtype=torch.int64)
        place = torch.arange(int(sizes.max()))
        self.valid = (place[None] < sizes[:, None]).to(device)
        self.index = torch.where(self.valid.cpu(), starts[:, None] + place[None], starts[:, None]).to(device)
        self.sizes = sizes.to(device)
        self.device, self.num_tiles, self.tile_rows = device, len(sizes), int(sizes.max())
        self.text_tokens = tiling.geometry.text_tokens
        self.text_start = 0 if tiling.text_first else tiling.geometry.video_tokens

    def measure(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Tensor,
        text_len: Tensor | None = None,
        query_tiles: Tensor | None = None,
    ) -> TileErrors:
        """q, k, v [B, N, H, D]; masks bool [H, M, nT, nT] (M may be 0); query_tiles: which tiles to measure on.

        All arithmetic is float32. NOTE a row whose kept scores all lie more than about 87 below its largest
        score counts as a row of zeros: the common maximum is subtracted before exp.
        """
        batch, _, heads, width = q.shape
        tiles = torch.arange(self.num_tiles, device=self.device) if query_tiles is None else query_tiles
        budget = CHUNK_BYTES["cuda" if q.is_cuda else "cpu"]
        chunk = max(1, budget // (4 * self.tile_rows * self.num_tiles * self.tile_rows))
        num_masks = masks.shape[1]
        error = torch.zeros(heads, num_masks, dtype=torch.float64, device=self.device)
        power = torch.zeros(heads, dtype=torch.float64, device=self.device)
        mass = torch.zeros(heads, self.num_tiles, self.num_tiles, device=self.device)
        ones = torch.ones(1, self.num_tiles, self.num_tiles, dtype=torch.bool, device=self.device)
        for b in range(batch):
            seen = self._seen(text_len, b)
            for h in range(heads):
                keys = k[b, :, h].float()[self.index.flatten()] * width**-0.5
                values = torch.cat([v[b, :, h].float()[self.index], self.valid[..., None]], -1) * seen[..., None]
                queries = q[b, :, h].float()[self.index]
                weights = torch.cat([masks[h], ones]).transpose(0, 1).float()
                for part in tiles.split(chunk):
                    partial = self._partial(queries[part].flatten(0, 1), keys, values)
                    outputs, denominators = self._combine(partial, weights[part])
                    rows = self.valid[part][:, None]
                    full = outputs[:, -1:].clone()
                    power[h] += self._squared(full, rows).sum()
                    error[h] += self._squared(outputs.sub_(full), rows)[:-1]
                    share = partial[..., -1].view(self.num_tiles, len(part), -1) / denominators[:, -1].clamp_min(1e-30)
                    share = (share * self.valid[part]).sum(-1) / self.sizes[part]
                    mass[h, part] += share.T / batch
        count = batch * int(self.sizes[tiles].sum()) * width
        return TileErrors(error.cpu().numpy(), power.cpu().numpy(), count, mass.double().cpu().numpy())

    def _seen(self, text_len: Tensor | None, b: int) -> Tensor:
        """float32 [nT, t]: 1 for keys that exist and are not padding text."""
        seen = self.valid
        if text_len is not None and self.text_tokens:
            place = self.index - self.text_start
            seen = seen & ~((place >= text_len[b]) & (place >= 0) & (place < self.text_tokens))
        return seen.float()

    def _partial(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[nT, R, D + 1]: numerators and, last, denominators of R query rows over each key tile."""
        scores = queries @ keys.T
        scores -= scores.amax(-1, keepdim=True)
        scores.exp_()
        return torch.bmm(scores.view(len(queries), self.num_tiles, self.tile_rows).transpose(0, 1), values)

    def _combine(self, partial: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [Q, M + 1, t, D] and denominators [Q, M + 1, t] under weights [Q, M + 1, nT]."""
        num_queries, width = weights.shape[0], partial.shape[-1]
        per_tile = partial.view(self.num_tiles, num_queries, self.tile_rows * width).transpose(0, 1)
        sums = torch.bmm(weights, per_tile).view(num_queries, -1, self.tile_rows, width)
        denominators = sums[..., -1]
        safe = torch.where(denominators > 0, denominators, torch.ones_like(denominators))
        return sums[..., :-1].div_(safe[..., None]), denominators

    @staticmethod
    def _squared(values: Tensor, rows: Tensor) -> Tensor:
        """float64 [M]: squares of values [Q, M, t, D] summed over the rows that exist, rows [Q, 1, t]."""
        per_row = torch.linalg.vector_norm(values, dim=-1).square_() * rows
        return per_row.sum((0, 2), dtype=torch.float64)
