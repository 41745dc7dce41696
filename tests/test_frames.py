"""Clips survive the disk bit for bit, and a failed write leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import imageio.v2 as iio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.quality import frames as io
from vidsparse.quality.metrics import compare_clips

ROOT = Path(__file__).parents[1]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Quantisation


def test_ties_round_to_even():
    ties = np.array([k for k in range(255) if (k + 0.5) / 255 * 255 == k + 0.5], np.float64)
    assert len(ties) > 100
    expected = [k + k % 2 for k in ties]
    assert io.quantise((ties + 0.5) / 255).tolist() == expected


def test_values_are_rounded_and_clipped_but_never_truncated_or_wrapped():
    values = np.array([-0.3, 0.0, 0.999, 1.0, 1.2, 2.0], np.float32)
    assert io.quantise(values).tolist() == [0, 0, 255, 255, 255, 255]
    levels = np.arange(256, dtype=np.uint8)
    assert io.quantise(levels) is levels
    for dtype in (np.float16, np.float32, np.float64):
        assert (io.quantise((levels / 255).astype(dtype)) == levels).all(), dtype


def test_quantise_leaves_its_argument_alone_and_takes_tensors():
    torch = pytest.importorskip("torch")
    tensor = torch.rand(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    kept = tensor.clone()
    expected = (tensor.double() * 255).round().to(torch.uint8).numpy()
    assert (io.quantise(tensor.requires_grad_()) == expected).all()
    assert (tensor == kept).all()
    rounded = tensor.detach().bfloat16()
    assert (io.quantise(rounded) == io.quantise(rounded.float().numpy())).all()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.array([0.1, np.nan]), ValueError, "NaN or infinity"),
        (np.array([0.1, -np.inf]), ValueError, "NaN or infinity"),
        (np.array([0.0, 200.0]), ValueError, "divide by 255"),
        (np.zeros((0, 3)), ValueError, "empty"),
        (np.array([1, 2]), TypeError, "int64"),
        (np.array([True]), TypeError, "bool"),
    ],
    ids=["nan", "inf", "float-255", "empty", "int64", "bool"],
)
def test_quantise_refuses(value, error, message):
    with pytest.raises(error, match=message):
        io.quantise(value)


# Lossless clips


@pytest.mark.parametrize("size", [(131, 95), (1, 1), (2, 300), (64, 48)], ids=str)
def test_ffv1_gives_back_every_bit(tmp_path, size):
    clip = noise(5, *size, 3)
    path = io.write_clip(tmp_path / "clip.mkv", clip, fps=12.5)
    back = io.read_clip(path)
    assert back.dtype == np.uint8
    assert np.array_equal(back, clip)
    assert os.listdir(tmp_path) == ["clip.mkv"]


@settings(max_examples=4, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(2, 40), st.sampled_from([1, 8, 24, 29.97])
)
def test_no_frame_is_lost_or_doubled_at_any_rate(tmp_path_factory, count, height, width, fps):
    clip = noise(count, height, width, 3, seed=count)
    path = io.write_clip(tmp_path_factory.mktemp("rate") / "clip.mkv", iter(clip), fps)
    assert np.array_equal(io.read_clip(path), clip)
    assert io.open_clip(path).fps == fps


def test_a_clip_tells_what_it_is_and_reads_twice(tmp_path):
    clip = noise(4, 40, 56, 3)
    lossless = io.open_clip(io.write_clip(tmp_path / "a.mkv", clip / np.float32(255), 8))
    assert (lossless.fps, lossless.codec, lossless.lossless) == (8, "ffv1", True)
    assert "ffmpeg" in lossless.decoder
    for _ in range(2):
        assert np.array_equal(np.stack(list(lossless)), clip)
    preview = io.open_clip(io.write_preview(tmp_path / "a.mp4", clip, 8))
    assert (preview.codec, preview.lossless) == ("h264", False)


def test_awkward_file_names(tmp_path):
    clip = noise(2, 9, 7, 3)
    path = io.write_clip(tmp_path / "a:b %03d it's #1 é.mkv", clip, 8)
    assert np.array_equal(io.read_clip(str(path)), clip)


def test_npz(tmp_path):
    clip = noise(3, 9, 7, 3)
    np.savez_compressed(tmp_path / "a.npz", frames=clip, fps=16)
    assert np.array_equal(io.read_clip(tmp_path / "a.npz"), clip)
    info = io.open_clip(tmp_path / "a.npz")
    assert (info.fps, info.lossless) == (16, True)
    np.savez(tmp_path / "b.npz", video=clip)
    with pytest.raises(ValueError, match="it holds video"):
        io.open_clip(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"PK not really")
    with pytest.raises(ValueError, match=r"c\.npz is no \.npz"):
        io.open_clip(tmp_path / "c.npz")


def test_folder_of_pngs_in_numeric_order(tmp_path):
    clip = noise(12, 9, 7, 3)
    for t, frame in enumerate(clip):
        io.write_png(tmp_path / f"frame_{t}.png", frame)
    (tmp_path / "notes.txt").write_text("not a frame")
    assert np.array_equal(io.read_clip(tmp_path), clip)
    assert io.open_clip(tmp_path).lossless
    cv2.imwrite(str(tmp_path / "frame_12.png"), np.zeros((9, 7, 3), np.uint16))
    with pytest.raises(ValueError, match=r"frame_12\.png: expected an 8-bit RGB PNG.*uint16"):
        io.read_clip(tmp_path)


def test_what_is_no_clip(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no clip at .*missing\.mkv"):
        io.open_clip(tmp_path / "missing.mkv")
    with pytest.raises(ValueError, match=r"holds no \.png"):
        io.open_clip(tmp_path)
    for name in ("text.mkv", "text.txt"):
        (tmp_path / name).write_text("hello\n" * 50)
        with pytest.raises(ValueError, match="no video that ffmpeg can read"):
            io.open_clip(tmp_path / name)


# Previews


@pytest.mark.parametrize(
    ("size", "scale", "shown"),
    [((131, 95), 1, (132, 96)), ((131, 95), 3, (394, 286)), ((48, 80), 4, (192, 320))],
    ids=["odd", "odd-x3", "x4"],
)
def test_preview_shows_every_pixel_where_it_was(tmp_path, size, scale, shown):
    clip = noise(3, *size, 1).repeat(3, axis=3)  # grey: chroma is stored at half the resolution
    path = io.write_preview(tmp_path / "clip.mp4", clip, 8, scale=scale, quality=10)
    with iio.get_reader(path) as reader:
        assert reader.get_meta_data()["pix_fmt"].startswith("yuv420p")
    back = io.read_clip(path)
    assert back.shape == (3, *shown, 3)
    enlarged = np.kron(clip, np.ones((1, scale, scale, 1), np.uint8))
    padding = [(0, n - m) for n, m in zip(back.shape, enlarged.shape, strict=True)]
    assert compare_clips(np.pad(enlarged, padding, mode="edge"), back).psnr_pool > 40


def test_enlargement():
    assert [io.enlargement(*size) for size in ((64, 64), (96, 160), (480, 832))] == [5, 2, 1]
    assert io.enlargement(40, 100, side=101) == 2


# Failures leave nothing behind


class Stopped(Exception):
    pass


@pytest.mark.parametrize("failure", [Stopped, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("write", "name"), [(io.write_clip, "a.mkv"), (io.write_preview, "a.mp4")], ids=["mkv", "mp4"]
)
def test_failure_in_the_middle_removes_the_part_and_keeps_the_old_file(
    tmp_path, write, name, failure
):
    target = tmp_path / name
    target.write_bytes(b"the old one")
    seen = []

    def broken():
        yield from noise(3, 32, 32, 3)
        seen.extend(os.listdir(tmp_path))
        raise failure

    with pytest.raises(failure):
        write(target, broken(), 8)
    assert len(seen) == 2, "the write goes to a temporary name in the same folder"
    assert os.listdir(tmp_path) == [name]
    assert target.read_bytes() == b"the old one"


def test_control_c_during_a_write(tmp_path):
    program = """
import sys, time, numpy as np
from vidsparse.quality.frames import write_clip
def slow():
    yield from np.zeros((3, 64, 64, 3), np.uint8)
    print("three frames in", flush=True)
    time.sleep(60)
write_clip(sys.argv[1], slow(), 8)
"""
    target = str(tmp_path / "a.mkv")
    child = subprocess.Popen(
        [sys.executable, "-c", program, target],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "three frames in\n"
    assert len(os.listdir(tmp_path)) == 1
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in encoder is a shell script")
def test_an_encoder_that_loses_the_frames_is_noticed(tmp_path, monkeypatch):
    encoder = tmp_path / "ffmpeg"
    encoder.write_text("#!/bin/sh\ncat > /dev/null\nexit 1\n")
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match=r"a\.mkv: 0 of 4 frames arrived"):
        io.write_clip(out / "a.mkv", noise(4, 16, 16, 3), 8)
    assert os.listdir(out) == []


def test_frames_that_change_size(tmp_path):
    frames = [noise(16, 16, 3), noise(16, 18, 3)]
    with pytest.raises(ValueError, match="frame 1 is 16x18, those before it are 16x16"):
        io.write_clip(tmp_path / "a.mkv", frames, 8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("a.mp4", noise(1, 8, 8, 3), 8, r"ends in \.mkv"),
        ("a.mkv", noise(1, 8, 8, 3), 0, "fps must be a positive number, got 0"),
        ("a.mkv", noise(1, 8, 8, 3), float("nan"), "fps must be a positive number, got nan"),
        ("a.mkv", [], 8, "no frames"),
        ("a.mkv", noise(2, 3, 8, 8), 8, r"expected frames of shape .* frame 0 has \(3, 8, 8\)"),
        ("a.mkv", noise(1, 2, 8, 8, 3), 8, r"frame 0 has \(2, 8, 8, 3\)"),
    ],
    ids=["suffix", "fps-0", "fps-nan", "none", "channels-first", "batch"],
)
def test_write_clip_refuses(tmp_path, name, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        io.write_clip(tmp_path / name, frames, fps)
    assert os.listdir(tmp_path) == []


def test_write_preview_refuses(tmp_path):
    for options in ({"scale": 0}, {"scale": 1.5}, {"quality": 11}):
        with pytest.raises(ValueError, match=next(iter(options))):
            io.write_preview(tmp_path / "a.mp4", noise(1, 8, 8, 3), 8, **options)


def test_a_target_that_cannot_be_written_is_named_before_any_work(tmp_path):
    def never():
        raise AssertionError("the frames were asked for")
        yield

    with pytest.raises(FileNotFoundError, match=r"cannot write.*missing/a\.mkv"):
        io.write_clip(tmp_path / "missing" / "a.mkv", never(), 8)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot write.*file/a\.mkv"):
        io.write_clip(tmp_path / "file" / "a.mkv", never(), 8)
    (tmp_path / "folder.mkv").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.mkv"):
        io.write_clip(tmp_path / "folder.mkv", never(), 8)


def test_atomic_output_is_all_or_nothing(tmp_path):
    target = tmp_path / "metrics.json"
    with io.atomic_output(target) as part:
        part.write_text("{}")
        assert not target.exists()
        assert part.suffix == ".json"
    assert target.read_text() == "{}"
    with pytest.raises(KeyboardInterrupt), io.atomic_output(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["metrics.json"]
    assert target.read_text() == "{}"


def test_quality_does_without_torch():
    program = (
        "import sys, vidsparse.quality.metrics, vidsparse.quality.sheet\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
