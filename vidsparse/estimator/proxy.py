"""ProxyAttn's scores: the largest logit of a block pair, of a few proxy heads for all.

    score_ij = max_{t in i, n in j} s qhat_t . khat_n,   qhat, khat: means over the heads of a group

over every `stride`-th token. All heads of a group rank blocks alike; how many of them a head reads
follows from its own block means (`selector.greedy` with reserve 0). It is good where heads agree,
and those of video models often do not. Groups are consecutive heads, as
equal in number as they can be. Source: ProxyAttn. Costs
groups / (2 heads stride^2) of a dense call.
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
    """groups: of heads that share a proxy, >= 1, at most as many as there are heads. stride: of
    that many tokens one is read, 1 .. 64."""

    name: str = "proxy"
    groups: int = 1
    stride: int = 4
    kind: ClassVar[ScoreKind] = "rank"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.groups >= 1, "estimator.groups", self.groups, "an integer >= 1")
        require(1 <= self.stride <= 64, "estimator.stride", self.stride, "an integer 1 .. 64")

    def products(self, block_q: int, block_k: int, heads: int) -> tuple[float, float]:
        """Scored pairs of all queries and keys, and numbers in each product by head dim."""
        return min(self.groups, heads) / heads / self.stride**2, 1


def estimate(draft: Draft, params: Params) -> Scores:
    """Logits float32 [B, H, nq, nk] of the proxies, which compare inside a row alone."""
    heads, device = draft.q.shape[1], draft.q.device
    q_token, k_token = (
        every(blocks, params.stride, device) for blocks in (draft.q_blocks, draft.k_blocks)
    )
    wide = torch.float64 if draft.q.dtype == torch.float64 else torch.float32
    shared = draft.order_q is None or draft.order_q.ndim == 1
    members = [*torch.arange(heads).tensor_split(min(params.groups, heads))]
    found = []
    for part in members:
        some = int(part[0]), len(part)
        means = (x.narrow(1, *some).mean(1, keepdim=True, dtype=wide) for x in (draft.q, draft.k))
        q, k = (x.expand(-1, heads, -1, -1) for x in means)
        for h in [some[0]] if shared else part.tolist():
            ranked = [
                _largest(
                    inside.head(q, draft.order_q, b, h, q_token) * draft.scale,
                    inside.head(k, draft.order_k, b, h, k_token),
                )
                for b in range(draft.q.shape[0])
            ]
            found += [torch.stack(ranked)] * (len(part) if shared else 1)
    value = torch.stack(found, 1).float()
    return Scores(value, params.kind, logits=lambda: draft.logits)


@lru_cache(maxsize=32)
def every(blocks: Blocks, stride: int, device: torch.device) -> Tensor:
    """int64 [n, m]: every stride-th token of a block, its first one where it has no such."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        place = torch.arange(0, blocks.size, stride)
        token = blocks.start[:, None] + place * (place < blocks.count[:, None])
        return token.to(device)


def _largest(q: Tensor, k: Tensor) -> Tensor:
    """[nq, nk] of q [nq, m, D], scaled, and k [nk, m, D]."""
    found = []
    for place in inside.parts(q, q.shape[1] * k.shape[0] * k.shape[1]):
        some = q.narrow(0, *place)
        logits = (some.flatten(0, 1) @ k.flatten(0, 1).mT).unflatten(1, k.shape[:2])
        found.append(logits.amax(-1).unflatten(0, some.shape[:2]).amax(1))
    return torch.cat(found)
