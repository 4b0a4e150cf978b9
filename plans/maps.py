"""Attention maps small enough to keep: tiles of the sequence pooled into at most a few hundred bins.

Letters: H heads, nT tiles of the sequence (text included), m bins.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.tiles import Tiling

MAP_SIDE = 144
"""Most bins of video tiles on one side of a stored map."""


def map_bins(tiling: Tiling, side: int = MAP_SIDE, step: int = 1) -> np.ndarray:
    """int64 [m]: first tile of each bin, in sequence order.

    A bin is a run of video tiles that divides a frame or holds whole frames, the shortest with at most `side` bins, so
    that lines parallel to the diagonal survive. Every text tile has a bin of its own. Runs are multiples of `step`.
    """
    plane = tiling.tile_grid[1] * tiling.tile_grid[2]
    runs = (run for run in count(step, step) if plane % run == 0 or run % plane == 0)
    run = next(run for run in runs if -(-tiling.num_video_tiles // run) <= side)
    video = tiling.first_video_tile + np.arange(0, tiling.num_video_tiles, run)
    text = np.arange(tiling.num_text_tiles) + (0 if tiling.text_first else tiling.num_video_tiles)
    return np.concatenate([text, video] if tiling.text_first else [video, text]).astype(np.int64)


def coarser(maps: np.ndarray, tiling: Tiling, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored maps [..., m, m] in at most `side` bins of video tiles, and the first tile of each bin.

    Raises SvditError for maps that are not in the bins of `map_bins`.
    """
    stored = map_bins(tiling)
    if maps.shape[-2:] != (len(stored), len(stored)):
        raise complain("maps", f"shape {maps.shape}", f"{len(stored)} x {len(stored)} bins", "search again")
    video = stored[np.isin(stored, np.arange(tiling.num_tiles)[tiling.video_slice])]
    run = int(video[1] - video[0]) if len(video) > 1 else 1
    bins = map_bins(tiling, side, run)
    sizes = np.add.reduceat(tiling.sizes.astype(np.int64), stored)
    return pooled(maps, sizes, np.searchsorted(stored, bins)), bins


def pooled(mass: np.ndarray, sizes: np.ndarray, bins: np.ndarray, tiles: np.ndarray | None = None) -> np.ndarray:
    """float64 [..., m, m]: part of the attention of a bin's query rows that goes to each bin of keys.

    mass [..., Q, nT]: the same of the query tiles `tiles` [Q] (None: all nT), mean over a tile's rows; sizes [nT]:
    tokens of the tiles. Rows of zeros were not measured and do not count; a bin without any other stays zero.
    """
    tiles = np.arange(len(sizes)) if tiles is None else tiles
    keys = np.add.reduceat(mass, bins, axis=-1, dtype=np.float64)
    weight = (mass.sum(-1) > 0) * sizes[tiles].astype(np.float64)
    member = (np.searchsorted(bins, tiles, side="right") - 1 == np.arange(len(bins))[:, None]).astype(np.float64)
    rows = member @ (keys * weight[..., None])
    total = (weight @ member.T)[..., None]
    return np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)


def kept_parts(mask: np.ndarray, tiling: Tiling, bins: np.ndarray) -> np.ndarray:
    """float64 [m, m]: part of the token pairs between two bins that a bool [nT, nT] mask keeps."""
    sizes = tiling.sizes.astype(np.float64)
    pairs = np.add.reduceat(np.add.reduceat(mask * np.outer(sizes, sizes), bins, axis=0), bins, axis=1)
    tokens = np.add.reduceat(sizes, bins)
    return pairs / np.outer(tokens, tokens)
