"""Tables made of the rows of the suite: every engine, the stages, what they stand against."""

from __future__ import annotations

from math import nan
from typing import Any

from gpu_rows import YARDSTICKS, Result

OTHERS = (*YARDSTICKS, "triton", "torch", "triton-int8", "triton-levels")
"""What a row is of, if not of an exact engine."""

STAGES = ("sparse", "pool", "draft", "select", "rest", "whole")
APART = ("pack", "summarise", "rest, none", "rest, row", "fill", "quantise")
"""Stages that are parts of others, or of other calls."""

Place = tuple[str, float]
"""Shape and density."""


def timed(rows: list[Result]) -> list[Result]:
    """Those that ran."""
    return [row for row in rows if row.ms_p50 is not None]


def engines(rows: list[Result], stage: str) -> list[Result]:
    """Rows of exact engines in a stage, without what is wrong with them; the fastest first."""
    own = [r for r in timed(rows) if r.impl not in OTHERS and r.stage == stage and not r.message]
    return sorted(own, key=lambda row: row.ms_p50 or nan)


def fastest(rows: list[Result], stage: str) -> dict[Place, Result]:
    """(shape, density) -> the row of the fastest engine."""
    best: dict[Place, Result] = {}
    for row in engines(rows, stage):
        best.setdefault((row.shape, row.density), row)
    return best


def speeds(rows: list[Result]) -> list[dict[str, Any]]:
    """One line per shape, density, engine and blocks; a speed stands beside its error."""
    at = {(*key(row), row.stage): row for row in timed(rows) if row.impl not in OTHERS}
    lines = []
    for one in sorted({place[:4] for place in at}):
        sparse, whole = at.get((*one, "sparse")), at.get((*one, "whole"))
        raster, any_row = at.get((*one, "raster")), sparse or whole
        if any_row is None:
            continue
        lines.append({
            "shape": one[0], "density": one[1], "engine": one[2], "blocks": one[3],
            "sparse ms": sparse and sparse.ms_p50, "TFLOP/s": sparse and sparse.tflops,
            "x dense": sparse and sparse.speedup_vs_dense, "dense": any_row.dense_impl,
            "whole ms": whole and whole.ms_p50, "whole x": whole and whole.speedup_vs_dense,
            "raster ms": raster and raster.ms_p50,
            "rel L2": sparse and sparse.rel_l2, "whole L2": whole and whole.rel_l2,
        })  # fmt: skip
    return lines


def key(row: Result) -> tuple[str, float, str, str]:
    return row.shape, row.density, row.impl, row.blocks


def stages(rows: list[Result]) -> list[dict[str, Any]]:
    """One line per shape and density: ms of every stage, in brackets as part of "sparse".

    other: what "whole" takes beyond the sum of the stages, of the fastest engine each.
    """
    at = {(r.shape, r.density, r.stage): r.ms_p50 or nan for r in timed(rows) if r.impl == "triton"}
    places = sorted({place[:2] for place in at})
    for stage in ("sparse", "whole"):
        best = fastest(rows, stage)
        at |= {(*place, stage): row.ms_p50 or nan for place, row in best.items()}
    lines = []
    for place in places:
        line: dict[str, Any] = {"shape": place[0], "density": place[1]}
        sparse = at.get((*place, "sparse"), nan)
        for stage in (*STAGES, *APART):
            ms = at.get((*place, stage))
            line[stage] = None if ms is None else share(ms, sparse)
        known = sum(at.get((*place, stage), nan) for stage in STAGES[:-1])
        other = at.get((*place, "whole"), nan) - known
        line["other"] = None if other != other else share(other, sparse)
        lines.append(line)
    return lines


def share(ms: float, sparse: float) -> str:
    """ms, and in brackets as part of the exact tiles, if that was timed."""
    return f"{ms:.3g}" + (f" ({ms / sparse:.1%})" if sparse == sparse else "")


def background(rows: list[Result]) -> list[str]:
    """A line per shape: dense attention, FlexAttention, the permutation that hoisting saves."""
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        own = [row for row in timed(rows) if row.shape == shape]
        known = [f"{r.impl} {r.ms_p50:.4g} ms ({r.tflops:.0f} TFLOP/s)" for r in own
                 if r.impl in YARDSTICKS and r.density == 1 and r.tflops is not None]  # fmt: skip
        known += [f"{r.impl} at density {r.density:g} {r.ms_p50:.4g} ms" for r in own
                  if r.impl in ("flex", "triton-int8")]  # fmt: skip
        known += [f"permute {r.ms_p50:.3g} ms" for r in own
                  if (r.impl, r.stage) == ("torch", "permute")]  # fmt: skip
        if known:
            lines.append(f"{shape}: {', '.join(known)}")
    return lines
