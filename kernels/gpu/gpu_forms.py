"""The tilings of the sparse forward against each other, random against coherent lists.

Coherent: a row lists the blocks around the diagonal, so neighbouring programs read the same keys;
random: no two rows alike, the worst case for the L2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from gpu_cases import SHAPES, TINY
from gpu_results import Machine
from gpu_tilings import Pattern, tiling_units
from gpu_units import Unit

PATTERNS: tuple[Pattern, ...] = (
    ("random", "plain", 0.1),
    ("coherent", "plain", 0.1),
    ("random", "rest", 0.1),
    ("random", "plain", 0.3),
    ("coherent", "plain", 0.3),
    ("coherent", "plain", 1.0),
)


def units(machine: Machine) -> list[Unit]:
    """Head dim 128, then 64."""
    wide = SHAPES["wan2.1-1.3b-480p"]
    narrow = replace(wide, name=f"{wide.name}, D 64", head_dim=64)
    shapes = (TINY,) if machine.dry else (wide, narrow)
    patterns = PATTERNS[:1] if machine.dry else PATTERNS
    return [
        unit
        for shape in shapes
        for pattern in patterns
        for unit in tiling_units(machine, shape, torch.bfloat16, pattern, "forms", 6)
    ]
