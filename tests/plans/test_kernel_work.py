"""Items, steps and slices of the kernel, by hand and by going through the launch order of a layer entry by entry."""

from __future__ import annotations

import numpy as np
import pytest

from svdit.plans.geometry import Geometry
from svdit.plans.kernel_work import KernelWork, kernel_work
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Skip, Stripe, Tiles
from svdit.plans.schema import template
from svdit.plans.tables import FULL, HEAD_SHIFT, NO_WORK, tables_of
from svdit.plans.tiles import Tiling


def by_the_launch_order(geometry: Geometry, tile: tuple[int, int, int], pattern) -> tuple[int, int, int]:
    """(items, steps, slices), as `sm90_slices.cuh` cuts the entries of work_order into items."""
    tables = tables_of(template("m", geometry, tile, pattern))
    heads, order, offsets = tables.head_pattern[0][0], tables.work_order[0][0], tables.tile_offsets
    tokens, items, steps, slices = int(offsets[-1]), 0, 0, 0

    def decoded(code):
        head, query = code >> HEAD_SHIFT, code & 0xFFFF
        if heads[head] == FULL:
            return head, (-1,), -(-tokens // 128), min(128, tokens - 128 * query)
        begin, end = tables.row_offsets[heads[head], query : query + 2]
        keys = tables.tile_index[begin:end].tolist()
        runs, blocks = [], 0
        for key in keys:
            if runs and key == runs[-1][1]:
                runs[-1][1] = key + 1
            else:
                runs.append([key, key + 1])
        for first, last in runs:
            blocks += -(-int(offsets[last] - offsets[first]) // 128)
        return head, tuple(keys), blocks, int(offsets[query + 1] - offsets[query])

    for base in range(0, len(order), 3):
        entries = [decoded(code) for code in order[base : base + 3].tolist() if code != NO_WORK]
        alike = geometry.head_dim == 64 and len(entries) == 3 and len({entry[:2] for entry in entries}) == 1
        shared = 1 if max((entry[3] for entry in entries), default=0) <= 64 else 2
        for number, (_, _, blocks, rows) in enumerate(entries):
            item = bool(blocks) and not (alike and number >= shared)
            items += item
            steps += item * blocks
            slices += -(-rows // 64) * blocks
    return items, steps, slices


def scattered(tiles: int, share: float) -> Tiles:
    return Tiles.from_mask(np.random.default_rng(1).random((tiles, tiles)) < share)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "pattern",
    [Full(), Skip(), Diagonal(frames=1), MultiDiagonal(rows=0, cols=1), Stripe(columns=((2, 5),)), scattered(144, 0.3)],
)
def test_whole_tiles_by_the_launch_order(head_dim, pattern):
    """Tiles of 64 tokens; lists of 144, 36 and of 12, 8 or 1 query tiles."""
    geometry, tile = Geometry((16, 24, 24), 0, "none", 1, 1, head_dim), (4, 4, 4)
    tiling = Tiling(geometry, tile)
    found, unit = kernel_work(tiling, tiling.mask(pattern)), 9216 / 128
    items, steps, slices = by_the_launch_order(geometry, tile, pattern)
    assert found.slices == pytest.approx(slices / (2 * unit**2))
    assert found.items == pytest.approx(items / unit, rel=0.02)  # the longest items last: a few neighbours part
    assert found.steps == pytest.approx(steps / unit**2, rel=0.02)


@pytest.mark.parametrize("pattern", [Full(), Diagonal(frames=0), scattered(12, 0.5)])
def test_border_tiles_and_text_by_the_launch_order(pattern):
    """3 x 5 x 7 tokens in tiles of 1 x 3 x 4, 20 of text; full heads in blocks of 128 of 125."""
    geometry, tile = Geometry((3, 5, 7), 20, "after", 1, 1, 128), (1, 3, 4)
    tiling = Tiling(geometry, tile)
    found, unit = kernel_work(tiling, tiling.mask(pattern)), 125 / 128
    counts = by_the_launch_order(geometry, tile, pattern)
    wanted = np.array(counts) / [unit, unit**2, 2 * unit**2]
    np.testing.assert_allclose([found.items, found.steps, found.slices], wanted)


def test_by_hand():
    """8 tiles of 128: whole runs at head size 128 give 1, density, density; at 64, three items become two, or one."""
    tiling = Tiling(Geometry((2, 4, 128), 0, "none", 1, 1, 128), (1, 1, 128))
    assert kernel_work(tiling, tiling.mask(Full())) == KernelWork(1.0, 1.0, 1.0, 0.0)
    assert kernel_work(tiling, tiling.mask(Diagonal())) == KernelWork(1.0, 0.5, 0.5, 0.5)
    assert kernel_work(tiling, tiling.mask(Skip())) == KernelWork(0.0, 0.0, 0.0, 0.0)
    shared = Tiling(Geometry((2, 3, 128), 0, "none", 1, 1, 64), (1, 1, 128))
    found = kernel_work(shared, shared.mask(Full()))
    assert (found.items, found.steps, found.slices) == pytest.approx((2 / 3, 2 / 3, 1.0))
    assert kernel_work(shared, shared.mask(MultiDiagonal(rows=0, cols=0))).items == 1.0  # lists of two
    small = Tiling(Geometry((2, 3, 64), 0, "none", 1, 1, 64), (1, 1, 64))
    found = kernel_work(small, small.mask(Diagonal()))  # 2 x 3 tiles of 64 rows, lists of 3 tiles, two blocks of 128
    assert (found.items, found.steps, found.slices) == pytest.approx((2 / 3, 4 / 9, 6 * 2 / 18))
