"""Patterns by their definitions, and attention that reads only what they hold, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.memory import Recall
from vidsparse.places import Places
from vidsparse.plan import BlockPlan, StepContext
from vidsparse.result import AttentionResult

RAGGED = TokenGrid(4, 5, 7, text_tokens=13)
"""Divided by nothing."""
BEFORE = TokenGrid(3, 5, 6, text_tokens=10, text_first=True, before=9)
"""Text, and rows of a history, in front."""
GRIDS = {"ragged": RAGGED, "before": BEFORE}
EXECUTORS = ("reference", "cpu")

Pairs = Callable[[tuple[int, int, int], tuple[int, int, int]], bool]
"""Whether a query at (frame, row, column) reads a key there."""


def random(grid: TokenGrid, heads: int = 2, seed: int = 0, depth: int = 16) -> list[Tensor]:
    """q, k, v [2, S, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 2, grid.tokens, heads, depth
    return [2 * torch.randn(sizes, generator=generator) for _ in range(3)]


def preset(name: str, *changes: str) -> SparseConfig:
    """With blocks of 16, of calls that are sparse from the first step on."""
    small = "schedule.min_tokens=0", "schedule.name=constant", "kernel.crossover=1"
    blocks = "kernel.block_q=32", "kernel.block_k=16"
    return SparseConfig.load(name, [*small, *blocks, *changes])


def call(
    config: SparseConfig,
    qkv: list[Tensor],
    grid: TokenGrid,
    impl: str = "reference",
    context: StepContext | None = None,
    recall: Recall | None = None,
) -> AttentionResult:
    """In float64 on the reference."""
    wide = [x.double() if impl == "reference" else x for x in qkv]
    return attend(*wide, grid=grid, config=config, impl=impl, context=context, recall=recall)


def places(grid: TokenGrid, config: SparseConfig) -> list[tuple[int, int, int] | None]:
    """Where the token at each position of the sequence stands; None: not in the video."""
    order, _ = token_order(grid, config.layout)
    found: list[tuple[int, int, int] | None] = []
    for index in (order - grid.video_start).tolist():
        inside = 0 <= index < grid.video_tokens
        frame, rest = divmod(index, grid.height * grid.width)
        found.append((frame, *divmod(rest, grid.width)) if inside else None)
    return found


def cuts(grid: TokenGrid, config: SparseConfig) -> tuple[Blocks, Blocks]:
    block_q = config.kernel.block_q
    assert isinstance(block_q, int)
    return Blocks.cut(grid, block_q), Blocks.cut(grid, config.kernel.block_k)


def block_map(grid: TokenGrid, config: SparseConfig, reads: Pairs) -> Tensor:
    """bool [nq, nk]: blocks with any pair of tokens that `reads`, and what is exact in any case."""
    where, (q_blocks, k_blocks) = places(grid, config), cuts(grid, config)
    pairs = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
    for t, query in enumerate(where):
        for u, key in enumerate(where):
            pairs[t, u] = query is not None and key is not None and reads(query, key)
    return blocks_of(pairs, q_blocks, k_blocks) | always(grid, config)


def always(grid: TokenGrid, config: SparseConfig) -> Tensor:
    """bool [nq, nk]: text, what is no video, and the block itself."""
    q_blocks, k_blocks = cuts(grid, config)
    outside = torch.tensor([place is None for place in places(grid, config)])
    tokens = torch.arange(grid.tokens)
    start = q_blocks.start[q_blocks.owner]  # of the block of each query
    end = (q_blocks.start + q_blocks.count)[q_blocks.owner]
    own = (tokens >= start[:, None]) & (tokens < end[:, None])
    return blocks_of(own | outside[:, None] | outside, q_blocks, k_blocks)


def stand(grid: TokenGrid, config: SparseConfig) -> Places:
    """What a pattern is given."""
    return Places(grid, token_order(grid, config.layout)[0], *cuts(grid, config))


def blocks_of(pairs: Tensor, q_blocks: Blocks, k_blocks: Blocks) -> Tensor:
    """bool [nq, nk]: blocks with any pair of tokens of a map [S, S]."""
    rows = [part.any(0) for part in pairs.split(q_blocks.count.tolist())]
    columns = torch.stack(rows).split(k_blocks.count.tolist(), 1)
    return torch.stack([part.any(1) for part in columns], 1)


def dense_on(qkv: list[Tensor], grid: TokenGrid, config: SparseConfig, blocks: Tensor) -> Tensor:
    """float64 [B, S, H, D] in raster order: softmax over the tokens of a map of blocks alone.

    blocks: bool [nq, nk], or [H, nq, nk], or [B, H, nq, nk], of blocks in layout order.
    """
    order, inverse = token_order(grid, config.layout)
    q_blocks, k_blocks = cuts(grid, config)
    q, k, v = (x.double()[:, order].transpose(1, 2) for x in qkv)
    mask = blocks[..., q_blocks.owner, :][..., k_blocks.owner]
    score = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return (score.softmax(-1) @ v).transpose(1, 2)[:, inverse]


def close(result: AttentionResult, wanted: Any, impl: str) -> None:
    """float64 on the reference, float32 elsewhere."""
    tolerance = 1e-9 if impl == "reference" else 2e-5
    assert result.plan is not None
    torch.testing.assert_close(result.out.double(), wanted, rtol=0, atol=tolerance)


def share(blocks: Tensor, grid: TokenGrid, config: SparseConfig) -> float:
    """Of all pairs of tokens, those in a map of blocks."""
    q_blocks, k_blocks = cuts(grid, config)
    return float(blocks[..., q_blocks.owner, :][..., k_blocks.owner].double().mean())


def moved(x: Tensor, order: Tensor) -> Tensor:
    """float64 [B, H, S, D] in an order of every head."""
    x = x.double().transpose(1, 2)
    return x.gather(2, order.unsqueeze(-1).expand(x.shape))


def means(x: Tensor, counts: Tensor) -> Tensor:
    return torch.stack([part.mean(2) for part in x.split(counts.tolist(), 2)], 2)


def top_p(plan: BlockPlan, q: Tensor, k: Tensor, forced: Tensor, p: float) -> Tensor:
    """bool [B, H, nq, nk]: forced blocks, then others by falling mass until p is reached."""
    logits = means(q, plan.q_blocks.count) @ means(k, plan.k_blocks.count).mT / q.shape[-1] ** 0.5
    mass = (logits + plan.k_blocks.count.log()).softmax(-1)
    rank = (mass + 2 * forced).argsort(-1, descending=True)
    ordered = mass.gather(-1, rank)
    wanted = ordered.cumsum(-1) - ordered < p
    return torch.zeros_like(wanted).scatter_(-1, rank, wanted) | forced


def reads(result: AttentionResult, qkv: list[Tensor], kept: Tensor, impl: str) -> None:
    """The output is attention over the kept blocks of the plan's orders alone."""
    plan = result.plan
    assert plan is not None and plan.order_q is not None and plan.order_k is not None
    q, k, v = (moved(x, o) for x, o in zip(qkv, (plan.order_q, *[plan.order_k] * 2), strict=True))
    mask = kept[..., plan.q_blocks.owner, :][..., plan.k_blocks.owner]
    score = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    out = torch.empty_like(q)
    out.scatter_(2, plan.order_q.unsqueeze(-1).expand(q.shape), score.softmax(-1) @ v)
    close(result, out.transpose(1, 2), impl)
