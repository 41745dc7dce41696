"""Orders of heads by content: what the operator gives with them, which heads take one, how long."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import vidsparse
from vidsparse.attention import attend
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig
from vidsparse.draft import Draft
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.layout import content
from vidsparse.memory import Memory
from vidsparse.plan import SKIP

GRIDS = {
    "plain": TokenGrid(3, 8, 8),
    "ragged-text": TokenGrid(3, 7, 9, text_tokens=13),
    "text-first": TokenGrid(2, 9, 11, text_tokens=20, text_first=True, before=7, after=5),
}


def method(**layout: Any) -> SparseConfig:
    return SparseConfig.from_dict(
        {
            "layout": {"name": "content", "tile": [2, 4, 4], **layout},
            "estimator": {"name": "ear"},
            "selector": {"name": "topk"},
            "compensation": {"name": "tilt"},
            "schedule": {"name": "constant", "density": 0.3, "min_tokens": 0},
            "kernel": {"block_q": 32, "block_k": 16, "impl": "cpu"},
        }
    )


def field(grid: TokenGrid, rank: int, heads: int = 2, depth: int = 32) -> tuple[Tensor, ...]:
    """q, k, v [2, S, H, D] that vary smoothly over the video in `rank` of D dimensions."""
    axes = torch.linspace(0, 1, grid.frames), torch.linspace(0, 1, grid.height)
    points = torch.cartesian_prod(*axes, torch.linspace(0, 1, grid.width))
    found = []
    for gain in (1.0, 1.0, 1.0):
        waves = torch.randn(2, heads, 3, rank) * 9
        shape = torch.sin(points @ waves + 6 * torch.rand(2, heads, 1, rank))
        x = 2 * gain * shape @ torch.randn(2, heads, rank, depth) / rank**0.5
        others = torch.randn(2, heads, grid.tokens - grid.video_tokens, depth)
        first = grid.video_start
        x = torch.cat([others[:, :, :first], x, others[:, :, first:]], 2)
        found.append(x.transpose(1, 2))
    return tuple(found)


@pytest.mark.parametrize("axes", [0, 6])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_output_is_that_of_the_plan_by_definition(grid: TokenGrid, axes: int) -> None:
    torch.manual_seed(axes)
    q, k, v = field(grid, 3)
    result = attend(q, k, v, grid=grid, config=method(axes=axes, gate=False))
    plan = result.plan
    assert plan is not None and plan.order_q is not None and plan.order_k is not None
    assert result.ordered is not None and result.ordered.all()
    assert not torch.equal(plan.order_q[0, 0], plan.order_k[0, 0])
    want, _ = reference.execute(*(x.transpose(1, 2).double() for x in (q, k, v)), plan)
    torch.testing.assert_close(result.out.transpose(1, 2).double(), want, rtol=0, atol=2e-5)
    assert 0.2 < result.density[0] < 0.55


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_only_the_video_is_ordered_and_text_is_exact(grid: TokenGrid) -> None:
    torch.manual_seed(5)
    q, k, v = field(grid, 3)
    plan = attend(q, k, v, grid=grid, config=method(gate=False)).plan
    assert plan is not None and plan.order_q is not None and plan.order_k is not None
    video = slice(grid.video_start, grid.video_start + grid.video_tokens)
    for order in (plan.order_q, plan.order_k):
        rest = order.clone()
        rest[..., video] = torch.arange(grid.tokens)[video]
        assert torch.equal(rest, torch.arange(grid.tokens).expand(rest.shape))
        inside = order[..., video].sort(-1).values - grid.video_start
        assert torch.equal(inside, torch.arange(grid.video_tokens).expand(inside.shape))
    assert (plan.levels[..., plan.k_blocks.text] == 0).all()
    assert (plan.levels[:, :, plan.q_blocks.text] == 0).all()


def test_hoisted_tokens_give_the_same() -> None:
    grid, config = GRIDS["ragged-text"], method()
    torch.manual_seed(7)
    q, k, v = field(grid, 3)
    order, inverse = token_order(grid, config.layout)
    plain = attend(q, k, v, grid=grid, config=config).out
    moved = (x[:, order] for x in (q, k, v))
    hoisted = attend(*moved, grid=grid, config=config, hoisted=True).out
    torch.testing.assert_close(hoisted[:, inverse], plain, rtol=0, atol=1e-6)


def test_density_one_is_dense_attention() -> None:
    grid = GRIDS["ragged-text"]
    torch.manual_seed(8)
    q, k, v = field(grid, 3)
    full = method(gate=False).override("schedule.density=1.0", "schedule.name=constant")
    near = full.override("schedule.density=0.999")
    dense = attend(q, k, v, grid=grid, config=full)
    assert dense.plan is None
    out = attend(q, k, v, grid=grid, config=near.override("selector.min_blocks=9999")).out
    torch.testing.assert_close(out, dense.out, rtol=0, atol=2e-5)


def noise(grid: TokenGrid) -> tuple[Tensor, ...]:
    """q, k, v [2, S, 2, 32]: neighbours in the video are alike, others have nothing in common."""
    shape = 4, 32, grid.frames, grid.height, grid.width
    smooth = partial(torch.nn.functional.avg_pool3d, kernel_size=3, stride=1, padding=1)
    drawn = (smooth(smooth(torch.randn(shape))) for _ in range(3))
    flat = (x.flatten(2).unflatten(0, (2, 2)).permute(0, 3, 1, 2) for x in drawn)
    return tuple(3 * x / x.std() for x in flat)


@pytest.mark.parametrize("rank", [2, 4, 32])
def test_heads_take_the_order_that_loses_less(rank: int) -> None:
    """Few dimensions: by content, and far better; all of them: as the tiles, and never worse."""
    torch.manual_seed(rank)
    grid = TokenGrid(4, 16, 16)
    q, k, v = field(grid, rank) if rank < 32 else noise(grid)
    dense = vidsparse.sparse_attention(q, k, v, grid=grid, config=method().override(
        "schedule.density=1.0"
    ))  # fmt: skip
    errors = {}
    for name, config in (
        ("content", method(gate=False)),
        ("gated", method()),
        ("tiles", method().override("layout.name=tile", "force.own_block=false")),
    ):
        result = attend(q, k, v, grid=grid, config=config)
        errors[name] = (result.out - dense).norm(dim=(1, 3)) / dense.norm(dim=(1, 3))
        if name == "gated":
            assert result.ordered is not None
            assert result.ordered.all() if rank < 5 else not result.ordered.any()
    if rank < 5:
        assert (errors["content"] < 0.6 * errors["tiles"]).all()
    assert (errors["gated"] <= 1.02 * errors["tiles"]).all()


def test_the_waste_of_an_order_by_brute_force() -> None:
    grid = GRIDS["ragged-text"]
    torch.manual_seed(9)
    q, k, v = (x.transpose(1, 2)[:1, :1] for x in field(grid, 3))
    blocks = Blocks.cut(grid, 32), Blocks.cut(grid, 16)
    found = content.waste(Draft(q, k, v, *blocks))
    parts = [
        list(x[0, 0].double().split(b.count.tolist())) for x, b in zip((q, k), blocks, strict=True)
    ]
    keys = [part for part, text in zip(parts[1], blocks[1].text, strict=True) if not text]
    lost, asked = 0.0, 0
    for own, text in zip(parts[0], blocks[0].text, strict=True):
        if text:
            continue
        mean, square = own.mean(0) / 32**0.5, own.square().mean(0) / 32
        logits = torch.stack([mean @ key.mean(0) for key in keys])
        mass = (logits + torch.tensor([len(key) for key in keys]).log()).softmax(0)
        variance = torch.stack([square @ key.var(0, correction=0) for key in keys])
        near = mass.topk(int(0.2 * len(keys))).indices
        lost += len(own) * float((mass * variance).sum() - (mass * variance)[near].sum())
        asked += len(own)
    assert float(found) == pytest.approx(lost / asked, rel=1e-4)


def test_orders_are_kept_for_some_steps_and_per_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, config, memory = GRIDS["plain"], method(refresh=3), Memory()
    made: list[Any] = []
    stock = content.head_orders
    monkeypatch.setattr(
        content, "head_orders", lambda *given: made.append(given[0].q.shape) or stock(*given)
    )
    torch.manual_seed(10)
    q, k, v = field(grid, 3)
    for step in range(7):
        for stream in ("cond", "uncond"):
            recall = memory.of(step, stream)
            attend(q, k, v, grid=grid, config=config, recall=recall)
    assert len(made) == 2 * 3, "at steps 0, 3 and 6"
    attend(q[:1], k[:1], v[:1], grid=grid, config=config, recall=memory.of(7, "cond"))
    assert made[-1][0] == 1, "another batch"
    attend(q, k, v, grid=grid, config=config, recall=memory.of(0, "uncond"))
    assert len(made) == 8, "a run that has begun anew"
    kept = memory.entries["orders", ("uncond",)][2]
    assert sum(x.nbytes for x in kept[:2]) == 8 * q.shape[0] * q.shape[2] * grid.tokens
    memory.clear()
    assert not memory.entries


def test_a_token_that_is_not_finite_stays_in_its_row() -> None:
    grid = GRIDS["plain"]
    torch.manual_seed(11)
    q, k, v = field(grid, 3)
    q[0, 77, 0, 3] = float("nan")
    out = attend(q, k, v, grid=grid, config=method()).out
    assert out[0, 77, 0].isnan().all()
    out[0, 77, 0] = 0
    assert out.isfinite().all()


def test_what_orders_of_heads_do_not_go_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"force.first_frame=True with layout.name='content'"):
        method().override("force.first_frame=true")
    with pytest.raises(ValueError, match=r"selector.name='topp' needs the mass of blocks, and"):
        method().override("selector.name=topp")
    for bad, said in (
        ("layout.axes=65", "0 .. 64"),
        ("layout.refresh=0", ">= 1"),
        ("layout.tile=[1,2]", "three integers"),
        ("layout.inner=odd", "raster, morton, hilbert"),
    ):
        with pytest.raises(ValueError, match=said):
            method().override(bad)


def test_own_blocks_are_those_of_shared_orders_alone() -> None:
    grid = GRIDS["plain"]
    torch.manual_seed(12)
    q, k, v = field(grid, 3)
    one = method().override("schedule.density=0.01", "estimator.name=mean")
    plan = attend(q, k, v, grid=grid, config=one).plan
    assert plan is not None and ((plan.levels == 0).sum(-1) == 1).all()
    tiles = one.override("layout.name=tile")
    plan = attend(q, k, v, grid=grid, config=tiles).plan
    assert plan is not None and ((plan.levels != SKIP).sum(-1) == 2).all(), "32 queries, 16 keys"


def test_batches_and_heads_do_not_mix() -> None:
    grid = GRIDS["ragged-text"]
    torch.manual_seed(13)
    q, k, v = field(grid, 3, heads=3)
    whole = attend(q, k, v, grid=grid, config=method()).out
    for batch in range(2):
        for head in range(3):
            own = (x[batch : batch + 1, :, head : head + 1] for x in (q, k, v))
            alone = attend(*own, grid=grid, config=method()).out
            torch.testing.assert_close(alone[0, :, 0], whole[batch, :, head], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("axes", [0, 6])
def test_heads_are_ordered_together_as_alone(
    monkeypatch: pytest.MonkeyPatch, axes: int, size: int
) -> None:
    """However many are bisected at once, and with blocks of queries like those of keys or not."""
    grid = GRIDS["ragged-text"]
    torch.manual_seed(14)
    q, k, v = (x.transpose(1, 2) for x in field(grid, 3, heads=3))
    params = content.Params(tile=(2, 4, 4), axes=axes, gate=False)
    blocks, base = (Blocks.cut(grid, n) for n in (size, 16)), torch.arange(grid.tokens)
    draft = Draft(q, k, v, *blocks, base, base)
    found = [content.head_orders(draft, grid, params)]
    for many in (1, 5 * grid.video_tokens * 6):
        monkeypatch.setattr(content, "MANY", many)
        found.append(content.head_orders(draft, grid, params))
    for batch, head in product(range(2), range(3)):
        own = (x[batch : batch + 1, head : head + 1] for x in (q, k, v))
        alone = content.head_orders(
            replace(draft, **dict(zip("qkv", own, strict=True))), grid, params
        )
        for orders in found:
            for order, one in zip(orders[:2], alone[:2], strict=True):
                assert torch.equal(order[batch, head], one[0, 0])


def test_a_grid_of_one_token() -> None:
    grid = TokenGrid(1, 1, 1)
    q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
    out = attend(q, k, v, grid=grid, config=replace(method())).out
    torch.testing.assert_close(out, v)
