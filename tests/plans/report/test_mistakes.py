"""`svdit-plan report` refuses what it cannot show, with the field, and leaves no file behind."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from svdit.plans.cli import main
from svdit.plans.schema import Stage
from svdit.plans.search_state import write_state
from tests.plans.search_states import paper_plan, search_state, written


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def state():
    return search_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    """Holds own.plan.json and its state."""
    folder = tmp_path_factory.mktemp("mistakes")
    written(folder, "own", paper_plan(state, 0.5), state)
    return folder


def unfinished(folder, state):
    write_state(folder / "part.search.npz", replace(state, done=3))
    return ["--state", folder / "part.search.npz"], "search state: got 3 of 6 steps measured; expected a"


def of_another_tile(folder, state):
    write_state(folder / "tile.search.npz", replace(state, settings={**state.settings, "tile": [1, 4, 4]}))
    return ["--state", folder / "tile.search.npz"], r"own.plan.json: \$.tile: got \[1, 2, 2\]; expected \[1, 4, 4\]"


def without_patterns(folder, state):
    write_state(folder / "few.search.npz", search_state(seed=2))
    row = ("full", "wide", "full")
    plan = {"wide": {"kind": "diagonal", "frames": 2}}
    path = folder / "wide.plan.json"
    text = json.loads((folder / "own.plan.json").read_text())
    text["patterns"] |= plan
    text["stages"][0]["layers"][0] = list(row)
    path.write_text(json.dumps(text))
    return ["--beside", path], r'wide: \$.stages\[0\].layers\[0\]\[1\]: got the pattern "wide"; expected a pattern that'


def with_maps_of_another_grid(folder, state):
    write_state(folder / "maps.search.npz", replace(state, maps=np.zeros((2, 3, 5, 5))))
    return ["--state", folder / "maps.search.npz"], r"maps: got shape \(2, 3, 5, 5\); expected 17 x 17 bins"


def judged(rows, message):
    def case(folder, state):
        (folder / "bad.json").write_text(json.dumps(rows))
        return ["--judged", folder / "bad.json"], message

    return case


MISTAKES = {
    "no state": lambda f, s: (["--state", f / "none.npz"], r"none.npz: got no file; expected a search state"),
    "unfinished": unfinished,
    "another tile": of_another_tile,
    "pattern not measured": without_patterns,
    "maps of another grid": with_maps_of_another_grid,
    "no such table": lambda f, s: (["--hardware", "none"], r"--hardware: got 'none'; expected cpu, h100 or a file"),
    "a place that is none": lambda f, s: (["-o", f / "none" / "r.html"], r"r.html: got no such file or directory"),
    "judged: no list": judged({"a": 1}, r"bad.json: \$: got {\"a\": 1}; expected a list of judged plans"),
    "judged: empty": judged([], r"bad.json: \$: got an empty list; expected at least one judged plan"),
    "judged: no object": judged([1], r"bad.json: \$\[0\]: got 1; expected an object with plan, psnr"),
    "judged: no psnr": judged([{"plan": "a"}], r"\$\[0\].psnr: got nothing; expected a value"),
    "judged: no values": judged([{"plan": "a", "psnr": []}], r"\$\[0\].psnr: got an empty list; expected one number"),
    "judged: words": judged([{"plan": "a", "psnr": "good"}], r"\$\[0\].psnr: got \"good\"; expected decibels"),
    "judged: no place": judged({"plans": [{"plan": "a", "psnr": 3}]}, r"\$.plans\[0\].density: got nothing, and no"),
    "judged: density": judged([{"plan": "a", "psnr": 3, "density": 2}], r"\$\[0\].density: got 2.0; expected a share"),
    "judged: speed": judged([{"plan": "a", "psnr": 3, "speedup": 0}], r"\$\[0\].speedup: got 0.0; expected a number"),
    "judged: two axes": judged(
        [{"plan": "a", "psnr": 3, "speedup": 1}, {"plan": "b", "psnr": 3, "density": 1}], "judged plans: got some with"
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_nothing_behind(case, folder, state):
    options, message = MISTAKES[case](folder, state)
    before = sorted(os.listdir(folder))
    if "-o" not in options:
        options = [*options, "-o", folder / "wrong.html"]
    done = run("report", folder / "own.plan.json", *options, "--json", folder / "wrong.json")
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("error: ") and done.stdout == ""
    assert sorted(os.listdir(folder)) == before


def test_weights_that_the_state_does_not_have(folder, state):
    path = written(folder, "weighted", paper_plan(state, weights="measured"), state)
    done = run("report", path, "-o", folder / "wrong.html")
    assert done.exit_code == 2 and "search state: got no measured weights; expected those that" in done.stderr
    path = written(folder, "spread", paper_plan(state, spread="wide"), state)
    done = run("report", path, "-o", folder / "wrong.html")
    assert done.exit_code == 2 and '$.provenance.spread: got "wide"; expected a finite number' in done.stderr
    assert not (folder / "wrong.html").exists()


def test_other_models_and_step_counts_do_not_go_beside(folder, state):
    short = replace(state, done=3, error=state.error[:3], power=state.power[:3],
                    scheduler={"scheduler/sigmas|tensor": np.linspace(1, 0, 4)})
    path = written(folder, "short", replace(paper_plan(state), stages=(Stage(1.0, (("full",) * 3,) * 2),)), short)
    done = run("report", folder / "own.plan.json", "--beside", path, "-o", folder / "wrong.html")
    assert done.exit_code == 2 and "short: steps: got 3; expected 6" in done.stderr
    other = replace(state, settings={**state.settings, "model": "wan2.1"})
    path = written(folder, "wan", replace(paper_plan(state), model="wan2.1"), other)
    done = run("report", folder / "own.plan.json", "--beside", path, "-o", folder / "wrong.html")
    assert done.exit_code == 2 and "wan: model: got wan2.1; expected tiny" in done.stderr
    assert not (folder / "wrong.html").exists()
