"""Plans, inputs and the check against the reference that the tests of the CPU engine share."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.cpu import engine
from vidsparse.plan import SKIP, BlockPlan

GRIDS = {
    "1000": (TokenGrid(5, 10, 20),) * 2,
    "1337": (TokenGrid(1, 7, 191),) * 2,
    "text-first": (TokenGrid(3, 10, 21, 77, True),) * 2,
    "text-last": (TokenGrid(3, 10, 21, 77),) * 2,
    "cross": (TokenGrid(1, 3, 100), TokenGrid(1, 1, 641, 30)),
    "one-block": (TokenGrid(1, 1, 5),) * 2,
}
CUTS = [(grids, (128, 64)) for grids in GRIDS]
CUTS += [(grids, blocks) for grids in ("1337", "text-first") for blocks in ((64, 64), (32, 16))]
TOLERANCES = {  # output relative L2, LSE absolute
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (4e-3, 5e-6),
    torch.float16: (1e-3, 5e-6),
    torch.float64: (1e-13, 1e-12),
}


def cuts(grids: str, block_q: int, block_k: int) -> tuple[Blocks, Blocks]:
    q_grid, k_grid = GRIDS[grids]
    return Blocks.cut(q_grid, block_q), Blocks.cut(k_grid, block_k)


def level_map(q_blocks: Blocks, k_blocks: Blocks, kind: str, heads: int = 2) -> Tensor:
    """Random levels, "mixed" over all or "exact" ones; with an empty and a full row."""
    levels = torch.randint(SKIP, k_blocks.levels + 1, (1, heads, len(q_blocks), len(k_blocks)))
    if kind == "exact":
        levels = torch.where(torch.rand(levels.shape) < 0.3, 0, SKIP)
    levels[0, 0, 0] = SKIP
    levels[0, -1, -1] = 0
    levels[0, 0, -1, -1] = 0  # the last block kept, here and
    levels[0, 0, -1, 0] = SKIP  # the first one not
    return levels.to(torch.int8)


def tensors(plan: BlockPlan, depth: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [B, H, S, D] as views of [B, S, H, D] memory."""
    batch, heads = plan.starts.shape[:2]
    sizes = (plan.q_blocks.tokens, plan.k_blocks.tokens, plan.k_blocks.tokens)
    made = (torch.randn(batch, n, heads, depth) * 1.3 for n in sizes)
    return [x.to(dtype).transpose(1, 2) for x in made]


def exact_plan(grids: str = "1000", rest: int = 6, density: float = 0.3) -> BlockPlan:
    q_blocks, k_blocks = cuts(grids, 128, 64)
    shape = (2, 3, len(q_blocks), len(k_blocks))
    levels = torch.where(torch.rand(shape) < density, 0, SKIP).to(torch.int8)
    return BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(rest)


def assert_matches(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **options: object) -> None:
    """Engine output and LSE equal the reference in float64 on the same numbers."""
    want, want_lse = reference.execute(q.double(), k.double(), v.double(), plan)
    out, lse = engine.execute(q, k, v, plan, return_lse=True, **options)  # type: ignore[arg-type]
    assert lse is not None and want_lse is not None
    assert out.dtype == q.dtype and out.shape == q.shape
    tolerance, lse_tolerance = TOLERANCES[q.dtype]
    assert (out.double() - want).norm() <= tolerance * want.norm()
    empty = want_lse.isinf()
    assert torch.equal(lse.isinf(), empty)
    assert not out[empty].any()
    assert ((lse.double() - want_lse)[~empty].abs() <= lse_tolerance).all()


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """The same numbers in every run, and one thread unless a test asks for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
