"""One oracle of every Triton launcher, under its name, in torch and from the definition.

float64 whatever the inputs are, on their device. Selection has its oracles in `vidsparse.selector`.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.reference import pool
from vidsparse.plan import SKIP, BlockPlan


def block_means(x: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Means over the tokens of each block, [B, H, n, D]; a block without a token gives zeros."""
    spans = zip(start.tolist(), count.tolist(), strict=True)
    return torch.stack([x[:, :, at : at + n].double().sum(2) / max(n, 1) for at, n in spans], 2)


def fill_keys(x: Tensor, blocks: Blocks, levels: dict[int, int], rows: int, padded: int) -> Tensor:
    """The key buffer, [B, H, rows, padded]: tokens from row 0 on, means of level l from levels[l].

    size >> l rows to a block; rows without a token and columns past D are zero.
    """
    out = torch.zeros(*x.shape[:2], rows, padded, dtype=torch.float64, device=x.device)
    for level, first in {0: 0, **levels}.items():
        means, _, owner = pool(x.double(), blocks, level)
        nth = torch.arange(len(owner), device=x.device) - torch.searchsorted(owner, owner)
        out[:, :, first + owner * (blocks.size >> level) + nth, : x.shape[3]] = means
    return out


def draft_scores(
    q: Tensor, k: Tensor, q_blocks: Blocks, k_blocks: Blocks, sub_blocks: int
) -> Tensor:
    """Log of the mean of exp(q . k / sqrt(D)) over the token pairs of two blocks, [B, H, nq, nk].

    A token stands for the mean of its piece, of which a full block has sub_blocks.
    """
    tokens = []
    for x, blocks in ((q, q_blocks), (k, k_blocks)):
        means, count, _ = pool(x.double(), blocks, (blocks.size // sub_blocks).bit_length() - 1)
        tokens.append(means.repeat_interleave(count, 2))
    score = tokens[0] @ tokens[1].mT / q.shape[3] ** 0.5
    for blocks in (k_blocks, q_blocks):
        runs = score.split(blocks.count.tolist(), -1)
        score = torch.stack([run.logsumexp(-1) - log(run.shape[-1]) for run in runs], -1).mT
    blocked: Tensor = score
    return blocked


def pack_lists(plan: BlockPlan, first: dict[int, int], rows: int) -> tuple[Tensor, Tensor]:
    """bool [B * H * nq, rows]: rows of the key buffer that a list names, and those named as `rest`.

    first: first row of each level, size >> level rows to a block. No list names a row twice.
    """
    level_map, listed = plan.level_map().flatten(0, 2), plan.levels.flatten(0, 2) != SKIP
    named, rest = level_map.new_zeros(2, len(level_map), rows, dtype=torch.bool)
    for level, at in first.items():
        height = plan.k_blocks.size >> level
        part = slice(at, at + height * len(plan.k_blocks))
        named[:, part] = (level_map == level).repeat_interleave(height, 1)
        rest[:, part] = ((level_map == level) & ~listed).repeat_interleave(height, 1)
    return named, rest


def named_rows(
    entry: Tensor, bits: Tensor | None, count: Tensor, whole: Tensor, block_n: int, rows: int
) -> tuple[Tensor, Tensor]:
    """int64 [n, rows]: how often packed lists name each row of the key buffer, and as `rest`.

    entry int32 [n, W], of which a list uses the first count [n]: rest << 30 | shift << 24 | tile of
    block_n rows. The first whole [n] of them want all rows, the others those that bits int64 [n, V]
    say, from 0 on: bit i wants the i-th 2^shift.
    """
    assert bool((whole <= count).all() and (count < entry.shape[1]).all()), "no room for the spare"
    place = torch.arange(entry.shape[1], device=entry.device)
    used, shared = place < count[:, None], place >= whole[:, None]
    word = entry.long().where(used, 0)[..., None]
    lane = torch.arange(block_n, device=entry.device)
    wanted = torch.ones_like(word + lane)
    if bits is not None:
        assert bool((count - whole < bits.shape[1]).all()), "no room for the spare bits"
        at = (place - whole[:, None]).clamp(0, bits.shape[1] - 1).long()
        chosen = bits.gather(1, at)[..., None] >> (lane >> (word >> 24 & 0xF)) & 1
        wanted = torch.where(shared[..., None], chosen, wanted)
    wanted = wanted.where(used[..., None], 0)
    row = (word & 0xFFFFFF) * block_n + lane
    assert int(row.max()) < rows, f"a list names row {int(row.max())} of {rows}"
    none = wanted.new_zeros(len(entry), rows)
    counted = wanted, wanted * (word >> 30)
    named, rest = (none.scatter_add(1, row.flatten(1), each.flatten(1)) for each in counted)
    return named, rest


def sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, named: Tensor, rest: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every query over the rows of the key buffer that the list of its block names.

    q [B, H, S, D], blocks: its cut; k, v [B, H, R, DP]; bias [R], log2 of the tokens behind a row;
    named, rest [B * H * nq, R], 0 or 1, as `named_rows` gives them. Returns out [B, H, S, D], LSE
    [B, H, S] and the share of the `rest` rows [B, H, S].
    """
    named, rest = (
        x.view(*q.shape[:2], len(blocks), -1)[:, :, blocks.owner.to(q.device)]
        for x in (named, rest)
    )
    k, v = (x[..., : q.shape[3]].double() for x in (k, v))
    score = q.double() @ k.mT / q.shape[3] ** 0.5 + bias.double() * log(2)
    score = score.masked_fill(named == 0, float("-inf"))
    lse = torch.logsumexp(score, -1)
    weight = (score - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weight @ v, lse, (weight * rest).sum(-1)


def add_first_order(q: Tensor, moment: Tensor, rest: Tensor, out: Tensor) -> Tensor:
    """out + rest * (q moment) / sqrt(D), [B, H, S, D]; moment [B, H, DP, DP], rest [B, H, S]."""
    depth = q.shape[3]
    term = q.double() @ moment[..., :depth, :depth].double() / depth**0.5
    total: Tensor = out.double() + rest.double()[..., None] * term
    return total


def taylor_state(k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """(1 / N) sum_n (k_n - mean of its block)^T v_n over the N video tokens, [B, H, D, D]."""
    owner = blocks.owner.to(k.device)
    video = ~blocks.on(k.device).text[owner]
    centred = k.double() - block_means(k, blocks.start, blocks.count)[:, :, owner]
    return centred[:, :, video].mT @ v[:, :, video].double() / int(video.sum())


def key_mean(x: Tensor, bias: Tensor) -> Tensor:
    """Mean over the tokens behind rows x [B, H, R, DP], 2^bias of them to a row: [B, H, DP]."""
    weight = bias.double().exp2()
    return (x.double() * weight[:, None]).sum(2) / weight.sum()


def quantise_keys(
    x: Tensor, group: int, bias: Tensor, mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys (x - mean) / scale, [B, H, R, DP], before they are rounded to int8.

    scale [B, H, R / group]: max |x - mean| / 127 of `group` rows, 1 if that is 0. mean [B, H, DP]:
    what was removed. Rows of bias -inf are zero.
    """
    centred = x.double() if mean is None else x.double() - mean.double()[:, :, None]
    centred = centred.masked_fill(bias[:, None].isneginf(), 0.0)
    scale = _scale(centred.abs().unflatten(2, (-1, group)).amax((3, 4)))
    return centred / scale.repeat_interleave(group, 2)[..., None], scale


def quantise_queries(
    q: Tensor, blocks: Blocks, group: int, key_mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries q / scale, [B, H, S, D], before they are rounded to int8, and the shift of their LSE.

    scale [B, H, n * size / group]: max |q| / 127 of `group` tokens of a block, 1 if that is 0.
    shift [B, H, S]: q . key_mean / sqrt(D).
    """
    q, depth = q.double(), q.shape[3]
    inside = torch.arange(blocks.tokens) - blocks.start[blocks.owner]
    part = (blocks.owner * (blocks.size // group) + inside // group).to(q.device)
    peak = q.new_zeros(*q.shape[:2], len(blocks) * blocks.size // group)
    size = q.abs().amax(3)
    scale = _scale(peak.scatter_reduce(2, part.expand_as(size), size, "amax"))
    mean = q.new_zeros(depth) if key_mean is None else key_mean[:, :, None, :depth].double()
    return q / scale[:, :, part, None], scale, (q * mean).sum(3) / depth**0.5


def _scale(peak: Tensor) -> Tensor:
    return torch.where(peak > 0, peak / 127, 1.0)
