"""One comparison with an oracle on a GPU, and the random tokens and plans that it takes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf

import gpu_rows
import torch
from gpu_cases import QKV, name_of
from gpu_results import Machine, facts, seed
from gpu_rows import Check
from gpu_units import Unit

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP, BlockPlan, FirstOrder

LIMITS = {getattr(torch, name): limit for name, limit in gpu_rows.LIMITS.items()}
"""Relative L2 of the output."""

GRIDS = {
    "ragged": TokenGrid(2, 9, 13, 41),
    "text first": TokenGrid(2, 9, 13, 41, True),
    "no text": TokenGrid(1, 1, 337),
    "one token": TokenGrid(1, 1, 1),
}

RAW_MEMORY = "VIDSPARSE_RAW_MEMORY"

Act = Callable[[], float | tuple[float, float]]
"""An error, or the error and the density of the plan; raises `Wrong`."""


class Wrong(Exception):
    """A result that is wrong in a way that its error does not show."""


def check(
    name: str,
    shape: str,
    dtype: torch.dtype,
    impl: str,
    limit: float,
    act: Act,
    *,
    family: str = "",
    seconds: float = 1.0,
    process: str = "",
) -> Unit:
    """The unit of a comparison. act makes its own inputs: what fails there is its own failure.

    An act that raises `Absent` is a row with the reason, and no failure.
    """
    blank = Check(**facts(), check=name, shape=shape, dtype=name_of(dtype), impl=impl, limit=limit)
    title = f"check: {name}; {shape}, {name_of(dtype)}, {impl}"

    def run() -> Iterator[Check]:
        seed(title)
        message = ""
        try:
            with poisoned():
                found = act()
        except Absent as absent:
            yield replace(blank, verdict="absent", message=str(absent))
            return
        except Wrong as wrong:
            found, message = inf, str(wrong)
        error, density = found if isinstance(found, tuple) else (found, None)
        yield replace(
            blank,
            error=float(f"{error:.3e}"),
            density=None if density is None else round(density, 4),
            verdict="right" if error <= limit else "wrong",
            message=message,
        )

    return Unit(title, blank, run, "gpu_checks", family or impl, seconds,
                process=process)  # fmt: skip


class Absent(Exception):
    """What was to be checked does not run on this machine."""


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, unless RAW_MEMORY is set: then a tool looks for what is not written."""
    if os.environ.get(RAW_MEMORY):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def tokens(
    machine: Machine, plan: BlockPlan, depth: int, dtype: torch.dtype, kind: str = "random"
) -> QKV:
    """Views of [B, S, H, D] memory.

    "structured": neighbours are alike, and scores rise along the sequence.
    """
    batch, heads = plan.levels.shape[:2]
    sizes = batch, plan.q_blocks.tokens, heads, depth
    q, k, v = (torch.randn(sizes, device=machine.device) for _ in range(3))
    if kind == "structured":
        coarse = torch.randn(batch, sizes[1] // 8 + 1, heads, depth, device=machine.device)
        k = k * 0.3 + coarse.repeat_interleave(8, 1)[:, : sizes[1]]
        way = torch.nn.functional.normalize(torch.randn(depth, device=machine.device), dim=0)
        q = q * 0.5 + 3 * way
        k = k + torch.linspace(0, 40, sizes[1], device=machine.device)[:, None, None] * way
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def level_plan(
    machine: Machine, grid: str, sizes: tuple[int, int], kind: str, rest: str, batch: int = 1
) -> BlockPlan:
    """Random levels, "mixed" over all or "exact" ones, with an empty and a full row.

    rest: skip | centroid | tilt (centroids with a bias) | global | row (with a first-order term).
    """
    q_blocks, k_blocks = (Blocks.cut(GRIDS[grid], size) for size in sizes)
    shape = (batch, 2, len(q_blocks), len(k_blocks))
    levels = torch.randint(SKIP, k_blocks.levels + 1, shape)
    if kind == "exact":
        levels = torch.where(torch.rand(shape) < 0.3, 0, SKIP)
    levels[0, -1, -1] = 0
    levels[0, 0, 0] = SKIP
    levels = levels.to(machine.device, torch.int8)
    listed = (0,) if kind == "exact" else tuple(range(k_blocks.levels + 1))
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks, listed)
    return rested(plan, rest)


def rested(plan: BlockPlan, rest: str) -> BlockPlan:
    """With a rest of `level_plan`."""
    if rest == "skip":
        return plan
    levels, bias = plan.levels, None
    if rest == "tilt":
        bias = torch.randn(levels.shape, device=levels.device)
        bias = bias.masked_fill(torch.rand(levels.shape, device=levels.device) < 0.1, -inf)
    first_order: FirstOrder = "global" if rest == "global" else "row" if rest == "row" else "none"
    return plan.with_rest(plan.k_blocks.levels, first_order, bias)


def density_of(plan: BlockPlan) -> float:
    """Kept work of a plan, the mean of its heads."""
    return float(plan.density.mean())
