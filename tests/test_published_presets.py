"""psa, pisa, draft and topp are the published methods: level maps from the papers' formulas."""

import math

import pytest
import torch
from by_formula import HEADS, call, field, ordered
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.estimator import sampled
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP

RAGGED = TokenGrid(2, 9, 13, text_tokens=5, text_first=True)


@pytest.mark.parametrize("grid", [None, RAGGED], ids=["text-last", "text-first"])
def test_draft_is_one_threshold_per_head_over_the_video(grid: TokenGrid | None) -> None:
    made = call("draft", "schedule.density=0.3", **({} if grid is None else {"grid": grid}))
    text = made.plan.q_blocks.text[:, None] | made.plan.k_blocks.text
    assert torch.equal(made.forced, text), "text alone is forced"
    for b, h in HEADS:
        weight = made.logits(b, h).exp()
        weight[text] = 0
        share = weight / weight.sum(-1, keepdim=True)
        pairs = share[~text].sort().values
        bound = pairs[math.floor(0.7 * len(pairs)) - 1]
        kept = (share >= bound) & ~text
        found = made.plan.levels[b, h] == 0
        assert int((found & ~text).sum()) == len(pairs) - math.floor(0.7 * len(pairs)) + 1
        rows = kept.any(-1)  # others are the guard's
        if bool(rows[~made.plan.q_blocks.text].all()):
            assert torch.equal(found, kept | text)


def test_draft_leaves_no_row_empty() -> None:
    made = call("draft", "schedule.density=0.05", grid=TokenGrid(3, 7, 11), seed=3)
    assert bool((made.plan.levels == 0).any(-1).all())


def drafted(grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, density: float) -> Tensor | None:
    """DraftAttention of one head, float64 [S, D] each in raster order: pooled tiles of 8 x 16 of a
    frame, smaller ones at its border; one threshold; softmax over the pairs of tokens that it
    leaves, and over text. None if a tile is left without any, of which the paper says nothing."""
    first = grid.video_start
    tiles = [
        [first + (f * grid.height + y) * grid.width + x
         for y in range(top, min(top + 8, grid.height))
         for x in range(left, min(left + 16, grid.width))]
        for f in range(grid.frames)
        for top in range(0, grid.height, 8)
        for left in range(0, grid.width, 16)
    ]  # fmt: skip
    owner = torch.full((grid.tokens,), -1)
    for n, tile in enumerate(tiles):
        owner[tile] = n
    means = [torch.stack([x[tile].mean(0) for tile in tiles]) for x in (q, k)]
    share = (means[0] @ means[1].T / q.shape[-1] ** 0.5).softmax(-1)
    pairs = share.flatten().sort().values
    kept = share >= pairs[math.floor((1 - density) * len(pairs)) - 1]
    if not bool(kept.any(-1).all()):
        return None
    reads = kept[owner][:, owner] | (owner < 0) | (owner < 0)[:, None]
    score = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~reads, float("-inf"))
    return score.softmax(-1) @ v


ODD = [
    TokenGrid(3, 13, 21),
    TokenGrid(2, 15, 26, text_tokens=11),
    TokenGrid(2, 7, 37, text_tokens=5, text_first=True),
    TokenGrid(2, 16, 32, text_tokens=7),
]
"""The border cuts tiles in width and height, or all of them; and a grid that they divide."""


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("grid", ODD, ids=lambda g: f"{g.height}x{g.width}")
def test_draft_is_the_published_method_on_tiles_that_the_border_cuts(
    grid: TokenGrid, impl: str
) -> None:
    small = "schedule.min_tokens=0", "schedule.name=constant", "schedule.density=0.5"
    config = SparseConfig.load("draft", [*small, "kernel.crossover=1"])
    q, k, v = field(grid, seed=4)
    result = attend(q, k, v, grid=grid, config=config, impl=impl)
    assert result.reason is None and result.plan is not None
    cut = result.plan.k_blocks
    wide, high = -(-grid.width // 16), -(-grid.height // 8)
    assert int((~cut.text).sum()) == grid.frames * wide * high and cut.tokens == grid.tokens
    compared = 0
    for b, h in HEADS:
        wanted = drafted(grid, *(x[b, :, h] for x in (q, k, v)), 0.5)
        if wanted is not None:
            torch.testing.assert_close(result.out[b, :, h], wanted, rtol=1e-9, atol=1e-10)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("density", [0.15, 0.4])
def test_pisa_ranks_by_logit_and_moment(density: float) -> None:
    made = call("pisa", f"schedule.density={density}")
    assert (made.plan.rest, made.plan.first_order) == (4, "global")
    nk, agree = len(made.plan.k_blocks), 0
    for b, h in HEADS:
        parts = zip(made.blocks("k", b, h), made.blocks("v", b, h), strict=True)
        norm = torch.stack([((k - k.mean(0)).T @ v).norm() for k, v in parts])
        score, plain = made.logits(b, h) + (norm + 1e-5).log(), made.logits(b, h)
        for i, row in enumerate(made.forced.tolist()):
            k = max(1, math.floor(density * nk))
            best = ordered(score[i].tolist(), row)[:k]
            wanted = [0 if row[j] or j in best else SKIP for j in range(nk)]
            assert made.plan.levels[b, h, i].tolist() == wanted
            agree += best == ordered(plain[i].tolist(), row)[:k]
    assert agree < 4 * len(made.forced), "the moment decides some rows"


def weights(made, b: int, h: int, share: int) -> torch.Tensor:
    """A_ij / sum_j A_ij of PSA, from the places that were drawn."""
    q, k = made.q[b, h], made.k[b, h]
    places = [
        sampled.sampled(cut, 2, share, 0, torch.device("cpu"))[h]
        for cut in (made.plan.q_blocks, made.plan.k_blocks)
    ]
    logits = q @ k.T * q.shape[-1] ** -0.5
    value = torch.zeros(len(places[0]), len(places[1]), dtype=torch.float64)
    for i, own in enumerate(places[0]):
        top = logits[own][:, places[1].flatten()].amax(1)
        for j, near in enumerate(places[1]):
            value[i, j] = (logits[own][:, near] - top[:, None]).exp().max()
    return value / value.sum(1, keepdim=True)


def test_psa_samples_the_same_quarter_of_every_block() -> None:
    cut = call("psa").plan.k_blocks
    found = sampled.sampled(cut, 3, 4, 0, torch.device("cpu")) - cut.start[:, None]
    assert found.shape == (3, len(cut), 4)
    for h in range(3):
        for count, places in zip(cut.count.tolist(), found[h].tolist(), strict=True):
            assert places == [place % count for place in found[h, 0].tolist()]
    assert not torch.equal(found[0], found[1])
    whole = sampled.sampled(cut, 1, 1, 0, torch.device("cpu"))[0]
    assert {*whole.flatten().tolist()} == set(range(cut.tokens))


@pytest.mark.parametrize("share", [1, 4])
def test_psa_by_rank(share: int) -> None:
    made = call("psa", f"estimator.share={share}", "schedule.density=0.3")
    nk = len(made.plan.k_blocks)
    ends = [math.floor(x * nk + 1e-9) for x in (0.2, 0.3, 0.7)]
    for b, h in HEADS:
        value = weights(made, b, h, share)
        for i, forced in enumerate(made.forced.tolist()):
            order = ordered(value[i].tolist(), forced)
            cost, wanted = 0.0, [SKIP] * nk
            for rank, j in enumerate(order):
                level = 0 if rank < ends[0] else 1 if rank < ends[1] else 3
                level = SKIP if rank >= ends[2] else level
                level = 0 if forced[j] or rank == 0 else level
                cost += 0 if level == SKIP else 0.5**level
                wanted[j] = level if forced[j] or cost <= 0.3 * nk + 1e-9 else SKIP
            assert made.plan.levels[b, h, i].tolist() == wanted


def test_psa_loses_no_block_to_rounding() -> None:
    """Of 400 blocks 40 exact, 20 in pairs, 80 by eight: what shares of four digits made 79."""
    from vidsparse.selector.pyramid import _quota_ends

    params = SparseConfig.load("psa").selector
    for nk in (20, 400, 1200, 8000):
        assert _quota_ends(0.15, nk, params) == [nk // 10, nk // 10 + nk // 20, 35 * nk // 100]


def test_psa_by_cumulative_score_with_caps() -> None:
    limits = 0.6, 0.3, 0.25
    text = ",".join(map(str, limits))
    made = call("psa_wan", f"estimator.similarity=[{text}]", "schedule.density=0.9")
    nk, capped = len(made.plan.k_blocks), 0
    for b, h in HEADS:
        caps = []
        for part in made.blocks("k", b, h):
            unit = part / part.norm(dim=1, keepdim=True)
            cap = 0
            for level, least in enumerate(limits, 1):
                width = 2**level
                pairs = [
                    float(unit[n] @ unit[n + width - 1])
                    for n in range(0, len(part) - width + 1, width)
                ]
                if not pairs or sum(pairs) / len(pairs) <= least:
                    break
                cap = level
            caps.append(cap)
        value = weights(made, b, h, 4)
        for i, forced in enumerate(made.forced.tolist()):
            order = ordered(value[i].tolist(), forced)
            front, wanted = 0.0, [SKIP] * nk
            for rank, j in enumerate(order):
                open_levels = [n for n, p in enumerate((0.5, 0.6, 0.7, 0.8)) if front < p - 1e-12]
                level = open_levels[0] if open_levels else SKIP
                capped += level > caps[j]
                level = min(level, caps[j])
                least = rank < math.floor(0.06 * nk) + 1
                wanted[j] = 0 if forced[j] or least else level
                front += float(value[i, j])
            assert made.plan.levels[b, h, i].tolist() == wanted
    assert capped and set(made.plan.levels.unique().tolist()) >= {SKIP, 0, 1}


def test_psa_wan_stays_below_its_cap() -> None:
    made = call("psa_wan", "schedule.density=0.3", "force.text=false")
    cost = torch.where(made.plan.levels == SKIP, 0.0, 0.5 ** made.plan.levels.double()).sum(-1)
    assert bool((cost <= 0.3 * len(made.plan.k_blocks) + 1e-9).all())


def test_topp_is_the_smallest_set_of_the_mass() -> None:
    made = call("topp", "selector.p=0.7", "schedule.density=0.99999999999", "force.own_block=false")
    count = made.plan.k_blocks.count.double()
    for b, h in HEADS:
        mass = (made.logits(b, h).exp() * count).tolist()
        for i, forced in enumerate(made.forced.tolist()):
            order, front = ordered(mass[i], forced), 0.0
            wanted = [SKIP] * len(count)
            for rank, j in enumerate(order):
                if forced[j] or rank == 0 or front < 0.7 * sum(mass[i]):
                    wanted[j] = 0
                front += mass[i][j]
            assert made.plan.levels[b, h, i].tolist() == wanted


def first(score: Tensor, forced: list[bool], many: int) -> list[int]:
    """The block ids that a row of scores reads first."""
    return ordered(score.tolist(), forced)[:many]


@pytest.mark.parametrize("grid", [None, RAGGED], ids=["text-last", "text-first"])
def test_pyramid_spends_its_budget_on_exact_blocks_and_on_means_of_eight(
    grid: TokenGrid | None,
) -> None:
    made = call("pyramid", "schedule.density=0.4", **({} if grid is None else {"grid": grid}))
    nk = len(made.plan.k_blocks)
    ends = [math.floor(x * nk + 1e-9) for x in (0.26, 0.26 + 8 * 0.14)]
    assert made.plan.rest == 4, "all others are centroids"
    for b, h, i, forced in made.rows():
        cost, wanted = 0.0, [SKIP] * nk
        for rank, j in enumerate(ordered(made.logits(b, h)[i].tolist(), forced)):
            level = 0 if forced[j] or rank < max(1, ends[0]) else 3 if rank < ends[1] else SKIP
            cost += 0 if level == SKIP else 0.5**level
            wanted[j] = level if forced[j] or cost <= 0.4 * nk + 1e-9 else SKIP
        assert made.plan.levels[b, h, i].tolist() == wanted


def test_sparsed_chooses_by_the_mean_weight_of_quarters_of_blocks() -> None:
    made = call("sparsed", "schedule.density=0.4")
    nk, scale = len(made.plan.k_blocks), made.q.shape[-1] ** -0.5
    for b, h in HEADS:
        value = torch.zeros(len(made.plan.q_blocks), nk, dtype=torch.float64)
        for i, own in enumerate(made.blocks("q", b, h)):
            for j, near in enumerate(made.blocks("k", b, h)):
                for q in own.split(8):
                    for k in near.split(4):
                        pairs = len(q) * len(k) / (len(own) * len(near))
                        value[i, j] += pairs * (scale * q.mean(0) @ k.mean(0)).exp()
        for i, forced in enumerate(made.forced.tolist()):
            best = first(value[i], forced, math.floor(0.4 * nk))
            wanted = [0 if forced[j] or j in best else SKIP for j in range(nk)]
            assert made.plan.levels[b, h, i].tolist() == wanted


def test_tiles_reads_the_largest_logits_and_first_order_of_the_rest() -> None:
    made = call("tiles", "schedule.density=0.3")
    cut, scale = made.plan.k_blocks, made.q.shape[-1] ** -0.5
    nk, video = len(cut), (~cut.text).tolist()
    for b, h in HEADS:
        keys, values, logits = made.blocks("k", b, h), made.blocks("v", b, h), made.logits(b, h)
        parts = zip(keys, values, video, strict=True)
        moment = sum((k - k.mean(0)).T @ v for k, v, one in parts if one)
        tokens = sum(len(k) for k, one in zip(keys, video, strict=True) if one)
        for i, q in enumerate(made.blocks("q", b, h)):
            forced = made.forced[i].tolist()
            best = first(logits[i], forced, max(1, math.floor(0.3 * nk)))
            exact = [forced[j] or j in best for j in range(nk)]
            assert (made.plan.levels[b, h, i] == 0).tolist() == exact
            top, down = torch.zeros_like(q), torch.zeros(len(q), 1, dtype=q.dtype)
            for j, (k, v) in enumerate(zip(keys, values, strict=True)):
                each = (scale * q @ k.T).exp()
                mass = len(k) * (scale * q @ k.mean(0)).exp()[:, None]
                down += each.sum(1, keepdim=True) if exact[j] else mass
                rest = mass * (v.mean(0) + scale / tokens * q @ moment)
                top += each @ v if exact[j] else rest
            begin = int(made.plan.q_blocks.start[i])
            found = made.out[b, h, begin : begin + len(q)]
            torch.testing.assert_close(found, top / down, rtol=1e-9, atol=1e-10)
