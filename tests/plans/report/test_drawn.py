"""What `svdit-plan report` draws: maps with the choice over them, looks of methods, colours; and how large it grows."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from dataclasses import replace

import numpy as np

from svdit.plans.report.map_images import LEVELS, NOT_MEASURED, VEIL_ALPHA, palette
from svdit.plans.schema import read_plan, write_plan
from svdit.plans.search_state import write_state
from tests.plans.report.conftest import Page, run
from tests.plans.search_states import GEOMETRY, paper_plan, search_state, written


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
