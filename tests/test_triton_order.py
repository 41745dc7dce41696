"""Kernels that gather and scatter by a layout's order, against the same on permuted tensors.

TRITON_INTERPRET=1 pytest tests/test_triton_order.py
"""

import os
import re
from itertools import product
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from torch import Tensor

from vidsparse.attention import attend
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig
from vidsparse.draft import Draft
from vidsparse.estimator import mean
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import engine as triton_engine
from vidsparse.kernels.gpu import means, summary, support
from vidsparse.plan import SKIP, BlockPlan

pytestmark = pytest.mark.interp

GRIDS = {
    "text-last": TokenGrid(3, 7, 9, 13),
    "text-first": TokenGrid(2, 9, 13, 41, True),
    "one-token": TokenGrid(1, 1, 1),
}
SMALL = TokenGrid(2, 5, 9, 11, True)


def order_of(grid: TokenGrid, layout: str = "hilbert") -> tuple[Tensor, Tensor]:
    """Order of a layout and its inverse."""
    config = SparseConfig.from_dict({"layout": {"name": layout}})
    return token_order(grid, config.layout)


def plan_of(grid: TokenGrid, sizes: tuple[int, int], full: bool) -> BlockPlan:
    """Random exact blocks, or random levels with the first-order term."""
    q_blocks, k_blocks = (Blocks.cut(grid, size) for size in sizes)
    top = k_blocks.levels if full else 0
    levels = torch.randint(SKIP, top + 1, (2, 2, len(q_blocks), len(k_blocks)), dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks, tuple(range(top + 1)))
    return plan.with_rest(k_blocks.levels, "global") if full else plan


def tensors(tokens: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [2, 2, S, depth], views of [2, S, 2, depth]."""
    return [torch.randn(2, tokens, 2, depth).to(dtype).transpose(1, 2) for _ in range(3)]


def assert_order_is_free(
    grid: TokenGrid,
    plan: BlockPlan,
    dtype: torch.dtype = torch.float32,
    depth: int = 64,
    **how: Any,
) -> None:
    """Out and LSE of the tokens as they stand, read by the order.

    Bit for bit; the first-order term is summed in other tiles, so that single roundings differ.
    """
    order, inverse = order_of(grid)
    qkv = tensors(grid.tokens, depth, dtype)
    out, lse = triton_engine.execute(*qkv, plan, order=order, return_lse=True, **how)
    moved = [x[:, :, order] for x in qkv]
    want, want_lse = triton_engine.execute(*moved, plan, return_lse=True, **how)
    assert lse is not None and want_lse is not None
    want, want_lse = want[:, :, inverse], want_lse[:, :, inverse]
    if plan.first_order == "none":
        assert torch.equal(out, want)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 5e-4}[dtype]
    assert (out.double() - want.double()).norm() <= tolerance * want.double().norm()
    assert torch.equal(lse, want_lse)
    assert out.isfinite().all() and out.transpose(1, 2).is_contiguous()


SIZES = (64, 32), (32, 64), (128, 128)
QUICK = {*zip(GRIDS, SIZES, strict=True)}
"""Each grid and each pair of sizes once; the other pairs are slow."""


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_exact_plans(grid: str, sizes: tuple[int, int]) -> None:
    assert_order_is_free(GRIDS[grid], plan_of(GRIDS[grid], sizes, False))


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in product(GRIDS, SIZES)
    ],
)
def test_plans_with_every_level_and_the_first_order(grid: str, sizes: tuple[int, int]) -> None:
    assert_order_is_free(GRIDS[grid], plan_of(GRIDS[grid], sizes, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [40, 96, 128])
def test_dtypes(dtype: torch.dtype, depth: int) -> None:
    assert_order_is_free(SMALL, plan_of(SMALL, (32, 32), True), dtype, depth)


@pytest.mark.parametrize("form", ["pointer", "tma"])
def test_forms(form: str) -> None:
    grid = GRIDS["text-last"]
    plan = plan_of(grid, (128, 64), False).with_rest(6, "global")
    assert_order_is_free(grid, plan, torch.bfloat16, 64, form=form)


def test_8_bit_products() -> None:
    grid = GRIDS["text-last"]
    assert_order_is_free(grid, plan_of(grid, (128, 64), True), torch.bfloat16, 64, qk="int8")


@pytest.mark.parametrize("size", [4, 32, 128])
def test_means(size: int) -> None:
    grid = GRIDS["text-first"]
    blocks, (order, _) = Blocks.cut(grid, size), order_of(grid)
    x = tensors(grid.tokens, 80, torch.bfloat16)[0]
    place = blocks.start, blocks.count.int(), size
    found = means.block_means(x, *place, order)
    assert torch.equal(found, means.block_means(x[:, :, order], *place))
    assert not torch.equal(found, means.block_means(x, *place))


@pytest.mark.parametrize("size", [16, 64, 128])
def test_moment(size: int) -> None:
    """In one part and in several parts per block."""
    grid = GRIDS["text-first"]
    blocks, (order, _) = Blocks.cut(grid, size), order_of(grid)
    for dtype in (torch.float32, torch.bfloat16):
        k, v, _ = tensors(grid.tokens, 80, dtype)
        place = blocks.start, blocks.count.int(), size, (~blocks.text).int()
        found = summary.summarise(k, v, *place, order, 99)
        moved = summary.summarise(k[:, :, order], v[:, :, order], *place, None, 99)
        assert all(torch.equal(*pair) for pair in zip(found, moved, strict=True))
        each = order.repeat(2, 2, 1)
        each[1, 0] = each[1, 0].flip(0)  # an order of its own for one of the heads
        own = summary.summarise(k, v, *place, each, 99)
        k, v = (x.gather(2, each[..., None].expand(x.shape)) for x in (k, v))
        want = summary.summarise(k, v, *place, None, 99)
        assert all(torch.equal(*pair) for pair in zip(own, want, strict=True))


@pytest.mark.parametrize("sub_blocks", [1, 4])
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_estimator(engine: str, sub_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "triton":
        from vidsparse.kernels.gpu import draft

        modules = {"draft": draft, "means": means}
        monkeypatch.setattr(support, "kernels", lambda name, x: modules[name])
    grid = GRIDS["text-last"]
    order, _ = order_of(grid)
    cuts = Blocks.cut(grid, 32), Blocks.cut(grid, 16)
    q, k, _ = tensors(grid.tokens, 64, torch.float32)
    params = mean.Params(sub_blocks=sub_blocks)
    found = mean.estimate(Draft(q, k, k, *cuts, order, order), params).value
    q, k = q[:, :, order], k[:, :, order]
    moved = mean.estimate(Draft(q, k, k, *cuts), params).value
    assert torch.equal(found, moved)


def test_an_order_with_gaps_in_memory() -> None:
    grid = GRIDS["text-last"]
    plan, (order, _) = plan_of(grid, (64, 64), False), order_of(grid)
    q, k, v = tensors(grid.tokens, 64, torch.float32)
    apart = torch.stack([order, order.flip(0)], 1)[:, 0]
    found, want = (triton_engine.execute(q, k, v, plan, order=x)[0] for x in (apart, order))
    assert not apart.is_contiguous() and torch.equal(found, want)


def test_no_stage_permutes() -> None:
    """A call on tokens in raster order reads and writes them where they stand."""
    grid = GRIDS["text-last"]
    schedule = {"name": "constant", "density": 0.5, "min_tokens": 0}
    config = SparseConfig.from_dict({"schedule": schedule, "layout": {"name": "hilbert"}})
    qkv = [x.transpose(1, 2) for x in tensors(grid.tokens, 64, torch.float32)]
    result = attend(*qkv, grid=grid, config=config, impl="triton")
    assert set(result.seconds) == {"estimate", "select", "kernel"}
    want = attend(*(x.double() for x in qkv), grid=grid, config=config, impl="reference")
    assert "permute" in want.seconds
    assert (result.out - want.out).norm() < 3e-6 * want.out.norm()


def test_refusals() -> None:
    grid = GRIDS["text-last"]
    plan = plan_of(grid, (64, 64), False)
    q, k, v = tensors(grid.tokens, 64, torch.float32)
    order, _ = order_of(grid)
    for bad, found in (
        (order.int(), "torch.int32 (202,) on cpu"),
        (order[:-1], "torch.int64 (201,) on cpu"),
        (order.to("meta"), "torch.int64 (202,) on meta"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"order is {found}") + ".*expected"):
            triton_engine.execute(q, k, v, plan, order=bad)
