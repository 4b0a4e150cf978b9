"""The state file of a search: settings, what was measured so far, and where the trajectory stands."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import shown
from svdit.plans.files import write_atomic
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Pattern, pattern_from_json
from svdit.plans.search import Measurement

FORMAT = "svdit-search-state"
VERSION = 1

ModePattern = Pattern | tuple[tuple[Pattern, ...], ...]


@dataclass(frozen=True, eq=False)
class SearchState:
    """`settings` decide what is measured; `record` says what it was measured on; arrays hold `done` steps.

    error [S, L, H, M], power [S, L, H], sparsity [L, H, M], latents [P, C, f, h, w]; `scheduler` as in
    `runtime.scheduler_state`.
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
        return Measurement(self.modes, self.patterns, self.error, self.power, self.sparsity)


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
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        head=np.frombuffer(json.dumps(head).encode(), np.uint8),
        error=state.error,
        power=state.power,
        sparsity=state.sparsity,
        latents=state.latents,
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
    try:
        patterns = tuple(_pattern_from(p) for p in head["patterns"])
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
        )
    except (KeyError, TypeError) as error:
        raise complain(str(path), f"a state without {error}", "a complete search state", hint) from None
    shape = (*state.sparsity.shape[:2], len(state.modes))
    if state.error.shape[1:] != shape or state.power.shape != state.error.shape[:3] or len(patterns) != shape[-1]:
        raise complain(str(path), "arrays that do not fit each other", "a complete search state", hint)
    return state


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    """Refuse to continue a search with other settings, naming the first one that differs."""
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise complain(
                f"{path}: {name}",
                shown(found.get(name)),
                f"{shown(wanted.get(name))} as asked for now",
                "use the same settings, name another --state, or delete the file",
            )


def _pattern_json(pattern: ModePattern) -> object:
    if isinstance(pattern, tuple):
        return [[head.to_json() for head in layer] for layer in pattern]
    return pattern.to_json()


def _pattern_from(obj: object) -> ModePattern:
    if isinstance(obj, list):
        return tuple(tuple(pattern_from_json(head) for head in layer) for layer in obj)
    return pattern_from_json(obj)
