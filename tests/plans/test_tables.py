"""Operator tables against brute-force masks: lists, ids, and the order of the work."""

from __future__ import annotations

import json

import numpy as np
import pytest

from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Skip, Tiles
from svdit.plans.schema import Plan, Stage, loads
from svdit.plans.tables import tables_of
from tests.cases import BY_NAME
from tests.plans.random_plans import random_plan
from tests.reference import token_mask

SOURCES = {f"seed-{seed}": random_plan(seed, heads=5) for seed in range(25)}
SOURCES.update({name: BY_NAME[name].plan for name in ("tile-border", "text-before-130-len-129", "nothing-kept")})


@pytest.fixture(params=SOURCES, ids=str)
def plan_and_tables(request):
    data = SOURCES[request.param]
    return data, tables_of(loads(json.dumps(data)))


def lists_of(tables, p):
    """Key tiles of each query tile of pattern p."""
    row = tables.row_offsets[p]
    return [tables.tile_index[row[q] : row[q + 1]].tolist() for q in range(len(row) - 1)]


def test_lists_equal_the_token_mask(plan_and_tables):
    data, tables = plan_and_tables
    first = tables.tile_offsets[:-1]
    assert tables.pattern_names[:2] == ("full", "skip")
    for p, name in enumerate(tables.pattern_names):
        found = lists_of(tables, p)
        if p < 2:
            assert not any(found)
        else:
            on_tiles = token_mask(data, name)[np.ix_(first, first)]
            assert found == [np.flatnonzero(row).tolist() for row in on_tiles]


def test_shapes_types_and_joints(plan_and_tables):
    data, tables = plan_and_tables
    geometry, stages = data["geometry"], len(data["stages"])
    tiles, patterns, heads = len(tables.tile_offsets) - 1, len(tables.pattern_names), geometry["heads"]
    assert tables.row_offsets.shape == (patterns, tiles + 1)
    assert np.array_equal(tables.row_offsets[1:, 0], tables.row_offsets[:-1, -1])
    assert len(tables.tile_index) == max(1, tables.row_offsets[-1, -1])
    assert [t.shape for t in tables.head_pattern] == [(stages, heads)] * geometry["layers"]
    assert [t.shape for t in tables.work_order] == [(stages, heads * tiles)] * geometry["layers"]
    arrays = [tables.tile_offsets, tables.row_offsets, tables.tile_index, *tables.head_pattern, *tables.work_order]
    assert all(a.dtype == np.int32 and a.flags.c_contiguous for a in arrays)


def test_heads_name_their_pattern_in_order_of_first_use(plan_and_tables):
    data, tables = plan_and_tables
    names = [
        [[tables.pattern_names[p] for p in table[s]] for table in tables.head_pattern]
        for s in range(len(data["stages"]))
    ]
    assert names == [stage["layers"] for stage in data["stages"]]
    used = [n for s in names for row in s for n in row]
    first_use = sorted(set(used) - {"full", "skip"}, key=used.index)
    assert tables.pattern_names == ("full", "skip", *first_use)


def rows_of(tables):
    """Every (head patterns, work order) pair of every layer and stage."""
    for heads, orders in zip(tables.head_pattern, tables.work_order, strict=True):
        yield from zip(heads, orders, strict=True)


def test_work_order_covers_every_row_of_every_head_once(plan_and_tables):
    _, tables = plan_and_tables
    tokens, tiles = int(tables.tile_offsets[-1]), len(tables.tile_offsets) - 1
    for heads, order in rows_of(tables):
        busy = order[order != -1]
        assert (order[len(busy) :] == -1).all()
        expected = {(h << 16) | q for h, p in enumerate(heads) for q in range(-(-tokens // 128) if p == 0 else tiles)}
        assert len(busy) == len(expected)
        assert set(busy.tolist()) == expected


def pairs_of(data, tables, p, q):
    """Kept token pairs of one work item, by counting."""
    tokens = int(tables.tile_offsets[-1])
    if p == 0:
        return (min(128 * (q + 1), tokens) - 128 * q) * tokens
    rows = slice(tables.tile_offsets[q], tables.tile_offsets[q + 1])
    return int(token_mask(data, tables.pattern_names[p])[rows].sum())


def test_work_order_is_heavy_first_grouped_and_longest_last(plan_and_tables):
    data, tables = plan_and_tables
    for heads, order in rows_of(tables):
        items = [(int(x) >> 16, int(x) & 0xFFFF) for x in order if x != -1]
        busy = [(h, q) for h, q in items if heads[h] != 1]
        assert items[: len(busy)] == busy, "skip heads come last"
        if not busy:
            continue
        work = np.array([pairs_of(data, tables, heads[h], q) for h, q in busy])
        left = work[::-1].cumsum()[::-1]
        cut = next((i for i in range(len(busy)) if left[i] <= 0.03 * left[0]), len(busy))
        assert (np.diff(work[cut:]) <= 0).all(), "the last 3 % go longest first"

        head_work = {h: sum(w for (g, _), w in zip(busy, work, strict=True) if g == h) for h, _ in busy}
        order_of_heads = [h for i, (h, _) in enumerate(busy[:cut]) if i == 0 or busy[i - 1][0] != h]
        assert len(order_of_heads) == len(set(order_of_heads)), "a head is one run"
        assert [head_work[h] for h in order_of_heads] == sorted((head_work[h] for h in order_of_heads), reverse=True)
        for h in order_of_heads:
            if heads[h] == 0:
                continue
            keys = [str(lists_of(tables, heads[h])[q]) for g, q in busy[:cut] if g == h]
            runs = [key for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
            assert len(runs) == len(set(runs)), "query tiles with equal lists are adjacent"


def order_by_the_rule(data, tables, heads):
    """Work items of one row, step by step as docs/op.md lists the order."""
    tokens, tiles = int(tables.tile_offsets[-1]), len(tables.tile_offsets) - 1
    of_head = {}
    for h, p in enumerate(heads):
        if p == 0:
            queries = list(range(-(-tokens // 128)))
        else:
            lists = [str(keys) for keys in lists_of(tables, p)]
            queries = sorted(range(tiles), key=lambda q, lists=lists: (lists.index(lists[q]), q))
        of_head[h] = [((h << 16) | q, 0 if p == 1 else pairs_of(data, tables, p, q)) for q in queries]
    ordered = sorted(of_head, key=lambda h: (heads[h] == 1, -sum(w for _, w in of_head[h]), heads[h], h))
    busy = [item for h in ordered if heads[h] != 1 for item in of_head[h]]
    total = sum(w for _, w in busy)
    cut = len(busy)
    while cut and sum(w for _, w in busy[cut - 1 :]) * 100 <= 3 * total:
        cut -= 1
    busy[cut:] = sorted(busy[cut:], key=lambda item: -item[1])
    items = [x for x, _ in busy] + [x for h in ordered if heads[h] == 1 for x, _ in of_head[h]]
    return items + [-1] * (len(heads) * tiles - len(items))


def test_work_order_follows_the_rule_exactly(plan_and_tables):
    data, tables = plan_and_tables
    for heads, order in rows_of(tables):
        assert order.tolist() == order_by_the_rule(data, tables, heads)


@pytest.mark.parametrize("density", [0.005, 0.1])
def test_scattered_lists_are_sorted_by_length(density):
    """300 frames of one tile. At 0.1, 128 lists keep nearly all tiles between them; at 0.005, about half."""
    kept = np.random.default_rng(0).random((300, 300)) < density
    kept[7] = kept[211]
    plan = plan_of({"t": Tiles.from_mask(kept)}, ["t"], grid=(300, 2, 2))
    tile = tables_of(plan).work_order[0][0]
    lists = [row.tobytes() for row in kept]
    queries = sorted(range(300), key=lambda q: (lists.index(lists[q]), q))
    groups = [kept[queries[i : i + 128]].any(0).mean() for i in (0, 128, 256)]
    if np.mean(groups) > 0.5:
        queries.sort(key=lambda q: -kept[q].sum())
    assert (np.mean(groups) > 0.5) == (density == 0.1)
    tail = 280
    assert tile[:tail].tolist() == queries[:tail]
    assert np.flatnonzero(tile == 211) == np.flatnonzero(tile == 7) + 1


def plan_of(patterns, rows, grid=(4, 6, 6)):
    geometry = Geometry(grid, 0, "none", 1, len(rows), 64)
    return Plan("test", geometry, (1, 8, 16), patterns, (Stage(1.0, (tuple(rows),)),))


def test_no_lists_at_all_leave_one_dummy_entry():
    tables = tables_of(plan_of({}, ["full", "skip"]))
    assert tables.tile_index.tolist() == [0]
    assert tables.row_offsets.tolist() == [[0] * 5, [0] * 5]


def test_other_names_of_full_and_skip_get_their_ids():
    plan = plan_of({"all": Full(), "off": Skip(), "d": Diagonal()}, ["off", "d", "all"])
    tables = tables_of(plan)
    assert tables.pattern_names == ("full", "skip", "d")
    assert tables.head_pattern[0].tolist() == [[1, 2, 0]]


def test_order_by_hand():
    """4 frames of one tile each, 36 tokens. multi_diagonal keeps all; stride 2 pairs frames 0 2 | 1 3."""
    plan = plan_of({"two": MultiDiagonal(stride=2), "own": Diagonal()}, ["skip", "own", "two", "full"])
    order = tables_of(plan).work_order[0][0]
    head = [int(x) >> 16 for x in order]
    tile = [int(x) & 0xFFFF for x in order]
    assert head[:14] == [3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0]
    assert tile[:14] == [0, 1, 0, 2, 1, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert order[14:].tolist() == [-1, -1]


def test_the_tail_is_sorted_by_hand():
    """100 frames of one tile, each query sees its own frame, the last one also frame 0: 101 units, 3 % are 3.03."""
    rows = [((q, q + 1),) for q in range(99)] + [((0, 1), (99, 100))]
    order = tables_of(plan_of({"t": Tiles(tuple(rows))}, ["t"], grid=(100, 2, 2))).work_order[0][0].tolist()
    assert order == [*range(98), 99, 98]
