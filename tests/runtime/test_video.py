"""Files for watching: what is written is what was made."""

from __future__ import annotations

import io

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from svdit.plans.errors import SvditError
from svdit.runtime.video import GAP, check_target, contact_sheet, enlarge, png_bytes, write_mp4


def test_mp4_keeps_frames_order_and_colours(tmp_path):
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    video = np.broadcast_to(colours[:, None, None], (3, 25, 33, 3)).copy()  # odd sides
    write_mp4(tmp_path / "v.mp4", video, fps=5)
    frames = np.stack(imageio.mimread(tmp_path / "v.mp4"))
    assert frames.shape[0] == 3 and min(frames.shape[1:3]) >= 256
    assert np.abs(frames.mean((1, 2)) - colours).max() < 12
    assert [f.name for f in tmp_path.iterdir()] == ["v.mp4"]


def test_a_failed_mp4_leaves_nothing(tmp_path):
    with pytest.raises(Exception):  # noqa: B017 (whatever the writer raises)
        write_mp4(tmp_path / "v.mp4", np.zeros((2, 8, 8, 7), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_enlarge_repeats_whole_pixels():
    frames = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    big = enlarge(frames, 6)
    assert big.shape == (1, 6, 6, 3)
    np.testing.assert_array_equal(big[:, ::3, ::3], frames)
    np.testing.assert_array_equal(big[:, 2::3, 2::3], frames)
    np.testing.assert_array_equal(enlarge(frames, 1), frames)


def test_contact_sheet_shows_first_and_last_frame():
    video = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 128, 128, 3))
    sheet = contact_sheet(video, columns=5)
    assert sheet.shape == (128, 5 * 128 + 4 * GAP, 3)
    assert [int(sheet[0, i * (128 + GAP), 0]) for i in range(5)] == [0, 5, 10, 14, 19]
    assert contact_sheet(video[:2], columns=5).shape[1] == 2 * 128 + GAP


def test_png_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(image)))), image)


def test_targets_are_checked_before_any_work(tmp_path):
    (tmp_path / "d.mp4").mkdir()
    for path, message in [
        (tmp_path / "v.avi", r"a file name that ends in \.mp4"),
        (tmp_path / "none/v.mp4", "an existing folder"),
        (tmp_path / "d.mp4", "it is a folder"),
    ]:
        with pytest.raises(SvditError, match=message):
            check_target(path, ".mp4", "--output")
    assert check_target(tmp_path / "v.mp4", ".mp4", "--output") == tmp_path / "v.mp4"
