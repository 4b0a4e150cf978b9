"""Plans inside small random diffusers pipelines on a GPU, in bfloat16 with the compiled kernel.

The truth is the same pipeline in float32 on the CPU; bfloat16 may be away from it as far as it is with the dense
attention that diffusers uses, twice at most.
"""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest
import torch

from svdit.exporter.export import export
from svdit.plans.schema import template
from svdit.runtime.drop_in import load
from svdit.runtime.ort_cuda_runner import OrtCudaRunner
from svdit.runtime.sparsify import sparsify
from svdit.trt_plugins import cuda_library, onnxruntime_library
from tests.runtime.test_drop_in import MODELS
from tests.runtime.test_sparsify import CASES, TILE, normal, two_stages
from tests.tolerance import rel_l2

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_library.find() is None, reason="needs a GPU and the built kernel"
)
needs_cuda_provider = pytest.mark.skipif(
    onnxruntime_library.find() is None or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs onnxruntime-gpu and the built operator",
)


class OnGpu:
    """A case, its pipeline's videos in float32 on the CPU, and a copy in bfloat16 on the GPU."""

    def __init__(self, name: str, folder) -> None:
        self.name, self.folder = name, folder
        self.case = CASES[name]()
        if name == "wan":
            self.case.inputs["prompt_embeds"] = normal(1, 512, 48)
            self.case.inputs["negative_prompt_embeds"] = normal(1, 512, 48, seed=6)
        self.pipe = self.case.pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.plan = replace(two_stages(self.case.geometry), model=MODELS[name][0])
        self.dense = self.case.run()
        with sparsify(self.pipe, self.plan):
            self.sparse = self.case.run()
        self.pipe.transformer.save_pretrained(folder / "checkpoint")
        self.pipe.transformer.to("cuda", torch.bfloat16)
        self.error = rel_l2(self.run(), self.dense)

    def run(self) -> torch.Tensor:
        moved = {
            name: x.to("cuda", torch.bfloat16 if x.is_floating_point() else x.dtype)
            for name, x in self.case.inputs.items()
            if isinstance(x, torch.Tensor)
        }
        return self.case.run(**moved).float().cpu()


@pytest.fixture(scope="module", params=sorted(CASES))
def made(request, tmp_path_factory):
    return OnGpu(request.param, tmp_path_factory.mktemp(request.param))


def test_an_all_full_plan_is_as_near_as_the_unmodified_pipeline(made):
    with sparsify(made.pipe, template("any", made.case.geometry, TILE)):
        assert rel_l2(made.run(), made.dense) <= 2 * made.error


def test_a_plan_of_two_stages_is_as_near(made):
    with sparsify(made.pipe, made.plan):
        assert rel_l2(made.run(), made.sparse) <= 2 * made.error


@pytest.fixture(scope="module")
def bundle(made):
    model, batch = MODELS[made.name]
    out, checkpoint = made.folder / "bundle", made.folder / "checkpoint"
    return export(model, made.plan, out, checkpoint=checkpoint, variant="plugin", precision="bf16", batch=batch).path


@pytest.mark.parametrize("backend", ["torch", pytest.param("onnxrt-cuda", marks=needs_cuda_provider)])
def test_a_bundle_is_as_near(made, bundle, backend):
    original = made.pipe.transformer
    with load(bundle, scheduler=made.pipe.scheduler, backend=backend, device="cuda") as transformer:
        made.pipe.transformer = transformer.to("cuda")
        try:
            assert rel_l2(made.run(), made.sparse) <= 2 * made.error
        finally:
            made.pipe.transformer = original


@needs_cuda_provider
def test_calls_of_one_and_of_two_rows_in_turn(made):
    """Each number of rows has a CUDA graph of its own, which the other's does not disturb."""
    folder, checkpoint = made.folder / "free", made.folder / "checkpoint"
    bundle = export(
        MODELS[made.name][0], made.plan, folder, checkpoint=checkpoint, variant="plugin", precision="bf16", batch="1-2"
    )
    with OrtCudaRunner(bundle) as runner:
        two = {spec.name: normal(*spec.sizes(2)).to("cuda") for spec in runner.inputs}
        if "encoder_attention_mask" in two:
            two["encoder_attention_mask"].fill_(1)
        one = {name: tensor[:1] for name, tensor in two.items()}
        first, both, again, both_again = (runner.infer_tensors(x, 0)["noise_pred"] for x in (one, two, one, two))
    assert torch.isfinite(both).all() and rel_l2(first.cpu(), both[:1].cpu()) <= 1e-2
    assert torch.equal(first, again) and torch.equal(both, both_again)


def test_offloading_is_the_pipelines_own(made, bundle):
    """The transformer's weights come to the GPU for its calls alone, with a plan and with a bundle in its place."""
    original = made.pipe.transformer
    try:
        with sparsify(made.pipe, made.plan):
            expected = made.run()
            made.pipe.enable_model_cpu_offload()
            assert rel_l2(made.run(), expected) <= 1e-6
            made.pipe.maybe_free_model_hooks()
            assert original.device.type == "cpu"
        with load(bundle, scheduler=made.pipe.scheduler, backend="torch", device="cuda") as transformer:
            made.pipe.transformer = transformer
            made.pipe.enable_model_cpu_offload()
            assert rel_l2(made.run(), made.sparse) <= 2 * made.error
    finally:
        made.pipe.transformer = original
        made.pipe.remove_all_hooks()
        original.to("cuda")
