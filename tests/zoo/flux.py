"""FLUX.1: an image alone, with a reference behind it, and with residuals of a ControlNet."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import tiny
import torch
from torch import Tensor

import zoo

WIDTH = 16
IMAGES = ((1, 12, 12), (1, 9, 11))


def model(heads: int, head_dim: int, **options: Any) -> Any:
    quarter = head_dim // 4
    return diffusers.FluxTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=8,
        axes_dims_rope=(2 * quarter, quarter, quarter),
        **{"in_channels": 4, **options},
    )


def places(height: int, width: int, image: int = 0, axes: int = 3) -> Tensor:
    """Image, row and column of each token; further axes are 0."""
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    _, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, height * width, 4),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "pooled_projections": zoo.noise(batch, 8),
        "timestep": zoo.times(batch) / 1000,
        "img_ids": places(height, width),
        "txt_ids": torch.zeros(zoo.TEXT, 3),
    }


def kontext(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """The ids have a batch axis, as older pipelines make them."""
    _, height, width = grid
    alone = arguments(model, grid, batch)
    both = torch.cat([alone["img_ids"], places(7, 5, image=1)])
    return {
        **alone,
        "hidden_states": zoo.noise(batch, height * width + 35, 4),
        "img_ids": both.expand(batch, -1, -1),
        "txt_ids": alone["txt_ids"].expand(batch, -1, -1),
    }


def controlled(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    tokens, width = grid[1] * grid[2], model.inner_dim
    return {
        **arguments(model, grid, batch),
        "controlnet_block_samples": [zoo.noise(batch, tokens, width, seed=4)],
        "controlnet_single_block_samples": [zoo.noise(batch, tokens, width, seed=5)],
    }


ALONE = ("hidden_states", "img_ids")
CASES = [
    zoo.Case("flux", model, arguments, grids=IMAGES, controls=ALONE),
    zoo.Case("flux kontext", model, kontext, grids=IMAGES, controls=ALONE),
    zoo.Case("flux controlnet", model, controlled, grids=IMAGES),
]


def vae() -> Any:
    return tiny.seeded(
        lambda: diffusers.AutoencoderKL(
            latent_channels=1, block_out_channels=(8,), norm_num_groups=2, shift_factor=0.0
        )
    )


PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def pipeline(
    kind: Any, batch: int = 2, channels: int = 4, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """channels: of the transformer's input, if a control image or a mask stands in some."""
    pipe = kind(
        transformer=zoo.lively(model(2, 16, in_channels=channels, out_channels=4)),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(PARTS),
        **more.pop("components", {}),
    )
    prompts = zoo.prompts(batch, WIDTH, mask="mask")
    call = {
        "prompt_embeds": prompts["prompt_embeds"],
        "negative_prompt_embeds": prompts["negative_prompt_embeds"],
        "pooled_prompt_embeds": zoo.noise(batch, 8, seed=5),
        "negative_pooled_prompt_embeds": zoo.noise(batch, 8, seed=6),
        "true_cfg_scale": 2.0,
        "height": 20,
        "width": 20,
        "num_inference_steps": zoo.STEPS,
        **more,
    }
    known = inspect.signature(kind.__call__).parameters
    return pipe, {name: value for name, value in call.items() if name in known or name in more}


def from_text() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.FluxPipeline)


NO_ADAPTER = {"image_encoder": None, "feature_extractor": None}


def edited() -> tuple[Any, dict[str, Any]]:
    kind, image = diffusers.FluxKontextPipeline, tiny.still(12, 16)
    return pipeline(
        kind, components=NO_ADAPTER, batch=1, image=image, max_area=400, _auto_resize=False
    )


def controlnet() -> Any:
    """With a residual for each block."""
    net = tiny.seeded(
        lambda: diffusers.FluxControlNetModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=8,
            axes_dims_rope=(8, 4, 4),
        )
    )
    return {"controlnet": zoo.lively(net)}


def from_images(
    kind: str, *images: str, parts: Callable[[], dict[str, Any]] = dict, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """Three of four steps, where a pipeline starts from an image."""
    cls = getattr(diffusers, f"Flux{kind}Pipeline")
    given = {name: tiny.still(20, 20) for name in images}
    if "strength" in inspect.signature(cls.__call__).parameters:
        given["strength"] = 0.8
    return pipeline(cls, components=parts(), batch=1, **given, **more)


without_adapter = partial(dict, NO_ADAPTER)


def guided() -> dict[str, Any]:
    return {**NO_ADAPTER, **controlnet()}


MASKED = ("image", "mask_image")
CONTROLLED = ("image", "control_image")
PIPELINES = {
    "flux": from_text,
    "flux kontext": edited,
    "flux kontext inpaint": partial(
        from_images,
        "KontextInpaint",
        *MASKED,
        parts=without_adapter,
        max_area=400,
        _auto_resize=False,
    ),
    "flux img2img": partial(from_images, "Img2Img", "image", parts=without_adapter),
    "flux inpaint": partial(from_images, "Inpaint", *MASKED, parts=without_adapter),
    "flux fill": partial(from_images, "Fill", *MASKED, channels=12),
    "flux control": partial(from_images, "Control", "control_image", channels=8),
    "flux control img2img": partial(from_images, "ControlImg2Img", *CONTROLLED, channels=8),
    "flux control inpaint": partial(
        from_images, "ControlInpaint", *MASKED, "control_image", channels=8
    ),
    "flux controlnet": partial(from_images, "ControlNet", "control_image", parts=guided),
    "flux controlnet img2img": partial(
        from_images, "ControlNetImg2Img", *CONTROLLED, parts=controlnet
    ),
    "flux controlnet inpaint": partial(
        from_images, "ControlNetInpaint", *MASKED, "control_image", parts=controlnet
    ),
}
