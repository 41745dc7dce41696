"""MiniMax-H3: text, frames or references to video with sound, in the rows that diffusers packs."""

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.minimax_h3 import before_denoise, modular_blocks_minimax_h3

import zoo

WIDTH = 16
SOUND = 5
"""Sound latents of each of two channels."""


def model(heads: int = 2, head_dim: int = 16) -> Any:
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        text_dim=WIDTH,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=head_dim // 6,
    )


def rows(model: Any, layout: tuple[Any, ...], batch: int) -> dict[str, Any]:
    """Arguments of a forward over rows that are packed so."""
    positions, tags, video, sound, text, given_video, given_sound = layout
    steps = before_denoise.MiniMaxH3SetTimestepsStep
    timestep, indices = steps.build_row_timesteps(
        video, sound, given_video, given_sound, len(text), 0.3, 0.6, 0.999, 1.0
    )
    return {
        "hidden_states": zoo.noise(batch, len(video), 4 * model.config.in_channels),
        "audio_hidden_states": zoo.noise(batch, len(sound), model.config.audio_in_channels),
        "encoder_hidden_states": zoo.noise(batch, len(text), WIDTH),
        "timestep": timestep,
        "timestep_indices": indices,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
    }


def facts(grid: zoo.Grid) -> tuple[Any, ...]:
    """What every layout is made for: sizes, patch, channels of sound, tags of sound and video."""
    frames, height, width = grid
    return frames, 2 * height, 2 * width, SOUND, (1, 2, 2), 2, 2, 0


def frames(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """The first and the last are given."""
    build = before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence
    tags = torch.ones(zoo.TEXT, dtype=torch.long)
    return rows(model, build(tags, *facts(grid), ("first", "last")), batch)


def references(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """A video with sound, and an image."""
    given = [SimpleNamespace(kind="video", has_audio=True), SimpleNamespace(kind="image")]
    latents = [torch.zeros(1, 24, 2, 4, 6), torch.zeros(1, 24, 1, 8, 4)]
    build = before_denoise.MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence
    tags = torch.ones(zoo.TEXT, dtype=torch.long)
    sound = [torch.zeros(2 * SOUND, 32)]
    return rows(model, build(tags, given, latents, sound, *facts(grid)), batch)


def each_row(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """Rows of the video with noise levels and kinds of their own, as a forward may have them."""
    given = frames(model, grid, batch)
    count = len(given["token_tags"])
    given["timestep_indices"] = torch.arange(count) % len(given["timestep"])
    given["token_tags"] = torch.arange(count) // 2 % 3
    return given


def pipeline() -> Any:
    """From embedded text to latents: the parts around that know nothing of the transformer."""
    torch.manual_seed(0)
    pipe = modular_blocks_minimax_h3.MiniMaxH3CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=zoo.lively(model()),
        scheduler=diffusers.MiniMaxH3Scheduler(),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    return pipe, {
        "prompt_embeds": zoo.noise(1, zoo.TEXT, WIDTH),
        "text_token_tags": torch.ones(zoo.TEXT, dtype=torch.long),
        "height": 64,
        "width": 96,
        "num_frames": 124,
        "num_inference_steps": zoo.STEPS,
        "output": "latents",
    }


VIDEO = ("input of transformer_blocks.0", "output of rope")
CASES = [
    zoo.Case("minimax_h3 frames", model, frames, controls=VIDEO),
    zoo.Case("minimax_h3 references", model, references, controls=VIDEO),
    zoo.Case("minimax_h3 each row", model, each_row),
]
PIPELINES: zoo.Pipelines = {"minimax_h3": pipeline}
