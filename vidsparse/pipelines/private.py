"""What diffusers does not promise to keep, and we use all the same: here and nowhere else.

Its hook registries, cache contexts and layer-skip hooks, and attributes with a leading underscore.
Checked with the releases of `CHECKED`, by a test for each name; what a release lacks is said when
this is imported.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import diffusers
from torch import nn

CHECKED = ("0.42.0", "0.42.1")
"""Lowest and highest release of diffusers on which all of this was checked."""

try:
    from diffusers.hooks import HookRegistry, ModelHook
    from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
    from diffusers.hooks.hooks import BaseState, CacheContext, HookFunctionReference, StateManager
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
except ImportError as error:
    raise ImportError(
        f"diffusers {diffusers.__version__} has moved what vidsparse hooks into ({error}): use a "
        f"release from {CHECKED[0]} to {CHECKED[1]}, on which it was checked"
    ) from error

__all__ = ["BaseState", "CacheContext", "ModelHook", "StateManager"]

REGISTRY = "_diffusers_hook"
"""Attribute of a module that holds its hook registry."""

RESET = "_reset_stateful_cache"
"""Method of a model that a pipeline calls at the end of its call."""


def place_observer(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Have diffusers tell `hook` about contexts and resets; without effect if it already does.

    It stands first in the registry, where no other hook's removal looks for a predecessor, and is
    no link in the chain of forwards: `register_hook` would put one around `module.forward`. A model
    that cannot be cached has no method that pipelines call at their end, so it gets one.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.hooks.get(name) is not hook:
        remove_observer(module, name)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.hooks[name] = hook
        registry._hook_order.insert(0, name)
        registry._fn_refs.insert(0, HookFunctionReference())
        if not hasattr(module, RESET):
            setattr(module, RESET, partial(hook.reset_state, module))


def remove_observer(module: nn.Module, name: str) -> None:
    """Undo `place_observer`; an empty registry goes too."""
    registry = getattr(module, REGISTRY, None)
    if registry is None:
        return
    if name in registry.hooks:
        index = registry._hook_order.index(name)
        del registry.hooks[name], registry._hook_order[index], registry._fn_refs[index]
        vars(module).pop(RESET, None)
    if not registry.hooks:
        delattr(module, REGISTRY)


def is_context_parallel(module: nn.Module) -> bool:
    """Whether `enable_parallelism` has put its split or gather hook on the module."""
    registry = getattr(module, REGISTRY, None)
    return registry is not None and any(name.startswith("cp_") for name in registry.hooks)


def skips_scores(attention: nn.Module) -> bool:
    """Whether layer-skip guidance replaces the attention of this module by its values."""
    registry = getattr(attention, REGISTRY, None)
    return registry is not None and any(
        isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores
        for hook in registry.hooks.values()
    )


def skip_as(ours: type, stock: type) -> None:
    """Layer-skip guidance, which looks processors up by exact class, treats ours as the stock one.

    Where diffusers has not registered the stock class, a skipped layer gives its input: of a joint
    one, video and text.
    """
    try:
        metadata = AttentionProcessorRegistry.get(stock)
    except ValueError:
        metadata = AttentionProcessorMetadata(skip_processor_output_fn=_input)
    AttentionProcessorRegistry.register(ours, metadata)


def _input(attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What an attention module would return if it changed nothing."""
    given = inspect.signature(type(attn).forward).bind(attn, *args, **kwargs).arguments
    hidden, text = given["hidden_states"], given.get("encoder_hidden_states")
    return hidden if text is None else (hidden, text)


def parallel_config(processor: Any) -> Any | None:
    """How the calls of an attention processor are split between processes; None if they are not."""
    return getattr(processor, "_parallel_config", None)


def backend(processor: Any) -> Any | None:
    """The attention backend that was chosen for a processor; None: the default."""
    return getattr(processor, "_attention_backend", None)


def current_timestep(pipe: Any) -> Any | None:
    """The timestep that a pipeline is at, if it tells."""
    return getattr(pipe, "_current_timestep", None)


def executed_steps(pipe: Any) -> Any | None:
    """The number of steps that the running call of a pipeline executes, if it tells."""
    return getattr(pipe, "_num_timesteps", None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps weights of the module elsewhere."""
    return any(hasattr(inner, "_hf_hook") for inner in module.modules())
