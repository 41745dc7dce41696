"""Qwen-Image: text, with padding, before the image; images to edit behind it.

In the layered model, the layers of the image are its frames, and the last image of `img_shapes` is
the given one.
"""

from __future__ import annotations

from math import prod
from typing import Any

from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformer2DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, RealText, Site, Split
from vidsparse.pipelines.families.hunyuan_video15 import self_attention
from vidsparse.pipelines.processor import SparseProcessor


class QwenImageSparseProcessor(SparseProcessor, QwenDoubleStreamAttnProcessor2_0):
    """`QwenDoubleStreamAttnProcessor2_0` with block-sparse attention."""


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The first image of `img_shapes`, or all layers; other images are rows behind it."""
    shapes = arguments["img_shapes"]
    images = shapes[0] if isinstance(shapes, list) else shapes
    images = images if isinstance(images, list) else [images]
    own, others = images[:1], images[1:]
    if transformer.config.use_layer3d_rope and len(images) > 1:
        own, others = images[:-1], images[-1:]
    if len(set(map(tuple, own))) > 1:
        raise ValueError(f"img_shapes={shapes}: expected layers of one size, then the given image")
    frames, height, width = own[0]
    return TokenGrid(len(own) * frames, height, width, after=sum(map(prod, others)))


def cuts(transformer: Any, arguments: Arguments, grid: TokenGrid) -> tuple[int, ...]:
    """After the first image, where all behind it is modulated as for timestep 0."""
    return (1,) if transformer.config.zero_cond_t and grid.frames > 1 else ()


def not_split(transformer: Any, arguments: Arguments) -> str:
    """Residuals of a ControlNet."""
    name = "controlnet_block_samples"
    return name if arguments.get(name) is not None else ""


ADAPTER = Adapter(
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    ),
    components=("transformer",),
    transformer=QwenImageTransformer2DModel,
    sparse=(QwenImageSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("argument", "hidden_states", 1),
        Site("output", "pos_embed", 0, items=(0,)),
        Site("argument", "controlnet_block_samples", 1, optional=True),
    ),
    exit=Site("input", "proj_out", 1),
    split=Split(cuts=True, lacks=not_split),
    text="first",
    real_text=RealText(("encoder_hidden_states_mask",), lambda mask: mask.bool()),
    cuts=cuts,
)
