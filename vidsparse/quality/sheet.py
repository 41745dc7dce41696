"""A contact sheet: evenly spaced frames of a dense clip, of sparse clips, and of their difference.

One PNG that opens anywhere: rows are clips with their figures at the left, columns are moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vidsparse.quality.frames import Frame, PathLike, enlarge, enlargement, iter_frames, write_png

_Color = tuple[int, int, int]
_PAPER, _INK, _SOFT = (250, 250, 248), (26, 28, 32), (102, 106, 114)
_MARGIN, _GAP, _ARM_GAP = 28, 8, 22
_LABEL_WIDTH, _CELL_WIDTH, _TITLE_WIDTH = 176, 160, 440  # the latter two are minima
_FACE = cv2.FONT_HERSHEY_SIMPLEX  # OpenCV 5 draws an outline font for it, OpenCV 4 ASCII strokes
_TITLE, _NAME, _TEXT, _SMALL = 0.9, 0.72, 0.6, 0.52  # its scales
_TITLE_LINES = 4
_SMALLEST_SIDE, _LARGEST_SIDE = 176, 320  # of a shown frame: longer side


@dataclass(frozen=True)
class SheetRow:
    """One clip and what to print beside it; what is None is not printed.

    `frames` is whatever `frames.iter_frames` takes. `speedup` is dense seconds / own seconds,
    `seconds` wall time, `psnr` in dB and `ssim` against dense (inf dB: identical), `density` in
    (0, 1].
    """

    name: str
    frames: Any
    speedup: float | None = None
    seconds: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    density: float | None = None

    def figures(self) -> list[str]:
        """The lines under the name: `["1.72x speed", "PSNR 27.3 dB", "density 0.25"]`."""
        lines = {
            "{:.2f}x speed": self.speedup,
            "{:.1f} s": self.seconds,
            "identical pixels" if self.psnr and isinf(self.psnr) else "PSNR {:.1f} dB": self.psnr,
            "SSIM {:.3f}": self.ssim,
            "density {:.3g}": self.density,
        }
        return [line.format(value) for line, value in lines.items() if value is not None]


@dataclass(frozen=True)
class _Band:
    """A drawn row: label lines as (text, scale, bold) and the pictures, all of one size."""

    label: list[tuple[str, float, bool]]
    tiles: list[Frame]
    gap: int

    @property
    def height(self) -> int:
        picture: int = self.tiles[0].shape[0]
        return max(picture, sum(_line(scale) for _, scale, _ in self.label))


def contact_sheet(
    dense: SheetRow,
    sparse: Sequence[SheetRow],
    *,
    title: str = "",
    subtitle: str = "",
    columns: int = 6,
    gain: int = 8,
    fps: float | None = None,
) -> Frame:
    """Draw the sheet and return it as uint8 RGB `(height, width, 3)`.

    Rows: `dense`, then for each of `sparse` its frames and min(255, gain * |dense - sparse|).
    Columns: at most `columns` >= 1 evenly spaced frames, the first and the last among them; `fps`
    adds their times. Small clips are enlarged by an integer factor, large ones shrunk to 320 px;
    the last line says which. `title` (the prompt, wrapped to four lines) and `subtitle` head it.
    Raises ValueError when counts or sizes of frames differ, or for columns or gain below 1.
    """
    if columns < 1 or gain < 1:
        raise ValueError(f"columns and gain must be at least 1, got {columns=} {gain=}")
    clips = [list(iter_frames(row.frames, row.name)) for row in (dense, *sparse)]
    if not clips[0]:
        raise ValueError(f"{dense.name} holds no frames")
    for row, clip in zip(sparse, clips[1:], strict=True):
        if len(clip) != len(clips[0]) or clip[0].shape != clips[0][0].shape:
            raise ValueError(f"{dense.name} is {_extent(clips[0])}, {row.name} is {_extent(clip)}")
    moments = np.linspace(0, len(clips[0]) - 1, min(columns, len(clips[0]))).round().astype(int)
    picked = [[clip[t] for t in moments] for clip in clips]
    bands = [_clip_band(dense, picked[0])]
    for row, frames in zip(sparse, picked[1:], strict=True):
        bands += [_clip_band(row, frames), _difference_band(dense, row, picked[0], frames, gain)]
    heads = [f"frame {t}" + (f", {t / fps:.2f} s" if fps else "") for t in moments]
    note = f"{_extent(clips[0])} px, shown {_shown_at(clips[0][0])}"
    if sparse:
        note += f"; difference: white from {-(-255 // gain)}/255 up"
    return _draw(title, subtitle, heads, bands, note)


def write_contact_sheet(
    path: PathLike, dense: SheetRow, sparse: Sequence[SheetRow], **options: Any
) -> Path:
    """Write `contact_sheet(dense, sparse, **options)` to a `.png`; errors also as `write_png`."""
    return write_png(path, contact_sheet(dense, sparse, **options))


def _clip_band(row: SheetRow, frames: list[Frame]) -> _Band:
    return _Band(_label(row.name, row.figures()), [_show(frame) for frame in frames], _ARM_GAP)


def _difference_band(
    dense: SheetRow, row: SheetRow, x: list[Frame], y: list[Frame], gain: int
) -> _Band:
    tiles = [
        _show(np.asarray(cv2.convertScaleAbs(cv2.absdiff(a, b), alpha=gain), np.uint8))
        for a, b in zip(x, y, strict=True)
    ]
    return _Band(_label(f"{gain}x difference", [f"|{dense.name} - {row.name}|"]), tiles, _GAP)


def _label(name: str, lines: list[str]) -> list[tuple[str, float, bool]]:
    width = _LABEL_WIDTH - 2 * _GAP
    label = [(part, _NAME, True) for part in _wrap(name, width, _NAME, True)]
    for line in lines:
        label += [(part, _TEXT, False) for part in _wrap(line, width, _TEXT)]
    return label


def _show(frame: Frame) -> Frame:
    """The frame at the size of its tile: whole pixels when enlarged, area means when shrunk."""
    height, width, _ = frame.shape
    if max(height, width) <= _LARGEST_SIDE:
        return enlarge(frame, enlargement(height, width, _SMALLEST_SIDE))
    shrink = _LARGEST_SIDE / max(height, width)
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)


def _shown_at(frame: Frame) -> str:
    height, width, _ = frame.shape
    if max(height, width) <= _LARGEST_SIDE:
        return f"{enlargement(height, width, _SMALLEST_SIDE)}x"
    return f"at {100 * _LARGEST_SIDE / max(height, width):.0f} %"


def _extent(clip: list[Frame]) -> str:
    size = f" of {clip[0].shape[0]}x{clip[0].shape[1]}" if clip else ""
    return f"{len(clip)} frame{'s' * (len(clip) != 1)}{size}"


def _draw(title: str, subtitle: str, heads: list[str], bands: list[_Band], note: str) -> Frame:
    cell = max(bands[0].tiles[0].shape[1], _CELL_WIDTH) + _GAP
    inner = max(_LABEL_WIDTH + len(heads) * cell - _GAP, _TITLE_WIDTH)
    width = inner + 2 * _MARGIN
    left = _MARGIN + _LABEL_WIDTH
    titles = _wrap(title, inner, _TITLE, True)
    if len(titles) > _TITLE_LINES:
        titles = [*titles[: _TITLE_LINES - 1], titles[_TITLE_LINES - 1][:-3] + "..."]
    strips = [_blank(_MARGIN, width)]
    strips += [_text(width, {_MARGIN: line}, _TITLE, _INK, True) for line in titles]
    strips.append(_blank(_GAP // 2, width))
    strips += [_text(width, {_MARGIN: s}, _TEXT, _SOFT) for s in _wrap(subtitle, inner, _TEXT)]
    strips.append(_blank(2 * _GAP, width))
    strips.append(_text(width, {left + i * cell: h for i, h in enumerate(heads)}, _SMALL, _SOFT))
    for i, band in enumerate(bands):
        strips += [_blank(band.gap if i else _GAP // 2, width), _band(width, band, cell)]
    notes = _wrap(note, inner - _LABEL_WIDTH, _SMALL)
    strips += [_blank(_GAP, width), *(_text(width, {left: n}, _SMALL, _SOFT) for n in notes)]
    return np.vstack([*strips, _blank(_MARGIN - _GAP, width)])


def _blank(height: int, width: int) -> Frame:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _text(width: int, at: dict[int, str], scale: float, color: _Color, bold: bool = False) -> Frame:
    """A strip with one line of text, its pieces at the given x."""
    strip = _blank(_line(scale), width)
    for x, piece in at.items():
        base = x, round(26 * scale)
        cv2.putText(strip, piece, base, _FACE, scale, color, 1 + bold, cv2.LINE_AA)
    return strip


def _band(width: int, band: _Band, cell: int) -> Frame:
    strip = _blank(band.height, width)
    y = 0
    for line, scale, bold in band.label:
        text = _text(_MARGIN + _LABEL_WIDTH, {_MARGIN: line}, scale, _INK if bold else _SOFT, bold)
        strip[y : y + len(text), : text.shape[1]] = text
        y += len(text)
    for column, tile in enumerate(band.tiles):
        x = _MARGIN + _LABEL_WIDTH + column * cell
        strip[: tile.shape[0], x : x + tile.shape[1]] = tile
    return strip


def _line(scale: float) -> int:
    return round(37 * scale)


def _text_width(text: str, scale: float, bold: bool) -> int:
    return int(cv2.getTextSize(text, _FACE, scale, 1 + bold)[0][0])


def _wrap(text: str, width: int, scale: float, bold: bool = False) -> list[str]:
    """Lines of at most `width` pixels; a word that is wider than a line is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if _text_width(joined, scale, bold) <= width:
            lines[-1] = joined
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            if lines[-1] and _text_width(lines[-1] + letter, scale, bold) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
