"""EasyAnimate: joint blocks with weights for the text, and without; control and inpainting."""

from functools import partial
from typing import Any

import diffusers
import tiny
import torch

import zoo

WIDTH = 24


def model(heads: int, head_dim: int, channels: int = 4) -> Any:
    """channels: of the latents and all that is given with them. A mask is encoded as a video."""
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        mmdit_layers=1,
        in_channels=channels,
        out_channels=4,
        patch_size=2,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        resize_inpaint_mask_directly=False,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
    }


def control(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    given = arguments(model, grid, batch)
    return {**given, "control_latents": zoo.noise(*given["hidden_states"].shape, seed=4)}


def pipeline(cls: Any, channels: int, **call: Any) -> tuple[Any, dict[str, Any]]:
    vae = tiny.seeded(
        lambda: diffusers.AutoencoderKLMagvit(
            block_out_channels=(8,) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        )
    )
    pipe = cls(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=tiny.seeded(lambda: model(2, 32, channels)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    text = {
        f"{negative}prompt_{part}": value
        for negative, seed in (("", 1), ("negative_", 2))
        for part, value in (
            ("embeds", zoo.noise(1, 8, WIDTH, seed=seed)),
            ("attention_mask", torch.ones(1, 8)),
        )
    }
    size = {"height": 64, "width": 96, "num_frames": 9}
    return pipe, {**text, **size, "guidance_scale": 3.0, "num_inference_steps": zoo.STEPS, **call}


def video() -> torch.Tensor:
    return zoo.noise(1, 3, 9, 64, 96).sigmoid()


def t2v() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.EasyAnimatePipeline, 4)


def inpaint() -> tuple[Any, dict[str, Any]]:
    """Channels of the latents, of the mask and of the video around it."""
    mask = 255.0 * (video()[:, :1] > 0.5)
    return pipeline(diffusers.EasyAnimateInpaintPipeline, 12, video=video(), mask_video=mask)


CASES = [
    zoo.Case("easyanimate", model, arguments),
    zoo.Case("easyanimate control", partial(model, channels=8), control, head_dims=(64,)),
]
PIPELINES: zoo.Pipelines = {
    "easyanimate": t2v,
    "easyanimate inpaint": inpaint,
}
