"""Other tools wrap the modules that we hook, before or after us: their wrappers stay."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from torch import Tensor, nn
from twins import HOOKED, ROUNDING, Scaled, Twins, lora, traces

import vidsparse

CPU = torch.device("cpu")


def wrap_forward(model: nn.Module) -> None:
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return tuple(1.1 * x for x in inner(*args, **kwargs))

    model.forward = forward  # type: ignore[method-assign]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "hook": lambda pipe: add_hook_to_module(pipe.transformer, ModelHook()),
    "hooks below": lambda pipe: [
        add_hook_to_module(m, AlignDevicesHook(CPU, io_same_device=True))
        for m in (pipe.transformer, pipe.transformer.rope, pipe.transformer.proj_out)
    ],
    "cpu_offload": lambda pipe: cpu_offload(pipe.transformer, execution_device="cpu"),
    "dispatch": lambda pipe: dispatch_model(
        pipe.transformer, {"": "cpu"}, main_device="cpu", force_hooks=True
    ),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group offload": lambda pipe: pipe.transformer.enable_group_offload(
        CPU, CPU, offload_type="leaf_level"
    ),
    "cache": lambda pipe: pipe.transformer.enable_cache(
        diffusers.FirstBlockCacheConfig(threshold=0.3)
    ),
    "forward": lambda pipe: wrap_forward(pipe.transformer),
}


@pytest.mark.parametrize("first", [True, False], ids=["wrapped first", "vidsparse first"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_stay(wrapper: str, first: bool) -> None:
    """What others put around the forward, before or after us, outlives restoring."""
    twins = Twins()
    if first:
        twins.both(WRAPPERS[wrapper])
    twins.accelerate(exact=True)
    if not first:
        twins.both(WRAPPERS[wrapper])

    def same() -> None:
        out = tiny.run(twins.ours, twins.call)
        assert torch.equal(tiny.run(twins.stock, twins.call), out)

    same()
    twins.accelerate(exact=True)
    same()
    twins.restore()
    same()
    assert traces(twins.ours) == []
    wrapped = [
        [("forward" in m.__dict__, hasattr(m, "_hf_hook")) for m in pipe.transformer.modules()]
        for pipe in (twins.stock, twins.ours)
    ]
    assert wrapped[0] == wrapped[1]


def halves(model: nn.Module) -> None:
    """A forward in two halves of the batch, to save memory."""
    inner = model.forward

    def forward(hidden_states: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        rows = zip(hidden_states, timestep, encoder_hidden_states, strict=True)
        outs = [inner(*(x[None] for x in row), **more) for row in rows]
        return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))

    model.forward = forward  # type: ignore[method-assign]


def second_try(model: nn.Module) -> None:
    """A forward that is run again after an error in its middle."""
    inner, model.tries = model.forward, 0
    block = model.blocks[1]

    def fail_once(*args: Any) -> None:
        model.tries += 1
        if model.tries % 2:
            raise MemoryError

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except MemoryError:
            return inner(*args, **kwargs)

    block.register_forward_pre_hook(fail_once)
    model.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("exact", [True, False], ids=["raster", "tile"])
@pytest.mark.parametrize("wrap", [halves, second_try])
def test_a_wrapper_that_runs_the_forward_twice(wrap: Callable[[Any], None], exact: bool) -> None:
    twins = Twins()
    twins.accelerate(exact)
    twins.both(lambda pipe: wrap(pipe.transformer))
    single = tiny.forward_arguments()
    batch = {n: torch.cat([x, x.flip(-1)]) for n, x in single.items() if isinstance(x, Tensor)}
    right = tiny.forward(twins.stock.transformer, **batch)
    with vidsparse.step(1, 2):
        out = tiny.forward(twins.ours.transformer, **batch)
    assert float((right - out).abs().max()) <= (0 if exact else ROUNDING)


ACTS = ["accelerate", "accelerate", "restore", "add", "toggle", "fuse", "unload", "wrap"]
ACTS += ["forward", "clear", "offload"]


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_acts(seed: int) -> None:
    """A random walk over everything above; the stock twin walks along."""
    draw, twins = random.Random(seed), Twins()
    adapters: list[str] = []
    offloaded = False

    def add(pipe: Any) -> None:
        lora(pipe, adapters[-1], targets)

    def clear(pipe: Any) -> None:
        pipe.transformer.get_submodule(name)._forward_hooks.clear()

    def wrap(pipe: Any) -> None:
        setattr(pipe.transformer, name, Scaled(getattr(pipe.transformer, name)))

    plain = twins.check()
    for _ in range(14):
        act = draw.choice(ACTS)
        name = draw.choice(HOOKED)
        if act == "accelerate":
            twins.accelerate(exact=draw.random() < 0.5)
        elif act == "restore":
            twins.restore()
        elif act == "offload":
            twins.both(
                (lambda pipe: remove_hook_from_module(pipe.transformer, recurse=True))
                if offloaded
                else WRAPPERS[draw.choice(["hook", "hooks below"])]
            )
            offloaded = not offloaded
        elif act == "add":
            targets = draw.sample(["proj_out", "patch_embedding", "to_q", "to_v", "ffn.net.2"], 2)
            adapters.append(f"a{len(adapters)}")
            twins.both(add)
        elif act == "toggle" and adapters:
            chosen = draw.choice(["disable_lora", "enable_lora"])
            twins.both(lambda pipe, chosen=chosen: getattr(pipe.transformer, chosen)())
        elif act == "fuse" and adapters:
            twins.both(lambda pipe: pipe.fuse_lora())
            twins.check()
            twins.both(lambda pipe: pipe.unfuse_lora())
        elif act == "unload" and adapters:
            twins.both(lambda pipe: pipe.unload_lora_weights())
            adapters.clear()
        elif act == "wrap" and not adapters:
            twins.both(wrap)
        elif act == "forward":
            twins.both(lambda pipe: wrap_forward(pipe.transformer))
        elif act == "clear":
            twins.both(clear)
        twins.check()
    twins.restore()
    assert not torch.equal(plain, twins.check())
    assert traces(twins.ours) == []
