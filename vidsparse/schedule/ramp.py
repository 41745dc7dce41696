"""Ramp: from dense to sparse over the steps, linear or cosine, with an optional density per layer.

With u = (step - first) / (steps - 1 - first), first = number of dense steps:
    linear: d = start + (density - start) u
    cosine: d = density + (start - density) (1 + cos(pi u)) / 2
"""

import math
from dataclasses import dataclass

from vidsparse.config import require
from vidsparse.densities import DenseParts
from vidsparse.plan import StepContext

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Params(DenseParts):
    """As `vidsparse.densities.DenseParts`, and the ramp.

    start: density at the first step after the dense ones, in (0, 1].
    shape: linear | cosine. layer_density: final density of each layer instead of `density`; empty,
    or one number in (0, 1] per layer of the model.
    """

    name: str = "ramp"
    start: float = 0.5
    shape: str = "linear"
    layer_density: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_density", tuple(self.layer_density))
        require(0 < self.start <= 1, "schedule.start", self.start, "a number in (0, 1]")
        require(self.shape in SHAPES, "schedule.shape", self.shape, ", ".join(SHAPES))
        ok = all(0 < d <= 1 for d in self.layer_density)
        require(
            ok, "schedule.layer_density", self.layer_density, "numbers in (0, 1], one per layer"
        )

    def ramp(self, step: int, steps: int, final: float) -> float:
        """Formula in the module docstring. final: `density`, or that of a layer."""
        first = self.count("dense_steps", steps)
        u = (step - first) / max(1, steps - 1 - first)
        if self.shape == "cosine":
            u = (1 - math.cos(math.pi * u)) / 2
        return self.start + (final - self.start) * u

    def dense_in(self, steps: int) -> list[int]:
        """As for a warm-up, and the steps in which the ramp is at 1 for every layer."""
        final = min(self.layer_density or (self.density,))
        return [
            n
            for n in range(steps)
            if self.in_dense_step(n, steps) or self.ramp(n, steps, final) >= 1
        ]


def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]:
    """Density of the ramp at this step and layer."""
    if context is None:
        return params.steady()
    reason = params.dense_reason(context)
    if reason:
        return 1.0, reason
    final = params.density
    if params.layer_density:
        n = len(params.layer_density)
        allowed = f"{context.layers} numbers, one per layer"
        require(n == context.layers, "length of schedule.layer_density", n, allowed)
        final = params.layer_density[context.layer]
    density = params.ramp(context.step, context.steps, final)
    return density, "warmup-step" if density >= 1 else None
