"""Windows of tiles (STA, GNA, NABLA) by their formulas; their size by the budget; refusals."""

import masked
import pytest
import torch

from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.pattern import window
from vidsparse.plan import StepContext


def first_tile(x: int, tiles: int, size: int, stride: int, shift: bool) -> int:
    """First tile of the window of tile x, as NATTEN states it: leader, centre."""
    leader = min(x // stride * stride + stride // 2, tiles - 1)
    if not shift:
        return leader - size // 2
    size = min(size, tiles)
    last = tiles - 1 - (size // 2 + size % 2 - 1)
    return min(max(leader, size // 2), last) - size // 2


def reads(grid: TokenGrid, params: window.Params, size: tuple[int, ...]) -> masked.Pairs:
    sizes = grid.frames, grid.height, grid.width

    def of(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        for axis in range(3):
            tile, n = params.tile[axis], -(-sizes[axis] // params.tile[axis])
            first = first_tile(
                query[axis] // tile, n, size[axis], params.stride[axis], params.shift
            )
            if not first <= key[axis] // tile < first + size[axis]:
                return False
        return True

    return of


TILE = "layout.tile=[2,4,2]", "pattern.tile=[2,4,2]"
CASES = {
    "sta": ("sta", *TILE, "pattern.window=[1,1,3]"),
    "sta-even": ("sta", *TILE, "pattern.window=[2,1,2]"),
    "gna": ("gna", *TILE, "pattern.window=[1,2,3]"),
    "cut-off": ("gna", *TILE, "pattern.window=[3,1,3]", "pattern.shift=false"),
    "heads": ("sta", *TILE, "pattern.window=[1,1,3,3,1,1]"),
}


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("grid", masked.GRIDS.values(), ids=masked.GRIDS)
@pytest.mark.parametrize("case", CASES)
def test_output_reads_the_window_alone(case: str, grid: TokenGrid, impl: str) -> None:
    config = masked.preset(*CASES[case], "schedule.density=0.99")
    sizes = config.pattern.window
    maps = [
        masked.block_map(grid, config, reads(grid, config.pattern, sizes[n : n + 3]))
        for n in range(0, len(sizes), 3)
    ]
    wanted = torch.stack([maps[head % len(maps)] for head in range(4)])
    qkv = masked.random(grid, heads=4)
    result = masked.call(config, qkv, grid, impl)
    masked.close(result, masked.dense_on(qkv, grid, config, wanted), impl)
    shares = [masked.share(one, grid, config) for one in wanted]
    assert result.density == pytest.approx(shares), "the report tells what the pattern gives"
    assert min(shares) < 0.9


def test_a_window_keeps_its_size_at_the_borders() -> None:
    for tiles in range(1, 9):
        for size in range(1, 10):
            for stride in range(1, 4):
                found = window.along(tiles, size, stride, shift=True)
                assert (found.sum(1) == min(size, tiles)).all()
                for x in range(tiles):
                    first = first_tile(x, tiles, size, stride, shift=True)
                    wanted = range(first, first + min(size, tiles))
                    assert found[x].nonzero().flatten().tolist() == [*wanted]
    blocked = window.along(8, 4, 4, shift=True)
    assert torch.equal(blocked, torch.block_diag(*[torch.ones(4, 4)] * 2).bool()), "stride = window"


SHARES = {  # published windows, and their densities in tiles
    (30, 48, 80): {(5, 3, 3): 0.15, (1, 6, 10): 0.20, (5, 1, 10): 0.167, (5, 6, 1): 0.10},
    (18, 48, 80): {(3, 1, 10): 0.167, (1, 5, 7): 0.194, (3, 3, 3): 0.15, (3, 4, 6): 0.40},
}


def test_published_windows_have_their_densities() -> None:
    """An even window is executed as it is: as k + 1 tiles, (3, 4, 6) would have 0.583."""
    for sizes, windows in SHARES.items():
        tiles = [n // t for n, t in zip(sizes, (6, 8, 8), strict=True)]
        for size, density in windows.items():
            axes = [
                window.along(n, w, 1, True).double().mean()
                for n, w in zip(tiles, size, strict=True)
            ]
            assert float(axes[0] * axes[1] * axes[2]) == pytest.approx(density, abs=0.001)


@pytest.mark.parametrize("name", ["sta", "gna"])
def test_the_budget_sizes_the_window(name: str, caplog: pytest.LogCaptureFixture) -> None:
    grid = TokenGrid(6, 15, 16, text_tokens=13)
    qkv = masked.random(grid, heads=1)
    found = []
    for density in (0.15, 0.3, 0.6):
        config = masked.preset(name, *TILE, f"schedule.density={density}")
        result = masked.call(config, qkv, grid, "cpu")
        assert result.plan is not None
        assert result.plan.levels.eq(0).any(-1).all(), "no empty row"
        found.append(result.density[0])
        assert 0.5 * density < found[-1] <= density
    assert found == sorted(found)
    assert not caplog.records
    one = masked.preset(name, "schedule.density=0.1")
    assert masked.call(one, masked.random(masked.RAGGED), masked.RAGGED).density[0] > 0.1, "a tile"
    assert "of all pairs, more than schedule.density=0.1" in caplog.text
    least = masked.call(masked.preset(name, *TILE, "schedule.density=0.001"), qkv, grid, "cpu")
    assert 0.001 < least.density[0] < 0.12, "one tile, text and the block itself"


def test_a_window_that_costs_more_than_the_density_is_refused_in_dense_steps_too() -> None:
    config = SparseConfig.load(
        "sta", ["schedule.min_tokens=0", "pattern.window=[2,9,9]", "schedule.dense_steps=2"]
    )
    qkv = masked.random(masked.RAGGED)
    for step in (0, 7):
        with pytest.raises(
            ValueError, match=r"schedule.density=0.2: pattern.name='window' .*1.000"
        ):
            masked.call(config, qkv, masked.RAGGED, context=StepContext(step, 9))


def test_nabla_adds_its_window_to_the_blocks_of_most_mass() -> None:
    grid = TokenGrid(3, 8, 8, text_tokens=16)
    changes = "layout.tile=[1,4,4]", "pattern.tile=[1,4,4]", "pattern.window=[1,1,3]"
    config = masked.preset("nabla", *changes, "selector.p=0.4", "schedule.density=0.9")
    qkv = masked.random(grid)
    q_blocks, k_blocks = masked.cuts(grid, config)
    near = masked.block_map(grid, config, reads(grid, config.pattern, (1, 1, 3)))
    order, _ = token_order(grid, config.layout)
    q, k = (x.double()[:, order].transpose(1, 2) for x in qkv[:2])
    means = [
        torch.stack([part.mean(2) for part in x.split(b.count.tolist(), 2)], 2)
        for x, b in ((q, q_blocks), (k, k_blocks))
    ]
    weight = (means[0] @ means[1].mT / 4 + k_blocks.count.log()).softmax(-1)
    mass, rank = weight.sort(-1, descending=True)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept.scatter_(-1, rank, mass.cumsum(-1) - mass < 0.4)
    assert (kept & ~near).any() and (near & ~kept).any()
    result = masked.call(config, qkv, grid)
    assert result.plan is not None
    assert torch.equal(result.plan.levels == 0, kept | near)
    masked.close(result, masked.dense_on(qkv, grid, config, kept | near), "reference")


def test_what_does_not_go_together_is_refused() -> None:
    for change, said in (
        ("pattern.name=none", "there is nothing to keep"),
        ("layout.name=content", "stand nowhere in the video"),
        ("selector.name=topk", "estimator.name='none' with selector.name='topk'"),
        ("pattern.window=[1,2]", "three integers >= 1 for each head"),
        ("pattern.stride=[1,1,0]", "three integers >= 1"),
        ("pattern.tile=[0,1,1]", "pattern.tile="),
    ):
        with pytest.raises(ValueError, match=said):
            SparseConfig.load("sta", [change])
    changes = ["pattern.window=[1,1,1,3,3,3]", "selector.name=topk", "estimator.name=mean"]
    with pytest.raises(ValueError, match="maps of heads beside"):
        SparseConfig.load("sta", changes)
    fine = window.Params(tile=(1, 1, 1), window=(1, 1, 1))
    with pytest.raises(ValueError, match=r"pattern.tile=.*at most 16,384"):
        window.blocks(masked.stand(TokenGrid(2, 99, 99), SparseConfig.load("sta")), 0, fine)
