"""Lists of key tiles, plain and with bits, against what they pack, in Triton's CPU interpreter.

TRITON_INTERPRET=1 pytest tests/test_triton_lists.py
"""

import os
from dataclasses import replace

import pytest
import torch

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles
from vidsparse.plan import SKIP, BlockPlan

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from cuts import GRIDS

from vidsparse.kernels.gpu import levels_engine, work
from vidsparse.kernels.gpu.exact_lists import pack_exact

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("kind", ["mixed", "exact"])
@pytest.mark.parametrize("blocks", [(64, 128), (32, 16), (64, 64)], ids=str)
def test_lists_name_the_rows_of_a_plan(blocks: tuple[int, int], kind: str) -> None:
    """Every wanted row of the key buffer once, no other; entries and spares are valid tiles."""
    plan = plan_of(blocks, kind == "mixed")
    block_n = min(64, blocks[1])
    layout = levels_engine.layout_for(plan, block_n, torch.device("cpu"))
    lists = levels_engine.lists_for(plan, layout, block_n)
    packed = lists.entry, lists.bits, lists.count, lists.whole
    found = oracles.named_rows(*packed, block_n, layout.rows)
    wanted = oracles.pack_lists(plan, layout.first, layout.rows)
    assert (lists.bits is None) == (kind == "exact") and wanted.any()
    assert torch.equal(found, wanted.long())
    assert (lists.count < lists.entry.shape[1]).all()
    spare = lists.entry.gather(1, lists.count[:, None].long()) & 0xFFFFFF
    assert ((spare + 1) * block_n <= layout.rows).all()


@pytest.mark.parametrize("nk", [1, 31, 1024, 1500])
def test_plain_lists(nk: int) -> None:
    """Every full block of level 0 once, ascending, in pieces; room for the entry after the last."""
    levels = torch.randint(SKIP, 2, (2, 2, 3, nk), dtype=torch.int8)
    levels[0, 0, 0], levels[1, 1, 2] = SKIP, 0
    first = torch.randperm(nk).sort()[0].int() * 128
    first[torch.rand(nk) < 0.1] = -1
    width = 2 * int((first >= 0).sum()) + 1
    entry, count = pack_exact(levels, first, 2, 64, width)
    wanted = oracles.pack_exact(levels, first, 2, 64)
    found = zip(entry.flatten(0, 2).tolist(), count.flatten().tolist(), strict=True)
    assert [row[:n] for row, n in found] == wanted
    assert all(row == sorted(row) for row in wanted) and (count < width).all()
    assert (entry.gather(3, count[..., None].long()) == 0).all()
    strided = levels.mT.contiguous().mT
    again = pack_exact(strided, first, 2, 64, width)
    assert torch.equal(again[1], count)


@pytest.mark.parametrize("rest", ["skip", "centroid"])
@pytest.mark.parametrize("blocks", [(64, 128), (32, 16)], ids=str)
def test_density(blocks: tuple[int, int], rest: str) -> None:
    """Counted on the device as by the definition, short blocks of both cuts with it."""
    plan = plan_of(blocks, mixed=True)
    plan = replace(plan, levels=torch.cat([plan.levels, plan.levels.flip(2)]))
    plan = plan if rest == "skip" else plan.with_rest(plan.k_blocks.levels)
    found = work.head_density(plan)
    assert found.dtype == torch.float64
    assert (found - plan.density.mean(0)).abs().max() < 1e-14


def plan_of(blocks: tuple[int, int], mixed: bool) -> BlockPlan:
    """Random levels with an empty and a full row."""
    q_blocks, k_blocks = (Blocks.cut(GRIDS["text-last"], size) for size in blocks)
    top = k_blocks.levels if mixed else 0
    levels = torch.randint(SKIP, top + 1, (1, 2, len(q_blocks), len(k_blocks)))
    levels[0, -1, -1] = 0
    levels[0, 0, 0] = SKIP
    return BlockPlan.from_levels(levels.to(torch.int8), q_blocks, k_blocks)
