"""What the GPU suite takes for a right selection: what follows from bounds within rounding."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import gpu_suite  # noqa: F401 - the path
from gpu_check_select import Rule, key_blocks, rounding, unjustified

from vidsparse.plan import SKIP, Scores
from vidsparse.selector import pyramid, topp

RULES = {"topp": Rule((0,), (0.7,), 1, True), "mass": Rule((0, 1, 4), (0.3, 0.6, 0.95), 2, False)}
BLOCKS = 33


def oracle(name: str, scores: Scores, forced: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """The selector in torch with bounds that are off by a share."""
    bounds = tuple(bound * (1 + shift) for bound in RULES[name].bounds)
    module, params = topp, topp.Params(p=bounds[0])
    if name == "mass":
        module, params = (
            pyramid,
            pyramid.Params(mode="mass", mass=bounds, levels=(0, 1, 4), min_blocks=2),
        )
    levels = module.select(scores, forced, 0.2, key_blocks(BLOCKS), params)
    return levels.masked_fill(forced, 0)


def sharp(spread: float) -> tuple[Scores, torch.Tensor]:
    """Rows whose mass is in a few blocks, so that bounds come before the budget does."""
    torch.manual_seed(3)
    value = spread * torch.randn(2, 3, 50, BLOCKS, dtype=torch.float64)
    return Scores(value, "logit"), torch.rand(50, BLOCKS) < 0.03


@pytest.mark.parametrize("name", RULES)
def test_right_selections_are_right(name: str) -> None:
    for spread in (0.5, 2.0, 5.0):
        scores, forced = sharp(spread)
        found = oracle(name, scores, forced)
        assert not unjustified(found, scores, forced, key_blocks(BLOCKS), RULES[name]).any()


def test_either_side_of_a_bound_is_right() -> None:
    """Of ten equal blocks five or six: both follow from a mass within rounding of one half."""
    mass = torch.full((1, 1, 1, BLOCKS), 1e-9 / (BLOCKS - 10), dtype=torch.float64)
    mass[..., :10] = (1 - 1e-9) / 10
    scores, forced = Scores(mass, "mass"), torch.zeros(1, BLOCKS, dtype=torch.bool)

    def wrong(bound: float) -> set[int]:
        """Numbers of blocks that are no right selection."""
        return {
            blocks
            for blocks in range(1, 7)
            if unjustified(
                torch.where(torch.arange(BLOCKS) < blocks, 0, SKIP).to(torch.int8).expand_as(mass),
                scores, forced, key_blocks(BLOCKS), Rule((0,), (bound,), 1, True),
            ).any()
        }  # fmt: skip

    assert wrong(0.5) == {1, 2, 3, 4}
    assert wrong(0.5 + 1e-4) == {1, 2, 3, 4, 5}
    assert wrong(0.5 - 1e-4) == {1, 2, 3, 4, 6}


@pytest.mark.parametrize("name", RULES)
def test_wrong_selections_are_wrong(name: str) -> None:
    """Bounds off by 1e-3, another block, a hole, a level too fine, a forced block left out."""
    cut, rule = key_blocks(BLOCKS), RULES[name]
    scores, forced = sharp(5.0)
    right = oracle(name, scores, forced)
    for shift in (-0.01, 0.01):
        off = oracle(name, scores, forced, shift)
        differs = (off != right).any(-1)
        assert differs.any()
        assert torch.equal(unjustified(off, scores, forced, cut, rule), differs)
    ranked = scores.weighted(cut).ranked(forced)

    def changed(rank: int, level: int) -> torch.Tensor:
        """The maps with one place of the ranking at a level, and which of them differ by it."""
        at = ranked[..., rank : rank + 1]
        return right.scatter(-1, at, level)

    for rank, level in ((0, SKIP), (BLOCKS - 1, 0), (0, 2), (BLOCKS - 1, 7)):
        assert unjustified(changed(rank, level), scores, forced, cut, rule).all()
    if forced.any():
        dropped = right.masked_fill(forced, SKIP)
        some = forced.any(-1).expand(right.shape[:-1])
        assert unjustified(dropped, scores, forced, cut, rule)[some].all()
    flat, none = sharp(0.0)[0], torch.zeros(50, BLOCKS, dtype=torch.bool)
    all_exact = torch.zeros(flat.value.shape, dtype=torch.int8)
    assert unjustified(all_exact, flat, none, cut, rule).all()  # far over the budget


def test_rounding_is_as_wide_as_float32_needs() -> None:
    """Sums in float32 of the longest rows stay within it, and it is no wider than 2e-5."""
    torch.manual_seed(0)
    value = 3 * torch.randn(1, 1, 20, 8192)
    scores = Scores(value.double(), "logit")
    cut = key_blocks(8192)
    exact = scores.mass(cut).cumsum(-1)
    b_mass = cut.count.float() * (value - value.amax(-1, keepdim=True)).exp()
    found = torch.stack([b_mass[..., :n].sum(-1) for n in range(64, 8192, 256)], -1)
    share = found.double() / b_mass.sum(-1, keepdim=True).double()
    want = torch.stack([exact[..., n - 1] for n in range(64, 8192, 256)], -1)
    slack = rounding(scores)
    assert bool(((share / want - 1).abs() <= slack).all())
    assert float(slack.max()) < 2e-5
