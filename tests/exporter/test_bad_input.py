"""Mistakes of the user: each gives exit code 2, says what, got and expected, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from svdit.exporter.cli import main
from svdit.plans.schema import dumps, template, write_plan
from tests.exporter.checkpoints import save_tiny

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
CONFIG = "transformer/config.json"


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def shard(checkpoint: Path, number: int = 0) -> Path:
    return sorted((checkpoint / "transformer").glob("*.safetensors"))[number]


def rewrite(path: Path, change) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def header(path: Path, change) -> None:
    """Change the header of a safetensors file and leave its data alone."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    parsed = json.loads(data[8 : 8 + length])
    change(parsed)
    text = json.dumps(parsed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_key(path: Path) -> str:
    return sorted(load_file(path))[0]


def drop_key(checkpoint):
    rewrite(shard(checkpoint), lambda t: t.pop(sorted(t)[0]))


def drop_key_and_index_entry(checkpoint):
    key = first_key(shard(checkpoint))
    drop_key(checkpoint)
    index = json.loads((checkpoint / INDEX).read_text())
    del index["weight_map"][key]
    (checkpoint / INDEX).write_text(json.dumps(index))


def add_key(checkpoint):
    path = shard(checkpoint)
    rewrite(path, lambda t: t.update({"blocks.9.extra": next(iter(t.values())).clone()}))
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["blocks.9.extra"] = path.name
    (checkpoint / INDEX).write_text(json.dumps(index))


def transpose(checkpoint):
    def change(tensors):
        for key, value in tensors.items():
            if value.ndim == 2 and value.shape[0] != value.shape[1]:
                tensors[key] = value.T.contiguous()

    for number in range(3):
        rewrite(shard(checkpoint, number), change)


def first_entry(**changes):
    def change(parsed):
        key = next(k for k in parsed if k != "__metadata__")
        parsed[key].update(changes)

    return lambda checkpoint: header(shard(checkpoint), change)


def no_captions(checkpoint):
    (checkpoint / "captions/config.json").unlink()


BAD_CHECKPOINTS = {
    "no folder": (lambda c: os.rename(c, f"{c}-gone"), "no such folder; expected a folder in diffusers' format"),
    "no config": (lambda c: (c / CONFIG).unlink(), "neither transformer/config.json nor config.json"),
    "config not json": (
        lambda c: (c / CONFIG).write_text("{"),
        r"config.json: got .*line 1 column 2.*; expected one JSON object",
    ),
    "config is a list": (lambda c: (c / CONFIG).write_text("[]"), r"got \[\]; expected a transformer's config"),
    "other class": (
        lambda c: edit(c / CONFIG, _class_name="FluxTransformer2DModel"),
        r'_class_name: got "FluxTransformer2DModel"; expected "WanTransformer3DModel"',
    ),
    "unknown config key": (lambda c: edit(c / CONFIG, flavour=3), r"\$.flavour: got an unknown key; expected one of"),
    "image without projections": (
        lambda c: edit(c / CONFIG, image_dim=1280),
        r"added_kv_proj_dim: got null; expected 128; null for text-to-video",
    ),
    "first and last frame": (
        lambda c: edit(c / CONFIG, pos_embed_seq_len=514),
        r"pos_embed_seq_len: got 514; expected null; models of a first and a last frame",
    ),
    "other qk norm": (lambda c: edit(c / CONFIG, qk_norm="layer_norm"), r'qk_norm: got "layer_norm"; expected'),
    "patch not a triple": (lambda c: edit(c / CONFIG, patch_size=[4, 4]), r"patch_size: got 2 entries"),
    "no heads": (lambda c: edit(c / CONFIG, num_attention_heads=0), r"num_attention_heads: got 0; expected an integer"),
    "odd head": (lambda c: edit(c / CONFIG, attention_head_dim=63), r"attention_head_dim: got 63; expected an even"),
    "eps": (lambda c: edit(c / CONFIG, eps=-1.0), r"eps: got -1.0; expected a positive"),
    "more layers than weights": (lambda c: edit(c / CONFIG, num_layers=3), r"layers: got 2; expected 3"),
    "wider than weights": (lambda c: edit(c / CONFIG, ffn_dim=128), r"got \[96(, 128)?\]; expected shape \[128"),
    "no weights": (
        lambda c: [p.unlink() for p in (c / "transformer").glob("*.safetensors*")],
        r"weights in .*: got none; expected diffusion_pytorch_model.safetensors",
    ),
    "shards without index": (lambda c: (c / INDEX).unlink(), r"got diffusion_pytorch_model-00001.*; expected"),
    "empty index": (lambda c: edit(c / INDEX, weight_map={}), r"weight_map: got \{\}; expected an object"),
    "index leaves the folder": (
        lambda c: edit(c / INDEX, weight_map={"a": "../a.safetensors"}),
        r"weight_map.a: got \"../a.safetensors\"; expected the name of a file",
    ),
    "missing shard": (lambda c: shard(c).unlink(), r"00001-of-.*: got no such file"),
    "cut shard": (lambda c: os.truncate(shard(c), shard(c).stat().st_size - 2), r"size: got \d+ bytes; expected \d+"),
    "empty shard": (lambda c: shard(c).write_bytes(b""), r"got a header of 0 bytes in 0; expected a safetensors file"),
    "text for a shard": (lambda c: shard(c).write_text("not weights" * 99), r"expected a safetensors file"),
    "key missing, index says it is there": (drop_key, r"got no tensor .*; expected the tensor, as the index says"),
    "key missing": (drop_key_and_index_entry, r"got 1 missing key\(s\): -.*; expected exactly the \d+ keys"),
    "key too many": (add_key, r"got 1 unknown key\(s\): \+blocks.9.extra"),
    "transposed": (transpose, r"got \[\d+, \d+\]; expected shape \[\d+, \d+\]"),
    "stored as bytes": (first_entry(dtype="F8_E4M3"), r'dtype: got "F8_E4M3"; expected one of F32, F16, BF16'),
    "negative shape": (first_entry(shape=[-1]), r"expected dtype, shape and data_offsets"),
    "shape against bytes": (first_entry(shape=[1]), r"bytes: got \d+; expected 2 for F16"),
    "no captions": (no_captions, r"no captions/config.json; expected a tiny checkpoint folder"),
    "vocabulary misses a kind": (
        lambda c: edit(c / "captions/config.json", vocabulary={"colour": ["red"]}),
        r"vocabulary.shape: got nothing; expected a value",
    ),
    "caption width": (lambda c: edit(c / "captions/config.json", width=64), r"width: got 64; expected 32"),
}

BAD_ARGUMENTS = {
    "unknown model": (["--model", "sora"], r"model: got 'sora'; expected one of cogvideox1\.5, .*tiny, wan2\.1"),
    "plan of another model": (["--model", "wan2.1"], r"plan model: got 'tiny'; expected 'wan2.1'"),
    "unknown variant": (["--variant", "magic"], r"'magic' is not one of 'plugin', 'portable', 'dense'"),
    "unknown precision": (["--precision", "int8"], r"'int8' is not one of 'fp32', 'fp16', 'bf16'"),
    "half precision portable": (
        ["--variant", "portable", "--precision", "fp16"],
        r"precision: got fp16; expected fp32 for the portable variant",
    ),
    "batch": (["--batch", "0"], r"batch: got 0; expected an integer of at least 1"),
    "batches": (["--batch", "2-1"], r"batch: got 2-1; expected a range from the smaller to the larger number"),
    "no such plan": (["--plan", "nowhere.plan.json"], r"nowhere.plan.json: got no such file"),
    "output is a file": (["-o", "file"], r"output file: got a file or a link; expected a new folder"),
    "output has other things": (["-o", "full"], r"output full: got a folder with other things in it"),
    "output in no folder": (["-o", "no/where"], r"output no/where: got no folder .*; expected a place"),
    "checkpoint is a file": (["--checkpoint", "file"], r"checkpoint file: got a file; expected a folder"),
}


def snapshot(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture
def workplace(own_tiny, tiny_plan, tmp_path, monkeypatch) -> Path:
    write_plan(tmp_path / "p.plan.json", tiny_plan)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(folder: Path, arguments: list[str], message: str) -> None:
    """Run the command; expect code 2, the message, no trace, and the folder as before."""
    before = snapshot(folder)
    result = CliRunner().invoke(main, arguments)
    text = result.output + result.stderr
    assert result.exit_code == 2, text
    assert "Traceback" not in text and re.search(message, text), text
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint(workplace, name):
    damage, message = BAD_CHECKPOINTS[name]
    damage(workplace / "checkpoint")
    arguments = ["--model", "tiny", "--plan", "p.plan.json", "--checkpoint", "checkpoint", "-o", "out"]
    refused(workplace, arguments, message)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(workplace, name):
    changes, message = BAD_ARGUMENTS[name]
    options = {"--model": "tiny", "--plan": "p.plan.json", "--checkpoint": "checkpoint", "-o": "out"}
    options.update(zip(changes[::2], changes[1::2], strict=True))
    refused(workplace, [word for pair in options.items() for word in pair], message)


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("heads", 4, r"geometry.heads: got 4; expected 2, as the tiny checkpoint"),
        ("head_dim", 128, r"geometry.head_dim: got 128; expected 64"),
        ("layers", 5, r"geometry.layers: got 5; expected 2"),
        ("text_tokens", 3, r"geometry.text_tokens: got 3; expected 0"),
        ("grid", (99, 6, 6), r"geometry.grid\[0\]: got 99; expected at most rope_max_seq_len, 64"),
    ],
)
def test_plan_that_contradicts_the_checkpoint(workplace, tiny_plan, field, value, message):
    import dataclasses

    changes = {field: value, **({"text_position": "after"} if field == "text_tokens" else {})}
    plan = template("tiny", dataclasses.replace(tiny_plan.geometry, **changes), (1, 4, 4))
    (workplace / "p.plan.json").write_text(dumps(plan))
    arguments = ["--model", "tiny", "--plan", "p.plan.json", "--checkpoint", "checkpoint", "-o", "out"]
    refused(workplace, arguments, message)


def test_a_model_without_shipped_weights_needs_a_checkpoint(workplace, tiny_plan):
    plan = template("wan2.1", tiny_plan.geometry, (1, 4, 4))
    (workplace / "p.plan.json").write_text(dumps(plan))
    arguments = ["--model", "wan2.1", "--plan", "p.plan.json", "-o", "out"]
    refused(workplace, arguments, r"checkpoint: got none; expected a folder with wan2.1 weights; give --checkpoint")


def test_two_files_of_one_name_cannot_be_linked(tmp_path):
    from svdit.exporter.link import place_weights
    from svdit.plans.errors import SvditError

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(b"")
    (tmp_path / "out").mkdir()
    files = [tmp_path / name / "w.safetensors" for name in ("a", "b")]
    with pytest.raises(SvditError, match="two files of one name"):
        place_weights(files, tmp_path / "out", False, print)


def test_command_writes_a_bundle_and_figures(workplace):
    arguments = ["--model", "tiny", "--plan", "p.plan.json", "--checkpoint", "checkpoint", "-o", "out"]
    result = CliRunner().invoke(main, [*arguments, "--variant", "portable", "--json", "figures.json"])
    assert result.exit_code == 0, result.output
    figures = json.loads((workplace / "figures.json").read_text())
    assert figures["stages"] == 2 and figures["variant"] == "portable" and figures["seconds"] > 0
    assert (workplace / "out" / "dit.stage1.onnx").is_file()


def test_single_files_are_read_too(tmp_path, tiny_plan):
    """Sharded or not, under diffusers' name or as the only file there is."""
    from svdit.exporter.models.registry import adapter
    from svdit.exporter.weights import stored_tensors

    checkpoint = save_tiny(tmp_path / "c")
    folder = checkpoint / "transformer"
    first = stored_tensors(folder)
    os.rename(folder / "diffusion_pytorch_model.safetensors", folder / "model.safetensors")
    assert stored_tensors(folder).keys() == first.keys()
    traced = adapter("tiny").traced_denoiser(checkpoint, tiny_plan.tiling(), None, dtype="float32")
    assert {t.key for t in traced.parameters.values()} == first.keys()
