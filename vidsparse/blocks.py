"""Blocks: a sequence cut into consecutive pieces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidsparse.grid import TokenGrid


@dataclass(frozen=True)
class Cut:
    """The tensors of `Blocks` on one device."""

    start: Tensor
    count: Tensor
    text: Tensor
    owner: Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """A cut of a sequence into consecutive blocks; the parts of a grid never share one.

    Equal to itself alone: it is the key of what is kept of a cut, and is looked up often.

    start, count: int64 [n], first token and number of tokens of each block; together they cover the
    sequence in order. text: bool [n]. size: the nominal block size; a count may be smaller, never
    larger.
    """

    start: Tensor
    count: Tensor
    text: Tensor
    size: int

    @classmethod
    def cut(cls, grid: TokenGrid, size: int, pieces: Tensor | None = None) -> Blocks:
        """Cut each part of `grid` into blocks of `size` tokens, the last of each shorter.

        pieces: int64 [n], tokens of consecutive pieces of the video that no block crosses, such as
        tiles; None: the video is one.
        """
        starts, counts, texts = [], [], []
        for first, length, is_text in grid.parts:
            inside = torch.tensor([length])
            if pieces is not None and first == grid.video_start and not is_text:
                inside = pieces
            begin = first + inside.cumsum(0) - inside
            start = begin[:, None] + torch.arange(0, int(inside.max()), size)
            count = ((begin + inside)[:, None] - start).clamp(max=size)
            real = count > 0
            starts.append(start[real])
            counts.append(count[real])
            texts.append(torch.full_like(starts[-1], is_text, dtype=torch.bool))
        return cls(torch.cat(starts), torch.cat(counts), torch.cat(texts), size)

    def __len__(self) -> int:
        return self.start.numel()

    @cached_property
    def tokens(self) -> int:
        return int(self.count.sum())

    @cached_property
    def owner(self) -> Tensor:
        """int64 [tokens], the block of each token."""
        return torch.repeat_interleave(torch.arange(len(self)), self.count)

    def on(self, device: torch.device) -> Cut:
        """start, count, text, owner on a device; the copies are kept: no call waits for one."""
        if device not in self._cuts:
            with torch.inference_mode(False):  # kept tensors must serve every grad mode
                here = self.start, self.count, self.text, self.owner
                self._cuts[device] = Cut(*(x.to(device) for x in here))
        return self._cuts[device]

    @cached_property
    def _cuts(self) -> dict[torch.device, Cut]:
        return {}

    @property
    def levels(self) -> int:
        """log2 of the block size: the level of the centroid."""
        return self.size.bit_length() - 1

    def split(self, pieces: int) -> Blocks:
        """Each block cut into `pieces` consecutive pieces, a short block into fewer."""
        size = max(1, self.size // pieces)
        start = self.start[:, None] + torch.arange(0, self.size, size)
        count = (self.start + self.count)[:, None] - start
        real = count > 0
        text = self.text[:, None].expand_as(start)
        return Blocks(start[real], count[real].clamp(max=size), text[real], size)

    def owner_of(self, pieces: Blocks) -> Tensor:
        """int64 [len(pieces)], the block that holds each piece of a `split`."""
        return torch.searchsorted(self.start, pieces.start, right=True) - 1

    def mean(self, x: Tensor) -> Tensor:
        """Means over the real tokens of each block. x [..., tokens, D] -> float32 [..., n, D].

        float64 stays float64.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = x.new_zeros((*x.shape[:-2], len(self), x.shape[-1]), dtype=dtype)
        full = (self.count == self.size).tolist()
        position = 0
        while position < len(self):  # runs of equal, full blocks are summed through a view
            run = position
            while run < len(full) and full[run]:
                run += 1
            if run == position:
                start, count = int(self.start[position]), int(self.count[position])
                sums[..., position, :] = x[..., start : start + count, :].sum(-2, dtype=dtype)
                position += 1
                continue
            start = int(self.start[position])
            part = x[..., start : start + (run - position) * self.size, :]
            sums[..., position:run, :] = part.unflatten(-2, (run - position, self.size)).sum(
                -2, dtype=dtype
            )
            position = run
        return sums / self.on(sums.device).count.to(dtype)[:, None]
