"""Drafts and what is made of them: spread, error-aware scores, tilt; by brute force in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.compensation import tilt
from vidsparse.draft import Draft, strips, taken
from vidsparse.estimator import ear, moments, variance
from vidsparse.grid import TokenGrid
from vidsparse.plan import BlockPlan

GRID = TokenGrid(2, 9, 11, text_tokens=13, before=3)
CUTS = Blocks.cut(GRID, 32), Blocks.cut(GRID, 16)


def made(dtype: torch.dtype = torch.float32, order: str = "none") -> tuple[Draft, list[Tensor]]:
    """A draft, and its q, k, v [B, H, S, D] in float64 in the order of the blocks."""
    q, k, v = ((2 * torch.randn(2, 3, GRID.tokens, 24)).to(dtype) for _ in range(3))
    shape = {"none": None, "all": (GRID.tokens,), "heads": (2, 3, GRID.tokens)}[order]
    orders = [None if shape is None else torch.rand(shape).argsort(-1) for _ in range(2)]
    moved = [taken(x, o).double() for x, o in zip((q, k, v), [*orders, orders[1]], strict=True)]
    return Draft(q, k, v, *CUTS, *orders), moved


def parts(x: Tensor, blocks: Blocks) -> list[Tensor]:
    return list(x.split(blocks.count.tolist(), 2))


@pytest.mark.parametrize("order", ["none", "all", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_spread_and_logits(dtype: torch.dtype, order: str) -> None:
    torch.manual_seed(1)
    draft, (q, k, _) = made(dtype, order)
    before = draft.q.clone(), draft.k.clone()
    means = [
        torch.stack([p.mean(2) for p in parts(x, b)], 2) for x, b in zip((q, k), CUTS, strict=True)
    ]
    squares = torch.stack([p.square().mean(2) for p in parts(q, CUTS[0])], 2)
    variances = torch.stack([p.var(2, correction=0) for p in parts(k, CUTS[1])], 2)
    assert draft.spread.dtype == draft.logits.dtype == torch.float32
    torch.testing.assert_close(
        draft.logits.double(), means[0] @ means[1].mT / 24**0.5, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        draft.spread.double(), squares @ variances.mT / 48, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(draft.q, before[0]) and torch.equal(draft.k, before[1]), "nothing written"
    scores = variance.estimate(draft, variance.Params(bound=1.5))
    want = draft.logits + draft.spread.clamp(max=1.5)
    assert scores.kind == "logit" and torch.equal(scores.value, want)


@pytest.mark.parametrize("order", ["none", "all", "heads"])
def test_error_aware_scores(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    draft, (q, k, v) = made(order=order)
    want = torch.zeros(2, 3, *map(len, CUTS), dtype=torch.float64)
    for i, own in enumerate(parts(q, CUTS[0])):
        mean = own.mean(2, keepdim=True) / 24**0.5
        centres = torch.cat([k, *(p.mean(2, keepdim=True) for p in parts(k, CUTS[1]))], 2)
        top = (mean @ centres.mT).logsumexp(-1, keepdim=True)
        pairs = zip(parts(k, CUTS[1]), parts(v, CUTS[1]), strict=True)
        for j, (keys, values) in enumerate(pairs):
            exact = (mean @ keys.mT - top).exp().mT * values
            far = (mean @ keys.mean(2, keepdim=True).mT - top).exp() * values.mean(2, keepdim=True)
            want[:, :, i, j] = (exact - far).square().sum((-1, -2))
    found = ear.estimate(draft, ear.Params())
    assert found.kind == "rank" and found.value.dtype == torch.float32
    scale = want.amax(-1, keepdim=True)
    assert ((found.value - want).abs() <= 1e-5 * scale).all()
    monkeypatch.setattr("vidsparse.draft.SCRATCH", 1000)  # a few rows at a time
    again = ear.estimate(draft, ear.Params()).value
    assert ((again - found.value).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("order", ["none", "all", "heads"])
def test_error_from_moments(order: str) -> None:
    """The expectation is drawn: logits of a block normal, its values in a random order."""
    torch.manual_seed(4)
    draft, (_, _, v) = made(order=order)
    found = moments.estimate(replace(draft, second=True), moments.Params(bound=0.3))
    assert found.kind == "rank" and torch.equal(
        found.value, moments.estimate(draft, moments.Params(bound=0.3)).value
    )
    spread = draft.spread.double().clamp(max=0.3)
    for b, h, i, j in ((0, 0, 1, 2), (1, 2, 3, 14), (0, 1, 0, 0)):
        values = parts(v, CUTS[1])[j][b, h]
        c, mean = spread[b, h, i, j], draft.logits[b, h, i, j].double()
        drawn = (mean + (2 * c).sqrt() * torch.randn(400_000, len(values)).double()).exp()
        lost = drawn[..., None] * values - (mean + c).exp() * values.mean(0)
        want = lost.square().sum((-1, -2)).mean().log()
        assert float(found.value[b, h, i, j]) == pytest.approx(float(want), abs=0.03)


def test_tilt_weighs_the_rest_by_its_spread() -> None:
    torch.manual_seed(3)
    draft, _ = made()
    levels = torch.where(torch.rand(2, 3, *map(len, CUTS)) < 0.3, 0, -1).to(torch.int8)
    plan = tilt.complete(BlockPlan.from_levels(levels, *CUTS), draft, tilt.Params(bound=0.7))
    assert (plan.rest, plan.first_order) == (4, "row") and plan.levels is levels
    assert plan.rest_bias is not None and torch.equal(plan.rest_bias, draft.spread.clamp(max=0.7))
    assert float(plan.rest_bias.max()) == pytest.approx(0.7) and float(plan.rest_bias.min()) >= 0


def test_strips_cover_all_rows() -> None:
    for rows, numbers in ((1, 1), (7, 1 << 23), (100, 1 << 30), (0, 5)):
        found = [n for cut in strips(rows, numbers) for n in range(cut.start, cut.stop)]
        assert found == list(range(rows))
    assert [cut.stop - cut.start for cut in strips(7, 1 << 23)] == [2, 2, 2, 1]


@pytest.mark.parametrize("module", [variance, moments, tilt], ids=["variance", "moments", "tilt"])
def test_bounds_are_positive(module: object) -> None:
    with pytest.raises(ValueError, match=r"bound=0.*a number"):
        module.Params(bound=0)  # type: ignore[attr-defined]
