"""Each private thing of diffusers that we touch is there, and means what we take it for."""

from __future__ import annotations

import ast
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
import zoo.anyflow
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import LayerSkipConfig, apply_layer_skip, hooks
from diffusers.hooks.context_parallel import apply_context_parallel

import vidsparse
from vidsparse.pipelines import families, private
from vidsparse.pipelines.recognition import adapter_for

PACKAGE = Path(vidsparse.__file__).resolve().parent
PRIVATE = ("_diffusers_hook", "_hook_order", "_fn_refs", "_parallel_config", "_attention_backend")
PRIVATE += ("_cp_plan", "_ulysses_local_rank", "_resolve_parallel_config")
PRIVATE += ("_current_timestep", "_num_timesteps", "_hf_hook", "_reset_stateful_cache")


def test_they_stand_in_one_file() -> None:
    """Names of attributes, and modules of diffusers' hooks."""
    for file in PACKAGE.rglob("*.py"):
        if file.name == "private.py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
            assert name not in PRIVATE, f"{file.name}:{node.lineno}"  # type: ignore[attr-defined]
            module = getattr(node, "module", None) or ""
            assert not module.startswith("diffusers.hooks"), file.name


class Noted(private.ModelHook):  # type: ignore[misc]
    """Changes nothing."""


def test_an_observer_comes_and_goes() -> None:
    model = tiny.transformer()
    private.place_observer(model, Noted(), "ours")
    registry = getattr(model, private.REGISTRY)
    assert registry._hook_order == ["ours"] and len(registry._fn_refs) == 1
    private.remove_observer(model, "ours")
    assert not hasattr(model, private.REGISTRY)


@pytest.mark.parametrize("build", [zoo.anyflow.pipeline, partial(tiny.build, "wan")])
def test_the_end_of_a_call_is_told(build: Any) -> None:
    """Also by a model that has no caches, such as AnyFlow."""
    pipe, call = build()
    plain = set(vars(pipe.transformer))
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    assert "step" not in vars(pipe.scheduler), "between runs the scheduler is untouched"
    assert len(vidsparse.run_report(pipe).calls) > 0
    vidsparse.restore_pipeline(pipe)
    assert set(vars(pipe.transformer)) == plain


def test_the_plan_is_read_off_the_hooks_of_context_parallelism() -> None:
    model = tiny.transformer()
    plan = private.own_plan(model)
    assert plan and not private.split_plan(model)
    assert private.splits_output(model.rope) is None and not private.gathers_output(model.proj_out)
    apply_context_parallel(model, ContextParallelConfig(ulysses_degree=2), plan)
    assert private.split_plan(model) == private.normalised_plan(plan)
    reference = private.splits_output(model.rope)
    assert reference is not None and reference.post_forward.__self__.metadata == plan["rope"]
    assert private.gathers_output(model.proj_out) and not private.gathers_output(model.rope)
    assert private.splits_output(model.blocks[0]) is None, "its input is split"


def test_a_plan_of_ours_goes_with_the_split_by_it() -> None:
    model, plain = tiny.transformer(), set(vars(tiny.transformer()))
    plan = {"proj_out": private.ContextParallelOutput(1)}
    private.place_plan(model, plan)
    assert private.own_plan(model) == plan
    parallel = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    model._parallel_config = model.blocks[0].attn1.processor._parallel_config = parallel
    apply_context_parallel(model, parallel.context_parallel_config, plan)
    assert private.context_parallel(model) is parallel
    private.remove_plan(model)
    assert set(vars(model)) == plain and not private.split_plan(model)
    assert model.blocks[0].attn1.processor._parallel_config is None
    private.remove_plan(model)


def test_skipped_scores() -> None:
    """Diffusers looks our class up, as it does not find the stock one of Wan."""
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    config = LayerSkipConfig(
        [1], fqn="blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True
    )
    apply_layer_skip(pipe.transformer, config)
    skipped = [private.skips_scores(block.attn1) for block in pipe.transformer.blocks]
    assert skipped == [False, True]


def test_what_processors_and_pipelines_tell() -> None:
    pipe, call = tiny.build("wan")
    pipe.transformer.set_attention_backend("native")
    processor = pipe.transformer.blocks[0].attn1.processor
    assert private.backend(processor) == "native"
    seen: list[tuple[Any, Any]] = []

    def look(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append((private.current_timestep(pipe), private.executed_steps(pipe)))
        return inputs

    tiny.run(pipe, call, callback_on_step_end=look)
    assert [steps for _, steps in seen] == [tiny.STEPS] * tiny.STEPS
    assert torch.equal(torch.stack([t for t, _ in seen]), pipe.scheduler.timesteps)


def test_offloaded_modules() -> None:
    from accelerate import cpu_offload

    model = tiny.transformer()
    assert not private.is_offloaded(model)
    cpu_offload(model, torch.device("cpu"))
    assert private.is_offloaded(model)


def test_the_checked_releases_are_those_that_are_asked_for() -> None:
    low, _ = private.CHECKED
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"diffusers>={low.removesuffix(".0")}"' in text
    installed = tuple(int(part) for part in diffusers.__version__.split(".")[:3])
    assert installed >= tuple(map(int, low.split(".")))


def test_a_release_that_has_moved_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is run again as another module; what is imported stays."""
    monkeypatch.delattr(hooks, "StateManager")
    spec = importlib.util.spec_from_file_location("moved", private.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError) as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    said = str(caught.value)
    assert "has moved what vidsparse hooks into (cannot import name 'StateManager'" in said
    assert f"from {private.CHECKED[0]} to {private.CHECKED[1]}" in said


def test_a_family_that_a_release_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def lacking(name: str, *args: Any) -> Any:
        if name.endswith("cogvideox"):
            raise ImportError("cannot import name 'CogVideoXTransformer3DModel'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", lacking)
    monkeypatch.setattr(families, "MISSING", families.MISSING)
    families.by_family.cache_clear()
    try:
        names = [adapter.transformer.__name__ for adapter in families.adapters()]
        assert "WanTransformer3DModel" in names and "CogVideoXTransformer3DModel" not in names
        with pytest.raises(ValueError, match="lacks cogvideox: cannot import name 'CogVideoXTr"):
            adapter_for(diffusers.DiffusionPipeline())
    finally:
        families.MISSING.clear()
        families.by_family.cache_clear()
