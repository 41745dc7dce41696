"""Means of blocks from one read of the tokens, and the sums that they and moments are made of.

Tokens are gathered by the order of a layout as they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operands import order_head
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.select import LARGEST

ROWS = tl.constexpr(16)
"""Tokens whose sums a program of `block_sums` holds beside each other."""


def sum_warps(padded: int) -> int:
    """Warps of one program of `block_sums`, for rows of `padded` elements."""
    return max(1, padded // 32)


@triton.jit
def block_sums(  # type: ignore[no-untyped-def]
    x_base,
    p_start,
    p_count,
    p_order,
    i_group,
    x_token,
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ORDERED: tl.constexpr,
    SQUARES: tl.constexpr,
    FINITE: tl.constexpr,
):
    """Sums of GROUPS blocks in float32, of their squares, and how many tokens they are of.

    A thread adds what it reads, `ROWS` tokens apart, and asks no other thread before the end.
    FINITE: a token with a number that is not finite has no part in it.
    """
    PER_BLOCK: tl.constexpr = ROWS // GROUPS
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, DP)
    block = i_group * GROUPS + o_r // PER_BLOCK
    start = tl.load(p_start + block, mask=block < blocks, other=0)
    count = tl.load(p_count + block, mask=block < blocks, other=0)
    b_sum = tl.zeros([ROWS, DP], tl.float32)
    b_square = tl.zeros([ROWS, DP], tl.float32)
    b_tokens = tl.zeros([ROWS], tl.int32)
    for at in tl.range(0, SIZE, PER_BLOCK, loop_unroll_factor=4):
        inside = at + o_r % PER_BLOCK
        m_t = inside < count
        token = start + inside
        if ORDERED:
            token = tl.load(p_order + token, mask=m_t, other=0)
        m_x = m_t[:, None]
        if D < DP:
            m_x = m_x & (o_d < D)[None, :]
        p_x = x_base + token[:, None] * x_token + o_d[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        if FINITE:
            sound = tl.sum((tl.abs(b_x) <= LARGEST).to(tl.int32), 1) == DP
            b_x = tl.where(sound[:, None], b_x, 0.0)
            m_t = m_t & sound
        b_sum += b_x
        b_tokens += m_t.to(tl.int32)
        if SQUARES:
            b_square += b_x * b_x
    return (
        of_groups(b_sum, GROUPS),
        of_groups(b_square, GROUPS),
        tl.sum(tl.reshape(b_tokens, [GROUPS, PER_BLOCK]), 1),
    )


@triton.jit
def of_groups(b_x, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS, DP] -> [GROUPS, DP]."""
    return tl.sum(tl.reshape(b_x, [GROUPS, b_x.shape[0] // GROUPS, b_x.shape[1]]), 1)


@triton.jit(do_not_specialize=["order_head", "heads", "blocks"])
def block_means_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_start,
    p_count,
    p_order,
    p_out,
    x_batch,
    x_head,
    x_token,
    order_head,
    heads,
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """out_j = sum of the tokens of block j / their number. Grid (groups of blocks, B * H)."""
    i_group = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    x_base = p_x + i_bh // heads * x_batch + i_bh % heads * x_head
    place = p_start, p_count, p_order + i_bh * order_head, i_group, x_token, blocks
    b_sum, _, b_count = block_sums(x_base, *place, D, DP, SIZE, GROUPS, ORDERED, False, False)
    b_mean = b_sum / tl.maximum(b_count, 1).to(tl.float32)[:, None]
    block = i_group * GROUPS + tl.arange(0, GROUPS)
    o_d = tl.arange(0, DP)
    p_mean = p_out + (i_bh * blocks + block)[:, None] * D + o_d[None, :]
    tl.store(p_mean, b_mean, mask=(block < blocks)[:, None] & (o_d < D)[None, :])


@operator("block_means")
def block_means(
    x: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None = None
) -> Tensor:
    """Means over the real tokens of each block, float32 [B, H, n, D], contiguous.

    x [B, H, S, D], D up to 128, read in place if its stride in D is 1; start int64 [n], count int32
    [n]: first token and tokens of each block, 0 .. size; a block without a token gives zeros.
    size: 1, 2, 4, .. 128.
    order: int64 [S] or [B, H, S] on the device of x, contiguous: position t of the layout is
        x[..., order[.., t], :]; None: t.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, depth = x.shape
    blocks = start.numel()
    padded = max(16, 1 << (depth - 1).bit_length())
    groups = max(1, ROWS.value // size)
    out = torch.empty(batch, heads, blocks, depth, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        block_means_kernel[(-(-blocks // groups), batch * heads)](
            x,
            start,
            count,
            start if order is None else order,
            out,
            *x.stride()[:3],
            order_head(order),
            heads,
            blocks,
            D=depth,
            DP=padded,
            SIZE=size,
            GROUPS=groups,
            ORDERED=order is not None,
            num_warps=sum_warps(padded),
            enable_fp_fusion=True,
        )
    return out


@block_means.register_fake
def _(x: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:2], start.shape[0], x.shape[3], dtype=torch.float32)
