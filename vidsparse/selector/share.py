"""Share: the blocks with a share of the gates of their row, or of the whole head.

With g_ij the scores, scaled to 0 .. 1 over the scope (row i, or all rows of the head),

    forced blocks, then others by falling g while what is kept has less than `tau` of sum g

What is shared is no mass: gates of a flat row are as wide as those of a peaky one. Over a head,
queries whose gates stand out take more blocks than others. Source: VMoBA (arXiv 2506.23858), with
blocks of queries where it gates tokens; forced blocks that have the share leave nothing to choose.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.plan import SKIP, Scores

SCOPES = ("row", "head")


@dataclass(frozen=True)
class Params:
    """tau: share to reach, in (0, 1]. scope: row | head. `schedule.density` caps the scope."""

    name: str = "share"
    tau: float = 0.25
    scope: str = "row"
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 < self.tau <= 1, "selector.tau", self.tau, "a number in (0, 1]")
        require(self.scope in SCOPES, "selector.scope", self.scope, ", ".join(SCOPES))


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]; the best block of every row, if none is forced."""
    value = scores.value.double().nan_to_num(0.0)
    first = forced.expand(value.shape)
    if params.scope == "head":
        value, first = (x.flatten(-2).unsqueeze(-2) for x in (value, first))
    least = value.amin(-1, keepdim=True)
    gate = (value - least) / (value.amax(-1, keepdim=True) - least).clamp(min=1e-30)
    ranked = Scores(gate, scores.kind).ranked(first)
    ordered = gate.gather(-1, ranked)
    before = ordered.cumsum(-1) - ordered
    cells = value.shape[-1]
    rank = torch.arange(cells, device=value.device)
    wanted = before < params.tau * gate.sum(-1, keepdim=True) - 1e-12
    wanted = wanted & (rank < max(1, int(density * cells + 1e-9)))
    keep = torch.zeros_like(wanted).scatter_(-1, ranked, wanted).view(scores.value.shape)
    best = scores.value.nan_to_num(0.0).argmax(-1, keepdim=True)
    empty = (keep | forced).sum(-1, keepdim=True) == 0
    alone = torch.arange(len(k_blocks), device=value.device) == best
    return torch.where(keep | forced | (empty & alone), 0, SKIP).to(torch.int8)
