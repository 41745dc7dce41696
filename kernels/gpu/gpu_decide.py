"""The last lines of a report: targets against figures, the fastest engines, lines to paste."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from gpu_rows import Check, Result, fault
from gpu_tables import engines, fastest, timed

from vidsparse import forms

SHAPE = "wan2.1-14b-720p"
"""Of all targets."""

DENSITIES = (0.1, 0.2, 1.0)
"""Of the table of that shape."""

PREFERENCE = (0.1, 0.2)
"""Densities whose whole calls decide which engine is asked first."""

AROUND = ("pool", "draft", "select", "rest")
"""Stages around the exact tiles, which are their overhead."""

TABLES = {forms.way("pointer"): ("exact/triton.py", "POINTER", "({major}, {width})"),
          forms.way("tma"): ("exact/triton.py", "TMA", "({major}, {width})"),
          f"{forms.way('tma')}-64": ("exact/triton.py", "TMA_64", "{major}"),
          "triton-rest": ("rest_merge.py", "TILINGS", "({major}, {minor})"),
          "triton-levels": ("levels_forward.py", "TILINGS", "({major}, {width})")}  # fmt: skip
"""What is tuned -> its file and table of tilings, and a key of it."""

MOST = 15
"""Lines of a decision."""

NAMED = 3
"""Engines, or wrong checks, that a line names."""


@dataclass(frozen=True)
class Target:
    """figure: a name of `figures`. bound: the least that it should be; most: the most."""

    about: str
    density: float
    figure: str
    bound: float
    most: bool = False


TARGETS = (
    Target("exact tiles against dense", 1.0, "sparse", 0.85),
    Target("whole call against dense", 0.2, "whole", 4.0),
    Target("whole call against dense", 0.1, "whole", 7.5),
    Target("exact tiles against FlexAttention, same mask", 0.2, "flex", 1.3),
    Target("8-bit against exact tiles, same mask", 0.2, "int8", 1.1),
    Target("stages around the tiles against the tiles", 0.1, "overhead", 0.15, most=True),
)
"""What a kernel of this shape is expected to reach on an H100, from instructions and bytes alone.

Exact tiles and overhead: a loop of 242 instructions for 64 keys (with warps that specialise) beside
1,024 cycles of tensor cores, 3.4 ms around 25. Whole calls: these two, at densities 0.1 and 0.2.
FlexAttention: the same tile by the same compiler, with a mask in its loop. 8-bit: a quarter of the
tensor cycles goes, but the instructions around them stay, which leaves 1.12 at most; below 1.1
there is nothing to pay for its error of 1e-2.
"""


def decision(
    checks: list[Check], bench: list[Result], tuned: list[Result], gpu: str, shape: str = SHAPE
) -> list[str]:
    """At most `MOST` lines. gpu: as in `Facts`."""
    lines = [line(target, bench, shape) for target in TARGETS]
    lines += [order(bench, density, shape) for density in DENSITIES]
    lines += [judgement(checks, bench), preference(checks, bench, shape)]
    return [*lines, *tilings(tuned, gpu)][:MOST]


def line(target: Target, bench: list[Result], shape: str) -> str:
    """A target against its figure."""
    what = f"{target.about}, d {target.density:g}"
    wanted = f"wanted at {'most' if target.most else 'least'} {target.bound:g}"
    found = figure(target.figure, bench, shape, target.density)
    if found is None:
        return f"target open: {what}: no figure, {wanted}"
    value, of = found
    met = value <= target.bound if target.most else value >= target.bound
    return f"target {'met' if met else 'MISSED'}: {what}: {value:.3g} ({of}), {wanted}"


def figure(name: str, bench: list[Result], shape: str, density: float) -> tuple[float, str] | None:
    """The figure of a target, and in words what it is of: engine, baseline, times."""
    place = shape, density
    own = [row for row in timed(bench) if (row.shape, row.density) == place]
    if name in ("sparse", "whole"):
        row = fastest(bench, name).get(place)
        if row is None or row.speedup_vs_dense is None:
            return None
        return row.speedup_vs_dense, f"{named(row)} {row.ms_p50:.4g} ms, baseline {row.dense_impl}"
    if name == "overhead":
        ours = fastest(bench, "sparse").get(place)
        parts = [r.ms_p50 for r in own if r.impl == "triton" and r.stage in AROUND]
        if ours is None or len(parts) < len(AROUND):
            return None
        around = sum(ms for ms in parts if ms is not None)
        return around / (ours.ms_p50 or 1), f"{around:.3g} ms, baseline {named(ours)}"
    impl = {"flex": "flex", "int8": "triton-int8"}[name]
    other = next((r for r in own if r.impl == impl and r.stage == "sparse"), None)
    same = [r for r in engines(own, "sparse") if other is not None and r.blocks == other.blocks]
    if other is None or not same:
        return None
    ours, theirs = same[0].ms_p50 or 1, other.ms_p50 or 1
    if name == "flex":
        return theirs / ours, f"{named(same[0])} {ours:.4g} ms, baseline flex {theirs:.4g} ms"
    return ours / theirs, f"8-bit {theirs:.4g} ms, baseline {named(same[0])} {ours:.4g} ms"


def named(row: Result) -> str:
    return f"{row.impl} {row.blocks}"


def order(bench: list[Result], density: float, shape: str) -> str:
    """The fastest engines at a density: of whole calls, at density 1 of the tiles alone."""
    stage = "sparse" if density == 1 else "whole"
    own = [r for r in engines(bench, stage) if (r.shape, r.density) == (shape, density)]
    shown = [f"{named(r)} {r.ms_p50:.4g} ms ({r.speedup_vs_dense}x {r.dense_impl}, "
             f"error {r.rel_l2:.1e})" for r in own if r.rel_l2 is not None]  # fmt: skip
    return f"fastest at d {density:g}, {stage}: {', '.join(shown[:NAMED]) or 'no figure'}"


def judgement(checks: list[Check], bench: list[Result]) -> str:
    """How many checks are right, which are not, which engines are not here."""
    counts = Counter(check.verdict for check in checks)
    bad = [f"{c.check} ({c.impl}, {c.shape}, {c.dtype})" for c in checks if fault(c)]
    bad += [f"{r.stage} ({named(r)}, {r.shape}, d {r.density:g})" for r in bench if fault(r)]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    wrong = f": {'; '.join(bad[:NAMED])}{more}" if bad else ""
    absent = [c.impl for c in checks if c.verdict == "absent" and c.check == "engine runs here"]
    not_here = f"; not here: {', '.join(absent)}" if absent else ""
    return f"checks: {counts['right']} right, wrong or failed {len(bad)}{wrong}{not_here}"


def preference(checks: list[Check], bench: list[Result], shape: str) -> str:
    """The line for exact.PREFERRED: engines whose results are right, the fastest first."""
    wrong = {row.impl for row in (*checks, *bench) if fault(row)}
    best: dict[str, tuple[float, str, str]] = {}
    rows = [r for r in engines(bench, "whole") if r.shape == shape and r.impl not in wrong]
    for impl, blocks in dict.fromkeys((r.impl, r.blocks) for r in rows):
        times = [r.ms_p50 or 0.0 for r in rows if (r.impl, r.blocks) == (impl, blocks)
                 and r.density in PREFERENCE]  # fmt: skip
        name, _, form = impl.partition("-")
        found = prod(times) ** 0.5, form, blocks
        if len(times) == len(PREFERENCE):
            best[name] = min(found, best.get(name, found))
    if not best:
        return "PREFERRED: no engine has right figures of whole calls at d 0.1 and 0.2"
    names = sorted(best, key=lambda name: best[name])
    how = [f"{n} {' '.join(filter(None, best[n][1:]))} {best[n][0]:.4g} ms" for n in names]
    listed = ", ".join(f'"{name}"' for name in names)
    comma = "," if len(names) == 1 else ""
    return f"PREFERRED = ({listed}{comma})  # exact/__init__.py; {'; '.join(how)}"


def tilings(tuned: list[Result], gpu: str) -> Iterator[str]:
    """Per file the entries of the fastest in its tables of tilings."""
    major, minor = match.groups() if (match := re.search(r"sm_(\d+)(\d)$", gpu)) else "??"
    best: dict[tuple[str, str], Result] = {}
    for row in sorted(timed(tuned), key=lambda row: row.ms_p50 or 0):
        if row.dtype == "bfloat16" and row.impl in TABLES and not fault(row):
            label, key = row.stage.partition(",")[0], TABLES[row.impl][2]
            width = 64 if row.head_dim <= 64 else 128
            keys = label.split(" ")[0].split("x")[1]
            where = key.format(major=major, minor=minor, width=width, keys=keys)
            best.setdefault((row.impl, where), row)
    said: dict[str, list[str]] = {}
    for impl, (file, table, _) in TABLES.items():
        entries = [f"{where}: Tiling({arguments(row.stage.partition(',')[0])})"
                   for (name, where), row in sorted(best.items()) if name == impl]  # fmt: skip
        if entries:
            said.setdefault(file, []).append(f"{table} {', '.join(entries)}")
    for file, tables in said.items():
        yield f"{file}: {'; '.join(tables)}"


def arguments(label: str) -> str:
    """Of `Tiling`, from a label such as "128x64 w8 s2 r128"."""
    sizes, *others = label.split(" ")
    return ", ".join([*sizes.split("x"), *(word[1:] for word in others)])
