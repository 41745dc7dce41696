"""Presets ear and proxy: how many blocks a row reads, and which, by the papers' formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from by_formula import HEADS, Call, call, ordered

from vidsparse.blocks import Blocks
from vidsparse.draft import Draft
from vidsparse.estimator import proxy
from vidsparse.grid import TokenGrid
from vidsparse.inspecting import measure
from vidsparse.plan import SKIP


def kept(
    made: Call, b: int, h: int, i: int, value: torch.Tensor, p: float, reserve: float, most: float
) -> list[bool]:
    """Budget in tokens by mass, forced blocks first; the largest by mass, as far as `most` pays for
    them beside these; then by falling value."""
    count = made.plan.k_blocks.count.tolist()
    nk, forced = len(count), made.forced[i].tolist()
    logit = made.logits(b, h)[i].tolist()
    mass = [n * math.exp(x) for n, x in zip(count, logit, strict=True)]
    front, budget = 0.0, 0
    for rank, j in enumerate(ordered(mass, forced)):
        if front < p * sum(mass) or rank < max(1, math.floor(2 * reserve * nk)):
            budget += count[j]
        front += mass[j]
    held = max(1, math.floor(reserve * nk)) if reserve else 0
    fixed = forced[:]
    for j in ordered(mass, [False] * nk)[:held]:
        beside = sum(n for n, one in zip(count, fixed, strict=True) if one)
        fixed[j] = fixed[j] or beside + count[j] <= most * sum(count)
    found, spent = fixed[:], 0
    for rank, j in enumerate(ordered(value.tolist(), fixed)):
        if rank == 0 or (spent < budget and spent + count[j] <= most * sum(count)):
            found[j] = True
        spent += count[j]
    return found


def errors(made: Call, b: int, h: int, i: int) -> torch.Tensor:
    """ln E_ic - ln n_c of SVG-EAR."""
    q = made.blocks("q", b, h)[i].mean(0) * made.q.shape[-1] ** -0.5
    found = []
    for k, v in zip(made.blocks("k", b, h), made.blocks("v", b, h), strict=True):
        exact = (k @ q).exp()[:, None] * v
        far = torch.exp(k.mean(0) @ q) * v.mean(0)
        found.append((exact - far).square().sum().log() - math.log(len(k)))
    return torch.stack(found)


@pytest.mark.parametrize("most", [0.3, 0.9])
def test_ear_spends_what_mass_asks_for_on_the_largest_errors(most: float) -> None:
    made = call("ear", f"schedule.density={most}", "selector.p=0.6")
    assert made.plan.rest == 4, "all others are centroids"
    by_mass = 0
    for b, h, i, _ in made.rows():
        wanted = kept(made, b, h, i, errors(made, b, h, i), 0.6, 0.1, most)
        assert (made.plan.levels[b, h, i] == 0).tolist() == wanted, (b, h, i)
        by_mass += wanted == kept(made, b, h, i, made.logits(b, h)[i], 0.6, 0.1, most)
    assert by_mass < len(HEADS) * len(made.plan.q_blocks), "and not on the largest masses"


def test_ear_is_no_worse_than_mass_at_its_cost() -> None:
    """On smooth fields with centroids for the rest, as SVG-EAR says, and as it costs."""
    lost = {}
    for name, changes in (("ear", ()), ("mass", ("estimator.name=mean",))):
        total = 0.0
        for seed in range(3):
            made = call("ear", *changes, "selector.p=0.6", "schedule.density=0.4", seed=seed)
            dense = torch.nn.functional.scaled_dot_product_attention(made.q, made.k, made.v)
            total += float((made.out - dense).norm() / dense.norm())
        lost[name] = total
    assert lost["ear"] <= lost["mass"]


def test_what_is_reserved_stays_within_the_density() -> None:
    """Of text and the own block and a fifth of the blocks, what they cost together."""
    made = call("ear", "schedule.density=0.3", "selector.reserve=0.3")
    exact, count = made.plan.levels == 0, made.plan.k_blocks.count
    cost, forced = (exact * count).sum(-1), (made.forced * count).sum(-1)
    most = torch.maximum(forced, torch.tensor(int(0.3 * int(count.sum()))))
    assert bool((cost <= most).all()) and bool((cost > forced).any())


def test_groups_of_heads_are_as_many_as_are_asked_for() -> None:
    """Of 5 heads in 4 groups the first two share a proxy, the others have their own."""
    cut = Blocks.cut(TokenGrid(1, 1, 40), 16)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 5, 40, 8, generator=generator).double() for _ in range(3))
    found = proxy.estimate(Draft(q, k, v, cut, cut), proxy.Params(groups=4, stride=1)).value
    for part in ([0, 1], [2], [3], [4]):
        logits = (q[0, part].mean(0) @ k[0, part].mean(0).T) / 8**0.5
        rows = torch.stack([x.amax(0) for x in logits.split(cut.count.tolist())])
        wanted = torch.stack([x.amax(1) for x in rows.split(cut.count.tolist(), 1)], 1)
        for h in part:
            torch.testing.assert_close(found[0, h].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_proxy_ranks_by_the_mean_head_and_counts_by_the_own(groups: int) -> None:
    made = call("proxy", f"estimator.groups={groups}", "selector.p=0.7", "schedule.density=0.9")
    scale, rows = made.q.shape[-1] ** -0.5, made.plan.q_blocks
    assert made.plan.rest == SKIP
    for b, h, i, _ in made.rows():
        q, k = (x[b].mean(0) if groups == 1 else x[b, h] for x in (made.q, made.k))
        parts_q, parts_k = (
            [part[::4] for part in x.split(cut.count.tolist())]
            for x, cut in ((q, rows), (k, made.plan.k_blocks))
        )
        value = torch.stack([(parts_q[i] @ part.T).max() * scale for part in parts_k])
        wanted = kept(made, b, h, i, value, 0.7, 0.0, 0.9)
        assert (made.plan.levels[b, h, i] == 0).tolist() == wanted, (b, h, i)
    if groups == 1:
        counts = (made.plan.levels == 0).sum(-1)
        assert not torch.equal(counts[:, 0], counts[:, 1]), "a sharp head reads fewer"


def test_what_inspect_shows_of_a_head_is_what_its_selector_was_told() -> None:
    """One head is asked for, and its ranking is that of the mean of both."""
    made = call("proxy", "force.text=false", "schedule.density=0.2")
    seen = SimpleNamespace(**{n: getattr(made, n).transpose(1, 2) for n in "qkv"})
    (shares,) = measure.draft(seen, made.plan, made.config, [1])
    kept = made.plan.levels[0, 1] == 0
    least = shares.masked_fill(~kept, torch.inf).amin(-1)
    assert bool((least >= shares.masked_fill(kept, 0.0).amax(-1) - 1e-9).all())
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares)))


def test_proxy_in_orders_of_heads() -> None:
    """Queries and keys of every head stand elsewhere; the proxy is ranked in the head's order."""
    from by_formula import GRID, SMALL, field

    from vidsparse.attention import attend
    from vidsparse.config import SparseConfig

    config = SparseConfig.load("proxy", [*SMALL, "layout.name=content", "layout.gate=false"])
    q, k, v = field(GRID, 1)
    result = attend(q, k, v, grid=GRID, config=config, impl="cpu")
    assert result.plan is not None and result.plan.order_k is not None
    assert bool(result.out.isfinite().all())
