"""Estimators, forced blocks, selectors, compensations and schedules by their definitions."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse import registry
from vidsparse.blocks import Blocks
from vidsparse.config import Force, SparseConfig, presets
from vidsparse.draft import Draft
from vidsparse.estimator import mean
from vidsparse.force import forced_blocks
from vidsparse.geometry import plan_geometry, token_order
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import oracles
from vidsparse.plan import SKIP, BlockPlan, Scores, StepContext

GRID = TokenGrid(3, 5, 7, text_tokens=21)
CPU = torch.device("cpu")


def random_scores(nq: int = 9, nk: int = 20, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores(torch.randn(2, 3, nq, nk, generator=generator), "logit")


def k_blocks(nk: int = 20, size: int = 64) -> Blocks:
    return Blocks.cut(TokenGrid(1, 1, nk * size - 7), size)


def nothing(scores: Scores) -> torch.Tensor:
    return torch.zeros(scores.value.shape[-2:], dtype=torch.bool)


def section(stage: str, **values: object) -> object:
    return getattr(SparseConfig.from_dict({stage: values}), stage)


def select(scores: Scores, forced: torch.Tensor, density: float, **values: object) -> torch.Tensor:
    params = section("selector", **values)
    blocks = k_blocks(scores.value.shape[-1])
    module = registry.method("selector", params.name)
    return module.select(scores, forced, density, blocks, params)


# estimator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sub", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mean_estimate_is_the_log_mean_exp_over_sub_block_means(sub, dtype):
    q, k = (torch.randn(2, 2, GRID.tokens, 16).to(dtype) for _ in range(2))
    q_cut, k_cut = Blocks.cut(GRID, 32), Blocks.cut(GRID, 16)
    params = mean.Params(sub_blocks=sub)
    scores = mean.estimate(Draft(q, k, k, q_cut, k_cut), params)
    assert scores.kind == "logit" and scores.value.dtype == torch.float32
    wanted = oracles.draft_scores(q, k, q_cut, k_cut, sub)
    torch.testing.assert_close(scores.value.double(), wanted, rtol=1e-4, atol=1e-5)


# forced blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("layout", ["raster", "hilbert"])
def test_forced_blocks_by_brute_force(layout, first):
    grid = TokenGrid(3, 5, 7, text_tokens=21, text_first=first)
    order, _ = token_order(grid, section("layout", name=layout))
    q_cut, k_cut = Blocks.cut(grid, 32), Blocks.cut(grid, 16)
    raster = order - grid.video_start
    is_text = (raster < 0) | (raster >= grid.video_tokens)
    frame = torch.where(is_text, -1, raster // 35)
    for name in ("text", "own_block", "first_frame", "same_frame"):
        switches = dict.fromkeys(("text", "own_block", "first_frame", "same_frame"), False)
        got = forced_blocks(Force(**(switches | {name: True})), grid, order, q_cut, k_cut)
        for i in range(len(q_cut)):
            for j in range(len(k_cut)):
                tq = torch.arange(int(q_cut.start[i]), int(q_cut.start[i] + q_cut.count[i]))
                tk = torch.arange(int(k_cut.start[j]), int(k_cut.start[j] + k_cut.count[j]))
                video_q, video_k = set(frame[tq].tolist()) - {-1}, set(frame[tk].tolist()) - {-1}
                wanted = {
                    "text": bool(is_text[tq].any() or is_text[tk].any()),
                    "own_block": bool(torch.isin(tq, tk).any()),
                    "first_frame": 0 in video_k,
                    "same_frame": bool(video_q & video_k),
                }[name]
                assert bool(got[i, j]) == wanted, (name, i, j)


# selectors ---------------------------------------------------------------------------------------


def test_topk_takes_the_best_blocks_and_no_more():
    scores = random_scores()
    levels = select(scores, nothing(scores), 0.3, name="topk")
    keep = levels == 0
    assert torch.equal(keep.sum(-1), torch.full((2, 3, 9), 6))
    worst_kept = scores.value.masked_fill(~keep, math.inf).amin(-1)
    best_left = scores.value.masked_fill(keep, -math.inf).amax(-1)
    assert bool((worst_kept > best_left).all())


def test_ties_go_to_the_lower_index():
    scores = Scores(torch.zeros(1, 1, 2, 20), "logit")
    levels = select(scores, nothing(scores), 0.25, name="topk")
    assert (levels[0, 0] == 0).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("kind", ["logit", "mass"])
def test_threshold_shares_the_budget_of_a_head_between_its_rows(kind):
    scores = random_scores(nq=11, nk=23)
    value = scores.value * torch.linspace(0.1, 6, 11)[:, None]  # flat rows first, peaky ones last
    scores = Scores(value if kind == "logit" else value.softmax(-1), kind)
    mass = scores.mass(k_blocks(23))
    for density in (0.1, 0.3, 0.77):
        keep = select(scores, nothing(scores), density, name="threshold", min_blocks=2) == 0
        assert bool((keep.sum(-1) >= 2).all())
        assert bool((keep.sum((-2, -1)) == int(density * 11 * 23)).all())
        for head, kept in zip(mass.flatten(0, 1), keep.flatten(0, 1), strict=True):
            best = head >= head.topk(2).values[:, 1:]  # the rows' minimum, kept by right
            rest = head.masked_fill(best, math.nan)
            bound = rest[kept & ~best].min() if bool((kept & ~best).any()) else math.inf
            assert not bool((rest[~kept] > bound).any())


def test_threshold_breaks_ties_in_order_and_survives_bad_scores():
    even = Scores(torch.zeros(1, 1, 3, 20), "logit")
    keep = select(even, nothing(even), 0.5, name="threshold")[0, 0] == 0
    assert keep.sum(-1).tolist() == [19, 10, 1], "30 of 60: the rows' first, then in order"
    bad = Scores(torch.full((1, 1, 3, 20), math.nan), "logit")
    keep = select(bad, nothing(bad), 0.05, name="threshold")[0, 0] == 0
    assert keep[:, 0].all() and keep.sum() == 3


@pytest.mark.parametrize("name", ["topk", "topp", "pyramid", "threshold"])
def test_every_row_keeps_its_minimum_and_its_forced_blocks(name):
    scores = random_scores()
    forced = torch.rand(9, 20) < 0.2
    for density in (0.01, 0.2, 0.5):
        levels = select(scores, forced, density, name=name, min_blocks=2)
        assert bool((levels == 0)[..., forced].all())
        assert bool(((levels == 0).sum(-1) >= 2).all())


@pytest.mark.parametrize("name", ["topk", "pyramid"])
@given(density=st.floats(0.02, 0.95), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_the_budget_includes_forced_blocks_and_is_spent(name, density, seed):
    scores = random_scores(seed=seed)
    forced = torch.zeros(9, 20, dtype=torch.bool)
    forced[:, seed % 20] = True
    levels = select(scores, forced, density, name=name)
    cost = torch.where(levels == SKIP, 0.0, 0.5 ** levels.double()).sum(-1)
    assert bool((cost <= max(density * 20, 1) + 1e-6).all())
    if name == "topk":
        assert bool((cost > density * 20 - 1).all())
    elif density < 0.25:  # above, level 3 runs out of blocks to pool
        assert bool((cost > density * 20 - 2).all())


@pytest.mark.parametrize("p", [0.3, 0.7, 0.95])
def test_topp_is_the_smallest_prefix_that_reaches_the_mass(p):
    scores = random_scores()
    levels = select(scores, nothing(scores), 0.999, name="topp", p=p)
    mass = scores.mass(k_blocks()).double()
    kept = torch.where(levels == 0, mass, 0.0)
    smallest = kept.masked_fill(levels != 0, math.inf).amin(-1)
    assert bool((kept.sum(-1) >= p - 1e-9).all())
    assert bool((kept.sum(-1) - smallest < p).all())


def test_topp_is_capped_by_the_density():
    scores = Scores(torch.zeros(1, 1, 2, 20), "logit")
    levels = select(scores, nothing(scores), 0.35, name="topp", p=0.99)
    assert (levels == 0).sum(-1).tolist() == [[[7, 7]]]


def test_pyramid_quotas_give_better_ranks_finer_levels():
    scores = random_scores(nk=40)
    values = dict(name="pyramid", levels=[0, 1, 3], shares=[0.5, 0.25, 0.25])
    levels = select(scores, nothing(scores), 0.2, **values)
    ranked = scores.value.argsort(-1, descending=True)
    row = levels.gather(-1, ranked)[0, 0, 0].tolist()
    assert row == [0] * 4 + [1] * 4 + [3] * 16 + [SKIP] * 16


def test_pyramid_mass_boundaries_include_the_crossing_block():
    mass = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]).expand(1, 1, 1, 5)
    scores = Scores(mass, "mass")
    values = dict(name="pyramid", mode="mass", levels=[0, 2], mass=[0.5, 0.8])
    levels = select(scores, nothing(scores), 0.999, **values)
    assert levels.flatten().tolist() == [0, 0, 2, SKIP, SKIP]


@pytest.mark.parametrize("name", ["topk", "topp", "pyramid"])
def test_nan_scores_still_give_a_plan(name):
    scores = random_scores()
    scores.value[0, 0, 3] = math.nan
    scores.value[0, 1, :, 4] = math.inf
    clean = select(random_scores(), nothing(scores), 0.3, name=name)
    levels = select(scores, nothing(scores), 0.3, name=name)
    assert bool(((levels == 0).sum(-1) >= 1).all())
    assert torch.equal(levels[1], clean[1]) and torch.equal(levels[0, 2], clean[0, 2])


# compensation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "rest", "order"),
    [
        ({"name": "none"}, SKIP, "none"),
        ({"name": "centroid"}, 6, "none"),
        ({"name": "taylor"}, 6, "global"),
        ({"name": "taylor", "scope": "block"}, 6, "block"),
    ],
    ids=["none", "centroid", "taylor-global", "taylor-block"],
)
def test_compensation_says_what_unlisted_blocks_give(values, rest, order):
    blocks = k_blocks(3)
    plan = BlockPlan.from_levels(torch.zeros(1, 1, 3, 3, dtype=torch.int8), blocks, blocks)
    x = torch.randn(1, 1, blocks.tokens, 4)
    draft = Draft(x, x, x, blocks, blocks)
    done = registry.method("compensation", str(values["name"])).complete(
        plan, draft, section("compensation", **values)
    )
    assert (done.rest, done.first_order) == (rest, order)
    assert done.levels is plan.levels and done.listed == plan.listed


# schedule ----------------------------------------------------------------------------------------


def density_at(step: int, layer: int = 3, steps: int = 20, layers: int = 6, **values: object):
    params = section("schedule", **values)
    context = StepContext(step, steps, layer, layers)
    return registry.method("schedule", params.name).density_at(context, params)


@pytest.mark.parametrize(("dense", "wanted"), [(0.3, 6), (0.26, 6), (4, 4), (0.0, 0), (0, 0)])
def test_warmup_counts_a_fraction_or_steps(dense, wanted):
    values = dict(name="warmup", density=0.2, dense_steps=dense, dense_layers=[])
    reasons = [density_at(step, **values)[1] for step in range(20)]
    assert reasons == ["warmup-step"] * wanted + [None] * (20 - wanted)


STEPS = (1, 2, 4, 8, 10, 20, 50)
DENSE = {  # share of dense steps -> of runs of so many STEPS: the share, rounded up
    0.0: (0, 0, 0, 0, 0, 0, 0),
    0.06: (1, 1, 1, 1, 1, 2, 3),
    0.1: (1, 1, 1, 1, 1, 2, 5),
    0.2: (1, 1, 1, 2, 2, 4, 10),
    0.25: (1, 1, 1, 2, 3, 5, 13),
    0.29: (1, 1, 2, 3, 3, 6, 15),
    0.3: (1, 1, 2, 3, 3, 6, 15),
    0.33: (1, 1, 2, 3, 4, 7, 17),
    0.4: (1, 1, 2, 4, 4, 8, 20),
}
OWN = {"fast": 0.2, "balanced": 0.25, "tiles": 0.25, "pyramid": 0.3, "quality": 0.4}


def test_every_preset_has_its_dense_steps_in_short_runs_too():
    shares = {name: SparseConfig.load(name).schedule.dense_steps for name in presets()}
    assert OWN.items() <= shares.items()
    for name, share in shares.items():
        config = SparseConfig.load(name)
        module = registry.method("schedule", config.schedule.name)
        for steps, wanted in zip(STEPS, DENSE[share], strict=True):
            assert config.dense_steps(steps) == tuple(range(wanted)), (name, steps)
            layer = StepContext(0, steps, 7, 30)
            reasons = [
                module.density_at(replace(layer, step=n), config.schedule)[1] for n in range(steps)
            ]
            assert reasons == ["warmup-step"] * wanted + [None] * (steps - wanted)


def test_a_share_is_rounded_up_in_decimal():
    """In binary 0.07 x 100 is more than 7, and 0.29 x 100 less than 29."""
    for percent in range(1, 100):
        params = section("schedule", dense_steps=percent / 100, dense_layers=[])
        for steps in (1, 3, 10, 100, 1000):
            assert params.count("dense_steps", steps) == -(-percent * steps // 100)
    last = section("schedule", dense_steps=0.0, last_dense_steps=0.25, dense_layers=[])
    assert [last.dense_in(n) for n in (1, 2, 10)] == [[0], [1], [7, 8, 9]]


def test_dense_steps_in_words():
    config = SparseConfig.load("balanced")
    assert config.dense_note(50) == "13 of 50 steps dense"
    assert config.dense_note(1).startswith("all 1 steps dense: nothing is sparse")
    constant = config.override("schedule.name=constant")
    assert constant.dense_steps(3) == () and constant.dense_note(3) == "0 of 3 steps dense"
    assert constant.override("schedule.density=1").dense_steps(3) == (0, 1, 2)
    ramp = config.override("schedule.name=ramp", "schedule.start=1", "schedule.dense_steps=2")
    assert ramp.dense_steps(9) == (0, 1, 2), "the ramp begins at density 1"
    for steps in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=r"steps=.*: allowed is an integer >= 1"):
            config.dense_steps(steps)


def test_warmup_dense_layers_and_last_steps():
    values = dict(name="warmup", density=0.2, dense_steps=0, dense_layers=[0, -1])
    assert density_at(7, layer=0, **values) == (1.0, "dense-layer")
    assert density_at(7, layer=5, **values) == (1.0, "dense-layer")
    assert density_at(7, layer=4, **values) == (0.2, None)
    assert density_at(18, last_dense_steps=2, **values) == (1.0, "warmup-step")
    assert density_at(17, last_dense_steps=2, **values) == (0.2, None)


@pytest.mark.parametrize("name", registry.methods("schedule"))
def test_density_one_is_dense_by_the_users_word(name):
    params = section("schedule", name=name, density=1.0)
    assert registry.method("schedule", name).density_at(None, params) == (1.0, "user")


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_ramp_falls_from_start_to_density(shape):
    values = dict(name="ramp", density=0.1, start=0.9, dense_steps=5, dense_layers=[], shape=shape)
    assert density_at(4, **values) == (1.0, "warmup-step")
    series = [density_at(step, **values)[0] for step in range(5, 20)]
    assert series[0] == pytest.approx(0.9) and series[-1] == pytest.approx(0.1)
    assert series[7] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(series))
    assert (series[1] - series[0] == pytest.approx(-0.8 / 14)) == (shape == "linear")


def test_ramp_takes_a_density_per_layer_and_checks_their_number():
    values = dict(name="ramp", dense_steps=0, dense_layers=[], layer_density=[0.1, 0.2, 0.3])
    assert density_at(19, layer=1, layers=3, **values) == (pytest.approx(0.2), None)
    with pytest.raises(ValueError, match="6 numbers, one per layer"):
        density_at(19, layer=1, layers=6, **values)


def test_geometry_is_cached_by_value():
    layout = section("layout", name="tile")
    first = plan_geometry(GRID, layout, Force(), 32, 16, CPU)
    equal = TokenGrid(3, 5, 7, 21), section("layout", name="tile"), Force()
    again = plan_geometry(*equal, 32, 16, CPU)
    assert again is first
    assert plan_geometry(GRID, layout, Force(first_frame=True), 32, 16, CPU) is not first
