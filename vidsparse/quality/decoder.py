"""The ffmpeg process that reads a video: what it holds, its frames, and whether all were read.

Frames come as PPM, whose header says their size: after rotation, whatever the container says. Every
stored frame comes once, whatever its time stamp. A stream that ends early, or of which ffmpeg could
not decode a part, is an error and not a shorter video.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from vidsparse.interrupts import held


@dataclass(frozen=True)
class Stream:
    """The video stream of a file, as ffmpeg names it; fps is None if nobody says."""

    codec: str
    pixels: str
    fps: float | None


def probe(path: Path) -> Stream | None:
    """Look at a file; None if ffmpeg finds no video in it. Raises OSError without ffmpeg."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-i", str(path)]
    with held():
        said = subprocess.run(command, capture_output=True, process_group=0).stderr
    text = said.decode(errors="replace")
    found = re.search(r"^ *Stream #\d+:\d+.*?: Video: (\w+)[^,]*, (\w+)(.*)$", text, re.MULTILINE)
    if found is None or found[2] == "none":
        return None
    rate = re.search(r"([\d.]+)(k?) fps", found[3])
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else 0.0
    return Stream(found[1], found[2], fps or None)


@cache
def version() -> str:
    """What decodes: names and versions."""
    return (
        f"imageio-ffmpeg {imageio_ffmpeg.__version__}, ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}"
    )


def decode(path: Path) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames of a video, uint8 RGB `(H, W, 3)`.

    Raises ValueError with ffmpeg's words, after the last whole frame, if it has not read all.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", str(path)]
    command += ["-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24"]
    command += ["-c:v", "ppm", "-f", "image2pipe", "-"]
    with tempfile.TemporaryFile() as said:
        with held():
            # in a group of its own, so that a Ctrl-C at the terminal is ours to deal with
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, process_group=0
            )
        try:
            assert process.stdout is not None
            while (frame := _frame(process.stdout)) is not None:
                yield frame
            status = process.wait()
        finally:
            _end(process)
        said.seek(0)
        complaint = _complaint(said.read().decode(errors="replace"))
    if status or complaint:
        raise ValueError(f"{path} is damaged: ffmpeg says {complaint or f'exit status {status}'}")


def _frame(stream: IO[bytes]) -> npt.NDArray[np.uint8] | None:
    """The next PPM image; None at the end, also within an image."""
    header = [stream.readline() for _ in range(3)]  # P6, width and height, 255
    if not header[2]:
        return None
    width, height = map(int, header[1].split())
    frame = np.empty((height, width, 3), np.uint8)
    room = frame.data.cast("B")
    while len(room):
        read = stream.readinto(room)  # type: ignore[attr-defined]
        if not read:
            return None
        room = room[read:]
    return frame


def _complaint(said: str) -> str:
    """The first line, without the address of who says it; empty if nothing was said."""
    lines = [re.sub(r"^(\[[^]]*\] *)+", "", line).strip() for line in said.splitlines()]
    return next((line for line in lines if line), "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it if it still runs, and wait."""
    if process.poll() is None:
        process.kill()
    if process.stdout is not None:
        with suppress(OSError):
            process.stdout.close()
    process.wait()
