"""Names: of a job's folder, and of the files in it."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Container
from pathlib import Path
from typing import Any

SCHEMA = "vidsparse.generate/1"
INSPECTION = "vidsparse.inspect/1"
SCHEMAS = (SCHEMA, INSPECTION)
"""Of the sidecars of all folders that appear as one act."""
METRICS = "metrics.json"
REPORT = "report.json"
ABOUT = {
    "sparse.png": "the image",
    "dense.png": "the same from the dense pipeline",
    "sparse.mp4": "the video",
    "dense.mp4": "the same from the dense pipeline",
    "side_by_side.mp4": "dense and sparse beside each other",
    "report.html": "both videos, where they differ and what attention did",
    "sheet.png": "frames of both and their difference",
    "dense.mkv": "lossless frames, to measure on",
    "sparse.mkv": "lossless frames, to measure on",
    REPORT: "every attention call: its density per head, or why it was dense",
    METRICS: "all figures, and all that it takes to repeat them",
}
"""Every file that a job can write, and what it is."""
STILLS = {"sparse.png", "dense.png"}
"""Those of a job that makes an image, instead of the .mp4."""

PAGE = "index.html"
PICTURE = re.compile(r"[a-z]+(-[a-z]+[0-9]+)*\.(png|gif)")
"""What `vidsparse inspect` calls its pictures."""

LONGEST_SLUG = 60  # bytes in UTF-8
LONGEST_WORD = 24  # bytes of a preset's name


def folder_name(prompt: str, preset: str, size: tuple[int, int, int], seed: int, id: str) -> str:
    """Name of a job's folder: what a person looks for, then what makes it unique.

    size: height, width, frames. Below 143 bytes, which an encrypted home folder still takes; never
    hidden, reserved, or changed by a file system that ignores case or cuts dots at the end.
    """
    height, width, frames = size
    words = slug(prompt) or "video"
    method = slug(Path(preset).stem, LONGEST_WORD) or "preset"
    name = f"{words}-{method}-{width}x{height}x{frames}-seed{seed}-{id[:10]}"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # the locale of this process knows fewer letters
        name = re.sub(r"[^a-z0-9-]+", "", name.encode("ascii", "ignore").decode()).lstrip("-")
    return name


def slug(text: str, longest: int = LONGEST_SLUG) -> str:
    """A file name from a text: its letters and digits of any script in lower case, joined by "-".

    Cut between words if it can be, to at most `longest` bytes of UTF-8; empty if the text has none.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # marks within words
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    words = [word for word in kept.split() if not all(_mark(c) for c in word)]
    name = "-".join(words)
    if len(name.encode()) <= longest:
        return name
    cut = name.encode()[: longest + 1].decode(errors="ignore")
    shorter = cut.rpartition("-")[0]
    if len(shorter.encode()) * 2 >= longest:
        return shorter
    cut = name.encode()[:longest].decode(errors="ignore")
    while cut and _mark(name[len(cut)]):  # not between a letter and its accent
        cut = cut[:-1]
    return cut.rstrip("-")


def read_sidecar(folder: Path, schemas: Container[str] = (SCHEMA,)) -> dict[str, Any] | None:
    """metrics.json of a job's folder; None if the folder has none that is of these schemas."""
    try:
        content = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        known = content["schema"] in schemas and isinstance(content["files"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if known else None


def read_finished(folder: Path, id: str) -> dict[str, Any] | None:
    """metrics.json of a folder that holds this very job, whole; None if it does not."""
    sidecar = read_sidecar(folder)
    if sidecar is None or sidecar.get("id") != id:
        return None
    return sidecar if all((folder / name).is_file() for name in sidecar["files"]) else None


def read_report(folder: Path) -> dict[str, Any] | None:
    """The run report of a job's folder, as `RunReport.to_dict` gives it; None if there is none."""
    try:
        content: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("calls"), list) else None


def files_of(folder: Path) -> set[str]:
    """Names that the folder's sidecar lists; only names that a job can write."""
    sidecar = read_sidecar(folder, SCHEMAS) or {"schema": SCHEMA}
    names = {name for name in sidecar.get("files", ()) if isinstance(name, str)}
    if sidecar["schema"] == SCHEMA:
        return names & set(ABOUT)
    return {n for n in names if n in (PAGE, REPORT, METRICS) or PICTURE.fullmatch(n)}


def _mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
