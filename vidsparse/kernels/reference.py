"""The oracle: executes any plan by the definition, one softmax over all groups of all levels.

Works in the dtype of its inputs (give it float64), needs memory for a full score matrix per level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels import executor
from vidsparse.plan import BlockPlan

if TYPE_CHECKING:  # with it OmegaConf, which the kernels do without
    from vidsparse.config import Kernel


def pool(x: Tensor, blocks: Blocks, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of 2^level consecutive tokens inside each block.

    x [..., tokens, D] -> (means [..., groups, D], true token counts int64 [groups], owning block
    int64 [groups]).
    """
    inside = torch.arange(blocks.tokens) - blocks.start[blocks.owner]
    # a group id that is unique over blocks, then compacted to 0 .. groups - 1 in order
    wide = blocks.owner * blocks.size + (inside >> level)
    _, group, count = torch.unique_consecutive(wide, return_inverse=True, return_counts=True)
    first = torch.zeros(len(count), dtype=torch.int64)
    first[group.flip(0)] = torch.arange(blocks.tokens).flip(0)
    group, count, owner = (t.to(x.device) for t in (group, count, blocks.owner[first]))
    sums = x.new_zeros((*x.shape[:-2], len(count), x.shape[-1])).index_add_(-2, group, x)
    return sums / count.to(x)[:, None], count, owner


def execute(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """O [B, H, Sq, D] in q's dtype and LSE [B, H, Sq] (float64 for float64 input, else float32).

    Formulas in `vidsparse.kernels`.
    """
    if plan.order_q is not None or plan.order_k is not None:
        q, k, v = _taken(q, plan.order_q), _taken(k, plan.order_k), _taken(v, plan.order_k)
        found = execute(q, k, v, plan.with_orders(None, None), return_lse=return_lse)
        out, lse = (None if x is None else _put(x, plan.order_q) for x in found)
        assert out is not None
        return out, lse
    scale = q.shape[-1] ** -0.5
    query_owner = plan.q_blocks.owner.to(q.device)
    level_map = plan.level_map().to(q.device)[:, :, query_owner]  # [B, H, Sq, nk]
    logits, values = [], []
    for level in range(plan.k_blocks.levels + 1):
        if not bool((level_map == level).any()):
            continue
        keys, count, owner = pool(k, plan.k_blocks, level)
        means, _, _ = pool(v, plan.k_blocks, level)
        score = scale * q @ keys.mT + count.to(q).log()
        if level == plan.rest and plan.rest_bias is not None:
            score = score + _rest_bias(q, plan)[..., owner]
        logits.append(score.masked_fill(level_map[..., owner] != level, float("-inf")))
        values.append(means)
    if not logits:
        nothing = q.new_full(q.shape[:-1], float("-inf"), dtype=_lse_dtype(q))
        return plan.blended(torch.zeros_like(q), nothing)
    score = torch.cat(logits, -1)
    lse = torch.logsumexp(score, -1)
    empty = lse == float("-inf")
    weight = torch.exp(score - lse.masked_fill(empty, 0.0)[..., None])
    # a zero weight keeps a NaN or inf of an unread value out of the row
    out = _weighted(weight, torch.cat(values, -2))
    if plan.first_order != "none":
        out = out + _first_order(q, k, v, plan, lse.masked_fill(empty, 0.0))
    out, lse = plan.blended(out.masked_fill(empty[..., None], 0.0), lse.to(_lse_dtype(q)))
    return out, (lse if return_lse else None)


class Executor(executor.Executor):
    """The definition, in torch, on any device."""

    name = "reference"
    about = "the definition, for comparison: a full score matrix per level"
    executes = executor.Executes(("none", "global", "block", "row"), True, True, True)

    def execute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        *,
        kernel: Kernel,
        order: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert order is None, "not among the facts"
        return execute(q, k, v, plan, return_lse=return_lse)


EXECUTOR = Executor()


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """weight @ values in which 0 * NaN = 0."""
    if bool(values.isfinite().all()):
        return weight @ values
    bad = (~values.isfinite().all(-1)).flatten(0, -2).any(0)
    out = weight[..., ~bad] @ values[..., ~bad, :]
    for group in bad.nonzero().flatten().tolist():
        share = weight[..., group, None]
        out = out + torch.where(share == 0, 0.0, share * values[..., None, group, :])
    return out


def _taken(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, H, S, D] in an order [B, H, S] of its tokens."""
    return x if order is None else x.gather(2, order[..., None].expand(x.shape))


def _put(x: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `_taken`; x may be without D."""
    if order is None:
        return x
    place = order if x.ndim == 3 else order[..., None].expand(x.shape)
    return torch.empty_like(x).scatter_(2, place, x)


def _rest_bias(q: Tensor, plan: BlockPlan) -> Tensor:
    """[B, H, Sq, nk]: the bias of the blocks that the row of a query reads as rest, 0 elsewhere."""
    assert plan.rest_bias is not None
    bias = plan.rest_bias.masked_fill(~plan.read_as_rest(), 0.0).to(q)
    return bias[:, :, plan.q_blocks.owner.to(q.device)]


def _first_order(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, lse: Tensor) -> Tensor:
    """The normalised Taylor term of the blocks that a row reads as rest."""
    blocks, scale = plan.k_blocks, q.shape[-1] ** -0.5
    means, count, owner = pool(k, blocks, blocks.levels)
    key_owner, query_owner = blocks.owner.to(k.device), plan.q_blocks.owner.to(q.device)
    centred = k - means[..., owner.argsort(stable=True)[key_owner], :]
    score = scale * q @ means.mT + count.to(q).log() - lse[..., None]
    if plan.rest_bias is not None:
        score = score + _rest_bias(q, plan)
    read = plan.read_as_rest().to(q.device)
    mass = score.exp().masked_fill(~read[:, :, query_owner], 0.0)
    if plan.first_order == "global":
        video = ~blocks.on(k.device).text[key_owner]
        moment = centred[..., video, :].mT @ v[..., video, :]
        term: Tensor = mass.sum(-1, keepdim=True) * (q @ moment) * (scale / int(video.sum()))
        return term
    parts = zip(*(x.split(blocks.count.tolist(), 2) for x in (centred, v)), strict=True)
    moments = torch.stack([keys.mT @ values for keys, values in parts], 2)  # [B, H, nk, D, D]
    if plan.first_order == "block":
        out = torch.zeros_like(q)
        for j, n in enumerate(blocks.count.tolist()):
            out = out + mass[..., j, None] * (q @ moments[:, :, j]) * (scale / n)
        return out
    draft = scale * _finite_means(q, plan.q_blocks) @ means.mT + count.to(q).log()
    if plan.rest_bias is not None:
        draft = draft + plan.rest_bias.to(q)
    weight = draft.masked_fill(~read, float("-inf")).softmax(-1).masked_fill(~read, 0.0)
    weight = weight / count.to(q)
    rows = []
    for i, part in enumerate(q.split(plan.q_blocks.count.tolist(), 2)):
        moment = _weighted(weight[:, :, i, None], moments.flatten(3)).view_as(moments[:, :, 0])
        rows.append(part @ moment)
    term = mass.sum(-1, keepdim=True) * torch.cat(rows, 2) * scale
    return term


def _finite_means(x: Tensor, blocks: Blocks) -> Tensor:
    """[..., n, D]: means over the tokens of each block whose numbers are all finite."""
    means = []
    for part in x.split(blocks.count.tolist(), -2):
        finite = part.isfinite().all(-1, keepdim=True)
        means.append(torch.where(finite, part, 0.0).sum(-2) / finite.sum(-2))
    return torch.stack(means, -2)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
