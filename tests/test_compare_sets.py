"""Figures of many clips, from their definitions."""

from itertools import product
from math import sqrt
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidsparse.compare.sets import front, geometric_mean, interval, pairing, spread
from vidsparse.compare.thresholds import missed, parse, upwards

NUMBERS = st.floats(-50, 100, allow_nan=False)


def test_spread():
    found = spread({"a": 30.0, "b": 20.0, "c": 40.0, "d": 34.0})
    assert (found.n, found.mean, found.median) == (4, 31.0, 32.0)
    assert (found.worst, found.worst_clip) == (20.0, "b")
    assert found.p10 == pytest.approx(20 + 0.3 * 10)  # linear between the two lowest
    with pytest.raises(ValueError, match="at least one clip"):
        spread({})


def test_few_clips_have_no_interval():
    assert interval([1.0] * 4, range(4)) == (None, None)
    assert interval([1.0] * 5, range(5)) == (1.0, 1.0)


def test_interval_is_that_of_all_resamples():
    """Of six clips there are 6^6 resamples, few enough to look at every one."""
    values = [0.3, -1.2, 2.5, 0.9, 4.0, -0.4]
    means = [fmean(values[i] for i in draw) for draw in product(range(6), repeat=6)]
    exact = np.percentile(means, [2.5, 97.5])
    assert interval(values, range(6), resamples=40_000) == pytest.approx(exact, abs=0.05)


def test_interval_draws_the_seeds_of_a_prompt_together():
    """Five prompts of eight equal seeds are five clips, not forty."""
    per_prompt = [0.0, 1.0, 2.0, 3.0, 4.0]
    apart = interval(per_prompt, range(5))
    together = interval(np.repeat(per_prompt, 8).tolist(), np.repeat(range(5), 8).tolist())
    assert together == pytest.approx(apart)
    as_if_forty = interval(np.repeat(per_prompt, 8).tolist(), range(40))
    width = [high - low for low, high in (together, as_if_forty)]
    assert width[0] > 2 * width[1] and width[0] == pytest.approx(width[1] * sqrt(8), rel=0.15)


def test_interval_repeats_by_its_seed():
    values = [float(n % 7) for n in range(30)]
    assert interval(values, range(30), seed=1) == interval(values, range(30), seed=1)
    assert interval(values, range(30), seed=1) != interval(values, range(30), seed=2)


def test_pairing_counts_and_names_the_better():
    a = {f"clip{n}": 30.0 + n for n in range(25)}
    b = {clip: value - (0.5 if n % 5 else 0.0) for n, (clip, value) in enumerate(a.items())}
    b["only in b"] = 99.0
    found = pairing("psnr_pool", ("a", a), ("b", b), {})
    assert (found.n, found.wins, found.ties, found.losses) == (25, 20, 5, 0)
    assert found.mean == pytest.approx(0.4) and found.median == pytest.approx(0.5)
    assert found.better == "a" and not found.wide
    turned = pairing("psnr_pool", ("b", b), ("a", a), {})
    assert turned.better == "a" and turned.mean == -found.mean
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=0.02)


def test_identical_arms_are_not_better():
    values = {str(n): float(n) for n in range(10)}
    found = pairing("ssim", ("a", values), ("b", dict(values)), {})
    assert (found.low, found.high, found.better, found.wide) == (0.0, 0.0, None, True)


def test_arms_without_a_common_clip():
    with pytest.raises(ValueError, match="a and b have no clip in common"):
        pairing("ssim", ("a", {"x": 1.0}), ("b", {"y": 1.0}), {})


def test_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None
    with pytest.raises(ValueError, match="positive"):
        geometric_mean([1.0, 0.0])


@given(st.dictionaries(st.text(max_size=3), st.tuples(NUMBERS, NUMBERS), max_size=8))
def test_front(points):
    found = front(points)
    assert bool(found) == bool(points)
    for name, (x, y) in points.items():
        above = [q for q in points.values() if q[0] >= x and q[1] >= y and q != (x, y)]
        assert (name in found) == (not above)


def test_thresholds():
    psnr, worst, ssim, drop = parse("psnr=25, psnr.worst=20,ssim=.85,tf_drop=.01")
    assert (psnr.measure, worst.part, ssim.value, drop.measure) == (
        "psnr_pool",
        "worst",
        0.85,
        "tf_diff",
    )
    reached = spread({"a": 24.0, "b": 26.0, "c": 25.0})
    assert missed(psnr, reached) is None
    assert missed(worst, reached) is None
    assert missed(parse("psnr=25.01")[0], reached) == "psnr >= 25.01: it is 25"
    assert missed(parse("psnr.worst=24.5")[0], reached) == "psnr.worst >= 24.5: it is 24 (a)"
    assert missed(ssim, None) == "ssim >= 0.85: not measured"


@pytest.mark.parametrize(("change", "allowed"), [(-0.009, True), (-0.011, False), (0.5, True)])
def test_flicker_may_drop_by_so_much(change, allowed):
    (drop,) = parse("tf_drop=.01")
    reached = spread({"clip": upwards("tf_diff", change)})
    assert (missed(drop, reached) is None) == allowed


@pytest.mark.parametrize(("value", "allowed"), [(0.09, True), (0.11, False)])
def test_of_lpips_less_is_better(value, allowed):
    (bound,) = parse("lpips.worst=.1")
    reached = spread({"good": upwards("lpips", 0.01), "bad": upwards("lpips", value)})
    assert (missed(bound, reached) is None) == allowed
    assert reached.worst_clip == "bad"


@pytest.mark.parametrize(
    "text", ["", "psnr", "psnr=", "psnr=high", "psnr=nan", "psnr=inf", "psnr.best=3", "sharpness=1",
             "psnr=1,,ssim=1", "psnr=1,psnr.mean=2", "psnr.worst.worst=1"]
)  # fmt: skip
def test_bad_thresholds(text):
    with pytest.raises(ValueError, match="--fail-under"):
        parse(text)
