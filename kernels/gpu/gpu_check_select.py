"""Correctness on a GPU of draft scores, selection and whole calls: what reads a method's settings.

Selectors that end at a rank must give the level map of torch exactly. Where a level ends at a mass,
float32 sums on the GPU and float64 sums here may lie on either side of the bound: `unjustified`
says which rows have a map that no mass within rounding of the bounds gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil, log2
from typing import Any

import torch
from gpu_cases import method
from gpu_check_stages import PLACES, relative
from gpu_compare import GRIDS, LIMITS, Wrong, check, density_of, level_plan, tokens
from gpu_results import Machine
from gpu_units import Unit
from gpu_ways import Way, here
from sampled import sampled_error
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import oracles
from vidsparse.kernels.gpu.select import MARGIN
from vidsparse.plan import SKIP, Scores

DENSITY = 0.2
EPSILON = 2.0**-24
"""A rounding of float32."""

EXPONENTIAL = 5
"""Roundings of count * exp(x), beside two per unit of x."""


def units(machine: Machine) -> list[Unit]:
    return [*calls(machine), *drafts(machine), *selections(machine)]


def calls(machine: Machine) -> Iterator[Unit]:
    """A whole call of the default method on every engine, against the oracle of its own plan."""
    for one in here(machine):
        for depth in (64,) if machine.dry else (128, 64):
            if sizes := one.sizes(machine, depth):
                yield check("whole call", f"ragged, D {depth}", torch.bfloat16, one.name,
                            LIMITS[torch.bfloat16],
                            partial(call_error, machine, one, depth, sizes[0]))  # fmt: skip


def call_error(
    machine: Machine, one: Way, depth: int, sizes: tuple[int, int]
) -> tuple[float, float]:
    from vidsparse.attention import attend

    plan = level_plan(machine, "ragged", sizes, "exact", "skip")
    q, k, v = tokens(machine, plan, depth, torch.bfloat16)
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    config = method(0.3, sizes, kernel__engine=one.engine, kernel__form=one.form)
    result = attend(*rows, grid=GRIDS["ragged"], config=config, hoisted=True)
    if result.plan is None:
        raise Wrong("the call went dense")
    error = sampled_error(q, k, v, result.out.transpose(1, 2), result.plan)
    return error, density_of(result.plan)


def drafts(machine: Machine) -> Iterator[Unit]:
    """Draft scores of whole blocks and of pieces, of tokens in any order."""
    kinds = {"draft scores": (1, False), "draft scores by an order": (1, True),
             "draft of pieces": (4, False)}  # fmt: skip
    places = PLACES[1:2] if machine.dry else PLACES
    for (grid, dtype, depth), name in product(places, kinds):
        act = partial(draft_error, machine, grid, depth, dtype, *kinds[name])
        yield check(name, f"{grid}, B 2, D {depth}", dtype, "kernel", 1e-5, act,
                    family="stage draft")  # fmt: skip


def draft_error(
    machine: Machine, grid: str, depth: int, dtype: torch.dtype, pieces: int, ordered: bool
) -> float:
    """Of the estimator on this device."""
    from vidsparse.draft import Draft
    from vidsparse.estimator import mean

    plan = level_plan(machine, grid, (128, 64), "mixed", "global", batch=2)
    q, k, _ = tokens(machine, plan, depth, dtype, "structured")
    cuts = plan.q_blocks, plan.k_blocks
    order = torch.randperm(q.shape[2], device=q.device) if ordered else None
    draft = Draft(q, k, k, *cuts, order, order)
    found = mean.estimate(draft, mean.Params(sub_blocks=pieces)).value
    if order is not None:
        q, k = q[:, :, order], k[:, :, order]
    return relative(found, oracles.draft_scores(q, k, *cuts, pieces))


@dataclass(frozen=True)
class Rule:
    """What a selector keeps: level l up to mass bounds[l]; budget: exact blocks, as a share."""

    levels: tuple[int, ...]
    bounds: tuple[float, ...]
    min_blocks: int
    whole: bool
    """Whether the budget is rounded down to whole blocks."""

    def budget(self, blocks: int) -> float:
        most = DENSITY * blocks + 1e-9
        return float(max(self.min_blocks, int(most))) if self.whole else most


def selectors() -> dict[str, tuple[Any, Any, Rule | None]]:
    """Name -> the selector, its settings, and the rule of one that ends at a mass."""
    from vidsparse.selector import pyramid, topk, topp

    levels: dict[str, Any] = {"levels": (0, 1, 4), "min_blocks": 2}
    bounds = (0.3, 0.6, 0.95)
    return {
        "topk": (topk, topk.Params(), None),
        "quota": (pyramid, pyramid.Params(shares=(0.5, 0.3, 0.2), **levels), None),
        "topp": (topp, topp.Params(p=0.7), Rule((0,), (0.7,), 1, True)),
        "mass": (pyramid, pyramid.Params(mode="mass", mass=bounds, **levels),
                 Rule((0, 1, 4), bounds, 2, False)),
    }  # fmt: skip


def selections(machine: Machine) -> Iterator[Unit]:
    """Share of rows with a wrong map; of random scores and of scores that tie, of both kinds."""
    for blocks, name in product((33,) if machine.dry else (33, 1182, 4097), selectors()):
        kinds = ("logit", "mass") if selectors()[name][2] else ("logit",)
        for kind, ties in product(kinds, (True,) if machine.dry else (False, True)):
            label = f"select: {name} by {kind}{', ties' * ties}"
            act: Callable[[], float] = partial(select_error, machine, name, blocks, kind, ties)
            yield check(label, f"{blocks} blocks", torch.float32, "kernel", 0.0, act,
                        family="stage select")  # fmt: skip


def select_error(machine: Machine, name: str, blocks: int, kind: Any, ties: bool) -> float:
    """With ties, logits are multiples of 1."""
    module, params, rule = selectors()[name]
    value = 2 * torch.randn(1, 2, 7, blocks)
    value = value.round() if ties else value
    value = value if kind == "logit" else value.softmax(-1)
    forced = torch.rand(7, blocks) < 0.05
    cut = key_blocks(blocks)
    scores = Scores(value.to(machine.device), kind)
    found = module.select(scores, forced.to(machine.device), DENSITY, cut, params).cpu()
    found = found.masked_fill(forced, 0)
    exact = Scores(value.double(), kind)
    if rule is None:
        want = module.select(exact, forced, DENSITY, cut, params)
        wrong = (found != want.masked_fill(forced, 0)).any(-1)
    else:
        wrong = unjustified(found, exact, forced, cut, rule)
    return float(wrong.double().mean())


def key_blocks(blocks: int) -> Blocks:
    """So many blocks of 64 tokens, the last of 5."""
    count = torch.full((blocks,), 64)
    count[-1] = 5
    return Blocks(count.cumsum(0) - count, count, torch.zeros(blocks, dtype=torch.bool), 64)


def rounding(scores: Scores) -> Tensor:
    """Relative error of a mass in float32 to the mass of its row, [B, H, nq, 1].

    A sum of n numbers in pairs is rounded log2 n times; exp(x) is as wrong as x is long. Twice, of
    the mass and of the whole; and the kernel ends `MARGIN` early on purpose.
    """
    long = scores.value.amax(-1, keepdim=True) - scores.value.amin(-1, keepdim=True)
    long = long if scores.kind == "logit" else torch.zeros_like(long)
    sums = ceil(log2(scores.value.shape[-1])) + 1
    return MARGIN + 2 * EPSILON * (sums + EXPONENTIAL + 2 * long)


def unjustified(
    found: Tensor, scores: Scores, forced: Tensor, k_blocks: Blocks, rule: Rule
) -> Tensor:
    """bool [B, H, nq]: rows whose level map follows from no bounds within rounding of the rule's.

    found: int8 [B, H, nq, nk], forced blocks at 0. scores: float64. From the definition: along the
    ranking a block has the first level whose bound is above the mass in front of it; forced blocks
    and the first min_blocks are exact; the first block that costs more than the budget, and all
    after it, are not listed.
    """
    ranked = scores.weighted(k_blocks).ranked(forced)
    level = found.gather(-1, ranked).long()
    nk = level.shape[-1]
    rank = torch.arange(nk)
    fixed = forced.expand_as(ranked).gather(-1, ranked) | (rank < rule.min_blocks)
    mass = scores.mass(k_blocks).gather(-1, ranked)
    before = mass.cumsum(-1) - mass
    slack = rounding(scores)
    total = mass.sum(-1, keepdim=True)
    steps = [bound * total for bound in rule.bounds]
    finest = sum((before >= step * (1 + slack)).long() for step in steps)
    coarsest = sum((before >= step * (1 - slack) - 1e-12).long() for step in steps)

    cost = torch.tensor([*(0.5**one for one in rule.levels), 0.0], dtype=torch.float64)
    place = torch.full_like(level, -1)
    for n, one in enumerate((*rule.levels, SKIP)):
        place[level == one] = n
    kept = (place >= 0) & (place < len(rule.levels))
    spent = cost[place.clamp(min=0)].cumsum(-1)
    budget = rule.budget(nk)

    right = torch.where(fixed, place == 0, (finest <= place) & (place <= coarsest))
    right &= fixed | (spent <= budget + 1e-9)
    ends = kept.long().cumprod(-1).sum(-1, keepdim=True)
    past = rank >= ends
    first = rank == ends
    earlier = spent - cost[place.clamp(min=0)]
    no_room = earlier + cost[finest] > budget + 1e-9
    over = (coarsest == len(rule.levels)) | no_room
    skipped = place == len(rule.levels)
    right = torch.where(past, skipped & ~fixed & (over | ~first), right)
    return ~right.all(-1)
