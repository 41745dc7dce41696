"""One call of the CPU engine: what its workers read and never write, and the jobs they share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vidsparse.kernels.cpu_keys import SharedHead, Slots, build_head
from vidsparse.plan import SKIP, BlockPlan

SCORE_ENTRIES = 128 * 4608
"""Entries of a worker's score buffer; wider rows run fewer queries at a time."""

MIN_QUERIES = 16
"""A row never runs fewer queries than this at a time."""

EXACT_WIDTHS = 8
"""Up to so many different row widths run as they are; see `Call.fit`."""


@dataclass
class Job:
    """Rows first, first + step, ... of one head."""

    batch: int
    head: int
    first: int
    step: int
    shared: SharedHead


class Call:
    """What all workers of one call read.

    levels: those that some row lists. rest: whether centroid columns are needed. front: number of
    moment and centroid columns, of these `reserved` moment columns. width: of the widest row; rows,
    entries: sizes of a worker's workspace and score buffer. product: FLOP of the average product.
    """

    def __init__(
        self,
        q: Tensor,
        out: Tensor,
        lse: Tensor | None,
        plan: BlockPlan,
        score_dtype: torch.dtype,
        value_dtype: torch.dtype,
    ) -> None:
        self.q, self.out, self.lse, self.plan = q, out, lse, plan
        self.score_dtype, self.value_dtype = score_dtype, value_dtype
        self.depth, self.scale = q.shape[-1], q.shape[-1] ** -0.5
        self.slots = Slots(plan.k_blocks)
        self.top, self.nk = plan.k_blocks.levels, len(plan.k_blocks)
        counts = plan.counts
        self.levels = counts.flatten(0, -2).sum(0).nonzero()[:, 0].tolist()
        self.rest = plan.rest != SKIP and bool((counts.sum(-1) < self.nk).any())
        self.first_order = self.rest and plan.first_order == "global"
        self.reserved = self.depth if self.first_order else 0
        self.front = self.reserved + (self.nk if self.rest else 0)
        self.first_q = plan.q_blocks.start.tolist()
        self.end_q = (plan.q_blocks.start + plan.q_blocks.count).tolist()
        self.block_q = int(plan.q_blocks.count.max())
        self.index = plan.index.contiguous()
        self.ids = self.index.numpy().data if self.slots.short else None
        self._size_workspace(counts)

    def _size_workspace(self, counts: Tensor) -> None:
        groups = self.slots.size // 2 ** torch.arange(self.top + 1, device="cpu")
        gathered = (counts * groups).sum(-1)
        widths = gathered + self.front * (counts.sum(-1) < self.nk)
        self.product = 2 * self.block_q * self.depth * float(widths.double().mean())
        self.exact = widths.unique().numel() <= EXACT_WIDTHS
        most = int(gathered.max())
        self.width = self.fit(self.front + most)
        self.rows = self.front + (most if self.exact else self.width)
        most_entries = max(SCORE_ENTRIES, 2 * MIN_QUERIES * self.width)
        self.entries = min(self.block_q * self.width, most_entries)
        if self.q.dtype != self.score_dtype:  # exact blocks of the widest row wait in the scores
            waiting = int(counts[..., 0].max()) * self.slots.size * self.depth
            self.entries = max(self.entries, -(-waiting // 2))

    def fit(self, width: int) -> int:
        """The width at which a row of `width` columns runs.

        The first product of a new shape costs oneDNN milliseconds, more than the product itself.
        Ragged plans have hundreds of widths, so these are rounded up to 16 per octave (2 % on
        average); plans with few widths run as they are.
        """
        if self.exact:
            return width
        step = max(16, 1 << max(0, width.bit_length() - 5))
        return -(-width // step) * step

    def queries(self, width: int) -> int:
        """How many queries of a block run at once at this width."""
        queries = self.block_q
        while queries * width > SCORE_ENTRIES and queries >= 2 * MIN_QUERIES:
            queries //= 2
        return queries

    def short_entries(self, bounds: list[int]) -> tuple[tuple[int, int, int], ...]:
        """(level, position in the level's list, block) of the short blocks that a row lists."""
        found = []
        if self.ids is not None:
            for level in self.levels:
                a, b = bounds[level], bounds[level + 1]
                for block in self.slots.short:
                    at = bisect_left(self.ids, block, a, b)
                    if at < b and self.ids[at] == block:
                        found.append((level, at - a, block))
        return tuple(found)

    def jobs(self, k: Tensor, v: Tensor, workers: int) -> Iterator[Job]:
        """One job per head; heads that do not fill all workers are cut into interleaved rows."""
        batch, heads = self.q.shape[:2]
        levels = sorted({*self.levels, self.top} if self.rest else self.levels)
        for n in range(batch * heads):
            b, h = divmod(n, heads)
            shared = SharedHead(
                partial(
                    build_head,
                    k[b, h],
                    v[b, h],
                    self.slots,
                    levels,
                    self.score_dtype,
                    self.value_dtype,
                    self.first_order,
                )
            )
            whole = n < batch * heads - batch * heads % workers
            parts = 1 if whole else min(workers, len(self.first_q))
            for part in range(parts):
                yield Job(b, h, part, parts, shared)
