"""Images and videos that a pipeline starts from: read, checked, brought to the video's size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vidsparse.generate.model_files import InputError, first_line
from vidsparse.quality.frames import Frame, iter_frames, open_clip

DEEP = ("I", "F")
"""How the modes of images begin that have more than 8 bits a channel."""


@dataclass(frozen=True)
class Picture:
    """An input as its file has it.

    option: "image", "last_image" or "video". file: its name. frames: RGB, one for an image.
    fps: of a video; None: the file does not say. more: it goes on after these frames.
    """

    option: str
    file: str
    frames: tuple[Image.Image, ...]
    fps: float | None = None
    more: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        width, height = self.frames[0].size
        return height, width

    def at(self, height: int, width: int, frames: int) -> Picture:
        """In another size: cut at two sides to the proportions, then scaled; of a video the first
        so many frames."""
        kept = self.frames[:frames]
        fitted = [ImageOps.fit(f, (width, height), Image.Resampling.LANCZOS) for f in kept]
        more = self.more or len(kept) < len(self.frames)
        return Picture(self.option, self.file, tuple(fitted), self.fps, more)

    @property
    def value(self) -> Any:
        """For a pipeline."""
        return list(self.frames) if self.option == "video" else self.frames[0]

    @property
    def sha256(self) -> str:
        """Of the size and the pixels."""
        digest = hashlib.sha256()
        for frame in self.frames:
            digest.update(f"{frame.size}\0".encode() + frame.tobytes())
        return digest.hexdigest()

    def cut(self, height: int, width: int) -> float:
        """Share of the picture that `at` cuts off."""
        tall, wide = self.size
        ratio = (tall / wide) / (height / width)
        return 1 - min(ratio, 1 / ratio)


def read_image(option: str, path: Path | str) -> Picture:
    """An image file. Raises InputError for what is none, is damaged, or would lose something."""
    file, flag = _file(option, path), option.replace("_", "-")
    try:
        with Image.open(file) as opened:
            if getattr(opened, "n_frames", 1) > 1:
                raise InputError(f"--{flag} {path}: expected one image, it holds several; --video")
            if opened.mode.startswith(DEEP):
                raise InputError(
                    f"--{flag} {path}: expected 8 bits a channel, it has more ({opened.mode})"
                )
            turned = ImageOps.exif_transpose(opened)
            if turned.has_transparency_data:
                low, _ = turned.convert("RGBA").getchannel("A").getextrema()
                if low != 255:
                    raise InputError(
                        f"--{flag} {path}: it is transparent in places; put it on a background"
                    )
            image = turned.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # PIL has one for every format
        raise InputError(f"--{flag} {path}: no image that can be read: {_why(error)}") from error
    return Picture(option, file.name, (image,))


def read_video(path: Path | str, most: int) -> Picture:
    """The first frames of a video file, an .npz or a folder of PNGs, `most` at most.

    Raises InputError for what is none of them, or is damaged.
    """
    file = _file("video", path, folder=True)
    frames: list[Frame] = []
    more = False
    try:
        clip = open_clip(file)
        for frame in iter_frames(clip, str(path)):
            more = len(frames) == most
            if more:
                break
            frames.append(frame)
    except (ValueError, OSError, RuntimeError) as error:
        why = first_line(error).replace(f"{file.absolute()} ", "")
        raise InputError(f"--video {path}: {why}") from error
    if not frames:
        raise InputError(f"--video {path}: holds no frame")
    images = tuple(Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    return Picture("video", file.name, images, clip.fps, more)


def told(inputs: Sequence[Picture]) -> dict[str, Any]:
    """For the sidecar: option -> {file, sha256}."""
    return {one.option: {"file": one.file, "sha256": one.sha256} for one in inputs}


def _file(option: str, path: Path | str, folder: bool = False) -> Path:
    flag, file = option.replace("_", "-"), Path(os.path.expanduser(path))
    if not file.exists():
        raise InputError(f"--{flag} {path}: no such file")
    if file.is_dir() and not folder:
        raise InputError(f"--{flag} {path}: expected an image file, it is a folder")
    return file


def _why(error: Exception) -> str:
    return "unknown format" if "cannot identify" in str(error) else first_line(error)
