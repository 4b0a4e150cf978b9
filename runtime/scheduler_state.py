"""The changing part of a diffusers scheduler as plain arrays, so that a run can be continued later.

Only numbers, None, tensors and lists of these are kept: no pickled code in a state file.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

PREFIX = "scheduler/"


def save_scheduler(scheduler: Any) -> dict[str, np.ndarray]:
    """Every plain attribute of the scheduler by its path; kinds are told apart by array type and shape."""
    return {
        PREFIX + path: array for name, value in sorted(vars(scheduler).items()) for path, array in _flat(name, value)
    }


def load_scheduler(scheduler: Any, stored: dict[str, np.ndarray]) -> None:
    """Put back what `save_scheduler` took from a scheduler with the same configuration and steps."""
    for name in sorted({re.split(r"[|\[]", key[len(PREFIX) :])[0] for key in stored if key.startswith(PREFIX)}):
        found, value = _nested(PREFIX + name, stored)
        if found:
            setattr(scheduler, name, value)


def _flat(path: str, value: Any) -> list[tuple[str, np.ndarray]]:
    if value is None:
        return [(f"{path}|none", np.zeros(0))]
    if isinstance(value, (bool, int, float)):
        return [(f"{path}|{type(value).__name__}", np.asarray(value))]
    if isinstance(value, torch.Tensor):
        return [(f"{path}|tensor", value.detach().cpu().numpy())]
    if isinstance(value, list):
        items = [_flat(f"{path}[{i}]", item) for i, item in enumerate(value)]
        if all(items):
            return [(f"{path}|list", np.asarray(len(value))), *(pair for item in items for pair in item)]
    return []


def _nested(path: str, stored: dict[str, np.ndarray]) -> tuple[bool, Any]:
    if f"{path}|none" in stored:
        return True, None
    for kind, make in (("bool", bool), ("int", int), ("float", float)):
        if f"{path}|{kind}" in stored:
            return True, make(stored[f"{path}|{kind}"])
    if f"{path}|tensor" in stored:
        return True, torch.from_numpy(np.array(stored[f"{path}|tensor"]))
    if f"{path}|list" in stored:
        items = [_nested(f"{path}[{i}]", stored) for i in range(int(stored[f"{path}|list"]))]
        return all(found for found, _ in items), [value for _, value in items]
    return False, None
