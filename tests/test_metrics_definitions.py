"""Every figure of a comparison of clips, from its definition in plain NumPy."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.quality.frames import write_clip
from vidsparse.quality.metrics import PROTOCOL, compare_clips, psnr, ssim

LUMA = np.array([0.299, 0.587, 0.114])  # BT.601


def drawn(frames, height, width, seed, change):
    """Two clips that differ in a part of their frames and values."""
    generator = np.random.default_rng(seed)
    shape = (frames, height, width, 3)
    dense = generator.integers(0, 256, shape, dtype=np.uint8)
    step = generator.integers(-change, change + 1, shape) * (
        generator.random((frames, 1, 1, 1)) < 0.7
    )
    return dense, np.clip(dense + step, 0, 255).astype(np.uint8)


def decibels(mse):
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def plain_ssim(x, y):
    """Wang et al. 2004 with the windows written out: 11 x 11, Gaussian of sigma 1.5, valid ones."""
    at = np.arange(11) - 5
    weight = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weight /= weight.sum()
    a, b = (np.lib.stride_tricks.sliding_window_view(p, (11, 11)) for p in (x, y))
    mean_a, mean_b = ((weight * p).sum((-2, -1)) for p in (a, b))
    off_a, off_b = a - mean_a[..., None, None], b - mean_b[..., None, None]
    spread_a, spread_b, both = (
        (weight * p).sum((-2, -1)) for p in (off_a**2, off_b**2, off_a * off_b)
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2))).mean()


@given(
    frames=st.integers(1, 6),
    height=st.integers(11, 14),
    width=st.integers(11, 14),
    fps=st.sampled_from([None, 0.3, 1.0, 2.0, 2.6, 30.0]),
    change=st.sampled_from([0, 1, 60]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_every_figure(frames, height, width, fps, change, seed):
    dense, test = drawn(frames, height, width, seed, change)
    found = compare_clips(dense, test, fps=fps)
    x, y = dense.astype(float), test.astype(float)
    mse = ((x - y) ** 2).mean((1, 2, 3))
    mse_y = ((x @ LUMA - y @ LUMA) ** 2).mean((1, 2))
    per_plane = [
        [plain_ssim(a[..., c], b[..., c]) for c in range(3)] for a, b in zip(x, y, strict=True)
    ]
    on_rgb = np.mean(per_plane, axis=1)
    on_luma = [plain_ssim(a @ LUMA, b @ LUMA) for a, b in zip(x, y, strict=True)]
    flicker = [np.abs(np.diff(z, axis=0)).mean((1, 2, 3)) for z in (x, y)]
    about = pytest.approx

    def near(value):
        return about(value, rel=1e-9, abs=1e-9)

    for t, frame in enumerate(found.frames):
        assert frame.t == t
        assert (frame.mse, frame.psnr) == (near(mse[t]), near(decibels(mse[t])))
        assert (frame.mse_y, frame.psnr_y) == (near(mse_y[t]), near(decibels(mse_y[t])))
        assert (frame.ssim, frame.ssim_y) == (near(on_rgb[t]), near(on_luma[t]))
        assert frame.max_abs == np.abs(x[t] - y[t]).max()
        assert frame.changed_frac == near((x[t] != y[t]).mean())
        pair = (frame.flick_ref, frame.flick_test)
        assert pair == ((None, None) if t == frames - 1 else tuple(near(z[t]) for z in flicker))

    assert (found.n_frames, found.height, found.width, found.fps) == (frames, height, width, fps)
    assert (found.mse, found.psnr_pool) == (near(mse.mean()), near(decibels(mse.mean())))
    assert (found.mse_y, found.psnr_y) == (near(mse_y.mean()), near(decibels(mse_y.mean())))
    capped = [min(decibels(z), 100.0) for z in mse]
    assert found.psnr_mean == near(np.mean(capped))
    assert found.psnr_min == near(min(map(decibels, mse)))
    assert found.n_identical == sum(mse == 0)
    assert found.n_capped == sum(decibels(z) > 100 for z in mse)
    assert found.worst_frame == mse.argmax()
    assert (found.ssim, found.ssim_min) == (near(on_rgb.mean()), near(on_rgb.min()))
    assert found.ssim_y == near(np.mean(on_luma))

    if frames == 1:
        assert found.tf_ref is found.tf_test is found.tf_diff is found.flicker_ratio is None
    else:
        still = [1 - z.mean() / 255 for z in flicker]
        assert (found.tf_ref, found.tf_test) == (near(still[0]), near(still[1]))
        assert found.tf_diff == near(still[1] - still[0])
        assert found.flicker_ratio == near(flicker[1].mean() / flicker[0].mean())
    if fps is None or frames == 1:
        assert found.psnr_slope is None
    else:
        line = np.polyfit(np.arange(frames) / fps, capped, 1)[0]
        assert found.psnr_slope == about(line, rel=1e-6, abs=1e-6)
    if fps is None:
        assert found.worst_second is found.psnr_worst_second is None
    else:
        length = min(frames, max(1, round(fps)))
        sums = [sum(mse[s : s + length]) for s in range(frames - length + 1)]
        start, stop = found.worst_second
        assert stop - start == length and sums[start] == near(max(sums))
        assert found.psnr_worst_second == near(decibels(max(sums) / length))


@given(height=st.integers(11, 15), width=st.integers(11, 15), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_ssim_of_a_pair_is_that_of_a_clip_of_one_frame(height, width, seed):
    dense, test = drawn(1, height, width, seed, 60)
    clip = compare_clips(dense, test)
    assert ssim(dense[0], test[0]) == (clip.ssim, clip.ssim_y)


def test_psnr_of_nothing_and_of_the_least_difference():
    assert psnr(0) == math.inf
    assert psnr(255**2) == 0
    assert psnr(1) == pytest.approx(20 * math.log10(255))
    assert psnr(1e-12) == pytest.approx(120 + 20 * math.log10(255))


def test_a_report_in_json_loses_no_figure_but_the_infinite_ones():
    dense, test = drawn(3, 12, 13, 4, 60)
    test[1] = dense[1]
    found = compare_clips(dense, test, fps=2)
    told = found.to_dict()
    assert told["protocol"] == PROTOCOL and json.loads(json.dumps(told, allow_nan=False))
    for name, value in told.items():
        if name in ("protocol", "frames"):
            continue
        assert value == getattr(found, name), name
    for frame, shown in zip(found.frames, told["frames"], strict=True):
        for name, value in shown.items():
            kept = getattr(frame, name)
            assert value == (None if kept in (math.inf, None) else kept)
    assert told["frames"][1]["psnr"] is None and found.n_identical == 1


def test_only_one_file_needs_to_know_the_speed(tmp_path):
    dense, test = drawn(4, 16, 18, 1, 60)
    file = write_clip(tmp_path / "a.mkv", dense, 4)
    assert compare_clips(file, test).fps == compare_clips(test, file).fps == 4.0
    assert compare_clips(dense, test).fps is None
    assert compare_clips(file, file).psnr_slope == 0
    for fps in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="fps must be a positive number"):
            compare_clips(file, test, fps=fps)
