"""Checkpoints and plans that several tests share; the checkpoints must not be changed in place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from svdit.exporter import export
from svdit.exporter.models.registry import adapter
from svdit.plans.patterns import Diagonal, MultiDiagonal, Stripe
from svdit.plans.schema import Plan, Stage, dumps
from tests.exporter import checkpoints


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """fp16, in several shards."""
    return checkpoints.save_tiny(tmp_path_factory.mktemp("tiny"), shard="150KB")


@pytest.fixture(scope="session")
def wan_checkpoint(tmp_path_factory) -> Path:
    """A transformer folder, float32, one file."""
    return checkpoints.save_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def own_tiny(tiny_checkpoint, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def _traces() -> dict:
    return {}


@pytest.fixture
def trace_once(monkeypatch, _traces) -> None:
    """Tracing takes seconds: tests about what comes after it share the traces."""
    original = export.trace_denoiser

    def cached(adapter, checkpoint, plan, precision, batch, report=lambda step: None):
        key = (adapter.name, checkpoint, dumps(plan), precision, batch)
        if key not in _traces:
            _traces[key] = original(adapter, checkpoint, plan, precision, batch, report)
        return _traces[key]

    monkeypatch.setattr(export, "trace_denoiser", cached)


@pytest.fixture(scope="session")
def tiny_plan(tiny_checkpoint) -> Plan:
    """Two stages, border tiles (grid 4 x 6 x 6 in tiles 1 x 4 x 4), every kind of head."""
    patterns = {
        "d": Diagonal(frames=0),
        "m": MultiDiagonal(rows=0, cols=0),
        "s": Stripe(columns=((0, 2),), frames=1),
    }
    stages = (Stage(0.4, (("full", "d"), ("full", "full"))), Stage(1.0, (("d", "skip"), ("m", "s"))))
    return Plan("tiny", adapter("tiny").geometry(tiny_checkpoint), (1, 4, 4), patterns, stages, {"method": "test"})
