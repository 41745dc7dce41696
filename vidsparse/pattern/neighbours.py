"""Neighbours: blocks with a token that touches one of the query block, corners included.

Source: Jenga's AttenCarve (arXiv 2505.16864), the 26 neighbours of a voxel along its curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.places import Places
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "neighbours"
    of_video: ClassVar[bool] = True


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself."""
    return (params,)


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """bool [nq, nk]: the volume of key blocks, shifted by each step to a neighbour."""
    video = places.raster >= 0
    owners = []
    for cut in (places.q_blocks, places.k_blocks):
        volume = torch.empty(places.grid.video_tokens, dtype=torch.int64)
        volume[places.raster[video]] = cut.owner[video]
        owners.append(volume.view(places.sizes))
    out = torch.zeros(len(places.q_blocks), len(places.k_blocks), dtype=torch.bool)
    for step in product((-1, 0, 1), repeat=3):
        here, there = (
            tuple(
                slice(max(0, d * sign), n + min(0, d * sign))
                for d, n in zip(step, places.sizes, strict=True)
            )
            for sign in (-1, 1)
        )
        out[owners[0][here].flatten(), owners[1][there].flatten()] = True
    return out


def phase(context: StepContext | None, params: Params) -> int:
    """The same always."""
    return 0
