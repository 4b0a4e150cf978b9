"""A plan as a picture: which head uses which pattern, and the tile mask of each pattern. Needs matplotlib."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svdit.plans.files import write_atomic
from svdit.plans.flops import pattern_density
from svdit.plans.listing import used_names
from svdit.plans.schema import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIP_COLOUR, FULL_COLOUR = "#d9d9d9", "#222222"
MASKS_A_ROW = 4


def write_png(path: str | Path, plan: Plan, dpi: int = 110) -> None:
    """Draw the plan and write the picture atomically. Raises SvditError when the place cannot be written."""
    data = io.BytesIO()
    figure_of(plan).savefig(data, format="png", dpi=dpi)
    write_atomic(path, data.getvalue())


def figure_of(plan: Plan) -> Figure:
    """Upper part: one map of layers x heads for each stage. Below: the tile mask of each pattern in use."""
    from matplotlib.figure import Figure

    names = used_names(plan)
    colours = dict(zip(names, _colours(names), strict=True))
    mask_rows = math.ceil(len(names) / MASKS_A_ROW)
    map_height = 1.6 + min(12.0, 0.16 * plan.geometry.layers)
    figure = Figure(figsize=(11, map_height + 2.7 * mask_rows), layout="constrained")
    maps, masks = figure.subfigures(2, 1, height_ratios=[map_height, 2.7 * mask_rows])
    _draw_maps(maps, plan, colours)
    _draw_masks(masks, plan, colours, mask_rows)
    return figure


def _draw_maps(figure, plan: Plan, colours: dict[str, str]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    numbers = {name: i for i, name in enumerate(colours)}
    palette = ListedColormap(list(colours.values()))
    axes = figure.subplots(1, len(plan.stages), squeeze=False, sharey=True)[0]
    before = 0.0
    for i, (stage, axis) in enumerate(zip(plan.stages, axes, strict=True)):
        cells = np.array([[numbers[name] for name in row] for row in stage.layers])
        edges = (-0.5, plan.geometry.heads - 0.5, plan.geometry.layers - 0.5, -0.5)
        axis.imshow(cells, cmap=palette, vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto", extent=edges)
        axis.set(title=f"stage {i}: {100 * before:g}-{100 * stage.until:g} %", xlabel="head")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        before = stage.until
    axes[0].set_ylabel("layer")
    patches = [Patch(facecolor=colour, edgecolor="#888888", label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False, fontsize="small")


def _draw_masks(figure, plan: Plan, colours: dict[str, str], rows: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    tiling, density = plan.tiling(), pattern_density(plan)
    axes = figure.subplots(rows, MASKS_A_ROW, squeeze=False).ravel()
    for axis, name in zip(axes, colours, strict=False):
        shades = LinearSegmentedColormap.from_list(name, ["white", colours[name]])  # averages where tiles < pixels
        mask = tiling.mask(plan.pattern(name)).astype(float)
        axis.imshow(mask, cmap=shades, vmin=0, vmax=1, interpolation="antialiased", interpolation_stage="data")
        axis.set_title(f"{name}  {density[name]:.3f}", fontsize="small")
        axis.set(xticks=[], yticks=[])
    for axis in axes[len(colours) :]:
        axis.axis("off")
    figure.supxlabel(f"key tile (of {tiling.num_tiles})", fontsize="small")
    figure.supylabel("query tile", fontsize="small")


def _colours(names: list[str]) -> list[str]:
    """Black for full, grey for skip, evenly spread hues for the rest."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    others = [name for name in names if name not in ("full", "skip")]
    spread = colormaps["tab10" if len(others) <= 10 else "turbo"]
    hues = [spread(i) if len(others) <= 10 else spread((i + 0.5) / len(others)) for i in range(len(others))]
    fixed = {"full": FULL_COLOUR, "skip": SKIP_COLOUR, **dict(zip(others, map(to_hex, hues), strict=True))}
    return [fixed[name] for name in names]
