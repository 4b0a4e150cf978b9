"""TensorRT: the engines that `svdit-build` put into a bundle, one CUDA graph each, replayed for every step.

Addresses never change after `activate`: every input and output has two buffers in device memory, each with a pinned one
on the host, and calls take the first and the second in turn. So the latents of a call are copied, on the stream
"upload", while the call before it still computes, on the stream "denoise". A call copies its inputs, `stage` and
`timestep` among them, then replays the graph, which reads what the buffers now hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdit.plans.bundle import Bundle
from svdit.plans.errors import SvditError, complain
from svdit.runtime import cuda
from svdit.runtime.build_platform import Platform, this_platform
from svdit.runtime.build_record import GIB, EngineRecord, read_record, require_fresh
from svdit.runtime.runner import Runner
from svdit.runtime.trt_engine import error_recorder, load_engine, refit
from svdit.runtime.trt_step import Steps
from svdit.trt_plugins import tensorrt_library

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Slot:
    """One of the two sets of buffers, by tensor name; `done` marks the end of the last call that used it."""

    number: int
    buffers: Mapping[str, cuda.Buffer]
    done: cuda.Event


class TrtRunner(Runner):
    """Runs the engines of a bundle, on one GPU.

    device            number of the GPU
    weight_streaming  GiB of weights in device memory, instead of what the engine was built with

    `infer` takes and gives arrays on the host, `infer_tensors` tensors on the GPU, where torch can use it.
    """

    backend = "tensorrt"

    def __init__(self, bundle: Bundle, *, device: int = 0, weight_streaming: float | None = None) -> None:
        manifest = bundle.manifest
        num_stages = max(stage for graph in manifest.graphs for stage in graph.stages) + 1
        super().__init__(f"tensorrt:{manifest.variant}", manifest.inputs, manifest.outputs, num_stages, manifest.batch)
        self.bundle, self.device, self.weight_streaming = bundle, device, weight_streaming
        self.tensor_device = f"cuda:{device}" if torch_has_cuda() else None
        self._stack = ExitStack()
        self._streams: dict[str, cuda.Stream] = {}
        self._slots: list[Slot] = []
        self._of_stage: dict[int, Steps] = {}
        self._errors: Any = None

    def _activate(self) -> None:
        try:
            self._load()
        except BaseException:
            self._close()
            raise

    def _load(self) -> None:
        record = read_record(self.bundle.path)
        platform = this_platform(self.device)
        require_fresh(self.bundle, record, platform)
        cudart = cuda.runtime()
        cuda.call(cudart.cudaSetDevice(self.device), f"device {self.device}")
        for name in ("upload", "denoise"):
            self._streams[name] = cuda.Stream(cudart, name, self._stack)
        manifest = self.bundle.manifest
        for number in range(2):
            buffers = {
                spec.name: cuda.Buffer(cudart, spec.name, spec.sizes(manifest.batch.most), spec.dtype, self._stack)
                for spec in (*manifest.inputs, *manifest.outputs)
            }
            self._slots.append(Slot(number, buffers, cuda.Event(cudart, f"use of buffers {number}", self._stack)))
        if manifest.variant == "plugin":
            tensorrt_library.load(platform.module)
        self._errors = error_recorder(platform.module)
        sets = [slot.buffers for slot in self._slots]
        for engine in record.engines:
            loaded = self._engine(platform, record, engine.file)
            steps = Steps(self._stack, cudart, loaded, sets, self._streams["denoise"], self._errors)
            steps.of(manifest.batch.most)
            self._of_stage |= dict.fromkeys(engine.stages, steps)

    def _engine(self, platform: Platform, record: EngineRecord, file: str) -> Any:
        """The engine in `file`, ready for contexts: weights put back, streaming budget set."""
        trt, folder = platform.module, self.bundle.path
        engine = load_engine(trt, folder / file, self._errors)
        if record.options.strip_weights:
            refit(trt, engine, folder.resolve() / Path(file).with_suffix(".onnx").name, self._errors)
        budget = record.options.weight_streaming if self.weight_streaming is None else self.weight_streaming
        if budget is not None:
            if record.options.weight_streaming is None:
                raise complain(
                    f"{folder / file}: weight streaming",
                    "an engine that cannot",
                    "one built for it",
                    f"run: svdit-build {folder} --weight-streaming {budget:g}",
                )
            engine.weight_streaming_budget_v2 = min(int(budget * GIB), engine.streamable_weights_size)
        return engine

    def _next_slot(self) -> Slot:
        """The buffers for the next call: those that the last one did not use."""
        self._slots.reverse()
        return self._slots[0]

    def infer_tensors(self, feed: Mapping[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
        """Evaluate once on the GPU's own tensors, in the order of torch's stream and without waiting for it.

        Calls from several streams of torch overlap: the inputs of one are copied while the one before computes.

        Raises SvditError for a tensor of another shape.
        """
        import torch

        rows = feed["hidden_states"].shape[0]
        for name, tensor in feed.items():
            if tuple(tensor.shape) != self.input(name).sizes(rows):
                raise complain(f"{self.name}: {name} shape", tuple(tensor.shape), self.input(name).sizes(rows))
        self.check_rows(rows)
        slot, (upload, denoise) = self._next_slot(), self._streams.values()
        with cuda.in_order(upload.of_torch(self.device)):
            upload.wait_for(slot.done)
            for name, tensor in feed.items():
                slot.buffers[name].of_torch(self.device)[: len(tensor)].copy_(tensor)
            if "stage" in slot.buffers:
                slot.buffers["stage"].of_torch(self.device).fill_(stage)
        made = {spec.name: slot.buffers[spec.name].of_torch(self.device)[:rows] for spec in self.outputs}
        outputs = {name: torch.empty_like(tensor) for name, tensor in made.items()}  # memory of the caller's stream
        with cuda.in_order(denoise.of_torch(self.device)):
            self._of_stage[stage].of(rows).launch(slot.number)
            for name, tensor in made.items():
                outputs[name].copy_(tensor)
            slot.done.record(denoise)
        self._errors.complain(self.name)
        return outputs

    def _infer(self, feed: Mapping[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
        slot, stream, rows = self._next_slot(), self._streams["denoise"], len(feed["hidden_states"])
        given = {**feed, "stage": np.array([stage], np.int32)} if "stage" in slot.buffers else feed
        for name, array in given.items():
            slot.buffers[name].host[: len(array)] = array
            slot.buffers[name].upload(stream)
        self._of_stage[stage].of(rows).launch(slot.number)
        outputs = [slot.buffers[spec.name] for spec in self.outputs]
        for buffer in outputs:
            buffer.download(stream)
        stream.wait()
        self._errors.complain(self.name)
        return {buffer.name: buffer.host[:rows].copy() for buffer in outputs}

    def _close(self) -> None:
        for stream in self._streams.values():
            with suppress(SvditError):  # what failed there was told by the call that noticed
                stream.wait()
        for made in (self._of_stage, self._streams, self._slots):
            made.clear()
        self._stack.close()


def torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
