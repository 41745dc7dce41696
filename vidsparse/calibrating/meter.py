"""What each head loses at each density, and what a call costs, seen in a dense run.

A call costs what it costs in a run: tokens stand in the order that is made once a forward, and
orders of heads are made once for the steps for which they last,

    seconds = those of a call that finds them + (those of one that makes them - these) / steps
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.geometry import token_order
from vidsparse.memory import Memory, Recall
from vidsparse.pipelines.observation import ObservedCall
from vidsparse.sections import Keep


@dataclass
class Meter:
    """An observer of a run whose calls are all dense, with tokens in raster order.

    config: the method. levels: densities, ascending, the last is 1. steps: of which the calls are
    measured, one of each group, in their order. Of guidance the branch with the prompt counts.
    tokens: of the longest call that was measured.
    """

    config: SparseConfig
    levels: Sequence[float]
    steps: Sequence[int]
    errors: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    seconds: dict[float, list[float]] = field(default_factory=lambda: defaultdict(list))
    making: list[float] = field(default_factory=list)
    rows: Counter[tuple[int, int]] = field(default_factory=Counter)
    tokens: int = 0

    @property
    def forwards(self) -> int:
        """Samples that a layer gets in a step: of guidance two."""
        return max(self.rows.values(), default=1)

    def __call__(self, call: ObservedCall) -> None:
        at = call.context
        if at.step not in self.steps:
            return
        self.rows[at.step, at.layer] += call.q.shape[0]
        self.tokens = max(self.tokens, call.grid.tokens)
        if at.branch == "uncond":
            return
        order, lasts = token_order(call.grid, self.config.layout)[0], self.config.orders_last
        every = (x[-1:] for x in (call.q, call.k, call.v, call.result.out))
        q, k, v, dense = (x.index_select(1, order.to(x.device)) for x in every)
        recall = None
        if lasts > 1:
            memory = Memory()
            made = self._timed(q, k, v, call, self.levels[0], memory.of(0))[1]
            recall = memory.of(1)
        lost = [self._lost(q, k, v, call, density, dense, recall) for density in self.levels]
        if lasts > 1:
            self.making.append((made - self.seconds[self.levels[0]][-1]) / lasts)
        self.errors[self.steps.index(at.step), at.layer] = np.stack(lost, -1)

    def table(self) -> np.ndarray:
        """[groups, layers, heads, levels]: squared error of a head, over the squared norm of the
        outputs of all heads of the layer.

        Raises ValueError if a step or a layer was never seen.
        """
        layers = 1 + max((layer for _, layer in self.errors), default=0)
        cells = [(group, layer) for group in range(len(self.steps)) for layer in range(layers)]
        if lacking := [cell for cell in cells if cell not in self.errors]:
            group, layer = lacking[0]
            raise ValueError(f"no dense call of group {group}, layer {layer} was seen")
        flat = np.stack([self.errors[cell] for cell in cells])
        return flat.reshape(len(self.steps), layers, *flat.shape[1:])

    def costs(self) -> list[float]:
        """Seconds of a head at each level, the last of dense attention; medians over calls."""
        making = max(0.0, median(self.making)) if self.making else 0.0
        return [median(self.seconds[level]) + making * (level < 1) for level in self.levels]

    def _timed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: ObservedCall,
        density: float,
        recall: Recall | None,
    ) -> tuple[Tensor, float]:
        """The output of a call, and its seconds by head."""
        config = at(self.config, density)
        _wait(q)
        start = perf_counter()
        out = attend(q, k, v, grid=call.grid, config=config, hoisted=True, recall=recall).out
        _wait(q)
        return out, (perf_counter() - start) / q.shape[2]

    def _lost(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: ObservedCall,
        density: float,
        dense: Tensor,
        recall: Recall | None,
    ) -> np.ndarray:
        """[heads], of one density; times it too."""
        out, seconds = self._timed(q, k, v, call, density, recall)
        self.seconds[density].append(seconds)
        off = (out.float() - dense.float()).double().square().sum((0, 1, 3))
        whole = dense.double().square().sum().clamp(min=1e-30)
        lost: np.ndarray = (off / whole).cpu().numpy()
        return lost * (density < 1)  # the rounding of two dense paths is no loss


def at(config: SparseConfig, density: float) -> SparseConfig:
    """The method with all calls at one density, none of them dense for being no faster, none with
    what another has chosen."""
    changes = f"schedule.density={density}", "schedule.min_tokens=0", "kernel.crossover=1"
    return replace(config.override("schedule.name=constant", *changes), keep=Keep())


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
