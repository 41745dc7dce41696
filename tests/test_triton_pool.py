"""Block means and the key buffer against float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_pool.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os

import pytest
import torch

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import oracles

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far
from cuts import GRIDS, assert_close, layouts, pieces, table, tokens
from torch import Tensor

from vidsparse.kernels.gpu import means as sums
from vidsparse.kernels.gpu import pool

pytestmark = pytest.mark.interp

HALF_ULP = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Relative error of one element that was rounded once; for float32, of its sum."""


def segments(blocks: Blocks, levels: tuple[int, ...], block_n: int) -> tuple[dict[int, int], int]:
    """First row of each level and rows of the buffer, levels from multiples of block_n on."""
    first, rows = {}, 0
    for level in levels:
        first[level] = rows
        rows += -(-len(blocks) * (blocks.size >> level) // block_n) * block_n
    return first, rows


def firsts(first: dict[int, int]) -> list[int]:
    """First row of each level as `fill_keys` takes it."""
    return [first.get(level, pool.ABSENT) for level in range(max(first) + 1)]


def assert_means(x: Tensor, blocks: Blocks) -> None:
    found = sums.block_means(x, *table(blocks))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert_close(found, oracles.block_means(x, blocks.start, blocks.count), 1e-6)


def assert_keys(x: Tensor, blocks: Blocks, levels: tuple[int, ...], block_n: int) -> None:
    """`fill_keys` equals the oracle, tokens and zeros bit for bit."""
    first, rows = segments(blocks, levels, block_n)
    width = 64 if x.shape[3] <= 64 else 128
    found = pool.fill_keys(x, *table(blocks), firsts(first), rows, width)
    wanted = oracles.fill_keys(x, blocks, first, rows, width)
    assert found.dtype == x.dtype and found.is_contiguous()
    assert_close(found, wanted, HALF_ULP[x.dtype])
    exact = wanted == 0
    exact[:, :, : len(blocks) * blocks.size] = True
    assert torch.equal(found[exact].double(), wanted[exact])


@pytest.mark.parametrize("size", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("grid", GRIDS)
def test_block_means(grid: str, size: int) -> None:
    blocks = Blocks.cut(GRIDS[grid], size)
    assert_means(tokens(blocks, 64, batch=2), blocks)


@pytest.mark.parametrize("depth", [64, 128, 80, 40])
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_block_means_are_float32_of_any_dtype(dtype: torch.dtype, depth: int) -> None:
    blocks = Blocks.cut(GRIDS["text-first"], 64)
    assert_means(tokens(blocks, depth, dtype), blocks)


@pytest.mark.parametrize("sub", [2, 4, 8])
def test_block_means_of_pieces(sub: int) -> None:
    """A missing piece gives zeros, and no token outside a block is read."""
    blocks = Blocks.cut(GRIDS["text-first"], 128)
    start, count, size = pieces(blocks, sub)
    count[0] -= 3  # leaves tokens to no block
    x = tokens(blocks, 64)
    wanted = oracles.block_means(x, start, count)
    owned = torch.zeros(blocks.tokens, dtype=torch.bool)
    for first, n in zip(start.tolist(), count.tolist(), strict=True):
        owned[first : first + n] = True
    assert (count == 0).any() and not owned.all()
    x[:, :, ~owned] = float("nan")
    assert_close(sums.block_means(x, start, count, size), wanted, 1e-6)


@pytest.mark.parametrize(
    ("size", "levels", "block_n"),
    [
        (128, (0, 1, 2, 3, 4, 5, 6, 7), 64),
        (128, (0, 7), 128),
        (64, (0,), 32),
        (64, (0, 2, 6), 64),
        (32, (0, 1, 4, 5), 64),
        (16, (0, 3, 4), 16),
        (4, (0, 1, 2), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", GRIDS)
def test_key_buffer(grid: str, size: int, levels: tuple[int, ...], block_n: int) -> None:
    blocks = Blocks.cut(GRIDS[grid], size)
    assert_keys(tokens(blocks, 64), blocks, levels, block_n)


@pytest.mark.parametrize("depth", [64, 128, 80, 40])
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_key_buffer_of_any_dtype(dtype: torch.dtype, depth: int) -> None:
    """Means come from the tokens and are rounded once, not from the level below."""
    blocks = Blocks.cut(GRIDS["text-last"], 64)
    assert_keys(tokens(blocks, depth, dtype), blocks, (0, 1, 3, 6), 64)


def test_memory_layouts() -> None:
    """Contiguous, transposed and strided inputs give the same numbers."""
    blocks = Blocks.cut(TokenGrid(1, 5, 9, 7, True), 16)
    first, rows = segments(blocks, (0, 2), 16)
    views = layouts(tokens(blocks, 64, torch.bfloat16, batch=2))
    keys = [pool.fill_keys(each, *table(blocks), firsts(first), rows, 64) for each in views]
    means = [sums.block_means(each, *table(blocks)) for each in views]
    for results in (keys, means):
        assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("size", [128, 16])
def test_gather_order(size: int) -> None:
    blocks = Blocks.cut(GRIDS["text-first"], size)
    first, rows = segments(blocks, (0, 1, 4), 64)
    x, order = tokens(blocks, 80), torch.randperm(blocks.tokens)
    place = *table(blocks), firsts(first), rows, 128
    found = pool.fill_keys(x, *place, order)
    assert torch.equal(found, pool.fill_keys(x[:, :, order], *place))
    assert not torch.equal(found, pool.fill_keys(x, *place))


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.means import block_means
from vidsparse.kernels.gpu.pool import fill_keys, fill_keys_kernel
HEADS, N, D = 3, 130, 64
start, count = torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32)
blocks = Blocks(start, count.long(), torch.zeros(2, dtype=torch.bool), 128)
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    memory = virtual((HEADS - 1) * head + (N - 1) * token + D, torch.float16)
    k = memory.as_strided((1, HEADS, N, D), (0, head, token, 1))
    k.copy_(torch.randn(k.shape))
    assert close(block_means(k, start, count, 128), oracles.block_means(k, start, count))
    keys = fill_keys(k, start, count, 128, [0, *[-1] * 6, 256], 272, D)
    wanted = oracles.fill_keys(k, blocks, {0: 0, 7: 256}, 272, D)
    assert torch.equal(keys[:, :, :N], k) and close(keys[:, :, 256:258], wanted[:, :, 256:258])

rows = 2**24  # of a head, of which the first few are written
out = virtual((HEADS - 1) * rows * D + 128 * D, torch.float16)
fill_keys_kernel[(1, HEADS)](
    k, start, count, start, out, *k.stride()[:3], 0, HEADS, 1, rows, (0,), (128,),
    D=D, DP=D, SIZE=128, LOW=8, HIGH=16, LEVELS=1, TOP=0, ORDERED=False,
)
assert torch.equal(out[2 * rows * D :].view(128, D), k[0, 2, :128])
""")
