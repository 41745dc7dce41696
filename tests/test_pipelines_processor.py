"""The processor: stock around the attention, stock when dense, sparse when it says so."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import vidsparse
from vidsparse.pipelines.families.wan import ADAPTER, WanSparseProcessor
from vidsparse.pipelines.processor import rebound


def processors(pipe: Any) -> dict[str, Any]:
    return {
        f"{component}.{name}": module.processor
        for component, transformer in ADAPTER.transformers(pipe).items()
        for name, module in transformer.named_modules()
        if hasattr(module, "processor")
    }


@pytest.mark.parametrize("name", tiny.WAN)
def test_density_one_in_raster_order_is_bit_identical(name: str) -> None:
    pipe, call = tiny.build(name)
    plain = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    assert torch.equal(plain, tiny.run(pipe, call))
    assert vidsparse.run_report(pipe).dense_reasons == {
        "user": len(vidsparse.run_report(pipe).calls)
    }


@pytest.mark.parametrize("name", tiny.WAN)
def test_density_one_in_tile_order_and_really_sparse_below(name: str) -> None:
    pipe, call = tiny.build(name)
    plain = tiny.run(pipe, call)
    distances = []
    for method in (tiny.DENSE, tiny.SPARSE):
        vidsparse.accelerate_pipeline(pipe, method)
        distances.append(float((plain - tiny.run(pipe, call)).abs().max()))
    assert distances[0] < 1e-5 and distances[1] > 1e-3
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, ["kernel.block_k=128"])
    whole = tiny.run(pipe, call)
    assert float((plain - whole).abs().max()) < 1e-5, "one key block, so the kernel reads all"
    assert None in {c.reason for c in vidsparse.run_report(pipe).calls}


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_i2v"])
def test_only_self_attention_is_touched(name: str) -> None:
    pipe, call = tiny.build(name)
    before = processors(pipe)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    for path, processor in processors(pipe).items():
        if path.endswith("attn1"):
            assert type(processor) is WanSparseProcessor
        else:
            assert processor is before[path]
    tiny.run(pipe, call)
    calls = vidsparse.run_report(pipe).calls
    assert len(calls) == 4 * 2 * 2, "steps x branches x layers: no cross-attention, no image keys"


def test_the_class() -> None:
    ours = WanSparseProcessor()
    assert isinstance(ours, WanAttnProcessor) and type(ours)().link is None
    stock = inspect.signature(WanAttnProcessor.__call__).parameters
    assert list(inspect.signature(type(ours).__call__).parameters) == list(stock)
    assert not isinstance(ours, torch.nn.Module)
    assert AttentionProcessorRegistry.get(WanSparseProcessor).skip_processor_output_fn


def test_an_unpickled_processor_is_stock() -> None:
    pipe, _ = tiny.build("wan")
    plain = tiny.forward(pipe.transformer)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    attention = pipe.transformer.blocks[0].attn1
    attention.processor._attention_backend = "native"
    copied = pickle.loads(pickle.dumps(attention.processor))
    assert type(copied) is WanSparseProcessor and copied._attention_backend == "native"
    vidsparse.restore_pipeline(pipe)
    for block in pipe.transformer.blocks:
        block.attn1.processor = copied
    assert torch.equal(plain, tiny.forward(pipe.transformer))


def test_settings_of_the_stock_processor_are_kept() -> None:
    pipe, call = tiny.build("wan")
    pipe.transformer.set_attention_backend("_native_math")
    stock = pipe.transformer.blocks[0].attn1.processor
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    ours = pipe.transformer.blocks[0].attn1.processor
    assert ours._attention_backend == stock._attention_backend == "_native_math"
    tiny.run(pipe, call)
    pipe.transformer.set_attention_backend("native")
    assert ours._attention_backend == "native"
    vidsparse.restore_pipeline(pipe)
    assert pipe.transformer.blocks[0].attn1.processor is stock
    assert stock._attention_backend == "native", "chosen while accelerated, so it stays"
    pipe.transformer.reset_attention_backend()


def test_dense_calls_use_the_chosen_backend() -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    pipe.transformer.blocks[1].attn1.processor._attention_backend = "no such backend"
    with pytest.raises(ValueError, match="no such backend"), vidsparse.step(0, 2):
        tiny.forward(pipe.transformer)


def test_layers_and_contexts_reach_the_schedule() -> None:
    pipe, call = tiny.build("wan", num_layers=3)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, ["schedule.dense_layers=[0,-1]"])
    tiny.run(pipe, call)
    reasons = {(c.step, c.layer): c.reason for c in vidsparse.run_report(pipe).calls}
    assert reasons == {
        (step, layer): "warmup-step" if step == 0 else "dense-layer" if layer != 1 else None
        for step in range(4)
        for layer in range(3)
    }


def test_replaced_processors_raise_at_the_next_run() -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    with pytest.raises(RuntimeError, match="2 of 2 attention processors were replaced"):
        tiny.run(pipe, call)
    with pytest.warns(RuntimeWarning, match="2 attention processors"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    tiny.run(pipe, call)
    assert vidsparse.run_report(pipe).density < 0.6


def test_a_replaced_transformer_raises_at_the_next_run() -> None:
    pipe, call = tiny.build("wan22")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    pipe.transformer_2 = tiny.transformer(seed=5)
    with pytest.raises(RuntimeError, match="transformer_2 was replaced"):
        tiny.run(pipe, call)


def test_attention_outside_a_forward_of_its_transformer_raises() -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    with pytest.raises(RuntimeError, match="outside a call of its transformer"):
        pipe.transformer.forward(**tiny.forward_arguments())
    with pytest.raises(RuntimeError, match="outside a call of its transformer"):
        pipe.transformer.blocks[0].attn1(torch.zeros(1, 72, 32))


def test_another_number_of_tokens_raises() -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    attention = pipe.transformer.blocks[0].attn1
    attention.register_forward_pre_hook(lambda m, args: (args[0][:, 1:], None, None, None))
    with pytest.raises(ValueError, match=r"71 tokens.*72 tokens"), vidsparse.step(0, 2):
        tiny.forward(pipe.transformer)


def test_a_masked_call_is_dense_and_says_so() -> None:
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    mask = torch.ones(1, 1, 72, 72, dtype=torch.bool)
    attention = pipe.transformer.blocks[0].attn1
    attention.register_forward_pre_hook(lambda m, args: (args[0], None, mask, args[3]))
    with vidsparse.step(1, 2):
        tiny.forward(pipe.transformer)
    calls = vidsparse.run_report(pipe).calls
    assert [c.reason for c in calls] == ["masked", None]


def test_a_second_pipeline_is_untouched() -> None:
    first, call = tiny.build("wan")
    second, _ = tiny.build("wan")
    plain = tiny.run(second, call)
    code, scope = WanAttnProcessor.__call__.__code__, dict(WanAttnProcessor.__call__.__globals__)
    vidsparse.accelerate_pipeline(first, tiny.SPARSE)
    tiny.run(first, call)
    assert torch.equal(plain, tiny.run(second, call))
    assert WanAttnProcessor.__call__.__code__ is code
    assert WanAttnProcessor.__call__.__globals__ == scope
    assert type(second.transformer.blocks[0].attn1.processor) is WanAttnProcessor


def test_code_without_the_primitive_is_refused() -> None:
    with pytest.raises(TypeError, match="does not call dispatch_attention_fn"):
        rebound(test_the_class, "dispatch_attention_fn", print)


def test_no_diffusers_before_there_is_a_pipeline() -> None:
    code = "import sys, vidsparse; print({'diffusers', 'triton'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
