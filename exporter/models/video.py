"""Videos in pixels and what they are in latents and tokens: arithmetic only.

A latent frame, row or column stands for `factors` pixels (the VAE's), a token for `patch` latents. The first frame of a
video has a latent frame of its own: F frames are (F - 1) / factors[0] + 1 latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from svdit.plans.errors import complain
from svdit.plans.fields import integer

AXES = ("frames", "height", "width")
Triple = tuple[int, int, int]


class VideoSize(NamedTuple):
    """Frames, and height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height} x {self.width}"


@dataclass(frozen=True)
class VideoCoder:
    """How a model cuts videos into tokens."""

    factors: Triple
    """Frames, rows and columns of pixels of one latent."""
    patch: Triple
    """Latent frames, rows and columns of one token."""
    pads_frames: bool = False
    """Whether latent frames that do not fill a patch are filled up, as CogVideoX1.5's pipeline does."""

    def grid(self, video: Triple) -> Triple:
        """Token grid of a VideoSize. Raises SvditError for one that does not divide, naming the nearest that does."""
        t, h, w = (self._tokens(axis, size) for axis, size in enumerate(video))
        return t, h, w

    def video(self, grid: Triple) -> VideoSize:
        """The video of a token grid; where frames are padded, the shortest one."""
        return VideoSize(*(self._size(axis, tokens) for axis, tokens in enumerate(grid)))

    def _tokens(self, axis: int, size: int) -> int:
        size = integer(size, AXES[axis], low=1)
        tokens = max(1, self._nearest(axis, size))
        fits = {self._size(axis, tokens)}
        if axis == 0 and self.pads_frames:
            fits = {self._frames(tokens * self.patch[0] - i) for i in range(self.patch[0])}
        if size in fits:
            return tokens
        step = self.factors[axis] * (1 if axis == 0 and self.pads_frames else self.patch[axis])
        what = f"a multiple of {step}" if axis else f"a multiple of {step}, and {self._first()}"
        nearest = min(fits, key=lambda fit: (abs(fit - size), fit))
        raise complain(f"video {AXES[axis]}", size, what, f"the nearest is {nearest}")

    def _first(self) -> int:
        """Frames of the shortest video, which every other one exceeds by whole steps."""
        return self._size(0, 1)

    def _nearest(self, axis: int, size: int) -> int:
        """Tokens along an axis whose size lies nearest."""
        latents = (size - 1) / self.factors[0] + 1 if axis == 0 else size / self.factors[axis]
        if axis == 0 and self.pads_frames:
            return -(-int(latents + 0.5) // self.patch[0])
        return int(latents / self.patch[axis] + 0.5)

    def _size(self, axis: int, tokens: int) -> int:
        latents = tokens * self.patch[axis]
        if axis:
            return latents * self.factors[axis]
        return self._frames(latents - (self.patch[0] - 1 if self.pads_frames else 0))

    def _frames(self, latents: int) -> int:
        return (latents - 1) * self.factors[0] + 1
