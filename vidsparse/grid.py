"""The token grid: where the tokens of a sequence stand."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise

import torch


def _integer(value: object) -> int | None:
    """An integer of any library as Python's own; None for everything else, truth values too."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of one sequence stand: a video cuboid in raster order, and others.

    frames, height, width: size of the video in tokens (latent frames, rows, columns), each >= 1.
    text_tokens: number of text tokens in the same sequence, >= 0.
    text_first: True if the text is the start of the sequence, False if its end.
    before, after: numbers of other rows next to the video, such as the frames of a history or a
        reference image, >= 0; they keep their order, and are chosen among like the video.
    cuts: frames, ascending, at which an order of the tokens must begin anew, because the model
        treats the parts of the video apart.

    Integers of NumPy and torch count as integers. Raises ValueError for anything else.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_first: bool = False
    before: int = 0
    after: int = 0
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("frames", "height", "width"), 1)
        for name, least in (sizes | dict.fromkeys(("text_tokens", "before", "after"), 0)).items():
            value = getattr(self, name)
            number = _integer(value)
            if number is None or number < least:
                raise ValueError(f"TokenGrid.{name}={value!r}: expected an integer >= {least}")
            object.__setattr__(self, name, number)
        if self.text_first not in (True, False):
            raise ValueError(f"TokenGrid.text_first={self.text_first!r}: expected True or False")
        object.__setattr__(self, "text_first", bool(self.text_first))
        bounds = (0, *self.cuts, self.frames)
        if any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(
                f"TokenGrid.cuts={self.cuts!r}: expected rising frames in 1 .. {self.frames - 1}"
            )
        object.__setattr__(self, "cuts", tuple(self.cuts))

    @classmethod
    def of(cls, grid: object) -> TokenGrid:
        """A grid, or the grid that a series (frames, height, width) means. Raises TypeError."""
        if isinstance(grid, cls):
            return grid
        if isinstance(grid, tuple | list) and len(grid) == 3:
            return cls(*grid)
        raise TypeError(
            f"grid is {grid!r:.80}: expected a TokenGrid, or (frames, height, width) of a video "
            "without text"
        )

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.other_tokens

    @property
    def other_tokens(self) -> int:
        """All but the text."""
        return self.before + self.video_tokens + self.after

    @property
    def video_start(self) -> int:
        """Index of the first video token in the sequence."""
        return self.before + (self.text_tokens if self.text_first else 0)

    @property
    def parts(self) -> list[tuple[int, int, bool]]:
        """(first token, number of tokens, is text) of the parts of the sequence, in their order."""
        text = (self.text_tokens, True)
        others = [(n, False) for n in (self.before, self.video_tokens, self.after)]
        found, first = [], 0
        for length, is_text in [text, *others] if self.text_first else [*others, text]:
            if length:
                found.append((first, length, is_text))
            first += length
        return found

    def check(self, tokens: int) -> None:
        """Raise ValueError unless a sequence of this many tokens is exactly this grid."""
        if tokens != self.tokens:
            others = f" + {self.before + self.after} other" if self.before + self.after else ""
            raise ValueError(
                f"sequence of {tokens} tokens does not match {self}: {self.frames} x {self.height} "
                f"x {self.width} video{others} + {self.text_tokens} text = {self.tokens} tokens; "
                "pass the grid of the latent video after patch embedding"
            )
