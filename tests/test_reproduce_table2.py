"""scripts/reproduce_table2.sh: what it refuses before it loads anything, and a whole run on a small random pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from svdit.plans.schema import read_plan, write_plan
from tests.runtime.pipelines import save_pipeline
from tests.runtime.test_sparsify import two_stages

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce_table2.sh"


def run(*arguments, **environment):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "SVDIT_NO_VENV": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (tmp_path / "prompts.txt").write_text("a cat\n")
    return tmp_path


BAD = {
    "too few": ((), {}, "arguments: got 0; expected MODEL CHECKPOINT PROMPTS [OUT]"),
    "another model": (("tiny", "{}/pipeline", "{}/prompts.txt"), {}, "MODEL: got tiny; expected hunyuan, cogvideox1.5"),
    "no pipeline": (("wan2.1", "{}", "{}/prompts.txt"), {}, "CHECKPOINT: got no {}/model_index.json; expected the"),
    "no prompts": (("wan2.1", "{}/pipeline", "{}/none"), {}, "PROMPTS: got no file {}/none"),
    "no plan": (("wan2.1", "{}/pipeline", "{}/prompts.txt"), {"SVDIT_PLAN": "none"}, "SVDIT_PLAN: got no file none"),
    "bad size": (
        ("wan2.1", "{}/pipeline", "{}/prompts.txt"),
        {"SVDIT_SIZE": "81 480"},
        "SVDIT_SIZE: got 81 480; expected frames, height and width, such as 81 480 832",
    ),
    "no GPU": (("wan2.1", "{}/pipeline", "{}/prompts.txt", "{}/out"), {}, "GPU: got none that PyTorch can see"),
    "no transformer": (
        ("wan2.1", "{}/pipeline", "{}/prompts.txt", "{}/out"),
        {"SVDIT_DEVICE": "cpu"},
        "neither transformer/config.json nor config.json; expected a pipeline folder",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_end_with_2_and_a_message(name, folder):
    arguments, environment, message = BAD[name]
    done = run(*(a.format(folder) for a in arguments), **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and message.format(folder) in done.stderr
    assert not list(folder.glob("out/*"))


def test_a_plan_and_a_search_exclude_each_other(folder):
    (folder / "p.plan.json").write_text("{}")
    environment = {"SVDIT_PLAN": str(folder / "p.plan.json"), "SVDIT_SEARCH": "1"}
    done = run("wan2.1", folder / "pipeline", folder / "prompts.txt", **environment)
    assert done.returncode == 2 and "SVDIT_SEARCH: got SVDIT_PLAN as well; expected one of the two" in done.stderr


def test_a_small_pipeline_is_searched_first(folder):
    save_pipeline("hunyuan", folder / "small")
    environment = {"SVDIT_STEPS": "2", "SVDIT_DEVICE": "cpu", "SVDIT_LPIPS": "0", "SVDIT_SIZE": "9 80 112"}
    done = run("hunyuan", folder / "small", folder / "prompts.txt", folder / "out", SVDIT_SEARCH="1", **environment)
    assert done.returncode == 0, done.stderr
    plan = read_plan(folder / "out" / "search.plan.json")
    assert plan.provenance["lam"] == 0.5 and plan.provenance["eps"] == 1 and plan.provenance["prompts"] == ["a cat"]
    assert json.loads((folder / "out" / "table2.json").read_text())["steps"] == 2


def test_a_small_pipeline_from_prompts_to_the_table(folder):
    case = save_pipeline("wan", folder / "small")
    write_plan(folder / "p.plan.json", replace(two_stages(case.geometry), model="wan2.1"))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    environment = {"SVDIT_STEPS": "3", "SVDIT_DEVICE": "cpu", "SVDIT_LPIPS": "0"}
    environment["SVDIT_PLAN"] = str(folder / "p.plan.json")
    done = run("wan2.1", folder / "small", folder / "prompts.txt", folder / "out", **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out" / "table2.json").read_text())
    assert found["steps"] == 3 and len(found["prompts"]) == 2 and found["lpips"] is None
    assert 5 < found["psnr"] < 60 and 0 < found["ssim"] < 1 and found["speedup"] > 0
    names = {f"{name}-{i}.mp4" for name in ("dense", "sparse") for i in (0, 1)}
    assert {file.name for file in (folder / "out").glob("*.mp4")} == names
