"""HunyuanVideo: joint blocks with padded text behind the video; the first frame apart."""

from functools import partial
from typing import Any

import diffusers
import tiny

import zoo

WIDTH = 16


def model(heads: int, head_dim: int, **options: Any) -> Any:
    side = head_dim // 3 // 2 * 2
    return diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        out_channels=4,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(head_dim - 2 * side, side, side),
        **{"in_channels": 4, **options},
    )


def token_replace(heads: int, head_dim: int) -> Any:
    return model(heads, head_dim, image_condition_type="token_replace")


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, model.config.in_channels, frames, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_attention_mask": zoo.words(batch).float(),
        "pooled_projections": zoo.noise(batch, 8),
        "guidance": 1000 * zoo.times(batch),
    }


CASES = [
    zoo.Case("hunyuan_video", model, arguments),
    zoo.Case("hunyuan_video token_replace", token_replace, arguments, cuts=True),
]


def vae() -> Any:
    return tiny.seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2
        )
    )


PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def pipeline(
    kind: Any, model: Any, components: dict[str, Any] | None = None, batch: int = 2, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """A pipeline of a class with the arguments of its call; prompts are given as embeddings."""
    pipe = kind(
        transformer=zoo.lively(model),
        vae=vae(),
        scheduler=tiny.euler(),
        **dict.fromkeys(PARTS),
        **(components or {}),
    )
    call = {
        **zoo.prompts(batch, WIDTH, mask="prompt_attention_mask"),
        "pooled_prompt_embeds": zoo.noise(batch, 8, seed=5),
        "negative_pooled_prompt_embeds": zoo.noise(batch, 8, seed=6),
        "true_cfg_scale": 2.0,
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "num_inference_steps": zoo.STEPS,
        **more,
    }
    return pipe, call


def from_text() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.HunyuanVideoPipeline, model(2, 16))


def from_image(kind: str, channels: int) -> tuple[Any, dict[str, Any]]:
    transformer = model(2, 16, image_condition_type=kind, in_channels=channels)
    return pipeline(
        diffusers.HunyuanVideoImageToVideoPipeline,
        transformer,
        {"image_processor": None},
        batch=1,
        image=tiny.still(64, 96),
    )


def skyreels() -> tuple[Any, dict[str, Any]]:
    transformer = model(2, 16, in_channels=8)
    kind = diffusers.HunyuanSkyreelsImageToVideoPipeline
    return pipeline(kind, transformer, batch=1, image=tiny.still(64, 96))


PIPELINES = {
    "hunyuan_video": from_text,
    "hunyuan_video token_replace": partial(from_image, "token_replace", 4),
    "hunyuan_video latent_concat": partial(from_image, "latent_concat", 9),
    "hunyuan_video skyreels": skyreels,
}
