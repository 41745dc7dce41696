"""Loops of machine code that multiply matrices: their length, and whether products wait in turn."""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")
JUMP = re.compile(r"\bBRA(?:\.\w+)*\s+(?:`\()?(?:[!U]*P?\w*,\s*)?(0x[0-9a-f]+)")
MANY = 8
"""Products from which a loop that waits for each of them is one that was serialised."""


@dataclass(frozen=True)
class Loop:
    """Instructions of one turn; products: on tensor cores; arrivals: fences before a product.

    Hopper's products of one chain need one fence and one wait, two chains of a turn two. Where the
    compiler could not keep their registers apart, every product has its own, and waits.
    """

    instructions: int
    products: int
    arrivals: int

    @property
    def serialised(self) -> bool:
        return self.products >= MANY and 2 * self.arrivals > self.products


def loops_of(text: str, products: str) -> tuple[Loop, ...]:
    """Of SASS: the loops with a product that hold no other loop with one, the longest first.

    products: regular expression of the instructions of tensor cores. A jump back over the whole
    of another such loop is none of them. Other assembly than SASS has no loops here.
    """
    found = [(int(m[1], 16), m[2].strip()) for m in map(INSTRUCTION.match, text.splitlines()) if m]
    place = {address: n for n, (address, _) in enumerate(found)}
    product = re.compile(rf"\b(?:{products})\b")
    spans = []
    for n, (address, instruction) in enumerate(found):
        jump = JUMP.search(instruction)
        target = int(jump[1], 16) if jump else address + 1
        if target <= address and target in place:
            spans.append((place[target], n))
    spans = [
        span for span in spans if any(product.search(t) for _, t in found[span[0] : span[1] + 1])
    ]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = []
    for first, last in inner:
        turn = [text for _, text in found[first : last + 1]]
        arrivals = sum("WARPGROUP.ARRIVE" in text for text in turn)
        loops.append(Loop(len(turn), sum(bool(product.search(text)) for text in turn), arrivals))
    return tuple(sorted(set(loops), key=lambda loop: -loop.products))
