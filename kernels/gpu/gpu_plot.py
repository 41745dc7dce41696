"""Two pictures from the CSVs of the GPU suite: speed-up over dense, and where the time goes.

python kernels/gpu/suite.py --plot
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from gpu_tables import OTHERS, STAGES

Line = dict[str, str]
SERIES = (
    ("", "sparse", "exact tiles", "o-", "#0b6e99"),
    ("", "whole", "whole operator", "s-", "#c4501b"),
    ("flex", "sparse", "FlexAttention, same mask", "^--", "#777777"),
)
"""Implementation, "": the fastest exact engine, stage, label, style, colour."""


def of(line: Line, impl: str) -> bool:
    """Whether a line is of an implementation, or of any exact engine."""
    return line["impl"] == impl if impl else line["impl"] not in OTHERS


def plot(folder: Path) -> list[Path]:
    """Draw from folder/gpu_bench.csv; the files that were written.

    Raises FileNotFoundError if there are no results, ValueError if they hold no times, ImportError
    without matplotlib.
    """
    source = folder / "gpu_bench.csv"
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; run kernels/gpu/suite.py first")
    with source.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["ms_p50"]]
    if not lines:
        raise ValueError(f"{source}: it holds no times")
    gpus = sorted({line["gpu"] for line in lines})
    written = []
    for gpu in gpus:
        own = [line for line in lines if line["gpu"] == gpu]
        tag = "" if len(gpus) == 1 else "_" + gpu.lower().replace(" ", "-")
        written.append(_save(_speedups(own, gpu), folder / f"gpu_speedup{tag}.png"))
        written.append(_save(_stages(own, gpu), folder / f"gpu_stages{tag}.png"))
    return written


def _figure(columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(4.2 * columns, 3.8), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def _save(figure: Any, path: Path) -> Path:
    """Write a picture, all or nothing."""
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=130)
    os.replace(part, path)
    return path


def _speedups(lines: list[Line], gpu: str) -> Any:
    """One panel per shape: speed-up over the fastest dense attention against density."""
    shapes = list(dict.fromkeys(line["shape"] for line in lines))
    figure, axes = _figure(len(shapes))
    for axis, shape in zip(axes, shapes, strict=True):
        own = [line for line in lines if line["shape"] == shape and line["speedup_vs_dense"]]
        densities: set[float] = set()
        for impl, stage, name, style, colour in SERIES:
            best: dict[float, float] = {}
            for line in own:
                if of(line, impl) and line["stage"] == stage:
                    x, y = float(line["density"]), float(line["speedup_vs_dense"])
                    best[x] = max(y, best.get(x, 0.0))
            points = sorted(best.items())
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=4)
                densities |= {x for x, _ in points}
        ideal = sorted(densities)
        axis.plot(ideal, [1 / x for x in ideal], ":", color="#222222", label="1 / density")
        axis.axhline(1, color="#bbbbbb", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{shape}\nN {own[0]['tokens']}",
                 xlabel="density (kept work)")  # fmt: skip
        axis.set_xticks(ideal, [f"{x:g}" for x in ideal])
        axis.set_yticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
        axis.minorticks_off()
    axes[0].set_ylabel("speed-up over the fastest dense attention")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Sparse attention on {gpu}, bfloat16", fontsize=11)
    return figure


def _stages(lines: list[Line], gpu: str) -> Any:
    """One panel per shape: ms of each stage, stacked, per density."""
    shapes = list(dict.fromkeys(line["shape"] for line in lines))
    figure, axes = _figure(len(shapes))
    for axis, shape in zip(axes, shapes, strict=True):
        own: dict[tuple[float, str], float] = {}
        for line in lines:
            if line["shape"] == shape and (line["impl"] == "triton" or of(line, "")):
                key, ms = (float(line["density"]), line["stage"]), float(line["ms_p50"])
                own[key] = min(ms, own.get(key, ms))
        densities = sorted({density for density, stage in own if stage == "whole"})
        names = [f"{density:g}" for density in densities]
        bottom = [0.0] * len(densities)
        for n, stage in enumerate(STAGES[:-1]):
            height = [max(0.0, own.get((density, stage), 0.0)) for density in densities]
            axis.bar(names, height, bottom=bottom, label=stage, color=f"C{n}", width=0.6)
            bottom = [a + b for a, b in zip(bottom, height, strict=True)]
        whole = [own[density, "whole"] for density in densities]
        axis.plot(names, whole, "k_", markersize=22, label="whole, measured")
        axis.set(title=shape, xlabel="density (kept work)")
    axes[0].set_ylabel("ms")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    figure.suptitle(f"Where the time goes on {gpu}, bfloat16", fontsize=11)
    return figure
