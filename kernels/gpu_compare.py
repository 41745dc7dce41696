"""One comparison with an oracle on a GPU, and the random tokens and plans that it takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import nan

import torch
from gpu_cases import QKV, name_of
from gpu_results import Check, Machine, facts, in_words

from vidsparse.plan import SKIP, BlockPlan, Blocks, TokenGrid

LIMITS = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 of the output."""

GRIDS = {
    "ragged": TokenGrid(2, 9, 13, 41),
    "text first": TokenGrid(2, 9, 13, 41, True),
    "no text": TokenGrid(1, 1, 337),
    "one token": TokenGrid(1, 1, 1),
}

Act = Callable[[], float]


def compare(name: str, shape: str, dtype: torch.dtype, impl: str, limit: float, act: Act) -> Check:
    """Run a comparison; an exception is a verdict too."""
    error, message = nan, ""
    try:
        with poisoned():
            error = act()
    except Exception as caught:
        message = in_words(caught)
    verdict = "right" if error <= limit else "failed" if message else "wrong"
    kept = float(f"{error:.3e}")
    return Check(**facts(), check=name, shape=shape, dtype=name_of(dtype), impl=impl, error=kept,
                 limit=limit, verdict=verdict, message=message)  # fmt: skip


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
