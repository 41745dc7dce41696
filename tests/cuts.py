"""Cuts of token grids, random tokens, and both as the kernels around the forward take them."""

from __future__ import annotations

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid

GRIDS = {
    "337": TokenGrid(1, 1, 337),
    "text-first": TokenGrid(2, 9, 13, 41, True),
    "text-last": TokenGrid(2, 9, 13, 41),
    "one-token": TokenGrid(1, 1, 1),
}


def tokens(
    blocks: Blocks, depth: int, dtype: torch.dtype = torch.float32, batch: int = 1
) -> Tensor:
    """[B, 2, S, D], a view of [B, S, 2, D] memory."""
    return (torch.randn(batch, blocks.tokens, 2, depth) + 0.5).to(dtype).transpose(1, 2)


def layouts(x: Tensor) -> tuple[Tensor, ...]:
    """x with its elements elsewhere in memory: contiguous, with gaps, transposed."""
    doubled = torch.cat([x, x], -1)[..., x.shape[3] :], torch.cat([x, x], 1)[:, x.shape[1] :]
    return x, x.contiguous(), *doubled, x.mT.contiguous().mT


def table(blocks: Blocks) -> tuple[Tensor, Tensor, int]:
    """start, count and size as the kernels take them."""
    return blocks.start, blocks.count.int(), blocks.size


def pieces(blocks: Blocks, sub: int) -> tuple[Tensor, Tensor, int]:
    """The table of `sub` pieces to every block, missing ones of no token."""
    size = blocks.size // sub
    start = blocks.start[:, None] + torch.arange(sub) * size
    count = ((blocks.start + blocks.count)[:, None] - start).clamp(0, size)
    return start.flatten(), count.flatten().int(), size


def assert_close(found: Tensor, wanted: Tensor, relative: float, absolute: float = 1e-6) -> None:
    """Of every element; the bound is for rounding, so a thousandth is added."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs()
    assert (error <= 1.001 * relative * wanted.abs() + absolute).all(), error.max()
