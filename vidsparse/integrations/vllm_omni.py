"""vLLM-Omni: an attention backend, registered by a plugin in the place of one of its own.

    VIDSPARSE_PRESET=tiles DIFFUSION_ATTENTION_BACKEND=RAINFUSION_ATTN vllm serve ... --omni

vLLM-Omni selects backends by the members of an enum, and a plugin may override what a member
stands for; it cannot add one. `MEMBER` is sparse attention that any model may select and that runs
on Ascend NPUs alone, so nobody loses it on a GPU. Without VIDSPARSE_PRESET it stays what it is.

Facts, of the published sources of 2026 (`vllm_omni/diffusion/attention/backends/abstract.py` and
`registry.py`, `vllm_omni/diffusion/forward_context.py`):

    plugin        the entry point group `vllm_omni.general_plugins`, called in every process
    tensors       [B, rows, H, D]; behind its Ulysses exchange, so all rows and some heads
    grid          `AttentionMetadata.video_layout`: prefix_len rows (text, conditions, sound), then
                  latent_grid t x h x w, then padding; a layout of several videos has neither, and
                  stays dense. In 0.30.0 Wan 2.2 and MiniMax-H3 have one. Without, the latents and
                  patches of the forward context, where a release tells them, if they are all of the
                  rows: then there is no text among them
    step          denoise_step_idx and total_denoise_steps of the forward context
    layer         a number in the prefix of the layer
    dense calls   TORCH_SDPA of vLLM-Omni itself, with the metadata

Cross-attention (keys of another length), causal layers, masks without a layout, in whatever form
the metadata has them (`UNUSUAL`, `PACKED`), other scales and calls outside of a denoising step are
dense. Ring attention is refused, for the reason in
`vidsparse.pipelines.parallel`.

Not verified: none of this has run inside vLLM-Omni, whose package needs a GPU; it is tested against
stubs of those signatures, which were compared with the sources in the wheel of release 0.30.0.
That a server's warm-up, graph capture and torch.compile take
`sparse_attention`, which is a graph break, is unknown: start it with eager execution. The prefix is
read as text, exactly, and the rows of the video as one video.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from math import prod
from typing import Any

from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.integrations import served

MEMBER = "RAINFUSION_ATTN"
DENSE = "TORCH_SDPA"
UNUSUAL = ("joint_query", "full_attn_spans", "query_ranges")
"""Fields of the metadata of calls that are not one video in one attention."""
PACKED = ("attn_mask", "packed_padding")
PADDED = frozenset(("valid_kv_length", "cu_seqlens_q", "cu_seqlens_k"))
"""Fields of the metadata, and entries of its `extra`, that say which rows are padding, as a layout
does, too."""
REGISTRY = "vllm_omni.diffusion.attention.backends.registry"
ABSTRACT = "vllm_omni.diffusion.attention.backends.abstract"
CONTEXT = "vllm_omni.diffusion.forward_context"


def register() -> None:
    """The entry point: have `MEMBER` mean `Backend` in this process, if settings are asked for."""
    if served.asked() is None:
        return
    registry = import_module(REGISTRY)
    member = registry.DiffusionAttentionBackendEnum[MEMBER]
    registry.register_diffusion_backend(member, f"{__name__}.Backend")


def __getattr__(name: str) -> Any:
    """`Backend` and `Impl`, made when the server asks for them: their bases are its classes."""
    if name not in ("Backend", "Impl"):
        raise AttributeError(name)
    abstract = import_module(ABSTRACT)
    impl = type("Impl", (Sparse, abstract.AttentionImpl), {"__module__": __name__})
    backend = type("Backend", (Facts, abstract.AttentionBackend), {"__module__": __name__})
    globals().update(Impl=impl, Backend=backend)
    return globals()[name]


class Facts:
    """What the server asks a backend."""

    accept_output_buffer = False

    @staticmethod
    def get_name() -> str:
        return MEMBER

    @staticmethod
    def get_impl_cls() -> Any:
        return import_module(__name__).Impl

    @staticmethod
    def get_metadata_cls() -> Any:
        return import_module(ABSTRACT).AttentionMetadata

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []  # any: what has no kernel runs dense, and says so

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        return True  # masked calls go to the dense backend


class Sparse(served.Layer):
    """Attention of one layer."""

    member = MEMBER

    @staticmethod
    def dense_class() -> Any:
        member = import_module(REGISTRY).DiffusionAttentionBackendEnum[DENSE]
        return member.get_class().get_impl_cls()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Any:
        """[B, rows, H, D] each."""
        grid = self.grid(query, key, attn_metadata)
        context = import_module(CONTEXT).get_forward_context() if grid is not None else None
        if grid is None or context is None:
            return self.dense.forward(query, key, value, attn_metadata)
        parallel = getattr(context.omni_diffusion_config, "parallel_config", None)
        if getattr(parallel, "ring_degree", 1) > 1:
            raise ValueError(
                "ring attention shows each process one chunk of the keys at a time, so blocks "
                "could not be chosen among all: use ulysses_degree in vLLM-Omni"
            )
        layer = served.layer_of(self.prefix)
        at = served.where(context.denoise_step_idx, context.total_denoise_steps, layer)
        if at is None:
            return self.dense.forward(query, key, value, attn_metadata)
        return served.attend(query, key, value, grid, at, self.config)

    forward_cuda = forward_hip = forward_xpu = forward

    def grid(self, query: Tensor, key: Tensor, metadata: Any) -> TokenGrid | None:
        """Of a self-attention call over a video; None for all other calls."""
        rows = query.shape[1]
        if not self.usual or key.shape[1] != rows:
            return None
        if any(getattr(metadata, name, None) is not None for name in UNUSUAL):
            return None
        layout = getattr(metadata, "video_layout", None)
        if layout is not None:
            if layout.latent_grid is None or layout.prefix_len is None:
                return None
            video = TokenGrid.of(tuple(layout.latent_grid))
            found = replace(video, text_tokens=layout.prefix_len, text_first=True)
            told = getattr(layout, "used_len", None)
            whole = found.tokens <= rows and told in (None, found.tokens)
            return found if whole else None
        packed = any(getattr(metadata, name, None) is not None for name in PACKED)
        if packed or PADDED & {*(getattr(metadata, "extra", None) or {})}:
            return None
        contexts = import_module(CONTEXT)
        if not contexts.is_forward_context_available():
            return None
        context = contexts.get_forward_context()
        latents, patch = (getattr(context, name, None) for name in ("latent_shape", "patch_size"))
        if latents is None or patch is None:
            return None
        sizes = tuple(size // side for size, side in zip(latents, patch, strict=True))
        return TokenGrid.of(sizes) if prod(sizes) == rows else None
