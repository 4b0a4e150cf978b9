"""Searches of several sets of prompts as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from svdit.plans.budget import errors_by_step, weighted_errors
from svdit.plans.errors import SvditError
from svdit.plans.joined import join
from svdit.plans.patterns import Diagonal
from svdit.plans.search_state import SearchState, read_state, write_state
from svdit.plans.stages import Segment
from tests.plans.search_states import STEPS, search_state

PROMPTS = (("a", "b", "c"), ("d",))
"""Three videos in one search, one in the other, so that a plain mean of both is wrong."""


def state(number: int, calibrated: bool = True, **settings) -> SearchState:
    """Search `number` (0 or 1): errors, weights and coherence of its own, the patterns of both."""
    made, random = search_state(seed=number), np.random.default_rng(10 + number)
    count = len(PROMPTS[number])
    own = {"prompts": list(PROMPTS[number]), "seed": 100 * number, **settings}
    made = replace(
        made,
        settings={**made.settings, **own},
        latents=np.zeros((count, 1, 1, 1, 1), np.float32),
        sparsity=1 - 0.4 * (1 - made.sparsity),  # as sparse as a calibrated search needs one pattern to be
        layer_power=made.power.mean(-1) * (number + 1.0),
        deviation=made.error * random.uniform(0.05, 0.1, made.error.shape),
    )
    if not calibrated:
        return made
    turn = random.normal(size=(count, STEPS, STEPS)) + np.eye(STEPS)
    coherence = np.abs(turn @ turn.transpose(0, 2, 1))
    weights = random.uniform(0.1, 3.0, made.power.shape)
    return replace(
        made, sensitivity=weights, coherence=coherence, record={**made.record, "calibrated": "steps and heads"}
    )


def test_errors_are_means_over_all_prompts():
    one, two = state(0), state(1)
    found = join([one, two])
    for name in ("error", "power", "layer_power", "maps"):
        np.testing.assert_allclose(getattr(found, name), (3 * getattr(one, name) + getattr(two, name)) / 4, rtol=1e-6)
    assert found.settings["prompts"] == ["a", "b", "c", "d"] and found.settings["seed"] == [0, 100]
    assert len(found.latents) == 0 and found.record["joined"] == 2
    assert found.maps.dtype == np.float32


def test_samples_of_query_tiles_are_independent_where_seeds_differ():
    one, two = state(0), state(1)
    apart = np.sqrt((3 * one.deviation) ** 2 + two.deviation**2) / 4
    np.testing.assert_allclose(join([one, two]).deviation, apart)
    two = state(1, seed=0)
    np.testing.assert_allclose(join([one, two]).deviation, (3 * one.deviation + two.deviation) / 4)


def final_errors(state: SearchState, segments: list[Segment]) -> np.ndarray:
    """[P] of each video, by the definition of coherence."""
    table = weighted_errors(state.measurement(), state.sensitivity)
    amplitude = np.sqrt(errors_by_step(table, segments))
    return np.array([amplitude @ video @ amplitude for video in state.coherence])


def test_a_video_has_the_errors_that_its_own_search_gives_it():
    """Where searches agree on errors and differ in what steps count, every video's error of every plan stays, up to
    the units of its search."""
    one, two = state(0), state(1)
    by_step = np.array([8.0, 3.0, 1.0, 0.5, 2.0, 0.1])
    same = {name: getattr(one, name) for name in ("error", "power", "layer_power")}
    two = replace(two, **same, sensitivity=one.sensitivity * by_step[:, None, None])
    found, random = join([one, two]), np.random.default_rng(0)
    ratios = []
    for _ in range(5):
        segments = [Segment(a, b, random.integers(0, 4, (2, 3)), 0.0) for a, b in ((0, 2), (2, STEPS))]
        own = np.concatenate([final_errors(one, segments), final_errors(two, segments)])
        ratios.append(final_errors(found, segments) / own)
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[0], np.shape(ratios)), rtol=1e-9)
    np.testing.assert_allclose(ratios[0][:3], ratios[0][0], rtol=1e-9)


def test_weights_are_geometric_means_over_videos():
    one, two = state(0), state(1)
    expected = np.exp((3 * np.log(one.sensitivity) + np.log(two.sensitivity)) / 4)
    np.testing.assert_allclose(join([one, two]).sensitivity, expected)
    plain = join([state(0, calibrated=False), state(1, calibrated=False)])
    assert plain.sensitivity is None and plain.coherence is None


def test_one_coherence_for_all_videos_counts_for_each_of_them():
    """States of before videos were told apart have one."""
    old = replace(state(0), coherence=state(0).coherence[:1])
    three = replace(old, coherence=np.repeat(old.coherence, 3, axis=0))
    np.testing.assert_array_equal(join([old, state(1)]).coherence, join([three, state(1)]).coherence)


@pytest.mark.parametrize("both", [True, False], ids=["in both", "in one"])
def test_a_step_that_changes_nothing_leaves_finite_weights(both):
    heard = (np.arange(STEPS) > 0)[:, None, None]
    states = [replace(s, sensitivity=s.sensitivity * heard) for s in (state(0), state(1))]
    found = join(states if both else [states[0], state(1)])
    assert np.isfinite(found.coherence).all() and np.isfinite(found.sensitivity).all()


def test_a_joined_state_is_written_and_read(tmp_path):
    found = join([state(0), state(1)])
    write_state(tmp_path / "j.search.npz", found)
    read = read_state(tmp_path / "j.search.npz")
    np.testing.assert_array_equal(read.coherence, found.coherence)
    assert (read.settings, read.record, read.patterns) == (found.settings, found.record, found.patterns)


def test_all_machines_are_named():
    other = state(1)
    other = replace(other, record={**other.record, "hardware": "another machine"})
    assert join([state(0), other]).record["hardware"] == "a made-up machine, another machine"



MISTAKES = {
    "one": (lambda: [state(0)], "searches to join: got 1; expected at least two"),
    "unfinished": (lambda: [state(0), replace(state(1), done=2)], "state 2: search state: got 2 of 6 steps measured"),
    "tile": (
        lambda: [state(0), state(1, tile=[1, 1, 1])],
        r"state 2: tile: got \[1, 1, 1\]; expected \[1, 2, 2\] as in state 1",
    ),
    "guidance": (lambda: [state(0), state(1, guidance=5.0)], "state 2: guidance: got 5.0; expected 3.0 as in state 1"),
    "patterns": (
        lambda: [state(0), replace(state(1), patterns=(*state(1).patterns[:3], Diagonal(frames=1)))],
        "state 2: patterns: got others; expected those of state 1.*--candidates state 1",
    ),
    "calibrated": (
        lambda: [state(0), state(1, calibrated=False)],
        'state 2: calibrated: got null; expected "steps and heads" as in state 1',
    ),
    "older": (
        lambda: [state(0), replace(state(1), maps=None)],
        "state 2: maps: got none; expected some as in state 1",
    ),
    "the same video": (
        lambda: [state(0), state(1, prompts=["c", "a"], seed=2)],
        'state 2: prompts: got "c" with seed 2; expected other videos than those of state 1',
    ),
    "joined before": (
        lambda: [state(0), join([state(0), state(1)])],
        "state 2: got a state that was joined before; expected single searches",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_does_not_belong_together_is_refused(case):
    states, message = MISTAKES[case]
    with pytest.raises(SvditError, match=f"(?s){message}"):
        join(states())
