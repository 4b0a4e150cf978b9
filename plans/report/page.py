"""The report of a search: one HTML file with maps, choice, trade-off and costs of a plan. Nothing outside it is needed.

Everything that it shows is worked out here; `page.html` only lays it out, and escapes all text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from svdit.plans.cost import CostModel
from svdit.plans.flops import pattern_density
from svdit.plans.listing import used_names
from svdit.plans.maps import coarser, kept_parts, map_bins
from svdit.plans.patterns import KINDS, Skip
from svdit.plans.report.chart import MARKERS, Axis, Mark, Series, chart, padded
from svdit.plans.report.figures import Entry, basis, figures, max_stages, ratio, scope
from svdit.plans.report.judged import JudgedPlan, same_axis
from svdit.plans.report.map_images import OCTAVES, map_uri, palette, shades, veil_uri
from svdit.plans.report.tradeoff import Place, best_places, rule_places
from svdit.plans.schema import Plan
from svdit.plans.search import DEFAULT_DENSE_STEPS, DEFAULT_ERROR_SCALE, Rule

MAP_PIXELS = 1 << 21
"""Pixels of all maps together: they keep the file small for models with many heads."""
COLOURS = 8
"""Of methods in the charts; the template has as many (s0 ...). Markers repeat after seven, so 56 methods differ."""
MOST_PATTERNS = 20
"""Patterns in the list of those in use, the most frequent ones."""
SIDE_BY_SIDE = 8
"""Most heads of a model whose stages stand beside each other."""
MEASURED_WITH = ("prompts", "seed", "guidance", "checkpoint", "projected")
"""Settings of a search that its errors depend on."""
LONG = ("relative_errors", "candidates", "step_weights", "prompts")
"""Provenance that the list at the end leaves out: shown elsewhere, or too long."""


def html(entry: Entry, others: Sequence[Entry] = (), judged: Sequence[JudgedPlan] = ()) -> tuple[str, dict]:
    """The page and its `figures`; `others` were read like `entry`."""
    from jinja2 import Environment, StrictUndefined

    numbers, cost = figures(entry, judged), entry.cost
    looks = _looks([entry.method, *(o.method for o in others), *(j.method for j in judged)])
    predicted, rows = _predicted(entry, others, looks)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = files("svdit.plans.report").joinpath("page.html").read_text(encoding="utf-8")
    page = environment.from_string(text).render(
        entry=entry,
        figures=numbers,
        own=next((one for one in judged if one.name == entry.name), None),
        cost=cost,
        basis=basis(cost),
        target=_target(entry.plan),
        headroom=_decibel(numbers["attention_error"], numbers["least_error_at_this_cost"]),
        predicted=predicted,
        rows=_with_judged(rows, judged),
        measured=_measured(entry, judged, looks) if judged else None,
        markers=MARKERS,
        looks=looks,
        looks_count=COLOURS,
        strips=_strips(entry),
        pictures=_pictures(entry, numbers["largest_errors"]),
        shades=["#{:02x}{:02x}{:02x}".format(*colour) for colour in palette()],
        octaves=OCTAVES,
        patterns=_patterns(entry)[:MOST_PATTERNS],
        more_patterns=max(0, len(used_names(entry.plan)) - MOST_PATTERNS),
        kinds=list(KINDS),
        provenance=_provenance(entry),
        files=dict.fromkeys((name, digest) for one in (entry, *others) for name, digest in one.sha256.items()),
    )
    return page, numbers


def _target(plan: Plan) -> str:
    found = plan.provenance.get("target")
    if not isinstance(found, dict):
        return ""
    return ", ".join(f"{goal} {x:g}" if isinstance(x, float) else f"{goal} {x}" for goal, x in found.items())


def _decibel(error: float, reference: float) -> float | None:
    """By how many dB the error lies above the reference; None where either is zero."""
    return 10 * math.log10(error / reference) if error > 0 and reference > 0 else None


def _looks(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour class and marker of each method, the same in every chart."""
    shapes = [name for name in MARKERS if name != "star"]
    distinct = list(dict.fromkeys(methods))
    return {name: {"look": f"s{i % COLOURS}", "marker": shapes[i % len(shapes)]} for i, name in enumerate(distinct)}


def _predicted(
    entry: Entry, others: Sequence[Entry], looks: dict[str, dict[str, str]]
) -> tuple[dict, list[dict]]:
    """The chart of predicted speed-up against signal to error, and one table row for each plan on it."""
    plan, cost, stages = entry.plan, entry.cost, max_stages(entry.plan)
    rule = Rule(
        error_scale=plan.provenance.get("error_scale", DEFAULT_ERROR_SCALE),
        normaliser=entry.normaliser,
        dense_steps=plan.provenance.get("dense_steps", DEFAULT_DENSE_STEPS),
    )
    counted = entry.errors, entry.heads_ms, cost.fixed_ms, stages
    best = best_places(*counted, entry.coherence)
    ruled = rule_places(entry.measured, *counted, rule, entry.coherence)
    rows = [
        {
            "name": one.name,
            "method": one.method,
            "chosen": one is entry,
            "density": one.standing.mean_density,
            "speedup": ratio(cost.dense_ms, one.latency_ms),
            "error": one.standing.total_error,
            "other": ", ".join(n for n in MEASURED_WITH if one.state.settings.get(n) != entry.state.settings.get(n)),
            "judged": None,
        }
        for one in (entry, *others)
    ]
    marks = {row["name"]: _mark(row["speedup"], row["error"], f"{row['name']} ({row['method']})") for row in rows}
    series = [
        Series(f"best plan at each cost, {stages} stages", "best", [_place(p, cost, "best plan") for p in best]),
        Series("Sparse-vDiT's rule, lam = eps", "rule", [_place(p, cost, "Sparse-vDiT's rule") for p in ruled]),
    ]
    for method, look in looks.items():
        found = [marks[row["name"]] for row in rows if row["method"] == method and not row["chosen"]]
        if found:
            found.sort(key=lambda mark: mark.x)
            series.append(Series(method, look["look"], found, look["marker"]))
    series.append(Series(entry.name, "chosen", [marks[entry.name]], "star"))
    fastest = [m.x for one in series[1:] for m in one.marks if math.isfinite(m.x)]
    x = Axis(1.0, max([*fastest, 1.2]) * 1.05, f"predicted speed-up of a denoiser pass ({scope(cost)})")
    steep = 1 + 0.15 * (x.high - 1)  # near 1x the curves rise without end
    seen = [m.y for one in series[:2] for m in one.marks if steep <= m.x <= x.high]
    y = Axis(*padded([*seen, *(mark.y for mark in marks.values())]), "signal to attention error, dB")
    return chart(series, x, y, 640, 330), rows


def _with_judged(rows: Sequence[dict], judged: Sequence[JudgedPlan]) -> list[dict]:
    """Plans of the first curve with what was judged of them, then the plans that were judged only."""
    of = {one.name: one for one in judged}
    known = [{**row, "judged": of.get(row["name"])} for row in rows]
    names = {row["name"] for row in rows}
    blank = {"chosen": False, "other": "", "speedup": None, "error": None}
    rest = sorted((one for one in judged if one.name not in names), key=lambda one: (one.method, -one.psnr))
    return known + [{**blank, "name": j.name, "method": j.method, "density": j.density, "judged": j} for j in rest]


def _mark(speedup: float | None, error: float, words: str) -> Mark:
    level = -10 * math.log10(error) if error > 0 else math.inf
    speed = math.inf if speedup is None else speedup
    return Mark(speed, level, f"{words}: {speed:.3g}x, {level:.1f} dB")


def _place(place: Place, cost: CostModel, words: str) -> Mark:
    return _mark(ratio(cost.dense_ms, place.latency_ms), place.error, words)


def _measured(entry: Entry, judged: Sequence[JudgedPlan], looks: dict[str, dict[str, str]]) -> dict:
    """The chart of PSNR against measured speed-up, or density where a plan has no speed."""
    axis = same_axis(judged)
    series = []
    for method, look in looks.items():
        found = sorted((one for one in judged if one.method == method), key=lambda one: getattr(one, axis))
        words = [f"{one.name} ({method}): {one.psnr:.2f} dB, lowest {one.lowest:.2f} dB" for one in found]
        marks = [Mark(getattr(one, axis), one.psnr, text) for one, text in zip(found, words, strict=True)]
        if marks:
            series.append(Series(method, look["look"], marks, look["marker"]))
    own = [m for one in series for m in one.marks if m.title.startswith(f"{entry.name} (")]
    series.append(Series(entry.name, "chosen", own[:1], "star"))
    marks = [mark for one in series for mark in one.marks]
    label = {"speedup": "measured speed-up", "density": "density, kept share of the query-key pairs"}[axis]
    x, y = Axis(*padded([m.x for m in marks]), label), Axis(*padded([m.y for m in marks]), "PSNR of the videos, dB")
    return chart(series, x, y, 640, 330)


def _strips(entry: Entry) -> dict:
    """Bars by step: time of a pass as a share of the dense one, and the step's share of the error."""
    stands, cost = entry.standing, entry.cost
    steps = len(stands.by_step)
    times = stands.pass_ms(cost) / (cost.dense_ms or 1.0)
    stage = np.repeat(np.arange(len(stands.steps)), stands.steps)
    error = stands.by_step / (stands.by_step.sum() or 1.0)
    return {
        "steps": steps,
        "bars": [
            {"step": s, "stage": int(i), "time": float(times[i]), "error": float(error[s])}
            for s, i in enumerate(stage)
        ],
        "most_error": float(error.max()) or 1.0,
    }


def _pictures(entry: Entry, largest: Sequence[dict]) -> dict:
    """Maps, veils and, for each stage, layer and head, which of them to lay over each other."""
    tiling, plan = entry.plan.tiling(), entry.plan
    geometry = plan.geometry
    side = max(16, math.isqrt(MAP_PIXELS // (geometry.layers * geometry.heads)))
    if entry.state.maps is None:
        maps, bins = [], map_bins(tiling, min(side, 144))
    else:
        found, bins = coarser(entry.state.maps, tiling, side)
        tokens = np.add.reduceat(tiling.sizes.astype(np.int64), bins)
        shade = shades(found, tokens)
        maps = [[map_uri(head) for head in layer] for layer in shade]
    names = used_names(plan)
    veils = {name: veil_uri(kept_parts(tiling.mask(plan.pattern(name)), tiling, bins)) for name in names}
    return {
        "maps": maps,
        "veils": [(i, name, veils[name]) for i, name in enumerate(names)],
        "numbers": {name: i for i, name in enumerate(names)},
        "side": len(bins),
        "beside": geometry.heads <= SIDE_BY_SIDE,
        "worst": {(row["stage"], row["layer"], row["head"]) for row in largest},
        "skip": {name for name in names if isinstance(plan.pattern(name), Skip)},
    }


def _patterns(entry: Entry) -> list[dict]:
    """Definition, density and number of heads (over stages) of every pattern in use."""
    plan, density = entry.plan, pattern_density(entry.plan)
    heads = Counter(name for stage in plan.stages for row in stage.layers for name in row)
    result = []
    for name in used_names(plan):
        pattern = plan.pattern(name).to_json()
        kind = pattern.pop("kind")
        words = json.dumps(pattern)[1:-1].replace('"', "")
        result.append(
            {
                "name": name,
                "kind": kind,
                "density": density[name],
                "heads": heads[name],
                "words": words if len(words) <= 70 else words[:67] + "...",
            }
        )
    return sorted(result, key=lambda row: -row["heads"])


def _provenance(entry: Entry) -> list[tuple[str, str]]:
    """What the plan records about itself, as text; numbers of a state that the plan does not repeat."""
    record = {k: v for k, v in entry.plan.provenance.items() if k not in LONG}
    record = {**{k: v for k, v in entry.state.record.items() if k not in record}, **record}
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in record.items()]
