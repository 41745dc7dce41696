"""Table: a density of its own for every group of steps, layer and head, as measured on a model.

Source: MoA (arXiv 2406.14909) and HeSS give heads and layers budgets of their own; here the step is
an input too: budgets that are right at one step are wrong at another. `vidsparse calibrate` makes
such tables.

With G groups over the n steps that no other setting makes dense, the n-th of them, u = 0 .. n - 1,
is in group floor(G u / n). A group is a text: one word for each layer, in it one digit for each
head, the place of its density among `levels`.
"""

from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from vidsparse.config import require
from vidsparse.densities import DenseParts
from vidsparse.plan import StepContext

MOST_LEVELS = 10


@dataclass(frozen=True)
class Params(DenseParts):
    """As `vidsparse.densities.DenseParts`, and the table; `density` is that of calls outside a run.

    levels: densities that occur, ascending, in (0, 1], 1 to 10 of them. groups: the table, one text
    for each group of steps, as in "01 23 11" for 3 layers of 2 heads; at least one.
    """

    name: str = "table"
    levels: tuple[float, ...] = (0.25,)
    groups: tuple[str, ...] = ("0",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("levels", "groups"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        rising = tuple(sorted(set(self.levels))) == self.levels
        ok = rising and 0 < len(self.levels) <= MOST_LEVELS and min(self.levels) > 0
        allowed = f"1 to {MOST_LEVELS} ascending numbers in (0, 1]"
        require(ok and self.levels[-1] <= 1, "schedule.levels", self.levels, allowed)
        require(bool(self.groups), "schedule.groups", self.groups, "at least one text")
        digits = "0123456789"[: len(self.levels)]
        for n, group in enumerate(self.groups):
            words = group.split()
            ok = bool(words) and len({len(word) for word in words}) == 1
            ok = ok and set(group) <= {*digits, " "} and self.sizes == sizes_of(group)
            allowed = f"for every layer a word of a digit 0 .. {digits[-1]} a head, as all groups"
            require(ok, f"schedule.groups[{n}]", group, allowed)

    @property
    def sizes(self) -> tuple[int, int]:
        """Layers and heads that the table is of."""
        return sizes_of(self.groups[0])

    def dense_in(self, steps: int) -> list[int]:
        """As for a warm-up, and the steps of groups in which every head is dense."""
        full = {" ", str(self.levels.index(1.0))} if self.levels[-1] == 1 else set()
        return [
            n
            for n in range(steps)
            if self.in_dense_step(n, steps) or set(self.groups[self.group(n, steps)]) <= full
        ]

    def group(self, step: int, steps: int) -> int:
        """Of a step that is not dense, 0-based."""
        sparse = [n for n in range(steps) if not self.in_dense_step(n, steps)]
        return len(self.groups) * sparse.index(step) // len(sparse)

    def heads(self, step: int, steps: int, layer: int) -> tuple[float, ...]:
        """Densities of the heads of a layer in a step that is not dense."""
        return _heads(self, self.group(step, steps), layer)


def density_at(context: StepContext | None, params: Params) -> tuple[float, str | None]:
    """The mean over the heads; 1.0 where all of them are dense."""
    if context is None:
        return params.steady()
    layers = params.sizes[0]
    allowed = f"{context.layers}, the layers of the model"
    require(layers == context.layers, "layers of schedule.groups", layers, allowed)
    reason = params.dense_reason(context)
    if reason:
        return 1.0, reason
    density = fmean(params.heads(context.step, context.steps, context.layer))
    return density, "dense-layer" if density == 1 else None


def head_densities(context: StepContext | None, params: Params) -> tuple[float, ...] | None:
    """Of a call that `density_at` calls sparse: density of each head, each in (0, 1]."""
    if context is None:
        return None
    return params.heads(context.step, context.steps, context.layer)


def sizes_of(group: str) -> tuple[int, int]:
    """Layers and heads of a text of the table."""
    words = group.split()
    return len(words), len(words[0]) if words else 0


@lru_cache(maxsize=4096)
def _heads(params: Params, group: int, layer: int) -> tuple[float, ...]:
    return tuple(params.levels[int(digit)] for digit in params.groups[group].split()[layer])
