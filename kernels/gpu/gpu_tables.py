"""Tables made of the rows of the bench: what counts, the stages, and what they stand against."""

from __future__ import annotations

from math import nan
from typing import Any

from gpu_rows import Result

STAGES = ("sparse", "pool", "draft", "select", "lists", "fill", "compensate", "whole")


def timed(rows: list[Result]) -> list[Result]:
    """Those that ran."""
    return [row for row in rows if row.ms_p50 is not None and not row.message]


def best_of(rows: list[Result], stage: str, int8: bool = False) -> dict[tuple[str, float], Result]:
    """(shape, density) -> row of the form that is fastest in a stage."""
    best: dict[tuple[str, float], Result] = {}
    for row in timed(rows):
        key = row.shape, row.density
        ours = row.impl.startswith("triton-") and row.impl.endswith("-int8") == int8
        if ours and row.stage == stage and (key not in best or row.ms_p50 < best[key].ms_p50):
            best[key] = row
    return best


def summary(rows: list[Result]) -> list[dict[str, Any]]:
    """One line per shape and density of what counts, in the fastest form."""
    lines = []
    rows = timed(rows)
    whole, small = best_of(rows, "whole"), best_of(rows, "sparse", int8=True)
    raster = best_of(rows, "raster")
    flex = {(r.shape, r.density): r.ms_p50 for r in rows if r.impl == "flex"}
    stage = {(r.shape, r.density, r.stage): r.ms_p50 for r in rows if r.impl == "triton"}
    for key, sparse in sorted(best_of(rows, "sparse").items()):
        around = sum(stage.get((*key, s), nan) for s in ("pool", "draft", "select", "compensate"))
        lines.append({
            "shape": sparse.shape, "density": sparse.density, "form": sparse.impl[7:],
            "sparse ms": sparse.ms_p50, "TFLOP/s": sparse.tflops,
            "x dense": sparse.speedup_vs_dense, "dense": sparse.dense_impl,
            "whole ms": whole[key].ms_p50 if key in whole else nan,
            "whole x dense": whole[key].speedup_vs_dense if key in whole else nan,
            "raster ms": raster[key].ms_p50 if key in raster else nan,
            "x flex": flex.get(key, nan) / sparse.ms_p50,
            "x int8": sparse.ms_p50 / small[key].ms_p50 if key in small else nan,
            "overhead": around / sparse.ms_p50, "rel L2": sparse.rel_l2,
            "whole L2": whole[key].rel_l2 if key in whole else nan,
        })  # fmt: skip
    return lines


def stages(rows: list[Result]) -> list[dict[str, Any]]:
    """One line per shape and density: ms of every stage, in brackets as part of "sparse".

    other: what "whole" takes beyond the sum of the stages.
    """
    rows = timed(rows)
    at = {(r.shape, r.density, r.stage): r.ms_p50 for r in rows if r.impl == "triton"}
    for stage in ("sparse", "whole"):
        at |= {(*key, stage): row.ms_p50 for key, row in best_of(rows, stage).items()}
    lines = []
    for shape, density in sorted({(r.shape, r.density) for r in rows if r.stage == "fill"}):
        line: dict[str, Any] = {"shape": shape, "density": density}
        sparse = at.get((shape, density, "sparse"), nan)
        for stage in STAGES:
            ms = at.get((shape, density, stage))
            line[stage] = None if ms is None else share(ms, sparse)
        known = sum(at.get((shape, density, stage), nan) for stage in STAGES[:-1])
        other = at.get((shape, density, "whole"), nan) - known
        line["other"] = None if other != other else share(other, sparse)
        lines.append(line)
    return lines


def share(ms: float, sparse: float) -> str:
    """ms, and in brackets as part of the sparse forward, if that was timed."""
    return f"{ms:.3g}" + (f" ({ms / sparse:.1%})" if sparse == sparse else "")


def background(rows: list[Result]) -> list[str]:
    """A line per shape: dense attention, the permutation that hoisting saves, quantisation."""
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        own = [row for row in timed(rows) if row.shape == shape]
        known = [f"{r.impl} {r.ms_p50:.4g} ms ({r.tflops:.0f} TFLOP/s)" for r in own
                 if r.density == 1 and r.stage == "whole" and r.tflops]  # fmt: skip
        known += [f"permute {r.ms_p50:.3g} ms" for r in own
                  if (r.impl, r.stage) == ("torch", "permute")]  # fmt: skip
        known += [f"quantise {r.ms_p50:.3g} ms" for r in own if r.stage == "quantise"][:1]
        lines.append(f"{shape}: {', '.join(known)}")
    return lines
