"""Patterns over pairs of frames: Radial attention by its rule, LVSA's window and anchors."""

from collections.abc import Iterator
from functools import cache

import masked
import pytest
import torch
from torch import Tensor

from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.pattern import radial
from vidsparse.plan import StepContext

WIDE = TokenGrid(4, 15, 21)
"""Frames of 315 tokens, of which those two apart read a band."""


def pairs_of_frames(grid: TokenGrid, decay: float, block: int) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, bool [P, P]): which tokens of frame b those of frame a read."""
    tokens = grid.height * grid.width
    apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    for a in range(grid.frames):
        for b in range(grid.frames):
            delta = abs(a - b)
            width = 2 ** len(bin(tokens)[2:]) / 2 ** (len(bin(delta)[2:]) if delta else 0)
            if delta <= 1:
                yield a, b, torch.ones(tokens, tokens, dtype=torch.bool)
            elif width >= 128 or delta % int(128 / width) == 0:
                yield a, b, apart <= max(width * decay, block)


@cache
def radial_blocks(grid: TokenGrid, config: SparseConfig) -> Tensor:
    """bool [nq, nk]: every pair of frames drawn into the whole map, and reduced to blocks."""
    q_blocks, k_blocks = masked.cuts(grid, config)
    tokens, first = grid.height * grid.width, grid.video_start
    out = torch.zeros(len(q_blocks), len(k_blocks), dtype=torch.bool)
    for a, b, local in pairs_of_frames(grid, config.pattern.decay, k_blocks.size):
        whole = torch.zeros(grid.tokens, grid.tokens)
        rows, columns = (slice(first + n * tokens, first + (n + 1) * tokens) for n in (a, b))
        whole[rows, columns] = local.float()
        for i, part in enumerate(whole.split(q_blocks.count.tolist())):
            density = part.mean(0)
            for j, column in enumerate(density.split(k_blocks.count.tolist())):
                some = int((column > 0).sum())
                out[i, j] |= some > 0 and int((column > 1 / 3).sum()) / some > 0.6
    return out


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize(
    ("grid", "decay"),
    [(masked.RAGGED, 0.2), (masked.BEFORE, 0.9), (WIDE, 0.4)],
    ids=["ragged", "before", "wide"],
)
def test_radial_attention_by_its_rule(grid: TokenGrid, decay: float, impl: str) -> None:
    changes = "schedule.density=0.9999", f"pattern.decay={decay}", "force.first_frame=false"
    config = masked.preset("radial", *changes)
    always = masked.always(grid, config)
    wanted = radial_blocks(grid, config) | always
    assert not wanted.all()
    qkv = masked.random(grid)
    result = masked.call(config, qkv, grid, impl)
    masked.close(result, masked.dense_on(qkv, grid, config, wanted), impl)
    assert result.density == pytest.approx([masked.share(wanted, grid, config)] * 2)


def test_the_rule_is_symmetric_and_grows_with_the_decay() -> None:
    widths = [radial.half_widths(21, 1560, decay, 64) for decay in (0.1, 0.3, 0.9)]
    for some in widths:
        assert torch.equal(some, some.T)
    assert (widths[0] <= widths[1]).all() and (widths[1] <= widths[2]).all()
    assert (widths[0] < widths[2]).any() and (widths[0] == -1).any()


PUBLISHED = {  # of the authors' masks, with frame 0 for all
    (21, 30, 52, 0.2, 128): 0.339,
    (20, 48, 80, 0.8, 128): 0.353,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_densities(case: tuple[int, int, int, float, int]) -> None:
    *sizes, decay, block = case
    grid = TokenGrid(*sizes)
    config = SparseConfig.load("radial", [f"kernel.block_q={block}", f"kernel.block_k={block}"])
    stand = masked.stand(grid, config)
    found = radial.blocks(stand, 0, radial.Params(decay=decay))
    assert found.any(1).all(), "no empty row"
    found |= stand.held(stand.k_blocks, (1, *sizes[1:]))[:, 0].flatten()  # and the sink
    assert stand.share(found) == pytest.approx(PUBLISHED[case], abs=0.005)


@pytest.mark.parametrize("name", ["radial", "lvsa"])
def test_the_budget_sizes_the_pattern(name: str) -> None:
    grid = WIDE
    qkv = masked.random(grid, heads=1)
    found = []
    for density in (0.001, 0.5, 0.7, 0.95):
        config = masked.preset(name, f"schedule.density={density}", "force.first_frame=false")
        result = masked.call(config, qkv, grid, "cpu")
        assert result.plan is not None and (result.plan.levels == 0).any(-1).all()
        assert result.density[0] <= max(density, found[0] if found else 1)
        found.append(result.density[0])
    assert found == sorted(found) and found[0] < found[-1]


def test_radial_is_for_the_raster() -> None:
    with pytest.raises(ValueError, match="drawn over frames as they stand"):
        SparseConfig.load("radial", ["layout.name=tile"])


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("grid", masked.GRIDS.values(), ids=masked.GRIDS)
def test_anchors_move_by_one_frame_a_step(grid: TokenGrid, impl: str) -> None:
    changes = "pattern.window=0", "pattern.period=2", "schedule.density=0.9999"
    config = masked.preset("lvsa", *changes)
    qkv = masked.random(grid)
    seen = set()
    for step in range(4):
        wanted = masked.block_map(
            grid, config, lambda a, b, step=step: a[0] == b[0] or b[0] % 2 == step % 2
        )
        result = masked.call(config, qkv, grid, impl, StepContext(step, 4))
        masked.close(result, masked.dense_on(qkv, grid, config, wanted), impl)
        seen.add(round(result.density[0], 9))
    assert len(seen) == 2, "of five or three frames, the odd ones are fewer"
