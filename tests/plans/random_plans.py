"""Random small plans as JSON objects, from a seed: every kind, odd grids, border tiles, text or none."""

from __future__ import annotations

import math

import numpy as np


def random_plan(seed: int, heads: int = 4, layers: int = 2, num_patterns: int = 5) -> dict:
    """A valid plan file with 1 to 3 stages; grids of at most a few hundred tokens."""
    rng = np.random.default_rng(seed)
    grid = [int(rng.integers(1, high)) for high in (7, 9, 9)]
    tile = [int(rng.integers(1, high)) for high in (3, 5, 5)]
    tile_grid = [math.ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    text = int(rng.choice([0, 0, 1, 9, 128, 150]))
    patterns = {f"p{i}": random_pattern(rng, tile_grid) for i in range(num_patterns)}
    names = ["full", "skip", *patterns]
    stages = int(rng.integers(1, 4))
    return {
        "format": "svdit-plan",
        "version": 1,
        "model": "random",
        "geometry": {
            "grid": grid,
            "text_tokens": text,
            "text_position": str(rng.choice(["before", "after"])) if text else "none",
            "layers": layers,
            "heads": heads,
            "head_dim": 64,
        },
        "tile": tile,
        "patterns": patterns,
        "stages": [
            {
                "until": (i + 1) / stages,
                "layers": [[str(rng.choice(names)) for _ in range(heads)] for _ in range(layers)],
            }
            for i in range(stages)
        ],
        "provenance": {"method": "random", "seed": seed, "note": "\u00e9 \u4e2d", "nested": [1, 2.5, None, {"a": 0}]},
    }


def random_pattern(rng: np.random.Generator, tile_grid, depth: int = 0) -> dict:
    """Any kind with any parameters; defaults are sometimes written out and sometimes left out."""
    count = math.prod(tile_grid)
    kinds = ["diagonal", "multi_diagonal", "diagonal", "multi_diagonal", "stripe", "tiles"] + ["union"] * (depth < 2)
    kind = str(rng.choice(kinds))
    if kind == "union":
        return {"kind": kind, "members": [random_pattern(rng, tile_grid, depth + 1) for _ in range(rng.integers(1, 4))]}
    if kind == "tiles":
        return {"kind": kind, "rows": [_ranges(rng, count) for _ in range(count)]}
    if kind == "stripe":
        return {"kind": kind, "columns": _ranges(rng, count), **_some(rng, frames=int(rng.integers(0, 3)))}
    shared = {
        "rows": _radius(rng),
        "cols": _radius(rng),
        "cell": [int(n) for n in rng.integers(1, 4, size=3)],
    }
    own = {"frames": int(rng.integers(0, 4))} if kind == "diagonal" else {"stride": int(rng.integers(1, 4))}
    if rng.random() < 0.4:
        own.pop("stride", None)
        return {"kind": kind, **_some(rng, **shared, **own), "clamp": True}
    return {"kind": kind, **_some(rng, **shared, **own, offset=int(rng.integers(0, 4)), clamp=False)}


def _radius(rng) -> int | None:
    return None if rng.random() < 0.2 else int(rng.integers(0, 3))


def _some(rng, **fields) -> dict:
    return {name: value for name, value in fields.items() if rng.random() < 0.6}


def _ranges(rng, count: int) -> list[list[int]]:
    result = []
    for _ in range(rng.integers(0, 3)):
        start = int(rng.integers(0, count))
        result.append([start, int(rng.integers(start + 1, count + 1))])
    return result
