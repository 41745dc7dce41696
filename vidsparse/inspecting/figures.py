"""The pictures: block maps, what a query tile reads over the frames, recall and error by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from vidsparse.drawing import INK, LINE, ORANGE, PAGE, SOFT, save, sheet, ticks
from vidsparse.inspecting.capture import Maps
from vidsparse.inspecting.measure import HeadFigures
from vidsparse.inspecting.places import OMITTED, Volume, frame_of
from vidsparse.plan import SKIP
from vidsparse.quality.frames import Frame

MASS = "magma_r"
OUTLINE = "#0a7d8c"
MOST_BLOCKS = 128
"""Of a map, on a side; of a larger one the window around the query tile is drawn."""
MOST_FRAMES = 12
EXACT, POOLED, CENTROID, NOTHING = (21, 101, 192), (244, 247, 251), (250, 250, 248), (26, 28, 32)
"""RGB of level 0, of the coarsest pooled level, of blocks that are only centroids or not read."""


def mass_maps(path: Path, maps: Mapping[int, Maps], figures: Mapping[int, HeadFigures],
              title: str, tiles: Mapping[int, int]) -> Path:  # fmt: skip
    """The draft beside the true block mass, a row per head. Maps, figures, tiles by head."""
    from matplotlib.colors import LogNorm

    nq, nk = next(iter(maps.values())).mass.shape
    windows = {head: (window(nq, tile), window(nk, round(tile * nk / nq)))
               for head, tile in tiles.items()}  # fmt: skip
    alike = len(set(windows.values())) == 1
    rows, columns = next(iter(windows.values()))
    side = min(2.75, 2.75 * len(rows) / len(columns))
    with sheet(PAGE, (side + 0.3) * len(maps) + 0.55) as figure:
        share = True if alike else "row"
        axes = figure.subplots(len(maps), 2, squeeze=False, sharex=share, sharey=share)
        shown = [_part(m, *windows[head]) for head, one in maps.items()
                 for m in (one.draft, one.mass)]  # fmt: skip
        top = max(float(m.max()) for m in shown)
        norm = LogNorm(min(0.1 / nk, top / 10), top, clip=True)
        for (head, one), pair in zip(maps.items(), axes, strict=True):
            rows, columns = windows[head]
            edge = (columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5)
            listed = _part(one.plan.levels != SKIP, rows, columns)
            for axis, name, mass in zip(
                pair, ("draft", "true mass"), (one.draft, one.mass), strict=True
            ):
                part = _part(mass, rows, columns)
                image = axis.imshow(part, cmap=MASS, norm=norm, extent=edge)
                outline(axis, listed, (columns.start, rows.start))
                axis.set_title(f"head {head}: {name}", loc="left")
            found = figures[head]
            pair[1].set_title(
                f"recall {found.recall:.3f} of {found.best:.3f} possible", loc="right", color=SOFT
            )
            pair[0].set_title(f"density {found.density:.3f}", loc="right", color=SOFT)
            pair[0].set_ylabel("query block (layout order)")
        for axis in axes[-1]:
            axis.set_xlabel("key block (layout order)")
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015, aspect=40, extend="min",
                              format=lambda share, _: f"{share:.6g}")  # fmt: skip
        bar.set_label("mass of a key block (share of the row)")
        figure.suptitle(f"{title}; outlined: the blocks that the plan lists", x=0.01, ha="left")
        return save(figure, path)


def _part(x: Tensor, rows: range, columns: range) -> npt.NDArray[Any]:
    """The blocks of a map that are drawn."""
    found: npt.NDArray[Any] = x[rows.start : rows.stop, columns.start : columns.stop].numpy()
    return found


def window(count: int, centre: int) -> range:
    """The blocks of a side of a map that are drawn: all, or `MOST_BLOCKS` around one."""
    first = max(0, min(centre - MOST_BLOCKS // 2, count - MOST_BLOCKS))
    return range(first, min(count, first + MOST_BLOCKS))


def outline(axis: Any, chosen: npt.NDArray[np.bool_], origin: tuple[int, int],
            colour: str = OUTLINE, width: float = 0.45) -> None:  # fmt: skip
    """Lines around the true cells [rows, columns]. origin: column and row of the first cell."""
    from matplotlib.collections import LineCollection

    x, y = origin[0] - 0.5, origin[1] - 0.5
    padded = np.pad(chosen, 1)
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # between left and right
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # between above and below
    lines = [[(x + c, y + r), (x + c, y + r + 1)] for r, c in down]
    lines += [[(x + c, y + r), (x + c + 1, y + r)] for r, c in across]
    many = len(lines) > chosen.size / 2
    axis.add_collection(
        LineCollection(lines, colors=colour, linewidths=width / 2 if many else width)
    )


def reads(path: Path, volume: Volume, own: npt.NDArray[np.bool_], video: Frame, centroid: int,
          title: str) -> Path:  # fmt: skip
    """What a query tile reads, over the frames of the video.

    volume: level codes [frames, rows, columns] of the tokens; own: bool, those of the tile.
    video: uint8 RGB [F, H, W, 3]. centroid: level of a whole block.
    """
    latents = chosen_frames(own, MOST_FRAMES)
    columns = min(len(latents), 6 if len(latents) > 8 else 4)
    rows = -(-len(latents) // columns)
    ratio = video.shape[1] / video.shape[2]
    with sheet(PAGE, rows * (PAGE / columns * ratio * 0.93 + 0.22) + 0.65) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        down, across = volume.shape[1:]
        edge = (-0.5, across - 0.5, down - 0.5, -0.5)  # in tokens
        for axis in axes.flat[len(latents) :]:
            axis.set_axis_off()
        for axis, latent in zip(axes.flat, latents, strict=False):
            at = frame_of(latent, len(volume), len(video))
            axis.imshow(tinted(video[at], volume[latent], centroid), extent=edge)
            outline(axis, own[latent], (0, 0), ORANGE, 1.2)
            axis.set_title(f"frame {at} (latent {latent})", loc="left", fontsize=6.5)
            axis.set(xticks=[], yticks=[], aspect=ratio * across / down)
            if own[latent].any():
                axis.spines[:].set(color=ORANGE, linewidth=1.2)
        figure.legend(
            handles=level_legend(sorted({*np.unique(volume).tolist()}, key=coarseness), centroid),
            loc="outside lower left", ncols=5,
        )  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left")
        return save(figure, path)


def chosen_frames(own: npt.NDArray[np.bool_], most: int) -> list[int]:
    """Latent frames to draw: all, or so many, evenly spaced, with the middle one of the tile."""
    count = len(own)
    if count <= most:
        return list(range(count))
    with_tile = np.flatnonzero(own.any((1, 2)))
    even = {round(i * (count - 1) / (most - 1)) for i in range(most)}
    middle = int(with_tile[len(with_tile) // 2])
    if middle not in even:
        even.remove(min(even, key=lambda n: abs(n - middle)))
    return sorted(even | {middle})


def tinted(frame: Frame, levels: Volume, centroid: int) -> Frame:
    """A frame in grey under the colours of the levels [rows, columns] that its tokens have."""
    height, width = frame.shape[:2]
    scale = max(1, -(-360 // max(height, width)))
    grey = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    size = width * scale, height * scale
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_CUBIC)
    colour = np.zeros((*levels.shape, 3), np.float32)
    share = np.zeros((*levels.shape, 1), np.float32)
    for code in np.unique(levels).tolist():
        colour[levels == code] = level_colour(code, centroid)
        share[levels == code] = 0.55 if code >= 0 else 0.45
    colour, share = (cv2.resize(x, size, interpolation=cv2.INTER_NEAREST) for x in (colour, share))
    share = share[..., None]
    mixed: Frame = (grey * (1 - share) + colour * share).round().astype(np.uint8)
    return mixed


def level_colour(code: int, centroid: int) -> npt.NDArray[np.float32]:
    """RGB 0 .. 255 of a level: from full colour for exact to nearly white for coarse."""
    if code == SKIP:
        return np.array(NOTHING, np.float32)
    if code == OMITTED:
        return np.array(CENTROID, np.float32)
    share = code / max(1, centroid) * 0.85
    return np.array(EXACT, np.float32) * (1 - share) + np.array(POOLED, np.float32) * share


def level_name(code: int, centroid: int) -> str:
    """What a level reads, in words."""
    if code == SKIP:
        return "not read"
    if code == OMITTED:
        return "left out: centroid only"
    if code == 0:
        return "exact"
    return "mean of the block" if code == centroid else f"means of {2**code} tokens"


def coarseness(code: int) -> int:
    """Sorts level codes from exact to not read."""
    return code if code >= 0 else 100 - code if code == SKIP else 99


def level_legend(codes: Sequence[int], centroid: int, tile: bool = True) -> list[Any]:
    """Handles of a legend for the levels, and for the query tile."""
    from matplotlib.patches import Patch

    found = [
        Patch(
            facecolor=tuple((level_colour(code, centroid) / 255).tolist()),
            edgecolor=LINE,
            linewidth=0.6,
            label=level_name(code, centroid),
        )
        for code in codes
    ]
    own = [Patch(facecolor="none", edgecolor=ORANGE, linewidth=1.2, label="query tile")]
    return found + own * tile


def by_head(path: Path, figures: Mapping[tuple[int, int, int], HeadFigures],
            size: tuple[int, int], steps: Sequence[int]) -> Path:  # fmt: skip
    """Recall and output error of every layer and head, a column per step. size: layers, heads."""
    layers, heads = size
    rows = (
        ("recall of true mass", "recall", "Greens", 1.0),
        ("output error (relative L2)", "error", "Oranges", None),
    )
    panel = min(3.2, max(0.9, 0.17 * layers))
    with sheet(PAGE, 2 * (panel + 0.55) + 0.25) as figure:
        axes = figure.subplots(2, len(steps), squeeze=False, sharex=True, sharey=True)
        for row, (name, field, colours, top) in zip(axes, rows, strict=True):
            values = [getattr(found, field) for found in figures.values()]
            low, high = (min(values), top) if top else (0.0, max(values))
            for axis, step in zip(row, steps, strict=True):
                grid = np.full((layers, heads), np.nan)
                for (at, layer, head), found in figures.items():
                    if at == step:
                        grid[layer, head] = getattr(found, field)
                image = axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
                axis.set_facecolor("#e4e2dd")
                axis.set_xticks(ticks(heads, 12))
                axis.set_yticks(ticks(layers, 10))
                if heads * len(steps) <= 16 and layers <= 16:
                    _numbers(axis, grid, (low, high))
                axis.set_title(f"step {step}", loc="left")
            row[0].set_ylabel("layer")
            bar = figure.colorbar(image, ax=row, fraction=0.05, pad=0.015, aspect=16)
            bar.outline.set_visible(False)
            bar.set_label(name)
        for axis in axes[-1]:
            axis.set_xlabel("head")
        return save(figure, path)


def _numbers(axis: Any, grid: npt.NDArray[np.float64], scale: tuple[float, float]) -> None:
    """Write the values into the cells."""
    for (layer, head), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = (value - scale[0]) > 0.6 * (scale[1] - scale[0])
            axis.text(head, layer, f"{value:.3f}", ha="center", va="center", fontsize=6,
                      color="white" if dark else INK)  # fmt: skip
        else:
            axis.text(head, layer, "dense", ha="center", va="center", fontsize=6, color=SOFT)
