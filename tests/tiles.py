"""Random input of `levels_forward`, and what it must give by the definition of its lists."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles
from vidsparse.kernels.gpu.operands import Keys, QueryRows, TileLists, Tiling

BLOCK_N = 64
TILES = 9
"""Of the key buffer: six of tokens, one of them ragged and one empty, three of pooled rows."""


@dataclass(frozen=True)
class Problem:
    """q [B, H, S, D] and the operands of `levels_forward`."""

    q: Tensor
    keys: Keys
    lists: TileLists
    rows: QueryRows
    shape: Tiling

    def outputs(self) -> tuple[Tensor, Tensor]:
        """out and lse to write into, full of NaN; out in the dtype of v."""
        batch, heads, tokens, depth = self.q.shape
        out = torch.full((batch, tokens, heads, depth), nan, dtype=self.keys.v.dtype)
        return out.transpose(1, 2), torch.full(self.q.shape[:3], nan)

    def expected(self) -> tuple[Tensor, Tensor]:
        """out and lse in float64, straight from the definition."""
        lists, keys = self.lists, self.keys
        packed = lists.entry, lists.bits, lists.count, lists.whole
        rows = oracles.named_rows(*packed, BLOCK_N, TILES * BLOCK_N)
        return oracles.levels_forward(self.q, keys.k, keys.v, keys.bias, rows, self.blocks)

    @property
    def blocks(self) -> Blocks:
        """The cut of the queries."""
        text = torch.zeros(len(self.rows.count), dtype=torch.bool)
        return Blocks(self.rows.start, self.rows.count.long(), text, self.rows.size)


def problem(
    depth: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = False,
    batch: int = 1,
    counts: tuple[int, ...] = (128, 43, 128, 1),
    block_m: int = 128,
    key_offset: float = 0.0,
) -> Problem:
    """Random lists with an empty and a full row, ragged tiles, pooled rows; q strided.

    counts: tokens of the query blocks; key_offset: added to every key.
    """
    heads, size = 2, max(64, *counts)
    shape = Tiling(block_m, BLOCK_N, 4, 2)
    total = sum(counts)
    q = torch.randn(batch, total, 3, heads, depth).to(dtype)[:, :, 1].transpose(1, 2)
    bias = torch.zeros(TILES * BLOCK_N)
    bias[3 * BLOCK_N - 27 : 3 * BLOCK_N] = float("-inf")  # ragged
    bias[5 * BLOCK_N : 6 * BLOCK_N] = float("-inf")  # empty
    bias[6 * BLOCK_N :] = torch.randint(1, 9, (3 * BLOCK_N,)).log2()
    bias[-5:] = float("-inf")
    padded = 64 if depth <= 64 else 128
    k, v = torch.zeros(2, batch, heads, TILES * BLOCK_N, padded)
    real = bias > float("-inf")
    for x, offset in ((k, key_offset), (v, 0.0)):
        x[:, :, real, :depth] = torch.randn(batch, heads, int(real.sum()), depth) + offset
    start = torch.tensor([sum(counts[:i]) for i in range(len(counts))])
    rows = QueryRows(start, torch.tensor(counts, dtype=torch.int32), size)
    lists = random_lists(batch * heads * len(counts), masked)
    return Problem(q, Keys(k.to(dtype), v.to(dtype), bias), lists, rows, shape)


def random_lists(rows: int, masked: bool) -> TileLists:
    """Each tile at most once, in any order; row 0 lists none, the last one all.

    masked: tiles with bits follow those without, of either kind none in some rows.
    """
    keep = torch.rand(rows, TILES) < 0.6
    keep[0], keep[-1] = False, True
    count = keep.sum(1).int()
    whole = (torch.rand(rows) * (count + 1)).int() if masked else count.clone()
    entry = torch.randint(0, TILES, (rows, TILES + 1), dtype=torch.int32)  # spares: valid tiles
    bits = torch.randint(-(2**62), 2**62, (rows, TILES + 1))
    for row in range(rows):
        tiles = keep[row].nonzero().flatten()
        tiles = tiles[torch.randperm(len(tiles))].int()
        shared = torch.arange(len(tiles)) >= whole[row]
        shift = torch.where(shared, torch.randint(0, 7, tiles.shape), 6).int()
        entry[row, : len(tiles)] = tiles | shift << 24
        blocks = 2 ** (6 - shift[shared].long())
        used = bits[row, : len(blocks)]
        used[blocks < 64] &= (1 << blocks[blocks < 64]) - 1
    return TileLists(entry, bits if masked else None, count, whole)


def assert_right(
    given: Problem, outputs: tuple[Tensor, Tensor], tolerance: float, lse_tolerance: float
) -> None:
    """Relative L2 of the output, absolute error of LSE, against float64."""
    (out, lse), (want, want_lse) = outputs, given.expected()
    empty = want_lse.isinf()
    assert empty.any() and not empty.all()
    assert torch.equal(lse == float("-inf"), empty)
    assert not out[empty].any()
    assert (out.double() - want).norm() <= tolerance * want.norm()
    assert ((lse.double() - want_lse)[~empty].abs() <= lse_tolerance).all()
