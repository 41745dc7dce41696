"""Neighbouring query blocks of one head, with what is theirs alone: tokens in order, moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vidsparse.kernels.cpu.call import Call, Job
from vidsparse.kernels.cpu.keys import Head
from vidsparse.kernels.cpu.step import compiled

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
    means = torch.cat(
        [_finite_means(call, some, q, order, out.dtype) for some in _alike(call, rows)]
    )
    bias = head.bias[rows.start : rows.stop, call.reserved :]
    weight = torch.addmm(bias, means, head.means.T, alpha=call.scale).softmax(1)
    weight /= call.slots.blocks.count.to(weight)
    total, tables = out.view(len(rows), -1).zero_(), (head.keys[0], head.values[0])
    compiled(add_moments)(total, weight, head.means, *tables, head.broken, MOMENT_BLOCKS)


def add_moments(
    total: Tensor,
    weight: Tensor,
    means: Tensor,
    keys: Tensor,
    values: Tensor,
    broken: Tensor | None,
    step: int,
) -> None:
    """total [rows, D * D] += weight [rows, nk] x the moments of key blocks, zero for broken ones.

    means [nk, D]; keys, values: tables of level 0; step: key blocks at once.
    """
    blocks, depth = means.shape
    for first in range(0, blocks, step):
        end = min(first + step, blocks)
        shape = [end - first, -1, depth]
        centred = keys[first:end].view(shape) - means[first:end].unsqueeze(1)
        # keys of padding are no longer 0, but its values are
        found = torch.bmm(centred.mT, values[first:end].view(shape).to(centred.dtype))
        if broken is not None:
            found.masked_fill_(broken[first:end].view(-1, 1, 1), 0.0)
        total.addmm_(weight[:, first:end], found.flatten(1))


def _alike(call: Call, rows: range) -> list[list[int]]:
    """Neighbouring rows of equal length, `GATHERED_ROWS` at most."""
    parts = (groupby(part, call.count_q.__getitem__) for part in _split(rows, GATHERED_ROWS))
    return [list(alike) for part in parts for _, alike in part]


def _finite_means(
    call: Call, rows: list[int], q: Tensor, order: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Mean [rows, D] over those queries of every row that are finite; rows of equal length."""
    span = call.span(rows)
    x = q[span] if order is None else q.index_select(0, order[span])
    x = x.view(len(rows), -1, call.depth)
    means = x.sum(1, dtype=dtype) / x.shape[1]
    if bool(means.isfinite().all()):
        return means
    finite = x.isfinite().all(2, keepdim=True)
    return torch.where(finite, x, 0.0).sum(1, dtype=dtype) / finite.sum(1)
