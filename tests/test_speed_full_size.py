"""scripts/speed_full_size.py: its templates, its parts on small models on the CPU, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdit.plans.flops import mean_density
from svdit.plans.patterns import Diagonal
from svdit.plans.schema import Plan, Stage, template

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = {
    "wan2.1": {"num_attention_heads": 3, "attention_head_dim": 64, "text_dim": 48, "ffn_dim": 96, "num_layers": 3,
               "freq_dim": 32},
    "cogvideox1.5": {"num_attention_heads": 3, "num_layers": 3, "text_embed_dim": 48, "time_embed_dim": 32,
                     "max_text_seq_length": 9, "sample_width": 24, "sample_height": 20},
    "hunyuan": {"num_attention_heads": 3, "attention_head_dim": 64, "num_layers": 3, "num_single_layers": 6,
                "text_embed_dim": 48, "pooled_projection_dim": 20, "rope_axes_dim": (16, 24, 24)},
}
TOKENS = {"wan2.1": 75_600, "cogvideox1.5": 45_106, "hunyuan": 119_056}
WEIGHTS = {"wan2.1": 14.29e9, "cogvideox1.5": 5.57e9, "hunyuan": 12.82e9}
"""Parameters of the published transformers."""


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import speed_full_size

        yield speed_full_size


@pytest.mark.parametrize("model", sorted(SMALL))
def test_templates_have_the_density_of_the_paper(script, model):
    config, latent = script.published_config(model), script.reference_latent(model)
    plan = script.template_plan(model, config.geometry(latent))
    assert plan.geometry.tokens == TOKENS[model]
    assert mean_density(plan) == pytest.approx(script.MODELS[model].density, abs=0.002)
    assert plan.provenance["method"] == "template"
    assert {"full", "skip"} < set(plan.stages[0].layers[0])


@pytest.mark.parametrize("model", sorted(SMALL))
def test_sizes_are_the_published_ones(script, model):
    transformer = script.build(script.published_config(model), "meta", torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(WEIGHTS[model], rel=1e-3)
    exact = {name for name, p in transformer.named_parameters() if p.dtype == torch.float32}
    assert bool(exact) == (model == "wan2.1")


@pytest.mark.parametrize("model", sorted(SMALL))
def test_a_small_model_goes_through_all_of_it(script, model, monkeypatch, tmp_path):
    """Without compilation, which is tested beside `sparsify`, and without a GPU's profile."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    monkeypatch.setattr(script, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(script.Bench, "breakdown", lambda bench: {"ms": {}})
    config = replace(script.published_config(model), **SMALL[model])
    latent = tuple(n * p for n, p in zip((2, 10, 12), config.patch, strict=True))
    plan = template(model, config.geometry(latent), (1, 4, 8), Diagonal(frames=0))
    report = script.Report({}, tmp_path / "out.json")
    script.run(model, config, latent, plan, ("flash", "fa4"), ("fa4",), 2, report, "cpu", torch.float32)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["rel_l2_error_all_full"] <= 1e-5
    assert figures["first_call"]["sparse"]["rel_l2_error"] == 0.0
    assert "flash_attn" in figures["first_call"]["fa4"]["error"]  # it is not installed here, and the others count
    assert figures["sparse"]["timed_layers"] == figures["dense"]["flash"]["timed_layers"] == plan.geometry.layers
    ratio = figures["dense"]["flash"]["latency_ms"] / figures["sparse"]["latency_ms"]
    assert figures["speedup_over_fastest"] == figures["speedup"]["flash"] == pytest.approx(ratio, abs=1e-3)


def test_a_short_timing_is_a_straight_line(script, monkeypatch):
    blocks = torch.nn.Module()
    blocks.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(40))
    depth = script.Depth(blocks, ("blocks",))
    bench = script.Bench(blocks, {"hidden_states": torch.zeros(1)}, depth, repeats=1)
    monkeypatch.setattr(bench, "once", lambda: (7.0 + 3.0 * len(blocks.blocks), []))
    monkeypatch.setattr(script, "SHORT_SECONDS", 0.0)
    figures = bench.short()
    assert figures["latency_ms"] == pytest.approx(7.0 + 3.0 * 40)
    assert figures["timed_layers"] == [1, 3]
    assert len(blocks.blocks) == 40


def test_a_unit_has_the_proportions_of_the_model(script):
    model = torch.nn.Module()
    model.twin, model.single = (torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(n)) for n in (20, 40))
    depth = script.Depth(model, ("twin", "single"))
    assert (depth.units, depth.unit_layers) == (20, 3)
    with depth.first(2):
        assert (len(model.twin), len(model.single)) == (2, 4)
    assert (len(model.twin), len(model.single)) == (20, 40)


KERNELS = {
    "void svdit::sm90_sparse_attention_kernel<svdit::Config<128>>(Params)": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at_": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>(Flash_fwd_params)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": "attention",
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT": "linear",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "linear",
    "triton_red_fused_add_mul_native_layer_norm_3": "norms",
    "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_5": "norms",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>": "norms",
    "triton_red_fused__fused_rms_norm__to_copy_add_mul_slice_sparse_attention_stack_sub_1": "norms",
    "triton_poi_fused_cat_sparse_attention_view_6": "RoPE and rest",
    "triton_poi_fused_gelu_7": "RoPE and rest",
    "triton_poi_fused_cat_mul_stack_4": "RoPE and rest",
    "Memcpy DtoD (Device -> Device)": "RoPE and rest",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_belong_to_a_part_of_the_step(script, kernel):
    assert script.kind_of(kernel) == KERNELS[kernel]


def test_the_parts_of_a_step_add_up(script):
    """A unit has every kernel once, 1 ms each; a call has 5 ms of copies and a product of 2 ms beside its units."""
    unit = [{"cat": "kernel", "name": kernel, "dur": 1000.0} for kernel in KERNELS]
    once = [{"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "dur": 5000.0}]
    once += [{"cat": "kernel", "name": "gemv2T_kernel_val", "dur": 2000.0}]
    once += [{"cat": cat, "name": "flash gemm", "dur": 5e6} for cat in ("gpu_user_annotation", "cpu_op")]
    figures = script.by_kind(unit + once, unit + unit + once, 10)
    assert figures["ms"] == {"attention": 40.0, "linear": 20.0, "norms": 40.0, "RoPE and rest": 40.0, "once": 7.0}
    kernels = {row["name"]: row["ms"] for row in figures["kernels_of_one_unit"]}
    assert kernels == {**{name[:160]: 1.0 for name in KERNELS}, "gemv2T_kernel_val": 0.0}


def test_the_stage_in_the_middle_of_a_plan_is_timed(script):
    plan = template("wan2.1", script.published_config("wan2.1").geometry((21, 90, 160)), (1, 8, 16))
    skip = (("skip",) * 40,) * 40
    staged = Plan(plan.model, plan.geometry, plan.tile, {}, (replace(plan.stages[0], until=0.2), Stage(1.0, skip)), {})
    assert script.one_stage(staged).stages == (Stage(1.0, skip),)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(SCRIPTS / "speed_full_size.py"), "--model", "hunyuan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: GPU: got none; expected a CUDA GPU" in done.stderr
