"""Heads: a fixed pattern for each layer and head, from a plan file or in turn. Sparse-vDiT.

In raster order, with P tokens in a frame, a query t reads a key u

    dense              always
    diagonal W         if |t - u| <= W
    multi-diagonal W   if |(t mod P) - (u mod P)| <= W: the same place in every frame
    stripe F           if u stands in frame F

and "a + b" where either does. Without a W it is left to the budget: f P / 2, or f N / 2 of the N
tokens of the video, with one f for all heads. Source: Sparse-vDiT (arXiv 2506.03065), which
searches them once for a model, as `vidsparse bench patterns` does; heads that it skips altogether
are not offered. The file is one of `vidsparse.head_plans`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import head_plans
from vidsparse.config import require
from vidsparse.places import Places
from vidsparse.plan import StepContext

ALLOWED = "dense, diagonal W, multi-diagonal W, stripe F, or several with + between"
CANDIDATES = ("diagonal", "multi-diagonal", "diagonal + stripe 0", "multi-diagonal + stripe 0")
"""Among which `vidsparse bench patterns` chooses, unless others are named."""

STEPS = 32
"""Values of f that are tried for a budget."""


@dataclass(frozen=True)
class Params:
    """patterns: as above, for heads in turn. file: path of a plan file instead, "": none."""

    name: str = "heads"
    patterns: tuple[str, ...] = ("multi-diagonal", "diagonal")
    file: str = ""
    of_video: ClassVar[bool] = True
    of_raster: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(self.patterns))
        ok = len(self.patterns) > 0 and all(map(parts, self.patterns))
        require(ok, "pattern.patterns", self.patterns, f"a list of {ALLOWED}")

    @property
    def per_head(self) -> bool:
        """Whether heads have patterns of their own."""
        return bool(self.file) or len(self.patterns) > 1

    @property
    def all_heads(self) -> bool:
        """Whether there must be one for every head of the model."""
        return bool(self.file)


def parts(pattern: str) -> list[tuple[str, int | None]]:
    """[(kind, number)] of a pattern; empty if it is none. None: a width left to the budget."""
    found: list[tuple[str, int | None]] = []
    for part in str(pattern).split("+"):
        kind, _, number = part.strip().partition(" ")
        if kind == "dense" and not number:
            found.append((kind, 0))
        elif kind in ("diagonal", "multi-diagonal", "stripe") and number.isdecimal():
            found.append((kind, int(number)))
        elif kind in ("diagonal", "multi-diagonal") and not number:
            found.append((kind, None))
        else:
            return []
    return found


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself, or with the widths that are left out, from all to nothing."""
    if params.file or not any(
        number is None for one in params.patterns for _, number in parts(one)
    ):
        return (params,)
    found = []
    for n in range(STEPS, -1, -1):
        half = (n / STEPS) ** 2 / 2
        widths = {
            "diagonal": int(half * places.grid.video_tokens),
            "multi-diagonal": int(half * places.grid.height * places.grid.width),
        }
        filled = [
            " + ".join(
                kind if kind == "dense" else f"{kind} {widths[kind] if number is None else number}"
                for kind, number in parts(one)
            )
            for one in params.patterns
        ]
        found.append(replace(params, patterns=tuple(filled)))
    return found


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """bool [nq, nk], or one for each head: blocks with any two tokens of which one reads the other.

    Blocks are in raster order. Raises ValueError for files that say something else.
    """
    names = params.patterns
    if params.file:
        names = tuple(head_plans.of_layer(Path(params.file), phase, complete, ALLOWED))
    known = {one: _read(places, one) for one in {*names}}
    maps = [known[one] for one in names]
    return torch.stack(maps) if params.per_head else maps[0]


def complete(pattern: str) -> bool:
    """Whether a name says all of a pattern, its width too."""
    found = parts(pattern)
    return bool(found) and not any(number is None for _, number in found)


def named(pattern: str, params: Params) -> Params:
    """The settings with one pattern for all heads. Raises ValueError for what is none."""
    require(bool(parts(pattern)), "candidate", pattern, ALLOWED)
    return replace(params, patterns=(pattern,), file="")


def name_of(params: Params) -> str:
    """The pattern of settings that `named` gave."""
    return params.patterns[0]


def _read(places: Places, pattern: str) -> Tensor:
    """bool [nq, nk] of one pattern."""
    out = torch.zeros(len(places.q_blocks), len(places.k_blocks), dtype=torch.bool)
    makers: dict[str, Callable[[Places, int], Tensor]] = {
        "dense": lambda places, _: torch.ones_like(out),
        "diagonal": _diagonal,
        "multi-diagonal": _multi_diagonal,
        "stripe": _stripe,
    }
    for kind, number in parts(pattern):
        assert number is not None, "settings have filled it in"
        out |= makers[kind](places, number)
    return out


def _video(places: Places) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of query and key blocks: (first, last) token in the video; first > last where none is."""
    found = []
    for cut in (places.q_blocks, places.k_blocks):
        first = cut.start - places.grid.video_start
        inside = (first >= 0) & (first < places.grid.video_tokens)
        last = torch.where(inside, first + cut.count - 1, first - 1)
        found.append((first, last))
    return found[0], found[1]


def _near(q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], width: int) -> Tensor:
    """bool [nq, nk]: runs of numbers, first to last, of which two are at most `width` apart."""
    some = (q[0] <= q[1])[:, None] & (k[0] <= k[1])
    return some & (q[0][:, None] <= k[1] + width) & (k[0] <= q[1][:, None] + width)


def _diagonal(places: Places, width: int) -> Tensor:
    return _near(*_video(places), width)


def _multi_diagonal(places: Places, width: int) -> Tensor:
    """A block holds one run of places of each frame that it is in."""
    frame = places.grid.height * places.grid.width
    held = []
    for first, last in _video(places):
        runs = []
        for n in range(places.grid.frames):
            begin, end = first.clamp(min=n * frame), last.clamp(max=(n + 1) * frame - 1)
            runs.append((begin - n * frame, torch.where(last < first, begin - 1, end) - n * frame))
        held.append(runs)
    rows, columns = (
        torch.stack([_places_near(run, frame, reach) for run in runs]).any(0).float()
        for runs, reach in zip(held, (width, 0), strict=True)
    )
    return rows @ columns.T > 0


def _places_near(run: tuple[Tensor, Tensor], frame: int, width: int) -> Tensor:
    """bool [n, frame]: places at most `width` from a run of each block."""
    at = torch.arange(frame)
    some = (run[0] <= run[1])[:, None]
    return some & (at >= run[0][:, None] - width) & (at <= run[1][:, None] + width)


def _stripe(places: Places, frame: int) -> Tensor:
    whole = 1, places.grid.height, places.grid.width
    counts = places.tiles(whole)
    require(frame < counts[0], "pattern stripe", frame, f"a frame, 0 .. {counts[0] - 1}")
    columns = places.held(places.k_blocks, whole)[:, frame].flatten(1).any(1)
    rows = places.held(places.q_blocks, places.sizes).flatten(1).any(1)
    return rows[:, None] & columns


def phase(context: StepContext | None, params: Params) -> int:
    """The layer, of a plan file."""
    return context.layer if context is not None and params.file else 0
