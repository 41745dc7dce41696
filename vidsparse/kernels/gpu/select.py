"""Block selection in Triton: from scores to a level map on the device, one program per row.

Level maps equal those of `vidsparse.selector` in torch: a row is ranked by falling score (by mass
where levels end at a mass), forced blocks first, ties to the lower index. Every level ends at a
rank, so a row is a few prefixes of its ranking, and a prefix is found without a sort: bit by bit,
first the score at its end (as an integer of the same order), then the index among the blocks that
tie there.

Mass is summed in float32, the selectors in torch sum in float64: a level may end one block earlier
or later where the mass in front of that block is within 1e-5 of the bound, relatively.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operator import operator
from vidsparse.plan import SKIP, ScoreKind

MAX_BLOCKS = 8192
"""Key blocks in a row at most: a program holds a whole row in registers."""

MIN_WIDTH = 128
"""Least width of a program's row: narrower ones would save nothing and cost compilations."""

MARGIN = 2e-6
"""Share of a bound by which the mass in front of a wanted block must be below it.

More than float32 sums err, so that a row whose mass ends exactly at a bound ends there.
"""

SKIPPED = tl.constexpr(SKIP)
COARSEST = tl.constexpr(9)
"""The last pooled level; a row's cost is counted in units of 2^-9 exact blocks."""

LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_BITS = tl.constexpr(0x7F7FFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)
FORCED_KEY = tl.constexpr(0x7FFFFFFE)
LEAST_KEY = tl.constexpr(-0x80000000)


@triton.jit
def ranking_key(b_value, m_forced):  # type: ignore[no-untyped-def]
    """int32 that orders like the ranking: forced, NaN, falling values with -0 = 0.

    An infinity ties with the largest finite number of its sign.
    """
    b_bits = b_value.to(tl.int32, bitcast=True)
    b_size = tl.minimum(b_bits & 0x7FFFFFFF, LARGEST_BITS)
    b_key = tl.where(b_bits < 0, -b_size, b_size)
    b_key = tl.where(b_value == b_value, b_key, INFINITY_BITS)
    return tl.where(m_forced, FORCED_KEY, b_key)


@triton.jit
def leading(b_key, b_weight, target, COUNTED: tl.constexpr, NK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mask of the shortest prefix of the ranking whose weights sum to `target` or more.

    b_weight: a block, or 1 to count (COUNTED). A target of 0 or less gives the empty prefix.
    """
    key = tl.full([], LEAST_KEY, tl.int32)
    step = tl.full([], LEAST_KEY, tl.int32)
    while step != 0:
        trial = key ^ step  # with the first step from the negative keys to the others
        weight = tl.sum(tl.where(b_key >= trial, b_weight, 0), 0)
        key = tl.where(weight < target, key, trial)
        step = (step >> 1) & 0x7FFFFFFF
        if COUNTED:  # a mass may be exact too early: blocks without any may follow
            step = tl.where(weight == target, 0, step)
    m_above = b_key > key
    m_tied = b_key == key
    o_late = NK - 1 - tl.arange(0, NK)
    ties = tl.sum(m_tied.to(tl.int32), 0)
    step = tl.where(ties > 1, NK // 2, 0)
    late = tl.full([], 0, tl.int32)
    while step > 0:
        m_trial = m_above | (m_tied & (o_late >= late + step))
        weight = tl.sum(tl.where(m_trial, b_weight, 0), 0)
        late = tl.where(weight < target, late, late + step)
        step = step >> 1
    return m_above | (m_tied & (o_late >= late))


@triton.jit
def finite_mass(b_value, m_k):  # type: ignore[no-untyped-def]
    """The given mass; NaN counts as 0, an infinity as the largest finite number."""
    b_mass = tl.maximum(tl.minimum(b_value, LARGEST), -LARGEST)
    return tl.where(m_k & (b_value == b_value), b_mass, 0.0)


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "min_blocks", "budget", "bounds"])
def select_kernel(  # type: ignore[no-untyped-def]
    p_value,
    p_forced,
    p_count,
    p_level,
    q_blocks,
    k_blocks,
    min_blocks,
    budget,
    bounds,
    LEVELS: tl.constexpr,
    RULE: tl.constexpr,
    NK: tl.constexpr,
):
    """Level l of `LEVELS` ends at rank `bounds`[l], or where its mass reaches bounds[l] * total.

    bounds: float32, ranks too, as Triton compiles anew for some integers in a tuple, 1 or 16.
    RULE: "rank", or how values become mass: "logit", "mass". The forced and the first min_blocks
    blocks are exact; the others of the ranking are kept while the cost of the row, sum 2^-level
    over its prefix, is at most budget / 2^9. Grid (B * H * nq).
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, NK)
    m_k = o_k < k_blocks
    b_value = tl.load(p_value + i_row * k_blocks + o_k, mask=m_k, other=-LARGEST)
    m_forced = tl.load(p_forced + (i_row % q_blocks) * k_blocks + o_k, mask=m_k, other=0) != 0
    if RULE == "logit":
        b_count = tl.load(p_count + o_k, mask=m_k, other=1).to(tl.float32)
        b_value += tl.log(b_count)  # blocks are ranked by their mass
        b_mass = tl.exp(b_value - tl.max(b_value, 0))  # NaN sums: no block is wanted
        b_mass = tl.where(m_k, b_mass, 0.0)
    b_key = tl.where(m_k, ranking_key(b_value, m_forced), LEAST_KEY)
    if RULE == "mass":
        b_mass = finite_mass(b_value, m_k)
    if RULE != "rank":
        total = tl.sum(b_mass, 0)

    end = tl.maximum(tl.sum(m_forced.to(tl.int32), 0), min_blocks)
    room = budget - (end << COARSEST)
    b_level = tl.full([NK], SKIPPED, tl.int32)
    for i in tl.static_range(len(LEVELS)):
        if RULE == "rank":
            last = tl.cast(bounds[i], tl.int32)
        else:
            m_last = leading(b_key, b_mass, bounds[i] * total - 1e-12, False, NK)
            last = tl.sum(m_last.to(tl.int32), 0)
        wanted = tl.maximum(last - end, 0)
        fitting = tl.maximum(room, 0) >> (COARSEST - LEVELS[i])
        room -= wanted << (COARSEST - LEVELS[i])  # below 0 if they don't fit: nothing follows
        end += tl.minimum(wanted, fitting)
        if RULE == "rank":
            m_end = leading(b_key, 1, end, True, NK)
        elif end == last:
            m_end = m_last
        else:
            m_end = leading(b_key, 1, end, True, NK)
        b_level = tl.where(m_end & (b_level == SKIPPED), LEVELS[i], b_level)
    tl.store(p_level + i_row * k_blocks + o_k, b_level.to(tl.int8), mask=m_k)


def select_topk(value: Tensor, forced: Tensor, k: int) -> Tensor:
    """The k best blocks of every row exact, or its forced ones if they are more.

    value: float32 [B, H, nq, nk], contiguous; nk <= 8192. forced: bool [nq, nk], same device.
    Returns int8 [B, H, nq, nk]: 0 or SKIP, as `vidsparse.selector.topk`; no host synchronisation.
    Raises ValueError for other tensors.
    """
    nk = value.shape[-1]
    levels: Tensor = select(value, forced, "rank", None, [0], [min(k, nk)], 0, nk)
    return levels


def select_topp(
    value: Tensor,
    kind: ScoreKind,
    forced: Tensor,
    key_counts: Tensor,
    p: float,
    min_blocks: int,
    cap: int,
) -> Tensor:
    """The shortest prefix of the ranking with mass p exact, min_blocks .. cap blocks, and forced.

    value: mass >= 0 for kind "mass". key_counts: integers [nk], tokens of each key block, same
    device. p in (0, 1]. cap >= min_blocks. Otherwise as `select_topk`, and as
    `vidsparse.selector.topp`.
    """
    levels: Tensor = select(value, forced, kind, key_counts, [0], [p], min_blocks, cap)
    return levels


def select_quota(
    value: Tensor,
    forced: Tensor,
    levels: Sequence[int],
    ends: Sequence[int],
    min_blocks: int,
    budget: float,
) -> Tensor:
    """Blocks up to rank ends[l] at levels[l], in a row that costs at most `budget` exact blocks.

    levels: ascending in 0 .. 9, 0 first. ends: ascending, one per level. The forced and the first
    min_blocks blocks are exact whatever the budget, density * nk. Returns levels or SKIP; otherwise
    as `select_topk`, and as mode "quota" of `vidsparse.selector.pyramid`.
    """
    nk = value.shape[-1]
    bounds = [min(end, nk) for end in ends]
    chosen: Tensor = select(value, forced, "rank", None, list(levels), bounds, min_blocks, budget)
    return chosen


def select_mass(
    value: Tensor,
    kind: ScoreKind,
    forced: Tensor,
    key_counts: Tensor,
    levels: Sequence[int],
    mass: Sequence[float],
    min_blocks: int,
    budget: float,
) -> Tensor:
    """Blocks up to cumulative mass mass[l] at levels[l]: mode "mass" of the pyramid.

    mass: ascending in (0, 1], one per level. Otherwise as `select_quota` and `select_topp`.
    """
    chosen: Tensor = select(
        value, forced, kind, key_counts, list(levels), list(mass), min_blocks, budget
    )
    return chosen


def width(blocks: int) -> int:
    """Row width that a program is compiled for."""
    return max(MIN_WIDTH, 1 << (blocks - 1).bit_length())


def warps(width: int) -> int:
    """Warps per program for a row width."""
    return 1 if width < 1024 else 2 if width == 1024 else 4 if width == 2048 else 8


@operator("select")
def select(
    value: Tensor,
    forced: Tensor,
    rule: str,
    key_counts: Tensor | None,
    levels: list[int],
    bounds: list[float],
    min_blocks: int,
    budget: float,
) -> Tensor:
    """Run `select_kernel`, in the words of the functions above; budget in exact blocks."""
    _check(value, forced, rule, key_counts)
    ok = len(levels) == len(bounds) and tuple(levels[:1]) == (0,) and levels[-1] <= COARSEST.value
    if not ok:
        raise ValueError(
            f"levels {tuple(levels)}, bounds {tuple(bounds)}: expected as many bounds as levels, "
            f"levels ascending from 0 to at most {COARSEST.value}"
        )
    share = 1.0 if rule == "rank" else 1 - MARGIN
    batch, heads, nq, nk = value.shape
    out = torch.empty_like(value, dtype=torch.int8)
    nk_width = width(nk)
    with torch.cuda.device_of(value):
        select_kernel[(batch * heads * nq,)](
            value,
            forced.contiguous(),
            forced if key_counts is None else key_counts,
            out,
            nq,
            nk,
            min(min_blocks, nk),
            int((min(budget, nk) + 1e-9) * 2**COARSEST.value),
            tuple(bound * share for bound in bounds),
            LEVELS=tuple(levels),
            RULE=rule,
            NK=nk_width,
            num_warps=warps(nk_width),
            enable_fp_fusion=True,
        )
    return out


@select.register_fake
def _(
    value: Tensor,
    forced: Tensor,
    rule: str,
    key_counts: Tensor | None,
    levels: list[int],
    bounds: list[float],
    min_blocks: int,
    budget: float,
) -> Tensor:
    return torch.empty_like(value, dtype=torch.int8)


def _check(value: Tensor, forced: Tensor, rule: str, key_counts: Tensor | None) -> None:
    """Raise ValueError unless the kernel can read these tensors."""
    device = value.device
    if refusal := support.refusal(device):
        raise ValueError(f"selection in Triton: {refusal}; use vidsparse.selector")
    if value.dim() != 4 or value.dtype != torch.float32 or not value.is_contiguous():
        raise ValueError(
            f"value is {value.dtype} {tuple(value.shape)}, strides {value.stride()}: expected "
            "float32 [B, H, nq, nk], contiguous; use value.float().contiguous()"
        )
    nq, nk = value.shape[2:]
    if not 1 <= nk <= MAX_BLOCKS:
        raise ValueError(
            f"{nk} key blocks: selection in Triton takes 1 .. {MAX_BLOCKS}; use larger blocks "
            "(kernel.block_k)"
        )
    if forced.dtype != torch.bool or forced.shape != (nq, nk) or forced.device != device:
        raise ValueError(
            f"forced is {forced.dtype} {tuple(forced.shape)} on {forced.device}: "
            f"expected bool {(nq, nk)} on {device}"
        )
    if rule == "rank" and key_counts is None:
        return
    if rule not in ("logit", "mass"):
        raise ValueError(f"kind={rule!r}: allowed are 'logit' and 'mass'")
    if (
        key_counts is None
        or key_counts.dtype not in (torch.int32, torch.int64)
        or key_counts.shape != (nk,)
        or key_counts.device != device
        or not key_counts.is_contiguous()
    ):
        found = key_counts if key_counts is None else (key_counts.dtype, *key_counts.shape)
        raise ValueError(
            f"key_counts is {found}: expected int32 or int64 [{nk}], contiguous, on {device}"
        )
