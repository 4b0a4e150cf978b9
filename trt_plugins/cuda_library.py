"""The compiled kernel library (`libsvdit_kernels.so`) seen from Python: found, opened, called through its C interface.

The structures mirror `include/svdit/problem.h` and `launch.h`. No torch at import time: addresses are integers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from svdit.plans.errors import SvditError, complain
from svdit.trt_plugins import built_library

FILE_NAME = "libsvdit_kernels.so"
VARIABLE = "SVDIT_KERNELS"
"""Environment variable with the path of the library; it wins over the places where builds put it."""
ABI_VERSION = 1
DTYPES = {"float16": 1, "bfloat16": 2}
_MESSAGE_SIZE = 512


class Problem(ctypes.Structure):
    """`svdit_problem`: shapes and attributes of one call."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("text_tokens", ctypes.c_int32),
        ("text_first", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("num_tiles", ctypes.c_int32),
        ("num_patterns", ctypes.c_int32),
        ("num_stages", ctypes.c_int32),
        ("num_items", ctypes.c_int32),
        ("num_entries", ctypes.c_int32),
    )


class Tensors(ctypes.Structure):
    """`svdit_tensors`: device addresses."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("q", "k", "v", "o"))


class TableAddresses(ctypes.Structure):
    """`svdit_tables`: addresses, of the device for a launch and of the host for a check."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "stage",
            "text_len",
            "head_pattern",
            "tile_offsets",
            "row_offsets",
            "tile_index",
            "work_order",
        )
    )


@dataclass(frozen=True)
class Attributes:
    """What a call knows beside its tensors: type name, [B, N, H, D], scale, text."""

    dtype: str
    shape: tuple[int, int, int, int]
    scale: float
    text_tokens: int
    text_first: bool


def problem_of(attributes: Attributes, table_shapes: dict[str, tuple[int, ...]]) -> Problem:
    """Fill the structure; `table_shapes` holds the shapes of the five constant tables by name."""
    if attributes.dtype not in DTYPES:
        raise complain("Q", attributes.dtype, "float16 or bfloat16", "the CUDA kernel has no other types")
    batch, tokens, heads, head_dim = attributes.shape
    return Problem(
        dtype=DTYPES[attributes.dtype],
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        text_tokens=attributes.text_tokens,
        text_first=int(attributes.text_first),
        scale=attributes.scale,
        num_tiles=table_shapes["tile_offsets"][0] - 1,
        num_patterns=table_shapes["row_offsets"][0],
        num_stages=table_shapes["head_pattern"][0],
        num_items=table_shapes["work_order"][1],
        num_entries=table_shapes["tile_index"][0],
    )


class KernelLibrary:
    """One opened library. Every failure is raised as SvditError with the library's own message."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            found = int(self._library.svdit_abi_version())
        except (OSError, AttributeError) as error:
            raise complain(str(path), str(error), f"a built {FILE_NAME}", "rebuild it with CMake") from None
        if found != ABI_VERSION:
            raise complain(str(path), f"interface version {found}", str(ABI_VERSION), "rebuild it with CMake")
        self._library.svdit_status_text.restype = ctypes.c_char_p
        self._library.svdit_workspace_size.restype = ctypes.c_size_t

    def check_problem(self, problem: Problem) -> None:
        """Raise SvditError for shapes or attributes that no kernel accepts."""
        self._call("svdit_check_problem", ctypes.byref(problem))

    def check_tables(self, problem: Problem, tables: dict[str, np.ndarray]) -> None:
        """Raise SvditError for table contents that contradict the problem; int32 arrays on the host."""
        addresses = _host_addresses(tables)
        self._call("svdit_check_tables", ctypes.byref(problem), ctypes.byref(addresses))

    def item_blocks(
        self, problem: Problem, tables: dict[str, np.ndarray], stage: int, text_len: int, item: int
    ) -> np.ndarray:
        """int32 [blocks, 2]: first row and rows of the key blocks that the kernel visits for a work item."""
        capacity = problem.tokens + 1
        starts, lengths = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32)
        addresses = _host_addresses(tables)
        count = self._library.svdit_item_blocks(
            ctypes.byref(problem),
            ctypes.byref(addresses),
            ctypes.c_int32(stage),
            ctypes.c_int32(text_len),
            ctypes.c_int32(item),
            ctypes.c_int32(capacity),
            starts.ctypes.data_as(ctypes.c_void_p),
            lengths.ctypes.data_as(ctypes.c_void_p),
        )
        if count < 0:
            raise complain("stage, item", f"{stage}, {item}", "numbers within work_order")
        return np.stack([starts[:count], lengths[:count]], axis=1)

    def workspace_size(self, problem: Problem) -> int:
        """Bytes of device memory that a launch needs."""
        return int(self._library.svdit_workspace_size(ctypes.byref(problem)))

    def launch(
        self,
        problem: Problem,
        tensors: Tensors,
        tables: TableAddresses,
        workspace: tuple[int, int],
        stream: int,
    ) -> None:
        """Enqueue on a CUDA stream; `workspace` is (address, bytes). Waits for nothing."""
        self._call(
            "svdit_launch",
            ctypes.byref(problem),
            ctypes.byref(tensors),
            ctypes.byref(tables),
            ctypes.c_void_p(workspace[0]),
            ctypes.c_size_t(workspace[1]),
            ctypes.c_void_p(stream),
        )

    def _call(self, name: str, *arguments: object) -> None:
        message = ctypes.create_string_buffer(_MESSAGE_SIZE)
        status = getattr(self._library, name)(*arguments, message, ctypes.c_size_t(_MESSAGE_SIZE))
        if status != 0:
            text = message.value.decode() or self._library.svdit_status_text(status).decode()
            raise SvditError(text)


def find() -> Path | None:
    """The library named by SVDIT_KERNELS, or where CMake installs or builds it; None when there is none."""
    return built_library.find(FILE_NAME, VARIABLE)


@lru_cache(maxsize=8)
def open_library(path: Path) -> KernelLibrary:
    """Open once per path. Raises SvditError for a file that is not this version of the library."""
    return KernelLibrary(path)


def _host_addresses(tables: dict[str, np.ndarray]) -> TableAddresses:
    for name, table in tables.items():
        if table.dtype != np.int32 or not table.flags.c_contiguous:
            raise complain(name, f"{table.dtype}, strides {table.strides}", "a contiguous int32 array")
    return TableAddresses(**{name: table.ctypes.data for name, table in tables.items()})
