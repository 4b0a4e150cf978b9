"""`svdit-plan report`: the page is parsed, and every number in it is worked out again from plan and state."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from svdit.plans.cost import cost_model, head_work, read_hardware
from svdit.plans.dynamics import DEFAULT_SPREAD, step_weights
from svdit.plans.flops import flops_of
from svdit.plans.schema import read_plan, template
from tests.plans.report.conftest import Page, run
from tests.plans.search_states import GEOMETRY, PROMPTS, STEPS, TILE, hardware_file, paper_plan, search_state, written


def facts(plan, state, spread=DEFAULT_SPREAD):
    """What a plan keeps, loses and costs, written out: by stage, and by (stage, layer, head)."""
    with tempfile.TemporaryDirectory() as folder:
        cost = cost_model(read_hardware(hardware_file(Path(folder))), "tiny", GEOMETRY)
    weights = step_weights(np.linspace(0, 1, STEPS + 1), np.linspace(1, 0, STEPS + 1), spread)
    data, tiling, heads, stages = state.measurement(), plan.tiling(), {}, []
    begin = 0
    for i, stage in enumerate(plan.stages):
        end = round(stage.until * STEPS)
        for layer, head in itertools.product(range(2), range(3)):
            pattern = plan.pattern(stage.layers[layer][head])
            density = tiling.density(tiling.mask(pattern))
            relative = np.zeros(end - begin)
            if pattern.kind != "full":
                mode = [data.pattern(m, layer, head) for m in range(4)].index(pattern)
                relative = data.error[begin:end, layer, head, mode] / data.power[begin:end, layer].mean(-1)
            error = float((relative * weights[begin:end]).sum() / weights.sum() / 6)
            ms = float(cost.heads_ms(head_work(tiling, [tiling.mask(pattern)]))[0])
            heads[i, layer, head] = {"density": density, "relative": relative.mean(), "error": error, "ms": ms}
        own = [heads[(i, *place)] for place in itertools.product(range(2), range(3))]
        stages.append(
            {
                "steps": end - begin,
                "density": np.mean([h["density"] for h in own]),
                "ms": cost.fixed_ms + sum(h["ms"] for h in own),
                "error": sum(h["error"] for h in own),
            }
        )
        begin = end
    latency = sum(s["ms"] * s["steps"] for s in stages) / STEPS
    error = sum(s["error"] for s in stages)
    density = sum(s["density"] * s["steps"] for s in stages) / STEPS
    return {"cost": cost, "stages": stages, "heads": heads, "ms": latency, "error": error, "density": density}


def close(values, expected):
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-12)


def test_headline_figures(made, state):
    page, _, figures, plan, _ = made
    truth = facts(plan, state)
    dense = truth["cost"].dense_ms
    close(page.values("speedup"), [dense / truth["ms"], truth["ms"], dense])
    close(page.values("density"), [truth["density"], flops_of(plan, truth["density"]).ratio])
    close(page.values("error"), [truth["error"]])
    best = figures["least_error_at_this_cost"]
    assert 0 < best <= truth["error"] * (1 + 1e-9)
    close(page.values("headroom"), [10 * math.log10(truth["error"] / best), best])
    close(page.values("psnr"), [29.0, 28.0, 1.5])
    assert figures["predicted"]["speedup"] == pytest.approx(dense / truth["ms"])
    assert figures["density"] == pytest.approx(plan.provenance["density"], rel=1e-5)


def test_stages(made, state):
    page, _, _, plan, _ = made
    truth = facts(plan, state)
    dense, total = truth["cost"].dense_ms, sum(s["ms"] * s["steps"] for s in truth["stages"])
    expected = []
    for stage in truth["stages"]:
        shares = stage["ms"] * stage["steps"] / total, stage["error"] / truth["error"]
        expected += [stage["density"], stage["ms"], dense / stage["ms"], *shares]
    close(page.values("stages"), [*expected, truth["density"], truth["ms"], dense / truth["ms"]])
    assert len(plan.stages) == 2
    mixes = [e["at"]["aria-label"] for e in page.all("div", "stages") if e["at"]["class"] == "mix"]
    for stage, mix in zip(plan.stages, mixes, strict=True):
        counted = {kind: int(count) for count, kind in (part.split() for part in mix.split(", "))}
        kinds = [plan.pattern(name).kind for row in stage.layers for name in row]
        assert counted == {kind: kinds.count(kind) for kind in set(kinds)}


def test_heads_with_the_largest_error(made, state):
    page, _, _, plan, _ = made
    truth = facts(plan, state)
    lossy = [place for place, head in truth["heads"].items() if head["error"]]
    worst = sorted(lossy, key=lambda place: -truth["heads"][place]["error"])
    cells = [e["text"] for e in page.all("td", "largest")]
    rows = [cells[i : i + 7] for i in range(0, len(cells), 7)]
    assert [(int(r[0]), *map(int, r[1].split(", "))) for r in rows] == worst[:12] and rows
    full = truth["cost"].item_ms + truth["cost"].pair_ms
    expected = []
    for place in worst[:12]:
        h, share = truth["heads"][place], truth["stages"][place[0]]["steps"] / STEPS
        expected += [h["density"], h["relative"], h["error"] / truth["error"], (full - h["ms"]) * share]
    close(page.values("largest"), expected)
    assert [r[2] for r in rows] == [plan.stages[i].layers[layer][head] for i, layer, head in worst[:12]]


def test_patterns_in_use(made):
    page, _, _, plan, _ = made
    names = [name for stage in plan.stages for row in stage.layers for name in row]
    listed = [e["text"] for e in page.all("code", "patterns")]
    assert sorted(listed) == sorted(set(names))
    tiling = plan.tiling()
    expected = [x for n in listed for x in (tiling.density(tiling.mask(plan.pattern(n))), names.count(n))]
    close(page.values("patterns"), expected)


def test_plans_on_the_curves(made, state):
    page, _, _, plan, (other, other_state) = made
    own, rival = facts(plan, state), facts(other, other_state)
    expected = [own["density"], own["cost"].dense_ms / own["ms"], own["error"], 1.5, 29.0, 28.0]
    expected += [rival["density"], rival["cost"].dense_ms / rival["ms"], rival["error"]]
    expected += [0.2, 2.0, 20.0, 20.0, 0.5, 1.6, 25.5, 25.5, 0.3, 1.9, 22.25, 22.25]
    section = [e for e in page.all("data") if "all-plans" in e["in"]]
    close([float(e["at"]["value"]) for e in section], expected)
    tags = [e["text"] for e in page.all("span", "all-plans")]
    assert tags == ["other prompts"]

    points = [(e["at"]["class"].split()[1], float(e["at"]["data-x"]), float(e["at"]["data-y"]))
              for e in page.all("path") if "data-x" in e["at"]]
    chosen = [p[1:] for p in points if p[0] == "chosen"]
    close(chosen, [[own["cost"].dense_ms / own["ms"], -10 * math.log10(own["error"])], [1.5, 29.0]])
    rivals = [p[1:] for p in points if p[0] == "s1"]
    close(rivals[0], [rival["cost"].dense_ms / rival["ms"], -10 * math.log10(rival["error"])])
    close(sorted(rivals[1:]), [[1.6, 25.5], [1.9, 22.25]])


def test_bars_of_the_steps(made, state):
    page, _, _, plan, _ = made
    truth, weights = facts(plan, state), step_weights(np.linspace(0, 1, STEPS + 1), np.linspace(1, 0, STEPS + 1))
    data, by_step = state.measurement(), []
    for step in range(STEPS):
        stage = plan.stages[plan.stage_of(step, STEPS)]
        total = 0.0
        for layer, head in itertools.product(range(2), range(3)):
            pattern = plan.pattern(stage.layers[layer][head])
            if pattern.kind != "full":
                mode = [data.pattern(m, layer, head) for m in range(4)].index(pattern)
                total += data.error[step, layer, head, mode] / data.power[step, layer].mean()
        by_step.append(weights[step] * total)
    titles = [e["text"] for e in page.all("title") if e["text"].startswith("step ")]
    times = [float(t.split(": ")[1].split()[0]) for t in titles if "of dense" in t]
    errors = [float(t.split(": ")[1].split()[0]) for t in titles if "%" in t]
    stage_of = [plan.stage_of(step, STEPS) for step in range(STEPS)]
    np.testing.assert_allclose(
        times, [truth["stages"][i]["ms"] / truth["cost"].dense_ms for i in stage_of], rtol=6e-3
    )
    np.testing.assert_allclose(errors, 100 * np.array(by_step) / sum(by_step), rtol=6e-3, atol=1e-9)


def tags(page):
    return [(e["at"]["class"], e["text"]) for e in page.all("span") if e["at"].get("class", "").startswith("tag")]


def test_predicted_times_are_marked_by_what_they_rest_on(made, folder):
    """The shipped table knows nothing of this size: all times are estimates. With rows of it, they are not."""
    page = made[0]
    assert tags(page).count(("tag est", "estimate")) == 3  # headline, curve, stages
    assert "from measured times" not in page.all("body")[0]["text"]
    rows = [
        {"case": "c", "batch": 1, "tokens": 72, "heads": 3, "head_dim": 64, "density": d, "latency_ms": 0.1 + d}
        for d in (0.1, 0.5, 1.0, 0.7)
    ]
    table = {"format": "svdit-hardware", "version": 1, "gpu": "G <1>", "status": "measured", "how": "h",
             "attention": rows, "rest": [{"model": "tiny", "tokens": 72, "rest_ms": 2.0}]}
    (folder / "g.json").write_text(json.dumps(table))
    done = run("report", folder / "own.plan.json", "--hardware", folder / "g.json", "-o", folder / "g.html")
    assert done.exit_code == 0, done.stderr
    page = Page((folder / "g.html").read_text())
    assert not [t for t in tags(page) if t[0] == "tag est"]
    assert tags(page).count(("tag", "from measured times")) == 3
    assert "on G <1>:" in next(e["text"] for e in page.all("div") if e["at"].get("id") == "speedup")


NASTY = "</title><script>alert('x')</script>\"'&amp;<img src=x onerror=alert(1)>"


def test_text_of_users_is_escaped(folder):
    state = search_state(prompts=(NASTY, "</style>"))
    plan = paper_plan(state, 0.5, method=NASTY, target={NASTY: NASTY}, note=[NASTY])
    path = written(folder, "nasty", plan, state)
    renamed = path.with_name("<b>'&.plan.json")
    os.replace(path, renamed)
    (folder / "nasty.json").write_text(json.dumps([{"plan": NASTY, "method": NASTY, "density": 0.1, "psnr": 3}]))
    done = run("report", renamed, "--state", folder / "nasty.search.npz", "--judged", folder / "nasty.json",
               "-o", folder / "nasty.html")
    assert done.exit_code == 0, done.output
    page = Page((folder / "nasty.html").read_text(encoding="utf-8"))
    found = {e["tag"] for e in page.elements}
    assert not found & {"script", "img", "b'"} and not [k for e in page.elements for k in e["at"] if k.startswith("on")]
    assert page.all("h1")[0]["text"] == "<b>'&"
    assert page.all("title")[0]["text"] == "<b>'&: search report"
    origin = page.all("dl")[0]["text"]
    assert NASTY in origin and "</style>" in origin


def test_nothing_is_fetched(made):
    page, text = made[:2]
    assert not {e["tag"] for e in page.elements} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for element in page.elements:
        for name, value in element["at"].items():
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), (name, value[:60])
    assert "@import" not in text and "//" not in re.sub(r"base64,[\w+/=]+", "", text)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {"#clip-predicted", "#clip-measured"}
    ids = [e["at"]["id"] for e in page.elements if "id" in e["at"]]
    assert len(ids) == len(set(ids))
    targets = {e["at"]["href"][1:] for e in page.elements if e["at"].get("href", "").startswith("#")}
    assert targets <= set(ids)


def test_the_same_input_gives_the_same_bytes(made, folder):
    """In other processes, whose sets have other orders."""
    for seed in ("1", "2"):
        arguments = ["report", "own.plan.json", "--beside", "rival.plan.json"]
        arguments += ["--judged", "judged.json", "--hardware", "gpu.json"]
        code = f"from svdit.plans.cli import main; main({[*arguments, '-o', 'again.html']!r})"
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert (folder / "again.html").read_text(encoding="utf-8") == made[1]


def test_measured_weights_count_for_every_plan_on_the_curve(folder, state):
    """Of the state of the first plan; a plan chosen with those of the schedule keeps these."""
    weights = np.random.default_rng(5).random((STEPS, 2, 3)) ** 2
    state = replace(state, sensitivity=weights)
    path = written(folder, "felt", paper_plan(state), state)
    other = written(folder, "unfelt", paper_plan(state, 0.2), search_state())
    done = run("report", path, "--beside", other, "-o", folder / "felt.html")
    assert done.exit_code == 0, done.output
    page, expected = Page((folder / "felt.html").read_text()), []
    for plan in (read_plan(path), read_plan(other)):
        data, total = state.measurement(), 0.0
        for step, layer, head in itertools.product(range(STEPS), range(2), range(3)):
            pattern = plan.pattern(plan.stages[plan.stage_of(step, STEPS)].layers[layer][head])
            if pattern.kind != "full":
                mode = [data.pattern(m, layer, head) for m in range(4)].index(pattern)
                share = data.error[step, layer, head, mode] / data.power[step, layer].mean()
                total += share * weights[step, layer, head] / weights.sum()
        expected.append(total)
    close(page.values("error"), expected[0])
    close([page.values("all-plans")[i] for i in (2, 5)], expected)
    path = written(folder, "scheduled", paper_plan(state, weights="schedule", spread=4.0), state)
    assert run("report", path, "-o", folder / "felt.html", "--json", folder / "felt.json").exit_code == 0
    found = json.loads((folder / "felt.json").read_text())["attention_error"]
    assert found == pytest.approx(facts(read_plan(path), state, spread=4.0)["error"])


def test_coherent_steps_are_combined_on_the_whole_page(folder, state):
    """Of a state that measured it: the error of every plan, and what the page says about its curve."""
    sides = np.random.default_rng(2).random((2, STEPS, 3))
    coherence = sides @ sides.transpose(0, 2, 1)
    state = replace(state, sensitivity=np.random.default_rng(5).random((STEPS, 2, 3)), coherence=coherence)
    path = written(folder, "coherent", paper_plan(state, 0.5), state)
    done = run("report", path, "-o", folder / "coherent.html", "--json", folder / "coherent.json")
    assert done.exit_code == 0, done.output
    plan, data, by_step = read_plan(path), state.measurement(), np.zeros(STEPS)
    for step, layer, head in itertools.product(range(STEPS), range(2), range(3)):
        pattern = plan.pattern(plan.stages[plan.stage_of(step, STEPS)].layers[layer][head])
        if pattern.kind != "full":
            mode = [data.pattern(m, layer, head) for m in range(4)].index(pattern)
            share = data.error[step, layer, head, mode] / data.power[step, layer].mean()
            by_step[step] += share * state.sensitivity[step, layer, head] / state.sensitivity.sum()
    truth = float(np.prod((coherence * np.sqrt(np.outer(by_step, by_step))).sum((1, 2))) ** 0.5)
    figures = json.loads((folder / "coherent.json").read_text())
    assert figures["attention_error"] == pytest.approx(truth, rel=1e-5)
    assert figures["least_error_at_this_cost"] <= truth * (1 + 1e-9)
    assert sum(stage["error_share"] for stage in figures["stages"]) == pytest.approx(1)
    text = (folder / "coherent.html").read_text(encoding="utf-8")
    assert "local minima" in text and "steps weighted and combined" in text


def test_a_dense_plan_has_no_error_to_show(folder, state):
    path = written(folder, "dense", template("tiny", GEOMETRY, TILE), state)
    done = run("report", path, "-o", folder / "dense.html", "--json", folder / "dense.json")
    assert done.exit_code == 0, done.output
    figures = json.loads((folder / "dense.json").read_text())
    assert (figures["attention_error"], figures["density"], figures["largest_errors"]) == (0.0, 1.0, [])
    assert "the plan is dense" in Page((folder / "dense.html").read_text()).all("body")[0]["text"]


def test_prompts_are_in_the_page(made):
    origin = made[0].all("dl")[0]["text"]
    assert all(prompt in origin for prompt in PROMPTS)
    assert "a made-up machine" in origin
