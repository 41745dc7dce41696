"""Cosmos: learned positions, hidden states of a control network, a timestep for each frame."""

from functools import partial
from typing import Any

import diffusers
import tiny
import torch

import zoo


def model(heads: int, head_dim: int, **options: Any) -> Any:
    settings = {
        "extra_pos_embed_type": None,
        "in_channels": 4,
        "out_channels": 4,
        "concat_padding_mask": False,
        **options,
    }
    return diffusers.CosmosTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=tiny.TEXT_WIDTH,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        patch_size=(1, 2, 2),
        **settings,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": zoo.times(batch) / 1000,
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, tiny.TEXT_WIDTH),
        "fps": 24,
    }


def frame_times(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    times = torch.linspace(0, 1, grid[0])[None, None, :, None, None].repeat(batch, 1, 1, 1, 1)
    return {**arguments(model, grid, batch), "timestep": times}


def controlled(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """Of Cosmos 2.5: text and image."""
    given = arguments(model, grid, batch)
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    frames, height, width = grid
    return {
        **given,
        "encoder_hidden_states": (given["encoder_hidden_states"], zoo.noise(batch, 4, 8)),
        "block_controlnet_hidden_states": [zoo.noise(batch, frames * height * width, inner)],
    }


def with_image(heads: int, head_dim: int, **options: Any) -> Any:
    return model(
        heads,
        head_dim,
        **options,
        img_context_dim_in=8,
        img_context_num_tokens=4,
        img_context_dim_out=heads * head_dim,
        controlnet_block_every_n=2,
    )


class Unwatched(torch.nn.Module):
    """In place of the guard, which comes from the hub."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def parts() -> dict[str, Any]:
    """Of Cosmos 1, but the transformer. A step is a ratio of noise levels, which fall to 0.002."""
    vae = tiny.seeded(
        lambda: diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8,) * 4,
            decode_block_out_channels=(8,) * 4,
            attention_resolutions=(8,),
            resolution=64,
            num_layers=2,
            patch_size=4,
            scaling_factor=1.0,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        )
    )
    return {
        "text_encoder": tiny.text_encoder("T5"),
        "tokenizer": tiny.tokenizer(),
        "vae": vae,
        "scheduler": diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        "safety_checker": Unwatched(),
    }


def t2w() -> tuple[Any, dict[str, Any]]:
    transformer = tiny.seeded(lambda: model(2, 32, extra_pos_embed_type="learnable"))
    return diffusers.CosmosTextToWorldPipeline(transformer=transformer, **parts()), tiny.arguments(
        32, 48
    )


def v2w() -> tuple[Any, dict[str, Any]]:
    transformer = tiny.seeded(lambda: model(2, 32, in_channels=5, extra_pos_embed_type="learnable"))
    pipe = diffusers.CosmosVideoToWorldPipeline(transformer=transformer, **parts())
    return pipe, tiny.arguments(32, 48, image=tiny.still(32, 48))


def second(kind: str, given: int = 1, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Cosmos 2. given: further channels, that tell the frames of the image."""
    transformer = tiny.seeded(lambda: model(2, 32, in_channels=16 + given, out_channels=16))
    pipe = getattr(diffusers, f"Cosmos2{kind}Pipeline")(
        transformer=transformer,
        vae=tiny.vae(),
        text_encoder=tiny.text_encoder("T5"),
        tokenizer=tiny.tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Unwatched(),
    )
    return pipe, tiny.arguments(**more)


def image() -> tuple[Any, dict[str, Any]]:
    pipe, call = second("TextToImage", 0)
    del call["num_frames"]
    return pipe, call


class Controls(torch.nn.Module):
    """In place of the control network, which resizes by torchvision."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, latents: torch.Tensor, **rest: Any) -> tuple[list[torch.Tensor]]:
        batch, _, frames, height, width = latents.shape
        return ([zoo.noise(batch, frames * height * width // 4, 2 * 32)],)


def latest(name: str = "PredictBase", **more: Any) -> tuple[Any, dict[str, Any]]:
    """Cosmos 2.5: with a timestep for each frame. Prompts are given as embeddings."""
    transfer = name == "Transfer"
    make = with_image if transfer else model
    channels = {"in_channels": 17, "out_channels": 16}
    pipe = getattr(diffusers, f"Cosmos2_5_{name}Pipeline")(
        transformer=tiny.seeded(lambda: make(2, 32, **channels)),
        vae=tiny.vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.UniPCMultistepScheduler(),
        safety_checker=Unwatched(),
        **({"controlnet": Controls()} if transfer else {}),
    )
    call = tiny.arguments(**more)
    del call["prompt"], call["negative_prompt"]
    text = {
        "prompt_embeds": zoo.noise(1, 8, tiny.TEXT_WIDTH, seed=1),
        "negative_prompt_embeds": zoo.noise(1, 8, tiny.TEXT_WIDTH, seed=2),
    }
    return pipe, {**call, **text}


VIDEO = ("output of patch_embed", "output of rope")
CASES = [
    zoo.Case(
        "cosmos",
        partial(model, extra_pos_embed_type="learnable"),
        arguments,
        controls=(*VIDEO, "output of learnable_pos_embed"),
    ),
    zoo.Case("cosmos frame times", model, frame_times, head_dims=(64,), controls=VIDEO, cuts=True),
    zoo.Case(
        "cosmos control",
        with_image,
        controlled,
        head_dims=(64,),
        controls=(*VIDEO, "block_controlnet_hidden_states"),
    ),
]
PIPELINES: zoo.Pipelines = {
    "cosmos": t2w,
    "cosmos image": v2w,
    "cosmos 2 text to image": image,
    "cosmos 2 image": partial(second, "VideoToWorld", image=tiny.still(64, 96)),
    "cosmos 2.5": latest,
    "cosmos 2.5 video": partial(latest, video=[tiny.still(64, 96)] * 9),
    "cosmos 2.5 transfer": partial(
        latest, "Transfer", controls=[tiny.still(64, 96)] * 9, num_frames_per_chunk=9
    ),
}
