"""Presets balanced, fast and quality from their formulas in float64: map and output of a call."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from by_formula import GRID, HEADS, SMALL, field
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid

GRIDS = GRID, TokenGrid(5, 6, 7, text_tokens=21, text_first=True), TokenGrid(4, 5, 9)
BOUND = 2.0


def parts(x: Tensor, order: Tensor, counts: Tensor) -> list[Tensor]:
    """The tokens of one head [S, D] in its order, by block."""
    return list(x[order].split(counts.tolist()))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("grid", GRIDS, ids=["after", "before", "no text"])
@pytest.mark.parametrize(
    ("preset", "density"), [("fast", 0.1), ("balanced", 0.2), ("quality", 0.3)]
)
def test_moments_rank_and_tilt_stands_for_the_rest(
    preset: str, density: float, grid: TokenGrid, impl: str
) -> None:
    """Orders are those of the call, which `test_content_order` and `test_bisection` look at; the
    bias of the rest is float32."""
    config = SparseConfig.load(preset, [*SMALL, "kernel.crossover=1"])
    assert config.schedule.density == density
    qkv = field(grid, seed=6)
    result = attend(*qkv, grid=grid, config=config, impl=impl)
    plan = result.plan
    assert plan is not None and plan.order_q is not None and plan.order_k is not None
    assert result.ordered is not None and bool(result.ordered.any())
    q_cut, k_cut, scale = plan.q_blocks, plan.k_blocks, qkv[0].shape[-1] ** -0.5
    nk, left = len(k_cut), 0
    for b, h in HEADS:
        q, k, v = (x[b, :, h] for x in qkv)
        order_q = plan.order_q[b, h]
        queries = parts(q, order_q, q_cut.count)
        keys, values = (parts(x, plan.order_k[b, h], k_cut.count) for x in (k, v))
        found = result.out[b, order_q, h].split(q_cut.count.tolist())
        for i, rows in enumerate(queries):
            logit, spread, score = [], [], []
            for near, of in zip(keys, values, strict=True):
                logit.append(float(scale * rows.mean(0) @ near.mean(0)))
                axes = rows.square().mean(0) * near.var(0, unbiased=False)
                spread.append(min(BOUND, float(scale**2 / 2 * axes.sum())))
                error = math.exp(2 * spread[-1]) * of.square().sum(-1).mean()
                error = float(error - of.mean(0).square().sum())
                score.append(2 * (logit[-1] + spread[-1]) + math.log(len(near) * error))
            forced = [bool(q_cut.text[i] or k_cut.text[j]) for j in range(nk)]
            most = max(1, math.floor(density * nk))
            best = sorted(range(nk), key=lambda j: (not forced[j], -score[j]))[:most]
            exact = [forced[j] or j in best for j in range(nk)]
            assert (plan.levels[b, h, i] == 0).tolist() == exact, (b, h, i)
            rest = [j for j in range(nk) if not exact[j]]
            left += len(rest)
            weight = [len(keys[j]) * math.exp(logit[j] + spread[j]) for j in rest]
            moment = torch.zeros(q.shape[-1], v.shape[-1], dtype=q.dtype)
            for j, one in zip(rest, weight, strict=True):
                inside = (keys[j] - keys[j].mean(0)).T @ values[j]
                moment += one / sum(weight) * inside / len(keys[j])
            top, down = torch.zeros_like(found[i]), torch.zeros(len(rows), 1, dtype=q.dtype)
            for j, (near, of) in enumerate(zip(keys, values, strict=True)):
                if exact[j]:
                    each = (scale * rows @ near.T).exp()
                    top, down = top + each @ of, down + each.sum(1, keepdim=True)
                    continue
                mass = len(near) * (scale * rows @ near.mean(0) + spread[j]).exp()[:, None]
                top, down = top + mass * (of.mean(0) + scale * rows @ moment), down + mass
            torch.testing.assert_close(found[i], top / down, rtol=1e-6, atol=1e-8)
    assert left > 0


def test_heads_stand_in_orders_of_their_own() -> None:
    """What the other test compares with is no order of all heads."""
    qkv = field(GRID, seed=6)
    config = SparseConfig.load("balanced", [*SMALL, "kernel.crossover=1"])
    plan = attend(*qkv, grid=GRID, config=config).plan
    assert plan is not None and plan.order_q is not None
    same = [
        torch.equal(plan.order_q[0, 0], plan.order_q[b, h]) for b, h in product(*[range(2)] * 2)
    ]
    assert sum(same) == 1
