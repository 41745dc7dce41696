"""Which lists and which tilings are fastest: engines on random and coherent lists, tilings.

Coherent: a row lists the blocks around the diagonal, so neighbouring programs read the same keys;
random: no two rows alike, the worst case for the L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from gpu_bench import Bench, Sizes, blank, plan_at, unit
from gpu_bench_stages import STAGES
from gpu_cases import SHAPES, SIZES, TINY, Shape, exact_plan, full_blocks, work
from gpu_results import Machine
from gpu_rows import Result
from gpu_units import Unit
from gpu_ways import Exact, Levels, exact, here, levels, way
from sampled import sampled_error

from vidsparse import forms as triton_forms
from vidsparse.kernels.gpu import engine, rest_merge, support
from vidsparse.kernels.gpu.operands import Tiling

HALF = torch.bfloat16
POINTER, TMA = map(triton_forms.way, triton_forms.FORMS)
TMA_64 = f"{TMA}-64"
"""The same on query blocks of 64, which have a table of their own."""

REST = "triton-rest"
"""The rest merge; its table, and that of `TMA_64`, are the same for every head dim."""

Numbers = tuple[int, int, int, int, int | None]

TILINGS: dict[int, dict[str, tuple[Numbers, ...]]] = {
    128: {
        POINTER: ((128, 64, 8, 3, None), (128, 64, 8, 2, None), (128, 128, 8, 2, None),
                  (64, 64, 4, 3, None)),
        TMA: ((128, 64, 8, 3, None), (128, 64, 8, 2, None), (128, 128, 8, 2, None),
              (64, 64, 4, 2, None)),
        TMA_64: ((64, 64, 4, 2, None), (64, 64, 4, 3, None)),
        REST: ((128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 32, 8, 3, None),
               (64, 64, 4, 2, None)),
        "triton-levels": ((128, 64, 8, 3, None), (128, 64, 8, 2, None), (64, 64, 4, 3, None)),
    },
    64: {
        POINTER: ((128, 64, 8, 3, None), (128, 128, 8, 2, None), (64, 64, 4, 3, None)),
        TMA: ((128, 64, 8, 3, 128), (128, 64, 8, 3, None), (128, 128, 8, 2, None)),
        "triton-levels": ((128, 64, 8, 3, None), (64, 64, 4, 3, None)),
    },
}  # fmt: skip
"""Head dim -> way -> block_m, block_n, warps, stages, registers, in bfloat16."""

FLOAT32 = ((32, 32, 8, 1, None), (32, 32, 4, 1, None), (64, 32, 8, 1, None))
"""Of the pointer form, whose exact products use no tensor cores."""

Pattern = tuple[str, float]
"""How blocks are listed, "random" or "coherent", and the density."""

PATTERNS: tuple[Pattern, ...] = (("random", 0.1), ("coherent", 0.1), ("random", 0.3),
                                 ("coherent", 1.0))  # fmt: skip
TUNED: Pattern = ("random", 0.2)


def forms(machine: Machine) -> Iterator[Unit]:
    """Every engine as it is shipped, on random and on coherent lists; head dim 128, then 64."""
    for shape in both(machine):
        for pattern in PATTERNS[:1] if machine.dry or shape.head_dim == 64 else PATTERNS:
            for one in here(machine):
                for sizes in one.sizes(machine, shape.head_dim)[:1]:
                    act = partial(exact, one)
                    yield lists_unit(machine, shape, pattern, one.name, sizes, "", act, "forms")


def tune(machine: Machine) -> Iterator[Unit]:
    """Every tiling; what does not compile is a row with the reason."""
    names = {one.name for one in here(machine) if one.engine == "triton"}
    names |= {"triton-levels", REST} | ({TMA_64} if TMA in names else set())
    for shape in both(machine):
        table = TILINGS[64 if shape.head_dim <= 64 else 128]
        every = [(name, Tiling(*numbers)) for name in table if name in names
                 for numbers in table[name]]  # fmt: skip
        if machine.dry:  # one of each table
            every = [*{name: (name, tiling) for name, tiling in every}.values()][::-1]
        for name, tiling in every:
            if name == REST:
                yield rest_unit(machine, shape, tiling)
                continue
            yield tiling_unit(machine, shape, HALF, name, tiling)
    if not machine.dry:
        for numbers in FLOAT32:
            yield tiling_unit(machine, both(machine)[0], torch.float32, POINTER,
                              Tiling(*numbers))  # fmt: skip


def both(machine: Machine) -> list[Shape]:
    """Wan 2.1 1.3B, and the same with a head dim of 64."""
    if machine.dry:
        return [TINY]
    wide = SHAPES["wan2.1-1.3b-480p"]
    return [wide, replace(wide, name=f"{wide.name}, D 64", head_dim=64)]


def label(shape: Tiling) -> str:
    """Such as "128x64 w8 s2 r128"."""
    limit = f" r{shape.registers}" if shape.registers else ""
    return f"{shape.block_m}x{shape.block_n} w{shape.warps} s{shape.stages}{limit}"


def tiling_unit(
    machine: Machine, shape: Shape, dtype: torch.dtype, name: str, tiling: Tiling
) -> Unit:
    """Blocks are as wide as a tile of keys, 64 at least, so that density means the same for all."""
    sizes = 64 if name == TMA_64 else 128, max(64, tiling.block_n)
    how: Callable[..., Exact | Levels] = (
        partial(levels, shape=tiling)
        if name == "triton-levels"
        else partial(exact, way(name.removesuffix("-64")), tiling=tiling)
    )
    return lists_unit(machine, shape, TUNED, name, sizes, label(tiling), how, "tune", dtype)


def rest_unit(machine: Machine, shape: Shape, tiling: Tiling) -> Unit:
    """Means, moment and rest merge of one tiling, beside the error of a whole call with it."""
    _, density = TUNED

    def act(this: Bench) -> Iterator[Result]:
        plan = plan_at(this, density)
        ready = STAGES["rest"](this, density, plan)
        plan = plan.with_rest(plan.k_blocks.levels, "global")
        with rest_tiling(machine, tiling):
            out, _ = engine.execute(*this.qkv, plan)
            times = this.beside_dense({REST: ready}, 0.4)
        error = sampled_error(*this.qkv, out, plan, blocks=2)
        yield this.row(density, REST, label(tiling), times[REST], None, times.get("dense"), error,
                       SIZES[0])  # fmt: skip

    row = blank(shape, density, REST, label(tiling), HALF, SIZES[0])
    return unit(machine, shape, row, act, f"tune {REST}", "tune")


@contextmanager
def rest_tiling(machine: Machine, tiling: Tiling) -> Iterator[None]:
    """Another tiling of the rest merge on the device of a machine."""
    capability = support.capability(machine.device)
    rest_merge.tiling.cache_clear()
    try:
        with patch.dict(rest_merge.TILINGS, {capability: tiling}):
            yield
    finally:
        rest_merge.tiling.cache_clear()


def lists_unit(
    machine: Machine,
    shape: Shape,
    pattern: Pattern,
    name: str,
    sizes: Sizes,
    label: str,
    how: Callable[..., Exact | Levels],
    part: str,
    dtype: torch.dtype = HALF,
) -> Unit:
    """One way over lists of a pattern. how: (q, k, v, plan) -> what is ready to run."""
    order, density = pattern
    stage = f"{label}, {order}" if label else order

    def act(this: Bench) -> Iterator[Result]:
        coherent = order == "coherent"
        plan = full_blocks(exact_plan(shape, density, sizes, machine.device, coherent))
        ready = how(*this.qkv, plan)
        error = sampled_error(*this.qkv, ready.run(), plan, blocks=2)
        times = this.beside_dense({name: ready.run}, 0.4)
        yield this.row(density, name, stage, times[name], work(plan, shape.head_dim),
                       times.get("dense"), error, sizes)  # fmt: skip

    row = blank(shape, density, name, stage, dtype, sizes)
    return unit(machine, shape, row, act, f"{part} {name}", part)
