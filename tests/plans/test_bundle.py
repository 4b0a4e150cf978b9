"""Bundles: round trip of the manifest, and every way in which a folder can stop being what it says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from svdit.plans.bundle import (
    HEADER_BYTES,
    Manifest,
    TensorSpec,
    graph_file,
    read_bundle,
    read_manifest,
    sha256_of,
    weight_file,
    write_manifest,
)
from svdit.plans.errors import SvditError
from svdit.plans.schema import dumps, loads, write_plan
from tests.plans.malformed import GOOD


@pytest.fixture
def bundle(tmp_path):
    """A portable bundle with two stages, a weight file of 3 MiB and a linked one."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    plan = loads(json.dumps(GOOD))
    write_plan(folder / "plan.json", plan)
    for stage in range(2):
        (folder / f"dit.stage{stage}.onnx").write_bytes(b"graph %d" % stage)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 12288)
    (tmp_path / "shared.safetensors").write_bytes(b"shared")
    (folder / "link.safetensors").symlink_to(tmp_path / "shared.safetensors")
    manifest = Manifest(
        model="tiny",
        variant="portable",
        precision="fp32",
        geometry=plan.geometry,
        batch=2,
        latent_shape=(3, 3, 16, 24),
        plan_sha256=hashlib.sha256(dumps(plan).encode()).hexdigest(),
        graphs=tuple(graph_file(folder, f"dit.stage{stage}.onnx", (stage,)) for stage in range(2)),
        weights=tuple(weight_file(folder, name) for name in ("weights.safetensors", "link.safetensors")),
        inputs=(TensorSpec("hidden_states", "float32", (2, 3, 3, 16, 24)), TensorSpec("text", "float32", (2, "L", 8))),
        outputs=(TensorSpec("noise_pred", "float32", (2, 3, 3, 16, 24)),),
        checkpoint="packaged",
        versions={"svdit": "0.1.0", "onnx": "1.18"},
    )
    write_manifest(folder, manifest)
    return folder, manifest


def test_what_was_written_is_read(bundle):
    folder, manifest = bundle
    found = read_bundle(folder)
    assert found.manifest == manifest == read_manifest(folder)
    assert found.plan == loads(json.dumps(GOOD))
    assert found.path == folder
    assert found.manifest.inputs[1].shape == (2, "L", 8)


def test_a_range_of_batches_is_read_back(bundle):
    folder, manifest = bundle
    inputs = (TensorSpec("hidden_states", "float32", ("batch", 3, 3, 16, 24)),)
    write_manifest(folder, replace(manifest, batch=(1, 2), inputs=inputs))
    assert json.loads((folder / "manifest.json").read_text())["batch"] == [1, 2]
    found = read_manifest(folder)
    assert found.batch == (1, 2) and found.inputs[0].sizes(2) == (2, 3, 3, 16, 24)


def test_header_hash_covers_the_first_mebibyte(bundle):
    folder, manifest = bundle
    data = (folder / "weights.safetensors").read_bytes()
    assert manifest.weights[0].size == len(data) == 3 * HEADER_BYTES
    assert manifest.weights[0].header_sha256 == hashlib.sha256(data[:HEADER_BYTES]).hexdigest()
    assert manifest.weights[1].header_sha256 == hashlib.sha256(b"shared").hexdigest()
    assert sha256_of(folder / "weights.safetensors") == hashlib.sha256(data).hexdigest()


def edit_manifest(folder, change):
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def overwrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def break_link(folder):
    (folder / "link.safetensors").resolve().unlink()


def other_plan(**change):
    """Replace the plan by another valid one and record its hash, so that only its contents are wrong."""

    def edit(folder):
        text = dumps(replace(loads(json.dumps(GOOD)), **change))
        (folder / "plan.json").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        edit_manifest(folder, lambda data: data.update(plan_sha256=digest))

    return edit


def manifest_key(key, value):
    return lambda folder: edit_manifest(folder, lambda data: data.update({key: value}))


def in_list(key, index, /, **change):
    return lambda folder: edit_manifest(folder, lambda data: data[key][index].update(change))


GEOMETRY = loads(json.dumps(GOOD)).geometry
FIRST_STAGE = loads(json.dumps(GOOD)).stages[1:]
BROKEN = {
    "no-manifest": (remove("manifest.json"), r"manifest.json: got no such file.*; expected the manifest of a bundle"),
    "no-plan": (remove("plan.json"), r"plan.json: got no such file.*; expected the plan of the bundle"),
    "no-graph": (remove("dit.stage1.onnx"), r"dit.stage1.onnx: got no such file; expected the file"),
    "dead-link": (break_link, r"link.safetensors: got a link to a file that is gone; expected the file"),
    "graph-changed": (
        overwrite("dit.stage0.onnx", b"x"),
        r"dit.stage0.onnx: sha256: got 2d71.*; expected [0-9a-f]{64}",
    ),
    "plan-changed": (
        overwrite("plan.json", b"{}"),
        r"plan.json: sha256: got 44136f.*; expected [0-9a-f]{64} as in the",
    ),
    "weights-cut": (
        overwrite("weights.safetensors", b"x"),
        r"weights.safetensors: size: got 1; expected 3145728",
    ),
    "weights-changed": (
        overwrite("weights.safetensors", b"\1" + bytes(3 * HEADER_BYTES - 1)),
        r"weights.safetensors: sha256 of the first MiB: got [0-9a-f]{64}; expected [0-9a-f]{64} as in the manifest",
    ),
    "other-model": (
        other_plan(model="wan2.1"),
        r'plan.json: \$.model: got "wan2.1"; expected "tiny"',
    ),
    "other-geometry": (
        other_plan(geometry=replace(GEOMETRY, head_dim=128)),
        r"plan.json: \$.geometry: got head_dim 128; expected head_dim 64; that is what the manifest has",
    ),
    "other-stages": (
        other_plan(stages=FIRST_STAGE),
        r"manifest.json: \$.graphs: got graphs for the stages \[0, 1\]; expected each of the 1 stages of the plan once",
    ),
    "stage-twice": (
        in_list("graphs", 1, stages=[0]),
        r"\$.graphs: got graphs for the stages \[0, 0\]; expected each of",
    ),
    "format": (manifest_key("format", "onnx"), r'manifest.json: \$.format: got "onnx"; expected "svdit-bundle"'),
    "version": (manifest_key("version", 2), r"\$.version: got 2; expected 1; export the bundle again"),
    "unknown-key": (manifest_key("engine", "x"), r"\$.engine: got an unknown key; expected one of format"),
    "variant": (manifest_key("variant", "fast"), r'\$.variant: got "fast"; expected one of plugin, portable, dense'),
    "precision": (manifest_key("precision", "fp8"), r'\$.precision: got "fp8"; expected one of fp32, fp16, bf16'),
    "batch": (manifest_key("batch", 0), r"\$.batch: got 0; expected an integer of at least 1"),
    "batches": (manifest_key("batch", [2, 1]), r"\$.batch: got 2-1; expected a range from the smaller"),
    "latent-shape": (manifest_key("latent_shape", [3, 3, 16]), r"\$.latent_shape: got 3 entries; expected a list of 4"),
    "geometry": (manifest_key("geometry", {}), r"\$.geometry.grid: got nothing; expected a value"),
    "hash": (
        manifest_key("plan_sha256", "ABC"),
        r'\$.plan_sha256: got "ABC"; expected 64 lower-case',
    ),
    "no-graphs": (manifest_key("graphs", []), r"\$.graphs: got an empty list; expected at least one graph"),
    "checkpoint": (manifest_key("checkpoint", ""), r'\$.checkpoint: got ""; expected a non-empty string'),
    "versions": (manifest_key("versions", {"onnx": 1}), r"\$.versions.onnx: got 1; expected a non-empty string"),
    "versions-list": (manifest_key("versions", []), r"\$.versions: got \[\]; expected an object of version strings"),
    "graph-outside": (
        in_list("graphs", 0, file="../a.onnx"),
        r'\$.graphs\[0\].file: got "../a.onnx"; expected a path',
    ),
    "graph-absolute": (
        in_list("graphs", 0, file="/a.onnx"),
        r'\$.graphs\[0\].file: got "/a.onnx"; expected a path',
    ),
    "weight-size": (in_list("weights", 1, size=-1), r"\$.weights\[1\].size: got -1; expected an integer from 0"),
    "weight-key": (in_list("weights", 1, md5="x"), r"\$.weights\[1\].md5: got an unknown key; expected one of file"),
    "input-shape": (in_list("inputs", 0, shape=[1.5]), r"\$.inputs\[0\].shape\[0\]: got 1.5; expected an integer"),
    "output-name": (in_list("outputs", 0, name=None), r"\$.outputs\[0\].name: got null; expected a non-empty string"),
    "not-json": (overwrite("manifest.json", b"{"), r"manifest.json: \$: got .*; expected one JSON object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_refused(bundle, name):
    folder, _ = bundle
    breaking, message = BROKEN[name]
    breaking(folder)
    with pytest.raises(SvditError, match=message):
        read_bundle(folder)


def test_no_folder_and_a_file_are_named(tmp_path):
    with pytest.raises(SvditError, match=r"none: got no folder; expected a bundle folder"):
        read_bundle(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SvditError, match=r"file: got a file; expected a bundle folder"):
        read_bundle(tmp_path / "file")


def test_describing_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(SvditError, match=r"a.onnx: got no such file or directory; expected an ONNX file"):
        graph_file(tmp_path, "a.onnx", (0,))
    with pytest.raises(SvditError, match=r"a.safetensors: got no such file or directory; expected a weight file"):
        weight_file(tmp_path, "a.safetensors")
