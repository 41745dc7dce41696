"""The first-order moment of a head, H = (1/N) sum_n (k_n - mean of its block)^T v_n over the video.

Programs sum slabs of `SLAB` tiles in float32 and torch adds the slabs: no atomics, and the numbers
of a head depend neither on the device nor on the heads beside it. Centred keys are rounded to the
dtype of the input before they are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.triton_forward import HEAD_DIMS

SLAB = 16
"""Tiles that one program sums."""


@dataclass(frozen=True)
class Shape:
    """rows: tokens of a tile, warps per program, stages of the K/V pipeline."""

    rows: int
    warps: int
    stages: int


def shape_for(dtype: torch.dtype, capability: tuple[int, int], size: int) -> Shape:
    """The shape of a program for blocks of `size` tokens on a device of this compute capability."""
    if dtype == torch.float32:  # exact products use no tensor cores and many registers
        return Shape(32, 8, 1)
    if capability[0] == 12:
        return Shape(64, 8, 2)
    return Shape(max(64, size), 8, 2 if capability in ((8, 6), (8, 9)) else 3)


@triton.jit
def load_rows(p_x, token, m_t, x_token, D: tl.constexpr, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS, DP]; zero where m_t is false and past D."""
    o_d = tl.arange(0, DP)
    m_x = m_t[:, None]
    if D < DP:
        m_x = m_x & (o_d < D)[None, :]
    return tl.load(p_x + token[:, None] * x_token + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def block_sums(b_k, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [GROUPS, D]: sums over the rows of each of the blocks in a tile."""
    ROWS: tl.constexpr = b_k.shape[0]
    return tl.sum(tl.reshape(b_k.to(tl.float32), [GROUPS, ROWS // GROUPS, b_k.shape[1]]), 1)


@triton.jit
def add_centred(b_h, b_k, b_mean, b_v):  # type: ignore[no-untyped-def]
    """b_h + (k - mean of its block)^T v; rows without a token are zero in v, which is enough."""
    GROUPS: tl.constexpr = b_mean.shape[0]
    ROWS: tl.constexpr = b_k.shape[0]
    DP: tl.constexpr = b_k.shape[1]
    b_blocks = tl.reshape(b_k.to(tl.float32), [GROUPS, ROWS // GROUPS, DP]) - b_mean[:, None, :]
    b_centred = tl.reshape(b_blocks, [ROWS, DP]).to(b_v.dtype)
    return tl.dot(tl.trans(b_centred), b_v, b_h, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "video"])
def taylor_state_kernel(  # type: ignore[no-untyped-def]
    p_k,
    p_v,
    p_start,
    p_count,
    p_video,
    p_out,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    video,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[slab] = sum (k - mean of its block)^T v over the tiles of a slab. Grid (slabs, B * H).

    A tile is GROUPS blocks, or one block in PARTS parts of ROWS tokens. video: number of blocks.
    """
    GROUPS: tl.constexpr = (ROWS + SIZE - 1) // SIZE
    PARTS: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    HEIGHT: tl.constexpr = ROWS // GROUPS
    i_slab = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    k_base = p_k + i_bh // heads * k_batch + i_bh % heads * k_head
    v_base = p_v + i_bh // heads * v_batch + i_bh % heads * v_head
    o_g = tl.arange(0, GROUPS)
    o_r = tl.arange(0, HEIGHT)
    first = tl.program_id(0) * SLAB
    last = tl.minimum(first + SLAB, (video + GROUPS - 1) // GROUPS)
    b_h = tl.zeros([DP, DP], tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        nth = i * GROUPS + o_g
        block = tl.load(p_video + nth, mask=nth < video, other=0)
        start = tl.load(p_start + block)
        count = tl.where(nth < video, tl.load(p_count + block), 0)
        token = tl.reshape(start[:, None] + o_r[None, :], [ROWS])
        left = tl.reshape(count[:, None] - o_r[None, :], [ROWS])
        b_inverse = (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
        if PARTS == 1:
            b_k = load_rows(k_base, token, left > 0, k_token, D, DP)
            b_v = load_rows(v_base, token, left > 0, v_token, D, DP)
            b_mean = block_sums(b_k, GROUPS) * b_inverse
            b_h = add_centred(b_h, b_k, b_mean, b_v)
        else:
            b_sum = tl.zeros([GROUPS, DP], tl.float32)
            for at in tl.range(0, SIZE, ROWS):
                b_k = load_rows(k_base, token + at, left > at, k_token, D, DP)
                b_sum += block_sums(b_k, GROUPS)
            b_mean = b_sum * b_inverse
            for at in tl.range(0, SIZE, ROWS):
                b_k = load_rows(k_base, token + at, left > at, k_token, D, DP)
                b_v = load_rows(v_base, token + at, left > at, v_token, D, DP)
                b_h = add_centred(b_h, b_k, b_mean, b_v)
    o_d = tl.arange(0, DP)
    o_h = o_d[:, None] * DP + o_d[None, :]
    tl.store(p_out + (i_slab * tl.num_programs(1) + i_bh) * DP * DP + o_h, b_h)


def taylor_state(
    k: Tensor, v: Tensor, start: Tensor, count: Tensor, size: int, video: Tensor
) -> Tensor:
    """The moment H of each head, float32 [B, H, P, P]; formula in the module docstring.

    k, v [B, H, S, D], one dtype, read in place if their stride in D is 1; start int64 [n], count
    int32 [n]: first token and tokens of each block, at most `size` (a power of two up to 128).
    video: int64, on the device of k, ids of the blocks that are summed, at least one; N is the
    number of their tokens. P: 64 or 128, >= D; rows and columns past D are zero.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, depth = k.shape
    padded = next(width for width in HEAD_DIMS if width >= depth)
    capability = torch.cuda.get_device_capability(k.device) if k.is_cuda else (8, 0)
    shape = shape_for(k.dtype, capability, size)
    slabs = triton.cdiv(triton.cdiv(video.numel() * size, max(size, shape.rows)), SLAB)
    sums = torch.empty(slabs, batch, heads, padded, padded, dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        taylor_state_kernel[(slabs, batch * heads)](
            k,
            v,
            start,
            count,
            video,
            sums,
            *k.stride()[:3],
            *v.stride()[:3],
            heads,
            video.numel(),
            D=depth,
            DP=padded,
            SIZE=size,
            ROWS=shape.rows,
            SLAB=SLAB,
            STAGES=shape.stages,
            num_warps=shape.warps,
            enable_fp_fusion=True,
        )
    return sums.sum(0).div_(count[video].sum())
