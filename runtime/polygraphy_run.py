"""Our backends as options of `polygraphy run`: --svdit-onnxrt, --svdit-onnxrt-cuda, --svdit-tensorrt, --svdit-torch.

Polygraphy finds `runner_groups` through the entry point "polygraphy.run.plugins" of this package. The model that
`polygraphy run` is given is the graph of a bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable


class _BundleArgs(BaseRunnerArgs):
    backend: ClassVar[str]

    def get_name_opt_impl(self) -> tuple[str, str]:
        return f"svdit's backend {self.backend}", f"svdit-{self.backend}"

    def add_to_script_impl(self, script: Any) -> None:
        folder = str(Path(self.arg_groups[ModelArgs].path).parent)
        script.add_import(imports=["BundleRunner"], frm="svdit.runtime.polygraphy_bridge")
        script.add_runner(make_invocable("BundleRunner", folder, self.backend))


class OrtArgs(_BundleArgs):
    """
    svdit on ONNX Runtime: inference with svdit's custom operator on the CPU.

    Depends on:

        - ModelArgs
    """

    backend = "onnxrt"


class OrtCudaArgs(_BundleArgs):
    """
    svdit on ONNX Runtime with CUDA: inference with svdit's custom operator on a GPU.

    Depends on:

        - ModelArgs
    """

    backend = "onnxrt-cuda"


class TrtArgs(_BundleArgs):
    """
    svdit on TensorRT: inference with the engine of a bundle.

    Depends on:

        - ModelArgs
    """

    backend = "tensorrt"


class TorchArgs(_BundleArgs):
    """
    svdit in PyTorch: inference with the model itself and a bundle's plan.

    Depends on:

        - ModelArgs
    """

    backend = "torch"


def runner_groups() -> list[BaseRunnerArgs]:
    """What Polygraphy adds to the argument groups of `run`."""
    return [OrtArgs(), OrtCudaArgs(), TrtArgs(), TorchArgs()]
