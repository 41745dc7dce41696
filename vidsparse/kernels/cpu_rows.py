"""The row loop of the CPU engine: gather, one GEMM, one softmax, one GEMM per query block.

For every query block the groups that its plan lists are gathered into one workspace,

    [ moment | centroids of the rest | pooled levels, coarse to fine | exact tokens ]

so that all levels share one softmax. Centroids are written once per head; the bias of a centroid
column is ln n_j, or -inf where the row lists the block. A pooled group has the bias of its number
of tokens. The moment columns have no score (-inf); after the softmax they hold G_t s q_t, and
their values H / N_v add the first-order term inside the second GEMM. Short blocks are padded with
zeros; where their padding is not overwritten or cut off, its columns have the bias -inf. No matrix
is allocated inside the loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vidsparse.kernels.cpu_call import NEG_INF, Call, Job
from vidsparse.kernels.cpu_keys import Head

ROWS_AT_ONCE = 4
"""Query blocks that are converted and scaled together."""

FIRST_ROWS = 16
"""Rows of weights that are rounded through a buffer; see `Worker._rounding`."""


@dataclass
class Gather:
    """Blocks of one level: where they go, and where their exact form waits to be converted."""

    level: int
    keys: Tensor
    values: Tensor
    staged: Tensor | None


@dataclass
class Tile:
    """Views of the score buffer for one number of queries.

    far, pooled, dead: columns that get a bias. weights: what the second product reads; rounding:
    the copies, to and from, that turn scores into weights.
    """

    score: Tensor
    far: Tensor | None
    pooled: Tensor | None
    dead: list[Tensor]
    weights: Tensor
    rounding: list[tuple[Tensor, Tensor]]
    out: Tensor | None
    peak: Tensor


@dataclass
class Columns:
    """The workspace of rows that list equally many blocks of every level, and views of it.

    keys [D, width], values [width, D]; far: number of moment and centroid columns, or 0; pooled:
    first and last pooled column and their bias; dead: columns without meaning; spare: workspace
    rows behind the groups.
    """

    keys: Tensor
    values: Tensor
    width: int
    far: int
    gathers: list[Gather]
    pooled: tuple[int, int, Tensor] | None
    dead: list[tuple[int, int]]
    spare: list[Tensor]
    queries: int
    tiles: dict[int, Tile] = field(default_factory=dict)


Signature = tuple[bool, tuple[int, ...], tuple[tuple[int, int, int], ...]]


class Worker:
    """Scratch memory of one thread, and the row loop."""

    def __init__(self, call: Call) -> None:
        self.call = call
        score, value, given = call.score_dtype, call.value_dtype, call.q.dtype
        empty = partial(torch.empty, device="cpu")
        self.k = empty(call.rows, call.depth, dtype=score)
        self.v = empty(call.rows, call.depth, dtype=value)
        self.q = empty(ROWS_AT_ONCE * call.block_q, call.depth, dtype=score)
        self.score = empty(call.entries, dtype=score)
        self.peak = empty(call.block_q, dtype=score)
        self.mass = empty(call.block_q, 1, dtype=score)
        # gathered blocks wait here for their conversion, before there are scores
        self.stage = self.score.view(given) if given != score else None
        self.first = empty(FIRST_ROWS * call.width if value != score else 0, dtype=value)
        self.out = empty(call.block_q, call.depth, dtype=value) if value != given else None
        self.k[: call.reserved].zero_()
        self.columns: dict[Signature, Columns | None] = {}

    def run(self, job: Job) -> None:
        """All rows of a job."""
        call, place = self.call, (job.batch, job.head)
        head = job.shared.get()
        if call.rest:
            self.k[call.reserved : call.front].copy_(head.keys[call.top])
            self.v[call.reserved : call.front].copy_(head.values[call.top])
        if head.moment is not None:
            self.v[: call.reserved].copy_(head.moment)
        bias = None if head.bias is None else head.bias.unbind()
        bounds = call.plan.starts[place].tolist()
        for first in range(job.first, job.end, ROWS_AT_ONCE):
            end = min(first + ROWS_AT_ONCE, job.end)
            sizes = call.count_q[first:end]
            a, b = call.first_q[first], call.first_q[first] + sum(sizes)
            q = self.q[: b - a].copy_(call.q[place][a:b]).mul_(call.scale).split(sizes)
            out = call.out[place][a:b].split(sizes)
            lse = [None] * len(sizes) if call.lse is None else call.lse[place][a:b].split(sizes)
            for n, row in enumerate(range(first, end)):
                columns = self._prepare(head, bounds[row])
                self._row(columns, None if bias is None else bias[row], q[n], out[n], lse[n])

    def _row(
        self,
        columns: Columns | None,
        bias: Tensor | None,
        q: Tensor,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """The queries of one block, as many at a time as the score buffer takes."""
        if columns is None:
            out.zero_()
            if lse is not None:
                lse.fill_(NEG_INF)
        elif len(q) <= columns.queries:
            self._attend(columns, bias, q, out, lse)
        else:
            for a in range(0, len(q), columns.queries):
                part = slice(a, a + columns.queries)
                self._attend(columns, bias, q[part], out[part], None if lse is None else lse[part])

    def _prepare(self, head: Head, bounds: list[int]) -> Columns | None:
        """Fill the workspace for a row. None: the row reads nothing."""
        call = self.call
        signature = (
            call.rest and bounds[-1] - bounds[0] < call.nk,
            tuple([bounds[level + 1] - bounds[level] for level in call.levels]),
            call.short_entries(bounds),
        )
        if signature not in self.columns:
            self.columns[signature] = self._layout(*signature)
        columns = self.columns[signature]
        if columns is None:
            return None
        for gather in columns.gathers:
            ids = call.index[bounds[gather.level] : bounds[gather.level + 1]]
            self._gather(head.keys[gather.level], ids, gather.keys, gather.staged)
            self._gather(head.values[gather.level], ids, gather.values, gather.staged)
        for rows in columns.spare:
            rows.zero_()
        return columns

    @staticmethod
    def _gather(table: Tensor, ids: Tensor, out: Tensor, staged: Tensor | None) -> None:
        if table.dtype == out.dtype:
            torch.index_select(table, 0, ids, out=out)
        else:
            assert staged is not None
            torch.index_select(table, 0, ids, out=staged)
            out.copy_(staged)

    def _layout(
        self, far: bool, counts: tuple[int, ...], shorts: tuple[tuple[int, int, int], ...]
    ) -> Columns | None:
        """Place the levels of a row, coarse to fine, behind the centroids."""
        call, slots = self.call, self.call.slots
        start = 0 if far else call.front
        at, gathers, dead, biases = call.front, [], [], []
        for level, count in reversed(list(zip(call.levels, counts, strict=True))):
            if count == 0:
                continue
            size = slots.size >> level
            end = at + count * size
            shape = (count, size * call.depth)
            staged = None
            if level == 0 and self.stage is not None:
                staged = self.stage[: count * shape[1]].view(shape)
            gathers.append(
                Gather(level, self.k[at:end].view(shape), self.v[at:end].view(shape), staged)
            )
            bias = self.score.new_full((count * size,), level * math.log(2.0))
            for _, position, block in (s for s in shorts if s[0] == level):
                first, groups = position * size, slots.groups(level, block)
                bias[first + groups - 1] = math.log(slots.last_group(level, block))
                if position == count - 1:  # the next level overwrites its padding
                    end = at + first + groups
                else:
                    dead.append((at + first + groups - start, at + first + size - start))
            if level > 0:
                biases.append(bias[: end - at])
            at = end
        width = at - start
        if width == 0:
            return None
        fitted = call.fit(width)
        spare = []
        if fitted > width:
            dead.append((width, fitted))
            spare = [x[at : start + fitted] for x in (self.k, self.v)]
        pooled = None
        if biases:
            vector = torch.cat(biases)
            pooled = (call.front - start, call.front - start + len(vector), vector)
        return Columns(
            self.k[start : start + fitted].T,
            self.v[start : start + fitted],
            fitted,
            call.front if far else 0,
            gathers,
            pooled,
            dead,
            spare,
            call.queries(fitted),
        )

    def _tile(self, columns: Columns, queries: int) -> Tile:
        width, entries = columns.width, queries * columns.width
        score = self.score[:entries].view(queries, width)
        pooled = columns.pooled
        weights, rounding = self._rounding(score)
        return Tile(
            score,
            score[:, : columns.far] if columns.far else None,
            score[:, pooled[0] : pooled[1]] if pooled else None,
            [score[:, a:b] for a, b in columns.dead],
            weights,
            rounding,
            None if self.out is None else self.out[:queries],
            self.peak[:queries],
        )

    def _rounding(self, score: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Weights of half the size in the front half of the same memory, and the copies to make.

        Rows 2^i .. 2^(i+1) of the weights take the place of rows 2^(i-1) .. 2^i of the scores,
        which have been copied already; only the first rows need a buffer of their own.
        """
        if self.call.value_dtype == self.call.score_dtype:
            return score, []
        rows, width = score.shape
        weights = self.score.view(self.call.value_dtype)[: rows * width].view(rows, width)
        end = min(rows, FIRST_ROWS)
        first = self.first[: end * width].view(end, width)
        copies = [(first, score[:end]), (weights[:end], first)]
        while end < rows:
            start, end = end, min(rows, 2 * end)
            copies.append((weights[start:end], score[start:end]))
        return weights, copies

    def _attend(
        self,
        columns: Columns,
        bias: Tensor | None,
        q: Tensor,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """One softmax over the workspace: scaled q [m, D] -> out [m, D], lse [m]."""
        call, m = self.call, q.shape[0]
        if m not in columns.tiles:
            columns.tiles[m] = self._tile(columns, m)
        tile = columns.tiles[m]
        score = tile.score
        torch.mm(q, columns.keys, out=score)
        if tile.far is not None and bias is not None:
            tile.far.add_(bias)
        if columns.pooled is not None and tile.pooled is not None:
            tile.pooled.add_(columns.pooled[2])
        for dead in tile.dead:
            dead.fill_(NEG_INF)
        if lse is not None:
            torch.amax(score, 1, out=lse)
        torch.softmax(score, -1, out=score)
        if lse is not None:  # max p = exp(max a - LSE), and max p >= 1 / width: the log is safe
            torch.amax(score, 1, out=tile.peak)
            lse.sub_(tile.peak.log_())
        if call.first_order and tile.far is not None:
            torch.sum(tile.far, 1, keepdim=True, out=self.mass[:m])
            torch.mul(q, self.mass[:m], out=score[:, : call.reserved])
        for rounded, exact in tile.rounding:
            rounded.copy_(exact)
        if tile.out is None:
            torch.mm(tile.weights, columns.values, out=out)
        else:
            out.copy_(torch.mm(tile.weights, columns.values, out=tile.out))
