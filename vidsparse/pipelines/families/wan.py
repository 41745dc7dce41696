"""Wan 2.1 and 2.2: text, image or video to video, one or two transformers, per-token timesteps.

Self-attention (`attn1` of each block) is over the video alone. Text and image enter through
cross-attention (`attn2`), which stays untouched. Lucy-Edit is such a transformer with the given
video in further channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.processor import SparseProcessor


class WanSparseProcessor(SparseProcessor, WanAttnProcessor):
    """`WanAttnProcessor` with block-sparse self-attention."""


def attention_over_video(cls: Any) -> Callable[[Any], list[Any]]:
    """Transformer -> the modules of an attention class that attend over the video itself, `attn1`
    of every block; for relatives, which have a class of their own."""

    def found(transformer: Any) -> list[Any]:
        modules = transformer.modules()
        return [m for m in modules if isinstance(m, cls) and not m.is_cross_attention]

    return found


self_attention = attention_over_video(WanAttention)


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, C, frames, height, width] in patches."""
    shape = tuple(arguments["hidden_states"].shape)
    if len(shape) != 5:
        raise ValueError(
            f"hidden_states.shape={shape}: expected [batch, channels, frames, height, width]"
        )
    patch = transformer.config.patch_size
    return TokenGrid(*(size // p for size, p in zip(shape[2:], patch, strict=True)))


VIDEO = (Site("output", "patch_embedding", (2, 3, 4)), Site("output", "rope", 1))

ADAPTER = Adapter(
    pipelines=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanModularPipeline",
        "LucyEditPipeline",
    ),
    components=("transformer", "transformer_2"),
    transformer=WanTransformer3DModel,
    sparse=(WanSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(*VIDEO, Site("output", "condition_embedder", 1, items=(0, 1), dims=3)),
    exit=Site("input", "proj_out", 1),
    split=Split(entries=(*VIDEO, Site("argument", "timestep", 1, dims=2))),
    branch_order={"WanVideoToVideoPipeline": ("cond", "uncond")},
)
