"""How our hooks sit on modules that others replace, wrap, copy and clear.

None of them touches `module.forward`: the wrappers that accelerate, diffusers and users put there,
before or after us, stay in any order of adding and removing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vidsparse.pipelines import private
from vidsparse.pipelines.private import BaseState, CacheContext, ModelHook, StateManager


class PlacedHook:
    """A hook of ours on the submodule that bears a name, whichever module that now is.

    name: "" is the model itself. call: (module, args, output) -> new output, or None.
    before: run before the module, as (module, args) -> new args, or None.
    first: before the hooks of others, else after them.
    always: run, with None for the output, when the forward raises, too.
    optional: the model may have no such submodule.

    Where diffusers splits the output of the submodule between processes, which it does inside of
    `module.forward`, a hook on it is called before that. A copy of the submodule gets a hook that
    does nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        call: Callable[..., Any],
        *,
        before: bool = False,
        first: bool = False,
        always: bool = False,
        optional: bool = False,
    ) -> None:
        self.model, self.name, self.call = model, name, call
        self.before, self.first, self.always = before, first, always
        self.optional = optional
        self.module: nn.Module | None = None
        self.handle: RemovableHandle | None = None
        self.inside: _BeforeSplit | None = None

    def target(self) -> nn.Module | None:
        """The module that bears the name now; None if there is none and need not be one."""
        try:
            return self.model.get_submodule(self.name)
        except AttributeError:
            if self.optional:
                return None
            raise

    def place(self) -> None:
        """Move to the module that bears the name now, and to our end of its hooks."""
        module = self.target()
        if module is None:
            self.remove()
            return
        split = None if self.before else private.splits_output(module)
        if split is not None:
            if self.inside is None or split.post_forward is not self.inside:
                self.remove()
                self.inside = _BeforeSplit(self, split)
            return
        hooks: Any = module._forward_pre_hooks if self.before else module._forward_hooks
        handle = self.handle
        if module is self.module and handle is not None and handle.id in hooks:
            end = next(iter(hooks) if self.first else reversed(hooks))
            if end != handle.id:  # in one step: other threads may run the module meanwhile
                hooks.move_to_end(handle.id, last=not self.first)
            return
        self.remove()
        self.module = module
        if self.before:
            self.handle = module.register_forward_pre_hook(
                self, prepend=self.first, with_kwargs=True
            )
        else:
            self.handle = module.register_forward_hook(
                self, prepend=self.first, always_call=self.always
            )

    def remove(self) -> None:
        """Take the hook off; without effect where others have taken it off."""
        if self.handle is not None:
            self.handle.remove()
        if self.inside is not None:
            self.inside.remove()
        self.module = self.handle = self.inside = None

    def __call__(self, module: nn.Module, *call: Any) -> Any:
        return self.call(module, *call)

    def __reduce__(self) -> Any:
        return _inert, ()


class _BeforeSplit:
    """Stands where diffusers calls its hook that splits an output: ours first, then that one."""

    def __init__(self, hook: PlacedHook, split: Any) -> None:
        self.hook: PlacedHook | None = hook
        self.split, self.after = split, split.post_forward
        split.post_forward = self

    def __call__(self, module: nn.Module, output: Any) -> Any:
        changed = None if self.hook is None else self.hook.call(module, (), output)
        return self.after(module, output if changed is None else changed)

    def remove(self) -> None:
        """Give diffusers its own hook back; if someone has wrapped us, we stay as a passage."""
        self.hook = None
        if self.split.post_forward is self:
            self.split.post_forward = self.after


def _inert() -> Callable[..., None]:
    return passage


def passage(module: nn.Module, *call: Any) -> None:
    """The hook of a copied module: changes nothing."""


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class _ThreadManager(StateManager):
    """Keeps the context of each thread apart: two runs of one transformer have two."""

    def __init__(self, state_class: type[BaseState]) -> None:
        self.local = threading.local()
        super().__init__(state_class)

    @property
    def _context(self) -> CacheContext | None:
        return getattr(self.local, "context", None)

    @_context.setter
    def _context(self, context: CacheContext | None) -> None:
        self.local.context = context


class ContextHook(ModelHook):
    """Learns the running `cache_context`; calls `on_reset` when a pipeline call has ended."""

    _is_stateful = True

    def __init__(self, on_reset: Callable[[], None]) -> None:
        super().__init__()
        self.manager = _ThreadManager(_NoState)  # diffusers writes the context into it
        self.on_reset = on_reset

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        self.on_reset()
        return module

    @property
    def context(self) -> CacheContext | None:
        """The running one of this thread, or None."""
        return self.manager._context
