"""Messages have four parts in one order, and keep it when a path is put before them."""

from __future__ import annotations

import pytest

from svdit.plans.errors import SvditError, complain, rooted


def test_four_parts_in_order():
    error = complain("head_dim", 96, "64 or 128", "pad to 128")
    assert str(error) == "head_dim: got 96; expected 64 or 128; pad to 128"
    assert str(complain("head_dim", 96, "64 or 128")) == "head_dim: got 96; expected 64 or 128"
    assert isinstance(error, ValueError)


def test_a_path_goes_before_the_subject():
    with pytest.raises(SvditError) as caught, rooted("plan.json: "), rooted("$."):
        raise complain("tile", 1, "2", "3")
    assert str(caught.value) == "plan.json: $.tile: got 1; expected 2; 3"
    assert caught.value.__suppress_context__


def test_errors_without_parts_keep_their_text():
    with pytest.raises(SvditError, match=r"^plan.json: no way$"), rooted("plan.json: "):
        raise SvditError("no way")


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), rooted("plan.json: "):
        raise KeyError("x")
