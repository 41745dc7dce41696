"""Peak: the largest logit of the mean query against the pieces of a key block.

    score_ij = max_m s qbar_i . kbar_jm,   kbar_jm: mean of the m-th of `pieces` equal parts of j

A few hot keys among cold ones are seen where the mean of the block is not. It is what block
granularity makes of AnchorAttention's scores of single keys. Costs `pieces` times block means.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vidsparse import inside
from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """pieces: of a key block, 1, 2, 4, 8 or 16 (tokens of a block / pieces >= 1)."""

    name: str = "peak"
    pieces: int = 4
    kind: ClassVar[ScoreKind] = "logit"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ok = self.pieces in (1, 2, 4, 8, 16)
        require(ok, "estimator.pieces", self.pieces, "1, 2, 4, 8, 16")

    def products(self, block_q: int, block_k: int, heads: int) -> tuple[float, float]:
        """Scored pairs of all queries and keys, and numbers in each product by head dim."""
        return self.pieces / (block_q * block_k), 1


def estimate(draft: Draft, params: Params) -> Scores:
    """Logits float32 [B, H, nq, nk]. Formula in the module docstring."""
    means, real = inside.pieces(draft, params.pieces)
    logits = torch.matmul(draft.q_means * draft.scale, means.flatten(2, 3).mT)
    logits = logits.unflatten(-1, real.shape).masked_fill(real.logical_not(), float("-inf"))
    return Scores(logits.amax(-1).float(), params.kind)
