"""Hoisted token order: permute once at the entry of a transformer, undo it once at the exit.

Everything in a DiT block except attention and RoPE works token by token. So if the tokens, the
rotary tables and what is embedded per token are permuted on entry, all layers see blocks that are
compact in space and time, and one inverse permutation before the last projection gives the video
back.

Others hook and wrap the same modules, and what they do may depend on the position of a token. So
our hooks stand next to the blocks: last after the modules of the entry, first before that of the
exit. Whatever is further out sees raster order.

The order depends on the grid alone: it is the same in every step, dense steps included, because
caches (FirstBlockCache and its kin) keep residuals in this order.

The rotary tables are permuted anew in each forward: the model computes them anew too, the gather is
a vanishing part of a forward, and a cache would have to guess whether the tables have changed.

Other tools replace modules (LoRA, quantisation) and clear hooks. So the hook before the transformer
looks at every forward where all the others sit, and puts them where they belong. That one can be
lost too: then no order is set, all tokens stay in raster order, and the processors, which hang on
no hook, raise.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from vidsparse.kernels.call_check import refuse_gradients
from vidsparse.pipelines import Adapter, PerToken
from vidsparse.pipelines.forward import Forward, Order
from vidsparse.pipelines.hooks import PlacedHook, is_context_parallel
from vidsparse.plan import StepContext, TokenGrid

KEPT_ORDERS = 8


class Hoist:
    """The hooks that carry the token order of one transformer.

    order: grid -> (order, inverse), int64 [tokens]: new sequence = old[order], old = new[inverse].
    forward: where the running forward is written for the processors.
    position: called when a forward starts; where in the run it stands.

    Gradients are refused at the entry, and not served densely: what a training step learns for
    dense attention is not what the accelerated pipeline computes, and a sparse call has no
    backward pass.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        order: Callable[[TokenGrid], tuple[Tensor, Tensor]],
        forward: Forward,
        position: Callable[[], StepContext | None] = lambda: None,
    ) -> None:
        self.transformer, self.adapter = transformer, adapter
        self.order, self.forward, self.position = order, forward, position
        self.names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.entries = (*adapter.embeddings, adapter.rope)
        self.handle: RemovableHandle | None = None
        self.hooks = [PlacedHook(transformer, adapter.rope, self._rotary)]
        for name in adapter.embeddings:
            self.hooks.append(PlacedHook(transformer, name, partial(self._embedded, name)))
        for fact in adapter.per_token:
            self.hooks.append(PlacedHook(transformer, fact.module, partial(self._per_token, fact)))
        exit = PlacedHook(transformer, adapter.output, self._leave, before=True, first=True)
        self.hooks.append(exit)
        self.hooks.append(PlacedHook(transformer, "", self._end, first=True, always=True))
        self.lock = threading.RLock()
        self.kept: OrderedDict[tuple[TokenGrid, torch.device], Order] = OrderedDict()

    def attach(self) -> None:
        """Register the hooks. Raises ValueError on a transformer split between processes."""
        self._place()
        self.handle = self.transformer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def detach(self) -> None:
        """Remove the hooks; the transformer is as before."""
        if self.handle is not None:
            self.handle.remove()
        for hook in self.hooks:
            hook.remove()

    def _place(self) -> None:
        """Every hook on the module that the transformer has now."""
        if is_context_parallel(self.transformer.get_submodule(self.adapter.rope)):
            raise ValueError(
                "the transformer is context-parallel: its rotary tables are split between "
                "processes and cannot be reordered; vidsparse does not support that"
            )
        for hook in self.hooks:
            hook.place()

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the transformer: fix the order of this forward."""
        if module is not self.transformer:
            raise RuntimeError(_COPIED)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if not torch.compiler.is_exporting():
            refuse_gradients(
                "the transformer or its input", _tensors(arguments), module.parameters()
            )
        with self.lock:  # threads may run this transformer at once
            self._place()
        latents = arguments["hidden_states"]
        _refuse_symbols(latents)
        grid = self.adapter.grid(module, arguments)
        order = self._order(grid, latents.device)
        per_token = [
            fact.module for fact in self.adapter.per_token if _many(arguments.get(fact.argument))
        ]
        self.forward.begin(order, (*self.entries, *per_token))
        self.forward.context = self.position()

    def _embedded(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After a patch embedding: its last three axes are the tokens in raster order."""
        order = self.forward.order
        if order is None:
            return None
        tokens = output.flatten(2)
        order.check(f"output of {name}", tokens.shape[2])
        self.forward.arrived(name)
        return order.permute(tokens, 2).view(output.shape)

    def _rotary(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
        """After the rotary embedding: its tables along the token axis."""
        order, axis = self.forward.order, self.adapter.rope_axis
        if order is None:
            return None
        for table in output:
            order.check("rotary table", table.shape[axis])
        self.forward.arrived(self.adapter.rope)
        return tuple(order.permute(table, axis) for table in output)

    def _per_token(
        self, fact: PerToken, module: nn.Module, args: Any, output: tuple[Any, ...]
    ) -> Any:
        """After a module that embeds an argument: what it gives for each token."""
        order = self.forward.order
        if order is None:
            return None
        moved = list(output)
        for index in fact.outputs:
            if _many(moved[index], 3):
                order.check(f"{fact.argument}, embedded", moved[index].shape[1])
                moved[index] = order.permute(moved[index], 1)
                self.forward.arrived(fact.module)
        return tuple(moved)

    def _leave(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the last token-wise module: back to raster order."""
        order = self.forward.order
        if order is None or not args:
            return None
        self.forward.require_entries()
        self.forward.leave()
        return order.undo(args[0], 1), *args[1:]

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the transformer, also when it raised: no forward is running."""
        if output is None:
            self.forward.clear()
        else:
            self.forward.end(self.adapter.output)

    def _order(self, grid: TokenGrid, device: torch.device) -> Order:
        """The order of a grid on a device; the last few are kept."""
        key = (grid, device)
        with self.lock:
            if key not in self.kept:
                # Kept tensors must serve every grad mode, and be real while a program is exported.
                with _disable_current_modes(), torch.inference_mode(False):
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
        raise RuntimeError(_COPIED)


_COPIED = (
    "an accelerated transformer cannot be copied or pickled, its hooks would stay with the "
    "original: restore_pipeline, copy, then accelerate_pipeline"
)


def _refuse_symbols(latents: Tensor) -> None:
    """Raise ValueError if an exported program shall serve several sizes of video."""
    if any(isinstance(size, torch.SymInt) for size in latents.shape[1:]):
        raise ValueError(
            f"hidden_states of shape {tuple(latents.shape)}: only the batch may be dynamic, as "
            "the token order is a constant of an exported program; take the other sizes out of "
            "dynamic_shapes and export one program for each size of video"
        )


def _many(value: object, axes: int = 2) -> bool:
    """Whether a value [B, n, ...] has one entry for each of several tokens."""
    return isinstance(value, Tensor) and value.ndim >= axes and value.shape[1] != 1


def _tensors(arguments: dict[str, Any]) -> Iterator[Tensor]:
    return (value for value in arguments.values() if isinstance(value, Tensor))
