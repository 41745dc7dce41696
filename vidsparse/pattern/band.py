"""Band: blocks that stand near the query block in the sequence, whatever the order of tokens is.

With N tokens, N_text of them text, and a density d of which text takes its part,

    d' = d - 2 N_text / N,   width = N (1 - sqrt(1 - d')),   |q - k| <= width

is the band that Sparse VideoGen (arXiv 2502.01776) runs in raster order for spatial heads, and for
temporal ones in the order that puts one place in all frames side by side (layout `stride`). A block
is kept if its middle stands so near to that of the query block: whole blocks, a band's area. Its
first-frame columns are not here: in the second order frame 0 is in every block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

from torch import Tensor

from vidsparse.config import require
from vidsparse.places import Places
from vidsparse.plan import StepContext

STEPS = 32
"""Widths that are tried where whole blocks, and what is forced, make the one above too dear."""


@dataclass(frozen=True)
class Params:
    """width: tokens to both sides, >= 1; 0: by the formula from `schedule.density`."""

    name: str = "band"
    width: int = 0
    of_video: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.width >= 0, "pattern.width", self.width, "an integer >= 1, or 0")


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself, or the width of the formula and narrower ones."""
    if params.width:
        return (params,)
    tokens = places.grid.tokens
    left = min(1.0, max(0.0, density - 2 * places.grid.text_tokens / tokens))
    widest = tokens * (1 - sqrt(1 - left))
    widths = [max(1, int(widest * n / STEPS)) for n in range(STEPS, -1, -1)]
    return [replace(params, width=width) for width in widths]


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """bool [nq, nk]."""
    middles, video = [], []
    for cut in (places.q_blocks, places.k_blocks):
        middles.append(cut.start + (cut.count - 1) / 2)
        video.append(places.held(cut, places.sizes).flatten(1).any(1))
    near = (middles[0][:, None] - middles[1]).abs() <= params.width
    return near & video[0][:, None] & video[1]


def phase(context: StepContext | None, params: Params) -> int:
    """The same always."""
    return 0
