"""Videos of every kind as ffmpeg hands them over: all of them, or an error."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from vidsparse.quality.frames import LOSSLESS, open_clip, read_clip, write_clip, write_preview

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 22, 34, 3), np.uint8)


def make(path, *options, frames=FRAMES):
    """Write frames with any codec of ffmpeg."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-s", size]
    command += ["-pix_fmt", "rgb24", "-r", "8", "-i", "-", *options, str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path


@pytest.mark.parametrize(("codec", "pixels"), sorted(LOSSLESS))
def test_what_is_called_lossless_gives_back_every_bit(tmp_path, codec, pixels):
    asked = "rgb24" if "huff" in codec else pixels  # which ffmpeg stores as 32 bits
    path = make(tmp_path / "a.mkv", "-c:v", codec, "-pix_fmt", asked)
    clip = open_clip(path)
    assert (clip.codec, clip.lossless, clip.fps) == (codec, True, 8.0)
    assert np.array_equal(read_clip(path), FRAMES)


@pytest.mark.parametrize(
    ("codec", "pixels", "said"),
    [
        ("ffv1", "yuv420p10le", "more than 8 bits a channel"),
        ("ffv1", "gray16le", "more than 8 bits a channel"),
        ("png", "rgb48be", "more than 8 bits a channel"),
        ("ffv1", "bgra", "an alpha channel"),
        ("ffv1", "yuva420p", "an alpha channel"),
    ],
)
def test_what_8_bit_rgb_cannot_hold_is_refused(tmp_path, codec, pixels, said):
    path = make(tmp_path / "a.mkv", "-c:v", codec, "-pix_fmt", pixels)
    with pytest.raises(ValueError, match=f"has {said}"):
        open_clip(path)


@pytest.mark.parametrize("options", [["-c:v", "ffv1", "-pix_fmt", "gray"], ["-c:v", "libx264"]])
def test_other_pixels_are_taken_as_lossy(tmp_path, options):
    path = make(tmp_path / "a.mkv", *options)
    assert not open_clip(path).lossless and read_clip(path).shape == FRAMES.shape


def test_an_animated_gif(tmp_path):
    path = make(tmp_path / "a.gif")
    assert open_clip(path).codec == "gif" and read_clip(path).shape == FRAMES.shape


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
@pytest.mark.parametrize("write", [write_clip, write_preview])
def test_a_file_that_was_cut_off_is_no_shorter_video(tmp_path, write, share):
    whole = write(tmp_path / ("a.mkv" if write is write_clip else "a.mp4"), FRAMES, 8)
    content = whole.read_bytes()
    whole.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"is damaged: ffmpeg says \w+|is no video"):
        read_clip(whole)


def test_every_stored_frame_comes_once_whatever_its_time(tmp_path):
    """A frame rate that changes: nothing is doubled to fill the gaps."""
    path = make(tmp_path / "a.mkv", "-c:v", "ffv1", "-pix_fmt", "bgr0", "-fps_mode", "passthrough",
                "-vf", "setpts=N*N/8/TB")  # fmt: skip
    assert np.array_equal(read_clip(path), FRAMES)


def test_frames_come_as_they_are_shown(tmp_path):
    """The size is that of the rotated frame."""
    upright = make(tmp_path / "a.mp4", "-c:v", "libx264", "-crf", "5")
    turned = tmp_path / "b.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90"]
    command += ["-i", upright, "-c", "copy", turned]
    subprocess.run(list(map(str, command)), check=True)
    assert np.array_equal(read_clip(turned), np.rot90(read_clip(upright), axes=(1, 2)))


def test_no_process_stays_behind_a_clip_that_is_not_read_to_its_end(tmp_path):
    psutil = pytest.importorskip("psutil")
    path = write_clip(tmp_path / "a.mkv", FRAMES, 8)
    others = psutil.Process().children()  # of tests before this one
    frames = iter(open_clip(path))
    next(frames)
    children = [child for child in psutil.Process().children() if child not in others]
    assert any("ffmpeg" in child.name() for child in children)
    frames.close()
    assert not [child for child in psutil.Process().children() if child in children]
