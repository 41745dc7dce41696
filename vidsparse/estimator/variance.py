"""Draft attention with the variance inside the blocks: score_ij = s qbar_i . kbar_j + spread_ij.

The mean of exp(s q . k) over the keys of a block is exp of the mean logit and half of its variance,
to second order; `spread` is that half, at most `bound` of it: far from the mean the expansion says
nothing (formula in `vidsparse.draft`). A block of few hot keys among cold ones is seen, at the
price of a second moment of q and of k.
"""

from dataclasses import dataclass
from typing import ClassVar

from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """bound: largest spread that is added, > 0 (natural log)."""

    name: str = "variance"
    bound: float = 2.0
    kind: ClassVar[ScoreKind] = "logit"
    spread: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.bound > 0, "estimator.bound", self.bound, "a number > 0")


def estimate(draft: Draft, params: Params) -> Scores:
    """Logits float32 [B, H, nq, nk]. Formula in the module docstring."""
    if draft.in_triton:
        return Scores(draft.in_one_pass("variance", params.bound), params.kind)
    return Scores(draft.logits + draft.spread.clamp(max=params.bound), params.kind)
