"""Sparse VideoGen: a band in raster order or through time, each head where it loses less."""

from math import sqrt

import masked
import pytest
import torch
from torch import Tensor

from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.layout import stride

GRIDS = {
    "ragged": TokenGrid(5, 7, 9, text_tokens=13),
    "text-first": TokenGrid(6, 5, 7, 10, True, 4),
}


def typed(grid: TokenGrid) -> tuple[list[Tensor], Tensor]:
    """q, k, v of a head that looks around in its frame and one that looks through time, and which
    is which, bool [2, 2]: in the second sample it is the other way round."""
    index = torch.arange(grid.video_tokens)
    frame, place = index // (grid.height * grid.width), index % (grid.height * grid.width)
    generator = torch.Generator().manual_seed(3)
    codes = [torch.randn(n, 16, generator=generator) for n in (grid.frames, int(place.max()) + 1)]
    heads = [3 * codes[0][frame], 3 * codes[1][place]]
    q = torch.randn(2, grid.tokens, 2, 16, generator=generator)
    k, v = q.clone(), torch.randn(q.shape, generator=generator)
    video = slice(grid.video_start, grid.video_start + grid.video_tokens)
    for sample in range(2):
        for head in range(2):
            for x in (q, k):
                x[sample, video, head] = heads[head ^ sample]
    return [q, k, v], torch.tensor([[False, True], [True, False]])


def through_time(grid: TokenGrid) -> list[int]:
    """The sequence with the frames of one place after each other."""
    video = [
        grid.video_start + (f * grid.height + y) * grid.width + x
        for y in range(grid.height)
        for x in range(grid.width)
        for f in range(grid.frames)
    ]
    rest = [*range(grid.tokens)]
    rest[grid.video_start : grid.video_start + grid.video_tokens] = video
    return rest


def banded(grid: TokenGrid, config: SparseConfig, width: float) -> Tensor:
    """bool [nq, nk]: middles of blocks of the video at most `width` apart, text, own block."""
    cuts = masked.cuts(grid, config)
    video = range(grid.video_start, grid.video_start + grid.video_tokens)
    out = torch.zeros(len(cuts[0]), len(cuts[1]), dtype=torch.bool)
    for i, (a, n) in enumerate(zip(cuts[0].start.tolist(), cuts[0].count.tolist(), strict=True)):
        for j, (b, m) in enumerate(
            zip(cuts[1].start.tolist(), cuts[1].count.tolist(), strict=True)
        ):
            inside = a in video and b in video
            near = abs(a + (n - 1) / 2 - b - (m - 1) / 2) <= width
            out[i, j] = near or (a < b + m and b < a + n) if inside else True
    return out


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_heads_take_their_order_and_read_a_band_in_it(grid: TokenGrid, impl: str) -> None:
    config = masked.preset("svg1", "pattern.width=40", "schedule.density=0.999")
    qkv, temporal = typed(grid)
    result = masked.call(config, qkv, grid, impl)
    assert result.ordered is not None and torch.equal(result.ordered, temporal)
    blocks = banded(grid, config, 40)
    wanted = torch.empty_like(qkv[0], dtype=torch.float64)
    moved = torch.tensor(through_time(grid))
    raster = [x.double() for x in qkv]
    for sample in range(2):
        for head in range(2):
            order = moved if temporal[sample, head] else torch.arange(grid.tokens)
            own = [x[sample : sample + 1, order, head : head + 1] for x in raster]
            out = masked.dense_on(own, grid, config.override("layout.name=raster"), blocks)
            wanted[sample, order, head] = out[0, :, 0]
    masked.close(result, wanted, impl)
    assert result.density == pytest.approx([masked.share(blocks, grid, config)] * 2)


def test_the_choice_is_that_of_the_smallest_error() -> None:
    """On heads of no kind, row by row."""
    grid = GRIDS["ragged"]
    config = masked.preset("svg1", "pattern.width=60", "schedule.density=0.999", "layout.rows=20")
    qkv = masked.random(grid, heads=5)
    result = masked.call(config, qkv, grid)
    assert result.ordered is not None
    rows = stride.drawn(grid, 20, torch.device("cpu"))
    assert len(set(rows.tolist())) == 20 and rows.max() >= grid.video_tokens // 2
    q, k, v = (x.double().transpose(1, 2) for x in qkv)
    score = q[:, :, rows] @ k.mT / 4
    exact = score.softmax(-1) @ v
    blocks, (q_blocks, k_blocks) = banded(grid, config, 60), masked.cuts(grid, config)
    errors = []
    for order in (torch.arange(grid.tokens), torch.tensor(through_time(grid))):
        place = order.argsort()
        mask = blocks[q_blocks.owner[place[rows]]][:, k_blocks.owner[place]]
        out = score.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        errors.append((out - exact).square().mean((-1, -2)))
    assert torch.equal(result.ordered, errors[1] < errors[0])
    assert result.ordered.any() and not result.ordered.all()


@pytest.mark.parametrize("impl", masked.EXECUTORS)
def test_the_grid_has_an_order_for_columns_of_the_image_too(impl: str) -> None:
    """Heads whose tokens are alike in a frame, a column, a place: each takes its own order."""
    grid = TokenGrid(5, 8, 6, text_tokens=13)
    config = masked.preset("mminference", "pattern.width=30", "schedule.density=0.99")
    n = torch.arange(grid.video_tokens)
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, grid.tokens, 3, 16, generator=generator)
    for head, alike in enumerate((n // 48, n % 6, n % 48)):
        codes = torch.randn(int(alike.max()) + 1, 16, generator=generator)
        q[:, : grid.video_tokens, head] = 3 * codes[alike]
    v = torch.randn(q.shape, generator=generator)
    result = masked.call(config, [q, q.clone(), v], grid, impl)
    assert result.plan is not None and result.plan.order_k is not None
    columns = [*sorted(range(240), key=lambda t: (t % 6, t)), *range(240, grid.tokens)]
    wanted = torch.tensor([[*range(grid.tokens)], columns, through_time(grid)])
    assert torch.equal(result.plan.order_k, wanted.expand(2, 3, -1))


def test_the_width_is_that_of_the_formula_in_whole_blocks() -> None:
    grid = TokenGrid(8, 15, 16, text_tokens=40)
    qkv = masked.random(grid, heads=1)
    for density in (0.2, 0.4, 0.7):
        config = masked.preset("svg1", f"schedule.density={density}")
        found = masked.call(config, qkv, grid, "cpu").density[0]
        assert 0.85 * density < found <= density
        width = grid.tokens * (1 - sqrt(1 - (density - 80 / grid.tokens)))
        assert found <= masked.share(banded(grid, config, width), grid, config) + 1e-9


def test_orders_are_permutations_of_the_video_by_residue() -> None:
    for grid in GRIDS.values():
        orders, places = stride.candidates(grid, stride.STRIDES, torch.device("cpu"))
        assert torch.equal(orders.gather(1, places), torch.arange(grid.tokens).expand(3, -1))
        assert orders[2].tolist() == through_time(grid)
        columns = (orders[1] - grid.video_start) % grid.width
        video = slice(grid.video_start, grid.video_start + grid.video_tokens)
        assert (columns[video].diff() >= 0).all(), "column by column"


def test_refusals() -> None:
    for change, said in (
        ("pattern.name=none", "the order in which a pattern loses least"),
        ("pattern.name=window", "stand nowhere in the video"),
        ("layout.strides=[raster,raster]", "raster, row, frame, each once"),
        ("layout.strides=[]", "raster, row, frame, each once"),
        ("layout.rows=0", ">= 1"),
        ("layout.refresh=0", ">= 1"),
        ("force.first_frame=true", "blocks of an order"),
        ("pattern.width=-1", "an integer >= 1, or 0"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseConfig.load("svg1", [change])
