"""Wan VACE: control blocks beside those of the video, one or two transformers, modular too."""

from typing import Any

import diffusers
import tiny
import torch
from diffusers.modular_pipelines.wan import Wan22VaceBlocks

import zoo
from zoo import wan


def model(heads: int = 2, head_dim: int = 16, seed: int = 0) -> Any:
    return tiny.transformer(
        seed,
        heads,
        head_dim,
        kind=diffusers.WanVACETransformer3DModel,
        vace_layers=[0, 1],
        vace_in_channels=96,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        **wan.arguments(model, grid, batch),
        "control_hidden_states": zoo.noise(batch, 96, frames, 2 * height, 2 * width, seed=4),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def edited(frames: int = 9, **more: Any) -> dict[str, Any]:
    """A call with a video, and a mask of what of it shall change."""
    video = [tiny.still(64, 96)] * frames
    return tiny.arguments(video=video, mask=[tiny.still(64, 96).convert("L")] * frames, **more)


def one() -> Any:
    pipe = diffusers.WanVACEPipeline(transformer=zoo.lively(model()), **tiny.parts(tiny.unipc()))
    return pipe, edited()


def two() -> Any:
    """The reference image is a frame more."""
    pipe = diffusers.WanVACEPipeline(
        transformer=zoo.lively(model()),
        transformer_2=zoo.lively(model(seed=1)),
        boundary_ratio=0.875,
        **tiny.parts(tiny.unipc()),
    )
    return pipe, edited(reference_images=[tiny.still(64, 96)])


def modular() -> Any:
    pipe = Wan22VaceBlocks().init_pipeline()
    pipe.update_components(
        transformer=zoo.lively(model()),
        transformer_2=zoo.lively(model(seed=1)),
        **tiny.parts(tiny.unipc()),
    )
    call = edited(output="latents", output_type="pt")
    del call["guidance_scale"]
    return pipe, call


CASES = [zoo.Case("wan_vace", model, arguments)]
PIPELINES: zoo.Pipelines = {"wan_vace": one, "wan_vace two": two, "wan_vace modular": modular}
