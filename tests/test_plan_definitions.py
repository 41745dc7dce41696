"""Cuts, plans, scores and forced blocks against loops over blocks and tokens."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.blocks import Blocks
from vidsparse.config import Force, SparseConfig
from vidsparse.force import forced_blocks
from vidsparse.geometry import plan_geometry, token_order
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP, BlockPlan, Scores

GRIDS = st.builds(
    TokenGrid,
    frames=st.integers(1, 20),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    text_tokens=st.sampled_from([0, 1, 15, 16, 17, 40]),
    text_first=st.booleans(),
)
LAYOUTS = st.sampled_from(["raster", "hilbert"])
SWITCHES = ("text", "own_block", "first_frame", "same_frame")


def spans(blocks):
    """(start, count, text) of every block."""
    assert (blocks.start.dtype, blocks.count.dtype) == (torch.int64, torch.int64)
    assert blocks.text.dtype == torch.bool
    return [*zip(*(x.tolist() for x in (blocks.start, blocks.count, blocks.text)), strict=True)]


@given(grid=GRIDS, size=st.sampled_from([1, 16, 32]))
@settings(max_examples=60, deadline=None)
def test_a_cut_is_every_size_tokens_of_the_video_and_of_the_text(grid, size):
    video = grid.frames * grid.height * grid.width
    parts = [(video, False), (grid.text_tokens, True)]
    wanted, first = [], 0
    for length, is_text in reversed(parts) if grid.text_first else parts:
        for start in range(0, length, size):
            wanted.append((first + start, min(size, length - start), is_text))
        first += length
    blocks = Blocks.cut(grid, size)
    assert spans(blocks) == wanted and len(blocks) == len(wanted)
    assert blocks.tokens == grid.tokens == first and grid.video_tokens == video
    assert 2**blocks.levels == size
    assert grid.video_start == (grid.text_tokens if grid.text_first else 0)
    owners = [i for i, (_, count, _) in enumerate(wanted) for _ in range(count)]
    assert blocks.owner.tolist() == owners


@given(grid=GRIDS, size=st.sampled_from([16, 32]), pieces=st.sampled_from([1, 2, 8, 16, 32, 64]))
@settings(max_examples=60, deadline=None)
def test_pieces_are_every_size_over_pieces_tokens_of_their_block(grid, size, pieces):
    blocks, step = Blocks.cut(grid, size), max(1, size // pieces)
    cut = blocks.split(pieces)
    wanted, owners = [], []
    for i, (start, count, is_text) in enumerate(spans(blocks)):
        for at in range(0, count, step):
            wanted.append((start + at, min(step, count - at), is_text))
            owners.append(i)
    assert spans(cut) == wanted and cut.size == step
    assert blocks.owner_of(cut).tolist() == owners


@given(grid=GRIDS, size=st.sampled_from([16, 32]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_means_keep_their_precision(grid, size, seed):
    x = torch.randn(2, grid.tokens, 3, generator=torch.Generator().manual_seed(seed)).double()
    blocks = Blocks.cut(grid, size)
    parts = [x[:, start : start + count].mean(1) for start, count, _ in spans(blocks)]
    exact = torch.stack(parts, 1)
    torch.testing.assert_close(blocks.mean(x), exact, rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = blocks.mean(x.to(dtype))
        assert found.dtype == torch.float32, "sums of many tokens need it"
        rounded = [x.to(dtype).double()[:, s : s + n].mean(1) for s, n, _ in spans(blocks)]
        torch.testing.assert_close(found.double(), torch.stack(rounded, 1), rtol=1e-5, atol=1e-6)


def random_plan(grid, size, seed, rest):
    q_blocks, k_blocks = Blocks.cut(grid, 2 * size), Blocks.cut(grid, size)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, len(q_blocks), len(k_blocks))
    levels = torch.randint(SKIP, k_blocks.levels + 1, shape, generator=generator).to(torch.int8)
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks)
    return plan.with_rest(k_blocks.levels) if rest else plan


@given(grid=GRIDS, size=st.sampled_from([16, 32]), seed=st.integers(0, 999), rest=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_plan_says_the_same_in_all_its_forms(grid, size, seed, rest):
    plan = random_plan(grid, size, seed, rest)
    q_spans, k_spans = spans(plan.q_blocks), spans(plan.k_blocks)
    heads = torch.zeros(plan.levels.shape[:2], dtype=torch.float64)
    top, index = plan.k_blocks.levels, plan.index.tolist()
    done, at = 0, tuple(plan.levels.shape[:3])
    assert plan.counts.shape == (*at, top + 1) and plan.starts.shape == (*at, top + 2)
    for b, h, i in product(*map(range, at)):
        row = plan.levels[b, h, i].tolist()
        shown = [plan.rest if level == SKIP else level for level in row]
        assert plan.level_map()[b, h, i].tolist() == shown
        bounds = [done]
        for level in range(top + 1):
            ids = [j for j, x in enumerate(row) if x == level]
            assert index[done : done + len(ids)] == ids
            assert plan.counts[b, h, i, level] == len(ids)
            done += len(ids)
            bounds.append(done)
        assert plan.starts[b, h, i].tolist() == bounds
        groups = sum(
            -(-count // 2**level)
            for level, (_, count, _) in zip(shown, k_spans, strict=True)
            if level != SKIP
        )
        heads[b, h] += float(Fraction(q_spans[i][1] * groups, grid.tokens**2))
    assert done == len(index)
    assert plan.listed == tuple(sorted({*plan.levels.flatten().tolist()} - {SKIP}))
    torch.testing.assert_close(plan.density, heads, rtol=1e-12, atol=1e-12)


def test_an_exact_plan_has_its_own_short_way_to_the_same_lists():
    blocks = Blocks.cut(TokenGrid(1, 1, 100), 16)
    levels = torch.full((1, 2, 7, 7), SKIP, dtype=torch.int8)
    levels[0, 0, 3, 5] = levels[0, 0, 3, 6] = levels[0, 1, 0, 2] = 0
    plan = BlockPlan.from_levels(levels, blocks, blocks)
    assert plan.listed == (0,) and plan.index.tolist() == [5, 6, 2]
    assert BlockPlan.from_levels(levels, blocks, blocks, (0, 2)).index.tolist() == [5, 6, 2]
    empty = BlockPlan.from_levels(torch.full_like(levels, SKIP), blocks, blocks)
    assert empty.index.numel() == 0 and not empty.density.any()


@pytest.mark.parametrize("level", [0, 2])
def test_a_row_may_list_more_blocks_than_fit_into_its_level_codes(level):
    """Levels are int8, numbers of blocks are not: 300 key blocks are 19,200 tokens."""
    q_blocks, k_blocks = (Blocks.cut(TokenGrid(1, 1, 16 * n), 16) for n in (2, 300))
    levels = torch.full((1, 1, 2, 300), level, dtype=torch.int8)
    levels[0, 0, 1, :100] = SKIP
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks)
    assert plan.counts[0, 0, :, level].tolist() == [300, 200]
    bounds = [[0] * (level + 1) + [300] * (5 - level), [300] * (level + 1) + [500] * (5 - level)]
    assert plan.starts[0, 0].tolist() == bounds
    assert plan.index.tolist() == [*range(300), *range(100, 300)]
    assert plan.density.item() == pytest.approx(250 / 300 / 2**level, abs=1e-12)


@pytest.mark.parametrize(("lowest", "highest", "good"), [(-1, 4, 1), (-2, 4, 0), (-1, 5, 0)])
def test_levels_run_from_skip_to_the_centroid(lowest, highest, good):
    blocks = Blocks.cut(TokenGrid(1, 1, 32), 16)
    levels = torch.tensor([[lowest, highest], [0, 0]], dtype=torch.int8)[None, None]
    if good:
        assert BlockPlan.from_levels(levels, blocks, blocks).listed == (0, 4)
    else:
        with pytest.raises(ValueError, match=rf"levels {lowest} \.\. {highest}: allowed -1 \.\. 4"):
            BlockPlan.from_levels(levels, blocks, blocks)


@given(rows=st.integers(1, 3), n=st.integers(1, 9), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_ranks_are_first_then_falling_score_then_index(rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(-2, 3, (2, 2, rows, n), generator=generator).float()
    first = torch.rand(rows, n, generator=generator) < 0.3
    ranked = Scores(value, "logit").ranked(first)
    for b, h, i in product(range(2), range(2), range(rows)):
        row, must = value[b, h, i].tolist(), first[i].tolist()
        wanted = sorted(range(n), key=lambda j: (not must[j], -row[j], j))
        assert ranked[b, h, i].tolist() == wanted


@given(
    grid=GRIDS,
    switches=st.tuples(*[st.booleans()] * 4),
    layout=st.sampled_from(["raster", "hilbert"]),
)
@settings(max_examples=80, deadline=None)
def test_forced_blocks_are_those_that_any_switch_asks_for(grid, switches, layout):
    params = SparseConfig.from_dict({"layout": {"name": layout}}).layout
    order, _ = token_order(grid, params)
    q_blocks, k_blocks = Blocks.cut(grid, 32), Blocks.cut(grid, 16)
    asked = dict(zip(SWITCHES, switches, strict=True))
    found = forced_blocks(Force(**asked), grid, order, q_blocks, k_blocks)
    per_frame = grid.height * grid.width

    def content(start, count, is_text):
        tokens = range(start, start + count)
        raster = [] if is_text else [int(order[t]) - grid.video_start for t in tokens]
        return set(tokens), is_text, {place // per_frame for place in raster}

    for i, q_span in enumerate(spans(q_blocks)):
        q_tokens, q_text, q_frames = content(*q_span)
        for j, k_span in enumerate(spans(k_blocks)):
            k_tokens, k_text, k_frames = content(*k_span)
            wanted = {
                "text": q_text or k_text,
                "own_block": bool(q_tokens & k_tokens),
                "first_frame": 0 in k_frames,
                "same_frame": bool(q_frames & k_frames),
            }
            assert bool(found[i, j]) == any(wanted[name] and asked[name] for name in SWITCHES)


@given(grid=GRIDS)
@settings(max_examples=30, deadline=None)
def test_geometry_is_made_of_its_parts(grid):
    config = SparseConfig.from_dict({"layout": {"name": "hilbert"}})
    force = Force(same_frame=True)
    made = plan_geometry(grid, config.layout, force, 64, 16, torch.device("cpu"))
    order, inverse = token_order(grid, config.layout)
    assert torch.equal(made.order, order) and torch.equal(made.inverse, inverse)
    assert torch.equal(order[inverse], torch.arange(grid.tokens))
    text = range(grid.tokens)[grid.video_tokens :]
    if grid.text_first:
        text = range(grid.text_tokens)
    assert order[list(text)].tolist() == list(text), "text keeps its place"
    assert (made.q_blocks.size, made.k_blocks.size) == (64, 16)
    forced = forced_blocks(force, grid, order, made.q_blocks, made.k_blocks)
    assert torch.equal(made.forced, forced)
    assert forced.shape == (len(made.q_blocks), len(made.k_blocks))


def test_what_is_kept_serves_every_grad_mode():
    """A first call under inference mode must not leave tensors that later ones cannot use."""
    layout = SparseConfig.from_dict({}).layout
    with torch.inference_mode():
        made = plan_geometry(TokenGrid(1, 5, 13), layout, Force(), 16, 16, torch.device("cpu"))
        cut = made.q_blocks.on(torch.device("meta"))
    kept = (made.order, made.inverse, made.forced, cut.start, cut.count, cut.text)
    assert not any(x.is_inference() for x in kept)
    assert made.q_blocks.on(torch.device("meta")) is cut
