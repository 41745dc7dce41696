"""From a plan and the (O, LSE) of its lists to the rest merge: means, moments, tilt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu.block_moments import aligned, block_moments, moment_dtype
from vidsparse.kernels.gpu.draft import draft_scores
from vidsparse.kernels.gpu.moments import finite_means
from vidsparse.kernels.gpu.operands import Means, QueryRows, ShortBlocks, padded_width
from vidsparse.kernels.gpu.rest_merge import rest_merge
from vidsparse.kernels.gpu.summary import rows_for, summarise
from vidsparse.kernels.gpu.support import MOMENT_BYTES
from vidsparse.kernels.gpu.weights import rest_bias, rest_weights
from vidsparse.plan import SKIP, BlockPlan, FirstOrder


@dataclass(frozen=True)
class Summary:
    """Of the key blocks of a call.

    draft: float32 [B, H, nk, D], means of the keys; means: of keys and values in the input's dtype;
    moment: of each head, None without the "global" first-order term.
    """

    draft: Tensor
    means: Means
    moment: Tensor | None


@dataclass(frozen=True)
class Part:
    """Heads first .. first + count - 1 of one of the batch."""

    batch: int
    first: int
    count: int

    def of(self, x: Tensor) -> Tensor:
        """x [B, H, ..] -> [1, count, ..], a view."""
        return x.narrow(0, self.batch, 1).narrow(1, self.first, self.count)

    def order(self, order: Tensor | None) -> Tensor | None:
        """Of an order int64 [S] or [B, H, S]: contiguous."""
        return order if order is None or order.ndim == 1 else self.of(order).contiguous()


@dataclass(frozen=True)
class Operands:
    """Of `rest_merge`, all but the moment. bias: of `weights.rest_bias`."""

    q: Tensor
    k: Tensor
    v: Tensor
    levels: Tensor
    rows: QueryRows
    out: Tensor
    lse: Tensor
    means: Means | None
    bias: Tensor | None
    short: ShortBlocks | None

    def of(self, part: Part) -> Operands:
        """The same of some heads."""
        assert self.means is not None and self.bias is not None
        q, k, v, levels, out, lse = (
            part.of(x) for x in (self.q, self.k, self.v, self.levels, self.out, self.lse)
        )
        rows = replace(self.rows, order=part.order(self.rows.order))
        means = replace(self.means, k=part.of(self.means.k), v=part.of(self.means.v))
        bias = part.of(self.bias)
        return Operands(q, k, v, levels, rows, out, lse, means, bias, self.short)

    def merge(
        self, moment: Tensor | None = None, first: int = 0, blocks: int | None = None
    ) -> None:
        """Run the kernel, on the query blocks first .. first + blocks - 1 alone if so asked."""
        operands = self.q, self.k, self.v, self.levels, self.rows, self.out, self.lse
        rest_merge(*operands, self.means, self.bias, moment, self.short, first, blocks)


def merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    rows: QueryRows,
    out: Tensor,
    lse: Tensor,
    start: Tensor,
    order: Tensor | None = None,
    short: ShortBlocks | None = None,
    summary: Summary | None = None,
) -> None:
    """Add to out and lse, in place, what the lists of a plan leave out.

    k, v [B, H, R, D']: block j of the plan from position start[j] on, int64 [nk], position t at row
    order[.., t], None: t. short: blocks that are read here if they are listed; None: there is none.
    summary: what `summary_of` gave for them, None: it is made here.
    """
    levels = plan.levels.contiguous()
    if plan.rest == SKIP:
        if short is not None:
            Operands(q, k, v, levels, rows, out, lse, None, None, short).merge(None)
        return
    if k.shape[3] > q.shape[3]:
        k, v = (x.narrow(3, 0, q.shape[3]) for x in (k, v))
    if summary is None:
        summary = _summary(k, v, plan.k_blocks, start, order, plan.first_order)
    tilt = None if plan.rest_bias is None else plan.rest_bias.contiguous()
    bias = rest_bias(levels, tilt, summary.means.bias)
    operands = Operands(q, k, v, levels, rows, out, lse, summary.means, bias, short)
    if plan.first_order == "row":
        count, _, _ = _blocks(plan.k_blocks, q.device)
        weight = _weights(operands, tilt, rows, count, summary.draft)
        _merge_by_rows(operands, plan, start, count, order, weight)
    else:
        operands.merge(summary.moment)


def summary_of(
    k: Tensor, v: Tensor, blocks: Blocks, order: Tensor | None, first_order: FirstOrder
) -> Summary:
    """What `merge` needs of k and v [B, H, S, D] for plans of this cut.

    order: int64 [S] or [B, H, S]: position t of the blocks is token order[.., t]; None: t.
    """
    order = None if order is None else order.contiguous()
    return _summary(k, v, blocks, blocks.on(k.device).start, order, first_order)


def _summary(
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    start: Tensor,
    order: Tensor | None,
    first_order: FirstOrder,
) -> Summary:
    count, moved, video = _blocks(blocks, k.device)
    tokens = video if first_order == "global" else 0
    place = start, count, blocks.size, moved, order, tokens
    draft, mean_k, mean_v, moment = summarise(k, v, *place)
    means = Means(mean_k, mean_v, _bias(blocks, k.device))
    return Summary(draft, means, moment if tokens else None)


def _merge_by_rows(
    operands: Operands,
    plan: BlockPlan,
    start: Tensor,
    count: Tensor,
    order: Tensor | None,
    weight: Tensor,
) -> None:
    """The rest merge with a moment of each query block, a few heads and query blocks at a time."""
    batch, heads, _, depth = operands.q.shape
    width = padded_width(depth)
    size = moment_dtype(operands.q.dtype).itemsize
    own = max(1, MOMENT_BYTES // (len(plan.k_blocks) * width**2 * size))
    for b, h in product(range(batch), range(0, heads, own)):
        part = Part(b, h, min(own, heads - h))
        some = operands.of(part)
        place = start, count, plan.k_blocks.size, part.order(order)
        moments = block_moments(some.k, some.v, *place).flatten(3)  # [R, 1, own, P * P]
        few = max(1, MOMENT_BYTES // (moments.shape[2] * width**2 * size))
        for i in range(0, len(plan.q_blocks), few):
            row = part.of(weight).narrow(2, i, min(few, weight.shape[2] - i))
            moment = torch.einsum("bhqk,kbhm->bhqm", row, moments).to(some.q.dtype)
            some.merge(moment.unflatten(3, (width, width)), i, row.shape[2])


def _weights(
    operands: Operands, tilt: Tensor | None, rows: QueryRows, count: Tensor, draft: Tensor
) -> Tensor:
    """[B, H, nq, R]: w_ij of `block_moments`, 0 where block j is not read as rest and past nk.

    Queries with a number that is not finite have no part in the means of their blocks.
    """
    q = operands.q
    mean = finite_means(q, rows.start, rows.count, rows.size, rows.order)
    logits = draft_scores(mean, draft, rows.count, count, 1, q.shape[3] ** -0.5)
    how = count, aligned(count.numel()), moment_dtype(q.dtype)
    weight: Tensor = rest_weights(logits, operands.levels, tilt, *how)
    return weight


@lru_cache(maxsize=16)
def _blocks(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """count int32 [nk], whether a block is of the video int32 [nk], tokens of the video."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        moved = (~blocks.text).to(device, torch.int32)
        return blocks.count.to(device, torch.int32), moved, int(blocks.count[~blocks.text].sum())


@lru_cache(maxsize=16)
def _bias(blocks: Blocks, device: torch.device) -> Tensor:
    """float32 [R], log2 of the tokens of a block, -inf past the last one."""
    with torch.inference_mode(False):
        past = rows_for(len(blocks)) - len(blocks)
        return torch.nn.functional.pad(blocks.count, (0, past)).double().log2().float().to(device)
