"""SVG2: k-means clusters of queries and keys, the clusters that are read, and equal blocks."""

from __future__ import annotations

import math
from typing import Any

import masked
import pytest
import torch
from torch import Tensor

from vidsparse.config import SparseConfig
from vidsparse.estimator import cluster_errors
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.layout import kmeans
from vidsparse.memory import Memory
from vidsparse.plan import StepContext
from vidsparse.result import AttentionResult

MANY = "layout.clusters_q=7", "layout.clusters_k=11"
FREE = *MANY, "selector.p=0.6", "schedule.density=0.99999999999"
"""Ragged clusters, and a cap that nothing meets."""


def lloyd(x: Tensor, start: Tensor | int, iterations: int) -> tuple[Tensor, Tensor]:
    """The cluster of each row of float64 [n, D], and the means [C, D]; start: means, or C."""
    if isinstance(start, int):
        start = torch.stack([x[(2 * c + 1) * len(x) // (2 * start)] for c in range(start)])
    means = start.clone()
    for _ in range(iterations):
        owner = torch.stack([(row - means).square().sum(-1).argmin() for row in x])
        for c in range(len(means)):
            if (owner == c).any():
                means[c] = x[owner == c].mean(0)
    return owner, means


class Wanted:
    """SVG2 of one head from its definition: orders of q and k, pairs of clusters, block masks."""

    def __init__(self, q: Tensor, k: Tensor, grid: TokenGrid, config: SparseConfig,
                 start: tuple[Any, Any] = (7, 11), iterations: int = 50) -> None:  # fmt: skip
        base, _ = token_order(grid, config.layout)
        first = grid.text_tokens if grid.text_first else 0
        place = base[first : first + grid.other_tokens]
        self.owner, self.means, self.order = [], [], []
        for x, begin in zip((q, k), start, strict=True):
            owner, means = lloyd(x[place], begin, iterations)
            order = base.clone()
            order[first : first + len(place)] = place[owner.argsort(stable=True)]
            self.owner.append(owner.sort().values)
            self.means.append(means)
            self.order.append(order)
        count = torch.bincount(self.owner[1], minlength=len(self.means[1]))
        weight = count * (self.means[0] @ self.means[1].T / q.shape[-1] ** 0.5).exp()
        self.mass = weight / weight.sum(-1, keepdim=True)
        self.pairs = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        self.at = at = slice(first, first + len(place))
        self.pairs[at, at] = self.chosen(config)[self.owner[0]][:, self.owner[1]]
        spread = torch.zeros(grid.tokens, grid.tokens, dtype=torch.float64)
        spread[at, at] = (self.mass / count.clamp(min=1))[self.owner[0]][:, self.owner[1]]
        self.blocks = masked.blocks_of(self.pairs, *masked.cuts(grid, config))
        q_blocks, k_blocks = masked.cuts(grid, config)
        rows = torch.stack([part.mean(0) for part in spread.split(q_blocks.count.tolist())])
        columns = rows.split(k_blocks.count.tolist(), 1)
        self.of_blocks = torch.stack([part.sum(1) for part in columns], 1)

    def chosen(self, config: SparseConfig) -> Tensor:
        """bool [Cq, Ck]: the clusters of most mass until p is reached, and a tenth of all."""
        found = torch.zeros(self.mass.shape, dtype=torch.bool)
        for row, of in zip(found, self.mass, strict=True):
            total = 0.0
            for n, c in enumerate(of.argsort(descending=True).tolist()):
                if total >= config.selector.p and n >= max(1, math.floor(0.1 * len(of))):
                    break
                row[c] = True
                total += float(of[c])
        return found


class Routed(Wanted):
    """SVG-EAR of one head: which pairs of clusters are exact."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> None:
        self.k, self.v = k, v
        super().__init__(q, k, *others)

    def chosen(self, config: SparseConfig) -> Tensor:
        """bool [Cq, Ck]: as many tokens as it takes to hold the mass p, of the clusters that lose
        most a token where they are centroids; the tenth with the most mass in any case."""
        place = self.order[1][self.at]
        parts = [place[self.owner[1] == c] for c in range(len(self.means[1]))]
        found = torch.zeros(self.mass.shape, dtype=torch.bool)
        for row, mass, query in zip(found, self.mass, self.means[0] / 4, strict=True):
            by_mass, held, budget = mass.argsort(descending=True).tolist(), 0.0, 0
            for rank, c in enumerate(by_mass):
                wanted = held < config.selector.p or rank < max(1, len(parts) // 5)
                budget += wanted * len(parts[c])
                held += float(mass[c])
            lost = []
            for part, mean in zip(parts, self.means[1], strict=True):
                exact = (self.k[part] @ query).exp()[:, None] * self.v[part]
                far = (mean @ query).exp() * self.v[part].mean(0)
                lost.append(float((exact - far).square().sum()) / len(part))
            sure = max(1, len(parts) // 10)
            others = sorted(by_mass[sure:], key=lambda c: -lost[c])
            for rank, c in enumerate(by_mass[:sure] + others):
                row[c] = rank < sure or budget > 0
                budget -= len(parts[c])
        return found


def heads(qkv: list[Tensor], grid: TokenGrid, config: SparseConfig, **how: Any) -> list[Wanted]:
    """Of every batch and head of q and k [B, S, H, D]."""
    q, k = (x.double().transpose(1, 2).flatten(0, 1) for x in qkv[:2])
    return [Wanted(*each, grid, config, **how) for each in zip(q, k, strict=True)]


def stack(found: list[Tensor]) -> Tensor:
    return torch.stack(found).unflatten(0, (2, 2))


def same_orders(result: AttentionResult, wanted: list[Wanted]) -> bool:
    plan = result.plan
    assert plan is not None and plan.order_q is not None and plan.order_k is not None
    of_q, of_k = (stack([w.order[n] for w in wanted]) for n in range(2))
    return torch.equal(plan.order_q, of_q) and torch.equal(plan.order_k, of_k)


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("grid", masked.GRIDS.values(), ids=masked.GRIDS)
def test_blocks_are_read_that_touch_the_clusters_of_most_mass(grid: TokenGrid, impl: str) -> None:
    config, qkv = masked.preset("svg2", *FREE), masked.random(grid)
    result = masked.call(config, qkv, grid, impl)
    wanted = heads(qkv, grid, config)
    assert same_orders(result, wanted)
    assert result.plan is not None and result.ordered is not None and result.ordered.all()
    blocks = stack([w.blocks for w in wanted])
    assert torch.equal(result.plan.levels == 0, blocks)
    assert not blocks.all() and blocks.any(-1).all()
    q_blocks, k_blocks = masked.cuts(grid, config)
    text = q_blocks.text[:, None] | k_blocks.text
    assert blocks[..., text].all() and not torch.equal(*blocks[:, :, ~text].unbind(1))
    assert float(result.plan.density[0, 0]) == pytest.approx(
        masked.share(blocks[0, 0], grid, config)
    )
    masked.reads(result, qkv, blocks, impl)


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("grid", masked.GRIDS.values(), ids=masked.GRIDS)
def test_svg_ear_reads_clusters_that_centroids_describe_worst(grid: TokenGrid, impl: str) -> None:
    config, qkv = masked.preset("svg_ear", *FREE), masked.random(grid)
    result = masked.call(config, qkv, grid, impl)
    each = zip(*(x.double().transpose(1, 2).flatten(0, 1) for x in qkv), strict=True)
    wanted = [Routed(*of, grid, config) for of in each]
    assert same_orders(result, wanted) and result.plan is not None
    blocks = stack([w.blocks for w in wanted])
    assert torch.equal(result.plan.levels == 0, blocks)
    by_mass = masked.call(config.override("estimator.name=clusters"), qkv, grid, impl).plan
    assert by_mass is not None and not torch.equal(by_mass.levels == 0, blocks)
    assert result.plan.rest == result.plan.k_blocks.levels, "what is not read gives its centroid"


def test_errors_of_clusters_hold_for_logits_of_any_size() -> None:
    """Against the definition in float64, of logits past 1000; one token alone loses nothing."""
    generator = torch.Generator().manual_seed(3)
    q, k = (30 * torch.randn(n, 4, generator=generator) for n in (5, 40))
    v, count = torch.randn(40, 6, generator=generator), torch.tensor([7, 0, 1, 32])
    parts = [x.split(count.tolist()) for x in (k, v)]
    k_means = torch.stack([x.mean(0) if len(x) else torch.zeros(4) for x in parts[0]])
    found = cluster_errors.logarithms(q, k_means, k, v, count)
    assert (q @ k.T).abs().max() > 1000
    for a, query in enumerate(q.double()):
        for b, (keys, values) in enumerate(zip(*parts, strict=True)):
            if len(keys) < 2:
                assert found[a, b] == -torch.inf or found[a, b] < found[a].max() - 10
                continue
            top = (keys.double() @ query).max()
            exact = (keys.double() @ query - top).exp()[:, None] * values
            far = (keys.double().mean(0) @ query - top).exp() * values.double().mean(0)
            wanted = (exact - far).square().sum().log() + 2 * top
            assert abs(found[a, b] - wanted) < 1e-5 * max(1.0, abs(top))


@pytest.mark.parametrize("density", [0.2, 0.45])
def test_a_row_that_touches_more_than_the_cap_reads_the_blocks_of_most_mass(density: float) -> None:
    grid, qkv = masked.RAGGED, masked.random(masked.RAGGED)
    config = masked.preset("svg2", *FREE, f"schedule.density={density}")
    result = masked.call(config, qkv, grid)
    wanted = heads(qkv, grid, config)
    q_blocks, k_blocks = masked.cuts(grid, config)
    text, cap = q_blocks.text[:, None] | k_blocks.text, int(density * len(k_blocks))
    capped = 0
    for one, levels in zip(wanted, result.plan.levels.flatten(0, 1), strict=True):  # type: ignore[union-attr]
        rank = (one.of_blocks.masked_fill(~one.blocks, -1) + 9 * text).argsort(-1, True)
        first = torch.zeros_like(text).scatter_(-1, rank[:, :cap], True)
        assert torch.equal(levels == 0, (first & one.blocks) | text)
        capped += int((one.blocks.sum(-1) > cap).sum())
    video = ~q_blocks.text
    assert capped and ((result.plan.levels == 0).sum(-1)[..., video] <= max(cap, 1)).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("impl", masked.EXECUTORS)
def test_equal_blocks_are_a_setting(impl: str) -> None:
    grid = masked.RAGGED
    config = masked.preset(
        "svg2", *MANY, "estimator.name=mean", "selector.p=0.5", "selector.min_share=0",
        "schedule.density=0.9",
    )  # fmt: skip
    qkv = masked.random(grid)
    result = masked.call(config, qkv, grid, impl)
    plan = result.plan
    assert same_orders(result, heads(qkv, grid, config))
    assert plan is not None and plan.order_q is not None and plan.order_k is not None
    forced = plan.q_blocks.text[:, None] | plan.k_blocks.text
    q, k = masked.moved(qkv[0], plan.order_q), masked.moved(qkv[1], plan.order_k)
    kept = masked.top_p(plan, q, k, forced, 0.5)
    assert (kept & ~forced).any() and not kept.all()
    masked.reads(result, qkv, kept, impl)


def test_a_step_goes_on_from_the_centroids_of_the_last_one_until_the_run_ends() -> None:
    grid, config, memory = masked.RAGGED, masked.preset("svg2", *FREE), Memory()
    first, second = masked.random(grid, seed=1), masked.random(grid, seed=2)
    masked.call(config, first, grid, recall=memory.of(3, "cond"))
    warm = masked.call(config, second, grid, recall=memory.of(4, "cond"))
    other = masked.call(config, second, grid, recall=memory.of(4, "uncond"))
    q, k = (x.double().transpose(1, 2).flatten(0, 1) for x in second[:2])
    starts = [tuple(w.means) for w in heads(first, grid, config)]
    wanted = [
        Wanted(*each, grid, config, start=start, iterations=2)
        for *each, start in zip(q, k, starts, strict=True)
    ]
    fresh = heads(second, grid, config)
    assert same_orders(warm, wanted) and not same_orders(warm, fresh)
    assert same_orders(other, fresh), "another branch"
    again = masked.call(config, second, grid, recall=memory.of(0, "cond"))
    assert same_orders(again, fresh), "a loop that has begun anew"
    memory.clear()
    assert same_orders(masked.call(config, second, grid, recall=memory.of(5, "cond")), fresh)
    kept = masked.preset("svg2", *FREE, "layout.refresh=2")
    plans = [
        masked.call(kept, x, grid, recall=memory.of(6 + n, "kept")).plan
        for n, x in enumerate((first, second))
    ]
    assert torch.equal(plans[0].order_k, plans[1].order_k)  # type: ignore[union-attr]
    assert torch.equal(plans[0].levels, plans[1].levels), "of the centroids that were kept"  # type: ignore[union-attr]


def test_clusters_follow_the_tokens_or_are_a_number() -> None:
    assert kmeans.number(0.00397, 75_600) == 300 and kmeans.number(0.01323, 75_600) == 1000
    assert kmeans.number(200, 75_600) == 200 and kmeans.number(200, 7) == 7
    assert kmeans.number(0.001, 9) == 1 and kmeans.number(1, 9) == 1


def test_an_empty_cluster_keeps_its_centroid() -> None:
    rows = torch.tensor([[0.0, 0], [0, 2], [8, 8]], dtype=torch.float64)[None]
    means = torch.tensor([[0.0, 1], [-50, 0], [8, 8]], dtype=torch.float64)[None]
    ranks, count, after = kmeans.iterated(rows, means)
    assert ranks.tolist() == [[0, 1, 2]] and count.tolist() == [[2, 0, 1]]
    assert torch.equal(after, means)


@pytest.mark.parametrize("estimator", ["clusters", "mean"])
@pytest.mark.parametrize("kind", ["more clusters than tokens", "equal tokens", "not finite"])
@pytest.mark.parametrize("impl", masked.EXECUTORS)
def test_every_row_reads_something(impl: str, kind: str, estimator: str) -> None:
    grid, qkv = masked.RAGGED, masked.random(masked.RAGGED)
    changes = (
        ["layout.clusters_q=999", "layout.clusters_k=999", "layout.iterations=3"]
        if kind.startswith("more")
        else []
    )
    if kind == "equal tokens":
        qkv = [torch.full_like(qkv[0], 3.0), torch.full_like(qkv[0], 1.0), qkv[2]]
    if kind == "not finite":
        qkv[0][0, 77, 0, 3], qkv[1][1, 20, 1, 0] = float("nan"), float("inf")
    config = masked.preset(
        "svg2", *FREE, *changes, f"estimator.name={estimator}", "schedule.density=0.4"
    )
    result = masked.call(config, qkv, grid, impl)
    assert result.plan is not None and (result.plan.levels == 0).any(-1).all()
    if kind != "not finite":
        assert result.out.isfinite().all()
        return
    assert result.out[0, 77, 0].isnan().all(), "a query has its row alone"
    result.out[0, 77, 0] = 0
    assert result.out[0].isfinite().all() and result.out[1, :, 0].isfinite().all()


def test_all_clusters_are_dense_attention() -> None:
    grid, qkv = masked.RAGGED, masked.random(masked.RAGGED)
    config = masked.preset("svg2", *FREE, "selector.p=1", "selector.min_share=0.99999",
                           "selector.min_blocks=999")  # fmt: skip
    result = masked.call(config, qkv, grid)
    assert result.density == (1.0, 1.0)
    whole = torch.ones(1, 1, dtype=torch.bool)
    q_blocks, k_blocks = masked.cuts(grid, config)
    whole = whole.expand(len(q_blocks), len(k_blocks))
    masked.close(result, masked.dense_on(qkv, grid, config, whole), "reference")


def test_heads_of_unlike_density_have_their_own_clusters() -> None:
    grid, qkv = masked.RAGGED, masked.random(masked.RAGGED)
    one = masked.preset("svg2", *FREE)
    parts = [masked.call(one.override(f"schedule.density={d}"), qkv, grid).plan for d in (0.3, 0.6)]
    table = "schedule.name=table", "schedule.levels=[0.3,0.6]", "schedule.groups=['01']"
    dense = "schedule.dense_steps=0", "schedule.dense_layers=[]"
    config = one.override(*table, *dense)
    plan = masked.call(config, qkv, grid, context=StepContext(0, 4)).plan
    assert plan is not None and parts[0] is not None and parts[1] is not None
    assert torch.equal(plan.levels[:, 0], parts[0].levels[:, 0])
    assert torch.equal(plan.levels[:, 1], parts[1].levels[:, 1])


def test_refusals() -> None:
    for change, said in (
        ("layout.clusters_q=0", r"layout.clusters_q=0: allowed is a share in \(0, 1\), or an"),
        ("layout.clusters_k=1.5", r"layout.clusters_k=1.5"),
        ("layout.iterations=0", "layout.iterations=0"),
        ("layout.refine=0", "layout.refine=0"),
        ("layout.refresh=0", "layout.refresh=0"),
        ("layout.tile=[0,1,1]", "layout.tile="),
        ("layout.name=tile", "estimator.name='clusters' with layout.name='tile', which makes no"),
        ("force.first_frame=true", "blocks of an order"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseConfig.load("svg2", [change])
