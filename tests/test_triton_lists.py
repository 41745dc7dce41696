"""The lists of key tiles against the plan that they pack, in Triton's CPU interpreter.

TRITON_INTERPRET=1 pytest tests/test_triton_lists.py
"""

import os

import pytest
import torch

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles
from vidsparse.plan import SKIP, BlockPlan

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from cuts import GRIDS

from vidsparse.kernels.gpu import engine

pytestmark = pytest.mark.interp


@pytest.mark.parametrize(
    ("kind", "rest"), [("mixed", "skip"), ("mixed", "centroid"), ("exact", "skip")]
)
@pytest.mark.parametrize("blocks", [(64, 128), (32, 16), (64, 64)], ids=str)
def test_lists_name_the_rows_of_a_plan(blocks: tuple[int, int], kind: str, rest: str) -> None:
    """Every wanted row of the key buffer once, no other; entries and spares are valid tiles."""
    q_blocks, k_blocks = (Blocks.cut(GRIDS["text-last"], size) for size in blocks)
    levels = torch.randint(SKIP, k_blocks.levels + 1, (1, 2, len(q_blocks), len(k_blocks)))
    if kind == "exact":
        levels = torch.where(levels > 2, 0, SKIP)
    levels[0, -1, -1] = 0
    levels[0, 0, 0] = SKIP
    plan = BlockPlan.from_levels(levels.to(torch.int8), q_blocks, k_blocks)
    plan = plan if rest == "skip" else plan.with_rest(k_blocks.levels)
    block_n = min(64, blocks[1])
    layout = engine.layout_for(plan, block_n, torch.device("cpu"))
    lists = engine.lists_for(plan, layout, block_n)
    packed = lists.entry, lists.bits, lists.count, lists.whole
    found = oracles.named_rows(*packed, block_n, layout.rows)
    wanted = oracles.pack_lists(plan, layout.first, layout.rows)
    assert (lists.bits is None) == (kind == "exact") and wanted[1].any() == (rest == "centroid")
    for each, rows in zip(found, wanted, strict=True):
        assert torch.equal(each, rows.long())
    assert (lists.count < lists.entry.shape[1]).all()
    spare = lists.entry.gather(1, lists.count[:, None].long()) & 0xFFFFFF
    assert ((spare + 1) * block_n <= layout.rows).all()
