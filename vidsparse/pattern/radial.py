"""Radial: the farther two frames are apart, the narrower the band that one reads of the other.

For frames a, b of P tokens, with delta = |a - b|, g = bit_length(delta), L = 2^bit_length(P) / 2^g:

    delta <= 1:  everything
    L < 128:     nothing, unless delta is a multiple of floor(128 / L)
    else:        tokens p, c of both frames with |p - c| <= max(decay L, block_k)

A block reads, of a pair of frames, the columns that any of its rows reads; a column counts as full
if more than 1/3 of the block's rows read it, and the block pair is kept if more than 0.6 of these
columns are full, for any pair of frames. Source: Radial Attention (arXiv 2506.19852), in raster
order; the rows of a block are those that it has, where theirs divide by 128 and lose the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.config import require
from vidsparse.places import Places
from vidsparse.plan import StepContext

NARROWEST = 128
"""Width below which pairs of frames are thinned out; it does not follow the block size."""
STEPS = 32
"""Decays that are tried for a budget, in (0, 1]."""


@dataclass(frozen=True)
class Params:
    """decay: in (0, 1], share of the width L that is read; 0: the largest, in 32nds, that
    `schedule.density` pays for. Published: 0.2 for Wan2.1, 0.8 for Wan2.2, 0.95 for HunyuanVideo.
    """

    name: str = "radial"
    decay: float = 0.0
    of_video: ClassVar[bool] = True
    of_raster: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.decay <= 1, "pattern.decay", self.decay, "a number in (0, 1], or 0")


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself, or all decays."""
    if params.decay:
        return (params,)
    return [replace(params, decay=n / STEPS) for n in range(STEPS, 0, -1)]


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """bool [nq, nk], of blocks in raster order."""
    frames, frame = places.grid.frames, places.grid.height * places.grid.width
    half = half_widths(frames, frame, params.decay, places.k_blocks.size)
    first = places.grid.video_start
    start, owner = places.k_blocks.start, places.k_blocks.owner
    owner = owner[first : first + places.grid.video_tokens]
    column = torch.arange(frame)
    # segments: the columns of one key block in one frame
    wide = owner + len(start) * torch.arange(frames).repeat_interleave(frame)
    segments, segment = torch.unique_consecutive(wide, return_inverse=True)
    segment_block = segments % len(start)
    out = torch.zeros(len(places.q_blocks), len(start), dtype=torch.bool)
    for i, (begin, rows) in enumerate(_video_rows(places)):
        end = begin + rows
        for a in range(begin // frame, -(-end // frame)):
            low, high = max(begin - a * frame, 0), min(end - a * frame, frame)
            width = half[a][:, None]
            # rows low .. high - 1 of frame a that read a column c: those in c - width .. c + width
            read = (column + width + 1).clamp(max=high) - (column - width).clamp(min=low)
            read = read.clamp_(min=0).flatten()
            some = torch.zeros(len(segments)).index_add_(0, segment, (read > 0).float())
            full = torch.zeros(len(segments)).index_add_(0, segment, (3 * read > rows).float())
            out[i, segment_block[full > 0.6 * some]] = True
    return out


def half_widths(frames: int, frame: int, decay: float, block: int) -> Tensor:
    """int64 [frames, frames]: how far a token reads to both sides; -1: nothing of that frame."""
    out = torch.full((frames, frames), -1)
    for delta in range(frames):
        width = 2.0 ** (frame.bit_length() - delta.bit_length())
        if delta <= 1:
            half = frame
        elif width < NARROWEST and delta % int(NARROWEST / width):
            continue
        else:
            half = int(max(decay * width, block))
        out.diagonal(delta).fill_(half)
        out.diagonal(-delta).fill_(half)
    return out


def _video_rows(places: Places) -> list[tuple[int, int]]:
    """(first token in the video, tokens) of the query blocks; none of those that hold no video."""
    first, tokens = places.grid.video_start, places.grid.video_tokens
    begin = places.q_blocks.start - first
    inside = (begin >= 0) & (begin < tokens)
    rows = places.q_blocks.count.masked_fill(~inside, 0)
    return [*zip(begin.clamp(0, tokens).tolist(), rows.tolist(), strict=True)]


def phase(context: StepContext | None, params: Params) -> int:
    """The same always."""
    return 0
