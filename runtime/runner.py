"""The base of everything that evaluates the denoiser, and the one table of backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from svdit.plans.batch import BATCH, Batch, batch_of
from svdit.plans.bundle import Bundle, TensorSpec
from svdit.plans.errors import SvditError, complain
from svdit.trt_plugins import onnxruntime_library

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

BACKENDS = ("auto", "tensorrt", "onnxrt-cuda", "onnxrt", "torch")


class Runner:
    """A denoiser that can be called: a context manager that owns its device state.

    The constructor only stores arguments; `activate` loads, `close` frees. Public methods check,
    `_activate`, `_infer` and `_close` do the work. `inputs` and `outputs` are tensor specifications without `stage`,
    which is an argument of `infer`; a dimension given as text is free but must agree between inputs. `batch` says
    what the free first dimension of a bundle's inputs may be.
    """

    backend = "none"
    tensor_device: str | None = None
    """torch's name of the device on which a runner's `infer_tensors` takes and gives tensors; None: `infer` only."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        num_stages: int,
        batch: Batch | None = None,
    ) -> None:
        self.name = name
        self.inputs = tuple(spec for spec in inputs if spec.name != "stage")
        self.outputs = tuple(outputs)
        self.num_stages = num_stages
        self._batch = batch
        self.active = False

    def __enter__(self) -> Self:
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def activate(self) -> None:
        """Load graphs or weights; calling it twice does nothing."""
        if not self.active:
            self._activate()
            self.active = True

    def close(self) -> None:
        """Free everything that `activate` made; calling it twice does nothing."""
        if self.active:
            self.active = False
            self._close()

    def input(self, name: str) -> TensorSpec:
        """The specification of one input; raises SvditError for an unknown name."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise complain(f"{self.name}: input", repr(name), f"one of {[s.name for s in self.inputs]}")

    @property
    def batch(self) -> Batch | None:
        """How many rows one call may have, or None where any number goes."""
        rows = self.input("hidden_states").shape[0]
        return batch_of(rows) if isinstance(rows, int) else self._batch

    def infer(self, feed: Mapping[str, np.ndarray], stage: int = 0) -> dict[str, np.ndarray]:
        """Evaluate once. Raises SvditError when a name, dtype, shape or the stage does not fit."""
        if not self.active:
            raise complain(
                f"{self.name}: state",
                "not activated",
                "an active runner",
                "use it in a `with` block or call activate()",
            )
        if not isinstance(stage, (int, np.integer)) or not 0 <= stage < self.num_stages:
            raise complain(f"{self.name}: stage", repr(stage), f"an integer in 0..{self.num_stages - 1}")
        self._check(feed)
        return self._infer(feed, int(stage))

    def infer_tensors(self, feed: Mapping[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
        """`infer` on tensors of `tensor_device`, in the order of torch's current stream and without waiting for it."""
        raise NotImplementedError

    def _check(self, feed: Mapping[str, np.ndarray]) -> None:
        names = [spec.name for spec in self.inputs]
        if sorted(feed) != sorted(names):
            missing, extra = sorted(set(names) - set(feed)), sorted(set(feed) - set(names))
            raise complain(f"{self.name}: inputs", f"missing {missing}, unknown {extra}", f"exactly {names}")
        free: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            array = feed[spec.name]
            if not isinstance(array, np.ndarray) or array.dtype != np.dtype(spec.dtype):
                got = str(array.dtype) if isinstance(array, np.ndarray) else type(array).__name__
                raise complain(f"{self.name}: {spec.name} dtype", got, spec.dtype, "convert the array first")
            fits = array.ndim == len(spec.shape)
            for size, want in zip(array.shape, spec.shape, strict=False):
                if isinstance(want, str):
                    seen, where = free.setdefault(want, (size, spec.name))
                    if seen != size:
                        raise complain(
                            f"{self.name}: {spec.name} shape", str(array.shape), f"{want} = {seen} as in {where}"
                        )
                else:
                    fits = fits and size == want
            if not fits:
                raise complain(f"{self.name}: {spec.name} shape", str(array.shape), str(tuple(spec.shape)))
        if BATCH in free:
            self.check_rows(free[BATCH][0])

    def check_rows(self, rows: int) -> None:
        """Raise SvditError unless a call may have so many rows."""
        batch = self.batch
        if batch is not None and not batch.least <= rows <= batch.most:
            hint = f"export the bundle with another --batch, such as {min(rows, batch.least)}-{max(rows, batch.most)}"
            raise complain(f"{self.name}: batch", f"a call of {rows}", f"{batch} rows", hint)

    def _activate(self) -> None:
        raise NotImplementedError

    def _infer(self, feed: Mapping[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


def resolve_backend(bundle: Bundle, backend: str) -> str:
    """Turn `auto` into a backend that can run this bundle here, and refuse what cannot.

    `auto` is onnxrt for bundles of standard operators (portable, dense) and torch for the plugin variant.
    """
    if backend not in BACKENDS:
        raise complain("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    variant = bundle.manifest.variant
    if backend == "auto":
        return "torch" if variant == "plugin" else "onnxrt"
    if backend == "onnxrt" and variant == "plugin" and onnxruntime_library.find() is None:
        raise complain(
            f"{bundle.path}: variant",
            repr(variant),
            f"'portable' or 'dense' for the backend onnxrt without {onnxruntime_library.FILE_NAME}",
            f"build it ({onnxruntime_library.BUILD}), export with --variant portable, or use --backend torch",
        )
    return backend


def make_runner(
    bundle: Bundle, backend: str = "auto", *, device: str = "cpu", threads: int | None = None, dense: bool = False
) -> Runner:
    """A runner for a bundle. `dense` (torch only) runs dense attention instead of the bundle's plan."""
    backend = resolve_backend(bundle, backend)
    if backend == "torch":
        from svdit.runtime.torch_runner import torch_from_bundle

        return torch_from_bundle(bundle, device=device, threads=threads, dense=dense)
    if device != "cpu" and backend == "onnxrt":
        raise complain("device", repr(device), "'cpu' with the backend onnxrt", "use --backend torch")
    if dense and bundle.manifest.variant != "dense":
        raise complain(
            "dense",
            "a bundle of variant " + repr(bundle.manifest.variant),
            "variant 'dense'",
            "pass the dense bundle itself",
        )
    if backend == "onnxrt-cuda":
        from svdit.runtime.ort_cuda_runner import OrtCudaRunner

        return OrtCudaRunner(bundle, index=gpu_index(device, backend))
    if backend == "tensorrt":
        from svdit.runtime.trt_runner import TrtRunner

        return TrtRunner(bundle, device=gpu_index(device, backend))
    from svdit.runtime.ort_runner import OrtRunner

    return OrtRunner(bundle, threads=threads)


def gpu_index(device: str, backend: str) -> int:
    """The GPU's number in `device`: cuda or cuda:N; "cpu", what commands say when nobody chose, is cuda:0."""
    if device in ("cpu", "cuda"):
        return 0
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise complain("device", repr(device), f"cuda or cuda:N with the backend {backend}")
    return int(number)


def need(package: str, purpose: str) -> None:
    """Raise SvditError when an importable package is missing, instead of an ImportError later on."""
    if importlib.util.find_spec(package) is None:
        raise complain("python package", f"no {package}", f"{package}, for {purpose}", f"pip install {package}")


__all__ = ["BACKENDS", "Runner", "SvditError", "make_runner", "need", "resolve_backend"]
