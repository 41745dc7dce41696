"""Which model family a pipeline belongs to; if to none, or not as it is, what is wrong with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from vidsparse.pipelines import private
from vidsparse.pipelines.adapter import Adapter, eager
from vidsparse.pipelines.families import MISSING, REFUSED, adapters


def require_pipeline(pipe: object) -> None:
    """Raise TypeError unless `pipe` is a diffusers pipeline, modular or not."""
    from diffusers import DiffusionPipeline, ModularPipeline  # takes seconds

    if isinstance(pipe, DiffusionPipeline | ModularPipeline):
        return
    expected = "expected a diffusers pipeline such as WanPipeline"
    if isinstance(pipe, type):
        name = pipe.__name__
        raise TypeError(f"pipe is the class {name}: {expected}, as {name}.from_pretrained makes it")
    holds = "; give the pipeline that holds it" if isinstance(pipe, nn.Module) else ""
    raise TypeError(f"pipe is a {type(pipe).__name__}: {expected}{holds}")


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of a pipeline.

    Raises ValueError that names its class and the supported ones or, if the class is supported or
    holds a transformer that is, what is wrong with the transformers; for a model of `REFUSED`, why.
    """
    known = adapters()
    adapter = next((a for a in known if a.transformers(pipe)), None)
    adapter = adapter or next((a for a in known if _meant(a, pipe)), None)
    if adapter is not None:
        held = {name: vars(pipe).get(name) for name in adapter.components}
        for name, module in held.items():
            _check_slot(adapter, type(pipe).__name__, name, module)
        if not adapter.transformers(pipe):
            state = {name: "None" if name in vars(pipe) else "missing" for name in held}
            nothing = ", ".join(f"{name} is {how}" for name, how in state.items())
            raise ValueError(
                f"this {type(pipe).__name__} holds no transformer ({nothing}): load it with "
                f"its weights, a {adapter.transformer.__name__}, before accelerate_pipeline"
            )
        return adapter
    for name, module in vars(pipe).items():
        kind = type(eager(module)).__name__
        if kind in REFUSED:
            raise ValueError(
                f"{type(pipe).__name__} is not supported: {name} is a {kind}, and {REFUSED[kind]}"
            )
    missing = "".join(f"; this diffusers lacks {family}: {why}" for family, why in MISSING.items())
    raise ValueError(
        f"{type(pipe).__name__} is not supported; `vidsparse models` lists the pipelines that are"
        f'{missing}; for others there is accelerate_pipeline(..., adapter="generic")'
    )


def _meant(adapter: Adapter, pipe: Any) -> bool:
    """Whether a pipeline without a transformer of this family is one by its name, or holds one in
    a wrapper."""
    if any(cls.__name__ in adapter.pipelines for cls in type(pipe).__mro__):
        return True
    held = (vars(pipe).get(name) for name in adapter.components)
    return any(within(module, adapter.transformer) for module in held)


def within(module: Any, cls: type[nn.Module]) -> nn.Module | None:
    """The first module of a class in a module, itself included."""
    if not isinstance(module, nn.Module):
        return None
    return next((inner for inner in module.modules() if isinstance(inner, cls)), None)


def _check_slot(adapter: Adapter, pipeline: str, name: str, module: Any) -> None:
    """Raise ValueError unless a component is None or a transformer that can be accelerated."""
    module, expected = eager(module), adapter.transformer.__name__
    if module is None:
        return
    if not isinstance(module, adapter.transformer):
        kind = type(module).__name__
        if within(module, adapter.transformer) is None:
            raise ValueError(f"{name} of this {pipeline} is a {kind}: expected a {expected}")
        raise ValueError(
            f"{name} of this {pipeline} is a {kind} around a {expected}, which vidsparse cannot "
            f"enter: set pipe.{name} to the {expected} itself, accelerate_pipeline, then wrap it"
        )
    offloaded = private.is_offloaded(module)
    if not offloaded and any(weight.is_meta for weight in module.parameters()):
        raise ValueError(
            f"{name} of this {pipeline} has weights on the meta device, so it has none: load them "
            "before accelerate_pipeline"
        )
