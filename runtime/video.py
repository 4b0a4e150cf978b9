"""Writing videos: mp4 for watching, a contact sheet for looking at once."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.files import write_atomic

MIN_SIDE = 256
SHEET_FRAMES = 8
GAP = 4


def check_target(path: Path, suffix: str | None, what: str) -> Path:
    """Refuse a target that cannot be written, before any work is done."""
    if suffix is not None and path.suffix.lower() != suffix:
        raise complain(what, str(path), f"a file name that ends in {suffix}")
    if not path.parent.is_dir():
        raise complain(what, str(path), f"an existing folder {path.parent}", "create the folder first")
    if path.is_dir():
        raise complain(what, str(path), "a file", "it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise complain(what, str(path), "a folder that can be written")
    return path


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded; what lies outside is cut."""
    return np.clip(np.asarray(video) * 255 + 0.5, 0, 255).astype(np.uint8)


def enlarge(frames: np.ndarray, min_side: int = MIN_SIDE) -> np.ndarray:
    """Repeat pixels so that the shorter side of [F, H, W, 3] reaches min_side; larger frames stay as they are."""
    factor = max(1, -(-min_side // min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_mp4(path: Path, video: np.ndarray, fps: int = 8) -> None:
    """Write uint8 [F, H, W, 3] as H.264 mp4, small frames enlarged by whole pixels; atomic."""
    import imageio.v2 as imageio

    frames = enlarge(video)
    height, width = (size + size % 2 for size in frames.shape[1:3])
    frames = np.pad(frames, ((0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0)), mode="edge")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp.mp4")
    try:
        with imageio.get_writer(
            temporary, fps=fps, codec="libx264", quality=8, macro_block_size=2, ffmpeg_log_level="error"
        ) as writer:
            for frame in frames:
                writer.append_data(frame)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def contact_sheet(video: np.ndarray, columns: int = SHEET_FRAMES, min_side: int = 128) -> np.ndarray:
    """uint8 [h, w, 3]: `columns` frames of [F, H, W, 3], evenly spaced from the first to the last, side by side."""
    count = min(columns, video.shape[0])
    picked = np.unique(np.linspace(0, video.shape[0] - 1, count).round().astype(int))
    frames = enlarge(video[picked], min_side)
    gap = np.full((frames.shape[1], GAP, 3), 255, np.uint8)
    parts: list[np.ndarray] = []
    for frame in frames:
        parts += [frame, gap]
    return np.concatenate(parts[:-1], axis=1)


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [h, w, 3] as PNG; atomic."""
    write_atomic(path, png_bytes(image))
