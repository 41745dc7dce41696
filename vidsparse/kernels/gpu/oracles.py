"""One oracle of every Triton launcher, under its name, in torch and from the definition.

float64 whatever the inputs are, on their device. Selection has its oracles in `vidsparse.selector`.
"""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.reference import pool
from vidsparse.plan import BlockPlan


def block_means(x: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Means over the tokens of each block, [B, H, n, D]; a block without a token gives zeros."""
    spans = zip(start.tolist(), count.tolist(), strict=True)
    return torch.stack([x[:, :, at : at + n].double().sum(2) / max(n, 1) for at, n in spans], 2)


def second_moments(x: Tensor, start: Tensor, count: Tensor, norms: bool) -> tuple[Tensor, Tensor]:
    """Means of x and of x^2 over the tokens of each block, [B, H, n, D]; norms: |mean|^2 and the
    mean of |x|^2, [B, H, n]."""
    mean, second = (block_means(y, start, count) for y in (x, x.double().square()))
    return (mean.square().sum(-1), second.sum(-1)) if norms else (mean, second)


def finite_means(x: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Means over the tokens of each block whose numbers are all finite; zeros without one."""
    good = x.isfinite().all(-1, keepdim=True)
    share = block_means(good, start, count)
    mean = block_means(torch.where(good, x, 0.0), start, count) / share
    return mean.masked_fill(share == 0, 0.0)


def rest_weights(logits: Tensor, levels: Tensor, tilt: Tensor | None, count: Tensor) -> Tensor:
    """softmax over the unlisted blocks of logits + ln count + tilt; 0 for all others."""
    score = logits.double() + count.log() + (0 if tilt is None else tilt.double())
    weight: Tensor = score.masked_fill(levels >= 0, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weight


def rest_bias(levels: Tensor, tilt: Tensor | None, bias: Tensor) -> Tensor:
    """[B, H, nq, R]: log2 n_j, and a tilt in natural units, of what is not listed; else -inf."""
    past = len(bias) - levels.shape[3]
    found = bias.double() + (0 if tilt is None else F.pad(tilt.double(), (0, past)) / log(2))
    return found.masked_fill(F.pad(levels, (0, past)) >= 0, -torch.inf)


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


def draft_spread(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Blocks, k_blocks: Blocks, rule: str, bound: float
) -> Tensor:
    """What `vidsparse.kernels.gpu.spread` writes by a rule, from the tokens, [B, H, nq, nk]."""
    scale, cut = q.shape[3] ** -0.5, (k_blocks.start, k_blocks.count)
    means, seconds = second_moments(q, q_blocks.start, q_blocks.count, False)
    parts = k.double().split(k_blocks.count.tolist(), 2)
    variance = torch.stack([part.var(2, correction=0) for part in parts], 2)
    logits: Tensor = scale * (means @ block_means(k, *cut).mT)
    spread: Tensor = (scale**2 / 2 * (seconds @ variance.mT)).clamp(max=bound)
    if rule != "moments":
        return spread if rule == "spread" else logits + spread
    norms, squares = second_moments(v, *cut, True)
    around = (2 * spread).exp() * squares.unsqueeze(2) - norms.unsqueeze(2)
    found: Tensor = 2 * (logits + spread) + around.log() + k_blocks.count.to(q.device).log()
    return found


def block_errors(q: Tensor, k: Tensor, v: Tensor, q_blocks: Blocks, k_blocks: Blocks) -> Tensor:
    """ln of what the mean query of a block loses of a key block by its centroid, from the tokens,
    [B, H, nq, nk]."""
    means = q.shape[3] ** -0.5 * block_means(q, q_blocks.start, q_blocks.count)
    found = []
    for keys, values in zip(*(x.double().split(k_blocks.count.tolist(), 2) for x in (k, v)),
                            strict=True):  # fmt: skip
        exact = (means @ keys.mT).exp().unsqueeze(-1) * values.unsqueeze(2)
        far = (means @ keys.mean(2, keepdim=True).mT).exp() * values.mean(2, keepdim=True)
        found.append((exact - far.unsqueeze(3)).square().sum((3, 4)).log())
    return torch.stack(found, -1)


def lost_mass(logits: Tensor, spread: Tensor, count: Tensor, text: Tensor, near: int) -> Tensor:
    """Of each row [B, H, nq]: sum of mass times spread past the `near` blocks of most mass."""
    mass = (logits.double() + count.log()).masked_fill(text, -torch.inf).softmax(-1)
    far = mass < mass.topk(near, -1).values[..., -1:]
    lost: Tensor = torch.where(far, mass * spread.double(), 0.0).sum(-1)
    return lost


def grams(x: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sums over some rows of x^T x, [B, H, D, D], and of x; what is not finite counts as 0."""
    part = x[:, :, first : first + rows].double().nan_to_num(0.0, 0.0, 0.0)
    return part.mT @ part, part.sum(2)


def project(x: Tensor, basis: Tensor, order: Tensor | None, first: int, rows: int) -> Tensor:
    """[B, H, A, rows]: some rows, in an order, on the axes of basis [B, H, D, A]."""
    part = x if order is None else x[:, :, order]
    part = part[:, :, first : first + rows].double().nan_to_num(0.0, 0.0, 0.0)
    found: Tensor = (part @ basis.double()).mT
    return found


def bisect(x: Tensor, names: Tensor, size: int) -> Tensor:
    """Names of the rows of x [B, H, A, n] in an order of which every `size` are a block.

    One part after the other; each cut leaves the rows of both halves in their order.
    """

    def blocks(rows: Tensor, ids: Tensor) -> list[Tensor]:
        left = -(-len(ids) // size) // 2 * size
        if left == 0:
            return [ids]
        part = rows[:, ids].double()
        ranked = part[part.var(1, correction=0).argmax()].argsort(stable=True)
        halves = ranked[:left].sort().values, ranked[left:].sort().values
        return [*blocks(rows, ids[halves[0]]), *blocks(rows, ids[halves[1]])]

    every = torch.arange(x.shape[3], device=x.device)
    orders = [names[torch.cat(blocks(rows, every))] for rows in x.flatten(0, 1)]
    return torch.stack(orders).view(*x.shape[:2], -1)


def pack_exact(levels: Tensor, first: Tensor, pieces: int, step: int) -> list[list[int]]:
    """The list of each row of levels [B, H, nq, nk]: blocks of level 0, as first + step * piece."""
    lists = []
    for row in levels.flatten(0, 2).tolist():
        blocks = [at for level, at in zip(row, first.tolist(), strict=True) if level == 0 <= at]
        lists.append([at + step * piece for at in blocks for piece in range(pieces)])
    return lists


def exact_tiles(
    q: Tensor, k: Tensor, v: Tensor, entry: Tensor, count: Tensor, block_n: int, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the tiles that the list of its block names.

    q [B, H, S, D], blocks: its cut; k, v [B, H, R, D']; entry [B, H, nq, W]: first rows of tiles of
    block_n, of which a list uses count [B, H, nq]. Returns out [B, H, S, D] and LSE [B, H, S].
    """
    used = torch.arange(entry.shape[3], device=q.device) < count[..., None]
    rows = entry.long().where(used, 0)[..., None] + torch.arange(block_n, device=q.device)
    named = used[..., None].expand(rows.shape).flatten(3).long()
    none = named.new_zeros(*entry.shape[:3], k.shape[2])
    return _attention(q, k, v, none.scatter_add(3, rows.flatten(3), named), None, blocks)


def rest_merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the rest merge makes of attention over the listed full blocks of a plan of level 0.

    q [B, H, S, D], k, v [B, H, S, D] in the order of the plan; moment [B, H, DP, DP] or
    [B, H, nq, DP, DP]: of the first-order term, None without one. Returns out and LSE: of the
    listed blocks, short ones among them, and of those that are read as rest.
    """
    blocks, depth, owner = plan.k_blocks, q.shape[3], plan.q_blocks.owner.to(q.device)
    q, k, v = q.double(), k.double(), v.double()
    token = (plan.levels == 0)[..., blocks.owner.to(q.device)][:, :, owner]
    means, values = (block_means(x, blocks.start, blocks.count) for x in (k, v))
    score = q @ k.mT / depth**0.5
    draft = q @ means.mT / depth**0.5 + blocks.count.to(q).log()
    if plan.rest_bias is not None:
        draft = draft + plan.rest_bias[:, :, owner].double()
    read = plan.read_as_rest()[:, :, owner]
    both = torch.cat(
        [score.masked_fill(~token, -torch.inf), draft.masked_fill(~read, -torch.inf)], 3
    )
    lse = both.logsumexp(3)
    weight = (both - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    out = weight @ torch.cat([v, values], 2)
    if moment is not None:
        part = moment[..., :depth, :depth].double()
        term = q @ part if part.ndim == 4 else (q[..., None, :] @ part[:, :, owner]).squeeze(3)
        out = out + weight[..., len(blocks.owner) :].sum(3, keepdim=True) * term / depth**0.5
    merged: Tensor = out
    return merged, lse


def pack_lists(plan: BlockPlan, first: dict[int, int], rows: int) -> Tensor:
    """bool [B * H * nq, rows]: rows of the key buffer that a list names, none of them twice.

    first: first row of each level, size >> level rows to a block.
    """
    levels = plan.levels.flatten(0, 2)
    named = levels.new_zeros(len(levels), rows, dtype=torch.bool)
    for level, at in first.items():
        height = plan.k_blocks.size >> level
        part = slice(at, at + height * len(plan.k_blocks))
        named[:, part] = (levels == level).repeat_interleave(height, 1)
    return named


def named_rows(
    entry: Tensor, bits: Tensor | None, count: Tensor, whole: Tensor, block_n: int, rows: int
) -> Tensor:
    """int64 [n, rows]: how often packed lists name each row of the key buffer.

    entry int32 [n, W], of which a list uses the first count [n]: shift << 24 | tile of block_n
    rows. The first whole [n] of them want all rows, the others those that bits int64 [n, V] say,
    from 0 on: bit i wants the i-th 2^shift.
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
    return none.scatter_add(1, row.flatten(1), wanted.flatten(1))


def levels_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, named: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the rows of the key buffer that the list of its block names.

    q [B, H, S, D], blocks: its cut; k, v [B, H, R, DP]; bias [R], log2 of the tokens behind a row;
    named [B * H * nq, R], 0 or 1, as `named_rows` gives it. Returns out [B, H, S, D] and LSE
    [B, H, S].
    """
    named = named.view(*q.shape[:2], len(blocks), -1)
    return _attention(q, k, v, named, bias.double() * log(2), blocks)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, named: Tensor, bias: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Over the rows that named [B, H, nq, R] is not 0 for; bias [R] in natural log."""
    k, v = (x[..., : q.shape[3]].double() for x in (k, v))
    score = q.double() @ k.mT / q.shape[3] ** 0.5
    score = score if bias is None else score + bias
    unnamed = (named == 0)[:, :, blocks.owner.to(q.device)]
    score = score.masked_fill(unnamed, float("-inf"))
    lse = torch.logsumexp(score, -1)
    weight = (score - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weight @ v, lse


def summarise(k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Means of keys and of values [B, H, n, D], and (1 / N) sum of H_j of the video [B, H, D, D].

    N: tokens of the video.
    """
    cut = blocks.on(k.device)
    count = cut.count.masked_fill(cut.text, 0).double()
    moments = torch.einsum("n,nbhij->bhij", count / count.sum(), block_moments(k, v, blocks))
    keys, values = (block_means(x, blocks.start, blocks.count) for x in (k, v))
    return keys, values, moments


def block_moments(k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Mean over the tokens n of block j of (k_n - their mean)^T v_n, [n, B, H, D, D]."""
    spans = zip(blocks.start.tolist(), blocks.count.tolist(), strict=True)
    parts = [(k[:, :, a : a + n].double(), v[:, :, a : a + n].double()) for a, n in spans]
    return torch.stack([(x - x.mean(2, keepdim=True)).mT @ y / x.shape[2] for x, y in parts])


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
