"""The scripts that check ONNX Runtime on a GPU, run on the CPU provider with small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svdit.plans.schema import write_plan
from svdit.trt_plugins import onnxruntime_library

pytest.importorskip("onnxruntime")
SCRIPTS = Path(__file__).parents[2] / "scripts"
LIBRARY = onnxruntime_library.find()
built = pytest.mark.skipif(
    LIBRARY is None, reason=f"no {onnxruntime_library.FILE_NAME}; build it: {onnxruntime_library.BUILD}"
)


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=900, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@built
def test_check_of_the_tiny_model(checkpoint, plan, tmp_path):
    write_plan(tmp_path / "p.plan.json", plan)
    folder, out = tmp_path / "prepared", tmp_path / "out.json"
    run("check_onnxruntime_cuda.py", "prepare", folder, "--reference", "--checkpoint", checkpoint, "--plan",
        tmp_path / "p.plan.json")
    run("check_onnxruntime_cuda.py", "check", folder, "--library", LIBRARY, "--json", out, "--loops", 1,
        "--only", "loops", "profile", "--try-cpu")
    report = json.loads(out.read_text())
    sparse = [row for row in report["loops"] if row["attention"] == "sparse"]
    assert len(sparse) == 2 and all(row["steps"] == 25 and row["psnr"] > 50 for row in sparse)
    for form in ("dense", "sparse"):
        found = report["profile"][form]
        assert found["sparse_attention_nodes"] == found["layers"] == 2 and found["copies"] == []


@built
def test_wide_models(tmp_path):
    out, names = tmp_path / "out.json", ("small", "small-cogvideox1.5", "small-hunyuan")
    run("bench_wide_models.py", "export", tmp_path, "--model", *names, "--precision", "fp16")
    run("bench_wide_models.py", "run", tmp_path, "--model", *names, "--library", LIBRARY, "--json", out, "--rounds", 1,
        "--try-cpu")
    models = json.loads(out.read_text())["models"]
    wan, cogvideox, hunyuan = (models[name] for name in names)
    assert [wan[key] for key in ("tokens", "layers", "heads", "batch")] == [640, 2, 4, 1]
    assert [cogvideox[key] for key in ("tokens", "layers", "heads", "batch")] == [132 + 226, 2, 48, 2]
    assert [hunyuan[key] for key in ("tokens", "layers", "heads", "batch")] == [91 * 4 + 256, 2, 24, 1]
    assert [row["attention"] for row in wan["rows"]] == ["dense", "mixed", "bands"]
    for model in (cogvideox, hunyuan):
        assert [row["attention"] for row in model["rows"]] == ["dense", "template"]
    for model in models.values():
        densities = [row["density"] for row in model["rows"]]
        assert densities[0] == 1 and densities == sorted(densities, reverse=True)
