"""Rectified SpaAttn: text apart in the mass, the gate, the blend; by loops in float64."""

import math

import pytest
import torch
from by_formula import GRID, HEADS, SMALL, Call, call, field, ordered
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.kernels.executor import Executes
from vidsparse.plan import SKIP


def shares(made: Call, b: int, h: int, i: int) -> Tensor:
    """P' of a row: softmax over means of video blocks, weighed, and tokens of text."""
    scale, cut = made.q.shape[-1] ** -0.5, made.plan.k_blocks
    q = made.blocks("q", b, h)[i].mean(0) * scale
    weights = []
    for part, text in zip(made.blocks("k", b, h), cut.text.tolist(), strict=True):
        each = (part @ q).exp().sum()
        weights.append(each if text else len(part) * (part.mean(0) @ q).exp())
    found = torch.stack(weights)
    return found / found.sum()


def gain(made: Call, b: int, h: int, i: int, j: int) -> bool:
    q, k = made.blocks("q", b, h)[i], made.blocks("k", b, h)[j]
    far_q, far_k = ((x - x.mean(0)).abs().mean(0) for x in (q, k))
    error = abs(far_q @ k.mean(0)) + abs(q.mean(0) @ far_k)
    return bool(abs(q.mean(0) @ k.mean(0)) > error)


@pytest.mark.parametrize(
    "grid", [GRID, TokenGrid(2, 9, 13, text_tokens=37, text_first=True)], ids=str
)
@pytest.mark.parametrize("gate", [True, False])
def test_by_the_formula(gate: bool, grid: TokenGrid) -> None:
    made = call("rectified", f"compensation.gate={gate}", grid=grid)
    cut, scale = made.plan.k_blocks, made.q.shape[-1] ** -0.5
    nk, states = len(cut), [0, 0, 0]
    for b, h in HEADS:
        keys, values = made.blocks("k", b, h), made.blocks("v", b, h)
        for i, forced in enumerate(made.forced.tolist()):
            mass = shares(made, b, h, i)
            order, front, exact = ordered(mass.tolist(), forced), 0.0, []
            for rank, j in enumerate(order):
                fits = rank < math.floor(0.35 * nk)
                chosen = rank < max(1, math.floor(0.2 * nk)) or front < 0.3
                if forced[j] or (fits and chosen):
                    exact.append(j)
                front += float(mass[j])
            assert made.plan.levels[b, h, i].tolist() == [
                0 if j in exact else SKIP for j in range(nk)
            ]
            given = [
                j for j in range(nk)
                if j not in exact and not cut.text[j] and (not gate or gain(made, b, h, i, j))
            ]  # fmt: skip
            states = [n + m for n, m in zip(states, (len(exact), len(given), nk), strict=True)]
            q = made.blocks("q", b, h)[i]
            k, v = (torch.cat([x[j] for j in exact]) for x in (keys, values))
            weight = (q @ k.T * scale).softmax(1)
            kept = float(mass.sum() - mass[given].sum())
            wanted = kept * (weight @ v) + sum(mass[j] * values[j].mean(0) for j in given)
            first = int(made.plan.q_blocks.start[i])
            rows = slice(first, first + len(q))
            torch.testing.assert_close(made.out[b, h, rows], wanted, rtol=1e-5, atol=1e-6)
            lse = (q @ k.T * scale).logsumexp(1) - math.log(kept)
            torch.testing.assert_close(made.lse[b, h, rows], lse, rtol=1e-5, atol=1e-5)
    exact_, given_, all_ = states
    assert given_ and (exact_ + given_ < all_) == gate, (
        "exact, compensated, and with a gate counted"
    )
    assert made.plan.rest == SKIP and 0.1 < float(made.plan.density.mean()) < 0.6


def test_the_gate_does_not_know_the_scale() -> None:
    from vidsparse.blocks import Blocks
    from vidsparse.compensation.rectify import gains
    from vidsparse.draft import Draft

    cut = Blocks.cut(GRID, 16)
    q, k, v = (x.transpose(1, 2) for x in field(GRID, 5))
    plain = gains(Draft(q, k, v, cut, cut))
    assert 0 < plain.double().mean() < 1
    assert torch.equal(plain, gains(Draft(3 * q, 0.01 * k, v, cut, cut)))


def test_rows_that_read_everything_are_dense_attention() -> None:
    for gate in (True, False):
        made = call("rectified", "selector.min_blocks=10000", f"compensation.gate={gate}")
        dense = torch.nn.functional.scaled_dot_product_attention(made.q, made.k, made.v)
        torch.testing.assert_close(made.out, dense, rtol=1e-12, atol=1e-12)


def test_hoisted_ordered_and_half_precision_give_the_same() -> None:
    config = SparseConfig.load("rectified", SMALL)
    q, k, v = field(GRID, 2)
    whole = attend(q, k, v, grid=GRID, config=config, impl="cpu", return_lse=True)
    order, inverse = token_order(GRID, config.layout)
    moved = (x[:, order] for x in (q, k, v))
    there = attend(*moved, grid=GRID, config=config, hoisted=True, impl="cpu", return_lse=True)
    torch.testing.assert_close(there.out[:, inverse], whole.out)
    torch.testing.assert_close(there.lse[:, :, inverse], whole.lse)
    half = (x.bfloat16() for x in (q, k, v))
    rough = attend(*half, grid=GRID, config=config, impl="cpu").out
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - whole.out).norm() < 0.03 * whole.out.norm()
    heads = config.override("layout.name=content", "layout.gate=false", "force.neighbours=0")
    for impl in ("cpu", "reference"):
        by_head = attend(q, k, v, grid=GRID, config=heads, impl=impl)
        if impl == "cpu":
            first = by_head.out
    torch.testing.assert_close(first, by_head.out, rtol=1e-9, atol=1e-10)


def test_a_query_that_is_not_finite_stays_in_its_row() -> None:
    config = SparseConfig.load("rectified", SMALL)
    q, k, v = field(GRID, 2)
    q[0, 77, 0, 3] = float("nan")
    out = attend(q, k, v, grid=GRID, config=config, impl="cpu").out
    assert out[0, 77, 0].isnan().all()
    out[0, 77, 0] = 0
    assert out.isfinite().all()


def test_who_executes_a_blend_and_what_is_none() -> None:
    plan = call("rectified").plan
    assert plan.blend is not None
    assert Executes().lacks(plan) == "plan.blend" and Executes(blend=True).lacks(plan) is None
    with pytest.raises(ValueError, match="share of blend is"):
        plan.with_blend(plan.blend[0].double(), plan.blend[1])
