"""Sol-Attn: which blocks stand out of their row, neighbours and sinks, by the paper's formula."""

import pytest
import torch
from by_formula import GRID, HEADS, call

from vidsparse.config import Force, SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP

FREE = "schedule.density=0.99999999999"


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_outliers_neighbours_and_sinks_are_exact_and_all_others_centroids(tau: float) -> None:
    made = call("sol", f"selector.tau={tau}", FREE, "kernel.block_q=16")
    cut, rows = made.plan.k_blocks, made.plan.q_blocks
    assert made.plan.rest == 4 and made.plan.rest_bias is None
    video, lone = ~cut.text, 0
    for b, h in HEADS:
        score = made.logits(b, h)
        for i in range(len(rows)):
            inside = score[i][video]
            outside = score[i] > inside.mean() + tau * inside.std(correction=0)
            for j in range(len(cut)):
                if rows.text[i] or cut.text[j]:
                    wanted = True
                else:  # blocks of one size: row i is beside key blocks i - 1 and i + 1
                    wanted = bool(outside[j]) or abs(i - j) <= 1 or j == 0
                    lone += bool(outside[j]) and abs(i - j) > 1 and j > 0
                assert bool(made.plan.levels[b, h, i, j] == 0) == wanted, (b, h, i, j)
    assert lone > 10


def test_output_is_one_softmax_of_tokens_and_weighed_centroids() -> None:
    made = call("sol", "selector.tau=1", FREE)
    owner_q = made.plan.q_blocks.owner
    for b, h in HEADS:
        exact = (made.plan.levels[b, h] == 0)[owner_q]
        k, v = made.blocks("k", b, h), made.blocks("v", b, h)
        q, scale = made.q[b, h], made.q.shape[-1] ** -0.5
        top, down = torch.zeros_like(q), torch.zeros(len(q), 1, dtype=q.dtype)
        for j, (keys, values) in enumerate(zip(k, v, strict=True)):
            each = (q @ keys.T * scale).exp()
            mean = (q @ keys.mean(0) * scale).exp()[:, None] * len(keys)
            here = exact[:, j, None]
            top += torch.where(here, each @ values, mean * values.mean(0))
            down += torch.where(here, each.sum(1, keepdim=True), mean)
        torch.testing.assert_close(made.out[b, h], top / down, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(made.lse[b, h], down[:, 0].log(), rtol=1e-9, atol=1e-10)


def test_the_density_caps_a_row_and_the_best_stay() -> None:
    alone = ("selector.tau=0", "force.neighbours=0", "force.sinks=0", "force.own_block=false")
    few, all_ = (
        call("sol", *alone, f"schedule.density={density}", grid=TokenGrid(3, 7, 11))
        for density in (0.2, 0.99)
    )
    kept, wanted = few.plan.levels == 0, all_.plan.levels == 0
    nk = len(few.plan.k_blocks)
    assert bool((kept <= wanted).all()) and bool((kept.sum(-1) <= int(0.2 * nk)).all())
    assert bool((kept.sum(-1) == wanted.sum(-1).clamp(max=int(0.2 * nk))).all())
    for b, h in HEADS:
        score = few.logits(b, h)
        least = score.masked_fill(~kept[b, h], torch.inf).amin(-1)
        left = score.masked_fill(kept[b, h] | ~wanted[b, h], -torch.inf).amax(-1)
        assert bool((least >= left).all())


def test_an_even_row_has_no_outlier_and_still_a_block() -> None:
    from vidsparse import registry
    from vidsparse.blocks import Blocks
    from vidsparse.plan import Scores

    method = registry.method("selector", "outlier")
    keys, nothing = Blocks.cut(TokenGrid(1, 1, 200), 16), torch.zeros(2, 13, dtype=torch.bool)
    for bad in (0.0, float("nan"), float("inf")):
        scores = Scores(torch.full((1, 1, 2, 13), bad), "logit")
        levels = method.select(scores, nothing, 0.5, keys, method.Params())
        assert ((levels == 0).sum(-1) == 1).all() and (levels[..., 1:] == SKIP).all()


def test_neighbours_and_sinks_by_brute_force() -> None:
    made = call(
        "sol", "force.neighbours=2", "force.sinks=3", "force.text=false", "kernel.block_q=64"
    )
    rows, cut = made.plan.q_blocks, made.plan.k_blocks
    ends = (cut.start + cut.count).tolist()
    for i, (start, count, text) in enumerate(
        zip(rows.start.tolist(), rows.count.tolist(), rows.text.tolist(), strict=True)
    ):
        own = [j for j in range(len(cut)) if cut.start[j] < start + count and ends[j] > start]
        for j in range(len(cut)):
            beside = not text and min(own) - 2 <= j <= max(own) + 2
            wanted = j in own or (not cut.text[j] and (beside or j < 3))
            assert bool(made.forced[i, j]) == wanted, (i, j)
    assert GRID.text_tokens


def test_what_has_no_place_in_an_order_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"force.neighbours=1 with layout.name='content'"):
        SparseConfig.load("balanced", ["force.neighbours=1"])
    with pytest.raises(ValueError, match=r"force.sinks=-1: allowed is an integer >= 0"):
        Force(sinks=-1)
    with pytest.raises(ValueError, match=r"selector.tau=-1.*\[0, 100\]"):
        SparseConfig.load("sol", ["selector.tau=-1"])
