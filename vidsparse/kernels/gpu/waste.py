"""What the rows of an order of tokens would lose, one program per row: `vidsparse.layout.content`.

    lost_i = sum_j m_ij spread_ij    over the blocks outside the `near` largest m of the row

with m_i the softmax of the drafted logits + ln n_j over the blocks of the video. Blocks that tie
with the last of the largest are none of the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.select import warps, width


@triton.jit(do_not_specialize=["k_blocks", "near"])
def lost_mass_kernel(  # type: ignore[no-untyped-def]
    p_logit,
    p_spread,
    p_count,
    p_text,
    p_out,
    k_blocks,
    near,
    NK: tl.constexpr,
):
    """out of a row, NaN if a score is. Grid (B * H * nq).

    The least of the largest masses is found bit by bit: masses order like the integers of their
    bits.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, NK)
    m_k = o_k < k_blocks
    m_k = m_k & (tl.load(p_text + o_k, mask=m_k, other=1) == 0)
    b_s = tl.load(p_logit + i_row * k_blocks + o_k, mask=m_k, other=float("-inf"))
    b_s += tl.log(tl.load(p_count + o_k, mask=m_k, other=1).to(tl.float32))
    b_mass = tl.where(m_k, tl.exp(b_s - tl.max(b_s, 0)), 0.0)
    b_key = b_mass.to(tl.int32, bitcast=True)
    least = tl.full([], 0, tl.int32)
    step = tl.full([], 1 << 30, tl.int32)
    while step > 0:
        trial = least | step
        least = tl.where(tl.sum((m_k & (b_key >= trial)).to(tl.int32), 0) < near, least, trial)
        step = step >> 1
    b_spread = tl.load(p_spread + i_row * k_blocks + o_k, mask=m_k, other=0.0)
    b_lost = tl.where(b_key < least, b_mass * b_spread, 0.0)
    tl.store(p_out + i_row, tl.sum(b_lost, 0) / tl.sum(b_mass, 0))


@operator("lost_mass")
def lost_mass(logits: Tensor, spread: Tensor, count: Tensor, text: Tensor, near: int) -> Tensor:
    """Mass times spread that each row loses, float32 [B, H, nq].

    logits, spread: float32 [B, H, nq, nk], contiguous; count: integers [nk], text: bool [nk], of
    the key blocks; near: 1 .. number of blocks that are not text.
    """
    out = torch.empty(logits.shape[:3], dtype=torch.float32, device=logits.device)
    blocks = logits.shape[3]
    with torch.cuda.device_of(logits):
        lost_mass_kernel[(out.numel(),)](
            logits,
            spread,
            count,
            text,
            out,
            blocks,
            near,
            NK=width(blocks),
            num_warps=warps(width(blocks)),
            enable_fp_fusion=True,
        )
    return out


@lost_mass.register_fake
def _(logits: Tensor, spread: Tensor, count: Tensor, text: Tensor, near: int) -> Tensor:
    return logits.new_empty(logits.shape[:3])
