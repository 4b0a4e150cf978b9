"""Random problems for the CUDA kernel, and what their tables mean token by token.

The tables are drawn directly, not built from plans: tiles of any size, lists of any kind, any item order. So they
reach corners that no plan produces, and the truth below shares no code with what it judges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FULL, SKIP = 0, 1


@dataclass(frozen=True)
class KernelCase:
    """Everything but Q, K, V. `tables` holds the seven int32 tables of the operator by name."""

    name: str
    dtype: str
    shape: tuple[int, int, int, int]
    scale: float
    text_tokens: int
    text_first: bool
    tables: dict[str, np.ndarray]

    @property
    def stage(self) -> int:
        return int(self.tables["stage"][0])

    def valid_keys(self, batch: int) -> np.ndarray:
        """bool [N]: keys that are not masked text."""
        tokens = self.shape[1]
        start = 0 if self.text_first else tokens - self.text_tokens
        valid = np.ones(tokens, dtype=bool)
        valid[start + int(self.tables["text_len"][batch]) : start + self.text_tokens] = False
        return valid

    def mask(self, batch: int, head: int, stage: int | None = None) -> np.ndarray:
        """bool [N, N]: query token attends to key token."""
        tokens = self.shape[1]
        pattern = int(self.tables["head_pattern"][self.stage if stage is None else stage, head])
        keep = np.zeros((tokens, tokens), dtype=bool)
        offsets = self.tables["tile_offsets"]
        if pattern == FULL:
            keep[:] = True
        elif pattern != SKIP:
            rows = self.tables["row_offsets"][pattern]
            for query in range(len(offsets) - 1):
                for tile in self.tables["tile_index"][rows[query] : rows[query + 1]]:
                    keep[offsets[query] : offsets[query + 1], offsets[tile] : offsets[tile + 1]] = True
        return keep & self.valid_keys(batch)


def random_case(seed: int, most_tokens: int = 1400) -> KernelCase:
    """A small problem; the same seed gives the same one."""
    rng = np.random.default_rng(seed)
    sizes, text_first, num_text_tiles = _random_tiles(rng, most_tokens)
    num_tiles = len(sizes)
    tile_offsets = np.concatenate([[0], np.cumsum(sizes)])
    text_tokens = int(sizes[:num_text_tiles].sum() if text_first else sizes[num_tiles - num_text_tiles :].sum())
    batch, heads, num_stages = int(rng.integers(1, 3)), int(rng.integers(1, 6)), int(rng.integers(1, 3))
    lists = [np.zeros((num_tiles, num_tiles), bool)] * 2
    lists += [_random_lists(rng, num_tiles) for _ in range(rng.integers(1, 4))]
    head_pattern = rng.integers(0, len(lists), size=(num_stages, heads))
    if rng.random() < 0.05:
        head_pattern[:] = SKIP
    counts = np.stack([x.sum(axis=1) for x in lists])
    ends = np.cumsum(counts).reshape(counts.shape)
    row_offsets = np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1)
    index = np.concatenate([np.nonzero(x)[1] for x in lists])
    text_len = rng.integers(0, text_tokens + 1, size=batch)
    text_len = np.where(rng.random(batch) < 0.3, rng.choice([0, text_tokens], size=batch), text_len)
    tables = {
        "stage": np.array([rng.integers(num_stages)]),
        "text_len": text_len,
        "head_pattern": head_pattern,
        "tile_offsets": tile_offsets,
        "row_offsets": row_offsets,
        "tile_index": index if len(index) else np.zeros(1),
        "work_order": _random_order(rng, head_pattern, int(tile_offsets[-1]), num_tiles),
    }
    head_dim = int(rng.choice([64, 128]))
    return KernelCase(
        name=f"random {seed}",
        dtype=str(rng.choice(["bfloat16", "float16"])),
        shape=(batch, int(tile_offsets[-1]), heads, head_dim),
        scale=float(rng.choice([head_dim**-0.5, 0.3, 0.02])),
        text_tokens=text_tokens,
        text_first=text_first,
        tables={name: np.ascontiguousarray(table, dtype=np.int32) for name, table in tables.items()},
    )


def order_of(head_pattern: np.ndarray, tokens: int, num_tiles: int) -> np.ndarray:
    """int32 [S, H * nT]: every item in natural order, then -1."""
    order = np.full((len(head_pattern), head_pattern.shape[1] * num_tiles), -1, dtype=np.int32)
    for stage, row in enumerate(head_pattern):
        items = [
            (head << 16) | query
            for head, pattern in enumerate(row)
            for query in range(-(-tokens // 128) if pattern == FULL else num_tiles)
        ]
        order[stage, : len(items)] = items
    return order


def _random_order(rng: np.random.Generator, head_pattern: np.ndarray, tokens: int, num_tiles: int) -> np.ndarray:
    order = order_of(head_pattern, tokens, num_tiles)
    for row in order:
        count = int((row >= 0).sum())
        row[:count] = rng.permutation(row[:count])
    return order


def _random_tiles(rng: np.random.Generator, most_tokens: int) -> tuple[np.ndarray, bool, int]:
    """Tile sizes in sequence order, whether text comes first, and the number of text tiles."""
    video = int(rng.integers(1, most_tokens))
    style = rng.integers(3)
    sizes: list[int] = []
    while video > 0:
        size = min(video, (128, int(rng.integers(1, 129)), int(rng.choice([128, 128, 80])))[style])
        sizes.append(size)
        video -= size
    text = int(rng.choice([0, 1, 100, 128, 200, 256]))
    text_tiles = [min(128, text - i) for i in range(0, text, 128)]
    text_first = bool(rng.integers(2))
    # a full head has ceil(N / 128) items, which must fit in one item per tile: true of any tiling
    ordered = text_tiles + sizes if text_first else sizes + text_tiles
    return np.array(ordered), text_first, len(text_tiles)


def _random_lists(rng: np.random.Generator, num_tiles: int) -> np.ndarray:
    """bool [nT, nT]: which key tiles each query tile keeps."""
    kind = rng.integers(5)
    if kind == 0:  # scattered
        return rng.random((num_tiles, num_tiles)) < rng.choice([0.1, 0.4, 0.8])
    if kind == 1:  # the same few tiles for all
        return np.broadcast_to(rng.random(num_tiles) < 0.3, (num_tiles, num_tiles)).copy()
    distance = np.abs(np.arange(num_tiles)[:, None] - np.arange(num_tiles))
    if kind == 2:  # band
        return distance <= rng.integers(0, 3)
    if kind == 3:  # comb
        return distance % rng.integers(2, 5) == 0
    keep = np.zeros((num_tiles, num_tiles), bool)  # most rows keep nothing
    keep[rng.integers(num_tiles), :] = True
    return keep
