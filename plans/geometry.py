"""What a model's self-attention sequence looks like: token grid, text tokens, layers and heads."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from svdit.plans.errors import complain, rooted
from svdit.plans.fields import INT_MAX, integer, integers, one_of, record, shown

TEXT_POSITIONS = ("before", "after", "none")
MAX_HEADS = 2**15 - 1
"""A work item packs the head into the upper half of an int32."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that a plan is written for. Raises SvditError at creation when they cannot be meant."""

    grid: tuple[int, int, int]
    """Video tokens along time, height, width after patchify."""
    text_tokens: int
    """Text tokens inside self-attention (0 when text enters by cross-attention only)."""
    text_position: str
    """"before" or "after" the video tokens; "none" exactly when there are no text tokens."""
    layers: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "grid", integers(self.grid, "grid", 3, low=1))
        put(self, "text_tokens", integer(self.text_tokens, "text_tokens", low=0))
        put(self, "text_position", one_of(self.text_position, "text_position", TEXT_POSITIONS))
        put(self, "layers", integer(self.layers, "layers", low=1))
        put(self, "heads", integer(self.heads, "heads", low=1, high=MAX_HEADS))
        put(self, "head_dim", integer(self.head_dim, "head_dim", low=1))
        if (self.text_position == "none") != (self.text_tokens == 0):
            raise complain(
                "text_position",
                f"{shown(self.text_position)} with {self.text_tokens} text tokens",
                '"none" with 0 text tokens, "before" or "after" with more',
            )
        if self.tokens > INT_MAX:
            raise complain("grid", f"{self.tokens} tokens", f"at most {INT_MAX} tokens")

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Length of the attention sequence: video and text tokens."""
        return self.video_tokens + self.text_tokens

    def to_json(self) -> dict:
        return {**asdict(self), "grid": list(self.grid)}

    @classmethod
    def from_json(cls, obj: object, path: str = "geometry") -> Geometry:
        """Read a JSON object found at `path`. Raises SvditError naming the field."""
        values = record(obj, path, [field.name for field in fields(cls)])
        with rooted(f"{path}."):
            return cls(**values)

    def require_same(self, other: Geometry, subject: str, owner: str) -> None:
        """Raise SvditError, naming each field, unless this geometry equals the one of `owner`."""
        wrong = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if wrong:
            raise complain(
                subject,
                ", ".join(f"{name} {shown(getattr(self, name))}" for name in wrong),
                ", ".join(f"{name} {shown(getattr(other, name))}" for name in wrong),
                f"that is what {owner} has",
            )
