"""`svdit-plan report`: the page is parsed, and every number in it is worked out again from plan and state."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from svdit.plans.cli import main
from svdit.plans.cost import cost_model, head_work, read_hardware
from svdit.plans.dynamics import DEFAULT_SPREAD, step_weights
from svdit.plans.flops import flops_of
from svdit.plans.report.map_images import LEVELS, NOT_MEASURED, VEIL_ALPHA, palette
from svdit.plans.schema import read_plan, template, write_plan
from svdit.plans.search_state import write_state
from tests.plans.search_states import GEOMETRY, PROMPTS, STEPS, TILE, hardware_file, paper_plan, search_state, written

VOID = {"meta", "br", "link", "img", "input"}
JUDGED = [
    {"plan": "own", "method": "sparse-vdit", "density": 0.5, "speedup": 1.5, "psnr": [30.0, 28.0]},
    {"plan": "svg-d50.plan.json", "method": "svg", "density": 0.5, "speedup": 1.6, "psnr": 25.5},
    {"plan": "svg-d30", "method": "svg", "density": 0.3, "speedup": 1.9, "psnr": 22.25, "ssim": [0.9]},
    {"plan": "other", "method": None, "density": 0.2, "speedup": 2.0, "psnr": 20.0},
]


class Page(HTMLParser):
    """Elements as (tag, attributes, text of the element, ancestors), and a check that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        self.close()
        assert not self.open, [e["tag"] for e in self.open]

    def handle_starttag(self, tag, attributes):
        found = {"tag": tag, "at": dict(attributes), "text": "", "in": [e["at"].get("id") for e in self.open]}
        self.elements.append(found)
        if tag not in VOID:
            self.open.append(found)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, (tag, self.getpos())
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, inside=None):
        return [e for e in self.elements if e["tag"] == tag and (inside is None or inside in e["in"])]

    def values(self, inside):
        return [float(e["at"]["value"]) for e in self.all("data", inside)]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def state():
    return search_state()


@pytest.fixture(scope="module")
def made(folder, state):
    """(page, text, figures, plan, other plan): a plan with another one beside it and some judged."""
    plan = written(folder, "own", paper_plan(state, 0.5), state)
    other_state = search_state(seed=1, prompts=("another",))
    other = written(folder, "rival", paper_plan(other_state, 0.2, method="svg"), other_state)
    (folder / "judged.json").write_text(json.dumps(JUDGED))
    done = run(
        "report", plan, "--beside", other, "--judged", folder / "judged.json", "-o", folder / "r.html",
        "--json", folder / "r.json", "--hardware", hardware_file(folder),
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder / 'r.html'}: ") and done.stdout.endswith("2 plans, 4 judged\n")
    text = (folder / "r.html").read_text(encoding="utf-8")
    figures = json.loads((folder / "r.json").read_text())
    return Page(text), text, figures, read_plan(plan), (read_plan(other), other_state)


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


def image(uri: str) -> np.ndarray:
    from PIL import Image

    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")).astype(int)


def test_maps_and_the_choice_over_them(made, state):
    """Each cell shows the map of its own head under the mask of its own pattern in that stage."""
    page, _, _, plan, _ = made
    pictures = {e["at"]["id"]: image(e["at"]["href"]) for e in page.all("image")}
    tiling, shades = plan.tiling(), [*palette(), NOT_MEASURED]
    sizes = tiling.sizes / tiling.sizes.sum()
    for layer, head in itertools.product(range(2), range(3)):
        mass = state.maps[layer, head].astype(float)
        times = mass / mass.sum(1, keepdims=True) / sizes
        level = np.clip(np.floor((np.log2(times) + 4) / 8 * LEVELS), 0, LEVELS - 1).astype(int)
        np.testing.assert_array_equal(pictures[f"m{layer}-{head}"][..., :3], np.array(shades)[level])

    cells, place = {}, None
    for e in page.elements:
        if e["tag"] == "title" and (found := re.match(r"layer (\d+), head (\d+): (\S+);", e["text"])):
            place = (int(found[1]), int(found[2]), found[3])
            cells.setdefault(place[:2], []).append({"name": place[2], "uses": []})
        elif e["tag"] == "use" and place and "patterns" not in e["in"]:
            cells[place[:2]][-1]["uses"].append(e["at"]["href"][1:])
    assert len(cells) == 6
    for (layer, head), stages in cells.items():
        assert [c["name"] for c in stages] == [stage.layers[layer][head] for stage in plan.stages]
        for cell in stages:
            assert cell["uses"][0] == f"m{layer}-{head}"
            kept = tiling.mask(plan.pattern(cell["name"]))
            if cell["name"] == "full":
                assert len(cell["uses"]) == 1
            else:
                alpha = pictures[cell["uses"][1]][..., 3]
                np.testing.assert_array_equal(alpha, np.where(kept, VEIL_ALPHA[0], VEIL_ALPHA[-1]))
    crosses = [e for e in page.all("path") if e["at"].get("class") == "dropped"]
    assert len(crosses) == sum(name == "skip" for stage in plan.stages for row in stage.layers for name in row) > 0


def test_unmeasured_rows_are_grey(folder, state):
    maps = state.maps.copy()
    maps[0, 0, 3] = 0
    path = written(folder, "rows", paper_plan(state), replace(state, maps=maps))
    assert run("report", path, "-o", folder / "rows.html").exit_code == 0
    page = Page((folder / "rows.html").read_text())
    found = next(image(e["at"]["href"]) for e in page.all("image") if e["at"]["id"] == "m0-0")
    assert (found[3, :, :3] == NOT_MEASURED).all() and not (found[2, :, :3] == NOT_MEASURED).all(1).any()


def test_a_state_without_maps_shows_masks_and_says_so(folder):
    state = search_state(maps=False)
    path = written(folder, "bare", paper_plan(state), state)
    assert run("report", path, "-o", folder / "bare.html").exit_code == 0
    page = Page((folder / "bare.html").read_text())
    assert not [e for e in page.all("image") if e["at"]["id"].startswith("m")]
    assert "holds no attention maps" in page.all("body")[0]["text"]


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


def test_every_method_has_a_look_of_its_own(folder, state):
    """More methods than there are colours or markers."""
    rows = [{"plan": f"p{i}", "method": f"method {i}", "density": 0.3, "psnr": i} for i in range(12)]
    (folder / "twelve.json").write_text(json.dumps(rows))
    path = written(folder, "twelve", paper_plan(state), state)
    assert run("report", path, "--judged", folder / "twelve.json", "-o", folder / "twelve.html").exit_code == 0
    text = (folder / "twelve.html").read_text()
    points = [e["at"] for e in Page(text).all("path") if "data-y" in e["at"] and "chosen" not in e["at"]["class"]]
    looks = {(at["class"], at["d"]) for at in points}
    assert len(looks) == len(points) == 12
    classes = {at["class"].split()[1] for at in points}
    assert all(f".{name}{{color:var(--{name})}}" in text and text.count(f"--{name}:#") == 2 for name in classes)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] if len(colour) == 7 else [
        int(c, 16) / 15 for c in colour[1:]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_told_from_the_page_in_both_themes(made):
    """WCAG 2.1: 4.5 for text, 3 for lines and markers."""
    themes = re.findall(r":root\{([^}]*)\}", made[1])
    assert len(themes) == 2
    light = dict(re.findall(r"--([\w-]+):(#\w+)", themes[0]))
    for colours in (light, light | dict(re.findall(r"--([\w-]+):(#\w+)", themes[1]))):
        for name, colour in colours.items():
            if name in ("page", "rule", "card", "skip"):
                continue
            high, low = sorted((luminance(colour), luminance(colours["page"])), reverse=True)
            least = 4.5 if name in ("ink", "soft", "accent", "mark") else 2.9 if name == "tiles" else 3.0
            assert (high + 0.05) / (low + 0.05) >= least, (name, colour)


def test_many_heads_stay_a_modest_file(folder):
    """40 layers of 24 heads: each head still has its map and the file stays below a megabyte."""
    big = replace(GEOMETRY, layers=40, heads=24)
    state = search_state(geometry=big)
    path = folder / "big.plan.json"
    write_plan(path, paper_plan(state))
    write_state(folder / "big.search.npz", state)
    assert run("report", path, "-o", folder / "big.html").exit_code == 0
    text = (folder / "big.html").read_text()
    page = Page(text)
    assert len([e for e in page.all("image") if e["at"]["id"].startswith("m")]) == 40 * 24
    assert len(text) < 2**20
    names = {name for stage in read_plan(path).stages for row in stage.layers for name in row}
    page = Page(text)
    assert len(page.all("code", "patterns")) == 20 < len(names)
    assert f"And {len(names) - 20} more that fewer heads use." in page.all("body")[0]["text"]
    order = [text.index(f'id="{name}"') for name in ("errors", "maps", "origin")]
    assert order == sorted(order), "with many heads the tables come first"


def test_prompts_are_in_the_page(made):
    origin = made[0].all("dl")[0]["text"]
    assert all(prompt in origin for prompt in PROMPTS)
    assert "a made-up machine" in origin
