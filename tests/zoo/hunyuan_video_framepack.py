"""HunyuanVideo Framepack: a history of three sizes before the video, image and text behind it."""

from typing import Any

import diffusers
import tiny
import torch
import transformers

import zoo
from zoo import hunyuan_video

WIDTH, IMAGE = hunyuan_video.WIDTH, 8


def model(heads: int, head_dim: int) -> Any:
    side = head_dim // 3 // 2 * 2
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        in_channels=4,
        out_channels=4,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(head_dim - 2 * side, side, side),
        has_image_proj=True,
        image_proj_dim=IMAGE,
        has_clean_x_embedder=True,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    size = (2 * height, 2 * width)
    indices = torch.arange(12)
    return {
        "hidden_states": zoo.noise(batch, 4, frames, *size),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_attention_mask": zoo.words(batch).float(),
        "pooled_projections": zoo.noise(batch, 8),
        "image_embeds": zoo.noise(batch, 5, IMAGE),
        "guidance": 1000 * zoo.times(batch),
        "indices_latents": indices[1 : 1 + frames],
        "latents_clean": zoo.noise(batch, 4, 2, *size, seed=4),
        "indices_latents_clean": indices[[0, 4]],
        "latents_history_2x": zoo.noise(batch, 4, 2, *size, seed=5),
        "indices_latents_history_2x": indices[5:7],
        "latents_history_4x": zoo.noise(batch, 4, 4, *size, seed=6),
        "indices_latents_history_4x": indices[7:11],
    }


CASES = [zoo.Case("hunyuan_video_framepack", model, arguments)]


def from_image() -> tuple[Any, dict[str, Any]]:
    """In two sections."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=IMAGE,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    features = transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8})
    return hunyuan_video.pipeline(
        diffusers.HunyuanVideoFramepackPipeline,
        model(2, 16),
        {
            "image_encoder": tiny.seeded(lambda: transformers.SiglipVisionModel(vision)),
            "feature_extractor": features,
        },
        batch=1,
        image=tiny.still(64, 96),
        latent_window_size=3,
        num_frames=10,
    )


PIPELINES = {"hunyuan_video_framepack": from_image}
