"""The attention problems that `svdit-bench attention` times: sizes, and one pattern a head.

Uniform cases give every head the same mask on tiles of 128 tokens, so that every kernel computes the same
blocks. The mixed case is one layer of a 720p HunyuanVideo plan with its border tiles and text. T, H, W count
tiles along frames, height and width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Pattern, Skip, Stripe, Tiles
from svdit.plans.schema import Plan, Stage
from svdit.plans.tables import Tables, tables_of

BLOCK = 128
LENGTHS = (16384, 32768, 65536, 118784, 237568, 480000)
"""Tokens of the cases comb-N."""
LISTS = (4, 8, 16, 32, 64, 128)
"""Key tiles of every query tile in the cases list-N."""


@dataclass(frozen=True)
class BenchCase:
    """One layer: `heads` holds a pattern name for each head."""

    name: str
    geometry: Geometry
    tile: tuple[int, int, int]
    patterns: dict[str, Pattern]
    heads: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, N, H, D with B = 1."""
        return 1, self.geometry.tokens, self.geometry.heads, self.geometry.head_dim

    @cached_property
    def plan(self) -> Plan:
        used = {name: pattern for name, pattern in self.patterns.items() if name in self.heads}
        return Plan(self.name, self.geometry, self.tile, used, (Stage(1.0, (self.heads,)),), {"method": "bench"})

    @cached_property
    def tables(self) -> Tables:
        return tables_of(self.plan)

    def pattern(self, name: str) -> Pattern:
        return {"full": Full(), "skip": Skip()}.get(name) or self.patterns[name]

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """bool [nT, nT] for each pattern in use; text included."""
        tiling = self.plan.tiling()
        return {name: tiling.mask(self.pattern(name)) for name in dict.fromkeys(self.heads)}

    @property
    def is_uniform(self) -> bool:
        """All heads alike, all tiles full: kernels with one mask on 128 x 128 blocks compute the same thing."""
        return len(set(self.heads)) == 1 and self.geometry.tokens == BLOCK * (len(self.tables.tile_offsets) - 1)

    @cached_property
    def pairs(self) -> int:
        """Kept query-key token pairs of all heads."""
        sizes = self.plan.tiling().sizes.astype(np.int64)
        of = {name: int(sizes @ mask @ sizes) for name, mask in self.masks.items()}
        return sum(of[name] for name in self.heads)

    @property
    def flop(self) -> int:
        """2 products of 2 operations per kept pair and head column: what the mask asks for, no padding."""
        return 4 * self.pairs * self.geometry.head_dim

    @property
    def density(self) -> float:
        return self.pairs / (self.geometry.tokens**2 * self.geometry.heads)


def _uniform(name: str, tiles: int, heads: int, head_dim: int, mask: np.ndarray | None) -> BenchCase:
    geometry = Geometry((tiles, 1, BLOCK), 0, "none", 1, heads, head_dim)
    pattern = "full" if mask is None else "kept"
    patterns = {} if mask is None else {"kept": Tiles.from_mask(mask)}
    return BenchCase(name, geometry, (1, 1, BLOCK), patterns, (pattern,) * heads)


def band(tiles: int, width: int) -> np.ndarray:
    """Key tiles at most `width` away."""
    i = np.arange(tiles)
    return np.abs(i[:, None] - i) <= width


def comb(tiles: int, period: int, width: int) -> np.ndarray:
    """Key tiles whose place in the frame is at most `width` away, cyclically, in every frame of `period` tiles."""
    i = np.arange(tiles) % period
    d = np.abs(i[:, None] - i)
    return np.minimum(d, period - d) <= width


def scattered(tiles: int, density: float) -> np.ndarray:
    """Random key tiles, different for each query tile."""
    return np.random.default_rng(0).random((tiles, tiles)) < density


def mixed_layer() -> BenchCase:
    """HunyuanVideo, 33 x 45 x 80 latent tokens and 256 of text; 4 full heads, 18 sparse ones, 2 skipped."""
    geometry = Geometry((33, 45, 80), 256, "after", 1, 24, 128)
    patterns: dict[str, Pattern] = {
        "diagonal": Diagonal(frames=1),
        "multi_diagonal": MultiDiagonal(rows=1, cols=1),
        "stripe": Stripe(columns=((0, 90),)),
    }
    heads = ("full",) * 4 + ("diagonal",) * 8 + ("multi_diagonal",) * 8 + ("stripe",) * 2 + ("skip",) * 2
    return BenchCase("mixed", geometry, (1, 8, 16), patterns, heads)


def mixed_wan() -> BenchCase:
    """Wan2.1 14B, 21 x 45 x 80 latent tokens; 8 full heads, 30 sparse ones, 2 skipped."""
    patterns: dict[str, Pattern] = {
        "diagonal": Diagonal(frames=2),
        "multi_diagonal": MultiDiagonal(rows=1, cols=1),
        "window": Diagonal(frames=4, rows=2, cols=1),
        "stripe": Stripe(columns=((0, 30),)),
    }
    heads = ("full",) * 8 + ("diagonal",) * 10 + ("multi_diagonal",) * 8 + ("window",) * 8 + ("stripe",) * 4
    geometry = Geometry((21, 45, 80), 0, "none", 1, 40, 128)
    return BenchCase("mixed-wan", geometry, (1, 8, 16), patterns, (*heads, "skip", "skip"))


def mixed_cogvideox() -> BenchCase:
    """CogVideoX1.5, 226 text tokens and 11 x 48 x 85 latent ones; 6 full heads, 38 sparse ones, 4 skipped."""
    patterns: dict[str, Pattern] = {
        "diagonal": Diagonal(frames=1),
        "multi_diagonal": MultiDiagonal(rows=1, cols=1),
        "stripe": Stripe(columns=((0, 36),)),
    }
    heads = ("full",) * 6 + ("diagonal",) * 16 + ("multi_diagonal",) * 16 + ("stripe",) * 6 + ("skip",) * 4
    return BenchCase("mixed-cog", Geometry((11, 48, 85), 226, "before", 1, 48, 64), (1, 8, 16), patterns, heads)


def _small_tiles(name: str, patterns: dict[str, Pattern], heads: tuple[str, ...]) -> BenchCase:
    """The heads of 16 rows of `tiny`: 9216 tokens in 144 tiles of 64."""
    geometry = Geometry((16, 24, 24), 0, "none", 1, len(heads), 64)
    return BenchCase(name, geometry, (4, 4, 4), patterns, heads)


def mixed_small_tiles() -> BenchCase:
    patterns = {
        "diagonal": Diagonal(frames=1),
        "multi_diagonal": MultiDiagonal(rows=1, cols=1),
        "scattered": Tiles.from_mask(scattered(144, 0.2)),
    }
    heads = ("full",) * 16 + ("diagonal",) * 16 + ("multi_diagonal",) * 12 + ("scattered",) * 16 + ("skip",) * 4
    return _small_tiles("mixed-tiles64", patterns, heads)


def _uniform_small_tiles(name: str, pattern: Pattern) -> BenchCase:
    return _small_tiles(name, {"kept": pattern}, ("kept",) * 64)


def _sized(tokens: int) -> BenchCase:
    """Time against length: a comb of about 17 percent, or of a fixed number of tiles at 480k tokens."""
    tiles = tokens // BLOCK
    return _uniform(f"comb-{tokens}", tiles, 24, 128, comb(tiles, 29, 2))


def _listed(count: int) -> BenchCase:
    """Time against list length: what an item costs beside its blocks."""
    return _uniform(f"list-{count}", 928, 24, 128, band_of(928, count))


_MAKERS = {
    "dense": lambda: _uniform("dense", 928, 24, 128, None),
    "band-6": lambda: _uniform("band-6", 928, 24, 128, band(928, 28)),
    "comb-17": lambda: _uniform("comb-17", 928, 24, 128, comb(928, 29, 2)),
    "random-40": lambda: _uniform("random-40", 928, 24, 128, scattered(928, 0.4)),
    "mixed": mixed_layer,
    "dense-d64": lambda: _uniform("dense-d64", 352, 48, 64, None),
    "comb-16-d64": lambda: _uniform("comb-16-d64", 352, 48, 64, comb(352, 32, 2)),
    "mixed-wan": mixed_wan,
    "mixed-cog": mixed_cogvideox,
    "dense-tiles64": lambda: _small_tiles("dense-tiles64", {}, ("full",) * 64),
    "band-tiles64": lambda: _uniform_small_tiles("band-tiles64", Diagonal(frames=0)),
    "comb-tiles64": lambda: _uniform_small_tiles("comb-tiles64", MultiDiagonal(rows=0, cols=1)),
    "random-tiles64": lambda: _uniform_small_tiles("random-tiles64", Tiles.from_mask(scattered(144, 0.3))),
    "mixed-tiles64": mixed_small_tiles,
    **{f"comb-{n}": (lambda n=n: _sized(n)) for n in LENGTHS},
    **{f"list-{n}": (lambda n=n: _listed(n)) for n in LISTS},
}


def band_of(tiles: int, count: int) -> np.ndarray:
    """Exactly `count` neighbouring key tiles for every query tile, clamped at the ends."""
    first = np.clip(np.arange(tiles) - count // 2, 0, tiles - count)[:, None]
    j = np.arange(tiles)[None]
    return (j >= first) & (j < first + count)


TABLE = ("dense", "band-6", "comb-17", "random-40", "mixed", "dense-d64", "comb-16-d64")
"""The cases that the figures in docs/kernels.md are about."""
MIXED = ("mixed", "mixed-wan", "mixed-cog", "mixed-tiles64")
"""Layers of unlike heads, which a latency table should predict from its other rows."""
SMALL_TILES = ("dense-tiles64", "band-tiles64", "comb-tiles64", "random-tiles64")
SWEEP = (*(f"comb-{n}" for n in LENGTHS), *(f"list-{n}" for n in LISTS))
"""Time against the length of the sequence and of the lists."""
LATENCY = tuple(dict.fromkeys((*TABLE, *SWEEP, *SMALL_TILES, *MIXED)))
"""The cases that a latency table is made of."""


def case_names() -> list[str]:
    return list(_MAKERS)


def bench_case(name: str) -> BenchCase:
    """Build a case by name. Raises SvditError for a name that does not exist."""
    if name not in _MAKERS:
        raise complain("case", name, "one of " + ", ".join(_MAKERS))
    return _MAKERS[name]()


def layer_case(plan: Plan, stage: int, layer: int) -> BenchCase:
    """One layer of a plan in one stage. Raises SvditError for a stage or layer that the plan does not have."""
    for what, got, count in (("stage", stage, len(plan.stages)), ("layer", layer, plan.geometry.layers)):
        if not 0 <= got < count:
            raise complain(what, got, f"0..{count - 1}, as the plan has")
    geometry = replace(plan.geometry, layers=1)
    heads = plan.stages[stage].layers[layer]
    return BenchCase(f"stage-{stage}-layer-{layer}", geometry, plan.tile, dict(plan.patterns), heads)


def dense_case(case: BenchCase) -> BenchCase:
    """The same layer with all heads full."""
    return replace(case, name=f"{case.name}-dense", heads=("full",) * len(case.heads))
