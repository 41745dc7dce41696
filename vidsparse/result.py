"""What a call gives beside its output, and how that is found out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, isfinite
from time import perf_counter

import torch
from torch import Tensor

from vidsparse.decision import Choice
from vidsparse.kernels.gpu import support
from vidsparse.plan import BlockPlan


@dataclass
class AttentionResult:
    """out [B, S, H, D]; lse [B, H, S] or None; plan None if dense.

    head_density: [H], float64; of a sparse call it is on the device of q, and to read it is to wait
    for a GPU. finite: of a watched call, bool [4] on the device of q: whether all numbers of q, k,
    v and out are finite; None if it was not watched, or if on a CPU all of out is. ordered: of a
    layout with orders of heads, bool [B, H] on the device of q, those that have one; else None.
    """

    out: Tensor
    lse: Tensor | None
    plan: BlockPlan | None
    head_density: Tensor
    reason: str | None
    choice: Choice = field(default_factory=Choice)
    seconds: dict[str, float] = field(default_factory=dict)
    finite: Tensor | None = None
    ordered: Tensor | None = None

    @property
    def density(self) -> tuple[float, ...]:
        """Kept fraction of the work of each head, in (0, 1]."""
        return tuple(self.head_density.tolist())


def head_density_of(plan: BlockPlan) -> Tensor:
    """Of each head over the batch, float64 [H], where the plan is."""
    work = support.kernels("work", plan.levels)
    density: Tensor = plan.density.mean(0) if work is None else work.head_density(plan)
    return density


def finite_numbers(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor | None:
    """`AttentionResult.finite`. On a CPU one pass over the output tells if there is more to ask.

    In the order of memory, and by extremes, which a NaN becomes too: in another order, or as a sum
    in float32, 16-bit numbers take 13 times as long.
    """
    if out.device.type == "cpu":
        in_memory = out.permute(sorted(range(out.ndim), key=out.stride, reverse=True))
        if all(isfinite(extreme.item()) for extreme in torch.aminmax(in_memory)):
            return None
    largest = [torch.linalg.vector_norm(x, inf) for x in (q, k, v, out)]
    return torch.stack(largest).isfinite()


@lru_cache(maxsize=64)
def full_density(heads: int) -> Tensor:
    """The density of a dense call, float64 [heads]."""
    with torch.inference_mode(False):
        return torch.ones(heads, dtype=torch.float64)


class timed:
    """Adds the seconds of what is done within to those of a stage."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self.start = perf_counter()

    def __exit__(self, *_: object) -> None:
        took = perf_counter() - self.start
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + took
