"""FLUX.2: attention modules of two classes; reference images behind the image."""

from typing import Any

import diffusers
import tiny
import torch

import zoo
from zoo.flux import IMAGES, places

WIDTH = 16


def model(heads: int, head_dim: int, **options: Any) -> Any:
    return diffusers.Flux2Transformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(head_dim // 4,) * 4,
        **{"in_channels": 4, **options},
    )


def cached(heads: int, head_dim: int) -> Any:
    """With the processors that Klein KV sets."""
    transformer = model(heads, head_dim)
    kinds = diffusers.models.transformers.transformer_flux2
    for block in transformer.transformer_blocks:
        block.attn.set_processor(kinds.Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(kinds.Flux2KVParallelSelfAttnProcessor())
    return transformer


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, height * width, 4),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "timestep": zoo.times(batch) / 1000,
        "guidance": zoo.times(batch) / 1000,
        "img_ids": places(height, width, axes=4).expand(batch, -1, -1),
        "txt_ids": torch.zeros(batch, zoo.TEXT, 4),
    }


def references(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    sizes = ((5, 4, 10), (3, 6, 20))
    parts = [places(height, width, axes=4), *(places(*size, axes=4) for size in sizes)]
    ids = torch.cat(parts).expand(batch, -1, -1)
    tokens = zoo.noise(batch, ids.shape[1], 4)
    return {**arguments(model, grid, batch), "hidden_states": tokens, "img_ids": ids}


CASES = [
    zoo.Case("flux2", model, arguments, grids=IMAGES),
    zoo.Case("flux2 references", model, references, grids=IMAGES),
    zoo.Case("flux2 klein kv", cached, arguments, grids=IMAGES),
]


def vae() -> Any:
    return tiny.seeded(
        lambda: diffusers.AutoencoderKLFlux2(
            latent_channels=4,
            block_out_channels=(8,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=2,
        )
    )


def pipeline(kind: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    pipe = kind(
        transformer=zoo.lively(model(2, 16, in_channels=16)),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    prompts = zoo.prompts(1, WIDTH, mask="mask")
    call = {
        "prompt_embeds": prompts["prompt_embeds"],
        "height": 20,
        "width": 20,
        "num_inference_steps": zoo.STEPS,
        **more,
    }
    return pipe, call


def from_text() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.Flux2Pipeline)


def klein() -> tuple[Any, dict[str, Any]]:
    negative = zoo.prompts(1, WIDTH, mask="mask")["negative_prompt_embeds"]
    return pipeline(
        diffusers.Flux2KleinPipeline,
        negative_prompt_embeds=negative,
        guidance_scale=2.0,
        image=tiny.still(64, 64),
    )


def klein_kv() -> tuple[Any, dict[str, Any]]:
    """Without a reference image, so without a cache."""
    return pipeline(diffusers.Flux2KleinKVPipeline)


PIPELINES = {"flux2": from_text, "flux2 klein": klein, "flux2 klein kv": klein_kv}
