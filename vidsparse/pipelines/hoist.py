"""Hoisted token order: permute once at the entry of a transformer, undo it once at the exit.

Everything in a DiT block except attention and RoPE works token by token. So if the tokens, the
rotary tables and what is embedded per token are permuted on entry, all layers see blocks that are
compact in space and time, and one inverse permutation before the last projection gives the video
back.

Others hook and wrap the same modules, and what they do may depend on the position of a token. So
our hooks stand next to the blocks: last at the entries, first at the exit. Whatever is further out
sees raster order. Where several processes share the tokens (`parallel.py`) they stand outside of
that: each process brings all tokens into the order before they are split, and back once they are
gathered.

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
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from vidsparse.grid import TokenGrid
from vidsparse.kernels.call_check import refuse_gradients
from vidsparse.pipelines import private
from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.forward import Forward, RealRows, real_rows
from vidsparse.pipelines.hooks import PlacedHook
from vidsparse.pipelines.kept import Kept
from vidsparse.pipelines.order import Order
from vidsparse.pipelines.parallel import Ulysses, ulysses_of
from vidsparse.plan import StepContext

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
        self.handle: RemovableHandle | None = None
        split = adapter.split if isinstance(adapter.split, Split) else Split()
        self.split_entries = adapter.entries if split.entries is None else split.entries
        sites = dict.fromkeys((*adapter.entries, *self.split_entries))
        self.hooks = {site: self._entry(site) for site in sites if site.at != "argument"}
        self.exits: list[PlacedHook] = []  # where tokens are whole, and where they are gathered
        if (exit := adapter.exit) is not None:
            leave, left = partial(self._leave, exit), partial(self._left, exit)
            self.exits.append(PlacedHook(transformer, exit.name, leave, before=True, first=True))
            self.exits.append(PlacedHook(transformer, exit.name, left, first=True))
        self.last = PlacedHook(transformer, "", self._end, first=True, always=True)
        self.ulysses: Ulysses | None = None
        self.lock = threading.RLock()
        self.kept: OrderedDict[tuple[TokenGrid, torch.device], Order] = OrderedDict()
        self.real_text: Kept[tuple[RealRows, ...]] = Kept()

    def _entry(self, site: Site) -> PlacedHook:
        """The hook that brings what passes at a site into the order."""
        call, before = (self._out, False) if site.at == "output" else (self._in, True)
        return PlacedHook(
            self.transformer, site.name, partial(call, site), before=before, optional=site.optional
        )

    def attach(self) -> None:
        """Register the hooks. Raises ValueError on one that is split in a way not supported."""
        self._place()
        self.handle = self.transformer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def detach(self) -> None:
        """Remove the hooks; the transformer is as before."""
        if self.handle is not None:
            self.handle.remove()
        for hook in (*self.hooks.values(), *self.exits, self.last):
            hook.remove()

    def _place(self) -> tuple[Site, ...]:
        """Every hook on the module that the transformer has now. Returns the entries.

        Raises as `ulysses_of`.
        """
        config = private.context_parallel(self.transformer)
        if self.ulysses is None or self.ulysses.config is not config:
            self.ulysses = ulysses_of(self.adapter, self.transformer)
        entries = self.adapter.entries if self.ulysses is None else self.split_entries
        for site, hook in self.hooks.items():
            if site in entries:
                hook.place()
            else:
                hook.remove()
        if self.exits:
            whole, gathered = self.exits
            module = gathered.target()
            if module is not None and private.gathers_output(module):
                whole, gathered = gathered, whole
            gathered.remove()
            whole.place()
        self.last.place()
        return entries

    @torch.compiler.disable
    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the transformer: fix the order of this forward, and bring arguments into it."""
        if module is not self.transformer:
            raise RuntimeError(_COPIED)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if not torch.compiler.is_exporting():
            refuse_gradients(
                "the transformer or its input", _tensors(arguments), module.parameters()
            )
        with self.lock:  # threads may run this transformer at once
            entries = self._place()
        latents = arguments["hidden_states"]
        _refuse_symbols(latents)
        order = self._order(self.adapter.video(module, arguments), latents.device)
        if self.ulysses is not None:
            self.ulysses.check(self.adapter, module, order.grid, arguments)
        inner = [site for site in entries if site.at != "argument" and not site.optional]
        self.forward.begin(order, tuple(site.name for site in inner))
        self.forward.ulysses = self.ulysses
        self.forward.context = self.position()
        self.forward.real_text = self._real_text(arguments)
        sites = [site for site in entries if site.at == "argument"]
        if not sites:
            return None
        for site in sites:
            if arguments.get(site.name) is None and not site.optional:
                raise ValueError(
                    f"{site.name} is missing in a call of {type(module).__name__}: vidsparse has "
                    "to bring it into the order of the tokens"
                )
            if site.name in arguments:
                arguments[site.name] = order.move(site, arguments[site.name])
        positional = self.names[: len(args)]
        rest = {name: value for name, value in arguments.items() if name not in positional}
        return tuple(arguments[name] for name in positional), rest

    def _real_text(self, arguments: Arguments) -> tuple[RealRows, ...] | None:
        """Text rows of each sample that are no padding; None if nobody says."""
        real = self.adapter.real_text
        if real is None or torch.compiler.is_exporting():
            return None
        values = tuple(arguments.get(name) for name in real.arguments)
        if values[0] is None:
            return None
        return self.real_text.get(values, lambda: real_rows(real.rows(*values)))

    def _out(self, site: Site, module: nn.Module, args: Any, output: Any) -> Any:
        """After a module at the entry: what it gives for each token."""
        if not self._meets(site):
            return None
        assert self.forward.order is not None
        moved = self.forward.order.move(site, output)
        self.forward.arrive(site.name)
        return moved

    def _in(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a module at the entry: the tokens that it gets."""
        if not self._meets(site):
            return None
        assert self.forward.order is not None
        moved = _changed(args, kwargs, partial(self.forward.order.move, site))
        self.forward.arrive(site.name)
        return moved

    def _meets(self, site: Site) -> bool:
        """Whether what passes at a site now has to be brought into the order."""
        forward = self.forward
        return forward.order is not None and not (site.once and site.name in forward.arrived)

    def _leave(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before the last token-wise module: back to raster order."""
        order = self.forward.order
        if order is None:
            return None
        self.forward.require_entries()
        moved = _changed(args, kwargs, partial(order.move, site, back=True))
        self.forward.leave()
        return moved

    def _left(self, site: Site, module: nn.Module, args: Any, output: Any) -> Any:
        """After it, where its output is gathered from several processes: back to raster order."""
        order = self.forward.order
        if order is None:
            return None
        self.forward.require_entries()
        moved = order.move(site, output, back=True)
        self.forward.leave()
        return moved

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the transformer, also when it raised: no forward is running."""
        if output is None:
            self.forward.clear()
        else:
            self.forward.end(self.adapter.exit)

    def _order(self, grid: TokenGrid, device: torch.device) -> Order:
        """The order of a grid on a device; the last few are kept."""
        key, video = (grid, device), replace(grid, before=0, after=0, text_first=False)
        with self.lock:
            if key not in self.kept:
                # Kept tensors must serve every grad mode, and be real while a program is exported.
                with _disable_current_modes(), torch.inference_mode(False):
                    order, inverse = self.order(video)
                    if torch.equal(order, torch.arange(video.tokens)):
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


def _changed(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a submodule with another first one."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _tensors(arguments: dict[str, Any]) -> Iterator[Tensor]:
    return (value for value in arguments.values() if isinstance(value, Tensor))
