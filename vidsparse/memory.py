"""Memory: what a run keeps from one step to the next, and drops when it ends."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

Kept = TypeVar("Kept")


@dataclass
class Memory:
    """Of one run. entries: (what, whose) -> (step at which it was made, form, it). reserved: bytes
    that are, or will be, taken by what is large: (what, whose) -> bytes."""

    entries: dict[tuple[str, Hashable], tuple[int, Hashable, Any]] = field(default_factory=dict)
    reserved: dict[tuple[str, Hashable], int] = field(default_factory=dict)

    def of(self, step: int, *whose: Hashable) -> Recall:
        """What a call at a step finds. whose: what calls share it; others see nothing."""
        return Recall(self, step, whose)

    def clear(self) -> None:
        """Forget all."""
        self.entries.clear()
        self.reserved.clear()


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
        found: Kept | None = self.find(what, form, lasts)
        return self.put(what, make(), form) if found is None else found

    def find(self, what: str, form: Hashable = None, lasts: float = inf) -> Any:
        """As `get`, None if there is nothing."""
        known = self.memory.entries.get((what, self.whose))
        if known is not None and known[1] == form and 0 <= self.step - known[0] < lasts:
            return known[2]
        return None

    def put(self, what: str, made: Kept, form: Hashable = None) -> Kept:
        """Keep it in place of what there was."""
        self.memory.entries[what, self.whose] = self.step, form, made
        return made

    def made(self, what: str) -> int | None:
        """The step at which it was made, None if there is none."""
        known = self.memory.entries.get((what, self.whose))
        return None if known is None else known[0]

    def reserve(self, what: str, size: int) -> int:
        """Note that it will take so many bytes; all bytes of the run that are noted."""
        self.memory.reserved[what, self.whose] = size
        return sum(self.memory.reserved.values())
