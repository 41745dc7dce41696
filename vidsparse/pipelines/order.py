"""Order: the token order of one forward, and how a tensor is brought into it and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Site


@dataclass(frozen=True)
class Order:
    """A token order. forward, inverse: int64 [video tokens]; both None is the identity.

    grid: of the forward, without its text.
    """

    grid: TokenGrid
    forward: Tensor | None
    inverse: Tensor | None

    def move(self, site: Site, value: Any, *, back: bool = False) -> Any:
        """What passes at a site in this order, or back in raster order. What is no tensor, and has
        none inside, stays.

        Raises ValueError for a tensor that does not have the tokens of the grid.
        """
        if isinstance(value, dict):
            return {name: self.move(site, inner, back=back) for name, inner in value.items()}
        if isinstance(value, tuple | list):
            inside, chosen = replace(site, items=None), site.items or range(len(value))
            moved = [
                self.move(inside, inner, back=back) if index in chosen else inner
                for index, inner in enumerate(value)
            ]
            return moved if isinstance(value, list) else tuple(moved)
        if not isinstance(value, Tensor) or site.dims not in (None, value.ndim):
            return value
        index = self.inverse if back else self.forward
        if isinstance(site.axes, tuple):
            return self._on_grid(site, site.axes, value, index)
        return self._in_sequence(site, site.axes, value, index)

    def _on_grid(
        self, site: Site, axes: tuple[int, int, int], x: Tensor, index: Tensor | None
    ) -> Tensor:
        """frames, height and width are neighbouring axes."""
        first, grid = axes[0] % x.ndim, self.grid
        size = tuple(x.shape[first : first + 3])
        if size != (grid.frames, grid.height, grid.width):
            self._refuse(site, prod(size), x)
        if index is None:
            return x
        flat = x.flatten(first, first + 2)
        return flat.index_select(first, index.to(x.device)).view(x.shape)

    def _in_sequence(self, site: Site, axis: int, x: Tensor, index: Tensor | None) -> Tensor:
        """The tokens are one axis, perhaps with text and other rows around the video."""
        if site.optional and not -x.ndim <= axis < x.ndim:
            return x
        grid, tokens = self.grid, x.shape[axis]
        if (site.optional or site.dims) and tokens == 1 != grid.video_tokens:
            return x
        words = tokens - grid.other_tokens
        if tokens == grid.video_tokens:
            first = 0
        elif words == 0 or (site.joint and words > 0):
            first = replace(grid, text_tokens=words).video_start
        else:
            self._refuse(site, tokens, x)
        if index is None:
            return x
        index = index.to(x.device)
        if tokens > grid.video_tokens:
            whole = torch.arange(tokens, device=x.device)
            whole[first : first + grid.video_tokens] = index + first
            index = whole
        return _selected(x, axis, index)

    def _refuse(self, site: Site, tokens: int, x: Tensor) -> NoReturn:
        grid = self.grid
        others = grid.before + grid.after
        raise ValueError(
            f"{site}: {tokens} tokens, but the latent video has {grid.frames} x {grid.height} x "
            f"{grid.width} = {grid.video_tokens}{f' and {others} other rows' if others else ''}; "
            f"its shape is {tuple(x.shape)}"
        )


def _selected(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """`x.index_select`; what is expanded, as a mask of all pairs over a batch, stays so: memory."""
    if x.stride(axis) == 0:
        return x
    once = x[tuple(slice(1) if step == 0 else slice(None) for step in x.stride())]
    return once.index_select(axis, index).expand(x.shape)
