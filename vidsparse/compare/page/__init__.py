"""report.html: a comparison as one file that opens from disk and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

import vidsparse
from vidsparse.compare.comparison import Comparison, Row
from vidsparse.compare.sets import interval
from vidsparse.compare.summary import number
from vidsparse.compare.trace import times, trace
from vidsparse.compare.views import FPS, Views, write_views
from vidsparse.quality.frames import atomic_output
from vidsparse.quality.metrics import PSNR_CAP
from vidsparse.terminal import printable

HERE = Path(__file__).resolve().parent
WIDTHS = (640, 480, 320)
"""Widest view, in pixels; the first at which the page fits its bound is taken."""
MOST_VIDEOS = 12
"""Clips with a video; of more only the worst, the median and the best of every arm."""
BASE64 = 4 / 3


def write_page(
    path: Path, comparison: Comparison, figures: Mapping[str, Any], megabytes: float
) -> None:
    """Write the page; it stays below `megabytes` if its text alone does.

    figures: the content of metrics.json.
    """
    with tempfile.TemporaryDirectory(prefix="vidsparse-") as folder:
        text = _render(comparison, figures, [None] * len(comparison.rows), {})
        room = int(megabytes * 1e6 - len(text.encode()))
        videos, why = _videos(comparison, Path(folder), room)
        text = _render(comparison, figures, videos, why)
    with atomic_output(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def _videos(
    comparison: Comparison, folder: Path, room: int
) -> tuple[list[Views | None], dict[int, str]]:
    """A video per row, or why it has none; all together at most `room` bytes in base64."""
    rows = comparison.rows
    wanted, why = list(range(len(rows))), dict[int, str]()
    if len(rows) > MOST_VIDEOS:
        wanted = _telling(comparison)
        why = {n: "only the worst, the median and the best clip of an arm have a video"
               for n in range(len(rows)) if n not in wanted}  # fmt: skip
    made: list[Views | None] = [None] * len(rows)
    for widest in WIDTHS:
        views = partial(_written, rows, folder, widest)
        with ThreadPoolExecutor(comparison.settings.workers) as pool:
            for n, written in zip(wanted, pool.map(views, wanted), strict=True):
                made[n] = written
        if sum(map(_size, made)) <= room:
            return made, why
    for n in sorted(wanted, key=lambda n: -_size(made[n])):
        if sum(map(_size, made)) <= room:
            break
        made[n] = None
        why[n] = "its video would make this page larger than --report-mb allows"
    return made, why


def _written(rows: Sequence[Row], folder: Path, widest: int, n: int) -> Views:
    return write_views(folder / f"{n}.mp4", rows[n], widest)


def _telling(comparison: Comparison) -> list[int]:
    """Places of the worst, median and best clip of every arm, by PSNR."""
    found = []
    for arm in comparison.tests:
        places = [n for n, row in enumerate(comparison.rows) if row.arm == arm.name]
        places.sort(key=lambda n: comparison.rows[n].measured.metrics.psnr_pool)
        found += [places[0], places[len(places) // 2], places[-1]]
    return sorted(set(found))


def _size(views: Views | None) -> int:
    return int(views.path.stat().st_size * BASE64) + 100 if views else 0


def _render(
    comparison: Comparison,
    figures: Mapping[str, Any],
    videos: Sequence[Views | None],
    why: Mapping[int, str],
) -> str:
    clips = [_clip(row, n, videos[n], why.get(n, "")) for n, row in enumerate(comparison.rows)]
    content = {
        "conditions": _conditions(comparison),
        "warnings": [printable(text) for text in comparison.warnings],
        "missed": [printable(text) for text in comparison.misses],
        "arms": [{**arm, **_interval(comparison, arm["arm"])} for arm in figures["arms"]],
        "pairings": figures["pairs"],
        "protocol": figures["protocol"],
        "command": printable(comparison.command, 4000),
        "figures": json.dumps(figures, indent=1),
        "clips": clips,
    }
    parts = {name: (HERE / name).read_text(encoding="utf-8") for name in _PARTS}
    environment = Environment(
        loader=PackageLoader("vidsparse.compare", "page"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        title="vidsparse compare",
        version=vidsparse.__version__,
        policy=_policy(parts),
        css=parts["report.css"],
        chart_css=parts["uPlot.min.css"],
        chart_js=parts["uPlot.iife.min.js"],
        js=parts["report.js"],
        data=_json(content),
        videos=[
            {"id": f"video-{n}", "data": _base64(views.path)}
            for n, views in enumerate(videos)
            if views
        ],
    )


_PARTS = ("report.css", "report.js", "uPlot.min.css", "uPlot.iife.min.js")


def _policy(parts: Mapping[str, str]) -> str:
    """Nothing is fetched, and no script or style runs but those that the page came with."""
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode()}'"
            for name in parts
            if name.endswith(kind)
        )
        for kind in (".js", ".css")
    }
    return (
        f"default-src 'none'; script-src {hashes['.js']}; style-src {hashes['.css']}; "
        "media-src blob:; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _json(content: Mapping[str, Any]) -> str:
    """JSON that stands in a script element: no "<" and no line ends of JavaScript in it."""
    text = json.dumps(content, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clip(row: Row, number_of: int, views: Views | None, why: str) -> dict[str, Any]:
    metrics = row.measured.metrics
    frames = metrics.frames
    shown = None
    if views is not None:
        shown = {"id": f"video-{number_of}", "width": views.width, "height": views.height}
    return {
        "arm": printable(row.arm),
        "clip": printable(row.clip),
        "prompt": printable(str(row.test.sidecar["prompt"])) if row.test.sidecar else None,
        "figures": _figures(row),
        "frames": metrics.n_frames,
        "fps": metrics.fps or FPS,
        "worst_frame": metrics.worst_frame,
        "worst_second": list(metrics.worst_second) if metrics.worst_second else None,
        "video": shown,
        "no_video": why,
        "series": {
            "psnr": [round(min(frame.psnr, PSNR_CAP), 4) for frame in frames],
            "ssim": [round(frame.ssim, 6) for frame in frames],
            "flick_ref": [_rounded(frame.flick_ref) for frame in frames],
            "flick_test": [_rounded(frame.flick_test) for frame in frames],
        },
        "trace": trace(row),
        "time": times(row),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else round(value, 5)


def _figures(row: Row) -> str:
    metrics = row.measured.metrics
    parts = [
        f"PSNR {number(metrics.psnr_pool, '.2f', ' dB')}",
        f"SSIM {number(metrics.ssim, '.4f')}",
        f"drift {number(metrics.psnr_slope, '+.2f', ' dB/s')}",
        f"flicker {number(metrics.flicker_ratio, '.3f')} of the reference's",
    ]
    if row.speedup is not None:
        parts.append(f"{row.speedup:.2f}x as fast")
    if row.density is not None:
        parts.append(f"density {row.density:.3f}")
    if row.floor is not None:
        parts.append(f"lossy file, codec floor {number(row.floor.psnr, '.1f', ' dB')}")
    return ", ".join(parts)


def _conditions(comparison: Comparison) -> str:
    """What all clips were made under, as far as sidecars say it and agree."""
    jobs = [row.test.sidecar for row in comparison.rows if row.test.sidecar]
    if not jobs:
        return f"{len(comparison.rows)} pairs of clips, no sidecars"
    facts = {
        "model": {str(job["model"]["name"]) for job in jobs},
        "size": {f"{job['width']}x{job['height']}, {job['frames']} frames" for job in jobs},
        "steps": {f"{job['steps']} steps" for job in jobs},
        "dtype": {str(job["dtype"]) for job in jobs},
        "device": {str(job.get("gpu") or job["device"]) for job in jobs},
        "seed": {f"seed {job['seed']}" for job in jobs},
    }
    return printable(", ".join(found.pop() for found in facts.values() if len(found) == 1))


def _interval(comparison: Comparison, arm: str) -> dict[str, float | None]:
    """95 % bootstrap interval of an arm's mean PSNR."""
    values = list(comparison.values(arm, "psnr_pool").values())
    low, high = interval(values, list(range(len(values))), seed=comparison.seed)
    return {"psnr_low": low, "psnr_high": high}


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
