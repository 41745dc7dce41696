"""What the calls of a layer do in each step of a run, by its schedule and by what it keeps.

Whether a call chooses its blocks, merges a tail, adds a residual or makes one for later follows
from the schedule and from the section `keep` alone (`vidsparse.carried` is what runs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vidsparse.config import SparseConfig
from vidsparse.costs.stage import ALONE, Carried
from vidsparse.memory import Memory


@dataclass(frozen=True)
class Call:
    """Self-attention of one layer in one step.

    density: of a sparse call; None: it is dense. carried: of a sparse call. beside: the density of
    the sparse call that a dense one makes besides, for a residual; None: it makes none.
    """

    density: float | None
    carried: Carried = ALONE
    beside: float | None = None
    beside_carried: Carried = ALONE

    @property
    def work(self) -> float:
        """Density, as reports count it: the first call of a tail reads everything."""
        return 1.0 if self.density is None or self.carried.tail == "made" else self.density


def calls(config: SparseConfig, densities: Sequence[float | None]) -> list[Call]:
    """Of one layer. densities: of its steps in turn, None of a dense one."""
    keep = config.keep
    memory = Memory()  # by the rule of a run itself

    def fresh(what: str, step: int, lasts: int, form: object = None) -> bool:
        recall = memory.of(step)
        recall.get(what, lasts, object, form)
        return recall.made(what) == step

    def sparse(step: int, residual: bool) -> Carried:
        first = fresh("anything", step, len(densities))
        if keep.tail > 1:
            new = fresh("tail", step, keep.tail)
            return Carried(chooses=new, tail="made" if new else "merged", first=first)
        if config.orders_last:
            fresh("orders", step, config.orders_last)
        orders = memory.of(step).made("orders")  # blocks of other orders are of no use
        return Carried(fresh("plan", step, keep.plans, orders), residual, first=first)

    found = []
    for step, density in enumerate(densities):
        after = densities[step + 1] if step + 1 < len(densities) else None
        if density is not None:
            found.append(Call(density, sparse(step, memory.of(step).made("residual") is not None)))
        elif keep.residual and after is not None:
            found.append(Call(None, beside=after, beside_carried=sparse(step, residual=False)))
            memory.of(step).put("residual", step)
        else:
            found.append(Call(None))
    return found


def period(config: SparseConfig) -> int:
    """Steps after which sparse calls do again what they take over in those between."""
    return max(config.keep.plans, config.keep.tail)


def steady(config: SparseConfig, steps: int) -> list[tuple[Carried, float]]:
    """What sparse calls of a run with so many sparse steps carry, each with its share of them."""
    every = max(1, min(period(config), steps))
    tails, residual = config.keep.tail > 1, config.keep.residual
    first = Carried(residual=residual, tail="made" if tails else "")
    later = Carried(chooses=False, residual=residual, tail="merged" if tails else "")
    return [(first, 1 / every), (later, 1 - 1 / every)]
