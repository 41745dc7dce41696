"""The error of an output on some heads and query blocks: of all it would take too long."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels import reference
from vidsparse.plan import BlockPlan


def sampled_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: BlockPlan, blocks: int = 3
) -> float:
    """Relative L2 of out against the reference in float64, on the first, middle and last head.

    q, k, v, out [B, H, S, D]; blocks: so many query blocks, from the first to the last.
    """
    heads = sorted({0, q.shape[1] // 2, q.shape[1] - 1})
    off = norm = 0.0
    for head in heads:
        rows = torch.linspace(0, len(plan.q_blocks) - 1, blocks).long().unique()
        tokens, part = sub_plan(plan, [head], rows)
        few, found = (_taken(x[:, head : head + 1], tokens).double() for x in (q, out))
        keys, values = (x[:, head : head + 1].double() for x in (k, v))
        want, _ = reference.execute(few, keys, values, part, return_lse=False)
        off += float((found - want).square().sum())
        norm += float(want.square().sum())
    return (off / norm) ** 0.5 if norm else off**0.5


def sub_plan(plan: BlockPlan, heads: list[int], rows: Tensor) -> tuple[Tensor, BlockPlan]:
    """The plan of some heads and query blocks alone, and the tokens of these blocks.

    rows: int64 [n]. tokens: int64 [B, len(heads), t] on the device of the plan: the queries of the
    part, in its order. Keys are those of the whole, in the order of the whole.
    """
    blocks, levels = plan.q_blocks, plan.levels
    start, count = blocks.start[rows], blocks.count[rows]
    spans = [torch.arange(int(s), int(s + n)) for s, n in zip(start, count, strict=True)]
    tokens = torch.cat(spans).to(levels.device).expand(len(levels), len(heads), -1)
    cut = Blocks(count.cumsum(0) - count, count, blocks.text[rows], blocks.size)
    here, blend = rows.to(levels.device), plan.blend
    if blend is not None:
        blend = blend[0][:, heads][:, :, here], blend[1][:, heads][:, :, here]
    if plan.order_q is not None:
        tokens = plan.order_q[:, heads].gather(2, tokens)
    return tokens, replace(
        plan,
        levels=levels[:, heads][:, :, here],
        q_blocks=cut,
        rest_bias=None if plan.rest_bias is None else plan.rest_bias[:, heads][:, :, here],
        blend=blend,
        order_q=None,
        order_k=None if plan.order_k is None else plan.order_k[:, heads],
    )


def _taken(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, 1, S, D] at tokens [B, 1, t]."""
    return x.gather(2, tokens.to(x.device)[..., None].expand(-1, -1, -1, x.shape[3]))
