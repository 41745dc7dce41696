"""One call of the CPU engine: what its workers read and never write, and the jobs they share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from vidsparse.kernels.cpu.keys import Head, SharedHead, Slots, build_tables, moment
from vidsparse.plan import SKIP, BlockPlan

SCORE_ENTRIES = 128 * 4608
"""Entries of a worker's score buffer; wider rows run fewer queries at a time."""

MIN_QUERIES = 16
"""A row never runs fewer queries than this at a time."""

EXACT_WIDTHS = 8
"""Up to so many different row widths run as they are; see `Call.fit`."""

JOBS_AT_END = 8
"""Jobs per worker that the last heads are cut into."""

MIN_ROWS = 4
"""No job is cut to fewer query blocks, unless there are fewer than workers."""

NEG_INF = float("-inf")


@dataclass
class Job:
    """The rows from `first` to before `end` of one head."""

    batch: int
    head: int
    first: int
    end: int
    shared: SharedHead


class Call:
    """What all workers of one call read.

    levels: those that some row lists. rest: whether centroid columns are needed. front: number of
    moment and centroid columns, of these `reserved` moment columns. widths: columns of every row
    before rounding; width: of the widest row; rows, entries: sizes of a worker's workspace and
    score buffer. product: FLOP of the average product. whole: all queries of a block run at once.
    """

    def __init__(
        self,
        q: Tensor,
        out: Tensor,
        lse: Tensor | None,
        plan: BlockPlan,
        score_dtype: torch.dtype,
        value_dtype: torch.dtype,
        whole: bool = False,
    ) -> None:
        self.q, self.out, self.lse, self.plan, self.whole = q, out, lse, plan, whole
        self.score_dtype, self.value_dtype = score_dtype, value_dtype
        wide = score_dtype == torch.float64
        self.bias_dtype = torch.float64 if wide else torch.float32
        self.depth, self.scale = q.shape[-1], q.shape[-1] ** -0.5
        self.slots = Slots(plan.k_blocks)
        self.top, self.nk = plan.k_blocks.levels, len(plan.k_blocks)
        counts = plan.counts
        self.levels = counts.flatten(0, -2).sum(0).nonzero()[:, 0].tolist()
        self.rest = plan.rest != SKIP and bool((counts.sum(-1) < self.nk).any())
        self.first_order = self.rest and plan.first_order == "global"
        self.reserved = self.depth if self.first_order and not whole else 0
        self.front = self.reserved + (self.nk if self.rest else 0)
        self.first_q = plan.q_blocks.start.tolist()
        self.count_q = plan.q_blocks.count.tolist()
        self.block_q: int = max(self.count_q)
        self.index = plan.index.contiguous()
        self.ids = self.index.numpy().data if self.slots.short else None
        self._size_workspace(counts)

    def _size_workspace(self, counts: Tensor) -> None:
        groups = self.slots.size // 2 ** torch.arange(self.top + 1, device="cpu")
        gathered = (counts * groups).sum(-1)
        self.widths = gathered + self.front * (counts.sum(-1) < self.nk)
        self.product = 2 * self.block_q * self.depth * float(self.widths.double().mean())
        self.exact = self.widths.unique().numel() <= EXACT_WIDTHS
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
        while not self.whole and queries * width > SCORE_ENTRIES and queries >= 2 * MIN_QUERIES:
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
        """A job per head; the last heads are cut, so that all workers end at about the same time.

        No worker has to keep pace: a core may be busy with other work, for example with a thread of
        OpenMP that spins for milliseconds after every parallel operation.
        """
        places = [divmod(n, self.q.shape[1]) for n in range(self.q.shape[0] * self.q.shape[1])]
        cut = len(places) % workers or workers
        for place in places[:-cut]:
            yield Job(*place, 0, len(self.count_q), SharedHead(partial(self._build, k, v, *place)))
        parts = -(-JOBS_AT_END * workers // cut) if workers > 1 else 1
        parts = max(min(parts, len(self.count_q) // MIN_ROWS), -(-workers // cut))
        split = [
            [Job(*place, *rows, shared) for rows in self._row_ranges(*place, parts)]
            for place in places[-cut:]
            for shared in [SharedHead(partial(self._build, k, v, *place))]
        ]
        for jobs in zip_longest(*split):
            yield from (job for job in jobs if job is not None)

    def _row_ranges(self, batch: int, head: int, parts: int) -> list[tuple[int, int]]:
        """(first row, end) of consecutive parts with about the same number of scores."""
        work = (self.widths[batch, head] * self.plan.q_blocks.count).cumsum(0)
        goals = work[-1] * torch.arange(1, parts, device="cpu") / parts
        cuts = [0, *torch.searchsorted(work.double(), goals.double()).tolist(), len(work)]
        return [(a, b) for a, b in pairwise(cuts) if a < b]

    def _build(self, k: Tensor, v: Tensor, batch: int, head: int) -> Head:
        """What the rows of one head share."""
        levels = sorted({*self.levels, self.top} if self.rest else self.levels)
        keys = build_tables(k[batch, head], self.slots, levels, self.score_dtype)
        values = build_tables(v[batch, head], self.slots, levels, self.value_dtype)
        order = None
        if self.first_order:
            means = keys[self.top]
            if self.whole:
                means = self.slots.pool(keys[0], self.top, self.depth)
            order = moment(keys[0], values[0], self.slots, means)
            order = order if self.whole else order.to(self.value_dtype)
        return Head(keys, values, order, self._bias(batch, head) if self.rest else None)

    def _bias(self, batch: int, head: int) -> Tensor:
        """[rows, front]: -inf in moment columns and for listed blocks, ln n_j for all others."""
        starts = self.plan.starts[batch, head]
        listed = self.index[starts[0, 0] : starts[-1, -1]]
        counts = starts[:, -1] - starts[:, 0]
        assert len(listed) == counts.sum(), "the lists of a head stand one behind the other"
        bias = torch.full((len(starts), self.front), NEG_INF, dtype=self.bias_dtype, device="cpu")
        bias[:, self.reserved :] = self.slots.log_counts
        rows = torch.repeat_interleave(torch.arange(len(starts), device="cpu"), counts)
        bias[rows, self.reserved + listed] = NEG_INF
        return bias
