"""Attention maps and kept masks as small PNG files in data URIs. Needs matplotlib and Pillow, which comes with it."""

from __future__ import annotations

import base64
import io

import numpy as np

LEVELS = 15
"""Shades of a map; with the colour of rows that were not measured they fit into 4 bits a pixel."""
OCTAVES = 4.0
"""Shades reach from 2^-OCTAVES to 2^OCTAVES times the attention of a uniform map."""
COLOURS = "magma"
NOT_MEASURED = (150, 150, 150)
VEIL = (226, 229, 234)
"""Colour over what is dropped, at VEIL_ALPHA."""
VEIL_ALPHA = (0, 78, 156, 222)
"""Opacity (of 255) where all, two thirds, one third and nothing of a pixel's pairs is kept."""


def palette() -> list[tuple[int, int, int]]:
    """The shades of a map from least to most attention."""
    from matplotlib import colormaps

    return [tuple(int(255 * c + 0.5) for c in colormaps[COLOURS](x)[:3]) for x in np.linspace(0.04, 1, LEVELS)]


def shades(maps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """uint8 [..., m, m]: 0 .. LEVELS - 1 by the logarithm of the attention over that of a uniform map.

    maps [..., m, m]: attention from rows to keys, in any unit of its row; tokens [m]: those of each bin. LEVELS marks
    rows of zeros.
    """
    total = maps.sum(-1, keepdims=True)
    uniform = tokens / tokens.sum()
    times = np.divide(maps, total * uniform, out=np.zeros_like(maps, dtype=np.float64), where=total > 0)
    place = (np.log2(np.maximum(times, 1e-30)) + OCTAVES) / (2 * OCTAVES) * LEVELS
    found = np.clip(np.floor(place), 0, LEVELS - 1).astype(np.uint8)
    found[np.broadcast_to(total == 0, found.shape)] = LEVELS
    return found


def map_uri(shade: np.ndarray) -> str:
    """A map of `shades`, uint8 [m, m]."""
    return _uri(shade, [*palette(), NOT_MEASURED], 4, None)


def veil_uri(kept: np.ndarray) -> str:
    """A veil over the pairs that are dropped; kept [m, m] are parts from 0 to 1."""
    steps = len(VEIL_ALPHA) - 1
    return _uri(np.rint((1 - kept) * steps).astype(np.uint8), [VEIL] * (steps + 1), 2, bytes(VEIL_ALPHA))


def _uri(pixels: np.ndarray, colours: list[tuple[int, int, int]], bits: int, alpha: bytes | None) -> str:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels), "P")
    image.putpalette([channel for colour in colours for channel in colour])
    data = io.BytesIO()
    image.save(data, "PNG", bits=bits, optimize=True, **({} if alpha is None else {"transparency": alpha}))
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
