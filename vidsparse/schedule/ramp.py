"""Ramp: from dense to sparse over the steps, linear or cosine, with an optional density per layer.

With u = (step - first) / (steps - 1 - first), first = number of dense steps:
    linear: d = start + (density - start) u
    cosine: d = density + (start - density) (1 + cos(pi u)) / 2
"""

import math
from dataclasses import dataclass

from vidsparse.config import require
from vidsparse.plan import StepContext
from vidsparse.schedule import DenseParts

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Params(DenseParts):
    """As `vidsparse.schedule.DenseParts`, and the ramp.

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


def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]:
    """Density of the ramp at this step and layer; formula in the module docstring."""
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
    first = params.count("dense_steps", context.steps)
    u = min(1.0, (context.step - first) / max(1, context.steps - 1 - first))
    if params.shape == "cosine":
        u = (1 - math.cos(math.pi * u)) / 2
    density = params.start + (final - params.start) * u
    return density, "warmup-step" if density >= 1 else None
