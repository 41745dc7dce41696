"""Made-up heads: fields that are smooth over the video and fill a given number of dimensions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vidsparse.grid import TokenGrid

SHARPNESS = 1.5
"""Standard deviation of the numbers of q and k: rows look at a few per cent of the video."""


def field(grid: TokenGrid, rank: int, depth: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v float32 [S, D] of a video without text: `rank` smooth maps, mixed into D numbers.

    Each map is white noise under a blur of about three tokens, so neighbours are alike, and tokens
    that are far apart are as alike as chance and the rank make them.
    """
    generator = torch.Generator().manual_seed(seed)
    size = grid.frames, grid.height, grid.width
    made = []
    for gain in (SHARPNESS, SHARPNESS, 1.0):
        x = torch.randn(1, rank, *size, generator=generator)
        for _ in range(2):
            x = functional.avg_pool3d(functional.pad(x, (1,) * 6, "replicate"), 3, 1)
        rows = x.flatten(2)[0].T @ torch.randn(rank, depth, generator=generator)
        made.append(gain * rows / rows.std())
    return made[0], made[1], made[2]
