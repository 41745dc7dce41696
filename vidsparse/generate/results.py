"""Files of a generation: videos, measures, contact sheet, metrics.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch

from vidsparse.compare.arms import Arm as CompareArm
from vidsparse.compare.arms import ClipFile
from vidsparse.compare.comparison import Comparison, Row
from vidsparse.compare.files import metrics as figures
from vidsparse.compare.measure import Settings, measure
from vidsparse.compare.page import write_page
from vidsparse.compare.run import REPORT_MB, cores
from vidsparse.generate.completing import FPS
from vidsparse.generate.forecast import Foretold
from vidsparse.generate.inputs import told
from vidsparse.generate.job import Job
from vidsparse.generate.limit import limit
from vidsparse.generate.model_files import InputError
from vidsparse.jobs.layout import ABOUT, METRICS, REPORT, SCHEMA
from vidsparse.pipelines.report import RunReport
from vidsparse.quality.frames import (
    Frame,
    atomic_output,
    enlarge,
    enlargement,
    open_clip,
    write_clip,
    write_png,
    write_preview,
)
from vidsparse.quality.metrics import ClipMetrics
from vidsparse.quality.sheet import SheetRow, write_contact_sheet
from vidsparse.versions import versions

PAPER, INK = (250, 250, 248), (26, 28, 32)
BANNER = 34  # pixels above a labelled video
GAP = 8  # pixels between two videos
TEXT_SIZE = 0.55  # scale of OpenCV's font


@dataclass(frozen=True)
class Arm:
    """One run of the pipeline.

    frames: uint8 [F, H, W, 3].
    denoise_seconds: first forward of a transformer to the end of the last step.
    cpu_seconds: CPU time of this process in the loop, all threads together.
    total_seconds: the whole pipeline call, text encoding and video decoding included.
    step_seconds, density: per step; see `clock.Listener.step`.
    report: of the sparse arm, None for the dense one. foretold: what the loop was predicted to
    take, None if nobody has predicted it.
    """

    frames: Frame
    denoise_seconds: float
    cpu_seconds: float
    total_seconds: float
    step_seconds: tuple[float, ...]
    density: tuple[float, ...]
    report: RunReport | None = None
    foretold: Foretold | None = None

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "denoise_seconds": self.denoise_seconds,
            "cpu_seconds": self.cpu_seconds,
            "total_seconds": self.total_seconds,
            "median_step_seconds": median(self.step_seconds),
            "step_seconds": list(self.step_seconds),
            "step_density": list(self.density),
            "predicted": asdict(self.foretold) if self.foretold else None,
        }


def check_encoder(folder: Path) -> None:
    """Write a little video both ways and remove it. Raises InputError if that does not work."""
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    try:
        write_clip(folder / "try.mkv", frames, FPS).unlink()
        write_preview(folder / "try.mp4", frames, FPS).unlink()
    except (OSError, RuntimeError) as error:
        what = " ".join(str(error).replace(f"{folder}/", "").split())
        raise InputError(
            f"no video can be written: {what}; `vidsparse doctor` says which ffmpeg is used"
        ) from error


def write(job: Job, sparse: Arm, dense: Arm | None, folder: Path) -> dict[str, Any]:
    """Write the files of a job into `folder`; returns the content of metrics.json."""
    scale = enlargement(*sparse.frames.shape[1:3])
    arms = {"sparse": sparse} if dense is None else {"sparse": sparse, "dense": dense}
    still = len(sparse.frames) == 1
    for name, arm in arms.items():
        if still:
            write_png(folder / f"{name}.png", arm.frames[0])
        else:
            write_preview(folder / f"{name}.mp4", arm.frames, job.fps, scale=scale)
    for name, arm in arms.items():
        write_clip(folder / f"{name}.mkv", arm.frames, job.fps)
    if sparse.report is not None:
        sparse.report.save(folder / REPORT)
    content = metrics(job, sparse, dense)
    if dense is not None:
        comparison = compare_arms(folder, content, Path(job.preset).stem)
        quality = comparison.rows[0].measured.metrics
        content["quality"] = quality.to_dict()
        write_page(folder / "report.html", comparison, figures(comparison), REPORT_MB)
        labels = (
            f"dense  {dense.denoise_seconds:.1f} s",
            f"vidsparse {Path(job.preset).stem}  {sparse.denoise_seconds:.1f} s",
        )
        if not still:
            both = side_by_side(dense.frames, sparse.frames, labels)
            write_preview(folder / "side_by_side.mp4", both, job.fps)
        _write_sheet(job, sparse, dense, quality, folder / "sheet.png")
    content["files"] = [name for name in ABOUT if name == METRICS or (folder / name).exists()]
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_output(folder / METRICS) as part:  # the last file: with it the folder is complete
        part.write_bytes(text.encode(errors="backslashreplace") + b"\n")
    reread: dict[str, Any] = json.loads(text)
    return reread


def compare_arms(folder: Path, content: dict[str, Any], preset: str) -> Comparison:
    """The sparse video in a job's folder against the dense one. content: of its sidecar."""
    settings = Settings(workers=cores())
    dense, sparse = (
        ClipFile(arm, open_clip(folder / f"{arm}.mkv"), content, arm) for arm in ("dense", "sparse")
    )
    row = Row(preset, dense, sparse, measure(dense, sparse, settings))
    arms = CompareArm("dense", {"dense": dense}), CompareArm(preset, {"sparse": sparse})
    return Comparison(arms[0], arms[1:], [row], settings)


def metrics(job: Job, sparse: Arm, dense: Arm | None) -> dict[str, Any]:
    """All figures of a job but "quality", ready for JSON.

    Seconds, dB, densities in (0, 1]; None: not measured.

    speedup: seconds of the dense arm / of the sparse arm, for the denoising loop, for its median
    step, for its CPU time and for the whole pipeline call. limit: as `limit.limit`.
    """
    totals = sparse.report.to_dict()["totals"] if sparse.report else {}
    speedup = None
    if dense is not None:
        speedup = {
            "denoise": dense.denoise_seconds / sparse.denoise_seconds,
            "median_step": median(dense.step_seconds) / median(sparse.step_seconds),
            "cpu": dense.cpu_seconds / sparse.cpu_seconds,
            "total": dense.total_seconds / sparse.total_seconds,
        }
    return {
        "schema": SCHEMA,
        "id": job.id,
        **conditions(job, sparse),
        "arms": {"dense": dense.figures() if dense else None, "sparse": sparse.figures()},
        "speedup": speedup,
        "limit": limit(dense.denoise_seconds, sparse.report, job.device) if dense else None,
        "density": totals.get("density"),
        "attention_density": totals.get("attention_density"),
        "sparse_calls": totals.get("sparse_calls"),
        "dense_calls": totals.get("dense_calls"),
        "dense_reasons": totals.get("dense_reasons"),
        "attention_seconds": totals.get("seconds"),
        "quality": None,
        "versions": versions(),
    }


def side_by_side(dense: Frame, sparse: Frame, labels: tuple[str, str]) -> Iterator[Frame]:
    """Frames of both videos, small ones enlarged by an integer factor, a label above each."""
    height, width = dense.shape[1:3]
    scale = enlargement(height, width)
    height, width = height * scale, width * scale
    canvas = np.full((BANNER + height, 2 * width + GAP, 3), PAPER, np.uint8)
    for x, label in zip((6, width + GAP + 6), labels, strict=True):
        base = (x, BANNER - 11)
        cv2.putText(canvas, label, base, cv2.FONT_HERSHEY_SIMPLEX, TEXT_SIZE, INK, 1, cv2.LINE_AA)
    for left, right in zip(dense, sparse, strict=True):
        frame = canvas.copy()
        frame[BANNER:, :width] = enlarge(left, scale)
        frame[BANNER:, width + GAP :] = enlarge(right, scale)
        yield frame


def conditions(job: Job, arm: Arm) -> dict[str, Any]:
    """All that it takes to repeat a run, without paths of this machine."""
    frames, height, width, _ = arm.frames.shape
    local = Path(job.model.source).is_dir()
    return {
        "model": {
            "name": job.model.name,
            "source": None if local else job.model.source,
            "fingerprint": job.fingerprint,
            "pipeline": job.takes.pipeline,
        },
        "prompt": job.prompt,
        "negative_prompt": job.settings.get("negative_prompt"),
        "inputs": told(job.inputs),
        "seed": job.seed,
        "steps": job.steps,
        "guidance": job.settings.get("guidance"),
        "guidance_2": job.settings.get("guidance_2"),
        "flow_shift": job.settings.get("flow_shift"),
        "height": height,
        "width": width,
        "frames": frames,
        "fps": job.fps,
        "tokens": job.tokens,
        "dtype": job.dtype,
        "device": job.device,
        "gpu": torch.cuda.get_device_name(job.device) if job.device != "cpu" else None,
        "threads": torch.get_num_threads(),
        "ulysses": job.ulysses,
        "preset": {
            "name": Path(job.preset).name,
            "overrides": list(job.overrides),
            "config": job.config.to_dict(),
        },
    }


def _write_sheet(job: Job, sparse: Arm, dense: Arm, quality: ClipMetrics, path: Path) -> None:
    row = SheetRow(
        Path(job.preset).stem,
        sparse.frames,
        speedup=dense.denoise_seconds / sparse.denoise_seconds,
        seconds=sparse.denoise_seconds,
        psnr=quality.psnr_pool,
        ssim=quality.ssim,
        density=sparse.report.density if sparse.report else None,
    )
    write_contact_sheet(
        path,
        SheetRow("dense", dense.frames, seconds=dense.denoise_seconds),
        [row],
        title=job.prompt,
        subtitle=f"{job.model.name}, seed {job.seed}, {len(sparse.step_seconds)} steps, "
        f"{job.dtype} on {job.device}",
        fps=job.fps,
    )
