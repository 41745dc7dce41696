"""GPUs that need not be here, one record of facts each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget

RESERVED = 1024
"""Bytes of shared memory that the system takes beside those of a block."""


@dataclass(frozen=True)
class Architecture:
    """capability: as torch gives it; (0, 0), which it never gives, takes the portable tilings.

    shared: most bytes of dynamic shared memory of one block.
    products, int8_products: instructions of tensor cores (regular expressions). asynchronous: has
    TMA, and the pipeliner keeps as many buffers as stages, elsewhere one less.
    """

    name: str
    target: GPUTarget
    capability: tuple[int, int]
    shared: int
    products: str
    int8_products: str
    asynchronous: bool = False

    def programs(self, shared: int) -> int:
        """That fit a multiprocessor with so many bytes of shared memory each."""
        return (self.shared + RESERVED) // (shared + RESERVED)

    @property
    def half_shared(self) -> int:
        """Of two blocks on one multiprocessor, bytes each."""
        return (self.shared - RESERVED) // 2


def nvidia(number: int, *facts: Any) -> Architecture:
    return Architecture(f"sm_{number}", GPUTarget("cuda", number, 32), divmod(number, 10), *facts)


def amd(name: str, *facts: Any) -> Architecture:
    return Architecture(name, GPUTarget("hip", name, 64), *facts)


ARCHITECTURES = {
    str(architecture.target.arch): architecture
    for architecture in (
        nvidia(80, 166_912, "HMMA", "IMMA"),
        nvidia(86, 101_376, "HMMA", "IMMA"),
        nvidia(89, 101_376, "HMMA", "IMMA"),
        nvidia(90, 232_448, "HGMMA", "IGMMA", True),
        nvidia(100, 232_448, r"UTC\w*MMA", "UTCIMMA|IMMA", True),
        nvidia(120, 101_376, "HMMA", "IMMA"),
        amd("gfx942", (0, 0), 65_536, r"v_mfma_f32_\w+", r"v_mfma_i32_\w+"),
    )
}
"""By the name that --arch takes."""

REQUIRED = ("80", "90", "100")
