"""MiniMax-H3: video and sound in one packed sequence, text first; text, frames or references to it.

All rows attend to all: [text, conditions, sound, video]. What a row is, and where it stands, are
arguments of the forward; the coordinates of the rows behind all sound tell the grid. Tokens are
packed in the forward, so they come in at the first block; two heads read all rows, and only that of
the video asks for raster order.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_minimax_h3 import (
    MiniMaxH3AttnProcessor,
    MiniMaxH3Transformer3DModel,
)
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.kept import Kept
from vidsparse.pipelines.processor import SparseProcessor

_by_coordinates: Kept[TokenGrid] = Kept()


class MiniMaxH3SparseProcessor(SparseProcessor, MiniMaxH3AttnProcessor):
    """`MiniMaxH3AttnProcessor` with block-sparse attention."""


def self_attention(transformer: Any) -> list[Any]:
    """Of every block; the token refiner's is over the text alone."""
    return [block.attn for block in transformer.transformer_blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """As the arguments that describe the rows tell it."""
    names = ("position_ids", "video_indices", "audio_indices", "text_indices")
    rows: tuple[Tensor, ...] = tuple(arguments[name] for name in names)
    return _by_coordinates.get(rows, lambda: grid_of(*rows))


def grid_of(position_ids: Tensor, video: Tensor, audio: Tensor, text: Tensor) -> TokenGrid:
    """Of rows with the coordinates [rows, 3]: time, y, x. Waits for the device.

    video, audio, text: where the rows of each kind stand. Raises ValueError unless the text is
    first and the video last, in raster order.
    """
    kinds = [set(kind.tolist()) for kind in (text, audio, video)]
    rows, words = len(position_ids), len(kinds[0])
    first = 1 + max(kinds[0] | kinds[1], default=-1)
    behind = set(range(first, rows))
    if kinds[0] != set(range(words)) or not behind or not behind <= kinds[2]:
        raise ValueError(_UNKNOWN)
    time, y, x = position_ids[first:].T.cpu()
    height, width = len(y.unique()), len(x.unique())
    plane = height * width
    views = ((time[::plane], (-1, 1, 1)), (y[:plane:width], (1, -1, 1)), (x[:width], (1, 1, -1)))
    if len(behind) % plane or not all(
        (coordinate.view(-1, height, width) == axis.view(view)).all()
        for coordinate, (axis, view) in zip((time, y, x), views, strict=True)
    ):
        raise ValueError(_UNKNOWN)
    return TokenGrid(len(behind) // plane, height, width, before=first - words)


_UNKNOWN = (
    "position_ids, video_indices, audio_indices and text_indices are not those of text, then "
    "conditions and sound, then whole frames of video in raster order: vidsparse cannot tell the "
    "latent video; restore_pipeline first"
)

ROWS = 0
"""Axis of what describes the rows."""

ADAPTER = Adapter(
    pipelines=("MiniMaxH3ModularPipeline",),
    components=("transformer", "transformer_ref"),
    transformer=MiniMaxH3Transformer3DModel,
    sparse=(MiniMaxH3SparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("input", "transformer_blocks.0", 1, joint=True),
        Site("output", "rope", ROWS, joint=True),
        Site("argument", "timestep_indices", ROWS, joint=True),
        Site("argument", "token_tags", ROWS, joint=True),
    ),
    exit=Site("input", "proj_out", 1, joint=True),
    split=Split(together=True),
    text="first",
)
