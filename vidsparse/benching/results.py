"""Rows as a CSV, a table and a picture."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import cycle
from math import exp, inf, isnan, log
from pathlib import Path
from statistics import fmean
from typing import Any

from vidsparse.benching.methods import ORACLE, RANDOM, Row
from vidsparse.drawing import PAGE, save, sheet
from vidsparse.quality.frames import atomic_output

LEAST = 1e-9
"""An error that is as good as none, for logarithms."""
FLOOR = 5e-3
"""Where the axis of errors ends: below are methods that read nearly everything."""
MOST_NAMES = 9
"""Methods with colours in a picture."""
COLOURS = [f"C{n}" for n in range(10) if n != 7]
"""Theirs, without the grey of those that have no name."""


def mean_error(rows: Sequence[Row]) -> float:
    """Geometric mean; NaN if one is: an output that is not finite is no small error."""
    return exp(fmean(log(LEAST if row.error < LEAST else row.error) for row in rows))


def _place(error: float) -> float:
    """For sorting: NaN is worst."""
    return inf if isnan(error) else error


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """By source, method and density asked for."""
    found: dict[tuple[str, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.source, row.method, row.asked].append(row)
    return dict(found)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with atomic_output(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Row)])
        writer.writeheader()
        for row in rows:
            plain = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in plain})


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each source, method and density; errors as geometric means."""
    return [
        {
            "source": source,
            "method": method,
            "asked": asked,
            "heads": len(some),
            "density": fmean(row.density for row in some),
            "error": mean_error(some),
            "worst": max((row.error for row in some), key=_place),
            "recall": fmean(row.recall for row in some),
            "planning_ms": 1e3 * fmean(row.planning for row in some),
            "call_ms": 1e3 * fmean(row.seconds for row in some),
        }
        for (source, method, asked), some in grouped(rows).items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Errors by method (down) and density (across), a block for each source, the best first."""
    lines = []
    by_place = grouped(rows)
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        asked = sorted({row.asked for row in own})
        lines.append(f"{source}, {len({row.head for row in own})} heads: error at density")
        lines.append(f"{'':12}" + "".join(f"{one:>9.2g}" for one in asked) + "   planning ms")
        means = {}
        for method in dict.fromkeys(row.method for row in own):
            cells = [by_place.get((source, method, one), []) for one in asked]
            shown = "".join(f"{mean_error(c):9.4f}" if c else f"{'-':>9}" for c in cells)
            every = [row for cell in cells for row in cell]
            planning = 1e3 * fmean(row.planning for row in every)
            means[method] = mean_error(every), f"{method:12}{shown}{planning:14.1f}"
        lines += [line for _, line in sorted(means.values(), key=lambda one: _place(one[0]))]
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[Row]) -> Path:
    """Error against density, both logarithmic, a panel for each source.

    Of many methods the best have colours and names, methods with the same errors one line.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    names = named(rows)

    sources = [*dict.fromkeys(row.source for row in rows)]
    with sheet(PAGE, 3.4 * -(-len(sources) // 2)) as figure:
        axes = figure.subplots(-(-len(sources) // 2), min(2, len(sources)), squeeze=False)
        for axis in axes.flat[len(sources) :]:
            axis.set_axis_off()
        for axis, source in zip(axes.flat, sources, strict=False):
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for (of, method, _), some in grouped(rows).items():
                if of == source:
                    place = fmean(row.density for row in some), mean_error(some)
                    lines[method].append(place)
            colours = cycle(COLOURS)
            for method, points in lines.items():
                style = {ORACLE: "--", RANDOM: ":"}.get(method, "-")
                look: dict[str, Any] = {"marker": "o", "ms": 3, "label": names.get(method)}
                if method in (ORACLE, RANDOM):
                    look |= {"color": "black", "lw": 1}
                elif method not in names:
                    look |= {"color": "0.8", "lw": 0.8, "ms": 1.5, "zorder": 0}
                elif not names[method]:
                    continue  # stands under the name of another
                else:
                    look["color"] = next(colours)
                axis.plot(*zip(*sorted(points), strict=True), style, **look)
            axis.set_ylim(
                bottom=FLOOR if min(p[1] for x in lines.values() for p in x) < FLOOR else None
            )
            axis.set(xscale="log", yscale="log", title=source)
            axis.set(xlabel="density (work kept)", ylabel="relative error")
            asked = sorted({row.asked for row in rows})
            axis.set_xticks(asked, [f"{one:g}" for one in asked])
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            for side in (axis.xaxis, axis.yaxis):
                side.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(lambda error, _: f"{error:g}")
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower left", ncols=6)
        return save(figure, path)


def named(rows: Sequence[Row]) -> dict[str, str]:
    """The methods that a picture names: `ORACLE`, `RANDOM`, and those of the least errors among
    all that read about as much as they were asked to; "" for one that does as another does. Few
    have their names whatever they read."""
    few = len({row.method for row in rows} - {ORACLE, RANDOM}) <= MOST_NAMES
    near = [row for row in rows if few or abs(row.density - row.asked) <= 0.15 * row.asked]
    errors: dict[str, list[float]] = defaultdict(list)
    for (_, method, _), some in grouped(near).items():
        errors[method].append(round(mean_error(some), 6))
    most = max(map(len, errors.values()), default=0)
    full = {m: tuple(of) for m, of in errors.items() if few or len(of) == most}
    alike: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for method in sorted(full, key=lambda m: fmean(map(log, full[m]))):
        if method not in (ORACLE, RANDOM):
            alike[full[method]].append(method)
    found = {ORACLE: ORACLE, RANDOM: RANDOM}
    for group in [*alike.values()][:MOST_NAMES]:
        found |= {group[0]: ", ".join(group)} | dict.fromkeys(group[1:], "")
    return found
