"""The first-order term: the moment of a head, and its product with the queries.

H = (1/N) sum_n (k_n - mean of its block)^T v_n over the N tokens of the video;
O_t += rest_t (q_t H) / sqrt(D), with rest_t the share of the blocks that the row does not list.

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

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import padded_width

SLAB = 16
"""Tiles that one program sums."""

STEP = 32
"""Columns of q that `add_first_order` multiplies at a time."""


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


def first_order_rows(dtype: torch.dtype) -> int:
    """Queries in one program of `add_first_order`."""
    return 32 if dtype == torch.float32 else 64


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
    p_order,
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
    ORDERED: tl.constexpr,
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
        position = tl.reshape(start[:, None] + o_r[None, :], [ROWS])
        left = tl.reshape(count[:, None] - o_r[None, :], [ROWS])
        b_inverse = (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
        if PARTS == 1:
            token = tokens_at(p_order, position, left > 0, ORDERED)
            b_k = load_rows(k_base, token, left > 0, k_token, D, DP)
            b_v = load_rows(v_base, token, left > 0, v_token, D, DP)
            b_mean = block_sums(b_k, GROUPS) * b_inverse
            b_h = add_centred(b_h, b_k, b_mean, b_v)
        else:
            b_sum = tl.zeros([GROUPS, DP], tl.float32)
            for at in tl.range(0, SIZE, ROWS):
                token = tokens_at(p_order, position + at, left > at, ORDERED)
                b_k = load_rows(k_base, token, left > at, k_token, D, DP)
                b_sum += block_sums(b_k, GROUPS)
            b_mean = b_sum * b_inverse
            for at in tl.range(0, SIZE, ROWS):
                token = tokens_at(p_order, position + at, left > at, ORDERED)
                b_k = load_rows(k_base, token, left > at, k_token, D, DP)
                b_v = load_rows(v_base, token, left > at, v_token, D, DP)
                b_h = add_centred(b_h, b_k, b_mean, b_v)
    o_d = tl.arange(0, DP)
    o_h = o_d[:, None] * DP + o_d[None, :]
    tl.store(p_out + (i_slab * tl.num_programs(1) + i_bh) * DP * DP + o_h, b_h)


@triton.jit(do_not_specialize=["heads", "tokens"])
def add_first_order_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_moment,
    p_rest,
    p_out,
    q_batch,
    q_head,
    q_token,
    out_batch,
    out_head,
    out_token,
    scale,
    heads,
    tokens,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """out += rest * scale * (q moment), in place. Grid (tokens / BM, B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    o_k = tl.arange(0, BK)
    m_m = o_m < tokens
    q_base = p_q + i_b * q_batch + i_h * q_head + o_m[:, None] * q_token
    p_h = p_moment + i_bh * DP * DP + o_d[None, :]
    b_term = tl.zeros([BM, DP], tl.float32)
    for i_k in tl.range(0, DP, BK):
        m_k = m_m[:, None] & (i_k + o_k < D)[None, :]
        b_q = tl.load(q_base + (i_k + o_k)[None, :], mask=m_k, other=0.0)
        b_h = tl.load(p_h + (i_k + o_k)[:, None] * DP)
        b_term = tl.dot(b_q, b_h, b_term, input_precision="ieee")
    b_rest = tl.load(p_rest + i_bh * tokens + o_m, mask=m_m, other=0.0) * scale
    m_q = m_m[:, None] & (o_d < D)[None, :]
    out_base = p_out + i_b * out_batch + i_h * out_head
    p_o = out_base + o_m[:, None] * out_token + o_d[None, :]
    b_out = tl.load(p_o, mask=m_q, other=0.0).to(tl.float32) + b_term * b_rest[:, None]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_q)


@torch.library.custom_op("vidsparse::taylor_state", mutates_args=())
def taylor_state(
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    video: Tensor,
    order: Tensor | None = None,
) -> Tensor:
    """The moment H of each head, float32 [B, H, P, P]; formula in the module docstring.

    k, v [B, H, S, D], one dtype, read in place if their stride in D is 1; start int64 [n], count
    int32 [n]: first token and tokens of each block, at most `size` (a power of two up to 128).
    video: int64, on the device of k, ids of the blocks that are summed, at least one; N is the
    number of their tokens. P: 64 or 128, >= D; rows and columns past D are zero.
    order: int64 [S] on the device of k: position t of the blocks is k[..., order[t], :]; None: t.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, depth = k.shape
    padded = padded_width(depth)
    shape = shape_for(k.dtype, support.capability(k.device), size)
    slabs = triton.cdiv(triton.cdiv(video.numel() * size, max(size, shape.rows)), SLAB)
    sums = torch.empty(slabs, batch, heads, padded, padded, dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        taylor_state_kernel[(slabs, batch * heads)](
            k,
            v,
            start,
            count,
            video,
            start if order is None else order,
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
            ORDERED=order is not None,
            num_warps=shape.warps,
            enable_fp_fusion=True,
        )
    return sums.sum(0).div_(count[video].sum())


@taylor_state.register_fake
def _(
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    video: Tensor,
    order: Tensor | None = None,
) -> Tensor:
    padded = padded_width(k.shape[3])
    return k.new_empty(*k.shape[:2], padded, padded, dtype=torch.float32)


@torch.library.custom_op("vidsparse::add_first_order", mutates_args=("out",))
def add_first_order(q: Tensor, moment: Tensor, rest: Tensor, out: Tensor) -> None:
    """out += rest * (q moment) / sqrt(D), in place.

    q, out [B, H, S, D] with stride 1 in D; moment [B, H, DP, DP] contiguous, dtype of q; rest
    float32 [B, H, S] contiguous.
    """
    batch, heads, tokens, depth = q.shape
    block_m = first_order_rows(q.dtype)
    with torch.cuda.device_of(q):
        add_first_order_kernel[(triton.cdiv(tokens, block_m), batch * heads)](
            q,
            moment,
            rest,
            out,
            *q.stride()[:3],
            *out.stride()[:3],
            depth**-0.5,
            heads,
            tokens,
            D=depth,
            DP=moment.shape[-1],
            BM=block_m,
            BK=STEP,
            num_warps=4,
            enable_fp_fusion=True,
        )
