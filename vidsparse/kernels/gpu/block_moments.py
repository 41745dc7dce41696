"""The moment of every key block by itself, which a query block sums with weights of its own.

    H_j / n_j = (1 / n_j) sum_{n in j} (k_n - kbar_j)^T v_n
              = (1 / n_j) (sum k_n^T v_n - (sum k_n)^T (sum v_n) / n_j)

    M_i = sum_j w_ij (H_j / n_j), w_i a softmax of drafted scores      (first_order "row")

By the second form keys go to the tensor cores as they were read, and are not rounded again; its
sums are float32. What it gives is rounded to the dtype of the input, to be summed over the blocks
on tensor cores, too; for float16, whose range products of keys and values leave, it stays in
float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import order_head, padded_width
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.summary import load_rows, tokens_at

ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}
"""Tokens of a tile, at most; exact products use no tensor cores and many registers."""


ALIGNED = 8
"""The number of moments is a multiple of it, the last ones zero: a sum over 1182 blocks in bfloat16
takes cuBLAS 4.2 ms a call of Wan 2.1 14B at 720p, one over 1184 is for its fast kernels."""


@triton.jit(do_not_specialize=["order_head", "heads", "blocks"])
def block_moments_kernel(  # type: ignore[no-untyped-def]
    p_k,
    p_v,
    p_start,
    p_count,
    p_order,
    p_out,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    order_head,
    heads,
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """H / n of a block, 0 past the last one. Grid (blocks or more, B * H)."""
    i_block = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    k_base = p_k + i_bh // heads * k_batch + i_bh % heads * k_head
    v_base = p_v + i_bh // heads * v_batch + i_bh % heads * v_head
    p_own = p_order + i_bh * order_head
    start = tl.load(p_start + i_block, mask=i_block < blocks, other=0)
    count = tl.load(p_count + i_block, mask=i_block < blocks, other=0)
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, DP)
    b_h = tl.zeros([DP, DP], tl.float32)
    b_sum_k = tl.zeros([DP], tl.float32)
    b_sum_v = tl.zeros([DP], tl.float32)
    for at in tl.static_range(0, SIZE, ROWS):
        m_r = at + o_r < count
        token = tokens_at(p_own, start + at + o_r, m_r, ORDERED)
        b_k = load_rows(k_base, token, m_r, k_token, D, DP)
        b_v = load_rows(v_base, token, m_r, v_token, D, DP)
        b_h = tl.dot(tl.trans(b_k), b_v, b_h, input_precision="ieee")
        b_sum_k += tl.sum(b_k.to(tl.float32), 0)
        b_sum_v += tl.sum(b_v.to(tl.float32), 0)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    b_h = (b_h - (b_sum_k * share)[:, None] * b_sum_v[None, :]) * share
    p_h = p_out + (i_block * tl.num_programs(1) + i_bh) * DP * DP
    tl.store(p_h + o_d[:, None] * DP + o_d[None, :], b_h.to(p_out.dtype.element_ty))


def warps_for(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Of a program on a device of this compute capability: as few as need not spill."""
    if dtype == torch.float32:
        return 16
    return 4 if capability[0] in (9, 10) else 8


def aligned(blocks: int) -> int:
    """Moments for so many blocks."""
    return -(-blocks // ALIGNED) * ALIGNED


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the moments of blocks, for keys and values of a dtype."""
    return torch.float32 if dtype == torch.float16 else dtype


@operator("block_moments")
def block_moments(
    k: Tensor, v: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None
) -> Tensor:
    """H_j / n_j of each block, [R, B, H, P, P] in `moment_dtype`, zero past n and past D.

    R: the next multiple of `ALIGNED`. Arguments and P as for
    `vidsparse.kernels.gpu.summary.summarise`.
    """
    blocks = start.numel()
    out = _empty(k, blocks)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, depth = k.shape
    with torch.cuda.device_of(k):
        block_moments_kernel[(out.shape[0], batch * heads)](
            k,
            v,
            start,
            count,
            start if order is None else order,
            out,
            *k.stride()[:3],
            *v.stride()[:3],
            order_head(order),
            heads,
            blocks,
            D=depth,
            DP=padded_width(depth),
            SIZE=size,
            ROWS=min(size, ROWS[k.dtype]),
            ORDERED=order is not None,
            num_warps=warps_for(k.dtype, support.capability(k.device)),
            enable_fp_fusion=True,
        )
    return out


@block_moments.register_fake
def _(
    k: Tensor, v: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None
) -> Tensor:
    return _empty(k, start.shape[0])


def _empty(k: Tensor, blocks: int) -> Tensor:
    padded = padded_width(int(k.shape[3]))  # fakes have symbols for sizes
    shape = aligned(blocks), *k.shape[:2], padded, padded
    return k.new_empty(shape, dtype=moment_dtype(k.dtype))
