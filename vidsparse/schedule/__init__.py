"""Schedule: the density of an attention call, from its step and layer.

A method is a file here with

    class Params
        frozen dataclass, first field `name`, with at least `density` and `min_tokens`.
    def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]
        density in (0, 1] and None, or (1.0, reason code) for a dense call
        ("warmup-step", "dense-layer", "user").

context None means that the caller knows no step: the steady state, `params.density`. A pure
function; no counters. `min_tokens`: sequences that are shorter are dense ("too-short").
"""

from dataclasses import dataclass
from typing import Union

from vidsparse.config import require
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class ConstantParams:
    """density: of the sparse calls, in (0, 1]. min_tokens: shorter sequences are dense, >= 0.

    At 1,024 tokens and density 0.2 the CPU engine is 1.6 times as fast as dense, at 512 slower.
    """

    name: str = ""
    density: float = 0.25
    min_tokens: int = 1024

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "schedule.density", self.density, "a number in (0, 1]")
        require(self.min_tokens >= 0, "schedule.min_tokens", self.min_tokens, "an integer >= 0")

    def steady(self) -> tuple[float, str | None]:
        """The configured density; 1.0 is dense by the user's word."""
        return self.density, "user" if self.density == 1 else None


@dataclass(frozen=True)
class DenseParts(ConstantParams):
    """As ConstantParams, and which steps and layers stay dense.

    dense_steps: first steps that are dense: a fraction of the steps if a float in [0, 1) (rounded
        to the nearest step), a count if an integer. last_dense_steps: the same for the last steps.
    dense_layers: indices of layers that are always dense; -1 is the last.
    """

    dense_steps: Union[int, float] = 0.2  # noqa: UP007 - the form that OmegaConf reads
    last_dense_steps: Union[int, float] = 0  # noqa: UP007
    dense_layers: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for key in ("dense_steps", "last_dense_steps"):
            value = getattr(self, key)
            ok = value >= 0 and (isinstance(value, int) or value < 1)
            require(ok, f"schedule.{key}", value, "a fraction in [0, 1) or a count >= 0")

    def count(self, key: str, steps: int) -> int:
        """Number of steps that `dense_steps` or `last_dense_steps` means in a run of `steps`."""
        value = getattr(self, key)
        return min(steps, value if isinstance(value, int) else round(value * steps))

    def dense_reason(self, context: StepContext) -> str | None:
        """Reason code if the call is in a dense step or layer, else None."""
        first = self.count("dense_steps", context.steps)
        last = context.steps - self.count("last_dense_steps", context.steps)
        if context.step < first or context.step >= last:
            return "warmup-step"
        dense = context.layer in {n % context.layers for n in self.dense_layers}
        return "dense-layer" if dense else None
