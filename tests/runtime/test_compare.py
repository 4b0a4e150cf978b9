"""Comparisons: the figures are those of the videos that the two runs make."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from svdit.exporter.export import export
from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.plans.flops import mean_density
from svdit.plans.schema import template
from svdit.runtime import cli
from svdit.runtime.compare import compare, dense_bundle, is_full
from svdit.runtime.metrics import psnr, ssim
from svdit.runtime.pipeline import Request, run_bundle
from svdit.runtime.runner import make_runner
from svdit.trt_plugins import onnxruntime_library
from tests.runtime.conftest import PROMPTS

STEPS = 4
REQUEST = Request(PROMPTS, 3, STEPS)


@pytest.fixture(scope="module")
def against_dense(bundles):
    return compare(read_bundle(bundles / "portable"), REQUEST, show=False)


def test_videos_are_those_of_single_runs(bundles, plan, against_dense):
    single = {}
    for name in ("portable", "portable-dense"):
        bundle = read_bundle(bundles / name)
        with make_runner(bundle) as runner:
            single[name] = run_bundle(runner, bundle, REQUEST, show=False)
    np.testing.assert_array_equal(against_dense.reference.videos, single["portable-dense"].videos)
    np.testing.assert_array_equal(against_dense.compared.videos, single["portable"].videos)
    for i, score in enumerate(against_dense.scores):
        assert (score.prompt, score.seed) == (PROMPTS[i], 3 + i)
        assert score.psnr == psnr(single["portable-dense"].videos[i], single["portable"].videos[i])
        assert score.ssim == ssim(single["portable-dense"].videos[i], single["portable"].videos[i])
    figures = against_dense.figures()
    assert figures["psnr"] == pytest.approx(np.mean([s.psnr for s in against_dense.scores]))
    assert figures["density"] == pytest.approx(mean_density(plan, STEPS)) and 0 < figures["density"] < 1
    assert figures["speedup"] == pytest.approx(
        sum(figures["step_ms"]["reference"]) / sum(figures["step_ms"]["compared"]), rel=1e-2
    )


def test_single_outputs_are_compared_once_a_stage_and_at_the_end(against_dense):
    # 4 steps in stages until .3, .6, 1: 0, 0, 1, 2
    assert [(e.output, e.step, e.stage) for e in against_dense.outputs] == [
        ("noise_pred", 0, 0),
        ("noise_pred", 2, 1),
        ("noise_pred", 3, 2),
    ]
    assert all(1e-4 < e.rel_l2_error < 1 and e.max_abs_error > 0 for e in against_dense.outputs)


def test_backends_agree(bundles):
    for name in ("portable", "portable-dense"):
        found = compare(read_bundle(bundles / name), REQUEST, against="torch", show=False)
        assert max(e.rel_l2_error for e in found.outputs) < 1e-5
        assert found.latents_rel_l2 < 1e-5
        assert found.figures()["density"] == (1.0 if name == "portable-dense" else pytest.approx(0.5, abs=0.4))


def test_a_bundle_of_the_same_plan_on_the_other_side(bundles, tmp_path, plan, checkpoint):
    """Float32 graphs beside the half-precision form of the plan: apart by no more than rounding, and judged as such."""
    half = export("tiny", plan, tmp_path / "fp16", checkpoint=checkpoint, precision="fp16")
    request = Request(PROMPTS[:1], 3, STEPS)
    portable = bundles / "portable"
    found = compare(half, request, backend="torch", against="onnxrt", other=portable, layers=True, show=False)
    assert (found.runner, found.against) == ("torch:plan", "onnxrt:portable")
    assert found.layers.tolerance == 2e-3 and found.layers.first_departure is None
    assert 1e-5 < max(e.rel_l2_error for e in found.outputs) < 5e-3
    same = compare(read_bundle(portable), request, backend="torch", against="torch", other=portable, show=False)
    assert same.figures()["identical"]


def test_the_other_bundle_must_be_of_the_same_plan(bundles, tmp_path, plan, checkpoint):
    other = export("tiny", template("tiny", plan.geometry, plan.tile), tmp_path / "full", checkpoint=checkpoint)
    with pytest.raises(SvditError, match=r"plan_sha256: got .*; expected .* as in .*; export both of one plan"):
        compare(read_bundle(bundles / "portable"), REQUEST, against="torch", other=other.path, show=False)


def test_torch_needs_no_dense_bundle(bundles):
    found = compare(read_bundle(bundles / "plugin"), Request(PROMPTS[:1], 3, STEPS), show=False)
    assert (found.backend, found.runner, found.against) == ("torch", "torch:plan", "dense")
    assert 10 < found.scores[0].psnr < 90


def test_command_writes_figures_and_report(bundles, tmp_path):
    figures, report = tmp_path / "c.json", tmp_path / "c.html"
    command = [
        str(bundles / "portable"),
        "--prompt",
        PROMPTS[0],
        "--prompt",
        PROMPTS[1],
        "--seed",
        "3",
        "--steps",
        "4",
        "--json",
        str(figures),
        "--report",
        str(report),
    ]
    done = CliRunner().invoke(cli.compare, [*command, "--min-psnr", "5"])
    assert done.exit_code == 0, done.output
    data = json.loads(figures.read_text())
    assert {
        "psnr",
        "ssim",
        "max_abs_error",
        "rel_l2_error",
        "density",
        "flops_ratio",
        "latency_ms",
        "speedup",
        "steps",
        "backend",
    } <= set(data)
    assert data["steps"] == 4 and data["backend"] == "onnxrt" and data["against"] == "dense"
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 4 and f"{data['psnr']:.2f} dB" in page and PROMPTS[1] in page
    missed = CliRunner().invoke(cli.compare, [*command, "--min-psnr", "99"])
    assert missed.exit_code == 1 and "missed: PSNR" in missed.stderr


def test_identical_videos_are_said_to_be(bundles, tmp_path):
    """One graph against itself; another runtime would round some pixel the other way on some machine."""
    figures = tmp_path / "c.json"
    done = CliRunner().invoke(
        cli.compare,
        [
            str(bundles / "portable"),
            "--against",
            "onnxrt",
            "--other",
            str(bundles / "portable"),
            "--prompt",
            PROMPTS[0],
            "--steps",
            "2",
            "--json",
            str(figures),
            "--min-psnr",
            "99",
        ],
    )
    data = json.loads(figures.read_text())
    assert done.exit_code == 0 and data["identical"] is True and data["psnr"] is None


def test_missing_dense_bundle_says_how_to_make_it(bundles, checkpoint, tmp_path):
    bundle = read_bundle(bundles / "portable")
    place = tmp_path / "none"
    with pytest.raises(SvditError) as caught:
        dense_bundle(bundle, place)
    command = re.search(r"make it with: svdit-export (.*)$", str(caught.value)).group(1).split()
    from svdit.exporter.cli import main

    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert dense_bundle(bundle, place).manifest.variant == "dense"


def test_a_plan_of_full_heads_is_dense(plan):
    assert is_full(template("tiny", plan.geometry, plan.tile)) and not is_full(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("portable", "--dense", "plugin"), "variant: got 'plugin'; expected 'dense'; make one with: svdit-export"),
        (("portable-dense",), "variant: got 'dense'; expected a sparse bundle with --against dense"),
        (
            ("portable", "--against", "onnxrt"),
            "--against: got 'onnxrt'; expected another backend than onnxrt, or dense",
        ),
        (("portable", "--against", "auto"), "--against: got 'auto'; expected another backend"),
        (("portable", "--against", "sparse"), "backend: got 'sparse'; expected one of auto"),
        (
            ("portable", "--against", "torch", "--dense", "portable-dense"),
            "--dense: got .*; expected nothing with --against",
        ),
        (
            ("portable", "--other", "plugin"),
            "--other: got plugin; expected nothing with --against dense; use --dense DIR, or --against BACKEND",
        ),
        (
            ("plugin", "--backend", "torch", "--against", "onnxrt"),
            "variant: got 'plugin'; expected 'portable' or 'dense'",
        ),
    ],
)
def test_pairs_that_make_no_sense(bundles, monkeypatch, arguments, message):
    monkeypatch.chdir(bundles)
    monkeypatch.setattr(onnxruntime_library, "find", lambda: None)
    done = CliRunner().invoke(cli.compare, [*arguments, "--prompt", PROMPTS[0], "--steps", "1"])
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr


def test_prompts_of_the_plan_are_the_default(bundles):
    done = CliRunner().invoke(cli.compare, [str(bundles / "portable"), "--steps", "1"])
    assert done.exit_code == 2 and "prompts: got none; expected at least one prompt; pass --prompt TEXT" in done.stderr
