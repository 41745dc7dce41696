"""What a preset does to a head: error of the output, recall of the true mass, time, density."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from vidsparse import registry
from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.draft import Draft, taken
from vidsparse.geometry import plan_geometry
from vidsparse.grid import TokenGrid
from vidsparse.inspecting.measure import Truth, figures, truth
from vidsparse.kernels.executor import Executor
from vidsparse.plan import SKIP, BlockPlan
from vidsparse.result import AttentionResult

ORACLE, RANDOM = "oracle", "random"
"""Rows beside the presets: blocks by their true mass, and by chance; all else as `BASE`."""

BASE = "tiles"


@dataclass(frozen=True)
class Head:
    """q, k, v: float32 [S, D], tokens in raster order. source: what it is of, in a word; name:
    which of these."""

    source: str
    name: str
    grid: TokenGrid
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Row:
    """Of one method on one head. asked: density that was to be met, density: that was.

    error: ||out - dense|| / ||dense||. recall: true mass of the listed blocks, mean over queries;
    best: the most that as many could have. planning, seconds: of the call without what executes
    the plan, and of all of it.
    """

    source: str
    head: str
    method: str
    asked: float
    density: float
    error: float
    recall: float
    best: float
    planning: float
    seconds: float


def at_density(config: SparseConfig, density: float) -> SparseConfig:
    """The config with calls of so much work, always sparse, centroids included.

    Every token group that is read counts (`BlockPlan.density`): the centroids of blocks that are
    left out are 1 / block_k of the work, so the selector gets the rest.
    """
    share = 1 / config.kernel.block_k if config.compensation.centroids else 0.0
    left = max(1e-6, (density - share) / (1 - share))
    changes = f"schedule.density={left}", "schedule.min_tokens=0", "kernel.crossover=1"
    return config.override("schedule.name=constant", *changes)


def measured(
    heads: Iterable[Head],
    presets: dict[str, SparseConfig],
    densities: Iterable[float],
    refused: Callable[[str, float, str], None] = lambda name, density, why: None,
) -> Iterator[Row]:
    """Rows of all presets on every head, and of `ORACLE` and `RANDOM`. refused: is told of a preset
    that cannot be at a density, as a pattern that reads more at least; it has no row there."""
    densities = tuple(densities)
    for head in heads:
        q, k, v = (x[None, :, None] for x in (head.q, head.k, head.v))
        dense = functional.scaled_dot_product_attention(head.q, head.k, head.v)
        for name, config in presets.items():
            found: Truth | None = None
            for density in densities:
                start = perf_counter()
                try:
                    result = attend(q, k, v, grid=head.grid, config=at_density(config, density))
                except ValueError as error:
                    refused(name, density, str(error))
                    continue
                seconds = perf_counter() - start
                if result.plan is None:
                    continue
                found = _truth(head, result.plan, config, dense) if found is None else found
                yield _row(head, name, density, result, found, dense, seconds)
        yield from _bounds(head, densities, dense)


def _row(
    head: Head, name: str, asked: float, result: AttentionResult, found: Truth, dense: Tensor,
    seconds: float,
) -> Row:  # fmt: skip
    assert result.plan is not None
    of = figures(found, result.plan, 0)
    return Row(
        head.source, head.name, name, asked, of.density, _error(result.out[0, :, 0], dense),
        of.recall, of.best, seconds - result.seconds["kernel"], seconds,
    )  # fmt: skip


def _truth(head: Head, plan: BlockPlan, config: SparseConfig, dense: Tensor) -> Truth:
    """The true mass of the blocks of a plan."""
    order_q, order_k = plan.order_q, plan.order_k
    if order_q is None or order_k is None:
        sizes = plan.q_blocks.size, plan.k_blocks.size
        geometry = plan_geometry(head.grid, config.layout, config.force, *sizes, head.q.device)
        order_q = order_k = geometry.order.expand(1, 1, -1)
    q, out = (x[order_q[0, 0]] for x in (head.q, dense))
    k, v = (x[order_k[0, 0]] for x in (head.k, head.v))
    return truth(q, k, v, out, (plan.q_blocks, plan.k_blocks))


def _bounds(head: Head, densities: Iterable[float], dense: Tensor) -> Iterator[Row]:
    """The rows beside the presets."""
    config = SparseConfig.load(BASE)
    kernel = replace(config.kernel, impl="auto")
    sizes = 64, config.kernel.block_k
    geometry = plan_geometry(head.grid, config.layout, config.force, *sizes, head.q.device)
    q, k, v = (taken(x[None, None], geometry.order) for x in (head.q, head.k, head.v))
    blocks = geometry.q_blocks, geometry.k_blocks
    found = truth(q[0, 0], k[0, 0], v[0, 0], dense[geometry.order], blocks)
    generator = torch.Generator(head.q.device).manual_seed(0)
    chance = torch.rand(found.mass.shape, generator=generator, device=head.q.device)
    compensation = registry.method("compensation", config.compensation.name)
    executor: Executor = registry.executor("cpu" if head.q.device.type == "cpu" else "triton")
    for name, value in ((ORACLE, found.mass.float()), (RANDOM, chance)):
        for density in densities:
            share = at_density(config, density).schedule.density
            kept = max(1, int(share * len(blocks[1]) + 1e-9))
            chosen = torch.zeros_like(value, dtype=torch.bool)
            chosen.scatter_(1, value.topk(kept, 1).indices, True)
            levels = torch.where(chosen | geometry.forced, 0, SKIP).to(torch.int8)[None, None]
            plan = BlockPlan.from_levels(levels, *blocks, (0,))
            plan = compensation.complete(plan, Draft(q, k, v, *blocks), config.compensation)
            start = perf_counter()
            out, _ = executor.execute(q, k, v, plan, kernel=kernel)
            seconds = perf_counter() - start
            of = figures(found, plan, 0)
            error = _error(out[0, 0], dense[geometry.order])
            place = head.source, head.name, name, density
            yield Row(*place, of.density, error, of.recall, of.best, 0.0, seconds)


def _error(out: Tensor, dense: Tensor) -> float:
    return float((out.double() - dense.double()).norm() / dense.double().norm())
