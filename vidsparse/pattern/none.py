"""None: no block is exact for its place alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.places import Places
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "none"
    of_video: ClassVar[bool] = False


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself."""
    return (params,)


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """Nothing."""
    return torch.zeros(len(places.q_blocks), len(places.k_blocks), dtype=torch.bool)


def phase(context: StepContext | None, params: Params) -> int:
    """The same always."""
    return 0
