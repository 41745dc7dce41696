"""Mochi: a sequence for each sample, as long as its text."""

from typing import Any

import diffusers
import tiny

import zoo


def model(heads: int, head_dim: int) -> Any:
    """`lively` gives the frequencies of positions, which start at zero, values."""
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        pooled_projection_dim=8,
        text_embed_dim=tiny.TEXT_WIDTH,
        time_embed_dim=8,
        max_sequence_length=zoo.TEXT,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, 12, frames, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, tiny.TEXT_WIDTH),
        "encoder_attention_mask": zoo.words(batch).bool(),
    }


def t2v() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=tiny.text_encoder("T5"),
        tokenizer=tiny.tokenizer(),
        transformer=zoo.lively(tiny.seeded(lambda: model(2, 32))),
    )
    return pipe, tiny.arguments(num_frames=13)


CASES = [zoo.Case("mochi", model, arguments)]
PIPELINES: zoo.Pipelines = {"mochi": t2v}
