"""Top-k: the k best key blocks of every row are exact, k = max(min_blocks, floor(density * nk)).

Forced blocks are among the k; if they alone are more than k, all of them are kept.
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
    """min_blocks: exact blocks that every row gets at least, >= 1."""

    name: str = "topk"
    min_blocks: int = 1
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = True
    needs_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.min_blocks >= 1, "selector.min_blocks", self.min_blocks, "an integer >= 1")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]; exactly k (or the forced) blocks per row."""
    nk = len(k_blocks)
    k = min(nk, max(params.min_blocks, int(density * nk + 1e-9)))
    if forced.ndim == 2 and (triton := support.kernels("select", scores.value)):
        levels: Tensor = triton.select_topk(scores.value, forced, k)
        return levels
    ranked = scores.ranked(forced)
    keep = torch.zeros_like(scores.value, dtype=torch.bool).scatter_(-1, ranked[..., :k], True)
    return torch.where(keep | forced, 0, SKIP).to(torch.int8)
