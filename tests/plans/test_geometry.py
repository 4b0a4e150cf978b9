"""Geometry: sizes, JSON form, comparison with another geometry. Wrong fields: tests/plans/malformed.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry

HUNYUAN = Geometry((33, 45, 80), 256, "after", 60, 24, 128)


def test_token_counts():
    assert (HUNYUAN.video_tokens, HUNYUAN.tokens) == (118800, 119056)


def test_json_round_trip():
    assert HUNYUAN.to_json() == {
        "grid": [33, 45, 80],
        "text_tokens": 256,
        "text_position": "after",
        "layers": 60,
        "heads": 24,
        "head_dim": 128,
    }
    assert Geometry.from_json(HUNYUAN.to_json()) == HUNYUAN


def test_errors_carry_the_path():
    with pytest.raises(SvditError, match=r"^here\.layers: got 0; expected an integer of at least 1$"):
        Geometry.from_json({**HUNYUAN.to_json(), "layers": 0}, "here")


def test_a_different_geometry_is_named_field_by_field():
    HUNYUAN.require_same(HUNYUAN, "plan", "the checkpoint")
    other = replace(HUNYUAN, grid=(33, 30, 52), heads=12)
    message = (
        r"^plan: got grid \[33, 45, 80\], heads 24; expected grid \[33, 30, 52\], heads 12; "
        r"that is what the checkpoint has$"
    )
    with pytest.raises(SvditError, match=message):
        HUNYUAN.require_same(other, "plan", "the checkpoint")
