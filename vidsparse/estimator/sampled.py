"""PSA's scores: the largest weight among sampled tokens of a block pair, as a share of its row.

    m_t  = max_u s q_t . k_u                      over all sampled keys u
    A_ij = max_{t in i, u in j} exp(s q_t . k_u - m_t),   score_ij = A_ij / sum_j A_ij

Of every block the same `1 / share` of its places is sampled, drawn once per head from `seed`; where
a short block has no such place, it counts on from its first token. It is no mass: boundaries that
were set for it do not carry over to other estimators.

`similarity`: how far a key block may be pooled. Level l is allowed if the first and the last of
every 2^l consecutive keys have a mean cosine above similarity[l - 1], and all finer levels are
allowed. Source: PSA (arXiv 2512.04025). Costs 1 / (2 share^2) of a dense call.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import inside
from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """share: of that many tokens one is sampled, 1 .. 64. seed: of the places. similarity: least
    cosine for level 1, 2, ..., in [-1, 1]; none: every level is allowed."""

    name: str = "sampled"
    share: int = 4
    seed: int = 0
    similarity: tuple[float, ...] = ()
    kind: ClassVar[ScoreKind] = "mass"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "similarity", tuple(self.similarity))
        require(1 <= self.share <= 64, "estimator.share", self.share, "an integer 1 .. 64")
        ok = len(self.similarity) <= 9 and all(-1 <= x <= 1 for x in self.similarity)
        allowed = "at most 9 numbers in [-1, 1], of level 1, 2, ..."
        require(ok, "estimator.similarity", self.similarity, allowed)

    def products(self, block_q: int, block_k: int, heads: int) -> tuple[float, float]:
        """Scored pairs of all queries and keys, and numbers in each product by head dim."""
        return 1 / self.share**2, 1


def estimate(draft: Draft, params: Params) -> Scores:
    """Shares float32 [B, H, nq, nk], and the levels that similarity allows. Formula above."""
    device, heads = draft.q.device, draft.q.shape[1]
    places = [
        sampled(blocks, heads, params.share, params.seed, device)
        for blocks in (draft.q_blocks, draft.k_blocks)
    ]

    def shares(b: int, h: int) -> Tensor:
        q = inside.head(draft.q, draft.order_q, b, h, places[0].select(0, h)) * draft.scale
        k = inside.head(draft.k, draft.order_k, b, h, places[1].select(0, h))
        found = []
        for place in inside.parts(q, q.shape[1] * k.shape[0] * k.shape[1]):
            some = q.narrow(0, *place)
            logits = (some.flatten(0, 1) @ k.flatten(0, 1).mT).unflatten(1, k.shape[:2])
            logits = logits.amax(-1)
            logits = logits - logits.amax(-1, keepdim=True)
            weight = logits.unflatten(0, some.shape[:2]).amax(1).exp()
            found.append(weight / weight.sum(-1, keepdim=True))
        return torch.cat(found)

    value = inside.by_head(draft, shares).float()
    if not params.similarity:
        return Scores(value, params.kind)
    coarsest = inside.by_head(draft, lambda b, h: _coarsest(draft, params.similarity, b, h))
    return Scores(value, params.kind, coarsest=coarsest)


@lru_cache(maxsize=32)
def sampled(blocks: Blocks, heads: int, share: int, seed: int, device: torch.device) -> Tensor:
    """int64 [heads, n, max(1, size // share)]: the sampled places of every block."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.rand(heads, blocks.size, generator=generator, device="cpu").argsort(-1)
        offset = drawn[:, : max(1, blocks.size // share)].sort(-1).values.unsqueeze(1)
        token = blocks.start[:, None] + offset % blocks.count[:, None]
        return token.to(device)


def _coarsest(draft: Draft, similarity: tuple[float, ...], b: int, h: int) -> Tensor:
    """int8 [nk]: the last level up to which a block may be pooled."""
    _, real = inside.slots(draft.k_blocks, draft.q.device)
    unit = torch.nn.functional.normalize(inside.keys(draft, b, h), dim=-1)
    allowed = torch.ones(len(unit), dtype=torch.int8, device=unit.device)
    found = torch.zeros_like(allowed)
    for level, least in enumerate(similarity[: draft.k_blocks.levels], 1):
        width = 2**level
        groups = unit.unflatten(1, (-1, width))
        both = real.unflatten(1, (-1, width)).select(2, -1)
        cosine = (groups.select(2, 0) * groups.select(2, -1)).sum(-1)
        cosine = cosine.masked_fill(both.logical_not(), 0.0)
        count = both.sum(-1)
        enough = (cosine.sum(-1) > least * count) & (count > 0)
        allowed = allowed * enough.to(torch.int8)
        found = found + allowed
    return found
