"""HunyuanVideo Framepack: image to video in sections, each after its history.

Self-attention is over [history at a quarter, at half, and at full size; video; image and text].
History rows keep their order before the video, and leave the sequence before the last projection.
The rotary module is called for the video first, then for each part of the history. Text is cut to
its real rows if there is one sample, and masked if there are more.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

from diffusers.models.transformers.transformer_hunyuan_video_framepack import (
    HunyuanVideoFramepackTransformer3DModel,
)
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, RealText, Site
from vidsparse.pipelines.families import hunyuan_video

HISTORY = {
    "latents_clean": "proj",
    "latents_history_2x": "proj_2x",
    "latents_history_4x": "proj_4x",
}
"""Arguments of the forward -> convolutions of `clean_x_embedder` that embed them."""


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, C, frames, height, width] in patches, after its history."""
    before = 0
    for name, projection in HISTORY.items():
        latents = arguments.get(name)
        if latents is not None:
            patch = getattr(transformer.clean_x_embedder, projection).kernel_size
            frames, height, width = map(_patches, latents.shape[2:], patch)
            before += frames * height * width
    return replace(hunyuan_video.grid(transformer, arguments), before=before)


def _patches(size: int, patch: int) -> int:
    return ceil(size / patch)


def real_rows(mask: Tensor, image: Tensor) -> Tensor:
    """The image's rows, and after them so many of the text."""
    return image.shape[1] + hunyuan_video.real_rows(mask)


ADAPTER = Adapter(
    pipelines=("HunyuanVideoFramepackPipeline",),
    components=("transformer",),
    transformer=HunyuanVideoFramepackTransformer3DModel,
    sparse=(hunyuan_video.HunyuanVideoSparseProcessor,),
    self_attention=hunyuan_video.self_attention,
    grid=grid,
    entries=(Site("output", "x_embedder", 1), Site("output", "rope", 0, once=True)),
    exit=Site("input", "proj_out", 1),
    text="last",
    real_text=RealText(("encoder_attention_mask", "image_embeds"), real_rows),
)
