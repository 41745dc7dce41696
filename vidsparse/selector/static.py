"""Static: the forced blocks and no others, those of the pattern among them; scores are not asked.

What a row costs is what the pattern holds, whatever `schedule.density` says: patterns whose size is
left to the budget follow it, and others are refused where they cost more
(`vidsparse.geometry.patterned`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.plan import SKIP, Scores


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "static"
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = False


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]."""
    kept = forced.expand(scores.value.shape)
    return torch.where(kept, 0, SKIP).to(torch.int8, memory_format=torch.contiguous_format)
