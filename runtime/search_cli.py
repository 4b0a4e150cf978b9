"""svdit-search: options in, one search or one new choice from an old one, a plan file out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from svdit.plans import baselines
from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.dynamics import DEFAULT_SPREAD
from svdit.plans.errors import SvditError, complain, rooted
from svdit.plans.schema import Plan, write_plan
from svdit.plans.search import (
    DEFAULT_DENSE_STEPS,
    DEFAULT_EPS,
    DEFAULT_ERROR_SCALE,
    DEFAULT_LAM,
    NORMALISERS,
    Rule,
    rule_for_density,
)
from svdit.plans.search_state import default_state
from svdit.runtime.prompt_options import collect_prompts, prompt_options

if TYPE_CHECKING:
    from svdit.plans.budget import Target
    from svdit.plans.cost import CostModel, Hardware
    from svdit.plans.search_state import SearchState

METHODS = ("sparse-vdit", "budget", *baselines.METHODS)
TARGETS = ("target_speedup", "target_density", "target_error")
BUDGET = (*TARGETS, "hardware", "batch", "spread", "calibrate", "calibrate_steps")
"""Options of --method budget alone."""
PAPER = ("lam", "eps", "error_scale")
"""Options of --method sparse-vdit alone."""
FILE = click.Path(path_type=Path)
MEASURING = (
    "model",
    "checkpoint",
    "frames",
    "height",
    "width",
    "prompt",
    "prompts_file",
    "seed",
    "steps",
    "guidance",
    "device",
    "dtype",
    "tile",
    "candidates",
    "query_tiles",
    "calibrate",
    "calibrate_steps",
    "state",
)
"""Options that say what to measure; none of them goes with --from-state."""


def parse_tile(text: str) -> tuple[int, int, int]:
    """ "1,8,16" -> (1, 8, 16)."""
    from svdit.plans.tiles import check_tile

    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise complain("--tile", repr(text), "three integers such as 1,8,16") from None
    return check_tile(sizes)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="NAME", help="Model to search for; required unless --from-state is given.")
@click.option("--checkpoint", type=FILE, metavar="DIR", help="Weights (default: those shipped with the model).")
@click.option(
    "--method",
    default="sparse-vdit",
    show_default=True,
    metavar="NAME",
    help="sparse-vdit: the paper's rule. budget: the best plan for a --target. Or a rival: "
    + ", ".join(baselines.METHODS)
    + ".",
)
@click.option("--target-speedup", type=float, metavar="X", help="budget: dense over plan time of a denoiser pass.")
@click.option("--target-density", type=float, metavar="D", help="budget: share of query-key pairs kept.")
@click.option("--target-error", type=float, metavar="E", help="budget: weighted mean relative error.")
@click.option(
    "--hardware", default="h100", show_default=True, metavar="NAME|FILE", help="budget: latency table to plan for."
)
@click.option("--batch", type=int, default=1, show_default=True, help="budget: rows of a denoiser pass to plan for.")
@click.option(
    "--spread",
    type=float,
    help=f"budget: how much more errors of early steps weigh (default: as calibrated, else {DEFAULT_SPREAD:g}).",
)
@click.option("--calibrate", is_flag=True, help="budget: measure what errors of each step and head do to the end.")
@click.option("--calibrate-steps", is_flag=True, help="budget: the same of each step alone, in a few passes.")
@click.option("--lam", type=float, default=DEFAULT_LAM, show_default=True, help="Price of density (lambda).")
@click.option("--eps", type=float, default=DEFAULT_EPS, show_default=True, help="Loss above which a head stays full.")
@click.option(
    "--error-scale",
    type=float,
    default=DEFAULT_ERROR_SCALE,
    show_default=True,
    help="Factor on the normalised error before the rule.",
)
@click.option(
    "--normaliser",
    default="layer",
    show_default=True,
    metavar="|".join(NORMALISERS),
    help="Mean square that errors are divided by: of the whole layer, or of each head.",
)
@click.option(
    "--dense-steps",
    type=float,
    default=DEFAULT_DENSE_STEPS,
    show_default=True,
    help="Share of the steps, from the first, kept full (not budget, which chooses them).",
)
@click.option("--density", type=float, help="Kept share of query-key pairs; for sparse-vdit it sets lam = eps.")
@click.option("--max-stages", type=int, default=3, show_default=True, help="Most stages of the plan.")
@click.option("--frames", type=int, help="Frames of the video (default: those of the model's reference video).")
@click.option("--height", type=int, help="Height of the video in pixels (default: as above).")
@click.option("--width", type=int, help="Width of the video in pixels (default: as above).")
@click.option("--steps", type=int, help="Denoising steps (default: the checkpoint's).")
@click.option("--guidance", type=float, help="Guidance scale (default: the checkpoint's).")
@prompt_options
@click.option("--seed", type=int, default=0, show_default=True, help="Prompt i uses seed + i.")
@click.option("--tile", metavar="T,H,W", help="Tile of the plan (default: the model's).")
@click.option(
    "--candidates", type=FILE, metavar="FILE", help="JSON object of patterns by name, or a search state: those it has."
)
@click.option("--query-tiles", type=int, help="Measure errors on that many query tiles (default: all).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16.")
@click.option("--state", type=FILE, metavar="FILE", help="State file (default: the output's name with .search.npz).")
@click.option(
    "--from-state",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Choose again from a finished search, without measuring; given several times: from all of them joined, which "
    "go to --state.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="GLOB",
    help="Leave candidates out of the choice by their names, such as 'heaviest-*'; may be repeated.",
)
@click.option("-o", "--output", type=FILE, required=True, metavar="P.plan.json", help="The plan file.")
@json_option
@click.pass_context
@reports_mistakes
def main(context: click.Context, **options: object) -> None:
    """Search a plan: measure every pattern on every head along the denoising trajectory, then choose.

    A search that was interrupted goes on where it stopped when the same command is given again.
    """
    output: Path = options["output"]  # type: ignore[assignment]
    method = str(options["method"])
    given = {
        name for name in options if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    _check_method(method, given)
    rule = Rule(*(options[name] for name in ("lam", "eps", "error_scale", "normaliser", "dense_steps")))  # type: ignore[arg-type]
    _check_outputs(output, options["json_file"])  # type: ignore[arg-type]
    states: tuple[Path, ...] = options["from_state"]  # type: ignore[assignment]
    if states:
        measuring = [name for name in MEASURING if name in given]
        if len(states) > 1 and "state" in measuring:
            measuring.remove("state")
        if measuring:
            raise complain(
                "--from-state",
                f"also {_flags(measuring)}",
                "no options that say what to measure",
                "the state file holds its own settings",
            )
        plan = _choose_again(states, options, rule)
    else:
        plan = _search(options, rule, output)
    write_plan(output, plan)
    write_json(options["json_file"], _figures(plan, output))  # type: ignore[arg-type]
    click.echo(_summary(plan, output))


def _figures(plan: Plan, output: Path) -> dict[str, object]:
    record = plan.provenance
    taken = ("lam", "eps", "target", "weighted_error", "gap", "gap_at_these_cuts", "predicted")
    return {
        "density": record["density"],
        "steps": record["steps"],
        "stages": len(plan.stages),
        **{name: record[name] for name in taken if name in record},
        "method": record["method"],
        "choice": record["choice"],
        "plan": str(output),
    }


def _summary(plan: Plan, output: Path) -> str:
    """The last line, and one about the predicted time of a budget plan: how much of it is an estimate."""
    record = plan.provenance
    text = (
        f"{output}: {len(plan.stages)} stages, {len(plan.patterns)} patterns, density "
        f"{record['density']:.4f} ({record['choice']})"
    )
    found = record.get("predicted")
    if found is None:
        return text
    text += (
        f"\n{found['scope']} {found['speedup']:.3f}x on {found['hardware']}: {found['latency_ms']:.4g} of "
        f"{found['dense_latency_ms']:.4g} ms a pass; weighted error {record['weighted_error']:.4g}, within "
        f"{100 * record['gap']:.2g} % of the optimum"
    )
    if found["estimated"]:
        text += (
            f"\nNOTE the time is an estimate: attention {found['attention']}, outside attention "
            f"{found['outside_attention']}"
        )
    return text


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_file", "").replace("_", "-") for name in names)


def _check_method(method: str, given: set[str]) -> None:
    """Each method takes its own options, and exactly one target where it needs one."""
    if method not in METHODS:
        raise complain("--method", repr(method), "one of " + ", ".join(METHODS))
    foreign = PAPER if method != "sparse-vdit" else ()
    if method == "budget":
        foreign += ("density", "dense_steps")
        targets = [name for name in TARGETS if name in given]
        if len(targets) != 1:
            raise complain("--method budget", _flags(targets) or "no target", f"one of {_flags(list(TARGETS))}")
    else:
        foreign += BUDGET
        if method != "sparse-vdit":
            foreign += ("max_stages", "candidates", "without")
            if "density" not in given:
                raise complain("--density", "nothing", f"a density for {method}")
    if {"calibrate", "calibrate_steps"} <= given:
        raise complain("--calibrate", "also --calibrate-steps", "one of them")
    wrong = [name for name in foreign if name in given]
    if wrong:
        raise complain(f"--method {method}", _flags(wrong), "options of this method only", "see docs/search.md")


def _check_outputs(output: Path, json_file: Path | None) -> None:
    from svdit.runtime.video import check_target

    if not output.name.endswith(".json"):
        raise complain("--output", str(output), "a file name that ends in .json", "P.plan.json is the custom")
    check_target(output, None, "--output")
    if json_file is not None:
        check_target(json_file, None, "--json")


def _search(options: dict, rule: Rule, output: Path) -> Plan:
    from svdit.plans import registry
    from svdit.plans.search_state import read_state
    from svdit.plans.tiles import Tiling
    from svdit.runtime.candidates import read_candidates
    from svdit.runtime.measure import search
    from svdit.runtime.torch_runner import checkpoint_of

    if options["model"] is None:
        raise complain("--model", "nothing", f"one of {', '.join(registry.model_names())}")
    adapter = registry.adapter(options["model"])
    if options["method"] not in baselines.UNMEASURED:
        prompts = collect_prompts(options["prompt"], options["prompts_file"])
    tile = adapter.default_tile() if options["tile"] is None else parse_tile(options["tile"])
    size = (options["frames"], options["height"], options["width"])
    tiling = Tiling(adapter.geometry_for(size, checkpoint_of(adapter, options["checkpoint"])), tile)
    specs = None
    if options["candidates"] is not None:
        is_state = options["candidates"].suffix == ".npz"
        specs = read_state(options["candidates"]) if is_state else read_candidates(options["candidates"], tiling)
    if options["method"] in baselines.METHODS:
        steps = options["steps"] or adapter.sampling(checkpoint_of(adapter, options["checkpoint"])).steps
        dense = sum(rule.is_dense(step, steps) for step in range(steps))
        with rooted("--"):
            if options["method"] in baselines.UNMEASURED:
                wanted = (tiling.geometry, tile, options["density"], dense, steps)
                return baselines.unmeasured_plan(options["method"], adapter.name, *wanted)
            within = baselines.sparse_density(options["density"], dense, steps)
            specs = baselines.candidates(options["method"], tiling, within)
    _check_target(options)
    if options["method"] != "sparse-vdit":
        rule = Rule(dense_steps=1.0)  # errors are measured along the dense trajectory
    state_file = options["state"] or default_state(output)
    found = search(
        adapter,
        options["checkpoint"],
        prompts,
        seed=options["seed"],
        steps=options["steps"],
        guidance=options["guidance"],
        rule=rule,
        max_stages=options["max_stages"],
        size=size,
        tile=tile,
        candidates=specs,
        query_tiles=options["query_tiles"],
        projected=options["method"] == "budget",
        calibrate="steps and heads" if options["calibrate"] else "steps" if options["calibrate_steps"] else None,
        device=options["device"],
        dtype=options["dtype"],
        state=state_file,
    )
    click.echo(f"measured errors are in {state_file} (svdit-search --from-state chooses again from them)", err=True)
    if options["method"] == "sparse-vdit" and options["density"] is None and not options["without"]:
        return found.plan
    return _choose(found.state, options, rule)


def _choose_again(files: tuple[Path, ...], options: dict, rule: Rule) -> Plan:
    """A plan from one finished search or from several; several are written to --state as one, if it is given."""
    from svdit.plans.joined import join
    from svdit.plans.search_state import read_state, write_state
    from svdit.runtime.video import check_target

    if len(files) == 1:
        return _choose(read_state(files[0]), options, rule)
    target: Path | None = options["state"]
    if target is not None:
        check_target(target, None, "--state")
        if target.exists():
            raise complain("--state", f"{target}, which exists", "a new file for the joined searches")
    state = join([read_state(file) for file in files], [str(file) for file in files])
    plan = _choose(state, options, rule)
    if target is not None:
        write_state(target, state)
    return plan


def _choose(state: SearchState, options: dict, rule: Rule) -> Plan:
    """The plan that the method makes of a finished state."""
    from svdit.runtime.measure import baseline_plan_of, budget_plan_of, plan_of

    if options["without"]:
        with rooted("--"):
            state = state.without(options["without"])
    if options["method"] == "budget":
        target, hardware = _check_target(options)
        with rooted("--target-"):
            return budget_plan_of(
                state,
                target,
                max_stages=options["max_stages"],
                cost=_cost(hardware, state, target, options["batch"]),
                spread=options["spread"],
                normaliser=options["normaliser"],
            )
    if options["method"] in baselines.METHODS:
        return baseline_plan_of(state, options["method"], options["density"], options["dense_steps"])
    if options["density"] is not None:
        rule = _rule_for(state.measurement(), options)
    return plan_of(state, rule, options["max_stages"])


def _cost(hardware: Hardware, state: SearchState, target: Target, batch: int) -> CostModel | None:
    """The cost model of the state's geometry; a density needs none, so a table without its head size is no mistake."""
    from svdit.plans.cost import cost_model

    try:
        return cost_model(hardware, state.settings["model"], state.geometry, batch)
    except SvditError:
        if target.goal == "density":
            return None
        raise


def _check_target(options: dict) -> tuple:
    """(Target, Hardware) of the budget method; mistakes in them are found before anything is measured."""
    from svdit.plans.budget import Target
    from svdit.plans.cost import read_hardware
    from svdit.plans.dynamics import check_spread
    from svdit.plans.fields import integer

    if options["method"] != "budget":
        return None, None
    name = next(name for name in TARGETS if options[name] is not None)
    if options["spread"] is not None:
        check_spread(options["spread"], "--spread")
    integer(options["batch"], "--batch", 1)
    with rooted("--target-"):
        target = Target(name.removeprefix("target_"), options[name])
    with rooted("--"):
        return target, read_hardware(options["hardware"])


def _rule_for(measured: object, options: dict) -> Rule:
    try:
        return rule_for_density(
            measured,
            options["density"],
            options["max_stages"],  # type: ignore[arg-type]
            options["error_scale"],
            options["normaliser"],
            options["dense_steps"],
        )
    except SvditError as error:
        raise error.under("--") from None


if __name__ == "__main__":
    main()
