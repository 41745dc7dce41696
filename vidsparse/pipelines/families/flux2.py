"""FLUX.2 and FLUX.2 Klein: text before the image, reference images behind it.

Double and single blocks have attention modules of two classes, and Klein KV sets processors of two
more. These are stock ones until their cache of reference keys is used, which is refused: it splits
attention in functions of its own, in which our primitive would not be called.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttnProcessor,
    Flux2Transformer2DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.families import flux
from vidsparse.pipelines.processor import SparseProcessor


class Flux2SparseProcessor(SparseProcessor, Flux2AttnProcessor):
    """`Flux2AttnProcessor`, of double blocks, with block-sparse attention."""


class Flux2ParallelSparseProcessor(SparseProcessor, Flux2ParallelSelfAttnProcessor):
    """`Flux2ParallelSelfAttnProcessor`, of single blocks, with block-sparse attention."""


class Flux2KVSparseProcessor(SparseProcessor, Flux2KVAttnProcessor):
    """`Flux2KVAttnProcessor`, while no cache is used."""


class Flux2KVParallelSparseProcessor(SparseProcessor, Flux2KVParallelSelfAttnProcessor):
    """`Flux2KVParallelSelfAttnProcessor`, while no cache is used."""


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """As in FLUX.1. Raises ValueError if keys of references come from a cache or go into one."""
    mode = arguments.get("kv_cache_mode")
    if mode is not None:
        raise ValueError(
            f"kv_cache_mode={mode!r}: vidsparse does not know attention with a cache of reference "
            "keys; use the pipeline without reference images, one that has no cache "
            "(Flux2KleinPipeline), or restore_pipeline first"
        )
    return flux.grid(transformer, arguments)


ADAPTER = Adapter(
    pipelines=(
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
    ),
    components=("transformer",),
    transformer=Flux2Transformer2DModel,
    sparse=(
        Flux2SparseProcessor,
        Flux2ParallelSparseProcessor,
        Flux2KVSparseProcessor,
        Flux2KVParallelSparseProcessor,
    ),
    self_attention=flux.self_attention,
    grid=grid,
    entries=(Site("argument", "hidden_states", 1), Site("argument", "img_ids", -2)),
    exit=Site("input", "proj_out", 1),
    split=Split(),
    text="first",
    packed=2,
)
