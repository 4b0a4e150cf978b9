"""The model itself in torch: adapter and attention function, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdit.plans import registry
from svdit.plans.batch import BATCH, Batch, batch_of
from svdit.plans.bundle import Bundle, TensorSpec
from svdit.plans.errors import complain
from svdit.plans.schema import Plan
from svdit.plans.tiles import Tiling
from svdit.runtime.runner import Runner, need

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
DTYPE_OF = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision of a bundle to torch's name."""


def checkpoint_of(adapter: Any, checkpoint: str | Path | None) -> Path:
    """The checkpoint folder to use; None or "packaged" means the weights shipped with the package."""
    if checkpoint is None or str(checkpoint) == "packaged":
        packaged = adapter.packaged_checkpoint()
        if packaged is None:
            raise complain(
                f"model {adapter.name}: checkpoint",
                "none",
                "a checkpoint folder",
                "this model ships no weights; pass --checkpoint DIR",
            )
        return Path(packaged)
    path = Path(checkpoint)
    if not path.is_dir():
        raise complain("checkpoint", str(path), "an existing folder in diffusers' layout")
    return path


def check_device(device: str) -> str:
    """Return `device` if torch can use it here."""
    need("torch", "the backend torch")
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise complain("device", repr(device), "cpu, cuda or cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise complain("device", repr(device), "cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise complain("device", repr(device), "a GPU that torch can see", "use --device cpu")
    return device


class TorchRunner(Runner):
    """Runs an adapter's denoiser. Any number of rows per call, or those of `batch`.

    plan None means dense attention. `attention` is a method of `runtime.attention.plan_attention`.
    dtype is that of weights and activations; inputs and outputs of `infer` are always float32.
    """

    backend = "torch"

    def __init__(
        self,
        adapter: Any,
        checkpoint: Path,
        tiling: Tiling,
        plan: Plan | None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "auto",
        threads: int | None = None,
        batch: Batch | int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise complain("dtype", repr(dtype), f"one of {', '.join(DTYPES)}")
        limits = None if batch is None else batch_of(batch)
        rows = BATCH if limits is None else limits.dim
        inputs = [
            TensorSpec(spec.name, spec.dtype, (rows, *spec.shape[1:]))
            for spec in adapter.inputs(checkpoint, tiling.geometry, 1)
            if spec.name != "stage"
        ]
        outputs = (TensorSpec("noise_pred", "float32", (rows, *adapter.output_shape(tiling.geometry, checkpoint))),)
        num_stages = 1 if plan is None else len(plan.stages)
        super().__init__("torch:dense" if plan is None else "torch:plan", inputs, outputs, num_stages, limits)
        self.adapter, self.checkpoint, self.tiling, self.plan = adapter, checkpoint, tiling, plan
        self.device, self.dtype, self.method, self.threads = device, dtype, attention, threads
        self._model: torch.nn.Module | None = None

    @property
    def model(self) -> torch.nn.Module:
        """The denoiser of an active runner; its `attention` may be replaced."""
        assert self._model is not None
        return self._model

    def _activate(self) -> None:
        check_device(self.device)
        import torch

        from svdit.runtime.attention import DenseAttention, plan_attention

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        attention = (
            DenseAttention(self.tiling)
            if self.plan is None
            else plan_attention(self.plan, self.device, self.method, self.dtype)
        )
        self._model = self.adapter.denoiser(
            self.checkpoint, self.tiling, attention, dtype=self.dtype, device=self.device
        ).eval()

    def _infer(self, feed: Mapping[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            given = {name: torch.from_numpy(array).to(self.device) for name, array in feed.items()}
            number = torch.tensor([stage], dtype=torch.int32, device=self.device)
            return {"noise_pred": self.model(**given, stage=number).float().cpu().numpy()}

    def _close(self) -> None:
        self._model = None
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()


def torch_from_bundle(
    bundle: Bundle, *, device: str = "cpu", threads: int | None = None, dense: bool = False, attention: str = "auto"
) -> TorchRunner:
    """A torch runner with the bundle's plan, checkpoint, precision and batch.

    A dense bundle, or `dense`, gives dense attention.
    """
    adapter = registry.adapter(bundle.manifest.model)
    checkpoint = checkpoint_of(adapter, bundle.manifest.checkpoint)
    dense = dense or bundle.manifest.variant == "dense"
    return TorchRunner(
        adapter,
        checkpoint,
        bundle.plan.tiling(),
        None if dense else bundle.plan,
        device=device,
        dtype=DTYPE_OF[bundle.manifest.precision],
        attention=attention,
        threads=threads,
        batch=bundle.manifest.batch,
    )
