"""The nouns of the Triton engine: tilings, query blocks, and the key buffer of plans with levels.

A list entry of such a plan is int32, `shift << 24 | tile`: rows tile * BN .. + BN of the key
buffer, 2^shift rows to a key block. A list names tiles inside one block first, then those of
several blocks, which have an int64 of bits each, bit i set if the i-th block is wanted. What
belongs to the next tile is loaded one turn ahead, so entries and bits of a list end in a spare, the
entry a valid tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from vidsparse.kernels.gpu.support import MAX_HEAD_DIM

HEAD_DIMS = (64, MAX_HEAD_DIM)
"""Widths of the key buffer; a smaller head dim is padded with zeros."""


@cache
def padded_width(depth: int) -> int:
    """The least of `HEAD_DIMS` that holds `depth` elements."""
    return next(width for width in HEAD_DIMS if width >= depth)


@dataclass(frozen=True)
class Tiling:
    """block_m queries x block_n keys per step, warps per program, stages of the K/V pipeline.

    registers: the most that a thread may use, None leaves it to the compiler. split: tiles without
    bits have a loop of their own, a sixth shorter, at the price of registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None
    split: bool = True

    def within(self, block_q: int, block_k: int) -> Tiling:
        """The same with tiles no larger than the blocks, and no more warps than rows keep busy."""
        block_m, block_n = min(self.block_m, block_q), min(self.block_n, block_k)
        warps = self.warps if block_m == self.block_m else min(self.warps, max(4, block_m // 16))
        return replace(self, block_m=block_m, block_n=block_n, warps=warps)


@dataclass(frozen=True)
class Keys:
    """k, v [B, H, R, DP], finite; bias float32 [R], log2 of the tokens behind a row.

    Equal strides, the rows of a head contiguous; R is a multiple of block_n, DP one of `HEAD_DIMS`;
    rows without a token have bias -inf.
    """

    k: Tensor
    v: Tensor
    bias: Tensor


@dataclass(frozen=True)
class TileLists:
    """entry int32 [rows, W]; bits int64 [rows, V], or None if every tile is inside one block.

    count int32 [rows]: entries in use, <= W - 1; whole int32 [rows]: those of them inside one
    block, so that count - whole of the bits are in use, < V; rows = B * H * nq.
    """

    entry: Tensor
    bits: Tensor | None
    count: Tensor
    whole: Tensor


@dataclass(frozen=True)
class QueryRows:
    """start int64 [nq], count int32 [nq]: tokens of each query block; size: its nominal size.

    order: int64 [S], or [B, H, S] for each head, contiguous: position t of the blocks is token
        order[.., t] of q and of the output; None: t.
    """

    start: Tensor
    count: Tensor
    size: int
    order: Tensor | None = None

    @property
    def order_head(self) -> int:
        """Elements from the order of one head to the next."""
        return order_head(self.order)


def order_head(order: Tensor | None) -> int:
    """Elements from the order of one head to the next: 0 for one of all heads."""
    return 0 if order is None or order.ndim == 1 else order.shape[-1]


@dataclass(frozen=True)
class Means:
    """Centroids: k, v [B, H, R, DP], equal strides, the rows of a head contiguous, R >= nk.

    bias float32 [R]: log2 of the tokens behind a row, -inf past the last block. R is a multiple of
    every tile's height.
    """

    k: Tensor
    v: Tensor
    bias: Tensor


@dataclass(frozen=True)
class ShortBlocks:
    """int32 [n] each: id, first row and rows of the key blocks that no tile of an engine covers."""

    block: Tensor
    first: Tensor
    count: Tensor


@dataclass(frozen=True)
class Scales:
    """Of int8 q and k, as `quant` makes them; contiguous float32.

    q [B, H, nq * parts], one per block_m queries of a query block; k [B, H, R / block_n], one per
    tile; shift [B, H, S], added to the LSE: (q . vector removed from every key) / sqrt(D).
    """

    q: Tensor
    k: Tensor
    shift: Tensor
