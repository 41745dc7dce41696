"""Wan 2.1 and 2.2: text, image or video to video, one or two transformers, per-token timesteps.

Self-attention (`attn1` of each block) is over the video alone. Text and image enter through
cross-attention (`attn2`), which stays untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from vidsparse.pipelines import Adapter, PerToken
from vidsparse.pipelines.processor import SparseProcessor
from vidsparse.plan import TokenGrid


class WanSparseProcessor(SparseProcessor, WanAttnProcessor):
    """`WanAttnProcessor` with block-sparse self-attention."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As the stock processor: hidden_states [B, tokens, C] -> [B, tokens, C]."""
        arguments = (hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if self.link is None or encoder_hidden_states is not None:
            out: Tensor = WanAttnProcessor.__call__(self, attn, *arguments)
            return out
        out = self.run(attn, *arguments)
        return out


def skipped(attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Output of self-attention when layer-skip guidance leaves it out."""
    return hidden_states


AttentionProcessorRegistry.register(  # layer-skip guidance looks processors up by exact class
    WanSparseProcessor, AttentionProcessorMetadata(skip_processor_output_fn=skipped)
)


def self_attention(transformer: nn.Module) -> list[Any]:
    """`attn1` of every block."""
    modules = transformer.modules()
    return [m for m in modules if isinstance(m, WanAttention) and not m.is_cross_attention]


def grid(transformer: Any, arguments: Mapping[str, Any]) -> TokenGrid:
    """The latent video [B, C, frames, height, width] in patches."""
    shape = tuple(arguments["hidden_states"].shape)
    if len(shape) != 5:
        raise ValueError(
            f"hidden_states.shape={shape}: expected [batch, channels, frames, height, width]"
        )
    patch = transformer.config.patch_size
    return TokenGrid(*(size // p for size, p in zip(shape[2:], patch, strict=True)))


ADAPTER = Adapter(
    pipelines=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanModularPipeline",
    ),
    components=("transformer", "transformer_2"),
    transformer=WanTransformer3DModel,
    stock=WanAttnProcessor,
    sparse=WanSparseProcessor,
    self_attention=self_attention,
    grid=grid,
    embeddings=("patch_embedding",),
    rope="rope",
    rope_axis=1,
    output="proj_out",
    per_token=(PerToken("timestep", "condition_embedder", outputs=(0, 1)),),
    branch_order={"WanVideoToVideoPipeline": ("cond", "uncond")},
)
