"""The density of a plan, counted on the device: two launches where torch takes twenty-five."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu.operator import operator
from vidsparse.plan import SKIP, BlockPlan

CHUNK = 1024
"""Key blocks that a program looks at in one turn."""


@triton.jit(do_not_specialize=["blocks", "q_blocks"])
def row_shares_kernel(  # type: ignore[no-untyped-def]
    p_levels, p_groups, p_count, p_pairs, p_share, blocks, q_blocks, CHUNK: tl.constexpr
):
    """share = queries of the row * sum_j groups[level_j + 1, j] / pairs. Grid (rows)."""
    i_row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([CHUNK], tl.int64)
    for start in tl.range(0, blocks, CHUNK):
        j = start + tl.arange(0, CHUNK)
        level = tl.load(p_levels + i_row * blocks + j, mask=j < blocks, other=-1).to(tl.int32)
        b_sum += tl.load(p_groups + (level + 1) * blocks + j, mask=j < blocks, other=0)
    work = tl.sum(b_sum, 0) * tl.load(p_count + i_row % q_blocks)
    tl.store(p_share + i_row, work.to(tl.float64) / tl.load(p_pairs))


@operator("row_shares")
def row_shares(levels: Tensor, groups: Tensor, count: Tensor, pairs: Tensor) -> Tensor:
    """float64 [B, H, nq]: the work of a row as a share of `pairs`, float64 [1].

    levels int8 [B, H, nq, nk]; groups int64 [levels + 1, nk]: keys that a block costs, row 0 for
    one that is not listed; count int64 [nq]: queries of a row.
    """
    levels = levels.contiguous()
    share = levels.new_empty(levels.shape[:3], dtype=torch.float64)
    with torch.cuda.device_of(levels):
        row_shares_kernel[(share.numel(),)](
            *(levels, groups, count, pairs, share, levels.shape[3], levels.shape[2]),
            CHUNK=CHUNK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return share


@row_shares.register_fake
def _(levels: Tensor, groups: Tensor, count: Tensor, pairs: Tensor) -> Tensor:
    return levels.new_empty(levels.shape[:3], dtype=torch.float64)


def head_density(plan: BlockPlan) -> Tensor:
    """`BlockPlan.density` as the mean over the batch, float64 [H], on the device of its levels."""
    cuts = plan.q_blocks, plan.k_blocks
    tables = _tables(*cuts, plan.rest, plan.levels.shape[0], plan.levels.device)
    shares: Tensor = row_shares(plan.levels, *tables)
    return shares.sum((0, 2))


@lru_cache(maxsize=16)
def _tables(
    q_blocks: Blocks, k_blocks: Blocks, rest: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """groups, count and pairs of `row_shares`; pairs of the whole batch."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        steps = 1 << torch.arange(k_blocks.levels + 1)[:, None]
        groups = (k_blocks.count + steps - 1) // steps
        unlisted = torch.zeros_like(k_blocks.count) if rest == SKIP else groups[rest]
        pairs = torch.tensor([float(batch * q_blocks.tokens * k_blocks.tokens)]).double()
        tables = torch.cat([unlisted[None], groups]), q_blocks.count, pairs
        groups, count, pairs = (x.to(device) for x in tables)
        return groups, count, pairs
