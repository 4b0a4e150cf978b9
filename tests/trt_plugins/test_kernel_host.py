"""The kernel library's host side, without a GPU: checks and their messages, and the kernel's index arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.trt_plugins import cuda_library
from tests.trt_plugins.kernel_cases import FULL, SKIP, random_case

PATH = cuda_library.find()
pytestmark = pytest.mark.skipif(PATH is None, reason="no libsvdit_kernels.so; build it with CMake")


@pytest.fixture(scope="module")
def library():
    return cuda_library.open_library(PATH)


def problem_of(case):
    attributes = cuda_library.Attributes(case.dtype, case.shape, case.scale, case.text_tokens, case.text_first)
    return cuda_library.problem_of(attributes, {name: x.shape for name, x in case.tables.items()})


@pytest.mark.parametrize("seed", range(60))
def test_blocks_cover_exactly_the_kept_keys(library, seed):
    case = random_case(seed)
    problem, tables = problem_of(case), case.tables
    library.check_tables(problem, tables)
    offsets = tables["tile_offsets"]
    for batch in range(case.shape[0]):
        masks = [case.mask(batch, head) for head in range(case.shape[2])]
        for item, code in enumerate(tables["work_order"][case.stage]):
            blocks = library.item_blocks(problem, tables, case.stage, int(tables["text_len"][batch]), item)
            if code < 0:
                assert len(blocks) == 0
                continue
            head, query = code >> 16, code & 0xFFFF
            pattern = tables["head_pattern"][case.stage, head]
            row = query * 128 if pattern == FULL else offsets[query]
            visited = np.zeros(case.shape[1], dtype=int)
            for start, length in blocks:
                assert 1 <= length <= 128
                visited[start : start + length] += 1
            assert visited.max(initial=0) <= 1
            assert (visited.astype(bool) == masks[head][row]).all(), (seed, item)
            short = [i for i, (start, n) in enumerate(blocks) if n < 128]
            for i in short:  # a block is short only where its run of rows ends
                start, n = blocks[i]
                assert start + n == case.shape[1] or not masks[head][row][start + n]


def test_item_blocks_refuses_an_item_out_of_range(library):
    case = random_case(1)
    with pytest.raises(SvditError, match="stage, item: got 0, 100000"):
        library.item_blocks(problem_of(case), case.tables, 0, 0, 100000)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", 0, r"dtype: got 0; expected 1 \(float16\) or 2 \(bfloat16\)"),
        ("head_dim", 96, "head_dim: got 96; expected 64 or 128; pad the heads"),
        ("scale", 0.0, "scale: got 0; expected a positive finite number"),
        ("scale", float("nan"), "scale: got nan"),
        ("scale", float("inf"), "scale: got inf"),
        ("batch", 0, "batch: got 0; expected 1..65535"),
        ("tokens", 0, "tokens: got 0"),
        ("heads", 40000, "heads: got 40000; expected 1..32767"),
        ("text_tokens", -1, "text_tokens: got -1"),
        ("text_first", 2, "text_first: got 2; expected 0..1"),
        ("num_tiles", 70000, "num_tiles: got 70000; expected 1..65536"),
        ("num_patterns", 1, "num_patterns: got 1"),
        ("num_stages", 0, "num_stages: got 0"),
        ("num_items", 0, "num_items: got 0"),
        ("num_entries", 0, "num_entries: got 0"),
    ],
)
def test_a_bad_problem_is_named(library, field, value, message):
    problem = problem_of(random_case(3))
    library.check_problem(problem)
    setattr(problem, field, value)
    with pytest.raises(SvditError, match=message):
        library.check_problem(problem)


def test_types_without_a_kernel_are_refused_before_the_library():
    case = random_case(3)
    attributes = cuda_library.Attributes("float32", case.shape, case.scale, 0, False)
    with pytest.raises(SvditError, match="Q: got float32; expected float16 or bfloat16"):
        cuda_library.problem_of(attributes, {})


def listed_case():
    """A case with a listed head of several entries, so that every table has something to spoil."""
    for seed in range(100):
        case = random_case(seed)
        patterns = case.tables["head_pattern"][0]
        if case.text_tokens and (patterns > SKIP).any() and len(case.tables["tile_index"]) > 20:
            return case
    raise AssertionError("no such seed")


def spoil(name, position, value):
    def change(tables):
        tables[name].reshape(-1)[position] = value

    return change


def duplicate_item(tables):
    tables["work_order"][0, 1] = tables["work_order"][0, 0]


def drop_item(tables):
    row = tables["work_order"][0]
    count = int((row >= 0).sum())
    row[count - 1] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("tile_offsets", 0, 1), r"tile_offsets: got 1\.\."),
        (spoil("tile_offsets", 1, 0), r"tile_offsets\[0\]: got a tile of 0 tokens; expected 1\.\.128"),
        (spoil("row_offsets", 3, -1), r"row_offsets\[0, 2\]"),
        (spoil("tile_index", 0, 30000), r"tile_index\[0\]: got tile 30000; expected ascending tiles"),
        (spoil("head_pattern", 0, 99), r"head_pattern\[0, 0\]: got 99"),
        (spoil("work_order", 0, 99 << 16), r"work_order\[0, 0\]: got \d+; expected \(head << 16\)"),
        (spoil("work_order", 0, -1), r"work_order\[0, 1\]: .* or -1 at the end only"),
        (duplicate_item, r"work_order\[0, 1\]: got item \d+ twice"),
        (drop_item, r"work_order\[0\]: got \d+ items; expected \d+"),
        (spoil("stage", 0, 9), r"stage: got 9; expected 0\.\."),
        (spoil("text_len", 0, 5000), r"text_len\[0\]: got 5000; expected 0\.\."),
    ],
)
def test_a_spoiled_table_is_named(library, change, message):
    case = listed_case()
    tables = {name: table.copy() for name, table in case.tables.items()}
    library.check_tables(problem_of(case), tables)
    change(tables)
    with pytest.raises(SvditError, match=message):
        library.check_tables(problem_of(case), tables)


def test_a_tile_across_text_and_video_is_refused(library):
    case = listed_case()
    problem = problem_of(case)
    problem.text_tokens -= 1 if case.text_tokens > 1 else -1
    problem.text_first = 1 - problem.text_first if problem.text_tokens == 0 else problem.text_first
    tables = {name: table for name, table in case.tables.items() if name not in ("stage", "text_len")}
    with pytest.raises(SvditError, match="tile across token"):
        library.check_tables(problem, tables)


def test_a_missing_table_is_named(library):
    case = random_case(1)
    tables = {name: x for name, x in case.tables.items() if name != "row_offsets"}
    with pytest.raises(SvditError, match="tables: got a null pointer"):
        library.check_tables(problem_of(case), tables)


def test_a_table_of_another_type_is_refused(library):
    case = random_case(1)
    tables = dict(case.tables, tile_index=case.tables["tile_index"].astype(np.int64))
    with pytest.raises(SvditError, match="tile_index: got int64"):
        library.check_tables(problem_of(case), tables)
