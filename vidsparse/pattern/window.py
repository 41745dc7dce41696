"""Window: every tile of queries reads the tiles around it; STA and, with a stride, GNA.

Along an axis of n tiles, with a window of w <= n tiles and a stride of s, the tiles x that share a
leader read the same w tiles around it, which are pushed back inside at the borders:

    leader = min(floor(x / s) s + floor(s / 2), n - 1)
    first  = clamp(leader - floor(w / 2), 0, n - w),   tiles first .. first + w - 1

so that every row reads the same number of tiles. s = 1 is Sliding Tile Attention (STA, arXiv
2502.04507), s > 1 Generalised Neighbourhood Attention (GNA, arXiv 2504.16922) in whole tiles, s = w
attention inside blocks. With `shift` false a window is cut off at the borders, as NABLA (arXiv
2507.13546) draws it: tiles leader - floor(w / 2) .. leader + floor((w - 1) / 2).

STA gives each head of each layer one of a few windows, which it searches once for a model: a plan
file (`vidsparse.head_plans`) names them, as "3 3 5", or "dense"; `vidsparse bench patterns --preset
sta` makes one. The paper chooses anew for every step; here one choice is for all of them, by the
errors in those that were captured.

A block is kept if any of its tokens stands in the window of any query of the row; where the tile is
as large as a block and divides the grid these are the published maps, at ragged edges more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import curves, head_plans
from vidsparse.config import require
from vidsparse.places import Places
from vidsparse.plan import StepContext

MAX_TILES = 1 << 14

ALLOWED = "tiles of frames, rows, columns, such as '3 3 5', or dense"
CANDIDATES = ("3 3 3", "3 6 1", "3 1 10", "1 6 5", "1 3 10", "1 5 7", "dense")
"""Among which `vidsparse bench patterns` chooses, unless others are named: those of the code of
STA for Wan, of 3 x 6 x 10 tiles."""


@dataclass(frozen=True)
class Params:
    """tile: frames, rows, columns of a tile, in tokens, best that of the layout.

    window: size in tiles, frames, rows, columns, each >= 1; three more for each further head, which
    heads take in turn. Empty: the largest that `schedule.density` pays for, growing alike on all
    axes. file: path of a plan file instead, "": none. stride: tiles that share a window, on each
    axis, >= 1. shift: whether windows keep their size at the borders.
    """

    name: str = "window"
    tile: tuple[int, ...] = (4, 4, 4)
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = (1, 1, 1)
    shift: bool = True
    file: str = ""
    of_video: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("tile", "window", "stride"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for key, allowed in curves.tile_faults(self.tile, "raster").items():
            require(False, f"pattern.{key}", getattr(self, key), allowed)
        ok = len(self.window) % 3 == 0 and min(self.window, default=1) >= 1
        require(ok, "pattern.window", self.window, "three integers >= 1 for each head, or []")
        if self.file and self.window:
            raise ValueError(
                f"pattern.window={self.window} with pattern.file={self.file!r}, which has windows "
                "of its own: leave one of them out"
            )
        ok = len(self.stride) == 3 and min(self.stride) >= 1
        require(ok, "pattern.stride", self.stride, "three integers >= 1")

    @property
    def per_head(self) -> bool:
        """Whether heads have windows of their own."""
        return bool(self.file) or len(self.window) > 3

    @property
    def all_heads(self) -> bool:
        """Whether there must be one for every head of the model."""
        return bool(self.file)


def parts(name: str) -> tuple[int, ...]:
    """The window that a name means, of "dense" larger than any; empty if it is none."""
    if name == "dense":
        return (MAX_TILES,) * 3
    sizes = name.split()
    ok = len(sizes) == 3 and all(one.isdecimal() and int(one) for one in sizes)
    return tuple(map(int, sizes)) if ok else ()


def named(name: str, params: Params) -> Params:
    """The settings with one window for all heads. Raises ValueError for what is none."""
    require(bool(parts(name)), "candidate", name, ALLOWED)
    return replace(params, window=parts(name), file="")


def name_of(params: Params) -> str:
    """The window of settings that `named` gave."""
    return "dense" if params.window == parts("dense") else " ".join(map(str, params.window))


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself, or windows that shrink from all tiles to one, an axis at a time."""
    if params.window or params.file:
        return (params,)
    counts = places.tiles(params.tile)
    drops = sorted(
        ((2 * m + 1) / (2 * n), axis) for axis, n in enumerate(counts) for m in range(1, n)
    )
    window = list(counts)
    found = [replace(params, window=tuple(window))]
    for _, axis in reversed(drops):
        window[axis] -= 1
        found.append(replace(params, window=tuple(window)))
    return found


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """bool [nq, nk], or one for each window."""
    counts = places.tiles(params.tile)
    require(
        counts[0] * counts[1] * counts[2] <= MAX_TILES, "pattern.tile", params.tile,
        f"a tile of which at most {MAX_TILES:,} cover the video",
    )  # fmt: skip
    rows, columns = (places.held(b, params.tile) for b in (places.q_blocks, places.k_blocks))
    windows = [params.window[n : n + 3] for n in range(0, len(params.window), 3)]
    if params.file:
        names = head_plans.of_layer(Path(params.file), phase, lambda x: bool(parts(x)), ALLOWED)
        windows = [parts(name) for name in names]
    known = {one: _read(rows, columns, counts, one, params) for one in {*windows}}
    maps = [known[one] for one in windows]
    return torch.stack(maps) if params.per_head else maps[0]


def _read(
    rows: Tensor, columns: Tensor, counts: tuple[int, ...], window: tuple[int, ...], params: Params
) -> Tensor:
    """bool [nq, nk] of blocks in the window of any tile of a row."""
    reached = rows.float()
    for axis, (n, w, stride) in enumerate(zip(counts, window, params.stride, strict=True), start=1):
        near = along(n, w, stride, params.shift).float()
        reached = torch.tensordot(reached, near, dims=([axis], [0])).movedim(-1, axis)
    return (reached > 0).float().flatten(1) @ columns.float().flatten(1).T > 0


def along(tiles: int, window: int, stride: int, shift: bool) -> Tensor:
    """bool [tiles, tiles] of one axis. Formula in the module docstring."""
    x = torch.arange(tiles)
    leader = (x // stride * stride + stride // 2).clamp(max=tiles - 1)
    first = leader - window // 2
    if shift:
        window = min(window, tiles)
        first = first.clamp(0, tiles - window)
    return (x >= first[:, None]) & (x < first[:, None] + window)


def phase(context: StepContext | None, params: Params) -> int:
    """The layer, of a plan file."""
    return context.layer if context is not None and params.file else 0
