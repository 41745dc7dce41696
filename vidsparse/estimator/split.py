"""Split: block means for the video, single tokens for the text (IPAR).

    mass_ij = softmax over the video blocks, s qbar_i . kbar_j + ln n_j, and the text tokens,
              s qbar_i . k_n, of which those of a block are summed

A mean of text says little of it, and what it says wrongly is missing from the video. Source:
Rectified SpaAttn, isolated-pooling attention reallocation. Costs a product with the text more than
block means.
"""

from dataclasses import dataclass
from typing import ClassVar

from vidsparse import inside
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "split"
    kind: ClassVar[ScoreKind] = "logit"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False


def estimate(draft: Draft, params: Params) -> Scores:
    """Logits float32 [B, H, nq, nk], of which `mass` is that above."""
    count = draft.k_blocks.on(draft.q.device).count
    value = inside.split_logits(draft)
    return Scores(value - count.to(value).log(), params.kind)
