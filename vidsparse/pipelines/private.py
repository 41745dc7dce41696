"""What diffusers does not promise to keep, and we use all the same: here and nowhere else.

Its hook registries, cache contexts and layer-skip hooks, and attributes with a leading underscore.
Checked with the releases of `CHECKED`, by a test for each name; what a release lacks is said when
this is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

CHECKED = ("0.42.0", "0.42.1")
"""Lowest and highest release of diffusers on which all of this was checked."""

try:
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks import HookRegistry, ModelHook
    from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
    from diffusers.hooks.context_parallel import remove_context_parallel
    from diffusers.hooks.hooks import BaseState, CacheContext, HookFunctionReference, StateManager
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention
except ImportError as error:
    raise ImportError(
        f"diffusers {diffusers.__version__} has moved what vidsparse hooks into ({error}): use a "
        f"release from {CHECKED[0]} to {CHECKED[1]}, on which it was checked"
    ) from error

__all__ = [
    "BaseState",
    "CacheContext",
    "ContextParallelInput",
    "ContextParallelOutput",
    "ModelHook",
    "StateManager",
]

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


def context_parallel(model: nn.Module) -> Any | None:
    """The `ParallelConfig` by which `enable_parallelism` has split the tokens of a transformer."""
    config = getattr(model, "_parallel_config", None)
    return None if getattr(config, "context_parallel_config", None) is None else config


def rank_of(config: Any) -> int:
    """Of this process among those that share the heads by a `ParallelConfig`."""
    return int(config.context_parallel_config._ulysses_local_rank)


def own_plan(model: nn.Module) -> Any | None:
    """By which `enable_parallelism` splits a model if it is told no other."""
    return getattr(model, "_cp_plan", None)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attend: Callable[..., Tensor], config: Any
) -> Tensor:
    """All-to-all, `attend(ctx, q, k, v, mask, ...)` on all tokens of some heads, and back.

    config: a `ParallelConfig`.
    """
    out: Tensor = _templated_context_parallel_attention(
        q, k, v, mask, forward_op=attend, backward_op=None, _parallel_config=config
    )
    return out


PLAN, CONFIG = "_cp_plan", "_parallel_config"


def place_plan(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """`enable_parallelism` splits this model by a plan that its class does not have."""
    setattr(model, PLAN, plan)


def remove_plan(model: nn.Module) -> None:
    """Undo `place_plan`. If the model is split by it, that ends too: only attention that knows of
    the split gives the right result."""
    plan = vars(model).pop(PLAN, None)
    if plan is None or vars(model).pop(CONFIG, None) is None:
        return
    remove_context_parallel(model, plan)
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if getattr(processor, CONFIG, None) is not None:
            setattr(processor, CONFIG, None)


def enable_ulysses(model: nn.Module, degree: int) -> None:
    """`enable_parallelism` between all processes; also on CPUs, of which torch knows none as
    accelerators, by which diffusers divides the rank."""
    if not torch.accelerator.is_available():
        setattr(model, RESOLVE, partial(_resolved_on_cpu, model))
    try:
        enable: Any = model.enable_parallelism
        enable(config=ContextParallelConfig(ulysses_degree=degree))
    finally:
        vars(model).pop(RESOLVE, None)


RESOLVE = "_resolve_parallel_config"


def _resolved_on_cpu(model: nn.Module, config: ContextParallelConfig) -> ParallelConfig:
    """What that method gives, which also keeps it."""
    from torch.distributed.device_mesh import init_device_mesh

    whole = ParallelConfig(context_parallel_config=config)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole.setup(rank, ranks, torch.device("cpu"), mesh=mesh)
    setattr(model, CONFIG, whole)
    return whole


def gathered(numbers: Tensor, config: Any) -> Tensor:
    """The numbers [n] of every process that shares the heads by a `ParallelConfig`: [processes, n],
    on the CPU; waits for them."""
    group = config.context_parallel_config._ulysses_mesh.get_group()
    own = numbers.to(config._device)
    found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(found, own, group=group)
    return torch.stack(found).cpu()


SPLIT, GATHER = "cp_input---", "cp_output---"
"""Names of the hooks of `enable_parallelism`, before the name of the module in the plan."""


def split_plan(model: nn.Module) -> dict[str, Any]:
    """The plan by which `enable_parallelism` has split a model, as its hooks tell it."""
    hooks: dict[str, Any] = {}
    for module in model.modules():
        registry = getattr(module, REGISTRY, None)
        hooks.update({} if registry is None else registry.hooks)
    found = {name: hook.metadata for name, hook in hooks.items() if name.startswith(SPLIT)}
    gathers = (name for name in hooks if name.startswith(GATHER))
    return found | {name: list(hooks[name].metadata) for name in gathers}


def normalised_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan in the form of `split_plan`."""
    found: dict[str, Any] = {}
    for name, what in plan.items():
        if isinstance(what, Mapping):
            found[SPLIT + name] = what
        else:
            found[GATHER + name] = list(what) if isinstance(what, list | tuple) else [what]
    return found


def splits_output(module: nn.Module) -> HookFunctionReference | None:
    """What calls the hook that splits the output of a module between processes; None without it."""
    registry = getattr(module, REGISTRY, None)
    for name, hook in {} if registry is None else registry.hooks.items():
        if name.startswith(SPLIT) and any(isinstance(key, int) for key in hook.metadata):
            return hook.fn_ref
    return None


def gathers_output(module: nn.Module) -> bool:
    """Whether the output of a module is gathered from all processes."""
    registry = getattr(module, REGISTRY, None)
    return registry is not None and any(name.startswith(GATHER) for name in registry.hooks)


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
