"""Two ways of running one model beside each other: same prompts, same noise, one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from svdit.plans.bundle import Bundle, read_bundle
from svdit.plans.errors import complain
from svdit.plans.flops import flops_of, mean_density
from svdit.plans.schema import Plan
from svdit.runtime.denoise import Feed, run_all
from svdit.runtime.layers import TOLERANCE, LayerErrors, judge, mark_layers
from svdit.runtime.metrics import max_abs_error, psnr, rel_l2_error, ssim
from svdit.runtime.pipeline import Generated, Model, Request, finish, prepare, stages_for
from svdit.runtime.polygraphy_bridge import OutputError, compare_outputs
from svdit.runtime.runner import Runner, make_runner, resolve_backend


@dataclass(frozen=True)
class VideoScore:
    """One prompt: its video against the reference video."""

    prompt: str
    seed: int
    psnr: float
    ssim: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found; the reference is what `against` names."""

    against: str
    backend: str
    runner: str
    scores: tuple[VideoScore, ...]
    outputs: tuple[OutputError, ...]
    latents_rel_l2: float
    latents_max_abs: float
    density: float
    flops_ratio: float
    reference: Generated
    compared: Generated
    layers: LayerErrors | None = None

    @property
    def speedup(self) -> float:
        """Summed denoiser time of the reference over that of the compared run, all steps."""
        return float(self.reference.step_seconds.sum() / self.compared.step_seconds.sum())

    def figures(self) -> dict[str, object]:
        """Plain JSON. A PSNR of identical videos is null, with `identical` true."""
        finite = [score.psnr for score in self.scores]
        return {
            "backend": self.backend,
            "runner": self.runner,
            "against": self.against,
            "steps": self.compared.steps,
            "guidance": self.compared.guidance,
            "psnr": _json(np.mean(finite)),
            "ssim": float(np.mean([score.ssim for score in self.scores])),
            "identical": bool(np.array_equal(self.reference.videos, self.compared.videos)),
            "max_abs_error": max(e.max_abs_error for e in self.outputs),
            "rel_l2_error": _json(max(e.rel_l2_error for e in self.outputs)),
            "latents": {"max_abs_error": self.latents_max_abs, "rel_l2_error": _json(self.latents_rel_l2)},
            "density": self.density,
            "flops_ratio": _json(self.flops_ratio),
            "latency_ms": float(np.median(self.compared.step_seconds) * 1000),
            "against_latency_ms": float(np.median(self.reference.step_seconds) * 1000),
            "speedup": self.speedup,
            "prompts": [{**asdict(score), "psnr": _json(score.psnr)} for score in self.scores],
            "outputs": [{**asdict(e), "rel_l2_error": _json(e.rel_l2_error)} for e in self.outputs],
            "step_ms": {"compared": _milliseconds(self.compared), "reference": _milliseconds(self.reference)},
            **({} if self.layers is None else {"layers": layer_figures(self.layers)}),
        }


def layer_figures(layers: LayerErrors) -> dict[str, object]:
    """Plain JSON of the errors of all layers."""
    first = layers.first_departure
    return {
        "tolerance": layers.tolerance,
        "first_departure": None if first is None else first.path,
        "errors": [
            {**asdict(e), "rel_l2_error": _json(e.rel_l2_error), "limit": _json(layers.limit(e.layer))}
            for e in layers.errors
        ],
    }


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _milliseconds(made: Generated) -> list[float]:
    return [round(float(second) * 1000, 3) for second in made.step_seconds]


def dense_export_command(bundle: Bundle, folder: Path) -> str:
    """The svdit-export command that makes the dense bundle belonging to `bundle` in `folder`."""
    manifest = bundle.manifest
    checkpoint = "" if manifest.checkpoint == "packaged" else f" --checkpoint {manifest.checkpoint}"
    return (
        f"svdit-export --model {manifest.model} --plan {bundle.path / 'plan.json'}{checkpoint} --variant dense "
        f"--precision {manifest.precision} --batch {manifest.batch} -o {folder}"
    )


def is_full(plan: Plan) -> bool:
    """Whether every head of every layer keeps everything: what a plugin bundle needs to be the dense one."""
    return all(name == "full" for stage in plan.stages for heads in stage.layers for name in heads)


def dense_bundle(bundle: Bundle, folder: Path | None) -> Bundle:
    """The dense bundle to compare with: `folder`, or `<bundle>-dense` beside the bundle.

    Raises SvditError when it is missing (with the command that makes it) or belongs to another model.
    """
    place = folder if folder is not None else bundle.path.resolve().parent / f"{bundle.path.resolve().name}-dense"
    if not place.is_dir():
        raise complain(
            "--against dense",
            f"no bundle at {place}",
            "a dense bundle of the same model",
            f"make it with: {dense_export_command(bundle, place)}",
        )
    dense = read_bundle(place)
    if dense.manifest.variant != "dense" and not is_full(dense.plan):
        raise complain(
            f"{place}: variant",
            repr(dense.manifest.variant),
            "'dense'",
            f"make one with: {dense_export_command(bundle, place)}",
        )
    hint = f"make one with: {dense_export_command(bundle, place)}"
    _check_alike(bundle, dense, ("model", "geometry", "latent_shape", "checkpoint", "precision", "batch"), hint)
    return dense


def other_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle in `folder`: the plan and weights of `bundle` in another variant or precision.

    Raises SvditError when it differs in anything else.
    """
    other = read_bundle(folder)
    names = ("model", "plan_sha256", "geometry", "latent_shape", "checkpoint", "batch")
    _check_alike(bundle, other, names, "export both of one plan and checkpoint, with one --batch")
    return other


def _check_alike(bundle: Bundle, other: Bundle, names: Sequence[str], hint: str) -> None:
    """Raise SvditError unless the manifests agree in `names` and the weights are the same."""
    for name in names:
        mine, theirs = getattr(bundle.manifest, name), getattr(other.manifest, name)
        if mine != theirs:
            raise complain(f"{other.path}: {name}", str(theirs), f"{mine} as in {bundle.path}", hint)
    mine = {w.file: (w.size, w.header_sha256) for w in bundle.manifest.weights}
    theirs = {w.file: (w.size, w.header_sha256) for w in other.manifest.weights}
    for name in sorted(set(mine) & set(theirs)):
        if mine[name] != theirs[name]:
            raise complain(f"{other.path}: {name}", "other weights", f"those of {bundle.path}", "export both again")


def make_pair(
    bundle: Bundle,
    backend: str,
    against: str,
    dense: Path | None,
    source: Bundle,
    *,
    device: str,
    threads: int | None,
) -> tuple[Runner, Runner]:
    """(reference, compared) runners, not yet active. The backend `against` runs `source`: `bundle`, or another one
    of its plan.
    """
    backend = resolve_backend(bundle, backend)
    compared = make_runner(bundle, backend, device=device, threads=threads)
    if against == "dense":
        if source is not bundle:
            hint = "use --dense DIR, or --against BACKEND"
            raise complain("--other", str(source.path), "nothing with --against dense", hint)
        if bundle.manifest.variant == "dense":
            raise complain(
                f"{bundle.path}: variant",
                "'dense'",
                "a sparse bundle with --against dense",
                "name the portable or plugin bundle; its dense sibling is found or given with --dense",
            )
        if backend == "torch" and dense is None:
            return make_runner(bundle, "torch", device=device, threads=threads, dense=True), compared
        full = dense_bundle(bundle, dense)
        return make_runner(full, backend, device=device, threads=threads), compared
    if dense is not None:
        raise complain("--dense", str(dense), f"nothing with --against {against}", "use --against dense")
    if source is bundle and resolve_backend(bundle, against) == backend:
        raise complain("--against", repr(against), f"another backend than {backend}, or dense")
    return make_runner(source, against, device=device if against == "torch" else "cpu", threads=threads), compared


def compare(
    bundle: Bundle,
    request: Request,
    *,
    backend: str = "auto",
    against: str = "dense",
    dense: Path | None = None,
    other: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    layers: bool = False,
    show: bool = True,
) -> Comparison:
    """Run both, step by step in turn, then judge videos, latents and single denoiser outputs.

    Single outputs are compared on inputs of the reference run: the first prompt at the first step of
    every stage and at the last step. `layers` compares the output of every attention layer on the same inputs.
    `other` is the folder of the bundle that the backend `against` runs, if not this one.
    """
    source = bundle if other is None else other_bundle(bundle, other)

    def pair() -> tuple[Runner, Runner]:
        return make_pair(bundle, backend, against, dense, source, device=device, threads=threads)

    reference, compared = pair()
    marked = [mark_layers(runner, bundle) for runner in pair()] if layers else []
    model, plan = Model.of(bundle, device), bundle.plan
    feeds: dict[int, tuple[int, int, Feed]] = {}
    with reference, compared, torch.inference_mode():
        runs = [prepare(r, model, request, stages_for(r, plan)) for r in (reference, compared)]
        steps = int(runs[0].steps)
        of_step = [plan.stage_of(step, steps) for step in range(steps)]
        wanted = {of_step.index(stage) for stage in of_step} | {steps - 1}

        def watch(step: int, stage: int, feed: Feed) -> None:
            if step in wanted and step not in feeds:
                feeds[step] = (step, of_step[step], {name: array.copy() for name, array in feed.items()})

        _warm_up((reference, compared), model, request, plan)
        runs[0].watch = watch
        run_all(runs, f"{reference.name} and {compared.name}", show)
        recorded = [feeds[step] for step in sorted(feeds)]
        outputs = compare_outputs(reference, compared, recorded)
        first, second = (finish(run, model) for run in runs)
    layer_errors = None
    if layers:
        coarsest = max(TOLERANCE[b.manifest.precision] for b in (bundle, source))
        tolerance = None if against == "dense" else coarsest
        with marked[0], marked[1], torch.inference_mode():
            layer_errors = judge(compare_outputs(*marked, recorded), tolerance)
    scores = [
        VideoScore(prompt, seed, psnr(a, b), ssim(a, b))
        for prompt, seed, a, b in zip(request.prompts, request.seeds, first.videos, second.videos, strict=True)
    ]
    density = 1.0 if bundle.manifest.variant == "dense" else mean_density(plan, steps)
    return Comparison(
        against if against == "dense" else reference.name,
        compared.backend,
        compared.name,
        tuple(scores),
        tuple(outputs),
        rel_l2_error(first.latents, second.latents),
        max_abs_error(first.latents, second.latents),
        density,
        flops_of(plan, density).ratio,
        first,
        second,
        layer_errors,
    )


def _warm_up(runners: Sequence[Runner], model: Model, request: Request, plan: Plan) -> None:
    """One untimed step of each, so that first-call costs are in neither time."""
    short = Request(request.prompts[:1], request.seed, 1, request.guidance)
    for runner in runners:
        prepare(runner, model, short, stages_for(runner, plan)).step()


def scores_table(found: Comparison) -> Sequence[tuple[str, str, str]]:
    """Rows (prompt, PSNR, SSIM) as text."""
    return [
        (s.prompt, "identical" if math.isinf(s.psnr) else f"{s.psnr:.2f} dB", f"{s.ssim:.4f}") for s in found.scores
    ]


def layers_table(layers: LayerErrors) -> list[str]:
    """A line for each layer, at the step where its relative error is largest."""
    rows = [(e.path, e) for e in layers.worst()]
    width = max(len(path) for path, _ in rows)
    return [
        f"{path:<{width}}  rel. L2 {e.rel_l2_error:.3e}  max. {e.max_abs_error:.3e}  (step {e.step})"
        + ("" if layers.tolerance is None else f"  limit {layers.limit(e.layer):.1e}")
        for path, e in rows
    ]
