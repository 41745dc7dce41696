"""Together with what else diffusers offers: the same result as the other feature alone."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip

import vidsparse
from vidsparse.pipelines.processor import attention_op

SKIP_HOOK = "layer_skip_hook"
CACHES = {
    "first-block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "taylor-seer": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d+\.attn1"]
    ),
    "pyramid": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("order", ["cache first", "vidsparse first"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches(cache: str, order: str) -> None:
    """They keep residuals or outputs over steps, and call some layers in some steps only."""
    pipe, call = tiny.build("wan")
    call["num_inference_steps"] = 6
    plain = tiny.run(pipe, call)
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    alone = tiny.run(pipe, call)
    assert distance(plain, alone) > 1e-3, "the cache must have an effect"
    pipe, _ = tiny.build("wan")
    if order == "cache first":
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    if order == "vidsparse first":
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    assert distance(alone, tiny.run(pipe, call)) < 1e-5
    report = vidsparse.run_report(pipe)
    assert 6 <= len(report.calls) < 6 * 2 * 2, "only executed calls are reported"
    assert report.steps == 6


@pytest.mark.parametrize("fused_first", [True, False])
def test_fused_projections(fused_first: bool) -> None:
    pipe, call = tiny.build("wan")
    if fused_first:
        pipe.transformer.fuse_qkv_projections()
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    if not fused_first:
        pipe.transformer.fuse_qkv_projections()
    fused = tiny.run(pipe, call)
    assert len(vidsparse.run_report(pipe).calls) == 16
    vidsparse.restore_pipeline(pipe)
    assert pipe.transformer.blocks[0].attn1.fused_projections
    assert torch.equal(fused, tiny.run(pipe, call))


def test_projections_are_called_as_modules() -> None:
    """LoRA and quantised layers replace modules; reading their weights would miss them."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    pipe, call = tiny.build("wan")
    plain = tiny.run(pipe, call)
    for block in pipe.transformer.blocks:
        block.attn1.to_v = Doubled(block.attn1.to_v)
    expected = tiny.run(pipe, call)
    assert float((plain - expected).abs().max()) > 1e-3
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    assert torch.equal(expected, tiny.run(pipe, call))


@pytest.mark.parametrize("scores_only", [True, False])
def test_layer_skip_guidance(scores_only: bool) -> None:
    """Only the stock attention can be told to return its values; skipped modules do not run."""
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    config = LayerSkipConfig(
        [1], skip_attention=not scores_only, skip_attention_scores=scores_only, skip_ff=False
    )
    apply_layer_skip(pipe.transformer, config)
    with vidsparse.step(1, 2):
        skipped = tiny.forward(pipe.transformer)
    calls = [(c.layer, c.reason) for c in vidsparse.run_report(pipe).calls]
    assert calls == ([(0, None), (1, "layer-skip")] if scores_only else [(0, None)])
    attention = pipe.transformer.blocks[1].attn1
    attention._diffusers_hook.remove_hook(SKIP_HOOK)
    with vidsparse.step(1, 2):
        assert float((skipped - tiny.forward(pipe.transformer)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["wan", pytest.param("wan_i2v", marks=pytest.mark.slow)])
def test_regional_compile_is_one_graph_for_all_layers_and_steps(name: str) -> None:
    pipe, call = tiny.build(name, num_layers=3)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    expected = tiny.run(pipe, call, num_inference_steps=12)
    calls = len(vidsparse.run_report(pipe).calls)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    compiled = tiny.run(pipe, call, num_inference_steps=12)
    assert len(graphs) == 1
    operators = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.vidsparse.attention.default in operators or any(
        "vidsparse" in str(target) for target in operators
    )
    assert float((expected - compiled).abs().max()) < 1e-5
    report = vidsparse.run_report(pipe)
    assert len(report.calls) == calls and report.density < 0.6
    with pytest.raises(ValueError, match="before compiling"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)


def test_the_operator_says_what_it_returns() -> None:
    """`torch.library.opcheck`: schema, fake tensors and the compiled graph agree with the code."""
    pipe, _ = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    seen: list[Any] = []
    processor = pipe.transformer.blocks[0].attn1.processor
    attend = processor.attend

    def check(q: Any, k: Any, v: Any, mask: Any, dense: Any) -> Any:
        if not seen:
            seen.append(None)
            torch.library.opcheck(attention_op, (q, k, v, mask, processor.number))
        return attend(q, k, v, mask, dense)

    processor.attend = check
    with vidsparse.step(1, 2):
        tiny.forward(pipe.transformer)
    assert seen


def test_a_compiled_transformer_is_refused() -> None:
    pipe, _ = tiny.build("wan")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="before compiling"):
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)


def test_model_offload_before_and_after() -> None:
    """On the CPU it moves nothing, but it wraps every module's forward."""
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE, ["layout.name=raster"])
    expected = tiny.run(pipe, call)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(expected, tiny.run(pipe, call))
    assert torch.equal(expected, tiny.run(pipe, call))
    assert len(vidsparse.run_report(pipe).calls) == 16
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    assert float((expected - tiny.run(pipe, call)).abs().max()) < 1e-5
    pipe.remove_all_hooks()
    assert float((expected - tiny.run(pipe, call)).abs().max()) < 1e-5
    vidsparse.restore_pipeline(pipe)
    assert torch.equal(expected, tiny.run(pipe, call))


@pytest.mark.parametrize("first", [True, False])
def test_group_offload(first: bool) -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    expected = tiny.run(pipe, call)
    vidsparse.restore_pipeline(pipe)
    cpu = torch.device("cpu")
    if not first:
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    if first:
        vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert torch.equal(expected, tiny.run(pipe, call))
    assert len(vidsparse.run_report(pipe).calls) == 16
