"""Finds the models that are installed, without this package importing the one that has them.

The package that knows models announces a module under the entry point group `svdit.registry`; the
module has the same two functions as this one.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from svdit.plans.errors import complain

GROUP = "svdit.registry"


def model_names() -> list[str]:
    """Names that `--model` accepts, sorted."""
    return sorted(_providers())


def adapter(name: str) -> Any:
    """The model adapter called `name`. Raises SvditError listing the names there are."""
    providers = _providers()
    if name not in providers:
        raise complain("model", repr(name), "one of " + ", ".join(sorted(providers)))
    return providers[name].adapter(name)


@cache
def _providers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entry_points(group=GROUP):
        module = entry.load()
        found.update(dict.fromkeys(module.model_names(), module))
    if not found:
        raise complain("models", f"no entry point in the group {GROUP}", "at least one", "reinstall svdit")
    return found
