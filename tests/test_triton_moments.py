"""Moments of blocks and weights of rows against float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_moments.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os

import pytest
import torch

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far
from cuts import GRIDS, assert_close, layouts, table, tokens
from torch import Tensor

from vidsparse.draft import taken
from vidsparse.kernels.gpu import moments
from vidsparse.kernels.gpu.weights import rest_bias, rest_weights

pytestmark = pytest.mark.interp


def orders(x: Tensor, which: str) -> Tensor | None:
    """Of all heads, of each, or none."""
    shape = {"none": None, "all": x.shape[2:3], "heads": x.shape[:3]}[which]
    return None if shape is None else torch.rand(shape).argsort(-1)


@pytest.mark.parametrize("norms", [False, True], ids=["moments", "norms"])
@pytest.mark.parametrize("order", ["none", "all", "heads"])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("grid", ["text-first", "337", "one-token"])
def test_second_moments(grid: str, size: int, order: str, norms: bool) -> None:
    blocks = Blocks.cut(GRIDS[grid], size)
    x = tokens(blocks, 40, batch=2)
    own = orders(x, order)
    found = moments.second_moments(x, *table(blocks), own, norms)
    wanted = oracles.second_moments(taken(x, own), blocks.start, blocks.count, norms)
    for one, want in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and one.is_contiguous()
        assert_close(one, want, 2e-6)


@pytest.mark.parametrize("depth", [64, 128, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_second_moments_are_float32_of_any_dtype(dtype: torch.dtype, depth: int) -> None:
    """And of any layout of memory; a token that belongs to no block is not read."""
    blocks = Blocks.cut(GRIDS["text-first"], 64)
    start, count, size = table(blocks)
    count[0] -= 3
    x = tokens(blocks, depth, dtype)
    wanted = oracles.second_moments(x, start, count, False)
    x[:, :, int(start[0] + count[0]) : int(start[1])] = float("nan")
    for view in layouts(x):
        for one, want in zip(
            moments.second_moments(view, start, count, size, None, False), wanted, strict=True
        ):
            assert_close(one, want, 2e-6)


@pytest.mark.parametrize("order", ["none", "heads"])
@pytest.mark.parametrize("size", [16, 128])
def test_finite_means(size: int, order: str) -> None:
    """A token that is not finite has no part in its block; a block of such tokens gives zeros."""
    blocks = Blocks.cut(GRIDS["text-first"], size)
    x = tokens(blocks, 40, torch.bfloat16, batch=2)
    own = orders(x, order)
    x[0, 1, 20, 3], x[1, 0, 50, 39], x[1, 1, 30, 0] = float("nan"), float("inf"), -float("inf")
    x[0, 0] = float("nan")
    found = moments.finite_means(x, *table(blocks), own)
    assert (found[0, 0] == 0).all()
    assert_close(found, oracles.finite_means(taken(x, own), blocks.start, blocks.count), 2e-6)


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.moments import second_moments
HEADS, N, D = 3, 130, 64
start, count = torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32)
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    memory = virtual((HEADS - 1) * head + (N - 1) * token + D, torch.float16)
    x = memory.as_strided((1, HEADS, N, D), (0, head, token, 1))
    x.copy_(torch.randn(x.shape))
    found = second_moments(x, start, count, 128, None, False)
    wanted = oracles.second_moments(x, start, count, False)
    assert all(close(one, want) for one, want in zip(found, wanted, strict=True))
""")


@pytest.mark.parametrize(("past", "dtype"), [(0, torch.float32), (6, torch.bfloat16)])
@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("blocks", [1, 130])
def test_rest_weights(blocks: int, tilted: bool, past: int, dtype: torch.dtype) -> None:
    """A row that lists every block has none; a tilt of -inf takes a block out."""
    logits = 3 * torch.randn(2, 2, 3, blocks)
    levels = torch.randint(-1, 1, logits.shape, dtype=torch.int8)
    levels[0, 0, 0], levels[1, 0, 1] = 0, -1
    tilt = torch.rand(logits.shape) if tilted else None
    if tilt is not None and blocks > 1:
        tilt[1, 0, 1, 3] = -torch.inf
    count = torch.randint(1, 65, (blocks,))
    wanted = oracles.rest_weights(logits, levels, tilt, count)
    found = rest_weights(logits, levels, tilt, count.int(), blocks + past, dtype)
    assert found.dtype == dtype and (found[..., blocks:] == 0).all()
    assert_close(found[..., :blocks], wanted, max(2e-5, torch.finfo(dtype).eps), 1e-7)


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("blocks", [1, 130])
def test_rest_bias(blocks: int, tilted: bool) -> None:
    """What is listed, and what lies past the last block, has none."""
    levels = torch.randint(-1, 1, (2, 2, 3, blocks), dtype=torch.int8)
    tilt = torch.randn(levels.shape) if tilted else None
    if tilt is not None:
        tilt[0, 1] = -torch.inf
    bias = torch.full((-(-blocks // 64) * 64,), -torch.inf)
    bias[:blocks] = torch.randint(1, 65, (blocks,)).log2()
    found, wanted = rest_bias(levels, tilt, bias), oracles.rest_bias(levels, tilt, bias)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
