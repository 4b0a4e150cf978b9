"""The scripts that measure speed on a GPU, on figures made up by a law and on the CPU with a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from svdit.plans.cost import read_hardware
from svdit.plans.flops import stage_shares
from svdit.plans.kernel_work import kernel_work
from svdit.plans.schema import write_plan
from svdit.runtime.bench_cases import LATENCY, MIXED, bench_case

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def latency(name: str) -> float:
    """A kernel of 0.05 ms a launch and 600 TFLOP/s, a third of it by steps, that loses nothing else."""
    case = bench_case(name)
    tiling = case.plan.tiling()
    found = {key: kernel_work(tiling, mask) for key, mask in case.masks.items()}
    unit = 4 * case.geometry.tokens**2 * case.geometry.head_dim / 600e9
    return 0.05 + sum(unit * (found[key].steps / 3 + found[key].slices * 2 / 3) for key in case.heads)


def test_a_latency_table_predicts_mixed_layers_of_a_kernel_that_keeps_the_law(tmp_path):
    cases = [
        {
            "case": name,
            "shape": bench_case(name).shape,
            "density": bench_case(name).density,
            "results": [{"implementation": "svdit", "latency_ms": latency(name), "tflops": 1.0, "sm_mhz": 1}],
        }
        for name in LATENCY
    ]
    bench = {"gpu": "G", "torch": "2", "dtype": "bfloat16", "rounds": 2, "seconds": 0.2, "cases": cases}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    said = run("hardware_table.py", tmp_path / "bench.json", "-o", tmp_path / "g.json")
    lines = dict(line.split(":", 1) for line in said.splitlines())
    assert set(lines) == set(MIXED)
    for name in MIXED:
        predicted = float(lines[name].split("predicted ")[1].split(" ms")[0])
        assert predicted == pytest.approx(latency(name), rel=0.01), name
    table = read_hardware(tmp_path / "g.json")
    assert len(table.rows) == len(LATENCY) and all(row.items and row.steps and row.slices for row in table.rows)


def test_times_of_a_loop_are_sums_over_its_stages(checkpoint, plan, tmp_path):
    write_plan(tmp_path / "p.plan.json", plan)
    said = run(
        "speed_tiny_gpu.py", tmp_path / "p.plan.json", "--checkpoint", checkpoint, "--device", "cpu", "--dtype",
        "float32", "--prompts", 1, "--rounds", 1, "--seconds", 0, "--json", tmp_path / "out.json",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["device"] == "cpu" and found["rows"] == 2 and set(found["dense"]) == set(found["dense_loop_ms"])
    row, counts = found["plans"][0], 25 * stage_shares(plan, 25)
    steps = [stage["step_ms"] for stage in row["stages"]]
    assert row["loop_ms"] == pytest.approx(float(np.dot(counts, steps)), abs=0.01)
    attention = [sum(stage["attention_ms"]) for stage in row["stages"]]
    assert row["attention_ms"] == pytest.approx(float(np.dot(counts, attention)), abs=0.01)
    assert all(part < whole for part, whole in zip(attention, steps, strict=True))
    assert row["speedup"] == pytest.approx(min(found["dense_loop_ms"].values()) / row["loop_ms"], rel=1e-3)
    assert f"| p | {row['density']:.3f} |" in said


def test_a_plan_on_the_cpu_is_the_mean_of_its_stages(checkpoint, plan, tmp_path):
    write_plan(tmp_path / "p.plan.json", plan)
    write_plan(tmp_path / "q.plan.json", plan)
    said = run(
        "speed_tiny.py", tmp_path / "p.plan.json", tmp_path / "q.plan.json", "--checkpoint", checkpoint, "--rows", 1,
        "--rounds", 1, "--json", tmp_path / "out.json",
    )
    first, again = json.loads((tmp_path / "out.json").read_text())["plans"]
    assert first["stages"] == again["stages"], "equal stages are timed once"
    ratio = sum(n * s["sparse"] / s["dense"] for n, s in zip(stage_shares(plan, 25), first["stages"], strict=True))
    assert len(first["stages"]) == 3 and first["speedup"] == pytest.approx(1 / ratio)
    assert f"| p | {first['density']:.3f} |" in said
