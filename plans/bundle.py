"""The manifest of an exported folder, and the check that the folder is still what it says.

A bundle holds `manifest.json`, `plan.json`, the ONNX graphs and their weight files (or links to
them). Readers call `read_bundle` and get a Bundle only when every file is there and unchanged.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

from svdit.plans.batch import Batch, batch_of
from svdit.plans.errors import SvditError, complain, rooted
from svdit.plans.fields import array, header, integer, integers, one_of, record, shown, string
from svdit.plans.files import parse_json, read_text, unusable, write_atomic
from svdit.plans.geometry import Geometry
from svdit.plans.schema import Plan, loads

FORMAT = "svdit-bundle"
VERSION = 1
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"
VARIANTS = ("plugin", "portable", "dense")
PRECISIONS = ("fp32", "fp16", "bf16")
PACKAGED = "packaged"
"""Value of `checkpoint` for weights that come with the installed package."""
HEADER_BYTES = 1 << 20
"""How much of a weight file is hashed: checkpoints have tens of gigabytes."""


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. A dimension is an int, or a name when it is free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        string(self.name, "name")
        string(self.dtype, "dtype")
        shape = array(self.shape, "shape", "dimensions")
        checked = (
            string(dim, f"shape[{i}]") if isinstance(dim, str) else integer(dim, f"shape[{i}]", low=0)
            for i, dim in enumerate(shape)
        )
        object.__setattr__(self, "shape", tuple(checked))

    def sizes(self, rows: int) -> tuple[int, ...]:
        """The shape where a free dimension is `rows`."""
        return tuple(rows if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class GraphFile:
    """One ONNX graph: its file inside the bundle, sha256 of the whole file, the stages it serves."""

    file: str
    sha256: str
    stages: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_inside(self.file, "file")
        _check_sha256(self.sha256, "sha256")
        stages = array(self.stages, "stages", "stage numbers")
        object.__setattr__(self, "stages", tuple(integer(s, f"stages[{i}]", low=0) for i, s in enumerate(stages)))


@dataclass(frozen=True)
class WeightFile:
    """One weight file or link in the bundle; `header_sha256` covers the first min(size, 1 MiB) bytes."""

    file: str
    size: int
    header_sha256: str

    def __post_init__(self) -> None:
        _check_inside(self.file, "file")
        object.__setattr__(self, "size", integer(self.size, "size", low=0, high=2**63 - 1))
        _check_sha256(self.header_sha256, "header_sha256")


@dataclass(frozen=True)
class Manifest:
    """What an exporter says about its bundle. Raises SvditError at creation naming the field."""

    model: str
    variant: str
    precision: str
    geometry: Geometry
    batch: Batch
    """Rows of a call; a number or a pair of numbers is taken too."""
    latent_shape: tuple[int, int, int, int]
    """Channels, frames, height, width of the latents, batch left out."""
    plan_sha256: str
    graphs: tuple[GraphFile, ...]
    weights: tuple[WeightFile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    checkpoint: str
    """Folder of the checkpoint the weights came from, or PACKAGED."""
    versions: dict[str, str]
    """Library name to version at export."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        string(self.model, "model")
        one_of(self.variant, "variant", VARIANTS)
        one_of(self.precision, "precision", PRECISIONS)
        put(self, "batch", batch_of(self.batch))
        put(self, "latent_shape", integers(self.latent_shape, "latent_shape", 4, low=1))
        _check_sha256(self.plan_sha256, "plan_sha256")
        for name in ("graphs", "weights", "inputs", "outputs"):
            put(self, name, tuple(array(getattr(self, name), name, "entries")))
        if not self.graphs:
            raise complain("graphs", "an empty list", "at least one graph")
        string(self.checkpoint, "checkpoint")
        if not isinstance(self.versions, dict):
            raise complain("versions", shown(self.versions), "an object of version strings")
        for name, version in self.versions.items():
            string(version, f"versions.{name}")


@dataclass(frozen=True)
class Bundle:
    """A checked folder."""

    path: Path
    manifest: Manifest
    plan: Plan


def sha256_of(path: str | Path, size: int | None = None) -> str:
    """Hex sha256 of a file, or of its first `size` bytes."""
    digest = hashlib.sha256()
    left = size
    with open(path, "rb") as file:
        while left is None or left > 0:
            chunk = file.read(HEADER_BYTES if left is None else min(left, HEADER_BYTES))
            if not chunk:
                break
            digest.update(chunk)
            left = None if left is None else left - len(chunk)
    return digest.hexdigest()


def weight_file(folder: str | Path, name: str) -> WeightFile:
    """Describe the weight file (or link) `name` of a bundle folder as it is now."""
    path = Path(folder) / name
    try:
        return WeightFile(name, path.stat().st_size, sha256_of(path, HEADER_BYTES))
    except OSError as error:
        raise unusable(path, error, "a weight file") from None


def graph_file(folder: str | Path, name: str, stages: tuple[int, ...]) -> GraphFile:
    """Describe the graph `name` of a bundle folder as it is now."""
    path = Path(folder) / name
    try:
        return GraphFile(name, sha256_of(path), stages)
    except OSError as error:
        raise unusable(path, error, "an ONNX file") from None


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically. Write the other files first."""
    own = {"geometry": manifest.geometry.to_json(), "batch": manifest.batch.to_json()}
    data = {"format": FORMAT, "version": VERSION, **asdict(manifest), **own}
    write_atomic(Path(folder) / MANIFEST_FILE, json.dumps(data, indent=1) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """Read `manifest.json` without looking at the files it names. Raises SvditError."""
    path = Path(folder) / MANIFEST_FILE
    text = read_text(path, "the manifest of a bundle")
    with rooted(f"{path}: "):
        names = [field.name for field in fields(Manifest)]
        parsed = parse_json(text, "$")
        header(parsed, "$", FORMAT, VERSION, "export the bundle again")
        data = record(parsed, "$", ["format", "version", *names])
        values = {name: data[name] for name in names}
        values["geometry"] = Geometry.from_json(data["geometry"], "$.geometry")
        parts = {"graphs": GraphFile, "weights": WeightFile, "inputs": TensorSpec, "outputs": TensorSpec}
        for name, cls in parts.items():
            values[name] = [
                _read(cls, item, f"$.{name}[{i}]") for i, item in enumerate(array(data[name], f"$.{name}", "entries"))
            ]
        with rooted("$."):
            return Manifest(**values)


def read_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle: format, files, hashes, plan. Raises SvditError naming what does not match."""
    folder = Path(folder)
    if not folder.is_dir():
        raise complain(str(folder), "no folder" if not folder.exists() else "a file", "a bundle folder")
    manifest = read_manifest(folder)
    text = read_text(folder / PLAN_FILE, "the plan of the bundle")
    plan_sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if plan_sha256 != manifest.plan_sha256:
        raise _changed(f"{folder / PLAN_FILE}: sha256", plan_sha256, manifest.plan_sha256)
    plan = loads(text, str(folder / PLAN_FILE))
    if plan.model != manifest.model:
        raise _changed(f"{folder / PLAN_FILE}: $.model", shown(plan.model), shown(manifest.model))
    plan.geometry.require_same(manifest.geometry, f"{folder / PLAN_FILE}: $.geometry", "the manifest")
    _check_stages(folder, manifest, plan)
    for graph in manifest.graphs:
        _check_file(folder / graph.file, None, None, graph.sha256)
    for weight in manifest.weights:
        _check_file(folder / weight.file, weight.size, HEADER_BYTES, weight.header_sha256)
    return Bundle(folder, manifest, plan)


def _read(cls: type, item: object, path: str) -> object:
    values = record(item, path, [field.name for field in fields(cls)])
    with rooted(f"{path}."):
        return cls(**values)


def _check_stages(folder: Path, manifest: Manifest, plan: Plan) -> None:
    served = sorted(stage for graph in manifest.graphs for stage in graph.stages)
    if served != list(range(len(plan.stages))):
        expected = f"each of the {len(plan.stages)} stages of the plan once"
        raise complain(f"{folder / MANIFEST_FILE}: $.graphs", f"graphs for the stages {served}", expected)


def _check_file(path: Path, size: int | None, hashed: int | None, sha256: str) -> None:
    if not path.is_file():
        got = "a link to a file that is gone" if path.is_symlink() else "no such file"
        raise complain(str(path), got, "the file that the manifest names", "export the bundle again")
    try:
        if size is not None and path.stat().st_size != size:
            raise _changed(f"{path}: size", path.stat().st_size, size)
        found = sha256_of(path, hashed)
    except OSError as error:
        raise unusable(path, error, "a readable file") from None
    if found != sha256:
        what = "sha256" if hashed is None else "sha256 of the first MiB"
        raise _changed(f"{path}: {what}", found, sha256)


def _changed(subject: str, got: object, expected: object) -> SvditError:
    return complain(subject, got, f"{expected} as in the manifest", "export the bundle again")


def _check_inside(value: object, subject: str) -> None:
    """A file of the bundle: a relative path with forward slashes that stays in the folder."""
    name = PurePosixPath(string(value, subject))
    if name.is_absolute() or ".." in name.parts or "\\" in str(name):
        raise complain(subject, shown(value), "a path inside the bundle folder")


def _check_sha256(value: object, subject: str) -> None:
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise complain(subject, shown(value), "64 lower-case hexadecimal digits")
