"""`svdit-build`: engines of TensorRT-RTX through the builder's own code, and every refusal."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest

from svdit.plans.bundle import read_bundle, sha256_of
from svdit.plans.errors import SvditError
from svdit.runtime import build, build_platform, build_record, cuda
from svdit.runtime.build_platform import Platform, require_buildable, this_platform
from svdit.runtime.build_progress import progress_monitor
from svdit.runtime.build_record import Options, read_record, require_fresh, stale_reason
from svdit.trt_plugins import tensorrt_library
from tests.runtime import tensorrt_stand_in as stand_in
from tests.runtime.tensorrt_rtx import needs_rtx, run_script

COMMAND = "from svdit.runtime.build_cli import main; main()"
H100 = Platform("tensorrt", stand_in.VERSION, stand_in.GPU)


def svdit_build(*arguments: object, rtx: bool = True) -> subprocess.CompletedProcess[str]:
    return run_script(COMMAND, *arguments, rtx=rtx)


def copy(bundles: Path, name: str, place: Path) -> Path:
    return Path(shutil.copytree(bundles / name, place / name))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def without_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


@needs_rtx
@pytest.mark.parametrize("name", ["portable", "portable-dense"])
def test_rtx_builds_the_bundle_once(bundles, tmp_path, name):
    folder = copy(bundles, name, tmp_path)
    before, bundle = files(folder), read_bundle(folder)
    done = svdit_build(folder, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "why: " in done.stdout and "engine.json: got no such file" in done.stdout
    assert files(folder) == before and files(tmp_path) == {name}

    done = svdit_build(folder, "--json", tmp_path / "f.json")
    assert done.returncode == 0, done.stderr
    graphs = bundle.manifest.graphs
    assert files(folder) - before == {"engine.json", *(Path(g.file).stem + ".engine" for g in graphs)}
    record = read_record(folder)
    assert record.library == "tensorrt_rtx" and record.options == Options() and record.gpu is None
    assert [(e.file, e.stages, e.graph_sha256) for e in record.engines] == [
        (Path(g.file).stem + ".engine", g.stages, g.sha256) for g in graphs
    ]
    for engine in record.engines:
        assert (folder / engine.file).stat().st_size == engine.size > bundle.manifest.weights[0].size / 4
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["built"] is True and figures["engine_bytes"] == sum(e.size for e in record.engines)
    assert re.fullmatch(rf"{name}\.tensorrt_rtx-[\d.]+\.timing", Path(figures["timing_cache"]).name)
    assert Path(figures["timing_cache"]).parent == tmp_path and Path(figures["timing_cache"]).is_file()

    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = svdit_build(folder, "--json", tmp_path / "f.json")
    assert done.returncode == 0 and "engines are up to date" in done.stdout
    assert json.loads((tmp_path / "f.json").read_text())["built"] is False
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@needs_rtx
def test_a_graph_that_the_parser_refuses_changes_nothing(bundles, tmp_path):
    """The first engine builds, the second does not: neither is put in place, and old ones stay."""
    folder = copy(bundles, "portable", tmp_path)
    stand_in.write_engines(read_bundle(folder))
    old = {name: (folder / name).read_bytes() for name in files(folder) if "engine" in name}
    path = folder / "dit.stage1.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Nonsense"
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"][1]["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = files(folder)
    done = svdit_build(folder)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: .*dit\.stage1\.onnx: got TensorRT-RTX .*Nonsense.*; expected a graph that it builds", last)
    assert files(folder) == before
    assert old == {name: (folder / name).read_bytes() for name in old}


@needs_rtx
@pytest.mark.skipif(not without_gpu(), reason="with a GPU it builds")
def test_stripping_needs_a_gpu_and_the_reason_is_told(bundles, tmp_path):
    folder = copy(bundles, "portable-dense", tmp_path)
    before = files(folder)
    done = svdit_build(folder, "--strip-weights")
    assert done.returncode == 2 and ": Error Code 1: " in done.stderr.splitlines()[-1], done.stderr
    assert files(folder) == before


@needs_rtx
def test_flags_reach_the_builder(bundles):
    """Read back from the configuration that Polygraphy made."""
    script = """
import sys
from svdit.plans.bundle import read_bundle
from svdit.runtime.build import WORKSPACE, builder_config, prepare
from svdit.runtime.build_platform import this_platform
from svdit.runtime.build_record import Options
from polygraphy.backend.trt import create_network
import tensorrt_rtx as trt
bundle, platform = read_bundle(sys.argv[1]), this_platform()
builder, network = create_network(strongly_typed=True)
for options in (Options(), Options(strip_weights=True), Options(weight_streaming=2)):
    config = builder_config(prepare(bundle, platform, options), None)(builder, network)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == WORKSPACE
    flags = ("STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING")
    print("flags", [name for name in flags if config.get_flag(getattr(trt.BuilderFlag, name))])
"""
    done = run_script(script, bundles / "portable")
    flags = [line for line in done.stdout.splitlines() if line.startswith("flags")]
    assert flags == ["flags []", "flags ['STRIP_PLAN', 'REFIT_IDENTICAL']", "flags ['WEIGHT_STREAMING']"], done


@needs_rtx
def test_progress_is_shown_and_a_cancelled_build_ends():
    import tensorrt_rtx as trt

    def build_one(monitor):
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", trt.float32, (4, 4))
        network.mark_output(
            network.add_matrix_multiply(x, *[trt.MatrixOperation.NONE, x], trt.MatrixOperation.NONE).get_output(0)
        )
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        return builder.build_serialized_network(network, config)

    monitor = progress_monitor(trt, "dit.onnx", show=False)
    assert build_one(monitor) is not None and len(monitor.phases) >= 1
    monitor.cancelled = True
    assert build_one(monitor) is None


def test_bars_nest_and_go(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monitor = progress_monitor(SimpleNamespace(IProgressMonitor=type("I", (), {"__init__": lambda self: None})), "dit")
    monitor.phase_start("outer", None, 2)
    monitor.phase_start("inner", "outer", 4)
    assert monitor.step_complete("inner", 3) is True
    monitor.phase_finish("inner")
    assert monitor.step_complete("outer", 0) is True
    monitor.phase_finish("outer")
    assert "dit: outer:   0%" in shown.getvalue() and "dit: inner:   0%" in shown.getvalue()
    assert monitor.step_complete("unknown", 1) is True


def test_rtx_does_not_take_the_plugin(bundles):
    with pytest.raises(SvditError, match=r"variant 'plugin': got TensorRT-RTX 1, .*; expected TensorRT; .*portable"):
        require_buildable(read_bundle(bundles / "plugin"), Platform("tensorrt_rtx", "1", None))


def test_gpus_and_types_that_the_plugin_does_not_have(bundles):
    bundle = read_bundle(bundles / "plugin")
    with pytest.raises(SvditError, match=r"got a GPU of compute capability 7\.5 \(T4\); expected 8\.0 or newer"):
        require_buildable(bundle, replace(H100, gpu=cuda.Gpu(0, "T4", "7.5")))
    with pytest.raises(SvditError, match=r"precision: got fp32; expected fp16 or bf16.*--precision bf16"):
        require_buildable(bundle, H100)


def registry(monkeypatch, loads: bool) -> list[str]:
    """A TensorRT whose registry takes libraries, or refuses them by None."""
    trt, loaded = ModuleType("tensorrt"), []
    trt.get_plugin_registry = lambda: SimpleNamespace(
        get_creator=lambda name, version, namespace: (name, version, namespace) if loads and loaded else None,
        load_library=lambda path: loaded.append(path) or (object() if loads else None),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return loaded


def test_the_plugin_library_is_loaded_once(bundles, tmp_path, monkeypatch):
    bundle = read_bundle(bundles / "plugin")
    bundle = replace(bundle, manifest=replace(bundle.manifest, precision="bf16"))
    monkeypatch.setattr(tensorrt_library, "find", lambda: None)
    registry(monkeypatch, loads=True)
    with pytest.raises(SvditError, match=r"libsvdit_tensorrt\.so: got no such file; .*build it: TENSORRT_ROOT="):
        require_buildable(bundle, H100)
    monkeypatch.setattr(tensorrt_library, "find", lambda: tmp_path / "x.so")
    loaded = registry(monkeypatch, loads=True)
    require_buildable(bundle, H100)
    require_buildable(bundle, H100)
    assert loaded == [str(tmp_path / "x.so")]
    registry(monkeypatch, loads=False)
    with pytest.raises(SvditError, match=r"x\.so: got a file that TensorRT does not load; expected the plugin"):
        require_buildable(bundle, H100)


def test_no_tensorrt(bundles):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    done = svdit_build(bundles / "portable", rtx=False)
    assert done.returncode == 2 and done.stderr.startswith("error: python package: got no tensorrt (")
    assert "pip install 'svdit[tensorrt]'" in done.stderr


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0.19", "12.0.0.1"])
def test_versions_of_tensorrt(monkeypatch, version):
    trt = ModuleType("tensorrt")
    trt.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(SvditError, match=re.escape(f"TensorRT: got {version}; expected 10.3 to 11.x")):
        this_platform()


@pytest.mark.parametrize("version", ["10.3.0.26", "11.1.0.2"])
def test_the_gpu_is_asked_for(monkeypatch, version):
    trt = ModuleType("tensorrt")
    trt.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(build_platform.cuda, "gpu", lambda index: replace(stand_in.GPU, index=index))
    assert this_platform(2) == Platform("tensorrt", version, replace(stand_in.GPU, index=2))
    assert str(this_platform()) == f"TensorRT {version}, NVIDIA H100 80GB HBM3 (compute capability 9.0)"


def test_no_gpu(monkeypatch):
    memory = stand_in.Status.cudaErrorMemoryAllocation
    monkeypatch.setattr(cuda, "runtime", lambda: SimpleNamespace(cudaGetDeviceCount=lambda: (memory, None)))
    with pytest.raises(SvditError, match=r"GPU: got none that CUDA can use; .*cudaErrorMemoryAllocation"):
        cuda.gpu(0)
    monkeypatch.setattr(
        cuda, "runtime", lambda: SimpleNamespace(cudaGetDeviceCount=lambda: (stand_in.Status.cudaSuccess, 2))
    )
    with pytest.raises(SvditError, match=r"GPU: got number 2; expected 0\.\.1"):
        cuda.gpu(2)


def test_plugin_layers_are_counted(bundles):
    bundle = read_bundle(bundles / "plugin")
    nodes = build.count_nodes(bundle.path / "dit.onnx")
    assert nodes == 2 and build.count_nodes(bundles / "portable" / "dit.stage0.onnx") == 0
    trt = SimpleNamespace(LayerType=SimpleNamespace(PLUGIN_V3=7))
    layers = [SimpleNamespace(type=kind) for kind in (1, 7, 2, 7)]
    network = SimpleNamespace(num_layers=4, get_layer=layers.__getitem__)
    build.require_plugins(network, trt, nodes, "dit.onnx")
    with pytest.raises(SvditError, match=r"dit\.onnx: plugin layers: got 2; expected 3, one a SparseAttention node"):
        build.require_plugins(network, trt, 3, "dit.onnx")


@pytest.fixture
def built(bundles, tmp_path):
    """A bundle with engines of the stand-in."""
    folder = copy(bundles, "portable", tmp_path)
    stand_in.write_engines(read_bundle(folder))
    return read_bundle(folder)


def test_a_record_reads_back_and_is_fresh(built):
    require_fresh(built, read_record(built.path), H100)
    assert stale_reason(built, H100, Options()) == ""


@pytest.mark.parametrize(
    ("platform", "message"),
    [
        (Platform("tensorrt_rtx", stand_in.VERSION, None), "library: got tensorrt; expected tensorrt_rtx"),
        (
            replace(H100, version="10.14.2.1"),
            r"library_version: got 10\.14\.1\.48; expected 10\.14\.2\.1; run: svdit-b",
        ),
        (replace(H100, gpu=cuda.Gpu(0, "B200", "10.0")), r"compute_capability: got 9\.0; expected 10\.0"),
    ],
)
def test_engines_of_another_platform_are_stale(built, platform, message):
    with pytest.raises(SvditError, match=message):
        require_fresh(built, read_record(built.path), platform)


def test_engines_of_other_graphs_weights_or_files_are_stale(built):
    record, manifest = read_record(built.path), built.manifest
    graphs = (replace(manifest.graphs[0], sha256="0" * 64), *manifest.graphs[1:])
    weights = (replace(manifest.weights[0], size=5),)
    for changed, message in (
        ({"graphs": graphs}, "engine.json: graphs: got"),
        ({"graphs": manifest.graphs[:1]}, "engine.json: graphs: got"),
        ({"weights": weights}, r"engine.json: weights .*\.safetensors: got"),
        ({"weights": ()}, "engine.json: number of weight files: got 1; expected 0"),
    ):
        with pytest.raises(SvditError, match=message):
            require_fresh(replace(built, manifest=replace(manifest, **changed)), record, H100)
    (built.path / "dit.stage2.engine").write_text("other")
    with pytest.raises(SvditError, match=r"dit\.stage2\.engine: got another file than was built"):
        require_fresh(built, record, H100)
    (built.path / "dit.stage1.engine").unlink()
    with pytest.raises(SvditError, match=r"dit\.stage1\.engine: got no such file; .*; run: svdit-build"):
        require_fresh(built, record, H100)


def test_other_options_build_again(built):
    reason = stale_reason(built, H100, Options(strip_weights=True))
    assert "built with Options(strip_weights=False" in reason and "asked for Options(strip_weights=True" in reason


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "x", r'\$\.format: got "x"; expected "svdit-engine"'),
        ("version", 2, r"\$\.version: got 2; expected 1; run: svdit-build"),
        ("engines", {}, r"\$\.engines: got \{\}; expected a list of entries"),
        ("engines", [{}], r"\$\.engines\[0\]\.file: got nothing"),
        ("library", 3, r"\$\.library: got 3; expected a non-empty string"),
        (
            "options",
            {"strip_weights": 1, "weight_streaming": None},
            r"\$\.options\.strip_weights: got 1; expected true",
        ),
        ("options", {"strip_weights": True, "weight_streaming": -1}, r"\$\.options\.weight_streaming: got -1"),
        ("more", 1, r"\$\.more: got an unknown key"),
    ],
)
def test_malformed_records(built, key, value, message):
    path = built.path / build_record.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(SvditError, match=r"engine\.json: " + message):
        read_record(built.path)


def test_a_record_cannot_name_files_elsewhere(built):
    path = built.path / build_record.FILE
    data = json.loads(path.read_text())
    data["engines"][0]["file"] = "../x.engine"
    path.write_text(json.dumps(data))
    with pytest.raises(SvditError, match=r"engines\[0\]\.file: got \.\./x\.engine; expected a file name"):
        read_record(built.path)


def test_a_full_disk_is_noticed_before_building(built, monkeypatch):
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    work = build.Work(built, H100, Options(), "none", built.path / "x.timing")
    with pytest.raises(SvditError, match="free disk space: got 10 bytes; expected about"):
        build.build(work)


def test_the_timing_cache_is_beside_the_bundle_and_per_platform(built):
    assert build.timing_cache(built.path, H100) == built.path.resolve().parent / (
        "portable.tensorrt-10.14.1.48-sm90.timing"
    )
