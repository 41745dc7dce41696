"""A sparse call in a CUDA graph: captured once, replayed on other numbers, never waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_cases import SIZES
from gpu_compare import Absent, Wrong, check, level_plan, tokens
from gpu_results import Machine
from gpu_units import Unit
from gpu_ways import Way, here
from torch import Tensor

from vidsparse.kernels.gpu import engine
from vidsparse.plan import BlockPlan

HALF = torch.bfloat16
KINDS = {"exact": ("exact", "global", {}), "levels": ("mixed", "global", {}),
         "int8": ("exact", "skip", {"qk": "int8"})}  # fmt: skip
"""Of calls: kind and rest of their plans, further settings."""


def graphs(machine: Machine) -> Iterator[Unit]:
    """A replay must give what the call gives, bit for bit."""
    for kind, (levels, rest, settings) in KINDS.items():
        exact = [(one, one.sizes(machine)[0]) for one in here(machine)]
        other = [(Way(f"triton-{kind}", "auto", "auto"), SIZES[0])]
        for one, sizes in exact if kind == "exact" else other:
            act = partial(replay_error, machine, levels, rest, sizes, {**one.settings, **settings})
            yield check(f"CUDA graph: {kind}", "ragged, D 128", HALF, one.name, 0.0, act,
                        seconds=2.0)  # fmt: skip


def replay_error(
    machine: Machine, kind: str, rest: str, sizes: tuple[int, int], how: dict[str, Any]
) -> float:
    """Largest difference of a replay on new tokens and levels; raises `Wrong` for a wait."""
    if machine.dry:
        raise Absent("a dry run has no CUDA graphs")
    plan, other = (level_plan(machine, "ragged", sizes, kind, rest) for _ in range(2))
    given, new = (tokens(machine, each, 128, HALF) for each in (plan, other))
    call = partial(engine.execute, *given, plan, return_lse=True, **how)
    call()
    try:
        no_wait(call)
    except RuntimeError as error:
        raise Wrong(f"the call waits for the device: {error}") from error
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for x, y in zip((*given, plan.levels), (*new, other.levels), strict=True):
        x.copy_(y)
    graph.replay()
    return difference(found, expected(new, other, how))


def expected(qkv: tuple[Tensor, ...], plan: BlockPlan, how: dict[str, Any]) -> tuple[Any, ...]:
    q, k, v = qkv
    return engine.execute(q, k, v, plan, return_lse=True, **how)


def difference(found: tuple[Any, ...], want: tuple[Any, ...]) -> float:
    """Of outputs and of LSE, where -inf equals -inf."""
    pairs = zip(found, want, strict=True)
    return max(float((a.float() - b.float()).abs().nan_to_num(nan=1.0).masked_fill(a == b, 0).max())
               for a, b in pairs)  # fmt: skip


def no_wait(act: Callable[[], Any]) -> Any:
    """What act gives; a RuntimeError if it waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return act()
    finally:
        torch.cuda.set_sync_debug_mode(before)
