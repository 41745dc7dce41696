"""The files of a comparison, written aside and then renamed, all of them or none.

metrics.json is the last, and an earlier one goes first: with it the folder is whole.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from vidsparse.compare.comparison import RANKED, Comparison, Row
from vidsparse.compare.page import write_page
from vidsparse.compare.sets import RESAMPLES
from vidsparse.compare.summary import markdown
from vidsparse.interrupts import held
from vidsparse.jobs.layout import METRICS
from vidsparse.quality.metrics import PROTOCOL, FrameMetrics
from vidsparse.versions import versions

SCHEMA = "vidsparse.compare/1"
FILES = {
    METRICS: "everything, with the protocol that the figures follow",
    "frames.csv": "every frame of every clip",
    "clips.csv": "every clip of every arm",
    "pareto.csv": "every arm: speed-up, PSNR, SSIM, density",
    "summary.md": "a page to paste into an issue",
    "report.html": "a page to look at: the clips, where they differ, what attention did",
}
FRAME_COLUMNS = tuple(name for name in FrameMetrics.__dataclass_fields__)
CLIP_COLUMNS = (
    "psnr_pool", "psnr_mean", "n_identical", "n_capped", "psnr_min", "worst_frame",
    "psnr_worst_second", "psnr_slope", "psnr_y", "ssim", "ssim_min", "ssim_y",
    "tf_ref", "tf_test", "tf_diff", "flicker_ratio", "vmaf", "xpsnr", "lpips",
)  # fmt: skip


def write(comparison: Comparison, out: Path, *, report_mb: float) -> None:
    """Write all files into the folder `out`; until all are there those that were there stay."""
    rows = comparison.rows
    content = metrics(comparison)
    with _together(out) as folder:
        _csv(folder / "frames.csv", _frame_rows(rows))
        _csv(folder / "clips.csv", [clip_row(row) for row in rows])
        _csv(folder / "pareto.csv", [arm_row(comparison, arm.name) for arm in comparison.tests])
        _text(folder / "summary.md", markdown(comparison))
        write_page(folder / "report.html", comparison, content, report_mb)
        _text(folder / METRICS, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextmanager
def _together(out: Path) -> Iterator[Path]:
    """Yield a hidden folder in `out`, whose files take their places at the end."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as folder:
        yield Path(folder)
        with held():
            (out / METRICS).unlink(missing_ok=True)
            for name in (*(name for name in FILES if name != METRICS), METRICS):
                os.replace(Path(folder) / name, out / name)


def metrics(comparison: Comparison) -> dict[str, Any]:
    """The content of metrics.json: plain values, infinite PSNR as None beside the MSE."""
    return {
        "schema": SCHEMA,
        "protocol": protocol(comparison),
        "reference": {"name": comparison.reference.name, "clips": len(comparison.reference.clips)},
        "arms": [arm_row(comparison, arm.name) for arm in comparison.tests],
        "clips": [clip_row(row) for row in comparison.rows],
        "sets": {
            arm.name: {
                measure: asdict(found)
                for measure in RANKED
                if (found := comparison.spread(arm.name, measure)) is not None
            }
            for arm in comparison.tests
        },
        "pairs": [asdict(pair) for pair in comparison.pairings],
        "unmatched": list(comparison.unmatched),
        "warnings": list(comparison.warnings),
        "thresholds": [str(threshold) for threshold in comparison.thresholds],
        "missed": comparison.misses,
        "versions": versions(),
    }


def protocol(comparison: Comparison) -> dict[str, Any]:
    """The conventions of the figures, without which they compare with nothing."""
    rows = comparison.rows
    return {
        **PROTOCOL,
        "frames": "all of the shorter clip" if comparison.settings.trim else "all",
        "lossy_input": any(row.lossy for row in rows),
        "bootstrap": {
            "resamples": RESAMPLES,
            "seed": comparison.seed,
            "interval": "95 % percentile",
            "drawn_together": "clips of one prompt",
        },
        "decoders": sorted({f.clip.decoder for row in rows for f in (row.reference, row.test)}),
        "ffmpeg": imageio_ffmpeg.get_ffmpeg_version(),
        "mismatch_allowed": list(comparison.allowed),
    }


def clip_row(row: Row) -> dict[str, Any]:
    """One line of clips.csv."""
    values = row.measured.values()
    floor, second = row.floor, row.measured.metrics.worst_second
    seconds_ref, seconds = row.seconds
    compat = {
        f"{name}_{measure}": value
        for name, both in row.measured.compat.items()
        for measure, value in both.items()
    }
    found = {
        "arm": row.arm,
        "clip": row.clip,
        "n_frames": row.measured.metrics.n_frames,
        "height": row.measured.metrics.height,
        "width": row.measured.metrics.width,
        "fps": row.measured.metrics.fps,
        **{column: values.get(column) for column in CLIP_COLUMNS},
        "worst_second": "-".join(map(str, second)) if second else None,
        **compat,
        "seconds_reference": seconds_ref,
        "seconds": seconds,
        "speedup": row.speedup,
        "density": row.density,
        "attention_density": row.attention_density,
        "lossy": row.lossy,
        "codec_floor_db": floor.psnr if floor else None,
        "codec_floor": ("exact" if floor.exact else "guessed, optimistic") if floor else None,
        "sha256_reference": row.measured.sha256[0],
        "sha256_test": row.measured.sha256[1],
        "not_measured": "; ".join(f"{n}: {why}" for n, why in row.measured.lacking.items()) or None,
    }
    return _finite(found)


def arm_row(comparison: Comparison, name: str) -> dict[str, Any]:
    """One line of pareto.csv."""
    psnr, ssim = comparison.spread(name, "psnr_pool"), comparison.spread(name, "ssim")
    return {
        "arm": name,
        "clips": len(comparison.of(name)),
        "speedup": comparison.speedup(name),
        "psnr_pool": psnr.mean if psnr else None,
        "psnr_pool_worst": psnr.worst if psnr else None,
        "psnr_pool_worst_clip": psnr.worst_clip if psnr else None,
        "ssim": ssim.mean if ssim else None,
        "ssim_worst": ssim.worst if ssim else None,
        "density": comparison.mean(name, "density"),
        "attention_density": comparison.mean(name, "attention_density"),
        "identical_clips": comparison.infinite(name),
        "lossy": comparison.lossy(name),
        "on_front": name in comparison.front,
    }


def _frame_rows(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    for row in rows:
        for frame in row.measured.metrics.frames:
            extra = {name: values[frame.t] for name, values in row.measured.extra.items()}
            yield _finite({"arm": row.arm, "clip": row.clip, **asdict(frame), **extra})


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in fields.items()}


def _csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Columns in the order in which the rows bring them; None is an empty cell."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
