"""Plans of level 0 alone: full key tiles in lists, run by an exact engine.

Keys and values are read where they stand if they stand as the engine addresses them; a copy is made
of tokens in another order, and for engines that address whole tiles where a part of the sequence
begins off their grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu.exact import ExactEngine, ExactLists, Question
from vidsparse.kernels.gpu.exact_lists import ABSENT, pack_exact
from vidsparse.kernels.gpu.operands import QueryRows, ShortBlocks, padded_width
from vidsparse.kernels.gpu.pool import fill_keys
from vidsparse.kernels.gpu.unblock import unblock
from vidsparse.plan import BlockPlan


@dataclass(frozen=True)
class Place:
    """Where the key blocks of a cut stand, and the entries of the full ones.

    start int64 [nk], count int32 [nk]: first row and rows; entry int32 [nk]: of the first of the
    `pieces` tiles of a full block, `step` apart; width: of a list. short: the other blocks.
    """

    start: Tensor
    count: Tensor
    entry: Tensor
    pieces: int
    step: int
    width: int
    short: ShortBlocks | None


@dataclass(frozen=True)
class KeysInPlace:
    """Keys and values [B, H, R, D'] of a call, the blocks at `place`, order None: as they stand."""

    k: Tensor
    v: Tensor
    place: Place


def run(
    engine: ExactEngine,
    asked: Question,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    rows: QueryRows,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> KeysInPlace:
    """Write out and lse of the listed full blocks; where keys and values stand.

    rows: of q, order: of k and v, int64 [S] or [B, H, S], contiguous.
    """
    blocks, tile = plan.k_blocks, engine.tile(asked)
    copied = order is not None or (engine.addresses == "tile" and not _on_grid(blocks, tile))
    place = key_place(blocks, tile, engine.addresses, copied, q.device)
    if copied:
        k, v = (_in_blocks(x, blocks, order) for x in (k, v))
    if place.width == 1:  # no block is full
        out.zero_()
        lse.fill_(float("-inf"))
        return KeysInPlace(k, v, place)
    packed = pack_exact(plan.levels, place.entry, place.pieces, place.step, place.width)
    lists = ExactLists(*packed)
    if engine.addresses == "token" or (rows.order is None and _consecutive(plan.q_blocks)):
        engine.run(q, k, v, lists, rows, out, lse, asked)
        return KeysInPlace(k, v, place)
    queries, depth = _in_blocks(q, plan.q_blocks, rows.order), q.shape[3]
    found = torch.empty_like(queries)
    found_lse = queries.new_empty(queries.shape[:3], dtype=torch.float32)
    full = QueryRows(*_full_rows(plan.q_blocks, q.device), rows.size)
    queries, found = (x.narrow(3, 0, depth) for x in (queries, found))
    engine.run(queries, k, v, lists, full, found, found_lse, asked)
    unblock(found, found_lse, rows, out, lse)
    return KeysInPlace(k, v, place)


@lru_cache(maxsize=16)
def key_place(
    blocks: Blocks,
    tile: int,
    addresses: Literal["token", "tile"],
    copied: bool,
    device: torch.device,
) -> Place:
    """`Place` for tiles of `tile` keys. copied: block j stands at row j * size; kept."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        full = blocks.count == blocks.size
        start = torch.arange(len(blocks)) * blocks.size if copied else blocks.start
        entry = start if addresses == "token" else start // tile
        entry = torch.where(full, entry, ABSENT).int()
        count, lacking = blocks.count.int(), (~full).nonzero().flatten()
        short = None
        if len(lacking):
            parts = lacking.int(), start[lacking].int(), count[lacking]
            short = ShortBlocks(*(part.to(device) for part in parts))
        pieces = blocks.size // tile
        start, count, entry = (x.to(device) for x in (start, count, entry))
        step = tile if addresses == "token" else 1
        width = int(full.sum()) * pieces + 1
        return Place(start, count, entry, pieces, step, width, short)


def _on_grid(blocks: Blocks, tile: int) -> bool:
    """Whether every full block begins at a whole number of tiles."""
    return not bool((blocks.start[blocks.count == blocks.size] % tile).any())


def _consecutive(blocks: Blocks) -> bool:
    """Whether block i begins at i times the size."""
    return torch.equal(blocks.start, torch.arange(len(blocks)) * blocks.size)


def _in_blocks(x: Tensor, blocks: Blocks, order: Tensor | None) -> Tensor:
    """[B, H, n * size, P]: block j of x [B, H, S, D] from row j * size on, zero past its end."""
    (_, count), rows = _full_rows(blocks, x.device), len(blocks) * blocks.size
    start = blocks.on(x.device).start
    place = start, count, blocks.size, [0], rows, padded_width(x.shape[3])
    placed: Tensor = fill_keys(x, *place, order)
    return placed


@lru_cache(maxsize=16)
def _full_rows(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """start int64 [n], count int32 [n] of blocks that stand as `_in_blocks` puts them."""
    with torch.inference_mode(False):
        start = torch.arange(len(blocks)) * blocks.size
        return start.to(device), blocks.count.to(device, torch.int32)
