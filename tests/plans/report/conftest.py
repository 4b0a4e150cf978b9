"""A report made once, and the parser that reads it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from svdit.plans.cli import main
from svdit.plans.schema import read_plan
from tests.plans.search_states import hardware_file, paper_plan, search_state, written

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
