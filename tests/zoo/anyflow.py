"""AnyFlow: a timestep for each frame, all alike or, where frames are given, not."""

from functools import partial
from typing import Any

import diffusers
import tiny
import torch

import zoo


def model(heads: int = 2, head_dim: int = 16) -> Any:
    return zoo.lively(
        diffusers.AnyFlowTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=2,
            text_dim=tiny.TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=64,
            rope_max_seq_len=32,
        )
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    moments = torch.linspace(0, 900, batch * frames).view(batch, frames)
    return {
        "hidden_states": zoo.noise(batch, frames, 16, 2 * height, 2 * width),
        "timestep": moments,
        "r_timestep": moments / 2,
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, tiny.TEXT_WIDTH),
    }


def pipeline(**more: Any) -> Any:
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    torch.manual_seed(0)
    pipe = diffusers.AnyFlowPipeline(transformer=model(), **tiny.parts(scheduler))
    return pipe, tiny.arguments(**more)


CASES = [zoo.Case("anyflow", model, arguments)]
PIPELINES: zoo.Pipelines = {
    "anyflow": pipeline,
    "anyflow frames": partial(pipeline, video_latents=zoo.noise(1, 1, 16, 8, 12)),
}
