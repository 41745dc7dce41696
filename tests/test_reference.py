"""The oracle against plain attention over explicitly replaced tokens, in float64."""

from dataclasses import replace
from itertools import product
from math import log

import pytest
import torch
import torch.nn.functional as F
from plans import biased, ordered

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


def parts(blocks, order, b, h):
    """The tokens of every block, as lists."""
    tokens = torch.arange(blocks.tokens) if order is None else order[b, h]
    return [part.tolist() for part in tokens.split(blocks.count.tolist())]


def token_by_token(q, k, v, plan):
    """The definition with loops over tokens and groups, an exponential at a time."""
    scale, text = q.shape[-1] ** -0.5, plan.k_blocks.text.tolist()
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
    for b, h in product(*map(range, q.shape[:2])):
        keys = parts(plan.k_blocks, plan.order_k, b, h)
        kbar = [k[b, h, ids].mean(0) for ids in keys]
        vbar = [v[b, h, ids].mean(0) for ids in keys]
        moment = [
            sum(torch.outer(k[b, h, n] - mean, v[b, h, n]) for n in ids)
            for ids, mean in zip(keys, kbar, strict=True)
        ]
        video = [j for j in range(len(keys)) if not text[j]]
        whole = sum(moment[j] for j in video) / sum(len(keys[j]) for j in video)
        for i, queries in enumerate(parts(plan.q_blocks, plan.order_q, b, h)):
            listed, rest = [], {}
            for j, ids in enumerate(keys):
                level = int(plan.levels[b, h, i, j])
                bias = 0.0 if plan.rest_bias is None else float(plan.rest_bias[b, h, i, j])
                if level == SKIP and plan.rest != SKIP and bias > float("-inf"):
                    rest[j] = log(len(ids)) + bias
                elif level != SKIP:
                    listed += [ids[n : n + 2**level] for n in range(0, len(ids), 2**level)]
            if not (listed or rest):
                continue
            drafted = [scale * q[b, h, queries].mean(0) @ kbar[j] + rest[j] for j in rest]
            share = torch.tensor(drafted).double().softmax(0).tolist()
            row = sum(p * moment[j] / len(keys[j]) for j, p in zip(rest, share, strict=True))
            slope = {
                "none": dict.fromkeys(rest, torch.zeros_like(whole)),
                "block": {j: moment[j] / len(keys[j]) for j in rest},
                "global": dict.fromkeys(rest, whole),
                "row": dict.fromkeys(rest, row),
            }[plan.first_order]
            rows, numerator, total = q[b, h, queries], 0.0, 0.0
            for ids in listed:
                weight = len(ids) * torch.exp(scale * rows @ k[b, h, ids].mean(0))[:, None]
                numerator, total = numerator + weight * v[b, h, ids].mean(0), total + weight
            for j, bias in rest.items():
                weight = torch.exp(scale * rows @ kbar[j] + bias)[:, None]
                numerator = numerator + weight * (vbar[j] + scale * rows @ slope[j])
                total = total + weight
            out[b, h, queries], lse[b, h, queries] = numerator / total, total.log()[:, 0]
    return out, lse


def a_plan(grid, rest, first_order="none", weighed=False, mixed=False):
    """Random levels with an empty and a full row, on blocks of 32 queries and 16 keys."""
    q_blocks, k_blocks = cut(grid)
    levels = torch.randint(SKIP, 5, (2, 2, len(q_blocks), len(k_blocks))).to(torch.int8)
    levels[0, 1, 0] = SKIP  # an empty row
    levels[1, 0, -1] = 0  # a full row
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(rest, first_order)
    plan = biased(plan) if weighed else plan
    return ordered(plan) if mixed else plan


@pytest.mark.parametrize(
    "form",
    [
        (SKIP,),
        (4,),
        *((4, scope) for scope in ("block", "global", "row")),
        *((4, scope, True) for scope in ("none", "block", "global", "row")),
        (SKIP, "none", False, True),
        (4, "global", False, True),
        (4, "row", True, True),
    ],
    ids=lambda form: "-".join(map(str, form)),
)
@pytest.mark.parametrize("grid", ["ragged", "text-first"])
def test_any_plan_equals_the_definition(grid, form):
    torch.manual_seed(len(form))
    grid = GRIDS[grid]
    q, k, v = inputs(grid)
    plan = a_plan(grid, *form)
    out, lse = reference.execute(q, k, v, plan)
    wanted, wanted_lse = token_by_token(q, k, v, plan)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)
    first = parts(plan.q_blocks, plan.order_q, 0, 1)[0]
    empty = torch.isneginf(lse[0, 1, first])
    assert bool(empty.all() if form[0] == SKIP or form[2:3] == (True,) else ~empty.any())
    assert not out[0, 1, first][empty].any()


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


def test_of_equal_queries_the_moment_of_a_row_is_that_of_its_blocks():
    """The draft is exact there: "row" is "block", on blocks of unequal length, too."""
    grid = GRIDS["text-first"]
    q, k, v = inputs(grid)
    plan = a_plan(grid, 4, "row", True)
    q = q[:, :, plan.q_blocks.start[plan.q_blocks.owner]]
    row, _ = reference.execute(q, k, v, plan)
    block, _ = reference.execute(q, k, v, replace(plan, first_order="block"))
    torch.testing.assert_close(row, block, rtol=1e-11, atol=1e-12)
    centroid, _ = reference.execute(q, k, v, replace(plan, first_order="none"))
    assert (row - centroid).norm() > 1e-3 * row.norm()


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
