"""PISA's scores: the logit of the means, and how much a block's first-order term would matter.

    score_ij = s qbar_i . kbar_j + ln( |H_j|_F + 1e-5 ),   H_j = sum_{n in j} (k_n - kbar_j)^T v_n

A block whose keys and values vary together loses most by being read as a centroid. Source: PISA
(arXiv 2602.01077), `use_bias`. Costs a D x D product per token, and reads keys and values; the
logit alone is estimator `mean`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vidsparse import inside
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores

FLOOR = 1e-5
"""Of the norm, of which the logarithm is taken."""


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "covariance"
    kind: ClassVar[ScoreKind] = "rank"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True


def estimate(draft: Draft, params: Params) -> Scores:
    """Logarithms float32 [B, H, nq, nk], which compare inside a row alone. Formula above."""
    _, real = inside.slots(draft.k_blocks, draft.q.device)

    def norms(b: int, h: int) -> Tensor:
        means = draft.k_means.select(0, b).select(0, h).unsqueeze(1)
        centred = inside.keys(draft, b, h) - means
        centred = centred.masked_fill(real.logical_not().unsqueeze(-1), 0.0)
        moments: Tensor = centred.mT @ inside.values(draft, b, h)
        return moments.square().sum((1, 2)).sqrt()

    gain = (inside.by_head(draft, norms) + FLOOR).log()
    value = draft.logits + gain.float().unsqueeze(-2)
    return Scores(value, params.kind, logits=lambda: draft.logits)
