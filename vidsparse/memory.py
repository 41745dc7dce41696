"""Memory: what a run keeps from one step to the next, and drops when it ends."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Kept = TypeVar("Kept")


@dataclass
class Memory:
    """Of one run. entries: (what, whose) -> (step at which it was made, form, it)."""

    entries: dict[tuple[str, Hashable], tuple[int, Hashable, Any]] = field(default_factory=dict)

    def of(self, step: int, *whose: Hashable) -> Recall:
        """What a call at a step finds. whose: what calls share it; others see nothing."""
        return Recall(self, step, whose)

    def clear(self) -> None:
        """Forget all."""
        self.entries.clear()


@dataclass(frozen=True)
class Recall:
    """A `Memory` as one call sees it."""

    memory: Memory
    step: int
    whose: tuple[Hashable, ...]

    def get(self, what: str, lasts: int, make: Callable[[], Kept], form: Hashable = None) -> Kept:
        """What was made less than `lasts` steps ago, or is made now.

        form: of the call; what was made for another one is made anew. Of a step that is ahead,
        because a loop has begun anew, nothing is taken.
        """
        known = self.memory.entries.get((what, self.whose))
        if known is not None and known[1] == form and 0 <= self.step - known[0] < lasts:
            found: Kept = known[2]
            return found
        made = make()
        self.memory.entries[what, self.whose] = self.step, form, made
        return made
