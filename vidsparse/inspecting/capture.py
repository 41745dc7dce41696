"""A recorder on an accelerated pipeline: the measures of the chosen calls, and little else.

Tensors of a call are measured while they are there and not kept: what stays is a few numbers per
head and step, the maps of the chosen layers and heads, and of one head the levels of every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidsparse.accelerate import observing
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.inspecting.choice import Choice
from vidsparse.inspecting.measure import HeadFigures, draft, figures, truth
from vidsparse.pipelines.observation import ObservedCall
from vidsparse.plan import BlockPlan


@dataclass(frozen=True)
class Maps:
    """Of one head of a call, on the CPU. draft, mass: float32 [nq, nk], rows sum to 1.

    levels: int8 [nq, nk], as `BlockPlan.levels`; SKIP where the plan does not list a block.
    """

    draft: Tensor
    mass: Tensor
    levels: Tensor


@dataclass
class Recorder:
    """An observer. Of a step and layer it looks at the first call that is not the unconditional
    branch of guidance, and of a batch at item 0.

    figures: (step, layer, head) -> figures, of all layers and heads in the chosen steps.
    maps: (step, layer, head) -> maps, of the chosen ones. film: step -> levels [nq, nk] of the
    layer and head `shown`, the reason for a dense call. cuts, grid, rest: of the plans.
    """

    config: SparseConfig
    choice: Choice
    figures: dict[tuple[int, int, int], HeadFigures] = field(default_factory=dict)
    maps: dict[tuple[int, int, int], Maps] = field(default_factory=dict)
    film: dict[int, Tensor | str] = field(default_factory=dict)
    cuts: tuple[Blocks, Blocks] | None = None
    grid: TokenGrid | None = None
    rest: int = 0
    seen: set[tuple[int, int]] = field(default_factory=set)
    shown: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.shown = self.choice.layers[len(self.choice.layers) // 2], self.choice.heads[0]

    @contextmanager
    def recording(self, pipe: Any) -> Iterator[None]:
        """The pipeline is observed inside."""
        with observing(pipe, self):
            yield

    def __call__(self, call: ObservedCall) -> None:
        at, plan = call.context, call.result.plan
        if at.branch == "uncond" or (at.step, at.layer) in self.seen:
            return
        self.seen.add((at.step, at.layer))
        if at.layer == self.shown[0]:
            reason = str(call.result.reason)
            levels = None if plan is None else plan.levels[0, self.shown[1]].cpu().clone()
            self.film[at.step] = reason if levels is None else levels
        if plan is None:
            return
        self.cuts, self.grid, self.rest = (plan.q_blocks, plan.k_blocks), call.grid, plan.rest
        if at.step in self.choice.steps:
            self._measure(call, plan)

    @torch.no_grad()
    def _measure(self, call: ObservedCall, plan: BlockPlan) -> None:
        at, out = call.context, call.result.out
        chosen = [*self.choice.heads] if at.layer in self.choice.layers else []
        drafts = draft(call, plan, self.config, chosen) if chosen else None
        for head in range(call.q.shape[2]):
            q, k, v, own = (x[0, :, head] for x in (call.q, call.k, call.v, out))
            found = truth(q, k, v, own, (plan.q_blocks, plan.k_blocks))
            place = at.step, at.layer, head
            self.figures[place] = figures(found, plan, head)
            if drafts is not None and head in chosen:
                levels = plan.levels[0, head].cpu().clone()
                mass = found.mass.float().cpu()
                self.maps[place] = Maps(drafts[chosen.index(head)].cpu(), mass, levels)
