"""Motif-Video: text or image to video; image rows and text, with padding, behind the video.

The last single blocks decode: they attend over the embedded video and, where the text stood, over
the video as the blocks before have left it, in the same order. For them this copy is no text, but
rows to be chosen among. Text cross-attention beside self-attention stays untouched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_motif_video import (
    MotifVideoAttnProcessor2_0,
    MotifVideoTransformer3DModel,
)
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, RealText, Site
from vidsparse.pipelines.families.hunyuan_video import grid, self_attention
from vidsparse.pipelines.processor import SparseProcessor


class MotifVideoSparseProcessor(SparseProcessor, MotifVideoAttnProcessor2_0):
    """`MotifVideoAttnProcessor2_0` with block-sparse attention."""


def sequence(transformer: Any, grid: TokenGrid, tokens: int, layer: int) -> TokenGrid:
    """Video and text, or in decoder blocks the video twice."""
    layers = len(self_attention(transformer))
    if layer < layers - transformer.num_decoder_layers:
        return replace(grid, text_tokens=tokens - grid.video_tokens)
    both = replace(grid, after=grid.video_tokens)
    both.check(tokens)
    return both


def real_rows(mask: Tensor, image: Tensor | None) -> Tensor:
    """All rows of the image, and those of the text that the mask, of any pattern, names."""
    image_rows = 0 if image is None else image.shape[1]
    return torch.nn.functional.pad(mask.bool(), (image_rows, 0), value=True)


ADAPTER = Adapter(
    pipelines=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
    components=("transformer",),
    transformer=MotifVideoTransformer3DModel,
    sparse=(MotifVideoSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(Site("output", "x_embedder", 1), Site("output", "rope", 0)),
    exit=Site("input", "proj_out", 1),
    text="last",
    real_text=RealText(("encoder_attention_mask", "image_embeds"), real_rows),
    sequence=sequence,
)
