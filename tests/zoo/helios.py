"""Helios: with a history, and without; pieces of a video, also in a pyramid of sizes."""

from typing import Any

import diffusers
import tiny
import torch
from diffusers.modular_pipelines.helios import HeliosAutoBlocks

import zoo
from zoo import wan

HISTORY = {"short": 2, "mid": 2, "long": 5}
"""Latent frames of each part."""


def model(heads: int = 2, head_dim: int = 16, **options: Any) -> Any:
    side = head_dim // 3 // 2 * 2
    return tiny.transformer(
        heads=heads,
        head_dim=head_dim,
        kind=diffusers.HeliosTransformer3DModel,
        rope_max_seq_len=None,
        rope_dim=(head_dim - 2 * side, side, side),
        **options,
    )


def amplified(heads: int, head_dim: int) -> Any:
    return model(heads, head_dim, is_amplify_history=True)


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    given, first = wan.arguments(model, grid, batch), 0
    for seed, name in enumerate(reversed(HISTORY)):
        part = HISTORY[name]
        latents = zoo.noise(batch, 16, part, 2 * height, 2 * width, seed=seed)
        given[f"latents_history_{name}"] = latents
        indices = torch.arange(first, first + part)
        given[f"indices_latents_history_{name}"] = indices.expand(batch, -1)
        first += part
    given["indices_hidden_states"] = torch.arange(first, first + frames).expand(batch, -1)
    return given


def pieces() -> Any:
    """Two of them."""
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    pipe = diffusers.HeliosPipeline(transformer=zoo.lively(model()), **tiny.parts(scheduler))
    more = {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3}
    return pipe, {**tiny.arguments(**more), "num_frames": 18}


def modular() -> Any:
    """One piece."""
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    pipe = HeliosAutoBlocks().init_pipeline()
    pipe.update_components(transformer=zoo.lively(model()), **tiny.parts(scheduler))
    more = {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3}
    call = tiny.arguments(output="latents", output_type="pt", **more)
    del call["guidance_scale"]
    return pipe, call


def pyramid() -> Any:
    """Two sizes."""
    scheduler = diffusers.HeliosScheduler(
        stage_range=[0, 1 / 2, 1], stages=2, gamma=0.25, use_dynamic_shifting=True
    )
    pipe = diffusers.HeliosPyramidPipeline(transformer=zoo.lively(model()), **tiny.parts(scheduler))
    call = tiny.arguments(
        64,
        128,
        history_sizes=[4, 2, 1],
        num_latent_frames_per_chunk=3,
        pyramid_num_inference_steps_list=[2, 4],
    )
    del call["num_inference_steps"]
    return pipe, call


CASES = [
    zoo.Case("helios", model, arguments),
    zoo.Case("helios without history", model, wan.arguments),
    zoo.Case("helios amplified", amplified, arguments, grids=((3, 5, 7),)),
]
PIPELINES: zoo.Pipelines = {"helios": pieces, "helios pyramid": pyramid, "helios modular": modular}
