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
from vidsparse.inspecting.places import HeadPlan
from vidsparse.pipelines.observation import ObservedCall
from vidsparse.plan import BlockPlan


@dataclass(frozen=True)
class Maps:
    """Of one head of a call, on the CPU. draft, mass: float32 [nq, nk], rows sum to 1."""

    draft: Tensor
    mass: Tensor
    plan: HeadPlan


@dataclass
class Recorder:
    """An observer. Of a step and layer it looks at the first call that is not the unconditional
    branch of guidance, and of a batch at item 0.

    figures: (step, layer, head) -> figures, of all layers and heads in the chosen steps.
    maps: (step, layer, head) -> maps, of the chosen ones. film: step -> the plan of the layer
    and head `shown`, the reason for a dense call. cuts, grid, rest: of the plans.
    """

    config: SparseConfig
    choice: Choice
    figures: dict[tuple[int, int, int], HeadFigures] = field(default_factory=dict)
    maps: dict[tuple[int, int, int], Maps] = field(default_factory=dict)
    film: dict[int, HeadPlan | str] = field(default_factory=dict)
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
            self.film[at.step] = reason if plan is None else HeadPlan.of(plan, self.shown[1])
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
            q, k, v, own = (
                x[0, :, head] if order is None else x[0, order[0, head], head]
                for x, order in (
                    (call.q, plan.order_q),
                    (call.k, plan.order_k),
                    (call.v, plan.order_k),
                    (out, plan.order_q),
                )
            )
            found = truth(q, k, v, own, (plan.q_blocks, plan.k_blocks))
            place = at.step, at.layer, head
            self.figures[place] = figures(found, plan, head)
            if drafts is not None and head in chosen:
                mass, drafted = found.mass.float().cpu(), drafts[chosen.index(head)].cpu()
                self.maps[place] = Maps(drafted, mass, HeadPlan.of(plan, head))
