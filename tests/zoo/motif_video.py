"""Motif-Video: padded text, also padded on its left, an image, decoder blocks over two videos."""

from functools import partial
from typing import Any

import diffusers
import tiny
import transformers

import zoo

WIDTH, IMAGE = 16, 8


def model(heads: int, head_dim: int, **options: Any) -> Any:
    side = head_dim // 3 // 2 * 2
    return diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        rope_axes_dim=(head_dim - 2 * side, side, side),
        image_embed_dim=IMAGE,
        **{"patch_size": 1, "in_channels": 9, "out_channels": 4, **options},
    )


def crossed(heads: int, head_dim: int) -> Any:
    """Blocks with text cross-attention beside self-attention, and patches."""
    options = {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True}
    return model(heads, head_dim, patch_size=2, **options)


def arguments(
    model: Any, grid: zoo.Grid, batch: int, image: bool = False, left: bool = False
) -> dict[str, Any]:
    frames, height, width = grid
    wide = model.config.patch_size
    mask = zoo.words(batch)
    return {
        "hidden_states": zoo.noise(batch, 9, frames, wide * height, wide * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_attention_mask": (mask.flip(1) if left else mask).bool(),
        "image_embeds": zoo.noise(batch, 5, IMAGE) if image else None,
    }


CASES = [
    zoo.Case("motif_video", model, arguments),
    zoo.Case("motif_video image", crossed, partial(arguments, image=True, left=True)),
]


def text_encoder() -> Any:
    """A tiny one, with the vision tower that embeds the image."""
    text = transformers.T5Gemma2TextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=tiny.VOCABULARY,
        max_position_embeddings=32,
        head_dim=8,
        dropout_rate=0.0,
        num_key_value_heads=2,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=IMAGE,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    config = transformers.T5Gemma2EncoderConfig(text_config=text, vision_config=vision)
    return tiny.seeded(lambda: transformers.T5Gemma2Encoder(config))


def pipeline(kind: Any, batch: int = 2, **components: Any) -> tuple[Any, dict[str, Any]]:
    transformer = model(2, 16, in_channels=33, out_channels=16)
    pipe = kind(
        transformer=zoo.lively(transformer),
        vae=tiny.vae(),
        scheduler=tiny.euler(),
        tokenizer=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
        **{"text_encoder": None, **components},
    )
    call = {
        **zoo.prompts(batch, WIDTH, mask="prompt_attention_mask"),
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": zoo.STEPS,
    }
    return pipe, call


def from_text() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.MotifVideoPipeline)


def from_image() -> tuple[Any, dict[str, Any]]:
    pipe, call = pipeline(
        diffusers.MotifVideoImage2VideoPipeline,
        batch=1,
        text_encoder=text_encoder(),
        feature_extractor=transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    )
    return pipe, {**call, "prompt": None, "image": tiny.still(32, 48)}


PIPELINES = {"motif_video": from_text, "motif_video image": from_image}
