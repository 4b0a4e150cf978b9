"""The state file of a search: settings, what was measured so far, and where the trajectory stands."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import shown
from svdit.plans.files import write_atomic
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Pattern, Tiles, pattern_from_json
from svdit.plans.search import Measurement

FORMAT = "svdit-search-state"
VERSION = 1
OPTIONAL = ("maps", "layer_power", "deviation", "sensitivity", "coherence")
"""Arrays that older files do not have."""
TILES = "tiles/"
"""Of the arrays with the `tiles` patterns of a mode, by its number."""

ModePattern = Pattern | tuple[tuple[Pattern, ...], ...]


@dataclass(frozen=True, eq=False)
class SearchState:
    """`settings` decide what is measured; `record` says what it was measured on; arrays hold `done` steps.

    Of searches that were joined (`plans.joined`), `settings["seed"]` is the list of their seeds.

    error [S, L, H, M], power [S, L, H], sparsity [L, H, M], layer_power [S, L] and deviation [S, L, H, M] as in
    `plans.search.Measurement`; latents [P, C, f, h, w]; `scheduler` as in `runtime.scheduler_state`. maps
    [L, H, m, m]: attention maps (`plans.maps`) summed over the steps so far, each divided by S. sensitivity [S, L, H],
    coherence [P, S, S]: what errors count in the end (`runtime.sensitivity.Sensitivity`). None: not in the file.
    """

    settings: dict
    record: dict
    modes: tuple[str, ...]
    patterns: tuple[ModePattern, ...]
    done: int
    error: np.ndarray
    power: np.ndarray
    sparsity: np.ndarray
    latents: np.ndarray
    scheduler: dict[str, np.ndarray]
    maps: np.ndarray | None = None
    layer_power: np.ndarray | None = None
    deviation: np.ndarray | None = None
    sensitivity: np.ndarray | None = None
    coherence: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.error)

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_json(self.settings["geometry"], "settings.geometry")

    def measurement(self) -> Measurement:
        """The finished measurement. Raises SvditError when steps are missing."""
        if self.done < self.steps:
            raise complain(
                "search state",
                f"{self.done} of {self.steps} steps measured",
                "a finished search",
                "run the svdit-search that wrote it again; it goes on where it stopped",
            )
        return Measurement(
            self.modes, self.patterns, self.error, self.power, self.sparsity, self.layer_power, self.deviation
        )

    def without(self, globs: Sequence[str]) -> SearchState:
        """The same with fewer modes to choose from; `record` says which names were left out.

        Raises SvditError for a glob that no mode matches, and when none is left.
        """
        out: set[str] = set()
        for glob in globs:
            matched = {name for name in self.modes if fnmatchcase(name, glob)}
            if not matched:
                raise complain("without", repr(glob), f"a name or glob of its {len(self.modes)} candidates")
            out |= matched
        left = [i for i, name in enumerate(self.modes) if name not in out]
        if not left:
            raise complain("without", f"all {len(self.modes)} candidates", "at least one that stays")
        return replace(
            self,
            record={**self.record, "without": list(globs)},
            modes=tuple(self.modes[i] for i in left),
            patterns=tuple(self.patterns[i] for i in left),
            error=self.error[..., left],
            sparsity=self.sparsity[..., left],
            deviation=None if self.deviation is None else self.deviation[..., left],
        )


def write_state(path: Path, state: SearchState) -> None:
    """Write atomically: an interrupted write leaves the previous step's state."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "settings": state.settings,
        "record": state.record,
        "modes": list(state.modes),
        "patterns": [_pattern_json(p) for p in state.patterns],
        "done": state.done,
    }
    tiles = {f"{TILES}{i}": _packed(p) for i, p in enumerate(state.patterns) if _is_tiles(p)}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        head=np.frombuffer(json.dumps(head).encode(), np.uint8),
        error=state.error,
        power=state.power,
        sparsity=state.sparsity,
        latents=state.latents,
        **tiles,
        **{name: getattr(state, name) for name in OPTIONAL if getattr(state, name) is not None},
        **state.scheduler,
    )
    write_atomic(path, buffer.getvalue())


def read_state(path: Path) -> SearchState:
    """Read a state file. Raises SvditError when it is not one or not of this version."""
    hint = "delete it to search from the start"
    if not path.is_file():
        raise complain(str(path), "no file" if not path.exists() else "a folder", "a search state (*.search.npz)")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        head = json.loads(arrays.pop("head").tobytes().decode())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise complain(str(path), f"an unreadable file ({type(error).__name__})", "a search state", hint) from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise complain(str(path), "another kind of file", f"the format {FORMAT}", hint)
    if head.get("version") != VERSION:
        raise complain(f"{path}: version", shown(head.get("version")), str(VERSION), hint)
    tiles = {name: arrays.pop(name) for name in list(arrays) if name.startswith(TILES)}
    optional = {name: arrays.pop(name, None) for name in OPTIONAL}
    if optional["coherence"] is not None and optional["coherence"].ndim == 2:  # of older files: one for all videos
        optional["coherence"] = optional["coherence"][None]
    try:
        patterns = tuple(
            _unpacked(tiles[f"{TILES}{i}"]) if stored is None else _pattern_from(stored)
            for i, stored in enumerate(head["patterns"])
        )
        state = SearchState(
            head["settings"],
            head["record"],
            tuple(head["modes"]),
            patterns,
            head["done"],
            arrays.pop("error"),
            arrays.pop("power"),
            arrays.pop("sparsity"),
            arrays.pop("latents"),
            arrays,
            **optional,
        )
    except (KeyError, TypeError) as error:
        raise complain(str(path), f"a state without {error}", "a complete search state", hint) from None
    shape = (*state.sparsity.shape[:2], len(state.modes))
    if state.error.shape[1:] != shape or state.power.shape != state.error.shape[:3] or len(patterns) != shape[-1]:
        raise complain(str(path), "arrays that do not fit each other", "a complete search state", hint)
    return state


def noise_levels(state: SearchState) -> tuple[np.ndarray, np.ndarray]:
    """Share of picture and of noise in the latents before each step and at the end, float64 [S + 1] each.

    Read from the scheduler of a finished search: `sigmas` of flow matching, or `alphas_cumprod`.
    """
    state.measurement()
    stored = {name.removeprefix("scheduler/").partition("|")[0]: value for name, value in state.scheduler.items()}
    sigmas = stored.get("sigmas")
    if sigmas is not None and len(sigmas) == state.steps + 1 and sigmas.max() <= 1:
        noise = np.asarray(sigmas, dtype=np.float64)
        return 1.0 - noise, noise
    if "alphas_cumprod" in stored and len(stored.get("timesteps", ())) == state.steps:
        power = np.append(stored["alphas_cumprod"][stored["timesteps"].astype(np.int64)].astype(np.float64), 1.0)
        return np.sqrt(power), np.sqrt(1.0 - power)
    raise complain(
        "search state",
        "a scheduler with neither flow matching's sigmas nor alphas_cumprod",
        "one of them",
        "choose with --method sparse-vdit, or call svdit.plans.budget with weights of your own",
    )


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    """Refuse to continue a search with other settings, naming the first one that differs."""
    step = "use the same settings, name another --state, or delete the file"
    check_same(str(path), found, wanted, "as asked for now", step)


def check_same(where: str, found: Mapping, wanted: Mapping, source: str, step: str, but: Collection[str] = ()) -> None:
    """Raise SvditError about the first entry in which two mappings differ, unless it is one of `but`."""
    for name in sorted({*found, *wanted} - set(but)):
        if found.get(name) != wanted.get(name):
            raise complain(f"{where}: {name}", shown(found.get(name)), f"{shown(wanted.get(name))} {source}", step)


def default_state(output: Path) -> Path:
    """tiny.plan.json -> tiny.search.npz, beside it."""
    return output.with_name(output.name.removesuffix(".json").removesuffix(".plan") + ".search.npz")


def _is_tiles(pattern: ModePattern) -> bool:
    return isinstance(pattern, tuple) and all(isinstance(head, Tiles) for layer in pattern for head in layer)


@lru_cache(maxsize=256)
def _packed(pattern: tuple[tuple[Tiles, ...], ...]) -> np.ndarray:
    """uint8 [L, H, nV, bytes]: a `tiles` pattern of every head as bits; kept, since a state is written many times."""
    masks = [[head.video_mask((1, 1, len(head.rows))) for head in layer] for layer in pattern]
    return np.packbits(np.array(masks), axis=-1)


def _unpacked(bits: np.ndarray) -> tuple[tuple[Tiles, ...], ...]:
    masks = np.unpackbits(bits, axis=-1, count=bits.shape[2]).view(bool)
    return tuple(tuple(Tiles.from_mask(head) for head in layer) for layer in masks)


def _pattern_json(pattern: ModePattern) -> object:
    """None where the pattern is kept as bits."""
    if _is_tiles(pattern):
        return None
    if isinstance(pattern, tuple):
        return [[head.to_json() for head in layer] for layer in pattern]
    return pattern.to_json()


def _pattern_from(obj: object) -> ModePattern:
    if isinstance(obj, list):
        return tuple(tuple(pattern_from_json(head) for head in layer) for layer in obj)
    return pattern_from_json(obj)
