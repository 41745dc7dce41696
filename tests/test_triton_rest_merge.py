"""The rest merge, on the (O, LSE) of the exact tiles in float64, against float64.

TRITON_INTERPRET=1 pytest tests/test_triton_rest_merge.py
"""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far
from cuts import GRIDS

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import exact_engine, oracles, rest, summary
from vidsparse.kernels.gpu.operands import Means, QueryRows
from vidsparse.kernels.gpu.rest_merge import rest_merge
from vidsparse.kernels.gpu.weights import rest_bias
from vidsparse.plan import SKIP, BlockPlan

pytestmark = pytest.mark.interp

TOLERANCES = {torch.float32: 3e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""Relative L2 of the output, which is rounded once before the merge and once after it."""

LSE_TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Absolute; means are rounded to the dtype."""


@dataclass(frozen=True)
class Given:
    """A plan of level 0, q, k, v, and what an exact engine would write of its full blocks."""

    plan: BlockPlan
    q: Tensor
    k: Tensor
    v: Tensor
    rows: QueryRows
    out: Tensor
    lse: Tensor


def given(
    grid: str,
    sizes: tuple[int, int] = (128, 64),
    depth: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    tilt: bool = False,
    rest_level: bool = True,
) -> Given:
    q_blocks, k_blocks = (Blocks.cut(GRIDS[grid], size) for size in sizes)
    levels = torch.randint(SKIP, 1, (2, 2, len(q_blocks), len(k_blocks)), dtype=torch.int8)
    levels[0, 0, 0], levels[0, 1, -1], levels[1, 0, 0] = SKIP, 0, 0
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks, (0,))
    if rest_level:
        bias = torch.randn(levels.shape) if tilt else None
        if bias is not None:
            bias[torch.rand(bias.shape) < 0.2] = float("-inf")
        plan = plan.with_rest(k_blocks.levels, "none", bias)
    q, k, v = (torch.randn(2, q_blocks.tokens, 2, depth).to(dtype).transpose(1, 2)
               for _ in range(3))  # fmt: skip
    full = k_blocks.count == k_blocks.size
    exact = BlockPlan.from_levels(levels.masked_fill(~full, SKIP), q_blocks, k_blocks, (0,))
    out, lse = oracles.rest_merge(q, k, v, exact)
    out = out.masked_fill(lse.isinf()[..., None], 0.0).to(dtype)
    rows = QueryRows(q_blocks.start, q_blocks.count.int(), q_blocks.size)
    return Given(plan, q, k, v, rows, out, lse.float())


def merged(
    g: Given, moment: Tensor | None = None, first: int = 0, blocks: int | None = None
) -> None:
    cut = g.plan.k_blocks
    place = exact_engine.key_place(cut, min(64, cut.size), "token", False, torch.device("cpu"))
    means = bias = None
    if g.plan.rest != SKIP:
        given = g.k, g.v, place.start, place.count, cut.size
        _, *pair, _ = summary.summarise(*given, (~cut.text).int(), None, 0)
        means = Means(*pair, rest._bias(cut, torch.device("cpu")))
        bias = rest_bias(g.plan.levels, g.plan.rest_bias, means.bias)
    operands = g.q, g.k, g.v, g.plan.levels, g.rows, g.out, g.lse, means, bias, moment
    rest_merge(*operands, place.short, first, blocks)


def assert_merged(g: Given, moment: Tensor | None = None) -> None:
    merged(g, moment)
    want, want_lse = oracles.rest_merge(g.q, g.k, g.v, g.plan, moment)
    empty = want_lse.isinf()
    assert torch.equal(g.lse == float("-inf"), empty) and not g.out[empty].any()
    want = want.masked_fill(empty[..., None], 0.0)
    assert (g.out.double() - want).norm() <= TOLERANCES[g.q.dtype] * want.norm()
    assert (g.lse - want_lse)[~empty].abs().max() <= LSE_TOLERANCE[g.q.dtype]


@pytest.mark.parametrize("tilt", [False, True], ids=["level", "tilted"])
@pytest.mark.parametrize("depth", [64, 80, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_centroids(dtype: torch.dtype, depth: int, tilt: bool) -> None:
    assert_merged(given("text-first", depth=depth, dtype=dtype, tilt=tilt))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sizes", [(128, 64), (64, 128), (32, 16), (16, 32)], ids=str)
def test_raggedness(sizes: tuple[int, int], grid: str) -> None:
    """Parts of a sequence that end in short blocks, or are nothing else."""
    assert_merged(given(grid, sizes, dtype=torch.float32))


@pytest.mark.parametrize("grid", ["text-first", "text-last", "337"])
def test_short_blocks_alone(grid: str) -> None:
    """A plan that drops its rest: rows without a key stay empty."""
    g = given(grid, rest_level=False)
    assert g.lse.isinf().any()
    assert_merged(g)


@pytest.mark.parametrize("by_row", [False, True], ids=["head", "query block"])
@pytest.mark.parametrize("depth", [64, 80, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_moments(dtype: torch.dtype, depth: int, by_row: bool) -> None:
    g = given("text-last", depth=depth, dtype=dtype)
    width = 64 if depth == 64 else 128
    sizes = (2, 2, len(g.plan.q_blocks), width, width) if by_row else (2, 2, width, width)
    assert_merged(g, torch.randn(sizes).to(dtype))


def test_some_query_blocks() -> None:
    """Moments of a few query blocks at a time: the others stay as they are."""
    g, whole = (given("text-first", (64, 64), dtype=torch.float32) for _ in range(2))
    whole = Given(g.plan, g.q, g.k, g.v, g.rows, g.out.clone(), g.lse.clone())
    before, n = g.out.clone(), len(g.plan.q_blocks)
    moment = torch.randn(2, 2, n, 64, 64)
    merged(whole, moment)
    merged(g, moment[:, :, 1:3].contiguous(), 1, 2)
    touched = torch.isin(g.plan.q_blocks.owner, torch.tensor([1, 2]))
    assert torch.equal(g.out[:, :, touched], whole.out[:, :, touched])
    assert torch.equal(g.out[:, :, ~touched], before[:, :, ~touched])


def test_a_heavy_rest_takes_over() -> None:
    """Centroids that outweigh the listed tiles by far: O, LSE and the share are rescaled."""
    g = given("337", (64, 16), dtype=torch.float32)
    bias = torch.linspace(-30, 60, g.plan.levels.shape[3]).expand(g.plan.levels.shape).contiguous()
    plan = g.plan.with_rest(g.plan.rest, "none", bias)
    assert_merged(Given(plan, g.q, g.k, g.v, g.rows, g.out, g.lse), torch.randn(2, 2, 64, 64))


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.operands import Means, QueryRows, ShortBlocks
from vidsparse.kernels.gpu.rest_merge import rest_merge
from vidsparse.kernels.gpu.weights import rest_bias
from vidsparse.plan import BlockPlan
HEADS, N, D = 3, 130, 64
text = torch.zeros(2, dtype=torch.bool)
blocks = Blocks(torch.tensor([0, 128]), torch.tensor([128, 2]), text, 128)
rows = QueryRows(blocks.start, blocks.count.int(), 128)
levels = torch.tensor([[-1, 0]], dtype=torch.int8).repeat(1, HEADS, 2, 1)
plan = BlockPlan.from_levels(levels, blocks, blocks, (0,)).with_rest(7)
one = torch.tensor([1], dtype=torch.int32)
short = ShortBlocks(one, 128 * one, 2 * one)
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    size = (HEADS - 1) * head + (N - 1) * token + D
    place = (1, HEADS, N, D), (0, head, token, 1)
    q, k, v, out = (virtual(size, torch.float16).as_strided(*place) for _ in range(4))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    out.zero_()
    mean_k, mean_v = (torch.zeros(1, HEADS, 64, D).half() for _ in range(2))
    for mean, x in ((mean_k, k), (mean_v, v)):
        mean[:, :, :2] = oracles.block_means(x, blocks.start, blocks.count).half()
    bias = torch.full((64,), -torch.inf)
    bias[:2] = blocks.count.log2()
    moment = torch.randn(1, HEADS, D, D).half()
    lse = torch.full((1, HEADS, N), -torch.inf)
    means = Means(mean_k, mean_v, bias)
    rest = rest_bias(levels.contiguous(), None, bias)
    rest_merge(q, k, v, levels, rows, out, lse, means, rest, moment, short)
    assert close(out, oracles.rest_merge(q, k, v, plan, moment)[0])
""")
