"""Kandinsky 6: video with and without sound, and with a reference image as a further frame."""

from functools import partial
from typing import Any

import diffusers
import tiny
import torch

import zoo
from zoo import kandinsky5

WIDTH, POOLED, SOUND = kandinsky5.WIDTH, kandinsky5.POOLED, 10


def model(heads: int, head_dim: int, channels: int = 4) -> Any:
    """With the settings of the released checkpoints."""
    return diffusers.Kandinsky6Transformer3DModel(
        **kandinsky5.settings(heads, head_dim, channels),
        in_audio_dim=4,
        out_audio_dim=4,
        ff_dim_a=64,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )


def silent(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, frames, 2 * height, 2 * width, 9),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "pooled_projections": zoo.noise(batch, POOLED),
        "timestep": zoo.times(batch),
        "encoder_attention_mask": zoo.words(batch).bool()[:, None, None],
    }


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    sound = zoo.noise(batch, SOUND, 4, seed=4)
    return {**silent(model, grid, batch), "audio_hidden_states": sound}


def image(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """The last frame is the reference, at the position of the first."""
    frames, height, width = grid
    last = torch.arange(frames) == frames - 1
    times = torch.arange(frames).masked_fill(last, 0)
    return {
        **arguments(model, grid, batch),
        "visual_rope_pos": (times, torch.arange(height), torch.arange(width)),
        "visual_token_type_ids": last.long().expand(batch, -1),
    }


def pipeline(**more: Any) -> tuple[Any, dict[str, Any]]:
    """Latents of 16 channels, 8 times smaller in height and width than the video."""
    pipe = diffusers.Kandinsky6TI2VAPipeline(
        transformer=zoo.lively(tiny.seeded(lambda: model(2, 32, 16))),
        vae=kandinsky5.vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    text = {
        "prompt_embeds": zoo.noise(1, 8, WIDTH, seed=1),
        "pooled_prompt_embeds": zoo.noise(1, POOLED, seed=1),
        "negative_prompt_embeds": zoo.noise(1, 8, WIDTH, seed=2),
        "negative_pooled_prompt_embeds": zoo.noise(1, POOLED, seed=2),
    }
    size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": zoo.STEPS}
    return pipe, {**text, **size, "guidance_scale": 3.0, "sample_audio": False, **more}


CASES = [
    zoo.Case("kandinsky6", model, arguments),
    zoo.Case("kandinsky6 silent", model, silent),
    zoo.Case("kandinsky6 image", model, image),
]
PIPELINES: zoo.Pipelines = {
    "kandinsky6": pipeline,
    "kandinsky6 image": partial(pipeline, image=tiny.still(64, 96)),
}
