"""VMAF and XPSNR by the ffmpeg that imageio-ffmpeg brings, where it has the filters.

Both work on yuv420p at the clip's own size and compare only between arms of one size: identical
clips get about 99.9 VMAF, not 100. Frame 0 has no motion term and is biased in both, so it counts
in the means and never as the worst.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import imageio_ffmpeg

from vidsparse.quality.frames import Clip, write_clip
from vidsparse.quality.metrics import PSNR_CAP

FILTERS = {"vmaf": "libvmaf", "xpsnr": "xpsnr"}
"""Our name of a measure -> ffmpeg's name of its filter."""

RATE = 25
"""Frames per second of the copies that are made of clips which ffmpeg cannot read; it decides
nothing, both inputs are paired frame by frame."""


@dataclass(frozen=True)
class Filtered:
    """One measure of a pair of clips: per frame, mean over all frames, lowest after frame 0."""

    frames: tuple[float, ...]
    mean: float
    worst: float


@cache
def lacking(measure: str) -> str | None:
    """Why this machine cannot take a measure of `FILTERS`, None if it can."""
    try:
        exe = imageio_ffmpeg.get_ffmpeg_exe()
        done = subprocess.run(
            [exe, "-hide_banner", "-filters"], capture_output=True, text=True, timeout=60
        )
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"ffmpeg does not run: {' '.join(str(error).split())}"
    name = FILTERS[measure]
    if re.search(rf"^\s*\S+\s+{name}\s", done.stdout, re.MULTILINE):
        return None
    return f"the ffmpeg of imageio-ffmpeg {imageio_ffmpeg.__version__} has no filter {name}"


def measure(name: str, reference: Clip, test: Clip, *, threads: int = 1) -> Filtered:
    """Take one measure of `FILTERS`; the clips must be of one size and length.

    Raises RuntimeError with the last words of ffmpeg if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="vidsparse-") as holder:
        folder = Path(holder)
        inputs = [_readable(clip, folder / f"{n}.mkv") for n, clip in enumerate((test, reference))]
        planes = [f"[{n}:v]setpts=N,format=yuv420p[{pad}]" for n, pad in enumerate("xy")]
        graph = ";".join([*planes, f"[x][y]{_call(name, threads)}"])
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-hide_banner",
            "-nostdin",
            "-loglevel",
            "error",
        ]
        for path in inputs:
            command += ["-i", str(path)]
        command += ["-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        log = folder / "log"
        if done.returncode or not log.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"{FILTERS[name]} of ffmpeg failed: {last}")
        frames = _vmaf(log) if name == "vmaf" else _xpsnr(log)
    if not frames:
        raise RuntimeError(f"{FILTERS[name]} of ffmpeg measured no frame")
    return Filtered(tuple(frames), sum(frames) / len(frames), min(frames[1:] or frames))


def _call(name: str, threads: int) -> str:
    if name == "vmaf":
        return f"libvmaf=log_fmt=json:log_path=log:n_threads={threads}"
    return "xpsnr=stats_file=log"


def _readable(clip: Clip, copy: Path) -> Path:
    """A file that ffmpeg reads: the clip's own, or a lossless copy of frames in another form."""
    if clip.path.is_dir() or clip.codec == "npz":
        return write_clip(copy, clip, RATE)
    return clip.path


def _vmaf(log: Path) -> list[float]:
    content = json.loads(log.read_text(encoding="utf-8"))
    return [float(frame["metrics"]["vmaf"]) for frame in content["frames"]]


def _xpsnr(log: Path) -> list[float]:
    """XPSNR of the luma plane; identical frames, which ffmpeg calls inf, are capped as our PSNR."""
    found: Sequence[str] = re.findall(r"XPSNR y:\s*(\S+)", log.read_text(encoding="utf-8"))
    return [min(float(value), PSNR_CAP) for value in found]
