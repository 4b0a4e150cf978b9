"""Prompts and captions of tiny."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from svdit.exporter.models.registry import adapter
from svdit.exporter.models.tiny.config import Captions
from svdit.exporter.models.tiny.prompts import tokens_of
from svdit.plans.errors import SvditError
from tests.exporter.checkpoints import VOCABULARY

CAPTIONS = Captions(VOCABULARY, 32, 4)


@pytest.mark.parametrize(
    "prompt,tokens",
    [
        ("red circle moving right", [0, 6, 9, 18]),
        ("fast blue square moving up-left", [2, 7, 14, 19]),
        ("A cyan triangle, going down-right, slow.", [5, 8, 10, 17]),
        ("UP green green square", [1, 7, 15, 18]),
    ],
)
def test_tokens(prompt, tokens):
    assert tokens_of(prompt, CAPTIONS) == tokens


@pytest.mark.parametrize(
    "prompt,message",
    [
        ("purple circle right", r"got the word 'purple'; expected colour: red, green"),
        ("red circle", r"got no direction; expected one of right, down-right"),
        ("circle right", r"got no colour; expected one of red"),
        ("red right", r"got no shape; expected one of circle, square, triangle"),
        ("red blue circle right", r"two words for its colour, 'red' and 'blue'; expected one"),
        ("red circle down right", r"diagonals are one word, as in down-right"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(SvditError, match=message):
        tokens_of(prompt, CAPTIONS)


def test_embeddings_are_rows_of_the_table(tiny_checkpoint):
    table = load_file(tiny_checkpoint / "captions/captions.safetensors")["weight"].float()
    got = adapter("tiny").encode_prompts(tiny_checkpoint, ["", "red circle right", "  "])
    assert got.shape == (3, 4, 32) and got.dtype == torch.float32
    assert not got[0].any() and not got[2].any()
    assert torch.equal(got[1], table[[0, 6, 9, 18]])


def test_decode_maps_pixels(tiny_checkpoint):
    latents = torch.tensor([-1.5, -1, 0, 1, 2.0]).reshape(1, 1, 5, 1, 1).expand(1, 3, 5, 1, 1)
    video = adapter("tiny").decode(tiny_checkpoint, latents)
    assert video.dtype == np.uint8 and video.shape == (1, 5, 1, 1, 3)
    assert video[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_sampling(tiny_checkpoint):
    sampling = adapter("tiny").sampling(tiny_checkpoint)
    first, second = sampling.scheduler(), sampling.scheduler()
    assert first is not second and first.config.shift == 3.0
    assert sampling.cfg == "batch" and sampling.guidance_scale > 1
