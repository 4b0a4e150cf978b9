"""One bundle for calls of one and of two rows: the engine builder, the runners with buffers of their own, the loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdit.exporter.export import export
from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.runtime import ort_cuda_runner
from svdit.runtime.build import prepare, profiles
from svdit.runtime.build_record import Options
from svdit.runtime.compare import compare
from svdit.runtime.pipeline import Request, run_bundle
from svdit.runtime.runner import make_runner
from tests.runtime import tensorrt_stand_in as stand_in
from tests.runtime.conftest import PROMPTS
from tests.runtime.test_build import H100
from tests.runtime.test_ort_cuda_runner import OnTheCpu, built
from tests.runtime.test_trt_runner import expected, install


@pytest.fixture(scope="module")
def free(checkpoint, plan, tmp_path_factory):
    """Bundles portable, portable-dense and plugin for one or two rows."""
    folder = tmp_path_factory.mktemp("free")
    for name, variant in (("portable", "portable"), ("portable-dense", "dense"), ("plugin", "plugin")):
        export("tiny", plan, folder / name, checkpoint=checkpoint, variant=variant, batch="1-2")
    return folder


def feed_of(bundle, rows, seed=0):
    random = np.random.default_rng(seed)
    specs = [spec for spec in bundle.manifest.inputs if spec.name != "stage"]
    return {spec.name: random.standard_normal(spec.sizes(rows)).astype(spec.dtype) for spec in specs}


def test_the_profile_of_an_engine(free, bundles):
    bundle = read_bundle(free / "plugin")
    (profile,) = profiles(bundle)
    assert set(profile) == {spec.name for spec in bundle.manifest.inputs}
    video, stage = profile["hidden_states"], profile["stage"]
    assert [tuple(shape) for shape in (video.min, video.opt, video.max)] == [(n, 3, 4, 24, 24) for n in (1, 2, 2)]
    assert [tuple(shape) for shape in (stage.min, stage.opt, stage.max)] == [(1,)] * 3
    assert profiles(read_bundle(bundles / "plugin")) is None
    lines = list(prepare(read_bundle(free / "portable"), H100, Options()).lines())
    assert "batch: 1-2, tuned for 2" in lines


def test_tensorrt_captures_each_number_of_rows_once(free, monkeypatch):
    bundle = read_bundle(free / "plugin")
    trt, device = install(monkeypatch, bundle)
    stand_in.write_engines(bundle)
    with make_runner(bundle, "tensorrt") as runner:
        for_two = trt.enqueued
        for i, (rows, stage) in enumerate([(2, 0), (1, 2), (2, 1), (1, 1)]):
            feed = feed_of(bundle, rows, i)
            np.testing.assert_array_equal(runner.infer(feed, stage)["noise_pred"], expected(feed, bundle, stage))
        assert trt.enqueued == 2 * for_two, "the same for one row, when it was asked for; the rest are replays"
        with pytest.raises(SvditError, match="batch: got a call of 3; expected 1-2 rows"):
            runner.infer(feed_of(bundle, 3), 0)
    assert not device.live


@built
def test_a_bound_graph_has_the_same_addresses_for_any_number_of_rows(free, monkeypatch):
    bundle = read_bundle(free / "plugin")
    monkeypatch.setattr(ort_cuda_runner, "check_bundle", lambda bundle: None)
    with OnTheCpu(bundle) as runner, make_runner(bundle, "onnxrt") as plain:
        before = {name: buffer.data_ptr() for name, buffer in runner._graph.buffers.items()}
        for i, (rows, stage) in enumerate([(1, 0), (2, 2), (1, 1), (2, 0)]):
            feed = feed_of(bundle, rows, i)
            got = runner.infer_tensors({name: torch.from_numpy(array) for name, array in feed.items()}, stage)
            np.testing.assert_array_equal(got["noise_pred"], plain.infer(feed, stage)["noise_pred"])
        assert before == {name: buffer.data_ptr() for name, buffer in runner._graph.buffers.items()}
        three = {name: torch.from_numpy(array) for name, array in feed_of(bundle, 3).items()}
        with pytest.raises(SvditError, match="batch: got a call of 3; expected 1-2 rows"):
            runner.infer_tensors(three, 0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_loop_makes_the_video_of_a_fixed_batch(free, bundles, guidance, monkeypatch):
    """Three prompts: without guidance the last call has one row, which nothing needs to fill up."""
    request = Request((*PROMPTS, "slow red circle moving up"), 0, 2, guidance)
    seen = []
    with make_runner(read_bundle(free / "portable"), threads=1) as runner:
        original = runner._infer
        monkeypatch.setattr(
            runner, "_infer", lambda feed, stage: seen.append(len(feed["timestep"])) or original(feed, stage)
        )
        made = run_bundle(runner, read_bundle(free / "portable"), request, show=False)
    with make_runner(read_bundle(bundles / "portable"), threads=1) as runner:
        truth = run_bundle(runner, read_bundle(bundles / "portable"), request, show=False)
    np.testing.assert_allclose(made.latents, truth.latents, atol=2e-5)
    assert seen == ([2, 1] * 2 if guidance == 1.0 else [2, 2, 2] * 2)


def test_comparing_with_the_dense_bundle_beside_it(free):
    """The dense bundle must be for the same batch; the command that makes it says so."""
    bundle = read_bundle(free / "portable")
    found = compare(bundle, Request(PROMPTS[:1], 0, 2), threads=1, layers=True, show=False)
    assert found.figures()["against"] == "dense" and len(found.layers.errors) > 0
    with pytest.raises(SvditError, match=r"make it with: .* --batch 1-2 -o "):
        compare(bundle, Request(PROMPTS[:1], 0, 2), dense=free / "none", threads=1, show=False)


def test_a_dense_bundle_of_another_batch_is_refused(free, bundles):
    with pytest.raises(SvditError, match=r"portable-dense: batch: got 2; expected 1-2 as in .*--batch 1-2"):
        compare(
            read_bundle(free / "portable"), Request(PROMPTS[:1], 0, 1), dense=bundles / "portable-dense", show=False
        )
