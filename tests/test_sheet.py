"""The contact sheet shows the right frames at the right size, and its text stays inside."""

import os

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.quality import sheet as module
from vidsparse.quality.sheet import SheetRow, contact_sheet, write_contact_sheet

PAPER = (250, 250, 248)


def colours(count, blue, height=40, width=44):
    """Flat frames: red tells the time, green is 200, blue tells the arm."""
    clip = np.empty((count, height, width, 3), np.uint8)
    clip[...] = 200
    clip[..., 0] = 7 * np.arange(count).reshape(-1, 1, 1)
    clip[..., 2] = blue
    return clip


def pixels(image, colour):
    return int((image == np.array(colour, np.uint8)).all(axis=2).sum())


def test_rows_and_columns_hold_the_frames_they_claim():
    dense, sparse = colours(11, 50), colours(11, 55)
    image = contact_sheet(SheetRow("dense", dense), [SheetRow("fast", sparse)], columns=6)
    assert image.dtype == np.uint8
    tile = 40 * 44 * 4**2  # 44 px wide: four times makes at least 176
    for t in range(11):
        shown = tile if t % 2 == 0 else 0
        assert pixels(image, (7 * t, 200, 50)) == shown, t
        assert pixels(image, (7 * t, 200, 55)) == shown, t
    assert pixels(image, (0, 0, 40)) == 6 * tile, "8 x |50 - 55|, six times"


def test_every_arm_gets_its_own_difference_and_it_saturates():
    rows = [SheetRow("near", colours(3, 52)), SheetRow("far", colours(3, 150))]
    image = contact_sheet(SheetRow("dense", colours(3, 50)), rows, gain=8)
    tile = 40 * 44 * 4**2
    assert pixels(image, (0, 0, 16)) == 3 * tile
    assert pixels(image, (0, 0, 255)) == 3 * tile
    dense_only = contact_sheet(SheetRow("dense", colours(3, 50)), [])
    assert dense_only.shape[0] < image.shape[0] / 3


def test_rows_stand_one_below_the_other_in_order():
    dense, sparse = colours(1, 50), colours(1, 55)
    image = contact_sheet(SheetRow("dense", dense), [SheetRow("fast", sparse)])
    tops = [
        np.argwhere((image == np.array(colour, np.uint8)).all(axis=2))[0]
        for colour in ((0, 200, 50), (0, 200, 55), (0, 0, 40))
    ]
    assert tops[0][0] < tops[1][0] < tops[2][0]
    assert len({top[1] for top in tops}) == 1


@pytest.mark.parametrize(("count", "columns", "shown"), [(1, 6, 1), (4, 6, 4), (9, 1, 1)])
def test_few_frames(count, columns, shown):
    image = contact_sheet(SheetRow("dense", colours(count, 50)), [], columns=columns)
    found = [t for t in range(count) if pixels(image, (7 * t, 200, 50))]
    assert len(found) == shown
    assert found[0] == 0


def test_large_clips_are_shrunk():
    image = contact_sheet(SheetRow("dense", colours(2, 50, 480, 832)), [], columns=2)
    assert pixels(image, (0, 200, 50)) == 185 * 320
    tall = contact_sheet(SheetRow("dense", colours(2, 50, 832, 480)), [], columns=2)
    assert pixels(tall, (0, 200, 50)) == 185 * 320


def test_figures_are_printed_beside_their_own_row():
    def draw(**figures):
        return contact_sheet(
            SheetRow("dense", colours(2, 50), seconds=60),
            [SheetRow("a", colours(2, 55), **figures)],
        )

    plain, full = draw(psnr=27.3), draw(psnr=37.3)
    assert plain.shape == full.shape
    rows, columns = np.nonzero((plain != full).any(axis=2))
    first_tile = np.argwhere((full == np.array((0, 200, 55), np.uint8)).all(axis=2))
    assert rows.min() >= first_tile[:, 0].min()
    assert rows.max() <= first_tile[:, 0].max()
    assert columns.max() < first_tile[:, 1].min()


def test_figures():
    row = SheetRow("balanced", None, speedup=1.718, seconds=35.61, psnr=27.28, ssim=0.9124)
    assert row.figures() == ["1.72x speed", "35.6 s", "PSNR 27.3 dB", "SSIM 0.912"]
    same = SheetRow("dense", None, psnr=float("inf"), density=0.25)
    assert same.figures() == ["identical pixels", "density 0.25"]
    assert SheetRow("dense", None, psnr=0.0).figures() == ["PSNR 0.0 dB"]


@pytest.mark.parametrize(
    "prompt",
    ["a red circle moves left " * 9, "x" * 300, "一只猫在草地上奔跑" * 30, "a\nb\tc"],
    ids=["words", "one-word", "no-spaces", "whitespace"],
)
@pytest.mark.parametrize("columns", [1, 3])
def test_no_text_leaves_the_sheet(prompt, columns):
    rows = [SheetRow(prompt[:60], colours(3, 55), speedup=1.5, psnr=30.0, density=0.2)]
    options = {"title": prompt, "subtitle": prompt, "fps": 8, "columns": columns}
    image = contact_sheet(SheetRow("dense", colours(3, 50)), rows, **options)
    border = np.ones(image.shape[:2], bool)
    border[14:-14, 20:-20] = False
    assert (image[border] == PAPER).all()
    assert (image[28:60] != PAPER).any(), "there is a title"


def test_a_long_prompt_takes_more_lines_but_at_most_four():
    heights = [
        contact_sheet(SheetRow("dense", colours(2, 50)), [], title="red circle " * n).shape[0]
        for n in (0, 1, 8, 60, 300)
    ]
    assert heights[0] < heights[1] < heights[2] < heights[3] == heights[4]


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=80), st.integers(60, 400))
def test_wrapping_keeps_every_letter_and_the_width(text, width):
    lines = module._wrap(text, width, 0.6)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(module._text_width(line, 0.6, False) <= width for line in lines)


def test_written_png_reads_back_and_leaves_no_part(tmp_path):
    rows = SheetRow("dense", colours(2, 50)), [SheetRow("fast", colours(2, 55))]
    path = write_contact_sheet(tmp_path / "sheet.png", *rows, title="a red circle", columns=2)
    back = cv2.imread(str(path))[..., ::-1]
    assert np.array_equal(back, contact_sheet(*rows, title="a red circle", columns=2))
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_contact_sheet(tmp_path / "sheet.png", SheetRow("dense", colours(2, 50)), [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("sparse", "options", "message"),
    [
        (colours(3, 55), {}, "dense is 2 frames of 40x44, fast is 3 frames of 40x44"),
        (colours(2, 55, 44, 40), {}, "dense is 2 frames of 40x44, fast is 2 frames of 44x40"),
        ([], {}, "fast is 0 frames"),
        (colours(2, 55), {"columns": 0}, "columns=0"),
        (colours(2, 55), {"gain": 0}, "gain=0"),
    ],
    ids=["count", "size", "empty", "columns", "gain"],
)
def test_what_does_not_fit_is_refused(sparse, options, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(SheetRow("dense", colours(2, 50)), [SheetRow("fast", sparse)], **options)
    with pytest.raises(ValueError, match="dense holds no frames"):
        contact_sheet(SheetRow("dense", []), [])
