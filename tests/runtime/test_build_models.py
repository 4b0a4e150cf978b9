"""Small configurations of every model become strongly typed engines of TensorRT-RTX, through `svdit-build`'s code."""

from __future__ import annotations

import onnx
import pytest

from svdit.exporter import export as exporter
from svdit.exporter.models.registry import adapter as find_adapter
from svdit.plans.batch import Batch
from svdit.plans.bundle import read_bundle
from svdit.plans.patterns import Diagonal, MultiDiagonal
from svdit.plans.schema import Stage
from svdit.runtime.build_record import read_record
from tests.exporter import small_models
from tests.runtime.tensorrt_rtx import needs_rtx, run_script
from tests.runtime.test_build import svdit_build

pytestmark = needs_rtx
PATTERNS = {"d": Diagonal(frames=0), "m": MultiDiagonal(rows=0, cols=0)}
STAGES = (Stage(1.0, (("full", "d", "m"), ("skip", "m", "d"))),)
TYPED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from svdit.plans.bundle import graph_file, read_bundle
from svdit.runtime.build import Work, build_engine
from svdit.runtime.build_platform import this_platform
from svdit.runtime.build_record import Options
folder = Path(sys.argv[1])
made = read_bundle(folder).manifest
manifest = SimpleNamespace(variant="portable", batch=made.batch, inputs=made.inputs)
bundle = SimpleNamespace(path=folder, manifest=manifest)
work = Work(bundle, this_platform(), Options(), "", folder / "timing")
build_engine(work, graph_file(folder, sys.argv[2], (0,)), folder / "made.engine", show=False)
"""


@pytest.mark.parametrize("model", small_models.NAMES)
def test_dense_and_portable_bundles(model, tmp_path):
    """One engine for one and for two rows."""
    checkpoint, plan = small_models.save(model, tmp_path / "checkpoint", PATTERNS, STAGES)
    trace = exporter.trace_denoiser
    traced = trace(find_adapter(model), checkpoint, plan, "fp32", Batch(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "trace_denoiser", lambda *_: traced)
        for variant in ("dense", "portable"):
            exporter.export(model, plan, tmp_path / variant, checkpoint=checkpoint, variant=variant, batch=(1, 2))
    for variant in ("dense", "portable"):
        done = svdit_build(tmp_path / variant)
        assert done.returncode == 0, done.stderr
        bundle = read_bundle(tmp_path / variant)
        assert [e.stages for e in read_record(bundle.path).engines] == [g.stages for g in bundle.manifest.graphs]


@pytest.mark.parametrize("batch", [2, (1, 2)])
@pytest.mark.parametrize("model", small_models.NAMES)
def test_plugin_graphs_are_strongly_typed(model, batch, tmp_path):
    """Everything of a bfloat16 plugin graph but the plugin: without a GPU, Q + K + V stands in for it."""
    checkpoint, plan = small_models.save(model, tmp_path / "checkpoint", PATTERNS, STAGES)
    bundle = exporter.export(model, plan, tmp_path / "plugin", checkpoint=checkpoint, precision="bf16", batch=batch)
    graph = onnx.load(bundle.path / "dit.onnx", load_external_data=False)
    for node in [node for node in graph.graph.node if node.op_type == "SparseAttention"]:
        (out,), (q, k, v), place = node.output, node.input[:3], list(graph.graph.node).index(node)
        graph.graph.node.remove(node)
        graph.graph.node.insert(place, onnx.helper.make_node("Add", [q, k], [out + "/qk"]))
        graph.graph.node.insert(place + 1, onnx.helper.make_node("Add", [out + "/qk", v], [out]))
    (bundle.path / "typed.onnx").write_bytes(graph.SerializeToString())
    done = run_script(TYPED, bundle.path, "typed.onnx")
    assert done.returncode == 0, done.stderr
    assert (bundle.path / "made.engine").stat().st_size > 10_000
