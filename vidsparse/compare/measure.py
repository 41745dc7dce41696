"""One pair of clips measured, or read from what an earlier run has kept of the same two clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vidsparse.compare import conventions, filters, learned
from vidsparse.compare.arms import ClipFile
from vidsparse.quality.frames import Clip, Frame, atomic_output
from vidsparse.quality.metrics import (
    PROTOCOL,
    ClipMetrics,
    FrameMetrics,
    frame_pairs,
    opened,
    size_of,
    summarise,
)

KEPT = ".measured"
"""Folder in the output that holds what has been measured, a file per pair of clips."""

CORE = ("psnr", "ssim", "flicker")
"""Measures that are always taken."""
OPTIONAL = ("vmaf", "xpsnr", "lpips")
"""Measures that need something that may not be here."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    optional: of `OPTIONAL`. compat: of `conventions.CONVENTIONS`. trim: compare as many frames as
    the shorter clip has. workers: threads, >= 1. fps: None: what the files say.
    """

    optional: tuple[str, ...] = ()
    compat: tuple[str, ...] = ()
    trim: bool = False
    workers: int = 1
    fps: float | None = None


@dataclass(frozen=True)
class Measured:
    """A pair of clips. extra: of the optional measures, frame by frame; None: not taken.

    lacking: optional measure -> why it was not taken. compat: convention -> {"psnr", "ssim"}.
    sha256: of the reference and of the test.
    """

    metrics: ClipMetrics
    sha256: tuple[str, str]
    extra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    compat: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def values(self) -> dict[str, float | None]:
        """The clip's measures by name, PSNR in dB (inf when identical), None if not taken."""
        own = {k: v for k, v in asdict(self.metrics).items() if isinstance(v, float | int | None)}
        means = {name: sum(v) / len(v) for name, v in self.extra.items()}
        return {**own, **dict.fromkeys(self.lacking), **means}


def measure(
    reference: ClipFile,
    test: ClipFile,
    settings: Settings,
    kept: Path | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> Measured:
    """Measure a pair of clips. kept: folder to look in first, and to keep the result in.

    on_frame: told the number of frames that are done. Raises ValueError for clips that cannot be
    compared.
    """
    shas = sha256(reference.clip), sha256(test.clip)
    lacking = {n: why for n in settings.optional if (why := _lacking(n))}
    file = kept / f"{_key(shas, settings, lacking)}.json" if kept else None
    if file is not None and (found := _read(file)) is not None:
        return found
    done = _measure(reference.clip, test.clip, settings, lacking, on_frame)
    done = Measured(done.metrics, shas, done.extra, {**lacking, **done.lacking}, done.compat)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(file) as part:
            part.write_text(json.dumps(_plain(done)), encoding="utf-8")
    return done


def sha256(clip: Clip) -> str:
    """Of a clip's file; of a folder of PNGs the hash of their names and bytes, in order."""
    digest = hashlib.sha256()
    files = sorted(clip.path.glob("[!.]*")) if clip.path.is_dir() else [clip.path]
    for file in files:
        if clip.path.is_dir():
            if file.suffix.lower() != ".png":
                continue
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _measure(
    reference: Clip,
    test: Clip,
    settings: Settings,
    lacking: Mapping[str, str],
    on_frame: Callable[[int], None] | None,
) -> Measured:
    x, y, fps = opened(reference, test, settings.fps)
    others = [conventions.CONVENTIONS[name] for name in settings.compat]

    def also(a: Frame, b: Frame) -> Any:
        return size_of(a, b), [convention.frame(a, b) for convention in others]

    frames: list[FrameMetrics] = []
    rows: list[Any] = []
    for metrics, more in frame_pairs(x, y, also=also, workers=settings.workers, trim=settings.trim):
        frames.append(metrics)
        rows.append(more)
        if on_frame:
            on_frame(len(frames))
    clip = summarise(tuple(frames), rows[0][0] if rows else (0, 0), fps)
    compat = {
        name: conventions.clip([row[1][n] for row in rows])
        for n, name in enumerate(settings.compat)
    }
    extra, failed = {}, {}
    for name in settings.optional:
        if name in lacking:
            continue
        try:
            extra[name] = tuple(_take(name, reference, test, settings))[: len(frames)]
        except (RuntimeError, OSError) as error:
            failed[name] = " ".join(str(error).split())
    return Measured(clip, ("", ""), extra, failed, compat)


def _take(name: str, reference: Clip, test: Clip, settings: Settings) -> Iterator[float]:
    if name == "lpips":
        return learned.lpips(reference, test)
    return iter(filters.measure(name, reference, test, threads=settings.workers).frames)


def _lacking(name: str) -> str | None:
    return learned.lacking() if name == "lpips" else filters.lacking(name)


def _key(shas: Sequence[str], settings: Settings, lacking: Mapping[str, str]) -> str:
    asked = {k: v for k, v in asdict(settings).items() if k != "workers"}
    facts = [shas, asked, lacking, PROTOCOL]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _plain(done: Measured) -> dict[str, Any]:
    content = asdict(done)
    content["metrics"].pop("frames")
    content["frames"] = [asdict(frame) for frame in done.metrics.frames]
    return content


def _read(file: Path) -> Measured | None:
    """What `measure` has kept; None if it is not there, or damaged, or of another version."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        frames = tuple(FrameMetrics(**frame) for frame in content["frames"])
        metrics = content["metrics"]
        if metrics["worst_second"] is not None:
            metrics["worst_second"] = tuple(metrics["worst_second"])
        extra = {name: tuple(values) for name, values in content["extra"].items()}
        return Measured(
            ClipMetrics(**metrics, frames=frames),
            tuple(content["sha256"]),
            extra,
            content["lacking"],
            content["compat"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
