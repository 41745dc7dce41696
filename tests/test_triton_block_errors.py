"""Errors of centroids block by block against float64, in Triton's CPU interpreter.

    TRITON_INTERPRET=1 pytest tests/test_triton_block_errors.py

in a process of its own: what is interpreted there cannot be compiled later.
"""

import os
from importlib import import_module

import pytest
import torch

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import far
from cuts import GRIDS, assert_close, layouts, table, tokens
from torch import Tensor

from vidsparse.draft import Draft
from vidsparse.estimator import ear
from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.block_errors import block_errors

pytestmark = pytest.mark.interp

TINY = 1e-37


def errors(q: Tensor, k: Tensor, v: Tensor, cuts: tuple[Blocks, Blocks], order=None) -> Tensor:
    means = oracles.block_means(q, cuts[0].start, cuts[0].count).float()
    return block_errors(means, k, v, *table(cuts[1]), order, q.shape[3] ** -0.5, TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [64, 128, 40])
@pytest.mark.parametrize("grids", [("text-first", "337"), ("337", "text-last")], ids=str)
def test_against_the_definition(grids: tuple[str, str], depth: int, dtype: torch.dtype) -> None:
    """Ragged blocks, text, a batch of 2; rows past a program's tile. The last block has a token
    alone, of which a centroid loses nothing."""
    cuts = Blocks.cut(GRIDS[grids[0]], 16), Blocks.cut(GRIDS[grids[1]], 16)
    q, k, v = (tokens(blocks, depth, dtype, batch=2) for blocks in (*cuts, cuts[1]))
    found, wanted = errors(q, k, v, cuts), oracles.block_errors(q, k, v, *cuts)
    assert found.dtype == torch.float32 and found.is_contiguous()
    single = cuts[1].count == 1
    assert bool((found[..., single] < wanted[..., ~single].min() - 5).all())
    assert_close(found[..., ~single], wanted[..., ~single], 1e-5, 1e-3)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_blocks_of_every_size_in_any_order_of_memory_and_tokens(size: int) -> None:
    blocks = Blocks.cut(GRIDS["text-first"], size)
    q, k, v = (tokens(blocks, 64) for _ in range(3))
    order = torch.stack([torch.randperm(blocks.tokens) for _ in range(2)]).unsqueeze(0)
    moved = [x.gather(2, order.unsqueeze(-1).expand_as(x)) for x in (k, v)]
    wanted = oracles.block_errors(q, *moved, blocks, blocks)
    for keys, values in zip(layouts(k), layouts(v), strict=True):
        assert_close(errors(q, keys, values, (blocks, blocks), order), wanted, 1e-5, 1e-3)
    one = order[0, 0]
    wanted = oracles.block_errors(q, k[:, :, one], v[:, :, one], blocks, blocks)
    assert_close(errors(q, k, v, (blocks, blocks), one), wanted, 1e-5, 1e-3)


def test_logits_of_any_size_neither_overflow_nor_vanish() -> None:
    blocks = Blocks.cut(GRIDS["337"], 16)
    q, k, v = (tokens(blocks, 64) for _ in range(3))
    found = errors(40 * q, 10 * k, v, (blocks, blocks))
    assert found.isfinite().all() and float(found.max() - found.min()) > 400


def test_what_is_not_finite_stays_in_its_row_or_block() -> None:
    blocks = Blocks.cut(GRIDS["text-first"], 32)
    q, k, v = (tokens(blocks, 64) for _ in range(3))
    clean = errors(q, k, v, (blocks, blocks))
    for x, spoilt in ((q, (0, 1, 3)), (k, (0, 1, slice(None), 3)), (v, (0, 1, slice(None), 3))):
        kept = float(x[0, 1, 100, 3])
        x[0, 1, 100, 3] = float("nan")
        found = errors(q, k, v, (blocks, blocks))
        row = list(spoilt)
        row[-1] = int(blocks.owner[100])
        assert found[tuple(row)].isnan().all()
        found[tuple(row)] = clean[tuple(row)]
        assert torch.equal(found, clean)
        x[0, 1, 100, 3] = kept


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_estimator_ranks_blocks_as_in_torch(
    monkeypatch: pytest.MonkeyPatch, gamma: float
) -> None:
    """Its logarithms less those of the plain errors are the same in a row."""
    cuts = Blocks.cut(GRIDS["text-last"], 32), Blocks.cut(GRIDS["text-last"], 16)
    q, k, v = (tokens(cuts[0], 64) for _ in range(3))
    order = torch.stack([torch.randperm(cuts[0].tokens) for _ in range(2)]).unsqueeze(0)
    params = ear.Params(gamma=gamma)
    wide = Draft(*(x.double() for x in (q, k, v)), *cuts, order, order)
    wanted = ear.estimate(wide, params).value.double().log()
    monkeypatch.setattr(
        support, "kernels", lambda name, x: import_module(f"vidsparse.kernels.gpu.{name}")
    )
    found = ear.estimate(Draft(q, k, v, *cuts, order, order), params).value
    apart = found.double() - wanted
    full = cuts[1].count > 1
    assert float(apart[..., full].std(-1).max()) < 1e-3


def test_offsets_past_2_31_elements() -> None:
    far.assert_passes("""
from vidsparse.kernels.gpu.block_errors import block_errors_kernel
from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
D, blocks = 64, Blocks.cut(TokenGrid(1, 1, 64), 64)
tokens = 2**25 + 64  # of a head; a program reads the last 64
k, v = (virtual(4 * tokens * D, torch.float32) for _ in range(2))
a, b = (x[(4 * tokens - 64) * D :].view(64, D).copy_(torch.randn(64, D)) for x in (k, v))
rows = 2**25  # query blocks of a head
q = virtual((3 * rows + 64) * D, torch.float32)
c = q[3 * rows * D :].view(64, D).copy_(torch.randn(64, D))
out = virtual(3 * rows + 64, torch.float32)
start, count = torch.tensor([tokens - 64]), torch.tensor([64], dtype=torch.int32)
block_errors_kernel[(1, 1, 4)](
    q, k, v, start, count, start, out, 4 * tokens * D, tokens * D, D, 4 * tokens * D, tokens * D, D,
    0, D**-0.5, 1e-37, 4, rows, 1, D=D, DP=D, SIZE=64, BM=64, BK=32, ORDERED=False, STAGES=2,
    WHOLE=False,
)
exact = (c.double() @ a.double().T * D**-0.5).exp().unsqueeze(-1) * b.double()
middle = (c.double() @ a.double().mean(0) * D**-0.5).exp()[:, None, None] * b.double().mean(0)
want = (exact - middle).square().sum((1, 2)).log()
assert close(out[3 * rows :], want)
""")
