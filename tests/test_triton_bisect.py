"""Bisection, projection and content order as a whole, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_bisect.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os
from importlib import import_module

import pytest
import torch

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import oracles

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far
from cuts import GRIDS, layouts, tokens
from torch import Tensor

from vidsparse import bisection
from vidsparse.bisection import bisected
from vidsparse.draft import Draft
from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.axes import main_axes
from vidsparse.kernels.gpu.bisect import CHUNKS, bisect
from vidsparse.kernels.gpu.projection import SLAB, grams, project
from vidsparse.layout import content

pytestmark = pytest.mark.interp


def field(rows: int, axes: int) -> Tensor:
    """Rows far from zero that vary more on some axes; some of them twice."""
    x = torch.randn(2, 2, axes, rows) * torch.rand(axes, 1) + 30 * torch.rand(axes, 1)
    x[..., rows // 2 :] = x[..., torch.randint(rows, (rows - rows // 2,))]
    return x


def blocks_of(order: Tensor, size: int) -> list[list[set[int]]]:
    return [[set(part.tolist()) for part in own.split(size)] for own in order.flatten(0, -2)]


@pytest.mark.parametrize(
    ("rows", "axes", "size"),
    [(1, 1, 1), (13, 6, 1), (16, 2, 16), (130, 6, 16), (337, 3, 32), (337, 3, 128), (40, 2, 64)],
    ids=str,
)
def test_bisect(rows: int, axes: int, size: int) -> None:
    x, names = field(rows, axes), torch.randperm(1000)[:rows].int()
    before = x.clone()
    found = bisect(x, names, [size])
    assert found.dtype == torch.int32 and torch.equal(x, before)
    assert torch.equal(found, oracles.bisect(x, names, size).int())
    place = bisected(x.mT.flatten(0, 1), size, local=False).view(found.shape)
    assert blocks_of(found, size) == blocks_of(names[place], size)


@pytest.mark.parametrize("sizes", [[64, 32], [16, 128], [512, 16]], ids=str)
def test_halves_of_a_batch_have_blocks_of_their_own(sizes: list[int]) -> None:
    x, names = field(337, 3), torch.randperm(337).int()
    found = bisect(x, names, sizes)
    for one, own, size in zip(found, x, sizes, strict=True):
        assert torch.equal(one, oracles.bisect(own[None], names, size)[0].int())


@pytest.mark.parametrize(("depth", "axes"), [(128, 6), (64, 16), (40, 3), (24, 1)])
@pytest.mark.parametrize("rank", [0, 2, 24])
def test_main_axes(depth: int, axes: int, rank: int) -> None:
    """Orthonormal whatever the rank; they span what those of the definition do."""
    x = torch.randn(3, 500, rank) * torch.linspace(3, 0.3, rank) @ torch.randn(3, rank, depth)
    covariance = x.mT @ x / 500
    start = bisection.start(depth, axes, torch.float32, covariance.device)
    found = main_axes(covariance, start, bisection.LEAST, bisection.SWEEPS).double()
    torch.testing.assert_close(found.mT @ found, torch.eye(axes).double().expand(3, -1, -1),
                               rtol=0, atol=1e-5)  # fmt: skip
    want = bisection.main_axes(covariance.double(), axes)
    apart = (found @ found.mT - want @ want.mT) @ covariance.double()
    assert apart.norm() <= 1e-4 * covariance.norm()


def test_a_part_that_is_longer_than_a_program() -> None:
    """Values repeat across its chunks, with zeros of both signs: the earlier ones go left."""
    rows = max(CHUNKS) + 700
    x = torch.randint(-2, 3, (1, 1, 2, rows)).float() * torch.tensor([1.0, 0.4])[:, None]
    x[0, 0, :, ::7] *= -1
    names = torch.arange(rows, dtype=torch.int32)
    assert (x == 0).any() and x[x == 0].signbit().any()
    assert torch.equal(bisect(x, names, [1024]), oracles.bisect(x, names, 1024).int())


def test_rows_that_are_no_numbers_are_not_lost() -> None:
    x = torch.randn(1, 1, 2, 100)
    x[0, 0, :, 3], x[0, 0, 0, 5], x[0, 0, 1, 70] = float("nan"), float("inf"), -float("inf")
    found = bisect(x, torch.arange(100, dtype=torch.int32), [16])
    assert torch.equal(found.sort().values.flatten(), torch.arange(100, dtype=torch.int32))


@pytest.mark.parametrize("depth", [64, 128, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_grams_and_projection(dtype: torch.dtype, depth: int) -> None:
    blocks = Blocks.cut(GRIDS["337"], 16)
    x, basis = tokens(blocks, depth, dtype, batch=2), torch.randn(2, 2, depth, 6)
    x[0, 1, 20, 3], x[1, 0, 300, 5] = float("nan"), float("inf")
    order = torch.randperm(blocks.tokens)
    for view in layouts(x):
        for one, want in zip(grams(view, 3, 330), oracles.grams(x, 3, 330), strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=1e-3)
    for own in (None, order):
        found, want = project(x, basis, own, 5, 300), oracles.project(x, basis, own, 5, 300)
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)


def test_grams_of_several_slabs() -> None:
    x = torch.randn(1, 1, SLAB + 100, 16)
    found, want = grams(x, 0, SLAB + 100), oracles.grams(x, 0, SLAB + 100)
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("ordered", [False, True])
def test_orders_of_heads_are_those_of_torch(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks, and the same choice of each head between both orders."""
    grid = TokenGrid(3, 7, 9, text_tokens=13)
    cuts = Blocks.cut(grid, 32), Blocks.cut(grid, 16)
    line = torch.linspace(0, 9, grid.tokens)[:, None]
    shared = torch.sin(line * torch.randn(24)) * 3
    q, k, v = (torch.randn(2, 2, grid.tokens, 24) for _ in range(3))
    q[:, 0, :, 2:], k[:, 0, :, 2:] = 0, 0  # few dimensions: by content
    q[:, 1] += shared
    k[:, 1] += shared
    q[0, 0, 20, 1] = float("nan")
    base = None
    if ordered:
        base = torch.arange(grid.tokens)
        base[: grid.video_tokens] = torch.randperm(grid.video_tokens)
    draft = Draft(q, k, v, *cuts, base, base)
    want = content.head_orders(draft, grid, content.Params(tile=(2, 4, 4)))
    monkeypatch.setattr(
        support, "kernels", lambda name, x: import_module(f"vidsparse.kernels.gpu.{name}")
    )
    found = content.head_orders(Draft(q, k, v, *cuts, base, base), grid, content.Params())
    assert torch.equal(found[2], want[2]) and found[2].any() and not found[2].all()
    for one, other, size in zip(found[:2], want[:2], (32, 16), strict=True):
        assert one.dtype == torch.int64
        assert blocks_of(one, size) == blocks_of(other, size)


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.axes import main_axes
from vidsparse.kernels.gpu.bisect import bisect_kernel
from vidsparse.kernels.gpu.projection import grams, project
HEADS, N, D = 3, 130, 64
for head, token in ((D, 2**24), (2**30 + 1024, D)):  # the last tokens, the last head are far away
    memory = virtual((HEADS - 1) * head + (N - 1) * token + D, torch.float16)
    x = memory.as_strided((1, HEADS, N, D), (0, head, token, 1))
    x.copy_(torch.randn(x.shape))
    basis, order = torch.randn(1, HEADS, D, 4), torch.randperm(N)
    assert close(grams(x, 0, N)[0], oracles.grams(x, 0, N)[0])
    for own in (None, order):
        assert close(project(x, basis, own, 0, N), oracles.project(x, basis, own, 0, N))

rows, axes = 2**28, 4  # the first part of 2^21, two blocks of 64; the last group is far away
x, out = (virtual(3 * rows * axes, torch.float32).view(3, axes, rows) for _ in range(2))
own = x[2, :, :128].copy_(torch.randn(axes, 128))
names, into = virtual(rows, torch.int32), virtual(3 * rows, torch.int32)
names[:128] = torch.arange(128)
bisect_kernel[(1, 3)](x, names, out, into, rows, 64, 64, 3, axes, 21, 0, CHUNK=256, MOVE=True)
want = oracles.bisect(own[None, None], names[:128], 64).flatten()
assert torch.equal(into[2 * rows :][:128], want)
assert torch.equal(out[2, :, :128], own[:, want.long()])
""")
