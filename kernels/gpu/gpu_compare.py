"""One comparison with an oracle on a GPU, and the random tokens and plans that it takes."""

from __future__ import annotations

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
from vidsparse.plan import SKIP, BlockPlan

LIMITS = {getattr(torch, name): limit for name, limit in gpu_rows.LIMITS.items()}
"""Relative L2 of the output."""

GRIDS = {
    "ragged": TokenGrid(2, 9, 13, 41),
    "text first": TokenGrid(2, 9, 13, 41, True),
    "no text": TokenGrid(1, 1, 337),
    "one token": TokenGrid(1, 1, 1),
}

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
    rank: int = 2,
    seconds: float = 4.0,
) -> Unit:
    """The unit of a comparison. act makes its own inputs: what fails there is its own failure."""
    blank = Check(**facts(), check=name, shape=shape, dtype=name_of(dtype), impl=impl, limit=limit)
    title = f"check: {name}; {shape}, {name_of(dtype)}, {impl}"

    def run() -> Iterator[Check]:
        seed(title)
        message = ""
        try:
            with poisoned():
                found = act()
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

    return Unit(title, blank, run, "gpu_checks", family or impl, rank, seconds)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN."""
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
    """Random levels, "mixed" over all or "exact" ones, with an empty and a full row."""
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
    if rest == "skip":
        return plan
    return plan.with_rest(k_blocks.levels, "global" if rest == "global" else "none")


def density_of(plan: BlockPlan) -> float:
    """Kept work of a plan, the mean of its heads."""
    return float(plan.density.mean())
