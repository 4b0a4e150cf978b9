"""svdit-bench layer, step and loop: what is timed, in which order, and what the JSON holds."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from svdit.exporter.export import export
from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.plans.flops import mean_density
from svdit.plans.schema import template, write_plan
from svdit.runtime.bench_cases import dense_case, layer_case
from svdit.runtime.bench_cli import main
from svdit.runtime.bench_runners import candidates, time_calls


def test_calls_take_turns_in_a_rotating_order():
    order = []

    def call(name: str, seconds: float):
        def timed() -> float:
            order.append(name)
            return seconds

        return timed

    timings = time_calls({name: call(name, s) for name, s in (("a", 0.5), ("b", 0.25))}, rounds=3, seconds=0)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # one call each to warm up
    assert [timing.milliseconds for timing in timings] == [[500.0] * 3, [250.0] * 3]


def test_a_layer_of_a_plan(plan):
    case = layer_case(plan, 1, 1)
    assert case.heads == ("first", "skip") and case.shape == (1, 144, 2, 64)
    tiling = plan.tiling()
    assert case.density == pytest.approx(tiling.density(tiling.mask(plan.pattern("first"))) / 2)
    assert dense_case(case).density == 1.0
    with pytest.raises(SvditError, match=r"stage: got 3; expected 0\.\.2, as the plan has"):
        layer_case(plan, 3, 0)
    with pytest.raises(SvditError, match=r"layer: got 2; expected 0\.\.1"):
        layer_case(plan, 0, 2)


def test_layer_checks_its_options_before_it_needs_a_gpu(plan, tmp_path):
    write_plan(tmp_path / "p.plan.json", plan)
    command = ["layer", str(tmp_path / "p.plan.json"), "--layer", "5", "--library", __file__]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2 and "error: layer: got 5; expected 0..1" in done.output


def test_stages_where_the_loop_changes_them(bundles):
    (sparse, dense) = candidates([bundles / "portable", bundles / "portable-dense"], ["torch"])
    assert [sparse.stage_at(x) for x in (0, 0.29, 0.3, 0.6, 0.99)] == [0, 0, 1, 2, 2]
    assert [dense.stage_at(x) for x in (0, 0.99)] == [0, 0]
    assert dense.density(4) == 1.0 and sparse.density(4) == mean_density(sparse.bundle.plan, 4)


def test_step_and_loop_write_their_rows(bundles, tmp_path):
    folders = [str(bundles / "portable-dense"), str(bundles / "portable")]
    short = ["--rounds", "1", "--seconds", "0", "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(main, ["step", *folders, "--backend", "onnxrt", *short])
    assert done.exit_code == 0, done.output
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["case"] for case in cases] == ["stage-0", "stage-1", "stage-2"]
    for case in cases:
        assert [row["implementation"] for row in case["results"]] == ["portable-dense:onnxrt", "portable:onnxrt"]
        assert all(row["latency_ms"] > 0 and row["calls"] == 1 for row in case["results"])
        assert case["results"][0]["speedup"] == 1.0
    done = CliRunner().invoke(main, ["loop", *folders, "--steps", "3", *short])
    assert done.exit_code == 0, done.output
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    plan = read_bundle(bundles / "portable").plan
    assert case["case"] == "loop-3" and [row["steps"] for row in case["results"]] == [3, 3]
    assert [row["density"] for row in case["results"]] == [1.0, pytest.approx(mean_density(plan, 3))]


def test_every_stage_is_timed_when_the_dense_bundle_has_one_stage(bundles, checkpoint, plan, tmp_path):
    """As in half precision, where a dense bundle is one whose plan keeps all heads full."""
    full = template("tiny", plan.geometry, plan.tile)
    export("tiny", full, tmp_path / "dense", checkpoint=checkpoint)
    command = ["step", str(tmp_path / "dense"), str(bundles / "plugin"), "--backend", "torch"]
    command += ["--rounds", "1", "--seconds", "0", "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["case"] for case in cases] == ["stage-0", "stage-1", "stage-2"]


def test_two_folders_of_one_name(bundles):
    with pytest.raises(SvditError, match=r"bundles and backends: got portable:torch, portable:torch; expected names"):
        candidates([bundles / "portable", bundles / "portable"], ["torch"])
