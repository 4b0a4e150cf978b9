"""Static masks and choice rules of other methods, so that all of them run on one kernel (docs/search.md).

Each method's mask is defined on tokens; a pair of tiles is kept when the method keeps at least half of its token pairs.
Widths are set by the density asked for. Nothing here needs a model: what must be measured comes as a `Measurement`.

V video tokens, nV video tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import number, one_of
from svdit.plans.flops import mean_density
from svdit.plans.geometry import Geometry
from svdit.plans.numbers import significant
from svdit.plans.patterns import Tiles, pattern_from_json
from svdit.plans.schema import Plan, Stage
from svdit.plans.search import Measurement, mode_density, with_full
from svdit.plans.stages import Segment
from svdit.plans.tiles import Tiling

METHODS = ("svg", "winattn-spatial", "winattn-temporal", "sta", "minference-static", "psa")
UNMEASURED = ("winattn-spatial", "winattn-temporal")
"""Methods whose mask follows from the geometry alone."""
STA_CELL = (6, 8, 8)
STA_WINDOWS = 5
"""Windows that a head may choose from: the densest ones that keep to the density."""
PSA_BLOCK = (3, 8, 16)
PSA_CANDIDATES = 100

Mask = np.ndarray


def check_method(method: str) -> str:
    return one_of(method, "method", METHODS)


def sparse_density(density: float, dense_steps: int, steps: int) -> float:
    """Density of the sparse steps when the first `dense_steps` of `steps` are full and all of them keep `density`."""
    expected = "a number above 0 and at most 1"
    if not 0 < number(density, "density", expected) <= 1:
        raise complain("density", density, expected)
    share = dense_steps / steps
    if density <= share and dense_steps:
        raise complain("density", density, f"more than the {share:.4g} of the dense steps", "give fewer dense steps")
    return (density - share) / (1 - share) if share < 1 else 1.0


def candidates(method: str, tiling: Tiling, density: float) -> dict[str, dict]:
    """What a head may choose from, as a search takes it: patterns by name; the sparse steps keep `density`."""
    check_method(method)
    if method == "minference-static":
        return {
            "vertical-slash": {"kind": "tiles", "rows": {"vertical_slash": density}},
            "block": {"kind": "tiles", "rows": {"block": density}},
        }
    if method == "sta":
        found = _sta(tiling, density)
    elif method == "psa":
        found = _psa(tiling)
    else:
        kinds = ("spatial", "temporal") if method == "svg" else (method.removeprefix("winattn-"),)
        found = {kind: _band(tiling, kind, density) for kind in kinds}
    return {name: Tiles.from_mask(mask).to_json() for name, mask in found.items()}


def unmeasured_plan(
    method: str, model: str, geometry: Geometry, tile: tuple[int, int, int], density: float, dense: int, steps: int
) -> Plan:
    """The plan of a method that has no choice: full in the first `dense` of `steps` steps, then its mask everywhere."""
    if method not in UNMEASURED:
        raise complain("method", method, "one of " + ", ".join(UNMEASURED))
    ((name, spec),) = candidates(method, Tiling(geometry, tile), sparse_density(density, dense, steps)).items()

    def stage(until: float, pattern: str) -> Stage:
        return Stage(until, ((pattern,) * geometry.heads,) * geometry.layers)

    stages = [stage(1.0, name)] if dense < steps else []
    if dense:
        stages.insert(0, stage(dense / steps, "full"))
    record = {"method": method, "target": {"density": density}, "steps": steps, "choice": "no measurement"}
    plan = Plan(model, geometry, tile, {name: pattern_from_json(spec)}, tuple(stages), record)
    return replace(plan, provenance={**record, "density": significant(mean_density(plan))})


def choice(method: str, measured: Measurement, dense_steps: int, density: float) -> list[Segment]:
    """Full in the first steps, then one choice per head by the method's own rule.

    SVG, STA, MInference: least error. PSA: the sparsest whose error, relative to the head's output, is within a
    bound; the bound is the smallest with which the sparse steps keep at most `density`.
    """
    check_method(method)
    steps, layers, heads, modes = measured.error.shape
    if dense_steps >= steps:
        return [Segment(0, steps, np.full((layers, heads), modes), 0.0)]
    normaliser = "head" if method == "psa" else "layer"
    error = with_full(measured.relative(normaliser), 0.0)[dense_steps:].mean(0)
    kept = mode_density(measured)
    picked = _sparsest(error, kept, density) if method == "psa" else error[..., :-1].argmin(-1)
    loss = float(np.take_along_axis(error, picked[..., None], -1).sum()) * (steps - dense_steps)
    sparse = Segment(dense_steps, steps, picked, loss)
    return [Segment(0, dense_steps, np.full((layers, heads), modes), 0.0), sparse] if dense_steps else [sparse]


def _sparsest(error: np.ndarray, kept: np.ndarray, density: float) -> np.ndarray:
    """int [L, H]: per head the sparsest mode with error <= bound, for the smallest bound that meets the density."""

    def at(bound: float) -> np.ndarray:
        return np.where(error <= bound, kept, np.inf).argmin(-1)

    bounds = np.unique(error)
    low, high = -1, len(bounds) - 1
    if np.take_along_axis(kept, at(bounds[high])[..., None], -1).mean() > density:
        raise complain("density", f"{density:.4g}", "one that the sparsest candidates reach", "ask for a larger one")
    while high - low > 1:
        middle = (low + high) // 2
        fits = np.take_along_axis(kept, at(bounds[middle])[..., None], -1).mean() <= density
        low, high = (low, middle) if fits else (middle, high)
    return at(bounds[high])


def _band(tiling: Tiling, kind: str, density: float) -> Mask:
    """SVG's band |q - k| < b in raster order (spatial) or position-major order (temporal), b as wide as fits."""
    video = tiling.geometry.video_tokens
    raster = np.arange(video)
    frame = tiling.geometry.grid[1] * tiling.geometry.grid[2]
    place = raster if kind == "spatial" else raster % frame * tiling.geometry.grid[0] + raster // frame
    position = place[tiling.order]
    return _widest(tiling, lambda half: _band_share(tiling, position, half) >= 0.5, video, density)


def _widest(tiling: Tiling, mask_of: Callable[[int], Mask], most: int, density: float) -> Mask:
    """The mask of the largest size in 1..most that keeps at most `density`; masks grow with the size."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _density(tiling, mask_of(middle)) <= density else (low, middle)
    if low == 0:
        raise complain("density", f"{density:.4g}", f"at least {_density(tiling, mask_of(1)):.4g}", "or smaller tiles")
    return mask_of(low)


def _density(tiling: Tiling, video_mask: Mask) -> float:
    """Density with text, as plans count it."""
    mask = np.ones((tiling.num_tiles, tiling.num_tiles), dtype=bool)
    mask[tiling.video_slice, tiling.video_slice] = video_mask
    return tiling.density(mask)


def _band_share(tiling: Tiling, position: np.ndarray, half: int) -> np.ndarray:
    """[nV, nV] share of token pairs with |position_q - position_k| < half; position [V] in tile order."""
    video = len(position)
    sizes = tiling.sizes[tiling.video_slice].astype(np.int64)
    tile_at = np.empty(video, dtype=np.int64)
    tile_at[position] = np.repeat(np.arange(len(sizes)), sizes)
    shares = np.empty((len(sizes), len(sizes)))
    for q, tokens in enumerate(np.split(position, np.cumsum(sizes)[:-1])):
        edges = np.zeros(video + 1)
        np.add.at(edges, np.maximum(tokens - half + 1, 0), 1)
        np.add.at(edges, np.minimum(tokens + half, video), -1)
        kept = np.bincount(tile_at, weights=np.cumsum(edges[:-1]), minlength=len(sizes))
        shares[q] = kept / (sizes[q] * sizes)
    return shares


def _axis_shares(tiling: Tiling, axis: int, keeps: Mask) -> np.ndarray:
    """[tiles, tiles] along one axis: share of position pairs that bool [n, n] keeps."""
    count, size = tiling.geometry.grid[axis], tiling.tile[axis]
    member = (np.arange(count) // size == np.arange(tiling.tile_grid[axis])[:, None]).astype(float)
    member /= member.sum(1, keepdims=True)
    return member @ keeps @ member.T


def _box(tiling: Tiling, keeps: list[Mask]) -> Mask:
    """Tile pairs of which three tests, one an axis, keep at least half of the token pairs."""
    t, h, w = (_axis_shares(tiling, axis, keep) for axis, keep in enumerate(keeps))
    return np.kron(np.kron(t, h), w) >= 0.5 - 1e-9


def _cells(grid: tuple[int, ...], wanted: tuple[int, ...]) -> list[int]:
    """Along each axis the divisor of the grid that is nearest to the cell wanted; of two, the smaller."""
    return [
        min((d for d in range(1, n + 1) if n % d == 0), key=lambda d, size=size: (abs(d - size), d))
        for n, size in zip(grid, wanted, strict=True)
    ]


def _window(count: int, cell: int, size: int) -> Mask:
    """bool [count, count]: a window of `size` cells whose centre is moved inward at the ends."""
    index = np.arange(count) // cell
    cells = -(-count // cell)
    if size >= cells:
        return np.ones((count, count), dtype=bool)
    centre = np.clip(index, size // 2, cells - 1 - size // 2)
    return np.abs(centre[:, None] - index) <= size // 2


def _sta(tiling: Tiling, density: float) -> dict[str, Mask]:
    """Sliding windows, odd or whole along each axis: the densest ones that keep at most `density`."""
    grid = tiling.geometry.grid
    cell = _cells(grid, STA_CELL)
    counts = [n // c for n, c in zip(grid, cell, strict=True)]
    sizes = [sorted({*range(1, n, 2), n}) for n in counts]
    found = {}
    for window in itertools.product(*sizes):
        mask = _box(tiling, [_window(n, c, w) for n, c, w in zip(grid, cell, window, strict=True)])
        if mask.any(axis=1).all():  # a tile wider than two windows keeps less than half of anything
            found["sta-" + "-".join(map(str, window))] = (mask, _density(tiling, mask))
    fitting = sorted(((kept, name) for name, (_, kept) in found.items() if kept <= density), reverse=True)
    if not fitting:
        least = min((kept for _, kept in found.values()), default=1.0)
        raise complain("density", f"{density:.4g}", f"at least {least:.4g} with cells of {cell}", "or smaller tiles")
    return _distinct({name: found[name][0] for _, name in fitting}, STA_WINDOWS)


def _psa(tiling: Tiling) -> dict[str, Mask]:
    """Windows of blocks in space; in time a window, its offset and a stride: evenly spaced densities."""
    grid = tiling.geometry.grid
    blocks = [-(-n // b) for n, b in zip(grid, PSA_BLOCK, strict=True)]
    space = [sorted({*(s for s in (1, 3, 5) if s < n), n}) for n in blocks[1:]]
    index = np.arange(grid[0]) // PSA_BLOCK[0]
    away = np.abs(index[:, None] - index)
    times = {}
    for width, offset, stride in itertools.product(range(1, blocks[0] + 1), (0, 1, 2), (2, 3, None)):
        distance = np.abs(away - offset)
        times[f"{width}-{offset}-{stride or 'inf'}"] = (distance % stride if stride else distance) <= width - 1
    found = {}
    for (name, time), rows, cols in itertools.product(times.items(), *space):
        plane = [_window(grid[1], PSA_BLOCK[1], rows), _window(grid[2], PSA_BLOCK[2], cols)]
        found[f"psa-{name}-{rows}-{cols}"] = _box(tiling, [time, *plane])
    found = _distinct({name: mask for name, mask in found.items() if mask.any(axis=1).all() and not mask.all()})
    names = sorted(found, key=lambda name: (_density(tiling, found[name]), name))
    places = np.unique(np.linspace(0, len(names) - 1, min(len(names), PSA_CANDIDATES)).round().astype(int))
    return {names[i]: found[names[i]] for i in places}


def _distinct(masks: dict[str, Mask], most: int | None = None) -> dict[str, Mask]:
    """The first of equal masks, at most `most` of them."""
    first: dict[bytes, str] = {}
    for name, mask in masks.items():
        first.setdefault(np.packbits(mask).tobytes(), name)
    return {name: masks[name] for name in list(first.values())[:most]}
