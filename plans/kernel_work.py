"""How much the Hopper kernel does for one head: items, steps and slices, by its own rules (docs/kernels.md).

An item is one query tile with its list of keys (128 rows of a full head). Key tiles that are neighbours are one run of
rows, cut into blocks of 128; a step is one block. In a step each 64 rows of the item, a slice, do their products and
exponentials; listed slices are those of heads that are not full. At head size 64, three neighbours of the launch order
with the same keys are two items of three slices, or one where each has no more than 64 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svdit.plans.tables import launch_order
from svdit.plans.tiles import TILE_ROWS, Tiling

SLICE_ROWS = 64
SHARING_HEAD_DIM = 64
"""The head size at which neighbours share their keys."""
SHARERS = 3


@dataclass(frozen=True)
class KernelWork:
    """Of one head: items with any keys, their steps, and slices in all steps.

    As shares of N / 128 items of N / 128 steps of 2 slices: at head size 128 whole blocks give 1 and three times the
    density; a full head has no listed slices.
    """

    items: float
    steps: float
    slices: float
    listed: float


def kernel_work(tiling: Tiling, mask: np.ndarray) -> KernelWork:
    """Of a bool [nT, nT] mask; one that keeps everything is a full head."""
    if mask.all():
        starts = np.arange(0, tiling.geometry.tokens, TILE_ROWS)
        rows = np.minimum(TILE_ROWS, tiling.geometry.tokens - starts)
        lists, blocks = np.zeros(len(rows), np.int64), np.full(len(rows), _blocks(tiling.geometry.tokens))
    else:
        _, first, lists = np.unique(np.packbits(mask, axis=1), axis=0, return_index=True, return_inverse=True)
        order = launch_order(tiling, mask)
        of_list = np.array([_blocks_of(mask[q], tiling.tile_offsets) for q in first])
        lists, rows = lists.reshape(-1)[order], tiling.sizes[order]
        blocks = of_list[lists]
    items = _shared(lists, rows) if tiling.geometry.head_dim == SHARING_HEAD_DIM else np.ones(len(lists))
    items = items * (blocks > 0)
    unit = tiling.geometry.tokens / TILE_ROWS
    steps = float((items * blocks).sum()) / unit**2
    slices = float((-(-rows // SLICE_ROWS) * blocks).sum()) / (2 * unit**2)
    return KernelWork(float(items.sum()) / unit, steps, slices, 0.0 if mask.all() else slices)


def _shared(lists: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Items for each entry of the launch order: 2 / 3 or 1 / 3 where three in a row have one list, else 1."""
    whole = len(lists) // SHARERS * SHARERS
    together = lists[:whole].reshape(-1, SHARERS)
    items = np.where((rows[:whole].reshape(-1, SHARERS) <= SLICE_ROWS).all(1), 1, 2)
    share = np.where((together == together[:, :1]).all(1), items / SHARERS, 1.0)
    return np.concatenate([np.repeat(share, SHARERS), np.ones(len(lists) - whole)])


def _blocks_of(kept: np.ndarray, offsets: np.ndarray) -> int:
    """Blocks of 128 rows in the runs of kept tiles, bool [nT]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]])))
    begin, end = edges[::2], edges[1::2]
    return int(_blocks(offsets[end] - offsets[begin]).sum())


def _blocks(rows: np.ndarray | int) -> np.ndarray | int:
    return -(-rows // TILE_ROWS)
