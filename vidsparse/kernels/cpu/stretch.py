"""Neighbouring query blocks of one head, with what is theirs alone: tokens in order, moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidsparse.kernels.cpu.call import Call, Job
from vidsparse.kernels.cpu.keys import Head

MOMENT_BLOCKS = 16
"""Key blocks whose moments exist at once."""

GATHERED_ROWS = 8
"""Rows whose queries are gathered at once."""


@dataclass(frozen=True)
class Stretch:
    """Query blocks `rows`, whose tokens stand from `origin` on in the plan's order.

    q, out [tokens, D], lse [tokens] or None: token `origin` is their first. moments [rows, D, D] of
    the first-order term of scope "row", or None.
    """

    rows: range
    origin: int
    q: Tensor
    out: Tensor
    lse: Tensor | None
    moments: Tensor | None = None


def stretches(call: Call, job: Job, head: Head) -> Iterator[Stretch]:
    """The rows of a job, all at once or, if something has to be made for them, few at a time.

    What was made for a stretch is made anew for the next one, in the same memory; with an order of
    the head, its results are scattered then.
    """
    place = job.batch, job.head
    q, out = call.q[place], call.out[place]
    lse = None if call.lse is None else call.lse[place]
    order = None if call.plan.order_q is None else call.plan.order_q[place]
    rows = range(job.first, job.end)
    if not call.row_moments:
        yield from _in_order(call, Stretch(rows, 0, q, out, lse), order)
        return
    shape = min(call.stretch, len(rows)), call.depth, call.depth
    kept = torch.empty(shape, dtype=call.bias_dtype, device="cpu")
    for part in _split(rows, call.stretch):
        moments = kept[: len(part)]
        row_moments(call, part, q, order, head, moments)
        yield from _in_order(call, Stretch(part, 0, q, out, lse, moments), order)


def _in_order(call: Call, whole: Stretch, order: Tensor | None) -> Iterator[Stretch]:
    """Stretches of tokens that stand in order; whole: such a one, but for the order."""
    if order is None:
        yield whole
        return
    spans = [call.span(rows) for rows in _split(whole.rows, GATHERED_ROWS)]
    most = max(span.stop - span.start for span in spans)
    q, out = (x.new_empty(most, call.depth) for x in (whole.q, whole.out))
    lse = None if whole.lse is None else whole.lse.new_empty(most)
    for rows, span in zip(_split(whole.rows, GATHERED_ROWS), spans, strict=True):
        ids, first = order[span], rows.start - whole.rows.start
        n = len(ids)
        torch.index_select(whole.q, 0, ids, out=q[:n])
        moments = None
        if whole.moments is not None:
            moments = whole.moments[first : first + len(rows)]
        yield Stretch(rows, span.start, q[:n], out[:n], None if lse is None else lse[:n], moments)
        whole.out.index_copy_(0, ids, out[:n])
        if whole.lse is not None and lse is not None:
            whole.lse.index_copy_(0, ids, lse[:n])


def _split(rows: range, size: int) -> list[range]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def row_moments(
    call: Call, rows: range, q: Tensor, order: Tensor | None, head: Head, out: Tensor
) -> None:
    """H_i of `vidsparse.kernels` for every row into out [rows, D, D]; q, order: of the head.

    The moments of key blocks, [nk, D, D], are too many to keep at 100,000 tokens: a few of them are
    made at a time, anew for every stretch, and each of them is used for all of its rows.
    """
    assert head.bias is not None and head.means is not None, "rows have moments of a rest"
    means = torch.stack([_finite_mean(q, order, call.span([row]), out.dtype) for row in rows])
    bias = head.bias[rows.start : rows.stop, call.reserved :]
    weight = torch.addmm(bias, means, head.means.T, alpha=call.scale).softmax(1)
    weight /= call.slots.blocks.count.to(weight)
    total = out.view(len(rows), -1).zero_()
    for first in range(0, len(call.slots), MOMENT_BLOCKS):
        blocks = slice(first, first + MOMENT_BLOCKS)
        found = _block_moments(head, head.means[blocks], call.slots.size, blocks)
        total.addmm_(weight[:, blocks], found.flatten(1))


def _block_moments(head: Head, means: Tensor, size: int, blocks: slice) -> Tensor:
    """H_j of neighbouring key blocks, [blocks, D, D]; zero for `broken` ones."""
    shape = len(means), size, -1
    keys = head.keys[0][blocks].view(shape) - means[:, None]
    values = head.values[0][blocks].view(shape).to(keys.dtype)
    found = torch.bmm(keys.mT, values)  # the values of padding are 0
    if head.broken is not None:
        found.masked_fill_(head.broken[blocks, None, None], 0.0)
    return found


def _finite_mean(q: Tensor, order: Tensor | None, span: slice, dtype: torch.dtype) -> Tensor:
    """Mean [D] over those queries of a row that are finite."""
    x = q[span] if order is None else q.index_select(0, order[span])
    mean = x.sum(0, dtype=dtype) / len(x)
    if bool(mean.isfinite().all()):
        return mean
    finite = x.isfinite().all(1, keepdim=True)
    return torch.where(finite, x, 0.0).sum(0, dtype=dtype) / finite.sum()
