"""Videos from bundles: backends agree, seeds decide, stages follow the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.plans.schema import template
from svdit.runtime.attention import MaskedAttention, OpAttention, plan_attention
from svdit.runtime.metrics import rel_l2_error
from svdit.runtime.pipeline import Model, Request, generate, prepare, run_bundle
from svdit.runtime.runner import make_runner, resolve_backend
from svdit.runtime.torch_runner import TorchRunner, check_device, checkpoint_of
from tests.runtime.conftest import PROMPTS, TILE

STEPS = 5


def made(folder, backend, seed=0, steps=STEPS, **options):
    bundle = read_bundle(folder)
    with make_runner(bundle, backend, **options) as runner:
        return run_bundle(runner, bundle, Request(PROMPTS, seed, steps), show=False)


@pytest.fixture(scope="module")
def by_torch(bundles):
    return made(bundles / "plugin", "torch")


def test_torch_and_onnxruntime_make_the_same_video(bundles, by_torch):
    by_graph = made(bundles / "portable", "onnxrt")
    assert rel_l2_error(by_torch.latents, by_graph.latents) < 1e-5
    assert np.abs(by_torch.videos.astype(int) - by_graph.videos).max() <= 1
    dense = made(bundles / "portable-dense", "onnxrt")
    assert rel_l2_error(dense.latents, made(bundles / "plugin", "torch", dense=True).latents) < 1e-5
    assert rel_l2_error(dense.latents, by_graph.latents) > 1e-2, "the plan must make a difference for this to mean much"


def test_stages_of_the_steps_are_the_plans(bundles, by_torch):
    # until .3, .6, 1 over 5 steps: step/steps = 0, .2 | .4 | .6 is not below .6, .8
    assert [record.stage for record in by_torch.records] == [0, 0, 1, 2, 2]
    assert [record.step for record in by_torch.records] == list(range(STEPS))
    assert by_torch.step_seconds.shape == (STEPS,)


def test_every_stage_runs_its_own_patterns(adapter, checkpoint, plan):
    """With one stage's rows replaced, latents are the same up to that stage's first step and differ after it."""
    model, request = Model(adapter, checkpoint, plan.tiling()), Request(PROMPTS[:1], 0, STEPS)
    full = (("full", "full"), ("full", "full"))

    def trajectory(stages):
        changed = replace(plan, stages=stages)
        with TorchRunner(adapter, checkpoint, plan.tiling(), changed) as runner, torch.inference_mode():
            run = prepare(runner, model, request, changed.stage_of)
            return [(run.step(), run.latents.clone())[1] for _ in range(STEPS)]

    whole = trajectory(plan.stages)
    for stage, first_step in ((0, 0), (1, 2), (2, 3)):
        other = trajectory(tuple(replace(s, layers=full) if i == stage else s for i, s in enumerate(plan.stages)))
        same = [torch.equal(a, b) for a, b in zip(whole, other, strict=True)]
        assert same == [True] * first_step + [False] * (STEPS - first_step)


def test_seeds_decide(bundles, by_torch):
    again = made(bundles / "plugin", "torch")
    np.testing.assert_array_equal(by_torch.videos, again.videos)
    shifted = made(bundles / "plugin", "torch", seed=1)
    assert rel_l2_error(by_torch.latents, shifted.latents) > 0.1
    alone = read_bundle(bundles / "plugin")
    with make_runner(alone, "torch") as runner:
        second = run_bundle(runner, alone, Request(PROMPTS[1:], 1, STEPS), show=False)
    np.testing.assert_allclose(second.latents[0], by_torch.latents[1], rtol=0, atol=2e-4)


def test_generate_without_a_bundle_is_the_same(adapter, checkpoint, plan, by_torch):
    for options in ({}, {"attention": "masked"}, {"batch": 3}):
        video = generate(adapter, checkpoint, PROMPTS, plan=plan, steps=STEPS, **options)
        assert rel_l2_error(by_torch.latents, video.latents) < 1e-5


def test_dense_does_not_depend_on_the_tile(adapter, checkpoint):
    first = generate(adapter, checkpoint, PROMPTS, steps=2)
    second = generate(adapter, checkpoint, PROMPTS, steps=2, tile=TILE)
    full = generate(adapter, checkpoint, PROMPTS, steps=2, plan=template("tiny", adapter.geometry(checkpoint), TILE))
    assert rel_l2_error(first.latents, second.latents) < 1e-5
    assert rel_l2_error(first.latents, full.latents) < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_op_and_masks_agree_on_every_layer_and_stage(plan, stage):
    torch.manual_seed(stage)
    q, k, v = (torch.randn(2, plan.geometry.tokens, 2, 64) for _ in range(3))
    number, nothing = torch.tensor([stage], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    op, masked = plan_attention(plan), plan_attention(plan, method="masked")
    assert isinstance(op, OpAttention) and isinstance(masked, MaskedAttention)
    for layer in range(2):
        expected, got = masked(q, k, v, layer, number, nothing), op(q, k, v, layer, number, nothing)
        assert rel_l2_error(expected.numpy(), got.numpy()) < 1e-6


@pytest.mark.parametrize(
    ("variant", "backend", "expected"),
    [
        ("plugin", "auto", "torch"),
        ("portable", "auto", "onnxrt"),
        ("portable-dense", "auto", "onnxrt"),
        ("portable", "torch", "torch"),
    ],
)
def test_backend_is_resolved(bundles, variant, backend, expected):
    assert resolve_backend(read_bundle(bundles / variant), backend) == expected


def test_a_closed_runner_is_closed(bundles):
    bundle = read_bundle(bundles / "portable")
    for backend in ("onnxrt", "torch"):
        runner = make_runner(bundle, backend)
        with runner:
            runner.activate()
        runner.close()
        with pytest.raises(SvditError, match="not activated"):
            runner.infer({}, 0)


def test_things_that_do_not_exist_are_refused(adapter, checkpoint, plan, bundles, tmp_path):
    for call, message in [
        (lambda: check_device("tpu"), "device: got 'tpu'; expected cpu, cuda or cuda:N"),
        (lambda: check_device("meta"), "device: got 'meta'"),
        (lambda: checkpoint_of(adapter, tmp_path / "none"), "checkpoint: got .*none; expected an existing folder"),
        (lambda: plan_attention(plan, method="flash"), "attention: got 'flash'; expected one of auto, op, masked"),
        (lambda: TorchRunner(adapter, checkpoint, plan.tiling(), plan, dtype="int8"), "dtype: got 'int8'"),
        (
            lambda: make_runner(read_bundle(bundles / "portable"), "onnxrt", device="cuda"),
            "device: got 'cuda'; expected 'cpu'",
        ),
        (lambda: make_runner(read_bundle(bundles / "portable"), "onnxrt", dense=True), "expected variant 'dense'"),
        (lambda: generate(adapter, checkpoint, []), "prompts: got none; expected at least one prompt"),
        (lambda: generate(adapter, checkpoint, ["  "]), r"prompts\[0\]: got '  '; expected text"),
    ]:
        with pytest.raises(SvditError, match=message):
            call()
    if not torch.cuda.is_available():
        with pytest.raises(SvditError, match="device: got 'cuda'; expected a GPU that torch can see"):
            check_device("cuda")
