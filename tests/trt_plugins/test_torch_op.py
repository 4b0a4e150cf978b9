"""The torch operator against token-level brute force in float64, on every golden case."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdit.plans.errors import SvditError
from svdit.trt_plugins import reference, torch_op
from tests.cases import BY_NAME, CASES, Case, op_attributes, op_inputs, rounded
from tests.reference import expected, expected_of
from tests.tolerance import check_attention


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    torch_op.load()
    torch_op.load()  # a second call must be harmless


def call(case: Case, dtype: torch.dtype = torch.float32, **changed):
    """Run the operator on a case, with some inputs replaced."""
    arguments = {name: torch.from_numpy(x) for name, x in op_inputs(case, str(dtype).split(".")[-1]).items()}
    arguments.update({name: arguments[name].to(dtype) for name in "qkv"})
    attributes = op_attributes(case)
    arguments.update({name: attributes[name] for name in ("scale", "text_tokens", "text_first")})
    return torch.ops.svdit.sparse_attention(**{**arguments, **changed})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_case_in_float32(case):
    out = call(case)
    assert out.is_contiguous()
    assert out.dtype == torch.float32
    check_attention(out.numpy(), expected(case), "float32", case)


LOW = ["pattern-all-text-after", "tile-border-d128", "text-before-130-len-130-64", "nothing-kept-text-after-len-4-0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", LOW)
def test_golden_case_in_16_bits(name, dtype):
    case, word = BY_NAME[name], str(dtype).split(".")[-1]
    out = call(case, dtype)
    assert out.dtype == dtype
    truth = expected_of(case, *case.qkv(word))
    check_attention(out.float().numpy(), truth, word, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_results_are_the_truth_rounded_once(dtype):
    """Accumulation is float32, so nearly every element is the nearest 16-bit number to the truth."""
    case, word = BY_NAME["tile-border-d128"], str(dtype).split(".")[-1]
    truth = rounded(expected_of(case, *case.qkv(word)).astype(np.float32), word)
    assert (call(case, dtype).float().numpy() != truth).mean() < 0.005


def test_rows_listed_under_full_and_skip_are_not_read():
    """Ids 0 and 1 mean full and skip whatever their lists say."""
    case = BY_NAME["tile-border"]
    tiles = len(case.tables.tile_offsets) - 1
    lists = np.concatenate([np.zeros(2 * tiles, np.int32), case.tables.tile_index])
    offsets = case.tables.row_offsets + 2 * tiles
    offsets[:2] = np.arange(tiles + 1)[None, :] + np.array([[0], [tiles]])  # one key for each query tile
    out = call(case, row_offsets=torch.from_numpy(offsets.astype(np.int32)), tile_index=torch.from_numpy(lists))
    check_attention(out.numpy(), expected(case), "float32", case)


@pytest.mark.parametrize("name", ["pattern-union", "text-after-5-len-3-0"])
def test_strided_inputs(name):
    case = BY_NAME[name]
    B, N, H, D = case.shape
    packed = torch.stack([torch.from_numpy(x) for x in case.qkv()], dim=2).reshape(B, N, 3 * H, D)
    q, k, v = packed.split(H, dim=2)
    assert not q.is_contiguous()
    out = call(case, q=q, k=k, v=v)
    assert out.is_contiguous()
    check_attention(out.numpy(), expected(case), "float32", name)


def test_the_cache_follows_the_contents_of_the_tables():
    case = BY_NAME["pattern-diagonal"]
    tables = case.tables.tile_index.copy()
    row_offsets = case.tables.row_offsets.copy()
    tile_index, offsets = torch.from_numpy(tables), torch.from_numpy(row_offsets)
    first = call(case, tile_index=tile_index, row_offsets=offsets)
    offsets[2:] = 0  # same tensors, now a pattern without any key
    second = call(case, tile_index=tile_index, row_offsets=offsets)
    assert first[:, :, 0].abs().max() > 0
    assert second[:, :, 0].abs().max() == 0


def test_registration_passes_opcheck():
    case = BY_NAME["text-after-130-len-130-64"]
    tensors = [torch.from_numpy(x) for x in op_inputs(case).values()]
    rest = [op_attributes(case)[name] for name in ("scale", "text_tokens", "text_first")]
    # The operator is for inference: it has no gradient, so the autograd check does not apply.
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.svdit.sparse_attention.default, (*tensors, *rest), test_utils=utilities)


def test_fake_gives_shape_and_type_without_data():
    case = BY_NAME["tile-exact"]
    inputs = {name: torch.from_numpy(x).to("meta") for name, x in op_inputs(case).items()}
    inputs.update({name: inputs[name].to(torch.bfloat16) for name in "qkv"})
    attributes = {name: op_attributes(case)[name] for name in ("scale", "text_tokens", "text_first")}
    out = torch.ops.svdit.sparse_attention(**inputs, **attributes)
    assert (tuple(out.shape), out.dtype, out.device.type) == (case.shape, torch.bfloat16, "meta")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


CASE = BY_NAME["text-after-5-len-3-0"]
"""B 2, N 95, H 5, D 64, 12 tiles, 5 text tokens, 1 stage, 5 patterns."""
WRONG = {
    "q-rank": ({"q": torch.zeros(2, 95, 320)}, r"Q: got shape \(2, 95, 320\); expected \[batch, tokens"),
    "k-shape": ({"k": torch.zeros(2, 94, 5, 64)}, r"K: got torch.float32 \(2, 94, 5, 64\); expected .*95"),
    "v-dtype": ({"v": torch.zeros(2, 95, 5, 64).half()}, r"V: got torch.float16 .*; expected torch.float32"),
    "dtype": ({n: torch.zeros(2, 95, 5, 64).double() for n in "qkv"}, r"Q: got torch.float64; expected float32"),
    "stage-dtype": ({"stage": torch.zeros(1)}, r"stage: got torch.float32; expected int32"),
    "stage-shape": ({"stage": int32(0, 0)}, r"stage: got shape \(2,\); expected \[1\]"),
    "stage-range": ({"stage": int32(1)}, r"stage: got 1; expected 0 to 0"),
    "text-len-shape": ({"text_len": int32(1)}, r"text_len: got shape \(1,\); expected \[2\]"),
    "text-len-range": ({"text_len": int32(3, 6)}, r"text_len\[1\]: got 6; expected 0 to 5"),
    "text-len-sign": ({"text_len": int32(-1, 0)}, r"text_len\[0\]: got -1; expected 0 to 5"),
    "heads": ({"head_pattern": int32([0] * 4)}, r"head_pattern: got shape \(1, 4\); expected \[any, 5\]"),
    "pattern-id": ({"head_pattern": int32([0, 1, 2, 3, 5])}, r"head_pattern: got 5; expected 0 to 4"),
    "rows": ({"row_offsets": int32([0] * 3)}, r"row_offsets: got shape \(1, 3\); expected \[any, 10\]"),
    "work-order": ({"work_order": int32(0)}, r"work_order: got shape \(1,\); expected \[1, any\]"),
    "tokens": ({"tile_offsets": int32(*range(10))}, r"tile_offsets: got 9 in the last entry; expected the 95"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_named(name):
    changed, message = WRONG[name]
    with pytest.raises(SvditError, match=message):
        call(CASE, **changed)


def test_the_plain_function_equals_the_operator():
    case = BY_NAME["stage-2-layer-1"]
    inputs = [torch.from_numpy(x) for x in op_inputs(case).values()]
    attributes = [op_attributes(case)[name] for name in ("scale", "text_tokens", "text_first")]
    assert torch.equal(reference.sparse_attention(*inputs, *attributes), call(case))
