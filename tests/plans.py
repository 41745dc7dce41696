"""Plans of every kind at random, and what they may carry: biases of the rest, orders of heads."""

from dataclasses import replace

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP, BlockPlan


def biased(plan: BlockPlan) -> BlockPlan:
    """A bias of the rest; -inf for a third of it, for key block 0 and for query block 0."""
    bias = torch.randn(plan.levels.shape)
    bias[torch.rand(bias.shape) < 0.3] = float("-inf")
    bias[:, :, 0], bias[..., 0] = float("-inf"), float("-inf")
    return plan.with_rest(plan.rest, plan.first_order, bias)


def ordered(plan: BlockPlan) -> BlockPlan:
    """Orders of each head, which mix text with text and all others with all others."""
    batch, heads = plan.levels.shape[:2]
    return plan.with_orders(
        _order(plan.q_blocks, batch, heads), _order(plan.k_blocks, batch, heads)
    )


def _order(blocks: Blocks, batch: int, heads: int) -> Tensor:
    text = blocks.text[blocks.owner].long()
    part = text.diff(prepend=text[:1]).abs().cumsum(0)
    return (part + torch.rand(batch, heads, blocks.tokens)).argsort(-1)


GRID = TokenGrid(2, 9, 11, text_tokens=13)
PLANS = {  # grid, query and key block, levels, rest, first order, what else it carries
    "levels": (GRID, 32, 16, (0, 1, 2, 4), 4, "none"),
    "exact": (GRID, 32, 16, (0,), SKIP, "none"),
    "centroid": (GRID, 64, 64, (0,), 6, "none"),
    "taylor": (GRID, 32, 16, (0,), 4, "global"),
    "text-first": (replace(GRID, text_first=True), 16, 32, (0, 5), 5, "global"),
    "ragged": (TokenGrid(1, 7, 19), 64, 32, (0, 3), 5, "none"),
    "one-block": (TokenGrid(1, 1, 5), 16, 16, (0,), 4, "none"),
    "bias": (GRID, 32, 16, (0, 4), 4, "none", biased),
    "bias-taylor": (GRID, 16, 32, (0, 1), 5, "global", biased),
    "row": (GRID, 16, 16, (0, 2), 4, "row"),
    "row-ragged": (TokenGrid(1, 7, 19), 64, 32, (0,), 5, "row", biased),
    "orders": (GRID, 32, 16, (0, 2), SKIP, "none", ordered),
    "orders-taylor": (GRID, 32, 32, (0,), 5, "global", ordered),
    "all": (replace(GRID, text_first=True), 16, 32, (0, 1, 5), 5, "row", biased, ordered),
    "orders-one-block": (TokenGrid(1, 1, 5), 16, 16, (0,), 4, "row", ordered),
}


def plan_of(name: str, batch: int, heads: int) -> BlockPlan:
    """Random levels; the first row lists nothing, the last one everything."""
    grid, block_q, block_k, levels, rest, order, *richer = PLANS[name]
    q_blocks, k_blocks = Blocks.cut(grid, block_q), Blocks.cut(grid, block_k)
    shape = (batch, heads, len(q_blocks), len(k_blocks))
    drawn = torch.tensor([SKIP, SKIP, *levels])[torch.randint(0, 2 + len(levels), shape)]
    drawn[:, :, 0], drawn[:, :, -1] = SKIP, 0
    plan = BlockPlan.from_levels(drawn.to(torch.int8), q_blocks, k_blocks).with_rest(rest, order)
    for carry in richer:
        plan = carry(plan)
    return plan
