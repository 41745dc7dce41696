"""Correctness on a GPU of the kernels of content order and of drafts with spread, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import inf

import torch
from gpu_check_stages import MEAN_LIMIT, PLACES, Inputs, on_inputs, order_of, relative
from gpu_compare import Wrong, check
from gpu_results import Machine
from gpu_units import Unit
from torch import Tensor

from vidsparse.draft import TINY, Draft
from vidsparse.kernels.gpu import oracles

WEIGHT_LIMIT = 2e-5
SCORE_LIMIT = 1e-5
"""Relative L2 of scores."""


def content(machine: Machine) -> Iterator[Unit]:
    """What presets with content order launch beside the stages of all methods."""
    acts: dict[str, tuple[float, Callable[[Inputs], float]]] = {
        "second moments": (MEAN_LIMIT, seconds_error),
        "draft with spread": (SCORE_LIMIT, spread_error),
        "errors of blocks": (SCORE_LIMIT, block_error),
        "lost mass": (SCORE_LIMIT, lost_error),
        "grams and projection": (SCORE_LIMIT, rows_error),
        "weights of the rest": (WEIGHT_LIMIT, weights_error),
        "bisection": (0.0, cuts_error),
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


def spread_error(given: Inputs) -> float:
    """The largest, of the scores by every rule."""
    from vidsparse.kernels.gpu.spread import RULES

    operands = given.q, given.k, given.v, given.plan.q_blocks, given.plan.k_blocks
    return max(
        relative(drafted(given, rule, 2.0), oracles.draft_spread(*operands, rule, 2.0))
        for rule in RULES
    )


def block_error(given: Inputs) -> float:
    """Of logarithms, in blocks of more than a token: of one, a centroid loses nothing."""
    from vidsparse.kernels.gpu.block_errors import block_errors

    cuts = given.plan.q_blocks, given.plan.k_blocks
    cut = cuts[1].on(given.q.device)
    means = oracles.block_means(given.q, cuts[0].start, cuts[0].count).float()
    place = cut.start, cut.count.int(), cuts[1].size, None
    found = block_errors(means, given.k, given.v, *place, given.q.shape[3] ** -0.5, TINY)
    want = oracles.block_errors(given.q, given.k, given.v, *cuts)
    several = cut.count > 1
    return relative(found[..., several], want[..., several])


def weights_error(given: Inputs) -> float:
    """The largest, of means of sound tokens, weights for moments, and biases of centroids."""
    from vidsparse.kernels.gpu.moments import finite_means
    from vidsparse.kernels.gpu.rest import _bias
    from vidsparse.kernels.gpu.weights import rest_bias, rest_weights

    x, blocks = given.q.clone(), given.plan.q_blocks
    x[:, :, ::7, 0] = inf
    cut = blocks.on(x.device)
    means = finite_means(x, cut.start, cut.count.int(), blocks.size, None)
    errors = [relative(means, oracles.finite_means(x, blocks.start, blocks.count))]
    levels = torch.where(torch.rand(given.plan.levels.shape, device=x.device) < 0.3, 0, -1)
    levels, tilt = levels.to(torch.int8), torch.randn(levels.shape, device=x.device)
    count = given.plan.k_blocks.on(x.device).count
    logits = torch.randn(levels.shape, device=x.device)
    wanted = oracles.rest_weights(logits, levels, tilt, count)
    columns = logits.shape[3] + 3
    found = rest_weights(logits, levels, tilt, count.int(), columns, torch.float32)
    errors.append(relative(found, torch.nn.functional.pad(wanted, (0, 3))))
    bias = _bias(given.plan.k_blocks, x.device)
    found, wanted = rest_bias(levels, tilt, bias), oracles.rest_bias(levels, tilt, bias)
    if not torch.equal(found.isinf(), wanted.isinf()):
        raise Wrong("a block that is listed has a bias, or another has none")
    errors.append(relative(found.nan_to_num(neginf=0.0), wanted.nan_to_num(neginf=0.0)))
    return max(errors)


def drafted(given: Inputs, rule: str, bound: float) -> Tensor:
    cuts = given.plan.q_blocks, given.plan.k_blocks
    return Draft(given.q, given.k, given.v, *cuts, second=True).in_one_pass(rule, bound, TINY)


def lost_error(given: Inputs) -> float:
    """Of scores that a call would have."""
    from vidsparse.kernels.gpu.waste import lost_mass

    cut = given.plan.k_blocks.on(given.q.device)
    logits, spread = drafted(given, "variance", 1.0), drafted(given, "spread", inf)
    operands = logits, spread, cut.count, cut.text, 3
    return relative(lost_mass(*operands), oracles.lost_mass(*operands))


def rows_error(given: Inputs) -> float:
    """The largest, of both sums and of rows on six axes, in any order."""
    from vidsparse.kernels.gpu.projection import grams, project

    x, part = given.k, (3, given.k.shape[2] - 8)
    basis = torch.randn(*x.shape[:2], x.shape[3], 6, device=x.device)
    order, _ = order_of(x, True)
    errors = [
        relative(*pair) for pair in zip(grams(x, *part), oracles.grams(x, *part), strict=True)
    ]
    how = basis, order, *part
    return max(*errors, relative(project(x, *how), oracles.project(x, *how)))


def cuts_error(given: Inputs) -> float:
    """Rows in another place than by the definition; some parts are longer than a program."""
    from vidsparse.kernels.gpu.bisect import bisect

    wrong = 0
    for rows in (given.k.shape[2], 20_000):
        x = torch.randn(2, 2, 6, rows, device=given.k.device)
        names = torch.randperm(rows, device=x.device).int()
        found = bisect(x, names, [128, 64])
        for one, own, size in zip(found, x, (128, 64), strict=True):
            wrong += int((one != oracles.bisect(own[None], names, size)[0]).sum())
    return float(wrong)
