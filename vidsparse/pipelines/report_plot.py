"""A run report as a picture: density by step and layer, and why calls were dense."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from vidsparse.drawing import LINE, PAGE, save, sheet, ticks
from vidsparse.quality.frames import PathLike
from vidsparse.reasons import REASONS
from vidsparse.terminal import printable

if TYPE_CHECKING:
    from vidsparse.pipelines.report import Call, RunReport

LONGEST = 60
"""Characters of a preset and its overrides that a title shows."""
SPARSE = "Blues"
SOME = "some of the calls dense"
GREYS = ("#d8d4cc", "#b9b2a6", "#8f887c", "#c9b79c", "#a58f74", "#77695a")
"""Of dense cells, in the order in which their reasons appear."""


def plot(report: RunReport, path: PathLike) -> Path:
    """Draw the map of a report; see `RunReport.plot`."""
    if not report.calls:
        raise ValueError("this report has no calls, so there is nothing to draw: run first")
    by_part: dict[str, list[Call]] = defaultdict(list)
    for call in report.calls:
        by_part[call.transformer].append(call)
    layers = {part: 1 + max(call.layer for call in calls) for part, calls in by_part.items()}
    height = sum(0.75 + min(3.0, max(0.8, 0.16 * n)) for n in layers.values()) + 0.5
    with sheet(PAGE, height) as figure:
        axes = figure.subplots(
            len(by_part), 1, squeeze=False, height_ratios=[max(5, n) for n in layers.values()]
        )[:, 0]
        top = max((c.mean_density for c in report.calls if not c.reason), default=1.0)
        seen: list[str] = []
        for axis, (part, calls) in zip(axes, by_part.items(), strict=True):
            image = _panel(axis, calls, (layers[part], report.steps), top, seen)
            if len(by_part) > 1:
                axis.set_title(part, loc="left")
        axes[-1].set_xlabel("denoising step")
        if any(not call.reason for call in report.calls):
            bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.015, aspect=18)
            bar.set_label("density of sparse calls\n(share of the work)")
            bar.outline.set_visible(False)
        _legend(figure, seen)
        figure.suptitle(
            f"{printable(report.preset, LONGEST)}: density {report.density:.3f} in sparse calls, "
            f"{report.attention_density:.3f} in all",
            x=0.01, ha="left",
        )  # fmt: skip
        return save(figure, path)


def cells(calls: Sequence[Call]) -> dict[tuple[int, int], tuple[float, tuple[str, ...]]]:
    """(step, layer) -> mean density of its calls, dense ones counting 1, and the reasons of dense
    ones; with "" among them if some were sparse.
    """
    grouped: dict[tuple[int, int], list[Call]] = defaultdict(list)
    for call in calls:
        grouped[call.step, call.layer].append(call)
    return {
        place: (
            fmean(1.0 if call.reason else call.mean_density for call in found),
            tuple(dict.fromkeys(call.reason or "" for call in found)),
        )
        for place, found in grouped.items()
    }


def _panel(
    axis: Any, calls: Sequence[Call], size: tuple[int, int], top: float, seen: list[str]
) -> Any:
    """Heat map of one transformer. size: layers, steps. seen: gathers what the legend names."""
    layers, steps = size
    density = np.full((layers, steps), np.nan)
    dense = np.full((layers, steps, 4), 0.0)
    for (step, layer), (mean, reasons) in cells(calls).items():
        if "" in reasons:
            density[layer, step] = mean
            if len(reasons) > 1:
                _note(seen, SOME)
                axis.plot(step, layer, ".", color="white", markersize=3)
        else:
            dense[layer, step] = _colour(_note(seen, reasons[0]))
    image = axis.imshow(density, cmap=SPARSE, vmin=0, vmax=top, aspect="auto")
    axis.imshow(dense, aspect="auto")
    axis.set_facecolor("white")
    axis.set_xticks(ticks(steps, 25))
    axis.set_yticks(ticks(layers, 10))
    axis.set_ylabel("layer")
    axis.set_xticks(np.arange(0.5, steps - 1), minor=True)
    axis.set_yticks(np.arange(0.5, layers - 1), minor=True)
    axis.grid(which="minor", color="white", linewidth=0.5 if steps * layers < 3000 else 0.1)
    axis.tick_params(which="minor", length=0)
    return image


def _note(seen: list[str], reason: str) -> int:
    """The place of a reason among those of the legend."""
    if reason not in seen:
        seen.append(reason)
    return [name for name in seen if name != SOME].index(reason) if reason != SOME else -1


def _colour(place: int) -> Any:
    from matplotlib.colors import to_rgba

    return to_rgba(GREYS[place % len(GREYS)])


def _legend(figure: Any, seen: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for place, reason in enumerate(name for name in seen if name != SOME):
        meaning = REASONS.get(reason, reason)
        colour = _colour(place)
        handles.append(Patch(facecolor=colour, edgecolor=LINE, label=f"dense: {meaning}"))
    if SOME in seen:
        handles.append(
            Line2D([], [], marker=".", linestyle="", color="black", label=f"white dot: {SOME}")
        )
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=min(3, len(handles)))
