"""A preset that gains nothing here is said so, once, when the size of the video is known.

On a CPU calls that are no faster go dense by what was measured there, so nothing is lost but what
the user hoped for. On a GPU sparse calls run, and whether they are slower follows from figures that
stand in a table (`vidsparse.costs.machine`): nothing is measured here, and nothing waits.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from vidsparse.config import SparseConfig
from vidsparse.costs import clock, run, stages
from vidsparse.costs.forward import BYTES, Forward
from vidsparse.costs.gpus import recognised
from vidsparse.costs.machine import Machine, in_words
from vidsparse.decision import scheduled
from vidsparse.grid import TokenGrid
from vidsparse.pipelines.provenance import of_another_run
from vidsparse.plan import StepContext
from vidsparse.result import AttentionResult

LONG = 50
"""Sparse steps over which what is kept from step to step is spread."""

CURE = "`vidsparse predict` says what it depends on; restore_pipeline takes vidsparse off"


class Expectation:
    """Of one accelerated pipeline. settings: preset and overrides, for the message."""

    def __init__(self, config: SparseConfig, settings: str) -> None:
        self.config, self.settings, self.told = config, settings, False

    def meet(
        self, grid: TokenGrid, context: StepContext, q: Tensor, result: AttentionResult, hoist: bool
    ) -> None:
        """A call was made. q [B, tokens, H, D]; hoist: of its adapter. Warns at most once."""
        if self.told or result.reason not in (None, "not-faster"):
            return
        self.told = True  # also where all is well: calls of one pipeline are alike
        if other := of_another_run(self.config.calibrated, grid, context.steps):
            self._warn(other)
        density, reason = scheduled(self.config, grid, context)
        if reason is not None:
            return
        if result.reason == "not-faster":
            why = dense_here(grid.tokens, density, result.choice.crossover, q.device.type)
        else:
            why = slower_here(self.config, grid, density, q, hoist)
        if why:
            self._warn(f"{why}; {CURE}")

    def _warn(self, why: str) -> None:
        warnings.warn(f"vidsparse {self.settings!r}: {why}", RuntimeWarning, stacklevel=3)


def dense_here(tokens: int, density: float, crossover: float, device: str) -> str:
    """What to know of calls that are dense because that is as fast."""
    if crossover <= 0:
        return (
            f"attention over {tokens:,} tokens is as fast dense on this {device} at any density, "
            "so it runs dense; longer videos gain"
        )
    return (
        f"attention over {tokens:,} tokens is as fast dense on this {device} from density "
        f"{crossover:.3g} on, so at {density:.3g} it runs dense; a lower schedule.density is "
        "sparse, longer videos gain"
    )


def slower_here(
    config: SparseConfig, grid: TokenGrid, density: float, q: Tensor, hoisted: bool
) -> str:
    """What to know of sparse calls that are predicted to be slower than dense ones; "" if not."""
    dtype = str(q.dtype).removeprefix("torch.")
    machine = _machine(q.device.index or 0) if q.is_cuda else None
    if machine is None or BYTES.get(dtype) != 2:
        return ""
    heads = q.shape[0] * q.shape[2]
    forward = Forward(grid, 1, heads, q.shape[3], (), 0.0, 0, dtype, hoisted)
    sparse, dense = both(forward, config, density, machine)
    if sparse <= dense:
        return ""
    sources = in_words(machine.sources())
    return (
        f"attention over {grid.tokens:,} tokens at density {density:.2f} is predicted to take "
        f"{1e3 * sparse:.2g} ms on this {machine.name}, dense attention {1e3 * dense:.2g} ms (from "
        f"{sources} figures); a lower schedule.density, longer videos or a larger "
        "schedule.min_tokens avoid that"
    )


def both(
    forward: Forward, config: SparseConfig, density: float, machine: Machine
) -> tuple[float, float]:
    """Seconds of self-attention of one layer, sparse at a density, in the mean of a long run, and
    dense."""
    how = run.method(forward, config, machine)
    sparse = clock.timed(run.steady(forward, config, how, density, LONG), machine).seconds
    return sparse, clock.timed(stages.dense_layer(forward), machine).seconds


@lru_cache(maxsize=8)
def _machine(index: int) -> Machine | None:
    return recognised(torch.cuda.get_device_name(index))
