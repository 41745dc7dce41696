"""The rows of the CPU engine: where a row's groups stand in the workspace, which rows run together.

For every query block the groups that its plan lists are gathered into one workspace,

    [ moment | centroids of the rest | pooled levels, coarse to fine | exact tokens ]

so that all levels share one softmax. Centroids are written once per head; the bias of a centroid
column is ln n_j and that of the plan, or -inf where the row lists the block. A pooled group has the
bias of its number of tokens. The moment columns have no score (-inf); after the softmax they hold
G_t s q_t, and their values, H / N_v or the H_i of the row, add the first-order term inside the
second GEMM. Short blocks are padded with zeros; where their padding is not overwritten or cut off,
its columns have the bias -inf. Neighbouring rows of one form run in one call of `step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from vidsparse.kernels.cpu.call import NEG_INF, Call, Job
from vidsparse.kernels.cpu.keys import Head
from vidsparse.kernels.cpu.step import compiled, run_rows
from vidsparse.kernels.cpu.stretch import Stretch, stretches

FIRST_ROWS = 16
"""Rows of weights that are rounded through a buffer; see `Worker._rounding`."""


@dataclass
class Gather:
    """Blocks of one level: where they go, and where their exact form waits to be converted."""

    level: int
    keys: Tensor
    values: Tensor
    staged: Tensor


@dataclass
class Tile:
    """Scratch for one number of queries, and views of it; names as in `step.run_rows`."""

    scaled: Tensor
    score: Tensor
    far: Tensor
    pooled: Tensor
    dead: list[Tensor]
    moment: Tensor
    peak: Tensor
    rounded: list[Tensor]
    exact: list[Tensor]
    weights: Tensor
    low_out: Tensor | None


@dataclass
class Columns:
    """The workspace of rows that list equally many blocks of every level, and views of it.

    keys [D, width], values [width, D]; far: number of moment and centroid columns, or 0; pooled:
    first and last pooled column, with their bias; dead: columns without meaning; spare: workspace
    rows behind the groups; queries: how many run at once.
    """

    keys: Tensor
    values: Tensor
    width: int
    far: int
    gathers: list[Gather]
    pooled: tuple[int, int]
    pooled_bias: Tensor
    dead: list[tuple[int, int]]
    spare: list[Tensor]
    queries: int
    tiles: dict[int, Tile] = field(default_factory=dict)

    def gathered(
        self, head: Head, rows: list[int], bounds: list[list[int]]
    ) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """spans, tables and targets of rows, as `step.run_rows` takes them."""
        levels = [gather.level for gather in self.gathers]
        spans = [at for row in rows for n in levels for at in bounds[row][n : n + 2]]
        tables = [table for n in levels for table in (head.keys[n], head.values[n])]
        return spans, tables, [x for gather in self.gathers for x in (gather.keys, gather.values)]


Signature = tuple[bool, tuple[int, ...], tuple[tuple[int, int, int], ...]]


class Worker:
    """Scratch memory of one thread, and the row loop."""

    def __init__(self, call: Call) -> None:
        self.call = call
        score, value, given = call.score_dtype, call.value_dtype, call.q.dtype
        empty = partial(torch.empty, device="cpu")
        self.k = empty(call.rows, call.depth, dtype=score)
        self.v = empty(call.rows, call.depth, dtype=value)
        self.q = empty(call.block_q, call.depth, dtype=score)
        self.score = empty(call.entries, dtype=score)
        self.peak = empty(call.block_q, dtype=score)
        self.none = empty(0, dtype=score)
        # gathered blocks wait here for their conversion, before there are scores
        self.stage = self.score.view(given) if given != score else None
        self.first = empty(FIRST_ROWS * call.width if value != score else 0, dtype=value)
        self.out = empty(call.block_q, call.depth, dtype=value) if value != given else None
        self.k[: call.reserved].zero_()
        self.columns: dict[Signature, Columns | None] = {}

    def run(self, job: Job) -> None:
        """All rows of a job, neighbours of one form together."""
        call, place = self.call, (job.batch, job.head)
        head = job.shared.get()
        if head.rest is not None:
            self.k[call.reserved : call.front].copy_(head.rest[0])
            self.v[call.reserved : call.front].copy_(head.rest[1])
        if call.reserved and head.moment is not None:
            self.v[: call.reserved].copy_(head.moment)
        bounds, far = call.plan.starts[place].tolist(), call.far[place].tolist()

        def form(row: int) -> tuple[int, int]:
            columns = self._columns(bounds[row], far[row])
            return (id(columns) if columns else 0), call.count_q[row]

        for stretch in stretches(call, job, head):
            for _, group in groupby(stretch.rows, key=form):
                rows = list(group)
                columns = self._columns(bounds[rows[0]], far[rows[0]])
                if columns is None:
                    self._clear(stretch, rows)
                    continue
                whole, rest = divmod(call.count_q[rows[0]], columns.queries)
                if not rest:
                    self._run(columns, head, stretch, rows, bounds, whole)
                    continue
                for row in rows:  # the last queries of a block are fewer, in the same workspace
                    self._run(columns, head, stretch, [row], bounds, whole, rest)

    def _clear(self, stretch: Stretch, rows: list[int]) -> None:
        """Rows that read nothing."""
        span = self.call.span(rows)
        first, end = span.start - stretch.origin, span.stop - stretch.origin
        stretch.out[first:end].zero_()
        if stretch.lse is not None:
            stretch.lse[first:end].fill_(NEG_INF)

    def _run(
        self,
        columns: Columns,
        head: Head,
        stretch: Stretch,
        rows: list[int],
        bounds: list[list[int]],
        whole: int,
        rest: int = 0,
    ) -> None:
        """`whole` times the usual number of queries of every row, then `rest` queries."""
        call = self.call
        spans, tables, targets = columns.gathered(head, rows, bounds)
        stages = [g.staged for g in columns.gathers for _ in range(2)]
        spare = columns.spare
        starts = [call.first_q[row] - stretch.origin for row in rows]
        bias, moments = self._of_rows(columns, head, stretch, rows)
        for queries, parts in ((columns.queries, whole), (rest, 1)):
            if queries * parts == 0:
                continue
            if queries not in columns.tiles:
                columns.tiles[queries] = self._tile(columns, queries)
            tile = columns.tiles[queries]
            compiled(run_rows)(
                stretch.q, stretch.out, stretch.lse, starts, queries, parts, call.scale,
                call.index, spans, tables, targets, stages, spare, columns.keys, columns.values,
                tile.scaled, tile.score, tile.far, bias, tile.pooled, columns.pooled_bias,
                tile.dead, tile.moment, moments, self.v[: call.reserved], tile.peak, tile.rounded,
                tile.exact, tile.weights, tile.low_out,
            )  # fmt: skip
            starts = [start + queries * parts for start in starts]
            spans, tables, targets, stages, spare = [], [], [], [], []  # gathered

    def _of_rows(
        self, columns: Columns, head: Head, stretch: Stretch, rows: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The bias and the moments of every row; none where there are no centroids."""
        if not columns.far or head.bias is None:
            return [], []
        bias = list(head.bias[rows[0] : rows[-1] + 1].unbind())
        if stretch.moments is None:
            return bias, []
        first = rows[0] - stretch.rows.start
        return bias, list(stretch.moments[first : first + len(rows)].unbind())

    def _columns(self, bounds: list[int], far: bool) -> Columns | None:
        """The workspace's arrangement for a row. None: the row reads nothing."""
        call = self.call
        signature = (
            far,
            tuple([bounds[level + 1] - bounds[level] for level in call.levels]),
            call.short_entries(bounds),
        )
        if signature not in self.columns:
            self.columns[signature] = self._layout(*signature)
        return self.columns[signature]

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
            staged = self.none
            if level == 0 and self.stage is not None:
                staged = self.stage[: count * shape[1]].view(shape)
            gathers.append(
                Gather(level, self.k[at:end].view(shape), self.v[at:end].view(shape), staged)
            )
            bias = torch.full((count * size,), level * math.log(2.0), dtype=call.bias_dtype)
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
        pooled_bias = torch.cat(biases) if biases else self.none
        first_pooled = call.front - start
        return Columns(
            self.k[start : start + fitted].T,
            self.v[start : start + fitted],
            fitted,
            call.front if far else 0,
            gathers,
            (first_pooled, first_pooled + len(pooled_bias)),
            pooled_bias,
            dead,
            spare,
            call.queries(fitted),
        )

    def _tile(self, columns: Columns, queries: int) -> Tile:
        call, width = self.call, columns.width
        score = self.score[: queries * width].view(queries, width)
        weights, rounded, exact = self._rounding(score)
        return Tile(
            self.q[:queries],
            score,
            score[:, : columns.far],
            score[:, slice(*columns.pooled)],
            [score[:, a:b] for a, b in columns.dead],
            score[:, : call.reserved] if columns.far and call.reserved else self.none,
            self.peak[:queries],
            rounded,
            exact,
            weights,
            None if self.out is None else self.out[:queries],
        )

    def _rounding(self, score: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Weights of half the size in the front half of the same memory, and the copies to make.

        Rows 2^i .. 2^(i+1) of the weights take the place of rows 2^(i-1) .. 2^i of the scores,
        which have been copied already; only the first rows need a buffer of their own.
        """
        if self.call.value_dtype == self.call.score_dtype:
            return score, [], []
        rows, width = score.shape
        weights = self.score.view(self.call.value_dtype)[: rows * width].view(rows, width)
        end = min(rows, FIRST_ROWS)
        first = self.first[: end * width].view(end, width)
        rounded, exact = [first, weights[:end]], [score[:end], first]
        while end < rows:
            start, end = end, min(rows, 2 * end)
            rounded.append(weights[start:end])
            exact.append(score[start:end])
        return weights, rounded, exact
