"""Each attention pattern as a formula over tile coordinates (docs/plan.md, "Patterns").

Shapes: a tile grid (nt, nh, nw) has nV = nt * nh * nw video tiles, numbered row-major. A mask is
bool [nV, nV]: may the query tile (row) see the key tile (column). Text tiles are no business of a
pattern; `tiles.Tiling.mask` adds them.

The kinds are those of Sparse-vDiT (arXiv 2506.03065): full, skip (redundant head), diagonal,
multi-diagonal, vertical stripe; `union` and `tiles` make every other static mask expressible, and
`clamp` with `cell` gives the windows of Sliding Tile Attention (arXiv 2502.04507).
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar

import numpy as np

from svdit.plans.errors import complain, rooted
from svdit.plans.fields import array, boolean, integer, integers, one_of, record, shown

TileGrid = tuple[int, int, int]
Ranges = tuple[tuple[int, int], ...]


class Pattern:
    """Base of all kinds. A subclass is a frozen dataclass whose fields are the keys of its JSON form."""

    kind: ClassVar[str]

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        """bool [nV, nV]; call `check_grid` first when the pattern comes from outside."""
        raise NotImplementedError

    def check_grid(self, tile_grid: TileGrid) -> None:
        """Raise SvditError when the pattern names tiles that this grid does not have."""

    def to_json(self) -> dict:
        """The canonical form: `kind`, then the fields that differ from their default."""
        result: dict = {"kind": self.kind}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                result[field.name] = _plain(value)
        return result


@dataclass(frozen=True)
class Full(Pattern):
    """Dense attention."""

    kind: ClassVar[str] = "full"

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        count = math.prod(tile_grid)
        return np.ones((count, count), dtype=bool)


@dataclass(frozen=True)
class Skip(Pattern):
    """No attention: the output of the head is exactly zero, text rows included."""

    kind: ClassVar[str] = "skip"

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        count = math.prod(tile_grid)
        return np.zeros((count, count), dtype=bool)


@dataclass(frozen=True)
class Diagonal(Pattern):
    """Band along time, by default the query's own frame. `rows`/`cols` None: the whole axis."""

    kind: ClassVar[str] = "diagonal"
    frames: int = 0
    rows: int | None = None
    cols: int | None = None
    offset: int = 0
    cell: tuple[int, int, int] = (1, 1, 1)
    clamp: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", integer(self.frames, "frames", low=0))
        _check_window(self)

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        if self.offset:
            distance = _distance(tile_grid[0], self.cell[0]) - self.offset
            near_t = np.abs(distance) <= self.frames
        else:
            near_t = _near(tile_grid[0], self.frames, self.cell[0], self.clamp)
        return _outer(near_t, *_near_plane(self, tile_grid))


@dataclass(frozen=True)
class MultiDiagonal(Pattern):
    """The same place in other frames: every `stride`-th one. `rows`/`cols` None: the whole axis."""

    kind: ClassVar[str] = "multi_diagonal"
    rows: int | None = 1
    cols: int | None = 1
    stride: int = 1
    offset: int = 0
    cell: tuple[int, int, int] = (1, 1, 1)
    clamp: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", integer(self.stride, "stride", low=1))
        _check_window(self)
        if self.clamp and self.stride != 1:
            raise complain("clamp", f"true with stride {self.stride}", "no stride beside clamp", "drop one")

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        distance = _distance(tile_grid[0], self.cell[0]) - self.offset
        return _outer(distance % self.stride == 0, *_near_plane(self, tile_grid))


@dataclass(frozen=True)
class Stripe(Pattern):
    """Global key tiles for every query, plus the `frames` nearest frames on each side."""

    kind: ClassVar[str] = "stripe"
    columns: Ranges
    frames: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _ranges(self.columns, "columns"))
        object.__setattr__(self, "frames", integer(self.frames, "frames", low=0))

    def check_grid(self, tile_grid: TileGrid) -> None:
        _check_ranges(self.columns, "columns", math.prod(tile_grid))

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        plane = tile_grid[1] * tile_grid[2]
        mask = _near(tile_grid[0], self.frames).repeat(plane, axis=0).repeat(plane, axis=1)
        for start, stop in self.columns:
            mask[:, start:stop] = True
        return mask


@dataclass(frozen=True)
class Union(Pattern):
    """Keeps what any member keeps."""

    kind: ClassVar[str] = "union"
    members: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        members = array(self.members, "members", "patterns")
        if not members:
            raise complain("members", "an empty list", "at least one pattern")
        for i, member in enumerate(members):
            if not isinstance(member, Pattern) or isinstance(member, Skip):
                got = "skip" if isinstance(member, Skip) else shown(member)
                raise complain(f"members[{i}]", got, "a pattern other than skip")
        object.__setattr__(self, "members", tuple(members))

    def check_grid(self, tile_grid: TileGrid) -> None:
        for i, member in enumerate(self.members):
            with rooted(f"members[{i}]."):
                member.check_grid(tile_grid)

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        return np.logical_or.reduce([member.video_mask(tile_grid) for member in self.members])


@dataclass(frozen=True)
class Tiles(Pattern):
    """Any mask: for each query tile, in tile order, the ranges of key tiles that it keeps."""

    kind: ClassVar[str] = "tiles"
    rows: tuple[Ranges, ...]

    def __post_init__(self) -> None:
        rows = array(self.rows, "rows", "range lists, one for each query tile")
        object.__setattr__(self, "rows", tuple(_ranges(row, f"rows[{q}]") for q, row in enumerate(rows)))

    def check_grid(self, tile_grid: TileGrid) -> None:
        count = math.prod(tile_grid)
        array(self.rows, "rows", "range lists, one for each video tile", count)
        for q, row in enumerate(self.rows):
            _check_ranges(row, f"rows[{q}]", count)

    def video_mask(self, tile_grid: TileGrid) -> np.ndarray:
        count = math.prod(tile_grid)
        mask = np.zeros((count, count), dtype=bool)
        for q, row in enumerate(self.rows):
            for start, stop in row:
                mask[q, start:stop] = True
        return mask

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> Tiles:
        """The `tiles` form of a bool [nV, nV] mask."""
        edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        rows = tuple(
            tuple(zip(np.flatnonzero(row == 1).tolist(), np.flatnonzero(row == -1).tolist(), strict=True))
            for row in edges
        )
        made = object.__new__(cls)  # the ranges are right by construction, and checking them takes 20 times as long
        object.__setattr__(made, "rows", rows)
        return made


KINDS: dict[str, type[Pattern]] = {cls.kind: cls for cls in (Full, Skip, Diagonal, MultiDiagonal, Stripe, Union, Tiles)}


def pattern_from_json(obj: object, path: str = "pattern") -> Pattern:
    """Read the JSON object at `path`. Raises SvditError with the path of the wrong field."""
    if not isinstance(obj, dict) or "kind" not in obj:
        raise complain(path, shown(obj), 'an object with a "kind"')
    cls = KINDS[one_of(obj["kind"], f"{path}.kind", KINDS)]
    names = {field.name: field.default is MISSING for field in fields(cls)}  # type: ignore[arg-type]
    required = ["kind", *(name for name, needed in names.items() if needed)]
    values = dict(record(obj, path, required, [name for name, needed in names.items() if not needed]))
    del values["kind"]
    if cls is Union:
        members = array(values["members"], f"{path}.members", "patterns")
        values["members"] = [pattern_from_json(m, f"{path}.members[{i}]") for i, m in enumerate(members)]
    with rooted(f"{path}."):
        return cls(**values)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_json() if isinstance(value, Pattern) else value


def _check_window(window: Diagonal | MultiDiagonal) -> None:
    """Fields that both diagonals share."""
    put = object.__setattr__
    for name in ("rows", "cols"):
        if getattr(window, name) is not None:
            put(window, name, integer(getattr(window, name), name, low=0, hint="null keeps the whole axis"))
    put(window, "offset", integer(window.offset, "offset", low=0))
    put(window, "cell", integers(window.cell, "cell", 3, low=1))
    put(window, "clamp", boolean(window.clamp, "clamp"))
    if window.clamp and window.offset:
        raise complain("clamp", f"true with offset {window.offset}", "no offset beside clamp", "drop one")


def _ranges(value: object, subject: str) -> Ranges:
    items = array(value, subject, "half-open [start, stop] ranges")
    result = []
    for i, item in enumerate(items):
        start, stop = integers(item, f"{subject}[{i}]", 2, low=0)
        if start >= stop:
            raise complain(f"{subject}[{i}]", [start, stop], "start below stop", "stop itself is outside")
        result.append((start, stop))
    return tuple(result)


def _check_ranges(ranges: Ranges, subject: str, count: int) -> None:
    for i, (start, stop) in enumerate(ranges):
        if stop > count:
            raise complain(f"{subject}[{i}]", [start, stop], f"a range within the {count} video tiles")


def _distance(count: int, cell: int) -> np.ndarray:
    """int [count, count]: distance in cells between positions on one axis."""
    position = np.arange(count) // cell
    return np.abs(position[:, None] - position[None, :])


def _near(count: int, radius: int | None, cell: int = 1, clamp: bool = False) -> np.ndarray:
    """bool [count, count]: key position within `radius` cells of the (clamped) query position."""
    cells = -(-count // cell)
    if radius is None or (clamp and cells <= 2 * radius + 1):
        return np.ones((count, count), dtype=bool)
    key = np.arange(count) // cell
    query = np.clip(key, radius, cells - 1 - radius) if clamp else key
    return np.abs(query[:, None] - key[None, :]) <= radius


def _near_plane(window: Diagonal | MultiDiagonal, tile_grid: TileGrid) -> tuple[np.ndarray, np.ndarray]:
    """The tests along height and width, which both diagonals share."""
    near_h = _near(tile_grid[1], window.rows, window.cell[1], window.clamp)
    near_w = _near(tile_grid[2], window.cols, window.cell[2], window.clamp)
    return near_h, near_w


def _outer(near_t: np.ndarray, near_h: np.ndarray, near_w: np.ndarray) -> np.ndarray:
    """Combine one bool [n, n] test an axis into bool [nV, nV]."""
    plane = near_h[:, None, :, None] & near_w[None, :, None, :]
    plane = plane.reshape(len(near_h) * len(near_w), -1)
    mask = near_t[:, None, :, None] & plane[None, :, None, :]
    return mask.reshape(len(near_t) * len(plane), -1)
