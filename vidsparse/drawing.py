"""Figures for papers and pages: matplotlib without a display, one style, pictures as one act.

matplotlib takes half a second to import: only what draws imports it, through here, and no state
of it is changed for others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vidsparse.quality.frames import Frame, PathLike, atomic_output

COLUMN, PAGE = 3.35, 6.9
"""Width of a figure in one column of a paper, and over both, in inches."""
DPI = 200
INK, SOFT, LINE = "#1a1c20", "#5c6370", "#b8bcc4"
ORANGE = "#e8590c"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "figure.titlesize": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "savefig.facecolor": "white",
    "image.interpolation": "nearest",
    "pdf.fonttype": 42,
}


def require_matplotlib() -> Any:
    """The module. Raises ImportError with the cure if it is missing."""
    try:
        import matplotlib
        import matplotlib.figure  # matplotlib alone does not bring it
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'matplotlib>=3.9'") from error
    return matplotlib


@contextmanager
def sheet(width: float, height: float) -> Iterator[Any]:
    """A figure of this size in inches, to be drawn and saved inside; its style ends with it."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield matplotlib.figure.Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Any, path: PathLike) -> Path:
    """Write a figure as one act, in the format that the suffix names.

    Raises ValueError for a format that matplotlib cannot write, OSError.
    """
    path = Path(path)
    known = sorted(figure.canvas.get_supported_filetypes())
    kind = path.suffix.removeprefix(".").lower()
    if kind not in known:
        raise ValueError(f"{path}: expected a name that ends in one of {', '.join(known)}")
    with atomic_output(path) as part:
        figure.savefig(part, format=kind, dpi=DPI)
    return path


def pixels(figure: Any) -> Frame:
    """uint8 RGB [H, W, 3] of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def ticks(count: int, most: int = 10) -> list[int]:
    """Round places on an axis of `count` things, the first included, at most about `most`."""
    step = next(s for s in _rounds() if count <= s * most)
    return list(range(0, count, step))


def _rounds() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
