"""Shapes, inputs, plans and prepared operands of the GPU scripts, and errors on sampled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine
from vidsparse.kernels.gpu.operands import Keys, QueryRows, Scales, TileLists, Tiling
from vidsparse.kernels.gpu.operator import sparse_forward
from vidsparse.plan import SKIP, BlockPlan

if TYPE_CHECKING:
    from vidsparse.config import SparseConfig

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values [B, H, S, D]."""

DENSITIES = (0.1, 0.2, 1.0, 0.3, 0.05, 0.5)
"""The most important first."""


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


def method(density: float, **changes: str) -> SparseConfig:
    """The default method at one density in every call. changes: section__key="value"."""
    from vidsparse.config import SparseConfig

    given = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    fixed = ["schedule.name=constant", f"schedule.density={density}", "schedule.min_tokens=0"]
    kernel = ["kernel.impl=triton", "kernel.block_q=128"]
    return SparseConfig.load("balanced", [*fixed, *kernel, *given])


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


@dataclass(frozen=True)
class Operands:
    """A plan ready for the sparse forward in one form, and its outputs."""

    q: Tensor
    keys: Keys
    lists: TileLists
    rows: QueryRows
    shape: Tiling
    form: str
    out: Tensor
    lse: Tensor
    rest: Tensor | None
    scales: Scales | None

    def forward(self) -> Tensor:
        """Run the kernel; the output."""
        operands = self.q, self.keys, self.lists, self.rows, self.shape
        outputs = self.out, self.lse, self.rest
        sparse_forward(*operands, *outputs, self.scales, form=self.form)
        return self.out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    form: str,
    shape: Tiling | None = None,
    int8: bool = False,
) -> Operands:
    """Operands of a plan, outputs full of NaN. shape None: the one that is shipped for the form."""
    shape = shape or engine.tiling_for(q, plan, form)
    layout = engine.layout_for(plan, shape.block_n, q.device)
    keys = engine.fill(k, v, layout)
    lists = engine.lists_for(plan, layout, shape.block_n)
    rows = engine.query_rows(plan.q_blocks, q.device)
    out = torch.full_like(q.transpose(1, 2), float("nan"), dtype=v.dtype).transpose(1, 2)
    lse = torch.full(q.shape[:3], float("nan"), device=q.device)
    rest = torch.full_like(lse, float("nan")) if plan.first_order == "global" else None
    scales = None
    if int8:
        from vidsparse.kernels.gpu.quant import int8_operands

        q, keys, scales = int8_operands(q, keys, rows, shape)
    return Operands(q, keys, lists, rows, shape, form, out, lse, rest, scales)


def sampled_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: BlockPlan, blocks: int = 3
) -> float:
    """Relative L2 error of out against the reference in float64, on some query blocks and heads."""
    heads = sorted({0, q.shape[1] // 2, q.shape[1] - 1})
    rows = torch.linspace(0, len(plan.q_blocks) - 1, blocks).long().unique()
    tokens, part = sub_plan(plan, heads, rows)
    tokens = tokens.to(q.device)
    off = norm = 0.0
    for n, head in enumerate(heads):
        one = BlockPlan(part.levels[:, n : n + 1], *_cuts(part), part.listed)
        one = one.with_rest(part.rest, part.first_order)
        few = q[:, head : head + 1, tokens].double()
        keys, values = (x[:, head : head + 1].double() for x in (k, v))
        want, _ = reference.execute(few, keys, values, one, return_lse=False)
        off += float((out[:, head : head + 1, tokens].double() - want).square().sum())
        norm += float(want.square().sum())
    return (off / norm) ** 0.5 if norm else off**0.5


def sub_plan(plan: BlockPlan, heads: list[int], rows: Tensor) -> tuple[Tensor, BlockPlan]:
    """The plan of some heads and query blocks alone, and the tokens [n] of these blocks."""
    blocks = plan.q_blocks
    start, count = blocks.start[rows], blocks.count[rows]
    tokens = [torch.arange(int(s), int(s + n)) for s, n in zip(start, count, strict=True)]
    cut = Blocks(count.cumsum(0) - count, count, blocks.text[rows], blocks.size)
    levels = plan.levels[:, heads][:, :, rows.to(plan.levels.device)]
    part = BlockPlan(levels, cut, plan.k_blocks, plan.listed)
    return torch.cat(tokens), part.with_rest(plan.rest, plan.first_order)


def _cuts(plan: BlockPlan) -> tuple[Blocks, Blocks]:
    return plan.q_blocks, plan.k_blocks


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" and so on."""
    return str(dtype).removeprefix("torch.")
