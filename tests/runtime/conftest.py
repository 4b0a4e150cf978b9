"""A small random checkpoint of the tiny format, and plans for it."""

from __future__ import annotations

import pytest

from svdit.plans import registry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Stripe, Union
from svdit.plans.schema import Plan, Stage
from tests.exporter.checkpoints import save_tiny

TILE = (1, 2, 4)
"""Of the grid 4 x 6 x 6: border tiles hold 4 tokens instead of 8."""
PROMPTS = ("red circle moving right", "fast blue square moving up")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adapter():
    return registry.adapter("tiny")


@pytest.fixture(scope="session")
def plan(adapter, checkpoint):
    """Three stages; every kind of pattern; a layer in which nothing is full; one with a skipped head."""
    patterns = {
        "band": Diagonal(frames=1),
        "place": MultiDiagonal(rows=0, cols=0),
        "both": Union((Diagonal(), MultiDiagonal(rows=1, cols=0))),
        "first": Stripe(columns=[[0, 6]]),
    }
    stages = (
        Stage(0.3, (("full", "band"), ("band", "full"))),
        Stage(0.6, (("band", "both"), ("first", "skip"))),
        Stage(1.0, (("place", "band"), ("skip", "first"))),
    )
    return Plan("tiny", adapter.geometry(checkpoint), TILE, patterns, stages, {"method": "template"})


@pytest.fixture(scope="session")
def bundles(checkpoint, plan, tmp_path_factory):
    """Folders portable, portable-dense and plugin, exported from one checkpoint and plan."""
    from svdit.exporter.export import export

    folder = tmp_path_factory.mktemp("bundles")
    for name, variant in (("portable", "portable"), ("portable-dense", "dense"), ("plugin", "plugin")):
        export("tiny", plan, folder / name, checkpoint=checkpoint, variant=variant)
    return folder


@pytest.fixture(scope="module")
def whole_runs_have_four_steps():
    """A search of `tiny` in four steps then walks along the very levels of `generate` in four."""
    from svdit.exporter.models.tiny import adapter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "STEPS", 4)
        yield
