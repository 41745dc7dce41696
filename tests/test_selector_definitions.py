"""Selectors against their definitions, row by row in exact fractions, ties and bounds included.

Masses are multiples of 1/64, so that many blocks are equal and a sum may meet a bound exactly.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse import registry
from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP, Scores

PARTS = 64
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 11))
DENSITY = st.integers(1, 20).map(lambda n: Fraction(n, 20))
LEAST, SEEDS = st.integers(1, 4), st.integers(0, 10**6)
FLAGS = st.sampled_from([0.0, 0.15, 0.5])


def masses(rows, nk, seed):
    """int64 [2, 2, rows, nk]: random parts that sum to 64, many of them equal, some 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, nk, (2, 2, rows, PARTS), generator=generator)
    return torch.nn.functional.one_hot(drawn, nk).sum(-2)


def flags(rows, nk, share, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, nk, generator=generator) < share


def select(name, weights, forced, density, kind="mass", **values):
    method = registry.method("selector", name)
    nk = weights.shape[-1]
    blocks = Blocks.cut(TokenGrid(1, 1, 64 * nk), 64)
    value = weights.float() / PARTS
    scores = Scores(value.log() if kind == "logit" else value, kind)
    params = method.Params(**values)
    levels = method.select(scores, forced, float(density), blocks, params)
    assert levels.dtype == torch.int8 and levels.shape == weights.shape
    assert {*levels.flatten().tolist()} <= {SKIP, 0, *params.levels}, "executors prepare for these"
    return levels


def rows_of(mass, forced):
    """Every row: where it stands, its masses as fractions, its forced blocks, its order."""
    for at in torch.cartesian_prod(*map(torch.arange, mass.shape[:-1])).tolist():
        row = [Fraction(n, PARTS) for n in mass[tuple(at)].tolist()]
        must = forced[at[-1]].tolist()
        order = sorted(range(len(row)), key=lambda j: (not must[j], -row[j], j))
        yield tuple(at), row, must, order


def floor_of(density, count):
    return int(density * count // 1)


def before(row, order):
    """What stands in front of each rank."""
    return [sum((row[j] for j in order[:rank]), Fraction(0)) for rank in range(len(order))]


@pytest.mark.parametrize("kind", ["mass", "logit"])
@given(size=SIZES, density=DENSITY, share=FLAGS, least=LEAST, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_topk(kind, size, density, share, least, seed):
    mass, forced = masses(*size, seed), flags(*size, share, seed)
    levels = select("topk", mass, forced, density, kind, min_blocks=least)
    for at, _, must, order in rows_of(mass, forced):
        first = order[: max(least, floor_of(density, size[1]))]
        wanted = [0 if must[j] or j in first else SKIP for j in range(size[1])]
        assert levels[at].tolist() == wanted


@pytest.mark.parametrize("kind", ["mass", "logit"])
@given(
    size=SIZES,
    density=DENSITY,
    share=FLAGS,
    least=LEAST,
    p=st.integers(1, 64),
    seed=SEEDS,
)
@settings(max_examples=80, deadline=None)
def test_topp(kind, size, density, share, least, p, seed):
    """A softmax of logits is not exact: there the bound lies between two sums."""
    mass, forced = masses(*size, seed), flags(*size, share, seed)
    p = Fraction(p, PARTS) if kind == "mass" else Fraction(2 * p - 1, 2 * PARTS)
    levels = select("topp", mass, forced, density, kind, p=float(p), min_blocks=least)
    cap = max(least, floor_of(density, size[1]))
    for at, row, must, order in rows_of(mass, forced):
        in_front = before(row, order)
        kept = {j for rank, j in enumerate(order) if rank < least or in_front[rank] < p}
        wanted = [
            0 if must[j] or (j in kept and order.index(j) < cap) else SKIP for j in range(size[1])
        ]
        assert levels[at].tolist() == wanted


@pytest.mark.parametrize(("name", "values"), [
    ("topp", {"p": 0.6}), ("pyramid", {"mode": "mass", "levels": (0, 2), "mass": (0.6, 0.6)}),
])  # fmt: skip
def test_a_short_block_weighs_its_tokens(name, values):
    """Rows are cut in the order of n exp(score): here the best score is of a block of 3 tokens."""
    count = torch.tensor([64, 64, 64, 3])
    keys = Blocks(count.cumsum(0) - count, count, torch.zeros(4, dtype=torch.bool), 64)
    logits = torch.tensor([[0.0, 1.0, 0.5, 2.0]])
    weight = [n * math.exp(x) for n, x in zip(count.tolist(), logits[0].tolist(), strict=True)]
    assert sorted(range(4), key=lambda j: -weight[j]) == [1, 2, 0, 3]
    assert weight[1] < 0.6 * sum(weight) < weight[1] + weight[2]
    method, nothing = registry.method("selector", name), torch.zeros(1, 4, dtype=torch.bool)
    scores = Scores(logits[None, None], "logit")
    levels = method.select(scores, nothing, 0.99, keys, method.Params(**values))
    assert levels.flatten().tolist() == [SKIP, 0, 0, SKIP]


@given(size=SIZES, density=DENSITY, share=FLAGS, least=LEAST, seed=SEEDS)
@settings(max_examples=80, deadline=None)
def test_threshold(size, density, share, least, seed):
    """A head's best blocks of all rows together, after the forced ones and each row's minimum."""
    mass, forced = masses(*size, seed), flags(*size, share, seed)
    levels = select("threshold", mass, forced, density, min_blocks=least)
    budget = max(1, floor_of(density, size[0] * size[1]))
    for head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        found, places = levels[tuple(head)], []
        for at, row, must, _ in rows_of(mass[tuple(head)][None, None], forced):
            best = sorted(range(len(row)), key=lambda j: (-row[j], j))[:least]
            places += [(not (must[j] or j in best), -row[j], at[2], j) for j in range(len(row))]
        places.sort()
        fixed = sum(not place[0] for place in places)
        wanted = torch.full(size, SKIP, dtype=torch.int8)
        for _, _, i, j in places[: max(budget, fixed)]:
            wanted[i, j] = 0
        assert torch.equal(found, wanted)


@given(size=SIZES, density=DENSITY, share=FLAGS, seed=SEEDS)
@settings(max_examples=80, deadline=None)
def test_threshold_apart_is_that_of_draft_attention(size, density, share, seed):
    """The floor(s n)-th smallest of the n free pairs of a head, and all that are not below it."""
    mass, forced = masses(*size, seed), flags(*size, share, seed)
    mass = mass * 64 + torch.rand(mass.shape, generator=torch.Generator().manual_seed(seed)) * 9
    levels = select("threshold", mass, forced, density, "logit", apart=True)
    free = ~forced
    for head, found in zip(mass.flatten(0, 1), levels.flatten(0, 1), strict=True):
        weight = (head.double() / 64).masked_fill(forced, 0.0)
        shares = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)
        n = int(free.sum())
        rank = floor_of(1 - density, n)
        values = shares[free].sort().values
        bound = values[max(rank, 1) - 1] if n else 0.0
        wanted = ((shares >= bound) & free) | forced
        alone = int(((values - bound).abs() <= 1e-5 * bound).sum()) == 1  # to float32
        if bool(wanted.any(-1).all()) and alone:
            assert torch.equal(found == 0, wanted)
        assert bool((found[forced] == 0).all()) and bool((found == 0).any(-1).all())


def spent(levels, order, must, least, limit):
    """The levels of the ranks that a budget of exact blocks pays for; forced ones are paid for."""
    cost, paid = Fraction(0), {}
    for rank, j in enumerate(order):
        fixed = must[j] or rank < least
        level = 0 if fixed else levels[rank]
        cost += 0 if level == SKIP else Fraction(1, 2**level)
        paid[j] = SKIP if cost > limit and not fixed else level
    return [paid[j] for j in range(len(order))]


LEVELS = st.sampled_from([(0,), (0, 1), (0, 3), (0, 1, 3), (0, 2, 5), (0, 1, 2, 6)])


@given(
    size=SIZES,
    density=DENSITY,
    share=FLAGS,
    least=LEAST,
    levels=LEVELS,
    seed=SEEDS,
)
@settings(max_examples=80, deadline=None)
def test_pyramid_by_rank(size, density, share, least, levels, seed):
    """Level l takes the next share_l * density * 2^l of the blocks, here with shares of 1/8."""
    nk, n = size[1], len(levels)
    shares = [Fraction(1, 8)] * (n - 1) + [1 - Fraction(n - 1, 8)]
    mass, forced = masses(*size, seed), flags(*size, share, seed)
    values = {"levels": levels, "shares": tuple(map(float, shares)), "min_blocks": least}
    found = select("pyramid", mass, forced, density, **values)
    end, by_rank = Fraction(0), []
    for level, part in zip(levels, shares, strict=True):
        end += part * density * nk * 2**level
        by_rank += [level] * (min(nk, int(end // 1)) - len(by_rank))
    by_rank += [SKIP] * (nk - len(by_rank))
    for at, _, must, order in rows_of(mass, forced):
        assert found[at].tolist() == spent(by_rank, order, must, least, density * nk)


@given(
    size=SIZES,
    density=DENSITY,
    share=FLAGS,
    least=LEAST,
    levels=LEVELS,
    bounds=st.lists(st.integers(1, 64), min_size=4, max_size=4),
    seed=SEEDS,
)
@settings(max_examples=120, deadline=None)
def test_pyramid_by_mass(size, density, share, least, levels, bounds, seed):
    """A block has the finest level whose boundary the mass in front of it has not reached."""
    bounds = [Fraction(n, PARTS) for n in sorted(bounds[: len(levels)])]
    mass, forced = masses(*size, seed), flags(*size, share, seed)
    values = {"mode": "mass", "levels": levels, "mass": tuple(map(float, bounds))}
    found = select("pyramid", mass, forced, density, min_blocks=least, **values)
    for at, row, must, order in rows_of(mass, forced):
        by_rank = []
        for in_front in before(row, order):
            open_levels = [x for x, b in zip(levels, bounds, strict=True) if in_front < b]
            by_rank.append(open_levels[0] if open_levels else SKIP)
        assert found[at].tolist() == spent(by_rank, order, must, least, density * size[1])


def test_a_level_deeper_than_the_blocks_is_refused():
    mass = masses(1, 3, 0)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert select("pyramid", mass, nothing, 1, levels=(0, 6), shares=(0.5, 0.5)).max() <= 6
    with pytest.raises(ValueError, match=r"selector\.levels=\(0, 7\): .* 6 = log2\(block_k\)"):
        select("pyramid", mass, nothing, 1, levels=(0, 7), shares=(0.5, 0.5))


@pytest.mark.parametrize("name", ["topk", "topp", "pyramid", "threshold"])
def test_a_row_is_selected_alike_in_every_place(name):
    """No row, head or batch entry knows of another; a head's rows share a budget in threshold."""
    mass, forced = masses(3, 9, 5), flags(3, 9, 0.2, 5)
    values = {"mode": "mass"} if name == "pyramid" else {}
    whole = select(name, mass, forced, Fraction(2, 5), **values)
    for b in range(2):
        for h in range(2):
            one = mass[b : b + 1, h : h + 1]
            alone = select(name, one, forced, Fraction(2, 5), **values)
            assert torch.equal(alone[0, 0], whole[b, h])
