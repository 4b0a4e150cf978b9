"""The golden cases of the attention operator: enumerated here, turned into tensors on demand.

Every implementation runs the same list: `CASES` for tests in Python, `op_inputs` and `op_attributes`
for whoever writes a case to files or builds a one-operator graph of it. `tests/reference.py` gives
the truth. A case is replayed by its name alone; seeds come from the name.

Letters: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from svdit.plans.schema import Plan, loads
from svdit.plans.tables import Tables, tables_of


@dataclass(frozen=True)
class Case:
    """One call of the operator: one layer of a plan in one stage."""

    name: str
    plan: dict
    """The plan file as a JSON object: what the brute-force reference reads."""
    stage: int
    layer: int
    text_len: tuple[int, ...]
    scale: float

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, N, H, D."""
        geometry = self.plan["geometry"]
        tokens = math.prod(geometry["grid"]) + geometry["text_tokens"]
        return len(self.text_len), tokens, geometry["heads"], geometry["head_dim"]

    @cached_property
    def parsed(self) -> Plan:
        return loads(json.dumps(self.plan), self.name)

    @cached_property
    def tables(self) -> Tables:
        return tables_of(self.parsed)

    def qkv(self, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 arrays [B, N, H, D] in tile order whose values `dtype` represents exactly."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        q, k, v = (rng.standard_normal(self.shape, dtype=np.float32) for _ in range(3))
        return rounded(1.5 * q, dtype), rounded(k, dtype), rounded(v + 0.25, dtype)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` as float32 after rounding to `dtype` (float32, float16 or bfloat16), to nearest even."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype != "bfloat16":
        raise AssertionError(f"no rounding to {dtype}")
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def op_inputs(case: Case, dtype: str = "float32") -> dict[str, np.ndarray]:
    """All inputs of the operator by name, in its order; q, k, v as float32 (see `Case.qkv`)."""
    q, k, v = case.qkv(dtype)
    tables = case.tables
    return {
        "q": q,
        "k": k,
        "v": v,
        "stage": np.array([case.stage], dtype=np.int32),
        "text_len": np.array(case.text_len, dtype=np.int32),
        "head_pattern": tables.head_pattern[case.layer],
        "tile_offsets": tables.tile_offsets,
        "row_offsets": tables.row_offsets,
        "tile_index": tables.tile_index,
        "work_order": tables.work_order[case.layer],
    }


def op_attributes(case: Case) -> dict[str, object]:
    """All attributes of the operator; the first three are also the last arguments of the torch op."""
    tables = case.tables
    return {
        "scale": case.scale,
        "text_tokens": tables.text_tokens,
        "text_first": tables.text_first,
        "patterns": list(tables.pattern_names),
        "grid": list(tables.grid),
        "tile": list(tables.tile),
    }


PATTERNS: dict[str, dict] = {
    "full": {"kind": "full"},
    "skip": {"kind": "skip"},
    "diagonal": {"kind": "diagonal"},
    "diagonal_frames": {"kind": "diagonal", "frames": 1},
    "diagonal_window": {"kind": "diagonal", "frames": 1, "rows": 1, "cols": 0},
    "diagonal_offset": {"kind": "diagonal", "offset": 1},
    "diagonal_offset_band": {"kind": "diagonal", "frames": 1, "offset": 3, "rows": 1},
    "diagonal_cell": {"kind": "diagonal", "frames": 0, "rows": 0, "cols": 1, "cell": [2, 1, 2]},
    "diagonal_clamp": {"kind": "diagonal", "frames": 1, "rows": 1, "cols": 0, "clamp": True},
    "diagonal_clamp_cell": {"kind": "diagonal", "frames": 0, "rows": 1, "cols": 1, "cell": [2, 1, 1], "clamp": True},
    "multi_diagonal": {"kind": "multi_diagonal"},
    "multi_diagonal_point": {"kind": "multi_diagonal", "rows": 0, "cols": 0},
    "multi_diagonal_rows": {"kind": "multi_diagonal", "rows": 0, "cols": None},
    "multi_diagonal_stride": {"kind": "multi_diagonal", "rows": 1, "cols": 1, "stride": 2},
    "multi_diagonal_stride_offset": {"kind": "multi_diagonal", "cols": 0, "stride": 3, "offset": 1},
    "multi_diagonal_cell": {"kind": "multi_diagonal", "rows": 0, "cols": 0, "stride": 2, "cell": [2, 2, 3]},
    "multi_diagonal_clamp": {"kind": "multi_diagonal", "rows": 1, "cols": 0, "clamp": True},
    "stripe": {"kind": "stripe", "columns": [[0, 2], [11, 12]]},
    "stripe_frames": {"kind": "stripe", "columns": [[3, 7], [5, 9]], "frames": 1},
    "stripe_no_columns": {"kind": "stripe", "columns": []},
    "union": {
        "kind": "union",
        "members": [
            {"kind": "multi_diagonal", "rows": 0, "cols": 0},
            {"kind": "stripe", "columns": [[0, 1]]},
            {"kind": "union", "members": [{"kind": "diagonal", "offset": 4, "cols": 1}]},
        ],
    },
}
"""One of each kind and parameter. Fit for every grid of at least 12 video tiles; `tiles` needs its own."""


def _case(
    name: str,
    grid,
    tile,
    layers,
    *,
    patterns: dict | None = None,
    stages=None,
    stage: int = 0,
    layer: int = 0,
    head_dim: int = 64,
    text: tuple[int, str] = (0, "none"),
    text_len: tuple[int, ...] | None = None,
    scale: float | None = None,
) -> Case:
    """`layers`: rows of pattern names of a one-stage plan, or use `stages`: a list of such lists."""
    stages = [layers] if stages is None else stages
    used = {name for rows in stages for row in rows for name in row} - {"full", "skip"}
    known = {**PATTERNS, **(patterns or {})}
    plan = {
        "format": "svdit-plan",
        "version": 1,
        "model": "golden",
        "geometry": {
            "grid": list(grid),
            "text_tokens": text[0],
            "text_position": text[1],
            "layers": len(stages[0]),
            "heads": len(stages[0][0]),
            "head_dim": head_dim,
        },
        "tile": list(tile),
        "patterns": {pattern: known[pattern] for pattern in known if pattern in used},
        "stages": [{"until": (i + 1) / len(stages), "layers": rows} for i, rows in enumerate(stages)],
        "provenance": {"method": "golden case"},
    }
    text_len = (text[0],) if text_len is None else text_len
    return Case(name, plan, stage, layer, text_len, head_dim**-0.5 if scale is None else scale)


def _every_pattern() -> list[Case]:
    """Odd grid (5, 7, 11) in tiles (1, 3, 4): tile grid 5 x 3 x 3, border tiles of 9, 4 and 3 tokens."""
    grid, tile = (5, 7, 11), (1, 3, 4)
    cases = [_case(f"pattern-{name}", grid, tile, [[name, "full"]]) for name in PATTERNS]
    every = [name for name in PATTERNS if name not in ("full", "skip")]
    cases.append(_case("pattern-all-text-after", grid, tile, [every], text=(7, "after"), text_len=(4,)))
    cases.append(_case("pattern-all-text-before", grid, tile, [every], text=(7, "before"), text_len=(7,)))
    rng = np.random.default_rng(11)
    rows = []
    for row in rng.random((45, 45)) < np.array([0.1, 0.4, 0.9])[:, None].repeat(15, 0):
        row[rng.random() < 0.15] = False
        rows.append([[int(k), int(k) + 1] for k in np.flatnonzero(row)])
    rows[0], rows[44] = [], [[0, 45]]
    listed = {"listed": {"kind": "tiles", "rows": rows}}
    cases.append(_case("pattern-tiles", grid, tile, [["listed", "full"]], patterns=listed))
    cases.append(
        _case("pattern-tiles-text", grid, tile, [["listed"]], patterns=listed, text=(3, "before"), text_len=(1,))
    )
    return cases


_MIX = ["full", "diagonal", "multi_diagonal_stride", "stripe_one", "skip"]
_ONE = {"stripe_one": {"kind": "stripe", "columns": [[1, 2]]}}


def _tile_sizes() -> list[Case]:
    """Full 128-row tiles beside border tiles, tiles larger than the grid, single tokens."""
    return [
        _case("tile-border", (3, 12, 20), (1, 8, 16), [_MIX], patterns=_ONE),
        _case("tile-border-d128", (3, 12, 20), (1, 8, 16), [_MIX], patterns=_ONE, head_dim=128),
        _case("tile-exact", (2, 16, 16), (1, 8, 16), [_MIX], patterns=_ONE, text_len=(0, 0)),
        _case("tile-deep", (9, 6, 10), (4, 4, 8), [_MIX], patterns=_ONE),
        _case("tile-over-grid", (2, 3, 5), (1, 8, 16), [_MIX], patterns=_ONE),
        _case("tile-one-token", (2, 3, 3), (1, 1, 1), [_MIX], patterns=_ONE),
        _case("tile-row", (3, 5, 40), (1, 1, 40), [_MIX], patterns=_ONE, head_dim=128),
        _case("tile-single", (1, 1, 1), (1, 8, 16), [["full", "diagonal", "skip"]]),
        _case("long", (5, 16, 20), (1, 8, 16), [_MIX], patterns=_ONE, head_dim=128),
        _case("long-text", (5, 16, 20), (1, 8, 16), [_MIX], patterns=_ONE, text=(226, "before"), text_len=(226, 50)),
        _case("scale", (3, 5, 7), (1, 2, 3), [_MIX], patterns=_ONE, scale=0.3),
    ]


def _text() -> list[Case]:
    """Text before and after, one run or several, partly or wholly masked, per batch element."""
    cases = []
    for position in ("before", "after"):
        for text, lengths in {
            5: [(5,), (2,), (0,), (3, 0)],
            128: [(127, 128)],
            130: [(130,), (129,), (128,), (17,), (130, 64), (0, 0)],
            256: [(256, 128), (100, 130)],
        }.items():
            for text_len in lengths:
                name = f"text-{position}-{text}-len-{'-'.join(map(str, text_len))}"
                grid, tile = (2, 5, 9), (1, 4, 8)
                cases.append(_case(name, grid, tile, [_MIX], patterns=_ONE, text=(text, position), text_len=text_len))
        cases.append(
            _case(f"text-{position}-d128", (3, 9, 17), (1, 8, 16), [_MIX], patterns=_ONE, head_dim=128,
                  text=(77, position), text_len=(30, 77)),
        )  # fmt: skip
    return cases


def _stages_and_layers() -> list[Case]:
    """The stage input picks the row; layers share the tables of the whole plan."""
    stages = [
        [["full"] * 3, ["full", "stripe_one", "full"]],
        [["diagonal", "multi_diagonal", "skip"], ["skip"] * 3],
        [["skip", "diagonal", "full"], ["multi_diagonal", "multi_diagonal", "stripe_one"]],
    ]
    return [
        _case(f"stage-{stage}-layer-{layer}", (3, 5, 7), (1, 2, 3), None, stages=stages, patterns=_ONE,
              stage=stage, layer=layer, text=(9, "after"), text_len=(9, 6))
        for stage in range(3)
        for layer in range(2)
    ]  # fmt: skip


def _nothing_kept() -> list[Case]:
    """Query rows without a single key: by the pattern, by text_len, by both."""
    far = {
        "far": {"kind": "diagonal", "offset": 2},  # the middle frame of three has no partner
        "none": {"kind": "diagonal", "offset": 9},
        "empty": {"kind": "tiles", "rows": [[]] * 12},
    }
    row = ["far", "none", "empty", "full"]
    grid, tile = (3, 4, 6), (1, 2, 3)
    cases = [
        _case("nothing-kept", grid, tile, [row], patterns=far),
        _case("nothing-kept-b2-d128", grid, tile, [row], patterns=far, text_len=(0, 0), head_dim=128),
        _case("nothing-kept-only", grid, tile, [["none", "empty"]], patterns=far),
        _case("skip-only", grid, tile, [["skip", "skip", "skip"]], text_len=(0, 0)),
        _case("skip-only-text", grid, tile, [["skip", "skip"]], text=(6, "after"), text_len=(0,)),
        _case("full-only", grid, tile, [["full", "full"]], text=(6, "before"), text_len=(5, 0)),
    ]
    for position in ("before", "after"):
        for text_len in ((0,), (4, 0)):
            name = f"nothing-kept-text-{position}-len-{'-'.join(map(str, text_len))}"
            text = (4, position)
            cases.append(_case(name, grid, tile, [row], patterns=far, text=text, text_len=text_len))
    return cases


CASES: tuple[Case, ...] = (
    *_every_pattern(),
    *_tile_sizes(),
    *_text(),
    *_stages_and_layers(),
    *_nothing_kept(),
)
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
