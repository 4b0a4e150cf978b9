"""The tile masks of all candidates of a search, each distinct one kept once, a bit for a tile pair.

Letters: L layers, H heads, M modes, nT tiles, Q query tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from svdit.plans.patterns import Pattern
from svdit.plans.search_state import ModePattern
from svdit.plans.tiles import Tiling


class ModeMasks:
    """Masks of modes that are one pattern for every head, or [L][H] of them."""

    def __init__(self, patterns: Sequence[ModePattern], tiling: Tiling) -> None:
        geometry = tiling.geometry
        self.num_tiles = tiling.num_tiles
        known: dict[Pattern, int] = {}
        self.index = np.zeros((geometry.layers, geometry.heads, len(patterns)), dtype=np.int64)
        for mode, found in enumerate(patterns):
            for layer in range(geometry.layers):
                for head in range(geometry.heads):
                    one = found[layer][head] if isinstance(found, tuple) else found
                    self.index[layer, head, mode] = known.setdefault(one, len(known))
        self.bits = np.zeros((len(known), self.num_tiles, -(-self.num_tiles // 8)), dtype=np.uint8)
        self.density = np.zeros(len(known))

        def store(pattern: Pattern) -> None:
            mask = tiling.mask(pattern)
            self.bits[known[pattern]] = np.packbits(mask, axis=1)
            self.density[known[pattern]] = tiling.density(mask)

        with ThreadPoolExecutor() as pool:  # numpy lets go of the interpreter for most of it
            list(pool.map(store, known))

    @property
    def sparsity(self) -> np.ndarray:
        """float64 [L, H, M]: 1 - kept share of query-key token pairs."""
        return 1.0 - self.density[self.index]

    def rows(self, layer: int, query_tiles: np.ndarray) -> np.ndarray:
        """bool [H, M, Q, nT]: what these query tiles keep under each mode."""
        packed = self.bits[self.index[layer][..., None], query_tiles]
        return np.unpackbits(packed, axis=-1, count=self.num_tiles).view(bool)

    def mask(self, layer: int, head: int, mode: int) -> np.ndarray:
        """bool [nT, nT] of one mode; mode M is full."""
        if mode == self.index.shape[2]:
            return np.ones((self.num_tiles, self.num_tiles), dtype=bool)
        packed = self.bits[self.index[layer, head, mode]]
        return np.unpackbits(packed, axis=-1, count=self.num_tiles).view(bool)
