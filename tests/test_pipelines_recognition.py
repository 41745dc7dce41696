"""Pipelines that are nearly right: what is wrong is said; what can work works."""

from __future__ import annotations

from typing import Any

import diffusers
import peft
import pytest
import tiny
import torch
import zoo
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks
from torch import nn

import vidsparse
from vidsparse.pipelines.families import REFUSED


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._wrapped_module = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped_module(*args, **kwargs)


def adapted(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))
    return wrapped


def missing(pipe: Any) -> None:
    del pipe.transformer


def set_to(value: Any) -> Any:
    return lambda pipe: setattr(pipe, "transformer", value(pipe.transformer))


WRONG = {
    "None": (set_to(lambda model: None), "transformer is None, transformer_2 is None"),
    "missing": (missing, "transformer is missing, transformer_2 is None"),
    "DataParallel": (set_to(nn.DataParallel), "transformer .* is a DataParallel around a Wan"),
    "wrapper": (set_to(Wrapper), "is a Wrapper around a WanTransformer3DModel.*set pipe.transf"),
    "peft": (set_to(adapted), "is a PeftModel around a WanTransformer3DModel"),
    "compiled": (set_to(lambda m: torch.compile(m, backend="eager")), "before compiling"),
    "meta": (set_to(lambda model: model.to("meta")), "weights on the meta device"),
    "other": (set_to(lambda model: nn.Linear(2, 2)), "is a Linear: expected a WanTransformer3DM"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_transformer_that_cannot_be_accelerated(case: str) -> None:
    change, message = WRONG[case]
    pipe, _ = tiny.build("wan")
    change(pipe)
    with pytest.raises(ValueError, match=message):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    with pytest.raises(ValueError, match="not accelerated"):
        vidsparse.run_report(pipe)


@pytest.mark.parametrize("case", ["wrapper", "DataParallel", "meta", "other"])
def test_a_wrong_second_transformer_is_no_half_acceleration(case: str) -> None:
    pipe, _ = tiny.build("wan22")
    change, message = WRONG[case]
    change(pipe)
    with pytest.raises(ValueError, match=message):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert type(pipe.transformer_2.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_what_is_given_instead_of_a_pipeline() -> None:
    with pytest.raises(TypeError, match=r"WanTransformer3DModel: .*the pipeline that holds it"):
        vidsparse.accelerate_pipeline(tiny.transformer())
    with pytest.raises(TypeError, match=r"is the class WanPipeline.*WanPipeline.from_pretrained"):
        vidsparse.accelerate_pipeline(diffusers.WanPipeline)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_accelerated(name: str) -> None:
    cls = getattr(diffusers, name)
    model = cls.__new__(cls)  # without weights
    nn.Module.__init__(model)
    pipe = zoo.Around(model, tiny.euler())
    with pytest.raises(ValueError, match=f"transformer is a {name}, and {REFUSED[name]}"):
        vidsparse.accelerate_pipeline(pipe)


def test_one_transformer_in_both_slots() -> None:
    pipe, call = tiny.build("wan22")
    pipe.transformer_2 = pipe.transformer
    plain = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    assert torch.equal(plain, tiny.run(pipe, call))
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert not torch.equal(plain, tiny.run(pipe, call))
    calls = vidsparse.run_report(pipe).calls
    assert sorted({c.step for c in calls}) == [0, 1, 2, 3] and len(calls) == 16
    vidsparse.restore_pipeline(pipe)
    assert torch.equal(plain, tiny.run(pipe, call))


def test_a_pipeline_with_the_second_transformer_only() -> None:
    """For instance to free the first one's memory, before or after accelerating."""
    pipe, _ = tiny.build("wan22")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    del pipe.transformer
    for _ in range(2):
        pipe.scheduler.set_timesteps(2)
        tiny.forward(pipe.transformer_2)
        assert vidsparse.run_report(pipe).calls[0].transformer == "transformer_2"
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)


def test_a_wrapper_around_an_accelerated_transformer() -> None:
    """Distributed and user wrappers call the transformer: nothing is lost."""
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    sparse = tiny.run(pipe, call)

    class Transparent(Wrapper):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("_wrapped_module"), name)

    pipe.transformer = Transparent(pipe.transformer)
    assert torch.equal(sparse, tiny.run(pipe, call))


def test_a_shallow_copy_of_the_transformer_is_refused() -> None:
    """As `DataParallel` makes one per GPU: its hooks are those of the original."""
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    replica = pipe.transformer._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="cannot be copied"), vidsparse.step(1, 2):
        tiny.forward(replica)


@pytest.mark.parametrize("blocks", [WanBlocks, Wan22Blocks])
def test_modular_pipelines(blocks: Any) -> None:
    pipe = blocks().init_pipeline()
    pipe.update_components(**tiny.parts(tiny.unipc()), transformer=tiny.transformer())
    if blocks is Wan22Blocks:
        pipe.update_components(transformer_2=tiny.transformer(seed=1))
    call = {**tiny.arguments(), "output": "latents"}
    del call["guidance_scale"]

    def run() -> torch.Tensor:
        with tiny.one_thread():
            out: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0))
        return out

    plain = run()
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    assert torch.equal(plain, run())
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert float((plain - run()).abs().max()) > 1e-3
    report = vidsparse.run_report(pipe)
    reasons = [(c.step, c.reason) for c in report.calls]
    assert report.steps == 4 and len(reasons) == 16
    assert all((reason == "warmup-step") == (step == 0) for step, reason in reasons)
    vidsparse.restore_pipeline(pipe)
    assert torch.equal(plain, run())
