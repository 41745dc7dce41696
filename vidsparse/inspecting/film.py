"""A GIF: at which level one query tile reads the video, and the whole map, step after step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imageio.v2 as iio
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidsparse.drawing import ORANGE, PAGE, pixels, sheet
from vidsparse.inspecting.figures import (
    MOST_FRAMES,
    chosen_frames,
    coarseness,
    level_colour,
    level_legend,
    outline,
    window,
)
from vidsparse.inspecting.places import OMITTED, HeadPlan, Places
from vidsparse.plan import SKIP
from vidsparse.quality.frames import Frame, atomic_output

SECONDS = 0.5
"""Of one step on the screen."""


def film(
    path: Path,
    plans: Mapping[int, HeadPlan | str],
    rest: int,
    places: Places,
    query: tuple[int, int, int],
    title: str,
) -> Path:
    """Write the GIF. plans: by step, of one head, or why the call was dense."""
    size = tuple(len(blocks) for blocks in places.cuts)
    whole = HeadPlan(torch.zeros(size, dtype=torch.int8))
    maps = {step: whole if isinstance(found, str) else found for step, found in plans.items()}
    codes = sorted({c for m in maps.values() for c in _codes(m.levels, rest)}, key=coarseness)
    drawn = []
    for step in sorted(maps):
        found, here = plans[step], places.under(maps[step])
        why = f"dense: {found}" if isinstance(found, str) else "sparse"
        about = f"{title}, step {step} ({why})"
        drawn.append(_frame(maps[step].levels, rest, here, here.tile(query), codes, about))
    with atomic_output(path) as part:
        iio.mimsave(part, drawn, format="GIF", duration=1000 * SECONDS, loop=0)
    return path


def _codes(levels: Tensor, rest: int) -> list[int]:
    """Level codes that occur in a map, as the pictures name them."""
    found: list[int] = levels.unique().tolist()
    return [OMITTED if code == SKIP and rest != SKIP else code for code in found]


def _frame(
    levels: Tensor,
    rest: int,
    places: Places,
    tile: int,
    codes: list[int],
    title: str,
) -> Frame:
    """One step: the map by blocks at the left, the grid frame by frame at the right."""
    from matplotlib.colors import ListedColormap

    volume, own = places.levels(levels, rest, tile), places.tokens(tile)
    centroid = places.cuts[1].levels
    latents = chosen_frames(own, MOST_FRAMES)
    columns = 4 if len(latents) > 4 else len(latents)
    rows = -(-len(latents) // columns)
    colours = ListedColormap([level_colour(code, centroid) / 255 for code in codes])
    with sheet(PAGE, 3.3) as figure:
        figure.set_dpi(110)
        left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
        axis = left.subplots()
        nq, nk = levels.shape
        down, across = window(nq, tile), window(nk, round(tile * nk / nq))
        part = levels[down.start : down.stop, across.start : across.stop].numpy().astype(np.int64)
        if rest != SKIP:
            part = np.where(part == SKIP, OMITTED, part)
        edge = (across.start - 0.5, across.stop - 0.5, down.stop - 0.5, down.start - 0.5)
        _show(axis, part, codes, colours, edge)
        row = np.zeros((len(down), len(across)), bool)
        row[tile - down.start] = True
        outline(axis, row, (across.start, down.start), ORANGE, 0.8)
        axis.set(xlabel="key block (layout order)", ylabel="query block (layout order)")
        panels = right.subplots(rows, columns, squeeze=False)
        for panel in panels.flat[len(latents) :]:
            panel.set_axis_off()
        for panel, latent in zip(panels.flat, latents, strict=False):
            _show(panel, volume[latent], codes, colours, None)
            outline(panel, own[latent], (0, 0), ORANGE, 1.0)
            panel.set(xticks=[], yticks=[])
            panel.set_title(f"latent {latent}", loc="left", fontsize=6.5)
        figure.legend(handles=level_legend(codes, centroid), loc="outside lower left", ncols=6)
        figure.suptitle(title, x=0.01, ha="left")
        return pixels(figure)


def _show(
    axis: Any,
    values: npt.NDArray[np.int64],
    codes: list[int],
    colours: Any,
    edge: tuple[float, float, float, float] | None,
) -> None:
    """Level codes as colours."""
    place = np.zeros(values.shape)
    for n, code in enumerate(codes):
        place[values == code] = n
    axis.imshow(place, cmap=colours, vmin=-0.5, vmax=len(codes) - 0.5, extent=edge)
