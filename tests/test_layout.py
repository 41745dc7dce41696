"""Every layout is a permutation on any grid, and makes blocks compact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse import curves, registry
from vidsparse.config import Force, SparseConfig
from vidsparse.geometry import plan_geometry, token_order
from vidsparse.grid import TokenGrid

LAYOUTS = [
    {"name": "raster"},
    {"name": "hilbert"},
    {"name": "tile", "tile": [2, 8, 8], "inner": "morton"},
    {"name": "tile", "tile": [3, 5, 4], "inner": "hilbert"},
    {"name": "tile", "tile": [1, 4, 4], "inner": "raster"},
    {"name": "content", "tile": [2, 4, 4]},
    {"name": "stride"},
    {"name": "cycle"},
    {"name": "keysort", "tile": [2, 4, 4]},
    {"name": "kmeans", "tile": [2, 4, 4]},
]
IDS = [
    "raster",
    "hilbert",
    "tile-morton",
    "tile-hilbert",
    "tile-raster",
    "content",
    "stride",
    "cycle",
    "keysort",
    "kmeans",
]


def layout(section: dict) -> object:
    beside = {"name": "band"} if section["name"] == "stride" else {}
    return SparseConfig.from_dict({"layout": section, "pattern": beside}).layout


@pytest.mark.parametrize("section", LAYOUTS, ids=IDS)
@given(
    frames=st.integers(1, 7),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    text=st.integers(0, 9),
    first=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_order_is_a_permutation_and_the_inverse_restores_it(
    section, frames, height, width, text, first
):
    grid = TokenGrid(frames, height, width, text, first)
    order, inverse = token_order(grid, layout(section))
    assert torch.equal(order.sort().values, torch.arange(grid.tokens))
    x = torch.randn(grid.tokens)
    assert torch.equal(x[order][inverse], x)
    text_at = slice(0, text) if first else slice(grid.video_tokens, grid.tokens)
    assert torch.equal(order[text_at], torch.arange(grid.tokens)[text_at])


def steps(order: torch.Tensor, sizes: tuple[int, int, int]) -> torch.Tensor:
    """Manhattan distance between consecutive tokens."""
    where = torch.stack(torch.unravel_index(order, sizes), -1)
    return where.diff(dim=0).abs().sum(-1)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 8, 8), (6, 10, 14), (8, 4, 2), (4, 30, 52)])
def test_hilbert_walks_from_neighbour_to_neighbour_on_even_sizes(sizes):
    assert int(steps(curves.hilbert(sizes), sizes).max()) == 1


@pytest.mark.parametrize("sizes", [(21, 30, 52), (5, 7, 9), (3, 9, 13), (11, 20, 20), (1, 1, 7)])
def test_hilbert_has_few_and_short_jumps_on_odd_sizes(sizes):
    distance = steps(curves.hilbert(sizes), sizes)
    assert int(distance.max()) <= 3
    assert float((distance > 1).float().mean()) < 0.03


def test_morton_of_a_cube_is_bit_interleaving():
    order = curves.morton((2, 2, 2))
    assert order.tolist() == list(range(8))
    square = curves.morton((1, 4, 4)).tolist()
    assert square == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_full_tiles_are_consecutive():
    sizes, tile = (4, 8, 12), (2, 4, 4)
    order, _ = token_order(TokenGrid(*sizes), layout({"name": "tile", "tile": list(tile)}))
    where = torch.stack(torch.unravel_index(order, sizes), -1).view(-1, 32, 3)
    tiles = where // torch.tensor(tile)
    assert bool((tiles == tiles[:, :1]).all())
    assert len(torch.unique(tiles[:, 0], dim=0)) == len(tiles)
    neighbours = tiles[:, 0].diff(dim=0).abs().sum(-1)
    assert int(neighbours.max()) == 1  # the snake


@pytest.mark.parametrize("name", ["tile", "hilbert"])
def test_blocks_are_more_compact_than_in_raster_order(name):
    sizes = (11, 20, 20)
    spread = {}
    for method in ("raster", name):
        order, _ = token_order(TokenGrid(*sizes), layout({"name": method}))
        where = torch.stack(torch.unravel_index(order, sizes), -1).double()
        blocks = where[: 68 * 64].view(68, 64, 3)
        spread[method] = (blocks - blocks.mean(1, keepdim=True)).pow(2).sum(-1).mean().item()
    assert spread[name] < 0.5 * spread["raster"]


def test_every_layout_file_is_tested():
    assert {section["name"] for section in LAYOUTS} == set(registry.methods("layout"))


@given(
    frames=st.integers(1, 4),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    text=st.integers(0, 9),
    first=st.booleans(),
    before=st.integers(0, 3),
    size=st.sampled_from([4, 16, 64]),
)
@settings(max_examples=50, deadline=None)
def test_no_ragged_block_holds_tokens_of_two_tiles(
    frames, height, width, text, first, before, size
):
    cuts = (1,) * (frames > 2)
    grid = TokenGrid(frames, height, width, text, first, before, cuts=cuts)
    section = {"name": "tile", "tile": [2, 4, 4], "inner": "raster", "ragged": True}
    made = plan_geometry(grid, layout(section), Force(), size, size, torch.device("cpu"))
    assert made.k_blocks.tokens == grid.tokens and int(made.k_blocks.count.max()) <= size
    assert torch.equal(made.k_blocks.start, made.k_blocks.count.cumsum(0) - made.k_blocks.count)
    index = made.order - grid.video_start
    video = (index >= 0) & (index < grid.video_tokens)
    frame, row, column = torch.unravel_index(index[video], (frames, height, width))
    part = torch.where(frame >= 1, 1, 0) if cuts else torch.zeros_like(frame)
    tiles = torch.stack([part, (frame - part) // 2, row // 4, column // 4], 1)
    owner = made.k_blocks.owner[video]
    pairs = torch.cat([owner[:, None], tiles], 1).unique(dim=0)
    assert len(pairs) == len(owner.unique()), "a tile for each block"
    tokens = tiles.unique(dim=0, return_counts=True)[1]
    assert len(pairs) == int((-(-tokens // size)).sum()), "and no more blocks than that takes"
