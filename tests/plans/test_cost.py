"""The cost model against tables whose law is known, and against the measured H100 table itself."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest

from svdit.plans.budget import mode_ms
from svdit.plans.cost import (
    MATRIX_SHARE,
    HeadWork,
    cost_model,
    hardware_names,
    head_work,
    key_lists,
    read_hardware,
)
from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.kernel_work import kernel_work
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Skip, Stripe
from svdit.plans.search import Measurement
from svdit.plans.tiles import Tiling

HUNYUAN = Geometry((33, 45, 80), 256, "after", 60, 24, 128)


def row(tokens, density, latency, heads=24, head_dim=128, **more):
    return {
        "case": "c",
        "batch": 1,
        "tokens": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "density": density,
        "latency_ms": latency,
        **more,
    }


def table(tmp_path, rows, **more):
    path = tmp_path / "g.json"
    content = {"format": "svdit-hardware", "version": 1, "gpu": "G", "status": "measured", "how": "h"}
    path.write_text(json.dumps({**content, "attention": rows, **more}))
    return read_hardware(path)


def test_recovers_launch_and_rate(tmp_path):
    """Rows made with 0.02 ms a launch and 500 TFLOP/s."""
    sizes = ((2000, 0.1), (8000, 0.5), (9000, 1.0), (4000, 0.3))
    rows = [row(n, d, 0.02 + 4 * 24 * 128 * n**2 * d / 500e9) for n, d in sizes]
    geometry = Geometry((10, 20, 40), 0, "none", 3, 24, 128)
    cost = cost_model(table(tmp_path, rows), "unknown", geometry)
    assert cost.launch_ms == pytest.approx(0.02, rel=1e-6) and cost.item_ms == pytest.approx(0, abs=1e-9)
    assert cost.pair_ms == pytest.approx(4 * 128 * 8000**2 / 500e9, rel=1e-6)
    assert cost.residual < 1e-6 and cost.attention_basis == "measured"
    assert cost.dense_ms == pytest.approx(3 * (0.02 + 24 * 4 * 128 * 8000**2 / 500e9), rel=1e-6)
    assert cost.heads_ms(HeadWork(np.array([0.0, 0.5]))).tolist() == pytest.approx([0.0, cost.pair_ms / 2])


def test_recovers_the_price_of_gathering(tmp_path):
    """Rows made with 2 ms a launch, 0.05 TFLOP/s and 1 ns a number gathered; density and gathering vary apart."""
    cases = ((1.0, 1.0), (0.2, 1.0), (0.2, 9.0), (0.4, 30.0), (0.1, 4.0), (0.6, 60.0))
    rows = [
        row(9216, d, 2 + 4 * 24 * 128 * 9216**2 * d / 0.05e9 / 1e3 + 2 * 24 * 128 * 9216 * g * 1e-6, gathered=g)
        for d, g in cases
    ]
    cost = cost_model(table(tmp_path, rows), "unknown", Geometry((1, 96, 96), 0, "none", 3, 24, 128))
    assert cost.launch_ms == pytest.approx(2, rel=1e-4) and cost.residual < 1e-6
    assert cost.gather_ms == pytest.approx(2 * 128 * 9216 * 1e-6, rel=1e-4)
    layer = cost.launch_ms + cost.heads_ms(HeadWork(np.full(24, 0.4), np.full(24, 30.0))).sum()
    assert layer == pytest.approx(rows[3]["latency_ms"], rel=1e-6)


def test_recovers_the_price_of_a_list(tmp_path):
    """Rows made with 3 ms a launch, 0.05 TFLOP/s, 1 ns a number gathered and 0.25 ms a list; they vary apart."""
    cases = ((1, 1, 1), (0.2, 1, 4), (0.2, 9, 60), (0.4, 30, 140), (0.1, 4, 144), (0.6, 60, 150), (0.05, 2, 36))
    unit, fetched = 4 * 24 * 128 * 9216**2, 2 * 24 * 128 * 9216
    rows = [
        row(9216, d, 3 + unit * d / 0.05e9 / 1e3 + fetched * g * 1e-6 + 24 * n * 0.25, gathered=g, lists=n)
        for d, g, n in cases
    ]
    cost = cost_model(table(tmp_path, rows), "unknown", Geometry((1, 96, 96), 0, "none", 3, 24, 128), 2)
    assert cost.launch_ms == pytest.approx(3, rel=1e-4) and cost.residual < 1e-6
    assert cost.list_ms == pytest.approx(2 * 0.25, rel=1e-4) and not cost.counts_density_alone
    layer = cost.launch_ms + cost.heads_ms(HeadWork(np.full(24, 0.4), 30.0, lists=140.0)).sum()
    assert layer == pytest.approx(2 * rows[3]["latency_ms"] - 3, rel=1e-6)


def test_the_dense_pass_that_was_measured_is_what_plans_are_compared_with(tmp_path):
    rows = [row(n, d, 0.02 + 4 * 24 * 128 * n**2 * d / 500e9) for n, d in ((2000, 0.1), (8000, 0.5), (9000, 1.0))]
    geometry, entry = Geometry((10, 20, 40), 0, "none", 3, 24, 128), {"model": "m", "tokens": 8000, "rest_ms": 7.0}
    modelled = cost_model(table(tmp_path, rows, rest=[entry]), "m", geometry, 2)
    measured = cost_model(table(tmp_path, rows, rest=[{**entry, "dense_ms": 40.0}]), "m", geometry, 2)
    assert measured.dense_ms == 80.0 != modelled.dense_ms and measured.fixed_ms == modelled.fixed_ms
    with pytest.raises(SvditError, match=r"rest\[0\]\.dense_ms: got 0.*; expected a number above 0"):
        table(tmp_path, rows, rest=[{**entry, "dense_ms": 0.0}])


def test_recovers_the_prices_of_items_steps_and_slices(tmp_path):
    """Rows made with 1 ms a launch and prices of items, steps and slices, which vary apart; a full head at size 64."""
    cases = ((2 / 3, 2 / 3, 1.0), (4 / 3, 0.3, 0.25), (2, 0.9, 0.45), (2, 0.15, 0.09), (1, 0.4, 0.4), (0.1, 0.1, 0.05))
    unit = 4 * 24 * 64 * 9216**2
    rows = [
        row(9216, 0.5, 1 + 0.01 * 24 * 72 * items + unit * (2e-10 * steps + 1e-10 * slices), head_dim=64)
        | {"items": items, "steps": steps, "slices": slices}
        for items, steps, slices in cases
    ]
    geometry = Geometry((16, 24, 24), 0, "none", 3, 24, 64)
    cost = cost_model(table(tmp_path, rows), "unknown", geometry)
    assert cost.counts_kernel_work and cost.pair_ms == 0 and cost.residual < 1e-6
    assert cost.launch_ms == pytest.approx(1.0, rel=1e-4)
    assert cost.dense_ms == pytest.approx(3 * rows[0]["latency_ms"], rel=1e-6), "a full head has the first row's counts"
    tiling = Tiling(geometry, (4, 4, 4))
    mask = tiling.mask(Diagonal(frames=0))
    work = kernel_work(tiling, mask)
    heads = cost.heads_ms(head_work(tiling, [mask, tiling.mask(Skip())]))
    one = 0.01 * 72 * work.items + unit / 24 * (2e-10 * work.steps + 1e-10 * work.slices)
    assert heads.tolist() == pytest.approx([one, 0.0], rel=1e-6)


def test_recovers_the_price_of_lists(tmp_path):
    """Rows made with 1 ms a launch, a price of slices and a tenth more for those of heads with lists."""
    cases = ((1.0, 0.0), (0.5, 0.5), (0.2, 0.2), (0.6, 0.3), (0.05, 0.05))
    unit = 4 * 24 * 128 * 9216**2
    rows = [
        row(9216, 0.5, 1 + unit * (1e-9 * slices + 1e-10 * listed))
        | {"items": 1.0, "steps": slices, "slices": slices, "listed": listed}
        for slices, listed in cases
    ]
    geometry = Geometry((16, 24, 24), 0, "none", 1, 24, 128)
    cost = cost_model(table(tmp_path, rows), "unknown", geometry)
    assert cost.residual < 1e-6 and cost.listed_ms == pytest.approx(cost.slice_ms / 10, rel=1e-4)
    assert cost.dense_ms == pytest.approx(rows[0]["latency_ms"], rel=1e-6)
    tiling = Tiling(geometry, (4, 4, 8))
    work = head_work(tiling, [tiling.mask(Diagonal(frames=0))])
    assert cost.heads_ms(work) == pytest.approx(unit / 24 * 1.1e-9 * work.slices, rel=1e-5)
    del rows[1]["listed"]
    assert cost_model(table(tmp_path, rows), "unknown", geometry).listed_ms == 0, "not every row says it"


def test_a_pass_of_more_rows(tmp_path):
    """Launches are shared, everything else is there once a row."""
    rows = [row(n, d, 0.02 + 4 * 24 * 128 * n**2 * d / 500e9) for n, d in ((2000, 0.1), (8000, 0.5), (9000, 1.0))]
    rest = [{"model": "m", "tokens": 8000, "rest_ms": 7.0}]
    hardware = table(tmp_path, rows, rest=rest)
    one, four = (cost_model(hardware, "m", Geometry((10, 20, 40), 0, "none", 3, 24, 128), n) for n in (1, 4))
    assert four.launch_ms == one.launch_ms and four.rest_ms == 28.0 and four.record()["batch"] == 4
    assert four.dense_ms - 3 * four.launch_ms == pytest.approx(4 * (one.dense_ms - 3 * one.launch_ms))
    with pytest.raises(SvditError, match="batch: got 0; expected an integer of at least 1"):
        cost_model(hardware, "m", HUNYUAN, 0)


def test_modes_cost_what_their_masks_do(tmp_path):
    """Measured columns differ between heads; a mode that keeps everything costs what a full head does."""
    rows = [
        row(64, 0.5, 1 + i * s, heads=1, head_dim=64) | {"items": i, "steps": s, "slices": s * s}
        for i, s in ((0.5, 0.1), (1.0, 0.4), (2.0, 0.9), (1.5, 0.2), (0.7, 0.6))
    ]
    geometry, tile = Geometry((4, 4, 4), 0, "none", 1, 2, 64), (1, 2, 2)
    cost, tiling = cost_model(table(tmp_path, rows), "unknown", geometry), Tiling(geometry, tile)
    patterns = (Diagonal(), ((Stripe(columns=[[0, 4]]), Stripe(columns=[[0, 16]])),))
    masks = [[tiling.mask(p[0][h] if isinstance(p, tuple) else p) for p in patterns] for h in range(2)]
    sparsity = np.array([[[1 - tiling.density(mask) for mask in row] for row in masks]])
    data = Measurement(("band", "stripe"), patterns, np.ones((1, 1, 2, 2)), np.ones((1, 1, 2)), sparsity)
    found = mode_ms(cost, data, tiling)
    expected = [[*cost.heads_ms(head_work(tiling, of_head)), cost.heads_ms(cost.full)] for of_head in masks]
    np.testing.assert_allclose(found, [expected])
    assert found[0, 1, 1] == found[0, 1, 2] and found[0, 0, 1] != found[0, 1, 1]


def test_key_lists_by_hand():
    """2 frames of 3 places: own frame is one list of 3 tiles a frame, same place one of 2 a place, full one of all."""
    tiling = Tiling(Geometry((2, 1, 6), 0, "none", 1, 1, 64), (1, 1, 2))
    for pattern, lists, keys in ((Diagonal(), 2, 1), (MultiDiagonal(0, 0), 3, 1), (Full(), 1, 1), (Skip(), 0, 0)):
        assert key_lists(tiling, tiling.mask(pattern)) == (lists, keys)
    near = tiling.mask(Diagonal(frames=0, rows=0, cols=1))  # lists of 2, 3 and 2 places in each of two frames
    assert key_lists(tiling, near) == (6, pytest.approx(2 * (2 + 3 + 2) / 6))
    work = head_work(tiling, [near, tiling.mask(Full())])
    assert work.lists.tolist() == [6, 1] and work.gathered.tolist() == pytest.approx([14 / 6, 1])


def shipped_without(folder, name, dropped):
    """Rows of a shipped table whose case `dropped` accepts, the table without them, and all its content."""
    content = json.loads(files("svdit.plans").joinpath("hardware", f"{name}.json").read_text())
    out = [row for row in content["attention"] if dropped(row["case"])]
    kept = [row for row in content["attention"] if row not in out]
    (folder / "without.json").write_text(json.dumps({**content, "attention": kept}))
    return out, read_hardware(folder / "without.json"), content


def test_predicts_the_measured_mixed_layer_from_the_other_rows(tmp_path):
    """H100: 4 full, 8 banded, 8 multi-diagonal, 2 stripe and 2 skip heads; fitted without this row, within 5 %."""
    [mixed], hardware, _ = shipped_without(tmp_path, "h100", lambda case: case == "mixed")
    cost = cost_model(hardware, "hunyuan", HUNYUAN)
    layer = cost.launch_ms + cost.heads_ms(HeadWork(np.full(24, mixed["density"]))).sum()
    assert layer == pytest.approx(mixed["latency_ms"], rel=0.05)


def test_predicts_the_mixed_layers_of_the_cpu_from_its_single_heads(tmp_path):
    """Four layers of one to four patterns; rows of the fit have one head that does not skip. Within 5 %."""
    mixed, hardware, content = shipped_without(tmp_path, "cpu", lambda case: case.startswith("mixed"))
    cost = cost_model(hardware, "tiny", Geometry((16, 24, 24), 0, "none", 8, 4, 64))
    assert len(mixed) == 4 and not cost.estimated and cost.dense_ms == content["rest"][0]["dense_ms"]
    for row in mixed:
        work = HeadWork(*(np.full(4, row[name]) for name in ("density", "gathered")), lists=np.full(4, row["lists"]))
        assert cost.launch_ms + cost.heads_ms(work).sum() == pytest.approx(row["latency_ms"], rel=0.05)


def test_shipped_table():
    assert "h100" in hardware_names()
    cost = cost_model(read_hardware("h100"), "hunyuan", HUNYUAN)
    assert cost.attention_basis == "measured" and cost.rest_basis == "roofline" and cost.estimated
    products = 2 * HUNYUAN.tokens * 12 * 3072**2 * 60
    assert cost.rest_ms == pytest.approx(products / (989.4e9 * MATRIX_SHARE))


def test_what_is_not_measured_says_so(tmp_path):
    rows = [row(4000, 1.0, 10.0)]
    far = cost_model(table(tmp_path, rows), "m", Geometry((10, 100, 100), 0, "none", 1, 1, 128))
    assert far.attention_basis == "extrapolated" and far.estimated and far.rest_basis == "none"
    peak = {"peak": {"tflops": 100.0, "source": "quoted"}}
    other = cost_model(table(tmp_path, rows, **peak), "m", Geometry((1, 40, 100), 0, "none", 1, 1, 64))
    assert other.attention_basis == "roofline" and other.estimated
    assert other.pair_ms == pytest.approx(4 * 64 * 4000**2 / (100e9 * 0.6))
    same = Geometry((1, 40, 100), 0, "none", 1, 1, 128)
    assert not cost_model(table(tmp_path, rows), "m", same).estimated
    rest = {"rest": [{"model": "tiny", "tokens": 4000, "rest_ms": 7.0}]}
    known = cost_model(table(tmp_path, rows, **rest), "tiny", same)
    assert (known.rest_ms, known.rest_basis, known.estimated) == (7.0, "measured", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"\$\.version: got 2; expected 1"),
        ({"speed": 1}, r"\$\.speed: got an unknown key"),
        ({"attention": [{"case": "c"}]}, r"\$\.attention\[0\]\.batch: got nothing"),
        ({"attention": [row(4000, 1.0, -1)]}, r"\$\.attention\[0\]\.latency_ms: got -1.0; expected a number above 0"),
        ({"peak": {"tflops": 0, "source": "s"}}, r"\$\.peak\.tflops: got 0.0"),
        ({"rest": [{"model": "m"}]}, r"\$\.rest\[0\]\.tokens: got nothing"),
    ],
)
def test_refuses(tmp_path, change, message):
    path = tmp_path / "g.json"
    content = {"format": "svdit-hardware", "version": 1, "gpu": "G", "status": "measured", "how": "h", "attention": []}
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(SvditError, match=message):
        read_hardware(path)


def test_refuses_what_it_cannot_say(tmp_path):
    with pytest.raises(SvditError, match="hardware: got G with rows for head_dim 128; expected 64, or a peak"):
        cost_model(table(tmp_path, [row(10, 1.0, 1.0)]), "m", Geometry((1, 1, 10), 0, "none", 1, 1, 64))
    with pytest.raises(SvditError, match=r"hardware: got 'h9000'; expected .*h100.* or a file"):
        read_hardware("h9000")
