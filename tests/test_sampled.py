"""The error of an output on a sample of rows: of the whole plan, whatever it carries."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
from sampled import sampled_error

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.plan import SKIP, BlockPlan

GRID = TokenGrid(1, 9, 13, 41, True)


def plan_of(kind: str) -> BlockPlan:
    """Of two batches and heads; kind: what it has beside levels."""
    q_blocks, k_blocks = Blocks.cut(GRID, 32), Blocks.cut(GRID, 16)
    levels = torch.where(torch.rand(2, 2, len(q_blocks), len(k_blocks)) < 0.4, 0, SKIP)
    plan = BlockPlan.from_levels(levels.to(torch.int8), q_blocks, k_blocks, (0,))
    if kind == "bias":
        return plan.with_rest(4, "none", 3 * torch.randn(levels.shape))
    plan = plan.with_rest(4, "row" if kind == "row" else "none")
    if kind != "orders":
        return plan
    order_q, order_k = (torch.rand(2, 2, GRID.tokens).argsort(-1) for _ in range(2))
    return plan.with_orders(order_q, order_k)


@pytest.mark.parametrize("kind", ["levels", "row", "bias", "orders"])
def test_right_rows_are_right_and_others_are_not(kind: str) -> None:
    plan = plan_of(kind)
    q, k, v = (torch.randn(2, 2, GRID.tokens, 8, dtype=torch.float64) for _ in range(3))
    out, _ = reference.execute(q, k, v, plan)
    assert sampled_error(q, k, v, out, plan) < 1e-12
    assert 0.01 < sampled_error(q, k, v, out * 1.02, plan) < 0.03
    other, _ = reference.execute(q, k, v, plan_of(kind))
    assert sampled_error(q, k, v, other, plan) > 0.1
