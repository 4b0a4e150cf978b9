"""Models are found through the entry point, without `plans` importing the package that has them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from svdit.plans import registry
from svdit.plans.errors import SvditError


@pytest.fixture
def providers(monkeypatch):
    """Replace the installed entry points; the list may be filled by the test."""
    modules = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(load=lambda m=m: m) for m in modules])
    registry._providers.cache_clear()
    yield modules
    registry._providers.cache_clear()


def test_installed_models():
    assert {"tiny", "wan2.1"} <= set(registry.model_names())
    assert registry.adapter("tiny").name == "tiny"


def test_several_providers(providers):
    for name in ("b", "a"):
        providers.append(SimpleNamespace(model_names=lambda n=name: [n], adapter=lambda x: f"adapter of {x}"))
    assert registry.model_names() == ["a", "b"]
    assert registry.adapter("b") == "adapter of b"


def test_an_unknown_model_lists_the_known_ones(providers):
    providers.append(SimpleNamespace(model_names=lambda: ["tiny", "wan2.1"], adapter=None))
    with pytest.raises(SvditError, match=r"model: got 'sora'; expected one of tiny, wan2.1"):
        registry.adapter("sora")


def test_no_provider_is_an_error(providers):
    with pytest.raises(SvditError, match=r"models: got no entry point in the group svdit.registry; expected at least"):
        registry.model_names()


def test_importing_the_registry_does_not_import_the_models():
    code = "import sys, svdit.plans.registry; print([m for m in sys.modules if m.startswith('svdit.exporter')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
