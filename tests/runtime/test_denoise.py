"""The loop against one written independently here, with a fake denoiser whose arithmetic is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from svdit.plans.bundle import TensorSpec
from svdit.plans.errors import SvditError
from svdit.runtime.denoise import Denoising, noise_for, run_all
from svdit.runtime.runner import Runner
from svdit.runtime.scheduler_state import load_scheduler, save_scheduler

LATENT = (2, 3, 4, 4)


class FakeRunner(Runner):
    """noise_pred = latents * a(text) + timestep / 1000 + stage, every call written down."""

    backend = "fake"

    def __init__(self, batch: int | str = "B", stages: int = 3) -> None:
        shape = (batch, *LATENT)
        super().__init__(
            "fake",
            (
                TensorSpec("hidden_states", "float32", shape),
                TensorSpec("timestep", "float32", (batch,)),
                TensorSpec("encoder_hidden_states", "float32", (batch, 2, 3)),
                TensorSpec("stage", "int32", (1,)),
            ),
            (TensorSpec("noise_pred", "float32", shape),),
            stages,
        )
        self.calls: list[tuple[int, float, int, np.ndarray]] = []

    def _activate(self) -> None:
        pass

    def _close(self) -> None:
        pass

    def _infer(self, feed, stage):
        weight = feed["encoder_hidden_states"].mean((1, 2))[:, None, None, None, None]
        self.calls.append((len(feed["timestep"]), float(feed["timestep"][0]), stage, feed["encoder_hidden_states"]))
        out = feed["hidden_states"] * weight + feed["timestep"][:, None, None, None, None] / 1000 + stage
        return {"noise_pred": out.astype(np.float32)}


def thirds(step: int, steps: int) -> int:
    return min(2, 3 * step // steps)


def embeddings(prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.linspace(-0.5, 0.5, prompts * 6).reshape(prompts, 2, 3)
    return text, torch.full((1, 2, 3), 0.1)


def by_hand(
    noise: torch.Tensor, text: torch.Tensor, uncond: torch.Tensor, steps: int, guidance: float, shift: float
) -> np.ndarray:
    """Rectified flow by Euler steps on shifted sigmas in float64, one prompt at a time."""
    base = np.linspace(1.0, 1.0 / 1000, 1000)  # diffusers' training sigmas, from which it takes its ends
    base = shift * base / (1 + (shift - 1) * base)
    sigmas = np.linspace(base[0], base[-1], steps)
    sigmas = np.append(shift * sigmas / (1 + (shift - 1) * sigmas), 0.0)
    rows = []
    for i in range(len(noise)):
        x = noise[i].numpy().astype(np.float64)
        for step in range(steps):

            def predict(embedding: torch.Tensor, x=x, step=step) -> np.ndarray:
                return x * float(embedding.double().mean()) + sigmas[step] + thirds(step, steps)

            v = predict(text[i])
            if guidance > 1:
                v = predict(uncond[0]) + guidance * (v - predict(uncond[0]))
            x = x + (sigmas[step + 1] - sigmas[step]) * v
        rows.append(x)
    return np.stack(rows)


@pytest.mark.parametrize("batch", ["B", 1, 2, 3, 4])
@pytest.mark.parametrize(("prompts", "guidance"), [(1, 3.0), (3, 3.0), (3, 1.0), (1, 0.0)])
def test_loop_against_hand_written_euler(batch, prompts, guidance):
    text, uncond = embeddings(prompts)
    noise = noise_for(range(prompts), LATENT)
    with FakeRunner(batch) as runner:
        run = Denoising(runner, FlowMatchEulerDiscreteScheduler(shift=3.0), noise, text, uncond, 7, guidance, thirds)
        run_all([run], "test", show=False)
    expected = by_hand(noise, text, uncond, 7, guidance, 3.0)
    np.testing.assert_allclose(run.latents.numpy(), expected, rtol=2e-5, atol=2e-5)
    assert [r.stage for r in run.records] == [thirds(i, 7) for i in range(7)]
    assert all(r.seconds >= 0 for r in run.records)
    rows = prompts * (2 if guidance > 1 else 1)
    per_call = rows if batch == "B" else batch
    assert len(runner.calls) == 7 * -(-rows // per_call)
    assert {call[0] for call in runner.calls} == {per_call}


def test_rows_of_a_prompt_are_neighbours_uncond_first():
    text, uncond = embeddings(2)
    with FakeRunner(2) as runner:
        Denoising(
            runner,
            FlowMatchEulerDiscreteScheduler(),
            noise_for([0, 1], LATENT),
            text,
            uncond,
            1,
            2.0,
            lambda step, steps: 0,
        ).step()
    assert len(runner.calls) == 2
    for i, (_, timestep, stage, rows) in enumerate(runner.calls):
        assert (timestep, stage) == (1000.0, 0)
        np.testing.assert_array_equal(rows, torch.cat([uncond, text[i : i + 1]]).numpy())


def test_seed_decides_the_noise_alone():
    first = noise_for([5, 6], LATENT)
    torch.manual_seed(99)
    np.testing.assert_array_equal(first, noise_for([5, 6], LATENT))
    np.testing.assert_array_equal(first[1], noise_for([6], LATENT)[0])
    assert float((first[0] - first[1]).abs().max()) > 0.1
    np.testing.assert_array_equal(first[0], torch.randn(LATENT, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
)
def test_a_run_can_be_continued_from_saved_scheduler_state(scheduler):
    text, uncond = embeddings(2)
    noise = noise_for([0, 1], LATENT)
    with FakeRunner() as runner:
        whole = Denoising(runner, scheduler(), noise, text, uncond, 6, 3.0, thirds)
        run_all([whole], "test", show=False)
        for stop in range(1, 6):
            first = Denoising(runner, scheduler(), noise, text, uncond, 6, 3.0, thirds)
            for _ in range(stop):
                first.step()
            second = Denoising(runner, scheduler(), noise, text, uncond, 6, 3.0, thirds)
            second.resume(stop, first.latents)
            load_scheduler(second.scheduler, save_scheduler(first.scheduler))
            while not second.done:
                second.step()
            np.testing.assert_array_equal(second.latents, whole.latents)


def test_interleaved_runs_take_turns_at_going_first():
    order: list[str] = []
    text, uncond = embeddings(1)

    def watched(name: str, runner: Runner) -> Denoising:
        run = Denoising(runner, FlowMatchEulerDiscreteScheduler(), noise_for([0], LATENT), text, uncond, 3, 1.0, thirds)
        run.watch = lambda step, stage, feed: order.append(f"{name}{step}")
        return run

    with FakeRunner() as a, FakeRunner() as b:
        run_all([watched("a", a), watched("b", b)], "test", show=False)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0; expected an integer >= 1"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"steps": True}, "steps: got True"),
        ({"guidance": float("nan")}, "guidance: got nan; expected a finite number >= 0"),
        ({"guidance": -1.0}, "guidance: got -1.0"),
        ({"text": torch.zeros(3, 2, 3)}, "prompts: got 3 embeddings; expected 1, one per latent"),
    ],
)
def test_refuses(change, message):
    text, uncond = embeddings(1)
    given = {
        "runner": FakeRunner(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "latents": noise_for([0], LATENT),
        "text": text,
        "uncond": uncond,
        "steps": 2,
        "guidance": 1.0,
        "stage_of": thirds,
        **change,
    }
    with pytest.raises(SvditError, match=message):
        Denoising(**given)


def test_latents_that_explode_are_an_error():
    text, uncond = embeddings(1)
    with FakeRunner() as runner:
        run = Denoising(
            runner,
            FlowMatchEulerDiscreteScheduler(),
            noise_for([0], LATENT),
            torch.full_like(text, torch.inf),
            uncond,
            2,
            1.0,
            thirds,
        )
        with pytest.raises(SvditError, match="fake: step 0: got latents that are not finite"):
            run.step()


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "0"])
def test_seed_is_checked(seed):
    with pytest.raises(SvditError, match="seed: got"):
        noise_for([seed], LATENT)


@pytest.mark.parametrize(
    ("feed", "stage", "message"),
    [
        ({}, 3, r"fake: stage: got 3; expected an integer in 0\.\.2"),
        ({}, -1, "fake: stage: got -1"),
        ({"timestep": None}, 0, r"fake: inputs: got missing \['timestep'\], unknown \[\]"),
        ({"extra": np.zeros(1)}, 0, r"unknown \['extra'\]"),
        ({"timestep": np.zeros(2)}, 0, "fake: timestep dtype: got float64; expected float32"),
        ({"timestep": [0.0, 0.0]}, 0, "fake: timestep dtype: got list"),
        (
            {"timestep": np.zeros(3, np.float32)},
            0,
            r"fake: timestep shape: got \(3,\); expected B = 2 as in hidden_states",
        ),
        (
            {"encoder_hidden_states": np.zeros((2, 2, 4), np.float32)},
            0,
            r"encoder_hidden_states shape: got \(2, 2, 4\); expected \('B', 2, 3\)",
        ),
        ({"encoder_hidden_states": np.zeros((2, 2), np.float32)}, 0, r"encoder_hidden_states shape: got \(2, 2\)"),
    ],
)
def test_runner_checks_its_inputs(feed, stage, message):
    good = {
        "hidden_states": np.zeros((2, *LATENT), np.float32),
        "timestep": np.zeros(2, np.float32),
        "encoder_hidden_states": np.zeros((2, 2, 3), np.float32),
    }
    with FakeRunner() as runner:
        runner.infer(good, 2)
        with pytest.raises(SvditError, match=message):
            runner.infer({name: array for name, array in {**good, **feed}.items() if array is not None}, stage)


def test_runner_must_be_active():
    runner = FakeRunner()
    with pytest.raises(SvditError, match="fake: state: got not activated; expected an active runner"):
        runner.infer({}, 0)
    with pytest.raises(SvditError, match="fake: input: got 'latents'; expected one of"):
        runner.input("latents")
