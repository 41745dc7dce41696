"""HunyuanVideo: text or image to video, SkyReels-V1; text behind the video, with padding.

Double and single blocks attend over video and text together. Where an image gives the first frame
(`token_replace`), blocks modulate it apart from the rest, by its place.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, RealText, Site, Split
from vidsparse.pipelines.private import ContextParallelInput, ContextParallelOutput
from vidsparse.pipelines.processor import SparseProcessor


class HunyuanVideoSparseProcessor(SparseProcessor, HunyuanVideoAttnProcessor2_0):
    """`HunyuanVideoAttnProcessor2_0` with block-sparse attention."""


def self_attention(transformer: Any) -> list[Any]:
    """Of the double blocks, then of the single ones."""
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    return [block.attn for block in blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, C, frames, height, width] in patches."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    deep, wide = transformer.config.patch_size_t, transformer.config.patch_size
    return TokenGrid(frames // deep, height // wide, width // wide)


def cuts(transformer: Any, arguments: Arguments, grid: TokenGrid) -> tuple[int, ...]:
    """After the frame of a given image."""
    apart = transformer.config.image_condition_type == "token_replace"
    return (1,) if apart and grid.frames > 1 else ()


def real_rows(mask: Tensor) -> Tensor:
    """So many rows of the text; the mask may be of a float type that cannot count so far."""
    return mask.sum(1, dtype=torch.int64)


PLAN = {
    "rope": {n: ContextParallelInput(0, expected_dims=2, split_output=True) for n in (0, 1)},
    "transformer_blocks.0": dict.fromkeys(
        ("hidden_states", "encoder_hidden_states"), ContextParallelInput(1, expected_dims=3)
    ),
    "proj_out": ContextParallelOutput(1, expected_dims=3),
}
"""Text and video each by itself. The mask of all keys stays whole: stock attention, which does not
sort the shares of the processes, takes it wrong."""

ADAPTER = Adapter(
    pipelines=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    ),
    components=("transformer",),
    transformer=HunyuanVideoTransformer3DModel,
    sparse=(HunyuanVideoSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(Site("output", "x_embedder", 1), Site("output", "rope", 0)),
    exit=Site("input", "proj_out", 1),
    split=Split(PLAN),
    text="last",
    real_text=RealText(("encoder_attention_mask",), real_rows),
    cuts=cuts,
)
