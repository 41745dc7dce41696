"""The key buffer of the sparse forward, from one read of the tokens.

It gathers by the order of a layout as it reads, so that nothing has to be permuted before. A
program reads a tile of `TILE` consecutive tokens of a layout, one block or several, as
[LOW, HIGH, D]: token t stands at [t % LOW, t // LOW]. A thread then holds `LOW` neighbours, so the
sums of the first three levels need no other thread, and the wider ones start from an eighth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operands import order_head
from vidsparse.kernels.gpu.operator import operator

TILE = 128
"""Tokens of one program, the largest block."""

LOW = 8
"""Neighbouring tokens in one thread; fewer if a block is smaller."""

ZERO_ROWS = tl.constexpr(16)

ABSENT = -1
"""Stands for the first row of a level that a key buffer does not hold."""


def warps(padded: int) -> int:
    """Warps of one program for rows of `padded` elements: they cover TILE / LOW rows at once."""
    return max(1, padded // 16)


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    p_x,
    p_start,
    p_count,
    p_order,
    i_tile,
    x_token,
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """[LOW, HIGH, DP] in the dtype of x; zero past the end of a block, past the blocks, past D."""
    o_t = tl.arange(0, HIGH)[None, :] * LOW + tl.arange(0, LOW)[:, None]
    block = i_tile * (LOW * HIGH // SIZE) + o_t // SIZE
    m_block = block < blocks
    m_t = o_t % SIZE < tl.load(p_count + block, mask=m_block, other=0)
    token = tl.load(p_start + block, mask=m_block, other=0) + o_t % SIZE
    if ORDERED:
        token = tl.load(p_order + token, mask=m_t, other=0)
    o_d = tl.arange(0, DP)
    m_x = m_t[:, :, None]
    if D < DP:
        m_x = m_x & (o_d < D)[None, None, :]
    return tl.load(p_x + token[:, :, None] * x_token + o_d[None, None, :], mask=m_x, other=0.0)


@triton.jit
def pair_sums(b_x):  # type: ignore[no-untyped-def]
    """Sums of the pairs of neighbours in a tile: [LOW / 2, HIGH, D], or [1, HIGH / 2, D]."""
    LOW: tl.constexpr = b_x.shape[0]
    HIGH: tl.constexpr = b_x.shape[1]
    DP: tl.constexpr = b_x.shape[2]
    if LOW > 1:
        b_sum = tl.sum(tl.reshape(b_x, [LOW // 2, 2, HIGH, DP]), 1)
    else:
        b_sum = tl.sum(tl.reshape(b_x, [1, HIGH // 2, 2, DP]), 2)
    return b_sum


@triton.jit
def group_means(b_sum, p_count, i_tile, blocks, LEVEL: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of a tile's groups of 2^LEVEL tokens, [LOW, HIGH, D], by their true tokens."""
    LOW: tl.constexpr = b_sum.shape[0]
    HIGH: tl.constexpr = b_sum.shape[1]
    o_g = tl.arange(0, HIGH)[None, :] * LOW + tl.arange(0, LOW)[:, None]
    first = o_g << LEVEL
    block = i_tile * ((LOW * HIGH << LEVEL) // SIZE) + first // SIZE
    count = tl.load(p_count + block, mask=block < blocks, other=0)
    inside = tl.minimum(tl.maximum(count - first % SIZE, 1), 1 << LEVEL)
    return b_sum * (1.0 / inside.to(tl.float32))[:, :, None]


@triton.jit
def store_groups(p_out, b_x, i_tile, first, end):  # type: ignore[no-untyped-def]
    """The rows [LOW, HIGH, D] of a tile, LOW * HIGH to a tile from `first` on, below `end`."""
    LOW: tl.constexpr = b_x.shape[0]
    HIGH: tl.constexpr = b_x.shape[1]
    DP: tl.constexpr = b_x.shape[2]
    o_g = tl.arange(0, HIGH)[None, :] * LOW + tl.arange(0, LOW)[:, None]
    row = (first + i_tile * (LOW * HIGH) + o_g).to(tl.int64)
    p_row = p_out + row[:, :, None] * DP + tl.arange(0, DP)[None, None, :]
    tl.store(p_row, b_x.to(p_out.dtype.element_ty), mask=(row < end)[:, :, None])


@triton.jit
def store_zeros(p_out, first, end, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows first .. end."""
    b_zero = tl.zeros([ZERO_ROWS, DP], p_out.dtype.element_ty)
    for start in tl.range(first, end, ZERO_ROWS):
        row = start + tl.arange(0, ZERO_ROWS)
        p_row = p_out + row.to(tl.int64)[:, None] * DP + tl.arange(0, DP)[None, :]
        tl.store(p_row, b_zero, mask=(row < end)[:, None])


@triton.jit(do_not_specialize=["order_head", "heads", "blocks", "rows"])
def fill_keys_kernel(  # type: ignore[no-untyped-def]
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
    rows,
    first,
    end,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LEVELS: tl.constexpr,
    TOP: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Level l: mean over 2^l tokens at row first[l] + group; zero to end[l]. Grid (tiles, B * H).

    LEVELS: bit l is set if level l is stored; TOP: the highest of them. The last program of a head
    also writes what lies past the groups of all programs.
    """
    i_tile = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    x_base = p_x + i_bh // heads * x_batch + i_bh % heads * x_head
    p_order += i_bh * order_head
    b_x = load_tile(
        x_base, p_start, p_count, p_order, i_tile, x_token, blocks, D, DP, SIZE, LOW, HIGH, ORDERED
    )
    out_base = p_out + i_bh * rows * DP
    store_groups(out_base, b_x, i_tile, first[0], end[0])
    b_sum = b_x.to(tl.float32)
    for LEVEL in tl.static_range(1, TOP + 1):
        b_sum = pair_sums(b_sum)
        if (LEVELS >> LEVEL) & 1:
            b_mean = group_means(b_sum, p_count, i_tile, blocks, LEVEL, SIZE)
            store_groups(out_base, b_mean, i_tile, first[LEVEL], end[LEVEL])
    tiles = tl.num_programs(0)
    if i_tile == tiles - 1:
        for LEVEL in tl.static_range(0, TOP + 1):
            if (LEVELS >> LEVEL) & 1:
                written = first[LEVEL] + tiles * (LOW * HIGH >> LEVEL)
                store_zeros(out_base, written, end[LEVEL], DP)


@operator("fill_keys")
def fill_keys(
    x: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    firsts: list[int],
    rows: int,
    padded: int,
    order: Tensor | None = None,
) -> Tensor:
    """The key buffer of a layout, [B, H, rows, padded] in the dtype of x, every element written.

    x, start, count, size, order: as for `vidsparse.kernels.gpu.means.block_means`, start and count
        in the layout's order.
    firsts: first row of each level, ABSENT for one that is not stored; firsts[0] is 0. From there
        on, size >> l rows to a block hold the means over the true tokens of each 2^l consecutive
        ones, rounded once; the segment ends where the next one begins, the last at `rows`. Rows
        without a token and columns past D are zero.
    padded: width of a row, 64 or 128, >= D.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, depth = x.shape
    blocks, low = start.numel(), min(LOW, size)
    bounds = sorted({*firsts, rows} - {ABSENT})
    ends = [first if first == ABSENT else bounds[bounds.index(first) + 1] for first in firsts]
    out = torch.empty(batch, heads, rows, padded, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        fill_keys_kernel[(-(-blocks * size // TILE), batch * heads)](
            x,
            start,
            count,
            start if order is None else order,
            out,
            *x.stride()[:3],
            order_head(order),
            heads,
            blocks,
            rows,
            tuple(firsts),
            tuple(ends),
            D=depth,
            DP=padded,
            SIZE=size,
            LOW=low,
            HIGH=TILE // low,
            LEVELS=sum(1 << level for level, first in enumerate(firsts) if first != ABSENT),
            TOP=len(firsts) - 1,
            ORDERED=order is not None,
            num_warps=warps(padded),
            enable_fp_fusion=True,
        )
    return out


@fill_keys.register_fake
def _(
    x: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    firsts: list[int],
    rows: int,
    padded: int,
    order: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:2], rows, padded)
