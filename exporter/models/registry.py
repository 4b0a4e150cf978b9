"""Model name to adapter: the only list of models."""

from __future__ import annotations

from svdit.exporter.models.base import ModelAdapter
from svdit.exporter.models.cogvideox.adapter import CogVideoXAdapter
from svdit.exporter.models.hunyuan.adapter import HunyuanAdapter
from svdit.exporter.models.tiny.adapter import TinyAdapter
from svdit.exporter.models.wan.adapter import WanAdapter
from svdit.plans.errors import complain

MODELS: dict[str, ModelAdapter] = {
    model.name: model for model in (TinyAdapter(), HunyuanAdapter(), CogVideoXAdapter(), WanAdapter())
}


def model_names() -> list[str]:
    """Names that --model accepts, sorted."""
    return sorted(MODELS)


def adapter(name: str) -> ModelAdapter:
    """The adapter called `name`. Raises SvditError listing the names there are."""
    if name not in MODELS:
        raise complain("model", repr(name), "one of " + ", ".join(model_names()))
    return MODELS[name]
