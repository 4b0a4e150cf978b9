"""`svdit::sparse_attention` on CUDA tensors: the compiled kernel behind the operator's schema."""

from __future__ import annotations

import torch
from torch import Tensor

from svdit.plans.errors import complain
from svdit.trt_plugins import cuda_library, reference

TABLES = ("stage", "text_len", "head_pattern", "tile_offsets", "row_offsets", "tile_index", "work_order")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Tensor,
    text_len: Tensor,
    head_pattern: Tensor,
    tile_offsets: Tensor,
    row_offsets: Tensor,
    tile_index: Tensor,
    work_order: Tensor,
    scale: float,
    text_tokens: int,
    text_first: bool,
) -> Tensor:
    """O [B, N, H, D] on the current stream. Shapes as in `reference.sparse_attention`; all tensors on one GPU.

    May be captured in a CUDA graph: `stage`, `text_len` and the tables are read when the kernel runs.
    Raises SvditError for types, shapes or devices that the kernel does not take.
    """
    tables = (stage, text_len, head_pattern, tile_offsets, row_offsets, tile_index, work_order)
    reference.check_tensors(q, k, v, *tables)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(q.contiguous(), k.contiguous(), v.contiguous(), out, dict(zip(TABLES, tables, strict=True)),
           scale, text_tokens, text_first)
    return out


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    tables: dict[str, Tensor],
    scale: float,
    text_tokens: int,
    text_first: bool,
    library: cuda_library.KernelLibrary | None = None,
) -> None:
    """Write into `out`; q, k, v, out [B, N, H, D] contiguous. `library` defaults to the one that `find` finds."""
    for name, x in {"K": k, "V": v, "O": out, **tables}.items():
        if x.device != q.device:
            raise complain(name, x.device, f"{q.device} like Q", "move the tables once, when the model is loaded")
        if not x.is_contiguous():
            raise complain(name, f"strides {x.stride()}", "a contiguous tensor")
    if library is None:
        path = cuda_library.find()
        if path is None:
            raise complain("kernel library", "none", cuda_library.FILE_NAME, "build it with CMake (docs/kernels.md)")
        library = cuda_library.open_library(path)
    attributes = cuda_library.Attributes(
        str(q.dtype).removeprefix("torch."), tuple(q.shape), scale, text_tokens, text_first
    )
    problem = cuda_library.problem_of(attributes, {name: tuple(x.shape) for name, x in tables.items()})
    with torch.cuda.device(q.device):
        size = library.workspace_size(problem)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
        library.launch(
            problem,
            cuda_library.Tensors(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()),
            cuda_library.TableAddresses(**{name: tables[name].data_ptr() for name in TABLES}),
            (workspace.data_ptr(), size),
            torch.cuda.current_stream().cuda_stream,
        )
