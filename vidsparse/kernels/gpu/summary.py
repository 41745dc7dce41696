"""What the rest merge needs of keys and values, from one read of each: block means and moments.

    kbar_j, vbar_j    means of the tokens of key block j
    H_j = sum_{n in j} (k_n - kbar_j)^T v_n
    M = (1 / N) sum_j H_j over the N tokens of the video      (first_order "global")

Programs sum slabs of tiles in float32 and a second launch adds the slabs: no atomics, and
the numbers of a head depend neither on the device nor on the heads beside it. Centred keys are
rounded to the dtype of the input before they are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import order_head, padded_width
from vidsparse.kernels.gpu.operator import operator

HEIGHT = 64
"""The rows of means are a multiple of it, and so of every tile of the rest merge."""


@dataclass(frozen=True)
class Shape:
    """rows: tokens of a tile, warps per program, stages of the K/V pipeline, tiles of a program."""

    rows: int
    warps: int
    stages: int
    slab: int = 64


def shape_for(
    dtype: torch.dtype, capability: tuple[int, int], size: int, moment: bool = True
) -> Shape:
    """The shape of a program for blocks of `size` tokens on a device of this compute capability.

    moment: whether it sums H_j too.
    """
    if dtype == torch.float32:  # exact products use no tensor cores and many registers
        return Shape(32, 8, 1)
    if capability[0] not in (9, 10):
        return Shape(64, 8, 2)
    if moment:
        return Shape(max(64, size), 8, 3)
    if capability[0] == 9:  # on an H200 0.53 ms where 8 warps and 2 stages take 1.1
        return Shape(64, 4, 1, 4)
    return Shape(max(64, size), 8, 1)  # 2 spill with an order


@triton.jit
def tokens_at(p_order, position, m_t, ORDERED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens at positions of the layout; any where m_t is false."""
    token = position
    if ORDERED:
        token = tl.load(p_order + position, mask=m_t, other=0)
    return token


@triton.jit
def load_rows(p_x, token, m_t, x_token, D: tl.constexpr, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS, DP]; zero where m_t is false and past D."""
    o_d = tl.arange(0, DP)
    m_x = m_t[:, None]
    if D < DP:
        m_x = m_x & (o_d < D)[None, :]
    return tl.load(p_x + token[:, None] * x_token + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def block_sums(b_x, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [GROUPS, D]: sums over the rows of each of the blocks in a tile."""
    ROWS: tl.constexpr = b_x.shape[0]
    return tl.sum(tl.reshape(b_x.to(tl.float32), [GROUPS, ROWS // GROUPS, b_x.shape[1]]), 1)


@triton.jit
def add_centred(b_h, b_k, b_mean, b_v):  # type: ignore[no-untyped-def]
    """b_h + (k - mean of its block)^T v; rows without a token are zero in v, which is enough."""
    GROUPS: tl.constexpr = b_mean.shape[0]
    ROWS: tl.constexpr = b_k.shape[0]
    DP: tl.constexpr = b_k.shape[1]
    b_blocks = tl.reshape(b_k.to(tl.float32), [GROUPS, ROWS // GROUPS, DP]) - b_mean[:, None, :]
    b_centred = tl.reshape(b_blocks, [ROWS, DP]).to(b_v.dtype)
    return tl.dot(tl.trans(b_centred), b_v, b_h, input_precision="ieee")


@triton.jit
def store_means(p_out, b_mean, row, m_row, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of width DP, in the dtype of the memory."""
    o_d = tl.arange(0, DP)
    p_row = p_out + row.to(tl.int64)[:, None] * DP + o_d[None, :]
    tl.store(p_row, b_mean.to(p_out.dtype.element_ty), mask=m_row[:, None])


@triton.jit(do_not_specialize=["order_head", "heads", "blocks"])
def summarise_kernel(  # type: ignore[no-untyped-def]
    p_k,
    p_v,
    p_start,
    p_count,
    p_moved,
    p_order,
    p_draft,
    p_mean_k,
    p_mean_v,
    p_sums,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    order_head,
    heads,
    blocks,
    mean_rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
    ORDERED: tl.constexpr,
    MOMENT: tl.constexpr,
):
    """Means of the blocks of a slab of tiles, and the sum of their H_j. Grid (slabs, B * H).

    A tile is GROUPS blocks, or one block in PARTS parts of ROWS tokens. Blocks of p_moved 0 have no
    part in the sum. The last program of a head zeroes the rows of means past the last block.
    """
    GROUPS: tl.constexpr = (ROWS + SIZE - 1) // SIZE
    PARTS: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    HEIGHT: tl.constexpr = ROWS // GROUPS
    i_slab = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    k_base = p_k + i_bh // heads * k_batch + i_bh % heads * k_head
    v_base = p_v + i_bh // heads * v_batch + i_bh % heads * v_head
    p_own = p_order + i_bh * order_head
    o_g = tl.arange(0, GROUPS)
    o_r = tl.arange(0, HEIGHT)
    o_d = tl.arange(0, DP)
    first = tl.program_id(0) * SLAB
    last = tl.minimum(first + SLAB, (blocks + GROUPS - 1) // GROUPS)
    b_h = tl.zeros([DP, DP], tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        block = i * GROUPS + o_g
        m_block = block < blocks
        start = tl.load(p_start + block, mask=m_block, other=0)
        count = tl.load(p_count + block, mask=m_block, other=0)
        moved = tl.load(p_moved + block, mask=m_block, other=0) != 0
        position = tl.reshape(start[:, None] + o_r[None, :], [ROWS])
        left = tl.reshape(count[:, None] - o_r[None, :], [ROWS])
        m_moved = tl.reshape(tl.broadcast_to(moved[:, None], [GROUPS, HEIGHT]), [ROWS])
        b_inverse = (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
        if PARTS == 1:
            token = tokens_at(p_own, position, left > 0, ORDERED)
            b_k = load_rows(k_base, token, left > 0, k_token, D, DP)
            b_v = load_rows(v_base, token, left > 0, v_token, D, DP)
            b_mean = block_sums(b_k, GROUPS) * b_inverse
            b_mean_v = block_sums(b_v, GROUPS) * b_inverse
            if MOMENT:
                b_h = add_centred(b_h, b_k, b_mean, tl.where(m_moved[:, None], b_v, 0.0))
        else:
            b_mean = tl.zeros([GROUPS, DP], tl.float32)
            b_mean_v = tl.zeros([GROUPS, DP], tl.float32)
            for at in tl.range(0, SIZE, ROWS):
                token = tokens_at(p_own, position + at, left > at, ORDERED)
                b_k = load_rows(k_base, token, left > at, k_token, D, DP)
                b_v = load_rows(v_base, token, left > at, v_token, D, DP)
                b_mean += block_sums(b_k, GROUPS)
                b_mean_v += block_sums(b_v, GROUPS)
            b_mean *= b_inverse
            b_mean_v *= b_inverse
            if MOMENT:
                for at in tl.range(0, SIZE, ROWS):
                    token = tokens_at(p_own, position + at, left > at, ORDERED)
                    b_k = load_rows(k_base, token, left > at, k_token, D, DP)
                    b_v = load_rows(v_base, token, (left > at) & m_moved, v_token, D, DP)
                    b_h = add_centred(b_h, b_k, b_mean, b_v)
        p_row = p_draft + (i_bh * blocks + block)[:, None] * D + o_d[None, :]
        tl.store(p_row, b_mean, mask=m_block[:, None] & (o_d < D)[None, :])
        row = i_bh * mean_rows + block
        store_means(p_mean_k, b_mean, row, m_block, DP)
        store_means(p_mean_v, b_mean_v, row, m_block, DP)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        for row in tl.range(blocks, mean_rows, 16):
            o_row = row + tl.arange(0, 16)
            b_zero = tl.zeros([16, DP], tl.float32)
            store_means(p_mean_k, b_zero, i_bh * mean_rows + o_row, o_row < mean_rows, DP)
            store_means(p_mean_v, b_zero, i_bh * mean_rows + o_row, o_row < mean_rows, DP)
    if MOMENT:
        o_h = o_d[:, None] * DP + o_d[None, :]
        p_h = p_sums + (i_slab * tl.num_programs(1) + i_bh) * DP * DP + o_h
        tl.store(p_h, b_h)


@triton.jit(do_not_specialize=["slabs", "step"])
def add_slabs_kernel(  # type: ignore[no-untyped-def]
    p_sums, p_out, factor, slabs, step, WIDTH: tl.constexpr
):
    """out = factor * sum over slabs, `step` elements apart. Grid (elements of one / WIDTH)."""
    o_x = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    b_sum = tl.zeros([WIDTH], tl.float32)
    p_x = p_sums + o_x
    for _ in tl.range(0, slabs):
        b_sum += tl.load(p_x)
        p_x += step
    tl.store(p_out + o_x, (b_sum * factor).to(p_out.dtype.element_ty))


def rows_for(blocks: int) -> int:
    """Rows of means for so many blocks."""
    return -(-blocks // HEIGHT) * HEIGHT


@operator("summarise")
def summarise(
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    moved: Tensor,
    order: Tensor | None,
    moment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of key blocks, and the moment M of each head.

    k, v [B, H, S, D], one dtype, read in place if their stride in D is 1; start int64 [n], count
    int32 [n]: first token and tokens of each block, at most `size` (a power of two, 16 .. 128).
    moved: int32 [n], on the device of k: 1 for the blocks of the video, whose H_j are summed.
    moment_tokens: N, the number of their tokens; 0: no moment is wanted.
    order: int64 [S] or [B, H, S] on the device of k, contiguous: position t of the blocks is
        k[..., order[.., t], :]; None: t.

    Returns key means float32 [B, H, n, D]; the means of keys and of values in the dtype of k,
    [B, H, R, P], zero past n and past D, R the next multiple of `HEIGHT`, P 64 or 128; and M
    [B, H, P, P] in the dtype of k, empty if it is not wanted.
    """
    draft, mean_k, mean_v, moment = _summary(k, start, moment_tokens)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, depth = k.shape
    wanted, blocks = moment_tokens > 0, start.numel()
    shape = shape_for(k.dtype, support.capability(k.device), size, wanted)
    slabs = -(-blocks * size // (max(size, shape.rows) * shape.slab))
    sums = k.new_empty(slabs if wanted else 0, *moment.shape, dtype=torch.float32)
    with torch.cuda.device_of(k):
        summarise_kernel[(slabs, batch * heads)](
            k,
            v,
            start,
            count,
            moved,
            start if order is None else order,
            draft,
            mean_k,
            mean_v,
            sums,
            *k.stride()[:3],
            *v.stride()[:3],
            order_head(order),
            heads,
            blocks,
            rows_for(blocks),
            D=depth,
            DP=padded_width(depth),
            SIZE=size,
            ROWS=shape.rows,
            SLAB=shape.slab,
            STAGES=shape.stages,
            ORDERED=order is not None,
            MOMENT=wanted,
            num_warps=shape.warps,
            enable_fp_fusion=True,
        )
    if wanted:
        elements = moment.numel()
        with torch.cuda.device_of(k):
            add_slabs_kernel[(elements // 1024,)](
                *(sums, moment, 1.0 / moment_tokens, slabs, elements),
                WIDTH=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return draft, mean_k, mean_v, moment


@summarise.register_fake
def _(
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    moved: Tensor,
    order: Tensor | None,
    moment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _summary(k, start, moment_tokens)


def _summary(k: Tensor, start: Tensor, moment_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `summarise` returns, not yet filled."""
    batch, heads, _, depth = k.shape
    blocks, padded = start.shape[0], padded_width(int(depth))  # fakes have symbols for sizes
    draft = k.new_empty(batch, heads, blocks, depth, dtype=torch.float32)
    mean_k, mean_v = (k.new_empty(batch, heads, rows_for(blocks), padded) for _ in range(2))
    side = padded if moment_tokens > 0 else 0
    return draft, mean_k, mean_v, k.new_empty(batch, heads, side, side)
