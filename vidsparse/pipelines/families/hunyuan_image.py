"""HunyuanImage 2.1 and its refiner: text behind the image, with padding.

The image is a latent of two axes, or in the refiner of three. With text of a second encoder, the
transformer sorts both: first the real rows of either, then the padding.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_hunyuanimage import (
    HunyuanImageAttnProcessor,
    HunyuanImageTransformer2DModel,
)
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, RealText, Site
from vidsparse.pipelines.families.hunyuan_video import self_attention
from vidsparse.pipelines.processor import SparseProcessor


class HunyuanImageSparseProcessor(SparseProcessor, HunyuanImageAttnProcessor):
    """`HunyuanImageAttnProcessor` with block-sparse attention."""


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent [B, C, (frames,) height, width] in patches."""
    second = arguments.get("encoder_attention_mask_2") is not None
    if second and (transformer.context_embedder_2 is None or not _has_second(arguments)):
        raise ValueError(
            "encoder_attention_mask_2 is given, but this transformer gets no second text, so it "
            "would not look at it: call it without that mask"
        )
    sizes, patch = arguments["hidden_states"].shape[2:], transformer.config.patch_size
    *frames, height, width = (size // p for size, p in zip(sizes, patch, strict=True))
    return TokenGrid(frames[0] if frames else 1, height, width)


def _has_second(arguments: Arguments) -> bool:
    return arguments.get("encoder_hidden_states_2") is not None


def real_rows(mask: Tensor, second: Tensor | None) -> Tensor:
    """The rows that the mask names; with a second text, how many of both."""
    return mask.bool() if second is None else mask.bool().sum(1) + second.bool().sum(1)


ADAPTER = Adapter(
    pipelines=("HunyuanImagePipeline", "HunyuanImageRefinerPipeline"),
    components=("transformer",),
    transformer=HunyuanImageTransformer2DModel,
    sparse=(HunyuanImageSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(Site("output", "x_embedder", 1), Site("output", "rope", 0)),
    exit=Site("input", "proj_out", 1),
    text="last",
    real_text=RealText(("encoder_attention_mask", "encoder_attention_mask_2"), real_rows),
)
