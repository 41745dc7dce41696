"""HunyuanVideo: joint blocks with padded text behind the video; the first frame apart."""

from typing import Any

import diffusers

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
        in_channels=4,
        out_channels=4,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(head_dim - 2 * side, side, side),
        **options,
    )


def token_replace(heads: int, head_dim: int) -> Any:
    return model(heads, head_dim, image_condition_type="token_replace")


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_attention_mask": zoo.words(batch),
        "pooled_projections": zoo.noise(batch, 8),
        "guidance": 1000 * zoo.times(batch),
    }


CASES = [
    zoo.Case("hunyuan_video", model, arguments),
    zoo.Case("hunyuan_video token_replace", token_replace, arguments),
]
PIPELINES: zoo.Pipelines = {}
