"""Kandinsky 5: the video keeps its axes outside of the blocks."""

from functools import partial
from typing import Any

import diffusers
import tiny
import torch

import zoo

WIDTH, POOLED = 32, 16


def settings(heads: int, head_dim: int, channels: int) -> dict[str, Any]:
    """Of a small transformer, of this version or the next."""
    side = head_dim // 3 // 2 * 2
    return {
        "in_visual_dim": channels,
        "out_visual_dim": channels,
        "in_text_dim": WIDTH,
        "in_text_dim2": POOLED,
        "time_dim": 16,
        "model_dim": heads * head_dim,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (head_dim - 2 * side, side, side),
    }


def model(heads: int, head_dim: int, channels: int = 4, given: bool = False) -> Any:
    """given: further channels for an image, and for where it is."""
    return diffusers.Kandinsky5Transformer3DModel(
        **settings(heads, head_dim, channels), visual_cond=given
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, frames, 2 * height, 2 * width, 4),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "pooled_projections": zoo.noise(batch, POOLED),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(zoo.TEXT),
    }


def vae() -> Any:
    return tiny.seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        )
    )


def image_vae() -> Any:
    return tiny.seeded(
        lambda: diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=16,
            norm_num_groups=1,
        )
    )


def pipeline(kind: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Latents of 16 channels, 8 times smaller in height and width than the video."""
    width, height = tiny.still(64, 96).size
    pipe = getattr(diffusers, f"Kandinsky5{kind}Pipeline")(
        transformer=zoo.lively(tiny.seeded(lambda: model(2, 32, 16, kind.startswith("I2")))),
        vae=image_vae() if kind.endswith("I") else vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    if kind.endswith("I"):
        pipe.resolutions = [(width, height)]
    text = {
        f"{negative}prompt_{part}": value
        for negative, seed in (("", 1), ("negative_", 2))
        for part, value in (
            ("embeds_qwen", zoo.noise(1, 8, WIDTH, seed=seed)),
            ("embeds_clip", zoo.noise(1, POOLED, seed=seed)),
            ("cu_seqlens", torch.tensor([0, 8])),
        )
    }
    size = {"height": height, "width": width, "num_inference_steps": zoo.STEPS}
    return pipe, {**text, **size, "guidance_scale": 3.0, **more}


CASES = [
    # It rounds queries and keys to bfloat16, some of them the other way after another sum.
    zoo.Case("kandinsky5", model, arguments, rounding=2e-4)
]
PIPELINES: zoo.Pipelines = {
    "kandinsky5": partial(pipeline, "T2V", num_frames=9),
    "kandinsky5 image": partial(pipeline, "I2V", num_frames=21, image=tiny.still(64, 96)),
    "kandinsky5 text to image": partial(pipeline, "T2I"),
    "kandinsky5 image to image": partial(pipeline, "I2I", image=tiny.still(64, 96)),
}
