"""HunyuanVideo 1.5: text of two encoders and of an image, sorted behind the video."""

from typing import Any

import diffusers
import tiny
import torch
import transformers

import zoo

WIDTH, GLYPHS, IMAGE = 16, 12, 8


def model(heads: int, head_dim: int) -> Any:
    side = head_dim // 3 // 2 * 2
    return diffusers.HunyuanVideo15Transformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        in_channels=9,
        out_channels=4,
        text_embed_dim=WIDTH,
        text_embed_2_dim=GLYPHS,
        image_embed_dim=IMAGE,
        rope_axes_dim=(head_dim - 2 * side, side, side),
        target_size=16,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """Without an image: its rows are zero."""
    return {
        "hidden_states": zoo.noise(batch, 9, *grid),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_attention_mask": zoo.words(batch),
        "encoder_hidden_states_2": zoo.noise(batch, 7, GLYPHS),
        "encoder_attention_mask_2": zoo.words(batch, 7),
        "image_embeds": torch.zeros(batch, 5, IMAGE),
    }


def with_image(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    return {**arguments(model, grid, batch), "image_embeds": zoo.noise(batch, 5, IMAGE)}


CASES = [
    zoo.Case("hunyuan_video15", model, arguments),
    zoo.Case("hunyuan_video15 image", model, with_image),
]


def vae() -> Any:
    return tiny.seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        )
    )


def call(batch: int = 2) -> dict[str, Any]:
    glyphs = zoo.prompts(batch, GLYPHS, mask="mask", rows=4)
    return {
        **zoo.prompts(batch, WIDTH, mask="prompt_embeds_mask", rows=8),
        "prompt_embeds_2": glyphs["prompt_embeds"],
        "prompt_embeds_mask_2": glyphs["mask"],
        "negative_prompt_embeds_2": glyphs["negative_prompt_embeds"],
        "negative_prompt_embeds_mask_2": glyphs["negative_mask"],
        "num_frames": 5,
        "num_inference_steps": zoo.STEPS,
    }


def parts() -> dict[str, Any]:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {
        **dict.fromkeys(names),
        "transformer": zoo.lively(model(2, 16)),
        "vae": vae(),
        "scheduler": tiny.euler(),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    }


def from_text() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanVideo15Pipeline(**parts())
    pipe.vision_num_semantic_tokens = 5
    return pipe, {**call(), "height": 16, "width": 24}


def from_image() -> tuple[Any, dict[str, Any]]:
    vision = transformers.SiglipVisionConfig(
        hidden_size=IMAGE,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(
        image_encoder=tiny.seeded(lambda: transformers.SiglipVisionModel(vision)),
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8}),
        **parts(),
    )
    return pipe, {**call(batch=1), "image": tiny.still(16, 24)}


PIPELINES = {"hunyuan_video15": from_text, "hunyuan_video15 image": from_image}
