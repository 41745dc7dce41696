"""Plans of several levels, and products in 8 bits: a key buffer and lists with bits.

The buffer holds, for every level in use, block_k >> level rows per key block whatever its true
length, so a block may be short anywhere; rows without a token are zero and have bias -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import levels_forward, quant, support
from vidsparse.kernels.gpu.levels_lists import Segment, pack_lists
from vidsparse.kernels.gpu.operands import Keys, QueryRows, TileLists, Tiling, padded_width
from vidsparse.kernels.gpu.pool import ABSENT, fill_keys
from vidsparse.plan import BlockPlan


@dataclass(frozen=True)
class KeyLayout:
    """Where the tokens of a cut stand in the key buffer; levels in use only, 0 always.

    first: first row of each level; rows: length of the buffer; start int64 [nk], count int32 [nk]:
    tokens of the blocks; bias: float32 [rows], log2 of the tokens behind a row.
    """

    blocks: Blocks
    first: dict[int, int]
    rows: int
    start: Tensor
    count: Tensor
    bias: Tensor


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    rows: QueryRows,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    qk: str,
) -> None:
    """Write out and lse of the listed blocks. rows: of q, order: of k and v; qk: native or int8."""
    shape = tiling_for(q, plan)
    layout = layout_for(plan, shape.block_n, q.device)
    keys = fill(k, v, layout, order)
    lists = lists_for(plan, layout, shape.block_n)
    scales, queries = None, q
    if qk == "int8":
        queries, keys, scales = quant.int8_operands(q, keys, rows, shape)
    levels_forward.levels_forward(queries, keys, lists, rows, shape, out, lse, scales)


def tiling_for(q: Tensor, plan: BlockPlan) -> Tiling:
    """Tiling of the forward for these queries and blocks."""
    sizes = plan.q_blocks.size, plan.k_blocks.size
    padded = padded_width(q.shape[3])
    return levels_forward.tiling(q.dtype, support.capability(q.device), *sizes, padded)


def layout_for(plan: BlockPlan, block_n: int, device: torch.device) -> KeyLayout:
    """Layout of the key buffer for tiles of block_n rows."""
    return key_layout(plan.k_blocks, tuple(sorted({0, *plan.listed})), block_n, device)


def fill(k: Tensor, v: Tensor, layout: KeyLayout, order: Tensor | None = None) -> Keys:
    """Keys and values [B, H, Sk, D] with their means in the layout of the buffer."""
    firsts = [layout.first.get(level, ABSENT) for level in range(max(layout.first) + 1)]
    place = layout.start, layout.count, layout.blocks.size, firsts, layout.rows
    padded = padded_width(k.shape[3])
    keys, values = (fill_keys(x, *place, padded, order) for x in (k, v))
    return Keys(keys, values, layout.bias)


def lists_for(plan: BlockPlan, layout: KeyLayout, block_n: int) -> TileLists:
    """The lists of a plan, finest level first."""
    size = plan.k_blocks.size
    parts = [Segment(level, layout.first[level] // block_n, size >> level) for level in plan.listed]
    return pack_lists(plan.levels.flatten(0, 2).contiguous(), parts, block_n)


@lru_cache(maxsize=16)
def key_layout(
    blocks: Blocks, levels: tuple[int, ...], block_n: int, device: torch.device
) -> KeyLayout:
    """Layout of the key buffer, each level from a multiple of block_n on; a pure function, kept."""
    with torch.inference_mode(False):
        first: dict[int, int] = {}
        parts: list[Tensor] = []
        rows = 0
        for level in levels:
            starts = torch.arange(blocks.size >> level) << level
            count = (blocks.count[:, None] - starts).clamp(0, 1 << level).flatten()
            first[level] = rows
            rows += -(-len(count) // block_n) * block_n
            parts.append(torch.nn.functional.pad(count, (0, rows - first[level] - len(count))))
        bias = torch.cat(parts).double().log2().float().to(device)
        count = blocks.count.to(device, torch.int32)
        return KeyLayout(blocks, first, rows, blocks.start.to(device), count, bias)
