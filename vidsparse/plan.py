"""The nouns that every stage speaks: token grid, blocks, block plan, scores, step context.

Shapes: B batch, H heads, S tokens, D head dim, nq / nk numbers of query / key blocks.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

SKIP = -1
"""Level code of a block that is not read at all."""


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


@dataclass(frozen=True)
class Cut:
    """The tensors of `Blocks` on one device."""

    start: Tensor
    count: Tensor
    text: Tensor


@dataclass(frozen=True)
class Blocks:
    """A cut of a sequence into consecutive blocks; the parts of a grid never share one.

    start, count: int64 [n], first token and number of tokens of each block; together they cover the
    sequence in order. text: bool [n]. size: the nominal block size; a count may be smaller, never
    larger.
    """

    start: Tensor
    count: Tensor
    text: Tensor
    size: int

    @classmethod
    def cut(cls, grid: TokenGrid, size: int) -> Blocks:
        """Cut each part of `grid` into blocks of `size` tokens, the last of each shorter."""
        starts, counts, texts = [], [], []
        for first, length, is_text in grid.parts:
            start = torch.arange(first, first + length, size)
            starts.append(start)
            counts.append((first + length - start).clamp(max=size))
            texts.append(torch.full_like(start, is_text, dtype=torch.bool))
        return cls(torch.cat(starts), torch.cat(counts), torch.cat(texts), size)

    def __len__(self) -> int:
        return self.start.numel()

    @property
    def tokens(self) -> int:
        return int(self.count.sum())

    @cached_property
    def owner(self) -> Tensor:
        """int64 [tokens], the block of each token."""
        return torch.repeat_interleave(torch.arange(len(self)), self.count)

    def on(self, device: torch.device) -> Cut:
        """start, count and text on a device; the copies are kept, so that no call waits for one."""
        if device not in self._cuts:
            with torch.inference_mode(False):  # kept tensors must serve every grad mode
                self._cuts[device] = Cut(
                    self.start.to(device), self.count.to(device), self.text.to(device)
                )
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


ScoreKind = Literal["logit", "mass"]


@dataclass(frozen=True)
class Scores:
    """Block scores. value: float32 [B, H, nq, nk]; kind: "logit", or "mass" (rows sum to 1)."""

    value: Tensor
    kind: ScoreKind

    def ranked(self, first: Tensor) -> Tensor:
        """int64 [B, H, nq, nk]: block ids, `first` in front, by falling score, ties by index."""
        value = self.value.nan_to_num(nan=float("inf"))
        best = torch.where(first, 0, 1).expand(value.shape)
        by_score = torch.argsort(value, dim=-1, descending=True, stable=True)
        return by_score.gather(-1, torch.argsort(best.gather(-1, by_score), dim=-1, stable=True))

    def mass(self, k_blocks: Blocks) -> Tensor:
        """Row-stochastic mass; logits are normalised as softmax_j(value + ln n_j)."""
        if self.kind == "mass":
            return self.value
        count = k_blocks.on(self.value.device).count
        return torch.softmax(self.value + count.to(self.value).log(), -1)


FirstOrder = Literal["none", "block", "global"]


@dataclass(frozen=True)
class BlockPlan:
    """At which resolution every query block reads every key block.

    levels: int8 [B, H, nq, nk], on any device: l = 0 .. log2(block_k) reads the means of 2^l
        consecutive tokens (0: the tokens themselves, the last: the centroid), SKIP: not listed.
    q_blocks, k_blocks: the cuts that it refers to.
    listed: the levels that may occur in `levels`, ascending: what an executor prepares for without
        reading the map back from a GPU.
    rest: level of every key block that a row does not list: SKIP, or the centroid level.
    first_order: Taylor term for the `rest` blocks: "none", per "block", or "global" (one moment per
        head).
    """

    levels: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    listed: tuple[int, ...]
    rest: int = SKIP
    first_order: FirstOrder = "none"

    @classmethod
    def from_levels(
        cls,
        levels: Tensor,
        q_blocks: Blocks,
        k_blocks: Blocks,
        listed: tuple[int, ...] | None = None,
    ) -> BlockPlan:
        """Plan from a level map, int8 [B, H, nq, nk]; listed None: the levels found in it.

        Raises ValueError for a map of another size and, without `listed`, for levels that do not
        exist.
        """
        nq, nk = levels.shape[2:]
        if (nq, nk) != (len(q_blocks), len(k_blocks)):
            raise ValueError(
                f"level map of {nq} x {nk} blocks, expected {len(q_blocks)} x {len(k_blocks)}"
            )
        if listed is None:
            found = tuple(levels.unique().tolist())
            top = k_blocks.levels
            if found and not (found[0] >= SKIP and found[-1] <= top):
                raise ValueError(
                    f"levels {found[0]} .. {found[-1]}: allowed {SKIP} .. {top} "
                    f"for blocks of {k_blocks.size} keys"
                )
            listed = tuple(level for level in found if level != SKIP)
        return cls(levels, q_blocks, k_blocks, listed)

    def with_rest(self, rest: int, first_order: FirstOrder = "none") -> BlockPlan:
        """The same map with another treatment of the blocks that it leaves out."""
        return replace(self, rest=rest, first_order=first_order)

    @cached_property
    def counts(self) -> Tensor:
        """int64 [B, H, nq, log2(block_k) + 1], number of listed key blocks per row and level."""
        shape = (*self.levels.shape[:3], self.k_blocks.levels + 1)
        counts = self.levels.new_zeros(shape, dtype=torch.int64)
        for level in self.listed:
            counts[..., level] = (self.levels == level).sum(-1)
        return counts

    @cached_property
    def starts(self) -> Tensor:
        """int64 [B, H, nq, log2(block_k) + 2]: where the lists of a row stand in `index`.

        Row (b, h, i) reads index[starts[.., l] : starts[.., l + 1]] at level l.
        """
        ends = self.counts.flatten().cumsum(0).view(self.counts.shape)
        return torch.cat([ends[..., :1] - self.counts[..., :1], ends], -1)

    @cached_property
    def index(self) -> Tensor:
        """int64 [entries], ids of the listed key blocks, row after row, ascending in each level."""
        if self.listed == (0,):
            return (self.levels == 0).flatten(0, 2).nonzero()[:, 1]
        flat = self.levels.flatten(0, 2)
        last = torch.where(flat == SKIP, self.k_blocks.levels + 1, flat).to(torch.int8)
        ranked = torch.argsort(last, dim=-1, stable=True)
        places = torch.arange(flat.shape[1], device=flat.device)
        return ranked[places < self.counts.sum(-1).flatten()[:, None]]

    def level_map(self) -> Tensor:
        """int8 [B, H, nq, nk]: the level of every block, `rest` where a row does not list it."""
        if self.rest == SKIP:
            return self.levels
        return torch.where(self.levels == SKIP, self.rest, self.levels)

    @cached_property
    def density(self) -> Tensor:
        """float64 [B, H]: (query, key group) pairs that are computed / all (query, key) pairs.

        For full blocks this is sum_j 2^-level(i, j) / nk averaged over the rows; `rest` counts too.
        """
        q_count = self.q_blocks.on(self.levels.device).count.double()
        k_count, size = self.k_blocks.count, self.k_blocks.size
        short = (k_count < size).nonzero().flatten().tolist()
        work = self.levels.new_zeros(self.levels.shape[:3], dtype=torch.float64)
        codes = {level: level for level in self.listed} | {SKIP: self.rest}
        for code, level in codes.items():
            if level == SKIP:
                continue
            kept, groups = self.levels == code, -(-size // 2**level)
            work += kept.sum(-1) * groups
            for j in short:  # fewer tokens, fewer groups
                work -= kept.select(-1, j) * (groups - -(-int(k_count[j]) // 2**level))
        return (work @ q_count) / (q_count.sum() * int(k_count.sum()))


Branch = Literal["cond", "uncond", "both", "single"]


@dataclass(frozen=True)
class StepContext:
    """Where in a generation an attention call stands.

    step: index of the denoising step, 0-based; steps: their number (>= 1).
    layer: index of the self-attention layer, 0-based; layers: their number.
    branch: guidance branch; "both" = one batch with both, "single" = the pipeline names none.
    transformer: name of the pipeline's component ("transformer", "transformer_2").
    context_name: of the `cache_context`, as the pipeline gave it: branches that guidance adds to
        "cond" and "uncond" differ by it alone. None if there is none.
    forward: number of the forward of this transformer within its step, 0-based: what tells branches
        apart where nothing names them.
    """

    step: int
    steps: int
    layer: int = 0
    layers: int = 1
    branch: Branch = "single"
    transformer: str = "transformer"
    context_name: str | None = None
    forward: int = 0

    @property
    def stream(self) -> tuple[str, str | int, int]:
        """What a state that is kept from step to step belongs to."""
        name = self.forward if self.context_name is None else self.context_name
        return self.transformer, name, self.layer
