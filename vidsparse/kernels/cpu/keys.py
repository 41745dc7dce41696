"""What the CPU engine gathers from: keys and values of one head, in blocks, at every level."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidsparse.blocks import Blocks

PART = 8
"""Blocks that are converted to fp32 at once, for their means and the moment: bounds the scratch."""


@dataclass(frozen=True)
class Slots:
    """Every block at the same stride: block j is row j of a [nk, size, D] table, its tokens first.

    Short blocks are padded with zeros. blocks: the cut; its size must be a power of two.
    """

    blocks: Blocks

    @property
    def size(self) -> int:
        return self.blocks.size

    def __len__(self) -> int:
        return len(self.blocks)

    @cached_property
    def counts(self) -> list[int]:
        """Number of tokens of each block."""
        return [int(n) for n in self.blocks.count.tolist()]

    @cached_property
    def short(self) -> list[int]:
        """Ids of the blocks with fewer than `size` tokens, ascending."""
        return [j for j, n in enumerate(self.counts) if n < self.size]

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(first token, tokens, first row of the flat table) of stretches copied in one go."""
        runs, first, length = [], 0, 0
        token = 0
        for j, n in enumerate(self.counts):
            if length == 0:
                first, row = token, j * self.size
            length, token = length + n, token + n
            if n < self.size or j == len(self) - 1:
                runs.append((first, length, row))
                length = 0
        return runs

    def groups(self, level: int, block: int) -> int:
        """Number of groups of 2^level tokens that hold tokens of the block."""
        return -(-self.counts[block] // (1 << level))

    def last_group(self, level: int, block: int) -> int:
        """Number of tokens in the last of those groups."""
        return (self.counts[block] - 1) % (1 << level) + 1

    def group_counts(self, level: int) -> Tensor:
        """float32 [nk, size / 2^level, 1]: tokens of each group, 1 for groups of padding."""
        group = torch.arange(self.size >> level, device="cpu")
        counts = self.blocks.count[:, None] - group * (1 << level)
        return counts.clamp(1, 1 << level).float()[..., None]

    @cached_property
    def log_counts(self) -> Tensor:
        """float64 [nk]: ln of the number of tokens of each block, the bias of its centroid."""
        return self.blocks.count.double().log()

    def fill(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """x [tokens, D] -> [nk, size * D], padded with zeros. A view of x if it has this form.

        order: int64 [tokens], row t of the blocks is row order[t] of x; None: row t.
        """
        shape = (len(self), self.size * x.shape[1])
        if order is None and not self.short and x.is_contiguous():
            return x.view(shape)
        table = torch.empty(len(self) * self.size, x.shape[1], dtype=x.dtype, device="cpu")
        for token, length, row in self.runs:
            part, at = table[row : row + length], slice(token, token + length)
            if order is None:
                part.copy_(x[at])
            else:
                torch.index_select(x, 0, order[at], out=part)
        for j in self.short:
            table[j * self.size + self.counts[j] : (j + 1) * self.size].zero_()
        return table.view(shape)

    def pool(self, table: Tensor, level: int, depth: int) -> Tensor:
        """Means of groups of 2^level tokens, [nk, (size / 2^level) * depth] in fp32 or fp64."""
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        groups = table.view(len(self), self.size >> level, 2**level, depth)
        means = torch.empty(len(self), self.size >> level, depth, dtype=dtype, device="cpu")
        for part, out in zip(groups.split(PART), means.split(PART), strict=True):
            torch.sum(part, 2, dtype=dtype, out=out)
        return means.div_(self.group_counts(level)).view(len(self), -1)


@dataclass(frozen=True)
class Head:
    """Tables of one head: level -> [nk, (size / 2^level) * D] of keys and of values.

    Level 0 has the dtype of the input, pooled keys that of the scores, pooled values that of the
    second product. moment [D, D]: H / N_v of the global first-order term, or None. bias: for every
    row the bias of its moment and centroid columns, rest [nk, D]: keys and values of the centroid
    columns; None if there are none. means [nk, D]: centroids of keys in fp32 or fp64, if there is a
    first-order term. broken: bool [nk], blocks that are not finite where a row may leave a block
    unread, or None: their centroids are zero, their bias NaN in rows that read them.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    moment: Tensor | None = None
    bias: Tensor | None = None
    rest: tuple[Tensor, Tensor] | None = None
    means: Tensor | None = None
    broken: Tensor | None = None


def build_tables(
    x: Tensor, slots: Slots, levels: list[int], dtype: torch.dtype, order: Tensor | None = None
) -> dict[int, Tensor]:
    """x [tokens, D] of one head, strided views too -> its tables, the pooled ones in dtype.

    order: as for `Slots.fill`.
    """
    exact = slots.fill(x, order)
    pooled = {n: slots.pool(exact, n, x.shape[1]).to(dtype) for n in levels if n > 0}
    return {0: exact, **pooled}


def moment(k: Tensor, v: Tensor, slots: Slots, centroids: Tensor) -> Tensor:
    """H / N_v [D, D]: sum of (k_n - kbar)^T v_n over the video keys, divided by their number.

    k, v: tables of level 0, centroids [nk, D] those of the keys.
    """
    depth = centroids.shape[1]
    video = (~slots.blocks.text).nonzero()[:, 0]
    tokens = int(slots.blocks.count[video].sum())
    total = torch.zeros(depth, depth, dtype=centroids.dtype, device="cpu")
    for ids in video.split(PART):
        centred = k[ids].view(len(ids), slots.size, depth).to(centroids.dtype)
        centred = (centred - centroids[ids, None]).view(-1, depth)  # v of the padding is 0
        total.addmm_(centred.T, v[ids].view(-1, depth).to(centroids.dtype))
    return total / max(tokens, 1)


class SharedHead:
    """A head that several threads need: whoever comes first builds it, the others wait."""

    def __init__(self, build: Callable[[], Head]) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._head: Head | None = None

    def get(self) -> Head:
        with self._lock:
            if self._head is None:
                self._head = self._build()
            return self._head
