"""Token grids, cuts into blocks and block plans."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP, BlockPlan, Scores

GRIDS = st.builds(
    TokenGrid,
    frames=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    text_tokens=st.integers(0, 40),
    text_first=st.booleans(),
)
SIZES = st.sampled_from([16, 32, 64])


def random_levels(nq: int, nk: int, top: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, nq, nk)
    return torch.randint(SKIP, top + 1, shape, generator=generator).to(torch.int8)


@given(grid=GRIDS, size=SIZES)
@settings(max_examples=60, deadline=None)
def test_blocks_cover_the_sequence_once_and_never_mix_text_with_video(grid, size):
    blocks = Blocks.cut(grid, size)
    spans = zip(blocks.start, blocks.count, strict=True)
    covered = torch.cat([torch.arange(first, first + n) for first, n in spans])
    assert torch.equal(covered, torch.arange(grid.tokens))
    assert int(blocks.count.max()) <= size
    is_text = torch.ones(grid.tokens, dtype=torch.bool)
    is_text[grid.video_start : grid.video_start + grid.video_tokens] = False
    assert torch.equal(is_text, blocks.text[blocks.owner])


@given(grid=GRIDS, size=SIZES, pieces=st.sampled_from([2, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_pieces_of_blocks_cover_them(grid, size, pieces):
    blocks = Blocks.cut(grid, size)
    cut = blocks.split(pieces)
    assert cut.tokens == grid.tokens
    total = torch.zeros(len(blocks), dtype=torch.int64)
    total.index_add_(0, blocks.owner_of(cut), cut.count)
    assert torch.equal(total, blocks.count)


@given(grid=GRIDS, size=SIZES)
@settings(max_examples=40, deadline=None)
def test_block_means_are_means_over_real_tokens(grid, size):
    blocks = Blocks.cut(grid, size)
    x = torch.randn(2, grid.tokens, 3, dtype=torch.float64)
    wanted = torch.stack([part.mean(1) for part in x.split(blocks.count.tolist(), dim=1)], 1)
    torch.testing.assert_close(blocks.mean(x), wanted)


@given(grid=GRIDS, size=SIZES, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_level_map_round_trip_and_ascending_ids(grid, size, seed):
    q_blocks, k_blocks = Blocks.cut(grid, 2 * size), Blocks.cut(grid, size)
    levels = random_levels(len(q_blocks), len(k_blocks), k_blocks.levels, seed)
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks)
    assert torch.equal(plan.level_map(), levels)
    assert plan.index.numel() == int((levels != SKIP).sum())
    bounds = plan.starts.reshape(-1, k_blocks.levels + 2)
    for row in bounds.tolist():
        for start, stop in pairwise(row):
            ids = plan.index[start:stop]
            assert bool((ids.diff() > 0).all())


def test_density_counts_pairs_at_their_level_and_the_rest():
    grid = TokenGrid(1, 1, 256)
    blocks = Blocks.cut(grid, 64)
    levels = torch.full((1, 1, 4, 4), SKIP, dtype=torch.int8)
    levels[..., 0], levels[..., 1] = 0, 3
    plan = BlockPlan.from_levels(levels, blocks, blocks)
    assert plan.density.item() == pytest.approx((1 + 1 / 8) / 4)
    assert plan.with_rest(6).density.item() == pytest.approx((1 + 1 / 8 + 2 / 64) / 4)


def test_a_bias_changes_what_is_read_and_no_density():
    plan, bias = a_plan_without_lists(), torch.zeros(1, 2, 3, 3)
    bias[0, 0, 1, 2] = float("-inf")
    biased = plan.with_rest(4, "row", bias)
    assert (biased.rest, biased.first_order) == (4, "row") and biased.rest_bias is bias
    read = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    assert torch.equal(plan.with_rest(4).read_as_rest(), read)
    read[0, 0, 1, 2] = False
    assert torch.equal(biased.read_as_rest(), read) and not plan.read_as_rest().any()
    assert torch.equal(biased.level_map(), torch.where(read, 4, SKIP))
    assert torch.equal(biased.density, plan.with_rest(4).density)
    listed = BlockPlan.from_levels(torch.zeros_like(plan.levels), plan.q_blocks, plan.k_blocks)
    assert not listed.with_rest(4, "none", bias).read_as_rest().any(), "listed blocks are not rest"
    assert biased.with_rest(4).rest_bias is None


def a_plan_without_lists():
    blocks = Blocks.cut(TokenGrid(1, 1, 40), 16)
    return BlockPlan.from_levels(torch.full((1, 2, 3, 3), SKIP, dtype=torch.int8), blocks, blocks)


def test_biases_and_orders_of_another_form_are_refused():
    plan, order = a_plan_without_lists(), torch.arange(40).repeat(1, 2, 1)
    with pytest.raises(ValueError, match=r"rest_bias with rest=-1 \(skip\).*use rest=4"):
        plan.with_rest(SKIP, "none", torch.zeros(1, 2, 3, 3))
    for bias in (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 3).double()):
        with pytest.raises(
            ValueError, match=r"rest_bias is .*expected torch.float32 \(1, 2, 3, 3\)"
        ):
            plan.with_rest(4, "none", bias)
    for bad in (order[:, :1], order[..., :39], order.int(), order.to("meta")):
        with pytest.raises(
            ValueError, match=r"order_q is .*expected torch.int64 \(1, 2, 40\) on cpu"
        ):
            plan.with_orders(bad, order)
    for place, token in ((0, 7), (3, -1), (39, 40)):
        bad = order.clone()
        bad[0, 1, place] = token
        with pytest.raises(ValueError, match=r"order_k is no order: .*0 \.\. 39, once"):
            plan.with_orders(order, bad)
    mixed = plan.with_orders(order, order.flip(-1))
    assert mixed.order_q is order and torch.equal(mixed.order_k[0, 0], torch.arange(40).flip(0))
    assert plan.with_orders(None, order).order_q is None
    on_a_gpu = BlockPlan(plan.levels.to("meta"), plan.q_blocks, plan.k_blocks, ())
    assert on_a_gpu.with_orders(order.to("meta"), None).order_q is not None, "nobody looks there"


def test_density_of_ragged_blocks_counts_tokens():
    grid = TokenGrid(1, 1, 70, text_tokens=5)  # key blocks of 64, 6 and 5 tokens
    blocks = Blocks.cut(grid, 64)
    levels = torch.tensor([0, 2, SKIP], dtype=torch.int8).expand(1, 1, 3, 3)
    plan = BlockPlan.from_levels(levels, blocks, blocks)
    assert plan.density.item() == pytest.approx((64 + 2) / 75)


def test_bad_grids_and_maps_are_refused():
    with pytest.raises(ValueError, match=r"TokenGrid.height=0"):
        TokenGrid(1, 0, 3)
    with pytest.raises(ValueError, match="text_tokens=-1"):
        TokenGrid(1, 1, 3, text_tokens=-1)
    with pytest.raises(ValueError, match=r"sequence of 100 tokens.*= 99 tokens"):
        TokenGrid(1, 9, 11).check(100)
    blocks = Blocks.cut(TokenGrid(1, 1, 64), 32)
    with pytest.raises(ValueError, match=r"levels -1 \.\. 6: allowed -1 \.\. 5"):
        levels = torch.tensor([[-1, 6], [0, 0]], dtype=torch.int8)
        BlockPlan.from_levels(levels[None, None], blocks, blocks)
    with pytest.raises(ValueError, match="2 x 3 blocks, expected 2 x 2"):
        BlockPlan.from_levels(torch.zeros(1, 1, 2, 3, dtype=torch.int8), blocks, blocks)


@pytest.mark.parametrize("grid", [(2, 3), (2, 3, 4, 5), "234", torch.tensor([2, 3, 4])], ids=str)
def test_only_three_numbers_are_a_grid(grid):
    """A fourth one could be meant for text, or for channels."""
    assert TokenGrid.of([2, 3, 4]) == TokenGrid.of((2, 3, 4)) == TokenGrid(2, 3, 4)
    with pytest.raises(TypeError, match=r"expected a TokenGrid, or \(frames, height, width\)"):
        TokenGrid.of(grid)


def test_a_grid_of_a_series_of_cuts_is_the_grid_of_their_tuple():
    """Grids are keys of what is kept for them."""
    grid = TokenGrid(4, 2, 2, cuts=[1, 3])
    assert grid == TokenGrid(4, 2, 2, cuts=(1, 3)) and len({grid, TokenGrid(4, 2, 2)}) == 2


def test_logits_become_mass_with_true_counts():
    blocks = Blocks.cut(TokenGrid(1, 1, 80), 64)  # 64 and 16 keys
    scores = Scores(torch.zeros(1, 1, 1, 2), "logit")
    torch.testing.assert_close(scores.mass(blocks).flatten(), torch.tensor([0.8, 0.2]))
