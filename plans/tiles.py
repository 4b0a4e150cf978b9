"""Token grid to tiles: tile order, tile sizes, and masks over all tiles of the sequence.

Letters: V video tokens, N all tokens, nV video tiles, nT all tiles (text tiles included).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import integers
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Full, Pattern, Skip

TILE_ROWS = 128
"""Most tokens of a tile, and the length of a text run: the query rows of one kernel block."""


def check_tile(tile: object) -> tuple[int, int, int]:
    """Three positive integers whose product fits a tile. Raises SvditError about `tile`."""
    t, h, w = integers(tile, "tile", 3, low=1)
    if t * h * w > TILE_ROWS:
        raise complain("tile", f"{t} x {h} x {w} = {t * h * w} tokens", f"at most {TILE_ROWS} tokens")
    return t, h, w


class Tiling:
    """How one geometry is cut into tiles of (tt, th, tw) tokens."""

    def __init__(self, geometry: Geometry, tile: tuple[int, int, int]) -> None:
        self.geometry = geometry
        self.tile = check_tile(tile)
        grid = geometry.grid
        self.tile_grid = tuple(-(-n // size) for n, size in zip(grid, self.tile, strict=True))
        self.num_video_tiles = math.prod(self.tile_grid)
        self.num_text_tiles = -(-geometry.text_tokens // TILE_ROWS)
        self.num_tiles = self.num_video_tiles + self.num_text_tiles
        self.text_first = geometry.text_position == "before"
        self.first_video_tile = self.num_text_tiles if self.text_first else 0

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 [nT]: tokens of each tile, tiles in sequence order."""
        video = np.ones(1, dtype=np.int64)
        for n, size, count in zip(self.geometry.grid, self.tile, self.tile_grid, strict=True):
            video = np.multiply.outer(video, np.minimum(size, n - size * np.arange(count)))
        starts = TILE_ROWS * np.arange(self.num_text_tiles)
        text = np.minimum(TILE_ROWS, self.geometry.text_tokens - starts)
        parts = (text, video.ravel()) if self.text_first else (video.ravel(), text)
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def tile_offsets(self) -> np.ndarray:
        """int32 [nT + 1]: first sequence position of each tile, and N."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int32)

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [V]: raster index (t * H + h) * W + w of the video token at each tile-order position."""
        t, h, w = np.indices(self.geometry.grid)
        tt, th, tw = self.tile
        _, rows, cols = self.tile_grid
        tile_of = ((t // tt) * rows + h // th) * cols + w // tw
        return np.argsort(tile_of.ravel(), kind="stable").astype(np.int64)

    @cached_property
    def inverse(self) -> np.ndarray:
        """int64 [V]: tile-order position of each raster index."""
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(len(self.order))
        return inverse

    @property
    def video_slice(self) -> slice:
        """The video tiles among all tiles."""
        return slice(self.first_video_tile, self.first_video_tile + self.num_video_tiles)

    def mask(self, pattern: Pattern) -> np.ndarray:
        """bool [nT, nT]: the pattern on video tiles; text keys kept, text queries keep all; skip: nothing."""
        if isinstance(pattern, (Full, Skip)):
            return np.full((self.num_tiles, self.num_tiles), isinstance(pattern, Full))
        mask = np.ones((self.num_tiles, self.num_tiles), dtype=bool)
        mask[self.video_slice, self.video_slice] = pattern.video_mask(self.tile_grid)
        return mask

    def density(self, mask: np.ndarray) -> float:
        """Kept query-key token pairs of a bool [nT, nT] mask, as a part of N * N."""
        return float(self.kept_pairs(mask).sum()) / self.geometry.tokens**2

    def kept_pairs(self, mask: np.ndarray) -> np.ndarray:
        """int64 [nT]: kept query-key token pairs of each query tile of a bool [nT, nT] mask."""
        sizes = self.sizes.astype(np.float64)  # exact: a row keeps at most N < 2**31 keys
        blocks = np.array_split(mask, -(-len(mask) // 1024))  # the product makes a float64 copy of the mask
        keys = np.concatenate([block @ sizes for block in blocks])
        return keys.astype(np.int64) * self.sizes
