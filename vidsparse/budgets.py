"""Budgets: a selector asked once for all heads, or once for those that have the same density.

Heads of density 1 are dense, whatever the selector: all of their blocks are exact.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.plan import Scores


def select(
    selector: ModuleType,
    scores: Scores,
    forced: Tensor,
    density: float,
    by_head: tuple[float, ...] | None,
    k_blocks: Blocks,
    params: Any,
) -> Tensor:
    """int8 [B, H, nq, nk], what a selector gives. by_head: density of each head, None: `density`.

    Raises ValueError for densities of another number of heads.
    """
    value = scores.value
    if by_head is None:
        levels: Tensor = selector.select(scores, forced, density, k_blocks, params)
        return levels
    heads = value.shape[1]
    allowed = f"{heads}, the heads of the model"
    require(len(by_head) == heads, "heads of schedule.groups", len(by_head), allowed)
    levels = torch.empty_like(value, dtype=torch.int8)
    whose = forced.ndim > 2 and forced.shape[-3] == heads > 1
    for one, place in _alike(by_head, value.device):
        if one == 1:
            levels.index_fill_(1, place, 0)
            continue
        theirs = forced.index_select(-3, place) if whose else forced
        some = selector.select(scores.of_heads(place), theirs, one, k_blocks, params)
        levels.index_copy_(1, place, some)
    return levels


@lru_cache(maxsize=1024)
def _alike(by_head: tuple[float, ...], device: torch.device) -> list[tuple[float, Tensor]]:
    """Each density with the heads that have it, int64 on the device."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        return [
            (one, torch.tensor([h for h, d in enumerate(by_head) if d == one], device=device))
            for one in sorted(set(by_head))
        ]
