"""Warm-up: the first steps and chosen layers are dense, everything else has one density.

The first steps lay down the composition of the video; errors there move objects, later ones only
blur.
"""

from dataclasses import dataclass

from vidsparse.densities import DenseParts
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class Params(DenseParts):
    """See `vidsparse.densities.DenseParts`."""

    name: str = "warmup"


def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]:
    """1.0 in dense steps and layers, `density` elsewhere."""
    reason = params.dense_reason(context) if context is not None else None
    return (1.0, reason) if reason else params.steady()
