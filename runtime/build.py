"""Engines from the graphs of a bundle, through Polygraphy's loaders. `build` is what `svdit-build` calls.

TensorRT and TensorRT-RTX (POLYGRAPHY_USE_TENSORRT_RTX=1) take the same way; only the class of the builder
configuration differs.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdit.plans.bundle import Bundle, GraphFile
from svdit.plans.errors import complain
from svdit.runtime.build_platform import RTX, Platform, require_buildable
from svdit.runtime.build_progress import progress_monitor
from svdit.runtime.build_record import (
    GIB,
    EngineFile,
    EngineRecord,
    Options,
    engine_file,
    engine_name,
    stale_reason,
    write_record,
)
from svdit.trt_plugins import tensorrt_library

WORKSPACE = 8 * GIB
"""Limit of a layer's scratch memory: without one, trying tactics can use up the device beside the weights."""


@dataclass(frozen=True)
class Work:
    """What `build` would do, as `--dry-run` prints it."""

    bundle: Bundle
    platform: Platform
    options: Options
    reason: str
    """Why engines are built; empty when those of the bundle are up to date."""
    timing_cache: Path

    @property
    def weight_bytes(self) -> int:
        return sum(weight.size for weight in self.bundle.manifest.weights)

    @property
    def disk_bytes(self) -> int:
        """About what the engines will take."""
        return 0 if self.options.strip_weights else self.weight_bytes * len(self.bundle.manifest.graphs)

    def lines(self) -> Iterator[str]:
        """The plan of work in words."""
        yield f"platform: {self.platform}"
        yield f"why: {self.reason or 'engines are up to date'}"
        for graph in self.bundle.manifest.graphs:
            yield f"engine: {graph.file} -> {self.bundle.path / engine_name(graph.file)}"
        stripped = "weights left out and put back when loaded" if self.options.strip_weights else "weights inside"
        streaming = self.options.weight_streaming
        yield f"engines: strongly typed, {stripped}; " + (
            "all weights in device memory" if streaming is None else f"{streaming:g} GiB of weights in device memory"
        )
        if self.bundle.manifest.batch.least < self.bundle.manifest.batch.most:
            yield f"batch: {self.bundle.manifest.batch}, tuned for {self.bundle.manifest.batch.most}"
        yield f"timing cache: {self.timing_cache} ({'there' if self.timing_cache.is_file() else 'new'})"
        yield f"weights: {self.weight_bytes / 1e9:.2f} GB; host memory while building: about three times that"
        yield f"disk: about {self.disk_bytes / 1e9:.2f} GB"


def prepare(bundle: Bundle, platform: Platform, options: Options) -> Work:
    """What there is to do for this bundle here. Raises SvditError with the reason where it cannot be built."""
    require_buildable(bundle, platform)
    return Work(bundle, platform, options, stale_reason(bundle, platform, options), timing_cache(bundle.path, platform))


def timing_cache(folder: Path, platform: Platform) -> Path:
    """The cache beside the bundle: it outlives an export, and holds for one version and kind of GPU."""
    kind = f"{platform.library}-{platform.version}"
    if platform.gpu is not None:
        kind += "-sm" + platform.gpu.compute_capability.replace(".", "")
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.{kind}.timing")


def build(work: Work, show: bool = True) -> EngineRecord:
    """Build every engine of the bundle, then put them in place with `engine.json`. Raises SvditError.

    Engines that are there already are replaced only when all new ones are built.
    """
    folder = work.bundle.path
    free = shutil.disk_usage(folder).free
    if free < work.disk_bytes:
        raise complain(f"{folder}: free disk space", f"{free} bytes", f"about {work.disk_bytes}", "free some")
    mark = secrets.token_hex(4)
    made: list[tuple[Path, EngineFile]] = []
    pending = [folder / f".{engine_name(g.file)}.{mark}.tmp" for g in work.bundle.manifest.graphs]
    try:
        for graph, path in zip(work.bundle.manifest.graphs, pending, strict=True):
            build_engine(work, graph, path, show)
            made.append((path, engine_file(path, engine_name(graph.file), graph.sha256, graph.stages)))
        for path, engine in made:
            os.replace(path, folder / engine.file)
    finally:
        for path in pending:
            path.unlink(missing_ok=True)
    gpu = work.platform.gpu
    result = EngineRecord(
        work.platform.library,
        work.platform.version,
        None if gpu is None else gpu.name,
        None if gpu is None else gpu.compute_capability,
        work.options,
        tuple(engine for _, engine in made),
        work.bundle.manifest.weights,
    )
    write_record(folder, result)
    return result


def build_engine(work: Work, graph: GraphFile, target: Path, show: bool) -> None:
    """One engine file from one graph of the bundle."""
    from polygraphy.backend.common import SaveBytes
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, PostprocessNetwork
    from polygraphy.exception import PolygraphyException

    trt = work.platform.module
    source = work.bundle.path.resolve() / graph.file
    monitor = progress_monitor(trt, graph.file, show)
    plugins = 0 if work.bundle.manifest.variant != "plugin" else count_nodes(source)
    network = PostprocessNetwork(
        NetworkFromOnnxPath(str(source), strongly_typed=True),
        lambda network: require_plugins(network, trt, plugins, str(source)),
    )
    engine = EngineBytesFromNetwork(
        network, config=builder_config(work, monitor), save_timing_cache=str(work.timing_cache)
    )
    with collected_errors() as errors:
        try:
            SaveBytes(engine, str(target))()
        except PolygraphyException as error:
            if monitor.cancelled:
                raise KeyboardInterrupt from None
            got = errors[0] if errors else str(error)
            raise complain(str(source), f"{work.platform}: {got}", "a graph that it builds") from None


def builder_config(work: Work, monitor: Any) -> Any:
    """Polygraphy's loader of the builder configuration."""
    from polygraphy.backend import trt as loaders

    trt = work.platform.module
    create = loaders.CreateConfig
    if work.platform.library == RTX:
        from polygraphy.backend import tensorrt_rtx

        create = tensorrt_rtx.CreateConfigRTX
    config = create(
        profiles=profiles(work.bundle),
        load_timing_cache=str(work.timing_cache) if work.timing_cache.is_file() else None,
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: WORKSPACE},
        strip_plan=work.options.strip_weights,
        weight_streaming=work.options.weight_streaming is not None,
        progress_monitor=monitor,
    )
    if not work.options.strip_weights:
        return config
    # NOTE without this flag a stripped engine is a refittable one, which gives up fusions across weights.
    return loaders.PostprocessConfig(config, lambda _, __, made: made.set_flag(trt.BuilderFlag.REFIT_IDENTICAL))


def profiles(bundle: Bundle) -> list[Any] | None:
    """The optimization profile of a bundle whose batch is free: from its smallest to its largest, tuned for that."""
    from polygraphy.backend.trt import Profile

    least, most = bundle.manifest.batch
    if least == most:
        return None
    profile = Profile()
    for spec in bundle.manifest.inputs:
        profile.add(spec.name, min=spec.sizes(least), opt=spec.sizes(most), max=spec.sizes(most))
    return [profile]


def count_nodes(path: Path) -> int:
    """How many SparseAttention nodes an ONNX file has; weights are not read."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return sum(node.op_type == tensorrt_library.NAME for node in graph.node)


def require_plugins(network: Any, trt: Any, expected: int, subject: str) -> None:
    """Raise SvditError unless the parsed network has one plugin layer for every SparseAttention node."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    if found != expected:
        raise complain(
            f"{subject}: plugin layers",
            found,
            f"{expected}, one a SparseAttention node",
            "set SVDIT_TENSORRT_VERBOSE=1 to see which plugins are created",
        )


@contextmanager
def collected_errors() -> Iterator[list[str]]:
    """The errors that Polygraphy and TensorRT log inside the block, instead of their lines on the terminal."""
    from polygraphy.logger import G_LOGGER

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                found.append(" ".join(record.getMessage().removeprefix("[E] ").split()))
            elif record.levelno >= logging.WARNING and "'colored' module" not in record.getMessage():
                print(record.getMessage(), file=sys.stderr)

    found: list[str] = []
    handler, logger = Collector(), logging.getLogger("Polygraphy")
    before, propagate = G_LOGGER.use_python_logging_system, logger.propagate
    G_LOGGER.use_python_logging_system, logger.propagate = True, False
    logger.addHandler(handler)
    try:
        with G_LOGGER.verbosity(G_LOGGER.WARNING):
            yield found
    finally:
        logger.removeHandler(handler)
        G_LOGGER.use_python_logging_system, logger.propagate = before, propagate
