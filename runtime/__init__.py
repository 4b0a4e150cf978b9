"""Runners, the denoising loop, comparison. `load` puts a bundle into a diffusers pipeline."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from svdit.runtime.drop_in import load

    return load
