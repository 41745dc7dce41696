"""The oracle: executes any plan by the definition, one softmax over all groups of all levels.

Works in the dtype of its inputs (give it float64), needs memory for a full score matrix per level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidsparse.plan import SKIP, BlockPlan, Blocks


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

    Formulas in `vidsparse.kernels` and, for the first-order term, `vidsparse.compensation.taylor`.
    """
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
        logits.append(score.masked_fill(level_map[..., owner] != level, float("-inf")))
        values.append(means)
    if not logits:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"), dtype=_lse_dtype(q))
    score = torch.cat(logits, -1)
    lse = torch.logsumexp(score, -1)
    empty = lse == float("-inf")
    weight = torch.exp(score - lse.masked_fill(empty, 0.0)[..., None])
    # a zero weight keeps a NaN or inf of an unread value out of the row
    out = _weighted(weight, torch.cat(values, -2))
    if plan.first_order != "none":
        out = out + _first_order(q, k, v, plan, lse.masked_fill(empty, 0.0))
    return out.masked_fill(empty[..., None], 0.0), (lse.to(_lse_dtype(q)) if return_lse else None)


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


def _first_order(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, lse: Tensor) -> Tensor:
    """The normalised Taylor term of the blocks that a row does not list."""
    blocks, scale = plan.k_blocks, q.shape[-1] ** -0.5
    means, count, owner = pool(k, blocks, blocks.levels)
    key_owner = blocks.owner.to(k.device)
    centred = k - means[..., owner.argsort(stable=True)[key_owner], :]
    score = scale * q @ means.mT + count.to(q).log() - lse[..., None]
    listed = plan.levels.to(q.device)[:, :, plan.q_blocks.owner.to(q.device)] != SKIP
    mass = score.exp().masked_fill(listed, 0.0)
    if plan.first_order == "global":
        video = ~blocks.on(k.device).text[key_owner]
        moment = centred[..., video, :].mT @ v[..., video, :]
        return mass.sum(-1, keepdim=True) * (q @ moment) * (scale / int(video.sum()))
    out = torch.zeros_like(q)
    for j in range(len(blocks)):
        start, n = int(blocks.start[j]), int(blocks.count[j])
        moment = centred[..., start : start + n, :].mT @ v[..., start : start + n, :]
        out = out + mass[..., j, None] * (q @ moment) * (scale / n)
    return out


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
