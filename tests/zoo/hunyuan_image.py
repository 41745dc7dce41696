"""HunyuanImage 2.1 and its refiner: one or two texts behind an image, of two or three axes."""

from functools import partial
from typing import Any

import diffusers
import tiny

import zoo

WIDTH, GLYPHS = 16, 12


def model(heads: int, head_dim: int, **options: Any) -> Any:
    return diffusers.HunyuanImageTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        out_channels=4,
        text_embed_dim=WIDTH,
        **{
            "in_channels": 4,
            "patch_size": (1, 1),
            "rope_axes_dim": (head_dim // 2, head_dim // 2),
            "text_embed_2_dim": GLYPHS,
            **options,
        },
    )


def refiner(heads: int, head_dim: int) -> Any:
    side = head_dim // 3 // 2 * 2
    return model(
        heads,
        head_dim,
        in_channels=8,
        guidance_embeds=True,
        patch_size=(1, 1, 1),
        rope_axes_dim=(head_dim - 2 * side, side, side),
        text_embed_2_dim=None,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int, second: bool = False) -> dict[str, Any]:
    sizes = grid[-len(model.config.patch_size) :]
    guided = model.config.guidance_embeds
    return {
        "hidden_states": zoo.noise(batch, model.config.in_channels, *sizes),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_attention_mask": zoo.words(batch),
        "encoder_hidden_states_2": zoo.noise(batch, 7, GLYPHS) if second else None,
        "encoder_attention_mask_2": zoo.words(batch, 7) if second else None,
        "guidance": 1000 * zoo.times(batch) if guided else None,
    }


IMAGES = ((1, 12, 12), (1, 9, 11))
CASES = [
    zoo.Case("hunyuan_image", model, partial(arguments, second=True), grids=IMAGES),
    zoo.Case("hunyuan_image one text", model, arguments, grids=IMAGES),
    zoo.Case("hunyuan_image refiner", refiner, arguments, grids=IMAGES),
]


def from_text() -> tuple[Any, dict[str, Any]]:
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
    pipe = diffusers.HunyuanImagePipeline(
        transformer=zoo.lively(model(2, 16)),
        scheduler=tiny.euler(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
        ocr_guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        **dict.fromkeys(parts),
    )
    glyphs = zoo.prompts(2, GLYPHS, mask="mask", rows=4)
    call = {
        **zoo.prompts(2, WIDTH, mask="prompt_embeds_mask", rows=8),
        "prompt_embeds_2": glyphs["prompt_embeds"],
        "prompt_embeds_mask_2": glyphs["mask"],
        "negative_prompt_embeds_2": glyphs["negative_prompt_embeds"],
        "negative_prompt_embeds_mask_2": glyphs["negative_mask"],
        "height": 320,
        "width": 320,
        "num_inference_steps": zoo.STEPS,
    }
    return pipe, call


def refined() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanImageRefinerPipeline(
        transformer=zoo.lively(refiner(2, 16)),
        scheduler=tiny.euler(),
        **dict.fromkeys(("text_encoder", "tokenizer", "vae", "guider")),
    )
    prompts = zoo.prompts(2, WIDTH, mask="prompt_embeds_mask", rows=8)
    call = {
        "image": zoo.noise(2, 4, 1, 10, 10, seed=4),
        "prompt_embeds": prompts["prompt_embeds"],
        "prompt_embeds_mask": prompts["prompt_embeds_mask"],
        "height": 160,
        "width": 160,
        "num_inference_steps": zoo.STEPS,
    }
    return pipe, call


PIPELINES = {"hunyuan_image": from_text, "hunyuan_image refiner": refined}
