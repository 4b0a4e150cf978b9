"""The search: what it measures, that it can be interrupted, and what it refuses."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from svdit.plans import baselines
from svdit.plans.budget import Target, weighted_errors
from svdit.plans.cost import cost_model, read_hardware
from svdit.plans.dynamics import step_weights
from svdit.plans.errors import SvditError
from svdit.plans.joined import join
from svdit.plans.patterns import Tiles
from svdit.plans.schema import dumps
from svdit.plans.search import Rule, loss_table, mode_density, probes, rule_for_density
from svdit.plans.search_state import read_state, write_state
from svdit.plans.stages import merge
from svdit.plans.tiles import Tiling
from svdit.runtime import measure
from svdit.runtime.denoise import Denoising
from svdit.runtime.measure import baseline_plan_of, budget_plan_of, noise_levels, plan_of, search
from svdit.runtime.pipeline import Model, Request, generate, prepare
from svdit.runtime.torch_runner import TorchRunner
from tests.plans.search_states import hardware_file
from tests.runtime.conftest import PROMPTS, TILE

pytestmark = pytest.mark.usefixtures("whole_runs_have_four_steps")
RULE = Rule(0.5, 0.4, 10.0, dense_steps=0.0)
SPECS = {
    "skip": {"kind": "skip"},
    "band": {"kind": "diagonal", "frames": 0},
    "wide": {"kind": "diagonal", "frames": 1},
    "place": {"kind": "multi_diagonal", "rows": 0, "cols": 0},
    "top": {"kind": "stripe", "columns": {"top": 4}},
}


def run(adapter, checkpoint, **changes):
    given = {"steps": 4, "tile": TILE, "rule": RULE, "candidates": SPECS, "max_stages": 2, "show": False, **changes}
    return search(adapter, checkpoint, given.pop("prompts", PROMPTS), **given)


@pytest.fixture(scope="module")
def found(adapter, checkpoint):
    return run(adapter, checkpoint)


def attention_inputs(adapter, checkpoint, tiling, steps=4):
    """q, k, v of every layer at the first step, recorded under dense attention; rows of all prompts."""
    calls = []

    def record(q, k, v, layer, stage, text_len):
        calls.append((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    model = Model(adapter, checkpoint, tiling)
    with TorchRunner(adapter, checkpoint, tiling, None) as runner, torch.inference_mode():
        runner.model.attention = record
        prepare(runner, model, Request(PROMPTS, 0, steps), measure.dense_stage).step()
    return calls


def test_first_layer_errors_against_float64(adapter, checkpoint, found):
    """Nothing precedes step 0, layer 0, so its errors can be computed from dense q, k, v alone."""
    tiling, data = found.plan.tiling(), found.measurement
    q, k, v = (x.double().numpy() for x in attention_inputs(adapter, checkpoint, tiling)[0])
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / 8.0

    def attend(mask):
        keep = mask.repeat(tiling.sizes, 0).repeat(tiling.sizes, 1)
        weights = np.where(keep, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        total = weights.sum(-1, keepdims=True)
        return np.einsum("bhnm,bmhd->bnhd", np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), v)

    full = attend(np.ones((tiling.num_tiles,) * 2, dtype=bool))
    np.testing.assert_allclose(data.power[0, 0], np.square(full).mean((0, 1, 3)), rtol=1e-4)
    for mode in range(len(SPECS)):
        for head in range(2):
            mask = tiling.mask(data.pattern(mode, 0, head))
            error = np.square(attend(mask) - full)[:, :, head].mean()
            assert data.error[0, 0, head, mode] == pytest.approx(error, rel=1e-3)
            assert data.sparsity[0, head, mode] == pytest.approx(1 - tiling.density(mask))


def test_maps_are_the_mean_of_softmax_over_query_tokens(adapter, checkpoint):
    """One step and one layer whose input nothing changed: against float64 softmax over tokens."""
    state = run(adapter, checkpoint, steps=1, max_stages=1).state
    tiling = Tiling(state.geometry, TILE)
    q, k, _ = (x.double() for x in attention_inputs(adapter, checkpoint, tiling, steps=1)[0])
    shares = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) / 8.0, -1).mean(0).numpy()
    edges = tiling.tile_offsets[:-1]
    tiles = np.add.reduceat(np.add.reduceat(shares, edges, axis=1), edges, axis=2) / tiling.sizes[:, None]
    np.testing.assert_allclose(state.maps[0], tiles, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(state.maps.sum(-1), 1.0, rtol=1e-5)


def test_projected_errors_are_shares_of_the_layers_output(adapter, checkpoint):
    """Mode "skip" of a head loses what the head adds to the projected output; float64, first layer, first step."""
    state = run(adapter, checkpoint, projected=True, rule=Rule(dense_steps=1.0)).state
    data, tiling = state.measurement(), Tiling(adapter.geometry(checkpoint), TILE)
    q, k, v = (x.double() for x in attention_inputs(adapter, checkpoint, tiling)[0])
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(8.0).softmax(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    with TorchRunner(adapter, checkpoint, tiling, None) as runner:
        project = runner.model.blocks[0].attn1.to_out[0].weight.detach().double()
    whole = (out.flatten(2) @ project.T).square().sum()
    skip = data.modes.index("skip")
    for head in range(2):
        part = (out[:, :, head] @ project[:, 64 * head : 64 * head + 64].T).square().sum()
        assert data.relative()[0, 0, head, skip] == pytest.approx(float(2 * part / whole), rel=1e-3)
    assert budget_plan_of(state, Target("density", 0.5), max_stages=2).provenance["projected"] is True


def test_choices_are_fed_forward(adapter, checkpoint):
    """With one sparse candidate that is always taken, the trajectory is that of the plan that uses it everywhere."""
    taken = run(adapter, checkpoint, candidates={"band": SPECS["band"]}, rule=Rule(0.0, 1e9, 1.0, dense_steps=0.0))
    plan = taken.plan
    assert {name for stage in plan.stages for row in stage.layers for name in row} == {"band"}
    video = generate(adapter, checkpoint, PROMPTS, plan=plan, steps=4)
    np.testing.assert_allclose(taken.state.latents, video.latents, rtol=0, atol=2e-4)
    never = run(adapter, checkpoint, candidates={"band": SPECS["band"]}, rule=Rule(0.5, 0.0, 1.0, dense_steps=0.0))
    assert never.plan.patterns == {} and never.plan.provenance["density"] == 1.0
    dense = generate(adapter, checkpoint, PROMPTS, steps=4)
    np.testing.assert_allclose(never.state.latents, dense.latents, rtol=0, atol=2e-4)


def test_dense_steps_are_fed_forward_dense(adapter, checkpoint):
    """Half of the steps dense: the walk is that of its own plan, which is full there and sparse after."""
    half = run(adapter, checkpoint, candidates={"band": SPECS["band"]}, rule=Rule(0.0, 1e9, 1.0, dense_steps=0.5))
    rows = [{name for row in stage.layers for name in row} for stage in half.plan.stages]
    assert rows == [{"full"}, {"band"}] and [stage.until for stage in half.plan.stages] == [0.5, 1.0]
    video = generate(adapter, checkpoint, PROMPTS, plan=half.plan, steps=4)
    np.testing.assert_allclose(half.state.latents, video.latents, rtol=0, atol=2e-4)


def test_search_is_deterministic(adapter, checkpoint, found):
    assert dumps(run(adapter, checkpoint).plan) == dumps(found.plan)


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_search_goes_on_to_the_same_plan(
    adapter, checkpoint, found, tmp_path, monkeypatch, after
):
    state, write, count = tmp_path / "s.search.npz", measure.write_state, []

    def failing(path, now):
        write(path, now)
        count.append(now.done)
        if len(count) == after:
            raise StopError

    monkeypatch.setattr(measure, "write_state", failing)
    with pytest.raises(StopError):
        run(adapter, checkpoint, state=state)
    assert read_state(state).done == after
    with pytest.raises(SvditError, match=rf"search state: got {after} of 4 steps measured; expected a finished search"):
        plan_of(read_state(state), RULE, 2)
    monkeypatch.setattr(measure, "write_state", lambda path, now: (write(path, now), count.append(now.done)))
    again = run(adapter, checkpoint, state=state)
    assert dumps(again.plan) == dumps(found.plan)
    np.testing.assert_array_equal(again.state.maps, found.state.maps)
    assert count == [1, 2, 3, 4], "no step is measured twice"
    assert [f.name for f in tmp_path.iterdir()] == ["s.search.npz"]


@pytest.mark.parametrize("after", [2, 4])
def test_an_interrupted_calibrated_search_goes_on_to_the_same_budget_plan(
    adapter, checkpoint, tmp_path, monkeypatch, after
):
    """In the middle of the walk, and behind it, before the calibration has begun."""
    given = {"rule": Rule(dense_steps=1.0), "projected": True, "calibrate": "steps and heads", "query_tiles": 9}
    whole = run(adapter, checkpoint, **given).state
    state, write = tmp_path / "s.search.npz", measure.write_state

    def failing(path, now):
        write(path, now)
        if now.done == after:
            raise StopError

    monkeypatch.setattr(measure, "write_state", failing)
    with pytest.raises(StopError):
        run(adapter, checkpoint, state=state, **given)
    assert read_state(state).done == after and read_state(state).sensitivity is None
    monkeypatch.setattr(measure, "write_state", write)
    run(adapter, checkpoint, state=state, **given)
    again, target = read_state(state), Target("density", 0.5)
    np.testing.assert_array_equal(again.sensitivity, whole.sensitivity)
    np.testing.assert_array_equal(again.coherence, whole.coherence)
    plans = [budget_plan_of(one, target, max_stages=2) for one in (again, whole)]
    assert dumps(plans[0]) == dumps(plans[1]) and plans[0].provenance["weights"] == "measured"


def test_a_dense_walk_is_not_walked_again_to_calibrate(adapter, checkpoint, monkeypatch):
    """4 steps of the search and, left at each of 4 steps, 4 + 3 + 2 + 1; behind sparse steps the dense 4 as well."""
    count, step = [], Denoising.step
    monkeypatch.setattr(Denoising, "step", lambda run: (count.append(run.position), step(run))[1])
    for share, passes in ((1.0, 14), (0.5, 18)):
        count.clear()
        given = {"rule": Rule(dense_steps=share), "calibrate": "steps"}
        run(adapter, checkpoint, candidates={"band": {"kind": "diagonal", "frames": 0}}, **given)
        assert len(count) == passes


def final_errors_of_probes(state):
    """[P, S] final error of every video with all heads under their probes at one step."""
    measured = state.measurement()
    errors = np.take_along_axis(measured.relative(), probes(measured)[None, ..., None], -1)[..., 0]
    return np.diagonal(state.coherence, axis1=1, axis2=2) * (state.sensitivity * errors).sum((1, 2))


def test_searches_with_a_share_of_the_prompts_are_one_together(adapter, checkpoint):
    """Two searches, the second with the patterns of the first, against one with all prompts and those patterns."""
    given = {"rule": Rule(dense_steps=1.0), "projected": True, "calibrate": "steps"}
    one = run(adapter, checkpoint, prompts=PROMPTS[:1], seed=5, **given).state
    given["candidates"] = one
    two = run(adapter, checkpoint, prompts=PROMPTS[1:], seed=6, **given).state
    whole = run(adapter, checkpoint, prompts=PROMPTS, seed=5, **given).state
    assert one.patterns == two.patterns and any(isinstance(p, tuple) for p in one.patterns)
    joined = join([one, two])
    np.testing.assert_allclose(joined.error, whole.error, rtol=1e-4, atol=1e-7 * whole.error.max())
    np.testing.assert_allclose(joined.layer_power, whole.layer_power, rtol=1e-5)
    np.testing.assert_allclose(joined.maps, whole.maps, rtol=1e-4, atol=1e-7)
    errors = [final_errors_of_probes(state) for state in (joined, whole)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-3)
    targets = [Target("density", share) for share in (0.3, 0.5, 0.7)]
    plans = [[budget_plan_of(s, t, max_stages=2) for t in targets] for s in (joined, whole)]
    assert [p.stages for p in plans[0]] == [p.stages for p in plans[1]]
    assert plan_of(joined, Rule(dense_steps=1.0), 2).provenance["choice"] == "open loop"


def test_a_search_goes_on_with_the_patterns_that_it_began_with(adapter, checkpoint, found, tmp_path):
    state = tmp_path / "s.search.npz"
    run(adapter, checkpoint, candidates=found.state, state=state)
    other = replace(found.state, patterns=found.state.patterns[::-1])
    with pytest.raises(SvditError, match=r"s\.search\.npz: patterns: got others; expected those of the state in"):
        run(adapter, checkpoint, candidates=other, state=state)


def test_patterns_of_a_search_at_another_size_are_refused(adapter, checkpoint, found):
    with pytest.raises(SvditError, match=r"candidates: got a search with tile \[.*\]; expected one with \[2, 2, 3\]"):
        run(adapter, checkpoint, candidates=found.state, tile=(2, 2, 3))


def test_a_calibration_that_does_not_exist_is_refused(adapter, checkpoint):
    with pytest.raises(SvditError, match='calibrate: got "heads"; expected one of steps, steps and heads'):
        run(adapter, checkpoint, calibrate="heads")


def test_choosing_again_from_the_state(adapter, checkpoint, found, tmp_path):
    state = tmp_path / "s.search.npz"
    run(adapter, checkpoint, state=state)
    stored = read_state(state)
    assert dumps(plan_of(stored, RULE, 2)) == dumps(found.plan)
    other = plan_of(stored, Rule(0.5, 0.3, 10.0, dense_steps=0.0), 2)
    assert other.provenance["choice"] == "open loop" and found.plan.provenance["choice"] == "closed loop"
    assert other.provenance["measured_with"]["eps"] == 0.4
    assert other.provenance["density"] >= found.plan.provenance["density"]


def test_a_state_keeps_the_tiles_of_every_head(adapter, checkpoint, tmp_path):
    state = tmp_path / "s.search.npz"
    specs = {"heavy": {"kind": "tiles", "rows": {"top": 0.2}}, "top": SPECS["top"], "band": SPECS["band"]}
    written = run(adapter, checkpoint, candidates=specs, state=state).state
    assert read_state(state).patterns == written.patterns and isinstance(written.patterns[0][1][1], Tiles)
    assert dumps(plan_of(read_state(state), RULE, 2)) == dumps(plan_of(written, RULE, 2))


def test_states_from_before_videos_were_told_apart_are_read(found, tmp_path):
    """Their one coherence [S, S] holds for every video."""
    steps = found.state.steps
    kept = {"sensitivity": np.full((steps, *found.state.power.shape[1:]), 2.0), "coherence": np.eye(steps) * 0.5 + 0.5}
    write_state(tmp_path / "old.search.npz", replace(found.state, **kept))
    read = read_state(tmp_path / "old.search.npz")
    assert read.coherence.shape == (1, steps, steps)
    three = replace(read, coherence=np.stack([read.coherence[0]] * 3))
    plan, again = (budget_plan_of(state, Target("density", 0.5), max_stages=2) for state in (read, three))
    assert plan == again and plan.provenance["combined_error"] > plan.provenance["weighted_error"]


def test_noise_levels_are_the_schedulers(adapter, checkpoint, found):
    scheduler = adapter.scheduler(checkpoint)
    scheduler.set_timesteps(4)
    signal, noise = noise_levels(found.state)
    np.testing.assert_allclose(noise, scheduler.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(signal + noise, 1.0)


def test_a_search_in_fewer_steps_takes_every_second_level(adapter, checkpoint):
    """Each of its steps stands for two of a run, and all of them for all: the last one is no shorter than they are."""
    scheduler = adapter.scheduler(checkpoint)
    scheduler.set_timesteps(4)
    noise = noise_levels(run(adapter, checkpoint, steps=2).state)[1]
    np.testing.assert_allclose(noise, scheduler.sigmas[[0, 2, 4]].numpy(), rtol=1e-6)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas[1] < 0.1 * noise[1]


def test_noise_levels_of_a_variance_preserving_scheduler(found):
    power, times = np.linspace(0.99, 0.0, 1000), np.array([999, 600, 300, 0])
    stored = {"scheduler/alphas_cumprod|tensor": power, "scheduler/timesteps|tensor": times}
    signal, noise = noise_levels(replace(found.state, scheduler=stored))
    np.testing.assert_allclose(signal**2 + noise**2, 1.0)
    assert signal[0] == 0 and noise[-1] == 0 and (np.diff(signal) > 0).all()
    with pytest.raises(SvditError, match="search state: got a scheduler with neither"):
        noise_levels(replace(found.state, scheduler={}))


def test_budget_from_a_state(found):
    """Within its target, at most as much error as any plan of the paper's rule that keeps as little."""
    weights = step_weights(*noise_levels(found.state))
    table, kept = weighted_errors(found.measurement, weights), mode_density(found.measurement)
    for target in (0.3, 0.6):
        plan = budget_plan_of(found.state, Target("density", target), max_stages=2)
        assert plan.provenance["density"] <= target + 1e-9 and plan.provenance["method"] == "budget"
        rule = rule_for_density(found.measurement, target, 2, dense_steps=0.0)
        segments = merge(loss_table(found.measurement, rule), 2)
        other = sum(
            np.take_along_axis(table[s.start : s.stop].sum(0), s.choice[..., None], -1).sum() for s in segments
        )
        assert plan.provenance["weighted_error"] <= other / (1 - plan.provenance["gap"]) + 1e-9
        names = [{n for row in stage.layers for n in row} for stage in plan.stages]
        assert len(names) <= 2 and kept.min() == 0


def test_a_speedup_is_reached_by_the_cost_model_it_was_asked_of(found, tmp_path):
    cost = cost_model(read_hardware(hardware_file(tmp_path)), "tiny", found.state.geometry)
    attention = cost.layers * cost.heads * cost.pair_ms / cost.dense_ms
    wanted = 1 / (1 - 0.5 * attention)  # half of the attention time saved
    plan = budget_plan_of(found.state, Target("speedup", wanted), max_stages=2, cost=cost)
    predicted = plan.provenance["predicted"]
    assert predicted["speedup"] >= wanted * (1 - 1e-5) and predicted["estimated"]
    assert 0.3 < plan.provenance["density"] <= 0.5 + 1e-6
    with pytest.raises(SvditError, match=r"speedup: got 1000; expected at most .* candidates on a made-up GPU"):
        budget_plan_of(found.state, Target("speedup", 1000.0), max_stages=2, cost=cost)


def test_a_rival_is_measured_and_chosen(adapter, checkpoint):
    """SVG at half density, half of 4 steps dense: nothing but its two masks, full before."""
    tiling = Tiling(adapter.geometry(checkpoint), TILE)
    specs = baselines.candidates("svg", tiling, baselines.sparse_density(0.7, 2, 4))
    state = run(adapter, checkpoint, candidates=specs, rule=Rule(dense_steps=1.0)).state
    plan = baseline_plan_of(state, "svg", 0.7, 0.5)
    assert [stage.until for stage in plan.stages] == [0.5, 1.0]
    assert {n for row in plan.stages[0].layers for n in row} == {"full"}
    assert {n for row in plan.stages[1].layers for n in row} <= {"spatial", "temporal"}
    assert plan.provenance["density"] <= 0.7
    with pytest.raises(SvditError, match=r"search state: got other candidates; expected those of svg at density 0\.8"):
        baseline_plan_of(state, "svg", 0.8, 0.5)


def test_sampling_query_tiles_changes_errors_only_a_little(adapter, checkpoint, found):
    sampled = run(adapter, checkpoint, query_tiles=6).measurement
    ratio = sampled.error[0, 0, :, 1:] / found.measurement.error[0, 0, :, 1:]
    assert not np.array_equal(sampled.error, found.measurement.error)
    assert np.abs(np.log(ratio)).max() < np.log(3)
    assert (found.measurement.deviation == 0).all() and (sampled.deviation[..., 1:] > 0).all()
    apart = np.abs(sampled.error[0, 0] - found.measurement.error[0, 0])[:, 1:] / sampled.deviation[0, 0, :, 1:]
    assert apart.max() < 5, "standard errors from the sampled value to the exhaustive one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"steps": 5},
            "steps: got 4; expected 5 as asked for now; use the same settings, name another --state, or delete",
        ),
        ({"prompts": PROMPTS[:1]}, "prompts: got"),
        ({"rule": Rule(0.5, 0.3, 10.0, dense_steps=0.0)}, "rule: got"),
        ({"tile": (1, 2, 3)}, "tile: got|candidates: got"),
        ({"seed": 1}, "seed: got 0; expected 1"),
        ({"query_tiles": 3}, "query_tiles: got null; expected 3"),
    ],
)
def test_a_state_of_another_search_is_refused(adapter, checkpoint, tmp_path_factory, change, message):
    state = tmp_path_factory.getbasetemp() / "refused.search.npz"
    if not state.exists():
        run(adapter, checkpoint, state=state)
    with pytest.raises(SvditError, match=message):
        run(adapter, checkpoint, state=state, **change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an unreadable file"),
        (b"not a zip file", "an unreadable file"),
        ({"head": "{}"}, "another kind of file"),
        ({"head": '{"format": "svdit-search-state", "version": 9}'}, "version: got 9; expected 1"),
        ({"head": '{"format": "svdit-search-state", "version": 1}'}, "a state without 'patterns'"),
        ({"other": ""}, "an unreadable file"),
    ],
)
def test_a_broken_state_is_refused(tmp_path, content, message):
    path = tmp_path / "s.search.npz"
    if isinstance(content, dict):
        buffer = io.BytesIO()
        np.savez(buffer, **{name: np.frombuffer(text.encode(), np.uint8) for name, text in content.items()})
        content = buffer.getvalue()
    path.write_bytes(content)
    with pytest.raises(SvditError, match=message):
        read_state(path)
    with pytest.raises(SvditError, match="no file"):
        read_state(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_stages": 0}, "max_stages: got 0"),
        ({"query_tiles": 0}, "query_tiles: got 0; expected an integer from 2 to"),
        ({"steps": 0}, "steps: got 0"),
        ({"prompts": []}, "prompts: got none"),
        ({"dtype": "int4"}, "dtype: got 'int4'"),
        ({"device": "gpu"}, "device: got 'gpu'"),
        ({"candidates": {}}, "candidates: got {}"),
        ({"tile": (16, 16, 16)}, "tile: got 16 x 16 x 16"),
        ({"prompts": ["purple square"]}, "purple"),
    ],
)
def test_search_refuses(adapter, checkpoint, change, message):
    with pytest.raises(SvditError, match=message):
        run(adapter, checkpoint, **change)
