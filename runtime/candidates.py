"""The candidate patterns of a search: a default ladder, a JSON file, and patterns that are measured first.

A candidate is a pattern in the plan file's syntax, by name. Two fields may ask for a measurement instead of
giving ranges; they are resolved per layer and head from the dense attention map:
`"columns": {"top": n}` of a stripe takes the n key tiles that get most attention from frames outside its band;
`"rows": {"top": p}` of a tiles pattern takes the share p of all tile pairs with most attention,
`"rows": {"block": p}` that share of the key tiles of every query tile, `"rows": {"vertical_slash": p}` the columns and
diagonals with most attention that together keep at most p. `"part": n` beside them takes the map of the first (0),
second or last (2) third of the steps instead of that of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np

from svdit.plans.errors import complain, rooted
from svdit.plans.fields import integer, number, one_of, record, shown
from svdit.plans.files import parse_json, read_text
from svdit.plans.patterns import Full, Pattern, Skip, Tiles, pattern_from_json
from svdit.plans.schema import BUILT_IN, Plan, template
from svdit.plans.tiles import Tiling

Specs = dict[str, dict]
VERTICAL_SHARE = 1000 / 7096
"""Columns among the lines of a vertical-slash pattern, MInference's default of 1000 columns and 6096 diagonals."""
MEASURED = ("top", "block", "vertical_slash")
MAP_PARTS = 3
"""Parts of the trajectory that have an attention map of their own."""
MOST_MAPPED = 512
"""Video tiles up to which the default ladder asks for whole attention maps."""
PLACES = (
    (0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (0, None), (None, 0), (1, None), (None, 1), (3, 3),
)
"""Half-widths in rows and columns of tiles around a place; None: all of the axis."""
CROSSED = ((0, 0), (1, 1), (0, None), (None, 0))
MAX_DENSITY = 0.85
"""The default ladder leaves out what saves less than this keeps."""


def default_candidates(tiling: Tiling) -> Specs:
    """Skip, bands, places, windows, stripes, unions and heaviest tiles of rising width, fitted to the grid; about 100.

    Heaviest tiles need the whole attention map of every head and are left out above MOST_MAPPED video tiles. Patterns
    with the same mask as an earlier one, or denser than MAX_DENSITY, are left out.
    """
    frames_all, rows_all, cols_all = tiling.tile_grid
    specs: Specs = {"skip": {"kind": "skip"}}
    widths = [f for f in (0, 1, 2, 3, 4, 6, 8, 11, 15) if f == 0 or 2 * f + 1 < 2 * frames_all]
    places = [(r, c) for r, c in PLACES if (r or 0) < rows_all and (c or 0) < cols_all]
    for f in widths:
        specs[f"diagonal-{f}"] = _diagonal(f)
    for r, c in places:
        specs[f"multi-{_label(r)}-{_label(c)}"] = _multi(r, c)
    for f in widths[:4]:
        for r, c in places:
            specs[f"window-{f}-{_label(r)}-{_label(c)}"] = _diagonal(f, r, c)
    plane = rows_all * cols_all
    for f in (0, 1, 2):
        specs[f"first-{f}"] = {"kind": "stripe", "columns": [[0, plane]], "frames": f}
        for share in (16, 8, 4, 2):
            specs[f"top{share}-{f}"] = _top(tiling, share, f)
    for f in widths[:3]:
        for r, c in [p for p in places if p in CROSSED]:
            specs[f"cross-{f}-{_label(r)}-{_label(c)}"] = _union(_diagonal(f), _multi(r, c))
    if 1 < tiling.num_video_tiles <= MOST_MAPPED:
        for share in (0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.36, 0.43, 0.5, 0.6, 0.7):
            specs[f"heaviest-{share:g}"] = {"kind": "tiles", "rows": {"top": share}}
        for part, share in product(range(MAP_PARTS), (0.12, 0.2, 0.3, 0.43, 0.6)):
            specs[f"heaviest-{share:g}-part{part}"] = {"kind": "tiles", "rows": {"top": share, "part": part}}
        for share in (0.1, 0.2, 0.3):
            specs[f"block-{share:g}"] = {"kind": "tiles", "rows": {"block": share}}
    return _thinned(specs, tiling)


def _diagonal(frames: int, rows: int | None = None, cols: int | None = None) -> dict:
    return {"kind": "diagonal", "frames": frames, "rows": rows, "cols": cols}


def _multi(rows: int | None, cols: int | None) -> dict:
    return {"kind": "multi_diagonal", "rows": rows, "cols": cols}


def _top(tiling: Tiling, share: int, frames: int) -> dict:
    """The heaviest one in `share` key tiles beside a band of frames."""
    return {"kind": "stripe", "columns": {"top": max(1, tiling.num_video_tiles // share)}, "frames": frames}


def _union(*members: dict) -> dict:
    return {"kind": "union", "members": list(members)}


def _label(size: int | None) -> str:
    return "all" if size is None else str(size)


def _thinned(specs: Specs, tiling: Tiling) -> Specs:
    seen: set[bytes] = set()
    kept: Specs = {}
    for name, spec in specs.items():
        if not is_measured(spec):
            mask = tiling.mask(pattern_from_json(spec))
            if tiling.density(mask) > MAX_DENSITY or mask.tobytes() in seen:
                continue
            seen.add(mask.tobytes())
        kept[name] = spec
    return kept


def read_candidates(path: Path, tiling: Tiling) -> Specs:
    """Candidates from a JSON object of name to pattern; SvditError names the file and the field."""
    obj = parse_json(read_text(path, "a JSON file of candidate patterns"), str(path))
    return check_candidates(obj, tiling, str(path))


def check_candidates(obj: object, tiling: Tiling, source: str = "candidates") -> Specs:
    """Check names and patterns against a tiling; measured fields are tried with a flat map."""
    if not isinstance(obj, Mapping) or not obj:
        raise complain(source, shown(obj), "an object of candidate patterns by name, at least one")
    flat = np.full((MAP_PARTS, tiling.num_video_tiles, tiling.num_video_tiles), 1.0 / tiling.num_video_tiles)
    specs: Specs = {}
    for name, spec in obj.items():
        where = f"{source}: $.{name}"
        pattern = resolve(spec, tiling, flat, where)
        if isinstance(pattern, Full):
            raise complain(where, '"full"', "a sparse pattern", "full needs no entry, it is always considered")
        if (name in BUILT_IN) != isinstance(pattern, Skip):
            raise complain(where, f"kind {spec['kind']!r}", 'the name "skip" for the kind skip, and only for it')
        with rooted(f"{source}: "):
            _check_in_plan(name, pattern, tiling)
        specs[name] = dict(spec)
    return specs


def _check_in_plan(name: str, pattern: Pattern, tiling: Tiling) -> None:
    """Let the plan's own checks judge name (with the suffix of measured ones) and fit to the grid."""
    if not isinstance(pattern, Skip):
        base = template("candidates", tiling.geometry, tiling.tile)
        Plan(base.model, base.geometry, base.tile, {f"{name}-l000h000": pattern}, base.stages, base.provenance)


def is_measured(spec: object) -> bool:
    """Whether a candidate asks for the attention map anywhere."""
    if isinstance(spec, Mapping):
        return any(key in spec for key in MEASURED) or any(is_measured(value) for value in spec.values())
    return isinstance(spec, (list, tuple)) and any(is_measured(value) for value in spec)


def needs_rows(spec: object) -> bool:
    """Whether a candidate is measured pair by pair, so that a sample of query tiles is not enough for its map."""
    if isinstance(spec, Mapping):
        rows = spec.get("rows")
        return isinstance(rows, Mapping) or any(needs_rows(value) for value in spec.values())
    return isinstance(spec, (list, tuple)) and any(needs_rows(value) for value in spec)


def resolve(spec: object, tiling: Tiling, mass: np.ndarray, where: str = "candidate") -> Pattern:
    """A candidate as a pattern; mass [parts, nV, nV] are the attention maps of the head, for measured fields."""
    if isinstance(spec, Mapping) and spec.keys() == {"kind", "rows"} and isinstance(spec["rows"], Mapping):
        one_of(spec["kind"], f"{where}.kind", [Tiles.kind])
        return Tiles.from_mask(_heaviest(spec["rows"], mass, where))
    return pattern_from_json(_filled(spec, tiling, mass, where), where)


def _filled(spec: object, tiling: Tiling, mass: np.ndarray, where: str) -> object:
    if not isinstance(spec, Mapping):
        return spec
    filled = dict(spec)
    if isinstance(filled.get("members"), (list, tuple)):
        filled["members"] = [_filled(m, tiling, mass, f"{where}.members[{i}]") for i, m in enumerate(spec["members"])]
    if isinstance(filled.get("columns"), Mapping):
        top = record(filled["columns"], f"{where}.columns", ["top"])["top"]
        count = integer(top, f"{where}.columns.top", 1, tiling.num_video_tiles)
        frames = integer(filled.get("frames", 0), f"{where}.frames", 0)
        filled["columns"] = _top_columns(mass.mean(0), tiling, count, frames)
    if isinstance(filled.get("rows"), Mapping):
        filled["rows"] = Tiles.from_mask(_heaviest(filled["rows"], mass, where)).to_json()["rows"]
    return filled


def _heaviest(rows: Mapping, mass: np.ndarray, where: str) -> np.ndarray:
    """bool [nV, nV] that measured `rows` ask for."""
    rule = next((key for key in MEASURED if key in rows), "top")
    asked = record(rows, f"{where}.rows", [rule], ["part"])
    share = number(asked[rule], f"{where}.rows.{rule}", "a number above 0 and below 1")
    if not 0 < share < 1:
        raise complain(f"{where}.rows.{rule}", share, "a number above 0 and below 1")
    choose = {"top": _top_pairs, "block": _top_blocks, "vertical_slash": _vertical_slash}[rule]
    if "part" not in asked:
        return choose(mass.mean(0), share)
    return choose(mass[integer(asked["part"], f"{where}.rows.part", 0, MAP_PARTS - 1)], share)


def _top_columns(mass: np.ndarray, tiling: Tiling, count: int, frames: int) -> list[list[int]]:
    """Ranges of the `count` video tiles with most attention from query tiles outside the frame band."""
    frames_all, plane = tiling.tile_grid[0], tiling.tile_grid[1] * tiling.tile_grid[2]
    by_frame = mass.reshape(frames_all, plane, frames_all, plane).sum(1)  # query frame, key frame, place
    frame = np.arange(frames_all)
    outside = np.abs(frame[:, None] - frame) > frames
    column = (by_frame * outside[..., None]).sum(0).ravel()
    keep = np.zeros((1, len(column)), dtype=bool)
    keep[0, np.argsort(-column, kind="stable")[:count]] = True
    return Tiles.from_mask(keep).to_json()["rows"][0]


def _top_pairs(mass: np.ndarray, share: float) -> np.ndarray:
    """bool [nV, nV]: the heaviest pairs of the whole head, and at least the heaviest of every row."""
    keep = np.zeros(mass.size, dtype=bool)
    keep[np.argsort(-mass.ravel(), kind="stable")[: max(1, round(share * mass.size))]] = True
    keep = keep.reshape(mass.shape)
    keep[np.arange(len(mass)), mass.argmax(1)] = True
    return keep


def _top_blocks(mass: np.ndarray, share: float) -> np.ndarray:
    """bool [nV, nV]: the same number of heaviest key tiles for every query tile, at least one."""
    count = max(1, int(share * len(mass)))
    keep = np.zeros(mass.shape, dtype=bool)
    np.put_along_axis(keep, np.argsort(-mass, axis=1, kind="stable")[:, :count], True, axis=1)
    return keep


def _vertical_slash(mass: np.ndarray, share: float) -> np.ndarray:
    """bool [nV, nV]: the heaviest columns and diagonals (key - query, both signs), one in seven lines a column."""
    size = len(mass)
    offset = np.arange(size)[None] - np.arange(size)[:, None] + size - 1
    column_rank, diagonal_rank = np.empty(size, np.int64), np.empty(2 * size - 1, np.int64)
    column_rank[np.argsort(-mass.sum(0), kind="stable")] = np.arange(size)
    by_diagonal = np.bincount(offset.ravel(), weights=mass.ravel(), minlength=2 * size - 1)
    diagonal_rank[np.argsort(-by_diagonal, kind="stable")] = np.arange(2 * size - 1)

    def lines(count: int) -> np.ndarray:
        columns = round(count * VERTICAL_SHARE)
        return (column_rank < columns)[None] | (diagonal_rank < count - columns)[offset]

    low, high = 1, 3 * size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lines(middle).mean() <= share else (low, middle)
    return lines(low)
