"""Qwen-Image: padded text before an image, images to edit behind it, layers."""

from functools import partial
from typing import Any

import diffusers
import tiny

import zoo
from zoo.flux import IMAGES

WIDTH = 16


def model(heads: int, head_dim: int, **options: Any) -> Any:
    side = head_dim // 3 // 2 * 2
    return diffusers.QwenImageTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(head_dim - 2 * side, side, side),
        **{"in_channels": 4, "out_channels": 1, **options},
    )


def layered(heads: int, head_dim: int, **options: Any) -> Any:
    return model(heads, head_dim, use_layer3d_rope=True, **options)


def apart(heads: int, head_dim: int, **options: Any) -> Any:
    """Images to edit, or all layers but the first, are modulated as for timestep 0."""
    return model(heads, head_dim, zero_cond_t=True, **options)


GIVEN = (1, 5, 7)


def arguments(
    model: Any, grid: zoo.Grid, batch: int, given: int = 0, left: bool = False
) -> dict[str, Any]:
    """given: number of images behind the generated one, or behind all its layers."""
    frames, height, width = grid
    shapes = [(1, height, width)] * frames + [GIVEN] * given
    mask = zoo.words(batch)
    return {
        "hidden_states": zoo.noise(batch, sum(h * w for _, h, w in shapes), 4),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_hidden_states_mask": (mask.flip(1) if left else mask).bool(),
        "timestep": zoo.times(batch) / 1000,
        "img_shapes": [shapes] * batch,
    }


def controlled(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    tokens, width = grid[1] * grid[2], model.inner_dim
    residual = zoo.noise(batch, tokens, width, seed=4)
    return {**arguments(model, grid, batch), "controlnet_block_samples": [residual]}


ALONE = ("hidden_states", "output of pos_embed")
image = partial(zoo.Case, grids=IMAGES, controls=ALONE)
CASES = [
    image("qwen_image", model, arguments),
    image("qwen_image edit", apart, partial(arguments, given=2, left=True)),
    zoo.Case("qwen_image layered", layered, partial(arguments, given=1), controls=ALONE),
    zoo.Case(
        "qwen_image layered apart",
        partial(apart, use_layer3d_rope=True),
        partial(arguments, given=1),
        cuts=True,
        controls=ALONE,
    ),
    zoo.Case("qwen_image controlnet", model, controlled, grids=IMAGES),
]


def vae(halvings: int, channels: int) -> Any:
    """With a channel more than the image has: pipelines tell images and latents apart by that."""
    latent = channels + 1
    return tiny.seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=2,
            z_dim=latent,
            input_channels=channels,
            dim_mult=[1] * (halvings + 1),
            num_res_blocks=0,
            temperal_downsample=[False] * halvings,
            latents_mean=[0.0] * latent,
            latents_std=[1.0] * latent,
        )
    )


def pipeline(
    kind: Any, batch: int = 2, halvings: int = 3, channels: int = 3, made: Any = model, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """channels: of the image. made: the kind of transformer."""
    pipe = kind(
        transformer=zoo.lively(
            made(2, 16, in_channels=4 * channels + 4, out_channels=channels + 1)
        ),
        vae=vae(halvings, channels),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        **more.pop("components", {}),
    )
    call = {
        **zoo.prompts(batch, WIDTH, mask="prompt_embeds_mask"),
        "true_cfg_scale": 2.0,
        "height": 160,
        "width": 160,
        "num_inference_steps": zoo.STEPS,
        **more,
    }
    return pipe, call


def from_text() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.QwenImagePipeline)


def edited(kind: Any, image: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline makes a million pixels of a given image, so the VAE has to be deep."""
    size, parts = {"height": 1280, "width": 1280}, {"processor": None}
    return pipeline(kind, components=parts, batch=1, halvings=6, image=image, **size)


def controlnet(more_channels: int = 0) -> Any:
    """With a residual for each block."""
    net = tiny.seeded(
        lambda: diffusers.QwenImageControlNetModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            extra_condition_channels=more_channels,
        )
    )
    return zoo.lively(net)


def guided(kind: str, more_channels: int, *images: str) -> tuple[Any, dict[str, Any]]:
    """By a ControlNet, which gets a mask in further channels."""
    given = {name: tiny.still(160, 160) for name in images}
    parts = {"controlnet": controlnet(more_channels)}
    cls = getattr(diffusers, f"QwenImage{kind}Pipeline")
    return pipeline(cls, components=parts, batch=1, **given)


def redrawn(kind: str, *images: str) -> tuple[Any, dict[str, Any]]:
    """Three of four steps."""
    given = {name: tiny.still(160, 160) for name in images}
    return pipeline(getattr(diffusers, f"QwenImage{kind}Pipeline"), batch=1, strength=0.8, **given)


def edited_in_part() -> tuple[Any, dict[str, Any]]:
    pipe, call = edited(diffusers.QwenImageEditInpaintPipeline, tiny.still(64, 64))
    return pipe, {**call, "mask_image": tiny.still(64, 64), "strength": 0.8}


def taken_apart() -> tuple[Any, dict[str, Any]]:
    """The VAE has an opacity channel, and is deep, as the pipeline makes 640 pixels of the side."""
    pipe, call = pipeline(
        diffusers.QwenImageLayeredPipeline,
        batch=1,
        made=layered,
        channels=4,
        halvings=5,
        components={"processor": None},
        image=tiny.still(64, 64).convert("RGBA"),
        layers=2,
    )
    pipe.register_modules(text_encoder=tiny.text_encoder())  # for its dtype
    pipe.vae.decode = lambda latents, **_: (latents,)  # the pipeline cannot return latents
    del call["height"], call["width"]
    return pipe, {**call, "prompt": "a monkey dances", "output_type": "pt"}


PIPELINES = {
    "qwen_image": from_text,
    "qwen_image img2img": partial(redrawn, "Img2Img", "image"),
    "qwen_image inpaint": partial(redrawn, "Inpaint", "image", "mask_image"),
    "qwen_image edit": partial(edited, diffusers.QwenImageEditPipeline, tiny.still(64, 64)),
    "qwen_image edit inpaint": edited_in_part,
    "qwen_image edit plus": partial(
        edited, diffusers.QwenImageEditPlusPipeline, [tiny.still(64, 64), tiny.still(64, 96)]
    ),
    "qwen_image layered": taken_apart,
    "qwen_image controlnet": partial(guided, "ControlNet", 0, "control_image"),
    "qwen_image controlnet inpaint": partial(
        guided, "ControlNetInpaint", 4, "control_image", "control_mask"
    ),
}
