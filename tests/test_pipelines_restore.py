"""Accelerating replaces, restoring undoes; what cannot be accelerated is refused by name."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import vidsparse
from vidsparse.pipelines.families.wan import ADAPTER


def hooks(pipe: Any) -> list[str]:
    """Everything that hangs on the modules and the scheduler of a pipeline, by name."""
    found = ["scheduler.step"] * ("step" in pipe.scheduler.__dict__)
    for component, model in ADAPTER.transformers(pipe).items():
        for name, module in model.named_modules():
            where = f"{component}.{name}"
            found += [f"{where} pre"] * len(module._forward_pre_hooks)
            found += [f"{where} post"] * len(module._forward_hooks)
            found += ["forward"] * ("forward" in module.__dict__)
            registry = module.__dict__.get("_diffusers_hook")
            found += [f"{where} {hook}" for hook in registry.hooks] if registry else []
            if hasattr(module, "processor"):
                found.append(f"{where} {type(module.processor).__name__}")
    return found


@pytest.mark.parametrize("name", tiny.WAN)
def test_restored_pixels_are_bit_identical(name: str) -> None:
    pipe, call = tiny.build(name)
    before, objects = hooks(pipe), [m.processor for m in attentions(pipe)]
    plain = tiny.run(pipe, call, output_type="pt")
    assert vidsparse.accelerate_pipeline(pipe, tiny.SPARSE) is pipe
    sparse = tiny.run(pipe, call, output_type="pt")
    assert not torch.equal(plain, sparse)
    assert vidsparse.restore_pipeline(pipe) is pipe
    assert hooks(pipe) == before
    assert all(m.processor is p for m, p in zip(attentions(pipe), objects, strict=True))
    assert torch.equal(plain, tiny.run(pipe, call, output_type="pt"))


def attentions(pipe: Any) -> list[Any]:
    models = ADAPTER.transformers(pipe).values()
    return [m for model in models for m in model.modules() if hasattr(m, "processor")]


def test_accelerating_twice_replaces() -> None:
    pipe, call = tiny.build("wan22")
    plain, before = tiny.run(pipe, call), hooks(pipe)
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    tiny.run(pipe, call)
    once = hooks(pipe)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    sparse = tiny.run(pipe, call)
    assert hooks(pipe) == once and not torch.equal(plain, sparse)
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    assert torch.equal(plain, tiny.run(pipe, call))
    vidsparse.restore_pipeline(pipe)
    assert hooks(pipe) == before


def test_restoring_what_is_not_accelerated_does_nothing() -> None:
    pipe, _ = tiny.build("wan")
    before = hooks(pipe)
    assert vidsparse.restore_pipeline(pipe) is pipe
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    vidsparse.restore_pipeline(vidsparse.restore_pipeline(pipe))
    assert hooks(pipe) == before


def test_restore_after_an_exception_and_an_exchanged_scheduler() -> None:
    pipe, call = tiny.build("wan")
    plain, first = tiny.run(pipe, call), pipe.scheduler
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)

    def fail(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tiny.run(pipe, call, callback_on_step_end=fail)
    pipe.scheduler = tiny.unipc()
    tiny.run(pipe, call)
    vidsparse.restore_pipeline(pipe)
    assert "step" not in {**pipe.scheduler.__dict__, **first.__dict__}
    pipe.scheduler = first
    assert torch.equal(plain, tiny.run(pipe, call))


def test_a_scheduler_that_someone_wrapped_since() -> None:
    pipe, call = tiny.build("wan")
    plain = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    listeners = []

    def wrap(pipe: Any, i: int, t: Any, kwargs: Any) -> Any:
        if i == 1:
            ours = pipe.scheduler.step
            listeners.extend(ours.listeners)
            pipe.scheduler.step = lambda *args, **kwargs: ours(*args, **kwargs)
        return kwargs

    expected = tiny.run(pipe, call, callback_on_step_end=wrap)
    theirs = pipe.scheduler.step
    assert torch.equal(expected, tiny.run(pipe, call)), "counted through the wrapper"
    assert pipe.scheduler.step is theirs
    vidsparse.restore_pipeline(pipe)
    gc.collect()
    assert [r() for r in listeners] == [None], "what is left in the chain holds nothing"
    assert torch.equal(plain, tiny.run(pipe, call)) and pipe.scheduler.step is theirs


def test_a_scheduler_that_someone_wrapped_before() -> None:
    pipe, call = tiny.build("wan")
    stock, calls = pipe.scheduler.step, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return stock(*args, **kwargs)

    pipe.scheduler.step = theirs
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    assert len(calls) == 4
    vidsparse.restore_pipeline(pipe)
    assert pipe.scheduler.step is theirs


def test_a_processor_that_someone_put_in_our_place_stays() -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    theirs = pipe.transformer.blocks[1].attn1.processor = WanAttnProcessor()
    with pytest.warns(RuntimeWarning, match="1 attention processors were no longer"):
        vidsparse.restore_pipeline(pipe)
    assert pipe.transformer.blocks[1].attn1.processor is theirs
    assert type(pipe.transformer.blocks[0].attn1.processor) is WanAttnProcessor


def test_saved_files_are_the_same(tmp_path: Path) -> None:
    pipe, call = tiny.build("wan22")
    tiny.run(pipe, call)  # a run alone changes what the tokenizer writes
    keys = list(pipe.transformer.state_dict())
    trees = []
    for state in ("stock", "accelerated"):
        if state == "accelerated":
            vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
            tiny.run(pipe, call)
            assert list(pipe.transformer.state_dict()) == keys
        pipe.save_pretrained(tmp_path / state)
        root = tmp_path / state
        files = [f for f in root.rglob("*") if f.is_file()]
        trees.append({f.relative_to(root): f.read_bytes() for f in files})
    assert trees[0] == trees[1] and len(trees[0]) > 8
    vidsparse.restore_pipeline(pipe)
    loaded = diffusers.WanPipeline.from_pretrained(tmp_path / "accelerated")
    loaded.set_progress_bar_config(disable=True)
    assert not any("Sparse" in name for name in hooks(loaded))
    assert torch.allclose(tiny.run(pipe, call), tiny.run(loaded, call), atol=1e-5)


def test_a_deleted_pipeline_is_freed() -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    held = [weakref.ref(pipe), weakref.ref(pipe.transformer), weakref.ref(pipe.scheduler)]
    del pipe
    gc.collect()
    assert [ref() for ref in held] == [None, None, None]


def test_a_shared_transformer() -> None:
    pipe, call = tiny.build("wan")
    plain = tiny.run(pipe, call)
    twin = diffusers.WanPipeline(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    with pytest.raises(ValueError, match=r"through another pipeline .*\(WanPipeline\).*'custom'"):
        vidsparse.accelerate_pipeline(twin, tiny.DENSE)
    expected = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(twin, tiny.SPARSE)
    for each in (pipe, twin):
        assert torch.equal(expected, tiny.run(each, call))
    vidsparse.restore_pipeline(pipe)
    assert torch.equal(plain, tiny.run(pipe, call)), "whoever had accelerated it last"
    assert torch.equal(plain, tiny.run(twin, call)), "it is one transformer"
    with pytest.raises(ValueError, match="not accelerated"):
        vidsparse.run_report(twin)


def test_acceleration_outlives_the_pipeline_that_asked_for_it() -> None:
    pipe, call = tiny.build("wan")
    plain = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    expected = tiny.run(pipe, call)
    twin = diffusers.WanPipeline(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    del pipe
    gc.collect()
    assert torch.equal(expected, tiny.run(twin, call))
    vidsparse.accelerate_pipeline(twin, tiny.DENSE, ["layout.name=raster"])
    assert torch.equal(plain, tiny.run(twin, call))
    before = hooks(vidsparse.restore_pipeline(twin))
    assert not any("Sparse" in name or "vidsparse" in name for name in before)


def test_unsupported_pipelines_are_named() -> None:
    pipe, _ = tiny.build("latte")
    with pytest.raises(ValueError, match="LattePipeline is not supported: transformer is a Latte"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"is not supported; `vidsparse models` lists.*=.generic"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)


@pytest.mark.parametrize("act", ["accelerate_pipeline", "restore_pipeline", "run_report"])
def test_what_is_no_pipeline(act: str) -> None:
    for thing in (tiny.transformer(), "wan", None, 3):
        with pytest.raises(TypeError, match=f"pipe is a {type(thing).__name__}: expected"):
            getattr(vidsparse, act)(thing)


def test_layers_that_the_model_does_not_have() -> None:
    pipe, _ = tiny.build("wan")
    before = hooks(pipe)
    for layers in ("[2]", "[0,-3]"):
        with pytest.raises(ValueError, match=r"dense_layers=\[-?\d\]: transformer has 2 layers"):
            vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, [f"schedule.dense_layers={layers}"])
    ramp = {**tiny.SPARSE, "schedule": {"name": "ramp", "layer_density": [0.1, 0.2, 0.3]}}
    with pytest.raises(ValueError, match="3 numbers, but transformer has 2 layers"):
        vidsparse.accelerate_pipeline(pipe, ramp)
    assert hooks(pipe) == before


def test_bad_settings_leave_the_first_acceleration_in_place() -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    installed = hooks(pipe)
    with pytest.raises(ValueError, match="no such preset"):
        vidsparse.accelerate_pipeline(pipe, "no such thing")
    with pytest.raises(ValueError, match="density"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, ["schedule.density=1.5"])
    assert hooks(pipe) == installed
    tiny.run(pipe, call)


def test_customised_attention_is_refused() -> None:
    class Custom(WanAttnProcessor):
        pass

    pipe, _ = tiny.build("wan22")
    pipe.transformer_2.blocks[1].attn1.processor = Custom()
    before = hooks(pipe)
    with pytest.raises(ValueError, match="transformer_2 has a Custom"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert hooks(pipe) == before


def test_a_failed_installation_leaves_nothing() -> None:
    pipe, call = tiny.build("wan22")
    plain = tiny.run(pipe, call)
    ring = ContextParallelConfig(ring_degree=2)
    pipe.transformer_2._parallel_config = ParallelConfig(context_parallel_config=ring)
    before = hooks(pipe)
    with pytest.raises(ValueError, match="ring attention"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert hooks(pipe) == before
    del pipe.transformer_2._parallel_config
    assert torch.equal(plain, tiny.run(pipe, call))
    with pytest.raises(ValueError, match="not accelerated"):
        vidsparse.run_report(pipe)
