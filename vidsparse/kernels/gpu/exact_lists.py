"""Packs a level map into plain lists of full key tiles, on the device: what an exact engine walks.

One launch, one program per list, in ascending order: no sort, no read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operator import operator

CHUNK = 1024
"""Key blocks that a program looks at in one turn."""

ABSENT = -1
"""Stands for the entry of a block that no list names."""


@triton.jit(do_not_specialize=["blocks", "width", "step"])
def pack_exact_kernel(  # type: ignore[no-untyped-def]
    p_levels,
    p_first,
    p_entry,
    p_count,
    blocks,
    width,
    step,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Blocks of level 0 as first + step * (0 .. PIECES - 1), none with first < 0. Grid (rows)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_j = tl.arange(0, CHUNK)
    used = 0
    p_list = p_entry + i_row * width
    for start in tl.range(0, blocks, CHUNK):
        j = start + o_j
        b_level = tl.load(p_levels + i_row * blocks + j, mask=j < blocks, other=-1)
        b_first = tl.load(p_first + j, mask=j < blocks, other=-1)
        wanted = (b_level == 0) & (b_first >= 0)
        b_wanted = wanted.to(tl.int32)
        at = used + (tl.cumsum(b_wanted, 0) - b_wanted) * PIECES
        for piece in tl.static_range(PIECES):
            tl.store(p_list + at + piece, b_first + piece * step, mask=wanted)
        used += tl.sum(b_wanted, 0) * PIECES
    tl.store(p_list + used, 0)
    tl.store(p_count + i_row, used)


@operator("pack_exact")
def pack_exact(
    levels: Tensor, first: Tensor, pieces: int, step: int, width: int
) -> tuple[Tensor, Tensor]:
    """entry int32 [B, H, nq, width] and count int32 [B, H, nq] of `exact.ExactLists`.

    levels int8 [B, H, nq, nk]: 0 for a block that is read as it is. first int32 [nk]: the entry of
    its first piece, or ABSENT: in no list; its pieces are `step` apart. width: at least pieces
    times the blocks that are not absent, and one.
    """
    levels = levels.contiguous()
    *rows, blocks = levels.shape
    entry = levels.new_empty(*rows, width, dtype=torch.int32)
    count = levels.new_empty(rows, dtype=torch.int32)
    with torch.cuda.device_of(levels):
        pack_exact_kernel[(count.numel(),)](
            *(levels, first, entry, count, blocks, width, step),
            PIECES=pieces,
            CHUNK=CHUNK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return entry, count


@pack_exact.register_fake
def _(levels: Tensor, first: Tensor, pieces: int, step: int, width: int) -> tuple[Tensor, Tensor]:
    rows = levels.shape[:3]
    count = levels.new_empty(rows, dtype=torch.int32)
    return levels.new_empty(*rows, width, dtype=torch.int32), count
