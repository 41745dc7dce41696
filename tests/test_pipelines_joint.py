"""Together with what else diffusers offers, where text and video are one sequence.

HunyuanVideo has padded text of unlike length behind the video and blocks of two kinds, CogVideoX
text before it and both branches of guidance in one batch, FLUX.1 an image. What a feature gives on
the stock pipeline is what it must give at density 1, whoever came first; with it calls are sparse;
and restored, the pipeline is as stock, bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers.hooks.mag_cache import MagCacheConfig
from test_family_pipelines import ROUNDING, distance, run
from torch import Tensor
from zoo import cogvideox, flux, hunyuan_video

import vidsparse

STEPS = 4
CPU = torch.device("cpu")
FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "hunyuan_video": hunyuan_video.from_text,
    "cogvideox": cogvideox.t2v,
    "flux": flux.from_text,
}


def build(family: str) -> tuple[Any, dict[str, Any]]:
    """The same weights each time."""
    torch.manual_seed(0)
    pipe, call = FAMILIES[family]()
    return pipe, {**call, "num_inference_steps": STEPS}


def cached(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda pipe: pipe.transformer.enable_cache(make(pipe))


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def lora(pipe: Any, name: str = "a", seed: int = 0) -> None:
    torch.manual_seed(seed)
    targets = ["to_q", "to_v", "proj_out"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)


CACHES: dict[str, Callable[[Any], Any]] = {
    "first-block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "taylor-seer": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"(single_)?transformer_blocks\.\d+\.attn1?"],
    ),
    "pyramid": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1000),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1000),
        tensor_format="BFCHW",
        is_guidance_distilled=not isinstance(pipe, diffusers.CogVideoXPipeline),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "mag": lambda pipe: MagCacheConfig(
        mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, max_skip_steps=1
    ),
}
FEATURES: dict[str, Callable[[Any], Any]] = {
    **{name: cached(make) for name, make in CACHES.items()},
    "casting": cast,
    "lora": lora,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": lambda pipe: [
        cpu_offload(part, execution_device="cpu")
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
    ],
    "leaf offload": lambda pipe: pipe.transformer.enable_group_offload(
        CPU, CPU, offload_type="leaf_level"
    ),
    "block offload": lambda pipe: pipe.transformer.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1
    ),
}
LOSSY = (*CACHES, "casting", "lora")


def blocks(pipe: Any) -> list[Any]:
    """What `compile_repeated_blocks` compiles, also of CogVideoX, which does not have it."""
    model = pipe.transformer
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]


@functools.cache
def plain(family: str) -> tuple[Tensor, int]:
    """What the stock pipeline gives, and its number of self-attention calls."""
    pipe, call = build(family)
    out = run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    run(pipe, call)
    return out, len(vidsparse.run_report(pipe).calls)


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


EACH = ("hunyuan_video", slow("cogvideox"), slow("flux"))
BOTH_ORDERS = (
    ("hunyuan_video", "vidsparse first"),
    ("cogvideox", "vidsparse last"),
    slow("hunyuan_video", "vidsparse last"),
    slow("cogvideox", "vidsparse first"),
    slow("flux", "vidsparse first"),
    slow("flux", "vidsparse last"),
)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("family", "order"), BOTH_ORDERS)
def test_feature(family: str, order: str, feature: str) -> None:
    usual, calls = plain(family)
    pipe, call = build(family)
    FEATURES[feature](pipe)
    right = run(pipe, call)
    assert (distance(usual, right) > 1e-3) == (feature in LOSSY)

    if order == "vidsparse first":
        pipe, _ = build(family)
        vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
        FEATURES[feature](pipe)
    else:
        vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    assert distance(right, run(pipe, call)) < ROUNDING
    report = vidsparse.run_report(pipe)
    assert report.steps == STEPS and set(report.dense_reasons) == {"user"}
    assert 0 < len(report.calls) < calls if feature in CACHES else len(report.calls) == calls

    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    assert distance(right, run(pipe, call)) > 1e-4
    report = vidsparse.run_report(pipe)
    assert set(report.dense_reasons) == {"warmup-step"} and report.density < 0.8

    vidsparse.restore_pipeline(pipe)
    assert torch.equal(right, run(pipe, call))


@pytest.mark.parametrize("family", EACH)
def test_adapters_come_and_go(family: str, tmp_path: Path) -> None:
    """Loaded from a file, scaled, fused, joined by another, unloaded, while accelerated."""
    stock, call = build(family)
    ours, _ = build(family)
    call["num_inference_steps"] = 1
    usual = run(stock, call)
    saved, _ = build(family)
    lora(saved)
    layers = peft.get_peft_model_state_dict(saved.transformer, adapter_name="a")
    saved.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    vidsparse.accelerate_pipeline(ours, tiny.DENSE)
    acts: dict[str, Callable[[Any], Any]] = {
        "load": lambda pipe: pipe.load_lora_weights(tmp_path, adapter_name="a"),
        "scale": lambda pipe: pipe.set_adapters("a", 0.5),
        "fuse": lambda pipe: pipe.fuse_lora(),
        "unfuse": lambda pipe: pipe.unfuse_lora(),
        "another": lambda pipe: lora(pipe, "b", seed=1),
        "both": lambda pipe: pipe.set_adapters(["a", "b"], [0.5, 0.7]),
        "delete": lambda pipe: pipe.delete_adapters("a"),
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }
    seen = [usual]
    for name, act in acts.items():
        act(stock), act(ours)
        seen.append(run(stock, call))
        assert distance(seen[-1], run(ours, call)) < ROUNDING, name
        changed = distance(seen[-2], seen[-1]) > 1e-3
        assert changed == (name not in ("fuse", "unfuse")), name
    assert distance(seen[-1], usual) < ROUNDING, "weights that were fused are rounded"
    vidsparse.restore_pipeline(ours)
    assert torch.equal(seen[-1], run(ours, call))


@pytest.mark.parametrize("family", EACH)
def test_callbacks(family: str) -> None:
    """They get and change the latents as the stock pipeline holds them."""

    def changing(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"])
        ramp = torch.linspace(0.5, 1.5, given["latents"][0].numel())
        return {"latents": given["latents"] * ramp.view_as(given["latents"][0])}

    seen: list[Tensor] = []
    pipe, call = build(family)
    call["callback_on_step_end"] = changing
    right = run(pipe, call)
    stock, seen = seen, []
    assert distance(plain(family)[0], right) > 1e-3
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    assert distance(right, run(pipe, call)) < ROUNDING
    assert len(seen) == len(stock) == STEPS
    assert all(distance(a, b) < ROUNDING for a, b in zip(stock, seen, strict=True))


@pytest.mark.parametrize("family", [slow("hunyuan_video"), "cogvideox"])
def test_decoded_in_tiles(family: str) -> None:
    pipe, call = build(family)
    call |= {"output_type": "pt", "num_inference_steps": 1}
    whole = run(pipe, call)
    pipe.vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    right = run(pipe, call)
    assert not torch.equal(whole, right)
    vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    assert distance(right, run(pipe, call)) < ROUNDING
    vidsparse.restore_pipeline(pipe)
    assert torch.equal(right, run(pipe, call))


@pytest.mark.parametrize("family", [slow("hunyuan_video"), "cogvideox", slow("flux")])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    """Files are those of the stock pipeline; what is loaded from them is stock."""
    pipe, call = build(family)
    call["num_inference_steps"] = 2
    files = []
    for state in ("stock", "accelerated"):
        if state == "accelerated":
            vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
        pipe.save_pretrained(root := tmp_path / state)
        found = [file for file in root.rglob("*") if file.is_file()]
        files.append({file.relative_to(root): file.read_bytes() for file in found})
    assert files[0] == files[1] and len(files[0]) > 4
    vidsparse.restore_pipeline(pipe)
    right = run(pipe, call)
    missing = {name: None for name, part in pipe.components.items() if part is None}
    loaded = type(pipe).from_pretrained(tmp_path / "accelerated", **missing)
    assert torch.equal(right, run(loaded, call))
    vidsparse.accelerate_pipeline(loaded, tiny.DENSE)
    assert distance(right, run(loaded, call)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH)
def test_compiled_blocks_are_as_many_graphs_as_stock(family: str) -> None:
    """One for each kind of block, for all layers, steps and branches; sparse as without."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    counts, outs = [], []
    for config in (None, tiny.SPARSE):
        pipe, call = build(family)
        if config:
            vidsparse.accelerate_pipeline(pipe, config)
        eager = run(pipe, call)
        torch._dynamo.reset()
        graphs.clear()
        for block in blocks(pipe):
            block.compile(backend=backend, fullgraph=True)
        outs.append(run(pipe, call))
        assert distance(eager, outs[-1]) < 1e-5
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0
    assert distance(*outs) > 1e-4
    report = vidsparse.run_report(pipe)
    assert set(report.dense_reasons) == {"warmup-step"} and report.density < 0.8
