"""A plan as the integer tables that the attention op reads (docs/op.md).

Letters: S stages, H heads, nT tiles of the sequence (text included), P patterns, M = H * nT work
items. All arrays are C-contiguous int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from svdit.plans.patterns import Full, Skip
from svdit.plans.schema import Plan
from svdit.plans.tiles import TILE_ROWS, Tiling

FULL, SKIP = 0, 1
"""Pattern ids that every table has; their CSR rows are empty and nobody reads them."""
HEAD_SHIFT = 16
"""A work item is (head << HEAD_SHIFT) | query tile."""
NO_WORK = -1
NEIGHBOURS = 128
"""Work items that a large GPU has in hand at once, about."""
TAIL_PERCENT = 3
"""Part of a layer's work, at its end, that is sorted longest item first to even out the finish."""


@dataclass(frozen=True)
class Tables:
    """Constants of all attention nodes of one graph. Per-layer entries are tuples over layers."""

    pattern_names: tuple[str, ...]
    """[P]: "full", "skip", then the patterns in the order in which stages, layers, heads first use them."""
    tile_offsets: np.ndarray
    """[nT + 1]: first sequence position of each tile, and N."""
    row_offsets: np.ndarray
    """[P, nT + 1]: row_offsets[p, q] .. row_offsets[p, q + 1] is the part of tile_index for query tile q."""
    tile_index: np.ndarray
    """[nnz]: key tiles, ascending in each row; a single 0 when no pattern has any."""
    head_pattern: tuple[np.ndarray, ...]
    """[S, H] for each layer: pattern id of each head."""
    work_order: tuple[np.ndarray, ...]
    """[S, M] for each layer: work items in launch order, then NO_WORK."""
    text_tokens: int
    text_first: bool
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]


def tables_of(plan: Plan) -> Tables:
    """Build the tables of a plan."""
    tiling = plan.tiling()
    ids = _pattern_ids(plan)
    shapes = [_Shape(tiling, tiling.mask(plan.pattern(name))) for name in ids]
    shapes[FULL].is_full, shapes[SKIP].is_skip = True, True

    row_offsets = np.zeros((len(shapes), tiling.num_tiles + 1), dtype=np.int64)
    rows, total = [], 0
    for p, shape in enumerate(shapes):
        counts = np.zeros(tiling.num_tiles, np.int64) if p <= SKIP else shape.mask.sum(axis=1)
        row_offsets[p, 0] = total
        row_offsets[p, 1:] = total + np.cumsum(counts)
        total = int(row_offsets[p, -1])
        if p > SKIP:
            rows.append(np.nonzero(shape.mask)[1])
    tile_index = np.concatenate(rows) if total else np.zeros(1)

    of = _id_lookup(plan, ids)
    by_layer = [
        np.array([[of[name] for name in stage.layers[layer]] for stage in plan.stages], dtype=np.int32)
        for layer in range(plan.geometry.layers)
    ]
    orders: dict[bytes, np.ndarray] = {}
    for heads in {row.tobytes(): row for table in by_layer for row in table}.values():
        orders[heads.tobytes()] = _work_order(shapes, heads, tiling.num_tiles)
    return Tables(
        pattern_names=tuple(ids),
        tile_offsets=_int32(tiling.tile_offsets),
        row_offsets=_int32(row_offsets),
        tile_index=_int32(tile_index),
        head_pattern=tuple(_int32(table) for table in by_layer),
        work_order=tuple(_int32(np.stack([orders[row.tobytes()] for row in table])) for table in by_layer),
        text_tokens=plan.geometry.text_tokens,
        text_first=tiling.text_first,
        grid=plan.geometry.grid,
        tile=plan.tile,
    )


def _pattern_ids(plan: Plan) -> list[str]:
    """Names by id. A name that is defined as full or skip is no pattern of its own."""
    ids = ["full", "skip"]
    for stage in plan.stages:
        for row in stage.layers:
            for name in dict.fromkeys(row):
                if name not in ids and not isinstance(plan.pattern(name), (Full, Skip)):
                    ids.append(name)
    return ids


def _id_lookup(plan: Plan, ids: list[str]) -> dict[str, int]:
    of = {name: i for i, name in enumerate(ids)}
    for name, pattern in plan.patterns.items():
        if isinstance(pattern, (Full, Skip)):
            of[name] = FULL if isinstance(pattern, Full) else SKIP
    return of


class _Shape:
    """One pattern on one tiling: its mask and, computed once, its items in order."""

    def __init__(self, tiling: Tiling, mask: np.ndarray) -> None:
        self.tiling = tiling
        self.mask = mask
        self.is_full = False
        self.is_skip = False

    @cached_property
    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """(query tiles in launch order, kept token pairs of each)."""
        tokens = self.tiling.geometry.tokens
        if self.is_full:
            starts = np.arange(0, tokens, TILE_ROWS)
            return np.arange(len(starts)), np.minimum(TILE_ROWS, tokens - starts) * tokens
        groups: dict[bytes, list[int]] = {}
        for q, row in enumerate(np.packbits(self.mask, axis=1)):
            groups.setdefault(row.tobytes(), []).append(q)
        order = np.array([q for group in groups.values() for q in group])
        pairs = self.tiling.kept_pairs(self.mask)
        if self._is_scattered(order):
            order = order[np.argsort(-(pairs // self.tiling.sizes)[order], kind="stable")]
        return order, pairs[order]

    def _is_scattered(self, order: np.ndarray) -> bool:
        """Whether items in hand at the same time keep, together, more than half of all key tiles.

        They find each other's keys in the cache only while they walk the sequence side by side. So they should start
        and end together: lists of about one length.
        """
        if len(order) <= NEIGHBOURS:
            return False
        together = np.logical_or.reduceat(self.mask[order], range(0, len(order), NEIGHBOURS), axis=0)
        return bool(together.mean() > 0.5)

    @cached_property
    def work(self) -> int:
        return int(self.items[1].sum())


def launch_order(tiling: Tiling, mask: np.ndarray) -> np.ndarray:
    """int [nT]: query tiles of one head with a bool [nT, nT] mask, as `work_order` has them but for its tail."""
    return _Shape(tiling, mask).items[0]


def _work_order(shapes: list[_Shape], head_pattern: np.ndarray, num_tiles: int) -> np.ndarray:
    """int64 [M]: heavy heads first, equal lists adjacent, the last few percent longest first, skip last."""
    heads = sorted(
        range(len(head_pattern)),
        key=lambda h: (shapes[head_pattern[h]].is_skip, -shapes[head_pattern[h]].work, head_pattern[h], h),
    )
    items, pairs = [], []
    num_busy = 0
    for h in heads:
        shape = shapes[head_pattern[h]]
        tiles, work = shape.items
        items.append((h << HEAD_SHIFT) | tiles)
        pairs.append(work)
        num_busy += 0 if shape.is_skip else len(tiles)
    order, work = np.concatenate(items), np.concatenate(pairs)

    left = np.cumsum(work[:num_busy][::-1])[::-1]  # work from each item to the end
    tail = int((100 * left > TAIL_PERCENT * left[:1]).sum())
    longest_first = np.argsort(-work[tail:num_busy], kind="stable")
    order[tail:num_busy] = order[tail:num_busy][longest_first]

    result = np.full(len(head_pattern) * num_tiles, NO_WORK, dtype=np.int64)
    result[: len(order)] = order
    return result


def _int32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)
