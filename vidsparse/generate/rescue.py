"""What was computed is kept when it cannot be written where it should be."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from vidsparse.generate.job import Job
from vidsparse.generate.results import Arm, write
from vidsparse.jobs.publish import Stage
from vidsparse.quality.frames import enlargement, write_clip, write_preview


def rescue(job: Job, arms: Mapping[str, Arm], stage: Stage) -> str:
    """Save finished arms, "dense" or "sparse" or both, where there is room.

    Returns a clause that says what is where: all of it in the first of `places` that takes it, else
    what the stage holds already, else the smallest preview that fits beside the target.
    """
    for place in places():
        with suppress(OSError):
            return f"what was computed is in {_save_in(place, job, arms)}"
    kept = _complete(stage.folder)
    if not kept:
        _save_little(stage.folder, job, arms)
        kept = _complete(stage.folder)
    with suppress(OSError):
        if kept:
            return f"no folder has room for all of it; {', '.join(kept)} is in {stage.keep()}"
    return "nothing could be kept, no folder has room"


def places() -> Iterator[Path]:
    """Folders in which there may be room."""
    with suppress(OSError):
        yield Path(tempfile.gettempdir())
    with suppress(OSError, RuntimeError):
        yield Path.home()


def _save_in(place: Path, job: Job, arms: Mapping[str, Arm]) -> Path:
    """A new folder in `place` with all there is. Raises OSError, and leaves nothing then."""
    folder = Path(tempfile.mkdtemp(prefix="vidsparse-", dir=place))
    try:
        try:
            if "sparse" in arms:
                write(job, arms["sparse"], arms.get("dense"), folder)
            else:
                for name, arm in arms.items():
                    write_clip(folder / f"{name}.mkv", arm.frames, job.fps)
        except OSError:
            raise
        except Exception:  # a defect in what draws or measures must not cost the frames
            for name, arm in arms.items():
                np.savez(folder / f"{name}.npz", frames=arm.frames, fps=job.fps)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _save_little(folder: Path, job: Job, arms: Mapping[str, Arm]) -> None:
    for name, arm in arms.items():
        whole = enlargement(*arm.frames.shape[1:3])
        for scale, quality in ((whole, 8), (1, 8), (1, 4), (1, 1)):
            try:
                write_preview(
                    folder / f"{name}.mp4", arm.frames, job.fps, scale=scale, quality=quality
                )
            except OSError:
                continue
            break


def _complete(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
