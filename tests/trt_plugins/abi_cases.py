"""Write golden cases to files, for the C++ program `abi_host` that knows no Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.cases import Case, op_attributes, op_inputs

NAMES = {"q": "Q", "k": "K", "v": "V"}


def bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` represents exactly, as its 16-bit patterns."""
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def values(content: bytes, dtype: str) -> np.ndarray:
    """The other way round, as float32."""
    if dtype == "float16":
        return np.frombuffer(content, np.float16).astype(np.float32)
    return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)


def write_case(case: Case, dtype: str, folder: Path) -> None:
    """`case.txt` with types, attributes and shapes, and one file a tensor."""
    folder.mkdir(parents=True)
    attributes = op_attributes(case)
    lines = [
        f"name {case.name}-{dtype}",
        f"dtype {dtype}",
        f"scale {attributes['scale']:.9g}",
        f"text_tokens {attributes['text_tokens']}",
        f"text_first {int(attributes['text_first'])}",
        *(" ".join([key, *map(str, attributes[key])]) for key in ("patterns", "grid", "tile")),
    ]
    for key, array in op_inputs(case, dtype).items():
        name = NAMES.get(key, key)
        content = bits(array, dtype) if key in NAMES else np.ascontiguousarray(array, dtype=np.int32)
        (folder / f"{name}.bin").write_bytes(content.tobytes())
        lines.append(" ".join(["tensor", name, *map(str, array.shape)]))
    (folder / "case.txt").write_text("\n".join(lines) + "\n")
