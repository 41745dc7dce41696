"""Clips in and out: lossless files to measure on, previews to look at, one way from float to uint8.

A frame is uint8 RGB ``(H, W, 3)``. Measured clips are FFV1 in ``.mkv`` (written here), ``.npz`` or
a folder of PNGs (both read only). Every output is written under a temporary name in its own folder
and renamed once it is complete.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import cv2
import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from vidsparse.interrupts import check, held
from vidsparse.quality.decoder import Stream, decode, probe, version
from vidsparse.quality.encoder import encode

Frame = npt.NDArray[np.uint8]
PathLike = str | os.PathLike[str]

LOSSLESS = {
    ("ffv1", "bgr0"),
    ("ffvhuff", "bgr0"),
    ("huffyuv", "bgr0"),
    ("magicyuv", "gbrp"),
    ("png", "rgb24"),
    ("utvideo", "gbrp"),
}
"""Codecs and pixel formats of videos that keep every bit of 8-bit RGB."""


@contextmanager
def atomic_output(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    The temporary name has the same suffix. An interruption is a failure; a file that was at `path`
    before a failure stays as it was. Raises OSError (FileNotFoundError, PermissionError, ...) that
    names `path`, at once, when its folder can't be written to.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder, expected a file name")
    part = target.with_name(f".{secrets.token_hex(6)}.part{target.suffix}")
    try:
        try:
            part.touch(exist_ok=False)
        except OSError as error:
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(target)) from error
        yield part
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):  # its folder is gone, or never was one: say the first error
            part.unlink(missing_ok=True)
        raise


def quantise(frames: Any) -> Frame:
    """Floats in [0, 1] -> uint8, any shape: clip to [0, 1], times 255, round half to even.

    Takes arrays, tensors and PIL images; uint8 passes unchanged. Computes in the precision of the
    input, float32 at least. Raises TypeError for other dtypes, ValueError for NaN, infinity, an
    empty array, and for values above 2, which are floats on a 0..255 scale.
    """
    array = _as_array(frames)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"expected frames as uint8 or as floats in [0, 1], got {array.dtype=}")
    if not array.size:
        raise ValueError(f"expected frames, got an empty array: {array.shape=}")
    low, high = float(array.min()), float(array.max())
    if not (isfinite(low) and isfinite(high)):
        raise ValueError(f"expected finite frames, got NaN or infinity (min {low}, max {high})")
    if high > 2:
        raise ValueError(
            f"float frames must be in [0, 1], got {high:g}; divide by 255 or pass uint8"
        )
    scaled = array.astype(np.promote_types(array.dtype, np.float32))
    np.clip(scaled, 0, 1, out=scaled)
    scaled *= 255
    np.rint(scaled, out=scaled)
    return scaled.astype(np.uint8)


def iter_frames(source: Any, name: str = "clip") -> Iterator[Frame]:
    """Frames of `source` one by one: contiguous uint8 RGB `(H, W, 3)`, floats quantised.

    `source` is a path, a `Clip`, an array or tensor `(F, H, W, 3)`, or an iterable of frames;
    messages call it `name`. Raises ValueError for a frame of another shape, or of another size
    than the frames before it; otherwise as `open_clip` and `quantise` do.
    """
    if isinstance(source, (str, os.PathLike)):
        source = open_clip(source)
    size: tuple[int, ...] | None = None
    for t, item in enumerate(source):
        check()
        frame = quantise(item)
        if frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise ValueError(
                f"{name}: expected frames of shape (height, width, 3), frame {t} has {frame.shape}"
            )
        size = size or frame.shape
        if frame.shape != size:
            raise ValueError(
                f"{name}: frame {t} is {frame.shape[0]}x{frame.shape[1]}, "
                f"those before it are {size[0]}x{size[1]} (height x width)"
            )
        yield np.ascontiguousarray(frame)


@dataclass(frozen=True)
class Clip:
    """A clip on disk. Each `iter()` decodes it anew, one frame at a time (`.npz`: loaded whole).

    `fps` is None when the file doesn't say. `lossless` is True only for what is known to keep every
    bit of 8-bit RGB: `LOSSLESS` videos, `.npz`, a folder of PNGs. Record `codec` and `decoder`
    beside a measurement.
    """

    path: Path
    fps: float | None
    codec: str
    lossless: bool
    decoder: str

    def __iter__(self) -> Iterator[Frame]:
        if self.path.is_dir():
            return map(_read_png, _png_files(self.path))
        return _load_npz(self.path) if self.codec == "npz" else decode(self.path)


def open_clip(path: PathLike) -> Clip:
    """Look at a video file, an `.npz` (`frames` `(F, H, W, 3)`, maybe `fps`) or a folder of PNGs.

    PNGs come in the order of the numbers in their names; other files in the folder are no part of
    the clip. Raises FileNotFoundError, or ValueError when the path holds none of the three, or a
    video of more than 8 bits a channel or with an alpha channel, which would be cut off.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"no clip at {path}")
    if path.is_dir():
        _png_files(path)
        return Clip(path, None, "png", True, f"opencv {cv2.__version__}")
    if path.suffix == ".npz":
        with _npz(path) as archive:
            fps = float(archive["fps"]) if "fps" in archive else None
        return Clip(path, fps, "npz", True, f"numpy {np.__version__}")
    stream = probe(path)
    if stream is None:
        raise ValueError(f"{path} is no video that ffmpeg can read, no .npz and no folder of PNGs")
    _check_pixels(path, stream)
    lossless = (stream.codec, stream.pixels) in LOSSLESS
    return Clip(path, stream.fps, stream.codec, lossless, version())


def read_clip(path: PathLike) -> Frame:
    """The whole clip as uint8 `(F, H, W, 3)`. Raises as `open_clip`, ValueError without frames."""
    frames = list(iter_frames(path, str(path)))
    if not frames:
        raise ValueError(f"{path} holds no frames")
    return np.stack(frames)


def write_clip(path: PathLike, frames: Any, fps: float) -> Path:
    """Write a lossless clip, FFV1 in `.mkv`; `read_clip` gives back the same bits.

    `frames` is anything that `iter_frames` takes, a generator too, of any size from 2 pixels of
    width; `fps` > 0 in frames per second. Returns the path. Raises ValueError for a wrong suffix,
    fps, no frames or sizes that differ, OSError when the file could not be written in full.
    """
    path = _suffixed(path, ".mkv")
    _encode(path, iter_frames(frames), fps, ["-vcodec", "ffv1", "-pix_fmt", "bgr0"])
    return path


def write_preview(
    path: PathLike, frames: Any, fps: float, *, scale: int = 1, quality: float = 8
) -> Path:
    """Write an H.264 `.mp4` for eyes: lossy, never measure on it. Plays in browsers (yuv420p).

    `scale` >= 1 makes each pixel a block of `scale` x `scale` equal pixels (see `enlargement`).
    Nothing is resampled: a side that is still odd gets its last row or column a second time.
    `quality` in [1, 10], 10 is best. Other arguments, result and errors as in `write_clip`.
    """
    path = _suffixed(path, ".mp4")
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be an integer >= 1, got {scale!r}")
    if not 1 <= quality <= 10:
        raise ValueError(f"quality must be in [1, 10], got {quality!r}")
    shown = (_pad_to_even(enlarge(frame, scale)) for frame in iter_frames(frames))
    crf = str(int((1 - quality / 10) * 51))  # 51 is the worst
    options = ["-vcodec", "libx264", "-crf", crf, "-pix_fmt", "yuv420p"]
    _encode(path, shown, fps, [*options, "-movflags", "+faststart"])
    return path


def write_seekable(path: PathLike, frames: Any, fps: float) -> Path:
    """Write an H.264 `.mp4` in which a player finds every frame at once: lossy, for eyes.

    No frame needs a later one, every twelfth stands alone, and frame t is shown from t / fps on.
    Sides must be even. Other arguments, result and errors as in `write_clip`.
    """
    path = _suffixed(path, ".mp4")
    options = ["-vcodec", "libx264", "-crf", "20", "-pix_fmt", "yuv420p", "-bf", "0", "-g", "12"]
    _encode(path, iter_frames(frames), fps, [*options, "-movflags", "+faststart"])
    return path


def write_png(path: PathLike, image: Any) -> Path:
    """Write one RGB frame `(H, W, 3)` as a `.png`. Result and errors as in `write_clip`."""
    path = _suffixed(path, ".png")
    (frame,) = iter_frames([image], "image")
    data = cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[1]
    with atomic_output(path) as part:
        part.write_bytes(data.tobytes())
    return path


def enlargement(height: int, width: int, side: int = 320) -> int:
    """The smallest integer factor that brings the longer side to at least `side` pixels."""
    return max(1, -(-side // max(height, width)))


def enlarge(frame: Frame, scale: int) -> Frame:
    """Nearest neighbour by an integer factor: `(H, W, 3)` -> `(scale*H, scale*W, 3)`."""
    return frame if scale == 1 else frame.repeat(scale, axis=0).repeat(scale, axis=1)


def _as_array(value: Any) -> npt.NDArray[Any]:
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _suffixed(path: PathLike, suffix: str) -> Path:
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"expected a file name that ends in {suffix}, got {path.name!r}")
    return path


def _pad_to_even(frame: Frame) -> Frame:
    height, width, _ = frame.shape
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode(path: Path, frames: Iterator[Frame], fps: float, options: list[str]) -> None:
    if not (isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    with held(), atomic_output(path) as part:
        written, complaint = encode(part, frames, fps, options)
        if not written:
            raise ValueError(f"no frames to write to {path}")
        try:  # a disk that filled up, or an encoder that failed, may show only in the file
            found = imageio_ffmpeg.count_frames_and_secs(str(part))[0]
        except RuntimeError:
            found = 0
        check()  # a Ctrl-C at a terminal ends the counting too
        if found != written or complaint:
            why = f"encoder failed or disk full{complaint and f': {complaint}'}"
            raise OSError(f"{path}: {found} of {written} frames arrived; {why}")


def _check_pixels(path: Path, stream: Stream) -> None:
    """Raise ValueError if 8-bit RGB cannot hold what a pixel format of ffmpeg says."""
    pixels = stream.pixels
    deep = re.search(r"(9|1[0246]|20|32|48|64)(le|be)$", pixels)
    alpha = re.match(r"yuva|rgba|bgra|argb|abgr|gbrap|ya8|ya16", pixels) and stream.codec != "gif"
    if deep or alpha:
        what = "more than 8 bits a channel" if deep else "an alpha channel"
        raise ValueError(
            f"{path} has {what} ({pixels}); expected 8 bits without alpha: convert it first"
        )


@contextmanager
def _npz(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "frames" not in archive:
                raise KeyError(f"it holds {', '.join(archive) or 'nothing'}")
            yield archive
    except (KeyError, TypeError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is no .npz with a numeric array `frames`: {error}") from error


def _load_npz(path: Path) -> Iterator[Any]:
    with _npz(path) as archive:
        frames = archive["frames"]
    if frames.ndim != 4 or not (
        frames.dtype == np.uint8 or np.issubdtype(frames.dtype, np.floating)
    ):
        raise ValueError(
            f"{path}: expected `frames` as uint8, or floats in [0, 1], of shape (frames, height, "
            f"width, 3), got {frames.dtype} {frames.shape}"
        )
    yield from frames


def _png_files(folder: Path) -> list[Path]:
    files = [file for file in folder.glob("[!.]*") if file.suffix.lower() == ".png"]
    if not files:
        raise ValueError(f"{folder} holds no .png files")
    parts = {file: re.split(r"(\d+)", file.name) for file in files}  # text, number, text, ...
    return sorted(files, key=lambda f: [int(p) if p.isdecimal() else p for p in parts[f]])


def _read_png(file: Path) -> Frame:
    data = np.frombuffer(file.read_bytes(), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = "no image" if image is None else f"{image.dtype} {image.shape}"
        raise ValueError(f"{file}: expected an 8-bit RGB PNG without alpha, got {found}")
    return np.ascontiguousarray(image[:, :, ::-1])
