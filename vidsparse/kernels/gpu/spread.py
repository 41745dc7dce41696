"""Drafts with the spread inside blocks, and what is made of them, in one pass over pairs of blocks.

    logits_ij = s mean_i . mean_j,   spread_ij = s^2 / 2 sum_d second_id (second_jd - mean_jd^2)

    rule "spread"      c_ij = min(bound, spread_ij), 0 where that is no number
    rule "variance"    logits_ij + c_ij
    rule "moments"     2 (logits_ij + c_ij) + ln n_j + ln max(tiny, e^(2 c_ij) mean|v|^2 - |vbar|^2)

Formulas and sources: `vidsparse.draft`, `vidsparse.estimator`, `vidsparse.compensation`. Both
products are as those of `vidsparse.kernels.gpu.draft`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import Tiling
from vidsparse.kernels.gpu.operator import operator

RULES = ("spread", "variance", "moments")
SHAPE = Tiling(64, 64, 8, 2)
STEP = 16
"""Columns of the moments that a program multiplies at a time: twice as many spill on sm_80."""


@triton.jit(do_not_specialize=["q_blocks", "k_blocks"])
def draft_spread_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_q_second,
    p_k,
    p_k_second,
    p_count,
    p_norm,
    p_square,
    p_out,
    scale,
    half,
    bound,
    tiny,
    q_blocks,
    k_blocks,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out by a rule of the module docstring. half: s^2 / 2. Grid (q tiles, k tiles, B * H)."""
    i_bh = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_m = o_m < q_blocks
    m_n = o_n < k_blocks
    o_q = (i_bh * q_blocks + o_m)[:, None] * D
    o_k = (i_bh * k_blocks + o_n)[None, :] * D
    b_s = tl.zeros([BM, BN], tl.float32)
    b_c = tl.zeros([BM, BN], tl.float32)
    PRECISION: tl.constexpr = "ieee" if WHOLE else "tf32x3"
    for i_d in tl.range(0, D, BK, num_stages=STAGES):
        o_d = i_d + tl.arange(0, BK)
        m_q = m_m[:, None] & (o_d < D)[None, :]
        m_k = m_n[None, :] & (o_d < D)[:, None]
        b_k = tl.load(p_k + o_k + o_d[:, None], mask=m_k, other=0.0)
        b_second = tl.load(p_k_second + o_k + o_d[:, None], mask=m_k, other=0.0)
        b_variance = tl.maximum(b_second - b_k * b_k, 0.0)
        b_q = tl.load(p_q_second + o_q + o_d[None, :], mask=m_q, other=0.0)
        b_c = tl.dot(b_q, b_variance, b_c, input_precision=PRECISION)
        if RULE != "spread":
            b_q = tl.load(p_q + o_q + o_d[None, :], mask=m_q, other=0.0)
            b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
    b_c = b_c * half
    if RULE == "spread":
        b_c = tl.where(b_c == b_c, b_c, 0.0)
    b_c = tl.minimum(b_c, bound)
    b_out = b_c
    if RULE == "variance":
        b_out = b_s * scale + b_c
    if RULE == "moments":
        o_j = i_bh * k_blocks + o_n
        b_square = tl.load(p_square + o_j, mask=m_n, other=1.0)
        b_norm = tl.load(p_norm + o_j, mask=m_n, other=0.0)
        b_count = tl.load(p_count + o_n, mask=m_n, other=1).to(tl.float32)
        b_around = tl.exp(2.0 * b_c) * b_square[None, :] - b_norm[None, :]
        b_around = tl.where(b_around < tiny, tiny, b_around)  # NaN stays
        b_out = 2.0 * (b_s * scale + b_c) + (tl.log(b_around) + tl.log(b_count)[None, :])
    p_ij = p_out + (i_bh * q_blocks + o_m)[:, None] * k_blocks + o_n[None, :]
    tl.store(p_ij, b_out, mask=m_m[:, None] & m_n[None, :])


@operator("draft_spread")
def draft_spread(
    q_means: Tensor,
    q_seconds: Tensor,
    k_means: Tensor,
    k_seconds: Tensor,
    rule: str,
    scale: float,
    bound: float,
    tiny: float,
    values: list[Tensor],
) -> Tensor:
    """Scores of all pairs of blocks by a rule of the module docstring, float32 [B, H, nq, nk].

    q_means, q_seconds [B, H, nq, D], k_means, k_seconds [B, H, nk, D]: `second_moments` of queries
        and keys, float32, contiguous; q_means is not read for the rule "spread".
    scale: s = 1 / sqrt(D). bound: of the spread, > 0; inf: none.
    tiny, values: for the rule "moments" alone: count int32 [nk], |vbar|^2 and mean|v|^2, float32
        [B, H, nk], contiguous.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: allowed are {', '.join(RULES)}")
    batch, heads, q_blocks, depth = q_seconds.shape
    k_blocks = k_means.shape[2]
    out = torch.empty(batch, heads, q_blocks, k_blocks, dtype=torch.float32, device=k_means.device)
    tiles = -(-q_blocks // SHAPE.block_m), -(-k_blocks // SHAPE.block_n)
    warps = SHAPE.warps if rule != "spread" else SHAPE.warps // 2  # it has half the products
    with torch.cuda.device_of(k_means):
        draft_spread_kernel[(*tiles, batch * heads)](
            q_means,
            q_seconds,
            k_means,
            k_seconds,
            *(values or (k_means, k_means, k_means)),
            out,
            scale,
            0.5 * scale**2,
            bound,
            tiny,
            q_blocks,
            k_blocks,
            D=depth,
            BM=SHAPE.block_m,
            BN=SHAPE.block_n,
            BK=STEP,
            RULE=rule,
            STAGES=SHAPE.stages,
            WHOLE=support.capability(k_means.device) == support.AMD,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return out


@draft_spread.register_fake
def _(
    q_means: Tensor,
    q_seconds: Tensor,
    k_means: Tensor,
    k_seconds: Tensor,
    rule: str,
    scale: float,
    bound: float,
    tiny: float,
    values: list[Tensor],
) -> Tensor:
    return k_means.new_empty(*q_seconds.shape[:3], k_means.shape[2])
