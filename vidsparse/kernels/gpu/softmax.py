"""What every kernel of an online softmax does: the rows of its queries, its steps, its end.

Steps are in log2 units.

In kernels: p_ pointer, d_ descriptor, o_ offsets, m_ mask, i_ index, b_ block in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)
"""A running maximum of nothing: finite, as a tile may be masked for every row."""


@triton.jit
def query_rows(  # type: ignore[no-untyped-def]
    p_start,
    p_rows,
    p_order,
    i_block,
    o_m,
    D: tl.constexpr,
    DP: tl.constexpr,
    ORDERED: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Tokens of the rows o_m of a query block, which of them there are, the mask of their elements.

    p_order: of the head. AGAIN: for the store after a loop; loaded anew, as what is kept through
    the loop takes registers.
    """
    m_m = o_m < tl.load(p_rows + i_block, volatile=AGAIN)
    m_q = m_m[:, None]
    if D < DP:
        m_q = m_q & (tl.arange(0, DP) < D)[None, :]
    o_q = tl.load(p_start + i_block, volatile=AGAIN) + o_m
    if ORDERED:
        o_q = tl.load(p_order + o_q, mask=m_m, other=0, volatile=AGAIN)
    return o_q, m_m, m_q


@triton.jit
def take_tile(b_s, b_v, b_max, b_sum, b_acc):  # type: ignore[no-untyped-def]
    """One step with scores b_s in log2 units: the new maximum, sum, accumulator and its factor.

    alpha: what everything summed before is to be multiplied by; part: what the tile adds.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.math.exp2(b_s - b_new[:, None])
    alpha = tl.math.exp2(b_max - b_new)
    part = tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * alpha[:, None], input_precision="ieee")
    return b_new, b_sum * alpha + part, b_acc, alpha, part


@triton.jit
def take_products(b_s, scale, b_v, b_max, b_sum, b_acc):  # type: ignore[no-untyped-def]
    """`take_tile` of products b_s = q . k, where scores are scale * b_s, scale > 0.

    The scale is part of the exponent's multiply-add: no operation of its own for an element.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.math.exp2(b_s * scale - b_new[:, None])
    alpha = tl.math.exp2(b_max - b_new)
    b_sum = b_sum * alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * alpha[:, None], input_precision="ieee")
    return b_new, b_sum, b_acc


@triton.jit
def finish(b_max, b_sum, b_acc):  # type: ignore[no-untyped-def]
    """Output and natural-log LSE of finished rows; b_sum 0 stands for a row without a key."""
    empty = b_sum == 0.0
    b_safe = tl.where(empty, 1.0, b_sum)
    b_lse = tl.where(empty, float("-inf"), (b_max + tl.math.log2(b_safe)) * LN_2)
    return b_acc * (1.0 / b_safe)[:, None], b_lse
