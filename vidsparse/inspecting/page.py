"""index.html: the pictures of a folder with their captions; it opens from disk and asks nobody."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imageio.v2 as iio
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

import vidsparse
from vidsparse.jobs.layout import PAGE
from vidsparse.quality.frames import atomic_output
from vidsparse.terminal import printable

CSS = Path(__file__).with_name("index.css")


@dataclass(frozen=True)
class Picture:
    """A file beside the page. alt: for those who cannot see it; caption: what it says."""

    file: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Group:
    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Section:
    """id: of its place in the page."""

    id: str
    title: str
    about: str
    groups: Sequence[Group]


def write_index(
    folder: Path,
    sections: Sequence[Section],
    rows: Sequence[dict[str, Any]],
    prompt: str,
    conditions: str,
    notes: Sequence[str],
) -> Path:
    """Write the page. rows: figures per step, layer and head. prompt: text of others."""
    css = CSS.read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("vidsparse.inspecting", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("index.html.j2").render(
        policy=_policy(css),
        css=css,
        prompt=printable(prompt),
        conditions=printable(conditions),
        notes=[printable(note) for note in notes],
        sections=[_section(folder, section) for section in sections],
        rows=rows,
        version=vidsparse.__version__,
    )
    path = folder / PAGE
    with atomic_output(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _policy(css: str) -> str:
    """Pictures beside the page, its own style, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self' file:; "
        "base-uri 'none'; form-action 'none'"
    )


def _section(folder: Path, section: Section) -> dict[str, Any]:
    groups = [
        {"title": group.title, "pictures": [_picture(folder, p) for p in group.pictures]}
        for group in section.groups
    ]
    return {"id": section.id, "title": section.title, "about": section.about, "groups": groups}


def _picture(folder: Path, picture: Picture) -> dict[str, Any]:
    """With its size in pixels, so that the page does not jump while it loads."""
    path = folder / picture.file
    shape = iio.imread(path).shape if path.suffix == ".gif" else cv2.imread(str(path)).shape  # type: ignore[union-attr]
    height, width = shape[-3:-1] if len(shape) > 2 else shape
    return {**vars(picture), "width": width, "height": height}
