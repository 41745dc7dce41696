"""What schedules share: density, its other word sparsity, and which steps and layers are dense."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from vidsparse.config import require
from vidsparse.plan import StepContext


def complement(sparsity: float) -> float:
    """The density of a sparsity, in decimal: of 0.9 it is 0.1."""
    allowed = "a number in [0, 1), which is 1 - schedule.density"
    require(0 <= sparsity < 1, "schedule.sparsity", sparsity, allowed)
    return float(1 - Fraction(str(sparsity)))


@dataclass(frozen=True)
class ConstantParams:
    """density: of the sparse calls, in (0, 1]. min_tokens: shorter sequences are dense, >= 0.

    A config may say sparsity, in [0, 1), for 1 - density.

    At 1,024 tokens and density 0.2 the CPU engine is 1.6 times as fast as dense, at 512 slower.
    """

    name: str = ""
    density: float = 0.25
    min_tokens: int = 1024
    other_words: ClassVar[Mapping[str, tuple[str, Callable[[float], float]]]] = {
        "sparsity": ("density", complement)
    }

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "schedule.density", self.density, "a number in (0, 1]")
        require(self.min_tokens >= 0, "schedule.min_tokens", self.min_tokens, "an integer >= 0")

    def steady(self) -> tuple[float, str | None]:
        """The configured density; 1.0 is dense by the user's word."""
        return self.density, "user" if self.density == 1 else None

    def dense_in(self, steps: int) -> list[int]:
        """Steps, 0-based, of a run of `steps` in which every layer is dense."""
        return [*range(steps)] if self.density == 1 else []


@dataclass(frozen=True)
class DenseParts(ConstantParams):
    """As ConstantParams, and which steps and layers stay dense.

    dense_steps: first steps that are dense: a share of the steps if a float in [0, 1), a count if
        an integer. A share is rounded up to whole steps, so it never means none: 0.25 is 1 step of
        1, 2 or 4, 3 of 10, 13 of 50. last_dense_steps: the same for the last steps.
    dense_layers: indices of layers that are always dense; -1 is the last.
    """

    dense_steps: int | float = 0.2
    last_dense_steps: int | float = 0
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
        if isinstance(value, int):
            return min(steps, value)
        return math.ceil(Fraction(str(value)) * steps)  # exact: 0.07 of 100 steps are 7

    def in_dense_step(self, step: int, steps: int) -> bool:
        """Whether a step of a run of `steps` is among its first or last dense ones."""
        last = self.count("last_dense_steps", steps)
        return step < self.count("dense_steps", steps) or step >= steps - last

    def dense_in(self, steps: int) -> list[int]:
        """Steps, 0-based, of a run of `steps` in which every layer is dense."""
        always = super().dense_in(steps)
        return always or [n for n in range(steps) if self.in_dense_step(n, steps)]

    def dense_reason(self, context: StepContext) -> str | None:
        """Reason code if the call is in a dense step or layer, else None."""
        if self.in_dense_step(context.step, context.steps):
            return "warmup-step"
        dense = context.layer in {n % context.layers for n in self.dense_layers}
        return "dense-layer" if dense else None
