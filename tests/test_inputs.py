"""Images and videos to start from: what is read, how it is fitted, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vidsparse.generate.inputs import read_image, read_video
from vidsparse.generate.model_files import InputError
from vidsparse.quality.frames import write_clip


@pytest.fixture
def picture():
    """RGB noise, higher than wide."""
    return np.random.default_rng(0).integers(0, 256, (48, 36, 3), np.uint8)


def save(array, path, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options)
    return path


def test_an_image_is_its_pixels(picture, tmp_path):
    read = read_image("image", save(picture, tmp_path / "a.png"))
    assert read.size == (48, 36) and read.file == "a.png"
    assert np.array_equal(np.asarray(read.value), picture)


def test_a_photo_is_turned_as_its_camera_says(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    read = read_image("image", save(picture, tmp_path / "a.png", exif=exif))
    assert np.array_equal(np.asarray(read.value), np.rot90(picture, -1))


@pytest.mark.parametrize("size", [(16, 16), (96, 72), (32, 64), (64, 32)])
def test_fitting_cuts_the_sides_evenly_and_keeps_the_proportions(tmp_path, size):
    """A disc stays a disc in the middle."""
    y, x = np.mgrid[:120, :90]
    disc = ((y - 59.5) ** 2 + (x - 44.5) ** 2 < 20**2) * 255
    image = np.repeat(disc[..., None].astype(np.uint8), 3, 2)
    fitted = np.asarray(read_image("image", save(image, tmp_path / "a.png")).at(*size, 1).value)
    assert fitted.shape == (*size, 3)
    mass = fitted[..., 0] / 255
    rows, columns = np.arange(size[0]) - (size[0] - 1) / 2, np.arange(size[1]) - (size[1] - 1) / 2
    assert abs((mass.sum(1) * rows).sum()) / mass.sum() < 0.2
    assert abs((mass.sum(0) * columns).sum()) / mass.sum() < 0.2
    tall, wide = (mass.sum(1) * rows**2).sum(), (mass.sum(0) * columns**2).sum()
    assert tall / wide == pytest.approx(1, rel=0.05)


def test_the_share_that_is_cut_off(picture, tmp_path):
    read = read_image("image", save(picture, tmp_path / "a.png"))
    assert read.cut(48, 36) == read.cut(96, 72) == 0
    assert read.cut(48, 48) == read.cut(16, 16) == pytest.approx(1 / 4)  # 36 of 48 rows stay
    assert read.cut(48, 18) == pytest.approx(1 / 2)


def test_the_hash_is_of_the_pixels_that_the_pipeline_gets(picture, tmp_path):
    one = read_image("image", save(picture, tmp_path / "a.png"))
    other = read_image("image", save(picture, tmp_path / "b.tiff"))
    assert one.sha256 == other.sha256
    changed = picture.copy()
    changed[3, 4, 1] ^= 1
    assert read_image("image", save(changed, tmp_path / "c.png")).sha256 != one.sha256
    assert one.at(16, 16, 1).sha256 != one.sha256
    turned = save(picture.reshape(36, 48, 3), tmp_path / "d.png")  # the same bytes
    assert read_image("image", turned).sha256 != one.sha256


def test_opaque_and_palette_images_are_taken(picture, tmp_path):
    opaque = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
    assert np.array_equal(read_image("image", save(opaque, tmp_path / "a.png")).value, picture)
    grey = read_image("image", save(picture[..., 0], tmp_path / "b.png"))
    assert np.array_equal(np.asarray(grey.value)[..., 2], picture[..., 0])
    Image.fromarray(picture).quantize(16).save(tmp_path / "c.png")
    assert read_image("image", tmp_path / "c.png").value.mode == "RGB"


def broken(name, picture, folder):
    """A file of a kind that is refused."""
    path = folder / "bad.png"
    if name == "missing":
        return folder / "nowhere.png"
    if name == "folder":
        return folder
    if name == "text":
        path.write_text("no image")
    elif name == "empty":
        path.touch()
    elif name == "cut off":
        whole = save(picture, folder / "whole.png").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "transparent":
        alpha = np.full(picture.shape[:2], 255, np.uint8)
        alpha[5, 5] = 254
        save(np.dstack([picture, alpha]), path)
    elif name == "16 bit":
        save(picture[..., 0].astype(np.uint16) * 257, path)
    elif name == "animated":
        frames = [Image.fromarray(np.roll(picture, k, 0)) for k in range(3)]
        frames[0].save(folder / "bad.gif", save_all=True, append_images=frames[1:])
        return folder / "bad.gif"
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "no such file"),
        ("folder", "expected an image file"),
        ("text", "unknown format"),
        ("empty", "unknown format"),
        ("cut off", "no image that can be read"),
        ("transparent", "transparent in places"),
        ("16 bit", "8 bits a channel"),
        ("animated", "holds several; --video"),
    ],
)
@pytest.mark.parametrize("option", ["image", "last_image"])
def test_what_is_no_image_is_refused(picture, tmp_path, name, said, option):
    path = broken(name, picture, tmp_path)
    with pytest.raises(InputError) as caught:
        read_image(option, path)
    text = str(caught.value)
    assert said in text and "\n" not in text
    assert text.startswith(f"--{option.replace('_', '-')} {path}")


def test_a_bomb_is_refused(tmp_path, monkeypatch, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="no image that can be read"):
        read_image("image", save(picture, tmp_path / "a.png"))


def test_a_video_is_its_first_frames(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (7, 16, 24, 3), np.uint8)
    path = write_clip(tmp_path / "a.mkv", frames, 12.0)
    whole, start = read_video(path, 7), read_video(path, 5)
    assert not whole.more and start.more and len(start.frames) == 5
    assert whole.fps == 12 and whole.size == (16, 24)
    assert np.array_equal(np.stack(whole.value), frames)
    assert np.array_equal(np.stack(start.value), frames[:5])
    fitted = whole.at(16, 24, 3)
    assert fitted.more and np.array_equal(np.stack(fitted.value), frames[:3])


def test_a_folder_of_pngs_is_a_video(tmp_path, picture):
    for k in range(3):
        save(np.roll(picture, k, 0), tmp_path / f"{k}.png")
    read = read_video(tmp_path, 9)
    assert read.fps is None and len(read.value) == 3
    assert np.array_equal(np.asarray(read.value[2]), np.roll(picture, 2, 0))


@pytest.mark.parametrize("content", [None, b"", b"no video"])
def test_what_is_no_video_is_refused(tmp_path, content):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_video(path, 9)
    text = str(caught.value)
    assert text.startswith(f"--video {path}: ") and "\n" not in text
    assert text.count(str(path)) == 1
