"""A pattern's tables as batches of equal work: query tiles with the same key list, and where the keys lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svdit.plans.tables import FULL, Tables


@dataclass(frozen=True)
class Batch:
    """Query tiles that keep the same keys."""

    queries: np.ndarray
    """int64: token positions of the query rows, ascending."""
    key_tiles: tuple[int, ...]
    """Key tiles, ascending; may be empty."""


def batches(tables: Tables, pattern: int) -> list[Batch]:
    """Every query tile of a pattern in exactly one batch, batches in the order of their first tile."""
    offsets = tables.tile_offsets
    num_tiles = len(offsets) - 1
    if pattern == FULL:
        return [Batch(np.arange(offsets[-1]), tuple(range(num_tiles)))]
    tiles_of: dict[tuple[int, ...], list[int]] = {}
    row = tables.row_offsets[pattern]
    for tile in range(num_tiles):
        keys = tuple(int(t) for t in tables.tile_index[row[tile] : row[tile + 1]])
        tiles_of.setdefault(keys, []).append(tile)
    return [Batch(positions(tables, tiles), keys) for keys, tiles in tiles_of.items()]


def positions(tables: Tables, tiles: tuple[int, ...] | list[int]) -> np.ndarray:
    """int64: token positions of these tiles, in the order given."""
    offsets = tables.tile_offsets.astype(np.int64)
    runs = [np.arange(offsets[t], offsets[t + 1]) for t in tiles]
    return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)


def uniform_size(tables: Tables) -> int | None:
    """The common number of tokens of all tiles, or None when they differ."""
    sizes = np.diff(tables.tile_offsets)
    return int(sizes[0]) if (sizes == sizes[0]).all() else None


def text_range(tables: Tables) -> tuple[int, int]:
    """First and last + 1 sequence position of the text tokens."""
    tokens = int(tables.tile_offsets[-1])
    start = 0 if tables.text_first else tokens - tables.text_tokens
    return start, start + tables.text_tokens
