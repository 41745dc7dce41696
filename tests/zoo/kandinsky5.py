"""Kandinsky 5: the video keeps its axes outside of the blocks."""

from typing import Any

import diffusers
import tiny
import torch

import zoo

WIDTH, POOLED = 32, 16


def model(heads: int, head_dim: int, channels: int = 4) -> Any:
    side = head_dim // 3 // 2 * 2
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=channels,
        out_visual_dim=channels,
        in_text_dim=WIDTH,
        in_text_dim2=POOLED,
        time_dim=16,
        model_dim=heads * head_dim,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(head_dim - 2 * side, side, side),
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


def t2v() -> tuple[Any, dict[str, Any]]:
    """Latents of 16 channels, 8 times smaller in height and width than the video."""
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=zoo.lively(tiny.seeded(lambda: model(2, 32, 16))),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    text = {
        f"{negative}prompt_{part}": value
        for negative, seed in (("", 1), ("negative_", 2))
        for part, value in (
            ("embeds_qwen", zoo.noise(1, 8, WIDTH, seed=seed)),
            ("embeds_clip", zoo.noise(1, POOLED, seed=seed)),
            ("cu_seqlens", torch.tensor([0, 8])),
        )
    }
    size = {"height": 64, "width": 96, "num_frames": 9}
    return pipe, {**text, **size, "guidance_scale": 3.0, "num_inference_steps": zoo.STEPS}


CASES = [
    # It rounds queries and keys to bfloat16, some of them the other way after another sum.
    zoo.Case("kandinsky5", model, arguments, rounding=2e-4)
]
PIPELINES: zoo.Pipelines = {"kandinsky5": t2v}
