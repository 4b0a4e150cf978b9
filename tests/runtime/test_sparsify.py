"""A plan inside diffusers pipelines of small random transformers, beside the pipeline's own attention under masks.

The reference is the unmodified pipeline with the attention that diffusers calls exchanged for torch's dense one under
boolean masks, built here from token coordinates in the model's own order.
"""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_hunyuan_video, transformer_wan
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Stripe
from svdit.plans.schema import Plan, Stage, template
from svdit.runtime import sparsify as module
from svdit.runtime.sparsify import sparsify, step_of
from tests.exporter.checkpoints import WAN, reference_model
from tests.exporter.models.hunyuan import checkpoints as hunyuan
from tests.tolerance import rel_l2

GRID = (3, 5, 7)
"""Odd sizes: no tile divides them."""
TILE = (2, 2, 4)
STEPS = 4
sdpa = functional.scaled_dot_product_attention


def normal(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A pipeline, the geometry of its attention, and a way to run it."""

    frames, height, width = 9, 80, 112
    calls_per_step = 1

    def run(self, **changes) -> torch.Tensor:
        options = {
            "num_inference_steps": STEPS, "num_frames": self.frames, "height": self.height, "width": self.width,
            "output_type": "latent", "generator": torch.Generator().manual_seed(1), **self.inputs, **changes,
        }
        return self.pipe(**options).frames


class WanCase(Case):
    calls_per_step = 2
    geometry = Geometry(GRID, 0, "none", 2, 3, 64)

    def __init__(self) -> None:
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        self.pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=reference_model(WAN)
        )
        self.inputs = {
            "prompt_embeds": normal(1, 9, 48), "negative_prompt_embeds": normal(1, 9, 48, seed=6), "guidance_scale": 3.0
        }

    def intercept(self, patch: pytest.MonkeyPatch, attend) -> None:
        patch.setattr(transformer_wan, "dispatch_attention_fn", dispatched(attend))


class CogVideoXCase(Case):
    frames = 17  # 5 latent frames, padded to 6
    geometry = Geometry(GRID, 7, "before", 2, 3, 64)

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=3, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=24,
            text_embed_dim=40, num_layers=2, sample_width=16, sample_height=12, patch_size=2, patch_size_t=2,
            max_text_seq_length=7, use_rotary_positional_embeddings=True, patch_bias=False,
        ).eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.normal_(1.0 if "norm" in name and name.endswith("norm.weight") else 0.0, 0.15)
        for block in model.transformer_blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                torch.nn.init.normal_(norm.weight, 1.0, 0.15)
        scheduler = diffusers.CogVideoXDPMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        self.pipe = diffusers.CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler
        )
        self.inputs = {
            "prompt_embeds": normal(1, 7, 40), "negative_prompt_embeds": normal(1, 7, 40, seed=6),
            "use_dynamic_cfg": True,
        }

    def intercept(self, patch: pytest.MonkeyPatch, attend) -> None:
        def replaced(q, k, v, attn_mask=None, **rest):
            assert attn_mask is None
            return attend(*(x.transpose(1, 2) for x in (q, k, v)), None).transpose(1, 2)

        patch.setattr(functional, "scaled_dot_product_attention", replaced)


class HunyuanVideoCase(Case):
    geometry = hunyuan.geometry()

    def __init__(self) -> None:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
        self.pipe = diffusers.HunyuanVideoPipeline(
            text_encoder=None, tokenizer=None, transformer=hunyuan.reference_model(), vae=None, scheduler=scheduler,
            text_encoder_2=None, tokenizer_2=None,
        )
        mask = (torch.arange(hunyuan.TEXT) < torch.tensor(hunyuan.VALID)[:, None]).to(torch.int64)
        self.inputs = {
            "prompt_embeds": normal(2, hunyuan.TEXT, 24), "pooled_prompt_embeds": normal(2, 20),
            "prompt_attention_mask": mask,
        }

    def intercept(self, patch: pytest.MonkeyPatch, attend) -> None:
        patch.setattr(transformer_hunyuan_video, "dispatch_attention_fn", dispatched(attend))


def dispatched(attend):
    """`attend` with the signature of diffusers' dispatcher."""

    def replaced(q, k, v, attn_mask=None, **rest):
        return attend(q, k, v, attn_mask)

    return replaced


CASES = {"wan": WanCase, "cogvideox": CogVideoXCase, "hunyuan": HunyuanVideoCase}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    made = CASES[request.param]()
    made.pipe.set_progress_bar_config(disable=True)
    made.dense = made.run()
    return made


def two_stages(geometry: Geometry) -> Plan:
    """Stages that change inside the loop; layers and heads that all differ, one skipped, one full."""
    patterns = {"d": Diagonal(frames=0), "m": MultiDiagonal(rows=0, cols=0), "s": Stripe(columns=((0, 1),), frames=1)}
    names = itertools.cycle(("full", "d", "m", "s", "d", "skip", "m"))
    stages = [
        Stage(until, tuple(tuple(next(names) for _ in range(geometry.heads)) for _ in range(geometry.layers)))
        for until in (0.4, 1.0)
    ]
    return Plan("any", geometry, TILE, patterns, tuple(stages), {"method": "test"})


def keep_mask(plan: Plan, stage: int, layer: int) -> torch.Tensor:
    """bool [H, N, N] in the model's own token order."""
    geometry, tiling = plan.geometry, plan.tiling()
    cells = itertools.product(*(range(n) for n in geometry.grid))
    rows, cols = (-(-n // size) for n, size in zip(geometry.grid[1:], TILE[1:], strict=True))
    tiles = [((t // TILE[0]) * rows + h // TILE[1]) * cols + w // TILE[2] for t, h, w in cells]
    if geometry.text_position == "before":
        tiles = [0] * geometry.text_tokens + [tile + 1 for tile in tiles]
    if geometry.text_position == "after":
        tiles += [max(tiles) + 1] * geometry.text_tokens
    place = torch.tensor(tiles)
    masks = [torch.from_numpy(tiling.mask(plan.pattern(name))) for name in plan.stages[stage].layers[layer]]
    return torch.stack([mask[place][:, place] for mask in masks])


def masked_run(case: Case, plan: Plan) -> torch.Tensor:
    """The unmodified pipeline; its attention calls of N queries and keys are counted to tell layer and step."""
    tokens, layers, calls = plan.geometry.tokens, plan.geometry.layers, itertools.count()

    def attend(q, k, v, given):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not q.shape[2] == k.shape[2] == tokens:
            return sdpa(q, k, v, attn_mask=given).transpose(1, 2)
        call, layer = divmod(next(calls), layers)
        stage = 0 if (call // case.calls_per_step) / STEPS < plan.stages[0].until else 1
        keep = keep_mask(plan, stage, layer)[None]
        keep = keep if given is None else keep & given
        silent = ~keep.any(-1, keepdim=True)
        return sdpa(q, k, v, attn_mask=keep | silent).masked_fill(silent, 0.0).transpose(1, 2)

    with pytest.MonkeyPatch.context() as patch:
        case.intercept(patch, attend)
        out = case.run()
    assert next(calls) == layers * case.calls_per_step * STEPS
    return out


def test_an_all_full_plan_gives_the_unmodified_video(case):
    with sparsify(case.pipe, template("any", case.geometry, TILE)):
        assert rel_l2(case.run(), case.dense) <= 1e-5


def test_a_plan_of_two_stages_equals_masked_attention(case):
    plan = two_stages(case.geometry)
    truth = masked_run(case, plan)
    assert rel_l2(case.dense, truth) > 1e-2  # the plan matters
    with sparsify(case.pipe, plan):
        assert rel_l2(case.run(), truth) <= 1e-5
        assert rel_l2(case.run(), truth) <= 1e-5  # a second run starts at the first stage again


def test_a_transformer_alone_takes_the_scheduler(case):
    plan = two_stages(case.geometry)
    with sparsify(case.pipe, plan):
        expected = case.run()
    with sparsify(case.pipe.transformer, plan, scheduler=case.pipe.scheduler):
        assert torch.equal(case.run(), expected)


def test_restoring_gives_the_original_video_bit_by_bit(case):
    before = [(name, p) for name, p in case.pipe.transformer.attn_processors.items()]
    handle = sparsify(case.pipe, two_stages(case.geometry))
    assert not torch.equal(case.run(), case.dense)
    handle.restore()
    handle.restore()
    assert torch.equal(case.run(), case.dense)
    after = case.pipe.transformer.attn_processors
    assert [(name, after[name]) for name, _ in before] == before


def test_an_error_inside_the_block_restores_too(case):
    with pytest.raises(RuntimeError, match="user"), sparsify(case.pipe, two_stages(case.geometry)):
        raise RuntimeError("user")
    assert torch.equal(case.run(), case.dense)


def test_steps_and_stages_are_told_to_callbacks(case):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, handle.step, handle.stage))
        return tensors

    with sparsify(case.pipe, two_stages(case.geometry)) as handle:
        case.run(callback_on_step_end=note)
    assert seen == [(0, 0, 0), (1, 1, 0), (2, 2, 1), (3, 3, 1)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_offloading_stays_the_pipelines(name):
    """Accelerate's hooks, put around the transformer before the exchange and after it."""
    case = CASES[name]()
    case.pipe.set_progress_bar_config(disable=True)
    plan = two_stages(case.geometry)
    with sparsify(case.pipe, plan):
        expected = case.run()
        case.pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(case.run(), expected)
    with sparsify(case.pipe, plan):
        assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("field", ["layers", "heads", "head_dim"])
def test_a_plan_of_another_model_is_refused(case, field):
    sizes = case.geometry.to_json()
    wrong = Geometry(**{**sizes, field: sizes[field] + 1})
    name = type(case.pipe.transformer).__name__
    with pytest.raises(SvditError, match=rf"plan geometry.{field}: got {sizes[field] + 1}; expected .*{name} has; use"):
        sparsify(case.pipe, template("any", wrong, TILE))
    assert torch.equal(case.run(), case.dense)


def test_text_in_the_wrong_place_is_refused(case):
    other = Geometry(GRID, 7, "before" if case.geometry.text_position == "after" else "after", case.geometry.layers,
                     case.geometry.heads, case.geometry.head_dim)
    with pytest.raises(SvditError, match=r"plan geometry.text_position: got '?(before|after)'?; expected"):
        sparsify(case.pipe, template("any", other, TILE))


def test_another_size_of_video_is_refused_when_it_runs(case):
    match = r"plan geometry.grid: got \(3, 5, 7\); expected \(3, 5, 8\), as the inputs.*; make a plan for this size"
    with sparsify(case.pipe, two_stages(case.geometry)), pytest.raises(SvditError, match=match):
        case.run(width=128)
    assert torch.equal(case.run(), case.dense)


def test_another_length_of_text_is_refused_when_it_runs():
    case = HunyuanVideoCase()
    sizes = {**case.geometry.to_json(), "text_tokens": 12}
    match = "plan geometry.text_tokens: got 12; expected 11, as the inputs"
    with sparsify(case.pipe, template("any", Geometry(**sizes), TILE)), pytest.raises(SvditError, match=match):
        case.run()


def test_what_is_exchanged_already_is_refused(case):
    plan = two_stages(case.geometry)
    with sparsify(case.pipe, plan), pytest.raises(SvditError, match=r"layer 0: attention processor: .*restore"):
        sparsify(case.pipe, plan)
    assert torch.equal(case.run(), case.dense)


def test_fused_projections_are_refused_where_they_change_the_processor():
    case = CogVideoXCase()
    case.pipe.transformer.fuse_qkv_projections()
    with pytest.raises(SvditError, match="got FusedCogVideoXAttnProcessor2_0; expected CogVideoXAttnProcessor2_0"):
        sparsify(case.pipe, two_stages(case.geometry))


def test_fused_projections_of_wan_run():
    case = WanCase()
    plan = two_stages(case.geometry)
    with sparsify(case.pipe, plan):
        expected = case.run()
    case.pipe.transformer.fuse_qkv_projections()
    with sparsify(case.pipe, plan):
        assert rel_l2(case.run(), expected) <= 1e-5


@pytest.mark.parametrize("target", [torch.nn.Linear(2, 2), object(), None])
def test_other_objects_are_refused(target):
    with pytest.raises(SvditError, match=r"transformer: got .*; expected a pipeline of diffusers with one of Wan"):
        sparsify(target, two_stages(Geometry(GRID, 0, "none", 2, 3, 64)))


def test_a_transformer_alone_needs_a_scheduler_for_stages():
    case = WanCase()
    with pytest.raises(SvditError, match="scheduler: got none; expected one, for a plan of 2 stages; pass scheduler="):
        sparsify(case.pipe.transformer, two_stages(case.geometry))
    sparsify(case.pipe.transformer, template("any", case.geometry, TILE)).restore()


def test_a_pipeline_with_two_transformers_is_refused():
    case = WanCase()
    case.pipe.transformer_2 = case.pipe.transformer
    with pytest.raises(SvditError, match="pipeline: got two transformers; expected one; use sparsify"):
        sparsify(case.pipe, two_stages(case.geometry))


def test_step_of_a_timestep():
    steps = torch.tensor([1000.0, 900.0, 900.0, 500.0, 20.0])
    assert [step_of(t, steps) for t in (1000.0, 900.0, 500.0, 20.0)] == [0, 1, 3, 4]
    assert step_of(torch.tensor([900.0, 900.0]), steps, step_index=2) == 2
    assert step_of(torch.tensor([[0.0, 500.0]]), steps) == 3
    assert step_of(torch.tensor([901.0]).bfloat16(), torch.tensor([999.0, 901.0])) == 1  # bfloat16 makes it 900
    with pytest.raises(SvditError, match="timestep: got 700; expected one of the scheduler's 5 timesteps, 20 to 1000"):
        step_of(700, steps)


def test_bfloat16_is_as_near_to_float32_as_the_unmodified_pipeline(case):
    model = case.pipe.transformer
    copies = {name: p.clone() for name, p in model.state_dict().items()}
    half = {n: x.bfloat16() for n, x in case.inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    try:
        model.to(torch.bfloat16)
        dense = case.run(**half)
        with sparsify(case.pipe, template("any", case.geometry, TILE)):
            got = case.run(**half)
    finally:
        model.to(torch.float32).load_state_dict(copies)
    assert got.dtype == dense.dtype
    assert rel_l2(got.float(), case.dense) <= 2 * rel_l2(dense.float(), case.dense)


def test_the_kernel_is_not_asked_on_the_cpu(monkeypatch):
    shared = module.Shared(two_stages(Geometry(GRID, 0, "none", 2, 3, 64)))
    assert shared.operator(torch.zeros(1)) is torch.ops.svdit.sparse_attention


def image_to_video(name: str) -> tuple[torch.nn.Module, dict]:
    """A transformer as the image-to-video pipelines use it, and its inputs without a timestep."""
    if name == "wan":
        model = reference_model({**WAN, "in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 192})
        return model, {
            "hidden_states": normal(1, 36, 3, 10, 14), "encoder_hidden_states": normal(1, 512, 48),
            "encoder_hidden_states_image": normal(1, 257, 20),
        }
    if name == "cogvideox":
        case = CogVideoXCase()
        own = {name: value for name, value in case.pipe.transformer.config.items() if not name.startswith("_")}
        torch.manual_seed(0)
        model = diffusers.CogVideoXTransformer3DModel(**{**own, "in_channels": 8, "ofs_embed_dim": 24}).eval()
        rotary = tuple(normal(105, 64, seed=seed) for seed in (1, 2))
        return model, {
            "hidden_states": normal(1, 6, 8, 10, 14), "encoder_hidden_states": normal(1, 7, 40),
            "image_rotary_emb": rotary, "ofs": torch.tensor([2.0]),
        }
    model = hunyuan.reference_model(image_condition_type="token_replace", guidance_embeds=False)
    inputs = hunyuan.feed(guidance=False)
    return model, {name: value for name, value in inputs.items() if name != "timestep"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_image_to_video_transformers_run(name):
    model, inputs = image_to_video(name)
    inputs["timestep"] = torch.full((len(inputs["hidden_states"]),), 700.0)
    with torch.no_grad():
        dense = model(**inputs).sample
        with sparsify(model, template("any", CASES[name].geometry, TILE)):
            assert rel_l2(model(**inputs).sample, dense) <= 1e-5
        with sparsify(model, template("any", CASES[name].geometry, TILE, Diagonal(frames=0))):
            assert rel_l2(model(**inputs).sample, dense) > 1e-4


@pytest.mark.parametrize(("name", "graphs"), [("wan", 1), ("cogvideox", 2), ("hunyuan", 3)])
def test_blocks_compile_whole_and_once_for_many_layers(name, graphs):
    """A kind of block has one graph; the first of a stream sees other strides and has its own."""
    case = CASES[name]()
    case.pipe.set_progress_bar_config(disable=True)
    counter = CompileCounterWithBackend("eager")
    with sparsify(case.pipe, two_stages(case.geometry)):
        expected = case.run()
        for block in case.pipe.transformer.modules():
            if type(block).__name__.endswith(("TransformerBlock", "CogVideoXBlock")):
                block.compile(backend=counter, fullgraph=True, dynamic=False)
        assert rel_l2(case.run(), expected) <= 1e-5
    assert counter.frame_count == graphs
