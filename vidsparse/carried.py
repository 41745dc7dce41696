"""Carried: what sparse calls take over from earlier steps of a run (`vidsparse.config.Keep`).

residual  R = O_dense - O_sparse of the last dense step before sparse ones; in these O_sparse + R.
tail      a call lists blocks E; at its first step what all others X give is computed too, and for
          some steps it stays while E is read anew:

              m = max(L_E, L_X),  w = exp(L - m),  O = (w_E O_E + w_X O_X) / (w_E + w_X)

          with L the LSE of both parts, which share no key as long as E is the same.

Source of the merge: FlashBlock; of the residual: ours. Both hold where attention moves slowly from
step to step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidsparse.config import Keep, SparseConfig
from vidsparse.decision import scheduled
from vidsparse.grid import TokenGrid
from vidsparse.memory import Recall
from vidsparse.plan import SKIP, BlockPlan, StepContext


@dataclass(frozen=True)
class Tail:
    """plan: what is read anew. ordered: of `AttentionResult`. out [B, H, S, D], lse [B, H, S]: of
    all that the plan does not list."""

    plan: BlockPlan
    ordered: Tensor | None
    out: Tensor
    lse: Tensor | None


def wants_tail(recall: Recall | None, keep: Keep) -> bool:
    """Whether calls merge one."""
    return recall is not None and keep.tail > 1


def tail_of(recall: Recall | None, keep: Keep, form: tuple[object, ...]) -> Tail | None:
    """The tail that a call merges, None if it makes a new one, or none."""
    if recall is None or keep.tail == 1:
        return None
    found: Tail | None = recall.find("tail", form, keep.tail)
    return found


def complement(plan: BlockPlan) -> BlockPlan:
    """The blocks that a plan does not list, exact."""
    levels = torch.where(plan.levels == SKIP, 0, SKIP).to(torch.int8)
    return replace(plan, levels=levels, listed=(0,))


def merged(out: Tensor, lse: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """Formula in the module docstring; a part without keys has the LSE -inf, and no weight."""
    assert tail.lse is not None
    most = torch.maximum(lse, tail.lse)
    base = most.masked_fill(most == float("-inf"), 0.0)
    here, there = (lse - base).exp(), (tail.lse - base).exp()
    total = (here + there).clamp(min=torch.finfo(here.dtype).tiny)
    both = out * (here / total).unsqueeze(-1) + tail.out * (there / total).unsqueeze(-1)
    return both.to(out.dtype), base + total.log()


def next_sparse(
    config: SparseConfig, grid: TokenGrid, context: StepContext | None
) -> StepContext | None:
    """The first later step in which the schedule makes a call sparse, None if there is none."""
    if context is None:
        return None
    for step in range(context.step + 1, context.steps):
        later = replace(context, step=step)
        if scheduled(config, grid, later)[1] is None:
            return later
    return None


def reserve(
    recall: Recall, keep: Keep, what: str, context: StepContext | None, *tensors: Tensor | None
) -> None:
    """Note what will be kept of a layer. Raises ValueError if that of all layers is too much.

    Every dense step notes it, the first too, so that a run is refused before it has cost much.
    """
    size = sum(x.numel() * x.element_size() for x in tensors if x is not None)
    layers = 1 if context is None else context.layers
    needed = max(recall.reserve(what, size), size * layers)
    if needed > keep.gigabytes * 1e9:
        raise ValueError(
            f"keep.{what} takes {size:,} bytes in each of {layers} layers, for every branch: "
            f"{needed / 1e9:.2f} GB or more, and keep.gigabytes={keep.gigabytes:g}; raise it, or "
            f"leave keep.{what} out"
        )
