"""First and second moments of the tokens of each block, both from one read of them.

    mean_j = (1 / n_j) sum x,   second_j = (1 / n_j) sum x^2,   for each of D channels
    norms: |mean_j|^2 and (1 / n_j) sum |x|^2, two numbers of a block
    finite: the mean over those of its tokens of which every number is finite

Read as `vidsparse.kernels.gpu.means.block_sums` does, in any order of the tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.means import ROWS, block_sums, sum_warps
from vidsparse.kernels.gpu.operands import order_head
from vidsparse.kernels.gpu.operator import operator


@triton.jit(do_not_specialize=["order_head", "heads", "blocks"])
def second_moments_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_start,
    p_count,
    p_order,
    p_mean,
    p_second,
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
    KIND: tl.constexpr,
):
    """mean and second of each block, or what `KIND` names of the two. Grid (groups, B * H)."""
    i_group = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    x_base = p_x + i_bh // heads * x_batch + i_bh % heads * x_head
    place = p_start, p_count, p_order + i_bh * order_head, i_group, x_token, blocks
    FINITE: tl.constexpr = KIND == "finite"
    SQUARES: tl.constexpr = KIND != "finite"
    b_mean, b_second, b_count = block_sums(
        x_base, *place, D, DP, SIZE, GROUPS, ORDERED, SQUARES, FINITE
    )
    b_share = (1.0 / tl.maximum(b_count, 1).to(tl.float32))[:, None]
    b_mean *= b_share
    b_second *= b_share
    block = i_group * GROUPS + tl.arange(0, GROUPS)
    m_block = block < blocks
    row = i_bh * blocks + block
    if KIND == "norms":
        tl.store(p_mean + row, tl.sum(b_mean * b_mean, 1), mask=m_block)
        tl.store(p_second + row, tl.sum(b_second, 1), mask=m_block)
    else:
        o_d = tl.arange(0, DP)
        o_row = row[:, None] * D + o_d[None, :]
        m_row = m_block[:, None] & (o_d < D)[None, :]
        tl.store(p_mean + o_row, b_mean, mask=m_row)
        if KIND == "moments":
            tl.store(p_second + o_row, b_second, mask=m_row)


@operator("second_moments")
def second_moments(
    x: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None, norms: bool
) -> tuple[Tensor, Tensor]:
    """Means over the real tokens of each block, and of the squares: float32 [B, H, n, D] both.

    x, start, count, size, order: as for `vidsparse.kernels.gpu.means.block_means`; x up to 128
    wide, size 16 .. 128. norms: instead |mean|^2 and the mean of |x|^2, float32 [B, H, n] both.
    """
    mean, second = _empty(x, start.numel(), norms)
    place = start, count, size, order
    _launch(x, *place, mean, second, "norms" if norms else "moments")
    return mean, second


@second_moments.register_fake
def _(
    x: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None, norms: bool
) -> tuple[Tensor, Tensor]:
    return _empty(x, start.shape[0], norms)


@operator("finite_means")
def finite_means(
    x: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None
) -> Tensor:
    """Means over the tokens of each block whose numbers are all finite, float32 [B, H, n, D].

    A block of none gives zeros. Arguments as for `second_moments`.
    """
    mean, _ = _empty(x, start.numel(), False)
    _launch(x, start, count, size, order, mean, mean, "finite")
    return mean


@finite_means.register_fake
def _(x: Tensor, start: Tensor, count: Tensor, size: int, order: Tensor | None) -> Tensor:
    return _empty(x, start.shape[0], False)[0]


def _launch(
    x: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    order: Tensor | None,
    mean: Tensor,
    second: Tensor,
    kind: str,
) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, depth = x.shape
    blocks = start.numel()
    padded = max(16, 1 << (depth - 1).bit_length())
    groups = max(1, ROWS.value // size)
    with torch.cuda.device_of(x):
        second_moments_kernel[(-(-blocks // groups), batch * heads)](
            x,
            start,
            count,
            start if order is None else order,
            mean,
            second,
            *x.stride()[:3],
            order_head(order),
            heads,
            blocks,
            D=depth,
            DP=padded,
            SIZE=size,
            GROUPS=groups,
            ORDERED=order is not None,
            KIND=kind,
            num_warps=sum_warps(padded),
            enable_fp_fusion=True,
        )


def _empty(x: Tensor, blocks: int, norms: bool) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], blocks) if norms else (*x.shape[:2], blocks, x.shape[3])
    mean, second = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return mean, second
