"""FLUX.1: text before the image, and in Kontext a reference image behind it.

What the transformer gets tells the size of the image only by the values of `img_ids`, which say for
each row which image it is of, its row and its column there. They are read once a run.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.kept import Kept
from vidsparse.pipelines.processor import SparseProcessor


class FluxSparseProcessor(SparseProcessor, FluxAttnProcessor):
    """`FluxAttnProcessor` with block-sparse attention."""


def self_attention(transformer: Any) -> list[Any]:
    """Of the double blocks, then of the single ones."""
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    return [block.attn for block in blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The first image of `img_ids`; the others are rows behind it.

    Raises ValueError if it does not stand in raster order, and for a mask of attention.
    """
    if (arguments.get("joint_attention_kwargs") or {}).get("attention_mask") is not None:
        raise ValueError(
            "joint_attention_kwargs has an attention_mask: vidsparse cannot bring it into the "
            "order of the tokens; call without it, or restore_pipeline first"
        )
    if torch.compiler.is_exporting():
        raise ValueError(
            f"a {type(transformer).__name__} tells its grid only by the values of img_ids, which "
            "an exported program does not have: restore_pipeline before the export"
        )
    ids = arguments["img_ids"]
    return _grids.get((ids,), lambda: _read(ids))


_grids: Kept[TokenGrid] = Kept()


def _read(ids: Tensor) -> TokenGrid:
    """The grid that ids [(B,) rows, 3 or 4] tell; waits for the device."""
    places = ids.reshape(-1, *ids.shape[-2:])[0, :, :3].cpu().long()
    of_first = places[:, 0] == places[0, 0]
    rows = int(of_first.long().cumprod(0).sum())
    image = places[:rows, 1:]
    height, width = (image.amax(0) + 1).tolist()
    if not torch.equal(image, torch.cartesian_prod(torch.arange(height), torch.arange(width))):
        raise ValueError(
            f"img_ids: the first {rows} rows are of one image, but are not those of {height} x "
            f"{width} tokens, row by row from its upper left; restore_pipeline first"
        )
    return TokenGrid(1, height, width, after=len(places) - rows)


def not_split(transformer: Any, arguments: Arguments) -> str:
    """Residuals of a ControlNet; coordinates with a batch, which diffusers has deprecated."""
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if arguments.get(name) is not None:
            return name
    return "img_ids with a batch" if arguments["img_ids"].ndim > 2 else ""


ADAPTER = Adapter(
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    components=("transformer",),
    transformer=FluxTransformer2DModel,
    sparse=(FluxSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("argument", "hidden_states", 1),
        Site("argument", "img_ids", -2),
        Site("argument", "controlnet_block_samples", 1, optional=True),
        Site("argument", "controlnet_single_block_samples", 1, optional=True),
    ),
    exit=Site("input", "proj_out", 1),
    split=Split(lacks=not_split),
    text="first",
    packed=2,
)
