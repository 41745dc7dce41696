"""Packs a map of several levels into lists of key tiles: what `levels_forward` walks.

A segment of the key buffer holds one level, `height` rows to a key block, in tiles of block_n rows.
One launch per segment appends its wanted tiles to the list of every row, in ascending order: no
sort, no read back, and nothing but the form of a segment is compiled in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operands import TileLists
from vidsparse.kernels.gpu.operator import operator

TILE_MASK = tl.constexpr(0xFFFFFF)
SHIFT_AT = tl.constexpr(24)

CHUNK = 1024
"""Key blocks that a program looks at in one turn."""


@dataclass(frozen=True)
class Segment:
    """level: what the map says of its blocks; first: its first tile.

    height: rows to a key block, a power of two; below block_n several blocks share a tile.
    """

    level: int
    first: int
    height: int


def word(height: int) -> int:
    """List entry of tile 0 of a segment with `height` rows (a power of two) to a key block.

    Or it with a tile number.
    """
    entry: int = (height.bit_length() - 1) << SHIFT_AT.value
    return entry


@triton.jit(do_not_specialize=["blocks", "width", "level", "first"])
def append_whole_kernel(  # type: ignore[no-untyped-def]
    p_levels,
    p_entry,
    p_count,
    blocks,
    width,
    level,
    first,
    tile_zero,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Blocks of PIECES whole tiles. tile_zero: the entry of tile 0. Grid (rows)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_j = tl.arange(0, CHUNK)
    used = tl.load(p_count + i_row)
    p_list = p_entry + i_row * width
    for start in tl.range(0, blocks, CHUNK):
        j = start + o_j
        b_level = tl.load(p_levels + i_row * blocks + j, mask=j < blocks, other=-2)
        wanted = b_level == level
        b_wanted = wanted.to(tl.int32)
        at = used + (tl.cumsum(b_wanted, 0) - b_wanted) * PIECES
        for piece in tl.static_range(PIECES):
            tl.store(p_list + at + piece, tile_zero | (first + j * PIECES + piece), mask=wanted)
        used += tl.sum(b_wanted, 0) * PIECES
    tl.store(p_list + used, 0)
    tl.store(p_count + i_row, used)


@triton.jit(do_not_specialize=["blocks", "width", "shared", "level", "first"])
def append_shared_kernel(  # type: ignore[no-untyped-def]
    p_levels,
    p_entry,
    p_bits,
    p_count,
    p_whole,
    blocks,
    width,
    shared,
    level,
    first,
    tile_zero,
    PER_TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """PER_TILE blocks to a tile, marked by bits. tile_zero: the entry of tile 0. Grid (rows)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, TILES)
    o_i = tl.arange(0, PER_TILE)
    used = tl.load(p_count + i_row)
    p_list = p_entry + i_row * width
    p_mask = p_bits + i_row * shared - tl.load(p_whole + i_row)
    for start in tl.range(0, (blocks + PER_TILE - 1) // PER_TILE, TILES):
        tile = start + o_t
        j = tile[:, None] * PER_TILE + o_i[None, :]
        b_level = tl.load(p_levels + i_row * blocks + j, mask=j < blocks, other=-2)
        b_bits = tl.sum((b_level == level).to(tl.int64) << o_i[None, :].to(tl.int64), 1)
        wanted = b_bits != 0
        b_wanted = wanted.to(tl.int32)
        at = used + tl.cumsum(b_wanted, 0) - b_wanted
        tl.store(p_list + at, tile_zero | (first + tile), mask=wanted)
        tl.store(p_mask + at, b_bits, mask=wanted)
        used += tl.sum(b_wanted, 0)
    tl.store(p_list + used, 0)
    tl.store(p_mask + used, 0)
    tl.store(p_count + i_row, used)


def pack_lists(levels: Tensor, segments: list[Segment], block_n: int) -> TileLists:
    """levels int8 [rows, nk], contiguous -> the lists of all rows, segment after segment.

    A list takes the tiles of a segment that hold a block whose level is the segment's. block_n:
    rows of a tile, at most 64 blocks to one.

    Raises ValueError for more: the bits of a tile are an int64.
    """
    segments = sorted(segments, key=lambda segment: segment.height < block_n)
    codes = [segment.level for segment in segments]
    firsts = [segment.first for segment in segments]
    heights = [segment.height for segment in segments]
    if any(block_n > 64 * height for height in heights):
        raise ValueError(
            f"tiles of {block_n} rows hold over 64 blocks of {min(heights)}: allowed is 64"
        )
    entry, bits, count, whole = pack_tiles(levels, codes, firsts, heights, block_n)
    return TileLists(entry, bits if bits.numel() else None, count, whole)


@operator("pack_tiles")
def pack_tiles(
    levels: Tensor, codes: list[int], firsts: list[int], heights: list[int], block_n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entry, bits (no element if every tile is inside one block), count, whole of `pack_lists`.

    codes, firsts, heights: level, first and height of each segment; those below block_n last.
    """
    assert heights == sorted(heights, key=lambda height: height < block_n)
    rows, blocks = levels.shape
    width, shared = widths(blocks, heights, block_n)
    entry = levels.new_empty(rows, width, dtype=torch.int32)
    bits = levels.new_empty(rows, shared, dtype=torch.int64)
    whole = levels.new_zeros(rows, dtype=torch.int32)
    count = whole
    for code, first, height in zip(codes, firsts, heights, strict=True):
        tile_zero = word(min(height, block_n))
        with torch.cuda.device_of(levels):
            if height >= block_n:
                append_whole_kernel[(rows,)](
                    *(levels, entry, whole, blocks, width, code, first, tile_zero),
                    PIECES=height // block_n,
                    CHUNK=CHUNK,
                    num_warps=4,
                    enable_fp_fusion=True,
                )
                continue
            count = whole.clone() if count is whole else count
            append_shared_kernel[(rows,)](
                *(levels, entry, bits, count, whole, blocks, width, shared),
                *(code, first, tile_zero),
                PER_TILE=block_n // height,
                TILES=CHUNK * height // block_n,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return entry, bits, count.clone() if count is whole else count, whole


@pack_tiles.register_fake
def _(
    levels: Tensor, codes: list[int], firsts: list[int], heights: list[int], block_n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, blocks = levels.shape
    width, shared = widths(blocks, heights, block_n)
    entry = levels.new_empty(rows, width, dtype=torch.int32)
    bits = levels.new_empty(rows, shared, dtype=torch.int64)
    count, whole = (levels.new_empty(rows, dtype=torch.int32) for _ in range(2))
    return entry, bits, count, whole


def widths(blocks: int, heights: list[int], block_n: int) -> tuple[int, int]:
    """Entries of a list and its bits, a spare included; 0 bits if every tile is inside a block."""
    tiles = {height: -(-blocks * height // block_n) for height in heights}
    shared = [tiles[height] for height in heights if height < block_n]
    return 1 + sum(tiles[height] for height in heights), 1 + sum(shared) if shared else 0
