"""A plan as text and figures, and the difference of two plans."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np

from svdit.plans.fields import shown
from svdit.plans.flops import flops_of, layer_density, mean_density, pattern_density
from svdit.plans.schema import BUILT_IN, Plan

SCOPES = {
    "model": "whole model: attention and matrix products",
    "attention": "attention only: the matrix products of this model are not known",
}


def used_names(plan: Plan) -> list[str]:
    """Pattern names that some head uses: "full" and "skip" first, then in the order of the plan."""
    used = {name for stage in plan.stages for row in stage.layers for name in row}
    return [name for name in (*BUILT_IN, *plan.patterns) if name in used]


def figures(plan: Plan) -> dict:
    """Everything `svdit-plan show` prints, as plain JSON. `flops_ratio` is dense over plan."""
    by_layer, density = layer_density(plan), pattern_density(plan)
    flops = flops_of(plan)
    heads = Counter(name for stage in plan.stages for row in stage.layers for name in row)
    return {
        "model": plan.model,
        "density": mean_density(plan),
        "flops_ratio": _finite(flops.ratio),
        "flops_scope": flops.scope,
        "patterns": {
            name: {**plan.pattern(name).to_json(), "density": density[name], "heads": heads[name]}
            for name in (*BUILT_IN, *plan.patterns)
        },
        "stages": [
            {
                "until": stage.until,
                "density": float(by_layer[i].mean()),
                "flops_ratio": _finite(flops_of(plan, float(by_layer[i].mean())).ratio),
                "layers": [
                    {"density": float(by_layer[i, j]), "heads": dict(Counter(row))}
                    for j, row in enumerate(stage.layers)
                ],
            }
            for i, stage in enumerate(plan.stages)
        ],
    }


def text(plan: Plan) -> str:
    """The table that `svdit-plan show` prints: patterns, then one row a layer for each stage."""
    geometry, tiling, data = plan.geometry, plan.tiling(), figures(plan)
    words = "no text" if not geometry.text_tokens else f"{geometry.text_tokens} text {geometry.text_position}"
    lines = [
        f"model       {plan.model}: {geometry.layers} layers, {geometry.heads} heads x {geometry.head_dim}",
        f"tokens      {_times(geometry.grid)} video, {words}: {geometry.tokens}",
        f"tiles       {_times(plan.tile)} tokens: {_times(tiling.tile_grid)} tiles"
        + (f" + {tiling.num_text_tiles} of text" if tiling.num_text_tiles else ""),
        f"method      {shown(plan.provenance.get('method', 'not stated'))}",
        "",
    ]
    width = max(len(name) for name in data["patterns"])
    lines.append(f"{'pattern':<{width}}  density  heads  definition")
    for name, row in data["patterns"].items():
        definition = "built in" if name in BUILT_IN else _definition(row)
        lines.append(f"{name:<{width}}  {row['density']:7.4f}  {row['heads']:5d}  {definition}")
    names = used_names(plan)
    before = 0.0
    for i, stage in enumerate(data["stages"]):
        span = f"{100 * before:g} to {100 * stage['until']:g} % of the steps"
        ratio = _ratio(stage["flops_ratio"])
        lines += ["", f"stage {i}: {span}, density {stage['density']:.4f}, FLOP ratio {ratio}"]
        lines.append("layer  density  " + "  ".join(names))
        for j, layer in enumerate(stage["layers"]):
            counts = "  ".join(f"{layer['heads'].get(name, 0) or '.':>{len(name)}}" for name in names)
            lines.append(f"{j:5d}  {layer['density']:7.4f}  {counts}")
        before = stage["until"]
    ratio = _ratio(data["flops_ratio"])
    lines += ["", f"all steps: density {data['density']:.4f}, FLOP ratio {ratio} ({SCOPES[data['flops_scope']]})"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Change:
    """One difference: where, and both values in words."""

    where: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.where}: {self.first} -> {self.second}"


def changes(first: Plan, second: Plan) -> list[Change]:
    """What makes the two compute different things. Names, unused definitions and provenance do not count.

    Heads are compared by what their pattern means, over every span of the denoising loop in which
    neither plan changes stage, so plans with different stages can be compared.
    """
    found = [
        Change(name, _line(a), _line(b))
        for name, a, b in (
            ("model", first.model, second.model),
            ("geometry", first.geometry.to_json(), second.geometry.to_json()),
            ("tile", first.tile, second.tile),
        )
        if a != b
    ]
    shape = [(plan.geometry.layers, plan.geometry.heads) for plan in (first, second)]
    if shape[0] != shape[1]:
        return found  # heads of different models have nothing in common
    before = 0.0
    for until in sorted({stage.until for plan in (first, second) for stage in plan.stages}):
        rows = [next(stage.layers for stage in plan.stages if stage.until >= until) for plan in (first, second)]
        span = f"{100 * before:g}-{100 * until:g} %"
        found += _head_changes(first, second, rows, span)
        before = until
    return found


def _head_changes(first: Plan, second: Plan, rows: list, span: str) -> list[Change]:
    found = []
    for layer, (row_a, row_b) in enumerate(zip(*rows, strict=True)):
        for head, (a, b) in enumerate(zip(row_a, row_b, strict=True)):
            one, other = first.pattern(a), second.pattern(b)
            if one != other:
                names = (a, b) if a != b else (f"{a} {_line(one.to_json())}", f"{b} {_line(other.to_json())}")
                found.append(Change(f"{span} of the steps, layer {layer}, head {head}", *names))
    return found


def _definition(row: dict) -> str:
    fields = {name: value for name, value in row.items() if name not in ("kind", "density", "heads")}
    return row["kind"] + "".join(f" {name}={shown(value)}" for name, value in fields.items())


def _line(value: object) -> str:
    return json.dumps(value)


def _times(values: tuple[int, ...]) -> str:
    return " x ".join(str(value) for value in values)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _ratio(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3f}"
