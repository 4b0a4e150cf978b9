"""Brute-force truth: attention over single tokens in float64, from the rules of docs/plan.md alone.

Nothing here comes from `svdit`: patterns are read as JSON objects, and every query-key token pair is
tested by the formula of its kind. Slow, and meant to be.

Letters: B batch, N tokens, V video tokens, H heads, D head size.
"""

from __future__ import annotations

import math

import numpy as np


def tile_coordinates(grid, tile) -> np.ndarray:
    """int [V, 3]: tile (t, h, w) of each video token, tokens in tile order."""
    return np.array([key[:3] for key in _sorted_tokens(grid, tile)])


def tile_order(grid, tile) -> np.ndarray:
    """int [V]: raster index of the video token at each position of the tile order."""
    _, H, W = grid
    return np.array([(t * H + h) * W + w for _, _, _, t, h, w in _sorted_tokens(grid, tile)])


def _sorted_tokens(grid, tile):
    tokens = []
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                tokens.append((t // tile[0], h // tile[1], w // tile[2], t, h, w))
    return sorted(tokens)


def keeps(pattern: dict, query: np.ndarray, key: np.ndarray, tile_grid) -> np.ndarray:
    """bool: does a query in tile `query` [..., 3] see a key in tile `key` [..., 3]; broadcasts."""
    kind = pattern["kind"]
    if kind in ("full", "skip"):
        return np.broadcast_to(np.array(kind == "full"), np.broadcast_shapes(query.shape, key.shape)[:-1])
    if kind == "union":
        result = keeps(pattern["members"][0], query, key, tile_grid)
        for member in pattern["members"][1:]:
            result = result | keeps(member, query, key, tile_grid)
        return result
    _, nh, nw = tile_grid
    number = (key[..., 0] * nh + key[..., 1]) * nw + key[..., 2]
    if kind == "tiles":
        row_of = (query[..., 0] * nh + query[..., 1]) * nw + query[..., 2]
        listed = np.zeros((len(pattern["rows"]), math.prod(tile_grid)), dtype=bool)
        for q, ranges in enumerate(pattern["rows"]):
            for start, stop in ranges:
                listed[q, list(range(start, stop))] = True
        return listed[row_of, number]
    if kind == "stripe":
        result = np.abs(query[..., 0] - key[..., 0]) <= pattern.get("frames", 0)
        for start, stop in pattern["columns"]:
            result = result | ((number >= start) & (number < stop))
        return result

    cell = np.array(pattern.get("cell", [1, 1, 1]))
    query, key = query // cell, key // cell
    counts = [math.ceil(n / c) for n, c in zip(tile_grid, cell, strict=True)]
    clamp = pattern.get("clamp", False)

    def near(axis: int, radius: int | None):
        if radius is None or (clamp and counts[axis] <= 2 * radius + 1):
            return np.array(True)
        centre = query[..., axis]
        if clamp:
            centre = np.minimum(np.maximum(centre, radius), counts[axis] - 1 - radius)
        return np.abs(centre - key[..., axis]) <= radius

    offset = pattern.get("offset", 0)
    d = np.abs(query[..., 0] - key[..., 0]) - offset
    if kind == "diagonal":
        frames = pattern.get("frames", 0)
        in_time = np.abs(d) <= frames if offset else near(0, frames)
        rows, cols = pattern.get("rows"), pattern.get("cols")
    elif kind == "multi_diagonal":
        in_time = np.mod(d, pattern.get("stride", 1)) == 0
        rows, cols = pattern.get("rows", 1), pattern.get("cols", 1)
    else:
        raise AssertionError(f"no rule for {kind}")
    return in_time & near(1, rows) & near(2, cols)


def video_mask(plan: dict, name: str) -> np.ndarray:
    """bool [V, V] in tile order: the pattern alone, without text."""
    pattern = {"kind": name} if name in ("full", "skip") else plan["patterns"][name]
    grid, tile = plan["geometry"]["grid"], plan["tile"]
    tile_grid = [math.ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    tiles = tile_coordinates(grid, tile)
    return keeps(pattern, tiles[:, None, :], tiles[None, :, :], tile_grid)


def is_text(plan: dict) -> np.ndarray:
    """bool [N]: which positions of the sequence are text."""
    geometry = plan["geometry"]
    video, text = math.prod(geometry["grid"]), geometry["text_tokens"]
    flags = [False] * video + [True] * text
    return np.array(flags[::-1] if geometry["text_position"] == "before" else flags)


def token_mask(plan: dict, name: str) -> np.ndarray:
    """bool [N, N] in sequence order: may this query see this key, all text tokens being valid."""
    text = is_text(plan)
    mask = text[:, None] | text[None, :]
    if name == "skip" or plan["patterns"].get(name, {}).get("kind") == "skip":
        return np.zeros_like(mask)
    mask[np.ix_(~text, ~text)] = video_mask(plan, name)
    return mask


def attention(plan: dict, stage: int, layer: int, q, k, v, *, text_len, scale: float) -> np.ndarray:
    """float64 [B, N, H, D] from q, k, v [B, N, H, D] in tile order; rows that see no key are zero."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    text = is_text(plan)
    text_number = np.cumsum(text) - 1
    masks = {}
    for head, name in enumerate(plan["stages"][stage]["layers"][layer]):
        if name not in masks:
            masks[name] = token_mask(plan, name)
        for b, valid in enumerate(text_len):
            mask = masks[name] & ~(text & (text_number >= valid))
            seen = mask.any(axis=1)
            scores = np.where(mask, scale * (q[b, :, head] @ k[b, :, head].T), -np.inf)[seen]
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, seen, head] = (weights / weights.sum(axis=1, keepdims=True)) @ v[b, :, head]
    return out


def expected(case) -> np.ndarray:
    """The truth of a golden case on its float32 inputs."""
    return expected_of(case, *case.qkv())


def expected_of(case, q, k, v) -> np.ndarray:
    """The truth of a golden case on other inputs, for instance rounded ones."""
    return attention(case.plan, case.stage, case.layer, q, k, v, text_len=case.text_len, scale=case.scale)
