"""Draft: q, k and v of a call as the stages see them before anything is computed exactly.

Over a block, what is drafted are means and second moments of its tokens:

    logits_ij = s qbar_i . kbar_j
    spread_ij = s^2 / 2 sum_d (mean over i of q_d^2) (variance over j of k_d)

with s = 1/sqrt(D). The spread is half the variance that the logits of a typical query of i have
inside block j, with the axes taken as independent: exp(logits + spread) is the mean of exp over the
block to second order, where the centroid alone, by Jensen, says too little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.clusters import Clusters
from vidsparse.kernels.gpu import support
from vidsparse.plan import StepContext

TINY = 1e-37
"""Stands for an error of nothing, as of a block whose values and logits are all the same."""
SCRATCH = 1 << 24
"""Numbers in a temporary of a few heads or rows, at most, unless one alone is more: 64 MiB."""
CACHED = 1 << 19
"""The same on a CPU, where what is read again at once should still be in the cache of a core."""


class Orders(NamedTuple):
    """What a layout gives heads: orders of queries and of keys, int64 [B, H, S], as a `Draft` takes
    them; bool [B, H], the heads that have one; and the clusters of queries and of keys that stand
    in them, if it makes any."""

    order_q: Tensor
    order_k: Tensor
    who: Tensor
    clusters: tuple[Clusters, Clusters] | None = None


class Making(NamedTuple):
    """What it costs to make the orders of so many heads: FLOPs, bytes that are read and written,
    operations that the host of a GPU starts; bytes that are kept beside the orders; how many
    clusters of queries and of keys there are."""

    flops: float
    bytes: float
    launches: float
    kept: float
    clusters: tuple[int, int]


@dataclass(frozen=True)
class Draft:
    """q [B, H, Sq, D], k, v [B, H, Sk, D], after norm and RoPE, any float dtype, views too.

    Position t of the query (key) blocks is token order_q[.., t] of q (order_k[.., t] of k and v),
    int64 [S] for all heads or [B, H, S]; None: token t. key_means: float32 [B, H, nk, D], if
    somebody has made them already. second: second moments will be asked for, so means come from the
    same read. forced: bool [nq, nk] or [H, nq, nk], blocks that are exact in any case. context: of
    the call, if it is known. clusters: of queries and of keys, if a layout has made them in these
    orders; a layout is given those of an earlier step. Means and sums run over the real tokens of a
    block only, in fp32 (float64 for float64).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    order_q: Tensor | None = None
    order_k: Tensor | None = None
    key_means: Tensor | None = None
    second: bool = False
    forced: Tensor | None = None
    context: StepContext | None = None
    clusters: tuple[Clusters, Clusters] | None = None

    def ordered(self, order_q: Tensor, order_k: Tensor) -> Draft:
        """The same tokens in other orders."""
        return replace(self, order_q=order_q, order_k=order_k, key_means=None)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @cached_property
    def in_triton(self) -> bool:
        """Whether Triton kernels draft this."""
        sizes = {self.q_blocks.size, self.k_blocks.size}
        able = sizes <= set(support.BLOCK_SIZES) and self.q.shape[-1] <= support.MAX_HEAD_DIM
        return able and support.kernels("draft", self.q) is not None

    @cached_property
    def q_means(self) -> Tensor:
        """[B, H, nq, D]."""
        return self._of_q[0] if self.second else self.means_of(self.q, self.q_blocks, self.order_q)

    @cached_property
    def k_means(self) -> Tensor:
        """[B, H, nk, D]."""
        if self.key_means is not None:
            return self.key_means
        return self._of_k[0] if self.second else self.means_of(self.k, self.k_blocks, self.order_k)

    @cached_property
    def value_norms(self) -> tuple[Tensor, Tensor]:
        """Of the values of each key block: |mean|^2 and the mean of |v|^2, [B, H, nk] both."""
        if self.in_triton:
            return self._in_one_read(self.v, self.k_blocks, self.order_k, norms=True)
        means, squares = self._moments(self.v, self.k_blocks, self.order_k)
        return means.square().sum(-1), squares.sum(-1)

    @cached_property
    def logits(self) -> Tensor:
        """float32 [B, H, nq, nk]. Formula in the module docstring."""
        if self.in_triton:
            counts = (pieces(b, 1, self.q.device)[1] for b in (self.q_blocks, self.k_blocks))
            kernels = support.kernels("draft", self.q)
            found: Tensor = kernels.draft_scores(self.q_means, self.k_means, *counts, 1, self.scale)
            return found
        return torch.matmul(self.q_means * self.scale, self.k_means.mT).float()

    @cached_property
    def spread(self) -> Tensor:
        """float32 [B, H, nq, nk], >= 0. Formula in the module docstring."""
        if self.in_triton:
            return self.in_one_pass("spread", inf)
        of_q, variance = self._of_q[1], self._of_k[1] - self.k_means.square()
        half = 0.5 * self.scale**2
        return torch.matmul(of_q * half, variance.clamp_(min=0).mT).float()

    def in_one_pass(self, rule: str, bound: float, tiny: float = 0.0) -> Tensor:
        """float32 [B, H, nq, nk] by a rule of `vidsparse.kernels.gpu.spread`; in Triton alone."""
        values: list[Tensor] = []
        if rule == "moments":
            values = [pieces(self.k_blocks, 1, self.k.device)[1], *self.value_norms]
        kernels = support.kernels("spread", self.q)
        moments = *self._of_q, self.k_means, self._of_k[1]
        found: Tensor = kernels.draft_spread(*moments, rule, self.scale, bound, tiny, values)
        return found

    def means_of(self, x: Tensor, blocks: Blocks, order: Tensor | None) -> Tensor:
        """[B, H, blocks, D] of q, k or v in an order of theirs."""
        if self.in_triton:
            start, count = pieces(blocks, 1, x.device)
            kernels = support.kernels("means", x)
            found: Tensor = kernels.block_means(x, start, count, blocks.size, order)
            return found
        return blocks.mean(taken(x, order))

    @cached_property
    def _of_q(self) -> tuple[Tensor, Tensor]:
        return self._moments(self.q, self.q_blocks, self.order_q)

    @cached_property
    def _of_k(self) -> tuple[Tensor, Tensor]:
        return self._moments(self.k, self.k_blocks, self.order_k)

    def _moments(self, x: Tensor, blocks: Blocks, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, H, n, D] twice: means of q, k or v over the tokens of each block, and of its squares;
        in torch a few heads at once, on a CPU one."""
        if self.in_triton:
            return self._in_one_read(x, blocks, order, norms=False)
        batch, heads, tokens, depth = x.shape
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        means, squares = [], []
        for b in range(batch):
            for cut in strips(heads, tokens * depth, scratch(x)):
                some, own = (cut.start, cut.stop - cut.start), order
                if order is not None and order.ndim == 3:
                    own = order.narrow(0, b, 1).narrow(1, *some)
                part = x.narrow(0, b, 1).narrow(1, *some)
                part = taken(part, own).to(wide)
                means.append(blocks.mean(part))
                squares.append(blocks.mean(part.square()))
        whole = batch, heads, len(blocks), depth
        return torch.cat(means, 1).view(whole), torch.cat(squares, 1).view(whole)

    def _in_one_read(
        self, x: Tensor, blocks: Blocks, order: Tensor | None, norms: bool
    ) -> tuple[Tensor, Tensor]:
        kernels = support.kernels("moments", x)
        place = *pieces(blocks, 1, x.device), blocks.size, order
        found: tuple[Tensor, Tensor] = kernels.second_moments(x, *place, norms)
        return found


def taken(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, H, S, D] in an order of its tokens, int64 [S] or [B, H, S]; None: as it is."""
    if order is None:
        return x
    if order.ndim == 1:
        return x.index_select(2, order)
    found = x.new_empty(x.shape)
    for b, h in product(range(x.shape[0]), range(x.shape[1])):
        # `gather` takes an index as large as x
        head, own = (y.select(0, b).select(0, h) for y in (x, order))
        torch.index_select(head, 0, own, out=found.select(0, b).select(0, h))
    return found


@lru_cache(maxsize=16)
def pieces(blocks: Blocks, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """start int64, count int32 [n * parts]: each block in pieces, some of them without a token."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        size = blocks.size // parts
        offset = torch.arange(parts) * size
        start = (blocks.start[:, None] + offset).flatten()
        count = (blocks.count[:, None] - offset).clamp(0, size).flatten()
        return start.to(device), count.to(device, torch.int32)


def scratch(x: Tensor) -> int:
    """Numbers in a temporary of what is made from x and read again at once."""
    return CACHED if x.device.type == "cpu" else SCRATCH


def strips(rows: int, numbers: int, most: int = SCRATCH) -> Iterator[slice]:
    """Cuts of `rows` rows of so many numbers each, as many rows at a time as `most` numbers are."""
    step = max(1, most // max(1, numbers))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
