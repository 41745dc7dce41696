"""One call of the CPU engine: what its workers read and never write, and the jobs they share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from vidsparse.kernels.cpu.keys import Head, SharedHead, Slots, build_tables, moment
from vidsparse.plan import BlockPlan

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

MIN_STRETCH, MAX_STRETCH = 32, 64
"""Rows whose moments are made at once: many, to make those of key blocks seldom, few in memory."""

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

    levels: those that some row lists. far: bool [B, H, nq], whether a row needs centroid columns;
    rest: whether any does. front: number of moment and centroid columns, of these `reserved` moment
    columns. row_moments: whether the first-order term differs from row to row; stretch: of how many
    rows its moments are made at once. widths: columns of every row before rounding; width: of the
    widest row; rows, entries: sizes of a worker's workspace and score buffer. product: FLOP of the
    average product. whole: all queries of a block run at once.
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
        self.far = plan.read_as_rest().any(-1)
        self.rest = bool(self.far.any())
        self.row_moments = self.rest and plan.first_order == "row"
        columns = self.rest and plan.first_order != "none" and not whole
        self.reserved = self.depth if columns else 0
        self.front = self.reserved + (self.nk if self.rest else 0)
        self.first_q = plan.q_blocks.start.tolist()
        self.count_q = plan.q_blocks.count.tolist()
        self.block_q: int = max(self.count_q)
        self.stretch = min(MAX_STRETCH, max(MIN_STRETCH, -(-len(self.count_q) // 2)))
        self.index = plan.index.contiguous()
        self.ids = self.index.numpy().data if self.slots.short else None
        self._size_workspace(counts)

    def _size_workspace(self, counts: Tensor) -> None:
        groups = self.slots.size // 2 ** torch.arange(self.top + 1, device="cpu")
        gathered = (counts * groups).sum(-1)
        self.widths = gathered + self.front * self.far
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

    def span(self, rows: Sequence[int]) -> slice:
        """The positions of the queries of neighbouring rows."""
        return slice(self.first_q[rows[0]], self.first_q[rows[-1]] + self.count_q[rows[-1]])

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
        if self.row_moments:  # whole stretches, so that no bit depends on the number of workers
            cuts = [min(len(work), round(at / self.stretch) * self.stretch) for at in cuts]
            cuts[-1] = len(work)
        return [(a, b) for a, b in pairwise(cuts) if a < b]

    def _build(self, k: Tensor, v: Tensor, batch: int, head: int) -> Head:
        """What the rows of one head share."""
        levels = sorted({*self.levels, self.top} if self.rest else self.levels)
        order_k = None if self.plan.order_k is None else self.plan.order_k[batch, head]
        keys = build_tables(k[batch, head], self.slots, levels, self.score_dtype, order_k)
        values = build_tables(v[batch, head], self.slots, levels, self.value_dtype, order_k)
        if not self.rest:
            return Head(keys, values)
        whole, means = None, None
        bias, rest = self._bias(batch, head), (keys[self.top], values[self.top])
        if self.plan.first_order != "none":
            pooled = self.slots.pool(keys[0], self.top, self.depth) if self.whole else rest[0]
            means = pooled.to(self.bias_dtype)
            if self.plan.first_order == "global":
                whole = moment(keys[0], values[0], self.slots, means)
                whole = whole if self.whole else whole.to(self.value_dtype)
        found = Head(keys, values, whole, bias, rest, means)
        return found if self.plan.rest_bias is None else self._contained(found, bias)

    def _contained(self, head: Head, bias: Tensor) -> Head:
        """The same head; blocks of it that are not finite reach the rows alone that read them."""
        assert head.rest is not None
        broken = ~(head.rest[0].isfinite() & head.rest[1].isfinite()).all(1)
        if not bool(broken.any()):
            return head
        columns = bias[:, self.reserved :]
        columns.masked_fill_(broken & (columns != NEG_INF), float("nan"))
        keys, values = (x.masked_fill(broken[:, None], 0.0) for x in head.rest)
        means = None if head.means is None else head.means.masked_fill(broken[:, None], 0.0)
        return replace(head, rest=(keys, values), means=means, broken=broken)

    def _bias(self, batch: int, head: int) -> Tensor:
        """[rows, front]: -inf in moment columns and for listed blocks, ln n_j + bias for others."""
        starts = self.plan.starts[batch, head]
        listed = self.index[starts[0, 0] : starts[-1, -1]]
        counts = starts[:, -1] - starts[:, 0]
        assert len(listed) == counts.sum(), "the lists of a head stand one behind the other"
        bias = torch.full((len(starts), self.front), NEG_INF, dtype=self.bias_dtype, device="cpu")
        bias[:, self.reserved :] = self.slots.log_counts
        if self.plan.rest_bias is not None:
            bias[:, self.reserved :] += self.plan.rest_bias[batch, head]
        rows = torch.repeat_interleave(torch.arange(len(starts), device="cpu"), counts)
        bias[rows, self.reserved + listed] = NEG_INF
        return bias
