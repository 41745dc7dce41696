"""Calls of presets on a grid that divides nothing, and their operands as formulas name them.

Two batch items; of each the first head is sharp, the second flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.geometry import plan_geometry
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.plan import SKIP, BlockPlan

GRID = TokenGrid(3, 7, 11, text_tokens=13)
HEADS = tuple(product(range(2), range(2)))
SMALL = "kernel.block_q=32", "kernel.block_k=16", "schedule.min_tokens=0", "schedule.name=constant"


@dataclass(frozen=True)
class Call:
    """q, k, v: float64 [2, 2, S, D] in the order of the blocks, and out, of the CPU executor."""

    config: SparseConfig
    plan: BlockPlan
    forced: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def blocks(self, name: str, b: int, h: int) -> list[Tensor]:
        """Of one head, [n, D] each."""
        cut = self.plan.q_blocks if name == "q" else self.plan.k_blocks
        return list(getattr(self, name)[b, h].split(cut.count.tolist()))

    def logits(self, b: int, h: int) -> Tensor:
        """s qbar_i . kbar_j, [nq, nk]."""
        q, k = (torch.stack([x.mean(0) for x in self.blocks(n, b, h)]) for n in "qk")
        return q @ k.T * self.q.shape[-1] ** -0.5

    def rows(self) -> Iterator[tuple[int, int, int, list[bool]]]:
        """Batch item, head, row, what is forced there."""
        for (b, h), i in product(HEADS, range(len(self.plan.q_blocks))):
            yield b, h, i, self.forced[i].tolist()


def field(grid: TokenGrid, seed: int, depth: int = 16) -> list[Tensor]:
    """q, k, v float64 [2, S, 2, depth], smooth over the video, and noise; head 0 sharp, 1 flat."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.linspace(0, 1, n) for n in (grid.frames, grid.height, grid.width)]
    points = torch.cartesian_prod(*axes).double()
    found = []
    for gain in (torch.tensor([2.5, 0.4]), torch.tensor([2.5, 0.4]), torch.ones(2)):
        waves = torch.randn(2, 2, 3, depth, generator=generator).double() * 5
        x = torch.sin(points @ waves + 3 * torch.rand(2, 2, 1, depth, generator=generator))
        others = torch.randn(2, 2, grid.tokens - len(points), depth, generator=generator).double()
        first = grid.video_start
        x = torch.cat([others[:, :, :first], x, others[:, :, first:]], 2)
        x = x + 0.3 * torch.randn(x.shape, generator=generator).double()
        found.append((x * gain.double()[:, None, None]).transpose(1, 2))
    return found


def call(preset: str, *changes: str, grid: TokenGrid = GRID, seed: int = 0) -> Call:
    """A sparse call of a preset at small blocks, the same by the reference and by the CPU executor.

    That no row is without a key, and that the plan costs at most what its own figures say, is
    asserted here.
    """
    config = SparseConfig.load(preset, [*SMALL, *changes])
    q, k, v = field(grid, seed)
    how = {"grid": grid, "config": config, "return_lse": True}
    found, other = (attend(q, k, v, impl=impl, **how) for impl in ("cpu", "reference"))
    plan = found.plan
    assert plan is not None and other.plan is not None
    assert torch.equal(plan.levels, other.plan.levels)
    torch.testing.assert_close(found.out, other.out, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.lse, other.lse, rtol=1e-9, atol=1e-10)
    assert bool((plan.level_map() != SKIP).any(-1).all()) and bool(found.out.isfinite().all())
    sizes = plan.q_blocks.size, plan.k_blocks.size
    geometry = plan_geometry(grid, config.layout, config.force, *sizes, q.device)
    moved = (x[:, geometry.order].transpose(1, 2) for x in (q, k, v))
    out, lse = found.out[:, geometry.order].transpose(1, 2), found.lse[:, :, geometry.order]
    q, k, v = moved
    if getattr(plan, "blend", None) is None:
        want, _ = reference.execute(q, k, v, plan)
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    return Call(config, plan, geometry.forced, q, k, v, out, lse)


def ordered(value: list[float], first: list[bool]) -> list[int]:
    """Block ids: `first` in front, by falling value, ties by index."""
    return sorted(range(len(value)), key=lambda j: (not first[j], -value[j], j))
