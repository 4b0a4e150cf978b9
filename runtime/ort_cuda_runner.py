"""ONNX Runtime's CUDA provider: the graph of a plugin bundle on fixed addresses, replayed as one CUDA graph.

Inputs and outputs are torch tensors whose addresses are bound once, `stage` among them. Torch and the session work on
one stream each, and each waits for the other on the device: nothing here waits on the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdit.plans.bundle import Bundle, TensorSpec
from svdit.plans.errors import SvditError, complain
from svdit.runtime import cuda
from svdit.runtime.layers import layer_specs, marked_graph
from svdit.runtime.ort_runner import WEIGHTS_FOLDER, weights_folder
from svdit.runtime.runner import Runner, need
from svdit.trt_plugins import onnxruntime_library

if TYPE_CHECKING:
    import torch

CUDA_PROVIDER = "CUDAExecutionProvider"
SAFE_CAPTURES = (1, 31)
"""A release that keeps what captured copies from the host read (microsoft/onnxruntime pull request 32121)."""
UNSUITED = ["GatherSliceToSplitFusion"]
"""Optimisations of ONNX Runtime that are left out: a Split into unlike parts needs pinned memory on the host."""
BUILD = "build it: scripts/build_kernels.sh with ONNXRUNTIME_ROOT set (docs/onnxruntime.md)"


class OrtCudaRunner(Runner):
    """Runs the one graph of a plugin bundle in half precision on one GPU.

    index       number of the GPU
    cuda_graph  capture the graph at the first call and replay it from then on

    `infer` takes and gives arrays on the host, `infer_tensors` tensors on the GPU.
    """

    backend = "onnxrt-cuda"

    def __init__(self, bundle: Bundle, *, index: int = 0, cuda_graph: bool = True) -> None:
        manifest = bundle.manifest
        check_bundle(bundle)
        num_stages = len(bundle.plan.stages)
        super().__init__("onnxrt-cuda:plugin", manifest.inputs, manifest.outputs, num_stages, manifest.batch)
        self.bundle, self.cuda_graph = bundle, cuda_graph
        self.tensor_device = f"cuda:{index}"
        self._marked = False
        self._graph: BoundGraph | None = None

    def mark_layers(self) -> None:
        """Before activation: let `infer` return every attention layer's output too."""
        self._marked = True
        self.outputs = (*self.outputs, *layer_specs(self.bundle))

    def _activate(self) -> None:
        require_cuda()
        import torch

        device = torch.device(self.tensor_device)
        if device.index >= torch.cuda.device_count():
            raise complain("device", self.tensor_device, f"cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        if self.cuda_graph and self.batch.most > self.batch.least:
            check_captures()
        library = onnxruntime_library.find()
        if library is None:
            raise complain(onnxruntime_library.FILE_NAME, "no such file", "the library with CUDA kernels inside", BUILD)
        stream = torch.cuda.Stream(device)
        options = cuda_options(device.index, stream.cuda_stream, self.cuda_graph)
        graph = self.bundle.path / self.bundle.manifest.graphs[0].file
        session = open_session(graph, library, CUDA_PROVIDER, options, marked=self._marked)
        manifest = self.bundle.manifest
        most = manifest.batch.most
        self._graph = BoundGraph(session, manifest.inputs, self.outputs, device, stream, most, self.cuda_graph)

    def infer_tensors(self, feed: Mapping[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
        """Evaluate once on the GPU's own tensors, without waiting; the results are the caller's.

        Raises SvditError for a tensor of another shape.
        """
        assert self._graph is not None
        self.check_rows(feed["hidden_states"].shape[0])
        return self._graph(feed, stage)

    def _infer(self, feed: Mapping[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
        import torch

        given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
        return {name: tensor.cpu().numpy() for name, tensor in self.infer_tensors(given, stage).items()}

    def _close(self) -> None:
        self._graph = None


class BoundGraph:
    """A session whose every input and output has one address for its whole life.

    inputs, outputs  specifications, `stage` int32 [1] among the inputs
    device           where the tensors lie
    stream           the CUDA stream that the session was made for; None on the CPU
    most             rows that there is room for, where the batch is free: fewer use the beginning of each buffer, and
                     every number of rows is captured on its own
    captures         the session was made with `enable_cuda_graph`
    """

    def __init__(
        self,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
        most: int = 1,
        captures: bool = False,
    ) -> None:
        import torch

        self._session, self._device, self._stream, self._captures = session, device, stream, captures
        self.buffers = {
            spec.name: torch.zeros(spec.sizes(most), dtype=getattr(torch, spec.dtype), device=device)
            for spec in (*inputs, *outputs)
        }
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._shapes = {spec.name: spec for spec in inputs}
        self._of_rows: dict[int, tuple[Any, Any]] = {}

    def _bind(self, rows: int) -> Any:
        """The addresses for calls of so many rows."""
        binding, device = self._session.io_binding(), self._device
        for specs, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for spec in specs:
                address, sizes = self.buffers[spec.name].data_ptr(), list(spec.sizes(rows))
                bind(spec.name, device.type, device.index or 0, np.dtype(spec.dtype), sizes, address)
        return binding

    def _run(self, rows: int) -> None:
        """One evaluation of what lies in the buffers; the first one of so many rows takes several runs."""
        try:
            if rows in self._of_rows:
                self._session.run_with_iobinding(*self._of_rows[rows])
                return
            binding = self._bind(rows)
            # NOTE an ordinary run, then two more and the capture, in which no memory can be allocated: by then the
            # pools have to hold all of it. So these runs wait for the stream at their end, else Concat and Split keep
            # their staging buffers.
            for graph in ("-1", str(rows)) if self._captures else ("-1",):
                self._session.run_with_iobinding(binding, run_options({"gpu_graph_id": graph}))
        except Exception as error:  # every failure of this library is an unrelated exception class
            if re.search("failed to allocate memory|out of memory", str(error), re.IGNORECASE):
                raise self._out_of_memory(rows, error) from error
            raise
        # NOTE without the first entry the session waits for its stream at the end of every run.
        later = {"disable_synchronize_execution_providers": "1", "gpu_graph_id": str(rows)}
        self._of_rows[rows] = binding, run_options(later)

    def _out_of_memory(self, rows: int, error: Exception) -> SvditError:
        got = f"{str(error).splitlines()[-1][-160:]!r} from ONNX Runtime"
        if self._device.type == "cuda":
            used, total = cuda.memory_in_use(self._device)
            got += f", {used / 2**30:.1f} of {total / 2**30:.1f} GiB in use"
        return complain(
            f"memory of {self._device}",
            got,
            f"room for the weights and the activations of {rows} rows",
            "free the GPU of other work, export fewer rows or a smaller video, or use sparsify() instead of a bundle",
        )

    def __call__(self, feed: Mapping[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
        """Copy in, run, and copy out to new tensors, all in the order of the caller's stream."""
        rows = feed["hidden_states"].shape[0]
        for name, tensor in feed.items():
            expected = self._shapes[name].sizes(rows)
            if tuple(tensor.shape) != expected:
                raise complain(f"{name} shape", tuple(tensor.shape), expected)
        with nullcontext() if self._stream is None else cuda.in_order(self._stream):
            for name, tensor in feed.items():
                self.buffers[name][: len(tensor)].copy_(tensor)
            self.buffers["stage"].fill_(stage)
            self._run(rows)
            return {spec.name: self.buffers[spec.name][: spec.sizes(rows)[0]].clone() for spec in self._outputs}


def run_options(entries: Mapping[str, str]) -> Any:
    """ONNX Runtime's options of one run."""
    import onnxruntime as ort

    options = ort.RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, value)
    return options


def cuda_options(index: int, stream: int, graph: bool) -> dict[str, str]:
    """Options of the CUDA provider: its GPU, the address of the stream it works on, whether runs are captured."""
    return {
        "device_id": str(index),
        "user_compute_stream": str(stream),
        "enable_cuda_graph": str(int(graph)),
        "arena_extend_strategy": "kSameAsRequested",
    }


def open_session(
    path: Path, library: Path, provider: str, options: Mapping[str, str], *, marked: bool = False
) -> Any:
    """A session of which every node runs on `provider`, with the custom-op library registered.

    `marked` adds the outputs of all attention layers.

    Raises SvditError when the runtime can't do that: it never falls back to another provider.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # NOTE with patterns the runtime plans one packed block for all activations in its first run and allocates it in the
    # second, beside what the first has left in its pool: twice the memory.
    settings.enable_mem_pattern = False
    if provider != "CPUExecutionProvider":
        # NOTE the runtime would put nodes without a kernel on the CPU; with this it refuses the graph.
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings.add_session_config_entry(WEIGHTS_FOLDER, str(weights_folder(path.parent)))
    try:
        settings.register_custom_ops_library(str(library))
        source = marked_graph(path) if marked else str(path)
        session = ort.InferenceSession(
            source,
            settings,
            providers=[provider],
            provider_options=[dict(options)],
            enable_fallback=0,
            disabled_optimizers=UNSUITED,
        )
    except Exception as error:  # every failure of this library is an unrelated exception class
        raise complain(
            str(path),
            f"ONNX Runtime: {str(error).splitlines()[0]}",
            f"a graph that runs on {provider} alone",
            f"check that {library} was built with CUDA and that ONNX Runtime finds CUDA and cuDNN",
        ) from error
    used = session.get_providers()
    if used[0] != provider:
        raise complain(str(path), f"a session on {', '.join(used)}", provider, "see ONNX Runtime's CUDA requirements")
    return session


def require_cuda() -> None:
    """Let ONNX Runtime find CUDA. Raises SvditError unless it has its CUDA provider and torch sees a GPU."""
    need("onnxruntime", "the backend onnxrt-cuda")
    need("torch", "the backend onnxrt-cuda")
    import onnxruntime as ort
    import torch

    available = ort.get_available_providers()
    if CUDA_PROVIDER not in available:
        raise complain(
            "ONNX Runtime",
            f"a build with {', '.join(available)}",
            CUDA_PROVIDER,
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu; or use --backend onnxrt",
        )
    if not torch.cuda.is_available():
        raise complain("GPU", "none that torch can use", "an NVIDIA GPU and a torch for CUDA", "use --backend onnxrt")
    ort.preload_dlls()  # CUDA and cuDNN as torch and pip installed them


def check_captures() -> None:
    """Raise SvditError unless a session may capture several graphs.

    Older runtimes reuse the host buffers that captured copies of Concat and Split read, so that one graph's tables end
    up in another.
    """
    import onnxruntime as ort

    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < SAFE_CAPTURES:
        raise complain(
            "onnxruntime-gpu",
            ort.__version__,
            f"{'.'.join(map(str, SAFE_CAPTURES))} or newer for one bundle with several numbers of rows",
            "upgrade it, or export with a fixed --batch",
        )


def check_bundle(bundle: Bundle) -> None:
    """Raise SvditError unless the bundle is one for this backend: plugin, fp16 or bf16."""
    manifest = bundle.manifest
    for name, got, wanted in (
        ("variant", manifest.variant, ("plugin",)),
        ("precision", manifest.precision, ("fp16", "bf16")),
    ):
        if got not in wanted:
            raise complain(
                f"{bundle.path}: {name}",
                repr(got),
                f"{' or '.join(map(repr, wanted))} for the backend onnxrt-cuda",
                "export with --variant plugin --precision bf16, or use another backend",
            )
