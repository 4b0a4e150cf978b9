"""Plugin bundles on ONNX Runtime's CPU provider, with the custom-op library."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.runtime.metrics import rel_l2_error
from svdit.runtime.pipeline import Request, run_bundle
from svdit.runtime.runner import make_runner
from svdit.trt_plugins import onnxruntime_library
from tests.runtime.conftest import PROMPTS

LIBRARY = onnxruntime_library.find()
built = pytest.mark.skipif(
    LIBRARY is None, reason=f"no {onnxruntime_library.FILE_NAME}; build it: {onnxruntime_library.BUILD}"
)


@built
def test_every_stage_equals_torch(bundles):
    """One graph, one session: the stage is an input of the operator, in every layer."""
    bundle = read_bundle(bundles / "plugin")
    rng = np.random.default_rng(0)
    with make_runner(bundle, "onnxrt") as graph, make_runner(bundle, "torch") as model:
        feed = {
            spec.name: rng.standard_normal(spec.shape, dtype=np.float32)
            for spec in graph.inputs
            if spec.name != "stage"
        }
        feed["timestep"] = np.full(feed["timestep"].shape, 700.0, np.float32)
        results = [(graph.infer(feed, s)["noise_pred"], model.infer(feed, s)["noise_pred"]) for s in range(3)]
    for got, truth in results:
        assert rel_l2_error(truth, got) < 1e-5
    assert rel_l2_error(results[0][1], results[2][1]) > 1e-2, "stages must differ for this to mean much"


@built
def test_the_same_video_as_torch(bundles):
    bundle = read_bundle(bundles / "plugin")
    made = []
    for backend in ("onnxrt", "torch"):
        with make_runner(bundle, backend) as runner:
            made.append(run_bundle(runner, bundle, Request(PROMPTS, 0, 3), show=False))
    assert rel_l2_error(made[1].latents, made[0].latents) < 1e-5


@pytest.mark.parametrize("marked", [False, True])
def test_weights_that_are_links(bundles, tmp_path, marked):
    """ONNX Runtime refuses links out of a folder; the runner tells it where they lead."""
    source, folder = bundles / "portable-dense", tmp_path / "linked"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    results = []
    for place in (source, folder):
        runner = make_runner(read_bundle(place), "onnxrt")
        feed = {spec.name: np.ones(spec.sizes(2), np.float32) for spec in runner.inputs}
        if marked:
            runner.mark_layers()
        with runner:
            results.append(runner.infer(feed))
    assert set(results[0]) == set(results[1]) and len(results[0]) == (3 if marked else 1)
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


def test_links_under_other_names_are_refused_with_a_way_out(bundles, tmp_path):
    shutil.copytree(bundles / "portable-dense", tmp_path / "b")
    (weights,) = (tmp_path / "b").glob("*.safetensors")
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    with pytest.raises(SvditError, match="with --copy-weights if its weights are links"):
        make_runner(read_bundle(tmp_path / "b"), "onnxrt").activate()


def test_a_file_that_is_no_library(bundles, tmp_path, monkeypatch):
    file = tmp_path / "broken.so"
    file.write_text("nothing")
    monkeypatch.setenv(onnxruntime_library.VARIABLE, str(file))
    with pytest.raises(SvditError, match=r"broken\.so: got ONNX Runtime: .*; rebuild it: cmake"):
        make_runner(read_bundle(bundles / "plugin"), "onnxrt").activate()


def test_a_library_that_went_away(bundles, tmp_path, monkeypatch):
    file = tmp_path / "there.so"
    file.touch()
    monkeypatch.setenv(onnxruntime_library.VARIABLE, str(file))
    runner = make_runner(read_bundle(bundles / "plugin"), "onnxrt")
    monkeypatch.setattr(onnxruntime_library, "find", lambda: None)
    with pytest.raises(SvditError, match=r"libsvdit_onnxruntime\.so: got no such file"):
        runner.activate()
