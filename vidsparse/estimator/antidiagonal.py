"""XAttention's scores: softmax over strided antidiagonals, summed over blocks.

Every `stride` = S consecutive tokens of a block are a group. The logit of a query group a and a key
group b is the mean over the antidiagonal of their S x S products,

    X_ab = 1 / (S sqrt(D)) sum_m q_(a, S-1-m) . k_(b, m)

which meets every row and every column once. Mass is softmax over the key groups, summed over those
of a block, mean over the query groups. A last group of r < S tokens repeats them, and weighs r / S.
Source: XAttention (arXiv 2503.16428). Costs 1 / (2S) of a dense call, and a softmax of N/S x N/S.
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

STRIDES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Params:
    """stride: tokens in a group, 1, 2, 4, 8, 16 or 32."""

    name: str = "antidiagonal"
    stride: int = 8
    kind: ClassVar[ScoreKind] = "mass"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        allowed = ", ".join(map(str, STRIDES))
        require(self.stride in STRIDES, "estimator.stride", self.stride, allowed)

    def products(self, block_q: int, block_k: int, heads: int) -> tuple[float, float]:
        """Scored pairs of all queries and keys, and numbers in each product by head dim."""
        return 1 / self.stride**2, self.stride


def estimate(draft: Draft, params: Params) -> Scores:
    """Mass float32 [B, H, nq, nk]. Formula in the module docstring."""
    stride, device = params.stride, draft.q.device
    q_token, q_weight = groups(draft.q_blocks, stride, True, device)
    k_token, k_weight = groups(draft.k_blocks, stride, False, device)
    scale = draft.scale / stride

    def mass(b: int, h: int) -> Tensor:
        q = inside.head(draft.q, draft.order_q, b, h, q_token).flatten(2) * scale
        k = inside.head(draft.k, draft.order_k, b, h, k_token).flatten(2)
        found = []
        for some in inside.parts(q, q.shape[1] * k.shape[0] * k.shape[1]):
            logits = q.narrow(0, *some).flatten(0, 1) @ k.flatten(0, 1).mT
            weight = torch.softmax(logits + k_weight.to(logits).log().flatten(), -1)
            weight = weight.unflatten(1, k_weight.shape).sum(-1)
            share = q_weight.narrow(0, *some).to(weight)
            share = share / share.sum(-1, keepdim=True)
            found.append((weight.unflatten(0, share.shape) * share.unsqueeze(-1)).sum(1))
        return torch.cat(found)

    return Scores(inside.by_head(draft, mass).float(), params.kind)


@lru_cache(maxsize=32)
def groups(
    blocks: Blocks, stride: int, backwards: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """int64 [n, G, S], float32 [n, G]: the tokens of every group, and r / S; 0 of one that a short
    block does not have."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        first = torch.arange(0, max(blocks.size, stride), stride)
        real = (blocks.count[:, None] - first).clamp(0, stride)
        place = torch.arange(stride)
        place = (stride - 1 - place if backwards else place) % real.clamp(min=1).unsqueeze(-1)
        start = blocks.start[:, None] + first * (real > 0)
        return (start.unsqueeze(-1) + place).to(device), (real / stride).to(device)
