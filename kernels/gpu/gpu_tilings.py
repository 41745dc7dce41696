"""The tilings of the sparse forward that are compared, and the unit that times one of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_bench import Bench, blank, unit
from gpu_cases import Shape, exact_plan, prepare, sampled_error, work
from gpu_results import Machine
from gpu_rows import Result
from gpu_units import Unit

from vidsparse.kernels.gpu.operands import Tiling

Numbers = tuple[int, int, int, int, int | None]

HALF: dict[int, dict[str, tuple[Numbers, ...]]] = {
    128: {
        "pointer": ((128, 64, 8, 3, None), (128, 64, 8, 2, None), (64, 64, 4, 3, None)),
        "tma": (
            (128, 64, 8, 2, 128),
            (128, 64, 8, 3, None),
            (128, 128, 8, 2, None),
            (128, 32, 8, 3, None),
            (64, 64, 4, 2, None),
            (64, 64, 4, 1, None),
        ),
        "ws": ((128, 64, 4, 3, None), (128, 64, 4, 2, None), (128, 64, 4, 4, None)),
    },
    64: {
        "pointer": ((128, 64, 8, 3, None), (128, 128, 8, 2, None), (64, 64, 4, 3, None)),
        "tma": ((128, 64, 8, 3, None), (128, 128, 8, 2, None), (64, 64, 4, 3, None)),
        "ws": ((128, 64, 4, 3, None), (128, 64, 4, 2, None), (128, 64, 4, 4, None)),
    },
}
"""Head dim -> form -> block_m, block_n, warps, stages, registers, for bfloat16 and float16.

"ws" of 128 keys does not compile: the bias of a key is in the way of its passes.
"""

FLOAT32 = ((32, 32, 8, 1, None), (32, 32, 4, 1, None), (64, 32, 8, 1, None))
MOST_BLOCKS = 64
"""Key blocks that may share a tile, one bit each."""

Pattern = tuple[str, str, float]
"""How blocks are listed: "random" or "coherent", "plain" or "rest", density of exact blocks."""


def candidates(depth: int, dtype: torch.dtype, forms: tuple[str, ...]) -> list[tuple[str, Tiling]]:
    """Form and tiling of everything that is tried. depth: head dim."""
    if dtype.itemsize == 4:
        return [("pointer", Tiling(*numbers)) for numbers in FLOAT32]
    table = HALF[64 if depth <= 64 else 128]
    return [(form, Tiling(*numbers)) for form in forms for numbers in table[form]]


def label(shape: Tiling) -> str:
    """Such as "128x64 w8 s2 r128"."""
    limit = f" r{shape.registers}" if shape.registers else ""
    return f"{shape.block_m}x{shape.block_n} w{shape.warps} s{shape.stages}{limit}"


def tiling_units(
    machine: Machine, shape: Shape, dtype: torch.dtype, pattern: Pattern, part: str, rank: int
) -> Iterator[Unit]:
    """Every candidate for one way to list blocks, each alone with dense attention."""
    every = candidates(shape.head_dim, dtype, machine.forms)
    for form, tiling in every[::3] if machine.dry else every:
        if pattern[1] == "plain" or tiling.block_n <= MOST_BLOCKS:
            yield tiling_unit(machine, shape, dtype, pattern, form, tiling, part, rank)


def tiling_unit(
    machine: Machine,
    shape: Shape,
    dtype: torch.dtype,
    pattern: Pattern,
    form: str,
    tiling: Tiling,
    part: str,
    rank: int,
) -> Unit:
    """Blocks are as wide as a tile of keys, 64 at least, so that density means the same for all."""
    order, content, density = pattern
    stage = f"{content} {label(tiling)}, {order}"

    def act(this: Bench) -> Iterator[Result]:
        sizes = 128, max(64, tiling.block_n)
        plan = exact_plan(shape, density, sizes, machine.device, order == "coherent")
        tflop = work(plan, shape.head_dim)
        if content == "rest":
            plan = plan.with_rest(plan.k_blocks.levels, "global")
        ready = prepare(*this.qkv, plan, form, tiling)
        own = plan.with_rest(plan.rest)  # the term of first order is added by another kernel
        error = sampled_error(*this.qkv, ready.forward(), own, blocks=2)
        times = this.beside_dense({form: ready.forward}, 0.4)
        yield this.row(density, form, stage, times[form], tflop, times.get("dense"), error)

    row = blank(shape, density, form, stage, dtype)
    return unit(machine, shape, row, act, f"tiling {form}", rank, part)
