"""What each head loses at each density, and what a call costs, seen in a dense run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.pipelines.observation import ObservedCall


@dataclass
class Meter:
    """An observer of a run whose calls are all dense, with tokens in raster order.

    config: the method. levels: densities, ascending, the last is 1. steps: of which the calls are
    measured, one of each group, in their order. Of guidance the branch with the prompt counts.
    """

    config: SparseConfig
    levels: Sequence[float]
    steps: Sequence[int]
    errors: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    seconds: dict[float, list[float]] = field(default_factory=lambda: defaultdict(list))
    rows: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def forwards(self) -> int:
        """Samples that a layer gets in a step: of guidance two."""
        return max(self.rows.values(), default=1)

    def __call__(self, call: ObservedCall) -> None:
        at = call.context
        if at.step not in self.steps:
            return
        self.rows[at.step, at.layer] += call.q.shape[0]
        if at.branch == "uncond":
            return
        q, k, v, dense = (x[-1:] for x in (call.q, call.k, call.v, call.result.out))
        lost = [self._lost(q, k, v, call, density, dense) for density in self.levels]
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
        return [median(self.seconds[level]) for level in self.levels]

    def _lost(
        self, q: Tensor, k: Tensor, v: Tensor, call: ObservedCall, density: float, dense: Tensor
    ) -> np.ndarray:
        """[heads], of one density; times it too."""
        config = at(self.config, density)
        _wait(q)
        start = perf_counter()
        out = attend(q, k, v, grid=call.grid, config=config).out
        _wait(q)
        self.seconds[density].append((perf_counter() - start) / q.shape[2])
        off = (out.float() - dense.float()).double().square().sum((0, 1, 3))
        whole = dense.double().square().sum().clamp(min=1e-30)
        lost: np.ndarray = (off / whole).cpu().numpy()
        return lost * (density < 1)  # the rounding of two dense paths is no loss


def at(config: SparseConfig, density: float) -> SparseConfig:
    """The method with all calls at one density, none of them dense for being no faster."""
    changes = f"schedule.density={density}", "schedule.min_tokens=0", "kernel.crossover=1"
    return config.override("schedule.name=constant", *changes)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
