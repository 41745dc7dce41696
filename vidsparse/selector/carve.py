"""Carve: the blocks that hold the mass p of a row, and at least a share `schedule.density` of them.

    n_i = max( #{n: mass of the n best <= p} + 1,  floor(density nk) )

of the n_i blocks of most mass, n_j exp(score_ij), over the nk key blocks of the video: text has no
part in the mass nor in the count, being exact (`force.text`). Source: Jenga's AttenCarve (arXiv
2505.16864), where 1 - density is the drop rate. Flat rows take more than the share: the report says
how much.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.plan import SKIP, Scores


@dataclass(frozen=True)
class Params:
    """p: mass to reach, in (0, 1]."""

    name: str = "carve"
    p: float = 0.3
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, "selector.p", self.p, "a number in (0, 1]")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]; forced blocks rank first, and their mass counts."""
    text = k_blocks.on(scores.value.device).text
    nothing = 0.0 if scores.kind == "mass" else float("-inf")
    scores = replace(scores, value=scores.value.masked_fill(text, nothing))
    video = int((~k_blocks.text).sum())
    mass = scores.mass(k_blocks).double().nan_to_num(0.0)
    ranked = scores.weighted(k_blocks).ranked(forced)
    reached = mass.gather(-1, ranked).cumsum(-1) <= params.p * mass.sum(-1, keepdim=True)
    wanted = reached.sum(-1, keepdim=True).add_(1).clamp_(min=int(density * video + 1e-9))
    rank = torch.arange(len(k_blocks), device=mass.device)
    keep = torch.zeros_like(reached).scatter_(-1, ranked, rank < wanted)
    return torch.where(keep | forced, 0, SKIP).to(torch.int8)
