"""svdit-bench without a GPU: what its cases mean, what it says to mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from svdit.plans.errors import SvditError
from svdit.runtime.bench_attention import Timing
from svdit.runtime.bench_cases import TABLE, band, band_of, bench_case, case_names, comb
from svdit.runtime.bench_cli import main


@pytest.mark.parametrize("name", TABLE)
def test_work_of_a_case_equals_its_tables(name):
    case = bench_case(name)
    tables, sizes = case.tables, np.diff(case.tables.tile_offsets).astype(np.int64)
    pairs = 0
    for pattern in tables.head_pattern[0][0]:
        if pattern == 0:
            pairs += case.geometry.tokens**2
        else:
            rows = tables.row_offsets[pattern]
            before = np.concatenate([[0], np.cumsum(sizes[tables.tile_index])])
            pairs += int(sizes @ np.diff(before[rows]))
    assert case.pairs == pairs
    assert case.flop == 4 * pairs * case.geometry.head_dim
    assert case.density == pytest.approx(pairs / (case.geometry.heads * case.geometry.tokens**2))


def test_the_table_holds_the_sizes_it_is_known_by():
    shapes = {name: bench_case(name).shape for name in TABLE}
    assert {shapes[name] for name in TABLE[:4]} == {(1, 118784, 24, 128)}
    assert shapes["mixed"] == (1, 33 * 45 * 80 + 256, 24, 128)
    assert {shapes[name] for name in TABLE[5:]} == {(1, 45056, 48, 64)}
    assert [bench_case(name).is_uniform for name in TABLE] == [True] * 4 + [False] + [True] * 2
    assert bench_case("mixed").heads.count("skip") == 2


def test_masks_by_hand():
    assert band(4, 1).astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert comb(6, 3, 0).astype(int).tolist()[1] == [0, 1, 0, 0, 1, 0]
    assert comb(8, 4, 1).astype(int).tolist()[0] == [1, 1, 0, 1, 1, 1, 0, 1]
    assert (band_of(9, 4).sum(axis=1) == 4).all()


def test_a_wrong_case_lists_the_right_ones():
    with pytest.raises(SvditError, match=r"case: got none-such; expected one of dense, band-6"):
        bench_case("none-such")


def test_a_timing_reports_its_median_and_rate():
    case = bench_case("comb-16-d64")
    row = Timing("x", [3.0, 1.0, 2.0], [1000, 2000], joules=30.0, seconds=0.1).to_json(case)
    assert row["latency_ms"] == 2.0 and row["latency_ms_range"] == [1.0, 3.0] and row["calls"] == 3
    assert row["tflops"] == round(case.flop / 2e-3 / 1e12, 1)
    assert row["sm_mhz"] == 1500 and row["watts"] == 300
    json.dumps(row)


def test_a_failed_implementation_reports_why():
    assert Timing("x", error="no such thing").to_json(bench_case("dense")) == {
        "implementation": "x",
        "error": "no such thing",
    }


def test_list_names_every_case():
    result = CliRunner().invoke(main, ["attention", "--list"])
    assert result.exit_code == 0 and result.output.split() == case_names()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--library", "x=/nowhere.so"], "error: --library: got /nowhere.so; expected a built libsvdit_kernels.so"),
        (["--library", __file__, "--peer", "fa9"], "error: --peer: got fa9; expected one of fa4, cudnn, flash, flex"),
        (["--library", __file__, "--dtype", "int8"], "error: --dtype: got int8; expected bfloat16 or float16"),
        (["--library", __file__, "--case", "nope"], "error: case: got nope; expected one of dense"),
    ],
)
def test_mistakes_are_named(arguments, message):
    result = CliRunner().invoke(main, ["attention", *arguments])
    assert result.exit_code == 2 and message in result.output


def test_no_gpu_is_a_message():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = CliRunner().invoke(main, ["attention", "--library", __file__])
    assert result.exit_code == 2 and "GPU: got none; expected a CUDA GPU" in result.output
