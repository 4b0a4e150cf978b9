"""One bundle for one and for two rows: every model and variant, against the model in torch, through the runners."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from svdit.exporter import export as exporter
from svdit.exporter import portable
from svdit.exporter.models.registry import adapter
from svdit.plans.batch import BATCH, Batch
from svdit.plans.bundle import Bundle
from svdit.plans.errors import SvditError
from svdit.plans.patterns import Diagonal, MultiDiagonal, Stripe
from svdit.plans.schema import Plan, Stage
from svdit.runtime.attention import OpAttention
from svdit.runtime.layers import mark_layers
from svdit.runtime.runner import make_runner
from svdit.trt_plugins import onnxruntime_library
from tests.exporter import checkpoints, small_models
from tests.exporter.graphs import run_in_python
from tests.exporter.models.hunyuan import checkpoints as hunyuan
from tests.tolerance import rel_l2

PATTERNS = {"d": Diagonal(frames=0), "m": MultiDiagonal(rows=0, cols=0), "s": Stripe(columns=((0, 2),), frames=1)}
THREE_HEADS = (
    Stage(0.4, (("full", "d", "m"), ("full", "full", "full"))),
    Stage(1.0, (("d", "skip", "s"), ("skip", "skip", "skip"))),
)
TWO_HEADS = (Stage(0.4, (("full", "d"), ("full", "full"))), Stage(1.0, (("d", "skip"), ("m", "s"))))
FEW_SCORES = 1 << 14
"""A limit on scores at once that cuts even these small layers, differently for one row and for two."""


def save(model: str, folder: Path) -> tuple[Path, Plan]:
    if model != "tiny":
        return small_models.save(model, folder, PATTERNS, THREE_HEADS)
    checkpoint = checkpoints.save_tiny(folder)
    return checkpoint, Plan("tiny", adapter("tiny").geometry(checkpoint), (1, 4, 4), PATTERNS, TWO_HEADS, {})


MODELS = ("tiny", *small_models.NAMES)


@dataclass
class Made:
    """A model's bundles for one or two rows, and inputs of two rows that differ."""

    name: str
    checkpoint: Path
    plan: Plan
    bundles: dict[str, Bundle]
    feed: dict[str, np.ndarray]

    def truth(self, rows: int, stage: int, attention) -> np.ndarray:
        denoiser = adapter(self.name).denoiser(self.checkpoint, self.plan.tiling(), attention)
        given = {name: torch.from_numpy(array[:rows]) for name, array in self.feed.items()}
        with torch.inference_mode():
            return denoiser(**given, stage=torch.tensor([stage], dtype=torch.int32)).numpy()

    def rows(self, count: int) -> dict[str, np.ndarray]:
        return {name: array[:count] for name, array in self.feed.items()}


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request, tmp_path_factory) -> Made:
    name, folder = request.param, tmp_path_factory.mktemp("batch")
    checkpoint, plan = save(name, folder / "checkpoint")
    traced = exporter.trace_denoiser(adapter(name), checkpoint, plan, "fp32", Batch(1, 2))
    bundles = {}
    with pytest.MonkeyPatch.context() as patch:  # one trace for the three variants
        patch.setattr(exporter, "trace_denoiser", lambda *_: traced)
        patch.setattr(portable, "SCORE_ELEMENTS", FEW_SCORES)
        for variant in ("plugin", "portable", "dense"):
            bundles[variant] = exporter.export(
                name, plan, folder / variant, checkpoint=checkpoint, variant=variant, batch="1-2"
            )
    random = np.random.default_rng(7)
    feed = {}
    for spec in bundles["portable"].manifest.inputs:
        feed[spec.name] = random.standard_normal(spec.sizes(2)).astype(spec.dtype)
    feed["timestep"] = np.array([812.0, 20.0], np.float32)
    if "encoder_attention_mask" in feed:
        lengths = np.array(hunyuan.VALID)[:, None]
        feed["encoder_attention_mask"] = (np.arange(hunyuan.TEXT) < lengths).astype(np.int32)
    return Made(name, checkpoint, plan, bundles, feed)


@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("stage", [0, 1])
def test_the_graphs_equal_torch(made, rows, stage):
    want = made.truth(rows, stage, OpAttention(made.plan))
    with make_runner(made.bundles["portable"], "onnxrt", threads=1) as runner:
        assert rel_l2(runner.infer(made.rows(rows), stage)["noise_pred"], want) <= 1e-5
    feed = {**made.rows(rows), "stage": np.array([stage], np.int32)}
    assert rel_l2(run_in_python(made.bundles["plugin"].path / "dit.onnx", feed), want) <= 1e-5
    with make_runner(made.bundles["plugin"], "torch") as runner:
        assert rel_l2(runner.infer(made.rows(rows), stage)["noise_pred"], want) <= 1e-5


@pytest.mark.skipif(onnxruntime_library.find() is None, reason=f"no {onnxruntime_library.FILE_NAME}")
def test_the_custom_operator_equals_torch(made):
    with make_runner(made.bundles["plugin"], "onnxrt", threads=1) as runner:
        for rows, stage in ((2, 0), (1, 1), (1, 0), (2, 1)):
            want = made.truth(rows, stage, OpAttention(made.plan))
            assert rel_l2(runner.infer(made.rows(rows), stage)["noise_pred"], want) <= 1e-5


@pytest.mark.parametrize("rows", [2, 1])
def test_dense_equals_torch(made, rows):
    full = tuple(("full",) * made.plan.geometry.heads for _ in range(made.plan.geometry.layers))
    everything = OpAttention(Plan(made.name, made.plan.geometry, made.plan.tile, {}, (Stage(1.0, full),), {}))
    with make_runner(made.bundles["dense"], "onnxrt", threads=1) as runner:
        got = runner.infer(made.rows(rows))["noise_pred"]
    assert rel_l2(got, made.truth(rows, 0, everything)) <= 1e-5


def test_the_manifest_and_the_graphs_name_the_free_dimension(made):
    for bundle in made.bundles.values():
        manifest = bundle.manifest
        assert manifest.batch == (1, 2)
        assert all(spec.shape[0] == (1 if spec.name == "stage" else BATCH) for spec in manifest.inputs)
        assert manifest.outputs[0].shape[0] == BATCH
        for file in manifest.graphs:
            graph = onnx.load(str(bundle.path / file.file), load_external_data=False).graph
            shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
            assert {dim.dim_param for shape in shapes for dim in shape} == {"", BATCH}


def test_no_shape_is_computed_in_a_plugin_graph(made):
    """What a provider would do on the host cannot be part of a captured run."""
    graph = onnx.load(str(made.bundles["plugin"].path / "dit.onnx"), load_external_data=False).graph
    assert not {node.op_type for node in graph.node} & {"Shape", "ConstantOfShape", "Expand", "Range"}


def test_other_numbers_of_rows_are_refused(made):
    three = {name: np.concatenate([array, array[:1]]) for name, array in made.feed.items()}
    for variant, backend in (("portable", "onnxrt"), ("plugin", "torch")):
        with make_runner(made.bundles[variant], backend) as runner:
            match = r"batch: got a call of 3; expected 1-2 rows; export the bundle with another --batch, such as 1-3"
            with pytest.raises(SvditError, match=match):
                runner.infer(three, 0)
            mixed = {**made.rows(2), "timestep": made.feed["timestep"][:1]}
            with pytest.raises(SvditError, match=r"timestep shape: got \(1,\); expected batch = 2 as in hidden_states"):
                runner.infer(mixed, 0)


def test_layers_can_be_marked(made):
    with mark_layers(make_runner(made.bundles["portable"], "onnxrt", threads=1), made.bundles["portable"]) as runner:
        for rows in (2, 1):
            layers = [array for name, array in runner.infer(made.rows(rows), 1).items() if name != "noise_pred"]
            assert len(layers) == made.plan.geometry.layers
            assert all(len(array) == rows for array in layers)


def test_three_rows(tmp_path):
    """Any range: here without the one row that torch's tracer knows best."""
    checkpoint, plan = save("tiny", tmp_path / "checkpoint")
    bundle = exporter.export("tiny", plan, tmp_path / "b", checkpoint=checkpoint, variant="portable", batch=(2, 3))
    feed = {spec.name: np.zeros(spec.sizes(3), spec.dtype) for spec in bundle.manifest.inputs}
    with make_runner(bundle, threads=1) as runner:
        assert runner.infer(feed, 0)["noise_pred"].shape[0] == 3
        with pytest.raises(SvditError, match="got a call of 1; expected 2-3 rows"):
            runner.infer({name: array[:1] for name, array in feed.items()}, 0)
