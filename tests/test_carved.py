"""Jenga's AttenCarve and VMoBA without training, by their formulas, row by row."""

from itertools import pairwise, product

import masked
import pytest
import torch
from torch import Tensor

from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.layout import cycle
from vidsparse.pattern import neighbours
from vidsparse.plan import Scores, StepContext
from vidsparse.selector import carve, share


def drafted(qkv: list[Tensor], grid: TokenGrid, config: SparseConfig, order: Tensor) -> Tensor:
    """float64 [B, H, nq, nk]: s qbar . kbar of blocks in an order."""
    q, k = (x.double()[:, order].transpose(1, 2) for x in qkv[:2])
    means = [
        torch.stack([part.mean(2) for part in x.split(b.count.tolist(), 2)], 2)
        for x, b in zip((q, k), masked.cuts(grid, config), strict=True)
    ]
    return means[0] @ means[1].mT / q.shape[-1] ** 0.5


@pytest.mark.parametrize("layout", ["hilbert", "tile"])
@pytest.mark.parametrize("grid", masked.GRIDS.values(), ids=masked.GRIDS)
def test_neighbours_are_those_that_touch(grid: TokenGrid, layout: str) -> None:
    config = masked.preset("jenga", f"layout.name={layout}")
    where, stand = masked.places(grid, config), masked.stand(grid, config)
    pairs = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
    for (t, a), (u, b) in product(enumerate(where), repeat=2):
        if a is not None and b is not None:
            pairs[t, u] = max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1
    wanted = masked.blocks_of(pairs, stand.q_blocks, stand.k_blocks)
    assert torch.equal(neighbours.blocks(stand, 0, config.pattern), wanted)
    assert not wanted.all()


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("p", [0.2, 0.7])
@pytest.mark.parametrize(
    "grid",
    [masked.RAGGED, TokenGrid(5, 7, 11), TokenGrid(3, 5, 11, text_tokens=37, text_first=True)],
    ids=["ragged", "short", "text"],
)
def test_jenga_keeps_the_share_or_the_mass_and_what_touches(
    grid: TokenGrid, p: float, impl: str
) -> None:
    """Of the video: a last block of one token has the mass of one token, and text has no part."""
    config = masked.preset("jenga", f"selector.p={p}", "schedule.density=0.3")
    qkv = masked.random(grid)
    stand, order = masked.stand(grid, config), token_order(grid, config.layout)[0]
    video = (~stand.k_blocks.text).nonzero().flatten().tolist()
    nk = len(video)
    mass = drafted(qkv, grid, config, order).exp() * stand.k_blocks.count
    mass = mass / mass[..., video].sum(-1, keepdim=True)
    always = masked.always(grid, config)
    always |= neighbours.blocks(stand, 0, config.pattern)
    wanted = torch.zeros_like(mass, dtype=torch.bool)
    crossed = set()
    for b, h, i in product(*map(range, mass.shape[:3])):
        row = sorted(video, key=lambda j: -float(mass[b, h, i, j]))
        total, count = 0.0, 0
        while count < nk and total + float(mass[b, h, i, row[count]]) <= p:
            total, count = total + float(mass[b, h, i, row[count]]), count + 1
        kept = max(count + 1, int(0.3 * nk))
        crossed.add(count + 1 > int(0.3 * nk))
        wanted[b, h, i, row[:kept]] = True
    assert crossed == ({False} if p < 0.5 else {True, False}) or crossed == {True}
    assert (wanted & ~always).any()
    result = masked.call(config, qkv, grid, impl)
    masked.close(result, masked.dense_on(qkv, grid, config, wanted | always), impl)


def test_ties_and_bad_scores_of_carve() -> None:
    blocks = masked.cuts(TokenGrid(1, 1, 160), masked.preset("jenga"))[1]
    even = Scores(torch.full((1, 1, 2, 10), 0.1), "mass")
    nothing = torch.zeros(2, 10, dtype=torch.bool)
    for density, p, kept in ((0.25, 0.45, 5), (0.5, 0.15, 5), (0.05, 0.01, 1), (0.1, 1.0, 10)):
        levels = carve.select(even, nothing, density, blocks, carve.Params(p=p))
        assert levels[0, 0].tolist() == [[0] * kept + [-1] * (10 - kept)] * 2
    bad = Scores(torch.full((1, 1, 2, 10), torch.nan), "mass")
    levels = carve.select(bad, nothing, 0.2, blocks, carve.Params())
    assert (levels == 0).any(-1).all()


def test_layers_take_turns_in_three_orders() -> None:
    for grid in masked.GRIDS.values():
        orders = [cycle.turned(grid, cycle.Params(), n, torch.device("cpu")) for n in range(3)]
        for order in orders:
            assert torch.equal(order.sort().values, torch.arange(grid.tokens))
            rest = order.clone()
            video = slice(grid.video_start, grid.video_start + grid.video_tokens)
            rest[video] = torch.arange(grid.tokens)[video]
            assert torch.equal(rest, torch.arange(grid.tokens))
        frame = grid.height * grid.width
        columns = (orders[1][video] - grid.video_start)[: 2 * 4 * grid.frames]
        place = {((n % frame) // grid.width // 2, n % grid.width // 4) for n in columns.tolist()}
        assert place == {(0, 0)}, "all frames of two rows and four columns"
        assert len({n // frame for n in columns.tolist()}) == grid.frames


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("scope", ["row", "head"])
@pytest.mark.parametrize("layer", range(3))
def test_vmoba_keeps_a_share_of_the_gates(layer: int, scope: str, impl: str) -> None:
    grid = masked.RAGGED
    changes = f"selector.scope={scope}", "selector.tau=0.7", "schedule.density=0.99"
    config = masked.preset("vmoba", *changes, "layout.tile=[2,4,4]")
    qkv = masked.random(grid)
    order = cycle.turned(grid, config.layout, layer, torch.device("cpu"))
    gate = drafted(qkv, grid, config, order)
    raster = config.override("layout.name=raster")
    own = masked.always(grid, raster)
    wanted = own.expand(gate.shape).clone()
    axes = (-1,) if scope == "row" else (-2, -1)
    gate = gate - gate.amin(axes, keepdim=True)
    gate = gate / gate.amax(axes, keepdim=True)
    for b, h in product(range(2), repeat=2):
        rows = [[i] for i in range(len(own))] if scope == "row" else [[*range(len(own))]]
        for some in rows:
            cells = [(i, j) for i in some for j in range(own.shape[1])]
            total = sum(float(gate[b, h, i, j]) for i, j in cells)
            kept = sum(float(gate[b, h, i, j]) for i, j in cells if own[i, j])
            for i, j in sorted(cells, key=lambda at: -float(gate[b, h][at])):
                if own[i, j] or kept >= 0.7 * total:
                    continue
                wanted[b, h, i, j] = True
                kept += float(gate[b, h, i, j])
    assert (wanted & ~own).any() and not wanted.all()
    result = masked.call(config, qkv, grid, impl, StepContext(3, 4, layer, 6))
    assert result.plan is not None and torch.equal(result.plan.levels == 0, wanted)
    moved = [x[:, order] for x in qkv]
    out = torch.empty(qkv[0].shape, dtype=torch.float64)
    out[:, order] = masked.dense_on(moved, grid, raster, wanted)
    masked.close(result, out, impl)


def test_own_blocks_with_the_share_leave_nothing_to_choose_and_no_row_is_empty() -> None:
    blocks = masked.cuts(TokenGrid(1, 1, 96), masked.preset("vmoba"))[1]
    scores = Scores(torch.tensor([[[[9.0, 1, 2, 0, 0, 1], [0, 5, 4, 3, 2, 1]]]]), "logit")
    own = torch.zeros(2, 6, dtype=torch.bool)
    own[0, 0] = True
    levels = share.select(scores, own, 0.9, blocks, share.Params(tau=0.5))
    assert (levels[0, 0] == 0).tolist() == [
        [True] + [False] * 5, [False, True, True] + [False] * 3
    ]  # fmt: skip
    flat = Scores(torch.zeros(1, 1, 2, 6), "logit")
    for scope in share.SCOPES:
        params = share.Params(tau=0.5, scope=scope)
        levels = share.select(flat, torch.zeros_like(own), 0.9, blocks, params)
        assert (levels == 0).any(-1).all()
    for one, more in pairwise((0.1, 0.3, 0.6, 1.0)):
        kept = [
            share.select(scores, own, 0.99, blocks, share.Params(tau=tau)).eq(0)
            for tau in (one, more)
        ]
        assert (kept[0] <= kept[1]).all()


def test_refusals() -> None:
    for name, change, said in (
        ("jenga", "selector.p=0", r"selector.p=0.0: allowed is a number in \(0, 1\]"),
        ("jenga", "estimator.name=moments", "selector.name='carve' needs the mass of blocks"),
        ("vmoba", "selector.tau=0", "selector.tau="),
        ("vmoba", "selector.scope=all", "row, head"),
        ("vmoba", "layout.cell=[2]", "two integers >= 1"),
        ("vmoba", "layout.tile=[0,1,1]", "layout.tile="),
    ):
        with pytest.raises(ValueError, match=said):
            SparseConfig.load(name, [change])
