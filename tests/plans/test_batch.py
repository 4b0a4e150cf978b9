"""Batches of a bundle: what is taken, how it is written, and how rows are cut into calls."""

from __future__ import annotations

import pytest

from svdit.plans.batch import BATCH, Batch, batch_of
from svdit.plans.errors import SvditError


@pytest.mark.parametrize("value", [(1, 2), [1, 2], "1-2", Batch(1, 2)])
def test_a_range(value):
    found = batch_of(value)
    assert found == (1, 2) and str(found) == "1-2" and found.dim == BATCH and found.to_json() == [1, 2]


@pytest.mark.parametrize("value", [2, "2", (2, 2), "2-2"])
def test_one_number(value):
    found = batch_of(value)
    assert found == (2, 2) and str(found) == "2" and found.dim == 2 and found.to_json() == 2
    assert batch_of(found.to_json()) == found


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("two", r'--batch: got "two"; expected a number such as 2, or a range such as 1-2'),
        ("1-2-3", r'--batch: got "1-2-3"; expected a number such as 2'),
        ("-2", r'--batch: got "-2"; expected a number'),
        ("2-1", r"--batch: got 2-1; expected a range from the smaller to the larger number"),
        ("0-2", r"--batch\[0\]: got 0; expected an integer of at least 1"),
        (0, r"--batch: got 0; expected an integer of at least 1"),
        ((1, 2, 3), r"--batch: got 3 entries; expected a list of 2 integers"),
        (True, r"--batch: got true; expected an integer"),
    ],
)
def test_anything_else_is_refused(value, match):
    with pytest.raises(SvditError, match=match):
        batch_of(value, "--batch")


@pytest.mark.parametrize(("batch", "rows", "sizes"), [((1, 2), 5, [2, 2, 1]), ((2, 2), 4, [2, 2]), ((1, 4), 3, [3])])
def test_cut(batch, rows, sizes):
    calls = Batch(*batch).cut(rows)
    assert [call.stop - call.start for call in calls] == sizes
    assert [row for call in calls for row in range(call.start, call.stop)] == list(range(rows))
