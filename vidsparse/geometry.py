"""What follows from the grid and the config alone: order, blocks, forced blocks, patterns."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vidsparse import registry
from vidsparse.blocks import Blocks
from vidsparse.config import Force
from vidsparse.force import forced_blocks
from vidsparse.grid import TokenGrid
from vidsparse.places import Places

WHOLE = 0.999
"""`schedule.density` from which on a pattern may read everything, as some layers of a plan do."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Geometry:
    """Of one grid and method. order, inverse: as `token_order`; forced: bool [nq, nk]."""

    order: Tensor
    inverse: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    forced: Tensor


def token_order(grid: TokenGrid, layout: Any) -> tuple[Tensor, Tensor]:
    """Sequence order of a layout and its inverse, int64 [grid.tokens] each; None: as they stand.

    x[order] is the sequence in layout order, x[order][inverse] is x. What is not video keeps its
    place, and no token crosses a cut of the grid.
    """
    order = torch.arange(grid.tokens)
    if layout is None:
        return order, order
    method = registry.method("layout", layout.name)
    first = grid.video_start
    for part in _stretches(grid):
        order[first : first + part.tokens] = method.video_order(part, layout) + first
        first += part.tokens
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(grid.tokens)
    return order, inverse


def _stretches(grid: TokenGrid) -> list[TokenGrid]:
    """The video between its cuts."""
    bounds = pairwise((0, *grid.cuts, grid.frames))
    return [TokenGrid(end - begin, grid.height, grid.width) for begin, end in bounds]


def _pieces(grid: TokenGrid, layout: Any) -> Tensor | None:
    """Tokens of consecutive pieces of the video that no block crosses; None: it is one."""
    if layout is None or not getattr(layout, "ragged", False):
        return None
    method = registry.method("layout", layout.name)
    return torch.cat([method.pieces(part, layout) for part in _stretches(grid)])


@lru_cache(maxsize=16)
def plan_geometry(
    grid: TokenGrid, layout: Any, force: Force, block_q: int, block_k: int, device: torch.device
) -> Geometry:
    """Order, blocks and forced blocks on a device; a pure function, the last results are kept."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        order, inverse = token_order(grid, layout)
        pieces = _pieces(grid, layout)
        q_blocks, k_blocks = (Blocks.cut(grid, size, pieces) for size in (block_q, block_k))
        apart = layout is not None and layout.per_head and not layout.shared
        own_block = force.own_block and not apart
        force = replace(force, own_block=own_block)
        forced = forced_blocks(force, grid, order, q_blocks, k_blocks)
        order, inverse, forced = (x.to(device) for x in (order, inverse, forced))
        return Geometry(order, inverse, q_blocks, k_blocks, forced)


@lru_cache(maxsize=64)
def patterned(
    grid: TokenGrid,
    layout: Any,
    force: Force,
    block_q: int,
    block_k: int,
    pattern: Any,
    *,
    density: float,
    phase: int,
    static: bool,
    device: torch.device,
    heads: int | None = None,
) -> Tensor:
    """bool [nq, nk], or [H, nq, nk] of a pattern of heads: forced blocks, the pattern's too.

    Of the settings that the pattern may stand for, the first that costs at most `density` together
    with the forced blocks, else the last, and a warning. static: nothing else is chosen, so that
    what is neither video nor text is exact both ways, and no row is empty. A pure function that is
    kept like `plan_geometry`; a schedule with a density for every step makes a map for every step.
    heads: of the model, which take the maps in turn; None: the maps as they are.
    """
    with torch.inference_mode(False):
        known = plan_geometry(grid, layout, force, block_q, block_k, torch.device("cpu"))
        places = Places(grid, known.order, known.q_blocks, known.k_blocks)
        fit, found = fitted(places, known.forced, pattern, density, phase, static)
        share = places.share(found)
        if static and share > density and fit != pattern:
            log.warning(
                "pattern.name=%r: the least that it reads of %d x %d x %d tokens is %.3f of all "
                "pairs, more than schedule.density=%g",
                *(pattern.name, *places.sizes, share, density),
            )
        if found.ndim == 3 and heads is not None:
            if len(found) != heads and getattr(pattern, "all_heads", False):
                raise ValueError(
                    f"pattern.file={pattern.file!r} is for {len(found)} heads, and the model has "
                    f"{heads}"
                )
            found = found.index_select(0, torch.arange(heads) % len(found))
        return found.to(device)


def fitted(
    places: Places, forced: Tensor, pattern: Any, density: float, phase: int, static: bool
) -> tuple[Any, Tensor]:
    """The setting of a pattern that `patterned` takes, and its blocks with the forced ones."""
    method = registry.method("pattern", pattern.name)
    forced = forced | _without_place(places) if static else forced

    def made(params: Any) -> Tensor:
        found: Tensor = method.blocks(places, phase, params) | forced
        return _guarded(found, places) if static else found

    options = method.settings(places, density, pattern)
    low, high = 0, len(options) - 1  # the first that fits is in low .. high, or none does
    while low < high:
        middle = (low + high) // 2
        fits = places.share(made(options[middle])) <= density
        low, high = (low, middle) if fits else (middle + 1, high)
    return options[low], made(options[low])


def pattern_fault(config: Any, grid: TokenGrid, block_q: int, phase: int) -> str | None:
    """Why a pattern whose size is given, and which is all that is read, is no answer to the density
    that is asked for; None if it is."""
    if config.selector.name != "static":
        return None
    return _fault(
        grid, config.layout, config.force, block_q, config.kernel.block_k, config.pattern,
        config.schedule.density, phase,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _fault(
    grid: TokenGrid, layout: Any, force: Force, block_q: int, block_k: int, pattern: Any,
    density: float, phase: int,
) -> str | None:  # fmt: skip
    device = torch.device("cpu")
    known = plan_geometry(grid, layout, force, block_q, block_k, device)
    places = Places(grid, known.order, known.q_blocks, known.k_blocks)
    options = registry.method("pattern", pattern.name).settings(places, density, pattern)
    if options[0] != pattern:  # the budget decides
        return None
    how: Any = {"density": density, "phase": phase, "static": True, "device": device}
    sizes = grid, layout, force, block_q, block_k, pattern
    share = places.share(patterned(*sizes, **how))
    if share <= density or density >= WHOLE:
        return None
    given = ", ".join(
        f"{field.name}={getattr(pattern, field.name)!r}" for field in fields(pattern)[1:]
    )
    return (
        f"schedule.density={density}: pattern.name={pattern.name!r} ({given}) with what is forced "
        f"reads {share:.3f} of the pairs of {grid.frames} x {grid.height} x {grid.width} tokens; "
        "ask for that density, or leave the size of the pattern to it"
    )


def _without_place(places: Places) -> Tensor:
    """bool [nq, nk]: pairs with a block that is neither video nor text, such as history."""
    found = []
    for blocks in (places.q_blocks, places.k_blocks):
        video = places.held(blocks, places.sizes).flatten(1).any(1)
        found.append(~video & ~blocks.text)
    return found[0][:, None] | found[1]


def _guarded(blocks: Tensor, places: Places) -> Tensor:
    """The same, where rows without a block have the one at their place."""
    own = torch.searchsorted(places.k_blocks.start, places.q_blocks.start, right=True) - 1
    empty = ~blocks.any(-1, keepdim=True)
    return blocks | (empty & (torch.arange(blocks.shape[-1]) == own[:, None]))
