"""Hoisted token order: permute once at the entry of a transformer, undo it once at the exit.

Everything in a DiT block except attention and RoPE works token by token. So if the tokens, the
rotary tables and every per-token argument are permuted on entry, all layers see blocks that are
compact in space and time, and one inverse permutation before unpatchifying gives the video back.
The order depends on the grid alone: it is the same in every step, dense steps included, because
caches (FirstBlockCache and its kin) keep residuals in this order.

The rotary tables are permuted anew in each forward: the model computes them anew too, the gather is
a vanishing part of a forward, and a cache would have to guess whether the tables have changed.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vidsparse.pipelines import Adapter, Forward
from vidsparse.pipelines.hooks import OutputHook, add_hook, is_context_parallel, remove_hook
from vidsparse.plan import TokenGrid

HOOK = "vidsparse_token_order"
KEPT_ORDERS = 8


@dataclass(frozen=True)
class Order:
    """A token order on a device. forward, inverse: int64 [tokens]; both None is the identity."""

    grid: TokenGrid
    forward: Tensor | None
    inverse: Tensor | None

    def check(self, what: str, tokens: int) -> None:
        """Raise ValueError unless `tokens` is the number of tokens of the grid."""
        grid = self.grid
        if tokens != grid.tokens:
            raise ValueError(
                f"{what}: {tokens} tokens, but the latent video has {grid.frames} x {grid.height} "
                f"x {grid.width} = {grid.tokens}"
            )


class Hoist:
    """The hooks that carry the token order of one transformer.

    order: grid -> (order, inverse), int64 [tokens]: new sequence = old[order], old = new[inverse].
    forward: where the grid of the running forward is written for the processors.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        order: Callable[[TokenGrid], tuple[Tensor, Tensor]],
        forward: Forward,
    ) -> None:
        self.transformer, self.adapter = transformer, adapter
        self.order, self.forward = order, forward
        self.names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.handles: list[RemovableHandle] = []
        self.kept: OrderedDict[tuple[TokenGrid, torch.device], Order] = OrderedDict()
        self.current: Order | None = None
        self.missing: set[str] = set()

    def attach(self) -> None:
        """Register the hooks. Raises ValueError on a transformer split between processes."""
        model, adapter = self.transformer, self.adapter
        rope = model.get_submodule(adapter.rope)
        if is_context_parallel(rope):
            raise ValueError(
                "the transformer is context-parallel: its rotary tables are split between "
                "processes and cannot be reordered; vidsparse does not support that"
            )
        add_hook(rope, OutputHook(self._rotary), HOOK)
        self.handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
        for name in adapter.embeddings:
            hook = partial(self._embedded, name)
            self.handles.append(model.get_submodule(name).register_forward_hook(hook))
        output = model.get_submodule(adapter.output)
        self.handles.append(output.register_forward_hook(self._leave))

    def detach(self) -> None:
        """Remove the hooks; the transformer is as before."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        remove_hook(self.transformer.get_submodule(self.adapter.rope), HOOK)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the transformer: fix the order of this forward, permute per-token arguments."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        grid = self.adapter.grid(module, arguments)
        order = self._order(grid, arguments["hidden_states"].device)
        self.current, self.forward.grid = order, grid
        self.missing = {*self.adapter.embeddings, self.adapter.rope}
        for name in self.adapter.per_token:
            value = arguments.get(name)
            if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] == 1:
                continue
            order.check(f"{name} of shape {tuple(value.shape)}", value.shape[1])
            if order.forward is not None:
                arguments[name] = value.index_select(1, order.forward)
        return (), arguments

    def _embedded(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After a patch embedding: its last three axes are the tokens in raster order."""
        if self.current is None:
            return None
        self.missing.discard(name)
        tokens = output.flatten(2)
        self.current.check(f"output of {name}", tokens.shape[2])
        if self.current.forward is None:
            return None
        return tokens.index_select(2, self.current.forward).view(output.shape)

    def _rotary(self, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """After the rotary embedding: its tables along the token axis."""
        if self.current is None:
            return output
        self.missing.discard(self.adapter.rope)
        axis = self.adapter.rope_axis
        for table in output:
            self.current.check("rotary table", table.shape[axis])
        if self.current.forward is None:
            return output
        return tuple(table.index_select(axis, self.current.forward) for table in output)

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After the last token-wise module: back to raster order."""
        order, self.current, self.forward.grid = self.current, None, None
        if order is None:
            return None
        if self.missing:
            raise RuntimeError(
                f"the vidsparse hook on {', '.join(sorted(self.missing))} did not run in this "
                "forward, so tokens and positions do not match; another library has probably put "
                "the forward of that module back: call accelerate_pipeline again, and before "
                "offloading"
            )
        return None if order.inverse is None else output.index_select(1, order.inverse)

    def _order(self, grid: TokenGrid, device: torch.device) -> Order:
        """The order of a grid on a device; the last few are kept."""
        key = (grid, device)
        if key not in self.kept:
            with torch.inference_mode(False):  # kept tensors must serve every grad mode
                order, inverse = self.order(grid)
                if torch.equal(order, torch.arange(grid.tokens)):
                    self.kept[key] = Order(grid, None, None)
                else:
                    self.kept[key] = Order(grid, order.to(device), inverse.to(device))
            if len(self.kept) > KEPT_ORDERS:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            "an accelerated transformer cannot be copied or pickled, its hooks would stay with "
            "the original: restore_pipeline, copy, then accelerate_pipeline"
        )
