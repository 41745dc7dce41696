"""The first-order moment and its term against float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_taylor.py

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
from cuts import GRIDS, layouts, table, tokens
from torch import Tensor

from vidsparse.kernels.gpu import taylor

pytestmark = pytest.mark.interp

TOLERANCES = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 of a product."""


def assert_moment(k: Tensor, v: Tensor, blocks: Blocks, tolerance: float) -> None:
    """Relative L2; exact zeros past the head dim."""
    depth = k.shape[3]
    width = 64 if depth <= 64 else 128
    video = (~blocks.text).nonzero().flatten()
    found = taylor.taylor_state(k, v, *table(blocks), video)
    wanted = oracles.taylor_state(k, v, blocks)
    assert found.shape == (*k.shape[:2], width, width) and found.dtype == torch.float32
    inside = found[..., :depth, :depth].double()
    assert (inside - wanted).norm() <= tolerance * wanted.norm()
    assert (found[..., depth:, :] == 0).all() and (found[..., depth:] == 0).all()


@pytest.mark.parametrize("slab", [2, 16])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", ["text-first", "text-last"])
def test_moment(
    grid: str, dtype: torch.dtype, size: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taylor, "SLAB", slab)
    blocks = Blocks.cut(GRIDS[grid], size)
    k, v = (tokens(blocks, 64, dtype) for _ in range(2))
    assert_moment(k, v, blocks, TOLERANCES[dtype])


@pytest.mark.parametrize("depth", [128, 80, 40])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_moment_head_dims(dtype: torch.dtype, depth: int) -> None:
    """Keys with a large common part, which must be gone before the keys are rounded.

    In float32 the sums of a block lose as many digits as that part has too many.
    """
    blocks = Blocks.cut(GRIDS["text-first"], 128)
    k, v = (tokens(blocks, depth, dtype, batch=2) for _ in range(2))
    common = 20 * torch.randn(depth).to(dtype)
    assert_moment(k + common, v, blocks, max(TOLERANCES[dtype], 2e-5))


def test_moment_of_one_head_stands_alone() -> None:
    """One token has no moment; other heads do not change the numbers of a head."""
    blocks = Blocks.cut(GRIDS["one-token"], 64)
    k, v = (tokens(blocks, 64) for _ in range(2))
    assert (taylor.taylor_state(k, v, *table(blocks), torch.tensor([0])) == 0).all()
    blocks = Blocks.cut(GRIDS["text-last"], 64)
    k, v = (tokens(blocks, 64, torch.bfloat16) for _ in range(2))
    video = (~blocks.text).nonzero().flatten()
    both = taylor.taylor_state(k, v, *table(blocks), video)
    one = taylor.taylor_state(k[:, 1:], v[:, 1:], *table(blocks), video)
    assert torch.equal(one, both[:, 1:])


def test_memory_layouts() -> None:
    """Contiguous, transposed and strided inputs give the same numbers."""
    blocks = Blocks.cut(TokenGrid(1, 5, 9, 7, True), 16)
    views = layouts(tokens(blocks, 64, torch.bfloat16, batch=2))
    moments = [
        taylor.taylor_state(each, views[-n], *table(blocks), torch.arange(len(blocks)))
        for n, each in enumerate(views)
    ]
    assert all(torch.equal(each, moments[0]) for each in moments)


@pytest.mark.parametrize("depth", [64, 128, 80])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_add_first_order(dtype: torch.dtype, depth: int) -> None:
    """In place, for a number of queries that divides nothing."""
    blocks = Blocks.cut(GRIDS["text-first"], 64)
    q, out = (tokens(blocks, depth, dtype, batch=2) for _ in range(2))
    width = 64 if depth <= 64 else 128
    moment, rest = torch.randn(2, 2, width, width).to(dtype), torch.rand(q.shape[:3])
    wanted = oracles.add_first_order(q, moment, rest, out)
    taylor.add_first_order(q, moment, rest, out)
    assert (out.double() - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.taylor import taylor_state
HEADS, N, D = 3, 130, 64
start, count = torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32)
blocks = Blocks(start, count.long(), torch.zeros(2, dtype=torch.bool), 128)
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    size = (HEADS - 1) * head + (N - 1) * token + D
    place = (1, HEADS, N, D), (0, head, token, 1)
    k, v = (virtual(size, torch.float16).as_strided(*place) for _ in range(2))
    for x in (k, v):
        x.copy_(torch.randn(x.shape))
    moment = taylor_state(k, v, start, count, 128, torch.arange(2))
    assert close(moment, oracles.taylor_state(k, v, blocks))
""")
