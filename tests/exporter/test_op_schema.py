"""The operator's one table against what is made from it and against its documentation."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from svdit.exporter.attention import attributes
from svdit.exporter.op_schema import ATTRIBUTES, DOMAIN, INPUTS, OP_TYPE, OP_VERSION, OUTPUTS, register_schema
from tests.cases import CASES


@pytest.fixture(scope="module")
def schema():
    register_schema()
    register_schema()
    return onnx.defs.get_schema(OP_TYPE, OP_VERSION, DOMAIN)


def test_schema_has_every_entry(schema):
    assert [p.name for p in schema.inputs] == [p.name for p in INPUTS]
    assert [p.name for p in schema.outputs] == [p.name for p in OUTPUTS]
    assert {name: a.required for name, a in schema.attributes.items()} == {
        a.name: a.default is None for a in ATTRIBUTES
    }


def test_nodes_carry_exactly_the_attributes_of_the_table():
    made = attributes(CASES[0].tables, 0.125)
    assert list(made) == [a.name for a in ATTRIBUTES]
    for attribute in ATTRIBUTES:
        kind = onnx.helper.make_attribute(attribute.name, made[attribute.name]).type
        assert onnx.AttributeProto.AttributeType.Name(kind) == attribute.kind


def test_documentation_names_every_entry():
    text = (Path(__file__).parents[2] / "docs" / "op.md").read_text()
    missing = [x.name for x in (*INPUTS, *OUTPUTS, *ATTRIBUTES) if f"`{x.name}`" not in text]
    assert not missing
