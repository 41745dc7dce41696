"""The Triton executor: lays out keys and tile lists on the device, then runs `triton_forward`.

Needs a CUDA device of compute capability 8.0 or newer, or TRITON_INTERPRET=1 set before the import.
Scores, softmax and sums are fp32; means of keys and values are rounded to the input's dtype.

The key buffer holds, for every level in use, block_k >> level rows per key block whatever its true
length, so a block may be short anywhere; rows without a token are zero and have bias -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidsparse.kernels import triton_forward
from vidsparse.kernels.triton_forward import HEAD_DIMS, Keys, QueryRows, TileLists, pack
from vidsparse.plan import SKIP, BlockPlan, Blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (16, 32, 64, 128)
CAPABILITY = (8, 0)


@dataclass(frozen=True)
class KeyLayout:
    """Where the tokens of a cut stand in the key buffer; levels in use only, 0 always.

    first: first row of each level; rows: length of the buffer; slot: int64 [tokens], row of each
    token; groups: float32 [nk * (block_k >> level), 1], true tokens per row of a level, at least 1;
    bias: float32 [rows], log2 of the true tokens; video: int64, ids of the blocks without text.
    """

    blocks: Blocks
    first: dict[int, int]
    rows: int
    slot: Tensor
    groups: dict[int, Tensor]
    bias: Tensor
    video: Tensor


def execute(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention by a plan; formulas in `vidsparse.kernels`. Inference only.

    q [B, H, Sq, D], k, v [B, H, Sk, D]: one device, one dtype (float32, bfloat16, float16), D up to
        128, in the order that the plan's blocks refer to; transposed views of [B, S, H, D] tensors
        are read in place. Values must be finite.
    plan: any levels, blocks of 16, 32, 64 or 128 tokens, short ones anywhere; `rest` SKIP or the
        centroid; `first_order` "none" or "global".

    Returns out, shape, dtype and memory layout like q, and the LSE float32 [B, H, Sq] (natural log)
    or None.

    Raises ValueError for anything else, for inputs that require grad and for devices without
    support.
    """
    _check(q, k, v, plan)
    q = q if q.stride(-1) == 1 else q.contiguous()
    transposed = q.transpose(1, 2).is_contiguous()
    batch, heads, tokens, depth = q.shape
    held = (batch, tokens, heads, depth) if transposed else q.shape
    out = torch.empty(held, dtype=q.dtype, device=q.device)
    out = out.transpose(1, 2) if transposed else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse if return_lse else None
    sizes = plan.q_blocks.size, plan.k_blocks.size
    shape = triton_forward.tiling(q.dtype, _capability(q.device), *sizes)
    counts = plan.counts.flatten(0, 2)
    levels = [level for level in range(plan.k_blocks.levels + 1) if bool(counts[:, level].any())]
    stored = {0, *levels, plan.rest} - {SKIP}
    layout = key_layout(plan.k_blocks, tuple(sorted(stored)), shape.block_n, q.device)
    keys = Keys(_fill(k, layout), _fill(v, layout), layout.bias)
    lists = tile_lists(plan, layout, levels, shape.block_n, q.device)
    rest = torch.empty_like(lse) if plan.first_order == "global" else None
    rows = query_rows(plan.q_blocks, q.device)
    triton_forward.sparse_forward(q, keys, lists, rows, shape, out, lse, rest)
    if rest is not None:
        triton_forward.add_first_order(q, _moment(keys, layout).to(q.dtype), rest, out)
    return out, lse if return_lse else None


@lru_cache(maxsize=16)
def query_rows(blocks: Blocks, device: torch.device) -> QueryRows:
    """The query blocks on the device; the last few results are kept."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        return QueryRows(blocks.start.to(device), blocks.count.to(device, torch.int32), blocks.size)


@lru_cache(maxsize=16)
def key_layout(
    blocks: Blocks, levels: tuple[int, ...], block_n: int, device: torch.device
) -> KeyLayout:
    """Layout of the key buffer, each level from a multiple of block_n on; a pure function, kept."""
    with torch.inference_mode(False):
        first, groups, rows = {}, {}, 0
        parts: list[Tensor] = []
        for level in levels:
            starts = torch.arange(blocks.size >> level) << level
            count = (blocks.count[:, None] - starts).clamp(0, 1 << level).flatten()
            first[level] = rows
            groups[level] = count.clamp(min=1).to(device, torch.float32)[:, None]
            rows += -(-len(count) // block_n) * block_n
            parts.append(torch.nn.functional.pad(count, (0, rows - first[level] - len(count))))
        owner = blocks.owner
        slot = owner * blocks.size + torch.arange(blocks.tokens) - blocks.start[owner]
        bias = torch.cat(parts).double().log2().float()
        video = (~blocks.text).nonzero().flatten()
        return KeyLayout(
            blocks, first, rows, slot.to(device), groups, bias.to(device), video.to(device)
        )


def tile_lists(
    plan: BlockPlan, layout: KeyLayout, levels: list[int], block_n: int, device: torch.device
) -> TileLists:
    """The plan as lists of tiles, level by level; levels: those that it lists anywhere."""
    counts = plan.counts.flatten(0, 2)
    segments = [(level, False) for level in levels]
    if plan.rest != SKIP:
        segments.append((plan.rest, True))
    heights = {level: plan.k_blocks.size >> level for level, _ in segments}
    width = _width(counts, segments, heights, block_n, len(plan.k_blocks))
    entry = torch.zeros(len(counts), width + 1, dtype=torch.int32, device=device)
    masked = any(height < block_n for height in heights.values())
    bits = torch.ones_like(entry, dtype=torch.int64) if masked else None
    used = torch.zeros(len(counts), dtype=torch.int64, device=device)
    listed = _Listed(plan, counts, device)
    for level, is_rest in segments:
        first, height = layout.first[level] // block_n, heights[level]
        if height >= block_n:
            row, block, nth = listed.at(level)
            pieces = height // block_n
            piece = torch.arange(pieces, device=device)
            column = used[row, None] + nth[:, None] * pieces + piece
            tile = first + block[:, None] * pieces + piece
            entry[row[:, None], column] = pack(tile, block_n, is_rest)
            used = used + listed.counts[:, level] * pieces
        else:
            assert bits is not None
            wanted = listed.bitmaps(None if is_rest else level, block_n // height)
            keep = wanted != 0
            tile = first + torch.arange(wanted.shape[1], device=device)
            # what is not kept goes to the spare entry: any valid tile will do there
            column = torch.where(keep, used[:, None] + keep.cumsum(1) - 1, width)
            entry.scatter_(1, column, pack(tile, height, is_rest).expand_as(column))
            bits.scatter_(1, column, wanted)
            used = used + keep.sum(1)
    return TileLists(entry, bits, used.int())


def _width(
    counts: Tensor,
    segments: list[tuple[int, bool]],
    heights: dict[int, int],
    block_n: int,
    blocks: int,
) -> int:
    """A bound of the tiles in a row, from what the host knows; counts [rows, levels + 1]."""
    need = torch.zeros_like(counts[:, 0])
    for level, is_rest in segments:
        tiles = -(-blocks * heights[level] // block_n)
        pieces = max(1, heights[level] // block_n)
        need += tiles if is_rest else (counts[:, level] * pieces).clamp(max=tiles)
    return int(need.max())


class _Listed:
    """The lists of a plan on the device. counts: int64 [rows, levels + 1]."""

    def __init__(self, plan: BlockPlan, counts: Tensor, device: torch.device) -> None:
        self.totals = counts.sum(0).tolist()
        self.counts = counts.to(device)
        self.starts = plan.starts.flatten(0, 2).to(device)
        self.index = plan.index.to(device)
        self.rows = torch.arange(len(counts), device=device)
        self.blocks = len(plan.k_blocks)

    def at(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each block listed at a level: its row, its id, its place among the row's blocks."""
        count = self.counts[:, level]
        row = torch.repeat_interleave(self.rows, count, output_size=self.totals[level])
        nth = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        return row, self.index[self.starts[row, level] + nth], nth

    def bitmaps(self, level: int | None, per_tile: int) -> Tensor:
        """int64 [rows, tiles], bit i: the i-th block of the tile is listed at this level.

        level None: it is not listed at all. per_tile: blocks in a tile, at most 64.
        """
        tiles = -(-self.blocks // per_tile)
        bits = self.counts.new_zeros(len(self.rows) * tiles)
        levels = [level] if level is not None else range(len(self.totals))
        for each in levels:
            row, block, _ = self.at(each)
            one = torch.ones_like(block) << block % per_tile
            bits.scatter_add_(0, row * tiles + block // per_tile, one)
        bits = bits.view(-1, tiles)
        if level is not None:
            return bits
        real = (self.blocks - torch.arange(tiles, device=bits.device) * per_tile).clamp(max=64)
        every = torch.where(real < 64, (1 << real.clamp(max=63)) - 1, -1)
        return ~bits & every


def _fill(x: Tensor, layout: KeyLayout) -> Tensor:
    """Keys or values [B, H, Sk, D] in the layout of the buffer: [B, H, R, DP]."""
    batch, heads, _, depth = x.shape
    padded = next(width for width in HEAD_DIMS if width >= depth)
    out = x.new_zeros(batch, heads, layout.rows, padded)
    out[..., :depth].index_copy_(2, layout.slot, x)
    tokens = out[:, :, : len(layout.blocks) * layout.blocks.size]
    for level, first in layout.first.items():
        if level:
            count = layout.groups[level]
            sums = tokens.unflatten(2, (len(count), 1 << level)).sum(3, dtype=torch.float32)
            out[:, :, first : first + len(count)] = sums / count
    return out


def _moment(keys: Keys, layout: KeyLayout) -> Tensor:
    """Mean over the video tokens of (k - mean of its block) v^T: float32 [B, H, DP, DP]."""
    batch, heads, _, padded = keys.k.shape
    blocks = layout.blocks
    count = layout.groups[blocks.levels][layout.video, None]
    out = keys.k.new_empty(batch * heads, padded, padded, dtype=torch.float32)
    with torch.autocast(keys.k.device.type, enabled=False):
        for head, pair in enumerate(zip(keys.k.flatten(0, 1), keys.v.flatten(0, 1), strict=True)):
            k, v = (
                x[: len(blocks) * blocks.size].view(-1, blocks.size, padded)[layout.video].float()
                for x in pair
            )
            centred = k - k.sum(1, keepdim=True) / count  # v of a padding row is zero
            out[head] = centred.flatten(0, 1).T @ v.flatten(0, 1) / count.sum()
    return out.view(batch, heads, padded, padded)


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter stands for the oldest one."""
    return CAPABILITY if device.type == "cpu" else torch.cuda.get_device_capability(device)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.device != q.device or x.dtype != q.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: the Triton engine expects "
                "[B, H, S, D] tensors of one device and one dtype, float32, bfloat16 or float16; "
                "convert them or use impl='reference'"
            )
    _check_device(q.device)
    _check_plan(q, k, v, plan)
    if not 1 <= q.shape[3] <= HEAD_DIMS[-1]:
        raise ValueError(
            f"head dim {q.shape[3]}: the Triton engine executes 1 .. {HEAD_DIMS[-1]}; "
            "use impl='reference'"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "q, k or v requires grad: sparse attention is inference only; "
            "call it under torch.no_grad()"
        )


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" and not (device.type == "cpu" and triton_forward.interpreted()):
        raise ValueError(
            f"tensors on {device}: the Triton engine needs a CUDA device; on a CPU use impl='cpu', "
            "or set TRITON_INTERPRET=1 before the first import to test the kernels"
        )
    if device.type == "cuda" and _capability(device) < CAPABILITY:
        raise ValueError(
            f"compute capability {_capability(device)} of {device}: the Triton engine needs "
            f"{CAPABILITY} or newer; use dense attention"
        )


def _check_plan(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    expected = (*q.shape[:2], plan.k_blocks.tokens, q.shape[3])
    if k.shape != expected or v.shape != expected or q.shape[2] != plan.q_blocks.tokens:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit a plan of "
            f"{plan.q_blocks.tokens} queries and {plan.k_blocks.tokens} keys"
        )
    rows = (*q.shape[:2], len(plan.q_blocks), plan.k_blocks.levels + 2)
    if tuple(plan.starts.shape) != rows:
        raise ValueError(f"plan.starts.shape={tuple(plan.starts.shape)}: expected {rows}")
    for name, size in (("q_blocks", plan.q_blocks.size), ("k_blocks", plan.k_blocks.size)):
        if size not in BLOCK_SIZES:
            raise ValueError(
                f"plan.{name}.size={size}: the Triton engine executes blocks of "
                f"{', '.join(map(str, BLOCK_SIZES))} tokens; use impl='reference'"
            )
    top = plan.k_blocks.levels
    if plan.rest not in (SKIP, top):
        raise ValueError(f"plan.rest={plan.rest}: expected {SKIP} (skip) or {top} (centroid)")
    order, able = plan.first_order, ("none",) if plan.rest == SKIP else ("none", "global")
    if order not in able:
        raise ValueError(
            f"plan.first_order={order!r} with plan.rest={plan.rest}: the Triton engine executes "
            f"{' or '.join(able)} here; use impl='reference'"
        )
