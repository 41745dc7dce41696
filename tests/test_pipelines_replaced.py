"""Other tools replace, copy and clear the modules that we hook: always what stock gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from twins import HOOKED, Scaled, Twins, lora, traces

import vidsparse


@pytest.mark.parametrize("exact", [True, False], ids=["raster", "tile"])
@pytest.mark.parametrize("targets", [["proj_out"], ["patch_embedding"], ["to_q", *HOOKED[::2]]])
def test_adapters_come_and_go(targets: list[str], exact: bool) -> None:
    twins = Twins()
    twins.accelerate(exact)
    plain = twins.check()
    acts: list[Callable[[Any], Any]] = [
        lambda pipe: lora(pipe, "a", targets),
        lambda pipe: pipe.transformer.disable_lora(),
        lambda pipe: pipe.transformer.enable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: lora(pipe, "b", ["proj_out", "to_v"]),
        lambda pipe: pipe.transformer.set_adapters(["a", "b"], [0.5, 0.7]),
        lambda pipe: pipe.transformer.delete_adapters("a"),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    changed = []
    for act in acts:
        twins.both(act)
        changed.append(float((plain - twins.check()).abs().max()) > 1e-3)
    assert changed[0] and changed[6] and not changed[8], "the adapters must have an effect"
    twins.both(acts[0])
    twins.restore()
    twins.check()
    assert traces(twins.ours) == []
    twins.accelerate(exact)
    twins.check()


def test_weights_loaded_and_swapped_through_the_pipeline() -> None:
    twins = Twins()
    twins.accelerate(exact=True)
    generator = torch.Generator().manual_seed(1)
    weights = {
        "transformer.proj_out.lora_A.weight": torch.randn(2, 32, generator=generator),
        "transformer.proj_out.lora_B.weight": torch.randn(64, 2, generator=generator),
    }
    plain = twins.check()
    twins.both(lambda pipe: pipe.load_lora_weights(dict(weights), adapter_name="x"))
    loaded = twins.check()
    other = {name: 2 * value for name, value in weights.items()}
    twins.both(lambda pipe: pipe.load_lora_weights(dict(other), adapter_name="x", hotswap=True))
    swapped = twins.check()
    assert not torch.equal(plain, loaded) and not torch.equal(loaded, swapped)
    twins.both(lambda pipe: pipe.unload_lora_weights())
    assert torch.equal(plain, twins.check())


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_copied_modules(accelerated_first: bool) -> None:
    """PEFT's `modules_to_save` copies a module with its hooks; the copy must not run ours."""
    twins = Twins()
    if accelerated_first:
        twins.accelerate(exact=False)
    twins.both(lambda pipe: lora(pipe, "a", ["to_q"], modules_to_save=["proj_out"]))
    if not accelerated_first:
        twins.accelerate(exact=False)
    twins.check()
    twins.restore()
    twins.check()
    assert traces(twins.ours) == []


@pytest.mark.parametrize("exact", [True, False], ids=["raster", "tile"])
@pytest.mark.parametrize("name", HOOKED)
def test_a_wrapped_submodule(name: str, exact: bool) -> None:
    twins = Twins()
    twins.accelerate(exact)
    plain = twins.check()

    def wrap(pipe: Any) -> None:
        pipe.transformer.set_submodule(name, Scaled(pipe.transformer.get_submodule(name)))

    def unwrap(pipe: Any) -> None:
        setattr(pipe.transformer, name, pipe.transformer.get_submodule(name).inner)

    twins.both(wrap)
    assert not torch.equal(plain, twins.check())
    twins.both(wrap)
    twins.check()
    twins.both(unwrap)
    twins.both(unwrap)
    assert torch.equal(plain, twins.check())
    twins.both(wrap)
    twins.restore()
    twins.check()
    assert traces(twins.ours) == []


@pytest.mark.parametrize("name", ["", *HOOKED])
def test_cleared_hooks_come_back(name: str) -> None:
    twins = Twins()
    twins.accelerate(exact=False)
    twins.check()
    twins.ours.transformer.get_submodule(name)._forward_hooks.clear()
    twins.check()


def test_a_cleared_registry_comes_back() -> None:
    twins = Twins()
    twins.accelerate(exact=False)
    plain = tiny.run(twins.ours, twins.call)
    del twins.ours.transformer._diffusers_hook
    tiny.run(twins.ours, twins.call)
    assert torch.equal(plain, tiny.run(twins.ours, twins.call))
    assert {c.branch for c in vidsparse.run_report(twins.ours).calls} == {"cond", "uncond"}


def test_the_hook_that_watches_the_others_is_missed() -> None:
    twins = Twins()
    twins.accelerate(exact=False)
    for cleared in ("_forward_pre_hooks", "_forward_hooks"):
        getattr(twins.ours.transformer, cleared).clear()
        with pytest.raises(RuntimeError, match="cleared the hooks of the transformer"):
            twins.check()
    twins.accelerate(exact=False)
    twins.check()


@pytest.mark.parametrize("entry", HOOKED[:2])
def test_a_forward_that_goes_around_a_hook(entry: str) -> None:
    """A forward of one's own may call `module.forward`, where no hook runs."""
    twins = Twins()
    twins.accelerate(exact=False)
    model = twins.ours.transformer
    module = model.get_submodule(entry)

    class Direct(nn.Module):
        __call__ = module.forward

    model._modules[entry] = Direct()
    with pytest.raises(RuntimeError, match=f"hook on {entry} did not run"):
        twins.check()
    model._modules[entry] = module
    twins.check()
    model.proj_out.__class__ = type("Direct", (nn.Linear,), {"__call__": nn.Linear.forward})
    with pytest.raises(RuntimeError, match="hook on proj_out did not run"):
        twins.check()


def test_hooks_of_others_see_raster_order() -> None:
    """Theirs may come before or after ours."""
    twins = Twins()
    positions = torch.linspace(0.5, 1.5, 72)

    def theirs(pipe: Any) -> None:
        model, shape = pipe.transformer, tiny.GRID
        entry, exit = positions.view(1, 1, *shape), positions.view(1, 72, 1)
        model.patch_embedding.register_forward_hook(lambda m, a, out: out * entry)
        model.proj_out.register_forward_hook(lambda m, a, out: out * exit, prepend=True)

    twins.both(theirs)
    twins.accelerate(exact=False)
    twins.check()
    twins.both(theirs)
    twins.check()


def test_replaced_attention() -> None:
    """Blocks replaced by new, copied or wrapped ones get our processor too."""
    twins = Twins(num_layers=3)
    twins.accelerate(exact=False)
    old = twins.ours.transformer.blocks[1]

    def new(pipe: Any) -> None:
        pipe.transformer.blocks[1] = tiny.transformer(seed=4).blocks[0]

    def wrapped(pipe: Any) -> None:
        pipe.transformer.blocks[0] = Scaled(pipe.transformer.blocks[0])

    for act in (new, wrapped):
        before = twins.check()
        twins.both(act)
        assert not torch.equal(before, twins.check())
        assert sorted(c.layer for c in vidsparse.run_report(twins.ours).calls[-3:]) == [0, 1, 2]
    assert type(old.attn1.processor).__name__ == "WanAttnProcessor"
    twins.ours.transformer.blocks = twins.ours.transformer.blocks[:2]
    with pytest.raises(
        RuntimeError, match=r"layers of transformer \(then 3, now 2\) were replaced"
    ):
        twins.check()
    twins.accelerate(exact=False)
    vidsparse.restore_pipeline(twins.ours)
    assert traces(twins.ours) == []


def test_a_replaced_transformer() -> None:
    """Nothing of ours is in the new one, so its runs are stock, which the report says."""
    twins = Twins()
    twins.accelerate(exact=False)
    old = twins.ours.transformer
    tiny.run(twins.ours, twins.call)

    def new(pipe: Any) -> None:
        pipe.transformer = tiny.transformer(seed=4)

    twins.both(new)

    def same() -> None:
        right, out = (tiny.run(pipe, twins.call) for pipe in (twins.stock, twins.ours))
        assert float((right - out).abs().max()) <= (0 if twins.exact else 2e-5)

    twins.exact = True
    same()
    with pytest.raises(ValueError, match="transformer of this WanPipeline was replaced since"):
        vidsparse.run_report(twins.ours)
    twins.accelerate(exact=False)
    same()
    assert len(vidsparse.run_report(twins.ours).calls) == 16
    twins.restore()
    same()
    twins.ours.transformer = old
    assert traces(twins.ours) == []


def test_processors_replaced_in_the_middle_of_a_run() -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)

    def replace(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        pipe.transformer.set_attn_processor(type(pipe.transformer.blocks[0].attn2.processor)())
        return kwargs

    with pytest.raises(RuntimeError, match="2 of 2 attention processors were replaced"):
        tiny.run(pipe, call, callback_on_step_end=replace)
