"""PBS-Attn's keys in segments, by its formulas."""

import masked
import pytest
import torch

from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.layout import keysort
from vidsparse.memory import Memory

SEGMENT = 48
CHANGES = f"layout.segment={SEGMENT}", f"pattern.segment={SEGMENT}", "layout.tile=[2,4,4]"


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("grid", masked.GRIDS.values(), ids=masked.GRIDS)
def test_keys_stand_by_mass_in_their_segments(grid: TokenGrid, impl: str) -> None:
    config = masked.preset("pbs", *CHANGES, "selector.p=0.6", "schedule.density=0.95")
    qkv = masked.random(grid)
    result = masked.call(config, qkv, grid, impl)
    plan = result.plan
    assert plan is not None and plan.order_q is not None and plan.order_k is not None
    base, _ = token_order(grid, config.layout)
    assert torch.equal(plan.order_q, base.expand(plan.order_q.shape))
    first, last = grid.video_start, grid.video_start + grid.video_tokens
    q = masked.moved(qkv[0], plan.order_q)
    weight = masked.means(q, plan.q_blocks.count) @ qkv[1].double().transpose(1, 2).mT / 4
    mass = weight.softmax(-1).mean(2)
    for begin in range(first, last, SEGMENT):
        end = min(begin + SEGMENT, last)
        own = plan.order_k[..., begin:end]
        same = base[begin:end].sort().values
        assert torch.equal(own.sort(-1).values, same.expand(own.shape)), "borders are respected"
        assert (mass.gather(-1, own).diff(dim=-1) <= 1e-7).all()
    around = [*range(first), *range(last, grid.tokens)]
    assert torch.equal(plan.order_k[..., around], base[around].expand(2, 2, -1))
    segments = torch.zeros(len(plan.q_blocks), len(plan.k_blocks), dtype=torch.bool)
    for i, start in enumerate(plan.q_blocks.start.tolist()):
        rows = range(start, start + int(plan.q_blocks.count[i]))
        for j, begin in enumerate(plan.k_blocks.start.tolist()):
            columns = range(begin, begin + int(plan.k_blocks.count[j]))
            if first <= start < last and first <= begin < last:
                asked = {(n - first) // SEGMENT for n in rows}
                segments[i, j] = bool(asked & {(n - first) // SEGMENT for n in columns})
    forced = segments | plan.q_blocks.text[:, None] | plan.k_blocks.text
    kept = masked.top_p(plan, q, masked.moved(qkv[1], plan.order_k), forced, 0.6)
    assert (kept & ~forced).any() and not kept.all()
    masked.reads(result, qkv, kept, impl)


def test_ties_keep_their_place_and_the_last_segment_is_short() -> None:
    mass = torch.tensor([1.0, 3, 1, 0, 0, 5, 0, 2])
    assert keysort.sorted_within(mass, 3).tolist() == [1, 0, 2, 5, 3, 4, 7, 6]
    assert keysort.sorted_within(mass, 99).tolist() == [5, 1, 7, 0, 2, 3, 4, 6]
    assert keysort.sorted_within(mass, 1).tolist() == [*range(8)]


@pytest.mark.parametrize("impl", masked.EXECUTORS)
def test_all_keys_in_any_order_are_dense_attention(impl: str) -> None:
    grid = masked.RAGGED
    config = masked.preset("pbs", *CHANGES, "selector.p=1", "schedule.density=0.9999",
                           "selector.min_blocks=999")  # fmt: skip
    qkv = masked.random(grid)
    result = masked.call(config, qkv, grid, impl)
    assert result.density == (1.0, 1.0)
    everything = torch.ones(1, 1, dtype=torch.bool)
    q_blocks, k_blocks = masked.cuts(grid, config)
    whole = everything.expand(len(q_blocks), len(k_blocks))
    masked.close(result, masked.dense_on(qkv, grid, config, whole), impl)


def test_orders_of_a_run_are_kept_and_dropped() -> None:
    config, memory = masked.preset("pbs", *CHANGES, "layout.refresh=2"), Memory()
    orders = []
    for step in range(3):
        qkv = masked.random(masked.RAGGED, seed=step)
        plan = masked.call(config, qkv, masked.RAGGED, recall=memory.of(step)).plan
        assert plan is not None and plan.order_k is not None
        orders.append(plan.order_k)
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    memory.clear()
    assert not memory.entries


def test_refusals() -> None:
    for change, said in (
        ("layout.segment=0", r"layout.segment=0: allowed is an integer >= 1"),
        ("pattern.segment=0", r"pattern.segment=0: allowed is an integer >= 1"),
        ("layout.refresh=0", "layout.refresh=0"),
        ("layout.tile=[0,1,1]", "layout.tile="),
        ("force.first_frame=true", "blocks of an order"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseConfig.load("pbs", [change])
