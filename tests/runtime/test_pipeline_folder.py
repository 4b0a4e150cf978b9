"""`svdit-run --pipeline` on small random pipelines, beside the same pipelines with the plan swapped in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from svdit.exporter.export import export
from svdit.plans.bundle import read_bundle
from svdit.runtime import cli
from svdit.runtime.pipeline import Request
from svdit.runtime.pipeline_folder import run_folder
from svdit.runtime.sparsify import sparsify
from tests.runtime.pipelines import BUILDERS, save_pipeline
from tests.runtime.test_drop_in import MODELS
from tests.runtime.test_sparsify import two_stages

PROMPT = "a red cat on a boat"


class Made:
    """A pipeline folder, a bundle of its transformer, and the case they come from."""

    def __init__(self, name: str, folder) -> None:
        self.name, self.pipeline, self.bundle = name, folder / "pipeline", folder / "bundle"
        self.case = save_pipeline(name, self.pipeline)
        self.plan = replace(two_stages(self.case.geometry), model=MODELS[name][0])
        export(
            self.plan.model, self.plan, self.bundle, checkpoint=self.pipeline, variant="portable", batch="1-2"
        )

    def truth(self, seed: int) -> np.ndarray:
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.pipeline, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        tokens = self.case.geometry.text_tokens
        with sparsify(pipe, self.plan):
            return pipe(
                prompt=PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(seed), output_type="np",
                num_frames=self.case.frames, height=self.case.height, width=self.case.width,
                **({"max_sequence_length": tokens} if tokens else {}),
            ).frames[0]


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def made(request, tmp_path_factory):
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def invoke(made, tmp_path, *arguments, pipeline=None, prompt=PROMPT):
    command = [made.bundle, "--pipeline", pipeline or made.pipeline, "--prompt", prompt, "--threads", 1]
    command += ["-o", tmp_path / "v.mp4", *arguments]
    return CliRunner().invoke(cli.run, [str(part) for part in command])


def refused(made, tmp_path, *arguments, match, **options):
    done = invoke(made, tmp_path, *arguments, **options)
    assert done.exit_code == 2, done.output
    assert match in done.output
    assert not list(tmp_path.glob("v*"))


def test_the_video_is_the_one_of_the_pipeline_with_the_plan(made):
    runner, found = run_folder(
        read_bundle(made.bundle), made.pipeline, Request((PROMPT,), seed=4, steps=3), threads=1, show=False
    )
    truth = made.truth(4)
    assert found.videos.shape == (1, *truth.shape)
    assert np.abs(found.videos[0] / 255 - truth).max() <= 1 / 255
    assert [(r.step, r.stage) for r in found.records] == [(0, 0), (1, 0), (2, 1)]
    assert (found.step_seconds > 0).all() and runner.backend == "onnxrt" and not runner.active


def test_the_command_writes_video_sheet_and_figures(made, tmp_path):
    size = ("--height", made.case.height, "--width", made.case.width, "--frames", made.case.frames)
    done = invoke(made, tmp_path, "--steps", 2, *size, "--json", tmp_path / "f.json")
    assert done.exit_code == 0, done.output
    assert {f.name for f in tmp_path.iterdir()} == {"v.mp4", "v.png", "f.json"}
    assert sum(1 for _ in imageio.get_reader(tmp_path / "v.mp4")) == made.case.frames
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["steps"] == 2 and figures["stages"] == [0, 1] and figures["model"] == made.plan.model
    assert figures["guidance"] == {"wan": 5.0, "cogvideox": 6.0, "hunyuan": 6.0}[made.name]


def test_the_transformer_may_be_missing_from_the_folder(made, tmp_path):
    shutil.copytree(made.pipeline, tmp_path / "p", ignore=shutil.ignore_patterns("transformer"))
    done = invoke(made, tmp_path, "--steps", 1, pipeline=tmp_path / "p")
    assert done.exit_code == 0, done.output


def test_another_size_is_refused(made, tmp_path):
    case = made.case
    match = f"--width: got 128; expected {case.width}: {made.bundle} is for {case.frames} frames of 80 x 112; leave"
    refused(made, tmp_path, "--width", 128, match=match)
    refused(made, tmp_path, "--frames", 5, match=f"--frames: got 5; expected {case.frames}")


def test_a_folder_that_is_no_pipeline_is_refused(made, tmp_path):
    refused(made, tmp_path, pipeline=tmp_path, match=f"pipeline {tmp_path}: got no model_index.json; expected a folder")
    refused(made, tmp_path, pipeline=tmp_path / "none", match="none: got no such folder")


def test_a_pipeline_that_is_not_whole_is_refused(made, tmp_path):
    shutil.copytree(made.pipeline, tmp_path / "p", ignore=shutil.ignore_patterns("vae"))
    refused(made, tmp_path, pipeline=tmp_path / "p", match=f"pipeline {tmp_path / 'p'}: got ")


def test_a_pipeline_of_another_model_is_refused(made, tmp_path):
    index = json.loads((made.pipeline / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    match = f"model_index.json: $._class_name: got \"FluxPipeline\"; expected {index['_class_name']} or "
    refused(made, tmp_path, pipeline=tmp_path, match=match)


def test_a_pipeline_of_other_sizes_is_refused(made, tmp_path):
    (tmp_path / "transformer").mkdir()
    shutil.copy(made.pipeline / "model_index.json", tmp_path)
    config = json.loads((made.pipeline / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 9}))
    match = f"transformer/config.json: $.num_layers: got 9; expected 2, as in {made.bundle}; the bundle was made from"
    refused(made, tmp_path, pipeline=tmp_path, match=match)


def test_an_image_goes_with_image_to_video_only(made, tmp_path):
    refused(made, tmp_path, "--image", tmp_path / "i.png", match="--image: got ")


def test_two_transformers_are_refused(made, tmp_path):
    index = json.loads((made.pipeline / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer_2": ["diffusers", "X"]}))
    refused(made, tmp_path, pipeline=tmp_path, match="model_index.json: $.transformer_2: got [")


def test_sizes_need_a_pipeline(made, tmp_path):
    done = CliRunner().invoke(cli.run, [str(made.bundle), "--prompt", PROMPT, "--height", "80"])
    assert done.exit_code == 2 and "--height: got 80; expected no such option without --pipeline" in done.output


def test_a_tokenizer_that_has_a_sentencepiece_model_alone(tmp_path):
    """As CogVideoX's pipeline ships its tokenizer: svdit's own requirements are enough to read it."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT] * 3), model_prefix=str(tmp_path / "spiece"), vocab_size=99, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer(PROMPT).input_ids, skip_special_tokens=True) == PROMPT
