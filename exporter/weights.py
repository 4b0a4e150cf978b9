"""Checkpoints in diffusers' folder format: which tensors lie where, and that every one is accounted for.

Nothing here reads a weight before `load` is called: a safetensors header says all that an export needs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter.models.base import StoredTensor
from svdit.plans.errors import complain
from svdit.plans.fields import shown
from svdit.plans.files import parse_json, read_json, unusable

if TYPE_CHECKING:
    import torch

STEM = "diffusion_pytorch_model"
ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}
"""Stored types that a weight may have, and their bytes."""
MAX_HEADER = 100_000_000
"""The safetensors format's own limit."""


def component_folder(checkpoint: Path, component: str) -> Path:
    """The folder of one component: `checkpoint` is a pipeline folder or that component's own folder."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        got = "a file" if checkpoint.exists() else "no such folder"
        raise complain(f"checkpoint {checkpoint}", got, "a folder in diffusers' format")
    for folder in (checkpoint / component, checkpoint):
        if (folder / "config.json").is_file():
            return folder
    raise complain(
        f"checkpoint {checkpoint}",
        f"neither {component}/config.json nor config.json",
        f"a pipeline folder, or its {component} folder",
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a component folder, sharded or not, by key. Raises SvditError for a damaged file."""
    index = folder / f"{STEM}.safetensors.index.json"
    if index.is_file():
        return _sharded(index)
    files = [folder / f"{STEM}.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise complain(
            f"weights in {folder}",
            "none" if not files else ", ".join(f.name for f in files),
            f"{STEM}.safetensors, or shards with {index.name}",
        )
    return read_header(files[0])


def _sharded(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index, "the index of the shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise complain(f"{index}: $.weight_map", shown(weight_map), "an object of tensor keys and shard files")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise complain(f"{index}: $.weight_map.{key}", shown(name), "the name of a file in this folder")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        for key, tensor in read_header(index.with_name(name)).items():
            if weight_map.get(key) != name:
                raise complain(
                    f"{index}: $.weight_map.{key}", shown(weight_map.get(key)), shown(name), f"{name} holds that key"
                )
            found[key] = tensor
    for key, name in weight_map.items():
        if key not in found:
            raise complain(f"{index.with_name(name)}", f"no tensor {key}", "the tensor, as the index says")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises SvditError unless the header and the file's size agree."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise complain(str(path), f"a header of {length} bytes in {size}", "a safetensors file")
            text = file.read(length).decode("utf-8")
    except UnicodeDecodeError:
        raise complain(str(path), "a header that is not UTF-8", "a safetensors file") from None
    except OSError as error:
        raise unusable(path, error, "a safetensors file") from None
    header = parse_json(text, f"{path}: header")
    if not isinstance(header, dict):
        raise complain(f"{path}: header", shown(header), "a JSON object")
    start = 8 + length
    tensors = {key: _entry(path, key, value, start) for key, value in header.items() if key != "__metadata__"}
    end = max((t.offset + t.length for t in tensors.values()), default=start)
    if end != size:
        raise complain(f"{path}: size", f"{size} bytes", f"{end}, as its header says", "download it again")
    return tensors


def _entry(path: Path, key: str, value: object, start: int) -> StoredTensor:
    where = f"{path}: {key}"
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers_fine = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        numbers_fine = False
    if not numbers_fine:
        raise complain(where, shown(value), "dtype, shape and data_offsets")
    if dtype not in ITEM_SIZE:
        expected = "one of " + ", ".join(ITEM_SIZE)
        raise complain(f"{where}: dtype", shown(dtype), expected, "quantised files are not read")
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        raise complain(f"{where}: bytes", end - begin, f"{expected} for {dtype} {list(shape)}")
    return StoredTensor(key, path, dtype, shape, start + begin, end - begin)


def match(
    expected: Mapping[str, tuple[str, tuple[int, ...]]], stored: Mapping[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """Pair parameters with tensors: `expected` is parameter -> (key, stored shape).

    Raises SvditError for a missing key, a key that nobody asked for, or another shape.
    """
    wanted = {key for key, _ in expected.values()}
    missing = sorted(wanted - stored.keys())
    leftover = sorted(stored.keys() - wanted)
    if missing or leftover:
        counts = f"{len(missing)} missing" if missing else ""
        counts += (" and " if missing and leftover else "") + (f"{len(leftover)} unknown" if leftover else "")
        names = [f"-{k}" for k in missing[:3]] + [f"+{k}" for k in leftover[:3]]
        more = " ..." if len(missing) > 3 or len(leftover) > 3 else ""
        raise complain(
            f"weights in {folder}",
            f"{counts} key(s): {', '.join(names)}{more}",
            f"exactly the {len(wanted)} keys that its config.json implies",
        )
    for key, shape in expected.values():
        if stored[key].shape != shape:
            raise complain(
                f"weights in {folder}: {key}", list(stored[key].shape), f"shape {list(shape)}", "see its config.json"
            )
    return {name: stored[key] for name, (key, _) in expected.items()}


def find(
    module: torch.nn.Module, stored_shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, StoredTensor]:
    """Where each parameter of a module lies: under its own name, in its own shape or the one in `stored_shapes`.

    Raises SvditError unless the files of `folder` hold exactly these.
    """
    expected = {name: (name, stored_shapes.get(name, tuple(p.shape))) for name, p in module.named_parameters()}
    return match(expected, stored_tensors(folder), folder)


def load(module: torch.nn.Module, where: Mapping[str, StoredTensor], device: str) -> None:
    """Read every parameter of a meta-device module into its own dtype and shape, on `device`."""
    import torch
    from safetensors import safe_open

    files: dict[Path, list[str]] = {}
    for name, tensor in where.items():
        files.setdefault(tensor.file, []).append(name)
    state = {}
    parameters = dict(module.named_parameters())
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                target = parameters[name]
                value = file.get_tensor(where[name].key).reshape(target.shape)
                state[name] = value.to(device=device, dtype=target.dtype, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if any(p.device == torch.device("meta") for p in module.parameters()):
        raise AssertionError("a parameter was not loaded")
