"""Relative: the largest logit in a block pair, against a reference of its query.

    score_ij = max_{t in i} ( max_{n in j} s q_t . k_n - m_tj )

against "near": m_t is the largest logit of query t in the first key block and in those of its own
place (SALE). against "running": m_tj is the largest logit in the key blocks 0 .. j - 1, what an
online softmax holds before that tile (of j = 0 its own), so that score_ij < ln lambda is where
BLASST skips it, and what lifts a maximum is above 0, by as much as it does. All products
of queries and keys are made, those of SALE between numbers of `bits` bits with a scale for each
block: this says what such a rule reads, and saves nothing by itself. `selector.absdiff` with anchor
"zero" is the rule. Sources: SALE; BLASST, the skip-softmax of TensorRT-LLM. Costs half of a dense
call.
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

AGAINST = ("near", "running")


@dataclass(frozen=True)
class Params:
    """against: near | running. bits: of the numbers, 4 or 8; 0: as they are."""

    name: str = "relative"
    against: str = "near"
    bits: int = 0
    kind: ClassVar[ScoreKind] = "logit"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.against in AGAINST, "estimator.against", self.against, ", ".join(AGAINST))
        require(self.bits in (0, 4, 8), "estimator.bits", self.bits, "0, 4, 8")

    def products(self, block_q: int, block_k: int, heads: int) -> tuple[float, float]:
        """Scored pairs of all queries and keys, and numbers in each product by head dim."""
        return 1, 1


def estimate(draft: Draft, params: Params) -> Scores:
    """Differences of logits float32 [B, H, nq, nk]. Formula in the module docstring."""
    device = draft.q.device
    empty_q, empty_k = (
        inside.slots(blocks, device)[1].logical_not() for blocks in (draft.q_blocks, draft.k_blocks)
    )
    close = near(draft.q_blocks, draft.k_blocks, device)
    nothing = float("-inf")

    def one(b: int, h: int) -> Tensor:
        q, k = inside.queries(draft, b, h) * draft.scale, inside.keys(draft, b, h)
        if params.bits:
            q, k = rounded(q, params.bits), rounded(k, params.bits)
        found = []
        for some in inside.parts(q, q.shape[1] * k.shape[0] * k.shape[1]):
            own = q.narrow(0, *some)
            logits = (own.flatten(0, 1) @ k.flatten(0, 1).mT).unflatten(1, k.shape[:2])
            top = logits.masked_fill(empty_k, nothing).amax(-1).unflatten(0, own.shape[:2])
            if params.against == "running":
                before = top.cummax(-1).values.narrow(-1, 0, top.shape[-1] - 1)
                of_query = torch.cat([top.narrow(-1, 0, 1), before], -1)
            else:
                far = close.narrow(0, *some).logical_not().unsqueeze(1)
                of_query = top.masked_fill(far, nothing).amax(-1, keepdim=True)
            above = (top - of_query).masked_fill(empty_q.narrow(0, *some).unsqueeze(-1), nothing)
            found.append(above.amax(1))
        return torch.cat(found)

    return Scores(inside.by_head(draft, one).float(), params.kind)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Of x [n, size, D] with one scale for each block, the largest number the largest of `bits`."""
    most = 2 ** (bits - 1) - 1
    scale: Tensor = (x.abs().amax((1, 2), keepdim=True) / most).clamp(min=1e-30)
    return (x / scale).round() * scale


@lru_cache(maxsize=16)
def near(q_blocks: Blocks, k_blocks: Blocks, device: torch.device) -> Tensor:
    """bool [nq, nk]: the first key block, and those that share a place with the query block."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        q_end, k_end = (x.start + x.count for x in (q_blocks, k_blocks))
        found = (q_blocks.start[:, None] < k_end) & (k_blocks.start < q_end[:, None])
        found[:, 0] = True
        return found.to(device)
