"""Shapes, inputs and plans of the GPU suite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP, BlockPlan

if TYPE_CHECKING:
    from vidsparse.config import SparseConfig

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values [B, H, S, D]."""

PRESET = "tiles"
"""Whose method is measured."""

SIZES = ((128, 64), (128, 128))
"""Tokens of a query and of a key block that engines are compared at; the first is the presets'."""


@dataclass(frozen=True)
class Shape:
    """Self-attention of one layer of a model, batch 1."""

    name: str
    grid: TokenGrid
    heads: int
    head_dim: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan2.1-14b-720p", TokenGrid(21, 45, 80), 40, 128),
        Shape("wan2.1-1.3b-480p", TokenGrid(21, 30, 52), 12, 128),
        Shape("hunyuanvideo-720p", TokenGrid(33, 45, 80, 256), 24, 128),
        Shape("cogvideox-5b", TokenGrid(13, 30, 45, 226, True), 48, 64),
    )
}
TINY = Shape("tiny", TokenGrid(1, 11, 13, 20), 2, 64)
"""Of a dry run."""


def random_qkv(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> QKV:
    """Views of [1, S, H, D] as a model gives them; the same every time."""
    generator = torch.Generator(device).manual_seed(shape.grid.tokens + shape.head_dim)
    sizes = (1, shape.grid.tokens, shape.heads, shape.head_dim)
    q, k, v = (
        torch.randn(sizes, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    return q, k, v


def method(
    density: float, sizes: tuple[int, int] = SIZES[0], preset: str = PRESET, **changes: str
) -> SparseConfig:
    """A preset's method at one density in every call. changes: section__key="value"."""
    from vidsparse.config import SparseConfig

    given = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    fixed = ["schedule.name=constant", f"schedule.density={density}", "schedule.min_tokens=0"]
    kernel = [f"kernel.block_q={sizes[0]}", f"kernel.block_k={sizes[1]}", "kernel.impl=triton"]
    return SparseConfig.load(preset, [*fixed, *kernel, *given])


def exact_plan(
    shape: Shape, density: float, sizes: tuple[int, int], device: torch.device, coherent: bool
) -> BlockPlan:
    """Exact blocks, equally many per row: random ones, or those around the diagonal."""
    q_blocks, k_blocks = (Blocks.cut(shape.grid, size) for size in sizes)
    nq, nk = len(q_blocks), len(k_blocks)
    keep = max(1, round(density * nk))
    if coherent:
        rows = torch.arange(nq, device=device)
        first = (rows * nk // nq - keep // 2).clamp(0, nk - keep)[:, None]
        columns = torch.arange(nk, device=device)
        wanted = ((columns >= first) & (columns < first + keep)).expand(1, shape.heads, nq, nk)
    else:
        generator = torch.Generator(device).manual_seed(nk)
        drawn = torch.rand(1, shape.heads, nq, nk, generator=generator, device=device)
        wanted = torch.zeros_like(drawn, dtype=torch.bool)
        wanted.scatter_(-1, drawn.topk(keep, -1).indices, True)
    levels = torch.where(wanted, 0, SKIP).to(torch.int8)
    return BlockPlan.from_levels(levels, q_blocks, k_blocks, (0,))


def work(plan: BlockPlan, head_dim: int) -> float:
    """TFLOP that a plan asks for."""
    batch, heads = plan.levels.shape[:2]
    pairs = plan.q_blocks.tokens * plan.k_blocks.tokens * batch * heads
    return 4 * pairs * head_dim * float(plan.density.mean()) / 1e12


def full_blocks(plan: BlockPlan) -> BlockPlan:
    """The plan without its rest and its short blocks: what an exact engine reads of it."""
    short = (plan.k_blocks.count < plan.k_blocks.size).to(plan.levels.device)
    return replace(plan.with_rest(SKIP), levels=plan.levels.masked_fill(short, SKIP))


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" and so on."""
    return str(dtype).removeprefix("torch.")
