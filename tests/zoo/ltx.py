"""LTX-Video: latents come packed; a timestep for each token; conditions before or behind."""

from typing import Any

import diffusers
import tiny
import torch
from diffusers import LTXI2VLongMultiPromptPipeline
from diffusers.pipelines.ltx import pipeline_ltx_i2v_long_multi_prompt as long
from diffusers.schedulers import LTXEulerAncestralRFScheduler

import zoo

SCALE = (8, 32, 32)


def model(heads: int, head_dim: int, layers: int = 2) -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=heads * head_dim,
        caption_channels=tiny.TEXT_WIDTH,
    )


def packed(batch: int, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": zoo.noise(batch, tokens, 8),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, tiny.TEXT_WIDTH),
        "encoder_attention_mask": zoo.words(batch),
    }


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    sizes = {"num_frames": frames, "height": height, "width": width}
    scale = (8 / 25, 32, 32)
    return {
        **packed(batch, frames * height * width),
        **sizes,
        "rope_interpolation_scale": scale,
    }


def token_times(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """The given first frame is at time 0."""
    given = arguments(model, grid, batch)
    frames, height, width = grid
    time = given["timestep"][:, None].repeat(1, frames * height * width)
    time[:, : height * width] = 0
    return {**given, "timestep": time}


def conditions(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """The first frame is given, and frames 8, 17 and 18 stand before the video."""
    frames, height, width = grid
    parts = [
        long.get_latent_coords(number, height, width, batch, "cpu", SCALE, 0)
        for number in (1, 2, frames)
    ]
    for part, first in zip(parts, (8, 17, 0), strict=True):
        part[:, 0] += first
    rows = torch.cat(parts, 2).float()
    rows[:, 0] /= 25
    given = packed(batch, rows.shape[2])
    time = given["timestep"][:, None].repeat(1, rows.shape[2])
    time[:, : 3 * height * width] = torch.linspace(0, 200, 3 * height * width)
    time[:, 3 * height * width : 4 * height * width] = 0
    return {**given, "timestep": time, "video_coords": rows}


def long_video(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """Two frames of the window before, one of a guide and a reference stand behind the video."""
    frames, height, width = grid
    latents = zoo.noise(1, 8, frames + 4, height, width)
    rows = long.build_video_coords_for_window(latents, 2, 1, 1, SCALE, 25)
    given = packed(batch, rows.shape[2])
    mask = torch.linspace(0, 1, rows.shape[2])[None, :, None]
    sizes = dict.fromkeys(("num_frames", "height", "width"), 1)
    return {**given, **sizes, "timestep": zoo.times(batch)[:, None, None] * mask} | {
        "video_coords": rows
    }


def pipeline(cls: Any, scheduler: Any = None) -> Any:
    """Latents are 4 times smaller in time, height and width than the video."""
    scaled = (True, True, False, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=scaled,
        decoder_spatio_temporal_scaling=scaled,
        patch_size=1,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return cls(
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=tiny.text_encoder("T5"),
        tokenizer=tiny.tokenizer(),
        transformer=tiny.seeded(lambda: model(2, 32)),
    )


def call(**more: Any) -> dict[str, Any]:
    return tiny.arguments(32, 32, **more)


def t2v() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.LTXPipeline), call()


def i2v() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.LTXImageToVideoPipeline), call(image=tiny.still(32, 32))


def condition() -> tuple[Any, dict[str, Any]]:
    """The first frame and one in the middle are given."""
    images = [tiny.still(32, 32), tiny.still(32, 32).rotate(90)]
    return pipeline(diffusers.LTXConditionPipeline), call(
        image=images, video=[None, None], frame_index=[0, 4], strength=[1.0, 0.8]
    )


def long_multi_prompt() -> tuple[Any, dict[str, Any]]:
    """Two windows of three frames with one in common; the last of the steps is not run."""
    return pipeline(LTXI2VLongMultiPromptPipeline, LTXEulerAncestralRFScheduler()), call(
        num_frames=17,
        num_inference_steps=tiny.STEPS + 1,
        temporal_tile_size=12,
        temporal_overlap=4,
        cond_image=tiny.still(32, 32),
    )


CASES = [
    zoo.Case("ltx", model, arguments, controls=("hidden_states", "output of rope")),
    zoo.Case("ltx token times", model, token_times),
    zoo.Case("ltx conditions", model, conditions),
    zoo.Case("ltx long video", model, long_video),
]
PIPELINES: zoo.Pipelines = {
    "ltx": t2v,
    "ltx i2v": i2v,
    "ltx condition": condition,
}
