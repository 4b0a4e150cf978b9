"""svdit-search on small random pipelines of the three models: its trajectory is the pipeline's own, and the way goes on
to an export and to videos.
"""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from svdit.exporter.cli import main as export_cli
from svdit.exporter.export import export
from svdit.plans import registry
from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.plans.schema import read_plan
from svdit.plans.search import Rule
from svdit.runtime import cli, measure, pipeline_parts, search_cli
from svdit.runtime.compare import compare
from svdit.runtime.denoise import noise_for
from svdit.runtime.measure import search
from svdit.runtime.pipeline import Request, run_bundle
from svdit.runtime.polygraphy_data import load_data
from svdit.runtime.runner import make_runner
from svdit.runtime.sparsify import sparsify
from tests.runtime.pipelines import BUILDERS, save_pipeline
from tests.runtime.test_drop_in import MODELS
from tests.tolerance import rel_l2

PROMPT = "a red cat on a boat"
STEPS = 3
TILE = (2, 2, 4)
CANDIDATES = {"skip": {"kind": "skip"}, "d": {"kind": "diagonal"}, "m": {"kind": "multi_diagonal"}}
DDIM = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class Made:
    """A pipeline's folder and the video that its searches are for."""

    def __init__(self, name: str, folder) -> None:
        self.name, self.folder = name, folder / "pipeline"
        self.case = save_pipeline(name, self.folder)
        if name == "cogvideox":  # the published scheduler: that of the case draws noise at every step
            pipe = self.pipe()
            pipe.scheduler = diffusers.CogVideoXDDIMScheduler(**DDIM)
            pipe.save_pretrained(self.folder)
        self.adapter = registry.adapter(MODELS[name][0])
        self.size = (self.case.frames, self.case.height, self.case.width)

    def search(self, prompts=(PROMPT,), **options):
        given = {"size": self.size, "tile": TILE, "steps": STEPS, "candidates": CANDIDATES, "show": False, **options}
        return search(self.adapter, self.folder, prompts, **given)

    def pipe(self):
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe, geometry, seed: int = 0, **options):
        """The pipeline's own result from the noise that a search starts from."""
        noise = noise_for([seed], self.adapter.latent_shape(geometry, self.folder))
        frames, height, width = self.size
        return pipe(
            prompt=PROMPT, num_inference_steps=STEPS, num_frames=frames, height=height, width=width,
            latents=noise.transpose(1, 2) if self.name == "cogvideox" else noise,
            **({"max_sequence_length": geometry.text_tokens} if geometry.text_tokens else {}), **options,
        ).frames  # fmt: skip


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def made(request, tmp_path_factory):
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def test_the_dense_trajectory_is_the_pipelines(made):
    """Prompts, noise levels, guidance and steps: everything as diffusers' pipeline has it."""
    found = made.search(rule=Rule(dense_steps=1.0))
    geometry = found.state.geometry
    want = made.call(made.pipe(), geometry, output_type="latent")
    want = want.transpose(1, 2) if made.name == "cogvideox" else want
    assert rel_l2(found.state.latents, want.numpy()) <= 1e-5
    settings = found.state.settings
    assert settings["guidance"] == {"wan": 5.0, "cogvideox": 6.0, "hunyuan": 6.0}[made.name]
    other = made.search(rule=Rule(dense_steps=1.0), prompts=("another prompt",))
    assert rel_l2(other.state.latents, found.state.latents) > 1e-3, "the prompt is heard"


def test_the_plan_fed_forward_is_the_pipelines_with_that_plan(made):
    """With a stage a step the plan is what ran while measuring."""
    found = made.search(rule=Rule(eps=3.0, lam=2.0, dense_steps=0.0), max_stages=STEPS)
    used = {name for stage in found.plan.stages for heads in stage.layers for name in heads}
    assert used & set(CANDIDATES), "something is sparse"
    pipe = made.pipe()
    with sparsify(pipe, found.plan):
        want = made.call(pipe, found.state.geometry, output_type="latent")
    want = want.transpose(1, 2) if made.name == "cogvideox" else want
    assert rel_l2(found.state.latents, want.numpy()) <= 2e-5


def test_an_interrupted_search_goes_on(made, tmp_path, monkeypatch):
    whole = made.search(prompts=(PROMPT, "a dog"), state=tmp_path / "whole.npz")
    write, file = measure.write_state, tmp_path / "s.npz"

    def stop(path, state):
        write(path, state)
        if state.done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(measure, "write_state", stop)
    with pytest.raises(KeyboardInterrupt):
        made.search(prompts=(PROMPT, "a dog"), state=file)
    monkeypatch.setattr(measure, "write_state", write)
    found = made.search(prompts=(PROMPT, "a dog"), state=file)
    np.testing.assert_array_equal(found.state.latents, whole.state.latents)
    assert found.plan == whole.plan


def test_text_encoders_are_loaded_once_and_gone_before_the_denoiser_comes(made, monkeypatch):
    loaded, alive = [], []
    load, activate = pipeline_parts.load_pipeline, measure.TorchRunner._activate

    def counted(*arguments, **options):
        pipe = load(*arguments, **options)
        loaded.append(weakref.ref(pipe.text_encoder))
        assert pipe.transformer is None and pipe.vae is None
        return pipe

    def watched(runner):
        gc.collect()
        alive.append([ref() is not None for ref in loaded])
        activate(runner)

    monkeypatch.setattr(pipeline_parts, "load_pipeline", counted)
    monkeypatch.setattr(measure.TorchRunner, "_activate", watched)
    columns = {"columns": {"kind": "stripe", "columns": {"top": 2}}}  # asks for a dense run before the search
    made.search(candidates={**CANDIDATES, **columns})
    assert alive == [[False]]


def test_from_a_checkpoint_to_a_video(made, tmp_path):
    """svdit-search, svdit-export, svdit-run, as docs/models.md has it."""
    frames, height, width = map(str, made.size)
    size = ["--frames", frames, "--height", height, "--width", width]
    plan, bundle, video = tmp_path / "p.plan.json", tmp_path / "bundle", tmp_path / "cat.mp4"
    source = ["--model", made.adapter.name, "--checkpoint", made.folder]
    rule = ["--tile", "2,2,4", "--steps", STEPS, "--dense-steps", 0.3, "--max-stages", 2, "--lam", 2, "--eps", 3]
    run = ["--pipeline", made.folder, "--prompt", PROMPT, "--steps", STEPS, "--threads", 1]
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    commands = [
        (search_cli.main, [*source, *size, *rule, "--prompts", tmp_path / "prompts.txt", "-o", plan]),
        (export_cli, [*source, *size, "--plan", plan, "--variant", "portable", "--batch", "1-2", "-o", bundle]),
        (cli.run, [bundle, *run, "-o", video]),
    ]
    for command, arguments in commands:
        done = CliRunner().invoke(command, [str(a) for a in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
    assert video.is_file()
    found = read_plan(plan)
    assert found.provenance["method"] == "sparse-vdit" and found.provenance["prompts"] == [PROMPT]
    assert len(found.stages) == 2 and found.model == made.adapter.name


def test_a_bundle_without_its_pipeline_makes_the_same_video(made, tmp_path, monkeypatch):
    """`svdit-run DIR` and `svdit-compare` encode and decode with the checkpoint's own parts too."""
    plan = made.search(rule=Rule(eps=3.0, lam=2.0), max_stages=2).plan
    made.adapter.check_geometry(made.folder, plan.geometry)
    export(plan.model, plan, tmp_path / "b", checkpoint=made.folder, variant="portable", batch=(1, 2))
    bundle = read_bundle(tmp_path / "b")
    with make_runner(bundle, threads=1) as runner:
        own = run_bundle(runner, bundle, Request((PROMPT,), 0, STEPS), show=False).videos[0]
    pipe = made.pipe()
    with sparsify(pipe, plan):
        want = made.call(pipe, plan.geometry, output_type="np")[0]
    assert own.shape == want.shape
    assert np.abs(own / 255 - want).max() <= 1.01 / 255
    found = compare(bundle, Request((PROMPT,), 0, 2), against="torch", threads=1, show=False)
    assert found.latents_rel_l2 <= 2e-5 and len(found.reference.videos) == 1
    monkeypatch.setenv("SVDIT_BUNDLE", str(tmp_path / "b"))
    feeds = list(load_data())
    assert len(feeds) == len(plan.stages)
    for feed in feeds:
        assert feed.pop("stage").shape == (1,)
        assert {name: x.shape for name, x in feed.items()} == {s.name: s.sizes(2) for s in bundle.manifest.inputs}
        assert {name: str(x.dtype) for name, x in feed.items()} == {s.name: s.dtype for s in bundle.manifest.inputs}


def test_a_search_with_the_dpm_scheduler_goes_on_too(tmp_path, monkeypatch):
    """CogVideoX's own: its steps look back, and draw noise."""
    made = Made("cogvideox", tmp_path)
    save_pipeline("cogvideox", made.folder)
    config = json.loads((made.folder / "scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "CogVideoXDPMScheduler"
    test_an_interrupted_search_goes_on(made, tmp_path, monkeypatch)


def test_what_is_no_pipeline_is_refused(made, tmp_path):
    alone = shutil.copytree(made.folder / "transformer", tmp_path / "transformer")
    with pytest.raises(SvditError, match=r"pipeline .*: got no model_index.json; expected a folder that a diffusers"):
        search(made.adapter, alone, [PROMPT], size=made.size, show=False)
    broken = shutil.copytree(made.folder, tmp_path / "b", ignore=shutil.ignore_patterns("text_encoder"))
    match = "pipeline .*: got .*; expected a complete pipeline; only transformer and vae may be missing"
    with pytest.raises(SvditError, match=match):
        search(made.adapter, broken, [PROMPT], size=made.size, show=False)
    index = json.loads((made.folder / "model_index.json").read_text())
    image = pipeline_parts.PIPELINES[made.adapter.pipeline_class][1]
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": image}))
    with pytest.raises(SvditError, match=rf"got {image}; expected {index['_class_name']}; image-to-video runs with"):
        search(made.adapter, broken, [PROMPT], size=made.size, show=False)


def test_sizes_are_checked_before_anything_is_loaded(made, tmp_path):
    arguments = ["--model", made.adapter.name, "--checkpoint", made.folder, "--prompt", PROMPT, "--height", 81]
    done = CliRunner().invoke(search_cli.main, [str(a) for a in [*arguments, "-o", tmp_path / "p.plan.json"]])
    assert done.exit_code == 2 and "video height: got 81; expected a multiple of" in done.output
    assert not list(tmp_path.iterdir())


def test_the_shipped_model_takes_another_size(checkpoint, adapter):
    found = search(
        adapter, checkpoint, ["red circle moving right"], size=(4, 16, None), steps=2, tile=TILE, show=False,
        candidates=CANDIDATES,
    )  # fmt: skip
    assert found.plan.geometry == replace(adapter.geometry(checkpoint), grid=(4, 4, 6))
    assert torch.isfinite(torch.from_numpy(found.state.latents)).all()
