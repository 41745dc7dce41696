"""HunyuanVideo 1.5: text or image to video; text of two encoders and of an image behind the video.

The transformer sorts these rows of each sample: first the real ones of image, glyphs and prompt,
then the padding of all three. Without an image, its rows are padding. Each block makes a mask of
queries and keys from this, which says no more.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor

from vidsparse.pipelines.adapter import Adapter, Arguments, RealText, Site
from vidsparse.pipelines.families.hunyuan_video import grid
from vidsparse.pipelines.processor import SparseProcessor

COMPRESSION, TARGET = 16, 640
"""Pixels of a side per latent, and the length of both sides of a square video, by default."""


class HunyuanVideo15SparseProcessor(SparseProcessor, HunyuanVideo15AttnProcessor2_0):
    """`HunyuanVideo15AttnProcessor2_0` with block-sparse attention."""


def self_attention(transformer: Any) -> list[Any]:
    """Of every block."""
    return [block.attn for block in transformer.transformer_blocks]


def real_rows(prompt: Tensor, glyphs: Tensor, image: Tensor) -> Tensor:
    """Real text rows of each sample; an image that is all zero stands for none."""
    image_rows = image.shape[1] * int(image.any())
    return prompt.bool().sum(1) + glyphs.bool().sum(1) + image_rows


def own_size(config: Arguments, picture: tuple[int, int]) -> tuple[int, int]:
    """What the pipeline that starts from an image makes of one of this height and width."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    height, width = HunyuanVideo15ImageProcessor(
        vae_scale_factor=COMPRESSION
    ).calculate_default_height_width(*picture, config.get("target_size") or TARGET)
    return int(height), int(width)


ADAPTER = Adapter(
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    components=("transformer",),
    transformer=HunyuanVideo15Transformer3DModel,
    sparse=(HunyuanVideo15SparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(Site("output", "x_embedder", 1), Site("output", "rope", 0)),
    exit=Site("input", "proj_out", 1),
    text="last",
    real_text=RealText(
        ("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"), real_rows
    ),
    own_size=own_size,
)
