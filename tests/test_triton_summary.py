"""Block means and moments from one read of keys and values, against float64, in the interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_summary.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os
from dataclasses import replace

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

from vidsparse.kernels.gpu import summary
from vidsparse.kernels.gpu.block_moments import aligned, block_moments

pytestmark = pytest.mark.interp

TOLERANCES = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2."""


def assert_summary(k: Tensor, v: Tensor, blocks: Blocks, tolerance: float) -> None:
    """Means of both and the moment, relative L2; exact zeros past the head dim and the blocks."""
    depth, n = k.shape[3], len(blocks)
    width = 64 if depth <= 64 else 128
    video = (~blocks.text).int()
    count = int(blocks.count[~blocks.text].sum())
    draft, mean_k, mean_v, moment = summary.summarise(k, v, *table(blocks), video, None, count)
    want_k, want_v, wanted = oracles.summarise(k, v, blocks)
    assert moment.shape == (*k.shape[:2], width, width) and moment.dtype == k.dtype
    assert (moment[..., :depth, :depth].double() - wanted).norm() <= tolerance * wanted.norm()
    assert (moment[..., depth:, :] == 0).all() and (moment[..., depth:] == 0).all()
    assert draft.dtype == torch.float32
    assert (draft.double() - want_k).norm() <= TOLERANCES[torch.float32] * want_k.norm()
    for found, want in ((mean_k, want_k), (mean_v, want_v)):
        assert found.dtype == k.dtype and found.shape[2] % summary.HEIGHT == 0
        assert (found[:, :, :n, :depth].double() - want).norm() <= tolerance * want.norm()
        assert (found[:, :, n:] == 0).all() and (found[..., depth:] == 0).all()
    without = summary.summarise(k, v, *table(blocks), video, None, 0)
    assert without[3].numel() == 0
    for found, same in zip(without, (draft, mean_k, mean_v), strict=False):
        assert torch.equal(found, same)


@pytest.mark.parametrize("slab", [2, 64])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", ["text-first", "text-last"])
def test_any_cut(
    grid: str, dtype: torch.dtype, size: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = summary.shape_for
    monkeypatch.setattr(summary, "shape_for", lambda *how: replace(whole(*how), slab=slab))
    blocks = Blocks.cut(GRIDS[grid], size)
    k, v = (tokens(blocks, 64, dtype) for _ in range(2))
    assert_summary(k, v, blocks, TOLERANCES[dtype])


@pytest.mark.parametrize("depth", [128, 80, 40])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_head_dims(dtype: torch.dtype, depth: int) -> None:
    """Keys with a large common part, which must be gone before the keys are rounded.

    In float32 the sums of a block lose as many digits as that part has too many.
    """
    blocks = Blocks.cut(GRIDS["text-first"], 128)
    k, v = (tokens(blocks, depth, dtype, batch=2) for _ in range(2))
    common = 20 * torch.randn(depth).to(dtype)
    assert_summary(k + common, v, blocks, max(TOLERANCES[dtype], 2e-5))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_of_blocks(dtype: torch.dtype, size: int) -> None:
    """Of every block by itself, those of text among them."""
    blocks = Blocks.cut(GRIDS["text-first"], size)
    k, v = (tokens(blocks, 80, dtype, batch=2) for _ in range(2))
    found = block_moments(k, v, *table(blocks), None)
    wanted = oracles.block_moments(k, v, blocks)
    assert found.shape == (aligned(len(blocks)), 2, 2, 128, 128) and found.dtype == dtype
    assert (found[len(blocks) :] == 0).all()
    found = found[: len(blocks)]
    assert (found[..., :80, :80].double() - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()
    assert (found[..., 80:, :] == 0).all() and (found[..., 80:] == 0).all()


def test_moments_of_float16_leave_its_range() -> None:
    """Products of 400 are past 65,504: in float32 they are what they are, and NaN stays NaN."""
    blocks = Blocks.cut(GRIDS["text-first"], 64)
    k, v = (400 * tokens(blocks, 64, torch.float16).sign() for _ in range(2))
    k[0, 0, -1] = torch.nan
    found = block_moments(k, v, *table(blocks), None)
    wanted = oracles.block_moments(k, v, blocks)
    assert found.dtype == torch.float32 and wanted[:-1].abs().max() > 65_504
    found = found[: len(blocks)]
    assert (found[:-1].double() - wanted[:-1]).norm() <= 1e-2 * wanted[:-1].norm()
    assert found[-1, 0, 0].isnan().any()


def test_one_head_stands_alone() -> None:
    """One token has no moment; other heads do not change the numbers of a head."""
    blocks = Blocks.cut(GRIDS["one-token"], 64)
    k, v = (tokens(blocks, 64) for _ in range(2))
    one = torch.ones(1, dtype=torch.int32)
    assert (summary.summarise(k, v, *table(blocks), one, None, 1)[3] == 0).all()
    blocks = Blocks.cut(GRIDS["text-last"], 64)
    k, v = (tokens(blocks, 64, torch.bfloat16) for _ in range(2))
    place = *table(blocks), (~blocks.text).int(), None, 234
    both = summary.summarise(k, v, *place)
    single = summary.summarise(k[:, 1:], v[:, 1:], *place)
    assert all(torch.equal(one, two[:, 1:]) for one, two in zip(single, both, strict=True))


def test_memory_layouts() -> None:
    """Contiguous, transposed and strided inputs give the same numbers."""
    blocks = Blocks.cut(TokenGrid(1, 5, 9, 7, True), 16)
    views = layouts(tokens(blocks, 64, torch.bfloat16, batch=2))
    place = *table(blocks), torch.ones(len(blocks), dtype=torch.int32), None, 52
    made = [summary.summarise(each, views[-n], *place) for n, each in enumerate(views)]
    for each in made:
        assert all(torch.equal(one, first) for one, first in zip(each, made[0], strict=True))


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.summary import summarise
HEADS, N, D = 3, 130, 64
start, count = torch.tensor([0, 128]), torch.tensor([128, 2], dtype=torch.int32)
blocks = Blocks(start, count.long(), torch.zeros(2, dtype=torch.bool), 128)
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    size = (HEADS - 1) * head + (N - 1) * token + D
    place = (1, HEADS, N, D), (0, head, token, 1)
    k, v = (virtual(size, torch.float16).as_strided(*place) for _ in range(2))
    for x in (k, v):
        x.copy_(torch.randn(x.shape))
    _, mean_k, mean_v, moment = summarise(k, v, start, count, 128, count, None, N)
    wanted = oracles.summarise(k, v, blocks)
    for found, want in zip((mean_k[:, :, :2], mean_v[:, :, :2], moment), wanted, strict=True):
        assert close(found, want)
""")
