"""Tables of densities: they are the best there are, and what is promised of their videos holds."""

import itertools
from typing import Any

import numpy as np
import pytest

from vidsparse import SparseConfig
from vidsparse.calibrating import goal as goals
from vidsparse.calibrating import words
from vidsparse.calibrating.goal import Goal
from vidsparse.calibrating.promise import Seen, exactness, margin, needed
from vidsparse.calibrating.search import LEVELS, NEAR, Search, psnr


def best(aim: np.ndarray, bounded: np.ndarray, budget: float) -> float:
    """Least sum of aim with sum of bounded <= budget, by looking at all tables."""
    cells, levels = aim[..., 0].size, aim.shape[-1]
    flat, bound = aim.reshape(cells, levels), bounded.reshape(cells, levels)
    rows = np.arange(cells)
    found = np.inf
    for table in itertools.product(range(levels), repeat=cells):
        if bound[rows, table].sum() <= budget * (1 + 1e-9):
            found = min(found, flat[rows, table].sum())
    return float(found)


@pytest.mark.parametrize("seed", range(6))
def test_no_table_is_better(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    shape = (2, 2, 2, 3)
    cost = np.broadcast_to(np.array([0.1, 0.3, 1.0]), shape) * numbers.integers(1, 4, (2, 1, 1, 1))
    error = np.sort(numbers.exponential(size=shape) ** 3, -1)[..., ::-1].copy()
    error[..., -1] = 0
    for share in (0.02, 0.2, 0.7):
        budget = share * error[..., 0].sum()
        table = goals.cheapest(cost, error, budget)
        assert goals.chosen(error, table).sum() <= budget * (1 + 1e-6)
        assert goals.chosen(cost, table).sum() <= best(cost, error, budget) * 1.002
        budget = cost[..., 0].sum() + share * (cost[..., -1] - cost[..., 0]).sum()
        table = goals.most_exact(cost, error, budget)
        assert goals.chosen(cost, table).sum() <= budget * (1 + 1e-6)
        aim = best(error, cost, budget)
        assert goals.chosen(error, table).sum() <= aim + 0.002 * error.max()
    assert (goals.cheapest(cost, error, 0.0) == 2).all()
    assert (goals.cheapest(cost, error, error.sum()) == 0).all()
    assert (goals.most_exact(cost, error, 0.0) == 0).all()


@pytest.mark.parametrize(("prompts", "t"), [(2, 3.0777), (4, 1.6377), (10, 1.3830)])
def test_the_margin_is_students(prompts: int, t: float) -> None:
    each = t / prompts**0.5
    assert margin([28.0, 30.0, 35.0], prompts) == pytest.approx(each * 13**0.5, rel=1e-4)
    assert margin([30.0, 36.0]) == pytest.approx(3.0777 * 18**0.5 / 2**0.5, rel=1e-4)
    guess = margin([30.0], prompts)  # before their spread can be told
    assert guess == margin((), prompts) == pytest.approx(each * 4.5, rel=1e-4)
    assert margin([30.0]) == margin([30.0], 1) == margin((), 1) == 0


def test_nine_calibrations_of_ten_hold_their_promise() -> None:
    """Four prompts are drawn, a table is made for them, and the mean over all is known."""
    numbers, held, mean = np.random.default_rng(0), 0, 17.0
    for offsets in numbers.normal(mean, 4, (4000, 4)):
        exact = needed(30, [Seen(9.0, float(9 + one)) for one in offsets], 4)
        held += mean + exact >= 30
    assert 0.885 < held / 4000 < 0.915  # 0.9, and three standard errors


def test_videos_of_dense_tables_say_nothing() -> None:
    dense = Seen(exactness(0.0), 78.0)
    assert needed(30, [dense], 2) == np.inf and dense.at(dense.exact) == 78
    assert needed(30, [dense, Seen(exactness(0.1), 35.0)], 1) == pytest.approx(5)


class Videos:
    """In place of `Runs`: MSE is the summed error of the heads times a factor of the prompt; all
    heads are alike, at half the density a call costs half and errs four times as much."""

    def __init__(self, factors: list[float]) -> None:
        self.factors, self.jobs, self.made = factors, [None] * len(factors), list[int]()
        self.error = np.array([1e-6 / level**2 * (level < 1) for level in LEVELS])

    def measured(self, number: int, *given: Any) -> dict[str, Any]:
        assert number < 2  # for videos heads are measured on two prompts
        error = np.broadcast_to(self.error, (3, 6, 2, len(LEVELS)))
        seen = {"forwards": 1, "step_seconds": 20.0, "tokens": 6336}
        return {"table": error.tolist(), "costs": [*LEVELS], **seen}

    def dense(self, number: int) -> None:
        pass

    def sparse(self, number: int, config: SparseConfig) -> dict[str, Any]:
        self.made.append(number)
        digits = "".join(config.schedule.groups).replace(" ", "")
        return {"mse": self.factors[number] * sum(self.error[int(digit)] for digit in digits)}


@pytest.mark.parametrize("target", [26.0, 30.0, 33.0])
def test_the_mean_over_prompts_lies_above_the_goal_by_their_spread(target: float) -> None:
    factors = [2e4, 8e4, 4e4, 16e4, 1e4]
    videos = Videos(factors)
    config = SparseConfig.load("tiles")
    search = Search(videos, config, Goal("psnr", target), 4, 20)  # type: ignore[arg-type]
    found = search.find()
    assert videos.made.count(4) == 0 and found.moved <= NEAR
    for number, told in enumerate(found.psnr):
        mse = videos.sparse(number, found.config)["mse"]
        assert told == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-6)
    mean, spread = np.mean(found.psnr), np.std(found.psnr, ddof=1)
    assert mean - 1.6377 * spread / 2 == pytest.approx(target, abs=0.15)  # tables are discrete
    assert len(videos.made) - 4 <= 4 + 2 * 4
    content = search.content(found, [4])
    assert content["held_out_psnr"] == [pytest.approx(psnr(videos.sparse(4, found.config)["mse"]))]
    said = words.reached(content)
    assert f"at least {target:.1f} dB in the mean over such prompts at 90 % confidence" in said
