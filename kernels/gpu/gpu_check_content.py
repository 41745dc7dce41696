"""Correctness on a GPU of the kernels of content order and of drafts with spread, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from gpu_check_stages import MEAN_LIMIT, PLACES, Inputs, on_inputs, order_of, relative
from gpu_compare import check
from gpu_results import Machine
from gpu_units import Unit

from vidsparse.kernels.gpu import oracles


def content(machine: Machine) -> Iterator[Unit]:
    """What preset `content` launches beside the stages of all methods."""
    acts: dict[str, tuple[float, Callable[[Inputs], float]]] = {
        "second moments": (MEAN_LIMIT, seconds_error),
    }
    for grid, dtype, depth in PLACES[1:2] if machine.dry else PLACES[::2]:
        for name, (bound, act) in acts.items():
            run = partial(on_inputs, act, machine, grid, depth, dtype, "structured")
            yield check(name, f"{grid}, B 2, D {depth}", dtype, "kernel", bound, run,
                        family=f"stage {name}", seconds=0.5)  # fmt: skip


def seconds_error(given: Inputs) -> float:
    """The largest, of moments and of their norms, of tokens in any order."""
    from vidsparse.kernels.gpu.moments import second_moments

    x, blocks = given.k, given.plan.k_blocks
    order, moved = order_of(x, True)
    cut, errors = blocks.on(x.device), []
    for norms in (False, True):
        found = second_moments(x, cut.start, cut.count.int(), blocks.size, order, norms)
        want = oracles.second_moments(moved, blocks.start, blocks.count, norms)
        errors += [relative(one, two) for one, two in zip(found, want, strict=True)]
    return max(errors)
