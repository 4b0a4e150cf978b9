"""`svdit-plan` through its command line: output, figures, exit codes, and files left behind."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from click.testing import CliRunner

from svdit.plans.cli import main
from svdit.plans.patterns import Diagonal, MultiDiagonal
from svdit.plans.schema import Stage, loads, write_plan
from tests.plans.malformed import GOOD, MALFORMED


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def plan():
    return loads(json.dumps(GOOD))


@pytest.fixture
def path(tmp_path, plan):
    path = tmp_path / "good.plan.json"
    write_plan(path, plan)
    return path


@pytest.mark.parametrize("name", MALFORMED)
def test_check_refuses_a_malformed_plan(name, tmp_path):
    text, message = MALFORMED[name]
    path = tmp_path / "bad.plan.json"
    path.write_text(text(), encoding="utf-8")
    done = run("check", path, "--json", tmp_path / "out.json")
    assert done.exit_code == 2
    assert done.stderr == f"error: {path}: {message}\n"
    assert done.stdout == ""
    assert os.listdir(tmp_path) == ["bad.plan.json"]


def test_check_accepts_a_good_plan(path, tmp_path):
    done = run("check", path, "--json", tmp_path / "out.json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: ok, tiny, density 0.")
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["plans"][0]["plan"] == str(path)
    assert 0 < figures["plans"][0]["density"] < 1


def test_check_names_every_bad_file_and_passes_the_good_one(path, tmp_path):
    (tmp_path / "a.json").write_text("[]")
    done = run("check", tmp_path / "a.json", path, tmp_path / "none.json")
    assert done.exit_code == 2
    assert done.stdout.count(": ok") == 1
    assert [line.split(": got ")[0] for line in done.stderr.splitlines()] == [
        f"error: {tmp_path / 'a.json'}: $",
        f"error: {tmp_path / 'none.json'}",
    ]


def test_check_against_a_checkpoint(path, plan, tmp_path, monkeypatch):
    class Adapter:
        def geometry(self, checkpoint):
            assert checkpoint == tmp_path
            return geometry

    monkeypatch.setattr("svdit.plans.registry.adapter", lambda name: Adapter())
    geometry = plan.geometry
    assert run("check", path, "--checkpoint", tmp_path).exit_code == 0
    geometry = replace(plan.geometry, heads=4)
    done = run("check", path, "--checkpoint", tmp_path)
    assert done.exit_code == 2
    assert f"{path}: $.geometry: got heads 3; expected heads 4; that is what {tmp_path} has" in done.stderr


def test_show_prints_every_stage_layer_and_pattern(path):
    done = run("show", path)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "model       tiny: 2 layers, 3 heads x 64" in lines
    assert "tokens      3 x 4 x 6 video, 5 text after: 77" in lines
    assert "tiles       1 x 2 x 3 tokens: 3 x 2 x 2 tiles + 1 of text" in lines
    assert any(line.startswith("m ") and line.endswith("multi_diagonal stride=2") for line in lines)
    assert sum(line.startswith("stage ") for line in lines) == 2
    assert any(line.startswith("stage 0: 0 to 25 % of the steps, density ") for line in lines)
    header = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert lines[header].split() == ["layer", "density", "full", "skip", "d", "m", "s", "u", "t"]
    assert lines[header + 1].split() == ["0", "1.0000", "3", ".", ".", ".", ".", ".", "."]
    assert "whole model: attention and matrix products" in lines[-1]


def test_show_says_when_the_model_is_not_known(tmp_path, plan):
    write_plan(tmp_path / "a.json", replace(plan, model="another"))
    assert "attention only" in run("show", tmp_path / "a.json").stdout.splitlines()[-1]


def test_show_figures(path, plan, tmp_path):
    assert run("show", path, "--json", tmp_path / "out.json").exit_code == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    tiling = plan.tiling()
    assert figures["model"] == "tiny"
    assert figures["flops_scope"] == "model"
    assert figures["flops_ratio"] > 1
    assert figures["patterns"]["m"]["density"] == tiling.density(tiling.mask(plan.pattern("m")))
    assert figures["patterns"]["d"]["heads"] == 2
    assert figures["stages"][0]["layers"][0] == {"density": 1.0, "heads": {"full": 3}}
    shares = 0.25 * figures["stages"][0]["density"] + 0.75 * figures["stages"][1]["density"]
    assert figures["density"] == pytest.approx(shares)


def test_show_draws_a_picture(path, plan, tmp_path):
    import numpy as np
    from matplotlib.image import imread

    from svdit.plans.picture import figure_of

    assert run("show", path, "--png", tmp_path / "out.png").exit_code == 0
    pixels = imread(tmp_path / "out.png")
    assert min(pixels.shape[:2]) > 500
    maps, masks = figure_of(plan).subfigs
    assert [axis.get_title() for axis in maps.axes] == ["stage 0: 0-25 %", "stage 1: 25-100 %"]
    names = [text.get_text() for text in maps.legends[0].get_texts()]
    assert names == ["full", "skip", "d", "m", "s", "u", "t"]
    cells = [[names[i] for i in row] for row in np.asarray(maps.axes[1].images[0].get_array())]
    assert cells == [list(row) for row in plan.stages[1].layers]
    tiling = plan.tiling()
    for axis, name in zip(masks.axes, names, strict=False):
        assert axis.get_title().split() == [name, f"{tiling.density(tiling.mask(plan.pattern(name))):.3f}"]
        assert np.array_equal(np.asarray(axis.images[0].get_array()), tiling.mask(plan.pattern(name)))


@pytest.mark.parametrize("option", ["--png", "--json"])
def test_show_cannot_write(path, tmp_path, option):
    target = tmp_path / "none" / "out"
    done = run("show", path, option, target)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {target}: got no such file or directory; expected a place that can be written\n"


def test_diff_of_equal_plans(path, plan, tmp_path):
    other = tmp_path / "other.json"
    renamed = {("d" if name == "d" else f"x{name}"): p for name, p in plan.patterns.items()}
    rename = {name: name for name in ("full", "skip", "d")} | {name: f"x{name}" for name in "msut"}
    stages = tuple(
        replace(stage, layers=tuple(tuple(rename[n] for n in row) for row in stage.layers)) for stage in plan.stages
    )
    write_plan(other, replace(plan, patterns=renamed, stages=stages, provenance={"method": "by hand"}))
    done = run("diff", path, other, "--json", tmp_path / "out.json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("0 differences; density ")
    assert json.loads((tmp_path / "out.json").read_text())["same"] is True


def changed_plans(plan):
    rows = plan.stages[1].layers
    swapped = (("m", *rows[0][1:]), rows[1])
    return {
        "model": (replace(plan, model="wan2.1"), ['model: "tiny" -> "wan2.1"']),
        "head": (
            replace(plan, stages=(plan.stages[0], Stage(1.0, swapped))),
            ["25-100 % of the steps, layer 0, head 0: d -> m"],
        ),
        "definition": (
            replace(plan, patterns={**plan.patterns, "m": MultiDiagonal(stride=3)}),
            [
                '0-25 % of the steps, layer 1, head 1: m {"kind": "multi_diagonal", "stride": 2} -> '
                'm {"kind": "multi_diagonal", "stride": 3}',
                '25-100 % of the steps, layer 0, head 1: m {"kind": "multi_diagonal", "stride": 2} -> '
                'm {"kind": "multi_diagonal", "stride": 3}',
            ],
        ),
        "until": (
            replace(plan, stages=(replace(plan.stages[0], until=0.5), plan.stages[1])),
            [
                "25-50 % of the steps, layer 0, head 0: d -> full",
                "25-50 % of the steps, layer 0, head 1: m -> full",
                "25-50 % of the steps, layer 0, head 2: skip -> full",
                "25-50 % of the steps, layer 1, head 0: u -> d",
                "25-50 % of the steps, layer 1, head 1: t -> m",
                "25-50 % of the steps, layer 1, head 2: full -> s",
            ],
        ),
        "layers": (
            replace(
                plan,
                geometry=replace(plan.geometry, layers=1),
                stages=tuple(replace(stage, layers=stage.layers[:1]) for stage in plan.stages),
            ),
            None,
        ),
        "split": (replace(plan, stages=(plan.stages[0], replace(plan.stages[1], until=0.6), plan.stages[1])), []),
        "unused": (replace(plan, patterns={**plan.patterns, "new": Diagonal(frames=7)}), []),
    }


@pytest.mark.parametrize("name", ["model", "head", "definition", "until", "layers", "split", "unused"])
def test_diff_says_what_differs(name, path, plan, tmp_path):
    other, expected = changed_plans(plan)[name]
    write_plan(tmp_path / "other.json", other)
    done = run("diff", path, tmp_path / "other.json")
    lines = done.stdout.splitlines()
    if expected is None:
        assert len(lines) == 2
        assert lines[0].startswith('geometry: {"grid": [3, 4, 6]')
    else:
        assert lines[:-1] == expected
    assert lines[-1].startswith(f"{len(lines) - 1} differences; density ")
    assert done.exit_code == (0 if expected == [] else 1)


def test_diff_prints_so_many_lines_and_counts_all(path, plan, tmp_path):
    write_plan(tmp_path / "other.json", changed_plans(plan)["until"][0])
    done = run("diff", path, tmp_path / "other.json", "--limit", 2, "--json", tmp_path / "out.json")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[2:3] == ["... and 4 more"]
    assert lines[3].startswith("6 differences")
    assert len(json.loads((tmp_path / "out.json").read_text())["differences"]) == 6


def test_diff_of_a_missing_file(path, tmp_path):
    done = run("diff", path, tmp_path / "none.json")
    assert done.exit_code == 2
    assert "none.json: got no such file or directory; expected a plan file" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["show"], ["check"], ["diff", "a"], ["show", "a", "--nonsense"], ["sho"]])
def test_wrong_usage(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.output


def test_help_names_the_commands():
    done = run("--help")
    assert done.exit_code == 0
    for command in ("show", "check", "diff"):
        assert command in done.output
        assert run(command, "--help").exit_code == 0
