"""Error from moments: what a row is expected to lose if a block gave only its tilted centroid.

If the logits of a block are normal with variance 2 c_ij and know nothing of its values, then

    score_ij = 2 (s qbar_i . kbar_j + c_ij) + ln n_j + ln( e^(2 c_ij) mean|v|^2 - |vbar_j|^2 )

is the logarithm of E sum_{n in j} |exp(a_n) v_n - E[exp(a_n)] vbar_j|^2, the error of `ear` with
the mass that compensation `tilt` gives; c_ij = min(bound, spread_ij) (`vidsparse.draft`). It ranks
blocks about as well as `ear` and costs what block means cost: nothing is read for a single row.
"""

from dataclasses import dataclass
from typing import ClassVar

from vidsparse.config import require
from vidsparse.draft import TINY, Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """bound: largest spread that is believed, in (0, 20] (natural log)."""

    name: str = "moments"
    bound: float = 2.0
    kind: ClassVar[ScoreKind] = "rank"
    spread: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 < self.bound <= 20, "estimator.bound", self.bound, "a number in (0, 20]")


def estimate(draft: Draft, params: Params) -> Scores:
    """Logarithms float32 [B, H, nq, nk], which compare inside a row alone. Formula above."""
    if draft.in_triton:
        found = draft.in_one_pass("moments", params.bound, TINY)
        return Scores(found, params.kind, logits=lambda: draft.logits)
    norms, squares = draft.value_norms
    spread = draft.spread.clamp(max=params.bound)
    count = draft.k_blocks.on(draft.q.device).count.to(spread)
    around = (2 * spread).exp() * squares.unsqueeze(-2) - norms.unsqueeze(-2)
    error = around.clamp(min=TINY).log() + count.log()
    value = (error + 2 * (draft.logits + spread)).float()
    return Scores(value, params.kind, logits=lambda: draft.logits)
