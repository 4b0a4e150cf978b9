"""Sizes of videos in pixels, latents and tokens, and the options that name them."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from svdit.exporter.cli import main as export_command
from svdit.exporter.models.registry import adapter
from svdit.exporter.models.video import VideoCoder, VideoSize
from svdit.plans.cli import main as plan_command
from svdit.plans.errors import SvditError
from svdit.plans.schema import read_plan

PUBLISHED = [
    ("wan2.1", (81, 720, 1280), (21, 45, 80)),
    ("wan2.1", (81, 480, 832), (21, 30, 52)),
    ("hunyuan", (129, 720, 1280), (33, 45, 80)),
    ("hunyuan", (117, 768, 1280), (30, 48, 80)),
    ("cogvideox1.5", (81, 768, 1360), (11, 48, 85)),
    ("cogvideox1.5", (161, 768, 1360), (21, 48, 85)),
]


@pytest.mark.parametrize(("name", "video", "grid"), PUBLISHED)
def test_published_sizes(name, video, grid):
    coder = adapter(name).coder()
    assert coder.grid(VideoSize(*video)) == grid
    assert coder.video(grid) == VideoSize(*video)


@pytest.mark.parametrize("frames", range(1, 60))
def test_padded_frames_are_counted_as_diffusers_does(frames):
    """CogVideoXPipeline fills latent frames up to a multiple of patch_size_t."""
    coder = adapter("cogvideox1.5").coder()
    if (frames - 1) % 4:
        with pytest.raises(SvditError, match=rf"video frames: got {frames}; expected a multiple of 4, and 1; the near"):
            coder.grid(VideoSize(frames, 16, 16))
    else:
        assert coder.grid(VideoSize(frames, 16, 16))[0] == math.ceil(((frames - 1) // 4 + 1) / 2)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ((81, 700, 1280), "video height: got 700; expected a multiple of 16; the nearest is 704"),
        ((81, 720, 1275), "video width: got 1275; expected a multiple of 16; the nearest is 1280"),
        ((80, 720, 1280), "video frames: got 80; expected a multiple of 4, and 1; the nearest is 81"),
        ((81, 3, 1280), "video height: got 3; expected a multiple of 16; the nearest is 16"),
        ((0, 720, 1280), "frames: got 0; expected an integer of at least 1"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest(video, message):
    with pytest.raises(SvditError, match=message):
        adapter("wan2.1").coder().grid(VideoSize(*video))


def test_the_nearest_size_is_a_size():
    coder = VideoCoder((4, 8, 8), (1, 2, 3))
    for axis in range(3):
        for size in range(1, 100):
            video = [1, 16, 24]
            video[axis] = size
            try:
                coder.grid(VideoSize(*video))
            except SvditError as error:
                nearest = int(str(error).rpartition(" ")[2])
                step = (4, 16, 24)[axis]
                assert abs(nearest - size) <= step / 2 or nearest == (1, 16, 24)[axis]
                video[axis] = nearest
                coder.grid(VideoSize(*video))


@pytest.mark.parametrize(
    ("name", "config", "factors"),
    [
        ("wan2.1", {"scale_factor_temporal": 2, "scale_factor_spatial": 16}, (2, 16, 16)),
        ("hunyuan", {"temporal_compression_ratio": 8, "spatial_compression_ratio": 4}, (8, 4, 4)),
        ("cogvideox1.5", {"temporal_compression_ratio": 4, "block_out_channels": [1, 2, 3]}, (4, 4, 4)),
        ("wan2.1", {}, (4, 8, 8)),
    ],
)
def test_factors_come_from_the_vae_of_the_checkpoint(name, config, factors, tmp_path):
    model = adapter(name)
    assert model.vae_factors(config) == factors
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    classes = {"wan2.1": "Wan", "hunyuan": "HunyuanVideo", "cogvideox1.5": "CogVideoX"}
    own = {"_class_name": f"{classes[name]}Transformer3DModel"}
    if name == "cogvideox1.5":
        own |= {"patch_size_t": 2, "use_rotary_positional_embeddings": True}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(own))
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert model.coder(tmp_path).factors == factors


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_a_template_of_any_size_goes_into_an_export_of_that_size(tiny_checkpoint, tmp_path):
    plan, size = tmp_path / "p.plan.json", ("--frames", 5, "--height", 32, "--width", 40)
    done = invoke(
        plan_command, "template", "--model", "tiny", "--checkpoint", tiny_checkpoint, *size, "--tile", 1, 4, 4,
        "--pattern", '{"kind": "multi_diagonal", "rows": 0}', "-o", plan,
    )
    assert done.exit_code == 0, done.output
    made = read_plan(plan)
    assert made.geometry.grid == (5, 8, 10) and [stage.until for stage in made.stages] == [0.2, 1.0]
    command = ("--model", "tiny", "--checkpoint", tiny_checkpoint, "--plan", plan, "-o", tmp_path / "b")
    done = invoke(export_command, *command, *size)
    assert done.exit_code == 0, done.output
    inputs = json.loads((tmp_path / "b" / "manifest.json").read_text())["inputs"]
    assert inputs[0]["shape"] == [2, 3, 5, 32, 40]
    done = invoke(export_command, *command, "--height", 48)
    assert done.exit_code == 2
    assert "plan geometry.grid: got [5, 8, 10], 5 frames of 32 x 40; expected [5, 12, 10] for 5 fr" in done.output
    hint = f"template --model tiny --checkpoint {tiny_checkpoint} --frames 5 --height 48 --width 40 -o P.plan.json"
    assert hint in done.output
    done = invoke(export_command, *command, "--width", 41)
    assert done.exit_code == 2 and "video width: got 41; expected a multiple of 4; the nearest is 40" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "wan"), "model: got 'wan'; expected one of"),
        (("--model", "wan2.1", "--height", 721), "the nearest is 720"),
        (("--model", "wan2.1", "--pattern", "{"), "--pattern"),
        (("--model", "wan2.1", "--dense-steps", 1), "--dense-steps: got 1.0; expected a number"),
        (("--model", "wan2.1", "--tile", 8, 8, 8), "tile: got 8 x 8 x 8 = 512 tokens"),
    ],
)
def test_bad_templates_are_refused(arguments, message, tmp_path):
    done = invoke(plan_command, "template", *arguments, "-o", tmp_path / "p.plan.json")
    assert done.exit_code == 2 and message in done.output
    assert not list(tmp_path.iterdir())


def test_a_template_without_a_checkpoint_is_for_the_published_model(tmp_path):
    done = invoke(plan_command, "template", "--model", "wan2.1", "-o", tmp_path / "p.plan.json")
    assert done.exit_code == 0, done.output
    assert read_plan(tmp_path / "p.plan.json").geometry == adapter("wan2.1").published.geometry((21, 90, 160))
