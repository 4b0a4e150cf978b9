"""Finished searches made up from random numbers, and plans chosen from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from svdit.plans.geometry import Geometry
from svdit.plans.maps import map_bins
from svdit.plans.patterns import Diagonal, MultiDiagonal, Skip, Stripe
from svdit.plans.schema import Plan, write_plan
from svdit.plans.search import Rule, plan_from
from svdit.plans.search_state import SearchState, default_state, write_state
from svdit.plans.tiles import Tiling

GEOMETRY = Geometry((4, 4, 4), 8, "after", 2, 3, 64)
TILE = (1, 2, 2)
STEPS = 6
PROMPTS = ("red circle moving right", "a square")


def hardware_file(folder: Path) -> Path:
    """A latency table that counts pairs, measured far from these sizes: tiles of 4 tokens suit no kernel."""
    shape = {"batch": 1, "tokens": 45056, "heads": 48, "head_dim": 64}
    rows = [{"case": "c", **shape, "density": d, "latency_ms": ms} for d, ms in ((1.0, 54.0), (0.15625, 8.5))]
    table = {"format": "svdit-hardware", "version": 1, "gpu": "a made-up GPU", "status": "measured", "how": "h"}
    path = folder / "gpu.json"
    peak = {"tflops": 989.4, "source": "made up"}
    path.write_text(json.dumps({**table, "attention": rows, "peak": peak}))
    return path


def search_state(seed: int = 0, maps: bool = True, prompts=PROMPTS, geometry: Geometry = GEOMETRY) -> SearchState:
    """Errors that fall with density and differ between heads, layers and steps; a flow-matching schedule."""
    tiling, random = Tiling(geometry, TILE), np.random.default_rng(seed)
    layers, heads = geometry.layers, geometry.heads
    stripes = tuple(tuple(Stripe(columns=[[4 * h % 16, 4 * h % 16 + 2]]) for h in range(heads)) for _ in range(layers))
    patterns = (Skip(), Diagonal(), MultiDiagonal(rows=0, cols=0), stripes)
    density = np.array(
        [
            [
                [tiling.density(tiling.mask(p[i][h] if isinstance(p, tuple) else p)) for p in patterns]
                for h in range(heads)
            ]
            for i in range(layers)
        ]
    )
    power = random.random((STEPS, layers, heads)) + 0.5
    error = random.random((STEPS, layers, heads, 4)) ** 3 * (1 - density) * power[..., None]
    error[..., 0] = power
    error[:, 1, 2, 0] *= 0.02  # a head that does next to nothing
    bins = len(map_bins(tiling))
    settings = {
        "model": "tiny",
        "geometry": geometry.to_json(),
        "tile": list(TILE),
        "prompts": list(prompts),
        "rule": {},
        "seed": 0,
        "guidance": 3.0,
        "query_tiles": None,
        "device": "cpu",
        "dtype": "float32",
        "checkpoint": {},
        "candidates": {},
    }
    return SearchState(
        settings=settings,
        record={"hardware": "a made-up machine", "torch": "0"},
        modes=("skip", "band", "place", "stripe"),
        patterns=patterns,
        done=STEPS,
        error=error,
        power=power,
        sparsity=1 - density,
        latents=np.zeros((1, 1, 1, 1, 1), np.float32),
        scheduler={"scheduler/sigmas|tensor": np.linspace(1, 0, STEPS + 1, dtype=np.float32)},
        maps=random.random((layers, heads, bins, bins)).astype(np.float32) ** 6 if maps else None,
    )


def paper_plan(state: SearchState, lam: float = 0.5, **record) -> Plan:
    """What the paper's rule chooses, in at most two stages, the first sixth of the steps dense."""
    rule = Rule(lam, lam, 1.0, dense_steps=0.1)
    return plan_from(
        state.measurement(),
        model="tiny",
        geometry=state.geometry,
        tile=TILE,
        rule=rule,
        max_stages=2,
        provenance={"prompts": state.settings["prompts"], **record},
    )


def written(folder: Path, name: str, plan: Plan, state: SearchState | None) -> Path:
    """Write a plan and, beside it, its state."""
    path = folder / f"{name}.plan.json"
    write_plan(path, plan)
    if state is not None:
        write_state(default_state(path), state)
    return path
