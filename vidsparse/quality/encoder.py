"""The ffmpeg process that writes a video: fed frame by frame, its end seen, never left over.

imageio's writer hides how the process ended, and runs Python in the forked child, where a signal
that comes at that moment is printed and dropped.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from vidsparse.interrupts import check, interruptible


def encode(
    path: Path, frames: Iterator[npt.NDArray[np.uint8]], fps: float, options: list[str]
) -> tuple[int, str]:
    """Write uint8 RGB frames of one size `(H, W, 3)` to `path`; options: of ffmpeg's output.

    Returns how many frames there were, and the last that ffmpeg said if it failed. Whatever is
    raised, no process stays behind. Without a frame nothing is written.
    """
    process, written = None, 0
    with tempfile.TemporaryFile() as said:
        try:
            while True:
                with interruptible():  # whoever makes the frames may take long
                    frame = next(frames, None)
                if frame is None:
                    break
                check()
                process = process or _start(path, frame.shape, fps, options, said)
                written += 1
                try:
                    _stdin(process).write(frame.data)
                except BrokenPipeError:  # it has given up: its exit status says so
                    break
            if process is None:
                return 0, ""
            with suppress(BrokenPipeError):
                _stdin(process).close()
            status = process.wait()
        finally:
            if process is not None:
                _end(process)
        if not status:
            return written, ""
        said.seek(0)
        lines = [line.strip() for line in said.read().decode(errors="replace").splitlines()]
        return written, next((line for line in reversed(lines) if line), f"exit status {status}")


def _start(
    path: Path, shape: tuple[int, ...], fps: float, options: list[str], said: IO[bytes]
) -> subprocess.Popen[bytes]:
    height, width, _ = shape
    rate = str(Fraction(fps).limit_denominator())
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
    command += ["-f", "rawvideo", "-s", f"{width}x{height}", "-pix_fmt", "rgb24", "-r", rate]
    command += ["-i", "-", "-an", *options, str(path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    # in a group of its own, so that a Ctrl-C at the terminal is ours to deal with
    return subprocess.Popen(command, **pipes, stderr=said, process_group=0)


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it if it still runs, and wait: afterwards no file of it appears."""
    if process.poll() is None:
        process.kill()
    with suppress(BrokenPipeError):
        _stdin(process).close()
    process.wait()
