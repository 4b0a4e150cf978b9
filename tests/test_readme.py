"""What README and docs point at exists, and the commands they show are real."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "exporter").rglob("README.md")), *sorted((ROOT / "trt_plugins").rglob("README.md"))]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
SCRIPT = re.compile(r"(?<![\w/.-])(scripts/[\w.]+)")
COMMAND = re.compile(r"\bsvdit-[a-z]+\b")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page):
    targets = [t for t in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in t]
    assert not [t for t in targets if not (page.parent / t).exists()]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_scripts_exist(page):
    named = set(SCRIPT.findall(page.read_text(encoding="utf-8")))
    assert not {n for n in named if not (ROOT / n).exists()}


@pytest.mark.parametrize("page", [ROOT / "README.md"], ids=ids)
def test_named_commands_are_installed(page):
    listed = set(re.findall(r"^(svdit-[a-z]+) =", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = set(COMMAND.findall(page.read_text(encoding="utf-8")))
    assert named and named <= listed


def test_readme_shows_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "scripts/demo.sh" in text and "scripts/test.sh" in text
