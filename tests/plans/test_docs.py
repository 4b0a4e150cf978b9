"""The worked examples and tables of docs/plan.md and docs/op.md are what the code does."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from svdit.plans.flops import MATRIX_WEIGHTS
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import KINDS, Diagonal, MultiDiagonal, pattern_from_json
from svdit.plans.schema import Plan, Stage
from svdit.plans.tables import tables_of

DOCS = Path(__file__).parents[2] / "docs"
PLAN_MD = (DOCS / "plan.md").read_text(encoding="utf-8")
OP_MD = (DOCS / "op.md").read_text(encoding="utf-8")


def test_tables_of_the_example_in_op_md():
    patterns = {"own": Diagonal(), "two": MultiDiagonal(stride=2)}
    stage = Stage(1.0, (("skip", "own", "two", "full"),))
    tables = tables_of(Plan("x", Geometry((4, 6, 6), 0, "none", 1, 4, 64), (1, 8, 16), patterns, (stage,)))
    block = re.search(r"```\n(tile_offsets.*?)```", OP_MD, re.DOTALL).group(1)
    stated = dict(re.split(r"\s+= ", line, maxsplit=1) for line in block.strip().splitlines())
    assert tuple(stated["patterns"].split(", ")) == tables.pattern_names
    for name in ("tile_offsets", "row_offsets", "tile_index"):
        assert json.loads(stated[name]) == getattr(tables, name).tolist()
    assert json.loads(stated["head_pattern"]) == tables.head_pattern[0].tolist()
    items = []
    for part in stated["work_order"].split(" | "):
        head = re.match(r"head (\d): \w+ (.*)", part)
        if head:
            items += [(int(head[1]) << 16) | int(tile) for tile in head[2].split()]
        else:
            items += [int(item) for item in part.split()]
    assert items == tables.work_order[0][0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_pattern_table_lists_the_keys_of_every_kind(kind):
    row = next(line for line in PLAN_MD.splitlines() if line.startswith(f"| `{kind}` |"))
    listed = re.findall(r"`(\w+)`", row.replace("\\|", "").split("|")[3])
    assert listed == [field.name for field in fields(KINDS[kind])]


def test_every_pattern_in_plan_md_is_a_pattern():
    found = re.findall(r'\{"kind":[^{}]*\}', PLAN_MD)
    literal = [text for text in found if not re.search(r": (n|\(|\[c|\[\[0, nH)", text)]
    assert len(found) >= 6
    assert len(literal) >= 3
    for text in literal:
        pattern_from_json(json.loads(text))


def test_stated_flop_weights():
    for model, weights in MATRIX_WEIGHTS.items():
        row = next(line for line in PLAN_MD.splitlines() if line.startswith("| ") and f"`{model}`" in line)
        assert float(row.split("|")[2]) == weights
