"""The plan: which pattern each head of each layer uses in each stage of the denoising loop.

The file format is docs/plan.md. Everything is checked when a Plan is created, whether it was read
from a file or built in Python, so a Plan that exists is a valid one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from svdit.plans.errors import complain, rooted
from svdit.plans.fields import array, header, integer, number, record, shown, string
from svdit.plans.files import parse_json, read_text, write_atomic
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Full, Pattern, Skip, pattern_from_json
from svdit.plans.tiles import Tiling, check_tile

FORMAT = "svdit-plan"
VERSION = 1
BUILT_IN: dict[str, Pattern] = {"full": Full(), "skip": Skip()}
"""Patterns that need no definition; their names cannot be redefined."""

MAX_TILES = 1 << 16
"""A work item packs the query tile into the lower half of an int32."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]{0,63}")


@dataclass(frozen=True)
class Stage:
    """A part of the denoising loop: `layers[l][h]` is the pattern name of head h in layer l."""

    until: float
    layers: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        until = number(self.until, "until", "a number above 0 and at most 1")
        if not 0 < until <= 1:
            raise complain("until", until, "a number above 0 and at most 1")
        object.__setattr__(self, "until", until)
        layers = array(self.layers, "layers", "rows, one for each layer")
        rows = (array(row, f"layers[{i}]", "pattern names") for i, row in enumerate(layers))
        object.__setattr__(self, "layers", tuple(tuple(row) for row in rows))


@dataclass(frozen=True)
class Plan:
    """A checked plan. Raises SvditError with the JSON path of the first thing that is wrong."""

    model: str
    geometry: Geometry
    tile: tuple[int, int, int]
    patterns: dict[str, Pattern]
    stages: tuple[Stage, ...]
    provenance: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", string(self.model, "model"))
        object.__setattr__(self, "tile", check_tile(self.tile))
        object.__setattr__(self, "patterns", dict(self.patterns))
        object.__setattr__(self, "stages", tuple(self.stages))
        _check_patterns(self)
        _check_stages(self)
        _check_provenance(self.provenance)

    def stage_of(self, step: int, steps: int) -> int:
        """The stage of step `step` (from 0) of `steps`: the first one whose `until` lies above step/steps."""
        steps = integer(steps, "steps", low=1)
        step = integer(step, "step", low=0, high=steps - 1)
        return next(i for i, stage in enumerate(self.stages) if stage.until > step / steps)

    def tiling(self) -> Tiling:
        return Tiling(self.geometry, self.tile)

    def pattern(self, name: str) -> Pattern:
        """The pattern called `name`, "full" and "skip" included. Raises SvditError listing the names."""
        found = BUILT_IN.get(name) or self.patterns.get(name)
        if found is None:
            raise complain("pattern", shown(name), "one of " + ", ".join([*BUILT_IN, *self.patterns]))
        return found


def loads(text: str, source: str = "plan") -> Plan:
    """Read a plan from JSON text. Raises SvditError; its subject is `source: $.json.path`."""
    with rooted(f"{source}: "):
        parsed = parse_json(text, "$")
        header(parsed, "$", FORMAT, VERSION, "use the release that wrote the plan")
        required = ["format", "version", "model", "geometry", "tile", "patterns", "stages"]
        data = record(parsed, "$", required, ["provenance"])
        geometry = Geometry.from_json(data["geometry"], "$.geometry")
        if not isinstance(data["patterns"], dict):
            raise complain("$.patterns", shown(data["patterns"]), "an object of named patterns")
        patterns = {name: pattern_from_json(value, f"$.patterns.{name}") for name, value in data["patterns"].items()}
        stages = [
            _stage_from_json(value, f"$.stages[{i}]")
            for i, value in enumerate(array(data["stages"], "$.stages", "stages"))
        ]
        with rooted("$."):
            return Plan(data["model"], geometry, data["tile"], patterns, tuple(stages), data.get("provenance", {}))


def dumps(plan: Plan) -> str:
    """The canonical text: one line for each pattern, layer row and provenance entry. `loads` undoes it."""
    line = _compact
    patterns = [f"  {line(name)}: {line(pattern.to_json())}" for name, pattern in plan.patterns.items()]
    provenance = [f"  {line(name)}: {line(value)}" for name, value in plan.provenance.items()]
    stages = []
    for stage in plan.stages:
        rows = ",\n".join(f"   {line(row)}" for row in stage.layers)
        stages.append(f'  {{"until": {line(stage.until)}, "layers": [\n{rows}\n  ]}}')
    parts = [
        f'"format": {line(FORMAT)}',
        f'"version": {VERSION}',
        f'"model": {line(plan.model)}',
        f'"geometry": {line(plan.geometry.to_json())}',
        f'"tile": {line(plan.tile)}',
        f'"patterns": {_block("{", patterns, "}")}',
        f'"stages": {_block("[", stages, "]")}',
        f'"provenance": {_block("{", provenance, "}")}',
    ]
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def read_plan(path: str | Path) -> Plan:
    """Read a `*.plan.json` file. Raises SvditError."""
    return loads(read_text(path, "a plan file"), str(path))


def write_plan(path: str | Path, plan: Plan) -> None:
    """Write atomically. Raises SvditError when the place cannot be written."""
    write_atomic(path, dumps(plan))


def template(model: str, geometry: Geometry, tile: tuple[int, int, int], pattern: Pattern | None = None) -> Plan:
    """One stage in which every head uses `pattern` (default: full); provenance says that nobody searched."""
    pattern = Full() if pattern is None else pattern
    name = pattern.kind
    patterns = {} if name in BUILT_IN else {name: pattern}
    row = (name,) * geometry.heads
    stage = Stage(1.0, (row,) * geometry.layers)
    return Plan(model, geometry, tile, patterns, (stage,), {"method": "template"})


def _stage_from_json(obj: object, path: str) -> Stage:
    values = record(obj, path, ["until", "layers"])
    with rooted(f"{path}."):
        return Stage(values["until"], values["layers"])


def _check_patterns(plan: Plan) -> None:
    tiling = plan.tiling()
    if tiling.num_tiles > MAX_TILES:
        tiles = " x ".join(map(str, plan.tile))
        raise complain("tile", f"{tiling.num_tiles} tiles of {tiles}", f"at most {MAX_TILES}", "use a larger tile")
    for name, pattern in plan.patterns.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            expected = "up to 64 of the characters A-Z a-z 0-9 _ . : + -, the first a letter, digit or _"
            raise complain("patterns", f"the name {shown(name)}", expected)
        if name in BUILT_IN:
            raise complain(f"patterns.{name}", "a definition of a built-in name", "another name")
        if not isinstance(pattern, Pattern):
            raise complain(f"patterns.{name}", shown(pattern), "a pattern")
        with rooted(f"patterns.{name}."):
            pattern.check_grid(tiling.tile_grid)


def _check_stages(plan: Plan) -> None:
    layers, heads = plan.geometry.layers, plan.geometry.heads
    if not plan.stages:
        raise complain("stages", "an empty list", "at least one stage")
    known = {*BUILT_IN, *plan.patterns}
    before = 0.0
    for i, stage in enumerate(plan.stages):
        if stage.until <= before:
            raise complain(f"stages[{i}].until", stage.until, f"more than {before} of the stage before")
        before = stage.until
        array(stage.layers, f"stages[{i}].layers", "rows, one for each layer", layers)
        for j, row in enumerate(stage.layers):
            where = f"stages[{i}].layers[{j}]"
            array(row, where, "pattern names, one for each head", heads)
            for k, name in enumerate(row):
                if not isinstance(name, str) or name not in known:
                    expected = "one of " + ", ".join([*BUILT_IN, *plan.patterns])
                    raise complain(f"{where}[{k}]", shown(name), expected, "define it under patterns")
    if before != 1.0:
        raise complain(f"stages[{len(plan.stages) - 1}].until", before, "1.0 in the last stage")


def _check_provenance(provenance: object) -> None:
    if not isinstance(provenance, Mapping):
        raise complain("provenance", shown(provenance), "an object")
    for name, value in provenance.items():
        if not isinstance(name, str):
            raise complain("provenance", f"the key {shown(name)}", "strings as keys")
        try:
            _compact({name: value}).encode("utf-8")
        except UnicodeEncodeError:
            raise complain(f"provenance.{name!a}", "half of a surrogate pair", "text that UTF-8 can hold") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise complain(f"provenance.{name!a}", str(error), "JSON with finite numbers") from None


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _block(opening: str, lines: list[str], closing: str) -> str:
    return opening + "\n" + ",\n".join(lines) + f"\n {closing}" if lines else opening + closing
