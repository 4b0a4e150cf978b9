"""The TensorRT and the GPU of this machine, and whether a bundle can be built for them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from svdit.plans.bundle import Bundle
from svdit.plans.errors import complain
from svdit.runtime import cuda
from svdit.trt_plugins import tensorrt_library

TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
OLDEST, TOO_NEW = (10, 3), (12, 0)
OLDEST_CAPABILITY = (8, 0)
"""Compute capability that the plugin's kernels start at."""


@dataclass(frozen=True)
class Platform:
    """What an engine depends on. `gpu` is None for TensorRT-RTX, whose engines are compiled further where they run."""

    library: str
    version: str
    gpu: cuda.Gpu | None

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.library)

    def __str__(self) -> str:
        name = "TensorRT-RTX" if self.library == RTX else "TensorRT"
        if self.gpu is None:
            return f"{name} {self.version}, any RTX GPU"
        return f"{name} {self.version}, {self.gpu.name} (compute capability {self.gpu.compute_capability})"


def this_platform(device: int = 0) -> Platform:
    """TensorRT, or TensorRT-RTX where POLYGRAPHY_USE_TENSORRT_RTX=1 asks for it, and GPU number `device`.

    Raises SvditError when the library, its version or the GPU will not do.
    """
    from polygraphy import config

    library = RTX if config.USE_TENSORRT_RTX else TENSORRT
    try:
        module = importlib.import_module(library)
    except (ImportError, OSError) as error:
        hint = "pip install tensorrt_rtx" if library == RTX else "pip install 'svdit[tensorrt]'"
        raise complain("python package", f"no {library} ({error})", f"{library} that imports", hint) from None
    version = str(module.__version__)
    if library == RTX:
        return Platform(library, version, None)
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= numbers < TOO_NEW:
        raise complain("TensorRT", version, "10.3 to 11.x", "install another version: pip install 'tensorrt>=10.3,<12'")
    return Platform(library, version, cuda.gpu(device))


def require_buildable(bundle: Bundle, platform: Platform) -> None:
    """Raise SvditError where the bundle's graphs cannot become engines of this platform; loads the plugin."""
    manifest = bundle.manifest
    if manifest.variant != "plugin":
        return
    subject = f"{bundle.path}: variant 'plugin'"
    if platform.gpu is None:
        raise complain(subject, str(platform), "TensorRT", "for TensorRT-RTX export with --variant portable")
    if tuple(map(int, platform.gpu.compute_capability.split("."))) < OLDEST_CAPABILITY:
        raise complain(
            subject,
            f"a GPU of compute capability {platform.gpu.compute_capability} ({platform.gpu.name})",
            "8.0 or newer, which the plugin's kernels are for",
            "for older GPUs export with --variant portable",
        )
    if manifest.precision == "fp32":
        raise complain(
            f"{bundle.path}: precision",
            "fp32",
            "fp16 or bf16: the plugin has no float32",
            "export again with --precision bf16",
        )
    tensorrt_library.load(platform.module)
