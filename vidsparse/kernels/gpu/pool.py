"""Means of blocks and the key buffer of the sparse forward, each from one read of the tokens.

Both gather by the order of a layout as they read, so that nothing has to be permuted before.

Sums of whole blocks are `block_sums`. A program of the key buffer reads a tile of `TILE`
consecutive tokens of a layout, one block or several, as [LOW, HIGH, D]: token t stands at
[t % LOW, t // LOW]. A thread then holds `LOW` neighbours, so the sums of the first three levels
need no other thread, and the wider ones start from an eighth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operands import order_head
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.select import LARGEST

TILE = 128
"""Tokens of one program, the largest block."""

LOW = 8
"""Neighbouring tokens in one thread; fewer if a block is smaller."""

ZERO_ROWS = tl.constexpr(16)

ROWS = tl.constexpr(16)
"""Tokens whose sums a program of `block_sums` holds beside each other."""

ABSENT = -1
"""Stands for the first row of a level that a key buffer does not hold."""


def warps(padded: int) -> int:
    """Warps of one program for rows of `padded` elements: they cover TILE / LOW rows at once."""
    return max(1, padded // 16)


def sum_warps(padded: int) -> int:
    """Warps of one program of `block_sums`, for rows of `padded` elements."""
    return max(1, padded // 32)


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

    x, start, count, size, order: as for `block_means`, start and count in the layout's order.
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
