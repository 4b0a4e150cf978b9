"""A plan inside a diffusers pipeline: the transformer's self-attention is exchanged in place.

    from svdit.runtime.sparsify import sparsify

    with sparsify(pipe, read_plan("P.plan.json")):
        video = pipe(prompt).frames

Everything else of the pipeline stays diffusers' own. For inference only: the operator has no gradient.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdit.plans.errors import complain
from svdit.plans.schema import Plan
from svdit.plans.tables import tables_of
from svdit.runtime.attention import PlacedTables
from svdit.runtime.families import Family, family_of
from svdit.trt_plugins import cuda_library, reference, torch_op

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

HALF = (torch.float16, torch.bfloat16)
CLOSE = 2.0**-8
"""Relative: a timestep may have been rounded to bfloat16 on its way."""


def sparsify(target: Any, plan: Plan, *, scheduler: Any = None) -> Sparsified:
    """Make the self-attention of `target` follow `plan`, until `restore()` or the end of a `with` block.

    target     a WanPipeline, CogVideoXPipeline or HunyuanVideoPipeline (image-to-video forms included), or its
               transformer alone
    scheduler  for a transformer alone and a plan of several stages: the diffusers scheduler whose `timesteps`
               say which step a call belongs to; a pipeline's own is used otherwise

    On a GPU in half precision the compiled kernel runs where it is found, else the operator in plain torch.
    Raises SvditError when the target is none of these, or when layers, heads or head size are not the plan's;
    the grid and the text tokens are checked at every call of the transformer.
    """
    transformer = getattr(target, "transformer", None)
    if isinstance(target, torch.nn.Module):
        transformer = target
    elif getattr(target, "transformer_2", None) is not None:
        raise complain(
            "pipeline",
            "two transformers",
            "one",
            "use sparsify(pipe.transformer, plan, scheduler=pipe.scheduler), and the same for pipe.transformer_2",
        )
    family = family_of(transformer)
    family.check(transformer, plan.geometry)
    if isinstance(target, torch.nn.Module):
        if scheduler is None and len(plan.stages) > 1:
            hint = "pass scheduler=pipe.scheduler, or give the pipeline itself"
            raise complain("scheduler", "none", f"one, for a plan of {len(plan.stages)} stages", hint)
        return Sparsified(transformer, family, plan, lambda: scheduler)
    return Sparsified(transformer, family, plan, lambda: target.scheduler if scheduler is None else scheduler)


class Sparsified:
    """The exchange, and the way back. `step` and `stage` are those of the latest call of the transformer."""

    def __init__(
        self, transformer: torch.nn.Module, family: Family, plan: Plan, scheduler: Callable[[], Any]
    ) -> None:
        self.transformer, self.family, self.plan = transformer, family, plan
        self.step: int | None = None
        self.stage = 0
        self._scheduler = scheduler
        self._signature = inspect.signature(type(transformer).forward)
        self._shared = Shared(plan)
        modules = family.attentions(transformer)
        self._originals = [(module, module.processor) for module in modules]
        once = family.takes_tile_order(transformer, plan.geometry, self._shared.order)
        for module, attention in zip(modules, self._shared.layers, strict=True):
            module.set_processor(family.processor(attention if once else InModelOrder(attention)))
        self._hooks = [transformer.register_forward_pre_hook(self._before, with_kwargs=True)]
        if once:
            self._hooks += family.reorder(transformer, self._shared)
        self._once = once

    def restore(self) -> None:
        """Put the original attention back; calling it twice does nothing."""
        for module, processor in self._originals:
            module.set_processor(processor)
        for hook in self._hooks:
            hook.remove()
        self._originals, self._hooks = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _before(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Runs before each forward of the transformer: checks its inputs, sets stage and text lengths, and brings
        those inputs into tile order that have a row for every token."""
        given = self._signature.bind(module, *args, **kwargs).arguments
        latents = given["hidden_states"]
        self.family.check_inputs(module, self.plan.geometry, given)
        if len(self.plan.stages) > 1:
            timesteps = self._scheduler().timesteps
            self.step = step_of(given["timestep"], timesteps, getattr(self._scheduler(), "step_index", None))
            self.stage = self.plan.stage_of(self.step, len(timesteps))
        self._shared.begin(latents.device, self.stage, self.family.text_lengths(self.plan.geometry, given))
        changed = self.family.reordered_inputs(given, self._shared) if self._once else {}
        if not changed:
            return args, kwargs
        given.pop("self")
        return (), {**given, **changed}


def step_of(timestep: Any, timesteps: Tensor, step_index: int | None = None) -> int:
    """The step (from 0) whose timestep a transformer was called with.

    Both calls of classifier-free guidance have one timestep, so they count as one step. Of several steps with
    the same timestep (second-order schedulers) the scheduler's own `step_index` is taken, or else the first.
    """
    value = float(torch.as_tensor(timestep).max())  # one per token in Wan 2.2, zero where an image is given
    away = (torch.as_tensor(timesteps).double().cpu() - value).abs()
    nearest = float(away.min())
    if nearest > CLOSE * max(abs(value), 1.0):
        low, high = float(timesteps.min()), float(timesteps.max())
        expected = f"one of the scheduler's {len(timesteps)} timesteps, {low:g} to {high:g}"
        hint = "transformer and scheduler must be those of one pipeline, after set_timesteps"
        raise complain("timestep", f"{value:g}", expected, hint)
    steps = torch.nonzero(away == nearest).flatten().tolist()
    return step_index if step_index in steps else steps[0]


class Shared:
    """The plan's tables on the device of the current call, its stage and text lengths; one for all layers."""

    def __init__(self, plan: Plan) -> None:
        torch_op.load()
        self.kernel = cuda_library.find() is not None
        self.tables = tables_of(plan)
        self.order = torch.from_numpy(plan.tiling().order)
        self.inverse = torch.argsort(self.order)
        self.device: torch.device | None = None
        self.layers = [LayerAttention(self) for _ in range(plan.geometry.layers)]

    def begin(self, device: torch.device, stage: int, text_len: list[int] | Tensor) -> None:
        """Stage and text lengths [B] of the coming call on `device`."""
        self.place(device)
        with torch.inference_mode(False):
            self.stage = torch.tensor([stage], dtype=torch.int32, device=device)
            self.text_len = torch.as_tensor(text_len, dtype=torch.int32, device=device)

    def place(self, device: torch.device) -> None:
        """Bring the tables to `device` unless they are there."""
        if device == self.device:
            return

        with torch.inference_mode(False):
            self.order, self.inverse = self.order.to(device), self.inverse.to(device)
            placed = PlacedTables(self.tables, device)
            for layer, attention in enumerate(self.layers):
                attention.tables = placed.of(layer)
            if self.device is not None:
                self.stage, self.text_len = self.stage.to(device), self.text_len.to(device)
        self.device = device

    def to_tiles(self, x: Tensor, dim: int) -> Tensor:
        """Video tokens along `dim`, which may have text tokens beside them, from raster order into tile order."""
        return self._reordered(x, dim, self.order)

    def to_raster(self, x: Tensor, dim: int) -> Tensor:
        """The way back."""
        return self._reordered(x, dim, self.inverse)

    def _reordered(self, x: Tensor, dim: int, order: Tensor) -> Tensor:
        order, text = order.to(x.device), x.shape[dim] - len(order)
        if text:
            first, last = (text, 0) if self.tables.text_first else (0, text)
            parts = torch.arange(first), order + first, torch.arange(last) + len(order)
            order = torch.cat([part.to(x.device) for part in parts])
        return x.index_select(dim, order)

    def operator(self, q: Tensor) -> Callable[..., Tensor]:
        """The compiled kernel or the CPU operator; plain torch on a GPU where the kernel cannot run."""
        if q.device.type == "cpu" or (self.kernel and q.dtype in HALF):
            return torch.ops.svdit.sparse_attention
        why = "no kernel library was found" if q.dtype in HALF else f"the kernel does not take {q.dtype}"
        warnings.warn(f"sparse attention runs in plain torch on {q.device}: {why} (docs/kernels.md)", stacklevel=2)
        return reference.sparse_attention


class LayerAttention:
    """Attention of one layer on q, k, v [B, N, H, D] in tile order.

    Its tables are tensors of its own, and nothing else tells the layers apart: one compiled block serves them all.
    """

    tables: tuple[Tensor, ...]

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = self.shared
        shared.place(q.device)
        return shared.operator(q)(
            q,
            k,
            v,
            shared.stage,
            shared.text_len,
            *self.tables,
            q.shape[-1] ** -0.5,
            shared.tables.text_tokens,
            shared.tables.text_first,
        )


class InModelOrder:
    """A layer's attention for tokens in the model's order: four gathers of [B, N, H, D] bring them to and fro."""

    def __init__(self, attention: LayerAttention) -> None:
        self.attention = attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = self.attention.shared
        return shared.to_raster(self.attention(*(shared.to_tiles(x, 1) for x in (q, k, v))), 1)
