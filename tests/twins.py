"""A stock pipeline and an accelerated one, to which a test does the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from peft import LoraConfig
from torch import Tensor, nn

import vidsparse
from vidsparse.pipelines.hooks import PlacedHook

ROUNDING = 2e-5
RASTER = ["layout.name=raster"]
HOOKED = ("patch_embedding", "rope", "proj_out")


class Scaled(nn.Module):
    """A wrapper that changes what it returns, and hands on no attribute of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return tuple(1.1 * x for x in out) if isinstance(out, tuple) else 1.1 * out


class Twins:
    """A stock pipeline and one to be accelerated, alike in everything else."""

    def __init__(self, name: str = "wan", **options: Any) -> None:
        self.stock, self.call = tiny.build(name, **options)
        self.ours, _ = tiny.build(name, **options)
        self.exact = True

    def accelerate(self, exact: bool) -> None:
        vidsparse.accelerate_pipeline(self.ours, tiny.DENSE, RASTER if exact else [])
        self.exact = exact

    def restore(self) -> None:
        vidsparse.restore_pipeline(self.ours)
        self.exact = True

    def both(self, act: Callable[[Any], Any]) -> None:
        """The same act, with the same random numbers, on both pipelines."""
        for pipe in (self.stock, self.ours):
            torch.manual_seed(0)
            act(pipe)

    def check(self) -> Tensor:
        """One forward of each; returns the stock output."""
        right = tiny.forward(self.stock.transformer)
        with vidsparse.step(1, 2):
            out = tiny.forward(self.ours.transformer)
        if self.exact:
            assert torch.equal(right, out)
        else:
            bound = ROUNDING * max(1.0, float(right.abs().max()))
            assert float((right - out).abs().max()) <= bound
        return right


def lora(pipe: Any, name: str, targets: list[str], **more: Any) -> None:
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more)
    pipe.transformer.add_adapter(config, adapter_name=name)


def traces(pipe: Any) -> list[str]:
    """What of ours is on the transformer of a pipeline."""
    found = []
    for name, module in pipe.transformer.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        ours: list[Any] = [h for h in hooks if isinstance(h, PlacedHook) or "Hoist" in repr(h)]
        registry = module.__dict__.get("_diffusers_hook")
        ours += [h for h in registry.hooks if "vidsparse" in h] if registry else []
        sparse = "Sparse" in type(getattr(module, "processor", None)).__name__
        found += [name] * (len(ours) + sparse)
    return found
