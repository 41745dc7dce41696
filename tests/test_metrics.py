"""Clip measures against closed forms, recorded figures and an SSIM straight from its formula."""

import json
import math
import weakref

import numpy as np
import pytest
from golden import pair
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vidsparse.quality.frames import open_clip, quantise, write_clip
from vidsparse.quality.metrics import PSNR_CAP, compare_clips, frame_pairs, psnr, ssim

clips = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 4), st.integers(11, 14), st.integers(11, 14), st.just(3))
)


def flat(values, height=12, width=13):
    """A clip of flat grey frames, one per value."""
    return np.array(
        [np.full((height, width, 3), value, np.uint8) for value in values], dtype=np.uint8
    )


def noise(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def golden():
    return pair()


def test_golden_pair(golden):
    m = compare_clips(*golden)
    assert m.psnr_pool == pytest.approx(32.526258, abs=5e-7)
    assert m.psnr_y == pytest.approx(35.988420, abs=5e-7)
    assert m.ssim == pytest.approx(0.8403302985, abs=5e-11)
    assert m.ssim_y == pytest.approx(0.9155365858, abs=5e-11)
    assert m.tf_ref == pytest.approx(0.9590557890, abs=5e-11)
    assert m.tf_test == pytest.approx(0.9513131973, abs=5e-11)
    assert m.tf_diff == pytest.approx(m.tf_test - m.tf_ref, abs=1e-12)
    assert (m.n_frames, m.height, m.width, m.n_identical, m.n_capped) == (8, 120, 208, 0, 0)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(golden, workers):
    reference, test = golden
    assert compare_clips(reference, test, workers=workers) == compare_clips(reference, test)


@pytest.mark.parametrize("step", [1, 16, 100])
def test_constant_difference_has_the_closed_form(step):
    dense = noise(1, (2, 20, 30, 3)) // 2
    m = compare_clips(dense, dense + np.uint8(step))
    assert m.psnr_pool == pytest.approx(20 * math.log10(255 / step), abs=1e-12)
    assert m.psnr_mean == pytest.approx(m.psnr_pool, abs=1e-12)
    assert m.mse == step**2
    assert m.frames[1].max_abs == step
    assert m.frames[1].changed_frac == 1


@pytest.mark.parametrize(("reference", "test"), [(2, 5), (5, 2), (5, 4), (3, 3)])
def test_trimmed_to_the_shorter_clip(reference, test):
    clips = noise(1, (reference, 12, 12, 3)), noise(2, (test, 12, 12, 3))
    both = min(reference, test)
    found = [frame for frame, _ in frame_pairs(*clips, trim=True)]
    assert tuple(found) == compare_clips(*(clip[:both] for clip in clips)).frames


def test_flat_frames_have_the_closed_form_of_ssim():
    c1 = 6.5025
    expected = (2 * 100 * 116 + c1) / (100**2 + 116**2 + c1)
    m = compare_clips(flat([100]), flat([116]))
    assert expected == pytest.approx(0.98908897, abs=5e-9)
    assert m.ssim == pytest.approx(expected, abs=1e-10)
    assert m.ssim_y == pytest.approx(expected, abs=1e-10)


def direct_ssim(x, y):
    """SSIM of two float64 planes, window by window, central moments, no filtering trick."""
    i = np.arange(11) - 5
    window = np.exp(-(i[:, None] ** 2 + i[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (plane[top : top + 11, left : left + 11] for plane in (x, y))
            mu_a, mu_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mu_a) ** 2).sum(), (window * (b - mu_b) ** 2).sum()
            cov = (window * (a - mu_a) * (b - mu_b)).sum()
            structure = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
            values.append(structure / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


@pytest.mark.parametrize("size", [(11, 11), (17, 23), (31, 12)], ids=str)
def test_ssim_equals_the_direct_form(size):
    x = noise(2, (*size, 3))
    y = np.clip(x + np.random.default_rng(3).normal(0, 25, x.shape), 0, 255).astype(np.uint8)
    luma = np.array([0.299, 0.587, 0.114])
    rgb, on_luma = ssim(x, y)
    planes = [direct_ssim(x[..., c].astype(float), y[..., c].astype(float)) for c in range(3)]
    assert rgb == pytest.approx(np.mean(planes), abs=1e-11)
    assert on_luma == pytest.approx(direct_ssim(x @ luma, y @ luma), abs=1e-11)
    assert abs(rgb - on_luma) > 1e-3


def test_unrelated_noise_is_not_flattered_by_wrapped_uint8():
    m = compare_clips(noise(4, (2, 128, 128, 3)), noise(5, (2, 128, 128, 3)))
    assert 7.7 < m.psnr_pool < 7.8
    assert abs(m.ssim) < 0.03


@settings(max_examples=40, deadline=None)
@given(clips, st.integers(0, 2**32 - 1))
def test_swapping_the_clips_changes_nothing_and_jensen_holds(dense, seed):
    spread = np.random.default_rng(seed).integers(0, 200, (len(dense), 1, 1, 1))
    test = (noise(seed, dense.shape) * (spread / 255)).astype(np.uint8) ^ dense
    m, swapped = compare_clips(dense, test, fps=8), compare_clips(test, dense, fps=8)
    for name in ("mse", "psnr_pool", "psnr_mean", "psnr_y", "ssim", "ssim_y", "psnr_slope"):
        assert getattr(m, name) == getattr(swapped, name), name
    assert (m.tf_ref, m.tf_test) == (swapped.tf_test, swapped.tf_ref)
    uncapped = np.mean([frame.psnr for frame in m.frames])
    assert uncapped >= m.psnr_pool - 1e-9
    assert -1 <= m.ssim_min <= m.ssim <= 1


def test_one_identical_frame_leaves_the_pooled_figure_finite():
    dense = flat([10, 20, 30, 40])
    test = flat([10, 30, 40, 50])
    m = compare_clips(dense, test)
    assert m.psnr_pool == pytest.approx(10 * math.log10(255**2 / 75), abs=1e-12)
    assert m.psnr_mean == pytest.approx((PSNR_CAP + 3 * psnr(100)) / 4, abs=1e-12)
    assert (m.n_identical, m.n_capped) == (1, 1)
    assert math.isinf(m.frames[0].psnr)


def test_identical_clips_give_json_without_infinity():
    dense = noise(6, (3, 16, 16, 3))
    m = compare_clips(dense, dense.copy(), fps=8)
    assert math.isinf(m.psnr_pool)
    assert (m.psnr_mean, m.ssim, m.n_identical, m.psnr_slope) == (100, 1, 3, 0)
    document = json.loads(json.dumps(m.to_dict(), allow_nan=False))
    assert document["psnr_pool"] is None
    assert document["mse"] == 0
    assert document["frames"][2]["psnr"] is None
    assert document["protocol"]["psnr_cap_db"] == 100


def test_the_cap_also_meets_frames_that_differ():
    dense = np.zeros((1, 400, 400, 3), np.uint8)
    test = dense.copy()
    test[0, 7, 9, 1] = 1
    m = compare_clips(dense, test)
    assert m.psnr_pool == pytest.approx(10 * math.log10(255**2 * dense.size), abs=1e-9)
    assert m.psnr_pool > 104
    assert (m.psnr_mean, m.n_identical, m.n_capped) == (100, 0, 1)
    assert m.frames[0].changed_frac == 1 / dense.size


def test_luma_weighs_the_channels():
    dense = flat([50])
    test = dense.copy()
    test[..., 2] += 40
    m = compare_clips(dense, test)
    assert m.mse_y == pytest.approx((0.114 * 40) ** 2, rel=1e-12)
    assert m.mse == pytest.approx(40**2 / 3, rel=1e-12)


def test_flicker_follows_each_arm():
    m = compare_clips(flat([0, 10, 0, 10]), flat([0, 30, 0, 30]))
    assert m.tf_ref == pytest.approx(1 - 10 / 255, abs=1e-12)
    assert m.tf_diff == pytest.approx(-20 / 255, abs=1e-12)
    assert m.flicker_ratio == pytest.approx(3, abs=1e-12)
    assert [frame.flick_test for frame in m.frames] == [30, 30, 30, None]


def test_what_cannot_be_measured_is_none():
    still = compare_clips(flat([9, 9]), flat([9, 12]))
    assert still.flicker_ratio is None
    assert still.tf_ref == 1
    assert still.psnr_slope is None
    assert still.worst_second is None
    single = compare_clips(flat([9]), flat([12]), fps=8)
    assert (single.tf_ref, single.tf_diff, single.psnr_slope) == (None, None, None)
    assert single.worst_second == (0, 1)


def test_slope_is_the_least_squares_line_in_db_per_second():
    steps = np.array([1, 3, 2, 7, 9, 12, 20])
    m = compare_clips(flat(0 * steps), flat(steps), fps=4)
    decibels = 20 * np.log10(255 / steps)
    assert m.psnr_slope == pytest.approx(np.polyfit(np.arange(7) / 4, decibels, 1)[0], abs=1e-9)
    assert m.psnr_slope < -10


def test_worst_frame_and_worst_second():
    steps = np.array([1, 20, 1, 1, 15, 16, 15, 1])
    m = compare_clips(flat(0 * steps), flat(steps), fps=3)
    assert m.worst_frame == 1
    assert m.psnr_min == pytest.approx(psnr(400), abs=1e-12)
    assert m.worst_second == (4, 7)
    assert m.psnr_worst_second == pytest.approx(psnr((225 + 256 + 225) / 3), abs=1e-9)


@pytest.mark.parametrize(
    ("dense", "test", "message"),
    [
        (flat([1, 2, 3]), flat([1, 2, 3, 4, 5]), "the reference has 3 frames, the test has 5"),
        (flat([1, 2, 3]), flat([1]), "the reference has 3 frames, the test has 1"),
        (flat([1]), flat([1], 13, 12), "the reference is 12x13, the test 13x12"),
        (flat([1], 10, 40), flat([1], 10, 40), "at least 11x11, got 10x40"),
        (flat([1], 40, 10), flat([1], 40, 10), "at least 11x11, got 40x10"),
        (flat([])[:0], flat([])[:0], "at least one frame"),
        (flat([1]) / 1.0 + 3, flat([1]), "must be in .0, 1."),
        (flat([1])[0], flat([1])[0], "expected frames of shape"),
    ],
    ids=["longer", "shorter", "size", "low", "narrow", "empty", "float-255", "no-time-axis"],
)
def test_clips_that_do_not_match_are_refused(dense, test, message):
    with pytest.raises(ValueError, match=message):
        compare_clips(iter(dense), iter(test))


def test_other_bad_arguments():
    with pytest.raises(TypeError, match="int64"):
        compare_clips(flat([1]).astype(np.int64), flat([1]))
    for fps in (0, -1, math.nan):
        with pytest.raises(ValueError, match="fps"):
            compare_clips(flat([1]), flat([1]), fps=fps)
    with pytest.raises(ValueError, match="11x11"):
        ssim(noise(0, (8, 8, 3)), noise(1, (8, 8, 3)))


def test_floats_are_measured_as_they_would_be_written():
    g = np.random.default_rng(8)
    dense, test = g.random((2, 3, 16, 16, 3), dtype=np.float32)
    assert compare_clips(dense, test) == compare_clips(quantise(dense), quantise(test))


def test_files_bring_their_fps_and_must_agree_on_it(tmp_path):
    dense, test = noise(9, (4, 16, 18, 3)), noise(10, (4, 16, 18, 3))
    a = write_clip(tmp_path / "a.mkv", dense, 4)
    b = write_clip(tmp_path / "b.mkv", test, 4)
    assert compare_clips(a, str(b)) == compare_clips(dense, test, fps=4)
    c = write_clip(tmp_path / "c.mkv", test, 8)
    with pytest.raises(ValueError, match="4 fps, the test 8; say which"):
        compare_clips(a, open_clip(c))
    assert compare_clips(a, c, fps=2).fps == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_only_two_frames_of_an_arm_are_alive(workers):
    alive = set()

    def stream(seed):
        g = np.random.default_rng(seed)
        for t in range(24):
            frame = g.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            alive.add((seed, t))
            weakref.finalize(frame, alive.discard, (seed, t))
            # a pair in use, one more for every thread beside the first, one being made
            assert sum(arm == seed for arm, _ in list(alive)) <= 2 + workers
            yield frame
            del frame

    assert compare_clips(stream(1), stream(2), workers=workers).n_frames == 24
