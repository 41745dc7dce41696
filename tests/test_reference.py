"""The oracle against plain attention over explicitly replaced tokens, in float64."""

import pytest
import torch
import torch.nn.functional as F

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import dense, reference
from vidsparse.plan import SKIP, BlockPlan

GRIDS = {
    "divides": TokenGrid(2, 8, 8),
    "ragged": TokenGrid(3, 5, 7),
    "text-last": TokenGrid(3, 5, 7, text_tokens=19),
    "text-first": TokenGrid(2, 3, 11, text_tokens=5, text_first=True),
}


def inputs(grid: TokenGrid, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, 2, grid.tokens, dim, dtype=torch.float64) for _ in range(3)]


def cut(grid: TokenGrid) -> tuple[Blocks, Blocks]:
    return Blocks.cut(grid, 32), Blocks.cut(grid, 16)


def row_by_row(q, k, v, plan):
    """The definition with loops: every row builds its own keys, values and counts."""
    levels, scale = plan.level_map(), q.shape[-1] ** -0.5
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in levels.shape[:3])).tolist():
        keys, values, bias = [], [], []
        for j, level in enumerate(levels[b, h, i].tolist()):
            if level == SKIP:
                continue
            start, count = int(plan.k_blocks.start[j]), int(plan.k_blocks.count[j])
            for group in torch.arange(start, start + count).split(2**level):
                keys.append(k[b, h, group].mean(0))
                values.append(v[b, h, group].mean(0))
                bias.append(torch.tensor(float(len(group))).double().log())
        if not keys:
            continue
        start, count = int(plan.q_blocks.start[i]), int(plan.q_blocks.count[i])
        score = scale * q[b, h, start : start + count] @ torch.stack(keys).T + torch.stack(bias)
        out[b, h, start : start + count] = torch.softmax(score, -1) @ torch.stack(values)
        lse[b, h, start : start + count] = torch.logsumexp(score, -1)
    return out, lse


@pytest.mark.parametrize("rest", [SKIP, 4], ids=["drop", "centroid"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_any_plan_equals_the_definition(grid, rest):
    q, k, v = inputs(grid)
    q_blocks, k_blocks = cut(grid)
    levels = torch.randint(SKIP, 5, (2, 2, len(q_blocks), len(k_blocks))).to(torch.int8)
    levels[0, 1, 0] = SKIP  # an empty row
    levels[1, 0, -1] = 0  # a full row
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(rest)
    out, lse = reference.execute(q, k, v, plan)
    wanted, wanted_lse = row_by_row(q, k, v, plan)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)
    empty = (plan.level_map()[0, 1, 0] == SKIP).all()
    assert bool(empty) == (rest == SKIP)
    if rest == SKIP:
        first = int(q_blocks.count[0])
        assert not out[0, 1, :first].any() and bool(torch.isneginf(lse[0, 1, :first]).all())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_full_plan_is_dense_attention(grid):
    q, k, v = inputs(grid)
    q_blocks, k_blocks = cut(grid)
    levels = torch.zeros(2, 2, len(q_blocks), len(k_blocks), dtype=torch.int8)
    out, lse = reference.execute(q, k, v, BlockPlan.from_levels(levels, q_blocks, k_blocks))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, dense.log_sum_exp(q, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["block", "global"])
def test_first_order_is_the_derivative_of_the_exact_block(scope):
    """Keys eps away from their mean: the Taylor error falls with eps^2, the centroid's with eps."""
    grid = TokenGrid(1, 4, 32)
    q_blocks, k_blocks = cut(grid)
    levels = torch.full((2, 2, len(q_blocks), len(k_blocks)), SKIP, dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks)
    q, k, v = inputs(grid)
    means = k_blocks.mean(k)[:, :, k_blocks.owner]
    if scope == "global":  # exact only where all blocks have the same keys and mass
        means = means[:, :, :1].expand_as(means)
        k = k - k_blocks.mean(k)[:, :, k_blocks.owner]
    else:
        k = k - means
    errors = {"centroid": [], "taylor": []}
    for eps in (1e-2, 1e-3):
        keys = means + eps * k
        exact = F.scaled_dot_product_attention(q, keys, v)
        for name, order in (("centroid", "none"), ("taylor", scope)):
            out, _ = reference.execute(q, keys, v, plan.with_rest(4, order))
            errors[name].append((out - exact).norm().item())
    assert errors["centroid"][0] / errors["centroid"][1] == pytest.approx(10, rel=0.2)
    assert errors["taylor"][0] / errors["taylor"][1] == pytest.approx(100, rel=0.2)


def test_global_moment_leaves_text_out():
    grid = TokenGrid(2, 4, 8, text_tokens=16)
    q, k, v = inputs(grid)
    q_blocks, k_blocks = cut(grid)
    levels = torch.full((2, 2, len(q_blocks), len(k_blocks)), SKIP, dtype=torch.int8)
    levels[..., k_blocks.text] = 0
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(4, "global")
    out, _ = reference.execute(q, k, v, plan)
    centroid, _ = reference.execute(q, k, v, plan.with_rest(4))
    video = slice(0, grid.video_tokens)
    keys, values = k[:, :, video], v[:, :, video]
    centred = keys - Blocks.cut(TokenGrid(2, 4, 8), 16).mean(keys).repeat_interleave(16, 2)
    moment = centred.mT @ values
    lse = reference.execute(q, k, v, plan)[1]
    _, far_lse = reference.execute(
        q,
        keys,
        values,
        BlockPlan.from_levels(
            torch.full((2, 2, len(q_blocks), 4), 4, dtype=torch.int8),
            q_blocks,
            Blocks.cut(TokenGrid(2, 4, 8), 16),
        ),
    )
    mass = (far_lse - lse).exp()[..., None]
    wanted = centroid + mass * (q @ moment) * (8**-0.5 / grid.video_tokens)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_an_unread_nan_stays_where_it_is():
    grid = TokenGrid(1, 4, 16)
    q, k, v = inputs(grid)
    blocks = Blocks.cut(grid, 16)
    levels = torch.zeros(2, 2, 4, 4, dtype=torch.int8)
    levels[..., :2, 3] = SKIP
    plan = BlockPlan.from_levels(levels, blocks, blocks)
    clean, _ = reference.execute(q, k, v, plan)
    k[:, :, 50], v[:, :, 55, 0] = float("nan"), float("inf")
    q[:, :, 5] = float("nan")
    out, _ = reference.execute(q, k, v, plan)
    fine = torch.ones(64, dtype=torch.bool)
    fine[32:], fine[5] = False, False
    torch.testing.assert_close(out[:, :, fine], clean[:, :, fine])
    assert not out[:, :, ~fine].isfinite().all(-1).any()
