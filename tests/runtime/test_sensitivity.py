"""Measured weights of steps and heads against what plans really do to the latents."""

from __future__ import annotations

import numpy as np
import pytest

from svdit.plans.budget import combined_error
from svdit.plans.errors import SvditError
from svdit.plans.patterns import pattern_from_json
from svdit.plans.schema import Plan, Stage
from svdit.plans.search import Rule, probes
from svdit.plans.tiles import Tiling
from svdit.runtime.measure import search
from svdit.runtime.pipeline import Model, Request, generate
from svdit.runtime.sensitivity import by_head, by_step, coherences, measure_sensitivity, scalar_products
from svdit.runtime.torch_runner import TorchRunner
from tests.runtime.conftest import PROMPTS, TILE

pytestmark = pytest.mark.usefixtures("whole_runs_have_four_steps")
SPECS = {
    "skip": {"kind": "skip"},
    "band": {"kind": "diagonal", "frames": 0},
    "wide": {"kind": "diagonal", "frames": 1},
    "place": {"kind": "multi_diagonal", "rows": 0, "cols": 0},
}


@pytest.fixture(scope="module")
def state(adapter, checkpoint):
    given = {"steps": 4, "tile": TILE, "candidates": SPECS, "projected": True, "show": False}
    return search(adapter, checkpoint, PROMPTS, rule=Rule(dense_steps=1.0), **given).state


def test_weights_by_hand():
    """Two heads, one twice as loud; the second of three steps counts tenfold; the ratio holds between tried steps."""
    error = np.full((3, 1, 2), 0.5)
    final, after = np.array([1.0, 10.0, 1.0]), np.array([3.0, 3.0, 3.0])
    alone = np.array([[[1.0, 2.0]], [[1.0, 2.0]]])
    steps = by_step(error, final)
    assert steps[:, 0].tolist() == [[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]]
    found = steps * by_head(error, after, np.array([0, 2]), alone)
    np.testing.assert_allclose(found[:, 0, 1] / found[:, 0, 0], 2.0)
    np.testing.assert_allclose(found[:, 0, 0] / found[0, 0, 0], [1, 10, 1])
    np.testing.assert_allclose((found * error).sum((1, 2)), final, err_msg="heads that add up give the step's error")


def test_probes_are_sparse_and_the_best_of_those(state):
    measured, chosen = state.measurement(), probes(state.measurement())
    for layer, head in np.ndindex(*chosen.shape):
        kept = 1 - measured.sparsity[layer, head]
        allowed = [m for m in range(len(SPECS)) if 0 < kept[m] <= 0.25]
        sums = measured.relative()[:, layer, head].sum(0)
        assert chosen[layer, head] == min(allowed, key=lambda m: sums[m])


def measured_again(adapter, checkpoint, state, **more):
    model = Model(adapter, checkpoint, Tiling(state.geometry, TILE))
    with TorchRunner(adapter, checkpoint, model.tiling, None) as runner:
        return measure_sensitivity(runner, model, Request(PROMPTS, 0, len(state.error)), state, show=False, **more)


@pytest.fixture(scope="module")
def found(adapter, checkpoint, state):
    return measured_again(adapter, checkpoint, state)


def sparse_at(state, steps: set[int]) -> Plan:
    """The probes of all heads at these of the 4 steps, full attention at the others."""
    measured, chosen = state.measurement(), probes(state.measurement())
    layers, heads = chosen.shape
    sparse = tuple(tuple(measured.modes[chosen[n, h]] for h in range(heads)) for n in range(layers))
    dense = (("full",) * heads,) * layers
    stages = [Stage((step + 1) / 4, sparse if step in steps else dense) for step in range(4)]
    patterns = {name: pattern_from_json(SPECS[name]) for name in SPECS if name != "skip"}
    return Plan("tiny", state.geometry, TILE, patterns, tuple(stages), {"method": "test"})


def final_error(adapter, checkpoint, plan: Plan) -> float:
    """Geometric mean over the videos."""
    dense = generate(adapter, checkpoint, PROMPTS, tile=TILE, steps=4).latents.astype(np.float64)
    apart = np.square(generate(adapter, checkpoint, PROMPTS, plan=plan, steps=4).latents - dense)
    return float(np.prod([video.mean() for video in apart]) ** (1 / len(PROMPTS)))


def test_weights_predict_what_plans_do_to_the_last_latents(adapter, checkpoint, state, found):
    """Plans that are sparse at one step, run by the op: predicted and real errors within a factor of 1.6."""
    measured = state.measurement()
    assert found.weights.shape == measured.power.shape and (found.weights > 0).all()
    picked = np.take_along_axis(measured.relative(), probes(measured)[None, ..., None], -1)[..., 0]
    predicted = (found.weights * picked).sum((1, 2))
    real = np.array([final_error(adapter, checkpoint, sparse_at(state, {step})) for step in range(4)])
    assert np.abs(np.log(predicted / real)).max() < np.log(1.6)
    assert np.log(real).std() > 0.1, "steps differ, so that the weights can be wrong"


def test_weights_of_steps_alone_are_those_of_all_heads_together(adapter, checkpoint, state, found):
    """With every head under its probe both say what the step counts."""
    alone, measured = measured_again(adapter, checkpoint, state, heads_too=False), state.measurement()
    assert (alone.weights == alone.weights[:, :1, :1]).all() and not (found.weights == found.weights[:, :1, :1]).all()
    np.testing.assert_array_equal(alone.coherence, found.coherence)
    picked = np.take_along_axis(measured.relative(), probes(measured)[None, ..., None], -1)[..., 0]
    real = np.array([final_error(adapter, checkpoint, sparse_at(state, {step})) for step in range(4)])
    np.testing.assert_allclose((alone.weights * picked).sum((1, 2)), real, rtol=1e-3)


def test_coherence_predicts_two_steps_together(adapter, checkpoint, state, found):
    """Nearer to the error of a plan sparse at two steps than the sum of its two errors is, or as near."""
    real = np.array([final_error(adapter, checkpoint, sparse_at(state, {step})) for step in range(4)])
    own = np.diagonal(found.coherence, axis1=1, axis2=2)
    np.testing.assert_allclose(own.prod(0), 1.0, err_msg="of videos beside a typical one")
    assert (found.coherence == found.coherence.transpose(0, 2, 1)).all()
    for pair in ((1, 2), (2, 3)):
        both = final_error(adapter, checkpoint, sparse_at(state, set(pair)))
        on = np.isin(np.arange(4), pair)
        combined_both = combined_error(np.where(on, real, 0.0), found.coherence)
        assert abs(np.log(combined_both / both)) <= abs(np.log(real[on].sum() / both)) + 0.1


def test_coherences_by_hand():
    """Squares in the second video are 16 times those of the first. Step 2 goes against step 0, step 3 does nothing."""
    products = np.array([[4.0, 2.0, -1.0, 0.0], [2.0, 4.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 0.0], [0.0] * 4])
    expected = np.array([[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(coherences(products[None])[0], expected)
    louder = np.where(np.eye(4) * np.arange(4) == 3, 1, 4)
    found = coherences(np.stack([products, products * 16]))
    np.testing.assert_allclose(found, [expected / louder, expected * louder])


def test_scalar_products_are_of_each_video():
    changes = np.random.default_rng(3).normal(size=(2, 3, 5, 7)).astype(np.float32)
    found = scalar_products(changes)
    assert found.shape == (2, 3, 3) and found.dtype == np.float64
    for video, a, b in np.ndindex(2, 3, 3):
        expected = sum(x * y for x, y in zip(changes[video, a].ravel(), changes[video, b].ravel(), strict=True)) / 35
        assert found[video, a, b] == pytest.approx(expected, abs=1e-6)


def test_sensitivity_is_deterministic(adapter, checkpoint, state, found):
    again = measured_again(adapter, checkpoint, state)
    np.testing.assert_array_equal(found.weights, again.weights)
    np.testing.assert_array_equal(found.coherence, again.coherence)


def test_refuses_candidates_without_a_probe(adapter, checkpoint):
    given = {"steps": 2, "tile": TILE, "candidates": {"skip": {"kind": "skip"}}, "show": False}
    found = search(adapter, checkpoint, PROMPTS, rule=Rule(dense_steps=1.0), **given).state
    with pytest.raises(SvditError, match=r"candidates: got none for some head; expected one that keeps at most 0\.25"):
        measured_again(adapter, checkpoint, found)
