"""`engine.json`: what the engines of a bundle were built from and for, and whether that still holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from svdit.plans.bundle import HEADER_BYTES, Bundle, WeightFile, sha256_of, weight_file
from svdit.plans.errors import SvditError, complain, rooted
from svdit.plans.fields import array, boolean, header, integer, number, record, string
from svdit.plans.files import parse_json, read_text, write_atomic
from svdit.runtime.build_platform import Platform

FORMAT = "svdit-engine"
VERSION = 1
FILE = "engine.json"
GIB = 1 << 30


@dataclass(frozen=True)
class Options:
    """How to build.

    strip_weights     leave the weights out of the engine; they are put back from the bundle when it is loaded
    weight_streaming  GiB of weights to keep in device memory, the rest comes from host memory; None: all on the device
    """

    strip_weights: bool = False
    weight_streaming: float | None = None

    def __post_init__(self) -> None:
        boolean(self.strip_weights, "strip_weights")
        if self.weight_streaming is not None and number(self.weight_streaming, "weight_streaming") < 0:
            raise complain("weight_streaming", self.weight_streaming, "GiB, not negative")


@dataclass(frozen=True)
class EngineFile:
    """One engine: its file as it was written, and the graph it was built from."""

    file: str
    size: int
    header_sha256: str
    graph_sha256: str
    stages: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("file", "header_sha256", "graph_sha256"):
            string(getattr(self, name), name)
        if Path(self.file).name != self.file:
            raise complain("file", self.file, "a file name")
        integer(self.size, "size", low=1, high=2**63 - 1)
        stages = tuple(integer(s, f"stages[{i}]", low=0) for i, s in enumerate(array(self.stages, "stages", "numbers")))
        object.__setattr__(self, "stages", stages)


@dataclass(frozen=True)
class EngineRecord:
    """All engines of a bundle. Raises SvditError at creation naming the field."""

    library: str
    library_version: str
    gpu: str | None
    compute_capability: str | None
    options: Options
    engines: tuple[EngineFile, ...]
    weights: tuple[WeightFile, ...]

    def __post_init__(self) -> None:
        for name in ("library", "library_version"):
            string(getattr(self, name), name)
        for name in ("gpu", "compute_capability"):
            if getattr(self, name) is not None:
                string(getattr(self, name), name)


def engine_name(graph: str) -> str:
    """The engine's file name for a graph's: dit.stage0.onnx gives dit.stage0.engine."""
    return Path(graph).with_suffix(".engine").name


def engine_file(path: Path, name: str, graph_sha256: str, stages: tuple[int, ...]) -> EngineFile:
    """Describe the engine at `path` that is, or will be, called `name`."""
    found = weight_file(path.parent, path.name)
    return EngineFile(name, found.size, found.header_sha256, graph_sha256, stages)


def write_record(folder: Path, made: EngineRecord) -> None:
    """Write `engine.json` atomically, after the engines."""
    write_atomic(folder / FILE, json.dumps({"format": FORMAT, "version": VERSION, **asdict(made)}, indent=1) + "\n")


def read_record(folder: Path) -> EngineRecord:
    """Read `engine.json`. Raises SvditError when there is none or it is malformed."""
    path = folder / FILE
    if not path.is_file():
        raise complain(str(path), "no such file", "an engine built from the bundle", f"run: svdit-build {folder}")
    with rooted(f"{path}: "):
        parsed = parse_json(read_text(path, "what the engines were built for"), "$")
        names = [field.name for field in fields(EngineRecord)]
        header(parsed, "$", FORMAT, VERSION, f"run: svdit-build {folder}")
        data = record(parsed, "$", ["format", "version", *names])
        values = {name: data[name] for name in names}
        values["options"] = _part(Options, data["options"], "$.options")
        for name, kind in (("engines", EngineFile), ("weights", WeightFile)):
            parts = array(data[name], f"$.{name}", "entries")
            values[name] = tuple(_part(kind, part, f"$.{name}[{i}]") for i, part in enumerate(parts))
        with rooted("$."):
            return EngineRecord(**values)


def require_fresh(bundle: Bundle, made: EngineRecord, platform: Platform) -> None:
    """Raise SvditError naming the first thing that is not as it was when the engines were built."""
    folder, again = bundle.path, f"run: svdit-build {bundle.path}"

    def same(subject: str, now: object, then: object) -> None:
        if now != then:
            raise complain(f"{folder / FILE}: {subject}", then, now, again)

    same("library", platform.library, made.library)
    same("library_version", platform.version, made.library_version)
    if platform.gpu is not None:
        same("compute_capability", platform.gpu.compute_capability, made.compute_capability)
    same("graphs", _graphs(bundle), {e.file: (e.graph_sha256, e.stages) for e in made.engines})
    for now, then in zip(bundle.manifest.weights, made.weights, strict=False):
        same(f"weights {then.file}", now, then)
    same("number of weight files", len(bundle.manifest.weights), len(made.weights))
    for engine in made.engines:
        path = folder / engine.file
        if not path.is_file():
            raise complain(str(path), "no such file", f"the engine that {FILE} names", again)
        found = (path.stat().st_size, sha256_of(path, HEADER_BYTES))
        if found != (engine.size, engine.header_sha256):
            raise complain(str(path), "another file than was built", f"the engine that {FILE} describes", again)


def stale_reason(bundle: Bundle, platform: Platform, options: Options) -> str:
    """Why the bundle needs building: a sentence, empty when its engines will do."""
    try:
        made = read_record(bundle.path)
        require_fresh(bundle, made, platform)
    except SvditError as error:
        return str(error)
    return "" if made.options == options else f"{bundle.path / FILE}: built with {made.options}, asked for {options}"


def _graphs(bundle: Bundle) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {engine_name(g.file): (g.sha256, g.stages) for g in bundle.manifest.graphs}


def _part(kind: Callable[..., object], value: object, path: str) -> object:
    values = record(value, path, [field.name for field in fields(kind)])  # type: ignore[arg-type]
    with rooted(f"{path}."):
        return kind(**values)
