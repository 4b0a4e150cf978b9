"""Searches of the same patterns on different prompts, read as one: each GPU takes a share of the prompts.

Errors and mean squares are means over all prompts, as one search would have measured them. What errors count in the end
is a geometric mean over videos there (`runtime.sensitivity`), and so it is here; each video keeps the final errors that
probes made in it.

Letters: P videos, S steps, L layers, H heads, M modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from svdit.plans.errors import complain, rooted
from svdit.plans.fields import shown
from svdit.plans.numbers import SILENT, geometric_mean
from svdit.plans.search import Measurement, errors_at, probes
from svdit.plans.search_state import OPTIONAL, SearchState, check_same

OWN = ("prompts", "seed")
"""Settings in which searches that are joined may differ."""
KNOWN = ("hardware", "torch")
"""Parts of the record in which they may differ; all are named then."""


def join(states: Sequence[SearchState], names: Sequence[str] | None = None) -> SearchState:
    """One finished search out of several, each of which measured the same patterns on videos of its own.

    names: of the states in error messages (default: state 1, state 2 and so on). `settings["seed"]` of the result is
    the list of theirs and it has no latents: it can be chosen from and reported on but not continued.
    Raises SvditError where one is not finished, where they differ in anything but prompts and seed (patterns that were
    measured included), where one knows more than another, and where two hold the same video.
    """
    if len(states) < 2:
        raise complain("searches to join", len(states), "at least two")
    names = [f"state {i + 1}" for i in range(len(states))] if names is None else list(names)
    first = states[0]
    measured = []
    for state, name in zip(states, names, strict=True):
        with rooted(f"{name}: "):
            measured.append(state.measurement())
    _check_videos(states, names)
    for state, name in zip(states[1:], names[1:], strict=True):
        _check_alike(first, state, names[0], name)
    counts = np.array([len(state.settings["prompts"]) for state in states], dtype=np.float64)

    def mean(attribute: str) -> np.ndarray | None:
        if getattr(first, attribute) is None:
            return None
        values = np.stack([getattr(state, attribute) for state in states])
        return np.average(values, axis=0, weights=counts).astype(values.dtype)

    record = {
        **first.record,
        **{key: ", ".join(dict.fromkeys(str(state.record.get(key)) for state in states)) for key in KNOWN},
        "joined": len(states),
    }
    whole = replace(
        first,
        settings={
            **first.settings,
            "prompts": list(chain.from_iterable(state.settings["prompts"] for state in states)),
            "seed": list(dict.fromkeys(state.settings["seed"] for state in states)),
        },
        record=record,
        error=mean("error"),
        power=mean("power"),
        latents=first.latents[:0],
        maps=mean("maps"),
        layer_power=mean("layer_power"),
        deviation=None if first.deviation is None else _deviation(states, counts),
    )
    if first.sensitivity is None:
        return whole
    sensitivity = geometric_mean(np.stack([state.sensitivity for state in states]), counts)
    together = whole.measurement()
    chosen = probes(together)
    final = _by_step(sensitivity, together, chosen)
    coherence = [
        np.broadcast_to(state.coherence, (int(count), *state.coherence.shape[1:]))  # older states have one for all
        * _outer_root(_by_step(state.sensitivity, own, chosen) / final)
        for state, own, count in zip(states, measured, counts, strict=True)
    ]
    return replace(whole, sensitivity=sensitivity, coherence=np.concatenate(coherence))


def _by_step(weights: np.ndarray, measured: Measurement, chosen: np.ndarray) -> np.ndarray:
    """[S] weighted errors of every step with all heads under the modes `chosen` [L, H]; weights [S, L, H]."""
    found = (weights * errors_at(measured, chosen)).sum((1, 2))
    return np.maximum(found, SILENT * (found.max() or 1.0))


def _outer_root(by_step: np.ndarray) -> np.ndarray:
    """[S, S] factors of the products of two steps from those of each step's own."""
    return np.sqrt(np.outer(by_step, by_step))


def _deviation(states: Sequence[SearchState], counts: np.ndarray) -> np.ndarray:
    """[S, L, H, M] standard error of the mean error: searches with one seed drew the same query tiles, others not."""
    by_seed: dict[int, np.ndarray] = {}
    for state, count in zip(states, counts, strict=True):
        seed = state.settings["seed"]
        by_seed[seed] = by_seed.get(seed, 0.0) + count / counts.sum() * state.deviation
    return np.sqrt(np.sum([np.square(part) for part in by_seed.values()], axis=0))


def _check_alike(first: SearchState, state: SearchState, name: str, other: str) -> None:
    step, source = "join searches that differ in nothing but --prompts and --seed", f"as in {name}"
    check_same(other, state.settings, first.settings, source, step, OWN)
    if (first.modes, first.patterns) != (state.modes, state.patterns):
        step = f"search again with --candidates {name}: candidates that are measured follow the prompts"
        raise complain(f"{other}: patterns", "others", f"those of {name}", step)
    check_same(other, state.record, first.record, source, "calibrate all searches alike", KNOWN)
    for key in OPTIONAL:
        if (getattr(first, key) is None) != (getattr(state, key) is None):
            has = ["none" if getattr(one, key) is None else "some" for one in (state, first)]
            raise complain(f"{other}: {key}", has[0], f"{has[1]} {source}", "search again with this release")


def _check_videos(states: Sequence[SearchState], names: Sequence[str]) -> None:
    """A video is a prompt and its seed; one that counts twice would pass for two."""
    seen: dict[tuple[str, int], str] = {}
    for state, name in zip(states, names, strict=True):
        if isinstance(state.settings["seed"], list):
            raise complain(name, "a state that was joined before", "single searches", "join all of them at once")
        for i, prompt in enumerate(state.settings["prompts"]):
            video = (prompt, state.settings["seed"] + i)
            if video in seen:
                raise complain(
                    f"{name}: prompts",
                    f"{shown(prompt)} with seed {video[1]}",
                    f"other videos than those of {seen[video]}",
                    "search with other prompts or another --seed",
                )
            seen[video] = name
