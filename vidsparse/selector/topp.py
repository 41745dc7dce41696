"""Top-p: the smallest set of key blocks that reaches the mass p of a row is exact.

Source: SVG2 (arXiv 2505.18875), XAttention (arXiv 2503.16428). Peaky rows take few blocks, flat
rows many; `schedule.density` caps a row, so that the cost is bounded.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.kernels.gpu import support
from vidsparse.plan import SKIP, Scores


@dataclass(frozen=True)
class Params:
    """p: mass to reach, in (0, 1]. min_blocks: exact blocks that every row gets at least, >= 1."""

    name: str = "topp"
    p: float = 0.9
    min_blocks: int = 1
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, "selector.p", self.p, "a number in (0, 1]")
        require(self.min_blocks >= 1, "selector.min_blocks", self.min_blocks, "an integer >= 1")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]. Forced blocks come first and their mass counts."""
    nk = len(k_blocks)
    cap = max(params.min_blocks, int(density * nk + 1e-9))
    if triton := support.kernels("select", scores.value):
        count = k_blocks.on(scores.value.device).count
        levels: Tensor = triton.select_topp(
            scores.value, scores.kind, forced, count, params.p, params.min_blocks, cap
        )
        return levels
    mass = scores.mass(k_blocks).double().nan_to_num(0.0)
    ranked = scores.ranked(forced)
    before = mass.gather(-1, ranked).cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    rank = torch.arange(nk, device=mass.device)
    wanted = before < params.p * mass.sum(-1, keepdim=True) - 1e-12
    wanted = ((rank < params.min_blocks) | wanted) & (rank < cap)
    keep = torch.zeros_like(wanted).scatter_(-1, ranked, wanted)
    return torch.where(keep | forced, 0, SKIP).to(torch.int8)
