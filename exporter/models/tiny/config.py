"""Sizes and caption vocabulary of `tiny`, a small Wan in pixel space trained on moving shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svdit.exporter.models.wan.config import WanConfig
from svdit.plans.errors import complain, rooted
from svdit.plans.fields import array, integer, integers, record, shown, string
from svdit.plans.files import read_json

REFERENCE_VIDEO = (16, 96, 96)
"""Frames, height, width in pixels: the size that the shipped weights were trained at."""
DEFAULT_TILE = (4, 4, 4)
DEFAULT_SPEED = "medium"
KINDS = ("colour", "shape", "direction", "speed")
"""Kinds of words, in the order of a caption's tokens."""
SPARE_ROWS = 1
"""Rows of the caption table after the words."""
PUBLISHED = WanConfig(
    patch_size=(1, 4, 4),
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=3,
    out_channels=3,
    text_dim=128,
    freq_dim=128,
    ffn_dim=1024,
    num_layers=8,
    rope_max_seq_len=64,
)


@dataclass(frozen=True)
class Captions:
    """The caption part of a checkpoint: captions/config.json.

    A caption is one token of each kind; token numbers run through the kinds in order.
    """

    vocabulary: dict[str, tuple[str, ...]]
    width: int
    tokens: int
    video: tuple[int, int, int] = REFERENCE_VIDEO

    def __post_init__(self) -> None:
        integer(self.width, "width", low=1)
        if integer(self.tokens, "tokens", low=1) != len(KINDS):
            raise complain("tokens", self.tokens, f"{len(KINDS)}, one of each kind")
        words = record(self.vocabulary, "vocabulary", KINDS)
        for kind in KINDS:
            for i, word in enumerate(array(words[kind], f"vocabulary.{kind}", "words")):
                string(word, f"vocabulary.{kind}[{i}]")
        object.__setattr__(self, "vocabulary", {kind: tuple(words[kind]) for kind in KINDS})
        object.__setattr__(self, "video", integers(self.video, "video", 3, low=1))
        every = [word for kind in KINDS for word in self.vocabulary[kind]]
        twice = sorted({word for word in every if every.count(word) > 1})
        if twice:
            raise complain("vocabulary", f"{shown(twice[0])} more than once", "each word once")

    @property
    def rows(self) -> int:
        """Rows of the caption table."""
        return sum(len(words) for words in self.vocabulary.values()) + SPARE_ROWS

    @classmethod
    def read(cls, folder: Path) -> Captions:
        """Read `folder`/config.json. Raises SvditError naming the field."""
        path = folder / "config.json"
        with rooted(f"{path}: "):
            data = record(read_json(path, "the caption vocabulary"), "$", ["vocabulary", "width", "tokens"], ["video"])
            with rooted("$."):
                return cls(**data)
