"""The fast CPU executor: gather, one GEMM, one softmax, one GEMM per query block; plain torch, nothing compiled.

One job per head. For every query block the groups that its plan lists are gathered into one workspace,

    [ moment | centroids of the rest | pooled levels, coarse to fine | exact tokens ]

so that all levels share one softmax. Centroids are written once per head; the bias of a centroid column is
ln n_j, or -inf where the row lists the block. A pooled group has the bias of its number of tokens. The
moment columns have no score (-inf); after the softmax they hold G_t s q_t, and their values H / N_v add the
first-order term inside the second GEMM. Short blocks are padded with zeros; where their padding is not
overwritten or cut off, its columns have the bias -inf.

Scores and softmax are fp32 (fp64 for fp64); for bf16 input the weights are rounded to bf16 for the second
GEMM if the CPU is faster at that (`cpu_matmul`). fp16 is computed in fp32.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidsparse.kernels import cpu_matmul, cpu_threads
from vidsparse.kernels.cpu_keys import Head, SharedHead, Slots, build_head
from vidsparse.plan import SKIP, BlockPlan

CROSSOVER_DENSITY = 0.6
CROSSOVER_TOKENS = 1024

SCORE_ENTRIES = 128 * 4096
"""Entries of a worker's score buffer; wider rows are cut into fewer queries at a time."""

MIN_QUERIES = 16
"""A row is never cut into fewer queries than this."""

EXACT_WIDTHS = 8
"""Up to so many different row widths run as they are; see `Call.fit`."""

NEG_INF = float("-inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    return_lse: bool = False,
    workers: int | None = None,
    matmul: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention by a plan; formulas in `vidsparse.kernels`. Inference only.

    q [B, H, Sq, D], k, v [B, H, Sk, D]: CPU tensors of one dtype (float32, bfloat16, float16, float64), in the
        order that the plan's blocks refer to; transposed views of [B, S, H, D] tensors are the usual case.
    plan: any levels; `rest` SKIP or the centroid; `first_order` "none" or "global".
    workers: threads, >= 1; None: torch.get_num_threads().
    matmul: "auto" lets fp32 products take oneDNN where a probe found it exact and faster, "native" forbids it.

    Returns out, shape, dtype and memory layout like q, and the LSE float32 [B, H, Sq] (float64 for float64,
    natural log) or None. The result does not depend on the number of workers, and a NaN in one query stays
    in that query's result.

    Raises ValueError for shapes that do not match, first_order "block", inputs that require grad.
    """
    _check(q, k, v, plan, workers, matmul)
    batch, heads, tokens, depth = q.shape
    transposed = q.transpose(1, 2).is_contiguous()
    shape = (batch, tokens, heads, depth) if transposed else tuple(q.shape)
    out = torch.empty(shape, dtype=q.dtype, device="cpu")
    out = out.transpose(1, 2) if transposed else out
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(batch, heads, tokens, dtype=wide, device="cpu") if return_lse else None
    if out.numel() == 0:
        return out, lse
    workers = min(workers or torch.get_num_threads(), batch * heads * len(plan.q_blocks))
    probe = cpu_matmul.probe(workers)
    low = q.dtype == torch.bfloat16 and probe.bf16
    call = Call(q, out, lse, plan, wide, torch.bfloat16 if low else wide)
    use_onednn = probe.onednn and matmul == "auto" and wide == torch.float32
    with cpu_matmul.onednn(use_onednn):
        cpu_threads.for_each(call.jobs(k, v, workers), lambda: Worker(call).run, workers)
    return out, lse


def engine_info() -> dict[str, Any]:
    """What this machine's engine does, for reports: routes of the matrix products and the probe's figures.

    fp32: "onednn" | "native"; bf16_values: dtype of weights times values for bf16 input; threads; figures of
    `cpu_matmul.Probe`.
    """
    threads = torch.get_num_threads()
    probe = cpu_matmul.probe(threads)
    return {
        "fp32": "onednn" if probe.onednn else "native",
        "bf16_values": "bfloat16" if probe.bf16 else "float32",
        "threads": threads,
        "onednn_gain": round(probe.onednn_gain, 2),
        "onednn_error": probe.onednn_error,
        "bf16_gain": round(probe.bf16_gain, 2),
    }


@dataclass
class Job:
    """Rows first, first + step, ... of one head."""

    batch: int
    head: int
    first: int
    step: int
    shared: SharedHead


class Call:
    """What all workers of one call read."""

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
        self.ids = memoryview(self.index.numpy()) if self.slots.short else None
        self._size_workspace(counts)

    def _size_workspace(self, counts: Tensor) -> None:
        groups = torch.tensor([self.slots.size >> level for level in range(self.top + 1)])
        gathered = (counts * groups).sum(-1)
        widths = gathered + self.front * (counts.sum(-1) < self.nk)
        self.exact = widths.unique().numel() <= EXACT_WIDTHS
        most = int(gathered.max())
        self.width = self.fit(self.front + most)
        self.rows = self.front + (most if self.exact else self.width)
        self.most_exact = int(counts[..., 0].max()) * self.slots.size
        self.entries = min(self.block_q * self.width, max(SCORE_ENTRIES, MIN_QUERIES * self.width))

    def fit(self, width: int) -> int:
        """The width at which a row of `width` columns runs.

        The first product of a new shape costs oneDNN milliseconds, more than the product itself. Ragged plans
        have hundreds of widths, so these are rounded up to 16 per octave (2 % on average); plans with few
        widths run as they are.
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

    def jobs(self, k: Tensor, v: Tensor, workers: int) -> list[Job]:
        """One job per head; the heads that do not fill all workers are cut into interleaved rows."""
        batch, heads = self.q.shape[:2]
        levels = sorted({*self.levels, self.top} if self.rest else self.levels)
        jobs = []
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
            jobs += [Job(b, h, part, parts, shared) for part in range(parts)]
        return jobs


@dataclass
class Gather:
    """Blocks of one level: where they go, and where their exact form waits to be converted."""

    level: int
    keys: Tensor
    values: Tensor
    staged: Tensor | None


@dataclass
class Tile:
    """Views of the score buffer for one number of queries."""

    q: Tensor
    score: Tensor
    far: Tensor | None
    pooled: Tensor | None
    dead: list[Tensor]
    weights: Tensor
    out: Tensor | None
    peak: Tensor


@dataclass
class Columns:
    """The workspace of rows that list equally many blocks of every level, and views of it.

    keys [D, width], values [width, D]; far: number of moment and centroid columns, or 0; pooled: first and
    last pooled column and their bias; dead: columns without meaning; spare: workspace rows behind the groups.
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
        self.q = empty(call.block_q, call.depth, dtype=score)
        self.score = empty(call.entries, dtype=score)
        self.peak = empty(call.block_q, dtype=score)
        self.mass = empty(call.block_q, 1, dtype=score)
        self.bias = torch.full((call.front,), NEG_INF, dtype=score, device="cpu")
        # converts gathered blocks, later in the row the weights
        cast = call.entries if value != score else 0
        self.stage = empty(
            max(cast, call.most_exact * call.depth) if given != score else 0, dtype=given
        )
        self.out = empty(call.block_q, call.depth, dtype=value) if value != given else None
        self.k[: call.reserved].zero_()
        self.columns: dict[Signature, Columns | None] = {}

    def run(self, job: Job) -> None:
        """All rows of a job."""
        call = self.call
        head = job.shared.get()
        if call.rest:
            self.k[call.reserved : call.front].copy_(head.keys[call.top])
            self.v[call.reserved : call.front].copy_(head.values[call.top])
        if head.moment is not None:
            self.v[: call.reserved].copy_(head.moment)
        starts = call.plan.starts[job.batch, job.head].tolist()
        q, out = call.q[job.batch, job.head], call.out[job.batch, job.head]
        lse = None if call.lse is None else call.lse[job.batch, job.head]
        for row in range(job.first, len(starts), job.step):
            first, end = call.first_q[row], call.end_q[row]
            columns = self._prepare(head, starts[row])
            if columns is None:
                out[first:end].zero_()
                if lse is not None:
                    lse[first:end].fill_(NEG_INF)
                continue
            for a in range(first, end, columns.queries):
                b = min(a + columns.queries, end)
                self._attend(columns, q[a:b], out[a:b], None if lse is None else lse[a:b])

    def _prepare(self, head: Head, bounds: list[int]) -> Columns | None:
        """Fill the workspace for a row. None: the row reads nothing."""
        call = self.call
        far = call.rest and bounds[-1] - bounds[0] < call.nk
        signature = (
            far,
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
        if far:
            bias = self.bias[call.reserved :].copy_(call.slots.log_counts)
            bias.index_fill_(0, call.index[bounds[0] : bounds[-1]], NEG_INF)
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
            if level == 0 and len(self.stage):
                staged = self.stage[: count * shape[1]].view(shape)
            gathers.append(
                Gather(level, self.k[at:end].view(shape), self.v[at:end].view(shape), staged)
            )
            bias = torch.full((count * size,), level * math.log(2.0), dtype=call.score_dtype)
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
        cast = self.call.value_dtype != self.call.score_dtype
        return Tile(
            self.q[:queries],
            score,
            score[:, : columns.far] if columns.far else None,
            score[:, pooled[0] : pooled[1]] if pooled else None,
            [score[:, a:b] for a, b in columns.dead],
            self.stage[:entries].view(queries, width) if cast else score,
            None if self.out is None else self.out[:queries],
            self.peak[:queries],
        )

    def _attend(self, columns: Columns, q: Tensor, out: Tensor, lse: Tensor | None) -> None:
        """One softmax over the workspace: q [m, D] -> out [m, D], lse [m]."""
        call, m = self.call, q.shape[0]
        if m not in columns.tiles:
            columns.tiles[m] = self._tile(columns, m)
        tile = columns.tiles[m]
        score = tile.score
        tile.q.copy_(q).mul_(call.scale)
        torch.mm(tile.q, columns.keys, out=score)
        if tile.far is not None:
            tile.far.add_(self.bias)
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
            torch.mul(tile.q, self.mass[:m], out=score[:, : call.reserved])
        if tile.weights is not score:
            tile.weights.copy_(score)
        if tile.out is None:
            torch.mm(tile.weights, columns.values, out=out)
        else:
            out.copy_(torch.mm(tile.weights, columns.values, out=tile.out))


def _check(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, workers: int | None, matmul: str
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.device.type != "cpu" or x.dtype != q.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: the CPU engine expects [B, H, S, D] CPU "
                "tensors of one dtype, float32, bfloat16, float16 or float64"
            )
    expected = (*q.shape[:2], plan.k_blocks.tokens, q.shape[3])
    if k.shape != expected or v.shape != expected or q.shape[2] != plan.q_blocks.tokens:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit a plan of "
            f"{plan.q_blocks.tokens} queries and {plan.k_blocks.tokens} keys"
        )
    rows = (*q.shape[:2], len(plan.q_blocks), plan.k_blocks.levels + 2)
    if tuple(plan.starts.shape) != rows:
        raise ValueError(f"plan.starts.shape={tuple(plan.starts.shape)}: expected {rows}")
    size, top = plan.k_blocks.size, plan.k_blocks.levels
    if size != 2**top:
        raise ValueError(f"plan.k_blocks.size={size}: the CPU engine needs a power of two")
    if plan.rest not in (SKIP, top):
        raise ValueError(f"plan.rest={plan.rest}: expected {SKIP} (skip) or {top} (centroid)")
    if plan.first_order not in ("none", "global") or (plan.first_order != "none" and plan.rest == SKIP):
        raise ValueError(
            f"plan.first_order={plan.first_order!r} with rest={plan.rest}: the CPU engine executes 'none', and "
            "'global' with the centroid; use impl='reference'"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "q, k or v requires grad: sparse attention is inference only; call it under torch.no_grad()"
        )
    if matmul not in ("auto", "native"):
        raise ValueError(f"matmul={matmul!r}: allowed is auto, native")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers!r}: expected an integer >= 1")
