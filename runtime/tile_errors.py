"""The output errors of many tile patterns from a single pass over the attention scores.

Softmax over a union of key tiles is a quotient of two sums over those tiles. So the numerator and
denominator of every (query row, key tile) pair are computed once, and each pattern costs only a small matrix
product with its 0/1 mask: about M / t of the scores' arithmetic for M patterns on tiles of t tokens.

Letters: B batch, N tokens, H heads, D head width, M patterns, nT tiles, t largest tile, Q query tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svdit.plans.tiles import Tiling

CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 1 << 30}
"""Largest score block; small enough for a CPU's caches to help, large enough to fill a GPU."""


@dataclass(frozen=True)
class TileErrors:
    """Sums by measured query tile, over its rows and all batch elements; float64 on the CPU.

    error [H, M, Q]   squared output error of each pattern;  power [H, Q]  squared dense output
    count [Q]         number of summed output values (rows * D)
    mass [H, Q, nT]   float32: attention that the tile's rows give to key tiles, mean over rows and batch
    """

    error: np.ndarray
    power: np.ndarray
    count: np.ndarray
    mass: np.ndarray

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean squared error [H, M] and mean square of the dense output [H] over all measured values."""
        total = self.count.sum()
        return self.error.sum(-1) / total, self.power.sum(-1) / total

    def deviation(self, num_tiles: int) -> np.ndarray:
        """[H, M] standard error of the mean error when the tiles are a simple random sample of `num_tiles`.

        That of a ratio estimator without replacement (Cochran, Sampling Techniques, 6.4): 0 when every tile was
        measured, NaN from a single tile of several.
        """
        sampled = len(self.count)
        if sampled == num_tiles:
            return np.zeros(self.error.shape[:2])
        if sampled < 2:
            return np.full(self.error.shape[:2], np.nan)
        apart = self.error - self.means()[0][..., None] * self.count
        variance = np.square(apart).sum(-1) / (sampled - 1) * (1 - sampled / num_tiles) / sampled
        return np.sqrt(variance) / self.count.mean()


def sample_tiles(num_tiles: int, count: int | None, key: tuple[int, ...]) -> np.ndarray:
    """Ascending int64 tile numbers: `count` of them drawn without replacement, the same for the same key; None: all."""
    if count is None:
        return np.arange(num_tiles)
    return np.sort(np.random.default_rng(key).choice(num_tiles, count, replace=False)).astype(np.int64)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Float32 products in TF32 on a GPU: what it rounds is rounded alike in all patterns and in the dense output."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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
        project: Tensor | None = None,
    ) -> TileErrors:
        """q, k, v [B, N, H, D]; masks bool [H, M, Q, nT], the rows of the query tiles measured on (None: all tiles).

        project float32 [H, D, D] is applied to the values, and so to all outputs, before they are compared.
        Sums are float32, products on a GPU TF32. NOTE a row whose kept scores all lie more than about 87 below its
        largest score counts as a row of zeros: the common maximum is subtracted before exp.
        """
        tiles = torch.arange(self.num_tiles, device=self.device) if query_tiles is None else query_tiles
        heads, num_masks = masks.shape[:2]
        error = torch.zeros(heads, num_masks, len(tiles), dtype=torch.float64, device=self.device)
        power = torch.zeros(heads, len(tiles), dtype=torch.float64, device=self.device)
        mass = torch.zeros(heads, len(tiles), self.num_tiles, device=self.device)
        ones = torch.ones(1, len(tiles), self.num_tiles, dtype=torch.bool, device=self.device)
        with _tensor_cores():
            for h, places, partial in self._partials(q, k, v, text_len, tiles, project):
                part = tiles[places]
                weights = torch.cat([masks[h], ones])[:, places].transpose(0, 1).float()
                outputs, denominators = self._combine(partial, weights)
                rows = self.valid[part][:, None]
                full = outputs[:, -1:].clone()
                power[h, places] += self._squared(full, rows)[0]
                error[h, :, places] += self._squared(outputs.sub_(full), rows)[:-1]
                share = partial[..., -1].view(self.num_tiles, len(part), -1) / denominators[:, -1].clamp_min(1e-30)
                share = (share * self.valid[part]).sum(-1) / self.sizes[part]
                mass[h, places] += share.T / q.shape[0]
        count = q.shape[0] * self.sizes[tiles].cpu().numpy() * v.shape[-1]
        return TileErrors(error.cpu().numpy(), power.cpu().numpy(), count, mass.cpu().numpy())

    def _partials(
        self, q: Tensor, k: Tensor, v: Tensor, text_len: Tensor | None, tiles: Tensor, project: Tensor | None
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """(head, which of `tiles`, numerators and denominators of their rows): one pass over keys and values each."""
        budget = CHUNK_BYTES["cuda" if q.is_cuda else "cpu"]
        chunk = max(1, budget // (4 * self.tile_rows * self.num_tiles * self.tile_rows))
        for b in range(q.shape[0]):
            seen = self._seen(text_len, b)
            for h in range(q.shape[2]):
                keys = k[b, :, h].float()[self.index.flatten()] * q.shape[-1] ** -0.5
                seen_values = v[b, :, h].float() if project is None else v[b, :, h].float() @ project[h]
                values = torch.cat([seen_values[self.index], self.valid[..., None]], -1) * seen[..., None]
                for start in range(0, len(tiles), chunk):
                    places = slice(start, min(start + chunk, len(tiles)))
                    queries = q[b, :, h][self.index[tiles[places]].flatten()].float()
                    yield h, places, self._partial(queries, keys, values)

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
        """float64 [M, Q]: squares of values [Q, M, t, D] summed over the rows that exist, rows [Q, 1, t]."""
        per_row = torch.linalg.vector_norm(values, dim=-1).square_() * rows
        return per_row.sum(2, dtype=torch.float64).T
