"""None: all blocks score alike, for selectors that ask for no score. Nothing is read."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "none"
    kind: ClassVar[ScoreKind] = "rank"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False


def estimate(draft: Draft, params: Params) -> Scores:
    """Zeros [B, H, nq, nk] that share one number."""
    sizes = *draft.q.shape[:2], len(draft.q_blocks), len(draft.k_blocks)
    return Scores(torch.zeros(1, device=draft.q.device).expand(sizes), params.kind)
