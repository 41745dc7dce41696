"""diffusers' hook registry: the two hooks that plain torch hooks cannot replace.

A registry hook sits inside what diffusers itself wraps around a module (a context-parallel split,
say), and only a stateful one is told the running `cache_context` and the end of a pipeline call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import nn


class OutputHook(ModelHook):
    """Replaces the output of a module by `change(output)`."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change = change

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return self.change(output)


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class ContextHook(ModelHook):
    """Learns the running `cache_context`; calls `on_reset` when a pipeline call has ended."""

    _is_stateful = True

    def __init__(self, on_reset: Callable[[], None]) -> None:
        super().__init__()
        self.manager = StateManager(_NoState)  # diffusers writes the context into it
        self.on_reset = on_reset

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        self.on_reset()
        return module

    @property
    def context_name(self) -> str | None:
        try:
            name: str | None = self.manager.context.name
            return name
        except ValueError:  # no context is set
            return None


def add_hook(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on `module`."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def remove_hook(module: nn.Module, name: str) -> None:
    """Undo `add_hook`, down to the attributes that the registry leaves on the module."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        del module._diffusers_hook
        if module.__dict__.get("forward") == MethodType(type(module).forward, module):
            del module.forward


def is_context_parallel(module: nn.Module) -> bool:
    """Whether `enable_parallelism` has put its split or gather hook on the module."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(name.startswith("cp_") for name in registry.hooks)


def skips_scores(attention: nn.Module) -> bool:
    """Whether layer-skip guidance replaces the attention of this module by its values."""
    registry = getattr(attention, "_diffusers_hook", None)
    return registry is not None and any(
        isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores
        for hook in registry.hooks.values()
    )
