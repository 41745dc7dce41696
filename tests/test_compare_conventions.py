"""Other projects' PSNR and SSIM: recorded figures, their own code, formulas."""

import math
import re

import numpy as np
import pytest
from golden import growing, pair
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vidsparse.compare import conventions
from vidsparse.compare.conventions import CONVENTIONS, clip
from vidsparse.quality.metrics import compare_clips


def measured(name, reference, test):
    return clip([CONVENTIONS[name].frame(x, y) for x, y in zip(reference, test, strict=True)])


@pytest.fixture(scope="module")
def golden():
    return pair()


def table():
    """Rows of the table in the module's text: name -> PSNR, SSIM of the golden pairs."""
    row = r"^ {4}(\w+)" + 4 * r" +([\d.]+|inf)" + "$"
    rows = re.findall(row, conventions.__doc__, re.MULTILINE)
    return {name: [float(figure) for figure in figures] for name, *figures in rows}


@pytest.mark.parametrize(
    ("name", "ssim"),
    [("svg", 0.9133), ("teacache", 0.8403), ("fastvideo", 0.8546), ("skimage", 0.8610),
     ("torchmetrics", 0.8401), ("ours", 0.8403)],
)  # fmt: skip
def test_the_table_holds_what_was_found_with_those_projects_own_code(name, ssim):
    """Of the first pair, once measured with the code of each of them."""
    assert table()[name][:2] == [32.53, ssim]


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("clips", [pair, growing])
def test_the_table_is_what_is_measured(name, clips):
    found = measured(name, *clips())
    psnr, ssim = table()[name][:2] if clips is pair else table()[name][2:]
    assert found["psnr"] == pytest.approx(psnr, abs=5e-3)
    assert found["ssim"] == pytest.approx(ssim, abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("clips", [pair, growing])
def test_where_torchmetrics_differs(clips):
    """Its PSNR of a whole clip is ours; its SSIM is ours where the window fits in the frame."""
    import torch
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    reference, test = clips()
    ours = compare_clips(reference, test)
    x, y = (torch.from_numpy(clip).permute(0, 3, 1, 2).double() for clip in (reference, test))
    pooled = peak_signal_noise_ratio(y, x, data_range=255.0)
    ssim, whole = structural_similarity_index_measure(
        y, x, data_range=255.0, return_full_image=True
    )
    assert float(pooled) == pytest.approx(ours.psnr_pool, abs=1e-5)  # a logarithm in float32
    assert float(whole[..., 5:-5, 5:-5].mean()) == pytest.approx(ours.ssim, abs=1e-12)
    at = slice(2) if clips is pair else slice(2, None)
    assert table()["torchmetrics"][at] == [round(float(pooled), 2), round(float(ssim), 4)]
    assert table()["ours"][at] == [round(ours.psnr_pool, 2), round(ours.ssim, 4)]


def test_skimage_is_skimage(golden):
    x, y = golden
    found = measured("skimage", x, y)
    theirs = [
        (
            peak_signal_noise_ratio(a, b, data_range=255),
            structural_similarity(a, b, data_range=255, channel_axis=2),
        )
        for a, b in zip(x, y, strict=True)
    ]
    psnrs, ssims = zip(*theirs, strict=True)
    assert found["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-10)
    assert found["ssim"] == pytest.approx(np.mean(ssims), abs=1e-12)


def test_ours_is_skimages_gaussian_form(golden):
    x, y = golden
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = [
        structural_similarity(a, b, data_range=255, channel_axis=2, **options)
        for a, b in zip(x, y, strict=True)
    ]
    assert compare_clips(x, y).ssim == pytest.approx(np.mean(theirs), abs=1e-12)
    assert measured("teacache", x, y)["ssim"] == pytest.approx(np.mean(theirs), abs=1e-12)


@pytest.mark.parametrize("name", ["svg", "fastvideo"])
def test_windows_with_zeros_around_the_frame(name):
    """Straight from the definition: every window a sum over the padded frame."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 256, (2, 1, 13, 15, 3), dtype=np.uint8)
    taps = np.ones(11) / 11
    if name == "fastvideo":
        taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
        taps /= taps.sum()
    window = np.outer(taps, taps)[..., None]

    def mean(values):
        padded = np.pad(values, ((5, 5), (5, 5), (0, 0)))
        height, width, _ = values.shape
        rows = [
            [(window * padded[i : i + 11, j : j + 11]).sum((0, 1)) for j in range(width)]
            for i in range(height)
        ]
        return np.array(rows)

    a, b = x[0].astype(float), y[0].astype(float)
    mu_a, mu_b = mean(a), mean(b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mu_a * mu_b + c1) * (2 * (mean(a * b) - mu_a * mu_b) + c2)
    spread = mean(a * a) - mu_a**2 + mean(b * b) - mu_b**2
    expected = (top / ((mu_a**2 + mu_b**2 + c1) * (spread + c2))).mean()
    assert measured(name, x, y)["ssim"] == pytest.approx(expected, abs=1e-12)


def test_one_identical_frame(golden):
    """Of the conventions only the capped ones, and ours, stay finite."""
    x, y = (clip[:3].copy() for clip in golden)
    y[1] = x[1]
    assert measured("svg", x, y)["psnr"] == math.inf == measured("skimage", x, y)["psnr"]
    rest = [CONVENTIONS["svg"].frame(x[t], y[t])[0] for t in (0, 2)]
    expected = (sum(rest) + 100) / 3
    assert measured("teacache", x, y)["psnr"] == pytest.approx(expected, abs=1e-10)
    assert measured("fastvideo", x, y)["psnr"] == pytest.approx(expected, abs=1e-10)
    assert math.isfinite(compare_clips(x, y).psnr_pool)
