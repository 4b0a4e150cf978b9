"""The whole export in reading order: read, trace, rewrite, check, save.

`export` is what `svdit-export` calls. Nothing of the target folder exists until everything has succeeded.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter.link import place_weights
from svdit.exporter.models.registry import adapter as find_adapter
from svdit.exporter.models.video import VideoSize
from svdit.plans.batch import Batch, batch_of
from svdit.plans.bundle import (
    MANIFEST_FILE,
    PACKAGED,
    PLAN_FILE,
    PRECISIONS,
    VARIANTS,
    Bundle,
    Manifest,
    TensorSpec,
    graph_file,
    read_bundle,
    weight_file,
    write_manifest,
)
from svdit.plans.errors import complain
from svdit.plans.fields import one_of
from svdit.plans.files import unusable
from svdit.plans.schema import Plan, dumps
from svdit.plans.tables import Tables, tables_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from svdit.exporter.models.base import ModelAdapter, StoredTensor

COMPUTE_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
OUTPUT = "noise_pred"
STEPS = ("trace", "tidy", "rewrite", "check", "save")
"""What `report` is told about, in this order."""
LIBRARIES = ("svdit", "torch", "onnx", "onnx-ir", "onnxscript", "diffusers")


@dataclass(frozen=True)
class Traced:
    """A denoiser as one graph with SparseAttention nodes, and where its weights lie."""

    model: ir.Model
    parameters: dict[str, StoredTensor]
    tables: Tables
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: Batch


def export(
    model: str,
    plan: Plan,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    variant: str = "plugin",
    precision: str = "fp32",
    batch: int | str | tuple[int, int] = 2,
    size: tuple[int | None, int | None, int | None] = (None, None, None),
    copy_weights: bool = False,
    report: Callable[[str], None] = lambda step: None,
    note: Callable[[str], None] = lambda text: None,
) -> Bundle:
    """Write the bundle `out` for one model and plan, and return it as read back.

    `batch` is a number of rows, or a range that one graph serves: (1, 2) or "1-2".
    `size`, frames, height and width of the video in pixels, only checks the plan's grid; None is whatever that gives.
    `report` hears of each of STEPS as it begins, `note` gets sentences for the user. Raises SvditError for
    whatever does not fit together; then nothing has been written and an older bundle at `out` is untouched.
    """
    adapter = find_adapter(model)
    one_of(variant, "variant", VARIANTS)
    one_of(precision, "precision", PRECISIONS)
    rows = batch_of(batch)
    if variant != "plugin" and precision != "fp32":
        raise complain("precision", precision, f"fp32 for the {variant} variant", "only the plugin computes in half")
    out = Path(out)
    check_target(out)
    folder, source = _checkpoint(adapter, checkpoint)
    check_size(adapter, folder, plan, size)
    report("trace")
    traced = trace_denoiser(adapter, folder, plan, precision, rows, report)
    report("rewrite")
    graphs = rewrite(traced, plan, variant)
    report("check")
    for graph, _ in graphs.values():
        check(graph)
    report("save")
    return _save(out, adapter, folder, source, plan, traced, graphs, variant, precision, rows, copy_weights, note)


def check_target(out: Path) -> None:
    """Raise SvditError unless `out` is free, empty, or a bundle that may be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise complain(f"output {out}", "a file or a link", "a new folder, or a bundle to replace")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise complain(f"output {out}", "a folder with other things in it", "a new folder, or a bundle to replace")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise complain(f"output {out}", f"no folder {parent}", "a place in an existing folder")
    if not os.access(parent, os.W_OK):
        raise complain(f"output {out}", f"a folder {parent} without write permission", "a place that can be written")


def _checkpoint(adapter: ModelAdapter, checkpoint: str | Path | None) -> tuple[Path, str]:
    """The checkpoint's folder, and how the manifest names it."""
    if checkpoint is not None:
        return Path(checkpoint), str(Path(checkpoint).absolute())
    packaged = adapter.packaged_checkpoint()
    if packaged is None:
        raise complain("checkpoint", "none", f"a folder with {adapter.name} weights", "give --checkpoint")
    return packaged, PACKAGED


def check_plan(adapter: ModelAdapter, checkpoint: Path, plan: Plan) -> None:
    """Raise SvditError where the plan is not for this model and checkpoint."""
    if plan.model != adapter.name:
        raise complain("plan model", repr(plan.model), repr(adapter.name), "give the --model that the plan names")
    adapter.check_geometry(checkpoint, plan.geometry)


def check_size(
    adapter: ModelAdapter, checkpoint: Path, plan: Plan, size: tuple[int | None, int | None, int | None]
) -> None:
    """Raise SvditError unless the plan's grid is that of a video of `size`: frames, height, width, or None for any."""
    if size == (None, None, None):
        return
    coder = adapter.coder(checkpoint)
    planned = coder.video(plan.geometry.grid)
    wanted = VideoSize(*(own if given is None else given for given, own in zip(size, planned, strict=True)))
    grid = coder.grid(wanted)
    if grid != plan.geometry.grid:
        where = f" --checkpoint {checkpoint}" if checkpoint != adapter.packaged_checkpoint() else ""
        sizes = f"--frames {wanted.frames} --height {wanted.height} --width {wanted.width}"
        raise complain(
            "plan geometry.grid",
            f"{list(plan.geometry.grid)}, {planned}",
            f"{list(grid)} for {wanted}",
            f"make a plan for that size: svdit-plan template --model {adapter.name}{where} {sizes} -o P.plan.json",
        )


def trace_denoiser(
    adapter: ModelAdapter,
    checkpoint: Path,
    plan: Plan,
    precision: str,
    batch: Batch,
    report: Callable[[str], None] = lambda step: None,
) -> Traced:
    """One graph for every variant: the denoiser with a SparseAttention node a layer, its values bound."""
    from svdit.exporter import graph
    from svdit.exporter.attention import SymbolicAttention

    check_plan(adapter, checkpoint, plan)
    tables = tables_of(plan)
    attention = SymbolicAttention(tables)
    denoiser = adapter.traced_denoiser(checkpoint, plan.tiling(), attention, dtype=COMPUTE_TYPES[precision])
    inputs = adapter.inputs(checkpoint, plan.geometry, batch.dim)
    model = graph.trace(denoiser.module, inputs, OUTPUT)
    report("tidy")
    graph.name_nodes(graph.simplify(model))
    values = {f"attention.{name}": value for name, value in attention.unique.values.items()}
    graph.bind_constants(model, {**denoiser.buffers, **values})
    graph.bind_weights(model, denoiser.parameters)
    shape = (batch.dim, *(int(n) for n in model.graph.outputs[0].shape[1:]))
    return Traced(model, denoiser.parameters, tables, inputs, (TensorSpec(OUTPUT, "float32", shape),), batch)


def rewrite(traced: Traced, plan: Plan, variant: str) -> dict[str, tuple[ir.Model, tuple[int, ...]]]:
    """Graphs of a variant by file name, each with the stages that it serves."""
    from svdit.exporter import graph, portable

    every = tuple(range(len(plan.stages)))
    if variant == "plugin":
        return {"dit.onnx": (graph.fill_by_arithmetic(traced.model.clone()), every)}
    most = traced.batch.most
    if variant == "dense":
        model = portable.expand_dense(traced.model.clone(), traced.tables, most)
        return {"dit.onnx": (graph.fill_by_arithmetic(graph.drop_unused(model)), every)}
    graphs = {}
    for stage in every:
        model = portable.expand_sparse(traced.model.clone(), traced.tables, stage, most)
        graphs[f"dit.stage{stage}.onnx"] = (graph.fill_by_arithmetic(graph.drop_unused(model)), (stage,))
    return graphs


def check(model: ir.Model) -> None:
    """Run onnx.checker with the operator's schema; weights outside the file stand in as inputs."""
    import onnx
    import onnx_ir as ir

    from svdit.exporter.op_schema import register_schema

    register_schema()
    proto = ir.to_proto(model)
    outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inside)
    for tensor in outside:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(proto)


def _save(
    out: Path,
    adapter: ModelAdapter,
    checkpoint: Path,
    source: str,
    plan: Plan,
    traced: Traced,
    graphs: dict[str, tuple[ir.Model, tuple[int, ...]]],
    variant: str,
    precision: str,
    batch: Batch,
    copy_weights: bool,
    note: Callable[[str], None],
) -> Bundle:
    """Write everything beside `out`, read it back, then put it in place."""
    import onnx_ir as ir

    from svdit.exporter.graph import weight_files

    out = out.absolute()
    work = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        work.mkdir()
        files = place_weights(weight_files(traced.parameters), work, copy_weights, note)
        for name, (model, _) in graphs.items():
            (work / name).write_bytes(ir.to_proto(model).SerializeToString())
        text = dumps(plan)
        (work / PLAN_FILE).write_text(text, encoding="utf-8", newline="\n")
        read = {value.name for model, _ in graphs.values() for value in model.graph.inputs}
        manifest = Manifest(
            model=adapter.name,
            variant=variant,
            precision=precision,
            geometry=plan.geometry,
            batch=batch,
            latent_shape=adapter.latent_shape(plan.geometry, checkpoint),
            plan_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
            graphs=tuple(graph_file(work, name, stages) for name, (_, stages) in graphs.items()),
            weights=tuple(weight_file(work, name) for name in files),
            inputs=tuple(spec for spec in traced.inputs if spec.name in read),
            outputs=traced.outputs,
            checkpoint=source,
            versions={name: version(name) for name in LIBRARIES},
        )
        write_manifest(work, manifest)
        read_bundle(work)
        _replace(work, out)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise unusable(out, error, "a place for the bundle") from None
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return read_bundle(out)


def _replace(work: Path, out: Path) -> None:
    """Rename `work` to `out`; what was at `out` is gone only after that has succeeded."""
    old = None
    if out.exists():
        old = work.with_suffix(".old")
        os.replace(out, old)
    try:
        os.replace(work, out)
    except BaseException:
        if old is not None:
            os.replace(old, out)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
