"""Bisection of rows into blocks, one launch for all cuts of a level: `vidsparse.bisection`.

A part of a level is one program. It finds the axis in which its rows vary most, the value at its
median digit by digit (the integer of a float that orders like it, eight bits at a time, by
histograms), and moves every row to its half. Rows keep their order in both halves: of equal ones
the earlier ones go left, and the blocks come out the same whatever runs beside them. A part of one
block is moved as it is, so the parts of a level need no table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operator import operator

CHUNKS = {256: 2, 1024: 4, 4096: 16}
"""Rows that a program takes at a time -> its warps."""

TOP_BIT = tl.constexpr(-0x80000000)


@triton.jit
def part_of(i_part, level, length, size):  # type: ignore[no-untyped-def]
    """First row of a part, its rows, those of its left half. A part of one block is all right."""
    first = 0
    left = (length + size - 1) // size // 2 * size
    for i in tl.range(0, level):
        right = (i_part >> (level - 1 - i)) & 1
        first += left * right
        length = tl.where(right == 1, length - left, left)
        left = (length + size - 1) // size // 2 * size
    return first, length, left


@triton.jit
def sorting_key(b_x):  # type: ignore[no-untyped-def]
    """uint32 that orders like a float, with -0 = 0."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return (b_bits ^ ((b_bits >> 31) | TOP_BIT)).to(tl.uint32, bitcast=True)


@triton.jit
def widest_axis(p_part, rows, axes, length, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of the axes in which the rows of a part vary most."""
    o_t = tl.arange(0, CHUNK)
    axis = 0
    most = -1.0
    for i in tl.range(0, axes):
        p_x = p_part + i * rows
        shift = tl.load(p_x)  # a part is far from zero for its width
        b_sum = tl.zeros([CHUNK], tl.float32)
        b_square = tl.zeros([CHUNK], tl.float32)
        for at in tl.range(0, length, CHUNK):
            b_x = tl.load(p_x + at + o_t, mask=at + o_t < length, other=shift) - shift
            b_sum += b_x
            b_square += b_x * b_x
        mean = tl.sum(b_sum, 0) / length
        variance = tl.sum(b_square, 0) / length - mean * mean
        axis = tl.where(variance > most, i, axis)
        most = tl.maximum(most, variance)
    return axis


@triton.jit
def key_at_rank(p_x, length, rank, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The key that the rank-th row has, from 1 on, and how many rows of it are among the first."""
    o_t = tl.arange(0, CHUNK)
    key = tl.full([], 0, tl.uint32)
    for DIGIT in tl.static_range(3, -1, -1):
        b_number = tl.zeros([256], tl.int32)
        for at in tl.range(0, length, CHUNK):
            m_t = at + o_t < length
            b_key = sorting_key(tl.load(p_x + at + o_t, mask=m_t, other=0.0))
            if DIGIT < 3:
                m_t = m_t & ((b_key >> (8 * DIGIT + 8)) == key)
            b_digit = ((b_key >> (8 * DIGIT)) & 255).to(tl.int32)
            b_number += tl.histogram(b_digit, 256, mask=m_t)
        b_up_to = tl.cumsum(b_number, 0)
        digit = tl.sum((b_up_to < rank).to(tl.int32), 0)
        rank -= tl.max(tl.where(b_up_to < rank, b_up_to, 0), 0)
        key = (key << 8) | digit.to(tl.uint32)
    return key, rank


@triton.jit(do_not_specialize=["rows", "size", "other", "groups", "axes", "level", "order_group"])
def bisect_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_order,
    p_x_out,
    p_order_out,
    rows,
    size,
    other,
    groups,
    axes,
    level,
    order_group,
    CHUNK: tl.constexpr,
    MOVE: tl.constexpr,
):
    """The rows of a part, and their order, with its left half first. Grid (2^level, all groups).

    size: of the blocks of the first `groups` groups, other: of the rest. MOVE: the rows too, for
    the next level.
    """
    i_g = tl.program_id(1).to(tl.int64)
    size = tl.where(i_g < groups, size, other)
    first, length, left = part_of(tl.program_id(0), level, rows, size)
    p_part = p_x + i_g * axes * rows + first
    p_out = p_x_out + i_g * axes * rows + first
    p_own = p_order + i_g * order_group + first
    p_own_out = p_order_out + i_g * rows + first
    cut = left > 0
    p_key = p_part + widest_axis(p_part, rows, tl.where(cut, axes, 0), length, CHUNK) * rows
    median, ties = key_at_rank(p_key, tl.where(cut, length, 0), left, CHUNK)
    o_t = tl.arange(0, CHUNK)
    less_before = 0
    ties_before = 0
    for at in tl.range(0, length, CHUNK):
        m_t = at + o_t < length
        b_key = sorting_key(tl.load(p_key + at + o_t, mask=m_t, other=0.0))
        b_less = (m_t & (b_key < median)).to(tl.int32)
        b_tie = (m_t & (b_key == median)).to(tl.int32)
        b_both = tl.cumsum(b_less | (b_tie << 16), 0)
        b_ties = ties_before + (b_both >> 16) - b_tie
        b_left = less_before + (b_both & 0xFFFF) - b_less + tl.minimum(b_ties, ties)
        goes_left = (b_less == 1) | ((b_tie == 1) & (b_ties < ties))
        b_place = tl.where(goes_left, b_left, left + at + o_t - b_left)
        less_before += tl.sum(b_less, 0)
        ties_before += tl.sum(b_tie, 0)
        b_token = tl.load(p_own + at + o_t, mask=m_t, other=0)
        tl.store(p_own_out + b_place, b_token, mask=m_t)
        if MOVE:
            for i in tl.range(0, axes):
                b_x = tl.load(p_part + i * rows + at + o_t, mask=m_t, other=0.0)
                tl.store(p_out + i * rows + b_place, b_x, mask=m_t)


@operator("bisect")
def bisect(x: Tensor, names: Tensor, sizes: list[int]) -> Tensor:
    """The names of rows in an order of which every `size` are a block, int32 [B, H, n].

    x: float32 [B, H, A, n], contiguous: A axes of n rows, not written. names: int32 [n],
    contiguous. sizes: one, or one for each half of the batch: early cuts have few parts, and two
    batches fill a device better than one. Cuts are those of `vidsparse.bisection.bisected` with
    local=False, but that of equal values on an axis the earlier rows go left, and that rows of a
    block stay in their order.
    """
    batch, heads, axes, rows = x.shape
    blocks = max(-(-rows // size) for size in sizes)
    orders = [x.new_empty(batch, heads, rows, dtype=torch.int32) for _ in range(2)]
    spare = [torch.empty_like(x) for _ in range(min(2, max(0, levels(blocks) - 1)))]
    if blocks == 1:
        return orders[0].copy_(names.expand(orders[0].shape))
    order, group = names, 0
    for level in range(levels(blocks)):
        last = level == levels(blocks) - 1
        chunk = chunk_for(max(longest(-(-rows // size), level) * size for size in sizes))
        into, moved = orders[level % 2], x if last else spare[level % 2]
        with torch.cuda.device_of(x):
            bisect_kernel[(1 << level, batch * heads)](
                x,
                order,
                moved,
                into,
                rows,
                sizes[0],
                sizes[-1],
                batch // len(sizes) * heads,
                axes,
                level,
                group,
                CHUNK=chunk,
                MOVE=not last,
                num_warps=CHUNKS[chunk],
                enable_fp_fusion=True,
            )
        x, order, group = moved, into, rows
    return order


def levels(blocks: int) -> int:
    """Cuts from all rows down to a block."""
    return (blocks - 1).bit_length()


def longest(blocks: int, level: int) -> int:
    """Blocks of the longest part of a level."""
    return -(-blocks // (1 << level))


def chunk_for(rows: int) -> int:
    """For parts of so many rows."""
    return next((chunk for chunk in CHUNKS if chunk >= rows), max(CHUNKS))


@bisect.register_fake
def _(x: Tensor, names: Tensor, sizes: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[3], dtype=torch.int32)
