"""The inner loop of the CPU engine: query blocks in a row that list equally many key blocks.

A row is some fifteen torch operations of 10 to 100 us. Called one by one from several Python
threads, each of them gives Python's global lock away and waits to get it back, which costs two
threads a quarter of their time and stops more of them from scaling at all. TorchScript runs the
whole loop in one call that does not hold the lock. Where it is missing, the same function runs as
plain Python: same result, one thread as fast, several slower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def gather(
    row: int,
    index: Tensor,
    spans: list[int],
    tables: list[Tensor],
    targets: list[Tensor],
    stages: list[Tensor],
    spare: list[Tensor],
) -> None:
    """The workspace of one row; arguments as of `run_rows`."""
    levels = len(targets) // 2
    for level in range(levels):
        at = 2 * (row * levels + level)
        ids = index[spans[at] : spans[at + 1]]
        for n in range(2 * level, 2 * level + 2):
            if tables[n].dtype == targets[n].dtype:
                torch.index_select(tables[n], 0, ids, out=targets[n])
            else:
                torch.index_select(tables[n], 0, ids, out=stages[n])
                targets[n].copy_(stages[n])
    for rest in spare:
        rest.zero_()


def run_rows(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    starts: list[int],
    queries: int,
    parts: int,
    scale: float,
    index: Tensor,
    spans: list[int],
    tables: list[Tensor],
    targets: list[Tensor],
    stages: list[Tensor],
    spare: list[Tensor],
    keys: Tensor,
    values: Tensor,
    scaled: Tensor,
    score: Tensor,
    far: Tensor,
    bias: list[Tensor],
    pooled: Tensor,
    pooled_bias: Tensor,
    dead: list[Tensor],
    moment: Tensor,
    moments: list[Tensor],
    moment_values: Tensor,
    peak: Tensor,
    rounded: list[Tensor],
    exact: list[Tensor],
    weights: Tensor,
    low_out: Tensor | None,
) -> None:
    """For every row: gather, then one softmax over the workspace for `parts` times `queries`.

    q, out [tokens, D], lse [tokens] of one head; row n starts at token starts[n].
    spans: for every row and level the first and last place in `index`, flat; for level i `tables`,
        `targets` and `stages` hold at 2 i the keys and at 2 i + 1 the values: table, workspace, and
        a buffer of the table's dtype where the workspace has another one. Nothing to gather: empty.
    keys [D, width], values [width, D]: the workspace. scaled [queries, D], score [queries, width],
        weights: scratch; weights is what the second product reads, made by copying `exact` to
        `rounded` pair by pair.
    far: score columns of the moment and the centroids, with a bias [columns] per row in `bias`;
        pooled, pooled_bias: those of pooled levels; dead: columns without meaning. moment: the
        first columns of score, which take G s q, or none; moment_values: their rows of values, into
        which every row of a list `moments` that is not empty writes its own [D, D].
    low_out: the result in the dtype of weights, or None if that is the dtype of out.
    """
    factor = torch.full(
        [], scale, dtype=scaled.dtype, device=scaled.device
    )  # a number is made a tensor in every call
    for row in range(len(starts)):
        gather(row, index, spans, tables, targets, stages, spare)
        if len(moments) > 0:
            moment_values.copy_(moments[row])
        for part in range(parts):
            first = starts[row] + part * queries
            end = first + queries
            scaled.copy_(q[first:end]).mul_(factor)
            torch.mm(scaled, keys, out=score)
            if len(bias) > 0:
                far.add_(bias[row])
            if pooled_bias.numel() > 0:
                pooled.add_(pooled_bias)
            for columns in dead:
                columns.fill_(float("-inf"))
            if lse is not None:
                torch.amax(score, 1, out=peak)
                lse[first:end].copy_(peak)
            torch.softmax(score, -1, out=score)
            if lse is not None:  # max p = exp(max a - LSE) >= 1 / width: the log is safe
                torch.amax(score, 1, out=peak)
                lse[first:end].sub_(peak.log_())
            if moment.numel() > 0:
                torch.mul(scaled, far.sum(1, keepdim=True), out=moment)
            for n in range(len(rounded)):
                rounded[n].copy_(exact[n])
            if low_out is None:
                torch.mm(weights, values, out=out[first:end])
            else:
                torch.mm(weights, values, out=low_out)
                out[first:end].copy_(low_out)


def attend_rows(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    starts: list[int],
    queries: int,
    scale: float,
    index: Tensor,
    spans: list[int],
    tables: list[Tensor],
    targets: list[Tensor],
    spare: list[Tensor],
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    far: Tensor,
    bias: list[Tensor],
    moments: list[Tensor],
) -> None:
    """For every row: gather, then torch's attention of its `queries` over the workspace.

    Arguments as of `run_rows`, of one dtype, but keys [width, D], and mask [width]: what is added
    to the scores, of which `far` are the columns of the centroids. moments: for every row that of
    its first-order term, [D, D] in float32, or none; the share of the centroids, which it takes, is
    exp of their LSE less that of all columns.
    """
    count = far.size(0)
    all_keys = keys.unsqueeze(0).unsqueeze(0)
    all_values = values.unsqueeze(0).unsqueeze(0)
    all_mask = mask.expand(1, 1, queries, mask.size(0))
    far_keys, far_values = all_keys[:, :, :count], all_values[:, :, :count]
    far_mask = far.expand(1, 1, queries, count)
    for row in range(len(starts)):
        gather(row, index, spans, tables, targets, [], spare)
        if len(bias) > 0:
            far.copy_(bias[row])
        first = starts[row]
        end = first + queries
        asked = q[first:end].unsqueeze(0).unsqueeze(0)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            asked, all_keys, all_values, 0.0, False, attn_mask=all_mask, scale=scale
        )
        result = found[0].view(queries, -1)
        total = found[1].view(queries)
        if len(moments) > 0:
            rest = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                asked, far_keys, far_values, 0.0, False, attn_mask=far_mask, scale=scale
            )
            share = (rest[1].view(queries) - total).exp().mul_(scale)
            asked_wide = q[first:end].to(moments[row].dtype)
            term = torch.mm(asked_wide, moments[row]).mul_(share.unsqueeze(1))
            result = term.add_(result)
        out[first:end].copy_(result)
        if lse is not None:
            lse[first:end].copy_(total)


@cache
def compiled(rows: Callable[..., Any]) -> Callable[..., Any]:
    """`run_rows` or `attend_rows` without the global lock, or as it is; the same on every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, without a successor that needs no compiler
        try:
            scripted: Callable[..., Any] = torch.jit.script(rows)
            return scripted
        except Exception:  # removed or broken: whatever the reason, the plain loop is as right
            return rows
