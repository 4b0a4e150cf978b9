"""Exported bundles as the transformer of diffusers pipelines, beside the pipelines of the same random checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdit import runtime
from svdit.exporter.export import export
from svdit.plans.errors import SvditError
from svdit.runtime.drop_in import load
from svdit.runtime.sparsify import sparsify
from tests.runtime.test_sparsify import CASES, STEPS, normal, two_stages
from tests.tolerance import rel_l2

MODELS = {"wan": ("wan2.1", 1), "cogvideox": ("cogvideox1.5", 2), "hunyuan": ("hunyuan", 2)}
"""Name and batch of the exports: Wan's pipeline evaluates the two rows of guidance in two calls."""


class Exported:
    """A case, its checkpoint, and bundles of a plan with two stages."""

    def __init__(self, name: str, folder) -> None:
        self.name, self.folder = name, folder
        self.case = CASES[name]()
        if name == "wan":  # its exports take as many text tokens as its pipeline makes
            self.case.inputs["prompt_embeds"] = normal(1, 512, 48)
            self.case.inputs["negative_prompt_embeds"] = normal(1, 512, 48, seed=6)
        self.case.pipe.set_progress_bar_config(disable=True)
        self.original = self.case.pipe.transformer
        self.original.save_pretrained(folder / "checkpoint")
        model, batch = MODELS[name]
        self.plan = replace(two_stages(self.case.geometry), model=model)
        self.bundle = folder / "bundle"
        made = export(model, self.plan, self.bundle, checkpoint=folder / "checkpoint", variant="portable", batch=batch)
        self.specs = [spec for spec in made.manifest.inputs if spec.name != "stage"]
        with sparsify(self.case.pipe, self.plan):
            self.truth = self.case.run()

    def run(self, transformer, **changes) -> torch.Tensor:
        self.case.pipe.transformer = transformer
        try:
            return self.case.run(**changes)
        finally:
            self.case.pipe.transformer = self.original


@pytest.fixture(scope="module", params=sorted(CASES))
def made(request, tmp_path_factory):
    return Exported(request.param, tmp_path_factory.mktemp(request.param))


def test_a_bundle_runs_in_its_pipeline(made):
    with load(made.bundle, scheduler=made.case.pipe.scheduler, threads=1) as transformer:
        assert rel_l2(made.run(transformer), made.truth) <= 1e-5
        assert transformer.step == STEPS - 1
        assert transformer.stage == 1


def test_it_looks_like_the_transformer_it_stands_in_for(made):
    with load(made.bundle, threads=1) as transformer:
        original = type(made.original).from_pretrained(made.folder / "checkpoint").config
        both = ({k: v for k, v in config.items() if k[0] != "_"} for config in (transformer.config, original))
        assert next(both) == next(both)
        assert transformer.config.in_channels == made.original.config.in_channels
        assert transformer.dtype == torch.float32
        assert transformer.device == torch.device("cpu")


def test_the_torch_backend_runs_too(made):
    with load(made.bundle, scheduler=made.case.pipe.scheduler, backend="torch") as transformer:
        assert rel_l2(made.run(transformer), made.truth) <= 1e-5


def test_offloading_stays_the_pipelines(made):
    with load(made.bundle, scheduler=made.case.pipe.scheduler, threads=1) as transformer:
        made.case.pipe.transformer = transformer
        try:
            made.case.pipe.enable_model_cpu_offload(device="cpu")
            assert rel_l2(made.case.run(), made.truth) <= 1e-5
        finally:
            made.case.pipe.remove_all_hooks()
            made.case.pipe.transformer = made.original


def test_the_step_comes_from_the_pipeline_or_its_scheduler(made):
    """WanPipeline tells it with every call."""
    with load(made.bundle, threads=1) as transformer:
        if made.name == "wan":
            assert rel_l2(made.run(transformer), made.truth) <= 1e-5
        else:
            match = r"scheduler: got none; expected one, for a plan of 2 stages; use load\(DIR, scheduler="
            with pytest.raises(SvditError, match=match):
                made.run(transformer)


def test_a_call_of_two_prompts(made):
    """More rows than the bundle's batch take several calls; rows that do not fill a batch are refused."""
    prompts = {name: x[:1].expand(2, *x.shape[1:]) for name, x in made.case.inputs.items() if hasattr(x, "shape")}
    with sparsify(made.case.pipe, made.plan):
        truth = made.case.run(**prompts)
    with load(made.bundle, scheduler=made.case.pipe.scheduler, threads=1) as transformer:
        assert rel_l2(made.run(transformer, **prompts), truth) <= 1e-5
        if made.name == "hunyuan":
            one = {name: x[:1] for name, x in prompts.items()}
            with pytest.raises(SvditError, match=r"batch: got a call of 1; expected 2 rows; .*--batch, such as 1-2"):
                made.run(transformer, **one)


def test_another_size_of_video_is_refused(made):
    with load(made.bundle, scheduler=made.case.pipe.scheduler, threads=1) as transformer:  # noqa: SIM117
        with pytest.raises(SvditError, match="hidden_states shape: got"):
            made.run(transformer, width=96)


def test_inputs_that_the_bundle_has_no_place_for_are_refused(made):
    extra = {
        "wan": {"encoder_hidden_states_image": torch.zeros(1, 257, 8)},
        "cogvideox": {"ofs": torch.zeros(1)},
        "hunyuan": {"attention_kwargs": {"scale": 0.5}},
    }[made.name]
    inputs = {
        name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in made.specs for name in (spec.name,)
    }
    with load(made.bundle, scheduler=made.case.pipe.scheduler, threads=1) as transformer:
        with pytest.raises(SvditError, match=f"inputs: got with {next(iter(extra))}; expected exactly hidden_states"):
            transformer(**inputs, **extra)
        del inputs["encoder_hidden_states"]
        with pytest.raises(TypeError, match="encoder_hidden_states"):
            transformer(**inputs)


def test_a_checkpoint_that_is_gone_is_refused(made):
    folder = made.folder / "checkpoint"
    config = folder / "config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace(made.original.config["_class_name"], "FluxTransformer2DModel"))
        with pytest.raises(SvditError, match="_class_name: got 'FluxTransformer2DModel'; expected one of Wan"):
            load(made.bundle)
        config.unlink()
        with pytest.raises(SvditError, match=r"checkpoint .*: got no transformer/config.json; expected a folder"):
            load(made.bundle)
    finally:
        config.write_text(text)


def test_the_short_name():
    assert runtime.load is load
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        runtime.loads  # noqa: B018


def test_no_bundle_is_refused(tmp_path):
    with pytest.raises(SvditError, match=r"manifest\.json"):
        load(tmp_path)
