"""Forced blocks: key blocks that are exact for a query block whatever their score."""

from __future__ import annotations

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import Force
from vidsparse.grid import TokenGrid


def forced_blocks(
    force: Force, grid: TokenGrid, order: Tensor, q_blocks: Blocks, k_blocks: Blocks
) -> Tensor:
    """bool [nq, nk].

    order: int64 [grid.tokens], raster position of the token at each position of the sequence.
    """
    out = torch.zeros(len(q_blocks), len(k_blocks), dtype=torch.bool)
    if force.text:
        out |= q_blocks.text[:, None] | k_blocks.text
    if force.own_block:
        out |= _own(q_blocks, k_blocks)
    if force.neighbours:
        own, place = _own(q_blocks, k_blocks), torch.arange(len(k_blocks))
        first = torch.where(own, place, len(k_blocks)).amin(1, keepdim=True) - force.neighbours
        last = torch.where(own, place, -1).amax(1, keepdim=True) + force.neighbours
        beside = (place >= first) & (place <= last) & ~own
        out |= beside & ~q_blocks.text[:, None] & ~k_blocks.text
    if force.sinks:
        video = ~k_blocks.text
        out |= video & (video.cumsum(0) <= force.sinks)
    if force.first_frame or force.same_frame:
        q_frames, k_frames = (_frames(grid, order, b) for b in (q_blocks, k_blocks))
        if force.first_frame:
            out |= k_frames[:, 0]
        if force.same_frame:
            out |= (q_frames.float() @ k_frames.float().T) > 0
    return out


def _own(q_blocks: Blocks, k_blocks: Blocks) -> Tensor:
    """bool [nq, nk]: the key blocks that share a token with a query block."""
    q_end, k_end = q_blocks.start + q_blocks.count, k_blocks.start + k_blocks.count
    return (q_blocks.start[:, None] < k_end) & (k_blocks.start < q_end[:, None])


def _frames(grid: TokenGrid, order: Tensor, blocks: Blocks) -> Tensor:
    """bool [n, frames]: which frames a block holds tokens of."""
    raster = order - grid.video_start
    video = (raster >= 0) & (raster < grid.video_tokens)
    frame = raster[video] // (grid.height * grid.width)
    out = torch.zeros(len(blocks), grid.frames, dtype=torch.bool)
    out[blocks.owner[video], frame] = True
    return out
