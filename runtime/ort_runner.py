"""ONNX Runtime on the CPU: one session per graph file of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from svdit.plans.bundle import Bundle
from svdit.plans.errors import complain
from svdit.runtime.layers import layer_specs, marked_graph
from svdit.runtime.progress import progress
from svdit.runtime.runner import Runner, need
from svdit.trt_plugins import onnxruntime_library

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Session option: the folder of the weight files. Graphs given as bytes need it, and links to files elsewhere."""


def weights_folder(folder: Path) -> Path:
    """Where ONNX Runtime finds the weights of the bundle in `folder`: there, or where all of them are links to.

    It refuses links out of the folder that it reads from.
    """
    files = list(folder.glob("*.safetensors"))
    real = {file.resolve().parent for file in files}
    same_names = all(file.resolve().name == file.name for file in files)
    return real.pop() if len(real) == 1 and same_names else folder.resolve()


def cpu_options(threads: int | None) -> Any:
    """Session options of the CPU provider; threads None: ONNX Runtime's own choice."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # NOTE threads of an idle session must not spin while another session of the same process works.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


class OrtRunner(Runner):
    """Runs the graphs of a bundle on ONNX Runtime's CPU provider.

    All sessions are created in `activate`, so that no step of the loop pays for loading. The weight files
    are external data, which ONNX Runtime maps into memory: the graphs of several stages share those pages.
    The graph of a plugin bundle takes the stage as an input and needs the custom-op library.
    """

    backend = "onnxrt"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        manifest = bundle.manifest
        num_stages = max(stage for graph in manifest.graphs for stage in graph.stages) + 1
        super().__init__(f"onnxrt:{manifest.variant}", manifest.inputs, manifest.outputs, num_stages, manifest.batch)
        self.bundle = bundle
        self.threads = threads
        self._marked = False
        self._sessions: dict[int, Any] = {}

    def mark_layers(self) -> None:
        """Before activation: let `infer` return every attention layer's output too."""
        self._marked = True
        self.outputs = (*self.outputs, *layer_specs(self.bundle))

    def _activate(self) -> None:
        need("onnxruntime", "the backend onnxrt")
        import onnxruntime as ort

        options = cpu_options(self.threads)
        if self.bundle.manifest.variant == "plugin":
            self._register(options)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(weights_folder(self.bundle.path)))
        graphs = self.bundle.manifest.graphs
        for graph in progress(graphs, f"loading {self.bundle.path.name}", "graph", show=len(graphs) > 1):
            path = self.bundle.path / graph.file
            try:
                source = marked_graph(path) if self._marked else str(path)
                session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # every failure of this library is an unrelated exception class
                self._sessions.clear()
                raise complain(
                    str(path),
                    f"ONNX Runtime: {str(error).splitlines()[0]}",
                    "a graph that ONNX Runtime can load on the CPU",
                    "export the bundle again, with --copy-weights if its weights are links",
                ) from error
            for stage in graph.stages:
                self._sessions[stage] = session

    def _register(self, options: Any) -> None:
        library = onnxruntime_library.find()
        if library is None:  # it was there when the backend was chosen
            raise complain(
                onnxruntime_library.FILE_NAME, "no such file", "the built library", onnxruntime_library.BUILD
            )
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # every failure of this library is an unrelated exception class
            raise complain(
                str(library),
                f"ONNX Runtime: {str(error).splitlines()[0]}",
                "a custom-op library that this ONNX Runtime can load",
                f"rebuild it: {onnxruntime_library.BUILD}",
            ) from error

    def _infer(self, feed: Mapping[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
        session = self._sessions[stage]
        names = [spec.name for spec in self.outputs]
        wanted = {node.name for node in session.get_inputs()}
        given: dict[str, np.ndarray] = {name: array for name, array in feed.items() if name in wanted}
        if "stage" in wanted:
            given["stage"] = np.array([stage], dtype=np.int32)
        return dict(zip(names, session.run(names, given), strict=True))

    def _close(self) -> None:
        self._sessions.clear()
