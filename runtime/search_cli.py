"""svdit-search: options in, one search or one new choice from an old one, a plan file out."""

from __future__ import annotations

from pathlib import Path

import click

from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import SvditError, complain
from svdit.plans.search import (
    DEFAULT_DENSE_STEPS,
    DEFAULT_EPS,
    DEFAULT_ERROR_SCALE,
    DEFAULT_LAM,
    NORMALISERS,
    Rule,
    rule_for_density,
)
from svdit.runtime.prompt_options import collect_prompts, prompt_options

METHODS = ("sparse-vdit", "budget")
FILE = click.Path(path_type=Path)
MEASURING = (
    "model",
    "checkpoint",
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
    "--method", default="sparse-vdit", show_default=True, metavar="NAME", help="sparse-vdit, the paper's rule."
)
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
    help="Share of the steps, from the first, kept full.",
)
@click.option("--density", type=float, help="Choose lam = eps so that this density is met (from measured errors).")
@click.option("--max-stages", type=int, default=3, show_default=True, help="Most stages of the plan.")
@click.option("--steps", type=int, help="Denoising steps (default: the checkpoint's).")
@click.option("--guidance", type=float, help="Guidance scale (default: the checkpoint's).")
@prompt_options
@click.option("--seed", type=int, default=0, show_default=True, help="Prompt i uses seed + i.")
@click.option("--tile", metavar="T,H,W", help="Tile of the plan (default: the model's).")
@click.option("--candidates", type=FILE, metavar="FILE", help="JSON object of candidate patterns by name.")
@click.option("--query-tiles", type=int, help="Measure errors on that many query tiles (default: all).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16.")
@click.option("--state", type=FILE, metavar="FILE", help="State file (default: the output's name with .search.npz).")
@click.option("--from-state", type=FILE, metavar="FILE", help="Choose again from a finished search, without measuring.")
@click.option("-o", "--output", type=FILE, required=True, metavar="P.plan.json", help="The plan file.")
@json_option
@click.pass_context
@reports_mistakes
def main(context: click.Context, **options: object) -> None:
    """Search a plan: measure every pattern on every head along the denoising trajectory, then choose.

    A search that was interrupted goes on where it stopped when the same command is given again.
    """
    output: Path = options["output"]  # type: ignore[assignment]
    _check_method(str(options["method"]))
    rule = Rule(*(options[name] for name in ("lam", "eps", "error_scale", "normaliser", "dense_steps")))  # type: ignore[arg-type]
    _check_outputs(output, options["json_file"])  # type: ignore[arg-type]
    if options["from_state"] is not None:
        given = [
            name for name in MEASURING if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        ]
        if given:
            flags = ", ".join("--" + name.replace("_file", "").replace("_", "-") for name in given)
            raise complain(
                "--from-state",
                f"also {flags}",
                "no options that say what to measure",
                "the state file holds its own settings",
            )
        state, plan = _choose_again(options, rule)
    else:
        state, plan = _search(options, rule, output)
    from svdit.plans.schema import write_plan

    write_plan(output, plan)
    figures = {
        "density": plan.provenance["density"],
        "steps": state.steps,
        "stages": len(plan.stages),
        "lam": plan.provenance["lam"],
        "eps": plan.provenance["eps"],
        "method": "sparse-vdit",
        "choice": plan.provenance["choice"],
        "plan": str(output),
    }
    write_json(options["json_file"], figures)  # type: ignore[arg-type]
    click.echo(
        f"{output}: {len(plan.stages)} stages, {len(plan.patterns)} patterns, density "
        f"{plan.provenance['density']:.4f} ({plan.provenance['choice']})"
    )


def _check_method(method: str) -> None:
    if method == "budget":
        raise complain("--method", "'budget'", "'sparse-vdit'", "the budget method is not part of this version")
    if method not in METHODS:
        raise complain("--method", repr(method), "'sparse-vdit'")


def _check_outputs(output: Path, json_file: Path | None) -> None:
    from svdit.runtime.video import check_target

    if not output.name.endswith(".json"):
        raise complain("--output", str(output), "a file name that ends in .json", "P.plan.json is the custom")
    check_target(output, None, "--output")
    if json_file is not None:
        check_target(json_file, None, "--json")


def default_state(output: Path) -> Path:
    """tiny.plan.json -> tiny.search.npz, beside it."""
    return output.with_name(output.name.removesuffix(".json").removesuffix(".plan") + ".search.npz")


def _search(options: dict, rule: Rule, output: Path) -> tuple:
    from svdit.plans import registry
    from svdit.runtime.candidates import read_candidates
    from svdit.runtime.measure import plan_of, search
    from svdit.runtime.torch_runner import checkpoint_of

    if options["model"] is None:
        raise complain("--model", "nothing", f"one of {', '.join(registry.model_names())}")
    adapter = registry.adapter(options["model"])
    prompts = collect_prompts(options["prompt"], options["prompts_file"])
    tile = adapter.default_tile() if options["tile"] is None else parse_tile(options["tile"])
    specs = None
    if options["candidates"] is not None:
        from svdit.plans.tiles import Tiling

        folder = checkpoint_of(adapter, options["checkpoint"])
        specs = read_candidates(options["candidates"], Tiling(adapter.geometry(folder), tile))
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
        tile=tile,
        candidates=specs,
        query_tiles=options["query_tiles"],
        device=options["device"],
        dtype=options["dtype"],
        state=state_file,
    )
    click.echo(f"measured errors are in {state_file} (svdit-search --from-state chooses again from them)", err=True)
    if options["density"] is None:
        return found.state, found.plan
    rule = _rule_for(found.measurement, options)
    return found.state, plan_of(found.state, rule, options["max_stages"])


def _choose_again(options: dict, rule: Rule) -> tuple:
    from svdit.runtime.measure import plan_of
    from svdit.runtime.search_state import read_state

    state = read_state(options["from_state"])
    if options["density"] is not None:
        rule = _rule_for(state.measurement(), options)
    return state, plan_of(state, rule, options["max_stages"])


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
